/* Sums of squares and AdamW. The sum is taken in shares that are cut the same way on every device; CUB's reductions would cut
 * them by the number of multiprocessors. */
#include <algorithm>
#include <cmath>

#include "harness/cuda/optimizer.cuh"

namespace {

enum { THREADS = 256, SHARES = 1056 };

template <class A, int N> __global__ void __launch_bounds__(THREADS) square_shares(const A *x, int64_t n, double *share)
{
    KL_SHARED(memory);
    double sum = 0.0;
#pragma unroll 4
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * N; i < n; i += (int64_t)SHARES * THREADS * N) {
        float v[N], squares = 0.0f;
        fetch_cell<A, N>(x, i).get(v);
#pragma unroll
        for (int j = 0; j < N; j++)
            squares += v[j] * v[j];
        sum += squares;
    }
    sum = block_sum(sum, (double *)memory);
    if (threadIdx.x == 0)
        share[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(THREADS) add_shares(const double *share, int count, double *out, bool accumulate)
{
    KL_SHARED(memory);
    double sum = 0.0;
    kl_grid_wait();
    for (int i = (int)threadIdx.x; i < count; i += THREADS)
        sum += share[i];
    sum = block_sum(sum, (double *)memory);
    if (threadIdx.x == 0)
        *out = (accumulate ? *out : 0.0) + sum;
}

struct adamw_arguments {
    layers_adamw p;
    float beta1, rest1, beta2, rest2, rate, v_scale, keep, tiny;
};

template <class G, int N> __global__ void __launch_bounds__(THREADS) step(const __grid_constant__ adamw_arguments a)
{
    const layers_adamw &p = a.p;
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * N;
    if (i >= p.n)
        return;
    auto fetched_g = fetch_cell<G, N>(p.g, i);
    auto fetched_m = fetch_cell<float, N>(p.m, i), fetched_v = fetch_cell<float, N>(p.v, i), fetched_w = fetch_cell<float, N>(p.w, i);
    float scale = kl_clip(p.sumsq, p.clip), g[N], m[N], v[N], w[N];
    fetched_g.get(g);
    fetched_m.get(m);
    fetched_v.get(v);
    fetched_w.get(w);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float x = scale * g[j];
        m[j] = a.beta1 * m[j] + a.rest1 * x;
        v[j] = a.beta2 * v[j] + a.rest2 * x * x;
        w[j] = a.keep * w[j] - a.rate * m[j] / (sqrtf(a.v_scale * v[j]) + a.tiny);
    }
    kda_row<float, N>::put(p.m + i, m);
    kda_row<float, N>::put(p.v + i, v);
    kda_row<float, N>::put(p.w + i, w);
    if (p.copy)
        kda_row<uint16_t, N>::put(p.copy + i, w);
}

} // namespace

size_t cuda_sumsq_workspace(const layers_sumsq *) { return SHARES * sizeof(double); }

kl_status cuda_sumsq(kl_ctx *ctx, const layers_sumsq *p, void *workspace, size_t)
{
    bool cells = in_cells(p->n, 0, (uintptr_t)p->x);
    int64_t blocks = divided(p->n, THREADS * (cells ? CELL : 1));
    kl_grid grid = grid_of(std::min(blocks, (int64_t)SHARES), THREADS, THREADS / 32 * sizeof(double));
    double *share = (double *)workspace;
    if (p->dtype == KL_BF16)
        KL_TRY(kl_launch(ctx, "sumsq", grid, cells ? square_shares<uint16_t, CELL> : square_shares<uint16_t, 1>, (const uint16_t *)p->x, p->n, share));
    else
        KL_TRY(kl_launch(ctx, "sumsq", grid, cells ? square_shares<float, CELL> : square_shares<float, 1>, (const float *)p->x, p->n, share));
    kl_grid one = grid_of(1, THREADS, grid.shared);
    one.overlap = true;
    return kl_launch(ctx, "sumsq", one, add_shares, (const double *)share, (int)grid.x, p->sum, p->accumulate);
}

kl_status cuda_adamw(kl_ctx *ctx, const layers_adamw *p)
{
    adamw_arguments a = {*p, (float)p->beta1, (float)(1.0 - p->beta1), (float)p->beta2, (float)(1.0 - p->beta2),
                         (float)(p->lr / (1.0 - pow(p->beta1, (double)p->step))), (float)(1.0 / (1.0 - pow(p->beta2, (double)p->step))),
                         (float)(1.0 - p->lr * p->decay), (float)p->eps};
    bool cells = in_cells(p->n, 0, (uintptr_t)p->w | (uintptr_t)p->m | (uintptr_t)p->v | (uintptr_t)p->g | (uintptr_t)p->copy);
    kl_grid grid = grid_of(divided(p->n, THREADS * (cells ? CELL : 1)), THREADS);
    if (p->g_dtype == KL_BF16)
        return kl_launch(ctx, "adamw", grid, cells ? step<uint16_t, CELL> : step<uint16_t, 1>, a);
    return kl_launch(ctx, "adamw", grid, cells ? step<float, CELL> : step<float, 1>, a);
}
