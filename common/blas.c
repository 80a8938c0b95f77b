#include "common/blas.h"

#include <cblas.h>

#include "common/parallel.h"
#include "common/simd.h"

enum { TILE_M = 256, TILE_N = 128, TILE_K = 256 };

void kl_blas_single_threaded(void) { openblas_set_num_threads(1); }
const char *kl_blas_name(void) { return openblas_get_config(); }

void kl_gemm_serial(kl_op ta, kl_op tb, int64_t M, int64_t N, int64_t K, float alpha,
                    const float *A, int64_t lda, const float *B, int64_t ldb, float beta, float *C, int64_t ldc)
{
    if (M <= 0 || N <= 0)
        return;
    if (K <= 0 || alpha == 0.0f) {
        for (int64_t m = 0; m < M; m++)
            for (int64_t n = 0; n < N; n++)
                C[m * ldc + n] = beta == 0.0f ? 0.0f : beta * C[m * ldc + n];
        return;
    }
    cblas_sgemm(CblasRowMajor, ta == KL_T ? CblasTrans : CblasNoTrans, tb == KL_T ? CblasTrans : CblasNoTrans,
                (blasint)M, (blasint)N, (blasint)K, alpha, A, (blasint)lda, B, (blasint)ldb, beta, C, (blasint)ldc);
}

void kl_gemm(const kl_ctx *ctx, kl_op ta, kl_op tb, int64_t M, int64_t N, int64_t K, float alpha,
             const float *A, int64_t lda, const float *B, int64_t ldb, float beta, float *C, int64_t ldc)
{
    int64_t rows = kl_ceil_div(M, TILE_M), columns = kl_ceil_div(N, TILE_N);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(ctx->threads)
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j++) {
            int64_t m = i * TILE_M, n = j * TILE_N;
            int64_t mt = M - m < TILE_M ? M - m : TILE_M, nt = N - n < TILE_N ? N - n : TILE_N;
            kl_gemm_serial(ta, tb, mt, nt, K, alpha, ta == KL_T ? A + m : A + m * lda, lda,
                           tb == KL_T ? B + n * ldb : B + n, ldb, beta, C + m * ldc + n, ldc);
        }
    }
}

/* ---- few rows: dot products over a weight row in its stored type ---- */

/* y[m] = x[m] . w for m < rows, each with two running sums whose order depends on K alone. */
static inline __attribute__((always_inline)) void dots(int rows, int64_t K, const float *X, int64_t ldx, const void *w,
                                                       kl_dtype type, float beta, float *y, int64_t ldy)
{
    kl_v even[KL_FEW_ROWS] = {{0}}, odd[KL_FEW_ROWS] = {{0}};
    int64_t k = 0;
    for (; k + 2 * KL_LANES <= K; k += 2 * KL_LANES) {
        kl_v w0 = kl_vload_as(w, type, k, KL_LANES), w1 = kl_vload_as(w, type, k + KL_LANES, KL_LANES);
        for (int m = 0; m < rows; m++) {
            even[m] += kl_vload(X + m * ldx + k) * w0;
            odd[m] += kl_vload(X + m * ldx + k + KL_LANES) * w1;
        }
    }
    for (; k < K; k += KL_LANES) {
        int64_t n = K - k < KL_LANES ? K - k : KL_LANES;
        kl_v w0 = kl_vload_as(w, type, k, n);
        for (int m = 0; m < rows; m++)
            even[m] += (n == KL_LANES ? kl_vload(X + m * ldx + k) : kl_vload_n(X + m * ldx + k, n)) * w0;
    }
    for (int m = 0; m < rows; m++) {
        float sum = kl_vsum(even[m] + odd[m]);
        y[m * ldy] = beta == 0.0f ? sum : sum + beta * y[m * ldy];
    }
}

#define DOTS(rows, type)                                                                 \
    case rows: dots(rows, K, X, ldx, w, type, beta, y, ldy); break;
#define DOTS_ALL(type)                                                                   \
    switch (M) {                                                                         \
        DOTS(1, type) DOTS(2, type) DOTS(3, type) DOTS(4, type)                          \
        DOTS(5, type) DOTS(6, type) DOTS(7, type) DOTS(8, type)                          \
    }

static void few_rows(int64_t M, int64_t K, const float *X, int64_t ldx, const void *w, kl_dtype type, float beta,
                     float *y, int64_t ldy)
{
    if (type == KL_BF16)
        DOTS_ALL(KL_BF16)
    else if (type == KL_F32)
        DOTS_ALL(KL_F32)
    else
        DOTS_ALL(KL_F16)
}

/* A tile of the weight as float: in place when it is float already, else converted into scratch. */
static const float *weight_tile(float *scratch, const void *W, kl_dtype type, int64_t ldw, int64_t n, int64_t nt,
                                int64_t k, int64_t kt, int64_t *ld)
{
    if (type == KL_F32) {
        *ld = ldw;
        return (const float *)W + n * ldw + k;
    }
    for (int64_t r = 0; r < nt; r++)
        kl_to_f32(scratch + r * kt, (const char *)W + (size_t)((n + r) * ldw + k) * kl_dtype_size(type), type, (size_t)kt);
    *ld = kt;
    return scratch;
}

/* A tile of rows of W against M rows of X. */
static void linear_tile(int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx, const void *W, kl_dtype type, int64_t ldw,
                        float beta, float *Y, int64_t ldy)
{
    float scratch[TILE_N * TILE_K];
    int64_t step = type == KL_F32 ? K : TILE_K;
    if (K <= 0)
        kl_gemm_serial(KL_N, KL_T, M, N, 0, 1.0f, NULL, 0, NULL, 0, beta, Y, ldy);
    for (int64_t k = 0; k < K; k += step) {
        int64_t kt = K - k < step ? K - k : step, ld;
        const float *w = weight_tile(scratch, W, type, ldw, 0, N, k, kt, &ld);
        kl_gemm_serial(KL_N, KL_T, M, N, kt, 1.0f, X + k, ldx, w, ld, k ? 1.0f : beta, Y, ldy);
    }
}

/* A tile of columns of W against M rows of dY. */
static void linear_dx_tile(int64_t M, int64_t N, int64_t K, const float *dY, int64_t ldy, const void *W, kl_dtype type, int64_t ldw,
                           float beta, float *dX, int64_t ldx)
{
    float scratch[TILE_K * TILE_N];
    int64_t step = type == KL_F32 ? N : TILE_K;
    if (N <= 0)
        kl_gemm_serial(KL_N, KL_N, M, K, 0, 1.0f, NULL, 0, NULL, 0, beta, dX, ldx);
    for (int64_t n = 0; n < N; n += step) {
        int64_t nt = N - n < step ? N - n : step, ld;
        const float *w = weight_tile(scratch, W, type, ldw, n, nt, 0, K, &ld);
        kl_gemm_serial(KL_N, KL_N, M, K, nt, 1.0f, dY + n, ldy, w, ld, n ? 1.0f : beta, dX, ldx);
    }
}

static const void *at(const void *W, kl_dtype type, int64_t offset) { return (const char *)W + (size_t)offset * kl_dtype_size(type); }

void kl_linear_serial(int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx, const void *W, kl_dtype type, int64_t ldw,
                      float beta, float *Y, int64_t ldy)
{
    if (M <= 0 || N <= 0)
        return;
    if (M <= KL_FEW_ROWS) {
        for (int64_t n = 0; n < N; n++)
            few_rows(M, K, X, ldx, at(W, type, n * ldw), type, beta, Y + n, ldy);
        return;
    }
    int64_t tile = type == KL_F32 ? N : TILE_N;
    for (int64_t n = 0; n < N; n += tile)
        linear_tile(M, N - n < tile ? N - n : tile, K, X, ldx, at(W, type, n * ldw), type, ldw, beta, Y + n, ldy);
}

void kl_linear_dx_serial(int64_t M, int64_t N, int64_t K, const float *dY, int64_t ldy, const void *W, kl_dtype type, int64_t ldw,
                         float beta, float *dX, int64_t ldx)
{
    if (M <= 0 || K <= 0)
        return;
    int64_t tile = type == KL_F32 ? K : TILE_N;
    for (int64_t k = 0; k < K; k += tile)
        linear_dx_tile(M, N, K - k < tile ? K - k : tile, dY, ldy, at(W, type, k), type, ldw, beta, dX + k, ldx);
}

void kl_linear(const kl_ctx *ctx, int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx,
               const void *W, kl_dtype type, int64_t ldw, float beta, float *Y, int64_t ldy)
{
    if (M <= 0 || N <= 0)
        return;
    if (M <= KL_FEW_ROWS) {
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (N * K > 8192)
        for (int64_t n = 0; n < N; n++)
            few_rows(M, K, X, ldx, at(W, type, n * ldw), type, beta, Y + n, ldy);
        return;
    }
    int64_t rows = kl_ceil_div(M, TILE_M), columns = kl_ceil_div(N, TILE_N);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(ctx->threads)
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j++) {
            int64_t m = i * TILE_M, n = j * TILE_N;
            linear_tile(M - m < TILE_M ? M - m : TILE_M, N - n < TILE_N ? N - n : TILE_N, K, X + m * ldx, ldx, at(W, type, n * ldw), type,
                        ldw, beta, Y + m * ldy + n, ldy);
        }
    }
}

void kl_linear_dx(const kl_ctx *ctx, int64_t M, int64_t N, int64_t K, const float *dY, int64_t ldy,
                  const void *W, kl_dtype type, int64_t ldw, float beta, float *dX, int64_t ldx)
{
    if (M <= 0 || K <= 0)
        return;
    int64_t rows = kl_ceil_div(M, TILE_M), columns = kl_ceil_div(K, TILE_N);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(ctx->threads)
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j++) {
            int64_t m = i * TILE_M, k = j * TILE_N;
            linear_dx_tile(M - m < TILE_M ? M - m : TILE_M, N, K - k < TILE_N ? K - k : TILE_N, dY + m * ldy, ldy, at(W, type, k), type,
                           ldw, beta, dX + m * ldx + k, ldx);
        }
    }
}
