/* The (token, choice) pairs sorted by expert. Within a chunk of 32 tokens a row's place is the number of lower bits in its
 * expert's word; chunks are scanned in order. Nothing depends on who comes first. */
#include "common/gpu.h"
#include "moe/cuda/moe_cuda.cuh"

namespace {

enum { SCANNERS = 32, PLACERS = 256 };

/* before, total: lane = expert, a warp a run of chunks. */
__global__ void __launch_bounds__(32 * SCANNERS) scan_chunks(const __grid_constant__ moe_device_routes r, const __grid_constant__ moe_device_rows rows, int E, int chunks)
{
    KL_SHARED(memory);
    int *sum = (int *)memory; /* [SCANNERS][32] */
    int lane = kl_lane(), warp = (int)threadIdx.x / 32, e = (int)blockIdx.x * 32 + lane;
    int share = (chunks + SCANNERS - 1) / SCANNERS, from = warp * share, to = from + share < chunks ? from + share : chunks;
    int mine = 0;
    kl_grid_wait();
#pragma unroll 4
    for (int c = from; c < to; c++)
        mine += e < E ? __popc(r.mask[(int64_t)c * E + e]) : 0;
    sum[warp * 32 + lane] = mine;
    __syncthreads();
    int before = 0;
    for (int w = 0; w < warp; w++)
        before += sum[w * 32 + lane];
    if (e < E && warp == SCANNERS - 1)
        rows.total[e] = before + mine;
    kl_grid_release();
#pragma unroll 4
    for (int c = from; c < to && e < E; c++) {
        rows.before[(int64_t)c * E + e] = before;
        before += __popc(r.mask[(int64_t)c * E + e]);
    }
}

/* How many clusters of `blocks` tiles of at most `most` rows an expert's n rows take. */
__device__ __forceinline__ int groups_of(int n, const moe_cut &cut) { return (n + cut.blocks * cut.most - 1) / (cut.blocks * cut.most); }

/* first[0..E] = sums of f(total) before each expert, in shared memory; all threads, a warp at a time. */
template <class Of> __device__ __forceinline__ void sum_before(int *first, const int *total, int E, Of f)
{
    int lane = kl_lane();
    if (threadIdx.x < 32) {
        int carry = 0;
        for (int from = 0; from < E; from += 32) {
            int own = from + lane < E ? f(total[from + lane]) : 0, sum = own;
            for (int m = 1; m < 32; m *= 2) {
                int other = __shfl_up_sync(0xffffffffu, sum, m);
                sum += lane >= m ? other : 0;
            }
            if (from + lane < E)
                first[from + lane] = carry + sum - own;
            carry += __shfl_sync(0xffffffffu, sum, 31);
        }
        if (lane == 0)
            first[E] = carry;
    }
    __syncthreads();
}

/* Cuts the rows of each expert into tiles of nearly equal size, so that the last is not a remainder. */
__device__ __forceinline__ void cut_groups(const moe_device_rows &rows, const int *first, int *before, int E, const moe_cut &cut)
{
    enum { EVEN = 16 }; /* up to so many groups, rounding to eights leaves the last one some rows */
    sum_before(before, rows.total, E, [&](int n) { return groups_of(n, cut); });
    for (int e = (int)threadIdx.x; e < E; e += PLACERS) {
        int n = first[e + 1] - first[e], groups = before[e + 1] - before[e];
        int tile = groups > EVEN ? cut.most : (n + 8 * cut.blocks * groups - 1) / (8 * cut.blocks * max(groups, 1)) * 8;
        for (int i = 0; i < groups; i++) {
            int done = i * cut.blocks * tile;
            cut.group[before[e] + i] = {e, first[e] + done, min(n - done, cut.blocks * tile), tile};
        }
    }
    if (threadIdx.x == 0)
        *cut.groups = before[E];
}

__global__ void __launch_bounds__(PLACERS) place(const __grid_constant__ moe_device_routes r, const __grid_constant__ moe_device_rows rows,
                                                 const __grid_constant__ moe_cut cut, int T, int E, int top_k)
{
    KL_SHARED(memory);
    int *first = (int *)memory; /* [E+1], then as many of groups */
    kl_grid_wait();
    sum_before(first, rows.total, E, [](int n) { return n; });
    int64_t chunk = blockIdx.x;
    int tokens = min(T - (int)chunk * MOE_CHUNK, MOE_CHUNK);
    kl_grid_release();
    for (int i = (int)threadIdx.x; i < tokens * top_k; i += PLACERS) {
        int64_t pair = chunk * MOE_CHUNK * top_k + i;
        int e = r.id[pair], t = i / top_k;
        uint32_t earlier = r.mask[chunk * E + e] & ((1u << t) - 1);
        int row = first[e] + rows.before[chunk * E + e] + __popc(earlier);
        rows.token[row] = (int)(chunk * MOE_CHUNK) + t;
        rows.weight[row] = r.weight[pair];
        rows.row_of[pair] = row;
    }
    if (chunk > 0)
        return;
    for (int e = (int)threadIdx.x; e <= E; e += PLACERS)
        rows.first[e] = first[e];
    cut_groups(rows, first, first + E + 1, E, cut);
}

} // namespace

moe_device_rows moe_device_rows_carve(kl_arena *a, const moe_problem *p, int64_t tokens)
{
    moe_device_rows r;
    r.before = KL_TAKE(a, int, moe_ceil(tokens, MOE_CHUNK) * p->E);
    r.total = KL_TAKE(a, int, p->E);
    r.first = KL_TAKE(a, int, p->E + 1);
    r.token = KL_TAKE(a, int, tokens * p->top_k);
    r.row_of = KL_TAKE(a, int, tokens * p->top_k);
    r.weight = KL_TAKE(a, float, tokens * p->top_k);
    return r;
}

moe_cut moe_cut_carve(kl_arena *a, const moe_problem *p, int64_t tokens, int blocks, int most)
{
    int64_t rows = tokens * p->top_k;
    moe_cut c = {nullptr, nullptr, blocks, most};
    c.group = KL_TAKE(a, moe_group, rows / (blocks * most) + (rows < p->E ? rows : p->E));
    c.groups = KL_TAKE(a, int, 1);
    return c;
}

kl_status moe_device_group(const kl_ctx *ctx, const moe_problem *p, int64_t count, const moe_device_routes *r, const moe_device_rows *rows, const moe_cut *cut)
{
    kl_range range("moe sort");
    int chunks = (int)moe_ceil(count, MOE_CHUNK);
    kl_grid g;
    g.x = moe_ceil(p->E, 32);
    g.threads = 32 * SCANNERS;
    g.shared = SCANNERS * 32 * sizeof(int);
    g.overlap = true;
    KL_TRY(kl_launch(ctx, "moe scan", g, scan_chunks, *r, *rows, (int)p->E, chunks));
    g.x = chunks;
    g.threads = PLACERS;
    g.shared = 2 * (size_t)(p->E + 1) * sizeof(int);
    return kl_launch(ctx, "moe place", g, place, *r, *rows, *cut, (int)count, (int)p->E, (int)p->top_k);
}
