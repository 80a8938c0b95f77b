/* Multi-head latent attention with an explicit softmax, on one sequence.
 *
 * Key j of head h is [ Wk_h c_j[:R] | c_j[R:] ], its value Wv_h c_j[:R]; the last Dr entries of c_j are shared by all heads. Then
 *
 *   s_ij = scale q_i . k_j,   p_ij = softmax over j of s_ij,   o_i = sum_j p_ij v_j
 *
 * The queries are the last Tq of the Tk positions: query i sees the keys j <= Tk - Tq + i. */
#ifndef REFERENCE_MLA_H
#define REFERENCE_MLA_H

#include "reference/real.h"

typedef struct {
    int64_t Tq, Tk, H;      /* 0 <= Tq <= Tk */
    int64_t Dn, Dr, Dv, R;  /* key dimensions from the latent, shared key dimensions (may be 0), value dimensions, latent rank */
    real scale;             /* 0 means (Dn+Dr)^-0.5 */
    const real *q;          /* [Tq,H,Dn+Dr], rotated if the model rotates */
    const real *c;          /* [Tk,R+Dr], the R part normalised, the Dr part rotated if the model rotates */
    const real *W;          /* [H*(Dn+Dv),R] (kv_b_proj): per head Dn key rows, then Dv value rows */
} ref_mla;

/* o [Tq,H,Dv]; lse [Tq,H], log of the sum over j of e^s_ij, may be NULL. Overwritten. Returns 0, or -1 when out of memory. */
int ref_mla_forward(const ref_mla *p, real *o, real *lse);

/* d_o [Tq,H,Dv] -> dq [Tq,H,Dn+Dr], dc [Tk,R+Dr], dW [H*(Dn+Dv),R]. Returns 0, or -1 when out of memory. */
int ref_mla_backward(const ref_mla *p, const real *d_o, real *dq, real *dc, real *dW);

/* Rotary embedding, in place, of the last Dr of the D entries of every head of x [T,H,D]; token t stands at position offset + t.
 * Dr is even. Entry i < Dr/2 of the rotated part pairs with entry i + Dr/2 (the two halves, not neighbours), and turns by
 * position * theta^(-2i/Dr). Backward turns dx by the opposite angle, in place. */
void ref_rope_forward(int64_t T, int64_t H, int64_t D, int64_t Dr, real theta, int64_t offset, real *x);
void ref_rope_backward(int64_t T, int64_t H, int64_t D, int64_t Dr, real theta, int64_t offset, real *dx);

#endif
