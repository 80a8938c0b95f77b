/* General diagonal-plus-low-rank recurrence, the baseline that KDA is measured against (report, Fig. 2):
 *
 *     S <- Diag(e^g) S + b (a^T S) + k v^T;   o = S^T (scale q)        with S the old state on the right
 *
 * KDA is the case a = k (.) e^g, b = -beta k, and beta k in the place of k. Float tensors, contiguous. */
#ifndef KL_DPLR_H
#define KL_DPLR_H

#include <stdint.h>

#include "common/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dplr_problem {
    int64_t B, T, N, H, K, V;
    const int64_t *cu_seqlens; /* as in kda_problem */
    float scale;               /* 0: K^-0.5 */
    int64_t chunk;             /* 16, 32, 64; 0: 64 */
    const float *q, *k, *a, *b; /* [B,T,H,K] */
    const float *v;             /* [B,T,H,V] */
    const float *g;             /* [B,T,H,K], natural-log decay <= 0 */
    const float *h0;            /* [N,H,K,V]; NULL: zero */
    float *ht;                  /* [N,H,K,V]; NULL: not wanted; may be h0 */
    float *o;                   /* [B,T,H,V] */
} dplr_problem;

kl_status dplr_validate(const kl_ctx *ctx, const dplr_problem *p);
const kl_variant *dplr_variants(int *count);
size_t dplr_workspace(const kl_ctx *ctx, const dplr_problem *p);
kl_status dplr_forward(kl_ctx *ctx, const dplr_problem *p, void *workspace, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
