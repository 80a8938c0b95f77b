/* Kimi Delta Attention, token by token (Equation 1 of the report), on one sequence. Packed sequences are one call each.
 *
 * Per value head, with q, k, v, g, beta of token t and the state S [K,V]:
 *
 *   S' = Diag(e^g) S            forget, channel by channel
 *   u  = beta (v - S'^T k)      what the state does not know yet about k
 *   S  = S' + k u^T             write it
 *   o  = S^T (scale q)          read
 *
 * Value head i reads query/key head i / (HV/H). */
#ifndef REFERENCE_KDA_H
#define REFERENCE_KDA_H

#include "reference/gate.h"
#include "reference/real.h"

typedef enum {
    REF_BETA_PLAIN,          /* beta as given */
    REF_BETA_SIGMOID,        /* sigmoid(beta) */
    REF_BETA_TWICE_SIGMOID   /* 2 sigmoid(beta): negative eigenvalues allowed */
} ref_beta_kind;

typedef struct {
    int64_t T, H, HV, K, V;  /* T >= 0; HV a multiple of H */
    int64_t G;               /* gates a value head: K (one a channel), K/b (one a block of b channels), 1 (one a head), 0 (no gate) */
    real scale;              /* of the queries; 0 means K^-0.5 */
    ref_gate_kind gate;
    real lower_bound;        /* bounded gate only, in [-5, 0) */
    ref_beta_kind beta_kind;
    int qk_l2norm;           /* 1: q and k are first divided by (sum x^2 + 1e-6)^0.5 */
    int no_delta;            /* 1: nothing is erased, u = beta v (GLA with G = K, Mamba2-like with G = 1) */
    const real *q, *k;       /* [T,H,K] */
    const real *v;           /* [T,HV,V] */
    const real *g;           /* [T,HV,G], before the gate; NULL when G = 0 */
    const real *beta;        /* [T,HV], before the sigmoid; NULL = 1 */
    const real *A_log;       /* [HV], softplus and bounded gates only */
    const real *dt_bias;     /* [HV*G], softplus and bounded gates only; NULL = 0 */
    const real *h0;          /* [HV,K,V], the state before the first token; NULL = 0 */
} ref_kda;

/* o [T,HV,V], ht [HV,K,V] the state after the last token (h0 when T = 0), states [T,HV,K,V] the state after every token.
 * Any may be NULL; all are overwritten. ht may be p->h0 itself. Returns 0, or -1 when out of memory. */
int ref_kda_forward(const ref_kda *p, real *o, real *ht, real *states);

typedef struct {
    const real *d_o;         /* [T,HV,V], NULL = 0 */
    const real *dht;         /* [HV,K,V], NULL = 0 */
    real *dq, *dk;           /* [T,H,K]; these and the following may be NULL */
    real *dv;                /* [T,HV,V] */
    real *dg;                /* [T,HV,G], before the gate */
    real *dbeta;             /* [T,HV], before the sigmoid */
    real *dA_log;            /* [HV] */
    real *ddt_bias;          /* [HV*G] */
    real *dh0;               /* [HV,K,V] */
} ref_kda_grad;

/* Adds to the gradients in d. Returns 0, or -1 when out of memory. */
int ref_kda_backward(const ref_kda *p, const ref_kda_grad *d);

#endif
