/* Rotation on either device: what both check first. */
#include "mla/internal.h"

static kl_status rope(kl_ctx *ctx, const mla_rotation *r)
{
    KL_REQUIRE(ctx, "ctx: expected a context, got NULL");
    KL_REQUIRE(r->rows >= 0, "rows: expected at least 0, got %lld", (long long)r->rows);
    KL_REQUIRE(r->heads >= 0, "heads: expected at least 0, got %lld", (long long)r->heads);
    KL_REQUIRE(r->Dr >= 0 && r->Dr % 2 == 0, "Dr: expected an even number, got %lld", (long long)r->Dr);
    if (r->rows == 0 || r->heads == 0 || r->Dr == 0)
        return kl_ok();
    KL_REQUIRE(r->heads == 1 || r->head_stride >= r->Dr, "head_stride: expected at least %lld, got %lld", (long long)r->Dr, (long long)r->head_stride);
    KL_REQUIRE(r->rows == 1 || r->row_stride >= r->Dr, "row_stride: expected at least %lld, got %lld", (long long)r->Dr, (long long)r->row_stride);
    KL_REQUIRE(r->x, "x: expected rows x heads x Dr numbers, got NULL");
    KL_REQUIRE(r->position, "position: expected %lld numbers, got NULL", (long long)r->rows);
    KL_REQUIRE(isfinite(r->theta) && r->theta > 0.0f, "theta: expected a positive number, got %g", (double)r->theta);
#ifdef KL_HAVE_CUDA
    if (ctx->device == KL_CUDA)
        return mla_cuda_rope(ctx, r);
#endif
    KL_REQUIRE(r->dtype == KL_F32, "dtype: expected float32 on the cpu, got %s", kl_dtype_name(r->dtype));
    return mla_cpu_rope(ctx, r);
}

kl_status mla_rope(kl_ctx *ctx, float *x, int64_t rows, int64_t heads, int64_t Dr, int64_t row_stride, int64_t head_stride,
                   const int64_t *position, float theta, bool inverse)
{
    return rope(ctx, &(mla_rotation){x, KL_F32, rows, heads, Dr, row_stride, head_stride, position, theta, inverse});
}

kl_status mla_rope_bf16(kl_ctx *ctx, uint16_t *x, int64_t rows, int64_t heads, int64_t Dr, int64_t row_stride, int64_t head_stride,
                        const int64_t *position, float theta, bool inverse)
{
    return rope(ctx, &(mla_rotation){x, KL_BF16, rows, heads, Dr, row_stride, head_stride, position, theta, inverse});
}
