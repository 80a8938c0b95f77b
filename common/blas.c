#include "common/blas.h"

#include <cblas.h>

#include "common/few_rows.h"
#include "common/parallel.h"

/* Sides of an OpenBLAS tile, at most and at least; columns of a weight converted at a time. */
enum { TILE_MAX = 512, TILE_MIN = 96, STEP_K = 256, TILES = 8 };
/* Few rows: multiply-adds below which a second thread costs more than it brings; rows of W a thread takes at a time. */
enum { FEW_ELEMENTS = 1 << 19, FEW_BLOCK = 48, SOME_ROWS = 32 };

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

/* Large tiles run near OpenBLAS's own speed; a few of them are needed for all threads to have one. Depends on the
 * problem alone, never on the number of threads. */
typedef struct tiling {
    int64_t m, n, rows, columns; /* sides, and how many of them */
} tiling;

static tiling tiles_of(int64_t M, int64_t N)
{
    tiling t = {TILE_MAX, TILE_MAX, kl_ceil_div(M, TILE_MAX), kl_ceil_div(N, TILE_MAX)};
    while (t.rows * t.columns < TILES && (M / t.rows > 2 * TILE_MIN || N / t.columns > 2 * TILE_MIN)) {
        if (M / t.rows > N / t.columns)
            t.rows *= 2;
        else
            t.columns *= 2;
    }
    t.m = (kl_ceil_div(M, t.rows) + 15) & ~(int64_t)15;
    t.n = (kl_ceil_div(N, t.columns) + 15) & ~(int64_t)15;
    t.rows = kl_ceil_div(M, t.m);
    t.columns = kl_ceil_div(N, t.n);
    return t;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Threads for that many multiply-adds: waking a second one costs ten microseconds or more. */
static int threads_for(const kl_ctx *ctx, tiling t, int64_t multiplications) { return t.rows * t.columns == 1 || multiplications < 1 << 20 ? 1 : ctx->threads; }

void kl_gemm(const kl_ctx *ctx, kl_op ta, kl_op tb, int64_t M, int64_t N, int64_t K, float alpha,
             const float *A, int64_t lda, const float *B, int64_t ldb, float beta, float *C, int64_t ldc)
{
    if (M <= 0 || N <= 0)
        return;
    tiling t = tiles_of(M, N);
    int threads = threads_for(ctx, t, M * N * K);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < t.rows; i++) {
        for (int64_t j = 0; j < t.columns; j++) {
            int64_t m = i * t.m, n = j * t.n;
            kl_gemm_serial(ta, tb, least(t.m, M - m), least(t.n, N - n), K, alpha, ta == KL_T ? A + m : A + m * lda, lda,
                           tb == KL_T ? B + n * ldb : B + n, ldb, beta, C + m * ldc + n, ldc);
        }
    }
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
    float scratch[TILE_MAX * STEP_K];
    int64_t step = type == KL_F32 ? K : STEP_K;
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
    float scratch[TILE_MAX * STEP_K];
    int64_t step = type == KL_F32 ? N : STEP_K;
    if (N <= 0)
        kl_gemm_serial(KL_N, KL_N, M, K, 0, 1.0f, NULL, 0, NULL, 0, beta, dX, ldx);
    for (int64_t n = 0; n < N; n += step) {
        int64_t nt = N - n < step ? N - n : step, ld;
        const float *w = weight_tile(scratch, W, type, ldw, n, nt, 0, K, &ld);
        kl_gemm_serial(KL_N, KL_N, M, K, nt, 1.0f, dY + n, ldy, w, ld, n ? 1.0f : beta, dX, ldx);
    }
}

static const void *at(const void *W, kl_dtype type, int64_t offset) { return (const char *)W + (size_t)offset * kl_dtype_size(type); }

/* OpenBLAS copies the weight before it multiplies, which pays only for many rows. */
static bool streams(int64_t M, int64_t K) { return M <= KL_FEW_ROWS || (M <= SOME_ROWS && K >= 64); }

void kl_linear_serial(int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx, const void *W, kl_dtype type, int64_t ldw,
                      float beta, float *Y, int64_t ldy)
{
    if (M <= 0 || N <= 0)
        return;
    if (streams(M, K)) {
        kl_few_rows(M, N, K, X, ldx, W, type, ldw, beta, Y, ldy);
        return;
    }
    int64_t tile = type == KL_F32 ? N : TILE_MAX;
    for (int64_t n = 0; n < N; n += tile)
        linear_tile(M, N - n < tile ? N - n : tile, K, X, ldx, at(W, type, n * ldw), type, ldw, beta, Y + n, ldy);
}

void kl_linear_dx_serial(int64_t M, int64_t N, int64_t K, const float *dY, int64_t ldy, const void *W, kl_dtype type, int64_t ldw,
                         float beta, float *dX, int64_t ldx)
{
    if (M <= 0 || K <= 0)
        return;
    int64_t tile = type == KL_F32 ? K : TILE_MAX;
    for (int64_t k = 0; k < K; k += tile)
        linear_dx_tile(M, N, K - k < tile ? K - k : tile, dY, ldy, at(W, type, k), type, ldw, beta, dX + k, ldx);
}

void kl_linear(const kl_ctx *ctx, int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx,
               const void *W, kl_dtype type, int64_t ldw, float beta, float *Y, int64_t ldy)
{
    if (M <= 0 || N <= 0)
        return;
    if (streams(M, K)) {
        if (ctx->threads == 1 || M * N * K < FEW_ELEMENTS) {
            kl_few_rows(M, N, K, X, ldx, W, type, ldw, beta, Y, ldy);
            return;
        }
#pragma omp parallel for schedule(static) num_threads(ctx->threads)
        for (int64_t n = 0; n < N; n += FEW_BLOCK)
            kl_few_rows(M, N - n < FEW_BLOCK ? N - n : FEW_BLOCK, K, X, ldx, at(W, type, n * ldw), type, ldw, beta, Y + n, ldy);
        return;
    }
    tiling t = tiles_of(M, N);
    int threads = threads_for(ctx, t, M * N * K);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < t.rows; i++) {
        for (int64_t j = 0; j < t.columns; j++) {
            int64_t m = i * t.m, n = j * t.n;
            linear_tile(least(t.m, M - m), least(t.n, N - n), K, X + m * ldx, ldx, at(W, type, n * ldw), type, ldw, beta, Y + m * ldy + n, ldy);
        }
    }
}

void kl_linear_dx(const kl_ctx *ctx, int64_t M, int64_t N, int64_t K, const float *dY, int64_t ldy,
                  const void *W, kl_dtype type, int64_t ldw, float beta, float *dX, int64_t ldx)
{
    if (M <= 0 || K <= 0)
        return;
    tiling t = tiles_of(M, K);
    int threads = threads_for(ctx, t, M * N * K);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < t.rows; i++) {
        for (int64_t j = 0; j < t.columns; j++) {
            int64_t m = i * t.m, k = j * t.n;
            linear_dx_tile(least(t.m, M - m), N, least(t.n, K - k), dY + m * ldy, ldy, at(W, type, k), type, ldw, beta, dX + m * ldx + k, ldx);
        }
    }
}
