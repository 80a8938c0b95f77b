/* What every configuration must satisfy, wherever it came from, and how many parameters it has. */
#include "harness/config.h"

#include <math.h>
#include <string.h>

#include "harness/weights.h"

const char *const kl_output_gate_names[] = {"sigmoid", "swish", "none", NULL};

/* Bounds that keep every product of sizes within 63 bits, far above any model. */
enum { HIDDEN_MAX = 1 << 17, INNER_MAX = 1 << 20, HEADS_MAX = 4096, HEAD_DIM_MAX = 4096, LATENT_MAX = 1 << 16, EXPERTS_MAX = 4096, SHARED_MAX = 64,
       VOCAB_MAX = 1 << 28, CONV_MAX = 16 };
static const int64_t LENGTH_MAX = (int64_t)1 << 32;

typedef struct {
    const char *key; /* as config.json spells it */
    int64_t value, low, high;
} bound;

static kl_status check_bounds(const bound *b, int n)
{
    for (int i = 0; i < n; i++)
        KL_REQUIRE(b[i].value >= b[i].low && b[i].value <= b[i].high, "%s: expected %lld to %lld, got %lld", b[i].key, (long long)b[i].low,
                   (long long)b[i].high, (long long)b[i].value);
    return kl_ok();
}

#define CHECK(...)                                                                                  \
    do {                                                                                            \
        const bound bounds_[] = {__VA_ARGS__};                                                      \
        KL_TRY(check_bounds(bounds_, (int)(sizeof bounds_ / sizeof *bounds_)));                     \
    } while (0)

static kl_status check_positive(const char *key, float x)
{
    KL_REQUIRE(x > 0 && isfinite(x), "%s: expected a positive number, got %g", key, (double)x);
    return kl_ok();
}

static kl_status check_model(const kl_config *c)
{
    CHECK({"num_hidden_layers", c->num_layers, 1, KL_MAX_LAYERS}, {"vocab_size", c->vocab_size, 1, VOCAB_MAX}, {"hidden_size", c->hidden_size, 1, HIDDEN_MAX},
          {"model_max_length", c->max_length, 1, LENGTH_MAX}, {"bos_token_id", c->bos_id, -1, c->vocab_size - 1},
          {"eos_token_id", c->eos_id, -1, c->vocab_size - 1}, {"pad_token_id", c->pad_id, -1, c->vocab_size - 1});
    KL_TRY(check_positive("rms_norm_eps", c->rms_norm_eps));
    KL_REQUIRE(c->dtype == KL_F32 || c->dtype == KL_BF16 || c->dtype == KL_F16, "dtype: expected float32, bfloat16 or float16, got %s",
               kl_dtype_name(c->dtype));
    for (int64_t i = 0; i < c->num_layers; i++)
        KL_REQUIRE(c->mixer[i] <= KL_MIX_MLA && c->sparse[i] <= 1, "layer %lld: expected a KDA or MLA mixer, dense or sparse", (long long)i + 1);
    return kl_ok();
}

static kl_status check_kda(const kl_config *c)
{
    CHECK({"linear_attn_config.num_heads", c->kda_heads, 1, HEADS_MAX}, {"linear_attn_config.head_dim", c->kda_head_dim, 1, KDA_MAX_DIM},
          {"linear_attn_config.short_conv_kernel_size", c->conv_width, 0, CONV_MAX});
    int64_t G = c->gate_values;
    KL_REQUIRE(G >= 0 && G <= c->kda_head_dim && (G == 0 || c->kda_head_dim % G == 0), "kl_gate_values: expected 0 or a divisor of head_dim = %lld, got %lld",
               (long long)c->kda_head_dim, (long long)G);
    KL_REQUIRE(c->gate == KDA_GATE_SOFTPLUS || c->gate == KDA_GATE_BOUNDED, "gate: expected softplus or bounded, got %d", (int)c->gate);
    KL_REQUIRE(c->gate != KDA_GATE_BOUNDED || (c->gate_lower_bound >= -5 && c->gate_lower_bound < 0), "gate_lower_bound: expected -5 to below 0, got %g",
               (double)c->gate_lower_bound);
    KL_REQUIRE(c->beta_kind == KDA_BETA_SIGMOID || c->beta_kind == KDA_BETA_SIGMOID2, "kl_beta: expected sigmoid or sigmoid2, got %d", (int)c->beta_kind);
    KL_REQUIRE((unsigned)c->output_gate <= KDA_OUT_NONE, "kl_output_gate: expected sigmoid, swish or none, got %d", (int)c->output_gate);
    return kl_ok();
}

static kl_status check_mla(const kl_config *c)
{
    CHECK({"num_attention_heads", c->num_heads, 1, HEADS_MAX}, {"kv_lora_rank", c->kv_lora_rank, 1, LATENT_MAX},
          {"qk_nope_head_dim", c->qk_nope_head_dim, 1, HEAD_DIM_MAX}, {"qk_rope_head_dim", c->qk_rope_head_dim, 0, HEAD_DIM_MAX},
          {"v_head_dim", c->v_head_dim, 1, HEAD_DIM_MAX});
    KL_TRY(check_positive("kl_kv_a_norm_eps", c->kv_a_norm_eps));
    KL_REQUIRE(c->mla_use_nope || c->qk_rope_head_dim % 2 == 0, "qk_rope_head_dim: expected an even size to rotate, got %lld",
               (long long)c->qk_rope_head_dim);
    return c->mla_use_nope ? kl_ok() : check_positive("rope_theta", c->rope_theta);
}

static kl_status check_sparse(const kl_config *c)
{
    CHECK({"num_experts", c->num_experts, 1, EXPERTS_MAX}, {"num_experts_per_token", c->top_k, 1, c->num_experts},
          {"num_shared_experts", c->num_shared_experts, 0, SHARED_MAX}, {"moe_intermediate_size", c->moe_intermediate_size, 1, INNER_MAX},
          {"num_expert_group", c->n_group, 1, c->num_experts}, {"topk_group", c->topk_group, 1, c->n_group});
    int64_t group = c->num_experts / c->n_group;
    KL_REQUIRE(c->num_experts % c->n_group == 0, "num_expert_group: expected a divisor of num_experts = %lld, got %lld", (long long)c->num_experts,
               (long long)c->n_group);
    KL_REQUIRE(c->n_group == 1 || group >= 2, "num_expert_group: expected groups of 2 experts or more, got %lld groups of %lld", (long long)c->n_group,
               (long long)group);
    KL_REQUIRE(c->top_k <= c->topk_group * group, "num_experts_per_token: expected at most the %lld experts of topk_group groups, got %lld",
               (long long)(c->topk_group * group), (long long)c->top_k);
    KL_REQUIRE(c->router_kind == MOE_SIGMOID || c->router_kind == MOE_SOFTMAX, "moe_router_activation_func: expected sigmoid or softmax, got %d",
               (int)c->router_kind);
    return check_positive("routed_scaling_factor", c->routed_scaling_factor);
}

kl_status kl_config_validate(const kl_config *c)
{
    KL_TRY(check_model(c));
    bool kda = false, mla = false, dense = false, sparse = false;
    for (int64_t i = 0; i < c->num_layers; i++) {
        *(c->mixer[i] == KL_MIX_KDA ? &kda : &mla) = true;
        *(c->sparse[i] ? &sparse : &dense) = true;
    }
    if (kda)
        KL_TRY(check_kda(c));
    if (mla)
        KL_TRY(check_mla(c));
    if (dense)
        CHECK({"intermediate_size", c->intermediate_size, 1, INNER_MAX});
    return sparse ? check_sparse(c) : kl_ok();
}

typedef struct {
    const kl_config *c;
    kl_param_count n;
} counting;

static bool param_is_embedding(const kl_param_info *info) { return strcmp(info->name, "model.embed_tokens.weight") == 0; }

static kl_status count_param(void *user, const kl_param_info *info, kl_param *param)
{
    (void)param;
    counting *k = user;
    int64_t n = info->rows * info->columns;
    k->n.total += n;
    bool looked_up = info->layer < 0 && param_is_embedding(info) && !k->c->tie_word_embeddings;
    if (!looked_up && info->expert < k->c->top_k) /* any top_k of the equal experts */
        k->n.active += n;
    return kl_ok();
}

kl_param_count kl_config_params(const kl_config *c)
{
    counting k = {.c = c};
    (void)kl_weights_each(c, NULL, count_param, &k);
    return k.n;
}
