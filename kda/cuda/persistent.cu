/* The chunk forward in one kernel: a block on every multiprocessor, some walk over tiles that the others prepare.
 *
 * Lanes walk: lane l takes the heads l, l + lanes, ... of all sequences, longest first, and numbers their tiles through; its
 * `parts` blocks walk over all of them, each for 64 or 128 columns of V. The groups of the other blocks, three in each, prepare items
 * 0, 1, 2, ... from one counter: item x is tile x / lanes of lane x % lanes. A finished tile goes through a ring in the second
 * cache, `depth` places a lane, small so that it stays there; both sides tell of tiles a few at a time:
 *
 *     carrier  take the next item; tell its group
 *     group    wait told; load its rows;  wait vacant; prepare into stage; arrive at ready
 *     carrier  wait ready; wait until the place is free (done); bulk store; arrive at vacant; filled += 1
 *     watcher  wait filled; arrive at seen
 *     loader   wait for a slot; wait seen; bulk load into the slot
 *     storer   wait for o of a tile, which is then done with; store it; arrive at finished
 *     reporter wait finished; done <- number of tiles
 *
 * Whoever asks or tells other blocks is a warp of its own: such a word takes longer than a tile, and a release waits for all that its
 * thread has under way. Nobody waits for ever: items are taken in the order of their tiles in every lane, each group has a
 * carrier of its own, and a place waits only for tiles with smaller numbers. That holds with fewer blocks at a time too, as long as
 * those that walk, which come first, and one more are there. */
#include <algorithm>

#include "common/arena.h"
#include "common/gpu.h"
#include "kda/cuda/prepare.cuh"
#include "kda/cuda/walk_wide.cuh"

namespace {

/* Warpgroups of a block: in one that walks, PARTS walk, 64 columns of V each, and the last two attend to them; in others all but the
 * last prepare. Registers a thread of each. */
enum { GROUPS = 3, THREADS = (GROUPS + 1) * KDA_GROUP, WALKING = 200, PREPARING = 152, ATTENDING = 72, CARRYING = 40 };
enum { COLUMNS = KDA_WIDE_COLUMNS, MOST_PATHS = 64, MOST_SEQUENCES = KDA_ORDERED_SEQUENCES, PLACES = 512, BATCH = 4 /* tiles that are told of together */, APART = 32 /* ints between what different blocks write */ };

struct work {
    kda_walk walk;
    kda_tile_source source;
    unsigned char *ring; /* [lanes][depth] tiles */
    int *next;           /* the item to be taken */
    int *filled;         /* [lanes][depth / BATCH] tiles that have come to these places so far */
    int *done;           /* [lanes][parts] tiles that were walked over, APART from each other */
    int pairs, lanes, parts, depth, items;
    int wide;            /* warpgroups that walk in a block */
};

/* What a group works on: tokens 0: nothing is left. */
struct item {
    int64_t token;
    int tokens, head, lane, n;
};

template <int KP_, int PARTS_> struct persistent {
    static constexpr int KP = KP_, PARTS = PARTS_, TILE = kda_core_tile<KP>::bytes;
    using ring = kda_wide_ring<KP, 5, PARTS>;
    struct group {
        alignas(128) unsigned char room[kda_prepare_room<KP>::bytes];
        alignas(128) unsigned char stage[TILE];
    };
    struct shared {
        union {
            group prepared[GROUPS];
            ring walked;
        };
        struct {
            item next[2];
            uint64_t told[2], ready, vacant; /* told: by the item's number, even or odd */
        } hand[GROUPS];
        uint64_t finished, reported; /* storer to reporter: a batch of tiles is done with; it knows */
        uint64_t seen[2], taken[2];  /* watcher to loader: a batch is in the ring; it knows */
    };
    static_assert(sizeof(shared) <= 232448, "a block has 227 KB");
};

/* ---- preparing ---- */

/* By a whole warp: item x, or tokens 0 where its lane has no such tile. */
__device__ __forceinline__ item find(const work &p, int x)
{
    item it = {};
    it.lane = x % p.lanes;
    it.n = x / p.lanes;
    int n = it.n;
    for (int first = it.lane; first < p.pairs; first += 32 * p.lanes) {
        int pair = first + kl_lane() * p.lanes, tiles = 0;
        kda_path path = {};
        if (pair < p.pairs) {
            path = kda_path_of(p.walk, pair);
            tiles = path.tiles > 0 ? path.tiles : 0;
        }
        int before = tiles;
        for (int m = 1; m < 32; m *= 2) {
            int other = __shfl_up_sync(0xffffffffu, before, m);
            before += kl_lane() >= m ? other : 0;
        }
        before -= tiles;
        int all = __shfl_sync(0xffffffffu, before + tiles, 31);
        uint32_t here = __ballot_sync(0xffffffffu, n >= before && n < before + tiles);
        if (here) {
            int i = n - before, from = __ffs(here) - 1;
            it.token = __shfl_sync(0xffffffffu, path.place.begin + (int64_t)i * p.walk.sequences.tile, from);
            it.tokens = __shfl_sync(0xffffffffu, tiles ? kda_tokens_of(p.walk.sequences, path.place, i) : 0, from);
            it.head = __shfl_sync(0xffffffffu, (int)path.head, from);
            break;
        }
        n -= all;
    }
    return it;
}

/* By a whole warp: the next item that has tokens. */
__device__ __forceinline__ item take(const work &p)
{
    for (;;) {
        int x = kl_lane() == 0 ? atomicAdd(p.next, 1) : 0;
        x = __shfl_sync(0xffffffffu, x, 0);
        if (x >= p.items)
            return {};
        item it = find(p, x);
        if (it.tokens)
            return it;
    }
}

template <class F> __device__ __forceinline__ void prepare(typename F::shared &m, const work &p, int group, int thread)
{
    constexpr int KP = F::KP;
    auto &hand = m.hand[group];
    auto &own = m.prepared[group];
    int held = -1;
    kda_prepare_head<KP> head = {};
    kda_prepare_ahead ahead = {};
    auto load = [&](const item &it) {
        if (it.tokens && it.head != held)
            head = kda_prepare_head_of<KP>(p.source, it.head, thread);
        held = it.head;
        if (it.tokens)
            ahead = kda_prepare_load<KP>(p.source, kda_locate_rows(p.source, it.head, it.token, it.tokens, thread), own.room, thread);
    };
    kl_mbar_wait(&hand.told[0], 0);
    item at = hand.next[0];
    load(at);
    for (int use = 0; at.tokens; use++) {
        item next;
        auto wait_for_stage = [&] {
            if (thread == 0)
                kl_mbar_wait(&hand.vacant, (use & 1) ^ 1);
        };
        auto load_next = [&] {
            kl_mbar_wait(&hand.told[(use + 1) & 1], (use + 1) >> 1 & 1);
            next = hand.next[(use + 1) & 1];
            load(next);
        };
        kda_prepare_tile<kda_core_form<KP>>(p.source, head, ahead, at.tokens, own.room, own.stage, thread, 1 + group, wait_for_stage, load_next);
        if (thread == 0)
            kl_mbar_arrive(&hand.ready);
        at = next;
    }
}

/* One warp: a group's items to it, its tiles away. */
template <class F> __device__ __forceinline__ void carry(typename F::shared &m, const work &p, int group)
{
    auto &hand = m.hand[group];
    auto tell = [&](int use) {
        item it = take(p);
        if (kl_lane() == 0) {
            hand.next[use & 1] = it;
            kl_mbar_arrive(&hand.told[use & 1]);
        }
        __syncwarp();
        return it;
    };
    item at = tell(0), next;
    for (int use = 0; at.tokens; use++, at = next) {
        next = tell(use + 1);
        kl_mbar_wait(&hand.ready, use & 1);
        int place = at.lane * p.depth + at.n % p.depth;
        if (at.n >= p.depth && kl_lane() < p.parts)
            kl_await(&p.done[(at.lane * p.parts + kl_lane()) * APART], at.n - p.depth + 1);
        __syncwarp();
        if (kl_lane() == 0) {
            kl_fence_async();
            kl_bulk_store(p.ring + (size_t)place * F::TILE, m.prepared[group].stage, F::TILE);
            kl_bulk_commit();
            kl_bulk_wait_read<0>();
            kl_mbar_arrive(&hand.vacant);
            kl_bulk_wait<0>();
            kl_fence_async();
            kl_add_release(&p.filled[place / BATCH], 1);
        }
        __syncwarp();
    }
}

/* ---- walking ---- */

/* Every path of a lane that is not left out, with the number of its first tile. */
template <class Visit> __device__ __forceinline__ void for_paths(const work &p, int lane, Visit visit)
{
    int first = 0;
    for (int pair = lane; pair < p.pairs; pair += p.lanes) {
        kda_path path = kda_path_of(p.walk, pair);
        if (path.tiles < 0)
            continue;
        visit(path, first);
        first += path.tiles;
    }
}

/* Tiles of a lane. */
__device__ __forceinline__ int count_tiles(const work &p, int lane)
{
    int total = 0;
    for_paths(p, lane, [&](const kda_path &path, int) { total += path.tiles; });
    return total;
}

/* One warp: tiles from the ring into the slots. */
template <class F> __device__ __forceinline__ void load(typename F::shared &m, const work &p, int lane, int column)
{
    unsigned char *ring = p.ring + (size_t)lane * p.depth * F::TILE;
    for_paths(p, lane, [&](const kda_path &path, int first) {
        kda_wide_load(m.walked, p.walk, path, {0, 0, path.tiles, first, nullptr, nullptr}, column, [&](int i) {
            int n = first + i, batch = n / BATCH;
            if (n % BATCH == 0) {
                kl_mbar_wait(&m.seen[batch & 1], batch >> 1 & 1);
                kl_mbar_arrive(&m.taken[batch & 1]);
            }
            return ring + (size_t)(n % p.depth) * F::TILE;
        });
    });
}

/* One thread: which batches are in the ring, up to two ahead of the loader, for whom the question would take longer than a tile. */
template <class F> __device__ __forceinline__ void watch(typename F::shared &m, const work &p, int lane)
{
    int *filled = &p.filled[lane * p.depth / BATCH], total = count_tiles(p, lane), places = p.depth / BATCH;
    for (int batch = 0; batch * BATCH < total; batch++) {
        kl_mbar_wait(&m.taken[batch & 1], (batch >> 1 & 1) ^ 1);
        kl_await(&filled[batch % places], batch / places * BATCH + min((int)BATCH, total - batch * BATCH));
        kl_fence_async();
        kl_mbar_arrive(&m.seen[batch & 1]);
    }
}

/* One warp: o to memory. A batch that is done with is reported by another one, which has no stores to wait for. */
template <class F> __device__ __forceinline__ void store(typename F::shared &m, const work &p, int lane, int column, int part)
{
    for_paths(p, lane, [&](const kda_path &path, int first) {
        kda_wide_store(m.walked, p.walk, path, {0, 0, path.tiles, first, nullptr, nullptr}, column, [&](int i) {
            int done = first + i + 1;
            if (done % BATCH == 0) {
                kl_mbar_wait(&m.reported, done / BATCH & 1);
                kl_mbar_arrive(&m.finished);
            }
        }, part);
    });
}

template <class F> __device__ __forceinline__ void report(typename F::shared &m, const work &p, int lane, int part)
{
    int total = count_tiles(p, lane);
    for (int done = BATCH; done <= total; done += BATCH) {
        kl_mbar_wait(&m.finished, (done / BATCH & 1) ^ 1);
        kl_mbar_arrive(&m.reported);
        kl_store_release(&p.done[(lane * p.parts + part) * APART], done);
    }
}

template <class F> __device__ __forceinline__ void walk(typename F::shared &m, const work &p, int lane, int column, int part, int warp)
{
    for_paths(p, lane, [&](const kda_path &path, int first) {
        kda_wide_compute(m.walked, p.walk, path, kda_whole(p.walk, path, first), column, warp, part);
    });
}

template <class F> __global__ void __launch_bounds__(THREADS, 1) everywhere(const __grid_constant__ work p)
{
    KL_SHARED(memory);
    typename F::shared &m = *(typename F::shared *)memory;
    int role = __shfl_sync(0xffffffffu, (int)threadIdx.x / KDA_GROUP, 0), thread = (int)threadIdx.x % KDA_GROUP, warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    int lane = (int)blockIdx.x / p.parts, part = (int)blockIdx.x % p.parts, column = COLUMNS * F::PARTS * part;
    bool walks = lane < p.lanes;
    if (threadIdx.x == 0) {
        for (int g = 0; g < GROUPS; g++) {
            kl_mbar_init(&m.hand[g].told[0], 1);
            kl_mbar_init(&m.hand[g].told[1], 1);
            kl_mbar_init(&m.hand[g].ready, 1);
            kl_mbar_init(&m.hand[g].vacant, 1);
        }
        kl_mbar_init(&m.finished, F::PARTS);
        kl_mbar_init(&m.reported, 1);
        for (int i = 0; i < 2; i++) {
            kl_mbar_init(&m.seen[i], 1);
            kl_mbar_init(&m.taken[i], 1);
        }
        if (walks)
            kda_wide_init(m.walked);
        kl_mbar_init_fence();
    }
    __syncthreads();
    if (role < F::PARTS && walks) {
        kl_registers_more<WALKING>();
        walk<F>(m, p, lane, column + COLUMNS * role, role, warp);
    } else if (role < GROUPS && !walks) {
        kl_registers_more<PREPARING>();
        prepare<F>(m, p, role, thread);
    } else if (role == GROUPS - 1) {
        kl_registers_fewer<ATTENDING>();
        if (warp == 0)
            load<F>(m, p, lane, column);
        else if (warp <= F::PARTS)
            store<F>(m, p, lane, column + COLUMNS * (warp - 1), warp - 1);
    } else {
        kl_registers_fewer<CARRYING>();
        if (!walks && warp < GROUPS)
            carry<F>(m, p, warp);
        else if (role == GROUPS && warp == 0 && kl_lane() == 0)
            watch<F>(m, p, lane);
        else if (role == GROUPS && warp == 1 && kl_lane() == 0)
            report<F>(m, p, lane, part);
    }
}

/* ---- the host's side ---- */

/* Measured nanoseconds: of a block for a tile walked over, by 64 or 128 columns, and for a head begun; of a multiprocessor for a tile
 * prepared; of the second cache for a tile; before the first tile is there. */
enum { WALK_64 = 620, WALK_128 = 980, BEGIN = 6000, PREPARE = 2150, CACHE = 29, START = 14000 };

/* Tiles of the longest lane. */
int64_t longest_lane(const kda_problem *p, const int64_t *order, int64_t pairs, int64_t lanes)
{
    int64_t tile = kda_tile_tokens(p), tiles = 0;
    if (!order)
        return kda_ceil(pairs, lanes) * kda_ceil(p->T, tile);
    for (int64_t pair = 0; pair < pairs; pair += lanes)
        tiles += kda_ceil(kda_sequence(p->T, p->cu_seqlens, order[pair / p->HV]).length, tile);
    return tiles;
}

/* How a problem is spread, by the shortest time that walkers and preparation need side by side, which is *time; lanes 0: it is not. */
work spread(const kl_ctx *ctx, const kda_problem *p, int64_t *time)
{
    work w = {};
    int64_t pairs = p->N * p->HV, blocks = kl_gpu_multiprocessors(ctx), all = kda_tile_count(p) * p->HV;
    *time = INT64_MAX;
    if (!ctx->hopper || p->K > 128 || pairs == 0 || (p->cu_seqlens && p->N > MOST_SEQUENCES))
        return w;
    int64_t order[KDA_ORDERED_SEQUENCES];
    if (p->cu_seqlens)
        kda_sequences_order(p, order);
    for (int wide = 1; wide <= (p->V > COLUMNS ? 2 : 1); wide++) {
        int64_t parts = kda_ceil(p->V, COLUMNS * wide), most = (blocks - 1) / parts;
        for (int64_t paths = most ? kda_ceil(pairs, most) : pairs + 1; paths <= MOST_PATHS && paths <= pairs; paths++) {
            int64_t lanes = kda_ceil(pairs, paths), tiles = longest_lane(p, p->cu_seqlens ? order : nullptr, pairs, lanes);
            int64_t walk = paths * BEGIN + tiles * (wide == 1 ? WALK_64 : WALK_128), prepare = PREPARE * all / (blocks - lanes * parts);
            int64_t need = START + std::max({walk, prepare, CACHE * all});
            if (need < *time && tiles * lanes <= INT32_MAX) {
                *time = need;
                w.pairs = (int)pairs;
                w.parts = (int)parts;
                w.lanes = (int)lanes;
                w.items = (int)(tiles * lanes);
                w.wide = wide;
            }
            if (walk >= std::max(prepare, CACHE * all))
                break; /* fewer lanes are longer ones */
        }
    }
    if (!w.lanes)
        return w;
    w.depth = (int)std::min<int64_t>(std::max<int64_t>(PLACES / w.lanes / BATCH, 4), 8) * BATCH;
    return w;
}

struct memory {
    void *table;
    int *control; /* next, done, filled */
    unsigned char *ring;
    int64_t controls;
};

memory carve(kl_arena *a, const kda_problem *p, const work &w)
{
    memory m;
    m.controls = APART + (int64_t)w.lanes * (w.parts * APART + w.depth / BATCH);
    m.table = kl_arena_take(a, kda_sequences_bytes(p), 1);
    m.control = KL_TAKE(a, int, m.controls);
    m.ring = (unsigned char *)kl_arena_take(a, (size_t)w.lanes * w.depth, kda_padded(p->K) == 64 ? kda_core_tile<64>::bytes : kda_core_tile<128>::bytes);
    return m;
}

template <class F> kl_status launch(const kl_ctx *ctx, const work &w)
{
    kl_grid g;
    g.x = kl_gpu_multiprocessors(ctx);
    g.threads = THREADS;
    g.shared = sizeof(typename F::shared);
    g.resident = true;
    return kl_launch(ctx, "kda persistent", g, everywhere<F>, w);
}

} // namespace

int64_t kda_cuda_persistent_time(const kl_ctx *ctx, const kda_problem *p)
{
    int64_t time;
    spread(ctx, p, &time);
    return time;
}

size_t kda_cuda_persistent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const kda_problem *p = (const kda_problem *)problem;
    int64_t time;
    work w = spread(ctx, p, &time);
    if (!w.lanes)
        return kda_cuda_two_pass_workspace(ctx, p, pass);
    kl_arena a = kl_arena_count();
    carve(&a, p, w);
    return a.overflow ? SIZE_MAX : a.used;
}

kl_status kda_cuda_persistent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = (const kda_problem *)problem;
    int64_t time;
    work w = spread(ctx, p, &time);
    if (!w.lanes)
        return kda_cuda_two_pass_forward(ctx, p, workspace, bytes);
    kl_arena a = kl_arena_over(workspace, bytes);
    memory m = carve(&a, p, w);
    if (a.overflow)
        return kl_error(KL_EINVAL, "kda: workspace: expected %zu bytes, got %zu", kda_cuda_persistent_workspace(ctx, p, KL_FORWARD), bytes);
    KL_TRY(kda_sequences_upload(ctx, p, m.table));
    KL_TRY(kl_gpu_fill(ctx, m.control, 0, (size_t)m.controls * sizeof(int)));
    w.walk = kda_walk_of(p, m.table);
    w.source = kda_tile_source_of(p);
    w.ring = m.ring;
    w.next = m.control;
    w.done = m.control + APART;
    w.filled = w.done + (size_t)w.lanes * w.parts * APART;
    if (kda_padded(p->K) == 64)
        return w.wide == 1 ? launch<persistent<64, 1>>(ctx, w) : launch<persistent<64, 2>>(ctx, w);
    return w.wide == 1 ? launch<persistent<128, 1>>(ctx, w) : launch<persistent<128, 2>>(ctx, w);
}
