/* The names and shapes of all parameters, in the order of the forward pass. */
#include <math.h>
#include <stdio.h>

#include "harness/weights.h"

/* One walk: the visitor and what all its calls share. */
typedef struct {
    const kl_config *c;
    kl_param_fn fn;
    void *user;
    kl_param scratch; /* stands in where the caller has no weights */
    int layer, expert;
} walk;

enum { NAME_MAX_BYTES = 128 };

static kl_status visit(walk *k, kl_param *param, kl_param_info info, const char *part)
{
    char name[NAME_MAX_BYTES];
    if (k->expert >= 0)
        snprintf(name, sizeof name, "model.layers.%d.block_sparse_moe.experts.%d.%s", k->layer, k->expert, part);
    else if (k->layer >= 0)
        snprintf(name, sizeof name, "model.layers.%d.%s", k->layer, part);
    else
        snprintf(name, sizeof name, "%s", part);
    info.name = name;
    info.layer = k->layer;
    info.expert = k->expert;
    k->scratch = (kl_param){.dtype = info.dtype, .rows = info.rows, .columns = info.columns};
    return k->fn(k->user, &info, param ? param : &k->scratch);
}

static float fan_in_std(int64_t columns) { return 0.5f / sqrtf((float)columns); }

static kl_status matrix(walk *k, kl_param *param, const char *part, int64_t rows, int64_t columns, float std)
{
    return visit(k, param, (kl_param_info){.ndim = 2, .shape = {rows, columns}, .rows = rows, .columns = columns, .dtype = k->c->dtype,
                                           .init_kind = KL_INIT_NORMAL, .init_std = std, .decay = true, .trained = true}, part);
}

static kl_status linear(walk *k, kl_param *param, const char *part, int64_t rows, int64_t columns)
{
    return matrix(k, param, part, rows, columns, fan_in_std(columns));
}

/* Projections back into the residual stream start smaller, so that its variance does not grow with depth. */
static kl_status residual(walk *k, kl_param *param, const char *part, int64_t rows, int64_t columns)
{
    return matrix(k, param, part, rows, columns, fan_in_std(columns) / sqrtf(2.0f * (float)k->c->num_layers));
}

static kl_status vector(walk *k, kl_param *param, const char *part, int64_t n, int kind, kl_dtype dtype, bool trained)
{
    return visit(k, param, (kl_param_info){.ndim = 1, .shape = {n}, .rows = 1, .columns = n, .dtype = dtype, .init_kind = kind, .trained = trained}, part);
}

static kl_status norm(walk *k, kl_param *param, const char *part, int64_t n) { return vector(k, param, part, n, KL_INIT_ONES, k->c->dtype, true); }

static kl_status convolution(walk *k, kl_param *param, const char *part, int64_t channels, int64_t width)
{
    return visit(k, param, (kl_param_info){.ndim = 3, .shape = {channels, 1, width}, .rows = channels, .columns = width, .dtype = k->c->dtype,
                                           .init_kind = KL_INIT_NORMAL, .init_std = fan_in_std(width), .decay = false, .trained = true}, part);
}

/* The address of a member where there is a layer to have one. */
#define AT(layer, member) ((layer) ? &(layer)->member : NULL)

static kl_status gate_params(walk *k, kl_layer *l)
{
    const kl_config *c = k->c;
    int64_t H = c->kda_heads, r = c->kda_head_dim;
    if (c->gate_values == 0)
        return kl_ok();
    KL_TRY(visit(k, AT(l, A_log), (kl_param_info){.ndim = 4, .shape = {1, 1, H, 1}, .rows = 1, .columns = H, .dtype = KL_F32,
                                                  .init_kind = KL_INIT_A_LOG, .trained = true}, "self_attn.A_log"));
    KL_TRY(vector(k, AT(l, dt_bias), "self_attn.dt_bias", H * c->gate_values, KL_INIT_DT_BIAS, KL_F32, true));
    KL_TRY(linear(k, AT(l, f_a), "self_attn.f_a_proj.weight", r, c->hidden_size));
    return linear(k, AT(l, f_b), "self_attn.f_b_proj.weight", H * c->gate_values, r);
}

static kl_status kda_params(walk *k, kl_layer *l)
{
    const kl_config *c = k->c;
    int64_t D = c->hidden_size, P = c->kda_heads * c->kda_head_dim, r = c->kda_head_dim;
    KL_TRY(linear(k, AT(l, q_proj), "self_attn.q_proj.weight", P, D));
    KL_TRY(linear(k, AT(l, k_proj), "self_attn.k_proj.weight", P, D));
    KL_TRY(linear(k, AT(l, v_proj), "self_attn.v_proj.weight", P, D));
    if (c->conv_width > 0) {
        KL_TRY(convolution(k, AT(l, q_conv), "self_attn.q_conv1d.weight", P, c->conv_width));
        KL_TRY(convolution(k, AT(l, k_conv), "self_attn.k_conv1d.weight", P, c->conv_width));
        KL_TRY(convolution(k, AT(l, v_conv), "self_attn.v_conv1d.weight", P, c->conv_width));
    }
    KL_TRY(gate_params(k, l));
    KL_TRY(linear(k, AT(l, b_proj), "self_attn.b_proj.weight", c->kda_heads, D));
    if (c->output_gate != KDA_OUT_NONE) {
        KL_TRY(linear(k, AT(l, g_a), "self_attn.g_a_proj.weight", r, D));
        KL_TRY(linear(k, AT(l, g_b), "self_attn.g_b_proj.weight", P, r));
    }
    KL_TRY(norm(k, AT(l, o_norm), "self_attn.o_norm.weight", c->kda_head_dim));
    return residual(k, AT(l, o_proj), "self_attn.o_proj.weight", D, P);
}

static kl_status mla_params(walk *k, kl_layer *l)
{
    const kl_config *c = k->c;
    int64_t D = c->hidden_size, H = c->num_heads, R = c->kv_lora_rank;
    KL_TRY(linear(k, AT(l, mla_q), "self_attn.q_proj.weight", H * (c->qk_nope_head_dim + c->qk_rope_head_dim), D));
    KL_TRY(linear(k, AT(l, kv_a), "self_attn.kv_a_proj_with_mqa.weight", R + c->qk_rope_head_dim, D));
    KL_TRY(norm(k, AT(l, kv_a_norm), "self_attn.kv_a_layernorm.weight", R));
    KL_TRY(linear(k, AT(l, kv_b), "self_attn.kv_b_proj.weight", H * (c->qk_nope_head_dim + c->v_head_dim), R));
    return residual(k, AT(l, o_proj), "self_attn.o_proj.weight", D, H * c->v_head_dim);
}

static kl_status dense_params(walk *k, kl_layer *l)
{
    int64_t D = k->c->hidden_size, I = k->c->intermediate_size;
    KL_TRY(linear(k, AT(l, gate_proj), "mlp.gate_proj.weight", I, D));
    KL_TRY(linear(k, AT(l, up_proj), "mlp.up_proj.weight", I, D));
    return residual(k, AT(l, down_proj), "mlp.down_proj.weight", D, I);
}

static kl_status expert_params(walk *k, kl_layer *l, int expert)
{
    int64_t D = k->c->hidden_size, I = k->c->moe_intermediate_size;
    k->expert = expert;
    kl_status s = linear(k, l ? &l->w1[expert] : NULL, "w1.weight", I, D);
    if (!kl_failed(s))
        s = linear(k, l ? &l->w3[expert] : NULL, "w3.weight", I, D);
    if (!kl_failed(s))
        s = residual(k, l ? &l->w2[expert] : NULL, "w2.weight", D, I);
    k->expert = -1;
    return s;
}

static kl_status sparse_params(walk *k, kl_layer *l)
{
    const kl_config *c = k->c;
    int64_t D = c->hidden_size, Is = c->num_shared_experts * c->moe_intermediate_size;
    KL_TRY(linear(k, AT(l, router), "block_sparse_moe.gate.weight", c->num_experts, D));
    KL_TRY(vector(k, AT(l, router_bias), "block_sparse_moe.gate.e_score_correction_bias", c->num_experts, KL_INIT_ZEROS, KL_F32, false));
    if (Is > 0) {
        KL_TRY(linear(k, AT(l, shared_gate), "block_sparse_moe.shared_experts.gate_proj.weight", Is, D));
        KL_TRY(linear(k, AT(l, shared_up), "block_sparse_moe.shared_experts.up_proj.weight", Is, D));
        KL_TRY(residual(k, AT(l, shared_down), "block_sparse_moe.shared_experts.down_proj.weight", D, Is));
    }
    for (int e = 0; e < c->num_experts; e++)
        KL_TRY(expert_params(k, l, e));
    return kl_ok();
}

static kl_status layer_params(walk *k, kl_layer *l)
{
    const kl_config *c = k->c;
    KL_TRY(norm(k, AT(l, input_norm), "input_layernorm.weight", c->hidden_size));
    KL_TRY(c->mixer[k->layer] == KL_MIX_KDA ? kda_params(k, l) : mla_params(k, l));
    KL_TRY(norm(k, AT(l, post_norm), "post_attention_layernorm.weight", c->hidden_size));
    return c->sparse[k->layer] ? sparse_params(k, l) : dense_params(k, l);
}

kl_status kl_weights_each(const kl_config *c, kl_weights *w, kl_param_fn fn, void *user)
{
    const float std = 0.02f;
    walk k = {.c = c, .fn = fn, .user = user, .layer = -1, .expert = -1};
    KL_TRY(matrix(&k, AT(w, embed), "model.embed_tokens.weight", c->vocab_size, c->hidden_size, std));
    for (int i = 0; i < c->num_layers; i++) {
        k.layer = i;
        KL_TRY(layer_params(&k, w ? &w->layers[i] : NULL));
    }
    k.layer = -1;
    KL_TRY(norm(&k, AT(w, norm), "model.norm.weight", c->hidden_size));
    if (c->tie_word_embeddings)
        return kl_ok();
    return matrix(&k, AT(w, lm_head), "lm_head.weight", c->vocab_size, c->hidden_size, std);
}
