/* The product of few rows with a weight in its stored type: what decoding a token is made of. */
#ifndef KL_COMMON_FEW_ROWS_H
#define KL_COMMON_FEW_ROWS_H

#include "common/dtype.h"

/* kl_linear for 1 <= M <= KL_FEW_ROWS on one thread: the weight is read once, from memory to registers. The bits of
 * an element depend on its row of X and its row of W alone, not on M, N or where the row stands. */
void kl_few_rows(int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx, const void *W, kl_dtype type, int64_t ldw,
                 float beta, float *Y, int64_t ldy);

#endif
