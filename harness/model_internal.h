/* What the files of the model share among themselves: the view of one call, the activations of a layer, and the layers'
 * forward and backward. Nothing outside harness/model*.c and harness/layer_*.c includes this.
 *
 * Legend: T packed tokens, D hidden, P = kda_heads kda_head_dim, r the gate rank, G gate values a head, R + Dr a latent row. */
#ifndef KL_HARNESS_MODEL_INTERNAL_H
#define KL_HARNESS_MODEL_INTERNAL_H

#include "common/arena.h"
#include "harness/model.h"

/* One call: the tokens, where each belongs, and scratch for the kernels. */
typedef struct kl_call {
    kl_model *m;
    kl_cache *cache;      /* NULL: every sequence starts from nothing */
    int64_t N, T;
    const int64_t *cu;    /* [N+1] */
    const int32_t *ids;   /* [T] */
    const int64_t *slot;  /* [N]; NULL: n */
    int64_t *position;    /* [T] place of each token in its sequence */
    int64_t *row;         /* [T] its row in the latent cache; NULL without cache */
    int64_t *kv_start, *kv_len; /* [N] latent rows of each sequence */
    void *scratch;        /* workspace of the family kernels */
    size_t scratch_bytes;
} kl_call;

typedef struct kl_kda_acts {
    float *q_in, *k_in, *v_in; /* [T,P] projections */
    float *q, *k, *v;          /* [T,P] after convolution and SiLU */
    float *f, *g;              /* [T,r], [T,HV G] decay before its gate */
    float *beta;               /* [T,HV] before the sigmoid */
    float *o;                  /* [T,P] of the operator */
    float *z_in, *z;           /* [T,r], [T,P] output gate before its function */
    float *y;                  /* [T,P] after the gated norm */
} kl_kda_acts;

typedef struct kl_mla_acts {
    float *q;                  /* [T,H(Dn+Dr)] */
    float *kv;                 /* [T,R+Dr] projection */
    float *latent;             /* [T,R+Dr] normalised, rotated if the model rotates */
    float *o;                  /* [T,H Dv] */
    float *lse;                /* [T,H] */
} kl_mla_acts;

typedef struct kl_layer_acts {
    float *h_mix, *h_mlp;      /* [T,D] normalised inputs of the two halves */
    float *mid;                /* [T,D] stream between them */
    float *y;                  /* [T,D] what the MLP adds */
    int32_t *chosen;           /* [T,top_k]; NULL: nobody counts */
    kl_kda_acts kda;
    kl_mla_acts mla;
} kl_layer_acts;

/* Gradients of one layer's activations, named after them. */
typedef struct kl_layer_dacts {
    float *dh;                 /* [T,D] */
    kl_kda_acts kda;
    kl_mla_acts mla;
} kl_layer_dacts;

/* Pieces of the arena; NULL pieces when it only counts. A backward pass needs each activation to survive: without one
 * (backward false) buffers whose content is spent serve again. */
void kl_kda_carve(kl_arena *a, const kl_config *c, int64_t T, bool backward, kl_kda_acts *acts);
void kl_mla_carve(kl_arena *a, const kl_config *c, int64_t T, kl_mla_acts *acts);

/* Bytes of scratch of layer l. */
size_t kl_kda_scratch(const kl_call *c, int64_t l, const kl_kda_acts *a, kl_pass pass);
size_t kl_mla_scratch(const kl_call *c, int64_t l, const kl_mla_acts *a, kl_pass pass);
size_t kl_mlp_scratch(const kl_call *c, int64_t l, const kl_layer_acts *a, kl_pass pass);

/* out += mixer(h): h [T,D], out [T,D]. */
kl_status kl_kda_layer(const kl_call *c, int64_t l, const float *h, const kl_kda_acts *a, float *out);
kl_status kl_mla_layer(const kl_call *c, int64_t l, const float *h, const kl_mla_acts *a, float *out);
/* a->y = mlp(a->h_mlp). */
kl_status kl_mlp_layer(const kl_call *c, int64_t l, const kl_layer_acts *a);

/* Given dout [T,D] and the activations of the forward pass: dh overwritten, parameter gradients accumulated into g. */
kl_status kl_kda_layer_backward(const kl_call *c, int64_t l, const float *h, const kl_kda_acts *a, const float *dout,
                                const kl_kda_acts *d, float *dh, kl_layer *g);
kl_status kl_mla_layer_backward(const kl_call *c, int64_t l, const float *h, const kl_mla_acts *a, const float *dout,
                                const kl_mla_acts *d, float *dh, kl_layer *g);
kl_status kl_mlp_layer_backward(const kl_call *c, int64_t l, const kl_layer_acts *a, const float *dout, float *dh, kl_layer *g);

/* One whole layer: out = in + mixer + mlp. in, a->mid and out may be one buffer when no backward pass follows. */
void kl_layer_carve(kl_arena *a, const kl_config *c, int64_t T, bool backward, bool chosen, kl_layer_acts *acts);
size_t kl_layer_scratch(const kl_call *c, const kl_layer_acts *a, kl_pass pass); /* the most of any layer */
kl_status kl_layer_forward(const kl_call *c, int64_t l, const float *in, const kl_layer_acts *a, float *out);

/* Checks the batch (and the cache, when there is one), then fills the call, its index arrays included. */
kl_status kl_call_begin(kl_call *c, kl_model *m, const kl_batch *batch, kl_cache *cache);

/* Files of another model are told by it: cache files, training states. */
uint64_t kl_model_fingerprint(const kl_config *c);

/* Fills m->identity, which is 0 until it is needed and after the weights have changed. */
kl_status kl_model_identify(kl_model *m);

/* Makes the workspace at least that large; its content may be lost. */
kl_status kl_model_reserve(kl_model *m, size_t bytes);

#endif
