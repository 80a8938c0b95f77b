/* Everything between the tensors of a call and what the recurrence reads, one token of one head at a time, and its
 * backward. Rows of K channels are written padded to a multiple of 16: q, k with 0, decays with 1. */
#ifndef KL_KDA_CPU_GATES_H
#define KL_KDA_CPU_GATES_H

#include "kda/internal.h"

/* y = factor x, or factor x / sqrt(sum x^2 + 1e-6) when l2norm. */
void kda_unit_row(bool l2norm, int64_t K, float factor, const float *x, float *y);
/* From dy, the gradient of y, to dx: overwritten, or added to. */
void kda_unit_row_backward(bool l2norm, int64_t K, float factor, const float *x, const float *dy, float *dx, bool accumulate);

/* decay[c] = e^(gate of channel c) of value head hv; g [G] is one token's row. */
void kda_decay_row(const kda_problem *p, int64_t hv, const float *g, float *decay);
/* da [K padded]: the gradient of the natural-log decay of each channel; used as scratch. dg [G] is overwritten;
 * *dA and dbias [G] are added to. Any of the three may be NULL. */
void kda_decay_row_backward(const kda_problem *p, int64_t hv, const float *g, float *da, float *dg, float *dA, float *dbias);

float kda_beta_value(kda_beta kind, float x);
float kda_beta_derivative(kda_beta kind, float x);

#endif
