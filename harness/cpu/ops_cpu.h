/* The CPU's rows of kl_ops, one idea a file, gathered by ops.c; and the checks that they share. */
#ifndef KL_HARNESS_CPU_OPS_CPU_H
#define KL_HARNESS_CPU_OPS_CPU_H

#include "harness/ops.h"

/* memory.c */
kl_status cpu_alloc(kl_ctx *ctx, void **p, size_t bytes);
void cpu_release(kl_ctx *ctx, void *p);
kl_status cpu_copy(kl_ctx *ctx, void *dst, const void *src, size_t bytes);
kl_status cpu_zero(kl_ctx *ctx, void *p, size_t bytes);
kl_status cpu_add(kl_ctx *ctx, float *y, const float *x, size_t n);

/* embed.c */
kl_status cpu_embed(kl_ctx *ctx, const kl_param *w, const int32_t *ids, int64_t T, float *y);
kl_status cpu_embed_backward(kl_ctx *ctx, kl_param *dw, const int32_t *ids, int64_t T, const float *dy);

/* linear.c */
kl_status cpu_linear(kl_ctx *ctx, const kl_param *w, int64_t T, const float *x, float *y, bool accumulate);
kl_status cpu_linear_backward(kl_ctx *ctx, const kl_param *w, int64_t T, const float *x, const float *dy, float *dx, bool accumulate, kl_param *dw);

/* norm.c */
kl_status cpu_rmsnorm(kl_ctx *ctx, const kl_param *w, float eps, int64_t T, int64_t D, const float *x, int64_t x_stride, float *y, int64_t y_stride);
kl_status cpu_rmsnorm_backward(kl_ctx *ctx, const kl_param *w, float eps, int64_t T, int64_t D, const float *x, int64_t x_stride,
                               const float *dy, int64_t dy_stride, float *dx, int64_t dx_stride, bool accumulate, kl_param *dw);

/* latent.c */
kl_status cpu_store_latent(kl_ctx *ctx, const float *rows, int64_t T, int64_t width, const int64_t *row_index, void *cache, kl_dtype type);

/* head_loss.c */
kl_status cpu_head_loss(kl_ctx *ctx, const kl_param *w, int64_t T, const float *x, const int32_t *targets, double *loss_sum,
                        int64_t *counted, float grad_scale, float *dx, kl_param *dw, void *workspace, size_t bytes);
size_t cpu_head_loss_workspace(const kl_ctx *ctx, const kl_param *w, int64_t T);

/* optimizer.c */
kl_status cpu_adamw(kl_ctx *ctx, size_t n, float *w, const float *g, float *m, float *v, double lr, double beta1, double beta2,
                    double eps, double decay, double clip_scale, int64_t step);
kl_status cpu_sumsq(kl_ctx *ctx, size_t n, const float *x, double *out);

/* A weight that can be read: data there, a float type, sizes >= 0. */
static inline kl_status check_weight(const char *op, const kl_param *w)
{
    KL_REQUIRE(w && w->data, "%s: w: expected a weight, got NULL", op);
    KL_REQUIRE(w->dtype == KL_F32 || w->dtype == KL_BF16 || w->dtype == KL_F16,
               "%s: w: expected float32, bfloat16 or float16, got %s", op, kl_dtype_name(w->dtype));
    KL_REQUIRE(w->rows >= 0 && w->columns >= 0, "%s: w: expected sizes >= 0, got [%lld,%lld]", op, (long long)w->rows, (long long)w->columns);
    return kl_ok();
}

/* A gradient that can be added to: float, shaped [rows,columns]. */
static inline kl_status check_gradient(const char *op, const kl_param *dw, int64_t rows, int64_t columns)
{
    KL_REQUIRE(dw->data, "%s: dw: expected a gradient, got NULL data", op);
    KL_REQUIRE(dw->dtype == KL_F32, "%s: dw: expected float32, got %s", op, kl_dtype_name(dw->dtype));
    KL_REQUIRE(dw->rows == rows && dw->columns == columns, "%s: dw: expected shape [%lld,%lld], got [%lld,%lld]", op,
               (long long)rows, (long long)columns, (long long)dw->rows, (long long)dw->columns);
    return kl_ok();
}

static inline kl_status check_tokens(const char *op, const kl_ctx *ctx, int64_t T)
{
    KL_REQUIRE(ctx, "%s: ctx: expected a context, got NULL", op);
    KL_REQUIRE(ctx->device == KL_CPU, "%s: device: expected cpu, got %s", op, kl_device_name(ctx->device));
    KL_REQUIRE(T >= 0, "%s: T: expected at least 0, got %lld", op, (long long)T);
    return kl_ok();
}

#endif
