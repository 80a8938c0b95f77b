#include "common/tile.h"

#include "common/simd.h"

/* The register block: rows x cols vectors of C, with room left for a row of B and a broadcast. */
enum { ROWS = 16, COLS = 4 };
KL_INLINE int block_rows(int cols) { return cols == 4 ? 6 : cols == 3 ? 8 : cols == 2 ? 12 : 16; }

/* One block of C, rows x cols vectors, both known when this is inlined. */
KL_INLINE void block(kl_tile_mode mode, int rows, int cols, int64_t K, const float *A, int64_t a_row, int64_t a_col,
                  const float *B, int64_t ldb, const float *row_scale, float *C, int64_t ldc)
{
    kl_v sum[ROWS][COLS];
KL_UNROLL
    for (int m = 0; m < rows; m++) {
KL_UNROLL
        for (int n = 0; n < cols; n++) {
            if (mode == KL_TILE_SET)
                sum[m][n] = (kl_v){0};
            else
                sum[m][n] = row_scale ? kl_vload(C + m * ldc + n * KL_LANES) * row_scale[m] : kl_vload(C + m * ldc + n * KL_LANES);
        }
    }
    for (int64_t k = 0; k < K; k++) {
        kl_v b[COLS];
KL_UNROLL
        for (int n = 0; n < cols; n++)
            b[n] = kl_vload(B + k * ldb + n * KL_LANES);
KL_UNROLL
        for (int m = 0; m < rows; m++) {
            kl_v a = kl_vset(A[m * a_row + k * a_col]);
KL_UNROLL
            for (int n = 0; n < cols; n++)
                sum[m][n] = mode == KL_TILE_SUB ? sum[m][n] - a * b[n] : sum[m][n] + a * b[n];
        }
    }
KL_UNROLL
    for (int m = 0; m < rows; m++)
KL_UNROLL
        for (int n = 0; n < cols; n++)
            kl_vstore(C + m * ldc + n * KL_LANES, sum[m][n]);
}

/* All rows of one strip of columns. */
KL_INLINE void strip(kl_tile_mode mode, int cols, int64_t M, int64_t K, const float *A, int64_t a_row, int64_t a_col,
                  const float *B, int64_t ldb, const float *row_scale, float *C, int64_t ldc)
{
    int rows = block_rows(cols);
    for (; M >= rows; M -= rows) {
        block(mode, rows, cols, K, A, a_row, a_col, B, ldb, row_scale, C, ldc);
        A += rows * a_row;
        C += rows * ldc;
        row_scale = row_scale ? row_scale + rows : 0;
    }
    for (rows = 8; rows >= 1; rows /= 2) {
        if (M < rows)
            continue;
        switch (rows) {
        case 8: block(mode, 8, cols, K, A, a_row, a_col, B, ldb, row_scale, C, ldc); break;
        case 4: block(mode, 4, cols, K, A, a_row, a_col, B, ldb, row_scale, C, ldc); break;
        case 2: block(mode, 2, cols, K, A, a_row, a_col, B, ldb, row_scale, C, ldc); break;
        case 1: block(mode, 1, cols, K, A, a_row, a_col, B, ldb, row_scale, C, ldc); break;
        }
        M -= rows;
        A += rows * a_row;
        C += rows * ldc;
        row_scale = row_scale ? row_scale + rows : 0;
    }
}

KL_INLINE void product(kl_tile_mode mode, int64_t M, int64_t N, int64_t K, const float *A, int64_t a_row, int64_t a_col,
                    const float *B, int64_t ldb, const float *row_scale, float *C, int64_t ldc)
{
    int64_t n = 0;
    for (; n + COLS * KL_LANES <= N; n += COLS * KL_LANES)
        strip(mode, COLS, M, K, A, a_row, a_col, B + n, ldb, row_scale, C + n, ldc);
    switch ((N - n) / KL_LANES) {
    case 3: strip(mode, 3, M, K, A, a_row, a_col, B + n, ldb, row_scale, C + n, ldc); break;
    case 2: strip(mode, 2, M, K, A, a_row, a_col, B + n, ldb, row_scale, C + n, ldc); break;
    case 1: strip(mode, 1, M, K, A, a_row, a_col, B + n, ldb, row_scale, C + n, ldc); break;
    }
}

void kl_tile_gemm(kl_tile_mode mode, int64_t M, int64_t N, int64_t K, const float *A, int64_t a_row, int64_t a_col,
                  const float *B, int64_t ldb, const float *row_scale, float *C, int64_t ldc)
{
    switch (mode) {
    case KL_TILE_SET: product(KL_TILE_SET, M, N, K, A, a_row, a_col, B, ldb, row_scale, C, ldc); break;
    case KL_TILE_ADD: product(KL_TILE_ADD, M, N, K, A, a_row, a_col, B, ldb, row_scale, C, ldc); break;
    case KL_TILE_SUB: product(KL_TILE_SUB, M, N, K, A, a_row, a_col, B, ldb, row_scale, C, ldc); break;
    }
}

/* Rows a and b exchange the lanes that a transpose at this distance moves: a keeps the lanes whose distance bit is 0. */
#define EXCHANGE(name, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15) \
    KL_INLINE void name(kl_v *a, kl_v *b) \
    { \
        kl_v low = __builtin_shufflevector(*a, *b, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15); \
        kl_v high = __builtin_shufflevector(*a, *b, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15); \
        *a = low; \
        *b = high; \
    }
EXCHANGE(exchange_1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
EXCHANGE(exchange_2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
EXCHANGE(exchange_4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
EXCHANGE(exchange_8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)

static void transpose_16(const float *from, int64_t ld_from, float *to, int64_t ld_to)
{
    kl_v x[16];
KL_UNROLL
    for (int i = 0; i < 16; i++)
        x[i] = kl_vload(from + i * ld_from);
KL_UNROLL
    for (int i = 0; i < 8; i++)
        exchange_8(&x[i], &x[i + 8]);
KL_UNROLL
    for (int i = 0; i < 16; i++)
        if (!(i & 4))
            exchange_4(&x[i], &x[i + 4]);
KL_UNROLL
    for (int i = 0; i < 16; i++)
        if (!(i & 2))
            exchange_2(&x[i], &x[i + 2]);
KL_UNROLL
    for (int i = 0; i < 16; i++)
        if (!(i & 1))
            exchange_1(&x[i], &x[i + 1]);
KL_UNROLL
    for (int i = 0; i < 16; i++)
        kl_vstore(to + i * ld_to, x[i]);
}

void kl_tile_transpose(int64_t rows, int64_t cols, const float *from, int64_t ld_from, float *to, int64_t ld_to)
{
    for (int64_t r = 0; r < rows; r += KL_LANES)
        for (int64_t c = 0; c < cols; c += KL_LANES)
            transpose_16(from + r * ld_from + c, ld_from, to + c * ld_to + r, ld_to);
}
