/* The whole model's configuration and parameters, in the reference's terms. Names are the released checkpoint's. */
#ifndef REFERENCE_WEIGHTS_H
#define REFERENCE_WEIGHTS_H

#include "reference/kda.h"
#include "reference/moe.h"
#include "reference/norm.h"
#include "reference/real.h"

typedef enum { REF_MIX_KDA, REF_MIX_MLA } ref_mixer;

typedef struct {
    int64_t vocab, D, L;             /* vocabulary, hidden size, layers */
    const unsigned char *mixer;      /* [L] ref_mixer */
    const unsigned char *sparse;     /* [L] 1: mixture of experts, 0: dense */
    real norm_eps;                   /* of every RMSNorm but kv_a_norm */
    int tied;                        /* 1: the head is the embedding */

    /* KDA: query, key and value heads alike, K = V = head dimension = rank of the two low-rank projections */
    int64_t kda_heads, kda_head_dim;
    int64_t G;                       /* gate values a head, see kda.h */
    int64_t conv_width;              /* 0: no convolution, the SiLU stays */
    ref_gate_kind gate;
    real lower_bound;                /* bounded gate only */
    ref_beta_kind beta_kind;
    ref_output_gate output_gate;

    /* MLA */
    int64_t heads, R, Dn, Dr, Dv;    /* see mla.h */
    int rope;                        /* 1: the Dr shared dimensions are rotated */
    real rope_theta;
    real kv_a_eps;                   /* 1e-6 in transformers and in the shipped remote code */

    /* feed-forward, see mlp.h and moe.h */
    int64_t I_dense;
    int64_t E, top_k, I, Is, n_group, topk_group;
    ref_router_kind router;
    int renormalize, biased_weights;
    real scaling;
} ref_config;

/* One layer; what its kind does not have is NULL. P = kda_heads kda_head_dim, r = kda_head_dim. */
typedef struct {
    real *input_norm, *post_norm;            /* [D] */
    /* KDA */
    real *q_proj, *k_proj, *v_proj;          /* [P,D] */
    real *q_conv, *k_conv, *v_conv;          /* [P,W] */
    real *f_a, *f_b;                         /* [r,D], [kda_heads*G,r] */
    real *A_log, *dt_bias;                   /* [kda_heads], [kda_heads*G] */
    real *b_proj;                            /* [kda_heads,D] */
    real *g_a, *g_b;                         /* [r,D], [P,r] */
    real *o_norm;                            /* [kda_head_dim] */
    /* MLA */
    real *mla_q;                             /* [heads*(Dn+Dr),D] */
    real *kv_a, *kv_a_norm;                  /* [R+Dr,D], [R] */
    real *kv_b;                              /* [heads*(Dn+Dv),R] */
    /* both */
    real *o_proj;                            /* [D,P] or [D,heads*Dv] */
    /* dense */
    real *gate_proj, *up_proj, *down_proj;   /* [I_dense,D], [I_dense,D], [D,I_dense] */
    /* sparse */
    real *router, *router_bias;              /* [E,D], [E]: the bias has no gradient */
    real **w1, **w2, **w3;                   /* [E] pointers to [I,D] (gate), [D,I] (down), [I,D] (up) */
    real *shared_gate, *shared_up, *shared_down; /* [Is,D], [Is,D], [D,Is] */
} ref_layer;

typedef struct {
    real *embed;                             /* [vocab,D] */
    ref_layer *layers;                       /* [L] */
    real *norm;                              /* [D] */
    real *lm_head;                           /* [vocab,D], NULL when tied */
} ref_weights;

/* All zero: parameters to be filled, or their gradients. Returns 0, or -1 when out of memory (nothing is kept then). */
int ref_weights_new(const ref_config *c, ref_weights *w);
void ref_weights_free(const ref_config *c, ref_weights *w);

/* Calls fn for every parameter that the configuration has, in a fixed order; stops at the first result other than 0 and returns it.
 * Vectors have rows = 1. The name, such as "model.layers.3.self_attn.q_proj.weight", is valid during the call only. */
typedef int (*ref_param_fn)(void *user, const char *name, int64_t rows, int64_t columns, real **param);
int ref_weights_each(const ref_config *c, ref_weights *w, ref_param_fn fn, void *user);

#endif
