/* The general recurrence: what a problem may be, its variant table, what it costs. */
#include "kda/internal.h"

kl_status dplr_validate(const kl_ctx *ctx, const dplr_problem *p)
{
    KL_REQUIRE(p, "dplr: problem: expected a pointer, got NULL");
    KL_REQUIRE(p->dtype == KL_F32 || p->dtype == KL_BF16, "dplr: dtype: expected float32 or bfloat16, got %s", kl_dtype_name(p->dtype));
    KL_REQUIRE(p->H >= 1 && p->H <= INT32_MAX, "dplr: H: expected 1 or more heads, got %lld", (long long)p->H);
    KL_REQUIRE(p->K >= 1 && p->K <= KDA_MAX_DIM, "dplr: K: expected 1..%d, got %lld", KDA_MAX_DIM, (long long)p->K);
    KL_REQUIRE(p->V >= 1 && p->V <= KDA_MAX_DIM, "dplr: V: expected 1..%d, got %lld", KDA_MAX_DIM, (long long)p->V);
    KL_TRY(kda_validate_sequences("dplr", p->B, p->T, p->N, p->cu_seqlens));
    int64_t tokens, bytes;
    bool too_big = __builtin_mul_overflow(p->B, p->T, &tokens) || __builtin_mul_overflow(tokens, p->H * KDA_MAX_DIM * 4, &bytes) ||
                   __builtin_mul_overflow(p->N, p->H * p->K * p->V * 4, &bytes);
    KL_REQUIRE(!too_big, "dplr: B T: expected tensors of less than 2^63 bytes, got B = %lld, T = %lld", (long long)p->B, (long long)p->T);
    KL_REQUIRE(isfinite(p->scale), "dplr: scale: expected a finite number, got %g", (double)p->scale);
    KL_REQUIRE(p->chunk == 0 || p->chunk == 16 || p->chunk == 32 || p->chunk == 64, "dplr: chunk: expected 0, 16, 32 or 64, got %lld",
               (long long)p->chunk);
    if (!ctx || tokens == 0)
        return kl_ok();
    KL_REQUIRE(p->q, "dplr: q: expected [B,T,H,K], got NULL");
    KL_REQUIRE(p->k, "dplr: k: expected [B,T,H,K], got NULL");
    KL_REQUIRE(p->a, "dplr: a: expected [B,T,H,K], got NULL");
    KL_REQUIRE(p->b, "dplr: b: expected [B,T,H,K], got NULL");
    KL_REQUIRE(p->v, "dplr: v: expected [B,T,H,V], got NULL");
    KL_REQUIRE(p->g, "dplr: g: expected [B,T,H,K], got NULL");
    KL_REQUIRE(p->o, "dplr: o: expected [B,T,H,V], got NULL");
    return kl_ok();
}

static kl_status check_chunk(const void *problem, kl_pass pass)
{
    const dplr_problem *p = problem;
    if (pass != KL_FORWARD)
        return kl_error(KL_EUNSUPPORTED, "dplr: pass: variant chunk on cpu offers forward only");
    if (p->dtype != KL_F32)
        return kl_error(KL_EUNSUPPORTED, "dplr: dtype: variant chunk on cpu offers float32, got %s", kl_dtype_name(p->dtype));
    return kl_ok();
}

static kl_status run_chunk(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(dplr_validate(ctx, problem));
    KL_TRY(check_chunk(problem, KL_FORWARD));
    return dplr_cpu_chunk_forward(ctx, problem, workspace, bytes);
}

/* Four products with the state, four matrices of which half is needed, four triangular products. */
static kl_cost cost_chunk(const void *problem, kl_pass pass)
{
    (void)pass;
    const dplr_problem *p = problem;
    double tokens = (double)p->B * (double)p->T * (double)p->H, C = (double)(p->chunk ? p->chunk : 64), K = (double)p->K, V = (double)p->V;
    double states = (double)p->N * p->H * K * V * ((p->h0 != NULL) + (p->ht != NULL)), size = (double)kl_dtype_size(p->dtype);
    return (kl_cost){.flops = tokens * (8.0 * K * V + 4.0 * C * K + 4.0 * C * V), .bytes = size * tokens * (5.0 * K + 2.0 * V) + 4.0 * states};
}

#ifdef KL_HAVE_CUDA
static kl_status check_cuda(const void *problem, kl_pass pass)
{
    const dplr_problem *p = problem;
    if (pass != KL_FORWARD)
        return kl_error(KL_EUNSUPPORTED, "dplr: pass: variant chunk on cuda offers forward only");
    if (p->dtype != KL_BF16)
        return kl_error(KL_EUNSUPPORTED, "dplr: dtype: variant chunk on cuda offers bfloat16, got %s", kl_dtype_name(p->dtype));
    if (p->chunk != 0 && p->chunk != 32)
        return kl_error(KL_EUNSUPPORTED, "dplr: chunk: variant chunk on cuda offers 0 and 32, got %lld", (long long)p->chunk);
    return kl_ok();
}

static kl_status run_cuda(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(dplr_validate(ctx, problem));
    KL_TRY(check_cuda(problem, KL_FORWARD));
    return dplr_cuda_chunk_forward(ctx, problem, workspace, bytes);
}
#endif

static const kl_variant variants[] = {
    {"dplr", "chunk", KL_CPU, "the general recurrence by chunks, the baseline of KDA", check_chunk, dplr_cpu_chunk_workspace, run_chunk,
     NULL, cost_chunk},
#ifdef KL_HAVE_CUDA
    {"dplr", "chunk", KL_CUDA, "tiles of 32 tokens prepared, then walked with the state in registers", check_cuda, dplr_cuda_chunk_workspace,
     run_cuda, NULL, cost_chunk},
#endif
};

const kl_variant *dplr_variants(int *count)
{
    *count = (int)(sizeof variants / sizeof *variants);
    return variants;
}

static const kl_variant *pick(kl_device device)
{
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        if (variants[i].device == device)
            return &variants[i];
    return NULL;
}

size_t dplr_workspace(const kl_ctx *ctx, const dplr_problem *p)
{
    const kl_variant *v = ctx ? pick(ctx->device) : NULL;
    return !v || kl_failed(dplr_validate(NULL, p)) ? 0 : v->workspace(ctx, p, KL_FORWARD);
}

kl_status dplr_forward(kl_ctx *ctx, const dplr_problem *p, void *workspace, size_t bytes)
{
    KL_REQUIRE(ctx, "dplr: ctx: expected a context, got NULL");
    const kl_variant *v = pick(ctx->device);
    return v ? v->forward(ctx, p, workspace, bytes) : kl_error(KL_EDEVICE, "dplr: device: no variant for %s", kl_device_name(ctx->device));
}
