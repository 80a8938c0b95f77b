#include "common/parallel.h"
#include "harness/cpu/ops_cpu.h"

/* cache[row_index[t]] = rows[t], rounded to the cache's type */
kl_status cpu_store_latent(kl_ctx *ctx, const float *rows, int64_t T, int64_t width, const int64_t *row_index, void *cache, kl_dtype type)
{
    KL_TRY(check_tokens("store_latent", ctx, T));
    KL_REQUIRE(type == KL_F32 || type == KL_BF16, "store_latent: type: expected float32 or bfloat16, got %s", kl_dtype_name(type));
    KL_REQUIRE(width >= 0, "store_latent: width: expected at least 0, got %lld", (long long)width);
    if (T == 0 || width == 0)
        return kl_ok();
    KL_REQUIRE(rows, "store_latent: rows: expected [%lld,%lld], got NULL", (long long)T, (long long)width);
    KL_REQUIRE(row_index, "store_latent: row_index: expected %lld rows, got NULL", (long long)T);
    KL_REQUIRE(cache, "store_latent: cache: expected memory, got NULL");
    for (int64_t t = 0; t < T; t++)
        KL_REQUIRE(row_index[t] >= 0, "store_latent: row_index[%lld]: expected at least 0, got %lld", (long long)t, (long long)row_index[t]);
    size_t row_bytes = (size_t)width * kl_dtype_size(type);
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (T * width > 1 << 15)
    for (int64_t t = 0; t < T; t++)
        kl_from_f32((char *)cache + (size_t)row_index[t] * row_bytes, type, rows + t * width, (size_t)width);
    return kl_ok();
}
