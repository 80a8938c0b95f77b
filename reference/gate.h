/* The forget gate: from what the layer projects to the natural-log decay of every channel.
 *
 *   log        a = g
 *   softplus   a = -exp(A_log) softplus(g + dt_bias)
 *   bounded    a = lower_bound sigmoid(exp(A_log) (g + dt_bias))
 *
 * A head has G gate values and K channels; gate j decays the K/G channels c with c / (K/G) = j.
 * G = K is one gate a channel (KDA), G = 1 one a head (Gated DeltaNet), G = 0 none (DeltaNet: a = 0, g is not read). */
#ifndef REFERENCE_GATE_H
#define REFERENCE_GATE_H

#include "reference/real.h"

typedef enum { REF_GATE_LOG, REF_GATE_SOFTPLUS, REF_GATE_BOUNDED } ref_gate_kind;

typedef struct {
    int64_t T, HV, K, G;  /* K a multiple of G */
    ref_gate_kind kind;
    real lower_bound;     /* bounded gate only, in [-5, 0) */
    const real *g;        /* [T,HV,G] */
    const real *A_log;    /* [HV]; not read by the log gate */
    const real *dt_bias;  /* [HV*G], NULL = 0; not read by the log gate */
} ref_gate;

/* a [T,HV,K], overwritten */
void ref_gate_forward(const ref_gate *p, real *a);

/* da [T,HV,K] -> dg [T,HV,G], dA_log [HV], ddt_bias [HV*G] */
void ref_gate_backward(const ref_gate *p, const real *da, real *dg, real *dA_log, real *ddt_bias);

#endif
