/* The backward pass of chunk_fwd.cu; gate and up are computed anew. For the rows of all experts at once, then through the router:
 *
 *     A = X w1^T,  B = X w3^T;   dM0 = dY w2;   dA, dB, cM, dc (inner_bwd.cu);   dX = dA w1 + dB w3;   dw1 += dA^T X,  dw3 += dB^T X,  dw2 += dY^T cM
 *
 * A and B lie eight by eight beside each other, as the rows of w1 and w3 do for the copy engine, so that each is one product of all. */
#include "common/gpu.h"
#include "moe/cuda/backward.cuh"
#include "moe/cuda/weights.cuh"

namespace {

constexpr int64_t BLOCK_TOKENS = 32768;

int64_t block_of(const moe_problem *p, int64_t t) { return p->T - t < BLOCK_TOKENS ? p->T - t : BLOCK_TOKENS; }

struct buffers {
    moe_device_routes routes;
    moe_device_rows rows;
    moe_cut cut;
    uint16_t *ab, *m; /* [rows,2 I], [rows,I]; before that of the shared expert */
    uint16_t *dx;     /* [rows,D] */
    float *dc;        /* [rows] */
    float **table;    /* [3,E+1] pointers to the gradients of w1, w3, w2, those of the shared expert last */
};

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

buffers carve(kl_arena *a, const moe_problem *p)
{
    buffers b = {};
    int64_t tokens = block_of(p, 0), rows = p->E ? tokens * p->top_k : 0;
    if (p->E) {
        moe_tiling cut = moe_tiling_of(rows, p->E);
        b.routes = moe_device_routes_carve(a, p, tokens);
        b.rows = moe_device_rows_carve(a, p, tokens);
        b.cut = moe_cut_carve(a, p, tokens, cut.blocks, cut.most);
    }
    int64_t inside = larger(rows * p->I, tokens * p->Is);
    b.ab = KL_TAKE(a, uint16_t, 2 * inside);
    b.m = KL_TAKE(a, uint16_t, inside);
    b.dx = KL_TAKE(a, uint16_t, rows * p->D);
    b.dc = KL_TAKE(a, float, rows);
    b.table = KL_TAKE(a, float *, 3 * (p->E + 1));
    return b;
}

kl_status upload_tables(const kl_ctx *ctx, const moe_problem *p, const moe_grads *g, float **table)
{
    float *const *lists[] = {g->dw1, g->dw3, g->dw2};
    float *shared[] = {g->dshared_w1, g->dshared_w3, g->dshared_w2}, *piece[128];
    for (int i = 0; i < 3; i++)
        for (int64_t from = 0; from <= p->E; from += 128) {
            int64_t count = p->E + 1 - from < 128 ? p->E + 1 - from : 128;
            for (int64_t n = 0; n < count; n++)
                piece[n] = from + n == p->E ? shared[i] : lists[i] ? lists[i][from + n] : nullptr;
            KL_TRY(kl_upload(ctx, table + i * (p->E + 1) + from, piece, (size_t)count * sizeof *piece));
        }
    return kl_ok();
}

/* One set of experts and the rows that it has of x and of dy. */
struct expert_rows {
    bool shared;
    int64_t E, width, tokens, rows;
    const uint16_t *x, *dy;
    uint16_t *dx;       /* of each row; NULL: not wanted */
    moe_product shape;  /* how the rows are grouped */
    const int *token, *first;
    const float *weight;
    bool few, wants_w13, wants_w2;
};

kl_status through(const kl_ctx *ctx, const moe_problem *p, const buffers &b, const expert_rows &s)
{
    moe_expert_weights w;
    KL_TRY(moe_expert_weights_of(&w, p, s.shared));
    moe_product up = s.shape, back = s.shape, out = s.shape;
    KL_TRY(moe_describe_two(&up, w.w1, w.w3, false));
    KL_TRY(moe_describe(&back, w.w2, 0, true));
    KL_TRY(moe_describe_two(&out, w.w1, w.w3, true));
    up.x = s.x, up.token = s.token, up.y = b.ab;
    back.x = s.dy, back.token = s.token, back.y = b.m;
    out.x = b.ab, out.token = nullptr, out.y = s.dx;
    up.x_rows = back.x_rows = (int)s.tokens;
    out.x_rows = (int)s.rows;
    KL_TRY(moe_device_product(ctx, "moe gate_up again", up, MOE_PLAIN, s.few));
    KL_TRY(moe_device_product(ctx, "moe down_bwd", back, MOE_TRANSPOSED, s.few));
    moe_inner_gradients inner = {b.ab, b.m, s.weight, s.shared ? nullptr : b.dc, s.rows, (int)s.width, up.up_first};
    KL_TRY(moe_device_inner_gradients(ctx, inner));
    float **table = b.table + (s.shared ? p->E : 0);
    int64_t kind = p->E + 1;
    moe_weight_product w13 = {b.ab, s.x, nullptr, s.token, s.first, (int)s.rows, (int)s.E, (int)(2 * s.width), (int)p->D,
                              {table + (up.up_first ? kind : 0), table + (up.up_first ? 0 : kind)}};
    moe_weight_product w2 = {s.dy, b.m, s.token, nullptr, s.first, (int)s.rows, (int)s.E, (int)p->D, (int)s.width, {table + 2 * kind, table + 2 * kind}};
    if (s.wants_w13)
        KL_TRY(moe_device_weight_product(ctx, "moe gate_up weights_bwd", w13));
    if (s.wants_w2)
        KL_TRY(moe_device_weight_product(ctx, "moe down weights_bwd", w2));
    return s.dx ? moe_device_product(ctx, "moe gate_up_bwd", out, MOE_TRANSPOSED, s.few) : kl_ok();
}

kl_status shared_expert(const kl_ctx *ctx, const moe_problem *p, const moe_grads *g, const buffers &b, int64_t t, int64_t count)
{
    kl_range range("moe shared expert_bwd");
    moe_tiling cut = moe_tiling_of(count, 1);
    expert_rows s = {};
    s.shared = true;
    s.E = 1, s.width = p->Is, s.tokens = s.rows = count;
    s.x = (const uint16_t *)p->x + t * p->D, s.dy = (const uint16_t *)g->dy + t * p->D;
    s.dx = g->dx ? (uint16_t *)g->dx + t * p->D : nullptr;
    s.shape.rows = (int)count;
    s.shape.tile = moe_tile_of(cut, count);
    s.few = cut.few;
    s.wants_w13 = g->dshared_w1 || g->dshared_w3;
    s.wants_w2 = g->dshared_w2;
    return through(ctx, p, b, s);
}

kl_status routed_experts(const kl_ctx *ctx, const moe_problem *p, const moe_grads *g, const buffers &b, int64_t t, int64_t count)
{
    moe_problem quiet = *p;
    quiet.chosen = nullptr;
    quiet.chosen_weight = nullptr;
    KL_TRY(moe_device_route(ctx, &quiet, t, count, &b.routes));
    KL_TRY(moe_device_group(ctx, p, count, &b.routes, &b.rows, &b.cut));
    expert_rows s = {};
    s.E = p->E, s.width = p->I, s.tokens = count, s.rows = count * p->top_k;
    s.x = (const uint16_t *)p->x + t * p->D, s.dy = (const uint16_t *)g->dy + t * p->D;
    s.dx = g->dx ? b.dx : nullptr;
    s.shape.group = b.cut.group, s.shape.groups = b.cut.groups;
    s.token = b.rows.token, s.first = b.rows.first, s.weight = b.rows.weight;
    s.few = moe_tiling_of(block_of(p, 0) * p->top_k, p->E).few;
    s.wants_w13 = g->dw1 || g->dw3;
    s.wants_w2 = g->dw2;
    KL_TRY(through(ctx, p, b, s));
    KL_TRY(moe_device_route_back(ctx, p, t, count, &b.routes, &b.rows, b.dc, g->drouter));
    return g->dx ? moe_device_combine_back(ctx, p, t, count, &b.routes, b.rows.row_of, b.dx, (uint16_t *)g->dx + t * p->D) : kl_ok();
}

} // namespace

size_t moe_cuda_chunk_backward_workspace(const moe_problem *p)
{
    kl_arena a = kl_arena_count();
    carve(&a, p);
    return a.overflow ? SIZE_MAX : a.used;
}

kl_status moe_cuda_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes)
{
    const moe_problem *p = (const moe_problem *)problem;
    const moe_grads *g = (const moe_grads *)grads;
    KL_TRY(moe_cuda_enter_backward(ctx, p, g));
    kl_arena a = kl_arena_over(workspace, bytes);
    buffers b = carve(&a, p);
    if (a.overflow)
        return kl_error(KL_EINVAL, "moe: workspace: expected %zu bytes, got %zu", moe_cuda_chunk_backward_workspace(p), bytes);
    if (p->T > 0)
        KL_TRY(upload_tables(ctx, p, g, b.table));
    for (int64_t t = 0; t < p->T; t += BLOCK_TOKENS) {
        int64_t count = block_of(p, t);
        if (p->Is)
            KL_TRY(shared_expert(ctx, p, g, b, t, count));
        if (p->E)
            KL_TRY(routed_experts(ctx, p, g, b, t, count));
        else if (!p->Is && g->dx)
            KL_TRY(kl_gpu_fill(ctx, (uint16_t *)g->dx + t * p->D, 0, (size_t)(count * p->D) * sizeof(uint16_t)));
    }
    return kl_ok();
}
