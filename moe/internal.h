/* The GPU's variants, for the table alone. */
#ifndef KL_MOE_INTERNAL_H
#define KL_MOE_INTERNAL_H

#include "moe/moe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the GPU's kernels take of what is valid. */
kl_status moe_cuda_takes(const moe_problem *p);
/* Validation of the forward entry points. */
kl_status moe_cuda_enter(const kl_ctx *ctx, const moe_problem *p);
kl_status moe_cuda_enter_backward(const kl_ctx *ctx, const moe_problem *p, const moe_grads *g);

/* The same of the recurrent form, which holds all tokens in a block's shared memory. */
kl_status moe_cuda_takes_few(const moe_problem *p);

size_t moe_cuda_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status moe_cuda_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
size_t moe_cuda_cublas_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status moe_cuda_cublas_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
size_t moe_cuda_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status moe_cuda_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
kl_status moe_cuda_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes);
size_t moe_cuda_chunk_backward_workspace(const moe_problem *p);

#ifdef __cplusplus
}
#endif
#endif
