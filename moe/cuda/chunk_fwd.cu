/* Tokens grouped by expert: route, sort, and for the rows of all experts at once
 *
 *     H_e = silu(X_e w1_e^T) (.) X_e w3_e^T;   Y_e = H_e w2_e^T;   y_t = shared_t + sum_k w_tk Y[row of (t,k)]
 *
 * The shared expert has every token and writes y itself, first. Long inputs go through in blocks of tokens. */
#include "common/gpu.h"
#include "moe/cuda/chunk.cuh"
#include "moe/cuda/product.cuh"
#include "moe/cuda/weights.cuh"

namespace {

/* Many rows an expert: pairs of blocks share weights. Few: a block has its own, and a deeper ring. */
template <bool SWIGLU> using many = moe_form<2, 192, 3, SWIGLU>;
template <bool SWIGLU> using few = moe_form<1, 64, 4, SWIGLU>;

struct tiling {
    bool few;
    int blocks, most;
};

tiling tiling_of(int64_t rows, int64_t experts)
{
    bool small = rows < 96 * experts;
    return {small, small ? few<true>::CLUSTER : many<true>::CLUSTER, small ? few<true>::MOST : many<true>::MOST};
}

struct buffers {
    moe_device_routes routes;
    moe_device_rows rows;
    moe_cut cut;
    uint16_t *h; /* [rows,I], before that [tokens,Is] */
    uint16_t *y; /* [rows,D] */
};

buffers carve(kl_arena *a, const moe_problem *p)
{
    buffers b = {};
    int64_t tokens = moe_block_of(p, 0), rows = p->E ? tokens * p->top_k : 0;
    if (p->E) {
        tiling cut = tiling_of(rows, p->E);
        b.routes = moe_device_routes_carve(a, p, tokens);
        b.rows = moe_device_rows_carve(a, p, tokens);
        b.cut = moe_cut_carve(a, p, tokens, cut.blocks, cut.most);
    }
    int64_t routed = rows * p->I, shared = tokens * p->Is;
    b.h = KL_TAKE(a, uint16_t, routed > shared ? routed : shared);
    b.y = KL_TAKE(a, uint16_t, rows * p->D);
    return b;
}

template <class F> kl_status launch(const kl_ctx *ctx, const char *name, const moe_product &p)
{
    kl_grid g;
    g.threads = MOE_PRODUCT_THREADS;
    g.shared = sizeof(typename F::shared);
    g.cluster = F::CLUSTER;
    g.overlap = true;
    g.x = F::CLUSTER;
    int clusters = F::CLUSTER > 1 ? kl_resident_clusters(ctx, g, moe_products<F>) : kl_gpu_multiprocessors(ctx);
    g.x = (int64_t)clusters * F::CLUSTER;
    return kl_launch(ctx, name, g, moe_products<F>, p);
}

template <bool SWIGLU> kl_status multiply(const kl_ctx *ctx, const char *name, const moe_product &p, bool small)
{
    return small ? launch<few<SWIGLU>>(ctx, name, p) : launch<many<SWIGLU>>(ctx, name, p);
}

/* Two products over the rows of one set of experts: x -> h -> y. */
struct two_products {
    moe_weights w1, w3, w2;
    moe_product inner, outer;
    bool few;
};

kl_status describe(two_products *s, const moe_problem *p, bool shared)
{
    int64_t E = shared ? 1 : p->E, width = shared ? p->Is : p->I;
    const void *one[3] = {p->shared_w1, p->shared_w3, p->shared_w2};
    KL_TRY(moe_weights_of(&s->w1, shared ? "shared_w1" : "w1", shared ? &one[0] : p->w1, E, width, p->D));
    KL_TRY(moe_weights_of(&s->w3, shared ? "shared_w3" : "w3", shared ? &one[1] : p->w3, E, width, p->D));
    KL_TRY(moe_weights_of(&s->w2, shared ? "shared_w2" : "w2", shared ? &one[2] : p->w2, E, p->D, width));
    s->inner = {}, s->outer = {};
    KL_TRY(moe_describe_two(&s->inner.weight, s->w1, s->w3, &s->inner.up_first));
    KL_TRY(moe_describe(&s->outer.weight, s->w2, 0));
    s->inner.K = (int)p->D, s->inner.width = (int)width, s->inner.across = (int)moe_ceil(width, 128);
    s->outer.K = (int)width, s->outer.width = (int)p->D, s->outer.across = (int)moe_ceil(p->D, 256);
    return kl_ok();
}

kl_status run(const kl_ctx *ctx, two_products *s, const uint16_t *x, uint16_t *h, uint16_t *y)
{
    s->inner.x = x, s->inner.y = h;
    s->outer.x = h, s->outer.y = y;
    KL_TRY(multiply<true>(ctx, "moe gate_up", s->inner, s->few));
    return multiply<false>(ctx, "moe down", s->outer, s->few);
}

kl_status shared_expert(const kl_ctx *ctx, const moe_problem *p, const buffers &b, int64_t t, int64_t count)
{
    two_products s;
    KL_TRY(describe(&s, p, true));
    tiling cut = tiling_of(count, 1);
    s.few = cut.few;
    s.inner.rows = s.outer.rows = (int)count;
    int64_t groups = moe_ceil(count, cut.blocks * cut.most);
    s.inner.tile = s.outer.tile = groups > 16 ? cut.most : (int)moe_ceil(count, 8 * cut.blocks * groups) * 8;
    return run(ctx, &s, (const uint16_t *)p->x + t * p->D, b.h, (uint16_t *)p->y + t * p->D);
}

kl_status routed_experts(const kl_ctx *ctx, const moe_problem *p, const buffers &b, int64_t t, int64_t count)
{
    two_products s;
    KL_TRY(describe(&s, p, false));
    KL_TRY(moe_device_route(ctx, p, t, count, &b.routes));
    KL_TRY(moe_device_group(ctx, p, count, &b.routes, &b.rows, &b.cut));
    s.few = b.cut.blocks == few<true>::CLUSTER;
    s.inner.group = s.outer.group = b.cut.group;
    s.inner.groups = s.outer.groups = b.cut.groups;
    s.inner.token = b.rows.token;
    KL_TRY(run(ctx, &s, (const uint16_t *)p->x + t * p->D, b.h, b.y));
    return moe_device_combine(ctx, p, t, count, b.rows.row_of, b.routes.weight, b.y);
}

} // namespace

size_t moe_cuda_chunk_forward_workspace(const moe_problem *p)
{
    kl_arena a = kl_arena_count();
    carve(&a, p);
    return a.overflow ? SIZE_MAX : a.used;
}

size_t moe_cuda_chunk_workspace(const kl_ctx *, const void *problem, kl_pass pass)
{
    if (kl_failed(moe_cuda_takes((const moe_problem *)problem)) || pass == KL_BACKWARD)
        return 0;
    return moe_cuda_chunk_forward_workspace((const moe_problem *)problem);
}

kl_status moe_cuda_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const moe_problem *p = (const moe_problem *)problem;
    KL_TRY(moe_cuda_enter(ctx, p));
    kl_arena a = kl_arena_over(workspace, bytes);
    buffers b = carve(&a, p);
    if (a.overflow)
        return kl_error(KL_EINVAL, "moe: workspace: expected %zu bytes, got %zu", moe_cuda_chunk_forward_workspace(p), bytes);
    for (int64_t t = 0; t < p->T; t += MOE_BLOCK_TOKENS) {
        int64_t count = moe_block_of(p, t);
        if (p->Is)
            KL_TRY(shared_expert(ctx, p, b, t, count));
        if (p->E)
            KL_TRY(routed_experts(ctx, p, b, t, count));
        else if (!p->Is)
            KL_TRY(kl_gpu_fill(ctx, (uint16_t *)p->y + t * p->D, 0, (size_t)(count * p->D) * sizeof(uint16_t)));
    }
    return kl_ok();
}
