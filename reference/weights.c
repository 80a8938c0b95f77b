#include "reference/weights.h"

#include <stdio.h>

/* One walk over the parameters: every visit goes through fn until one fails. */
typedef struct {
    ref_param_fn fn;
    void *user;
    int64_t layer;
    int status;
} walk;

static void visit(walk *v, const char *name, int64_t rows, int64_t columns, real **param)
{
    if (v->status == 0)
        v->status = v->fn(v->user, name, rows, columns, param);
}

/* "model.layers.LAYER." before the name */
static void visit_in_layer(walk *v, const char *name, int64_t rows, int64_t columns, real **param)
{
    char full[128];
    snprintf(full, sizeof full, "model.layers.%lld.%s", (long long)v->layer, name);
    visit(v, full, rows, columns, param);
}

static void each_of_kda(const ref_config *c, ref_layer *w, walk *v)
{
    int64_t D = c->D, H = c->kda_heads, r = c->kda_head_dim, P = H * r, W = c->conv_width;
    visit_in_layer(v, "self_attn.q_proj.weight", P, D, &w->q_proj);
    visit_in_layer(v, "self_attn.k_proj.weight", P, D, &w->k_proj);
    visit_in_layer(v, "self_attn.v_proj.weight", P, D, &w->v_proj);
    if (W > 0) {
        visit_in_layer(v, "self_attn.q_conv1d.weight", P, W, &w->q_conv);
        visit_in_layer(v, "self_attn.k_conv1d.weight", P, W, &w->k_conv);
        visit_in_layer(v, "self_attn.v_conv1d.weight", P, W, &w->v_conv);
    }
    if (c->G > 0) {
        visit_in_layer(v, "self_attn.f_a_proj.weight", r, D, &w->f_a);
        visit_in_layer(v, "self_attn.f_b_proj.weight", H * c->G, r, &w->f_b);
        visit_in_layer(v, "self_attn.A_log", 1, H, &w->A_log);
        visit_in_layer(v, "self_attn.dt_bias", 1, H * c->G, &w->dt_bias);
    }
    visit_in_layer(v, "self_attn.b_proj.weight", H, D, &w->b_proj);
    if (c->output_gate != REF_OUTPUT_GATE_NONE) {
        visit_in_layer(v, "self_attn.g_a_proj.weight", r, D, &w->g_a);
        visit_in_layer(v, "self_attn.g_b_proj.weight", P, r, &w->g_b);
    }
    visit_in_layer(v, "self_attn.o_norm.weight", 1, r, &w->o_norm);
    visit_in_layer(v, "self_attn.o_proj.weight", D, P, &w->o_proj);
}

static void each_of_mla(const ref_config *c, ref_layer *w, walk *v)
{
    visit_in_layer(v, "self_attn.q_proj.weight", c->heads * (c->Dn + c->Dr), c->D, &w->mla_q);
    visit_in_layer(v, "self_attn.kv_a_proj_with_mqa.weight", c->R + c->Dr, c->D, &w->kv_a);
    visit_in_layer(v, "self_attn.kv_a_layernorm.weight", 1, c->R, &w->kv_a_norm);
    visit_in_layer(v, "self_attn.kv_b_proj.weight", c->heads * (c->Dn + c->Dv), c->R, &w->kv_b);
    visit_in_layer(v, "self_attn.o_proj.weight", c->D, c->heads * c->Dv, &w->o_proj);
}

static void each_of_moe(const ref_config *c, ref_layer *w, walk *v)
{
    char name[64];
    visit_in_layer(v, "block_sparse_moe.gate.weight", c->E, c->D, &w->router);
    visit_in_layer(v, "block_sparse_moe.gate.e_score_correction_bias", 1, c->E, &w->router_bias);
    for (int64_t e = 0; e < c->E; e++) {
        snprintf(name, sizeof name, "block_sparse_moe.experts.%lld.w1.weight", (long long)e);
        visit_in_layer(v, name, c->I, c->D, &w->w1[e]);
        snprintf(name, sizeof name, "block_sparse_moe.experts.%lld.w2.weight", (long long)e);
        visit_in_layer(v, name, c->D, c->I, &w->w2[e]);
        snprintf(name, sizeof name, "block_sparse_moe.experts.%lld.w3.weight", (long long)e);
        visit_in_layer(v, name, c->I, c->D, &w->w3[e]);
    }
    if (c->Is > 0) {
        visit_in_layer(v, "block_sparse_moe.shared_experts.gate_proj.weight", c->Is, c->D, &w->shared_gate);
        visit_in_layer(v, "block_sparse_moe.shared_experts.up_proj.weight", c->Is, c->D, &w->shared_up);
        visit_in_layer(v, "block_sparse_moe.shared_experts.down_proj.weight", c->D, c->Is, &w->shared_down);
    }
}

static void each_of_layer(const ref_config *c, int64_t l, ref_layer *w, walk *v)
{
    visit_in_layer(v, "input_layernorm.weight", 1, c->D, &w->input_norm);
    if (c->mixer[l] == REF_MIX_KDA)
        each_of_kda(c, w, v);
    else
        each_of_mla(c, w, v);
    visit_in_layer(v, "post_attention_layernorm.weight", 1, c->D, &w->post_norm);
    if (c->sparse[l]) {
        each_of_moe(c, w, v);
    } else {
        visit_in_layer(v, "mlp.gate_proj.weight", c->I_dense, c->D, &w->gate_proj);
        visit_in_layer(v, "mlp.up_proj.weight", c->I_dense, c->D, &w->up_proj);
        visit_in_layer(v, "mlp.down_proj.weight", c->D, c->I_dense, &w->down_proj);
    }
}

int ref_weights_each(const ref_config *c, ref_weights *w, ref_param_fn fn, void *user)
{
    walk v = { .fn = fn, .user = user };
    visit(&v, "model.embed_tokens.weight", c->vocab, c->D, &w->embed);
    for (int64_t l = 0; l < c->L; l++) {
        v.layer = l;
        each_of_layer(c, l, &w->layers[l], &v);
    }
    visit(&v, "model.norm.weight", 1, c->D, &w->norm);
    if (!c->tied)
        visit(&v, "lm_head.weight", c->vocab, c->D, &w->lm_head);
    return v.status;
}

static int allocate(void *user, const char *name, int64_t rows, int64_t columns, real **param)
{
    (void)user, (void)name;
    *param = ref_zeros(rows * columns);
    return *param ? 0 : -1;
}

static int release(void *user, const char *name, int64_t rows, int64_t columns, real **param)
{
    (void)user, (void)name, (void)rows, (void)columns;
    free(*param);
    *param = NULL;
    return 0;
}

/* The arrays of pointers that the walk goes through. */
static int allocate_pointers(const ref_config *c, ref_weights *w)
{
    *w = (ref_weights){ .layers = calloc((size_t)c->L + 1, sizeof *w->layers) };
    if (!w->layers)
        return -1;
    int status = 0;
    for (int64_t l = 0; l < c->L; l++) {
        ref_layer *layer = &w->layers[l];
        layer->w1 = calloc((size_t)c->E + 1, sizeof *layer->w1);
        layer->w2 = calloc((size_t)c->E + 1, sizeof *layer->w2);
        layer->w3 = calloc((size_t)c->E + 1, sizeof *layer->w3);
        if (!layer->w1 || !layer->w2 || !layer->w3)
            status = -1;
    }
    return status;
}

static void free_pointers(const ref_config *c, ref_weights *w)
{
    for (int64_t l = 0; l < c->L && w->layers; l++) {
        free(w->layers[l].w1);
        free(w->layers[l].w2);
        free(w->layers[l].w3);
    }
    free(w->layers);
    *w = (ref_weights){ 0 };
}

int ref_weights_new(const ref_config *c, ref_weights *w)
{
    if (allocate_pointers(c, w) != 0) {
        free_pointers(c, w);
        return -1;
    }
    if (ref_weights_each(c, w, allocate, NULL) == 0)
        return 0;
    ref_weights_free(c, w);
    return -1;
}

void ref_weights_free(const ref_config *c, ref_weights *w)
{
    if (w->layers)
        ref_weights_each(c, w, release, NULL);
    free_pointers(c, w);
}
