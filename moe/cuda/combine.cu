/* The rows of a token's experts added up. A thread has eight columns of a token. */
#include "moe/cuda/chunk.cuh"

namespace {

enum { THREADS = 256, AHEAD = 8 };

struct combination {
    uint16_t *y;
    const uint16_t *row;
    const int *row_of;
    const float *weight;
    int64_t pieces; /* of eight columns, in all */
    int across, top_k;
    bool shared;    /* y holds the shared expert's part */
};

__device__ __forceinline__ void add(float sum[8], uint4 v, float weight)
{
    const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[2 * i] += weight * kl_bf16_low(pair[i]);
        sum[2 * i + 1] += weight * kl_bf16_high(pair[i]);
    }
}

__global__ void __launch_bounds__(THREADS) combine(const __grid_constant__ combination c)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, t = i / c.across, piece = i % c.across;
    kl_grid_wait();
    kl_grid_release();
    if (i >= c.pieces)
        return;
    float sum[8] = {};
    if (c.shared)
        add(sum, ((const uint4 *)c.y)[i], 1.0f);
    for (int k = 0; k < c.top_k; k += AHEAD) {
        uint4 v[AHEAD];
        float weight[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (k + j < c.top_k) {
                int64_t pair = t * c.top_k + k + j;
                v[j] = __ldcs((const uint4 *)c.row + (int64_t)c.row_of[pair] * c.across + piece);
                weight[j] = c.weight[pair];
            }
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (k + j < c.top_k)
                add(sum, v[j], weight[j]);
    }
    ((uint4 *)c.y)[i] = make_uint4(kl_pack_bf16(sum[0], sum[1]), kl_pack_bf16(sum[2], sum[3]), kl_pack_bf16(sum[4], sum[5]), kl_pack_bf16(sum[6], sum[7]));
}

} // namespace

kl_status moe_device_combine(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const int *row_of, const float *weight, const uint16_t *row)
{
    combination c = {(uint16_t *)p->y + t * p->D, row, row_of, weight, count * (p->D / 8), (int)(p->D / 8), (int)p->top_k, p->Is > 0};
    kl_grid g;
    g.x = moe_ceil(c.pieces, THREADS);
    g.threads = THREADS;
    g.overlap = true;
    return kl_launch(ctx, "moe combine", g, combine, c);
}
