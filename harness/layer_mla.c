/* The MLA layer: query projection, latent projection and its norm, attention, output projection. */
#include "harness/model_internal.h"

static int64_t query_width(const kl_config *c) { return c->num_heads * (c->qk_nope_head_dim + c->qk_rope_head_dim); }
static int64_t latent_width(const kl_config *c) { return c->kv_lora_rank + c->qk_rope_head_dim; }
static bool rotates(const kl_config *c) { return !c->mla_use_nope && c->qk_rope_head_dim > 0; }

void kl_mla_carve(kl_arena *a, const kl_config *c, int64_t T, kl_mla_acts *acts)
{
    size_t n = (size_t)T;
    acts->q = KL_TAKE(a, float, kl_mul(n, (size_t)query_width(c), &a->overflow));
    acts->kv = KL_TAKE(a, float, kl_mul(n, (size_t)latent_width(c), &a->overflow));
    acts->latent = KL_TAKE(a, float, kl_mul(n, (size_t)latent_width(c), &a->overflow));
    acts->o = KL_TAKE(a, float, kl_mul(n, (size_t)(c->num_heads * c->v_head_dim), &a->overflow));
    acts->lse = KL_TAKE(a, float, kl_mul(n, (size_t)c->num_heads, &a->overflow));
}

static mla_problem attention_of(const kl_call *c, int64_t l, const kl_mla_acts *a)
{
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    mla_problem p = {
        .N = c->N, .H = k->num_heads, .R = k->kv_lora_rank, .Dn = k->qk_nope_head_dim, .Dr = k->qk_rope_head_dim,
        .Dv = k->v_head_dim, .cu_q = c->cu, .kv_start = c->kv_start, .kv_len = c->kv_len,
        .weight_dtype = w->kv_b.dtype, .q = a->q, .kv_b = w->kv_b.data, .o = a->o, .lse = a->lse,
        .latent = a->latent, .latent_rows = c->T, .latent_dtype = KL_F32,
    };
    if (c->cache) {
        p.latent = c->cache->latent[l];
        p.latent_rows = c->cache->slots * c->cache->capacity;
        p.latent_dtype = c->cache->latent_dtype;
    }
    return p;
}

static const kl_variant *pick(const kl_call *c, const mla_problem *p, kl_pass pass)
{
    const char *name = c->m->mla_variant;
    const kl_variant *v = mla_pick(c->m->ctx->device, name, p, pass);
    return v || pass == KL_FORWARD || !name ? v : mla_pick(c->m->ctx->device, NULL, p, pass);
}

static kl_status missing(const kl_call *c)
{
    return kl_error(KL_EUNSUPPORTED, "mla variant: none called '%s' for this model on %s",
                    c->m->mla_variant ? c->m->mla_variant : "(any)", kl_device_name(c->m->ctx->device));
}

size_t kl_mla_scratch(const kl_call *c, int64_t l, const kl_mla_acts *a, kl_pass pass)
{
    mla_problem p = attention_of(c, l, a);
    const kl_variant *v = pick(c, &p, pass);
    return v ? v->workspace(c->m->ctx, &p, pass) : 0;
}

/* Queries and latent rows turn by their positions; inverse: their gradients turn back. */
static kl_status rotate(const kl_call *c, float *q, float *latent, bool inverse)
{
    const kl_config *k = &c->m->config;
    int64_t head = k->qk_nope_head_dim + k->qk_rope_head_dim;
    KL_TRY(c->m->ops->rope(c->m->ctx, q + k->qk_nope_head_dim, c->T, k->num_heads, k->qk_rope_head_dim, query_width(k), head,
                           c->position, k->rope_theta, inverse));
    return c->m->ops->rope(c->m->ctx, latent + k->kv_lora_rank, c->T, 1, k->qk_rope_head_dim, latent_width(k), k->qk_rope_head_dim,
                           c->position, k->rope_theta, inverse);
}

kl_status kl_mla_layer(const kl_call *c, int64_t l, const float *h, const kl_mla_acts *a, float *out)
{
    const kl_ops *ops = c->m->ops;
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    kl_ctx *ctx = c->m->ctx;
    int64_t row = latent_width(k);
    KL_TRY(ops->linear(ctx, &w->mla_q, c->T, h, a->q, false));
    /* latent = [norm(kv[:R]) | kv[R:]] */
    KL_TRY(ops->linear(ctx, &w->kv_a, c->T, h, a->kv, false));
    KL_TRY(ops->copy(ctx, a->latent, a->kv, (size_t)(c->T * row) * sizeof *a->kv));
    KL_TRY(ops->rmsnorm(ctx, &w->kv_a_norm, k->kv_a_norm_eps, c->T, k->kv_lora_rank, a->kv, row, a->latent, row));
    if (rotates(k))
        KL_TRY(rotate(c, a->q, a->latent, false));
    if (c->cache)
        KL_TRY(ops->store_latent(ctx, a->latent, c->T, row, c->row, c->cache->latent[l], c->cache->latent_dtype));

    mla_problem p = attention_of(c, l, a);
    const kl_variant *v = pick(c, &p, KL_FORWARD);
    if (!v)
        return missing(c);
    KL_TRY(v->forward(ctx, &p, c->scratch, c->scratch_bytes));
    return ops->linear(ctx, &w->o_proj, c->T, a->o, out, true);
}

kl_status kl_mla_layer_backward(const kl_call *c, int64_t l, const float *h, const kl_mla_acts *a, const float *dout,
                                const kl_mla_acts *d, float *dh, kl_layer *g)
{
    const kl_ops *ops = c->m->ops;
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    kl_ctx *ctx = c->m->ctx;
    int64_t row = latent_width(k);

    /* forward: out = o_proj o, o = attention(q, latent) */
    KL_TRY(ops->linear_backward(ctx, &w->o_proj, c->T, a->o, dout, d->o, false, &g->o_proj));
    mla_problem p = attention_of(c, l, a);
    mla_grads dp = {.d_o = d->o, .dq = d->q, .dlatent = d->latent, .dkv_b = g->kv_b.data, .o = a->o, .lse = a->lse};
    const kl_variant *v = pick(c, &p, KL_BACKWARD);
    if (!v)
        return missing(c);
    KL_TRY(v->backward(ctx, &p, &dp, c->scratch, c->scratch_bytes));
    if (rotates(k))
        KL_TRY(rotate(c, d->q, d->latent, true));

    /* forward: latent = [norm(kv[:R]) | kv[R:]], kv = kv_a h, q = q_proj h */
    KL_TRY(ops->copy(ctx, d->kv, d->latent, (size_t)(c->T * row) * sizeof *d->kv));
    KL_TRY(ops->rmsnorm_backward(ctx, &w->kv_a_norm, k->kv_a_norm_eps, c->T, k->kv_lora_rank, a->kv, row, d->latent, row,
                                 d->kv, row, false, &g->kv_a_norm));
    KL_TRY(ops->linear_backward(ctx, &w->kv_a, c->T, h, d->kv, dh, false, &g->kv_a));
    return ops->linear_backward(ctx, &w->mla_q, c->T, h, d->q, dh, true, &g->mla_q);
}
