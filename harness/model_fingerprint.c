/* Numbers that tell models apart: one for everything in a configuration that decides what the weights mean (not the type they are
 * stored in), one for the weights themselves. */
#include <string.h>

#include "harness/model_internal.h"

static const uint64_t FNV_START = 0xcbf29ce484222325u, FNV_PRIME = 0x100000001b3u;

static uint64_t fnv(uint64_t sum, const void *data, size_t bytes)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++)
        sum = (sum ^ p[i]) * FNV_PRIME;
    return sum;
}

static uint64_t fnv_int(uint64_t sum, int64_t x) { return fnv(sum, &x, sizeof x); }
static uint64_t fnv_float(uint64_t sum, float x) { return fnv(sum, &x, sizeof x); }

uint64_t kl_model_fingerprint(const kl_config *c)
{
    uint64_t s = FNV_START;
    s = fnv_int(s, c->vocab_size), s = fnv_int(s, c->hidden_size), s = fnv_int(s, c->num_layers);
    s = fnv_float(s, c->rms_norm_eps);
    s = fnv(s, c->mixer, (size_t)c->num_layers), s = fnv(s, c->sparse, (size_t)c->num_layers);
    s = fnv_int(s, c->kda_heads), s = fnv_int(s, c->kda_head_dim), s = fnv_int(s, c->conv_width);
    s = fnv_int(s, c->gate), s = fnv_float(s, c->gate_lower_bound), s = fnv_int(s, c->gate_values);
    s = fnv_int(s, c->beta_kind), s = fnv_int(s, c->output_gate);
    s = fnv_int(s, c->num_heads), s = fnv_int(s, c->kv_lora_rank), s = fnv_int(s, c->qk_nope_head_dim);
    s = fnv_int(s, c->qk_rope_head_dim), s = fnv_int(s, c->v_head_dim), s = fnv_int(s, c->mla_use_nope);
    s = fnv_float(s, c->rope_theta), s = fnv_float(s, c->kv_a_norm_eps);
    s = fnv_int(s, c->intermediate_size), s = fnv_int(s, c->num_experts), s = fnv_int(s, c->top_k);
    s = fnv_int(s, c->num_shared_experts), s = fnv_int(s, c->moe_intermediate_size), s = fnv_int(s, c->n_group);
    s = fnv_int(s, c->topk_group), s = fnv_int(s, c->router_kind), s = fnv_int(s, c->moe_renormalize);
    s = fnv_int(s, c->moe_biased_weights), s = fnv_float(s, c->routed_scaling_factor);
    return s;
}

/* Vectors whole, the first row of matrices outside the experts: enough to differ between any two trainings, little to read. */
static kl_status add_weights(void *user, const kl_param_info *info, kl_param *p)
{
    uint64_t *sum = user;
    if (info->expert < 0 && p->data)
        *sum = fnv(*sum, p->data, (size_t)p->columns * kl_dtype_size(p->dtype));
    return kl_ok();
}

kl_status kl_model_identify(kl_model *m)
{
    if (m->identity)
        return kl_ok();
    uint64_t sum = kl_model_fingerprint(&m->config);
    KL_TRY(kl_weights_each(&m->config, &m->weights, add_weights, &sum));
    m->identity = sum ? sum : 1;
    return kl_ok();
}
