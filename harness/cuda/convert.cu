/* Floats rounded to bfloat16, for products. */
#include "harness/cuda/cells.cuh"

namespace {

enum { THREADS = 128 };

template <int N> __global__ void __launch_bounds__(THREADS) round_rows(const float *x, int64_t stride, uint16_t *y, int64_t columns, int64_t across)
{
    int64_t t = blockIdx.x / across, i = (blockIdx.x % across * THREADS + threadIdx.x) * (int64_t)N;
    if (i >= columns)
        return;
    float v[N];
    fetch_cell<float, N>(x, t * stride + i).get(v);
    kda_row<uint16_t, N>::put(y + t * columns + i, v);
}

} // namespace

kl_status cuda_round(kl_ctx *ctx, int64_t rows, int64_t columns, const float *x, int64_t stride, uint16_t *y)
{
    bool cells = in_cells(columns, stride, (uintptr_t)x | (uintptr_t)y);
    int64_t across = divided(columns, THREADS * (cells ? CELL : 1));
    return kl_launch(ctx, "round", grid_of(rows * across, THREADS), cells ? round_rows<CELL> : round_rows<1>, x, stride, y, columns, across);
}
