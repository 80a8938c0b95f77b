/* The inside of an expert, backward. A warp has a row. */
#include "common/gpu.h"
#include "moe/cuda/backward.cuh"

namespace {

enum { WARPS = 8 };

__device__ __forceinline__ void unpack(float to[8], uint4 v)
{
    const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        to[2 * i] = kl_bf16_low(pair[i]), to[2 * i + 1] = kl_bf16_high(pair[i]);
}

__device__ __forceinline__ uint4 pack(const float x[8])
{
    return make_uint4(kl_pack_bf16(x[0], x[1]), kl_pack_bf16(x[2], x[3]), kl_pack_bf16(x[4], x[5]), kl_pack_bf16(x[6], x[7]));
}

__global__ void __launch_bounds__(32 * WARPS) inner_gradients(const __grid_constant__ moe_inner_gradients g)
{
    int64_t r = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    kl_grid_wait();
    kl_grid_release();
    if (r >= g.rows)
        return;
    float c = g.weight ? g.weight[r] : 1.0f, dc = 0.0f;
    uint4 *ab = (uint4 *)(g.ab + r * 2 * g.width), *m = (uint4 *)(g.m + r * g.width);
    int gate = g.up_first ? 1 : 0;
    for (int i = kl_lane(); i < g.width / 8; i += 32) {
        float a[8], b[8], dm0[8], da[8], db[8], cm[8];
        unpack(a, ab[2 * i + gate]);
        unpack(b, ab[2 * i + 1 - gate]);
        unpack(dm0, m[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float s = kl_rcp(1.0f + kl_exp2(-1.44269504f * a[j])), silu = a[j] * s, dm = c * dm0[j];
            dc += dm0[j] * silu * b[j];
            da[j] = dm * b[j] * (s + silu * (1.0f - s));
            db[j] = dm * silu;
            cm[j] = c * silu * b[j];
        }
        ab[2 * i + gate] = pack(da);
        ab[2 * i + 1 - gate] = pack(db);
        m[i] = pack(cm);
    }
    dc = kl_warp_sum(dc);
    if (g.dc && kl_lane() == 0)
        g.dc[r] = dc;
}

} // namespace

kl_status moe_device_inner_gradients(const kl_ctx *ctx, const moe_inner_gradients &inner)
{
    kl_range range("moe inner_bwd");
    kl_grid g;
    g.x = moe_ceil(inner.rows, WARPS);
    g.threads = 32 * WARPS;
    g.overlap = true;
    return kl_launch(ctx, "moe inner_bwd", g, inner_gradients, inner);
}
