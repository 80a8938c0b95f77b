#include <string.h>

#include "moe/cpu/moe_cpu.h"
#include "moe/internal.h"

static kl_status takes(const void *problem, kl_pass pass)
{
    (void)pass;
    const moe_problem *p = problem;
    KL_TRY(moe_validate(NULL, p));
    KL_REQUIRE(p->dtype == KL_F32, "moe: dtype: expected float32 on the cpu, got %s", kl_dtype_name(p->dtype));
    return kl_ok();
}

static kl_status takes_forward(const void *problem, kl_pass pass)
{
    if (pass == KL_BACKWARD)
        return kl_error(KL_EUNSUPPORTED, "moe: recurrent has no backward pass; chunk has");
    return takes(problem, pass);
}

#ifdef KL_HAVE_CUDA
static kl_status takes_few_on_cuda(const void *problem, kl_pass pass)
{
    if (pass == KL_BACKWARD)
        return kl_error(KL_EUNSUPPORTED, "moe: recurrent has no backward pass; chunk has");
    return moe_cuda_takes_few(problem);
}

static kl_status takes_forward_on_cuda(const void *problem, kl_pass pass)
{
    if (pass == KL_BACKWARD)
        return kl_error(KL_EUNSUPPORTED, "moe: cublas has no backward pass; chunk has");
    return moe_cuda_takes(problem);
}

static kl_status takes_on_cuda(const void *problem, kl_pass pass)
{
    (void)pass;
    return moe_cuda_takes(problem);
}
#endif

/* Every weight that some token needs is read once; 2 flops a weight and row. */
static kl_cost cost(const void *problem, kl_pass pass)
{
    const moe_problem *p = problem;
    double T = (double)p->T, D = (double)p->D, rows = p->E ? T * (double)p->top_k : 0.0;
    double expert = 3.0 * D * (double)p->I, shared = 3.0 * D * (double)p->Is, router = D * (double)p->E;
    double touched = rows < (double)p->E ? rows : (double)p->E;
    double weights = T > 0.0 ? touched * expert + shared : 0.0;
    double mlp = 2.0 * (rows * expert + T * shared), io = T * D * (double)kl_dtype_size(p->dtype);
    double weight_bytes = weights * (double)kl_dtype_size(p->weight_dtype), router_bytes = router * (double)kl_dtype_size(p->router_dtype);
    if (pass == KL_FORWARD)
        return (kl_cost){.flops = 2.0 * T * router + mlp, .bytes = 2.0 * io + weight_bytes + router_bytes};
    /* Router, gate and up again, then two products for every one of the forward pass; float gradients are read and written. */
    return (kl_cost){.flops = 6.0 * T * router + (2.0 + 2.0 / 3.0) * mlp,
                     .bytes = 3.0 * io + weight_bytes + router_bytes + 8.0 * (weights + router)};
}

static const kl_variant variants[] = {
    {
        .family = "moe", .name = "recurrent", .device = KL_CPU,
        .summary = "token by token: the chosen experts' weights stream once a token",
        .check = takes_forward, .workspace = moe_recurrent_workspace, .forward = moe_recurrent_forward, .cost = cost,
    },
    {
        .family = "moe", .name = "chunk", .device = KL_CPU,
        .summary = "tokens grouped by expert, one product a tile of rows",
        .check = takes, .workspace = moe_chunk_workspace, .forward = moe_chunk_forward, .backward = moe_chunk_backward, .cost = cost,
    },
#ifdef KL_HAVE_CUDA
    {
        .family = "moe", .name = "recurrent", .device = KL_CUDA,
        .summary = "a few tokens: the chosen experts' weights stream past once, through a ring for every warp",
        .check = takes_few_on_cuda, .workspace = moe_cuda_recurrent_workspace, .forward = moe_cuda_recurrent_forward, .cost = cost,
    },
    {
        .family = "moe", .name = "chunk", .device = KL_CUDA,
        .summary = "rows of all experts sorted, two grouped products by warpgroups, rows of a token added in order",
        .check = takes_on_cuda, .workspace = moe_cuda_chunk_workspace, .forward = moe_cuda_chunk_forward, .backward = moe_cuda_chunk_backward, .cost = cost,
    },
    {
        .family = "moe", .name = "cublas", .device = KL_CUDA,
        .summary = "the baseline: rows copied into order, products by cuBLASLt in tiles of one size",
        .check = takes_forward_on_cuda, .workspace = moe_cuda_cublas_workspace, .forward = moe_cuda_cublas_forward, .cost = cost,
    },
#endif
};

const kl_variant *moe_variants(int *count)
{
    if (count)
        *count = (int)(sizeof variants / sizeof *variants);
    return variants;
}

/* Up to this many tokens it is better to stream weights than to group tokens. */
enum { FEW_TOKENS = 1, FEW_TOKENS_CUDA = 2 };

static bool streams(kl_device device, const moe_problem *p, kl_pass pass)
{
    if (pass == KL_BACKWARD || p->T > (device == KL_CUDA ? FEW_TOKENS_CUDA : FEW_TOKENS))
        return false;
#ifdef KL_HAVE_CUDA
    return device == KL_CPU || !kl_failed(moe_cuda_takes_few(p));
#else
    return true;
#endif
}

const kl_variant *moe_pick(kl_device device, const char *name, const moe_problem *p, kl_pass pass)
{
    if (!name)
        name = streams(device, p, pass) ? "recurrent" : "chunk";
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        if (variants[i].device == device && strcmp(variants[i].name, name) == 0)
            return &variants[i];
    return NULL;
}

size_t moe_workspace(const kl_ctx *ctx, const moe_problem *p, kl_pass pass)
{
    const kl_variant *v = moe_pick(ctx ? ctx->device : KL_CPU, NULL, p, pass);
    return v ? v->workspace(ctx, p, pass) : 0;
}

kl_status moe_forward(kl_ctx *ctx, const moe_problem *p, void *workspace, size_t bytes)
{
    KL_REQUIRE(ctx && p, "moe: %s: expected one, got NULL", ctx ? "problem" : "ctx");
    const kl_variant *v = moe_pick(ctx->device, NULL, p, KL_FORWARD);
    if (!v)
        return kl_error(KL_EUNSUPPORTED, "moe: device: no variant for %s", kl_device_name(ctx->device));
    return v->forward(ctx, p, workspace, bytes);
}

kl_status moe_backward(kl_ctx *ctx, const moe_problem *p, const moe_grads *g, void *workspace, size_t bytes)
{
    KL_REQUIRE(ctx && p, "moe: %s: expected one, got NULL", ctx ? "problem" : "ctx");
    const kl_variant *v = moe_pick(ctx->device, NULL, p, KL_BACKWARD);
    if (!v)
        return kl_error(KL_EUNSUPPORTED, "moe: device: no variant for %s", kl_device_name(ctx->device));
    return v->backward(ctx, p, g, workspace, bytes);
}
