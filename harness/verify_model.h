/* A model's golden data, and the parts of its verification; private to harness/verify_model*.c. */
#ifndef KL_HARNESS_VERIFY_MODEL_H
#define KL_HARNESS_VERIFY_MODEL_H

#include "harness/model.h"
#include "harness/verify.h"

typedef struct kl_golden_model {
    kl_tensors *file;
    kl_model *model;
    int64_t rows, T;         /* input_ids [rows,T] */
    int32_t *ids;            /* [rows,T] */
    int64_t *cu;             /* [rows+1] */
    const float *logits;     /* [rows,T,vocab] */
    int32_t *greedy;         /* [greedy_count] */
    int64_t greedy_count, prompt_count;
} kl_golden_model;

/* Logits, every hidden state, loss and every gradient, under the name of the variants that the model is pinned to. */
kl_status kl_verify_model_tensors(kl_verifier *v, const kl_golden_model *g, const char *variant, bool gradients);
/* Every grad.NAME of the file against the same parameter's gradient in grads. */
kl_status kl_verify_model_grads(kl_verifier *v, const kl_golden_model *g, kl_weights *grads, const char *variant);
/* Greedy ids with and without the cache; the cache's save, load, fork and rewind; chunked prefill. */
kl_status kl_verify_model_cache(kl_verifier *v, const kl_golden_model *g);

#endif
