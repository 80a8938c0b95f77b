/* Depthwise causal short convolution with carried tail, optionally followed by SiLU:
 *
 *     z[t,d] = sum_{j<W} weight[d,j] x[t-W+1+j,d];   y = z sigmoid(z) or z
 *
 * where x before the first token of a sequence comes from its tail (zero without one). */
#ifndef KL_KDA_CONV_H
#define KL_KDA_CONV_H

#include "common/context.h"
#include "common/dtype.h"
#include "common/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kda_conv_problem {
    int64_t B, T, N;            /* as in kda_problem */
    const int64_t *cu_seqlens;  /* [N+1] or NULL */
    int64_t D, W;               /* channels; taps, 1..16 */
    bool silu;
    kl_dtype dtype;             /* of x, y and their gradients: F32; on CUDA also BF16 */
    const void *x;              /* [B,T,D], x_stride elements from token to token (0: D) */
    int64_t x_stride;
    const void *weight;         /* [D,W] */
    kl_dtype weight_dtype;      /* F32, BF16, F16 */
    void *y;                    /* [B,T,D], y_stride; never x */
    int64_t y_stride;
    const void *tail_in;        /* [N or pool,D,W-1], oldest first; NULL: zero */
    void *tail_out;             /* same; NULL: not wanted; may be tail_in */
    kl_dtype tail_dtype;        /* of both: F32, or BF16 (inputs are rounded as they are kept) */
    const int64_t *state_index; /* [N] slots of the pool; NULL: n. On CUDA device memory: a sequence whose slot is outside the pool is left out */
    int64_t state_pool;         /* slots in the pool; 0: as many as state_index needs */
    void *workspace;            /* kda_conv_workspace() bytes where the tensors are, 64-byte aligned; NULL where that is 0 */
    size_t workspace_bytes;
} kda_conv_problem;

typedef struct kda_conv_grads {
    const void *dy;             /* [B,T,D], y_stride */
    const float *dtail_out;     /* [N,D,W-1] or NULL */
    void *dx;                   /* [B,T,D], x_stride; overwritten */
    float *dweight;             /* [D,W] float; accumulated; NULL: not wanted */
    float *dtail_in;            /* [N,D,W-1]; overwritten; NULL: not wanted */
} kda_conv_grads;

/* 0 on the CPU. ctx may not be NULL. */
size_t kda_conv_workspace(const kl_ctx *ctx, const kda_conv_problem *p, kl_pass pass);
kl_status kda_conv_forward(kl_ctx *ctx, const kda_conv_problem *p);
/* Recomputes z from x: nothing is kept from the forward pass. */
kl_status kda_conv_backward(kl_ctx *ctx, const kda_conv_problem *p, const kda_conv_grads *g);

#ifdef __cplusplus
}
#endif
#endif
