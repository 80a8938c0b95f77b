/* The chunk forward in one kernel: no tile ever goes to device memory.
 *
 * A cluster of blocks takes one head of one sequence after another. Every block walks over all of its tiles for its own
 * columns of V, and prepares every BLOCKS-th tile with two groups of warps that take turns. A courier thread carries a
 * finished tile from the group's staging memory to a small ring in L2, from where one multicast copy puts it into a
 * slot of every block:
 *
 *     group:    wait vacant[group]; prepare into stage[group]; arrive at ready[group]
 *     courier:  wait ready[group]; bulk store to the ring; arrive at vacant[group]; wait until the slot is free; multicast
 *     walkers:  wait full[slot]; use; tell the block that fills the slot next (ring.cuh)
 *
 * A place in the ring is written again two tiles of the block later: the slot that the tile between them went to was
 * free only when all blocks were done with the first. */
#include "common/gpu.h"
#include "kda/cuda/prepare.cuh"
#include "kda/cuda/walk.cuh"

namespace {

/* Four warpgroups: one walks, two prepare, one carries tiles and takes in v; and the registers that a thread of each may use. */
enum { GROUPS = 2, PLACES = 2, THREADS = KDA_GROUP * (GROUPS + 2), WALKING = 176, PREPARING = 144, CARRYING = 48 };

template <int KP_, int WARPS_, int SLOTS_, int BLOCKS_> struct fused {
    static constexpr int KP = KP_, WARPS = WARPS_, SLOTS = SLOTS_, BLOCKS = BLOCKS_;
    static constexpr int TILE = kda_tile<KP>::bytes;
    static_assert(SLOTS <= BLOCKS, "the ring in L2 counts on the slots to order its uses");

    struct shared {
        alignas(128) unsigned char room[GROUPS][(kda_prepare_room<KP>::bytes + 127) / 128 * 128];
        alignas(128) unsigned char stage[GROUPS][TILE];
        kda_ring<KP, WARPS, SLOTS, BLOCKS> ring;
        uint64_t ready[GROUPS], vacant[GROUPS];
    };
    static_assert(sizeof(shared) <= 232448, "a block has 227 KB");
};

struct work {
    kda_walk walk;
    kda_tile_source source;
    unsigned char *ring; /* [blocks][PLACES] tiles */
    int64_t pairs;
};

__device__ __forceinline__ int64_t clusters_of(int blocks) { return gridDim.x / blocks; }

/* Every step-th tile of the heads that this cluster takes, beginning with tile n. */
struct cursor {
    int64_t pair, clusters;
    int n, first; /* the tile, and the first one of its path */
    kda_path path;

    __device__ __forceinline__ bool find(const work &p)
    {
        while (n - first >= path.tiles) {
            first += path.tiles > 0 ? path.tiles : 0;
            pair += clusters;
            if (pair >= p.pairs)
                return false;
            path = kda_path_of(p.walk, pair);
        }
        return true;
    }
    __device__ __forceinline__ bool begin(const work &p, int tile, int blocks)
    {
        clusters = gridDim.x / blocks;
        pair = blockIdx.x / blocks - clusters;
        n = tile;
        first = 0;
        path.tiles = 0;
        return find(p);
    }
    __device__ __forceinline__ bool step(const work &p, int tiles)
    {
        n += tiles;
        return find(p);
    }
};

template <class F> __device__ __forceinline__ void prepare(typename F::shared &m, const work &p, int group, int thread, int rank)
{
    constexpr int KP = F::KP;
    cursor at;
    auto rows_here = [&] {
        int i = at.n - at.first;
        return kda_locate_rows(p.source, (int)at.path.head, at.path.place.begin + (int64_t)i * p.walk.sequences.tile,
                               kda_tokens_of(p.walk.sequences, at.path.place, i), thread);
    };
    bool more = at.begin(p, rank + F::BLOCKS * group, F::BLOCKS);
    if (!more)
        return;
    kda_tile_rows rows = rows_here();
    kda_prepare_head<KP> head = kda_prepare_head_of<KP>(p.source, rows.hv, thread);
    kda_prepare_ahead ahead = kda_prepare_load<KP>(p.source, rows, m.room[group], thread);
    for (int use = 0; more; use++) {
        int tokens = rows.tokens;
        more = at.step(p, GROUPS * F::BLOCKS);
        if (more) {
            rows = rows_here();
            kda_fetch_rows<KP>(p.source, rows, thread);
        }
        auto wait_for_stage = [&] {
            if (thread == 0)
                kl_mbar_wait(&m.vacant[group], (use & 1) ^ 1);
        };
        auto load_next = [&] {
            if (!more)
                return;
            if (rows.hv != head.hv)
                head = kda_prepare_head_of<KP>(p.source, rows.hv, thread);
            ahead = kda_prepare_load<KP>(p.source, rows, m.room[group], thread);
        };
        kda_prepare_tile<kda_block_form<KP>>(p.source, head, ahead, tokens, m.room[group], m.stage[group], thread, 1 + group, wait_for_stage, load_next);
        if (thread == 0)
            kl_mbar_arrive(&m.ready[group]);
    }
}

/* One thread. */
template <class F> __device__ __forceinline__ void carry(typename F::shared &m, const work &p, int rank)
{
    unsigned char *ring = p.ring + (size_t)blockIdx.x * PLACES * F::TILE;
    cursor at;
    int i = 0;
    for (bool more = at.begin(p, rank, F::BLOCKS); more; more = at.step(p, F::BLOCKS), i++) {
        int group = i % GROUPS, slot = at.n % F::SLOTS;
        unsigned char *place = ring + i % PLACES * F::TILE;
        kl_mbar_wait(&m.ready[group], i / GROUPS & 1);
        kl_bulk_store(place, m.stage[group], F::TILE);
        kl_bulk_commit();
        kl_bulk_wait_read<0>();
        kl_mbar_arrive(&m.vacant[group]);
        kl_bulk_wait<0>();
        kl_fence_async();
        kda_ring_reserve(m.ring, at.n);
        kl_bulk_load_multicast(m.ring.slot[slot], place, F::TILE, &m.ring.full[slot], (uint16_t)((1 << F::BLOCKS) - 1));
    }
}

template <class F, class Role> __device__ __forceinline__ void walk(const work &p, Role role)
{
    int first = 0;
    for (int64_t pair = blockIdx.x / F::BLOCKS; pair < p.pairs; pair += clusters_of(F::BLOCKS)) {
        kda_path path = kda_path_of(p.walk, pair);
        role(path, first);
        first += path.tiles > 0 ? path.tiles : 0;
    }
}

template <class F> __global__ void __launch_bounds__(THREADS, 1) forward(const __grid_constant__ work p)
{
    KL_SHARED(memory);
    typename F::shared &m = *(typename F::shared *)memory;
    int role = (int)threadIdx.x / KDA_GROUP, thread = (int)threadIdx.x % KDA_GROUP, rank = kl_cluster_rank();
    if (threadIdx.x == 0) {
        for (int g = 0; g < GROUPS; g++) {
            kl_mbar_init(&m.ready[g], 1);
            kl_mbar_init(&m.vacant[g], 1);
        }
        kda_ring_init(m.ring);
    }
    kl_cluster_sync();
    if (role == 0) {
        kl_registers_more<WALKING>();
        int warp = thread / 32 % F::WARPS, column = KDA_COLUMNS * (rank * F::WARPS + warp);
        if (thread < 32 * F::WARPS)
            walk<F>(p, [&](const kda_path &path, int first) { kda_walk_state(m.ring, p.walk, path, first, warp, column); });
        else if (thread < 64 * F::WARPS)
            walk<F>(p, [&](const kda_path &path, int first) { kda_walk_output(m.ring, p.walk, path, first, warp, column); });
    } else if (role <= GROUPS) {
        kl_registers_more<PREPARING>();
        prepare<F>(m, p, role - 1, thread, rank);
    } else {
        kl_registers_fewer<CARRYING>();
        int warp = thread / 32 - 2, column = KDA_COLUMNS * (rank * F::WARPS + warp);
        if (thread == 0)
            carry<F>(m, p, rank);
        else if (warp >= 0 && warp < F::WARPS)
            walk<F>(p, [&](const kda_path &path, int first) { kda_walk_input(m.ring, p.walk, path, first, warp, column); });
    }
    __syncwarp();
    kl_cluster_sync(); /* nobody leaves while others still signal it */
}

template <class F> kl_grid grid_of(int64_t clusters)
{
    kl_grid g;
    g.x = F::BLOCKS * clusters;
    g.threads = THREADS;
    g.shared = sizeof(typename F::shared);
    g.cluster = F::BLOCKS;
    return g;
}

template <class F> int64_t clusters_of(const kl_ctx *ctx, const kda_problem *p)
{
    int64_t pairs = p->N * p->HV, most = kl_resident_clusters(ctx, grid_of<F>(1), forward<F>);
    return pairs < most ? pairs : most;
}

template <class F> kl_status launch(const kl_ctx *ctx, const kda_problem *p, void *workspace, int64_t clusters)
{
    work w = {};
    w.walk = kda_walk_of(p, workspace);
    w.source = kda_tile_source_of(p);
    w.ring = (unsigned char *)workspace + kda_sequences_room(p);
    w.pairs = p->N * p->HV;
    return kl_launch(ctx, "kda fused", grid_of<F>(clusters), forward<F>, w);
}

using eight = fused<128, 1, 3, 8>;

} // namespace

/* Few heads: parts of their sequences at a time, or eight blocks of 16 columns each share one. More heads than clusters fit the device at a time go in two passes. */
static bool fits(const kl_ctx *ctx, const kda_problem *p)
{
    return p->K > 64 && p->K <= 128 && p->V <= 128 && clusters_of<eight>(ctx, p) == p->N * p->HV;
}

size_t kda_cuda_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const kda_problem *p = (const kda_problem *)problem;
    if (kda_cuda_scan_pays(ctx, p))
        return kda_cuda_scan_workspace(ctx, p, pass);
    if (!fits(ctx, p))
        return kda_cuda_two_pass_workspace(ctx, p, pass);
    return kda_sequences_room(p) + (size_t)(p->N * p->HV) * eight::BLOCKS * PLACES * eight::TILE;
}

kl_status kda_cuda_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = (const kda_problem *)problem;
    if (kda_cuda_scan_pays(ctx, p))
        return kda_cuda_scan_forward(ctx, p, workspace, bytes);
    if (!fits(ctx, p))
        return kda_cuda_two_pass_forward(ctx, p, workspace, bytes);
    size_t need = kda_cuda_chunk_workspace(ctx, p, KL_FORWARD);
    KL_REQUIRE(!need || (workspace && bytes >= need), "kda: workspace: expected %zu bytes, got %zu", need, workspace ? bytes : 0);
    KL_TRY(kda_sequences_upload(ctx, p, workspace));
    return launch<eight>(ctx, p, workspace, p->N * p->HV);
}
