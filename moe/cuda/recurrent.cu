/* A few tokens, one by one: every chosen expert's weights stream past once, a warp a row, dealt out to the whole device.
 *
 *     h_k[i] = silu(w1_k[i,:] x) w3_k[i,:] x;      y[d] = shared + sum_k w_k (w2_k[d,:] h_k)
 *
 * Three launches: logits; then each block chooses for itself and takes rows of w1 and w3; then of w2, a block all experts of its d, so that
 * it adds them up in order. The last is there early and has its first rows on the way while the one before it ends. */
#include "common/gpu.h"
#include "moe/cuda/choose.cuh"
#include "moe/cuda/chunk.cuh"
#include "moe/cuda/weights.cuh"

namespace {

enum { WARPS = 16, THREADS = 32 * WARPS };

/* One set of experts; w1, w3: [width,D], w2: [D,width], `stride` elements from expert to expert. */
struct experts {
    const uint16_t *w1, *w3, *w2;
    int64_t stride1, stride2;
    int width;
    uint16_t *h; /* [slots,width] */
};

struct step {
    moe_router_view v;
    const float *logit;
    experts routed, shared; /* width 0: none */
    uint16_t *y;
    int *id;                /* what the caller wants of the choice, or NULL */
    float *weight;
};

/* Shared memory of a block: the choice of all tokens, and what the rows are multiplied with. */
struct room {
    int *id;
    float *weight;
    uint32_t *scratch;
    unsigned char *rest;
};

__host__ __device__ inline size_t up16(size_t bytes) { return (bytes + 15) / 16 * 16; }
__host__ __device__ inline size_t choice_bytes(int T, int top_k, int E, int n_group) { return up16((size_t)T * (2 * top_k + moe_choice_words(E, n_group)) * 4); }

__device__ __forceinline__ room room_of(unsigned char *memory, const moe_router_view &v)
{
    int *id = (int *)memory;
    float *weight = (float *)(id + v.T * v.top_k);
    return {id, weight, (uint32_t *)(weight + v.T * v.top_k), memory + choice_bytes(v.T, v.top_k, v.E, v.n_group)};
}

__device__ __forceinline__ void choose(const step &s, const room &m)
{
    const moe_router_view &v = s.v;
    int warp = (int)threadIdx.x / 32, lane = kl_lane();
    for (int t = warp; v.E && t < v.T; t += WARPS) {
        moe_choice c = moe_choose(v, s.logit + t * v.E, m.scratch + t * moe_choice_words(v.E, v.n_group));
        if (lane < v.top_k) {
            m.id[t * v.top_k + lane] = c.id;
            m.weight[t * v.top_k + lane] = c.weight;
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void put_choice(const step &s, const room &m)
{
    for (int i = (int)threadIdx.x; i < s.v.T * s.v.top_k; i += THREADS) {
        if (s.id)
            s.id[i] = m.id[i];
        if (s.weight)
            s.weight[i] = m.weight[i];
    }
}

__device__ __forceinline__ void add_product(float &sum, const uint4 &a, const uint4 &b)
{
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        sum += kl_bf16_low(x[i]) * kl_bf16_low(y[i]), sum += kl_bf16_high(x[i]) * kl_bf16_high(y[i]);
}

__device__ __forceinline__ uint4 piece_of(const uint16_t *row, int piece, int pieces)
{
    return piece < pieces ? __ldcs((const uint4 *)row + piece) : make_uint4(0, 0, 0, 0);
}

/* Row `row` of w1 and w3 of expert e, times x: one number of h. */
__device__ __forceinline__ void inner_row(const experts &w, int e, int row, const uint4 *x, int D, uint16_t *h)
{
    enum { AHEAD = 3 };
    const uint16_t *w1 = w.w1 + e * w.stride1 + (int64_t)row * D, *w3 = w.w3 + e * w.stride1 + (int64_t)row * D;
    int pieces = D / 8;
    float a = 0.0f, b = 0.0f;
    for (int from = kl_lane(); from < pieces; from += 32 * AHEAD) {
        uint4 p[AHEAD], q[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            p[j] = piece_of(w1, from + 32 * j, pieces);
            q[j] = piece_of(w3, from + 32 * j, pieces);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            uint4 at = from + 32 * j < pieces ? x[from + 32 * j] : make_uint4(0, 0, 0, 0);
            add_product(a, p[j], at);
            add_product(b, q[j], at);
        }
    }
    a = kl_warp_sum(a);
    b = kl_warp_sum(b);
    if (kl_lane() == 0)
        *h = kl_to_bf16(a * kl_rcp(1.0f + kl_exp2(-1.44269504f * a)) * b);
}

__global__ void __launch_bounds__(THREADS, 2) gate_up(const __grid_constant__ step s)
{
    KL_SHARED(memory);
    room m = room_of(memory, s.v);
    uint4 *x = (uint4 *)m.rest;
    int pieces = s.v.D / 8, warp = (int)(threadIdx.x / 32 * gridDim.x + blockIdx.x), warps = (int)gridDim.x * WARPS;
    if (!s.v.E) /* no logits were computed in between: x may still be on its way */
        kl_grid_wait();
    for (int i = (int)threadIdx.x; i < s.v.T * pieces; i += THREADS)
        x[i] = ((const uint4 *)s.v.x)[i];
    __syncthreads();
    for (int i = warp; i < s.v.T * s.shared.width; i += warps)
        inner_row(s.shared, 0, i % s.shared.width, x + i / s.shared.width * pieces, s.v.D, &s.shared.h[i]);
    kl_grid_wait();
    kl_grid_release();
    choose(s, m);
    if (blockIdx.x == 0)
        put_choice(s, m);
    for (int i = warp; i < s.v.T * s.v.top_k * s.routed.width; i += warps) {
        int slot = i / s.routed.width;
        inner_row(s.routed, m.id[slot], i % s.routed.width, x + slot / s.v.top_k * pieces, s.v.D, &s.routed.h[i]);
    }
}

/* Rows d of w2 of several slots, two at a time: slot_d = w2[d,:] h. */
struct outer_rows {
    enum { TOGETHER = 2, AHEAD = 4 };
    const experts &w;
    const int *id;   /* expert of each slot; NULL: 0 */
    int d, count, slots;
    uint4 p[TOGETHER][AHEAD];

    __device__ __forceinline__ void load(int i, int from)
    {
        int pieces = w.width / 8;
#pragma unroll
        for (int n = 0; n < TOGETHER; n++) {
            int at = i + n * WARPS, slot = at / count;
            const uint16_t *row = w.w2 + (at < slots * count ? (id ? id[slot] : 0) * w.stride2 + (int64_t)(d + at % count) * w.width : 0);
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                p[n][j] = piece_of(row, from + 32 * j + kl_lane(), at < slots * count ? pieces : 0);
        }
    }
    /* h: [slots,width] in shared memory; out [slots,count]. The first load is done. */
    __device__ __forceinline__ void run(const uint4 *h, float *out)
    {
        int pieces = w.width / 8, warp = (int)threadIdx.x / 32;
        bool loaded = true;
        for (int i = warp; i < slots * count; i += TOGETHER * WARPS) {
            float sum[TOGETHER] = {};
            for (int from = 0; from < pieces; from += 32 * AHEAD) {
                if (!loaded)
                    load(i, from);
                loaded = false;
#pragma unroll
                for (int n = 0; n < TOGETHER; n++) {
                    int at = i + n * WARPS, slot = at / count;
#pragma unroll
                    for (int j = 0; j < AHEAD; j++) {
                        int piece = from + 32 * j + kl_lane();
                        if (at < slots * count && piece < pieces)
                            add_product(sum[n], p[n][j], h[slot * pieces + piece]);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < TOGETHER; n++) {
                float all = kl_warp_sum(sum[n]);
                if (kl_lane() == 0 && i + n * WARPS < slots * count)
                    out[i + n * WARPS] = all;
            }
        }
    }
};

__device__ __forceinline__ void fetch_h(uint4 *to, const experts &w, int slots)
{
    for (int i = (int)threadIdx.x; i < slots * w.width / 8; i += THREADS)
        to[i] = __ldcg((const uint4 *)w.h + i);
}

__global__ void __launch_bounds__(THREADS, 2) down(const __grid_constant__ step s, int share)
{
    KL_SHARED(memory);
    room m = room_of(memory, s.v);
    const moe_router_view &v = s.v;
    int d = (int)blockIdx.x * share, count = v.D - d < share ? v.D - d : share, slots = v.T * v.top_k, alone = s.shared.width ? v.T : 0;
    uint4 *h = (uint4 *)m.rest, *h_shared = h + slots * s.routed.width / 8;
    float *part = (float *)(h_shared + alone * s.shared.width / 8), *part_shared = part + slots * share;
    choose(s, m);
    outer_rows routed = {s.routed, m.id, d, count, slots, {}}, shared = {s.shared, nullptr, d, count, alone, {}};
    routed.load((int)threadIdx.x / 32, 0);
    kl_grid_wait();
    kl_grid_release();
    fetch_h(h, s.routed, slots);
    fetch_h(h_shared, s.shared, alone);
    __syncthreads();
    routed.run(h, part);
    if (alone) {
        shared.load((int)threadIdx.x / 32, 0);
        shared.run(h_shared, part_shared);
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < v.T * count; i += THREADS) {
        int t = i / count, at = i % count;
        float sum = alone ? part_shared[i] : 0.0f;
        for (int k = 0; k < v.top_k; k++)
            sum += m.weight[t * v.top_k + k] * part[(t * v.top_k + k) * count + at];
        s.y[(int64_t)t * v.D + d + at] = kl_to_bf16(sum);
    }
}

/* ---- the host's side ---- */

struct buffers {
    moe_device_routes routes;
    uint16_t *h, *h_shared;
};

int64_t choices(const moe_problem *p) { return p->E ? p->top_k : 0; }

buffers carve(kl_arena *a, const moe_problem *p)
{
    buffers b = {};
    if (p->E)
        b.routes = moe_device_routes_carve(a, p, p->T);
    b.h = KL_TAKE(a, uint16_t, p->T * choices(p) * p->I);
    b.h_shared = KL_TAKE(a, uint16_t, p->T * p->Is);
    return b;
}

kl_status describe(experts *x, const char *const name[3], const void *const *w1, const void *const *w3, const void *const *w2, int64_t E, int64_t width, int64_t D,
                   uint16_t *h)
{
    moe_weights a, b, c;
    KL_TRY(moe_weights_of(&a, name[0], w1, E, width, D));
    KL_TRY(moe_weights_of(&b, name[1], w3, E, width, D));
    KL_TRY(moe_weights_of(&c, name[2], w2, E, D, width));
    if (a.stride != b.stride)
        return kl_error(KL_EUNSUPPORTED, "moe: w3: expected experts as far apart as those of w1, %lld elements, got %lld", (long long)a.stride, (long long)b.stride);
    *x = {a.base, b.base, c.base, a.stride, c.stride, (int)width, h};
    return kl_ok();
}

kl_status describe_all(step *s, const moe_problem *p, const buffers &b)
{
    static const char *const routed[] = {"w1", "w3", "w2"}, *const shared[] = {"shared_w1", "shared_w3", "shared_w2"};
    if (p->E) {
        s->v = moe_view_of(p, 0, p->T, &b.routes);
        KL_TRY(describe(&s->routed, routed, p->w1, p->w3, p->w2, p->E, p->I, p->D, b.h));
    } else {
        s->v.T = (int)p->T;
        s->v.D = (int)p->D;
        s->v.x = (const uint16_t *)p->x;
    }
    if (p->Is)
        KL_TRY(describe(&s->shared, shared, &p->shared_w1, &p->shared_w3, &p->shared_w2, 1, p->Is, p->D, b.h_shared));
    return kl_ok();
}

size_t inner_bytes(const moe_problem *p)
{
    return choice_bytes((int)p->T, (int)choices(p), (int)p->E, (int)p->n_group) + (size_t)(p->T * p->D) * sizeof(uint16_t);
}

size_t outer_bytes(const moe_problem *p, int64_t share)
{
    int64_t slots = p->T * choices(p), alone = p->Is ? p->T : 0;
    return choice_bytes((int)p->T, (int)choices(p), (int)p->E, (int)p->n_group) + (size_t)(slots * p->I + alone * p->Is) * sizeof(uint16_t) +
           (size_t)((slots + alone) * share) * sizeof(float);
}

} // namespace

size_t moe_cuda_recurrent_workspace(const kl_ctx *, const void *problem, kl_pass pass)
{
    const moe_problem *p = (const moe_problem *)problem;
    if (pass == KL_BACKWARD || kl_failed(moe_cuda_takes_few(p)))
        return 0;
    kl_arena a = kl_arena_count();
    carve(&a, p);
    return a.overflow ? SIZE_MAX : a.used;
}

kl_status moe_cuda_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const moe_problem *p = (const moe_problem *)problem;
    KL_TRY(moe_cuda_enter(ctx, p));
    KL_TRY(moe_cuda_takes_few(p));
    kl_arena a = kl_arena_over(workspace, bytes);
    buffers b = carve(&a, p);
    if (a.overflow)
        return kl_error(KL_EINVAL, "moe: workspace: expected %zu bytes, got %zu", moe_cuda_recurrent_workspace(ctx, p, KL_FORWARD), bytes);
    if (p->T == 0)
        return kl_ok();
    step s = {};
    s.y = (uint16_t *)p->y;
    s.id = p->chosen;
    s.weight = p->chosen_weight;
    s.logit = b.routes.logit;
    KL_TRY(describe_all(&s, p, b));
    if (p->E)
        KL_TRY(moe_device_logits(ctx, p, 0, p->T, &b.routes));
    kl_grid g;
    g.x = kl_gpu_multiprocessors(ctx);
    g.threads = THREADS;
    g.shared = inner_bytes(p);
    g.overlap = true;
    KL_TRY(kl_launch(ctx, "moe recurrent inner", g, gate_up, s));
    int64_t share = moe_ceil(p->D, g.x);
    g.x = moe_ceil(p->D, share);
    g.shared = outer_bytes(p, share);
    return kl_launch(ctx, "moe recurrent outer", g, down, s, (int)share);
}
