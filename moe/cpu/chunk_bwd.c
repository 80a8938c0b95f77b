/* The backward pass of chunk_fwd.c, tile by tile; gate and up are computed anew. For a row r of expert e with weight c
 * (the shared expert: 1), a = w1 x, b = w3 x, m = silu(a) (.) b:
 *
 *     y = c w2 m:            dm0 = w2^T dy;  dc = dm0 . m;  dm = c dm0;  dw2 += dy (c m)^T
 *     m = silu(a) (.) b:     da = dm (.) b silu'(a);  db = dm (.) silu(a);  silu'(a) = s + a s (1 - s)
 *     a = w1 x,  b = w3 x:   dx = w1^T da + w3^T db;  dw1 += da x^T;  dw3 += db x^T
 *
 * then dc goes through the router, and dx of a token sums its rows in order of choice. */
#include "common/blas.h"
#include "common/parallel.h"
#include "moe/cpu/moe_cpu.h"

/* Of the routed rows, or of the shared expert's tokens. */
typedef struct inner_gradients {
    float *da, *db, *m; /* [rows,width]; m times c */
} inner_gradients;

typedef struct backward_buffers {
    moe_block block;
    inner_gradients routed, shared;
    float *dc;      /* [rows, column tiles of I] partial sums of dm0 . m */
    float *dweight; /* [tokens,top_k] */
    float *dx;      /* [rows,D] */
    float *thread;  /* [threads][thread_floats] */
    size_t thread_floats;
} backward_buffers;

static inner_gradients carve_inner(kl_arena *a, size_t rows, int64_t width)
{
    size_t n = kl_mul(rows, (size_t)width, &a->overflow);
    inner_gradients g;
    g.da = KL_TAKE(a, float, n);
    g.db = KL_TAKE(a, float, n);
    g.m = KL_TAKE(a, float, n);
    return g;
}

static backward_buffers carve(kl_arena *a, const moe_problem *p, int threads)
{
    int64_t tokens = moe_block_tokens(p, KL_BACKWARD);
    size_t rows = kl_mul((size_t)tokens, (size_t)moe_top_k(p), &a->overflow);
    backward_buffers b = {.block = moe_block_carve(a, p, tokens, threads)};
    b.routed = carve_inner(a, rows, p->I);
    b.shared = carve_inner(a, (size_t)tokens, p->Is);
    b.dc = KL_TAKE(a, float, kl_mul(rows, (size_t)kl_ceil_div(p->I, MOE_TILE_COLUMNS), &a->overflow));
    b.dweight = KL_TAKE(a, float, rows);
    b.dx = KL_TAKE(a, float, kl_mul(rows, (size_t)p->D, &a->overflow));
    b.thread_floats = (size_t)b.block.tile_rows * (2 * (size_t)p->D + 3 * MOE_TILE_COLUMNS);
    b.thread = KL_TAKE(a, float, kl_mul((size_t)threads, b.thread_floats, &a->overflow));
    return b;
}

size_t moe_chunk_backward_workspace(const kl_ctx *ctx, const moe_problem *p)
{
    kl_arena a = kl_arena_count();
    carve(&a, p, moe_threads(ctx));
    return a.overflow ? SIZE_MAX : a.used;
}

/* One row of n columns: from a, b, dm0 to da, db, c m; returns dm0 . m. */
static float swiglu_backward(int64_t n, float c, const float *a, const float *b, const float *dm0, float *da, float *db, float *m)
{
    kl_v dot = {0};
    for (int64_t i = 0; i < n; i += KL_LANES) {
        int64_t left = n - i < KL_LANES ? n - i : KL_LANES;
        kl_v av = kl_vload_n(a + i, left), bv = kl_vload_n(b + i, left), dm = kl_vload_n(dm0 + i, left);
        kl_v s = kl_vsigmoid(av), silu = av * s;
        dot += dm * silu * bv;
        dm *= c;
        kl_vstore_n(da + i, dm * bv * (s + silu * (1.0f - s)), left);
        kl_vstore_n(db + i, dm * silu, left);
        kl_vstore_n(m + i, c * silu * bv, left);
    }
    return kl_vsum(dot);
}

static void inner_tile(const moe_problem *p, const moe_grads *g, const backward_buffers *b, const moe_tile *tile, int thread)
{
    moe_expert w = moe_expert_of(p, tile->expert);
    bool shared = tile->expert == p->E;
    const inner_gradients *out = shared ? &b->shared : &b->routed;
    int64_t rows = tile->rows, n = tile->columns, offset = tile->column * p->D, ld = b->block.tile_rows;
    float *xs = b->thread + (size_t)thread * b->thread_floats, *dys = xs + ld * p->D;
    float *up_a = dys + ld * p->D, *up_b = up_a + ld * MOE_TILE_COLUMNS, *dm0 = up_b + ld * MOE_TILE_COLUMNS;
    const float *x = moe_gather(p, &b->block, tile, p->x, xs), *dy = moe_gather(p, &b->block, tile, g->dy, dys);
    kl_linear_serial(rows, n, p->D, x, p->D, moe_weight_at(p, w.w1, offset), p->weight_dtype, p->D, 0.0f, up_a, n);
    kl_linear_serial(rows, n, p->D, x, p->D, moe_weight_at(p, w.w3, offset), p->weight_dtype, p->D, 0.0f, up_b, n);
    kl_linear_dx_serial(rows, p->D, n, dy, p->D, moe_weight_at(p, w.w2, tile->column), p->weight_dtype, w.width, 0.0f, dm0, n);
    int64_t tiles = kl_ceil_div(p->I, MOE_TILE_COLUMNS);
    for (int64_t r = 0; r < rows; r++) {
        int64_t row = tile->row + r, at = row * w.width + tile->column;
        float c = shared ? 1.0f : b->block.row_weight[row];
        float dc = swiglu_backward(n, c, up_a + r * n, up_b + r * n, dm0 + r * n, out->da + at, out->db + at, out->m + at);
        if (!shared)
            b->dc[row * tiles + tile->column / MOE_TILE_COLUMNS] = dc;
    }
}

/* dX = dA w1 + dB w3 over one tile */
static void outer_tile(const moe_problem *p, const moe_grads *g, const backward_buffers *b, const moe_tile *tile)
{
    moe_expert w = moe_expert_of(p, tile->expert);
    bool shared = tile->expert == p->E;
    const inner_gradients *in = shared ? &b->shared : &b->routed;
    int64_t at = tile->row * w.width;
    float *dx = (shared ? (float *)g->dx + b->block.t * p->D : b->dx) + tile->row * p->D + tile->column;
    kl_linear_dx_serial(tile->rows, w.width, tile->columns, in->da + at, w.width, moe_weight_at(p, w.w1, tile->column), p->weight_dtype, p->D, 0.0f, dx, p->D);
    kl_linear_dx_serial(tile->rows, w.width, tile->columns, in->db + at, w.width, moe_weight_at(p, w.w3, tile->column), p->weight_dtype, p->D, 1.0f, dx, p->D);
}

/* Columns d .. d+n-1 of the rows [from, to) of an expert, out of source [T,D]; *ld: floats from row to row */
static const float *gather_columns(const moe_problem *p, const backward_buffers *b, int64_t e, int64_t from, int64_t to, const void *source,
                                   int64_t d, int64_t n, float *buffer, int64_t *ld)
{
    const float *rows = (const float *)source + b->block.t * p->D + d;
    *ld = p->D;
    if (e == p->E)
        return rows + from * p->D;
    for (int64_t r = from; r < to; r++)
        memcpy(buffer + (r - from) * n, rows + b->block.token[r] * p->D, (size_t)n * sizeof(float));
    *ld = n;
    return buffer;
}

typedef struct weight_grads {
    float *dw1, *dw3, *dw2;
} weight_grads;

static weight_grads weight_grads_of(const moe_problem *p, const moe_grads *g, int64_t e)
{
    if (e == p->E)
        return (weight_grads){g->dshared_w1, g->dshared_w3, g->dshared_w2};
    return (weight_grads){g->dw1 ? g->dw1[e] : NULL, g->dw3 ? g->dw3[e] : NULL, g->dw2 ? g->dw2[e] : NULL};
}

/* dw1 += dA^T X, dw3 += dB^T X, dw2 += dY^T (c M) for columns i.. of the width and d.. of D: rows in token order. */
static void weight_tile(const moe_problem *p, const moe_grads *g, const backward_buffers *b, int64_t e, int64_t i, int64_t d, int thread)
{
    weight_grads dw = weight_grads_of(p, g, e);
    bool shared = e == p->E;
    const inner_gradients *in = shared ? &b->shared : &b->routed;
    int64_t width = shared ? p->Is : p->I, from = shared ? 0 : b->block.first[e], to = shared ? b->block.count : b->block.first[e + 1];
    int64_t ni = width - i < MOE_TILE_COLUMNS ? width - i : MOE_TILE_COLUMNS, nd = p->D - d < MOE_TILE_COLUMNS ? p->D - d : MOE_TILE_COLUMNS;
    float *buffer = b->thread + (size_t)thread * b->thread_floats;
    for (int64_t r = from; r < to; r += MOE_TILE_ROWS) {
        int64_t end = to - r < MOE_TILE_ROWS ? to : r + MOE_TILE_ROWS, at = r * width + i, ld;
        if (dw.dw1 || dw.dw3) {
            const float *x = gather_columns(p, b, e, r, end, p->x, d, nd, buffer, &ld);
            if (dw.dw1)
                kl_gemm_serial(KL_T, KL_N, ni, nd, end - r, 1.0f, in->da + at, width, x, ld, 1.0f, dw.dw1 + i * p->D + d, p->D);
            if (dw.dw3)
                kl_gemm_serial(KL_T, KL_N, ni, nd, end - r, 1.0f, in->db + at, width, x, ld, 1.0f, dw.dw3 + i * p->D + d, p->D);
        }
        if (dw.dw2) {
            const float *dy = gather_columns(p, b, e, r, end, g->dy, d, nd, buffer, &ld);
            kl_gemm_serial(KL_T, KL_N, nd, ni, end - r, 1.0f, dy, ld, in->m + at, width, 1.0f, dw.dw2 + d * width + i, width);
        }
    }
}

/* dx_t = shared + its rows in order of choice; dc of its rows through the choice to d logits */
static void combine(const moe_problem *p, const moe_grads *g, const backward_buffers *b, int64_t i, int thread)
{
    int64_t tiles = kl_ceil_div(p->I, MOE_TILE_COLUMNS), top_k = moe_top_k(p);
    const int32_t *row_of = b->block.row_of + i * top_k;
    if (g->dx) {
        float *dx = (float *)g->dx + (b->block.t + i) * p->D;
        if (!p->Is)
            memset(dx, 0, (size_t)p->D * sizeof(float));
        for (int64_t k = 0; k < top_k; k++) {
            const float *row = b->dx + row_of[k] * p->D;
#pragma omp simd
            for (int64_t d = 0; d < p->D; d++)
                dx[d] += row[d];
        }
    }
    for (int64_t k = 0; k < top_k; k++) {
        float *dc = b->dc + row_of[k] * tiles;
        for (int64_t c = 1; c < tiles; c++)
            dc[0] += dc[c];
        b->dweight[i * top_k + k] = dc[0];
    }
    if (p->E)
        moe_choose_backward(p, &b->block.routes, i, b->dweight + i * top_k, thread);
}

/* l = router x:  dx += dl router,  drouter += dl^T x */
static void router_backward(const kl_ctx *ctx, const moe_problem *p, const moe_grads *g, const moe_block *b)
{
    const float *dl = b->routes.score, *x = (const float *)p->x + b->t * p->D;
    if (g->dx)
        kl_linear_dx(ctx, b->count, p->E, p->D, dl, p->E, p->router, p->router_dtype, p->D, 1.0f, (float *)g->dx + b->t * p->D, p->D);
    if (g->drouter)
        kl_gemm(ctx, KL_T, KL_N, p->E, p->D, b->count, 1.0f, dl, p->E, x, p->D, 1.0f, g->drouter, p->D);
}

/* The phases of one block inside a team of threads. */
static void block_backward(const moe_problem *p, const moe_grads *g, const backward_buffers *b)
{
    int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < b->block.inner_count; i++)
        inner_tile(p, g, b, &b->block.inner[i], thread);
    if (g->dx) {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < b->block.outer_count; i++)
            outer_tile(p, g, b, &b->block.outer[i]);
    }
    int64_t widest = p->E && p->I > p->Is ? p->I : p->Is;
    int64_t across = kl_ceil_div(widest, MOE_TILE_COLUMNS), down = kl_ceil_div(p->D, MOE_TILE_COLUMNS);
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t e = p->E; e >= 0; e--)
        for (int64_t i = 0; i < across; i++)
            for (int64_t d = 0; d < down; d++)
                if (i * MOE_TILE_COLUMNS < (e == p->E ? p->Is : p->I))
                    weight_tile(p, g, b, e, i * MOE_TILE_COLUMNS, d * MOE_TILE_COLUMNS, thread);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->block.count; i++)
        combine(p, g, b, i, thread);
}

kl_status moe_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes)
{
    const moe_problem *p = problem;
    const moe_grads *g = grads;
    KL_REQUIRE(ctx, "moe: ctx: expected a context, got NULL");
    KL_TRY(moe_validate(ctx, p));
    KL_TRY(moe_validate_grads(p, g));
    KL_TRY(moe_enter(workspace, bytes, moe_chunk_workspace(ctx, p, KL_BACKWARD)));
    kl_arena arena = kl_arena_over(workspace, bytes);
    backward_buffers b = carve(&arena, p, moe_threads(ctx));
    int64_t step = moe_block_tokens(p, KL_BACKWARD);
    for (int64_t t = 0; t < p->T; t += step) {
        moe_block_take(ctx, p, t, step, &b.block);
#pragma omp parallel num_threads(ctx->threads) if (moe_worth_threads(p, b.block.count))
        block_backward(p, g, &b);
        if (p->E)
            router_backward(ctx, p, g, &b.block);
    }
    return kl_ok();
}
