/* The chunk forward in two passes: one kernel prepares the tiles of all heads into the workspace, another walks over them,
 * its blocks there as soon as the last tiles leave them room. */
#include <algorithm>

#include "common/gpu.h"
#include "kda/cuda/prepare.cuh"
#include "kda/cuda/walk_wide.cuh"

namespace {

/* ---- K up to 128: a warpgroup walks, 64 columns of V of one head of one sequence a block ---- */

template <int KP> using wide_ring = kda_wide_ring<KP, 5>;

template <int KP>
__global__ void __launch_bounds__(KDA_WIDE_THREADS) walk_wide(const __grid_constant__ kda_walk p, const unsigned char *tiles, int parts)
{
    KL_SHARED(shared);
    wide_ring<KP> &m = *(wide_ring<KP> *)shared;
    int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0), column = KDA_WIDE_COLUMNS * (int)(blockIdx.x % parts);
    if (threadIdx.x == 0)
        kda_wide_init(m);
    __syncthreads();
    kl_grid_wait();
    kda_path path = kda_path_of(p, blockIdx.x / parts);
    if (path.tiles < 0)
        return;
    kda_stretch all = kda_whole(p, path, 0);
    if (warp < 4)
        kda_wide_compute(m, p, path, all, column, warp);
    else if (warp == 4)
        kda_wide_load(m, p, path, all, column,
                      [&](int i) { return tiles + (size_t)((path.place.tile + i) * p.HV + path.head) * wide_ring<KP>::TILE; });
    else
        kda_wide_store(m, p, path, all, column, [](int) {});
}

/* ---- wider K, and devices before Hopper: warps walk, 32 columns a block ---- */

enum { WARPS = 2, THREADS = 32 * (3 * WARPS + 1) }; /* state, output and input warps, and one that loads */

template <int KP> using narrow_ring = kda_ring<KP, WARPS, KP == 256 ? 3 : 4>;

template <int KP> __device__ __forceinline__ void load_tiles(narrow_ring<KP> &m, const kda_walk &p, const kda_path &path, const unsigned char *tiles)
{
    enum { BYTES = kda_tile<KP>::bytes };
    for (int i = 0; i < path.tiles; i++) {
        kda_ring_reserve(m, i);
        kl_bulk_load(m.slot[i % narrow_ring<KP>::SLOTS], tiles + (size_t)((path.place.tile + i) * p.HV + path.head) * BYTES, BYTES,
                     &m.full[i % narrow_ring<KP>::SLOTS]);
        kl_bulk_issued(&m.full[i % narrow_ring<KP>::SLOTS]);
    }
}

template <int KP> __global__ void __launch_bounds__(THREADS) walk(const __grid_constant__ kda_walk p, const unsigned char *tiles, int parts)
{
    KL_SHARED(shared);
    narrow_ring<KP> &m = *(narrow_ring<KP> *)shared;
    int warp = (int)threadIdx.x / 32, column = KDA_COLUMNS * ((int)(blockIdx.x % parts) * WARPS + warp % WARPS);
    if (threadIdx.x == 0)
        kda_ring_init(m);
    __syncthreads();
    kl_grid_wait();
    kda_path path = kda_path_of(p, blockIdx.x / parts);
    if (warp < WARPS)
        kda_walk_state(m, p, path, 0, warp, column);
    else if (warp < 2 * WARPS)
        kda_walk_output(m, p, path, 0, warp - WARPS, column);
    else if (warp < 3 * WARPS)
        kda_walk_input(m, p, path, 0, warp - 2 * WARPS, column);
    else if (kl_lane() == 0)
        load_tiles<KP>(m, p, path, tiles);
}

/* Wide: what wgmma needs is there, and K is at most 128. */
bool is_wide(const kl_ctx *ctx, const kda_problem *p) { return ctx->hopper && p->K <= 128; }

template <int KP, bool wide> kl_status launch_walk(const kl_ctx *ctx, const kda_problem *p, const void *table, const void *tiles)
{
    int parts = (int)kda_ceil(p->V, wide ? (int)KDA_WIDE_COLUMNS : KDA_COLUMNS * WARPS);
    kl_grid g;
    g.x = p->N * p->HV * parts;
    g.overlap = true;
    g.threads = wide ? (int)KDA_WIDE_THREADS : (int)THREADS;
    auto launch = [&](auto kernel) { return kl_launch(ctx, "kda walk", g, kernel, kda_walk_of(p, table), (const unsigned char *)tiles, parts); };
    if constexpr (wide) {
        g.shared = sizeof(wide_ring<KP>);
        return launch(walk_wide<KP>);
    } else {
        g.shared = sizeof(narrow_ring<KP>);
        return launch(walk<KP>);
    }
}

} // namespace

kda_walk kda_walk_of(const kda_problem *p, const void *table)
{
    kda_walk w = {};
    w.sequences = kda_sequences_of(p, table);
    w.v = (const uint16_t *)p->v;
    w.o = (uint16_t *)p->o;
    w.h0 = (const float *)p->h0;
    w.ht = (float *)p->ht;
    w.chunk_states = p->chunk_states;
    w.state_index = p->state_index;
    w.v_stride = kda_stride(p->v_stride, p->HV * p->V);
    w.o_stride = kda_stride(p->o_stride, p->HV * p->V);
    w.HV = p->HV;
    w.pool = p->state_pool ? p->state_pool : p->N;
    w.K = (int)p->K;
    w.V = (int)p->V;
    bool value_first = p->state_layout == KDA_STATE_VK;
    w.channel_stride = value_first ? 1 : w.V;
    w.column_stride = value_first ? w.K : 1;
    w.v_aligned = (uintptr_t)p->v % 16 == 0 && w.v_stride % 8 == 0 && p->V % 8 == 0;
    w.o_aligned = (uintptr_t)p->o % 16 == 0 && w.o_stride % 8 == 0 && p->V % 8 == 0;
    return w;
}

/* Bytes a block of the walk, the larger of the two kernels, on a device before Hopper. */
size_t kda_cuda_two_pass_shared(const kda_problem *p)
{
    int KP = kda_padded(p->K);
    return KP == 64 ? sizeof(narrow_ring<64>) : KP == 128 ? sizeof(narrow_ring<128>) : sizeof(narrow_ring<256>);
}

size_t kda_cuda_two_pass_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const kda_problem *p = (const kda_problem *)problem;
    (void)pass;
    return kda_sequences_room(p) + (size_t)(kda_tile_count(p) * p->HV) * (is_wide(ctx, p) ? kda_core_tile_bytes(p->K) : kda_tile_bytes(p->K));
}

kl_status kda_cuda_two_pass_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = (const kda_problem *)problem;
    size_t need = kda_cuda_two_pass_workspace(ctx, p, KL_FORWARD);
    KL_REQUIRE(!need || (workspace && bytes >= need), "kda: workspace: expected %zu bytes, got %zu", need, workspace ? bytes : 0);
    unsigned char *tiles = (unsigned char *)workspace + kda_sequences_room(p);
    KL_TRY(kda_sequences_upload(ctx, p, workspace));
    bool wide = is_wide(ctx, p);
    KL_TRY(kda_cuda_prepare(ctx, p, workspace, tiles, wide));
    switch (kda_padded(p->K)) {
    case 64: return wide ? launch_walk<64, true>(ctx, p, workspace, tiles) : launch_walk<64, false>(ctx, p, workspace, tiles);
    case 128: return wide ? launch_walk<128, true>(ctx, p, workspace, tiles) : launch_walk<128, false>(ctx, p, workspace, tiles);
    default: return launch_walk<256, false>(ctx, p, workspace, tiles);
    }
}

/* ---- the form that should take the least time ---- */

/* Measured nanoseconds of two passes: of a block for a tile walked over; of memory for a block's tile; of a multiprocessor for a tile
 * prepared; before the first and after the last. */
enum { WALK_TILE = 570, READ = 12, PREPARE = 2150, START = 10000 };

static int64_t two_pass_time(const kl_ctx *ctx, const kda_problem *p)
{
    int64_t blocks = kl_gpu_multiprocessors(ctx), all = kda_tile_count(p) * p->HV, parts = kda_ceil(p->V, (int)KDA_WIDE_COLUMNS);
    int64_t rounds = kda_ceil(p->N * p->HV * parts, blocks), longest = kda_ceil(kda_longest(p->T, p->N, p->cu_seqlens), kda_tile_tokens(p));
    return START + all * PREPARE / blocks + std::max(longest * rounds * WALK_TILE, all * parts * READ);
}

static const struct form {
    int64_t (*time)(const kl_ctx *, const kda_problem *); /* nanoseconds that it should take; INT64_MAX: not to be had */
    size_t (*workspace)(const kl_ctx *, const void *, kl_pass);
    kl_status (*forward)(kl_ctx *, const void *, void *, size_t);
} forms[] = {{two_pass_time, kda_cuda_two_pass_workspace, kda_cuda_two_pass_forward},
             {kda_cuda_persistent_time, kda_cuda_persistent_workspace, kda_cuda_persistent_forward},
             {kda_cuda_follow_time, kda_cuda_follow_workspace, kda_cuda_follow_forward},
             {kda_cuda_fused_time, kda_cuda_fused_workspace, kda_cuda_fused_forward},
             {kda_cuda_scan_time, kda_cuda_scan_workspace, kda_cuda_scan_forward}};

static const form &fastest(const kl_ctx *ctx, const kda_problem *p)
{
    const form *best = forms;
    int64_t least = INT64_MAX;
    for (const form &f : forms) {
        int64_t time = f.time(ctx, p);
        if (time < least) {
            least = time;
            best = &f;
        }
    }
    return *best;
}

size_t kda_cuda_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    return fastest(ctx, (const kda_problem *)problem).workspace(ctx, problem, pass);
}

kl_status kda_cuda_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    return fastest(ctx, (const kda_problem *)problem).forward(ctx, problem, workspace, bytes);
}
