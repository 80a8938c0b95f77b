/* The whole model on B rows of T tokens, forward and backward: embedding, L layers, final norm, head, cross-entropy.
 *
 *   x_0 = embed[ids];   m = x_l + mixer_l(norm(x_l)),   x_{l+1} = m + feed_forward_l(norm(m));   logits = lm_head norm(x_L) */
#ifndef REFERENCE_MODEL_H
#define REFERENCE_MODEL_H

#include "reference/weights.h"

typedef struct {
    int64_t B, T;             /* rows do not see one another */
    const int64_t *ids;       /* [B,T] in 0 .. vocab-1 */
    const int64_t *targets;   /* [B,T], -1 = ignored; NULL = the next token of the row, and none for the last */
} ref_batch;

typedef struct {
    real *logits;             /* [B,T,vocab]; may be NULL */
    real *hidden;             /* [L+1,B,T,D]: x_0 .. x_{L-1} and last norm(x_L); may be NULL */
    real loss;                /* mean cross-entropy over the targets that are not ignored */
} ref_outputs;

/* Everything in out is overwritten. Returns 0, or -1 when out of memory. */
int ref_model_forward(const ref_config *c, const ref_weights *w, const ref_batch *batch, ref_outputs *out);

/* Adds d loss / d parameter to dw, which has the shape of w; loss may be NULL. Returns 0, or -1 when out of memory. */
int ref_model_backward(const ref_config *c, const ref_weights *w, const ref_batch *batch, real *loss, const ref_weights *dw);

#endif
