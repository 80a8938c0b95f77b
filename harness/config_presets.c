/* The named models. */
#include <string.h>

#include "harness/config.h"

/* What all of them share; a preset changes what it must. */
static kl_config base(int64_t layers)
{
    kl_config c = {.num_layers = layers, .max_length = 1048576, .rms_norm_eps = 1e-5f, .dtype = KL_BF16, .bos_id = -1, .eos_id = -1, .pad_id = -1,
                   .conv_width = 4, .gate = KDA_GATE_SOFTPLUS, .beta_kind = KDA_BETA_SIGMOID, .output_gate = KDA_OUT_SIGMOID,
                   .mla_use_nope = true, .rope_theta = 10000, .kv_a_norm_eps = 1e-6f, .n_group = 1, .topk_group = 1,
                   .router_kind = MOE_SIGMOID, .moe_renormalize = true, .routed_scaling_factor = 2.446f, .num_shared_experts = 1};
    memset(c.sparse + 1, 1, (size_t)layers - 1);
    return c;
}

static void set_kda(kl_config *c, int64_t heads, int64_t head_dim)
{
    c->kda_heads = heads;
    c->kda_head_dim = c->gate_values = head_dim;
}

static void set_mla(kl_config *c, int64_t heads, int64_t latent, int64_t nope, int64_t rope, int64_t v)
{
    c->num_heads = heads;
    c->kv_lora_rank = latent;
    c->qk_nope_head_dim = nope;
    c->qk_rope_head_dim = rope;
    c->v_head_dim = v;
}

static void set_moe(kl_config *c, int64_t experts, int64_t top_k, int64_t inner)
{
    c->num_experts = experts;
    c->top_k = top_k;
    c->moe_intermediate_size = inner;
}

/* Kimi-Linear-48B-A3B as released. */
static kl_config preset_48b(void)
{
    kl_config c = base(27);
    c.vocab_size = 163840, c.hidden_size = 2304, c.intermediate_size = 9216;
    c.bos_id = 163584, c.eos_id = 163586, c.pad_id = 163839;
    set_kda(&c, 32, 128);
    set_mla(&c, 32, 512, 128, 64, 128);
    set_moe(&c, 256, 8, 1024);
    return c;
}

/* The size at which CPU speed is compared with transformers. */
static kl_config preset_60m(void)
{
    kl_config c = base(8);
    c.vocab_size = 16384, c.hidden_size = 512, c.intermediate_size = 1024;
    c.bos_id = 1, c.eos_id = 2, c.pad_id = 0, c.dtype = KL_F32;
    set_kda(&c, 4, 128);
    set_mla(&c, 8, 256, 64, 32, 64);
    set_moe(&c, 16, 4, 176);
    return c;
}

/* The bundled checkpoint: under 4 MB of bf16. Vocabulary: 2,039 ranks and the nine special tokens. */
static kl_config preset_demo(void)
{
    kl_config c = base(8);
    c.vocab_size = 2048, c.hidden_size = 128, c.intermediate_size = 384, c.tie_word_embeddings = true;
    c.bos_id = 2039, c.eos_id = 2040, c.pad_id = 2047, c.max_length = 8192;
    set_kda(&c, 4, 32);
    set_mla(&c, 4, 64, 32, 16, 32);
    set_moe(&c, 4, 2, 64);
    return c;
}

/* For tests: every part of the model at odd sizes. */
static kl_config preset_tiny(void)
{
    kl_config c = base(6);
    c.vocab_size = 512, c.hidden_size = 96, c.intermediate_size = 160, c.dtype = KL_F32, c.max_length = 4096;
    c.bos_id = 1, c.eos_id = 2, c.pad_id = 0;
    set_kda(&c, 4, 24);
    set_mla(&c, 4, 32, 24, 8, 24);
    set_moe(&c, 8, 2, 48);
    return c;
}

/* The synthetic recall tasks of the report's figure 4: two KDA layers, two heads of 128, dense MLPs. */
static kl_config preset_fig4(void)
{
    kl_config c = base(2);
    c.vocab_size = 512, c.hidden_size = 256, c.intermediate_size = 1024, c.dtype = KL_F32, c.max_length = 8192;
    memset(c.sparse, 0, 2);
    c.routed_scaling_factor = 1;
    set_kda(&c, 2, 128);
    set_mla(&c, 2, 128, 128, 64, 128);
    set_moe(&c, 0, 0, 0);
    c.num_shared_experts = 0;
    return c;
}

static const struct {
    const char *name, *hybrid;
    kl_config (*make)(void);
} presets[] = {
    {"48b", "hybrid=3:1", preset_48b}, {"60m", "hybrid=3:1", preset_60m},   {"demo", "hybrid=3:1", preset_demo},
    {"tiny", "hybrid=3:1", preset_tiny}, {"fig4", "hybrid=1:0", preset_fig4},
};
enum { PRESETS = sizeof presets / sizeof *presets };

const char *kl_config_preset_name(int i) { return i >= 0 && i < PRESETS ? presets[i].name : NULL; }

kl_status kl_config_preset(kl_config *c, const char *name)
{
    for (int i = 0; i < PRESETS; i++)
        if (strcmp(name, presets[i].name) == 0) {
            *c = presets[i].make();
            return kl_config_set(c, presets[i].hybrid);
        }
    return kl_error(KL_EINVAL, "preset: expected one of 48b, 60m, demo, tiny, fig4, got '%.60s'", name);
}
