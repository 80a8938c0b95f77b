/* RMSNorm over each head of the KDA output, then weight and output gate:
 *
 *     y = x rsqrt(mean x^2 + eps) (.) weight (.) act(gate),   act: sigmoid, swish z sigmoid(z), or none */
#ifndef KL_KDA_GATED_NORM_H
#define KL_KDA_GATED_NORM_H

#include "common/context.h"
#include "common/dtype.h"
#include "common/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kda_output_gate { KDA_OUT_SIGMOID = 0, KDA_OUT_SWISH, KDA_OUT_NONE } kda_output_gate;

typedef struct kda_gated_norm_problem {
    int64_t rows;          /* tokens times heads */
    int64_t V;
    kda_output_gate gate_kind;
    float eps;
    kl_dtype dtype;        /* of x, gate, y and their gradients: F32; on CUDA also BF16 */
    const void *x, *gate;  /* [rows,V]; gate NULL with KDA_OUT_NONE */
    const void *weight;    /* [V] */
    kl_dtype weight_dtype;
    void *y;               /* [rows,V]; may be x */
    void *workspace;       /* kda_gated_norm_workspace() bytes where the tensors are, 64-byte aligned; NULL where that is 0 */
    size_t workspace_bytes;
} kda_gated_norm_problem;

typedef struct kda_gated_norm_grads {
    const void *dy;
    void *dx, *dgate;      /* [rows,V]; overwritten; dx may be dy; dgate NULL with KDA_OUT_NONE */
    float *dweight;        /* [V]; accumulated; NULL: not wanted */
} kda_gated_norm_grads;

/* 0 on the CPU. ctx may not be NULL. */
size_t kda_gated_norm_workspace(const kl_ctx *ctx, const kda_gated_norm_problem *p, kl_pass pass);
kl_status kda_gated_norm_forward(kl_ctx *ctx, const kda_gated_norm_problem *p);
/* p->x must be the forward input, so a forward in place cannot be differentiated. */
kl_status kda_gated_norm_backward(kl_ctx *ctx, const kda_gated_norm_problem *p, const kda_gated_norm_grads *g);

#ifdef __cplusplus
}
#endif
#endif
