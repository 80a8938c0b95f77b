/* The ablations: one "key=value" at a time on top of a configuration. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness/config.h"

static kl_status parse_integer(const char *key, const char *text, int64_t low, int64_t high, int64_t *value)
{
    char *end;
    errno = 0;
    long long n = strtoll(text, &end, 10);
    if (errno || end == text || *end || n < low || n > high)
        return kl_error(KL_EINVAL, "%s: expected an integer from %lld to %lld, got '%.40s'", key, (long long)low, (long long)high, text);
    *value = n;
    return kl_ok();
}

static kl_status parse_float(const char *key, const char *text, float *value)
{
    char *end;
    double x = strtod(text, &end);
    if (end == text || *end || !(fabs(x) <= 3e38))
        return kl_error(KL_EINVAL, "%s: expected a number, got '%.40s'", key, text);
    *value = (float)x;
    return kl_ok();
}

static kl_status parse_choice(const char *key, const char *text, const char *const *names, int *value)
{
    for (*value = 0; names[*value]; ++*value)
        if (strcmp(text, names[*value]) == 0)
            return kl_ok();
    return kl_error(KL_EINVAL, "%s: expected %s, %s%s%s, got '%.40s'", key, names[0], names[1], names[2] ? ", " : "", names[2] ? names[2] : "", text);
}

/* a:b repeats a KDA layers and b MLA layers; where both kinds occur the last layer is always MLA, as in the
 * released model (3:1 on 27 layers: 4, 8, ..., 24 and 27). 0:1 is all MLA, n:0 has none. */
static kl_status set_hybrid(kl_config *c, const char *text)
{
    char a_text[24];
    const char *colon = strchr(text, ':');
    int64_t a = 0, b = 0;
    if (!colon || (size_t)(colon - text) >= sizeof a_text)
        return kl_error(KL_EINVAL, "hybrid: expected KDA:MLA such as 3:1, 0:1 or n:0, got '%.40s'", text);
    memcpy(a_text, text, (size_t)(colon - text));
    a_text[colon - text] = '\0';
    KL_TRY(parse_integer("hybrid", strcmp(a_text, "n") == 0 ? "1" : a_text, 0, KL_MAX_LAYERS, &a));
    KL_TRY(parse_integer("hybrid", colon + 1, 0, KL_MAX_LAYERS, &b));
    KL_REQUIRE(a + b > 0 && (b == 0 || strcmp(a_text, "n") != 0), "hybrid: expected KDA:MLA such as 3:1, 0:1 or n:0, got '%.40s'", text);
    for (int64_t i = 0; i < c->num_layers; i++)
        c->mixer[i] = i % (a + b) < a ? KL_MIX_KDA : KL_MIX_MLA;
    if (a > 0 && b > 0)
        c->mixer[c->num_layers - 1] = KL_MIX_MLA;
    return kl_ok();
}

static kl_status set_gate(kl_config *c, const char *text)
{
    int64_t block = 0;
    if (strcmp(text, "channel") == 0)
        c->gate_values = c->kda_head_dim;
    else if (strcmp(text, "head") == 0)
        c->gate_values = 1;
    else if (strcmp(text, "none") == 0)
        c->gate_values = 0;
    else if (strncmp(text, "block:", 6) == 0) {
        KL_TRY(parse_integer("gate=block", text + 6, 1, c->kda_head_dim, &block));
        KL_REQUIRE(c->kda_head_dim % block == 0, "gate=block: expected a divisor of head_dim = %lld, got %lld", (long long)c->kda_head_dim, (long long)block);
        c->gate_values = c->kda_head_dim / block;
    } else
        return kl_error(KL_EINVAL, "gate: expected channel, block:B, head or none, got '%.40s'", text);
    return kl_ok();
}

static kl_status set_gate_kind(kl_config *c, const char *text)
{
    if (strcmp(text, "softplus") == 0) {
        c->gate = KDA_GATE_SOFTPLUS;
        return kl_ok();
    }
    if (strncmp(text, "bounded:", 8) != 0)
        return kl_error(KL_EINVAL, "gate_kind: expected softplus or bounded:LB, got '%.40s'", text);
    c->gate = KDA_GATE_BOUNDED;
    return parse_float("gate_kind=bounded", text + 8, &c->gate_lower_bound);
}

/* Keeps the gate's granularity: by channel, by head, or blocks of the same size. */
static kl_status set_head_dim(kl_config *c, const char *text)
{
    int64_t old = c->kda_head_dim, G = c->gate_values, block = G ? old / G : 0;
    KL_TRY(parse_integer("head_dim", text, 1, KDA_MAX_DIM, &c->kda_head_dim));
    if (G == old)
        c->gate_values = c->kda_head_dim;
    else if (G > 1) {
        KL_REQUIRE(c->kda_head_dim % block == 0, "head_dim: expected a multiple of the gate's blocks of %lld, got %lld", (long long)block,
                   (long long)c->kda_head_dim);
        c->gate_values = c->kda_head_dim / block;
    }
    return kl_ok();
}

/* Both kinds of layer get that many heads. */
static kl_status set_heads(kl_config *c, const char *text)
{
    KL_TRY(parse_integer("heads", text, 1, 4096, &c->kda_heads));
    c->num_heads = c->kda_heads;
    return kl_ok();
}

/* Cuts the layers, or repeats what the first ones do: hybrid=3:1 is implied where both kinds occur. */
static kl_status set_layers(kl_config *c, const char *text)
{
    int64_t old = c->num_layers, kda = 0;
    KL_TRY(parse_integer("layers", text, 1, KL_MAX_LAYERS, &c->num_layers));
    for (int64_t i = 0; i < old; i++)
        kda += c->mixer[i] == KL_MIX_KDA;
    for (int64_t i = old; i < c->num_layers; i++)
        c->sparse[i] = c->sparse[old - 1];
    return set_hybrid(c, kda == 0 ? "0:1" : kda == old ? "n:0" : "3:1");
}

/* Without experts every layer is dense; with some, all but the first are sparse unless some already are. */
static kl_status set_experts(kl_config *c, const char *text)
{
    KL_TRY(parse_integer("experts", text, 0, 4096, &c->num_experts));
    bool any = memchr(c->sparse, 1, (size_t)c->num_layers) != NULL;
    if (c->num_experts == 0)
        memset(c->sparse, 0, sizeof c->sparse);
    else if (!any)
        memset(c->sparse + 1, 1, (size_t)c->num_layers - 1);
    if (c->top_k > c->num_experts)
        c->top_k = c->num_experts;
    return kl_ok();
}

static kl_status set_first_dense(kl_config *c, const char *text)
{
    int64_t first = 0;
    KL_TRY(parse_integer("first_dense", text, 0, c->num_layers, &first));
    for (int64_t i = 0; i < c->num_layers; i++)
        c->sparse[i] = i >= first;
    return kl_ok();
}

static kl_status set_dtype(kl_config *c, const char *text)
{
    static const char *const names[] = {"float32", "bfloat16", "float16", NULL}, *const shorts[] = {"f32", "bf16", "f16", NULL};
    int dtype = 0;
    if (kl_failed(parse_choice("dtype", text, shorts, &dtype)))
        KL_TRY(parse_choice("dtype", text, names, &dtype));
    c->dtype = (kl_dtype)dtype;
    return kl_ok();
}

static kl_status set_output_gate(kl_config *c, const char *text)
{
    int kind = 0;
    KL_TRY(parse_choice("output_gate", text, kl_output_gate_names, &kind));
    c->output_gate = (kda_output_gate)kind;
    return kl_ok();
}

static kl_status set_beta(kl_config *c, const char *text)
{
    static const char *const names[] = {"sigmoid", "sigmoid2", NULL};
    int kind = 0;
    KL_TRY(parse_choice("beta", text, names, &kind));
    c->beta_kind = kind ? KDA_BETA_SIGMOID2 : KDA_BETA_SIGMOID;
    return kl_ok();
}

static kl_status set_router(kl_config *c, const char *text)
{
    static const char *const names[] = {"sigmoid", "softmax", NULL};
    int kind = 0;
    KL_TRY(parse_choice("router", text, names, &kind));
    c->router_kind = kind ? MOE_SOFTMAX : MOE_SIGMOID;
    return kl_ok();
}

static kl_status set_rope(kl_config *c, const char *text)
{
    int64_t rope = 0;
    KL_TRY(parse_integer("rope", text, 0, 1, &rope));
    c->mla_use_nope = !rope;
    return kl_ok();
}

static const struct {
    const char *key;
    kl_status (*set)(kl_config *c, const char *text);
} rules[] = {
    {"hybrid", set_hybrid}, {"gate", set_gate}, {"gate_kind", set_gate_kind}, {"head_dim", set_head_dim}, {"heads", set_heads}, {"layers", set_layers},
    {"experts", set_experts}, {"first_dense", set_first_dense}, {"dtype", set_dtype}, {"output_gate", set_output_gate}, {"beta", set_beta},
    {"router", set_router}, {"rope", set_rope},
};

/* Plain sizes; kl_config_validate has the last word about them. */
static const struct {
    const char *key;
    size_t offset;
    int64_t low, high;
} sizes[] = {
    {"vocab", offsetof(kl_config, vocab_size), 1, 1 << 28},
    {"hidden", offsetof(kl_config, hidden_size), 1, 1 << 17},
    {"max_length", offsetof(kl_config, max_length), 1, (int64_t)1 << 32},
    {"conv", offsetof(kl_config, conv_width), 0, 16},
    {"kda_heads", offsetof(kl_config, kda_heads), 1, 4096},
    {"mla_heads", offsetof(kl_config, num_heads), 1, 4096},
    {"latent", offsetof(kl_config, kv_lora_rank), 1, 1 << 16},
    {"nope_dim", offsetof(kl_config, qk_nope_head_dim), 1, 4096},
    {"rope_dim", offsetof(kl_config, qk_rope_head_dim), 0, 4096},
    {"v_dim", offsetof(kl_config, v_head_dim), 1, 4096},
    {"inner", offsetof(kl_config, intermediate_size), 1, 1 << 20},
    {"moe_inner", offsetof(kl_config, moe_intermediate_size), 1, 1 << 20},
    {"top_k", offsetof(kl_config, top_k), 1, 4096},
    {"shared", offsetof(kl_config, num_shared_experts), 0, 64},
    {"groups", offsetof(kl_config, n_group), 1, 4096},
    {"topk_groups", offsetof(kl_config, topk_group), 1, 4096},
    {"bos", offsetof(kl_config, bos_id), -1, 1 << 28},
    {"eos", offsetof(kl_config, eos_id), -1, 1 << 28},
    {"pad", offsetof(kl_config, pad_id), -1, 1 << 28},
};

static const struct {
    const char *key;
    size_t offset;
} floats[] = {
    {"norm_eps", offsetof(kl_config, rms_norm_eps)},
    {"kv_a_norm_eps", offsetof(kl_config, kv_a_norm_eps)},
    {"rope_theta", offsetof(kl_config, rope_theta)},
    {"scaling", offsetof(kl_config, routed_scaling_factor)},
}, flags[] = {
    {"tied", offsetof(kl_config, tie_word_embeddings)},
    {"renormalize", offsetof(kl_config, moe_renormalize)},
    {"biased_weights", offsetof(kl_config, moe_biased_weights)},
};

static kl_status set_one(kl_config *c, const char *key, const char *text)
{
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (strcmp(key, rules[i].key) == 0)
            return rules[i].set(c, text);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (strcmp(key, sizes[i].key) == 0)
            return parse_integer(key, text, sizes[i].low, sizes[i].high, (int64_t *)((char *)c + sizes[i].offset));
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++)
        if (strcmp(key, floats[i].key) == 0)
            return parse_float(key, text, (float *)((char *)c + floats[i].offset));
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (strcmp(key, flags[i].key) == 0) {
            int64_t on = 0;
            KL_TRY(parse_integer(key, text, 0, 1, &on));
            *(bool *)((char *)c + flags[i].offset) = on;
            return kl_ok();
        }
    return kl_error(KL_EINVAL, "%s: unknown option of a model", key);
}

kl_status kl_config_set(kl_config *c, const char *assignment)
{
    char key[32];
    const char *equals = strchr(assignment, '=');
    if (!equals || equals == assignment || (size_t)(equals - assignment) >= sizeof key)
        return kl_error(KL_EINVAL, "expected key=value, got '%.60s'", assignment);
    memcpy(key, assignment, (size_t)(equals - assignment));
    key[equals - assignment] = '\0';
    kl_config changed = *c;
    KL_TRY(set_one(&changed, key, equals + 1));
    *c = changed;
    return kl_ok();
}
