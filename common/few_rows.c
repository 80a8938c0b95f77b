#include "common/few_rows.h"

#include <stdbool.h>
#include <string.h>

#include "common/simd.h"

/* Rows of X that a block takes at most: as many as its sums find registers for. */
#ifdef KL_AVX512
enum { ROWS_X = 8 };
#else
enum { ROWS_X = 2 };
#endif
enum { BLOCK_W = 96, PIECE = 128, FETCH_M = 4 };

/* The last n < 16 elements of a row, the other lanes 0. */
#ifdef KL_AVX512
KL_INLINE kl_v tail(const void *row, kl_dtype type, int64_t k, int64_t n) { return kl_vload_as(row, type, k, n); }
#else
static __attribute__((noinline)) void tail_lanes(float lanes[KL_LANES], const void *row, kl_dtype type, int64_t k, int64_t n)
{
    memset(lanes, 0, KL_LANES * sizeof(float));
    kl_to_f32(lanes, (const char *)row + (size_t)k * kl_dtype_size(type), type, (size_t)n);
}
KL_INLINE kl_v tail(const void *row, kl_dtype type, int64_t k, int64_t n)
{
    float lanes[KL_LANES];
    tail_lanes(lanes, row, type, k, n);
    return kl_vload(lanes);
}
#endif

/* The R rows after these, columns k .. k + PIECE - 1, into the cache: the hardware reads ahead only within a page. */
KL_INLINE void fetch_next(const int R, const kl_dtype type, const char *W, size_t row_bytes, int64_t k)
{
    for (int r = R; r < 2 * R; r++)
        for (size_t byte = 0; byte < PIECE * kl_dtype_size(type); byte += 64)
            __builtin_prefetch(W + (size_t)r * row_bytes + (size_t)k * kl_dtype_size(type) + byte);
}

/* Y[m,r] = X[m] . W[r] for m < M, r < R, each one running sum of sixteen lanes. M and R are constants where this is
 * inlined, so that the M R sums live in registers, and every load serves R or M of them. */
KL_INLINE void block(const int M, const int R, const kl_dtype type, int64_t K, const float *X, int64_t ldx, const char *W, size_t row_bytes,
                  float beta, float *Y, int64_t ldy)
{
    kl_v sum[M * R];
#pragma GCC unroll 24
    for (int i = 0; i < M * R; i++)
        sum[i] = (kl_v){0};
    int64_t whole = K - K % KL_LANES, left = K - whole;
    const bool fetch = M <= FETCH_M; /* with more rows there is arithmetic enough to wait behind */
    int64_t step = fetch ? PIECE : whole + 1;
    for (int64_t piece = 0; piece < whole; piece += step) {
        if (fetch)
            fetch_next(R, type, W, row_bytes, piece);
        int64_t end = whole - piece < step ? whole : piece + step;
        for (int64_t k = piece; k < end; k += KL_LANES) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                kl_v w = kl_vload_as(W + (size_t)r * row_bytes, type, k, KL_LANES);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++)
                    sum[m * R + r] += kl_vload(X + m * ldx + k) * w;
            }
        }
    }
    if (left) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            kl_v w = tail(W + (size_t)r * row_bytes, type, whole, left);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
                sum[m * R + r] += tail(X + m * ldx, KL_F32, whole, left) * w;
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            float y = kl_vsum(sum[m * R + r]);
            Y[m * ldy + r] = beta == 0.0f ? y : y + beta * Y[m * ldy + r];
        }
}

/* All N rows of W, R at a time. */
KL_INLINE void rows(const int M, const int R, const kl_dtype type, int64_t N, int64_t K, const float *X, int64_t ldx, const char *W,
                 size_t row_bytes, float beta, float *Y, int64_t ldy)
{
    int64_t n = 0;
    for (; n + R <= N; n += R)
        block(M, R, type, K, X, ldx, W + (size_t)n * row_bytes, row_bytes, beta, Y + n, ldy);
    for (; n < N; n++)
        block(M, 1, type, K, X, ldx, W + (size_t)n * row_bytes, row_bytes, beta, Y + n, ldy);
}

/* R so that sums and one operand fit the registers. */
KL_INLINE void up_to_rows_x(const kl_dtype type, int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx, const char *W, size_t row_bytes,
                         float beta, float *Y, int64_t ldy)
{
#define CASE(M, R) case M: rows(M, R, type, N, K, X, ldx, W, row_bytes, beta, Y, ldy); break;
    switch (M) {
#ifdef KL_AVX512
        CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 5) CASE(5, 4) CASE(6, 4) CASE(7, 3) CASE(8, 3)
#else
        CASE(1, 4) CASE(2, 2)
#endif
    }
#undef CASE
}

/* A block of W comes from memory for the first rows of X and from the cache for the others. */
KL_INLINE void of_type(const kl_dtype type, int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx, const char *W, size_t row_bytes,
                    float beta, float *Y, int64_t ldy)
{
    int64_t step = M <= ROWS_X ? N : BLOCK_W;
    for (int64_t n = 0; n < N; n += step)
        for (int64_t m = 0; m < M; m += ROWS_X)
            up_to_rows_x(type, M - m < ROWS_X ? M - m : ROWS_X, N - n < step ? N - n : step, K, X + m * ldx, ldx, W + (size_t)n * row_bytes,
                        row_bytes, beta, Y + m * ldy + n, ldy);
}

static void few_f32(int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx, const void *W, size_t row_bytes, float beta, float *Y, int64_t ldy)
{
    of_type(KL_F32, M, N, K, X, ldx, W, row_bytes, beta, Y, ldy);
}
static void few_bf16(int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx, const void *W, size_t row_bytes, float beta, float *Y, int64_t ldy)
{
    of_type(KL_BF16, M, N, K, X, ldx, W, row_bytes, beta, Y, ldy);
}
static void few_f16(int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx, const void *W, size_t row_bytes, float beta, float *Y, int64_t ldy)
{
    of_type(KL_F16, M, N, K, X, ldx, W, row_bytes, beta, Y, ldy);
}

void kl_few_rows(int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx, const void *W, kl_dtype type, int64_t ldw,
                 float beta, float *Y, int64_t ldy)
{
    (type == KL_F32 ? few_f32 : type == KL_BF16 ? few_bf16 : few_f16)(M, N, K, X, ldx, W, (size_t)ldw * kl_dtype_size(type), beta, Y, ldy);
}
