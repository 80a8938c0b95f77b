/* Multi-head Latent Attention: causal attention whose keys and values are expanded from a latent.
 *
 * Legend: N sequences, H heads, R latent rank, Dn and Dr the two parts of a query/key head (with and
 * without expansion), Dv value head. For head h and key row j, with the latent row c_j = [latent_j | pe_j]:
 *
 *     k_jh = [Wk_h latent_j | pe_j],  v_jh = Wv_h latent_j,  o_ih = sum_j softmax_j(scale q_ih . k_jh) v_jh
 *
 * over the keys j that query i may see. The queries of a sequence are its last ones: with Tq queries and
 * Tk keys, query i sees keys 0 .. Tk - Tq + i. Two forms compute the same:
 * recurrent (absorbed, for decoding): q Wk_h is one query of R + Dr against the latent rows themselves;
 * chunk (for prefill and training): keys and values expanded tile by tile, online softmax.
 * No rotation is applied here: NoPE is the model, mla_rope() serves the ablation. */
#ifndef KL_MLA_H
#define KL_MLA_H

#include <stdint.h>

#include "common/context.h"
#include "common/dtype.h"
#include "common/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mla_problem {
    int64_t N, H, R, Dn, Dr, Dv;
    const int64_t *cu_q;       /* [N+1], host: queries of sequence n are rows cu_q[n] .. cu_q[n+1]-1 of q and o */
    const int64_t *kv_start;   /* [N]: first row of sequence n in latent; ranges may not overlap in backward */
    const int64_t *kv_len;     /* [N]: keys of sequence n, at least its queries */
    float scale;               /* 0: (Dn + Dr)^-0.5 */
    kl_dtype dtype;            /* of q, o and their gradients; CPU: F32 */
    kl_dtype latent_dtype;     /* F32 or BF16 */
    kl_dtype weight_dtype;     /* F32, BF16 or F16 */
    const void *q;             /* [Tq,H,Dn+Dr]; q_stride elements from token to token, 0: contiguous */
    int64_t q_stride;
    const void *latent;        /* [rows,R+Dr]; the R part already normalised */
    int64_t latent_rows;       /* rows that exist, for checking kv_start and kv_len */
    const void *kv_b;          /* [H,Dn+Dv,R]: per head Dn rows of Wk, then Dv rows of Wv */
    void *o;                   /* [Tq,H,Dv], contiguous */
    float *lse;                /* [Tq,H] natural log of the softmax denominator (with scale); NULL: not wanted */
} mla_problem;

/* dq and dlatent overwrite (latent rows of no sequence are left alone); dkv_b accumulates. NULL: not wanted.
 * o and lse: what the forward pass wrote, or both NULL: then so much of it as is needed is computed again. */
typedef struct mla_grads {
    const void *d_o;           /* [Tq,H,Dv] */
    void *dq;                  /* [Tq,H,Dn+Dr], q_stride */
    float *dlatent;            /* [rows,R+Dr] */
    float *dkv_b;              /* [H,Dn+Dv,R] */
    const void *o;             /* [Tq,H,Dv] */
    const float *lse;          /* [Tq,H] */
} mla_grads;

kl_status mla_validate(const kl_ctx *ctx, const mla_problem *p);
kl_status mla_validate_grads(const mla_problem *p, const mla_grads *g);

const kl_variant *mla_variants(int *count);
const kl_variant *mla_pick(kl_device device, const char *name, const mla_problem *p, kl_pass pass);

size_t mla_workspace(const kl_ctx *ctx, const mla_problem *p, kl_pass pass);
kl_status mla_forward(kl_ctx *ctx, const mla_problem *p, void *workspace, size_t bytes);
/* p->o and p->lse are neither read nor written. */
kl_status mla_backward(kl_ctx *ctx, const mla_problem *p, const mla_grads *g, void *workspace, size_t bytes);

/* Rotary embedding for the ablation, in place: Dr contiguous numbers for each of rows x heads, pairs
 * (i, i + Dr/2), angle position[row] theta^(-2i/Dr). inverse: rotate back, which is also the gradient.
 * row_stride, head_stride: elements. x and position lie where the context computes; bfloat16 on a device only. */
kl_status mla_rope(kl_ctx *ctx, float *x, int64_t rows, int64_t heads, int64_t Dr, int64_t row_stride, int64_t head_stride,
                   const int64_t *position, float theta, bool inverse);
kl_status mla_rope_bf16(kl_ctx *ctx, uint16_t *x, int64_t rows, int64_t heads, int64_t Dr, int64_t row_stride, int64_t head_stride,
                        const int64_t *position, float theta, bool inverse);

#ifdef __cplusplus
}
#endif
#endif
