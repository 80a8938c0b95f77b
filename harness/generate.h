/* Prompt in, text out: chunked prefill, then one token a step, for a batch of prompts of unequal length. */
#ifndef KL_HARNESS_GENERATE_H
#define KL_HARNESS_GENERATE_H

#include "harness/model.h"
#include "harness/sample.h"

typedef struct kl_generation {
    int64_t max_new;          /* tokens to add at most */
    int64_t prefill_chunk;    /* tokens a prefill call; 0: 512 */
    kl_sampling sampling;     /* sequence n draws from stream n of the seed: its text does not depend on its neighbours */
    const int64_t *stop_ids;
    int stop_count;
    /* called for each new token of sequence n as it is chosen; returning false stops that sequence. May be NULL. */
    bool (*on_token)(void *user, int64_t n, int32_t id);
    void *user;
} kl_generation;

typedef struct kl_generation_stats {
    double prefill_seconds, decode_seconds;
    int64_t prompt_tokens, new_tokens, decode_steps;
    size_t cache_bytes;
} kl_generation_stats;

/* prompt n: ids[n] of length lengths[n] >= 1, continuing slot n of the cache. new_ids[n]: room for max_new; new_counts[n]. */
kl_status kl_generate(kl_model *m, kl_cache *cache, int64_t N, const int32_t *const *ids, const int64_t *lengths,
                      const kl_generation *options, int32_t *const *new_ids, int64_t *new_counts, kl_generation_stats *stats);

#endif
