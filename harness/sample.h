/* Choosing the next token. */
#ifndef KL_HARNESS_SAMPLE_H
#define KL_HARNESS_SAMPLE_H

#include "common/rng.h"
#include "common/status.h"

typedef struct kl_sampling {
    float temperature;        /* 0: greedy, lowest id wins ties */
    int64_t top_k;            /* 0: all */
    float top_p;              /* 1: all */
    float min_p;              /* 0: all; keeps p >= min_p * best */
    float repetition_penalty; /* 1: none; divides positive and multiplies negative logits of seen ids */
    uint64_t seed;
} kl_sampling;

kl_status kl_sampling_validate(const kl_sampling *s);
/* logits [vocab] are scratch. seen: ids so far. Order: penalty, temperature, top-k, top-p, min-p. scratch: [vocab] ints.
 * Unless greedy, one uniform number is drawn. -1: no logit is a number. */
int32_t kl_sample(const kl_sampling *s, kl_rng *rng, float *logits, int64_t vocab, const int32_t *seen, int64_t seen_count, int32_t *scratch);

#endif
