/* The table of variants, the dispatch that picks from it, and what a problem costs. */
#include <stdio.h>
#include <string.h>

#include "common/gpu.h"
#include "kda/internal.h"

static kl_status check_float32(const kda_problem *p, const char *name)
{
    if (p->dtype != KL_F32)
        return kl_error(KL_EUNSUPPORTED, "kda: dtype: variant %s on cpu offers float32, got %s", name, kl_dtype_name(p->dtype));
    if (p->state_dtype != KL_F32)
        return kl_error(KL_EUNSUPPORTED, "kda: state_dtype: variant %s on cpu offers float32, got %s", name, kl_dtype_name(p->state_dtype));
    return kl_ok();
}

static kl_status check_recurrent(const void *problem, kl_pass pass)
{
    if (pass != KL_FORWARD)
        return kl_error(KL_EUNSUPPORTED, "kda: pass: variant recurrent on cpu offers forward only");
    return check_float32(problem, "recurrent");
}

static kl_status check_chunk(const void *problem, kl_pass pass)
{
    const kda_problem *p = problem;
    KL_TRY(check_float32(p, "chunk"));
    if (pass == KL_FORWARD && p->token_states)
        return kl_error(KL_EUNSUPPORTED, "kda: token_states: variant chunk does not offer them, variant recurrent does");
    return kl_ok();
}

#ifdef KL_HAVE_CUDA
static kl_status check_cuda_recurrent(const void *problem, kl_pass pass)
{
    (void)problem;
    if (pass != KL_FORWARD)
        return kl_error(KL_EUNSUPPORTED, "kda: pass: variant recurrent on cuda offers forward only");
    return kl_ok();
}

static kl_status check_cuda_chunk_named(const kda_problem *p, kl_pass pass, const char *name)
{
    if (p->dtype != KL_BF16)
        return kl_error(KL_EUNSUPPORTED, "kda: dtype: variant %s on cuda offers bfloat16, got %s", name, kl_dtype_name(p->dtype));
    if (p->state_dtype != KL_F32)
        return kl_error(KL_EUNSUPPORTED, "kda: state_dtype: variant %s on cuda offers float32, got %s", name, kl_dtype_name(p->state_dtype));
    if (pass == KL_FORWARD && p->token_states)
        return kl_error(KL_EUNSUPPORTED, "kda: token_states: variant %s does not offer them, variant recurrent does", name);
    return kl_ok();
}

static kl_status check_cuda_chunk(const void *problem, kl_pass pass) { return check_cuda_chunk_named(problem, pass, "chunk"); }
static kl_status check_cuda_chunk_forward(const void *problem, kl_pass pass, const char *name)
{
    if (pass != KL_FORWARD)
        return kl_error(KL_EUNSUPPORTED, "kda: pass: variant %s on cuda offers forward only", name);
    return check_cuda_chunk_named(problem, pass, name);
}
static kl_status check_cuda_two_pass(const void *problem, kl_pass pass) { return check_cuda_chunk_forward(problem, pass, "chunk_two_pass"); }
static kl_status check_cuda_scan(const void *problem, kl_pass pass) { return check_cuda_chunk_forward(problem, pass, "chunk_scan"); }
static kl_status check_cuda_follow(const void *problem, kl_pass pass) { return check_cuda_chunk_forward(problem, pass, "chunk_follow"); }
static kl_status check_cuda_fused(const void *problem, kl_pass pass) { return check_cuda_chunk_forward(problem, pass, "chunk_fused"); }
static kl_status check_cuda_persistent(const void *problem, kl_pass pass) { return check_cuda_chunk_forward(problem, pass, "chunk_persistent"); }
#endif

static double tokens(const kda_problem *p) { return (double)p->B * (double)p->T; }

/* Every input once, every output once; backward reads them again with their gradients. */
static double least_bytes(const kda_problem *p, kl_pass pass)
{
    double element = (double)kl_dtype_size(p->dtype), state = (double)p->HV * p->K * p->V;
    double token = element * (2.0 * p->H * p->K + 2.0 * p->HV * p->V + p->HV * (p->G + 1.0));
    double states = (double)p->N * state * (double)kl_dtype_size(p->state_dtype) * ((p->h0 != NULL) + (p->ht != NULL));
    double forward = tokens(p) * token + states;
    if (pass == KL_BACKWARD)
        return 2.0 * forward - element * tokens(p) * p->HV * p->V;
    return forward + (p->token_states ? 4.0 * tokens(p) * state : 0.0);
}

/* Decay, S'^T k, k u^T and S^T q: 7 K V a token and head. */
static kl_cost cost_recurrent(const void *problem, kl_pass pass)
{
    const kda_problem *p = problem;
    return (kl_cost){.flops = tokens(p) * p->HV * 7.0 * p->K * p->V, .bytes = least_bytes(p, pass)};
}

/* The report's 6 T d^2 + 3 T C d + T C^2 with u solved for directly: three products with the state, two matrices of which
 * half is needed, two triangular products. Backward: those again, six more with the state, and each triangle twice. */
static kl_cost cost_chunk(const void *problem, kl_pass pass)
{
    const kda_problem *p = problem;
    double C = (double)kda_chunk_tokens(p), K = (double)p->K, V = (double)p->V;
    double states = 6.0 * K * V, triangles = 2.0 * C * K + 2.0 * C * V;
    double token = pass == KL_FORWARD ? states + triangles : 3.0 * states + 3.0 * triangles;
    return (kl_cost){.flops = tokens(p) * p->HV * token, .bytes = least_bytes(p, pass)};
}

static kl_status run_recurrent(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(kda_validate(ctx, problem));
    KL_TRY(check_recurrent(problem, KL_FORWARD));
    return kda_cpu_recurrent_forward(ctx, problem, workspace, bytes);
}

static kl_status run_chunk(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(kda_validate(ctx, problem));
    KL_TRY(check_chunk(problem, KL_FORWARD));
    return kda_cpu_chunk_forward(ctx, problem, workspace, bytes);
}

static kl_status run_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes)
{
    KL_TRY(kda_validate(ctx, problem));
    KL_TRY(kda_validate_grads(problem, grads));
    KL_TRY(check_chunk(problem, KL_BACKWARD));
    return kda_cpu_chunk_backward(ctx, problem, grads, workspace, bytes);
}

#ifdef KL_HAVE_CUDA
static kl_status run_cuda_recurrent(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(kda_validate(ctx, problem));
    return kda_cuda_recurrent_forward(ctx, problem, workspace, bytes);
}

static kl_status run_cuda_chunk(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(kda_validate(ctx, problem));
    KL_TRY(check_cuda_chunk(problem, KL_FORWARD));
    return kda_cuda_chunk_forward(ctx, problem, workspace, bytes);
}

static kl_status run_cuda_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes)
{
    KL_TRY(kda_validate(ctx, problem));
    KL_TRY(kda_validate_grads(problem, grads));
    KL_TRY(check_cuda_chunk(problem, KL_BACKWARD));
    return kda_cuda_chunk_backward(ctx, problem, grads, workspace, bytes);
}

static size_t workspace_cuda_chunk(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    return pass == KL_BACKWARD ? kda_cuda_chunk_backward_workspace(ctx, problem) : kda_cuda_chunk_workspace(ctx, problem, pass);
}

static kl_status run_cuda_two_pass(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(kda_validate(ctx, problem));
    KL_TRY(check_cuda_two_pass(problem, KL_FORWARD));
    return kda_cuda_two_pass_forward(ctx, problem, workspace, bytes);
}

/* What the forms that need Hopper ask before their kernels. */
static kl_status enter_hopper(const kl_ctx *ctx, const void *problem, const char *form)
{
    char who[32];
    snprintf(who, sizeof who, "kda: %s", form);
    KL_TRY(kda_validate(ctx, problem));
    KL_TRY(check_cuda_chunk_forward(problem, KL_FORWARD, form));
    return kl_gpu_require_hopper(ctx, who);
}

static kl_status run_cuda_scan(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(enter_hopper(ctx, problem, "chunk_scan"));
    return kda_cuda_scan_forward(ctx, problem, workspace, bytes);
}

static kl_status run_cuda_follow(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(enter_hopper(ctx, problem, "chunk_follow"));
    return kda_cuda_follow_forward(ctx, problem, workspace, bytes);
}

static kl_status run_cuda_fused(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(enter_hopper(ctx, problem, "chunk_fused"));
    return kda_cuda_fused_forward(ctx, problem, workspace, bytes);
}

static kl_status run_cuda_persistent(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    KL_TRY(enter_hopper(ctx, problem, "chunk_persistent"));
    return kda_cuda_persistent_forward(ctx, problem, workspace, bytes);
}
#endif

static const kl_variant variants[] = {
    {"kda", "recurrent", KL_CPU, "one state update a token; decode steps and several tokens a step", check_recurrent,
     kda_cpu_recurrent_workspace, run_recurrent, NULL, cost_recurrent},
    {"kda", "chunk", KL_CPU, "blocks of tokens through the triangular system of the chunk", check_chunk, kda_cpu_chunk_workspace,
     run_chunk, run_chunk_backward, cost_chunk},
#ifdef KL_HAVE_CUDA
    {"kda", "recurrent", KL_CUDA, "one state update a token; decode steps, several tokens a step, float32", check_cuda_recurrent,
     kda_cuda_recurrent_workspace, run_cuda_recurrent, NULL, cost_recurrent},
    {"kda", "chunk", KL_CUDA, "tiles of 32 tokens on the tensor cores, bfloat16: the fastest of those below", check_cuda_chunk,
     workspace_cuda_chunk, run_cuda_chunk, run_cuda_chunk_backward, cost_chunk},
    {"kda", "chunk_fused", KL_CUDA, "the same tiles, prepared and walked over in one block, whole heads: many heads", check_cuda_fused,
     kda_cuda_fused_workspace, run_cuda_fused, NULL, cost_chunk},
    {"kda", "chunk_two_pass", KL_CUDA, "the same tiles, all prepared before the walk: any K and V", check_cuda_two_pass,
     kda_cuda_two_pass_workspace, run_cuda_two_pass, NULL, cost_chunk},
    {"kda", "chunk_scan", KL_CUDA, "the same tiles, sequences cut into parts that are walked over at the same time", check_cuda_scan,
     kda_cuda_scan_workspace, run_cuda_scan, NULL, cost_chunk},
    {"kda", "chunk_follow", KL_CUDA, "the same tiles, walked over while later ones are prepared by another kernel", check_cuda_follow,
     kda_cuda_follow_workspace, run_cuda_follow, NULL, cost_chunk},
    {"kda", "chunk_persistent", KL_CUDA, "the same tiles through a ring in the second cache, a block on every multiprocessor", check_cuda_persistent,
     kda_cuda_persistent_workspace, run_cuda_persistent, NULL, cost_chunk},
#endif
};

const kl_variant *kda_variants(int *count)
{
    *count = (int)(sizeof variants / sizeof *variants);
    return variants;
}

static const kl_variant *find(kl_device device, const char *name)
{
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        if (variants[i].device == device && !strcmp(variants[i].name, name))
            return &variants[i];
    return NULL;
}

/* Up to this many tokens in the longest sequence, token by token is faster. */
enum { FEW_TOKENS = 8 };

const kl_variant *kda_pick(kl_device device, const char *name, const kda_problem *p, kl_pass pass)
{
    if (name)
        return find(device, name);
    const kl_variant *recurrent = find(device, "recurrent"), *chunk = find(device, "chunk");
    bool few = pass == KL_FORWARD && (p->token_states || kda_longest(p->T, p->N, p->cu_seqlens) <= FEW_TOKENS);
    if (few || pass != KL_FORWARD)
        return few ? recurrent : chunk;
    /* What the chunk form does not offer, the recurrence may. */
    bool fits = chunk && !kl_failed(chunk->check(p, pass));
    return fits || !recurrent || kl_failed(recurrent->check(p, pass)) ? chunk : recurrent;
}

/* kda_pick, but the recurrence where the chunk form takes more shared memory than the device has. */
static const kl_variant *pick_on(const kl_ctx *ctx, const kda_problem *p, kl_pass pass)
{
    const kl_variant *v = kda_pick(ctx->device, NULL, p, pass);
#ifdef KL_HAVE_CUDA
    const kl_variant *recurrent = find(ctx->device, "recurrent");
    bool small = ctx->device == KL_CUDA && !ctx->hopper && pass == KL_FORWARD && kda_cuda_two_pass_shared(p) > ctx->shared_most;
    if (small && !kl_failed(recurrent->check(p, pass)))
        return recurrent;
#endif
    return v;
}

static kl_status pick(const kl_ctx *ctx, const kda_problem *p, kl_pass pass, const kl_variant **v)
{
    KL_REQUIRE(ctx, "kda: ctx: expected a context, got NULL");
    KL_TRY(kda_validate(ctx, p));
    *v = pick_on(ctx, p, pass);
    return *v ? kl_ok() : kl_error(KL_EDEVICE, "kda: device: no variant for %s", kl_device_name(ctx->device));
}

size_t kda_workspace(const kl_ctx *ctx, const kda_problem *p, kl_pass pass)
{
    if (!ctx || kl_failed(kda_validate(NULL, p)))
        return 0;
    const kl_variant *v = pick_on(ctx, p, pass);
    return v ? v->workspace(ctx, p, pass) : 0;
}

kl_status kda_forward(kl_ctx *ctx, const kda_problem *p, void *workspace, size_t bytes)
{
    const kl_variant *v;
    KL_TRY(pick(ctx, p, KL_FORWARD, &v));
    return v->forward(ctx, p, workspace, bytes);
}

kl_status kda_backward(kl_ctx *ctx, const kda_problem *p, const kda_grads *g, void *workspace, size_t bytes)
{
    const kl_variant *v;
    KL_TRY(pick(ctx, p, KL_BACKWARD, &v));
    return v->backward(ctx, p, g, workspace, bytes);
}
