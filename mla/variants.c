/* The table of variants, and the choice among them for each sequence by the work that either form would do. */
#include <string.h>

#include "mla/internal.h"

static kl_status check_forward(const void *problem, kl_pass pass)
{
    (void)problem;
    if (pass == KL_BACKWARD)
        return kl_error(KL_EUNSUPPORTED, "pass: expected forward, the only one of mla recurrent, got backward");
    return kl_ok();
}

static kl_status check_any(const void *problem, kl_pass pass)
{
    (void)problem, (void)pass;
    return kl_ok();
}

static size_t chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    return pass == KL_FORWARD ? mla_chunk_forward_workspace(ctx, problem) : mla_chunk_backward_workspace(ctx, problem);
}

/* Pairs of a query and a key that it sees: sum_i (Tk - Tq + i + 1). */
static double pairs(const mla_problem *p, int64_t n)
{
    double queries = (double)mla_queries(p, n), keys = (double)p->kv_len[n];
    return queries * (keys - queries) + queries * (queries + 1.0) / 2.0;
}

/* Operations of sequence n and one head: keys and values expanded, then attention; or absorbed, with both ends. */
static double chunk_flops(const mla_problem *p, int64_t n)
{
    return 2.0 * (double)p->kv_len[n] * (double)p->R * (double)(p->Dn + p->Dv) + 2.0 * pairs(p, n) * (double)mla_row(p);
}
static double recurrent_flops(const mla_problem *p, int64_t n)
{
    return 2.0 * (double)mla_queries(p, n) * (double)p->R * (double)(p->Dn + p->Dv) + 2.0 * pairs(p, n) * (double)(2 * p->R + p->Dr);
}

static kl_cost cost(const void *problem, kl_pass pass)
{
    const mla_problem *p = problem;
    double queries = 0, keys = 0, flops = 0, H = (double)p->H, head = (double)(p->Dn + p->Dr);
    for (int64_t n = 0; n < p->N; n++) {
        double expand = 2.0 * (double)p->kv_len[n] * (double)p->R * (double)(p->Dn + p->Dv);
        queries += (double)mla_queries(p, n);
        keys += (double)p->kv_len[n];
        if (pass == KL_FORWARD)
            flops += H * fmin(chunk_flops(p, n), recurrent_flops(p, n));
        else /* expand once, its two gradients; s, dp, dq, dk, dv */
            flops += H * (3.0 * expand + 2.0 * pairs(p, n) * (3.0 * head + 2.0 * (double)p->Dv));
    }
    double element = (double)kl_dtype_size(p->dtype), width = (double)(p->R + p->Dr);
    double q = queries * H * head * element, o = queries * H * (double)p->Dv * element;
    double latent = keys * width * (double)kl_dtype_size(p->latent_dtype), weights = H * (double)(p->Dn + p->Dv) * (double)p->R;
    double bytes = q + o + latent + weights * (double)kl_dtype_size(p->weight_dtype);
    if (pass == KL_BACKWARD) /* dq, dlatent, dkv_b read and written */
        bytes += q + keys * width * 4.0 + 2.0 * weights * 4.0;
    else if (p->lse)
        bytes += queries * H * 4.0;
    return (kl_cost){flops, bytes};
}

static const kl_variant table[] = {
    {"mla", "recurrent", KL_CPU, "absorbed: queries against the latent rows themselves, keys in pieces", check_forward,
     mla_recurrent_workspace, mla_recurrent_forward, NULL, cost},
    {"mla", "chunk", KL_CPU, "keys and values expanded head by head, tiled online softmax", check_any, chunk_workspace,
     mla_chunk_forward, mla_chunk_backward, cost},
#ifdef KL_HAVE_CUDA
    {"mla", "recurrent", KL_CUDA, "absorbed: queries against the latent rows themselves, split over the keys, bfloat16", mla_cuda_recurrent_check,
     mla_cuda_recurrent_workspace, mla_cuda_recurrent_forward, NULL, cost},
    {"mla", "chunk", KL_CUDA, "keys and values expanded by cuBLASLt, causal attention by warpgroups, bfloat16", mla_cuda_chunk_check, mla_cuda_chunk_workspace,
     mla_cuda_chunk_forward, mla_cuda_chunk_backward, cost},
#endif
};
enum { RECURRENT, CHUNK, VARIANTS = sizeof table / sizeof *table }; /* the first two: on the cpu */

const kl_variant *mla_variants(int *count)
{
    *count = VARIANTS;
    return table;
}

static const kl_variant *find(kl_device device, const char *name)
{
    for (int i = 0; i < VARIANTS; i++)
        if (table[i].device == device && strcmp(table[i].name, name) == 0)
            return &table[i];
    return NULL;
}

/* ---- dispatch: by sequence, so that neighbours do not change what a sequence gets ---- */

/* 10^9 operations a second and thread, measured on a 2.7 GHz Sapphire Rapids (mla/README.md); only their ratios matter. */
typedef struct rates {
    double expand, attend; /* chunk: matrix products of whole tiles; score and sum tiles with the softmax between */
    double ends, latent;   /* recurrent: row by row through the weights; rows against a block of latents */
} rates;

static rates measured(const mla_problem *p)
{
    double latent = !mla_has_tiles(p) ? 60.0 : p->latent_dtype == KL_BF16 ? 300.0 : 150.0;
    return (rates){.expand = 140.0, .attend = 62.0, .ends = 25.0, .latent = latent};
}

static int choose(const mla_problem *p, int64_t n)
{
    rates r = measured(p);
    double weights = (double)p->R * (double)(p->Dn + p->Dv), seen = pairs(p, n);
    double chunk = (double)p->kv_len[n] * weights / r.expand + seen * (double)mla_row(p) / r.attend;
    double recurrent = (double)mla_queries(p, n) * weights / r.ends + seen * (double)(2 * p->R + p->Dr) / r.latent;
    return recurrent <= chunk ? RECURRENT : CHUNK;
}

/* The run of sequences from n0 on that take the same variant, which is returned; *n1: one past the last.
 * Sequences without queries go with either. */
static int next_run(const mla_problem *p, int64_t n0, int64_t *n1)
{
    int chosen = -1;
    int64_t n = n0;
    for (; n < p->N; n++) {
        if (mla_queries(p, n) == 0)
            continue;
        int choice = choose(p, n);
        if (chosen >= 0 && choice != chosen)
            break;
        chosen = choice;
    }
    *n1 = n;
    return chosen >= 0 ? chosen : RECURRENT;
}

static mla_problem part_of(const mla_problem *p, int64_t n0, int64_t n1)
{
    mla_problem part = *p;
    part.N = n1 - n0;
    part.cu_q += n0;
    part.kv_start += n0;
    part.kv_len += n0;
    return part;
}

static size_t mixed_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const mla_problem *p = problem;
    if (pass == KL_BACKWARD)
        return mla_chunk_backward_workspace(ctx, p);
    size_t most = 0;
    for (int64_t n0 = 0, n1; n0 < p->N; n0 = n1) {
        const kl_variant *v = &table[next_run(p, n0, &n1)];
        mla_problem part = part_of(p, n0, n1);
        size_t bytes = v->workspace(ctx, &part, pass);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static kl_status mixed_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const mla_problem *p = problem;
    KL_TRY(mla_enter_cpu(ctx, p, true));
    KL_TRY(mla_check_workspace(workspace, bytes, mixed_workspace(ctx, p, KL_FORWARD)));
    for (int64_t n0 = 0, n1; n0 < p->N; n0 = n1) {
        const kl_variant *v = &table[next_run(p, n0, &n1)];
        mla_problem part = part_of(p, n0, n1);
        KL_TRY(v->forward(ctx, &part, workspace, bytes));
    }
    return kl_ok();
}

static const kl_variant mixed = {"mla", "mixed", KL_CPU, "for each sequence the variant that suits it", check_any, mixed_workspace,
                                 mixed_forward, mla_chunk_backward, cost};

/* Up to this many queries in every sequence, a device reads the latents themselves (mla/README.md: which form). */
enum { FEW_QUERIES = 192 };

static const kl_variant *pick_cuda(const mla_problem *p, kl_pass pass)
{
    const kl_variant *recurrent = find(KL_CUDA, "recurrent"), *chunk = find(KL_CUDA, "chunk");
    if (pass == KL_BACKWARD || !chunk)
        return pass == KL_BACKWARD ? chunk : recurrent;
    int64_t most = 0;
    for (int64_t n = 0; p && p->cu_q && n < p->N; n++)
        most = mla_max(most, mla_queries(p, n));
    bool reads = !(p && kl_failed(recurrent->check(p, pass))), expands = !(p && kl_failed(chunk->check(p, pass)));
    return reads && (most <= FEW_QUERIES || !expands) ? recurrent : chunk;
}

const kl_variant *mla_pick(kl_device device, const char *name, const mla_problem *p, kl_pass pass)
{
    const kl_variant *named = name ? find(device, name) : NULL;
    if (name)
        return named && pass == KL_BACKWARD && !named->backward ? NULL : named;
    if (device == KL_CUDA)
        return pick_cuda(p, pass);
    if (pass == KL_BACKWARD)
        return &table[CHUNK];
    if (!p || p->N <= 0 || !p->cu_q || !p->kv_len)
        return &table[RECURRENT];
    int64_t n1;
    int chosen = next_run(p, 0, &n1);
    return n1 == p->N ? &table[chosen] : &mixed;
}

/* ---- the plain entry points ---- */

size_t mla_workspace(const kl_ctx *ctx, const mla_problem *p, kl_pass pass)
{
    const kl_variant *v = mla_pick(ctx->device, NULL, p, pass);
    return v ? v->workspace(ctx, p, pass) : 0;
}

static kl_status no_variant(const kl_ctx *ctx)
{
    KL_REQUIRE(ctx, "ctx: expected a context, got NULL");
    return kl_error(KL_EUNSUPPORTED, "device: mla has no variant for this pass on %s", kl_device_name(ctx->device));
}

kl_status mla_forward(kl_ctx *ctx, const mla_problem *p, void *workspace, size_t bytes)
{
    const kl_variant *v = ctx ? mla_pick(ctx->device, NULL, p, KL_FORWARD) : NULL;
    return v ? v->forward(ctx, p, workspace, bytes) : no_variant(ctx);
}

kl_status mla_backward(kl_ctx *ctx, const mla_problem *p, const mla_grads *g, void *workspace, size_t bytes)
{
    const kl_variant *v = ctx ? mla_pick(ctx->device, NULL, p, KL_BACKWARD) : NULL;
    return v ? v->backward(ctx, p, g, workspace, bytes) : no_variant(ctx);
}
