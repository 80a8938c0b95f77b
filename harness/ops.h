/* The operations that a model is made of, as a table: implemented once over the CPU kernels
 * (harness/cpu/) and once over CUDA (harness/cuda/). All tensors live where the device computes; activations are float
 * on the CPU. Shapes are row-major; T counts packed tokens. Gradients of activations overwrite, of parameters accumulate. */
#ifndef KL_HARNESS_OPS_H
#define KL_HARNESS_OPS_H

#include "common/context.h"
#include "harness/weights.h"
#include "kda/conv.h"
#include "kda/gated_norm.h"
#include "kda/kda.h"
#include "mla/mla.h"
#include "moe/moe.h"

typedef struct kl_ops {
    const char *name;
    /* device memory */
    kl_status (*alloc)(kl_ctx *, void **p, size_t bytes); /* 64-byte aligned, not cleared */
    void (*release)(kl_ctx *, void *p);
    kl_status (*copy)(kl_ctx *, void *dst, const void *src, size_t bytes);
    kl_status (*zero)(kl_ctx *, void *p, size_t bytes);

    /* y[T,D] = w[id]; dw[id] += dy */
    kl_status (*embed)(kl_ctx *, const kl_param *w, const int32_t *ids, int64_t T, float *y);
    kl_status (*embed_backward)(kl_ctx *, kl_param *dw, const int32_t *ids, int64_t T, const float *dy);
    /* y[T,N] = x[T,K] w[N,K]^T (+ y when accumulate) */
    kl_status (*linear)(kl_ctx *, const kl_param *w, int64_t T, const float *x, float *y, bool accumulate);
    /* dx (+)= dy w; dw += dy^T x; either may be NULL */
    kl_status (*linear_backward)(kl_ctx *, const kl_param *w, int64_t T, const float *x, const float *dy, float *dx, bool accumulate, kl_param *dw);
    /* y = x rsqrt(mean x^2 + eps) w over rows of D at the given strides */
    kl_status (*rmsnorm)(kl_ctx *, const kl_param *w, float eps, int64_t T, int64_t D, const float *x, int64_t x_stride, float *y, int64_t y_stride);
    kl_status (*rmsnorm_backward)(kl_ctx *, const kl_param *w, float eps, int64_t T, int64_t D, const float *x, int64_t x_stride,
                                  const float *dy, int64_t dy_stride, float *dx, int64_t dx_stride, bool accumulate, kl_param *dw);
    /* y += x over n */
    kl_status (*add)(kl_ctx *, float *y, const float *x, size_t n);
    /* the families, as their headers say */
    kl_status (*conv)(kl_ctx *, const kda_conv_problem *);
    kl_status (*conv_backward)(kl_ctx *, const kda_conv_problem *, const kda_conv_grads *);
    kl_status (*gated_norm)(kl_ctx *, const kda_gated_norm_problem *);
    kl_status (*gated_norm_backward)(kl_ctx *, const kda_gated_norm_problem *, const kda_gated_norm_grads *);
    kl_status (*rope)(kl_ctx *, float *x, int64_t rows, int64_t heads, int64_t Dr, int64_t row_stride, int64_t head_stride,
                      const int64_t *position, float theta, bool inverse);
    /* kda, mla, moe go through their own variant tables with ctx->device */
    /* rows of [R+Dr] floats into the latent cache (slots, capacity), at position[t] of slot_of[t] */
    kl_status (*store_latent)(kl_ctx *, const float *rows, int64_t T, int64_t width, const int64_t *row_index, void *cache, kl_dtype type);
    /* loss over logits = x w^T without ever holding all of them: sum of -log p(target) for target >= 0 (double, fixed
     * order); when dx is not NULL also dx (overwritten) and dw (accumulated), both of sum * grad_scale */
    kl_status (*head_loss)(kl_ctx *, const kl_param *w, int64_t T, const float *x, const int32_t *targets, double *loss_sum,
                           int64_t *counted, float grad_scale, float *dx, kl_param *dw, void *workspace, size_t bytes);
    size_t (*head_loss_workspace)(const kl_ctx *, const kl_param *w, int64_t T);
    /* optimizer over n floats; clip_scale multiplies the gradient first. sumsq: double, fixed order */
    kl_status (*adamw)(kl_ctx *, size_t n, float *w, const float *g, float *m, float *v, double lr, double beta1, double beta2,
                       double eps, double decay, double clip_scale, int64_t step);
    kl_status (*sumsq)(kl_ctx *, size_t n, const float *x, double *out);
} kl_ops;

extern const kl_ops kl_ops_cpu;
const kl_ops *kl_ops_for(kl_device device); /* NULL: none yet for that device */

#endif
