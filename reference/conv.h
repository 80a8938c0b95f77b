/* Depthwise causal short convolution with an optional SiLU, on one sequence.
 *
 *   z[t,c] = sum_j w[c,j] x[t-(W-1)+j, c],   y = silu(z) or z
 *
 * Tap W-1 meets the current token. Inputs before the first token come from the tail that the previous call handed out. */
#ifndef REFERENCE_CONV_H
#define REFERENCE_CONV_H

#include "reference/real.h"

typedef struct {
    int64_t T, C, W;      /* tokens (0 allowed), channels, width >= 1 */
    int silu;             /* 1: y = silu(z), 0: y = z */
    const real *x;        /* [T,C] */
    const real *w;        /* [C,W] */
    const real *tail;     /* [C,W-1], the W-1 inputs before x, oldest first; NULL = zeros */
} ref_conv;

/* y [T,C]; tail_out [C,W-1], the last W-1 inputs of tail and x together, NULL if not wanted. Both are overwritten.
 * tail_out may be p->tail itself. */
void ref_conv_forward(const ref_conv *p, real *y, real *tail_out);

/* dy [T,C], dtail_out [C,W-1] (either may be NULL) -> dx [T,C], dw [C,W], dtail [C,W-1] */
void ref_conv_backward(const ref_conv *p, const real *dy, const real *dtail_out, real *dx, real *dw, real *dtail);

#endif
