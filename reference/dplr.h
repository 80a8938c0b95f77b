/* The general diagonal-plus-low-rank recurrence, token by token, on one sequence: the baseline that KDA is measured against.
 *
 *   S = Diag(e^g) S + b (S^T a)^T + k v^T        with S on the right the state before the token
 *   o = S^T (scale q)
 *
 * KDA is the special case  a = k e^g,  b = -beta k,  v' = beta v  (or k' = beta k):
 * with S' = Diag(e^g) S, S'^T k = S^T (e^g k), so that S' + k (beta (v - S'^T k))^T = S' - beta k (S^T a)^T + k (beta v)^T. */
#ifndef REFERENCE_DPLR_H
#define REFERENCE_DPLR_H

#include "reference/real.h"

typedef struct {
    int64_t T, H, K, V;            /* T >= 0 */
    real scale;                    /* of the queries; 0 means K^-0.5 */
    const real *q, *k, *a, *b, *g; /* [T,H,K]; g is the natural-log decay */
    const real *v;                 /* [T,H,V] */
    const real *h0;                /* [H,K,V], NULL = 0 */
} ref_dplr;

/* o [T,H,V], ht [H,K,V] (h0 when T = 0); either may be NULL; overwritten. Returns 0, or -1 when out of memory. */
int ref_dplr_forward(const ref_dplr *p, real *o, real *ht);

typedef struct {
    const real *d_o;               /* [T,H,V], NULL = 0 */
    const real *dht;               /* [H,K,V], NULL = 0 */
    real *dq, *dk, *da, *db, *dg;  /* [T,H,K]; these and the following may be NULL */
    real *dv;                      /* [T,H,V] */
    real *dh0;                     /* [H,K,V] */
} ref_dplr_grad;

/* Adds to the gradients in d. Keeps the state after every token of one head. Returns 0, or -1 when out of memory. */
int ref_dplr_backward(const ref_dplr *p, const ref_dplr_grad *d);

#endif
