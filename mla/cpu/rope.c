/* Rotary embedding of the shared key dimensions and of their query part, for the ablation. */
#include "mla/cpu/internal.h"

kl_status mla_rope(kl_ctx *ctx, float *x, int64_t rows, int64_t heads, int64_t Dr, int64_t row_stride, int64_t head_stride,
                   const int64_t *position, float theta, bool inverse)
{
    KL_REQUIRE(ctx, "ctx: expected a context, got NULL");
    KL_REQUIRE(ctx->device == KL_CPU, "device: expected a context on the cpu, got one on %s", kl_device_name(ctx->device));
    KL_REQUIRE(rows >= 0, "rows: expected at least 0, got %lld", (long long)rows);
    KL_REQUIRE(heads >= 0, "heads: expected at least 0, got %lld", (long long)heads);
    KL_REQUIRE(Dr >= 0 && Dr % 2 == 0, "Dr: expected an even number, got %lld", (long long)Dr);
    if (rows == 0 || heads == 0 || Dr == 0)
        return kl_ok();
    KL_REQUIRE(heads == 1 || head_stride >= Dr, "head_stride: expected at least %lld, got %lld", (long long)Dr, (long long)head_stride);
    KL_REQUIRE(rows == 1 || row_stride >= Dr, "row_stride: expected at least %lld, got %lld", (long long)Dr, (long long)row_stride);
    KL_REQUIRE(x, "x: expected rows x heads x Dr floats, got NULL");
    KL_REQUIRE(position, "position: expected %lld numbers, got NULL", (long long)rows);
    KL_REQUIRE(isfinite(theta) && theta > 0.0f, "theta: expected a positive number, got %g", (double)theta);
    int64_t half = Dr / 2;
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (rows * Dr > 4096)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t i = 0; i < half; i++) {
            /* (a, b) <- (a cos - b sin, b cos + a sin), angle = position theta^(-2i/Dr) */
            double angle = (double)position[row] * pow((double)theta, -2.0 * (double)i / (double)Dr);
            float c = (float)cos(angle), s = (float)(inverse ? -sin(angle) : sin(angle));
            for (int64_t h = 0; h < heads; h++) {
                float *a = x + row * row_stride + h * head_stride + i, a0 = a[0], b0 = a[half];
                a[0] = a0 * c - b0 * s;
                a[half] = b0 * c + a0 * s;
            }
        }
    }
    return kl_ok();
}
