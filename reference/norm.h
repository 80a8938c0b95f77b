/* Normalisation of rows: RMS, gated RMS, L2. Rows N are whatever precedes the last dimension (tokens, or tokens times heads). */
#ifndef REFERENCE_NORM_H
#define REFERENCE_NORM_H

#include "reference/real.h"

typedef enum { REF_OUTPUT_GATE_SIGMOID, REF_OUTPUT_GATE_SWISH, REF_OUTPUT_GATE_NONE } ref_output_gate;

/* y = x (mean x^2 + eps)^-1/2 * w.   x, y [N,D]; w [D], NULL = 1 */
void ref_rmsnorm_forward(int64_t N, int64_t D, real eps, const real *x, const real *w, real *y);
void ref_rmsnorm_backward(int64_t N, int64_t D, real eps, const real *x, const real *w, const real *dy, real *dx, real *dw);

/* y = rmsnorm(x) * w * act(z), act one of sigmoid(z), silu(z), 1 (z is not read).   x, z, y [N,D] (N = tokens times heads); w [D] */
void ref_gated_rmsnorm_forward(int64_t N, int64_t D, real eps, ref_output_gate gate, const real *x, const real *w, const real *z, real *y);
int ref_gated_rmsnorm_backward(int64_t N, int64_t D, real eps, ref_output_gate gate, const real *x, const real *w, const real *z,
                               const real *dy, real *dx, real *dw, real *dz);

/* y = x (sum x^2 + eps)^-1/2.   x, y [N,D] */
#define REF_L2NORM_EPS 1e-6
void ref_l2norm_forward(int64_t N, int64_t D, real eps, const real *x, real *y);
void ref_l2norm_backward(int64_t N, int64_t D, real eps, const real *x, const real *dy, real *dx);

#endif
