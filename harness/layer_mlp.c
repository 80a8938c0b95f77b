/* The second half of a layer: the mixture of experts, or the dense MLP, which is a shared expert alone. */
#include "harness/model_internal.h"

static moe_problem experts_of(const kl_call *c, int64_t l, const kl_layer_acts *a)
{
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    moe_problem p = {.T = c->T, .D = k->hidden_size, .x = a->h_mlp, .y = a->y};
    if (!k->sparse[l]) {
        p.Is = k->intermediate_size;
        p.weight_dtype = w->gate_proj.dtype;
        p.shared_w1 = w->gate_proj.data, p.shared_w3 = w->up_proj.data, p.shared_w2 = w->down_proj.data;
        return p;
    }
    p.E = k->num_experts, p.I = k->moe_intermediate_size, p.top_k = k->top_k;
    p.Is = k->num_shared_experts * k->moe_intermediate_size;
    p.n_group = k->n_group, p.topk_group = k->topk_group;
    p.router_kind = k->router_kind, p.renormalize = k->moe_renormalize, p.biased_weights = k->moe_biased_weights;
    p.scale = k->routed_scaling_factor;
    p.weight_dtype = w->w1[0].dtype;
    p.router_dtype = w->router.dtype;
    p.router = w->router.data, p.bias = w->router_bias.data;
    p.w1 = w->w1_data, p.w3 = w->w3_data, p.w2 = w->w2_data;
    p.shared_w1 = w->shared_gate.data, p.shared_w3 = w->shared_up.data, p.shared_w2 = w->shared_down.data;
    p.chosen = a->chosen;
    return p;
}

static const kl_variant *pick(const kl_call *c, const moe_problem *p, kl_pass pass)
{
    const char *name = c->m->moe_variant;
    const kl_variant *v = moe_pick(c->m->ctx->device, name, p, pass);
    return v || pass == KL_FORWARD || !name ? v : moe_pick(c->m->ctx->device, NULL, p, pass);
}

static kl_status missing(const kl_call *c)
{
    return kl_error(KL_EUNSUPPORTED, "moe variant: none called '%s' for this model on %s",
                    c->m->moe_variant ? c->m->moe_variant : "(any)", kl_device_name(c->m->ctx->device));
}

size_t kl_mlp_scratch(const kl_call *c, int64_t l, const kl_layer_acts *a, kl_pass pass)
{
    moe_problem p = experts_of(c, l, a);
    const kl_variant *v = pick(c, &p, pass);
    return v ? v->workspace(c->m->ctx, &p, pass) : 0;
}

kl_status kl_mlp_layer(const kl_call *c, int64_t l, const kl_layer_acts *a)
{
    moe_problem p = experts_of(c, l, a);
    const kl_variant *v = pick(c, &p, KL_FORWARD);
    if (!v)
        return missing(c);
    return v->forward(c->m->ctx, &p, c->scratch, c->scratch_bytes);
}

kl_status kl_mlp_layer_backward(const kl_call *c, int64_t l, const kl_layer_acts *a, const float *dout, float *dh, kl_layer *g)
{
    moe_problem p = experts_of(c, l, a);
    moe_grads d = {.dy = dout, .dx = dh};
    p.chosen = NULL;
    if (p.E == 0) {
        d.dshared_w1 = g->gate_proj.data, d.dshared_w3 = g->up_proj.data, d.dshared_w2 = g->down_proj.data;
    } else {
        d.drouter = g->router.data;
        d.dw1 = (float *const *)g->w1_data, d.dw3 = (float *const *)g->w3_data, d.dw2 = (float *const *)g->w2_data;
        d.dshared_w1 = g->shared_gate.data, d.dshared_w3 = g->shared_up.data, d.dshared_w2 = g->shared_down.data;
    }
    const kl_variant *v = pick(c, &p, KL_BACKWARD);
    if (!v)
        return missing(c);
    return v->backward(c->m->ctx, &p, &d, c->scratch, c->scratch_bytes);
}
