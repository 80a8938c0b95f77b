/* General diagonal-plus-low-rank recurrence, the baseline that KDA is measured against (report, Fig. 2):
 *
 *     S <- Diag(e^g) S + b (a^T S) + k v^T;   o = S^T (scale q)        with S the old state on the right
 *
 * KDA is the case a = k (.) e^g, b = -beta k, and beta k in the place of k; nothing of the kind is assumed here. Tensors are
 * contiguous. On the CPU they are host memory and float; on CUDA device memory and bfloat16, the states float, and cu_seqlens
 * host memory as in kda_problem. */
#ifndef KL_DPLR_H
#define KL_DPLR_H

#include <stdint.h>

#include "common/dtype.h"
#include "common/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dplr_problem {
    int64_t B, T, N, H, K, V;
    const int64_t *cu_seqlens; /* as in kda_problem */
    float scale;               /* 0: K^-0.5 */
    int64_t chunk;             /* 16, 32, 64; 0: what suits the device (64 on the CPU, 32 on CUDA, which offers no other) */
    kl_dtype dtype;            /* of q, k, a, b, v, g, o; 0 is KL_F32 */
    const void *q, *k, *a, *b; /* [B,T,H,K] */
    const void *v;             /* [B,T,H,V] */
    const void *g;             /* [B,T,H,K], natural-log decay <= 0 */
    const float *h0;           /* [N,H,K,V]; NULL: zero */
    float *ht;                 /* [N,H,K,V]; NULL: not wanted; may be h0 */
    void *o;                   /* [B,T,H,V] */
} dplr_problem;

kl_status dplr_validate(const kl_ctx *ctx, const dplr_problem *p);
const kl_variant *dplr_variants(int *count);
size_t dplr_workspace(const kl_ctx *ctx, const dplr_problem *p);
kl_status dplr_forward(kl_ctx *ctx, const dplr_problem *p, void *workspace, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
