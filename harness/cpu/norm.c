#include <math.h>

#include "common/parallel.h"
#include "common/simd.h"
#include "harness/cpu/ops_cpu.h"

enum { ROWS = 512, COLUMNS = 4 * KL_LANES, FEW_ELEMENTS = 1 << 14 };

static inline int64_t lanes_left(int64_t D, int64_t d) { return D - d < KL_LANES ? D - d : KL_LANES; }
static inline kl_v load(const float *p, int64_t n) { return n == KL_LANES ? kl_vload(p) : kl_vload_n(p, n); }
static inline void store(float *p, kl_v x, int64_t n)
{
    if (n == KL_LANES)
        kl_vstore(p, x);
    else
        kl_vstore_n(p, x, n);
}

/* r = (mean x^2 + eps)^-1/2 */
static float inverse_rms(int64_t D, float eps, const float *x)
{
    kl_v even = {0}, odd = {0};
    int64_t d = 0;
    for (; d + 2 * KL_LANES <= D; d += 2 * KL_LANES) {
        kl_v a = kl_vload(x + d), b = kl_vload(x + d + KL_LANES);
        even += a * a;
        odd += b * b;
    }
    for (; d < D; d += KL_LANES) {
        kl_v a = load(x + d, lanes_left(D, d));
        even += a * a;
    }
    return 1.0f / sqrtf(kl_vsum(even + odd) / (float)D + eps);
}

static kl_status check_norm(const char *op, const kl_ctx *ctx, const kl_param *w, float eps, int64_t T, int64_t D, const float *x, int64_t x_stride)
{
    KL_TRY(check_tokens(op, ctx, T));
    KL_TRY(check_weight(op, w));
    KL_REQUIRE(D >= 1, "%s: D: expected at least 1, got %lld", op, (long long)D);
    KL_REQUIRE(w->rows * w->columns == D, "%s: w: expected [%lld], got [%lld,%lld]", op, (long long)D, (long long)w->rows, (long long)w->columns);
    KL_REQUIRE(x || T == 0, "%s: x: expected [%lld,%lld], got NULL", op, (long long)T, (long long)D);
    KL_REQUIRE(x_stride >= D, "%s: x_stride: expected at least D = %lld, got %lld", op, (long long)D, (long long)x_stride);
    KL_REQUIRE(eps >= 0.0f, "%s: eps: expected at least 0, got %g", op, (double)eps);
    return kl_ok();
}

/* y = x r (.) w */
kl_status cpu_rmsnorm(kl_ctx *ctx, const kl_param *w, float eps, int64_t T, int64_t D, const float *x, int64_t x_stride, float *y, int64_t y_stride)
{
    KL_TRY(check_norm("rmsnorm", ctx, w, eps, T, D, x, x_stride));
    KL_REQUIRE(y || T == 0, "rmsnorm: y: expected [%lld,%lld], got NULL", (long long)T, (long long)D);
    KL_REQUIRE(y_stride >= D, "rmsnorm: y_stride: expected at least D = %lld, got %lld", (long long)D, (long long)y_stride);
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (T * D > FEW_ELEMENTS)
    for (int64_t t = 0; t < T; t++) {
        const float *xt = x + t * x_stride;
        kl_v r = kl_vset(inverse_rms(D, eps, xt));
        for (int64_t d = 0; d < D; d += KL_LANES) {
            int64_t n = lanes_left(D, d);
            store(y + t * y_stride + d, load(xt + d, n) * r * kl_vload_as(w->data, w->dtype, d, n), n);
        }
    }
    return kl_ok();
}

/* y = x r (.) w:  dw += sum_t dy x r, over rows in order; each column has one owner */
static void add_dw(int64_t rows, int64_t D, int64_t d0, const float *x, int64_t x_stride, const float *dy, int64_t dy_stride, const float *r, float *dw)
{
    for (int64_t d = d0; d < D && d < d0 + COLUMNS; d += KL_LANES) {
        int64_t n = lanes_left(D, d);
        kl_v sum = load(dw + d, n);
        for (int64_t t = 0; t < rows; t++)
            sum += load(dy + t * dy_stride + d, n) * load(x + t * x_stride + d, n) * r[t];
        store(dw + d, sum, n);
    }
}

/* y = x r (.) w,  r = (sum x^2 / D + eps)^-1/2:  dx = dy (.) w r - x r^3 (sum dy w x) / D */
static void row_dx(const kl_param *w, int64_t D, const float *x, const float *dy, float r, float *dx, bool accumulate)
{
    kl_v sum = {0};
    for (int64_t d = 0; d < D; d += KL_LANES) {
        int64_t n = lanes_left(D, d);
        sum += load(dy + d, n) * kl_vload_as(w->data, w->dtype, d, n) * load(x + d, n);
    }
    float s = kl_vsum(sum) * r * r * r / (float)D;
    for (int64_t d = 0; d < D; d += KL_LANES) {
        int64_t n = lanes_left(D, d);
        kl_v g = load(dy + d, n) * kl_vload_as(w->data, w->dtype, d, n) * r - load(x + d, n) * s;
        store(dx + d, accumulate ? load(dx + d, n) + g : g, n);
    }
}

kl_status cpu_rmsnorm_backward(kl_ctx *ctx, const kl_param *w, float eps, int64_t T, int64_t D, const float *x, int64_t x_stride,
                               const float *dy, int64_t dy_stride, float *dx, int64_t dx_stride, bool accumulate, kl_param *dw)
{
    KL_TRY(check_norm("rmsnorm_backward", ctx, w, eps, T, D, x, x_stride));
    KL_REQUIRE(dy || T == 0, "rmsnorm_backward: dy: expected [%lld,%lld], got NULL", (long long)T, (long long)D);
    KL_REQUIRE(dy_stride >= D, "rmsnorm_backward: dy_stride: expected at least D = %lld, got %lld", (long long)D, (long long)dy_stride);
    if (dx)
        KL_REQUIRE(dx_stride >= D, "rmsnorm_backward: dx_stride: expected at least D = %lld, got %lld", (long long)D, (long long)dx_stride);
    if (dw)
        KL_TRY(check_gradient("rmsnorm_backward", dw, w->rows, w->columns));
    float r[ROWS];
#pragma omp parallel num_threads(ctx->threads) if (T * D > FEW_ELEMENTS)
    for (int64_t t0 = 0; t0 < T; t0 += ROWS) {
        int64_t rows = T - t0 < ROWS ? T - t0 : ROWS;
        const float *xb = x + t0 * x_stride, *dyb = dy + t0 * dy_stride;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; t++)
            r[t] = inverse_rms(D, eps, xb + t * x_stride);
        if (dw) {
#pragma omp for schedule(static)
            for (int64_t d = 0; d < D; d += COLUMNS)
                add_dw(rows, D, d, xb, x_stride, dyb, dy_stride, r, dw->data);
        }
        if (dx) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < rows; t++)
                row_dx(w, D, xb + t * x_stride, dyb + t * dy_stride, r[t], dx + (t0 + t) * dx_stride, accumulate);
        }
    }
    return kl_ok();
}
