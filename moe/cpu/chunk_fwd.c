/* Tokens grouped by expert. A block of tokens is routed and sorted; then tiles of rows run as matrix products:
 *
 *     H_e = silu(X_e w1_e^T) (.) X_e w3_e^T;   Y_e = H_e w2_e^T;   y_t = shared_t + sum_k w_tk Y[row of (t,k)]
 *
 * The shared expert (and with E = 0 the dense MLP) is one more expert, which has every token and writes y itself. */
#include "common/blas.h"
#include "common/parallel.h"
#include "moe/cpu/moe_cpu.h"

typedef struct forward_buffers {
    moe_block block;
    float *h, *h_shared; /* [rows,I], [tokens,Is] */
    float *y;            /* [rows,D] each expert's output, unweighted */
    float *gather;       /* [threads][MOE_TILE_ROWS,D] */
    float *up;           /* [threads][MOE_TILE_ROWS,MOE_TILE_COLUMNS] */
} forward_buffers;

static forward_buffers carve(kl_arena *a, const moe_problem *p, int threads)
{
    int64_t tokens = moe_block_tokens(p, KL_FORWARD);
    size_t rows = kl_mul((size_t)tokens, (size_t)moe_top_k(p), &a->overflow);
    forward_buffers b = {.block = moe_block_carve(a, p, tokens, threads)};
    b.h = KL_TAKE(a, float, kl_mul(rows, (size_t)p->I, &a->overflow));
    b.h_shared = KL_TAKE(a, float, kl_mul((size_t)tokens, (size_t)p->Is, &a->overflow));
    b.y = KL_TAKE(a, float, kl_mul(rows, (size_t)p->D, &a->overflow));
    size_t tile_rows = (size_t)threads * (size_t)b.block.tile_rows;
    b.gather = KL_TAKE(a, float, kl_mul(tile_rows, p->E ? (size_t)p->D : 0, &a->overflow));
    b.up = KL_TAKE(a, float, kl_mul(tile_rows, MOE_TILE_COLUMNS, &a->overflow));
    return b;
}

size_t moe_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    if (kl_failed(moe_validate(NULL, problem)))
        return 0;
    if (pass == KL_BACKWARD)
        return moe_chunk_backward_workspace(ctx, problem);
    kl_arena a = kl_arena_count();
    carve(&a, problem, moe_threads(ctx));
    return a.overflow ? SIZE_MAX : a.used;
}

/* h <- silu(h) (.) up, n contiguous floats a row */
static void swiglu(int64_t rows, int64_t n, float *h, int64_t ld, const float *up)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i += KL_LANES) {
            int64_t left = n - i < KL_LANES ? n - i : KL_LANES;
            kl_v a = kl_vload_up_to(h + r * ld + i, left);
            kl_v b = kl_vload_up_to(up + r * n + i, left);
            kl_v m = a * kl_vsigmoid(a) * b;
            kl_vstore_up_to(h + r * ld + i, m, left);
        }
}

/* H = silu(X w1^T) (.) X w3^T over one tile */
static void inner_tile(const moe_problem *p, const forward_buffers *b, const moe_tile *tile, int thread)
{
    moe_expert w = moe_expert_of(p, tile->expert);
    int64_t n = tile->columns, offset = tile->column * p->D;
    float *up = b->up + (size_t)thread * (size_t)b->block.tile_rows * MOE_TILE_COLUMNS;
    const float *x = moe_gather(p, &b->block, tile, p->x, b->gather + (size_t)thread * (size_t)b->block.tile_rows * (size_t)p->D);
    float *h = (tile->expert == p->E ? b->h_shared : b->h) + tile->row * w.width + tile->column;
    kl_linear_serial(tile->rows, n, p->D, x, p->D, moe_weight_at(p, w.w1, offset), p->weight_dtype, p->D, 0.0f, h, w.width);
    kl_linear_serial(tile->rows, n, p->D, x, p->D, moe_weight_at(p, w.w3, offset), p->weight_dtype, p->D, 0.0f, up, n);
    swiglu(tile->rows, n, h, w.width, up);
}

/* Y = H w2^T over one tile */
static void outer_tile(const moe_problem *p, const forward_buffers *b, const moe_tile *tile)
{
    moe_expert w = moe_expert_of(p, tile->expert);
    bool shared = tile->expert == p->E;
    const float *h = (shared ? b->h_shared : b->h) + tile->row * w.width;
    float *y = (shared ? (float *)p->y + b->block.t * p->D : b->y) + tile->row * p->D + tile->column;
    kl_linear_serial(tile->rows, tile->columns, w.width, h, w.width, moe_weight_at(p, w.w2, tile->column * w.width), p->weight_dtype, w.width,
                     0.0f, y, p->D);
}

/* y_t = shared_t + sum_k w_tk Y[row of (t,k)] */
static void combine(const moe_problem *p, const forward_buffers *b, int64_t i)
{
    float *y = (float *)p->y + (b->block.t + i) * p->D;
    if (!p->Is)
        memset(y, 0, (size_t)p->D * sizeof(float));
    for (int64_t k = 0; k < moe_top_k(p); k++) {
        float weight = b->block.routes.weight[i * p->top_k + k];
        const float *row = b->y + b->block.row_of[i * p->top_k + k] * p->D;
#pragma omp simd
        for (int64_t d = 0; d < p->D; d++)
            y[d] += weight * row[d];
    }
}

kl_status moe_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const moe_problem *p = problem;
    KL_TRY(moe_enter_forward(ctx, p));
    KL_TRY(moe_enter(workspace, bytes, moe_chunk_workspace(ctx, p, KL_FORWARD)));
    kl_arena arena = kl_arena_over(workspace, bytes);
    forward_buffers b = carve(&arena, p, moe_threads(ctx));
    int64_t step = moe_block_tokens(p, KL_FORWARD);
    for (int64_t t = 0; t < p->T; t += step) {
        moe_block_take(ctx, p, t, step, &b.block);
#pragma omp parallel num_threads(ctx->threads) if (moe_worth_threads(p, b.block.count))
        {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < b.block.inner_count; i++)
                inner_tile(p, &b, &b.block.inner[i], omp_get_thread_num());
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < b.block.outer_count; i++)
                outer_tile(p, &b, &b.block.outer[i]);
            if (p->E || !p->Is) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < b.block.count; i++)
                    combine(p, &b, i);
            }
        }
    }
    return kl_ok();
}
