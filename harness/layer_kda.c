/* The KDA layer: projections, short convolutions, the operator, gated norm, output projection. */
#include "harness/model_internal.h"

static int64_t width(const kl_config *c) { return c->kda_heads * c->kda_head_dim; }
static bool has_output_gate(const kl_config *c) { return c->output_gate != KDA_OUT_NONE; }

void kl_kda_carve(kl_arena *a, const kl_config *c, int64_t T, bool backward, kl_kda_acts *acts)
{
    size_t n = (size_t)T, P = (size_t)width(c), r = (size_t)c->kda_head_dim, HV = (size_t)c->kda_heads;
    *acts = (kl_kda_acts){0};
    acts->q_in = KL_TAKE(a, float, kl_mul(n, P, &a->overflow));
    acts->k_in = KL_TAKE(a, float, kl_mul(n, P, &a->overflow));
    acts->v_in = KL_TAKE(a, float, kl_mul(n, P, &a->overflow));
    acts->q = KL_TAKE(a, float, kl_mul(n, P, &a->overflow));
    acts->k = KL_TAKE(a, float, kl_mul(n, P, &a->overflow));
    acts->v = KL_TAKE(a, float, kl_mul(n, P, &a->overflow));
    acts->f = KL_TAKE(a, float, kl_mul(n, r, &a->overflow));
    acts->g = KL_TAKE(a, float, kl_mul(n, HV * (size_t)c->gate_values, &a->overflow));
    acts->beta = KL_TAKE(a, float, kl_mul(n, HV, &a->overflow));
    acts->z_in = KL_TAKE(a, float, kl_mul(n, r, &a->overflow));
    acts->o = acts->q_in, acts->z = acts->k_in, acts->y = acts->v_in;
    if (backward) {
        acts->o = KL_TAKE(a, float, kl_mul(n, P, &a->overflow));
        acts->z = KL_TAKE(a, float, kl_mul(n, P, &a->overflow));
        acts->y = KL_TAKE(a, float, kl_mul(n, P, &a->overflow));
    }
}

static kda_problem operator_of(const kl_call *c, int64_t l, const kl_kda_acts *a)
{
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    kda_problem p = {
        .B = 1, .T = c->T, .N = c->N, .H = k->kda_heads, .HV = k->kda_heads, .K = k->kda_head_dim, .V = k->kda_head_dim,
        .G = k->gate_values, .cu_seqlens = c->cu, .qk_l2norm = true, .beta_kind = k->beta_kind,
        .q = a->q, .k = a->k, .v = a->v, .beta = a->beta, .o = a->o,
    };
    if (k->gate_values > 0) {
        p.gate = k->gate;
        p.lower_bound = k->gate == KDA_GATE_BOUNDED ? k->gate_lower_bound : 0.0f;
        p.g = a->g;
        p.A_log = w->A_log.data;
        p.dt_bias = w->dt_bias.data;
    }
    if (c->cache) {
        p.h0 = p.ht = c->cache->kda_state[l];
        p.state_index = c->slot;
        p.state_pool = c->cache->slots;
    }
    return p;
}

/* which: 0 q, 1 k, 2 v. */
static kda_conv_problem convolution_of(const kl_call *c, int64_t l, int which, const float *x, float *y)
{
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    const kl_param *taps = which == 0 ? &w->q_conv : which == 1 ? &w->k_conv : &w->v_conv;
    kda_conv_problem p = {
        .B = 1, .T = c->T, .N = c->N, .cu_seqlens = c->cu, .D = width(k), .W = k->conv_width, .silu = true,
        .x = x, .y = y, .weight = taps->data, .weight_dtype = taps->dtype,
    };
    if (k->conv_width == 0) {
        p.W = 1;
        p.weight = c->m->unit_taps;
        p.weight_dtype = KL_F32;
    } else if (c->cache && k->conv_width > 1) {
        size_t pool = (size_t)(c->cache->slots * width(k) * (k->conv_width - 1)) * kl_dtype_size(c->cache->tail_dtype);
        p.tail_in = p.tail_out = (char *)c->cache->conv_tail[l] + (size_t)which * pool;
        p.tail_dtype = c->cache->tail_dtype;
        p.state_index = c->slot;
    }
    return p;
}

static kl_status convolve(const kl_call *c, int64_t l, int which, const float *x, float *y)
{
    kda_conv_problem p = convolution_of(c, l, which, x, y);
    return c->m->ops->conv(c->m->ctx, &p);
}

static kda_gated_norm_problem norm_of(const kl_call *c, int64_t l, const kl_kda_acts *a)
{
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    return (kda_gated_norm_problem){
        .rows = c->T * k->kda_heads, .V = k->kda_head_dim, .gate_kind = k->output_gate, .eps = k->rms_norm_eps,
        .x = a->o, .gate = has_output_gate(k) ? a->z : NULL,
        .weight = w->o_norm.data, .weight_dtype = w->o_norm.dtype, .y = a->y,
    };
}

static const kl_variant *pick(const kl_call *c, const kda_problem *p, kl_pass pass)
{
    const char *name = c->m->kda_variant;
    const kl_variant *v = kda_pick(c->m->ctx->device, name, p, pass);
    return v || pass == KL_FORWARD || !name ? v : kda_pick(c->m->ctx->device, NULL, p, pass);
}

static kl_status missing(const kl_call *c)
{
    return kl_error(KL_EUNSUPPORTED, "kda variant: none called '%s' for this model on %s",
                    c->m->kda_variant ? c->m->kda_variant : "(any)", kl_device_name(c->m->ctx->device));
}

size_t kl_kda_scratch(const kl_call *c, int64_t l, const kl_kda_acts *a, kl_pass pass)
{
    kda_problem p = operator_of(c, l, a);
    const kl_variant *v = pick(c, &p, pass);
    return v ? v->workspace(c->m->ctx, &p, pass) : 0;
}

kl_status kl_kda_layer(const kl_call *c, int64_t l, const float *h, const kl_kda_acts *a, float *out)
{
    const kl_ops *ops = c->m->ops;
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    kl_ctx *ctx = c->m->ctx;
    KL_TRY(ops->linear(ctx, &w->q_proj, c->T, h, a->q_in, false));
    KL_TRY(ops->linear(ctx, &w->k_proj, c->T, h, a->k_in, false));
    KL_TRY(ops->linear(ctx, &w->v_proj, c->T, h, a->v_in, false));
    KL_TRY(convolve(c, l, 0, a->q_in, a->q));
    KL_TRY(convolve(c, l, 1, a->k_in, a->k));
    KL_TRY(convolve(c, l, 2, a->v_in, a->v));
    if (k->gate_values > 0) {
        KL_TRY(ops->linear(ctx, &w->f_a, c->T, h, a->f, false));
        KL_TRY(ops->linear(ctx, &w->f_b, c->T, a->f, a->g, false));
    }
    KL_TRY(ops->linear(ctx, &w->b_proj, c->T, h, a->beta, false));

    kda_problem p = operator_of(c, l, a);
    const kl_variant *v = pick(c, &p, KL_FORWARD);
    if (!v)
        return missing(c);
    KL_TRY(v->forward(ctx, &p, c->scratch, c->scratch_bytes));

    if (has_output_gate(k)) {
        KL_TRY(ops->linear(ctx, &w->g_a, c->T, h, a->z_in, false));
        KL_TRY(ops->linear(ctx, &w->g_b, c->T, a->z_in, a->z, false));
    }
    kda_gated_norm_problem norm = norm_of(c, l, a);
    KL_TRY(ops->gated_norm(ctx, &norm));
    return ops->linear(ctx, &w->o_proj, c->T, a->y, out, true);
}

/* Through the convolution and the projection of q, k or v; dh += . */
static kl_status backward_qkv(const kl_call *c, int64_t l, int which, const float *h, const float *x, const float *dy,
                              float *dx, const kl_param *proj, float *dh, kl_param *dtaps, kl_param *dproj)
{
    kda_conv_problem p = convolution_of(c, l, which, x, NULL);
    kda_conv_grads g = {.dy = dy, .dx = dx, .dweight = c->m->config.conv_width > 0 ? dtaps->data : NULL};
    KL_TRY(c->m->ops->conv_backward(c->m->ctx, &p, &g));
    return c->m->ops->linear_backward(c->m->ctx, proj, c->T, h, dx, dh, true, dproj);
}

kl_status kl_kda_layer_backward(const kl_call *c, int64_t l, const float *h, const kl_kda_acts *a, const float *dout,
                                const kl_kda_acts *d, float *dh, kl_layer *g)
{
    const kl_ops *ops = c->m->ops;
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    kl_ctx *ctx = c->m->ctx;

    /* forward: out = o_proj y, y = norm(o) (.) act(z) */
    KL_TRY(ops->linear_backward(ctx, &w->o_proj, c->T, a->y, dout, d->y, false, &g->o_proj));
    kda_gated_norm_problem norm = norm_of(c, l, a);
    kda_gated_norm_grads dnorm = {.dy = d->y, .dx = d->o, .dgate = has_output_gate(k) ? d->z : NULL, .dweight = g->o_norm.data};
    KL_TRY(ops->gated_norm_backward(ctx, &norm, &dnorm));

    /* forward: o = KDA(q, k, v, g, beta) */
    kda_problem p = operator_of(c, l, a);
    kda_grads dp = {.d_o = d->o, .dq = d->q, .dk = d->k, .dv = d->v, .dbeta = d->beta};
    if (k->gate_values > 0) {
        dp.dg = d->g;
        dp.dA_log = g->A_log.data;
        dp.ddt_bias = g->dt_bias.data;
    }
    const kl_variant *v = pick(c, &p, KL_BACKWARD);
    if (!v)
        return missing(c);
    KL_TRY(v->backward(ctx, &p, &dp, c->scratch, c->scratch_bytes));

    /* forward: beta = b h, g = f_b f_a h, z = g_b g_a h, q = conv(q_proj h) */
    KL_TRY(ops->linear_backward(ctx, &w->b_proj, c->T, h, d->beta, dh, false, &g->b_proj));
    if (k->gate_values > 0) {
        KL_TRY(ops->linear_backward(ctx, &w->f_b, c->T, a->f, d->g, d->f, false, &g->f_b));
        KL_TRY(ops->linear_backward(ctx, &w->f_a, c->T, h, d->f, dh, true, &g->f_a));
    }
    if (has_output_gate(k)) {
        KL_TRY(ops->linear_backward(ctx, &w->g_b, c->T, a->z_in, d->z, d->z_in, false, &g->g_b));
        KL_TRY(ops->linear_backward(ctx, &w->g_a, c->T, h, d->z_in, dh, true, &g->g_a));
    }
    KL_TRY(backward_qkv(c, l, 0, h, a->q_in, d->q, d->q_in, &w->q_proj, dh, &g->q_conv, &g->q_proj));
    KL_TRY(backward_qkv(c, l, 1, h, a->k_in, d->k, d->k_in, &w->k_proj, dh, &g->k_conv, &g->k_proj));
    return backward_qkv(c, l, 2, h, a->v_in, d->v, d->v_in, &w->v_proj, dh, &g->v_conv, &g->v_proj);
}
