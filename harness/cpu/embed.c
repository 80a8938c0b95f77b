#include "common/parallel.h"
#include "harness/cpu/ops_cpu.h"

enum { FEW_ELEMENTS = 1 << 15 };

static kl_status check_ids(const char *op, const int32_t *ids, int64_t T, int64_t vocabulary)
{
    KL_REQUIRE(ids || T == 0, "%s: ids: expected %lld ids, got NULL", op, (long long)T);
    for (int64_t t = 0; t < T; t++)
        KL_REQUIRE(ids[t] >= 0 && ids[t] < vocabulary, "%s: ids[%lld]: expected 0 to %lld, got %d", op, (long long)t,
                   (long long)vocabulary - 1, (int)ids[t]);
    return kl_ok();
}

/* y[t] = w[id_t] */
kl_status cpu_embed(kl_ctx *ctx, const kl_param *w, const int32_t *ids, int64_t T, float *y)
{
    KL_TRY(check_tokens("embed", ctx, T));
    KL_TRY(check_weight("embed", w));
    KL_REQUIRE(y || T == 0, "embed: y: expected [%lld,%lld], got NULL", (long long)T, (long long)w->columns);
    KL_TRY(check_ids("embed", ids, T, w->rows));
    int64_t D = w->columns;
    size_t row_bytes = (size_t)D * kl_dtype_size(w->dtype);
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (T * D > FEW_ELEMENTS)
    for (int64_t t = 0; t < T; t++)
        kl_to_f32(y + t * D, (const char *)w->data + (size_t)ids[t] * row_bytes, w->dtype, (size_t)D);
    return kl_ok();
}

/* dw[id_t] += dy[t]: a row of dw belongs to one thread, which meets its tokens in order; so the sums do
 * not depend on how rows are dealt out. */
kl_status cpu_embed_backward(kl_ctx *ctx, kl_param *dw, const int32_t *ids, int64_t T, const float *dy)
{
    KL_TRY(check_tokens("embed_backward", ctx, T));
    KL_REQUIRE(dw, "embed_backward: dw: expected a gradient, got NULL");
    KL_TRY(check_gradient("embed_backward", dw, dw->rows, dw->columns));
    KL_REQUIRE(dy || T == 0, "embed_backward: dy: expected [%lld,%lld], got NULL", (long long)T, (long long)dw->columns);
    KL_TRY(check_ids("embed_backward", ids, T, dw->rows));
    int64_t D = dw->columns;
#pragma omp parallel num_threads(ctx->threads) if (T * D > FEW_ELEMENTS)
    {
        int32_t owners = omp_get_num_threads(), me = omp_get_thread_num();
        for (int64_t t = 0; t < T; t++) {
            if (ids[t] % owners != me)
                continue;
            float *row = (float *)dw->data + (int64_t)ids[t] * D;
#pragma omp simd
            for (int64_t d = 0; d < D; d++)
                row[d] += dy[t * D + d];
        }
    }
    return kl_ok();
}
