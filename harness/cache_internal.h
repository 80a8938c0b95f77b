/* What cache.c and cache_file.c share. */
#ifndef KL_HARNESS_CACHE_INTERNAL_H
#define KL_HARNESS_CACHE_INTERNAL_H

#include "harness/cache.h"

typedef enum kl_cache_part { KL_PART_STATE = 0, KL_PART_TAIL, KL_PART_LATENT, KL_PARTS } kl_cache_part;
typedef void (*kl_cache_part_fn)(void *user, kl_cache_part part, void *data, size_t bytes);

/* Every piece of a slot in the order of the file: layer by layer the KDA state and the tails of q, k, v; then layer by
 * layer the first `length` latent rows. */
void kl_cache_each_part(const kl_cache *cache, int64_t slot, int64_t length, kl_cache_part_fn fn, void *user);

/* The slot's content has been replaced by `length` tokens from elsewhere: marks of its former tokens are void. */
void kl_cache_replace(kl_cache *cache, int64_t slot, int64_t length);

#endif
