/* Tokens grouped by expert: route, sort, and for the rows of all experts at once
 *
 *     H_e = silu(X_e w1_e^T) (.) X_e w3_e^T;   Y_e = H_e w2_e^T;   y_t = shared_t + sum_k w_tk Y[row of (t,k)]
 *
 * The shared expert has every token and writes y itself, first. Long inputs go through in blocks of tokens. */
#include "common/gpu.h"
#include "moe/cuda/weights.cuh"

namespace {

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
        moe_tiling cut = moe_tiling_of(rows, p->E);
        b.routes = moe_device_routes_carve(a, p, tokens);
        b.rows = moe_device_rows_carve(a, p, tokens);
        b.cut = moe_cut_carve(a, p, tokens, cut.blocks, cut.most);
    }
    int64_t routed = rows * p->I, shared = tokens * p->Is;
    b.h = KL_TAKE(a, uint16_t, routed > shared ? routed : shared);
    b.y = KL_TAKE(a, uint16_t, rows * p->D);
    return b;
}

/* Two products over the rows of one set of experts: x -> h -> y. */
struct two_products {
    moe_product inner, outer;
    bool few;
};

kl_status describe(two_products *s, const moe_problem *p, bool shared)
{
    moe_expert_weights w;
    KL_TRY(moe_expert_weights_of(&w, p, shared));
    s->inner = {}, s->outer = {};
    KL_TRY(moe_describe_two(&s->inner, w.w1, w.w3, false));
    s->inner.width /= 2;
    return moe_describe(&s->outer, w.w2, 0, false);
}

kl_status run(const kl_ctx *ctx, two_products *s, const uint16_t *x, int64_t x_rows, int64_t rows, uint16_t *h, uint16_t *y)
{
    s->inner.x_rows = (int)x_rows, s->outer.x_rows = (int)rows;
    s->inner.x = x, s->inner.y = h;
    s->outer.x = h, s->outer.y = y;
    KL_TRY(moe_device_product(ctx, "moe gate_up", s->inner, MOE_SWIGLU, s->few));
    return moe_device_product(ctx, "moe down", s->outer, MOE_PLAIN, s->few);
}

kl_status shared_expert(const kl_ctx *ctx, const moe_problem *p, const buffers &b, int64_t t, int64_t count)
{
    kl_range range("moe shared expert");
    two_products s;
    KL_TRY(describe(&s, p, true));
    moe_tiling cut = moe_tiling_of(count, 1);
    s.few = cut.few;
    s.inner.rows = s.outer.rows = (int)count;
    s.inner.tile = s.outer.tile = moe_tile_of(cut, count);
    return run(ctx, &s, (const uint16_t *)p->x + t * p->D, count, count, b.h, (uint16_t *)p->y + t * p->D);
}

kl_status routed_experts(const kl_ctx *ctx, const moe_problem *p, const buffers &b, int64_t t, int64_t count)
{
    two_products s;
    KL_TRY(describe(&s, p, false));
    KL_TRY(moe_device_route(ctx, p, t, count, &b.routes));
    KL_TRY(moe_device_group(ctx, p, count, &b.routes, &b.rows, &b.cut));
    s.few = moe_tiling_of(moe_block_of(p, 0) * p->top_k, p->E).few;
    s.inner.group = s.outer.group = b.cut.group;
    s.inner.groups = s.outer.groups = b.cut.groups;
    s.inner.token = b.rows.token;
    KL_TRY(run(ctx, &s, (const uint16_t *)p->x + t * p->D, count, count * p->top_k, b.h, b.y));
    return moe_device_combine(ctx, p, t, count, b.rows.row_of, b.routes.weight, b.y);
}

size_t forward_workspace(const moe_problem *p)
{
    kl_arena a = kl_arena_count();
    carve(&a, p);
    return a.overflow ? SIZE_MAX : a.used;
}

} // namespace

size_t moe_cuda_chunk_workspace(const kl_ctx *, const void *problem, kl_pass pass)
{
    const moe_problem *p = (const moe_problem *)problem;
    if (kl_failed(moe_cuda_takes(p)))
        return 0;
    return pass == KL_BACKWARD ? moe_cuda_chunk_backward_workspace(p) : forward_workspace(p);
}

kl_status moe_cuda_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const moe_problem *p = (const moe_problem *)problem;
    KL_TRY(moe_cuda_enter(ctx, p));
    kl_arena a = kl_arena_over(workspace, bytes);
    buffers b = carve(&a, p);
    if (a.overflow)
        return kl_error(KL_EINVAL, "moe: workspace: expected %zu bytes, got %zu", forward_workspace(p), bytes);
    return moe_each_block(
        ctx, p, [&](int64_t t, int64_t count) { return shared_expert(ctx, p, b, t, count); },
        [&](int64_t t, int64_t count) { return routed_experts(ctx, p, b, t, count); });
}
