#include <math.h>

#include "common/parallel.h"
#include "harness/cpu/ops_cpu.h"

enum { BLOCK = 1 << 14, PARTIAL_SUMS = 64, SUM_LANES = 8 };

/* Loshchilov and Hutter's AdamW, bias-corrected:
 *     m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
 *     w <- w - lr ( (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps) + decay w ) */
kl_status cpu_adamw(kl_ctx *ctx, size_t n, float *w, const float *g, float *m, float *v, double lr, double beta1, double beta2,
                    double eps, double decay, double clip_scale, int64_t step)
{
    KL_TRY(check_tokens("adamw", ctx, 0));
    KL_REQUIRE(step >= 1, "adamw: step: expected at least 1, got %lld", (long long)step);
    KL_REQUIRE(beta1 >= 0.0 && beta1 < 1.0, "adamw: beta1: expected at least 0 and below 1, got %g", beta1);
    KL_REQUIRE(beta2 >= 0.0 && beta2 < 1.0, "adamw: beta2: expected at least 0 and below 1, got %g", beta2);
    KL_REQUIRE(eps > 0.0, "adamw: eps: expected above 0, got %g", eps);
    if (n == 0)
        return kl_ok();
    KL_REQUIRE(w && g && m && v, "adamw: %s: expected %zu floats, got NULL", !w ? "w" : !g ? "g" : !m ? "m" : "v", n);
    float b1 = (float)beta1, c1 = (float)(1.0 - beta1), b2 = (float)beta2, c2 = (float)(1.0 - beta2);
    float rate = (float)(lr / (1.0 - pow(beta1, (double)step)));
    float v_scale = (float)(1.0 / (1.0 - pow(beta2, (double)step)));
    float keep = (float)(1.0 - lr * decay), clip = (float)clip_scale, tiny = (float)eps;
    size_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (blocks > 1)
    for (size_t b = 0; b < blocks; b++) {
        size_t end = (b + 1) * BLOCK < n ? (b + 1) * BLOCK : n;
#pragma omp simd
        for (size_t i = b * BLOCK; i < end; i++) {
            float gi = clip * g[i];
            m[i] = b1 * m[i] + c1 * gi;
            v[i] = b2 * v[i] + c2 * gi * gi;
            w[i] = keep * w[i] - rate * m[i] / (sqrtf(v_scale * v[i]) + tiny);
        }
    }
    return kl_ok();
}

/* Sum of x^2 over [from, to) in double, eight interleaved sums. */
static double squares(const float *x, size_t from, size_t to)
{
    double lane[SUM_LANES] = {0};
    size_t i = from;
    for (; i + SUM_LANES <= to; i += SUM_LANES)
        for (int j = 0; j < SUM_LANES; j++)
            lane[j] += (double)x[i + (size_t)j] * (double)x[i + (size_t)j];
    for (; i < to; i++)
        lane[0] += (double)x[i] * (double)x[i];
    double sum = 0.0;
    for (int j = 0; j < SUM_LANES; j++)
        sum += lane[j];
    return sum;
}

kl_status cpu_sumsq(kl_ctx *ctx, size_t n, const float *x, double *out)
{
    KL_TRY(check_tokens("sumsq", ctx, 0));
    KL_REQUIRE(out, "sumsq: out: expected a place for the sum, got NULL");
    KL_REQUIRE(x || n == 0, "sumsq: x: expected %zu floats, got NULL", n);
    double partial[PARTIAL_SUMS];
    size_t share = (n + PARTIAL_SUMS - 1) / PARTIAL_SUMS;
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (n > BLOCK)
    for (size_t s = 0; s < PARTIAL_SUMS; s++) {
        size_t from = s * share < n ? s * share : n, to = (s + 1) * share < n ? (s + 1) * share : n;
        partial[s] = squares(x, from, to);
    }
    *out = 0.0;
    for (int s = 0; s < PARTIAL_SUMS; s++)
        *out += partial[s];
    return kl_ok();
}
