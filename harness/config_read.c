/* config.json in: the released spelling, the transformers-native one, and the kl_* keys for what neither can say. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness/config.h"
#include "harness/file.h"
#include "harness/json.h"

enum { CONFIG_BYTES_MAX = 1 << 20 };

/* ---- fields by name ---- */

/* The member under one name or another; both may stand there if they say the same. */
static kl_status either(const cJSON *object, const char *a, const char *b, const cJSON **item)
{
    const cJSON *x = kl_json_get(object, a), *y = b ? kl_json_get(object, b) : NULL;
    if (x && y && !cJSON_Compare(x, y, 1)) {
        char tx[64], ty[64];
        return kl_error(KL_EFORMAT, "%s and %s disagree: %s and %s", a, b, kl_json_describe(x, tx), kl_json_describe(y, ty));
    }
    *item = x ? x : y;
    return kl_ok();
}

static kl_status as_integer(const cJSON *item, const char *key, int64_t *value)
{
    char text[64];
    if (!kl_json_integer(item, value))
        return kl_error(KL_EFORMAT, "%s: expected an integer, got %s", key, kl_json_describe(item, text));
    return kl_ok();
}

/* Leaves *value alone where the key is absent, unless it is required. */
static kl_status get_integer(const cJSON *object, const char *a, const char *b, bool required, int64_t *value)
{
    const cJSON *item = NULL;
    KL_TRY(either(object, a, b, &item));
    if (!item && required)
        return kl_error(KL_EFORMAT, "%s: expected an integer, it is missing", a);
    return item ? as_integer(item, a, value) : kl_ok();
}

static kl_status get_float(const cJSON *object, const char *key, float *value)
{
    const cJSON *item = kl_json_get(object, key);
    char text[64];
    if (!item)
        return kl_ok();
    if (!cJSON_IsNumber(item) || !(fabs(item->valuedouble) <= 3e38))
        return kl_error(KL_EFORMAT, "%s: expected a number, got %s", key, kl_json_describe(item, text));
    *value = (float)item->valuedouble;
    return kl_ok();
}

static kl_status get_bool(const cJSON *object, const char *a, const char *b, bool *value)
{
    const cJSON *item = NULL;
    char text[64];
    KL_TRY(either(object, a, b, &item));
    if (!item)
        return kl_ok();
    if (!cJSON_IsBool(item))
        return kl_error(KL_EFORMAT, "%s: expected true or false, got %s", a, kl_json_describe(item, text));
    *value = cJSON_IsTrue(item);
    return kl_ok();
}

/* One of names, as its index; names end in NULL. */
static kl_status get_choice(const cJSON *object, const char *a, const char *b, const char *const *names, int *value)
{
    const cJSON *item = NULL;
    KL_TRY(either(object, a, b, &item));
    if (!item)
        return kl_ok();
    for (int i = 0; cJSON_IsString(item) && names[i]; i++)
        if (strcmp(item->valuestring, names[i]) == 0) {
            *value = i;
            return kl_ok();
        }
    char text[64], list[128] = "";
    for (int i = 0; names[i]; i++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s\"%s\"", i ? ", " : "", names[i]);
    return kl_error(KL_EUNSUPPORTED, "%s: expected one of %s, got %s", a, list, kl_json_describe(item, text));
}

/* ---- what is refused ---- */

static kl_status refuse(const cJSON *object, const char *key, const char *only)
{
    const cJSON *item = kl_json_get(object, key);
    char text[64];
    if (!item || cJSON_IsFalse(item) || (cJSON_IsNumber(item) && item->valuedouble == 0))
        return kl_ok();
    return kl_error(KL_EUNSUPPORTED, "%s: only %s is supported, got %s", key, only, kl_json_describe(item, text));
}

static kl_status refuse_unsupported(const cJSON *json, const cJSON *linear)
{
    static const char *const off[] = {"attention_bias", "mlp_bias", "use_full_rank_gate", "num_nextn_predict_layers", "attention_dropout",
                                      "sliding_window", "use_sliding_window"};
    static const char *const null[] = {"q_lora_rank", "rope_scaling", "quantization_config"};
    static const char *const acts[] = {"silu", NULL}, *const types[] = {"kimi_linear", NULL};
    int ignored;
    if (!kl_json_get(json, "model_type"))
        return kl_error(KL_EFORMAT, "model_type: expected \"kimi_linear\", it is missing");
    KL_TRY(get_choice(json, "model_type", NULL, types, &ignored));
    KL_TRY(get_choice(json, "hidden_act", NULL, acts, &ignored));
    for (size_t i = 0; i < sizeof off / sizeof *off; i++) {
        KL_TRY(refuse(json, off[i], "false or 0"));
        KL_TRY(refuse(linear, off[i], "false or 0"));
    }
    for (size_t i = 0; i < sizeof null / sizeof *null; i++) {
        char text[64];
        const cJSON *item = kl_json_get(json, null[i]);
        if (item)
            return kl_error(KL_EUNSUPPORTED, "%s: only null is supported, got %s", null[i], kl_json_describe(item, text));
    }
    return kl_ok();
}

static kl_status refuse_unknown_own(const cJSON *json)
{
    static const char *const own[] = {"kl_gate_values", "kl_beta", "kl_output_gate", "kl_biased_weights", "kl_kv_a_norm_eps"};
    for (const cJSON *item = json->child; item; item = item->next) {
        bool known = strncmp(item->string, "kl_", 3) != 0;
        for (size_t i = 0; i < sizeof own / sizeof *own && !known; i++)
            known = strcmp(item->string, own[i]) == 0;
        if (!known)
            return kl_error(KL_EUNSUPPORTED, "%.60s: unknown key", item->string);
    }
    return kl_ok();
}

/* ---- layers ---- */

/* Marks the layers that one of the two lists names; both count from 1. */
static kl_status mark_layers(const kl_config *c, const cJSON *list, const char *key, int mark, unsigned char *marks)
{
    if (list && !cJSON_IsArray(list))
        return kl_error(KL_EFORMAT, "linear_attn_config.%s: expected an array of layers", key);
    for (const cJSON *item = list ? list->child : NULL; item; item = item->next) {
        int64_t layer = 0;
        KL_TRY(as_integer(item, key, &layer));
        if (layer < 1 || layer > c->num_layers)
            return kl_error(KL_EFORMAT, "linear_attn_config.%s: layer %lld: expected 1 to %lld (layers count from 1)", key, (long long)layer,
                            (long long)c->num_layers);
        if (marks[layer - 1] & mark)
            return kl_error(KL_EFORMAT, "linear_attn_config.%s: layer %lld stands twice", key, (long long)layer);
        marks[layer - 1] |= (unsigned char)mark;
    }
    return kl_ok();
}

static kl_status read_layer_lists(kl_config *c, const cJSON *linear)
{
    enum { IN_KDA = 1, IN_MLA = 2 };
    unsigned char marks[KL_MAX_LAYERS] = {0};
    KL_TRY(mark_layers(c, kl_json_get(linear, "kda_layers"), "kda_layers", IN_KDA, marks));
    KL_TRY(mark_layers(c, kl_json_get(linear, "full_attn_layers"), "full_attn_layers", IN_MLA, marks));
    for (int i = 0; i < c->num_layers; i++) {
        if (marks[i] == 0 || marks[i] == (IN_KDA | IN_MLA))
            return kl_error(KL_EFORMAT, "linear_attn_config: layer %d is in %s of kda_layers and full_attn_layers, expected in exactly one", i + 1,
                            marks[i] ? "both" : "neither");
        c->mixer[i] = marks[i] == IN_KDA ? KL_MIX_KDA : KL_MIX_MLA;
    }
    return kl_ok();
}

/* A list with one of two words for each layer; marks[i] = 1 for the second. */
static kl_status read_types(const kl_config *c, const cJSON *list, const char *key, const char *zero, const char *one, unsigned char *marks)
{
    if (!cJSON_IsArray(list) || cJSON_GetArraySize(list) != c->num_layers)
        return kl_error(KL_EFORMAT, "%s: expected an array of num_hidden_layers = %lld entries, got %d", key, (long long)c->num_layers,
                        cJSON_GetArraySize(list));
    int i = 0;
    for (const cJSON *item = list->child; item; item = item->next, i++) {
        const char *word = cJSON_IsString(item) ? item->valuestring : "";
        if (strcmp(word, zero) != 0 && strcmp(word, one) != 0)
            return kl_error(KL_EUNSUPPORTED, "%s: layer %d: expected \"%s\" or \"%s\", got \"%.40s\"", key, i + 1, zero, one, word);
        marks[i] = strcmp(word, one) == 0;
    }
    return kl_ok();
}

static kl_status read_mixers(kl_config *c, const cJSON *json, const cJSON *linear)
{
    const cJSON *types = kl_json_get(json, "layer_types");
    bool lists = kl_json_get(linear, "kda_layers") || kl_json_get(linear, "full_attn_layers");
    if (lists)
        KL_TRY(read_layer_lists(c, linear));
    if (types) {
        unsigned char marks[KL_MAX_LAYERS];
        KL_TRY(read_types(c, types, "layer_types", "linear_attention", "full_attention", marks));
        for (int i = 0; i < c->num_layers; i++) {
            if (lists && marks[i] != c->mixer[i])
                return kl_error(KL_EFORMAT, "layer_types: layer %d: disagrees with linear_attn_config", i + 1);
            c->mixer[i] = marks[i];
        }
    }
    if (!lists && !types)
        return kl_error(KL_EFORMAT, "linear_attn_config: expected kda_layers and full_attn_layers (or layer_types), they are missing");
    return kl_ok();
}

/* Sparse from layer first_k_dense_replace on, every moe_layer_freq-th; counted from 0, unlike the lists above. */
static kl_status read_sparse(kl_config *c, const cJSON *json)
{
    int64_t first = 0, every = 1;
    KL_TRY(get_integer(json, "first_k_dense_replace", NULL, false, &first));
    KL_TRY(get_integer(json, "moe_layer_freq", NULL, false, &every));
    if (first < 0 || every < 1)
        return kl_error(KL_EFORMAT, "first_k_dense_replace, moe_layer_freq: expected at least 0 and 1, got %lld and %lld", (long long)first, (long long)every);
    for (int i = 0; i < c->num_layers; i++)
        c->sparse[i] = c->num_experts > 0 && i >= first && i % every == 0;
    const cJSON *types = kl_json_get(json, "mlp_layer_types");
    if (!types)
        return kl_ok();
    unsigned char marks[KL_MAX_LAYERS];
    KL_TRY(read_types(c, types, "mlp_layer_types", "dense", "sparse", marks));
    for (int i = 0; i < c->num_layers; i++) {
        if (kl_json_get(json, "first_k_dense_replace") && marks[i] != c->sparse[i])
            return kl_error(KL_EFORMAT, "mlp_layer_types: layer %d: disagrees with first_k_dense_replace", i + 1);
        c->sparse[i] = marks[i];
    }
    return kl_ok();
}

/* ---- groups of fields ---- */

static kl_status read_id(const cJSON *json, const char *key, int64_t *id)
{
    const cJSON *item = kl_json_get(json, key);
    if (cJSON_IsArray(item)) /* several ends of text: the first is the one that a chat turn ends with */
        item = item->child;
    return item ? as_integer(item, key, id) : kl_ok();
}

static kl_status read_model(kl_config *c, const cJSON *json)
{
    static const char *const dtypes[] = {"float32", "bfloat16", "float16", NULL};
    int dtype = KL_BF16;
    KL_TRY(get_integer(json, "vocab_size", NULL, true, &c->vocab_size));
    KL_TRY(get_integer(json, "hidden_size", NULL, true, &c->hidden_size));
    KL_TRY(get_integer(json, "num_hidden_layers", NULL, true, &c->num_layers));
    if (c->num_layers < 1 || c->num_layers > KL_MAX_LAYERS)
        return kl_error(KL_EFORMAT, "num_hidden_layers: expected 1 to %d, got %lld", KL_MAX_LAYERS, (long long)c->num_layers);
    KL_TRY(get_integer(json, "model_max_length", "max_position_embeddings", false, &c->max_length));
    KL_TRY(get_float(json, "rms_norm_eps", &c->rms_norm_eps));
    KL_TRY(get_bool(json, "tie_word_embeddings", NULL, &c->tie_word_embeddings));
    KL_TRY(get_choice(json, "dtype", "torch_dtype", dtypes, &dtype));
    c->dtype = (kl_dtype)dtype;
    KL_TRY(read_id(json, "bos_token_id", &c->bos_id));
    KL_TRY(read_id(json, "eos_token_id", &c->eos_id));
    return read_id(json, "pad_token_id", &c->pad_id);
}

static kl_status read_kda(kl_config *c, const cJSON *json, const cJSON *linear)
{
    static const char *const betas[] = {"sigmoid", "sigmoid2", NULL};
    static const struct { const char *released, *native; size_t offset; } sizes[] = {
        {"num_heads", "linear_num_heads", offsetof(kl_config, kda_heads)},
        {"head_dim", "linear_head_dim", offsetof(kl_config, kda_head_dim)},
        {"short_conv_kernel_size", "linear_conv_kernel_dim", offsetof(kl_config, conv_width)},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const cJSON *a = kl_json_get(linear, sizes[i].released), *b = kl_json_get(json, sizes[i].native);
        int64_t *value = (int64_t *)((char *)c + sizes[i].offset), other = 0;
        if (a)
            KL_TRY(as_integer(a, sizes[i].released, value));
        if (b)
            KL_TRY(as_integer(b, sizes[i].native, &other));
        if (a && b && *value != other)
            return kl_error(KL_EFORMAT, "linear_attn_config.%s and %s disagree: %lld and %lld", sizes[i].released, sizes[i].native, (long long)*value,
                            (long long)other);
        if (b)
            *value = other;
    }
    const cJSON *bound = kl_json_get(json, "gate_lower_bound") ? json : linear;
    if (kl_json_get(bound, "gate_lower_bound")) {
        c->gate = KDA_GATE_BOUNDED;
        KL_TRY(get_float(bound, "gate_lower_bound", &c->gate_lower_bound));
    }
    int beta = 0, output_gate = 0;
    c->gate_values = c->kda_head_dim;
    KL_TRY(get_integer(json, "kl_gate_values", NULL, false, &c->gate_values));
    KL_TRY(get_choice(json, "kl_beta", NULL, betas, &beta));
    KL_TRY(get_choice(json, "kl_output_gate", NULL, kl_output_gate_names, &output_gate));
    c->beta_kind = beta ? KDA_BETA_SIGMOID2 : KDA_BETA_SIGMOID;
    c->output_gate = (kda_output_gate)output_gate;
    return kl_ok();
}

static kl_status read_rope(kl_config *c, const cJSON *json)
{
    static const char *const types[] = {"default", NULL};
    const cJSON *parameters = kl_json_get(json, "rope_parameters");
    int ignored;
    KL_TRY(get_bool(json, "mla_use_nope", NULL, &c->mla_use_nope));
    KL_TRY(get_float(json, "rope_theta", &c->rope_theta));
    KL_TRY(get_choice(parameters, "rope_type", "type", types, &ignored));
    return get_float(parameters, "rope_theta", &c->rope_theta);
}

static kl_status read_mla(kl_config *c, const cJSON *json)
{
    bool any = memchr(c->mixer, KL_MIX_MLA, (size_t)c->num_layers) != NULL;
    KL_TRY(get_integer(json, "num_attention_heads", NULL, any, &c->num_heads));
    int64_t kv_heads = c->num_heads;
    KL_TRY(get_integer(json, "num_key_value_heads", NULL, false, &kv_heads));
    if (kv_heads != c->num_heads)
        return kl_error(KL_EUNSUPPORTED, "num_key_value_heads: only num_attention_heads = %lld is supported, got %lld", (long long)c->num_heads,
                        (long long)kv_heads);
    KL_TRY(get_integer(json, "kv_lora_rank", NULL, any, &c->kv_lora_rank));
    KL_TRY(get_integer(json, "qk_nope_head_dim", NULL, any, &c->qk_nope_head_dim));
    KL_TRY(get_integer(json, "qk_rope_head_dim", NULL, any, &c->qk_rope_head_dim));
    KL_TRY(get_integer(json, "v_head_dim", NULL, any, &c->v_head_dim));
    KL_TRY(read_rope(c, json));
    return get_float(json, "kl_kv_a_norm_eps", &c->kv_a_norm_eps);
}

static kl_status read_mlp(kl_config *c, const cJSON *json)
{
    static const char *const routers[] = {"sigmoid", "softmax", NULL};
    int router = MOE_SIGMOID;
    bool grouped = true;
    KL_TRY(get_integer(json, "num_experts", "num_local_experts", false, &c->num_experts));
    KL_TRY(read_sparse(c, json));
    bool sparse = memchr(c->sparse, 1, (size_t)c->num_layers) != NULL, dense = memchr(c->sparse, 0, (size_t)c->num_layers) != NULL;
    KL_TRY(get_integer(json, "intermediate_size", NULL, dense, &c->intermediate_size));
    KL_TRY(get_integer(json, "num_experts_per_token", "num_experts_per_tok", sparse, &c->top_k));
    KL_TRY(get_integer(json, "num_shared_experts", "n_shared_experts", false, &c->num_shared_experts));
    KL_TRY(get_integer(json, "moe_intermediate_size", NULL, sparse, &c->moe_intermediate_size));
    KL_TRY(get_bool(json, "use_grouped_topk", NULL, &grouped));
    if (grouped) {
        KL_TRY(get_integer(json, "num_expert_group", "n_group", false, &c->n_group));
        KL_TRY(get_integer(json, "topk_group", NULL, false, &c->topk_group));
    }
    KL_TRY(get_choice(json, "moe_router_activation_func", "scoring_func", routers, &router));
    c->router_kind = (moe_router)router;
    KL_TRY(get_bool(json, "moe_renormalize", "norm_topk_prob", &c->moe_renormalize));
    KL_TRY(get_bool(json, "kl_biased_weights", NULL, &c->moe_biased_weights));
    return get_float(json, "routed_scaling_factor", &c->routed_scaling_factor);
}

static kl_status read_all(kl_config *c, const cJSON *json)
{
    const cJSON *linear = kl_json_get(json, "linear_attn_config");
    if (linear && !cJSON_IsObject(linear))
        return kl_error(KL_EFORMAT, "linear_attn_config: expected an object");
    KL_TRY(refuse_unsupported(json, linear));
    KL_TRY(refuse_unknown_own(json));
    KL_TRY(read_model(c, json));
    KL_TRY(read_mixers(c, json, linear));
    KL_TRY(read_kda(c, json, linear));
    KL_TRY(read_mla(c, json));
    KL_TRY(read_mlp(c, json));
    return kl_config_validate(c);
}

static kl_status parse_named(kl_config *c, const char *text, size_t length, const char *name)
{
    kl_config made = {.max_length = 1048576, .rms_norm_eps = 1e-5f, .bos_id = -1, .eos_id = -1, .pad_id = -1, .conv_width = 4,
                      .gate = KDA_GATE_SOFTPLUS, .beta_kind = KDA_BETA_SIGMOID, .mla_use_nope = true, .rope_theta = 10000, .kv_a_norm_eps = 1e-6f,
                      .n_group = 1, .topk_group = 1, .moe_renormalize = true, .routed_scaling_factor = 1};
    cJSON *json;
    KL_TRY(kl_json_parse(&json, text, length, name));
    kl_status s = kl_error_in(read_all(&made, json), "%s", name);
    cJSON_Delete(json);
    if (!kl_failed(s))
        *c = made;
    return s;
}

kl_status kl_config_parse(kl_config *c, const char *text, size_t length) { return parse_named(c, text, length, "config.json"); }

kl_status kl_config_load(kl_config *c, const char *path)
{
    char *text;
    size_t length;
    KL_TRY(kl_file_read(path, CONFIG_BYTES_MAX, &text, &length));
    kl_status s = parse_named(c, text, length, path);
    free(text);
    return s;
}
