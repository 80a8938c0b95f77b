#include "common/gpu.h"
#include "moe/internal.h"

static bool float_type(kl_dtype t) { return t == KL_F32 || t == KL_BF16 || t == KL_F16; }

static kl_status check_dtypes(const kl_ctx *ctx, const moe_problem *p)
{
    KL_REQUIRE(float_type(p->dtype), "moe: dtype: expected float32, bfloat16 or float16, got %s", kl_dtype_name(p->dtype));
    if (ctx)
        KL_TRY(kl_gpu_require_hopper(ctx, "moe"));
    if (ctx && ctx->device == KL_CPU)
        KL_REQUIRE(p->dtype == KL_F32, "moe: dtype: expected float32 on the cpu, got %s", kl_dtype_name(p->dtype));
    KL_REQUIRE(float_type(p->weight_dtype), "moe: weight_dtype: expected float32, bfloat16 or float16, got %s", kl_dtype_name(p->weight_dtype));
    KL_REQUIRE(p->E == 0 || float_type(p->router_dtype), "moe: router_dtype: expected float32, bfloat16 or float16, got %s", kl_dtype_name(p->router_dtype));
    return kl_ok();
}

static kl_status check_sizes(const moe_problem *p)
{
    const struct { const char *name; int64_t value, low, high; } sizes[] = {
        {"T", p->T, 0, INT32_MAX}, {"D", p->D, 1, 1 << 24}, {"E", p->E, 0, 1 << 20}, {"Is", p->Is, 0, 1 << 24},
        {"I", p->I, p->E ? 1 : 0, 1 << 24}, {"top_k", p->top_k, p->E ? 1 : 0, p->E ? p->E : INT32_MAX},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        KL_REQUIRE(sizes[i].value >= sizes[i].low && sizes[i].value <= sizes[i].high, "moe: %s: expected %lld to %lld, got %lld",
                   sizes[i].name, (long long)sizes[i].low, (long long)sizes[i].high, (long long)sizes[i].value);
    return kl_ok();
}

static kl_status check_groups(const moe_problem *p)
{
    if (p->E == 0)
        return kl_ok();
    KL_REQUIRE(p->n_group >= 0 && p->n_group <= p->E, "moe: n_group: expected 0 to E = %lld, got %lld", (long long)p->E, (long long)p->n_group);
    if (p->n_group <= 1)
        return kl_ok();
    KL_REQUIRE(p->E % p->n_group == 0, "moe: n_group: expected a divisor of E = %lld, got %lld", (long long)p->E, (long long)p->n_group);
    KL_REQUIRE(p->topk_group >= 1 && p->topk_group <= p->n_group, "moe: topk_group: expected 1 to n_group = %lld, got %lld",
               (long long)p->n_group, (long long)p->topk_group);
    int64_t reach = p->topk_group * (p->E / p->n_group);
    KL_REQUIRE(p->top_k <= reach, "moe: top_k: expected at most %lld, the experts of topk_group groups, got %lld", (long long)reach, (long long)p->top_k);
    return kl_ok();
}

static kl_status check_pointers(const moe_problem *p)
{
    if (p->T > 0) {
        KL_REQUIRE(p->x, "moe: x: expected [%lld,%lld], got NULL", (long long)p->T, (long long)p->D);
        KL_REQUIRE(p->x != p->y, "moe: y: expected memory of its own, got x");
    }
    if (p->E > 0) {
        KL_REQUIRE(p->router, "moe: router: expected [%lld,%lld], got NULL", (long long)p->E, (long long)p->D);
        const struct { const char *name; const void *const *w; } lists[] = {{"w1", p->w1}, {"w3", p->w3}, {"w2", p->w2}};
        for (int i = 0; i < 3; i++) {
            KL_REQUIRE(lists[i].w, "moe: %s: expected %lld pointers, got NULL", lists[i].name, (long long)p->E);
            for (int64_t e = 0; e < p->E; e++)
                KL_REQUIRE(lists[i].w[e], "moe: %s[%lld]: expected a weight, got NULL", lists[i].name, (long long)e);
        }
    }
    if (p->Is > 0) {
        KL_REQUIRE(p->shared_w1, "moe: shared_w1: expected [%lld,%lld], got NULL", (long long)p->Is, (long long)p->D);
        KL_REQUIRE(p->shared_w3, "moe: shared_w3: expected [%lld,%lld], got NULL", (long long)p->Is, (long long)p->D);
        KL_REQUIRE(p->shared_w2, "moe: shared_w2: expected [%lld,%lld], got NULL", (long long)p->D, (long long)p->Is);
    }
    return kl_ok();
}

/* Sizes, dtypes and options, before any tensor is looked at. */
static kl_status check_shape(const kl_ctx *ctx, const moe_problem *p)
{
    KL_TRY(check_dtypes(ctx, p));
    KL_TRY(check_sizes(p));
    KL_TRY(check_groups(p));
    KL_REQUIRE(p->router_kind == MOE_SIGMOID || p->router_kind == MOE_SOFTMAX, "moe: router_kind: expected sigmoid (0) or softmax (1), got %d", (int)p->router_kind);
    KL_REQUIRE(p->scale - p->scale == 0.0f, "moe: scale: expected a finite number, got %g", (double)p->scale);
    return kl_ok();
}

kl_status moe_validate(const kl_ctx *ctx, const moe_problem *p)
{
    KL_REQUIRE(p, "moe: problem: expected one, got NULL");
    KL_TRY(check_shape(ctx, p));
    return ctx ? check_pointers(p) : kl_ok();
}

kl_status moe_validate_grads(const moe_problem *p, const moe_grads *g)
{
    KL_REQUIRE(p && g, "moe: %s: expected one, got NULL", p ? "grads" : "problem");
    KL_REQUIRE(g->dy || p->T == 0, "moe: dy: expected [%lld,%lld], got NULL", (long long)p->T, (long long)p->D);
    if (g->dx && p->T > 0) {
        KL_REQUIRE(g->dx != p->x, "moe: dx: expected memory of its own, got x");
        KL_REQUIRE(g->dx != g->dy, "moe: dx: expected memory of its own, got dy");
    }
    return kl_ok();
}

/* ---- the GPU's kernels ---- */

enum { CUDA_MOST_EXPERTS = 1024, CUDA_MOST_CHOICES = 32, CUDA_MOST_WIDTH = 1 << 14 };

static kl_status check_cuda_width(const char *name, int64_t value)
{
    if (value % 8 || value > CUDA_MOST_WIDTH)
        return kl_error(KL_EUNSUPPORTED, "moe: %s: expected a multiple of 8 up to %d on cuda, got %lld", name, CUDA_MOST_WIDTH, (long long)value);
    return kl_ok();
}

kl_status moe_cuda_takes(const moe_problem *p)
{
    KL_TRY(moe_validate(NULL, p));
    const struct { const char *name; kl_dtype type; bool any; } types[] = {
        {"dtype", p->dtype, false}, {"weight_dtype", p->weight_dtype, false}, {"router_dtype", p->router_dtype, p->E == 0 || p->router_dtype == KL_F32}};
    for (int i = 0; i < 3; i++)
        if (types[i].type != KL_BF16 && !types[i].any)
            return kl_error(KL_EUNSUPPORTED, "moe: %s: expected bfloat16%s on cuda, got %s", types[i].name, i == 2 ? " or float32" : "", kl_dtype_name(types[i].type));
    KL_TRY(check_cuda_width("D", p->D));
    KL_TRY(check_cuda_width("I", p->E ? p->I : 0));
    KL_TRY(check_cuda_width("Is", p->Is));
    if (p->E > CUDA_MOST_EXPERTS)
        return kl_error(KL_EUNSUPPORTED, "moe: E: expected at most %d on cuda, got %lld", CUDA_MOST_EXPERTS, (long long)p->E);
    if (p->E && p->top_k > CUDA_MOST_CHOICES)
        return kl_error(KL_EUNSUPPORTED, "moe: top_k: expected at most %d on cuda, got %lld", CUDA_MOST_CHOICES, (long long)p->top_k);
    return kl_ok();
}

/* Half of a multiprocessor's shared memory, so that one launch may begin while another ends. */
enum { CUDA_FEW_TOKENS = 8, CUDA_FEW_BYTES = 112 << 10 };

kl_status moe_cuda_takes_few(const moe_problem *p)
{
    KL_TRY(moe_cuda_takes(p));
    if (p->T > CUDA_FEW_TOKENS)
        return kl_error(KL_EUNSUPPORTED, "moe: T: recurrent takes at most %d tokens on cuda, got %lld", CUDA_FEW_TOKENS, (long long)p->T);
    int64_t slots = (p->E ? p->top_k : 0) + 1, wide = (p->E ? p->top_k * p->I : 0) + p->Is;
    int64_t a_token = 2 * (wide > p->D ? wide : p->D) + 8 * (p->E + slots) + 4 * slots * (p->D / 8 + 1);
    if (p->T * a_token > CUDA_FEW_BYTES)
        return kl_error(KL_EUNSUPPORTED, "moe: T: recurrent takes at most %lld tokens of this size on cuda, got %lld", (long long)(CUDA_FEW_BYTES / a_token), (long long)p->T);
    return kl_ok();
}

static kl_status enter_cuda(const kl_ctx *ctx, const moe_problem *p)
{
    KL_REQUIRE(ctx, "moe: ctx: expected a context, got NULL");
    KL_TRY(moe_validate(ctx, p));
    return moe_cuda_takes(p);
}

static kl_status check_aligned(const char *name, const void *at)
{
    KL_REQUIRE((uintptr_t)at % 16 == 0, "moe: %s: expected an address that is a multiple of 16, got %p", name, at);
    return kl_ok();
}

kl_status moe_cuda_enter(const kl_ctx *ctx, const moe_problem *p)
{
    KL_TRY(enter_cuda(ctx, p));
    KL_REQUIRE(p->y || p->T == 0, "moe: y: expected [%lld,%lld], got NULL", (long long)p->T, (long long)p->D);
    KL_TRY(check_aligned("x", p->x));
    KL_TRY(check_aligned("y", p->y));
    return check_aligned("router", p->router);
}

kl_status moe_cuda_enter_backward(const kl_ctx *ctx, const moe_problem *p, const moe_grads *g)
{
    KL_TRY(enter_cuda(ctx, p));
    KL_TRY(moe_validate_grads(p, g));
    KL_TRY(check_aligned("x", p->x));
    KL_TRY(check_aligned("router", p->router));
    KL_TRY(check_aligned("dy", g->dy));
    KL_TRY(check_aligned("dx", g->dx));
    const struct { const char *name; float *const *list; } lists[] = {{"dw1", g->dw1}, {"dw3", g->dw3}, {"dw2", g->dw2}};
    for (int i = 0; i < 3; i++)
        for (int64_t e = 0; lists[i].list && e < p->E; e++)
            KL_TRY(check_aligned(lists[i].name, lists[i].list[e]));
    KL_TRY(check_aligned("dshared_w1", g->dshared_w1));
    KL_TRY(check_aligned("dshared_w3", g->dshared_w3));
    return check_aligned("dshared_w2", g->dshared_w2);
}
