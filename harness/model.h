/* The whole model: embedding, layers, final norm, head; forward, loss and backward. One copy for every
 * device and for training and generation alike: it speaks to the kernels through kl_ops. */
#ifndef KL_HARNESS_MODEL_H
#define KL_HARNESS_MODEL_H

#include "harness/cache.h"
#include "harness/ops.h"
#include "harness/weights.h"

typedef struct kl_model {
    kl_ctx *ctx;
    const kl_ops *ops;
    kl_config config;
    kl_weights weights;
    /* Pinned by name, or NULL: dispatch by shape. A pinned variant without a backward pass leaves that one to dispatch. */
    const char *kda_variant, *mla_variant, *moe_variant;
    int64_t *expert_load;     /* [layers,E]; NULL: not counted. kl_model_loss adds how many tokens chose each expert */
    size_t keep_bytes;        /* activations that kl_model_loss may keep for its backward pass instead of recomputing; 0: 1 GiB */
    /* private */
    void *workspace;          /* grows between calls, never inside a kernel call */
    size_t workspace_bytes;
    int64_t *index;           /* host memory: positions and rows of the current call's tokens */
    size_t index_count;
    uint64_t identity;        /* of configuration and weights: whose caches these are; 0: to be computed */
    float *unit_taps;         /* [P] ones, when the model has no short convolution */
} kl_model;

kl_status kl_model_open(kl_model **m, kl_ctx *ctx, const char *dir);                       /* maps a checkpoint */
kl_status kl_model_random(kl_model **m, kl_ctx *ctx, const kl_config *c, uint64_t seed);   /* owned float weights */
void kl_model_close(kl_model *m);
/* Gives the workspace back when it is larger than `keep` bytes: a long prompt's is much larger than a decoding step needs. */
void kl_model_trim(kl_model *m, size_t keep);

/* N packed sequences: tokens cu[n] .. cu[n+1]-1 of ids. With a cache, sequence n continues slot[n] (all distinct) and
 * its length grows; without, it starts from nothing. */
typedef struct kl_batch {
    int64_t N;
    const int64_t *cu;        /* [N+1] */
    const int32_t *ids;       /* [cu[N]], each in [0, vocab) */
    const int64_t *slot;      /* [N]; NULL: n */
} kl_batch;

/* What is wanted back; all optional. */
typedef struct kl_outputs {
    float *logits;            /* [cu[N],vocab], or [N,vocab] with last_only */
    bool last_only;           /* logits of each sequence's last token only; an empty sequence leaves its row alone */
    float **hidden;           /* [layers+1] -> [cu[N],D]: embeddings, the stream after each layer, the last one after the final norm */
} kl_outputs;

/* Refuses ids outside the vocabulary, a sequence beyond the cache's capacity or the model's max_length, by name.
 * The cache is untouched when the arguments are refused. */
kl_status kl_model_forward(kl_model *m, const kl_batch *batch, kl_cache *cache, const kl_outputs *out);

/* Mean cross-entropy over targets >= 0 (targets [cu[N]], -1: not counted) and, when grads is not NULL, its gradient
 * times grad_scale added to grads (float, shaped like the weights). Activations are recomputed layer by layer where that
 * saves memory. *tokens: how many targets counted. */
kl_status kl_model_loss(kl_model *m, const kl_batch *batch, const int32_t *targets, double *loss, int64_t *tokens,
                        kl_weights *grads, float grad_scale);

#endif
