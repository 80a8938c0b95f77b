/* What happens between the tokens of one chunk. With P(j->i) the product of the decays of tokens j+1..i:
 *
 *     A[i,j] = sum_c x[i,c] P(j->i)[c] y[j,c]      for j < i (and j = i where said)
 *
 * P is never a quotient and never an exponential of a difference, only a product of decays, so every gate is exact: the
 * one thing that can happen is underflow to zero. Below the diagonal 16x16 blocks it is split at an anchor between row
 * and column. Anchors sit where tokens are halved: at level h (16, 32, 64) the tokens [s, s+h) meet [s+h, s+2h) through
 * anchor s+h-1, for s = 0, 2h, 4h, ... Positions count from the chunk's start, so no later token moves an anchor. */
#ifndef KL_KDA_CPU_INTRA_H
#define KL_KDA_CPU_INTRA_H

#include <stdbool.h>
#include <stdint.h>

enum { KDA_BLOCK = 16, KDA_MAX_CHUNK = 128 };

/* Matrices [n,width] of one chunk, rows ld apart: n tokens, width channels (K padded to 16, padding zero). Walks go down
 * the columns, so ld is an odd number of cache lines: kda_leading(width). */
typedef struct kda_tokens {
    int64_t n, width, ld;
    const float *decay; /* e^g; padding 1 */
} kda_tokens;

static inline int64_t kda_leading(int64_t width) { return width | 16; }

/* y[i] = x[i] P(-1->i): what the row reads of the state before the chunk. For two matrices at a time; x1 NULL: one. */
void kda_from_start(kda_tokens t, const float *x0, const float *x1, float *y0, float *y1);
/* y[j] P(j->n-1): what the row leaves in the state after the chunk; whole [width] = P(-1->n-1). */
void kda_to_end(kda_tokens t, const float *x, float *y, float *whole);

/* P between each token and its anchor at level h: P(s+h-1->i) for the second half, P(j->s+h-1) for the first. First
 * halves without a second half are left alone. */
void kda_anchor_factors(kda_tokens t, int64_t h, float *factor);

/* For each of two row matrices x0, x1 (x1 NULL: none) A[i,j] of all j < i below the diagonal blocks of 16 (rows of A
 * lda apart). factor [n,ld], left, right0, right1 [n,ld] and across [width,64] are scratch. */
typedef struct kda_level_scratch {
    float *factor, *left, *right0, *right1, *across;
} kda_level_scratch;
void kda_off_diagonal(kda_tokens t, const float *x0, const float *x1, const float *y, float *A0, float *A1, int64_t lda,
                      const kda_level_scratch *scratch);
/* The same on the diagonal blocks, for j <= i: each column walks down its block with a running product. The element right of
 * each second diagonal one becomes 0. */
void kda_diagonal(kda_tokens t, const float *x0, const float *x1, const float *y, float *A0, float *A1, int64_t lda);
/* Forward substitution, U in place, columns a multiple of 16: with R the right-hand side,
 *     r_i = R_i - sum_{j<i} A[i,j] u_j;   u_i = beta_i r_i        (beta NULL: 1)
 * residual [n,ld], when wanted, receives r. */
void kda_solve_lower(int64_t n, int64_t columns, const float *A, int64_t lda, const float *beta, float *U, float *residual, int64_t ld);
/* Back substitution with the transpose: z_j = Z_j - sum_{i>j} A[i,j] y_i;  y_j = beta_j z_j. Y in place; residual receives z. */
void kda_solve_upper(int64_t n, int64_t columns, const float *A, int64_t lda, const float *beta, float *Y, float *residual, int64_t ld);
/* O_i += sum_{j<=i} A[i,j] U_j (j < i when strict) */
void kda_apply_lower(int64_t n, int64_t columns, bool strict, const float *A, int64_t lda, const float *U, float *O, int64_t ld);
/* O_j += sum_{i>=j} A[i,j] U_i */
void kda_apply_upper(int64_t n, int64_t columns, const float *A, int64_t lda, const float *U, float *O, int64_t ld);

#endif
