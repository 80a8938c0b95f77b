/* Rotary embedding of the shared key dimensions and of their query part, for the ablation. */
#include "mla/cpu/internal.h"

kl_status mla_cpu_rope(kl_ctx *ctx, const mla_rotation *r)
{
    int64_t half = r->Dr / 2;
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (r->rows * r->Dr > 4096)
    for (int64_t row = 0; row < r->rows; row++) {
        for (int64_t i = 0; i < half; i++) {
            /* (a, b) <- (a cos - b sin, b cos + a sin), angle = position theta^(-2i/Dr) */
            double angle = (double)r->position[row] * pow((double)r->theta, -2.0 * (double)i / (double)r->Dr);
            float c = (float)cos(angle), s = (float)(r->inverse ? -sin(angle) : sin(angle));
            for (int64_t h = 0; h < r->heads; h++) {
                float *a = (float *)r->x + row * r->row_stride + h * r->head_stride + i, a0 = a[0], b0 = a[half];
                a[0] = a0 * c - b0 * s;
                a[half] = b0 * c + a0 * s;
            }
        }
    }
    return kl_ok();
}
