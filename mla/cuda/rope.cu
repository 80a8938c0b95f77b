/* Rotary embedding on the device: a thread takes one pair of columns of a row through all heads, its angle made in double. */
#include "common/device.cuh"
#include "mla/internal.h"

namespace {

enum { THREADS = 256 };

__device__ __forceinline__ float read(const float *x) { return *x; }
__device__ __forceinline__ float read(const uint16_t *x) { return kl_load_bf16(x); }
__device__ __forceinline__ void write(float *x, float v) { *x = v; }
__device__ __forceinline__ void write(uint16_t *x, float v) { *x = kl_to_bf16(v); }

template <class T> __global__ void __launch_bounds__(THREADS) rotate(mla_rotation r)
{
    int64_t half = r.Dr / 2, x = (int64_t)blockIdx.x * THREADS + threadIdx.x, row = x / half, i = x % half;
    if (row >= r.rows)
        return;
    /* (a, b) <- (a cos - b sin, b cos + a sin), angle = position theta^(-2i/Dr) */
    double angle = (double)r.position[row] * pow((double)r.theta, -2.0 * (double)i / (double)r.Dr);
    float c = (float)cos(angle), s = (float)(r.inverse ? -sin(angle) : sin(angle));
    T *a = (T *)r.x + row * r.row_stride + i;
    for (int64_t h = 0; h < r.heads; h++, a += r.head_stride) {
        float a0 = read(a), b0 = read(a + half);
        write(a, a0 * c - b0 * s);
        write(a + half, b0 * c + a0 * s);
    }
}

} // namespace

kl_status mla_cuda_rope(kl_ctx *ctx, const mla_rotation *r)
{
    kl_grid g;
    g.threads = THREADS;
    g.x = (r->rows * (r->Dr / 2) + THREADS - 1) / THREADS;
    return r->dtype == KL_BF16 ? kl_launch(ctx, "mla rope", g, rotate<uint16_t>, *r) : kl_launch(ctx, "mla rope", g, rotate<float>, *r);
}
