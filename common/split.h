/* Float products on a bf16 matrix unit. A float is exactly the sum of three bf16 numbers: h, itself rounded, m, what that
 * leaves rounded, and l, the rest; so
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

#include "common/simd.h"

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

/* Memory that will be read soon: rows of several matrices, asked for a few lines at a time while the unit works, so that
 * the requests never stand in the way of its own. */
enum { KL_AHEAD_MATRICES = 4, KL_AHEAD_BYTES = 128 };
typedef struct kl_ahead {
    struct {
        const char *row;      /* the next one */
        size_t stride, bytes; /* from row to row; of one */
    } matrix[KL_AHEAD_MATRICES];
    int matrices, current;
    size_t at;    /* in the current matrix's row */
    int64_t rows; /* still to be asked for, of each matrix */
} kl_ahead;

static inline void kl_ahead_step(kl_ahead *ahead)
{
    if (!ahead || ahead->rows <= 0)
        return;
    const char *next = ahead->matrix[ahead->current].row + ahead->at;
    for (int i = 0; i < KL_AHEAD_BYTES; i += 64)
        __builtin_prefetch(next + i, 0, 2);
    ahead->at += KL_AHEAD_BYTES;
    if (ahead->at < ahead->matrix[ahead->current].bytes)
        return;
    ahead->at = 0;
    ahead->matrix[ahead->current].row += ahead->matrix[ahead->current].stride;
    ahead->current = ahead->current + 1 < ahead->matrices ? ahead->current + 1 : 0;
    ahead->rows -= ahead->current == 0;
}

/* How many of the products of parts above are made. With three, the parts being rounded, the error is about 2^-18 of
 * |A| |B|; for results that nothing else is computed from. */
typedef enum kl_split_terms { KL_SPLIT_THREE, KL_SPLIT_SIX } kl_split_terms;

/* An operand is packed in strips of 16 rows (of a left one) or columns (of a right one), strip_depth of the summed index
 * long: `depth` or more. Work on a part of a deeper operand begins kl_split_bytes(16, k) after its start, k a multiple of 32. */

/* The unit sums over pairs of neighbours. Which two are neighbours is free as long as both operands agree: here indices k
 * and k + 16 of each 32, so that neither needs more than a shift and a blend. One row of a tile, sixteen pairs (x0, x1), in
 * two or three parts, KL_SPLIT_TILE bytes apart; the tiles of 32 of the summed index are KL_SPLIT_BLOCK bytes. */
enum { KL_SPLIT_TILE = 1024, KL_SPLIT_BLOCK = 3 * KL_SPLIT_TILE };

/* Bits whose upper half is x rounded to bf16: half an ulp is added to the magnitude. A NaN of all ones becomes zero here
 * and stays a NaN in what is left. */
KL_INLINE kl_v kl_split_rounded(kl_v x) { return (kl_v)((kl_vu)x + 0x8000u); }
KL_INLINE kl_v kl_split_upper(kl_v x) { return (kl_v)((kl_vu)x & 0xffff0000u); }
KL_INLINE void kl_split_store(char *to, kl_v x0, kl_v x1) { *(kl_vu *)to = ((kl_vu)x1 & 0xffff0000u) | ((kl_vu)x0 >> 16); }
KL_INLINE void kl_split_pairs(int parts, kl_v x0, kl_v x1, char *to)
{
    kl_v h0 = kl_split_rounded(x0), h1 = kl_split_rounded(x1);
    kl_split_store(to, h0, h1);
    x0 -= kl_split_upper(h0);
    x1 -= kl_split_upper(h1);
    kl_v m0 = kl_split_rounded(x0), m1 = kl_split_rounded(x1);
    kl_split_store(to + KL_SPLIT_TILE, m0, m1);
    if (parts == 3)
        kl_split_store(to + 2 * KL_SPLIT_TILE, x0 - kl_split_upper(m0), x1 - kl_split_upper(m1));
}

/* The left operand: A, or -A, [M,depth], rows `ld` apart, depth a multiple of 16 (padded to 32 with zeros). Rows
 * beyond M up to a multiple of 16 must be readable and may be anything: they make rows of the product that nobody reads.
 * For KL_SPLIT_THREE the last part is left out. */
void kl_split_left(kl_split_terms terms, int64_t M, int64_t depth, bool negative, const float *A, int64_t ld, void *packed, int64_t strip_depth);
/* The right operand: B [depth,N], rows `ld` apart, N a multiple of 16; rows from depth up to a multiple of 32 count as 0.
 * row_scale, when given, then multiplies B in place: B <- Diag(row_scale) B. */
void kl_split_right(int64_t depth, int64_t N, float *B, int64_t ld, const float *row_scale, void *packed, int64_t strip_depth);
/* C = from + A B (from NULL: A B; from may be C): C [M padded to 16, N], rows `ld` apart. ahead: what to ask for meanwhile,
 * or NULL. */
void kl_split_product(kl_split_terms terms, const float *from, int64_t ld_from, int64_t M, int64_t N, int64_t depth, const void *left,
                      int64_t left_depth, const void *right, int64_t right_depth, float *C, int64_t ld, kl_ahead *ahead);

#ifdef __cplusplus
}
#endif
#endif
