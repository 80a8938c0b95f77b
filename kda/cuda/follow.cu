/* The chunk forward by kernels that run at the same time. One prepares the tiles of all heads on some multiprocessors, the first
 * tiles of all before the second ones; another follows, a block on each multiprocessor that is left, walking over tiles that are
 * there. Tiles keep the places that they have in two passes, so those who prepare wait for nobody, and those who walk only for a
 * kernel that was launched before theirs: they find everything ready where the two do not overlap.
 *
 *     teller   there[its tiles] <- 0; when all of the block have done so, the walk may start
 *     group    wait vacant; prepare into stage; arrive at ready
 *     teller   wait ready; bulk store; arrive at vacant; when it is done, there[tile] <- 1
 *     watcher  wait taken, there; arrive at seen
 *     loader   wait seen; arrive at taken; bulk load into a slot, and so on as in walk_wide.cuh
 *
 * Preparing ends long before a walk over the whole sequence does. The multiprocessors that it leaves walk over the end of the
 * sequence, cut into parts, meanwhile: from zero state and from the columns of the identity, since a part is affine in the state
 * before it (join.cuh). What then remains is short, a launch a part.
 *
 * Who tells or asks another kernel is a warp of its own (persistent.cu). */
#include <algorithm>

#include "common/arena.h"
#include "common/gpu.h"
#include "kda/cuda/join.cuh"
#include "kda/cuda/prepare.cuh"
#include "kda/cuda/summary.cuh"

namespace {

/* Groups that prepare in a block, a warp each beside them; the walk's warps and one that watches. */
enum { GROUPS = 2, PREPARERS = GROUPS * (KDA_GROUP + 32), WALKERS = KDA_WIDE_THREADS + 32 };
enum { BATCH = 2 /* tiles that are asked for together */, AHEAD = 4 /* batches that are asked for ahead */, TELLERS = 1 + GROUPS /* their barrier */ };

/* Tiles of a sequence's first part and of each that follows, of which there are `later` at most. */
struct cut {
    int first, each, later;
};

struct work {
    kda_walk walk, inner; /* inner: with state tables of our own */
    kda_walk unit, no_v;  /* of the identity: KP columns whose outputs are Q, no columns of v */
    kda_tile_source source;
    unsigned char *tiles; /* [tile number][HV] */
    int *there;           /* [pairs][longest]: is the tile there? */
    int pairs;
    int longest, items;   /* tiles of the longest sequence, times pairs */
    cut parts;
    float *state, *B;     /* [later][pairs][K,V]: before a later part; after it, walked over from zero */
    float *M;             /* [later][pairs][KP KP] */
};

template <int KP> struct preparing {
    struct {
        alignas(128) unsigned char room[kda_prepare_room<KP>::bytes];
        alignas(128) unsigned char stage[kda_core_tile<KP>::bytes];
    } group[GROUPS];
    uint64_t ready[GROUPS], vacant[GROUPS], begun;
};

template <int KP> struct following {
    kda_wide_ring<KP, 5> walked;
    uint64_t seen[AHEAD], taken[AHEAD];
};

template <int KP> __device__ __forceinline__ unsigned char *tile_of(const work &p, const kda_path &path, int i)
{
    return p.tiles + (size_t)((path.place.tile + i) * p.walk.HV + path.head) * kda_core_tile<KP>::bytes;
}

__device__ __forceinline__ int begin_of(const cut &c, int part) { return part ? c.first + (part - 1) * c.each : 0; }
__device__ __forceinline__ int end_of(const cut &c, int part, int tiles) { return min(tiles, c.first + part * c.each); }

__device__ __forceinline__ int64_t size_of(const work &p) { return (int64_t)p.walk.K * p.walk.V; }
/* Of a later part. */
__device__ __forceinline__ float *state_of(const work &p, int part, int pair) { return p.state + ((int64_t)(part - 1) * p.pairs + pair) * size_of(p); }
__device__ __forceinline__ float *B_of(const work &p, int part, int pair) { return p.B + ((int64_t)(part - 1) * p.pairs + pair) * size_of(p); }
template <int KP> __device__ __forceinline__ float *M_of(const work &p, int part, int pair) { return p.M + ((int64_t)(part - 1) * p.pairs + pair) * KP * KP; }
__device__ __forceinline__ int64_t slot_of(const work &p, const kda_path &path) { return (path.slot * p.walk.HV + path.head) * size_of(p); }

/* ---- preparing ---- */

/* What a group works on, one after another: every (groups of the grid)-th tile of all pairs, pairs innermost. */
struct turn {
    kda_path path;
    int item, pair, tile;

    __device__ __forceinline__ turn(const work &p, int group) : item(group * (int)gridDim.x + (int)blockIdx.x) { find(p); }
    __device__ __forceinline__ bool there(const work &p) const { return item < p.items; }
    __device__ __forceinline__ void next(const work &p)
    {
        item += GROUPS * (int)gridDim.x;
        find(p);
    }
    /* The first one from here on that its sequence has. */
    __device__ __forceinline__ void find(const work &p)
    {
        for (; item < p.items; item += GROUPS * (int)gridDim.x) {
            tile = item / p.pairs;
            pair = item % p.pairs;
            path = kda_path_of(p.walk, pair);
            if (tile < path.tiles)
                return;
        }
    }
};

template <int KP> __device__ __forceinline__ void prepare(preparing<KP> &m, const work &p, int group, int thread)
{
    auto &own = m.group[group];
    turn at(p, group);
    kda_prepare_head<KP> head = {};
    kda_prepare_ahead ahead = {};
    kda_tile_rows rows = {};
    auto locate = [&] {
        const kda_sequences &s = p.walk.sequences;
        rows = kda_locate_rows(p.source, (int)at.path.head, at.path.place.begin + (int64_t)at.tile * s.tile, kda_tokens_of(s, at.path.place, at.tile), thread);
    };
    auto load = [&] {
        ahead = kda_prepare_load<KP>(p.source, rows, own.room, thread);
        head = kda_prepare_head_of<KP>(p.source, rows.hv, thread);
    };
    kl_grid_wait();
    bool more = at.there(p);
    if (more) {
        locate();
        load();
    } else if (group == 0 && thread == 0)
        kl_mbar_arrive(&m.begun);
    if (group > 0 && more)
        kl_mbar_wait(&m.begun, 0); /* the first group, alone and so faster, has made a tile that a walk waits for */
    for (int use = 0; more; use++) {
        int tokens = rows.tokens;
        at.next(p);
        more = at.there(p);
        if (more)
            locate();
        auto wait_for_stage = [&] {
            if (thread == 0)
                kl_mbar_wait(&m.vacant[group], (use & 1) ^ 1);
        };
        auto load_next = [&] {
            if (more)
                load();
        };
        kda_prepare_tile<kda_core_form<KP>>(p.source, head, ahead, tokens, own.room, own.stage, thread, 1 + group, wait_for_stage, load_next);
        if (thread == 0)
            kl_mbar_arrive(&m.ready[group]);
        if (thread == 0 && group == 0 && use == 0)
            kl_mbar_arrive(&m.begun);
    }
}

/* One warp: a group's tiles away. */
template <int KP> __device__ __forceinline__ void tell(preparing<KP> &m, const work &p, int group)
{
    kl_grid_wait();
    for (int i = (group + kl_lane() * GROUPS) * (int)gridDim.x + (int)blockIdx.x; i < p.items; i += 32 * GROUPS * (int)gridDim.x)
        p.there[i % p.pairs * p.longest + i / p.pairs] = 0;
    __threadfence();
    kl_barrier(TELLERS, 32 * GROUPS);
    kl_grid_release();
    if (kl_lane() > 0)
        return;
    turn at(p, group);
    for (int use = 0; at.there(p); use++, at.next(p)) {
        kl_mbar_wait(&m.ready[group], use & 1);
        kl_fence_async();
        kl_bulk_store(tile_of<KP>(p, at.path, at.tile), m.group[group].stage, kda_core_tile<KP>::bytes);
        kl_bulk_commit();
        kl_bulk_wait_read<0>();
        kl_mbar_arrive(&m.vacant[group]);
        kl_bulk_wait<0>();
        kl_fence_async();
        kl_store_release(&p.there[at.pair * p.longest + at.tile], 1);
    }
}

template <int KP> __global__ void __launch_bounds__(PREPARERS, 1) prepare_ahead(const __grid_constant__ work p)
{
    KL_SHARED(memory);
    preparing<KP> &m = *(preparing<KP> *)memory;
    int thread = (int)threadIdx.x, group = __shfl_sync(0xffffffffu, thread / KDA_GROUP, 0);
    if (thread == 0) {
        for (int g = 0; g < GROUPS; g++) {
            kl_mbar_init(&m.ready[g], 1);
            kl_mbar_init(&m.vacant[g], 1);
        }
        kl_mbar_init(&m.begun, 1);
        kl_mbar_init_fence();
    }
    __syncthreads();
    if (group < GROUPS)
        prepare<KP>(m, p, group, thread % KDA_GROUP);
    else
        tell<KP>(m, p, thread % KDA_GROUP / 32);
}

/* ---- walking ---- */

/* One warp: which batches of tiles [begin, end) are there, ahead of the loader, for whom the question would take longer than a tile.
 * The walk ends after those who prepare. */
template <int KP> __device__ __forceinline__ void watch(following<KP> &m, const work &p, int pair, int begin, int end)
{
    const int *there = p.there + (int64_t)pair * p.longest + kl_lane();
    for (int batch = 0, known = begin; begin + batch * BATCH < end; batch++) {
        int wanted = min(begin + (batch + 1) * BATCH, end);
        if (kl_lane() == 0)
            kl_mbar_wait(&m.taken[batch % AHEAD], (batch / AHEAD & 1) ^ 1);
        while (known < wanted) {
            uint32_t missing = ~__ballot_sync(0xffffffffu, known + kl_lane() < end && kl_load_acquire(there + known));
            known += missing ? __ffs(missing) - 1 : 32;
        }
        __syncwarp();
        if (kl_lane() == 0) {
            kl_fence_async();
            kl_mbar_arrive(&m.seen[batch % AHEAD]);
        }
    }
    kl_grid_wait();
}

/* A block: 64 columns of V of a part, or of the identity. Every head's first part comes before all others, which wait for room. */
template <int KP> __global__ void __launch_bounds__(WALKERS, 1) follow(const __grid_constant__ work p)
{
    KL_SHARED(memory);
    following<KP> &m = *(following<KP> *)memory;
    int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0), splits = (p.walk.V + KDA_WIDE_COLUMNS - 1) / KDA_WIDE_COLUMNS;
    int x = (int)blockIdx.x, part = 0;
    if (x >= p.pairs * splits) {
        x -= p.pairs * splits;
        splits += KP / KDA_WIDE_COLUMNS;
        part = 1 + x / (p.pairs * splits);
        x %= p.pairs * splits;
    }
    int pair = x / splits, column = KDA_WIDE_COLUMNS * (x % splits);
    bool of_V = column < p.walk.V;
    if (!of_V)
        column = KDA_WIDE_COLUMNS * (splits - 1 - x % splits);
    if (threadIdx.x == 0) {
        for (int i = 0; i < AHEAD; i++) {
            kl_mbar_init(&m.seen[i], 1);
            kl_mbar_init(&m.taken[i], 1);
        }
        kda_wide_init(m.walked);
    }
    __syncthreads();
    kda_path path = kda_path_of(p.walk, pair);
    kda_stretch at = {};
    at.begin = at.from = __shfl_sync(0xffffffffu, begin_of(p.parts, part), 0); /* known to be the same for all, as wgmma likes it */
    at.end = __shfl_sync(0xffffffffu, end_of(p.parts, part, path.tiles), 0);
    bool there = __shfl_sync(0xffffffffu, path.tiles >= 0 && (part == 0 || at.begin < at.end), 0), last = at.end == path.tiles;
    auto tile = [&](int i) {
        int batch = (i - at.begin) / BATCH;
        if ((i - at.begin) % BATCH == 0) {
            kl_mbar_wait(&m.seen[batch % AHEAD], batch / AHEAD & 1);
            kl_mbar_arrive(&m.taken[batch % AHEAD]);
        }
        return tile_of<KP>(p, path, i);
    };
    auto load = [&](float s[KP / 8][4], int c) {
        if (of_V)
            kda_load_state<KP>(s, p.walk, part == 0 && p.walk.h0 ? p.walk.h0 + slot_of(p, path) : nullptr, c);
        else
            kda_identity<KP>(s, c);
    };
    auto store = [&](const float s[KP / 8][4], int c) {
        if (last && !p.walk.ht)
            return;
        if (part == 0)
            kda_store_state<KP>(s, last ? p.walk : p.inner, last ? p.walk.ht + slot_of(p, path) : state_of(p, 1, pair), c);
        else if (of_V)
            kda_store_state<KP>(s, p.inner, B_of(p, part, pair), c);
        else
            kda_store_summary<KP>(s, M_of<KP>(p, part, pair), c);
    };
    if (warp == 6)
        watch<KP>(m, p, pair, at.begin, at.end);
    else if (!there)
        return;
    else if (warp < 4)
        kda_wide_compute(m.walked, p.walk, path, at, column, warp, 0, load, store);
    else if (warp == 4)
        kda_wide_load(m.walked, of_V ? p.walk : p.no_v, path, at, column, tile);
    else
        kda_wide_store(m.walked, of_V ? p.walk : p.unit, path, at, column, [](int) {});
}

/* ---- putting together ---- */

/* A block: some tokens of a later part of a head, or some columns of the state behind it. */
template <int KP> __global__ void __launch_bounds__(KDA_JOIN_THREADS, 2) join(const __grid_constant__ work p, int part)
{
    KL_SHARED(memory);
    kda_join_room<KP> &m = *(kda_join_room<KP> *)memory;
    int x = (int)blockIdx.x, tile = p.walk.sequences.tile, pair = x % p.pairs, panels = (p.walk.V + KDA_JOIN_COLUMNS - 1) / KDA_JOIN_COLUMNS;
    int pieces = (p.parts.each * tile + KDA_JOIN_TOKENS - 1) / KDA_JOIN_TOKENS * panels;
    kda_path path = kda_path_of(p.walk, pair);
    int begin = begin_of(p.parts, part), end = end_of(p.parts, part, path.tiles);
    kl_grid_wait();
    kl_grid_release();
    if (begin >= end)
        return;
    kda_joint at;
    at.S = state_of(p, part, pair);
    at.B = B_of(p, part, pair);
    at.M = M_of<KP>(p, part, pair);
    at.Q = p.unit.o;
    at.head = path.head;
    at.token = path.place.begin + (int64_t)begin * tile;
    at.tokens = min((int64_t)end * tile, path.place.length) - (int64_t)begin * tile;
    bool last = end == path.tiles;
    at.next = !last ? state_of(p, part + 1, pair) : p.walk.ht ? p.walk.ht + slot_of(p, path) : nullptr;
    x /= p.pairs;
    if (x >= pieces) {
        if (at.next)
            kda_join_state(m, last ? p.walk : p.inner, at, KDA_JOIN_STATE_COLUMNS * (x - pieces));
        return;
    }
    int first = KDA_JOIN_TOKENS * (x / panels), column = KDA_JOIN_COLUMNS * (x % panels);
    if (p.walk.o_aligned)
        kda_join_outputs<KP, true>(m, p.walk, at, first, column);
    else
        kda_join_outputs<KP, false>(m, p.walk, at, first, column);
}

/* ---- the host's side ---- */

/* Measured nanoseconds: of a block for a tile walked over, more for each block that walks, more where tiles come from memory, and of a
 * later part; of a multiprocessor for a tile prepared; until the first tile is there for preparing and for walking; from the end of
 * preparing to the first tile of a later part; to put parts together, and each; at the end. */
enum { WALK = 490, WALKER = 3, FAR = 45, WALK_LATER = 600, PREPARE = 2600, PREPARED = 12000, STARTED = 15000, CHANGE = 4500, JOIN = 6000, JOIN_EACH = 5500, END = 4000 };
enum { LEAST_TILES = 2, MOST_LATER = 15, STAY = 75 << 20 /* bytes of tiles that mostly stay in the second cache until they are read */ };

int64_t longest_of(const kda_problem *p) { return kda_ceil(kda_longest(p->T, p->N, p->cu_seqlens), kda_tile_tokens(p)); }
int64_t splits_of(const kda_problem *p) { return kda_ceil(p->V, (int)KDA_WIDE_COLUMNS); }
int64_t units_of(const kda_problem *p) { return kda_padded(p->K) / KDA_WIDE_COLUMNS; }

/* The parts that take least time, which is *time; first 0: the form is not to be had. With n later parts of y tiles each, and x tiles before them,
 *
 *     STARTED + x walk = prepared + CHANGE + y WALK_LATER      x + n y = longest */
cut plan(const kl_ctx *ctx, const kda_problem *p, int64_t *time)
{
    int64_t blocks = kl_gpu_multiprocessors(ctx), pairs = p->N * p->HV, walkers = pairs * splits_of(p), longest = longest_of(p), all = kda_tile_count(p) * p->HV;
    *time = INT64_MAX;
    if (!ctx->hopper || p->K > 128 || walkers == 0 || walkers >= blocks || longest == 0 || pairs * longest > INT32_MAX)
        return {};
    bool far = all * (int64_t)kda_core_tile_bytes(p->K) > STAY;
    int64_t prepared = PREPARED + all * PREPARE / (blocks - walkers), walk = WALK + WALKER * walkers + (far ? FAR : 0);
    int64_t most = far || p->chunk_states ? 0 : (blocks - walkers) / (pairs * (splits_of(p) + units_of(p)));
    cut best = {(int)longest, 0, 0};
    *time = std::max(STARTED + longest * walk, prepared) + END;
    for (int64_t n = 1; n <= most && n <= MOST_LATER; n++) {
        int64_t y = (STARTED + longest * walk - prepared - CHANGE) / (WALK_LATER + n * walk), x = longest - n * y;
        int64_t need = std::max(STARTED + x * walk, prepared + CHANGE + y * WALK_LATER) + JOIN + n * JOIN_EACH + END;
        if (y >= LEAST_TILES && x > 0 && need < *time) {
            *time = need;
            best = {(int)x, (int)y, (int)n};
        }
    }
    return best;
}

struct memory {
    void *table;
    unsigned char *tiles;
    int *there;
    uint16_t *Q;
    float *state, *B, *M;
};

memory carve(kl_arena *a, const kda_problem *p, const cut &parts)
{
    memory m = {};
    size_t pairs = (size_t)(p->N * p->HV), KP = (size_t)kda_padded(p->K);
    m.table = kl_arena_take(a, kda_sequences_bytes(p), 1);
    m.tiles = (unsigned char *)kl_arena_take(a, kl_mul((size_t)kda_tile_count(p), (size_t)p->HV, &a->overflow), kda_core_tile_bytes(p->K));
    m.there = KL_TAKE(a, int, pairs *(size_t)longest_of(p));
    if (!parts.later)
        return m;
    m.Q = KL_TAKE(a, uint16_t, (size_t)(p->B * p->T * p->HV) * KP);
    m.state = KL_TAKE(a, float, (size_t)parts.later * pairs * (size_t)(p->K * p->V));
    m.B = KL_TAKE(a, float, (size_t)parts.later * pairs * (size_t)(p->K * p->V));
    m.M = KL_TAKE(a, float, (size_t)parts.later * pairs * KP * KP);
    return m;
}

kl_grid grid(int64_t blocks, int threads, size_t shared)
{
    kl_grid g;
    g.x = blocks;
    g.threads = threads;
    g.shared = shared;
    g.overlap = true;
    return g;
}

template <int KP> kl_status launch(const kl_ctx *ctx, const work &w)
{
    int64_t V = w.walk.V, splits = kda_ceil(V, (int)KDA_WIDE_COLUMNS), pairs = w.pairs, walkers = pairs * splits, later = w.parts.later;
    KL_TRY(kl_launch(ctx, "kda prepare ahead", grid(std::max<int64_t>(kl_gpu_multiprocessors(ctx) - walkers, 1), PREPARERS, sizeof(preparing<KP>)), prepare_ahead<KP>, w));
    KL_TRY(kl_launch(ctx, "kda follow", grid(walkers + later * pairs * (splits + KP / KDA_WIDE_COLUMNS), WALKERS, sizeof(following<KP>)), follow<KP>, w));
    int64_t pieces = kda_ceil(w.parts.each * w.walk.sequences.tile, (int)KDA_JOIN_TOKENS) * kda_ceil(V, (int)KDA_JOIN_COLUMNS);
    kl_grid joining = grid(pairs * (pieces + kda_ceil(V, (int)KDA_JOIN_STATE_COLUMNS)), KDA_JOIN_THREADS, sizeof(kda_join_room<KP>));
    for (int part = 1; part <= later; part++)
        KL_TRY(kl_launch(ctx, "kda join", joining, join<KP>, w, part));
    return kl_ok();
}

size_t room(const kda_problem *p, const cut &parts)
{
    kl_arena a = kl_arena_count();
    carve(&a, p, parts);
    return a.overflow ? SIZE_MAX : a.used;
}

kl_status forward(const kl_ctx *ctx, const kda_problem *p, const cut &parts, void *workspace, size_t bytes)
{
    kl_arena a = kl_arena_over(workspace, bytes);
    memory m = carve(&a, p, parts);
    if (a.overflow)
        return kl_error(KL_EINVAL, "kda: workspace: expected %zu bytes, got %zu", room(p, parts), bytes);
    KL_TRY(kda_sequences_upload(ctx, p, m.table));
    work w = {};
    w.walk = w.inner = w.unit = w.no_v = kda_walk_of(p, m.table);
    w.inner.channel_stride = w.walk.V;
    w.inner.column_stride = 1;
    w.unit.o = m.Q;
    w.unit.V = kda_padded(p->K);
    w.unit.o_stride = p->HV * w.unit.V;
    w.unit.o_aligned = true;
    w.no_v.V = 0;
    w.source = kda_tile_source_of(p);
    w.tiles = m.tiles;
    w.there = m.there;
    w.pairs = (int)(p->N * p->HV);
    w.longest = (int)longest_of(p);
    w.items = w.pairs * w.longest;
    w.parts = parts;
    w.state = m.state;
    w.B = m.B;
    w.M = m.M;
    return kda_padded(p->K) == 64 ? launch<64>(ctx, w) : launch<128>(ctx, w);
}

/* Parts of so many tiles; whole sequences where states on the way are wanted. */
cut asked(const kda_problem *p, int64_t first, int64_t each)
{
    int64_t longest = longest_of(p);
    if (p->chunk_states || longest <= first)
        return {(int)longest, 0, 0};
    return {(int)first, (int)each, (int)kda_ceil(longest - first, each)};
}

} // namespace

int64_t kda_cuda_follow_time(const kl_ctx *ctx, const kda_problem *p)
{
    int64_t time;
    plan(ctx, p, &time);
    return time;
}

size_t kda_cuda_follow_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const kda_problem *p = (const kda_problem *)problem;
    int64_t time;
    cut parts = plan(ctx, p, &time);
    return parts.first ? room(p, parts) : kda_cuda_two_pass_workspace(ctx, p, pass);
}

kl_status kda_cuda_follow_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = (const kda_problem *)problem;
    int64_t time;
    cut parts = plan(ctx, p, &time);
    return parts.first ? forward(ctx, p, parts, workspace, bytes) : kda_cuda_two_pass_forward(ctx, p, workspace, bytes);
}

size_t kda_cuda_follow_cut_workspace(const kda_problem *p, int64_t first, int64_t each) { return room(p, asked(p, first, each)); }

kl_status kda_cuda_follow_cut(const kl_ctx *ctx, const kda_problem *p, int64_t first, int64_t each, void *workspace, size_t bytes)
{
    return forward(ctx, p, asked(p, first, each), workspace, bytes);
}
