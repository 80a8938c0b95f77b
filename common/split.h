/* Float products on a bf16 matrix unit. A float is exactly the sum of three bf16 numbers, its leading, middle and last
 * eight significant bits, h + m + l; so
 *
 *     A B = Ah Bh + Ah Bm + Am Bh + Am Bm + Ah Bl + Al Bh + (terms below 2^-23 of |A| |B|)
 *
 * with every product accumulated in float: the accuracy of a float product at several times its speed. Operands are
 * packed once, as tiles of 16 rows by 32 of the summed index with their three parts side by side, and used often.
 * The order of every sum is fixed, so an element depends on its row of A and its column of B alone. */
#ifndef KL_COMMON_SPLIT_H
#define KL_COMMON_SPLIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Whether this build and this processor have such a unit and the system lets this process use it (asked of it here). */
bool kl_split_available(void);
/* Around its use in each thread. */
void kl_split_begin(void);
void kl_split_end(void);

/* Bytes of a packed operand of `rows` rows (or columns) and `depth` of the summed index. */
static inline size_t kl_split_bytes(int64_t rows, int64_t depth)
{
    return (size_t)((rows + 15) / 16) * (size_t)((depth + 31) / 32) * 3 * 1024;
}

/* The left operand: sign times A [M,depth], rows `ld` apart, depth a multiple of 16 (padded to 32 with zeros). Rows
 * beyond M up to a multiple of 16 must be readable and may be anything: they make rows of the product that nobody reads. */
void kl_split_left(int64_t M, int64_t depth, float sign, const float *A, int64_t ld, void *packed);
/* The right operand: B [depth,N], rows `ld` apart, N a multiple of 16; rows from depth up to a multiple of 32 count as 0.
 * row_scale, when given, then multiplies B in place: B <- Diag(row_scale) B. */
void kl_split_right(int64_t depth, int64_t N, float *B, int64_t ld, const float *row_scale, void *packed);
/* C = A B, or C += A B: C [M padded to 16, N], rows `ld` apart. */
void kl_split_product(bool add, int64_t M, int64_t N, int64_t depth, const void *left, const void *right, float *C, int64_t ld);

#ifdef __cplusplus
}
#endif
#endif
