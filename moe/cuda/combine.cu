/* The rows of a token's experts added up. A thread has eight columns of a token. */
#include "common/gpu.h"
#include "moe/cuda/backward.cuh"

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
    const float *dl; /* backward: gradients of the logits [T,E], where not after a softmax only of the chosen experts */
    const int *id;
    moe_router_view v;
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

/* sum += router^T dl of token t */
__device__ __forceinline__ void add_router(float sum[8], const combination &c, int64_t t, int64_t piece)
{
    const float *dl = c.dl + t * c.v.E;
    for (int n = 0; n < c.v.parts; n++) {
        const uint4 *router = (const uint4 *)c.v.router + (int64_t)n * c.v.E * c.across + piece;
        if (c.v.softmax)
            for (int e = 0; e < c.v.E; e++)
                add(sum, router[(int64_t)e * c.across], dl[e]);
        else
            for (int k = 0; k < c.top_k; k++) {
                int e = c.id[t * c.top_k + k];
                add(sum, router[(int64_t)e * c.across], dl[e]);
            }
    }
}

template <bool BACK> __global__ void __launch_bounds__(THREADS) combine(const __grid_constant__ combination c)
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
                weight[j] = BACK ? 1.0f : c.weight[pair];
            }
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (k + j < c.top_k)
                add(sum, v[j], weight[j]);
    }
    if (BACK)
        add_router(sum, c, t, piece);
    ((uint4 *)c.y)[i] = make_uint4(kl_pack_bf16(sum[0], sum[1]), kl_pack_bf16(sum[2], sum[3]), kl_pack_bf16(sum[4], sum[5]), kl_pack_bf16(sum[6], sum[7]));
}

kl_grid grid_of(const combination &c)
{
    kl_grid g;
    g.x = moe_ceil(c.pieces, THREADS);
    g.threads = THREADS;
    g.overlap = true;
    return g;
}

combination combination_of(const moe_problem *p, int64_t count, uint16_t *y, const uint16_t *row, const int *row_of)
{
    combination c = {};
    c.y = y, c.row = row, c.row_of = row_of;
    c.pieces = count * (p->D / 8);
    c.across = (int)(p->D / 8), c.top_k = (int)p->top_k;
    c.shared = p->Is > 0;
    return c;
}

} // namespace

kl_status moe_device_combine(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const int *row_of, const float *weight, const uint16_t *row)
{
    kl_range range("moe combine");
    combination c = combination_of(p, count, (uint16_t *)p->y + t * p->D, row, row_of);
    c.weight = weight;
    return kl_launch(ctx, "moe combine", grid_of(c), combine<false>, c);
}

kl_status moe_device_combine_back(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const moe_device_routes *r, const int *row_of, const uint16_t *row,
                                  uint16_t *dx)
{
    kl_range range("moe combine_bwd");
    combination c = combination_of(p, count, dx, row, row_of);
    c.dl = r->logit;
    c.id = r->id;
    c.v = moe_view_of(p, t, count, r);
    return kl_launch(ctx, "moe combine_bwd", grid_of(c), combine<true>, c);
}
