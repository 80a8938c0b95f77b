#include "harness/info.h"

#include <stdio.h>

#include "harness/cache.h"
#include "harness/weights.h"

kl_status kl_info_choose(kl_config *c, const char *dir, const char *preset, const char *const *set, int set_count)
{
    KL_REQUIRE((dir != NULL) != (preset != NULL), "model: expected a directory or --preset NAME%s", dir ? ", got both" : "");
    if (preset) {
        KL_TRY(kl_config_preset(c, preset));
    } else {
        char path[4096];
        KL_REQUIRE(snprintf(path, sizeof path, "%s/config.json", dir) < (int)sizeof path, "%s: path too long", dir);
        KL_TRY(kl_config_load(c, path));
    }
    for (int i = 0; i < set_count; i++)
        KL_TRY(kl_config_set(c, set[i]));
    return kl_config_validate(c);
}

kl_status kl_info_cache(const kl_config *c, int64_t context, kl_cache_row *row)
{
    *row = (kl_cache_row){.context = context};
    row->total = kl_cache_bytes(c, context, &row->kda_state, &row->conv_tail, &row->latents);
    kl_config attention = *c;
    for (int64_t i = 0; i < c->num_layers; i++)
        attention.mixer[i] = KL_MIX_MLA;
    row->all_mla = kl_cache_bytes(&attention, context, NULL, NULL, NULL);
    KL_REQUIRE(row->total != SIZE_MAX && row->all_mla != SIZE_MAX, "context: a cache of %lld tokens does not fit size_t", (long long)context);
    return kl_ok();
}

static kl_status add_bytes(void *user, const kl_param_info *info, kl_param *param)
{
    double n = (double)kl_dtype_size(info->dtype);
    (void)param;
    for (int i = 0; i < info->ndim; i++)
        n *= (double)info->shape[i];
    *(double *)user += n;
    return kl_ok();
}

kl_status kl_info_bytes(const kl_config *c, double *bytes)
{
    *bytes = 0.0;
    return kl_weights_each(c, NULL, add_bytes, bytes);
}

static void add_int(cJSON *o, const char *name, int64_t value) { cJSON_AddNumberToObject(o, name, (double)value); }

static void add_layers(cJSON *o, const char *name, const kl_config *c, int mixer)
{
    cJSON *list = cJSON_AddArrayToObject(o, name);
    for (int64_t i = 0; i < c->num_layers; i++)
        if (c->mixer[i] == mixer)
            cJSON_AddItemToArray(list, cJSON_CreateNumber((double)(i + 1)));
}

cJSON *kl_info_config(const kl_config *c)
{
    static const char *const gates[] = {"log", "softplus", "bounded"};
    static const char *const betas[] = {"plain", "sigmoid", "sigmoid2"};
    cJSON *o = cJSON_CreateObject();
    add_int(o, "vocab_size", c->vocab_size);
    add_int(o, "hidden_size", c->hidden_size);
    add_int(o, "num_hidden_layers", c->num_layers);
    add_int(o, "model_max_length", c->max_length);
    cJSON_AddStringToObject(o, "dtype", kl_dtype_name(c->dtype));
    cJSON_AddNumberToObject(o, "rms_norm_eps", (double)c->rms_norm_eps);
    cJSON_AddBoolToObject(o, "tie_word_embeddings", c->tie_word_embeddings);
    add_layers(o, "kda_layers", c, KL_MIX_KDA);
    add_layers(o, "full_attn_layers", c, KL_MIX_MLA);
    add_int(o, "kda_heads", c->kda_heads);
    add_int(o, "kda_head_dim", c->kda_head_dim);
    add_int(o, "short_conv_kernel_size", c->conv_width);
    cJSON_AddStringToObject(o, "gate", gates[c->gate]);
    add_int(o, "gate_values", c->gate_values);
    cJSON_AddStringToObject(o, "beta", betas[c->beta_kind]);
    cJSON_AddStringToObject(o, "output_gate", kl_output_gate_names[c->output_gate]);
    add_int(o, "num_attention_heads", c->num_heads);
    add_int(o, "kv_lora_rank", c->kv_lora_rank);
    add_int(o, "qk_nope_head_dim", c->qk_nope_head_dim);
    add_int(o, "qk_rope_head_dim", c->qk_rope_head_dim);
    add_int(o, "v_head_dim", c->v_head_dim);
    cJSON_AddBoolToObject(o, "mla_use_nope", c->mla_use_nope);
    cJSON_AddNumberToObject(o, "kv_a_norm_eps", (double)c->kv_a_norm_eps);
    add_int(o, "intermediate_size", c->intermediate_size);
    add_int(o, "num_experts", c->num_experts);
    add_int(o, "num_experts_per_token", c->top_k);
    add_int(o, "num_shared_experts", c->num_shared_experts);
    add_int(o, "moe_intermediate_size", c->moe_intermediate_size);
    cJSON_AddStringToObject(o, "moe_router_activation_func", c->router_kind == MOE_SOFTMAX ? "softmax" : "sigmoid");
    cJSON_AddBoolToObject(o, "moe_renormalize", c->moe_renormalize);
    cJSON_AddNumberToObject(o, "routed_scaling_factor", (double)c->routed_scaling_factor);
    return o;
}
