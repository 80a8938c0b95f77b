/* The chunk forward in one kernel: a block on every multiprocessor, tiles prepared by all and walked over by some.
 *
 * Lanes walk: lane l takes the heads l, l + lanes, ... of all sequences, longest first, and numbers their tiles through; its
 * `parts` blocks walk over all of them, each for 64 columns of V. Preparing groups of warps, two in a walking block and three
 * in others, take items 0, 1, 2, ... from one counter: item x is tile x / lanes of lane x % lanes. A finished tile goes
 * through a ring in the second cache, `depth` places a lane:
 *
 *     group    wait vacant; prepare into stage; arrive at ready
 *     carrier  wait ready; wait until the place is free (done); bulk store; arrive at vacant; filled <- number of the tile
 *     loader   wait for a slot; wait filled; bulk load into the slot
 *     walkers  as in walk_wide.cuh; the storing warp: done <- number of the tile
 *
 * Nobody waits for ever: items are taken in the order of their tiles in every lane, each group has a carrier of its own, and
 * a place waits only for tiles with smaller numbers. */
#include <algorithm>

#include "common/arena.h"
#include "common/gpu.h"
#include "kda/cuda/prepare.cuh"
#include "kda/cuda/walk_wide.cuh"

namespace {

/* Warpgroups: one walks or prepares, two prepare, one carries and loads. Registers a thread of each. */
enum { GROUPS = 3, THREADS = (GROUPS + 1) * KDA_GROUP, WALKING = 184, PREPARING = 144, CARRYING = 40 };
enum { COLUMNS = KDA_WIDE_COLUMNS, MOST_PATHS = 64, MOST_SEQUENCES = KDA_ORDERED_SEQUENCES, PLACES = 768, APART = 32 /* ints between what different blocks write */ };

struct work {
    kda_walk walk;
    kda_tile_source source;
    unsigned char *ring; /* [lanes][depth] tiles */
    int *next;           /* the item to be taken */
    int *filled;         /* [lanes][depth] number of the tile in the place, from 1 */
    int *done;           /* [lanes][parts] tiles that were walked over, APART from each other */
    int pairs, lanes, parts, depth, items;
};

/* What a group works on: tokens 0: nothing is left. */
struct item {
    int64_t token;
    int tokens, head, lane, n;
};

template <int KP_> struct persistent {
    static constexpr int KP = KP_, TILE = kda_core_tile<KP>::bytes;
    using ring = kda_wide_ring<KP, 3>;
    struct group {
        alignas(128) unsigned char room[kda_prepare_room<KP>::bytes];
        alignas(128) unsigned char stage[TILE];
    };
    struct shared {
        union {
            group first;
            ring walked;
        };
        group other[GROUPS - 1];
        struct {
            item next[2];
            int lane, n; /* of the staged tile; lane < 0: no more */
            uint64_t ready, vacant;
        } hand[GROUPS];
    };
    static_assert(sizeof(shared) <= 232448, "a block has 227 KB");
};

/* ---- preparing ---- */

/* Item x, or tokens 0 where its lane has no such tile. */
__device__ __forceinline__ item find(const work &p, int x)
{
    item it = {};
    it.lane = x % p.lanes;
    it.n = x / p.lanes;
    int first = 0;
    for (int pair = it.lane; pair < p.pairs; pair += p.lanes) {
        kda_path path = kda_path_of(p.walk, pair);
        int tiles = path.tiles > 0 ? path.tiles : 0;
        if (!p.walk.sequences.row && !p.walk.state_index) { /* all alike */
            int whole = it.n / tiles;
            if (pair + (int64_t)whole * p.lanes >= p.pairs)
                break;
            path = kda_path_of(p.walk, pair + whole * p.lanes);
            first = whole * tiles;
        }
        if (it.n - first < tiles) {
            int i = it.n - first;
            it.token = path.place.begin + (int64_t)i * p.walk.sequences.tile;
            it.tokens = kda_tokens_of(p.walk.sequences, path.place, i);
            it.head = (int)path.head;
            break;
        }
        first += tiles;
    }
    return it;
}

/* The next item that has tokens, x being taken already. */
__device__ __forceinline__ item take(const work &p, int x)
{
    item it = {};
    for (; x < p.items; x = atomicAdd(p.next, 1)) {
        it = find(p, x);
        if (it.tokens)
            break;
    }
    return it;
}

template <class F>
__device__ __forceinline__ void prepare(typename F::shared &m, typename F::group &own, const work &p, int group, int thread)
{
    constexpr int KP = F::KP;
    auto &hand = m.hand[group];
    int barrier = 1 + group, taken = 0, use = 0, held = -1;
    if (thread == 0) {
        hand.next[1] = take(p, atomicAdd(p.next, 1));
        taken = atomicAdd(p.next, 1);
    }
    kl_barrier(barrier, KDA_GROUP);
    item at = hand.next[1];
    kda_prepare_head<KP> head = {};
    kda_prepare_ahead ahead = {};
    auto load = [&](const item &it) {
        if (it.head != held)
            head = kda_prepare_head_of<KP>(p.source, it.head, thread);
        held = it.head;
        ahead = kda_prepare_load<KP>(p.source, kda_locate_rows(p.source, it.head, it.token, it.tokens, thread), own.room, thread);
    };
    if (at.tokens)
        load(at);
    for (; at.tokens; use++) {
        if (thread == 0) {
            hand.next[use & 1] = take(p, taken);
            taken = atomicAdd(p.next, 1);
        }
        item next;
        auto wait_for_stage = [&] {
            if (thread == 0) {
                kl_mbar_wait(&hand.vacant, (use & 1) ^ 1);
                hand.lane = at.lane;
                hand.n = at.n;
            }
        };
        auto load_next = [&] {
            next = hand.next[use & 1];
            if (next.tokens)
                load(next);
        };
        kda_prepare_tile<kda_core_form<KP>>(p.source, head, ahead, at.tokens, own.room, own.stage, thread, barrier, wait_for_stage, load_next);
        if (thread == 0)
            kl_mbar_arrive(&hand.ready);
        at = next;
    }
    if (thread == 0) {
        kl_mbar_wait(&hand.vacant, (use & 1) ^ 1);
        hand.lane = -1;
        kl_mbar_arrive(&hand.ready);
    }
}

/* ---- carrying and loading: one warp each ---- */

template <class F> __device__ __forceinline__ void carry(typename F::shared &m, typename F::group &own, const work &p, int group)
{
    auto &hand = m.hand[group];
    for (int use = 0;; use++) {
        kl_mbar_wait(&hand.ready, use & 1);
        int lane = hand.lane, n = hand.n;
        if (lane < 0)
            return;
        int place = lane * p.depth + n % p.depth;
        if (n >= p.depth && kl_lane() < p.parts)
            kl_await(&p.done[(lane * p.parts + kl_lane()) * APART], n - p.depth + 1);
        __syncwarp();
        if (kl_lane() == 0) {
            kl_fence_async();
            kl_bulk_store(p.ring + (size_t)place * F::TILE, own.stage, F::TILE);
            kl_bulk_commit();
            kl_bulk_wait_read<0>();
            kl_mbar_arrive(&hand.vacant);
            kl_bulk_wait<0>();
            kl_fence_async();
            kl_store_release(&p.filled[place], n + 1);
        }
        __syncwarp();
    }
}

/* Every path of a lane, with the number of its first tile. */
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

template <class F> __device__ __forceinline__ void load(typename F::ring &r, const work &p, int lane, int part)
{
    const int *filled = &p.filled[lane * p.depth];
    const unsigned char *ring = p.ring + (size_t)lane * p.depth * F::TILE;
    for_paths(p, lane, [&](const kda_path &path, int first) {
        kda_wide_load(r, p.walk, path, kda_whole(p.walk, path, first), COLUMNS * part, [&](int i) {
            int place = (first + i) % p.depth;
            kl_await(&filled[place], first + i + 1);
            kl_fence_async();
            return ring + (size_t)place * F::TILE;
        });
    });
}

/* Of done tiles it is told a few at a time: a word to another block takes longer than a tile. */
template <class F> __device__ __forceinline__ void store(typename F::ring &r, const work &p, int lane, int part)
{
    int *done = &p.done[(lane * p.parts + part) * APART];
    for_paths(p, lane, [&](const kda_path &path, int first) {
        kda_wide_store(r, p.walk, path, kda_whole(p.walk, path, first), COLUMNS * part, [&](int i) {
            if ((first + i) % 4 == 3)
                kl_store_release(done, first + i + 1);
        });
    });
}

template <class F> __global__ void __launch_bounds__(THREADS, 1) everywhere(const __grid_constant__ work p)
{
    KL_SHARED(memory);
    typename F::shared &m = *(typename F::shared *)memory;
    int role = (int)threadIdx.x / KDA_GROUP, thread = (int)threadIdx.x % KDA_GROUP, warp = thread / 32;
    int lane = (int)blockIdx.x / p.parts, part = (int)blockIdx.x % p.parts;
    bool walks = lane < p.lanes;
    if (threadIdx.x == 0) {
        for (int g = 0; g < GROUPS; g++) {
            kl_mbar_init(&m.hand[g].ready, 1);
            kl_mbar_init(&m.hand[g].vacant, 1);
        }
        if (walks)
            kda_wide_init(m.walked);
        kl_mbar_init_fence();
    }
    __syncthreads();
    if (role == 0 && walks) {
        kl_registers_more<WALKING>();
        int of_four = __shfl_sync(0xffffffffu, warp, 0);
        for_paths(p, lane, [&](const kda_path &path, int first) {
            kda_wide_compute(m.walked, p.walk, path, kda_whole(p.walk, path, first), COLUMNS * part, of_four);
        });
    } else if (role < GROUPS) {
        kl_registers_more<PREPARING>();
        prepare<F>(m, role ? m.other[role - 1] : m.first, p, role, thread);
    } else {
        kl_registers_fewer<CARRYING>();
        if (warp == 0 && walks)
            load<F>(m.walked, p, lane, part);
        else if (warp == GROUPS && walks)
            store<F>(m.walked, p, lane, part);
        else if (warp < GROUPS)
            carry<F>(m, warp ? m.other[warp - 1] : m.first, p, warp);
    }
}

/* ---- the host's side ---- */

/* How a problem is spread; lanes 0: it is not, two passes then. */
work spread(const kl_ctx *ctx, const kda_problem *p)
{
    work w = {};
    int64_t pairs = p->N * p->HV, parts = kda_ceil(p->V, COLUMNS), blocks = kl_gpu_multiprocessors(ctx), most = blocks / parts;
    if (p->K > 128 || pairs == 0 || pairs > most * MOST_PATHS || (p->cu_seqlens && p->N > MOST_SEQUENCES))
        return w;
    int64_t paths = kda_ceil(pairs, most), lanes = kda_ceil(pairs, paths), tile = kda_tile_tokens(p), tiles = 0;
    int64_t order[KDA_ORDERED_SEQUENCES];
    if (p->cu_seqlens)
        kda_sequences_order(p, order);
    for (int64_t pair = 0; pair < pairs; pair += lanes)
        tiles += kda_ceil(kda_sequence(p->T, p->cu_seqlens, p->cu_seqlens ? order[pair / p->HV] : 0).length, tile);
    if (tiles * lanes > INT32_MAX)
        return w;
    w.pairs = (int)pairs;
    w.parts = (int)parts;
    w.lanes = (int)lanes;
    w.items = (int)(tiles * lanes);
    w.depth = (int)std::min<int64_t>(std::max<int64_t>(PLACES / lanes, 8), 256);
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
    m.controls = APART + (int64_t)w.lanes * (w.parts * APART + w.depth);
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

size_t kda_cuda_persistent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const kda_problem *p = (const kda_problem *)problem;
    work w = spread(ctx, p);
    if (!w.lanes)
        return kda_cuda_two_pass_workspace(ctx, p, pass);
    kl_arena a = kl_arena_count();
    carve(&a, p, w);
    return a.overflow ? SIZE_MAX : a.used;
}

kl_status kda_cuda_persistent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = (const kda_problem *)problem;
    work w = spread(ctx, p);
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
    return kda_padded(p->K) == 64 ? launch<persistent<64>>(ctx, w) : launch<persistent<128>>(ctx, w);
}
