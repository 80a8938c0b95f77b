/* Backward of the intra-chunk matrices A[i,j] = sum_c x[i,c] P(j->i)[c] k[j,c] for x = q (j <= i) and x = k (j < i).
 * The gradient of the log-decay of token t gathers every pair with j < t <= i. At each level those are sums that only
 * grow: over the rows i >= t of the second half, over the columns j < t of the first. Nothing is subtracted, and the
 * pairs i = j, which no decay touches, never enter. */
#ifndef KL_KDA_CPU_INTRA_BWD_H
#define KL_KDA_CPU_INTRA_BWD_H

#include "kda/cpu/intra.h"

typedef struct kda_intra_grads {
    const float *q, *k;                 /* [n,ld] */
    const float *dAqk, *dAkk;           /* [n,lda]; dAkk NULL: no k rows */
    int64_t lda;
    float *dq, *dk, *da;                /* [n,ld]: added to; da of the log-decay */
    float *product, *row_term;          /* [C,ld] scratch */
} kda_intra_grads;

void kda_off_diagonal_backward(kda_tokens t, const kda_intra_grads *g, const kda_level_scratch *scratch);
void kda_diagonal_backward(kda_tokens t, const kda_intra_grads *g);

/* da_t += sum_{i>=t} term_i and da_t += sum_{j<t} term_j over n rows of `width`, ld apart. */
void kda_add_sums_from_row(int64_t n, int64_t width, int64_t ld, const float *term, float *da);
void kda_add_sums_before_row(int64_t n, int64_t width, int64_t ld, const float *term, float *da);

#endif
