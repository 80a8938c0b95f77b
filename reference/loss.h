/* The two ends of the model: token embedding and cross-entropy. */
#ifndef REFERENCE_LOSS_H
#define REFERENCE_LOSS_H

#include "reference/real.h"

/* x[n] = table[ids[n]].   ids [N] in 0 .. vocab-1, table [vocab,D], x [N,D] overwritten */
void ref_embedding_forward(int64_t N, int64_t D, const int64_t *ids, const real *table, real *x);

/* dx [N,D] -> dtable [vocab,D] */
void ref_embedding_backward(int64_t N, int64_t D, const int64_t *ids, const real *dx, real *dtable);

/* The mean over the rows n with targets[n] >= 0 of -log softmax(logits[n])[targets[n]]; 0 when there is no such row.
 * logits [N,vocab], targets [N], -1 = ignored. */
real ref_cross_entropy_forward(int64_t N, int64_t vocab, const real *logits, const int64_t *targets);

/* dloss, a scalar -> dlogits [N,vocab] */
void ref_cross_entropy_backward(int64_t N, int64_t vocab, const real *logits, const int64_t *targets, real dloss, real *dlogits);

#endif
