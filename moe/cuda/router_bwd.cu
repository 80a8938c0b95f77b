/* The router, backward:
 *
 *     w_n = scale s_n / sum:  ds_n = (scale dw_n - sum_m dw_m w_m) / sum;
 *     s = sigmoid(l):  dl = s (1 - s) ds;   s = softmax(l):  dl = s (ds - sum s ds);   drouter += dl^T x
 *
 * After a sigmoid only the chosen experts' dl are not 0, and only those are written and read. */
#include "common/gpu.h"
#include "moe/cuda/backward.cuh"
#include "moe/cuda/choose.cuh"

namespace {

enum { WARPS = 8, THREADS = 256, DENSE_EXPERTS = 4, AHEAD = 4 };

struct way_back {
    moe_router_view v;
    moe_device_routes r;
    const int *row_of, *first, *token;
    const float *dc;
    float *drouter;
};

/* A warp a token; dl takes the logits' place. */
__global__ void __launch_bounds__(32 * WARPS) choose_back(const __grid_constant__ way_back b)
{
    const moe_router_view &v = b.v;
    int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = kl_lane();
    kl_grid_wait();
    kl_grid_release();
    if (t >= v.T)
        return;
    float *logit = b.r.logit + t * v.E, dw = 0.0f, w = 0.0f;
    moe_score score = moe_score_of(v, logit);
    int id = -1;
    if (lane < v.top_k) {
        int64_t pair = t * v.top_k + lane;
        dw = b.dc[b.row_of[pair]];
        w = b.r.weight[pair];
        id = b.r.id[pair];
    }
    float mean = v.renormalize ? kl_warp_sum(dw * w) : 0.0f;
    float ds = id >= 0 ? (v.scale * dw - mean) / b.r.sum[t] : 0.0f, s = id >= 0 ? score(logit[id]) : 0.0f;
    if (!v.softmax) {
        __syncwarp();
        if (id >= 0)
            logit[id] = s * (1.0f - s) * ds;
        return;
    }
    float total = kl_warp_sum(s * ds);
    for (int e = lane; e < v.E; e += 32)
        logit[e] = -score(logit[e]) * total;
    __syncwarp();
    if (id >= 0)
        logit[id] += s * ds;
}

/* drouter[e,:] of EXPERTS experts, a thread eight columns; their rows, or every token. */
template <int EXPERTS> __global__ void __launch_bounds__(THREADS) router_gradients(const __grid_constant__ way_back b, int slabs)
{
    const moe_router_view &v = b.v;
    int e = (int)blockIdx.x / slabs * EXPERTS, d = ((int)blockIdx.x % slabs * THREADS + (int)threadIdx.x) * 8;
    kl_grid_wait();
    kl_grid_release();
    if (d >= v.D)
        return;
    int from = EXPERTS > 1 ? 0 : b.first[e], to = EXPERTS > 1 ? v.T : b.first[e + 1];
    float sum[EXPERTS][8] = {};
    for (int r = from; r < to; r += AHEAD) {
        uint4 x[AHEAD];
        float dl[AHEAD][EXPERTS];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int64_t t = r + j < to ? (EXPERTS > 1 ? r + j : b.token[r + j]) : -1;
            x[j] = t >= 0 ? *(const uint4 *)(v.x + t * v.D + d) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int n = 0; n < EXPERTS; n++)
                dl[j][n] = t >= 0 && e + n < v.E ? b.r.logit[t * v.E + e + n] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const uint32_t pair[4] = {x[j].x, x[j].y, x[j].z, x[j].w};
#pragma unroll
            for (int n = 0; n < EXPERTS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sum[n][2 * i] += dl[j][n] * kl_bf16_low(pair[i]);
                    sum[n][2 * i + 1] += dl[j][n] * kl_bf16_high(pair[i]);
                }
        }
    }
#pragma unroll
    for (int n = 0; n < EXPERTS; n++)
        for (int i = 0; e + n < v.E && i < 8; i++)
            b.drouter[(int64_t)(e + n) * v.D + d + i] += sum[n][i];
}

} // namespace

kl_status moe_device_route_back(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const moe_device_routes *r, const moe_device_rows *rows,
                                const float *dc, float *drouter)
{
    kl_range range("moe router_bwd");
    way_back b = {moe_view_of(p, t, count, r), *r, rows->row_of, rows->first, rows->token, dc, drouter};
    kl_grid g;
    g.x = moe_ceil(count, WARPS);
    g.threads = 32 * WARPS;
    g.overlap = true;
    KL_TRY(kl_launch(ctx, "moe choose_bwd", g, choose_back, b));
    if (!drouter)
        return kl_ok();
    int slabs = (int)moe_ceil(p->D, 8 * THREADS);
    g.x = slabs * (b.v.softmax ? moe_ceil(p->E, DENSE_EXPERTS) : p->E);
    g.threads = THREADS;
    return kl_launch(ctx, "moe router_bwd", g, b.v.softmax ? router_gradients<DENSE_EXPERTS> : router_gradients<1>, b, slabs);
}
