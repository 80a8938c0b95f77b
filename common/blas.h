/* Matrix products on the CPU, row-major. OpenBLAS computes tiles; the tiling is ours and fixed, so the
 * bits do not depend on the number of threads. */
#ifndef KL_COMMON_BLAS_H
#define KL_COMMON_BLAS_H

#include <stdint.h>

#include "common/context.h"
#include "common/dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kl_op { KL_N = 0, KL_T } kl_op;

/* C[M,N] = alpha op(A)[M,K] op(B)[K,N] + beta C, all float. lda, ldb, ldc: floats from row to row of the
 * stored matrix. beta = 0 overwrites C (NaN in it does not survive). Any of M, N, K may be 0. */
void kl_gemm(const kl_ctx *ctx, kl_op ta, kl_op tb, int64_t M, int64_t N, int64_t K, float alpha,
             const float *A, int64_t lda, const float *B, int64_t ldb, float beta, float *C, int64_t ldc);

/* The same on one thread, for callers that are already parallel. */
void kl_gemm_serial(kl_op ta, kl_op tb, int64_t M, int64_t N, int64_t K, float alpha,
                    const float *A, int64_t lda, const float *B, int64_t ldb, float beta, float *C, int64_t ldc);

/* Y[M,N] = X[M,K] W[N,K]^T + beta Y with the weight read in its own type (F32, BF16, F16) and never
 * copied whole. Up to KL_FEW_ROWS rows stream the weight once through dot products; the bits of an element
 * then depend on its row of X and its row of W alone. More rows go through OpenBLAS tile by tile. */
enum { KL_FEW_ROWS = 8 };
void kl_linear(const kl_ctx *ctx, int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx,
               const void *W, kl_dtype wtype, int64_t ldw, float beta, float *Y, int64_t ldy);

/* dX[M,K] = dY[M,N] W[N,K] + beta dX: the input gradient of kl_linear, weight in its own type. */
void kl_linear_dx(const kl_ctx *ctx, int64_t M, int64_t N, int64_t K, const float *dY, int64_t ldy,
                  const void *W, kl_dtype wtype, int64_t ldw, float beta, float *dX, int64_t ldx);

/* The same two on one thread, for callers that are already parallel. */
void kl_linear_serial(int64_t M, int64_t N, int64_t K, const float *X, int64_t ldx,
                      const void *W, kl_dtype wtype, int64_t ldw, float beta, float *Y, int64_t ldy);
void kl_linear_dx_serial(int64_t M, int64_t N, int64_t K, const float *dY, int64_t ldy,
                         const void *W, kl_dtype wtype, int64_t ldw, float beta, float *dX, int64_t ldx);

/* OpenBLAS shall use one thread a call: the parallelism is ours. Process-wide in OpenBLAS. */
void kl_blas_single_threaded(void);
const char *kl_blas_name(void);

#ifdef __cplusplus
}
#endif
#endif
