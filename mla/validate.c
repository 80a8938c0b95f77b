/* Arguments are refused here, in the order device, dtype, layout, shape, options, before anything is read. */
#include <limits.h>

#include "common/gpu.h"
#include "mla/internal.h"

static kl_status check_dtypes(kl_device device, const mla_problem *p)
{
    if (device == KL_CPU && p->dtype != KL_F32)
        return kl_error(KL_EUNSUPPORTED, "dtype: expected float32 on the cpu, got %s", kl_dtype_name(p->dtype));
    KL_REQUIRE(p->dtype == KL_F32 || p->dtype == KL_BF16, "dtype: expected float32 or bfloat16, got %s", kl_dtype_name(p->dtype));
    KL_REQUIRE(p->latent_dtype == KL_F32 || p->latent_dtype == KL_BF16, "latent_dtype: expected float32 or bfloat16, got %s",
               kl_dtype_name(p->latent_dtype));
    KL_REQUIRE(p->weight_dtype == KL_F32 || p->weight_dtype == KL_BF16 || p->weight_dtype == KL_F16,
               "weight_dtype: expected float32, bfloat16 or float16, got %s", kl_dtype_name(p->weight_dtype));
    return kl_ok();
}

/* 1 <= the dimension <= INT_MAX, which BLAS can still name. */
static kl_status check_dim(const char *name, int64_t value, int64_t least)
{
    KL_REQUIRE(value >= least && value <= INT_MAX, "%s: expected %lld to %d, got %lld", name, (long long)least, INT_MAX,
               (long long)value);
    return kl_ok();
}

static kl_status check_sizes(const mla_problem *p)
{
    KL_REQUIRE(p->N >= 0, "N: expected at least 0 sequences, got %lld", (long long)p->N);
    KL_TRY(check_dim("H", p->H, 1));
    KL_TRY(check_dim("R", p->R, 1));
    KL_TRY(check_dim("Dn", p->Dn, 1));
    KL_TRY(check_dim("Dr", p->Dr, 0));
    KL_TRY(check_dim("Dv", p->Dv, 1));
    int64_t width = p->R + p->Dr, head = p->Dn + p->Dr + p->Dv, out = p->H * p->Dv, query = p->H * (p->Dn + p->Dr), weights;
    KL_REQUIRE(width <= INT_MAX, "R + Dr: expected at most %d, got %lld", INT_MAX, (long long)width);
    KL_REQUIRE(head <= INT_MAX, "Dn + Dr + Dv: expected at most %d, got %lld", INT_MAX, (long long)head);
    KL_REQUIRE(out <= INT_MAX, "H Dv: expected at most %d, got %lld", INT_MAX, (long long)out);
    KL_REQUIRE(query <= INT_MAX, "H (Dn + Dr): expected at most %d, got %lld", INT_MAX, (long long)query);
    KL_REQUIRE(!__builtin_mul_overflow((p->Dn + p->Dv) * p->H, p->R * 4, &weights),
               "H (Dn + Dv) R: the weights of kv_b do not fit the address space");
    KL_REQUIRE(p->q_stride == 0 || (p->q_stride >= query && p->q_stride <= INT_MAX),
               "q_stride: expected 0 or %lld to %d, got %lld", (long long)query, INT_MAX, (long long)p->q_stride);
    return kl_ok();
}

static kl_status check_sequences(const mla_problem *p)
{
    KL_REQUIRE(p->latent_rows >= 0, "latent_rows: expected at least 0, got %lld", (long long)p->latent_rows);
    int64_t bytes;
    KL_REQUIRE(!__builtin_mul_overflow(p->latent_rows, (p->R + p->Dr) * 4, &bytes),
               "latent_rows: %lld rows of %lld do not fit the address space", (long long)p->latent_rows, (long long)(p->R + p->Dr));
    if (p->N == 0)
        return kl_ok();
    KL_REQUIRE(p->cu_q, "cu_q: expected N + 1 = %lld numbers, got NULL", (long long)p->N + 1);
    KL_REQUIRE(p->kv_start, "kv_start: expected N = %lld numbers, got NULL", (long long)p->N);
    KL_REQUIRE(p->kv_len, "kv_len: expected N = %lld numbers, got NULL", (long long)p->N);
    KL_REQUIRE(p->cu_q[0] >= 0, "cu_q[0]: expected at least 0, got %lld", (long long)p->cu_q[0]);
    for (int64_t n = 0; n < p->N; n++) {
        long long i = n, start = p->kv_start[n], keys = p->kv_len[n], rows = p->latent_rows;
        KL_REQUIRE(p->cu_q[n + 1] >= p->cu_q[n], "cu_q[%lld]: expected at least cu_q[%lld] = %lld, got %lld", i + 1, i,
                   (long long)p->cu_q[n], (long long)p->cu_q[n + 1]);
        long long queries = mla_queries(p, n);
        KL_REQUIRE(keys >= queries, "kv_len[%lld]: expected at least the %lld queries of the sequence, got %lld", i, queries, keys);
        KL_REQUIRE(start >= 0 && start <= rows, "kv_start[%lld]: expected 0 to latent_rows = %lld, got %lld", i, rows, start);
        KL_REQUIRE(keys <= rows - start, "kv_len[%lld]: expected at most %lld (latent_rows - kv_start), got %lld", i, rows - start, keys);
    }
    KL_REQUIRE(!__builtin_mul_overflow(p->cu_q[p->N], 4 * mla_max(mla_q_stride(p), p->H * p->Dv), &bytes),
               "cu_q[%lld]: %lld queries do not fit the address space", (long long)p->N, (long long)p->cu_q[p->N]);
    return kl_ok();
}

static kl_status check_pointers(const mla_problem *p)
{
    int64_t keys = 0, queries = p->N ? p->cu_q[p->N] - p->cu_q[0] : 0;
    for (int64_t n = 0; n < p->N; n++)
        keys = mla_max(keys, p->kv_len[n]);
    KL_REQUIRE(p->q || !queries, "q: expected [%lld,%lld,%lld], got NULL", (long long)queries, (long long)p->H, (long long)(p->Dn + p->Dr));
    KL_REQUIRE(p->latent || !keys, "latent: expected [%lld,%lld], got NULL", (long long)p->latent_rows, (long long)(p->R + p->Dr));
    KL_REQUIRE(p->kv_b || !queries, "kv_b: expected [%lld,%lld,%lld], got NULL", (long long)p->H, (long long)(p->Dn + p->Dv), (long long)p->R);
    return kl_ok();
}

kl_status mla_validate_inputs(const kl_ctx *ctx, const mla_problem *p)
{
    KL_REQUIRE(ctx, "ctx: expected a context, got NULL");
    KL_REQUIRE(p, "problem: expected an mla_problem, got NULL");
    KL_TRY(check_dtypes(ctx->device, p));
    KL_TRY(check_sizes(p));
    KL_TRY(check_sequences(p));
    KL_TRY(check_pointers(p));
    KL_REQUIRE(isfinite(p->scale), "scale: expected a finite number, got %g", (double)p->scale);
    return kl_ok();
}

kl_status mla_validate(const kl_ctx *ctx, const mla_problem *p)
{
    KL_TRY(mla_validate_inputs(ctx, p));
    KL_REQUIRE(p->o || p->N == 0 || p->cu_q[p->N] == p->cu_q[0], "o: expected [%lld,%lld,%lld], got NULL",
               (long long)(p->cu_q[p->N] - p->cu_q[0]), (long long)p->H, (long long)p->Dv);
    return kl_ok();
}

kl_status mla_enter_cpu(const kl_ctx *ctx, const mla_problem *p, bool writes_o)
{
    KL_REQUIRE(!ctx || ctx->device == KL_CPU, "device: expected a context on the cpu, got one on %s", kl_device_name(ctx->device));
    return writes_o ? mla_validate(ctx, p) : mla_validate_inputs(ctx, p);
}

kl_status mla_enter_cuda(const kl_ctx *ctx, const mla_problem *p, const char *variant, bool writes_o)
{
    KL_TRY(writes_o ? mla_validate(ctx, p) : mla_validate_inputs(ctx, p));
    KL_REQUIRE(ctx->device == KL_CUDA, "device: expected a context on cuda, got one on %s", kl_device_name(ctx->device));
    KL_TRY(kl_gpu_require_hopper(ctx, "mla"));
    KL_TRY(mla_check_bf16(p, variant));
    const struct { const char *name; const void *at; } tensor[] = {{"q", p->q}, {"latent", p->latent}, {"kv_b", p->kv_b}, {"o", p->o}};
    for (size_t i = 0; i < sizeof tensor / sizeof *tensor; i++)
        KL_REQUIRE((uintptr_t)tensor[i].at % 16 == 0, "%s: expected an address that is a multiple of 16 on cuda, got %p", tensor[i].name, tensor[i].at);
    return kl_ok();
}

kl_status mla_check_bf16(const mla_problem *p, const char *variant)
{
    const struct { const char *name; kl_dtype dtype; } tensor[] = {{"dtype", p->dtype}, {"latent_dtype", p->latent_dtype}, {"weight_dtype", p->weight_dtype}};
    for (size_t i = 0; i < sizeof tensor / sizeof *tensor; i++)
        if (tensor[i].dtype != KL_BF16)
            return kl_error(KL_EUNSUPPORTED, "%s: mla %s on cuda offers bfloat16, got %s", tensor[i].name, variant, kl_dtype_name(tensor[i].dtype));
    if (p->latent_rows > INT_MAX)
        return kl_error(KL_EUNSUPPORTED, "latent_rows: mla %s on cuda offers at most %d, got %lld", variant, INT_MAX, (long long)p->latent_rows);
    const struct { const char *name; int64_t value; } eighth[] = {{"R", p->R}, {"Dr", p->Dr}, {"Dn", p->Dn}, {"Dv", p->Dv}, {"q_stride", p->q_stride}};
    for (size_t i = 0; i < sizeof eighth / sizeof *eighth; i++)
        if (eighth[i].value % 8)
            return kl_error(KL_EUNSUPPORTED, "%s: mla %s on cuda offers multiples of 8, got %lld", eighth[i].name, variant, (long long)eighth[i].value);
    return kl_ok();
}

static bool overlap(const mla_problem *p, int64_t a, int64_t b)
{
    return p->kv_len[a] && p->kv_len[b] && p->kv_start[a] < p->kv_start[b] + p->kv_len[b] && p->kv_start[b] < p->kv_start[a] + p->kv_len[a];
}

kl_status mla_validate_grads(const mla_problem *p, const mla_grads *g)
{
    KL_REQUIRE(p, "problem: expected an mla_problem, got NULL");
    KL_REQUIRE(g, "grads: expected an mla_grads, got NULL");
    KL_REQUIRE(g->d_o || p->N == 0 || p->cu_q[p->N] == p->cu_q[0], "d_o: expected [%lld,%lld,%lld], got NULL",
               (long long)(p->cu_q[p->N] - p->cu_q[0]), (long long)p->H, (long long)p->Dv);
    KL_REQUIRE(!g->o == !g->lse, "%s: expected [%lld,%lld%s with %s, got NULL", g->o ? "lse" : "o", p->N ? (long long)(p->cu_q[p->N] - p->cu_q[0]) : 0LL,
               (long long)p->H, g->o ? "]" : ",Dv]", g->o ? "o" : "lse");
    /* In ascending order each range need only be compared with the one before it. */
    bool ascending = true;
    for (int64_t n = 1; n < p->N; n++)
        ascending = ascending && p->kv_start[n] >= p->kv_start[n - 1] + p->kv_len[n - 1];
    for (int64_t n = 1; n < p->N && !ascending; n++)
        for (int64_t m = 0; m < n; m++)
            KL_REQUIRE(!overlap(p, m, n), "kv_start[%lld]: expected latent rows of its own in a backward pass, got rows of sequence %lld",
                       (long long)n, (long long)m);
    return kl_ok();
}

kl_status mla_check_workspace(const void *workspace, size_t bytes, size_t needed)
{
    KL_REQUIRE(needed != SIZE_MAX, "workspace: the problem needs more than the address space");
    KL_REQUIRE(bytes >= needed, "workspace: expected at least %zu bytes, got %zu", needed, bytes);
    KL_REQUIRE(workspace || !needed, "workspace: expected %zu bytes, got NULL", needed);
    KL_REQUIRE((uintptr_t)workspace % 64 == 0, "workspace: expected an address that is a multiple of 64, got %p", workspace);
    return kl_ok();
}
