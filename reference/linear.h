/* y = x W^T. */
#ifndef REFERENCE_LINEAR_H
#define REFERENCE_LINEAR_H

#include "reference/real.h"

/* x [N,I], W [O,I] -> y [N,O], overwritten */
void ref_linear_forward(int64_t N, int64_t I, int64_t O, const real *x, const real *W, real *y);

/* dy [N,O] -> dx [N,I], dW [O,I] */
void ref_linear_backward(int64_t N, int64_t I, int64_t O, const real *x, const real *W, const real *dy, real *dx, real *dW);

#endif
