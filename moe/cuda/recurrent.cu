/* A few tokens, one by one: every chosen expert's weights stream past once, dealt out by rows to the warps of the whole device.
 *
 *     h_k[i] = silu(w1_k[i,:] x) w3_k[i,:] x;      y[d] = shared + sum_k w_k (w2_k[d,:] h_k)
 *
 * Two launches that overlap: logits; then a block on every multiprocessor, which chooses for itself and takes rows of w1 and w3, and then
 * of w2 the columns d of all experts, so that it adds them up in order. In between the blocks meet, for the h of all. Rows of w2 need
 * nothing of h and come in through the warps' rings (rows.cuh) meanwhile. One warp copies nothing and has time for the rest: it chooses while the
 * others take the shared expert, and it tells the other blocks, since such a word waits for the copies of the thread that says it. */
#include <algorithm>

#include "common/gpu.h"
#include "moe/cuda/choose.cuh"
#include "moe/cuda/chunk.cuh"
#include "moe/cuda/rows.cuh"
#include "moe/cuda/weights.cuh"

namespace {

/* Warps that multiply; barriers of all warps, of these. MOST_BYTES leaves room beside a block for one of the next launch's. */
enum { WARPS = 8, WORKERS = 32 * WARPS, THREADS = WORKERS + 32, INNER_DONE = 1, H_THERE, WORKERS_MEET, MOST_BYTES = 220 << 10 };

/* One set of experts; w1, w3: [width,D], w2: [D,width], `stride` elements from expert to expert. */
struct experts {
    const uint16_t *w1, *w3, *w2;
    int64_t stride1, stride2;
    int width, slots;
    uint16_t *h; /* [slots,width] */
};

struct step {
    moe_router_view v;
    const float *logit;
    experts routed, shared; /* slots 0: none */
    uint16_t *y;
    int *id;                /* what the caller wants of the choice, or NULL */
    float *weight;
    int *arrived;           /* blocks whose h is complete; 0 before this launch */
    int share, depth;       /* columns of y a block at most; places of a ring */
};

/* The rows that a warp takes one after the other. Those of the shared expert come first, while the choice is made, and last. */
enum { SHARED_INNER, ROUTED_INNER, ROUTED_OUTER, SHARED_OUTER, LISTS };

/* Shared memory of a block but for the rings. x makes room for h. */
struct room {
    moe_rows *list;
    uint64_t *full;    /* [WARPS][depth] */
    int *id;           /* the choice of all tokens */
    float *weight;
    uint32_t *scratch;
    uint4 *x, *h, *h_shared;
    float *part, *part_shared; /* [slots,share] */
    unsigned char *rings;
};

__host__ __device__ inline size_t up(size_t bytes) { return (bytes + 127) / 128 * 128; }

__host__ __device__ inline size_t lay_out(room *m, unsigned char *memory, const step &s)
{
    const moe_router_view &v = s.v;
    size_t at = 0;
    auto take = [&](size_t bytes) {
        unsigned char *piece = memory + at;
        at += up(bytes);
        return piece;
    };
    m->list = (moe_rows *)take(LISTS * sizeof(moe_rows));
    m->full = (uint64_t *)take((size_t)WARPS * s.depth * sizeof(uint64_t));
    m->id = (int *)take((size_t)s.routed.slots * sizeof(int));
    m->weight = (float *)take((size_t)s.routed.slots * sizeof(float));
    m->scratch = (uint32_t *)take((size_t)moe_choice_words(v.E, v.n_group) * sizeof(uint32_t));
    m->part = (float *)take((size_t)(s.routed.slots + s.shared.slots) * s.share * sizeof(float));
    m->part_shared = m->part + s.routed.slots * s.share;
    size_t h = ((size_t)s.routed.slots * s.routed.width + (size_t)s.shared.slots * s.shared.width) * sizeof(uint16_t), x = (size_t)v.T * v.D * sizeof(uint16_t);
    m->x = m->h = (uint4 *)take(h > x ? h : x);
    m->h_shared = m->h + s.routed.slots * s.routed.width / 8;
    m->rings = memory + at;
    return at;
}

__device__ __forceinline__ void choose(const step &s, const room &m)
{
    const moe_router_view &v = s.v;
    int lane = kl_lane();
    for (int t = 0; v.E && t < v.T; t++) {
        moe_choice c = moe_choose(v, s.logit + t * v.E, m.scratch);
        if (lane < v.top_k) {
            int i = t * v.top_k + lane;
            m.id[i] = c.id;
            m.weight[i] = c.weight;
            if (blockIdx.x == 0 && s.id)
                s.id[i] = c.id;
            if (blockIdx.x == 0 && s.weight)
                s.weight[i] = c.weight;
        }
        __syncwarp();
    }
}

/* ---- rows ---- */

/* The columns of y that a block has end where the next one's begin. */
__device__ __forceinline__ int first_column(const step &s, int block) { return (int)((int64_t)s.v.D * block / (int)gridDim.x); }

__device__ __forceinline__ void list_rows(const step &s, const room &m)
{
    int blocks = (int)gridDim.x, d = first_column(s, (int)blockIdx.x), count = first_column(s, (int)blockIdx.x + 1) - d;
    for (int shared = 0; shared < 2; shared++) {
        const experts &w = shared ? s.shared : s.routed;
        const int *id = shared ? nullptr : m.id;
        int together = max(1, min((int)MOE_TOGETHER, MOE_PLACE_BYTES / 2 / max(w.width, 1))), each = (count + together - 1) / together;
        m.list[shared ? SHARED_INNER : ROUTED_INNER] = {w.w1, w.w3, w.stride1, s.v.D, w.width, 1, w.width, id, (int)blockIdx.x, blocks, WARPS * blocks, w.slots * w.width};
        m.list[shared ? SHARED_OUTER : ROUTED_OUTER] = {w.w2 + (int64_t)d * w.width, nullptr, w.stride2, w.width, count, together, each, id, 0, 1, WARPS, w.slots * each};
    }
}

__device__ __forceinline__ void add_product(float &sum, const uint4 &a, const uint4 &b)
{
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        sum += kl_bf16_low(x[i]) * kl_bf16_low(y[i]), sum += kl_bf16_high(x[i]) * kl_bf16_high(y[i]);
}

/* h = silu(w1 x) w3 x, a row of both at a time. */
__device__ __forceinline__ void inner(moe_ring &ring, int which, const uint4 *x, int choices, uint16_t *h)
{
    const moe_rows &list = ring.list[which];
    while (ring.has(which)) {
        int i = ring.next_item();
        const uint4 *at = x + i / list.rows / choices * (list.columns / 8);
        float a = 0.0f, b = 0.0f;
        for (int column = 0; column < list.columns; column += list.wide()) {
            const uint4 *w1 = (const uint4 *)ring.wait(), *w3 = w1 + MOE_PLACE_BYTES / 32;
            int pieces = list.pieces(column);
#pragma unroll 3
            for (int piece = kl_lane(); piece < pieces; piece += 32) {
                uint4 v = at[column / 8 + piece];
                add_product(a, w1[piece], v);
                add_product(b, w3[piece], v);
            }
            ring.next();
        }
        a = kl_warp_sum(a);
        b = kl_warp_sum(b);
        if (kl_lane() == 0)
            h[i] = kl_to_bf16(a * kl_rcp(1.0f + kl_exp2(-1.44269504f * a)) * b);
    }
}

/* part[slot][d] = w2[d,:] h_slot, some d at a time. */
__device__ __forceinline__ void outer(moe_ring &ring, int which, const uint4 *h, float *part, int share)
{
    static_assert(MOE_TOGETHER == 4, "a lane for each");
    const moe_rows &list = ring.list[which];
    while (ring.has(which)) {
        int i = ring.next_item(), slot = i / list.items, first = i - slot * list.items, count = list.count(first), row = list.columns / 8;
        float sum[MOE_TOGETHER] = {};
        for (int column = 0; column < list.columns; column += list.wide()) {
            const uint4 *w2 = (const uint4 *)ring.wait(), *at = h + slot * row + column / 8;
            int pieces = list.pieces(column);
#pragma unroll 2
            for (int piece = kl_lane(); piece < pieces; piece += 32) {
                uint4 v = at[piece];
#pragma unroll
                for (int n = 0; n < MOE_TOGETHER; n++)
                    if (n < count)
                        add_product(sum[n], w2[n * row + piece], v);
            }
            ring.next();
        }
#pragma unroll
        for (int n = 0; n < MOE_TOGETHER; n++)
            sum[n] = kl_warp_sum(sum[n]);
        float own = kl_lane() == 0 ? sum[0] : kl_lane() == 1 ? sum[1] : kl_lane() == 2 ? sum[2] : sum[3];
        if (kl_lane() < count)
            part[slot * share + first * list.together + kl_lane()] = own;
    }
}

/* ---- the two kinds of warps ---- */

__device__ __forceinline__ void meet(const step &s)
{
    kl_barrier(INNER_DONE, THREADS);
    if (kl_lane() == 0) {
        kl_add_release(s.arrived, 1);
        kl_await(s.arrived, (int)gridDim.x);
    }
    __syncwarp();
    kl_barrier(H_THERE, THREADS);
}

__device__ __forceinline__ void fetch_h(uint4 *to, const experts &w, int thread)
{
    for (int i = thread; i < w.slots * w.width / 8; i += WORKERS)
        to[i] = __ldcg((const uint4 *)w.h + i);
}

__device__ __forceinline__ void add_up(const step &s, const room &m, int thread)
{
    const moe_router_view &v = s.v;
    int d = first_column(s, (int)blockIdx.x), count = first_column(s, (int)blockIdx.x + 1) - d;
    for (int i = thread; i < v.T * count; i += WORKERS) {
        int t = i / count, at = i % count;
        float sum = s.shared.slots ? m.part_shared[t * s.share + at] : 0.0f;
        for (int k = 0; k < v.top_k; k++)
            sum += m.weight[t * v.top_k + k] * m.part[(t * v.top_k + k) * s.share + at];
        s.y[(int64_t)t * v.D + d + at] = kl_to_bf16(sum);
    }
}

__global__ void __launch_bounds__(THREADS, 1) stream(const __grid_constant__ step s)
{
    KL_SHARED(memory);
    room m;
    lay_out(&m, memory, s);
    int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0), thread = (int)threadIdx.x;
    if (!s.v.E) /* no logits were computed in between: x may still be on its way */
        kl_grid_wait();
    if (warp == WARPS && kl_lane() == 0) {
        list_rows(s, m);
        for (int i = 0; i < WARPS * s.depth; i++)
            kl_mbar_init(&m.full[i], 1);
        kl_mbar_init_fence();
    }
    for (int i = thread; i < s.v.T * s.v.D / 8; i += THREADS)
        m.x[i] = ((const uint4 *)s.v.x)[i];
    __syncthreads();
    moe_ring ring = moe_ring_of(m.rings, m.full, s.depth, m.list, warp);
    if (warp == WARPS) {
        kl_grid_wait();
        choose(s, m);
    } else {
        ring.fill(ROUTED_INNER);
        inner(ring, SHARED_INNER, m.x, 1, s.shared.h);
    }
    __syncthreads();
    kl_grid_release();
    if (warp == WARPS) {
        meet(s);
        return;
    }
    ring.fill(LISTS);
    inner(ring, ROUTED_INNER, m.x, s.v.top_k, s.routed.h);
    __syncwarp();
    kl_barrier_arrive(INNER_DONE, THREADS);
    kl_barrier(H_THERE, THREADS);
    fetch_h(m.h, s.routed, thread);
    fetch_h(m.h_shared, s.shared, thread);
    kl_barrier(WORKERS_MEET, WORKERS);
    outer(ring, ROUTED_OUTER, m.h, m.part, s.share);
    outer(ring, SHARED_OUTER, m.h_shared, m.part_shared, s.share);
    kl_barrier(WORKERS_MEET, WORKERS);
    add_up(s, m, thread);
}

/* ---- the host's side ---- */

struct buffers {
    moe_device_routes routes;
    uint16_t *h, *h_shared;
    int *arrived;
};

int64_t choices(const moe_problem *p) { return p->E ? p->top_k : 0; }

buffers carve(kl_arena *a, const moe_problem *p)
{
    buffers b = {};
    if (p->E)
        b.routes = moe_device_routes_carve(a, p, p->T);
    b.h = KL_TAKE(a, uint16_t, p->T * choices(p) * p->I);
    b.h_shared = KL_TAKE(a, uint16_t, p->T * p->Is);
    b.arrived = KL_TAKE(a, int, 1);
    return b;
}

kl_status describe(experts *x, const moe_problem *p, bool shared, uint16_t *h)
{
    moe_expert_weights w;
    KL_TRY(moe_expert_weights_of(&w, p, shared));
    if (w.w1.stride != w.w3.stride)
        return kl_error(KL_EUNSUPPORTED, "moe: w3: expected experts as far apart as those of w1, %lld elements, got %lld", (long long)w.w1.stride, (long long)w.w3.stride);
    *x = {w.w1.base, w.w3.base, w.w2.base, w.w1.stride, w.w2.stride, (int)w.w1.rows, (int)(p->T * (shared ? 1 : p->top_k)), h};
    return kl_ok();
}

kl_status describe_all(step *s, const moe_problem *p, const buffers &b)
{
    s->v.T = (int)p->T;
    s->v.D = (int)p->D;
    s->v.x = (const uint16_t *)p->x;
    if (p->E) {
        s->v = moe_view_of(p, 0, p->T, &b.routes);
        KL_TRY(describe(&s->routed, p, false, b.h));
    }
    return p->Is ? describe(&s->shared, p, true, b.h_shared) : kl_ok();
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
    kl_grid g;
    g.x = kl_gpu_multiprocessors(ctx);
    g.threads = THREADS;
    g.overlap = g.resident = true;
    step s = {};
    s.y = (uint16_t *)p->y;
    s.id = p->chosen;
    s.weight = p->chosen_weight;
    s.logit = b.routes.logit;
    s.arrived = b.arrived;
    s.share = (int)moe_ceil(p->D, g.x);
    KL_TRY(describe_all(&s, p, b));
    room m;
    size_t rest = lay_out(&m, nullptr, s), ring = (size_t)WARPS * MOE_PLACE_BYTES;
    s.depth = (int)std::min<size_t>(MOE_MOST_PLACES, (MOST_BYTES - rest) / ring);
    g.shared = lay_out(&m, nullptr, s) + s.depth * ring;
    kl_range range("moe stream");
    if (p->E)
        KL_TRY(moe_device_logits(ctx, p, 0, p->T, &b.routes, b.arrived));
    else
        KL_TRY(kl_gpu_fill(ctx, b.arrived, 0, sizeof *b.arrived));
    return kl_launch(ctx, "moe stream", g, stream, s);
}
