/* One step of an optimizer. Parameters are arrays [n] or matrices [R,C], updated in place with their moments. */
#ifndef REFERENCE_OPTIMIZER_H
#define REFERENCE_OPTIMIZER_H

#include "reference/real.h"

/* AdamW (Loshchilov and Hutter), bias-corrected:
 *     m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
 *     w = w - lr ( (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps) + decay w )          step counts from 1 */
void ref_adamw(int64_t n, real *w, const real *g, real *m, real *v, real lr, real beta1, real beta2, real eps, real decay, int64_t step);

/* X [R,C] <- U V^T, roughly, of X = U S V^T: Newton and Schulz's quintic iteration (Jordan's coefficients), from X / |X|,
 *     X <- a X + (b A + c A A) X,  A = X X^T
 * which drives every singular value into about 0.7 .. 1.2. Returns 0, or -1 when out of memory. */
int ref_orthogonalise(int64_t R, int64_t C, int64_t steps, real *X);

/* Muon with Nesterov's momentum, decoupled decay, and the scale that gives its update the size of AdamW's:
 *     m = momentum m + g;  w = w - lr ( 0.2 sqrt(max(R, C)) orthogonalised(g + momentum m) + decay w ) */
int ref_muon(int64_t R, int64_t C, real *w, const real *g, real *m, real lr, real momentum, real decay, int64_t steps);

#endif
