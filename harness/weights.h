/* The parameters of a model. kl_weights_each is the one place that knows their names and shapes: loading,
 * saving, initialising, counting, gradients and the optimizer all walk it. */
#ifndef KL_HARNESS_WEIGHTS_H
#define KL_HARNESS_WEIGHTS_H

#include "common/rng.h"
#include "harness/config.h"
#include "harness/safetensors.h"

/* A matrix or vector: contiguous, data NULL when the model has none. */
typedef struct kl_param {
    void *data;
    kl_dtype dtype;
    int64_t rows, columns; /* [rows,columns]; vectors: rows = 1 */
} kl_param;

typedef struct kl_layer {
    kl_param input_norm, post_norm;                  /* [D] */
    /* KDA; P = kda_heads kda_head_dim, r = kda_head_dim */
    kl_param q_proj, k_proj, v_proj;                 /* [P,D] */
    kl_param q_conv, k_conv, v_conv;                 /* [P,W] */
    kl_param f_a, f_b, dt_bias, A_log;               /* [r,D], [HV G,r], [HV G] F32, [HV] F32; none when G = 0 */
    kl_param b_proj;                                 /* [HV,D] */
    kl_param g_a, g_b;                               /* [r,D], [P,r]; none without output gate */
    kl_param o_norm;                                 /* [V] */
    /* MLA */
    kl_param mla_q, kv_a, kv_a_norm, kv_b;           /* [H(Dn+Dr),D], [R+Dr,D], [R], [H(Dn+Dv),R] */
    /* both */
    kl_param o_proj;                                 /* [D,P] or [D,H Dv] */
    /* dense */
    kl_param gate_proj, up_proj, down_proj;          /* [I,D], [I,D], [D,I] */
    /* sparse */
    kl_param router, router_bias;                    /* [E,D], [E] F32 */
    kl_param shared_gate, shared_up, shared_down;    /* [Is,D], [Is,D], [D,Is], Is = num_shared_experts * moe_intermediate_size */
    kl_param *w1, *w3, *w2;                          /* [E] of [I,D], [I,D], [D,I] */
    const void **w1_data, **w3_data, **w2_data;      /* [E]: the same data pointers, as moe_problem wants them */
} kl_layer;

typedef struct kl_weights {
    kl_param embed, norm, lm_head;                   /* [vocab,D], [D], [vocab,D] (= embed when tied) */
    int64_t num_layers;
    kl_layer *layers;
    kl_tensors *mapping;                             /* the file behind mapped parameters, or NULL */
    void *owned;                                     /* one block behind owned parameters, or NULL */
    size_t owned_bytes;
} kl_weights;

/* What each() is told of a parameter, in a fixed order. shape: as the released checkpoint stores it. */
typedef struct kl_param_info {
    const char *name;   /* released name, "model.layers.3.self_attn.q_proj.weight" */
    int ndim;
    int64_t shape[4];
    int64_t rows, columns; /* as kl_param has it */
    kl_dtype dtype;     /* in which it is stored when the model's dtype is config->dtype */
    float init_std;     /* initial standard deviation; 0: see init_kind */
    enum { KL_INIT_NORMAL, KL_INIT_ONES, KL_INIT_ZEROS, KL_INIT_A_LOG, KL_INIT_DT_BIAS } init_kind;
    bool decay;         /* weight decay applies (matrices) */
    bool trained;       /* false: the router's choice bias */
    int layer;          /* -1: outside the layers */
    int expert;         /* -1: none */
} kl_param_info;
typedef kl_status (*kl_param_fn)(void *user, const kl_param_info *info, kl_param *param);
/* Visits every parameter that the configuration has; stops at the first failure. w NULL: param is a stand-in without
 * data, for counting. Tied embeddings: lm_head is not visited. */
kl_status kl_weights_each(const kl_config *c, kl_weights *w, kl_param_fn fn, void *user);

/* Maps dir (config already loaded from it): released or transformers-native names, the fused forms split by
 * pointer (experts.gate_up_proj, conv1d), A_log as [1,1,H,1] or [H]. Missing, unknown or misshapen tensors are
 * refused by name with expected and actual shape. Nothing is copied, but router_bias, A_log and dt_bias into F32 where stored otherwise. */
kl_status kl_weights_open(kl_weights *w, const kl_config *c, const char *dir);
/* Owned float parameters, initialised from the seed (the same whatever the thread count). */
kl_status kl_weights_init(kl_weights *w, const kl_config *c, uint64_t seed);
/* Owned float parameters, all zero: gradients, moments. */
kl_status kl_weights_zeros(kl_weights *w, const kl_config *c);
/* config.json and model.safetensors with released names into dir, converted to dtype (A_log, dt_bias, choice bias stay F32). */
kl_status kl_weights_save(const kl_weights *w, const kl_config *c, kl_dtype dtype, const char *dir);
/* Owned float copy of any weights: what training starts from. */
kl_status kl_weights_to_f32(kl_weights *out, const kl_weights *in, const kl_config *c);
void kl_weights_free(kl_weights *w);

#endif
