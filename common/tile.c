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

static void transpose_16(const float *from, int64_t ld_from, float *to, int64_t ld_to)
{
    kl_v x[16];
KL_UNROLL
    for (int i = 0; i < 16; i++)
        x[i] = kl_vload(from + i * ld_from);
    kl_vtranspose(x);
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
