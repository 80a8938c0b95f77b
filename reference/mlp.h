/* The gated feed-forward block of one token: y = w2 ( silu(w1 x) * w3 x ). An expert, the shared expert and the dense layer are all this.
 * The released names are w1 = gate_proj, w3 = up_proj, w2 = down_proj. */
#ifndef REFERENCE_MLP_H
#define REFERENCE_MLP_H

#include "reference/real.h"

typedef struct {
    int64_t D, I;           /* hidden size, width of the block */
    const real *w1, *w3;    /* [I,D] */
    const real *w2;         /* [D,I] */
} ref_mlp;

typedef struct {
    real *dw1, *dw3;        /* [I,D], may be NULL */
    real *dw2;              /* [D,I], may be NULL */
} ref_mlp_grad;

/* x [D] -> y [D], overwritten. Returns 0, or -1 when out of memory. */
int ref_mlp_forward(const ref_mlp *p, const real *x, real *y);

/* dy [D] -> dx [D] (may be NULL) and the weights' gradients. Returns 0, or -1 when out of memory. */
int ref_mlp_backward(const ref_mlp *p, const real *x, const real *dy, real *dx, const ref_mlp_grad *d);

#endif
