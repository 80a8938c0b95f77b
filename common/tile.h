/* Products of small matrices that lie in a core's own caches: chunk operands, states, intra-chunk matrices.
 * Every element of C is one chain of multiply-adds over k = 0, 1, ... whatever the sizes around it, so its bits
 * depend on its row of A, its column of B and nothing else: not on M, N or where the tile edges fall. */
#ifndef KL_COMMON_TILE_H
#define KL_COMMON_TILE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kl_tile_mode {
    KL_TILE_SET, /* C = A B */
    KL_TILE_ADD, /* C = Diag(row_scale) C + A B */
    KL_TILE_SUB, /* C = Diag(row_scale) C - A B */
} kl_tile_mode;

/* A [M,K]: element (m,k) at A[m a_row + k a_col], so a transpose is a swap of strides. B [K,N] and C [M,N]:
 * rows contiguous, ldb and ldc floats apart; N a multiple of 16 (pad B's columns). row_scale [M], NULL: 1. */
void kl_tile_gemm(kl_tile_mode mode, int64_t M, int64_t N, int64_t K, const float *A, int64_t a_row, int64_t a_col,
                  const float *B, int64_t ldb, const float *row_scale, float *C, int64_t ldc);

/* to[c,r] = from[r,c]; rows and cols multiples of 16. */
void kl_tile_transpose(int64_t rows, int64_t cols, const float *from, int64_t ld_from, float *to, int64_t ld_to);

static inline int64_t kl_tile_pad(int64_t n) { return (n + 15) & ~(int64_t)15; }

#ifdef __cplusplus
}
#endif
#endif
