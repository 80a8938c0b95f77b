/* Which tensors the problems of each family have, and how they lie on a device. */
#include "harness/problem_device.h"

/* An empty tensor may have the address of the next one. */
static const kl_case_tensor *tensor_of(const kl_case *c, const float *out)
{
    for (int i = 0; i < c->count; i++)
        if (c->tensor[i].out == out && c->tensor[i].T * c->tensor[i].H * c->tensor[i].D > 0)
            return &c->tensor[i];
    return NULL;
}

kl_part *kl_part_add(kl_image *im, const kl_case *c, const char *name, kl_part_kind kind, const void *in, void *out, const void *field, int64_t *stride,
                     int64_t rows, int64_t width)
{
    if (!in && !out)
        return NULL;
    const kl_placement *at = &c->place;
    kl_part *p = &im->part[im->count++];
    const kl_case_tensor *t = out ? tensor_of(c, out) : NULL;
    *p = (kl_part){.name = name, .kind = kind, .in = in, .out = out, .gradient = t && t->gradient, .accumulates = t && t->accumulates,
                   .field = {field}, .stride = stride, .rows = rows, .width = width,
                   .dtype = kind == KL_PART_ACTIVATION ? at->dtype : kind == KL_PART_STATE ? at->state_dtype : KL_F32,
                   .pitch = width + (stride ? at->gap : 0)};
    int64_t held = kind == KL_PART_STATE && at->pool ? kl_pool_slots(rows) : rows;
    p->bytes = held ? (size_t)(held * p->pitch - (p->pitch - width)) * kl_dtype_size(p->dtype) : 0;
    return p;
}

kl_part *kl_part_add_stored(kl_image *im, const kl_case *c, const char *name, kl_dtype dtype, const void *in, const void *field, int64_t rows, int64_t width)
{
    kl_part *p = kl_part_add(im, c, name, KL_PART_STORED, in, NULL, field, NULL, rows, width);
    if (p) {
        p->dtype = dtype;
        p->bytes = (size_t)(rows * width) * kl_dtype_size(dtype);
    }
    return p;
}

void kl_part_through_table(kl_part *p)
{
    if (p)
        p->tabled = true;
}

static void list_kda(kl_image *im, const kl_case *c)
{
    const kda_problem *h = &c->problem.kda;
    kda_problem *p = &im->on.problem.kda;
    const kda_grads *hg = &c->grads.kda;
    kda_grads *g = &im->on.grads.kda;
    int64_t tokens = h->B * h->T, keys = h->H * h->K, values = h->HV * h->V, gates = h->HV * h->G, state = h->HV * h->K * h->V;
    p->dtype = c->place.dtype;
    p->state_dtype = c->place.state_dtype;
    kl_part_add(im, c, "q", KL_PART_ACTIVATION, h->q, NULL, &p->q, &p->q_stride, tokens, keys);
    kl_part_add(im, c, "k", KL_PART_ACTIVATION, h->k, NULL, &p->k, &p->k_stride, tokens, keys);
    kl_part_add(im, c, "v", KL_PART_ACTIVATION, h->v, NULL, &p->v, &p->v_stride, tokens, values);
    kl_part_add(im, c, "g", KL_PART_ACTIVATION, h->g, NULL, &p->g, &p->g_stride, tokens, gates);
    kl_part_add(im, c, "beta", KL_PART_ACTIVATION, h->beta, NULL, &p->beta, &p->beta_stride, tokens, h->HV);
    kl_part_add(im, c, "A_log", KL_PART_PLAIN, h->A_log, NULL, &p->A_log, NULL, 1, h->HV);
    kl_part_add(im, c, "dt_bias", KL_PART_PLAIN, h->dt_bias, NULL, &p->dt_bias, NULL, 1, gates);
    if (c->place.in_place && h->h0 && h->ht && !c->backward) {
        kl_part *both = kl_part_add(im, c, "ht", KL_PART_STATE, h->h0, h->ht, &p->h0, NULL, h->N, state);
        both->field[1] = &p->ht;
    } else {
        kl_part_add(im, c, "h0", KL_PART_STATE, h->h0, NULL, &p->h0, NULL, h->N, state);
        kl_part_add(im, c, "ht", KL_PART_STATE, NULL, h->ht, &p->ht, NULL, h->N, state);
    }
    kl_part_add(im, c, "o", KL_PART_ACTIVATION, NULL, h->o, &p->o, &p->o_stride, tokens, values);
    kl_part_add(im, c, "chunk_states", KL_PART_PLAIN, NULL, h->chunk_states, &p->chunk_states, NULL, kda_chunk_count(h), state);
    kl_part_add(im, c, "token_states", KL_PART_PLAIN, NULL, h->token_states, &p->token_states, NULL, tokens, state);
    kl_part_add(im, c, "do", KL_PART_ACTIVATION, hg->d_o, NULL, &g->d_o, &p->o_stride, tokens, values);
    kl_part_add(im, c, "dht", KL_PART_PLAIN, hg->dht, NULL, &g->dht, NULL, h->N, state);
    kl_part_add(im, c, "dq", KL_PART_ACTIVATION, NULL, hg->dq, &g->dq, &p->q_stride, tokens, keys);
    kl_part_add(im, c, "dk", KL_PART_ACTIVATION, NULL, hg->dk, &g->dk, &p->k_stride, tokens, keys);
    kl_part_add(im, c, "dv", KL_PART_ACTIVATION, NULL, hg->dv, &g->dv, &p->v_stride, tokens, values);
    kl_part_add(im, c, "dg", KL_PART_ACTIVATION, NULL, hg->dg, &g->dg, &p->g_stride, tokens, gates);
    kl_part_add(im, c, "dbeta", KL_PART_ACTIVATION, NULL, hg->dbeta, &g->dbeta, &p->beta_stride, tokens, h->HV);
    kl_part_add(im, c, "dA_log", KL_PART_PLAIN, NULL, hg->dA_log, &g->dA_log, NULL, 1, h->HV);
    kl_part_add(im, c, "ddt_bias", KL_PART_PLAIN, NULL, hg->ddt_bias, &g->ddt_bias, NULL, 1, gates);
    kl_part_add(im, c, "dh0", KL_PART_PLAIN, NULL, hg->dh0, &g->dh0, NULL, h->N, state);
}

static void list_dplr(kl_image *im, const kl_case *c)
{
    const dplr_problem *h = &c->problem.dplr;
    dplr_problem *p = &im->on.problem.dplr;
    p->dtype = c->place.dtype;
    int64_t tokens = h->B * h->T, keys = h->H * h->K, values = h->H * h->V, state = keys * h->V;
    kl_part_add(im, c, "q", KL_PART_ACTIVATION, h->q, NULL, &p->q, NULL, tokens, keys);
    kl_part_add(im, c, "k", KL_PART_ACTIVATION, h->k, NULL, &p->k, NULL, tokens, keys);
    kl_part_add(im, c, "a", KL_PART_ACTIVATION, h->a, NULL, &p->a, NULL, tokens, keys);
    kl_part_add(im, c, "b", KL_PART_ACTIVATION, h->b, NULL, &p->b, NULL, tokens, keys);
    kl_part_add(im, c, "g", KL_PART_ACTIVATION, h->g, NULL, &p->g, NULL, tokens, keys);
    kl_part_add(im, c, "v", KL_PART_ACTIVATION, h->v, NULL, &p->v, NULL, tokens, values);
    kl_part_add(im, c, "h0", KL_PART_PLAIN, h->h0, NULL, &p->h0, NULL, h->N, state);
    kl_part_add(im, c, "ht", KL_PART_PLAIN, NULL, h->ht, &p->ht, NULL, h->N, state);
    kl_part_add(im, c, "o", KL_PART_ACTIVATION, NULL, h->o, &p->o, NULL, tokens, values);
}

static void list_mla(kl_image *im, const kl_case *c)
{
    const mla_problem *h = &c->problem.mla;
    mla_problem *p = &im->on.problem.mla;
    const mla_grads *hg = &c->grads.mla;
    mla_grads *g = &im->on.grads.mla;
    int64_t tokens = h->N ? h->cu_q[h->N] : 0, queries = h->H * (h->Dn + h->Dr), values = h->H * h->Dv, width = h->R + h->Dr;
    int64_t weights = h->H * (h->Dn + h->Dv);
    p->dtype = c->place.dtype;
    kl_part_add(im, c, "q", KL_PART_ACTIVATION, h->q, NULL, &p->q, &p->q_stride, tokens, queries);
    kl_part_add_stored(im, c, "latent", h->latent_dtype, h->latent, &p->latent, h->latent_rows, width);
    kl_part_add_stored(im, c, "kv_b", h->weight_dtype, h->kv_b, &p->kv_b, weights, h->R);
    kl_part_add(im, c, "o", KL_PART_ACTIVATION, NULL, h->o, &p->o, NULL, tokens, values);
    kl_part_add(im, c, "lse", KL_PART_PLAIN, NULL, h->lse, &p->lse, NULL, tokens, h->H);
    kl_part_add(im, c, "do", KL_PART_ACTIVATION, hg->d_o, NULL, &g->d_o, NULL, tokens, values);
    kl_part_add(im, c, "given o", KL_PART_ACTIVATION, hg->o, NULL, &g->o, NULL, tokens, values);
    kl_part_add(im, c, "given lse", KL_PART_PLAIN, hg->lse, NULL, &g->lse, NULL, tokens, h->H);
    kl_part_add(im, c, "dq", KL_PART_ACTIVATION, NULL, hg->dq, &g->dq, &p->q_stride, tokens, queries);
    kl_part_add(im, c, "dlatent", KL_PART_PLAIN, NULL, hg->dlatent, &g->dlatent, NULL, h->latent_rows, width);
    kl_part_add(im, c, "dkv_b", KL_PART_PLAIN, NULL, hg->dkv_b, &g->dkv_b, NULL, weights, h->R);
}

static void list_moe(kl_image *im, const kl_case *c)
{
    const moe_problem *h = &c->problem.moe;
    moe_problem *p = &im->on.problem.moe;
    const moe_grads *hg = &c->grads.moe;
    moe_grads *g = &im->on.grads.moe;
    int64_t expert = h->I * h->D, shared = h->Is * h->D;
    p->dtype = p->router_dtype = c->place.dtype;
    kl_part_add(im, c, "x", KL_PART_ACTIVATION, h->x, NULL, &p->x, NULL, h->T, h->D);
    if (h->E) {
        kl_part_add(im, c, "router", KL_PART_ACTIVATION, h->router, NULL, &p->router, NULL, h->E, h->D);
        kl_part_add(im, c, "bias", KL_PART_PLAIN, h->bias, NULL, &p->bias, NULL, 1, h->E);
        kl_part_through_table(kl_part_add_stored(im, c, "w1", h->weight_dtype, h->w1[0], &p->w1, h->E, expert));
        kl_part_through_table(kl_part_add_stored(im, c, "w3", h->weight_dtype, h->w3[0], &p->w3, h->E, expert));
        kl_part_through_table(kl_part_add_stored(im, c, "w2", h->weight_dtype, h->w2[0], &p->w2, h->E, expert));
    }
    kl_part_add_stored(im, c, "shared_w1", h->weight_dtype, h->shared_w1, &p->shared_w1, 1, shared);
    kl_part_add_stored(im, c, "shared_w3", h->weight_dtype, h->shared_w3, &p->shared_w3, 1, shared);
    kl_part_add_stored(im, c, "shared_w2", h->weight_dtype, h->shared_w2, &p->shared_w2, 1, shared);
    kl_part_add(im, c, "y", KL_PART_ACTIVATION, NULL, h->y, &p->y, NULL, h->T, h->D);
    kl_part_add(im, c, "dy", KL_PART_ACTIVATION, hg->dy, NULL, &g->dy, NULL, h->T, h->D);
    kl_part_add(im, c, "dx", KL_PART_ACTIVATION, NULL, hg->dx, &g->dx, NULL, h->T, h->D);
    kl_part_add(im, c, "drouter", KL_PART_PLAIN, NULL, hg->drouter, &g->drouter, NULL, h->E, h->D);
    kl_part_through_table(kl_part_add(im, c, "dw1", KL_PART_PLAIN, NULL, hg->dw1 ? hg->dw1[0] : NULL, &g->dw1, NULL, h->E, expert));
    kl_part_through_table(kl_part_add(im, c, "dw3", KL_PART_PLAIN, NULL, hg->dw3 ? hg->dw3[0] : NULL, &g->dw3, NULL, h->E, expert));
    kl_part_through_table(kl_part_add(im, c, "dw2", KL_PART_PLAIN, NULL, hg->dw2 ? hg->dw2[0] : NULL, &g->dw2, NULL, h->E, expert));
    kl_part_add(im, c, "dshared_w1", KL_PART_PLAIN, NULL, hg->dshared_w1, &g->dshared_w1, NULL, 1, shared);
    kl_part_add(im, c, "dshared_w3", KL_PART_PLAIN, NULL, hg->dshared_w3, &g->dshared_w3, NULL, 1, shared);
    kl_part_add(im, c, "dshared_w2", KL_PART_PLAIN, NULL, hg->dshared_w2, &g->dshared_w2, NULL, 1, shared);
}

kl_status kl_parts_list(kl_image *im, const kl_case *c)
{
    im->on = *c;
    switch (c->family) {
    case KL_FAMILY_KDA: list_kda(im, c); return kl_ok();
    case KL_FAMILY_DPLR: list_dplr(im, c); return kl_ok();
    case KL_FAMILY_MLA: list_mla(im, c); return kl_ok();
    case KL_FAMILY_MOE: list_moe(im, c); return kl_ok();
    }
    return kl_error(KL_EINVAL, "%s: has no place on a device", kl_family_name(c->family));
}

