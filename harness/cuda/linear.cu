/* Projections: y = x w^T, dx = dy w, dw += dy^T x, each one product. */
#include "common/gpu.h"
#include "harness/cuda/cells.cuh"

namespace {

/* A matrix of bfloat16: the caller's, or a rounded copy. */
struct operand {
    const uint16_t *at;
    int64_t stride;
};

struct pieces {
    uint16_t *x, *weight, *dy; /* copies, where the tensors are float */
    void *product;
};

pieces carve(kl_arena *arena, const layers_linear *p, kl_pass pass)
{
    pieces m = {};
    if (p->x_dtype == KL_F32)
        m.x = KL_TAKE(arena, uint16_t, p->T * p->K);
    if (p->weight_dtype == KL_F32)
        m.weight = KL_TAKE(arena, uint16_t, p->N * p->K);
    if (pass == KL_BACKWARD && p->y_dtype == KL_F32)
        m.dy = KL_TAKE(arena, uint16_t, p->T * p->N);
    m.product = KL_TAKE(arena, char, KL_PRODUCT_WORKSPACE);
    return m;
}

kl_status bf16_of(kl_ctx *ctx, kl_dtype type, const void *x, int64_t stride, int64_t rows, int64_t columns, uint16_t *copy, operand *out)
{
    stride = stride_or(stride, columns);
    if (type == KL_F32)
        KL_TRY(cuda_round(ctx, rows, columns, (const float *)x, stride, copy));
    *out = type == KL_F32 ? operand{copy, columns} : operand{(const uint16_t *)x, stride};
    return kl_ok();
}

} // namespace

size_t cuda_linear_workspace(const layers_linear *p, kl_pass pass)
{
    kl_arena arena = kl_arena_count();
    carve(&arena, p, pass);
    return arena.used;
}

kl_status cuda_linear(kl_ctx *ctx, const layers_linear *p, void *workspace, size_t bytes)
{
    kl_arena arena = kl_arena_over(workspace, bytes);
    pieces m = carve(&arena, p, KL_FORWARD);
    operand x, w;
    KL_TRY(bf16_of(ctx, p->x_dtype, p->x, p->x_stride, p->T, p->K, m.x, &x));
    KL_TRY(bf16_of(ctx, p->weight_dtype, p->weight, 0, p->N, p->K, m.weight, &w));
    kl_product y = {};
    y.M = p->T, y.N = p->N, y.K = p->K;
    y.a_stride = x.stride, y.b_stride = w.stride, y.y_stride = stride_or(p->y_stride, p->N);
    y.b_transposed = true;
    y.y_dtype = p->y_dtype;
    return kl_gpu_product(ctx, &y, 1.0f, x.at, w.at, p->accumulate ? 1.0f : 0.0f, p->y, p->y, m.product, KL_PRODUCT_WORKSPACE);
}

kl_status cuda_linear_backward(kl_ctx *ctx, const layers_linear *p, const layers_linear_grads *g, void *workspace, size_t bytes)
{
    kl_arena arena = kl_arena_over(workspace, bytes);
    pieces m = carve(&arena, p, KL_BACKWARD);
    operand x, w, dy;
    KL_TRY(bf16_of(ctx, p->y_dtype, g->dy, p->y_stride, p->T, p->N, m.dy, &dy));
    if (g->dx) {
        KL_TRY(bf16_of(ctx, p->weight_dtype, p->weight, 0, p->N, p->K, m.weight, &w));
        kl_product dx = {};
        dx.M = p->T, dx.N = p->K, dx.K = p->N;
        dx.a_stride = dy.stride, dx.b_stride = w.stride, dx.y_stride = stride_or(p->x_stride, p->K);
        dx.y_dtype = p->x_dtype;
        KL_TRY(kl_gpu_product(ctx, &dx, 1.0f, dy.at, w.at, g->accumulate ? 1.0f : 0.0f, g->dx, g->dx, m.product, KL_PRODUCT_WORKSPACE));
    }
    if (!g->dweight)
        return kl_ok();
    KL_TRY(bf16_of(ctx, p->x_dtype, p->x, p->x_stride, p->T, p->K, m.x, &x));
    kl_product dw = {};
    dw.M = p->N, dw.N = p->K, dw.K = p->T;
    dw.a_stride = dy.stride, dw.b_stride = x.stride, dw.y_stride = p->K;
    dw.a_transposed = true;
    dw.y_dtype = KL_F32;
    return kl_gpu_product(ctx, &dw, 1.0f, dy.at, x.at, 1.0f, g->dweight, g->dweight, m.product, KL_PRODUCT_WORKSPACE);
}
