/* One decode step of everything in a KDA layer between its projections: short convolutions of q, k, v with SiLU, the operator
 * with its norms and gates inside, the gated norm; tails and states in their pools, in place. */
#ifndef KL_KDA_DECODE_LAYER_H
#define KL_KDA_DECODE_LAYER_H

#include "kda/gated_norm.h"
#include "kda/kda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kda_decode_problem {
    /* The operator: N = B sequences of T new tokens (one, or a few), no cu_seqlens. q, k, v are what the convolutions read;
     * h0 is ht, updated in place; o is not used. No chunk_states, no token_states. */
    kda_problem kda;

    /* the convolutions of q, k and v, in this order */
    int64_t W;                 /* taps, 1..16 */
    kl_dtype weight_dtype;     /* F32, BF16, F16 */
    const void *weight[3];     /* [H K,W], [H K,W], [HV V,W] */
    kl_dtype tail_dtype;       /* F32, BF16 */
    void *tail[3];             /* [pool,H K,W-1] and so on, oldest first; NULL with W = 1 */

    /* the norm over each head of the output */
    kda_output_gate output_gate;
    float eps;
    kl_dtype norm_weight_dtype;
    const void *norm_weight;   /* [V] */
    const void *z;             /* [N,T,HV,V] of kda.dtype, contiguous; NULL with KDA_OUT_NONE */
    void *y;                   /* the same; of a sequence that is left out, nothing in particular */
} kda_decode_problem;

/* Bytes that the step needs; 0 where one kernel does all of it (CUDA, HV = H, K = V = 128, W <= 4, float state). */
size_t kda_decode_workspace(const kl_ctx *ctx, const kda_decode_problem *p);
kl_status kda_decode(kl_ctx *ctx, const kda_decode_problem *p, void *workspace, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
