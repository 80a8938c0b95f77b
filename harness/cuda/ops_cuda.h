/* The operations of harness/layers.h over CUDA, one idea a file as in harness/cpu/. Problems are valid when they come here;
 * workspaces as large as asked for. */
#ifndef KL_HARNESS_CUDA_OPS_CUDA_H
#define KL_HARNESS_CUDA_OPS_CUDA_H

#include "harness/layers.h"

#ifdef __cplusplus
extern "C" {
#endif

/* norm.cu */
size_t cuda_rmsnorm_workspace(const layers_rmsnorm *p, kl_pass pass);
kl_status cuda_rmsnorm(kl_ctx *ctx, const layers_rmsnorm *p);
kl_status cuda_rmsnorm_backward(kl_ctx *ctx, const layers_rmsnorm *p, const layers_rmsnorm_grads *g, void *workspace, size_t bytes);

/* embed.cu */
size_t cuda_embed_workspace(const kl_ctx *ctx, const layers_embed *p, kl_pass pass);
kl_status cuda_embed(kl_ctx *ctx, const layers_embed *p);
kl_status cuda_embed_backward(kl_ctx *ctx, const layers_embed *p, const layers_embed_grads *g, void *workspace, size_t bytes);

/* swiglu.cu */
kl_status cuda_swiglu(kl_ctx *ctx, const layers_swiglu *p);
kl_status cuda_swiglu_backward(kl_ctx *ctx, const layers_swiglu *p, const layers_swiglu_grads *g);

/* convert.cu: rows of floats to dense rows of bfloat16 */
kl_status cuda_round(kl_ctx *ctx, int64_t rows, int64_t columns, const float *x, int64_t stride, uint16_t *y);

/* linear.cu */
size_t cuda_linear_workspace(const layers_linear *p, kl_pass pass);
kl_status cuda_linear(kl_ctx *ctx, const layers_linear *p, void *workspace, size_t bytes);
kl_status cuda_linear_backward(kl_ctx *ctx, const layers_linear *p, const layers_linear_grads *g, void *workspace, size_t bytes);

/* mlp.cu */
size_t cuda_mlp_workspace(const layers_mlp *p, kl_pass pass);
kl_status cuda_mlp(kl_ctx *ctx, const layers_mlp *p, void *workspace, size_t bytes);
kl_status cuda_mlp_backward(kl_ctx *ctx, const layers_mlp *p, const layers_mlp_grads *g, void *workspace, size_t bytes);

/* head_loss.cu; grads NULL: losses alone */
size_t cuda_head_loss_workspace(const layers_head_loss *p, kl_pass pass);
kl_status cuda_head_loss(kl_ctx *ctx, const layers_head_loss *p, const layers_head_loss_grads *g, void *workspace, size_t bytes);

/* optimizer.cu */
size_t cuda_sumsq_workspace(const layers_sumsq *p);
kl_status cuda_sumsq(kl_ctx *ctx, const layers_sumsq *p, void *workspace, size_t bytes);
kl_status cuda_adamw(kl_ctx *ctx, const layers_adamw *p);

/* muon.cu */
size_t cuda_muon_workspace(const layers_muon *p);
kl_status cuda_muon(kl_ctx *ctx, const layers_muon *p, void *workspace, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
