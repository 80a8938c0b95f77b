/* A model's configuration: config.json in the released and in the transformers-native spelling, the
 * presets, and the variants that the ablations ask for. */
#ifndef KL_HARNESS_CONFIG_H
#define KL_HARNESS_CONFIG_H

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"
#include "kda/gated_norm.h"
#include "kda/kda.h"
#include "moe/moe.h"

enum { KL_MAX_LAYERS = 512 };
typedef enum kl_mixer { KL_MIX_KDA = 0, KL_MIX_MLA } kl_mixer;

typedef struct kl_config {
    /* whole model */
    int64_t vocab_size, hidden_size, num_layers, max_length;
    float rms_norm_eps;
    bool tie_word_embeddings;
    kl_dtype dtype;                 /* of stored weights; also of the latent cache */
    int64_t bos_id, eos_id, pad_id; /* -1: none */
    unsigned char mixer[KL_MAX_LAYERS];  /* kl_mixer */
    unsigned char sparse[KL_MAX_LAYERS]; /* 1: mixture of experts, 0: dense MLP */

    /* KDA: H = HV = kda_heads, K = V = kda_head_dim, gate rank = kda_head_dim */
    int64_t kda_heads, kda_head_dim;
    int64_t conv_width;             /* taps; 0: no short convolution */
    kda_gate gate;                  /* SOFTPLUS (released) or BOUNDED (gate_lower_bound) */
    float gate_lower_bound;
    int64_t gate_values;            /* G: kda_head_dim (channel), a divisor (blocks), 1 (head: GDN), 0 (none) */
    kda_beta beta_kind;             /* SIGMOID, or SIGMOID2 */
    kda_output_gate output_gate;

    /* MLA */
    int64_t num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim;
    bool mla_use_nope;              /* false: rotary embedding on the qk_rope_head_dim */
    float rope_theta;
    float kv_a_norm_eps;            /* 1e-6 unless the file says otherwise */

    /* MLP */
    int64_t intermediate_size;
    int64_t num_experts, top_k, num_shared_experts, moe_intermediate_size, n_group, topk_group;
    moe_router router_kind;
    bool moe_renormalize, moe_biased_weights;
    float routed_scaling_factor;
} kl_config;

/* "sigmoid", "swish", "none" by kda_output_gate, then NULL: the words of config.json and of kl_config_set. */
extern const char *const kl_output_gate_names[];

/* Consistency of every field; the message names the key as config.json spells it. */
kl_status kl_config_validate(const kl_config *c);

/* From a config.json (at most 1 MiB) or from its text. Unknown keys are ignored unless they change the
 * computation in a way that is not supported (use_full_rank_gate, q_lora_rank, rope_scaling, biases, ...). */
kl_status kl_config_load(kl_config *c, const char *path);
kl_status kl_config_parse(kl_config *c, const char *text, size_t length);
/* Writes the released spelling, plus kl_* keys for what it cannot say (gate granularity, output gate). Atomic. */
kl_status kl_config_save(const kl_config *c, const char *path);

/* "48b" (the released model), "60m", "demo" (the bundled checkpoint), "tiny" (tests), "fig4" (2 layers, 2 heads of 128),
 * ...; kl_config_preset_name(i) lists them, NULL ends the list. */
kl_status kl_config_preset(kl_config *c, const char *name);
const char *kl_config_preset_name(int i);

/* One "key=value" of the ablations, applied on top: hybrid=3:1|0:1|1:1|7:1|15:1|n:0, gate=channel|block:B|head|none,
 * gate_kind=softplus|bounded:LB, rope=0|1, output_gate=sigmoid|swish|none, conv=0|W, layers=, hidden=, heads=, head_dim=,
 * experts=, top_k=, vocab=, dtype=, max_length=, biased_weights=0|1, beta=sigmoid|sigmoid2, router=sigmoid|softmax, tied=0|1, first_dense=,
 * kda_heads=, mla_heads=, latent=, nope_dim=, rope_dim=, v_dim=, inner=, moe_inner=, shared=, groups=, topk_groups=, scaling=,
 * renormalize=0|1, norm_eps=, kv_a_norm_eps=, rope_theta=, bos=, eos=, pad=. Unknown keys are refused by name. *c is untouched on failure.
 * hybrid=a:b repeats a KDA and b MLA layers, and where both kinds occur the last layer is MLA, as in the released model; setting
 * layers= or hybrid= afterwards redoes it (layers= keeps all-MLA and no-MLA, and makes any other mix 3:1). */
kl_status kl_config_set(kl_config *c, const char *assignment);

/* Parameters in all and active for one token: top_k of the experts; the embedding only as the head that it may be tied to,
 * since a token reads one row of it. */
typedef struct kl_param_count {
    int64_t total, active;
} kl_param_count;
kl_param_count kl_config_params(const kl_config *c);

#endif
