/* config.json out: the released spelling, and kl_* keys for what it cannot say. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "harness/config.h"
#include "harness/file.h"

/* The shortest decimal that reads back as the same float. */
static void put_float(FILE *out, const char *key, float value)
{
    char text[32];
    bool whole = value == rintf(value) && fabsf(value) < 1e7f;
    snprintf(text, sizeof text, "%.1f", (double)value);
    for (int digits = 1; digits <= 9 && !whole; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)value);
        if (strtof(text, NULL) == value)
            break;
    }
    fprintf(out, "  \"%s\": %s,\n", key, text);
}

static void put_integer(FILE *out, const char *key, int64_t value) { fprintf(out, "  \"%s\": %lld,\n", key, (long long)value); }
static void put_bool(FILE *out, const char *key, bool value) { fprintf(out, "  \"%s\": %s,\n", key, value ? "true" : "false"); }
static void put_text(FILE *out, const char *key, const char *value) { fprintf(out, "  \"%s\": \"%s\",\n", key, value); }

static void put_id(FILE *out, const char *key, int64_t id)
{
    if (id < 0)
        fprintf(out, "  \"%s\": null,\n", key);
    else
        put_integer(out, key, id);
}

static void put_layers(FILE *out, const kl_config *c, const char *key, int mixer)
{
    fprintf(out, "    \"%s\": [", key);
    const char *comma = "";
    for (int i = 0; i < c->num_layers; i++)
        if (c->mixer[i] == mixer) {
            fprintf(out, "%s%d", comma, i + 1);
            comma = ", ";
        }
    fputs("],\n", out);
}

static void put_kda(FILE *out, const kl_config *c)
{
    fputs("  \"linear_attn_config\": {\n", out);
    put_layers(out, c, "kda_layers", KL_MIX_KDA);
    put_layers(out, c, "full_attn_layers", KL_MIX_MLA);
    fprintf(out, "    \"num_heads\": %lld,\n    \"head_dim\": %lld,\n    \"short_conv_kernel_size\": %lld\n  },\n", (long long)c->kda_heads,
            (long long)c->kda_head_dim, (long long)c->conv_width);
    if (c->gate == KDA_GATE_BOUNDED)
        put_float(out, "gate_lower_bound", c->gate_lower_bound);
    if (c->gate_values != c->kda_head_dim)
        put_integer(out, "kl_gate_values", c->gate_values);
    if (c->beta_kind == KDA_BETA_SIGMOID2)
        put_text(out, "kl_beta", "sigmoid2");
    if (c->output_gate != KDA_OUT_SIGMOID)
        put_text(out, "kl_output_gate", kl_output_gate_names[c->output_gate]);
}

static void put_mla(FILE *out, const kl_config *c)
{
    put_integer(out, "num_attention_heads", c->num_heads);
    put_integer(out, "num_key_value_heads", c->num_heads);
    fputs("  \"q_lora_rank\": null,\n", out);
    put_integer(out, "kv_lora_rank", c->kv_lora_rank);
    put_integer(out, "qk_nope_head_dim", c->qk_nope_head_dim);
    put_integer(out, "qk_rope_head_dim", c->qk_rope_head_dim);
    put_integer(out, "v_head_dim", c->v_head_dim);
    put_bool(out, "mla_use_nope", c->mla_use_nope);
    put_float(out, "rope_theta", c->rope_theta);
    fputs("  \"rope_scaling\": null,\n", out);
    if (c->kv_a_norm_eps != 1e-6f)
        put_float(out, "kl_kv_a_norm_eps", c->kv_a_norm_eps);
}

/* The released pair of numbers where it can say which layers are sparse; the list of words where it cannot. */
static void put_sparse(FILE *out, const kl_config *c)
{
    int64_t first = 0;
    while (first < c->num_layers && !c->sparse[first])
        first++;
    for (int64_t i = first; i < c->num_layers; i++)
        if (!c->sparse[i]) {
            fputs("  \"mlp_layer_types\": [", out);
            for (int64_t j = 0; j < c->num_layers; j++)
                fprintf(out, "%s\"%s\"", j ? ", " : "", c->sparse[j] ? "sparse" : "dense");
            fputs("],\n", out);
            return;
        }
    put_integer(out, "first_k_dense_replace", first);
    put_integer(out, "moe_layer_freq", 1);
}

static void put_mlp(FILE *out, const kl_config *c)
{
    put_text(out, "hidden_act", "silu");
    put_integer(out, "intermediate_size", c->intermediate_size);
    put_sparse(out, c);
    put_integer(out, "num_experts", c->num_experts);
    put_integer(out, "num_experts_per_token", c->top_k);
    put_integer(out, "num_shared_experts", c->num_shared_experts);
    put_integer(out, "moe_intermediate_size", c->moe_intermediate_size);
    put_text(out, "moe_router_activation_func", c->router_kind == MOE_SOFTMAX ? "softmax" : "sigmoid");
    put_bool(out, "moe_renormalize", c->moe_renormalize);
    put_bool(out, "use_grouped_topk", true);
    put_integer(out, "num_expert_group", c->n_group);
    put_integer(out, "topk_group", c->topk_group);
    put_float(out, "routed_scaling_factor", c->routed_scaling_factor);
    if (c->moe_biased_weights)
        put_bool(out, "kl_biased_weights", true);
}

static void put_all(FILE *out, const kl_config *c)
{
    fputs("{\n  \"architectures\": [\"KimiLinearForCausalLM\"],\n", out);
    put_text(out, "model_type", "kimi_linear");
    put_text(out, "dtype", kl_dtype_name(c->dtype));
    put_integer(out, "vocab_size", c->vocab_size);
    put_integer(out, "hidden_size", c->hidden_size);
    put_integer(out, "num_hidden_layers", c->num_layers);
    put_integer(out, "model_max_length", c->max_length);
    put_float(out, "rms_norm_eps", c->rms_norm_eps);
    put_bool(out, "tie_word_embeddings", c->tie_word_embeddings);
    put_kda(out, c);
    put_mla(out, c);
    put_mlp(out, c);
    put_id(out, "bos_token_id", c->bos_id);
    put_id(out, "eos_token_id", c->eos_id);
    put_id(out, "pad_token_id", c->pad_id);
    fputs("  \"num_nextn_predict_layers\": 0\n}\n", out);
}

kl_status kl_config_save(const kl_config *c, const char *path)
{
    KL_TRY(kl_config_validate(c));
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return kl_error_errno("%s: no memory", path);
    put_all(out, c);
    kl_writer w = {0};
    kl_status s = fclose(out) == 0 ? kl_writer_open(&w, path) : kl_error(KL_ENOMEM, "%s: no memory", path);
    if (!kl_failed(s))
        s = kl_writer_write(&w, text, size);
    if (!kl_failed(s))
        s = kl_writer_commit(&w);
    kl_writer_abandon(&w);
    free(text);
    return s;
}
