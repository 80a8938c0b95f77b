#include "common/blas.h"
#include "harness/cpu/ops_cpu.h"

/* y = x w^T (+ y) */
kl_status cpu_linear(kl_ctx *ctx, const kl_param *w, int64_t T, const float *x, float *y, bool accumulate)
{
    KL_TRY(check_tokens("linear", ctx, T));
    KL_TRY(check_weight("linear", w));
    KL_REQUIRE(x || T * w->columns == 0, "linear: x: expected [%lld,%lld], got NULL", (long long)T, (long long)w->columns);
    KL_REQUIRE(y || T * w->rows == 0, "linear: y: expected [%lld,%lld], got NULL", (long long)T, (long long)w->rows);
    kl_linear(ctx, T, w->rows, w->columns, x, w->columns, w->data, w->dtype, w->columns, accumulate ? 1.0f : 0.0f, y, w->rows);
    return kl_ok();
}

/* y = x w^T:  dx = dy w,  dw += dy^T x */
kl_status cpu_linear_backward(kl_ctx *ctx, const kl_param *w, int64_t T, const float *x, const float *dy, float *dx, bool accumulate, kl_param *dw)
{
    KL_TRY(check_tokens("linear_backward", ctx, T));
    KL_TRY(check_weight("linear_backward", w));
    int64_t N = w->rows, K = w->columns;
    KL_REQUIRE(dy || T * N == 0, "linear_backward: dy: expected [%lld,%lld], got NULL", (long long)T, (long long)N);
    if (dw) {
        KL_TRY(check_gradient("linear_backward", dw, N, K));
        KL_REQUIRE(x || T * K == 0, "linear_backward: x: expected [%lld,%lld] when dw is wanted, got NULL", (long long)T, (long long)K);
    }
    if (dx)
        kl_linear_dx(ctx, T, N, K, dy, N, w->data, w->dtype, K, accumulate ? 1.0f : 0.0f, dx, K);
    if (dw)
        kl_gemm(ctx, KL_T, KL_N, N, K, T, 1.0f, dy, N, x, K, 1.0f, dw->data, K);
    return kl_ok();
}
