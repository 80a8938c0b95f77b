/* The two token mixers of the model, each on B rows of T tokens that do not see one another.
 * Forward overwrites out; backward computes the forward pass anew and adds to dx and to the layer's gradients in dw.
 * x, out, dout, dx [B,T,D]. All return 0, or -1 when out of memory. */
#ifndef REFERENCE_MIXER_H
#define REFERENCE_MIXER_H

#include "reference/weights.h"

int ref_kda_layer_forward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, real *out);
int ref_kda_layer_backward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, const real *dout, real *dx,
                           const ref_layer *dw);

int ref_mla_layer_forward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, real *out);
int ref_mla_layer_backward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, const real *dout, real *dx,
                           const ref_layer *dw);

#endif
