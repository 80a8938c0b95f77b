/* What a model remembers between calls: for each of `slots` sequences the KDA states, the convolution tails and
 * the MLA latents, sized at creation. */
#ifndef KL_HARNESS_CACHE_H
#define KL_HARNESS_CACHE_H

#include "common/context.h"
#include "harness/config.h"

typedef struct kl_cache {
    kl_config config;
    int64_t slots, capacity;    /* sequences; tokens each */
    int64_t *length;            /* [slots] tokens so far */
    kl_dtype latent_dtype;      /* BF16 when config.dtype is BF16, else F32 */
    float **kda_state;          /* [layers] -> [slots,HV,K,V]; NULL for MLA layers */
    float **conv_tail;          /* [layers] -> [slots,3 P,W-1] (q | k | v channels); NULL for MLA layers or without convolution */
    void **latent;              /* [layers] -> [slots,capacity,R+Dr]; NULL for KDA layers */
    void *memory;               /* the one block behind all of them */
    size_t bytes;
} kl_cache;

/* Bytes for one sequence of `capacity` tokens, exactly; the parts are reported where not NULL. Latents in 2 bytes for BF16. */
size_t kl_cache_bytes(const kl_config *c, int64_t capacity, size_t *kda_state, size_t *conv_tail, size_t *latents);

kl_status kl_cache_create(kl_cache **cache, const kl_config *c, int64_t slots, int64_t capacity);
void kl_cache_destroy(kl_cache *cache);
void kl_cache_reset(kl_cache *cache, int64_t slot);
kl_status kl_cache_fork(kl_cache *cache, int64_t from, int64_t to); /* slot `to` becomes a copy of slot `from` */

/* A kept checkpoint: KDA states and tails copied, latents by length (they only grow). Rewinding to one that is
 * longer than the slot is now, or of another cache, is refused. */
typedef struct kl_cache_mark kl_cache_mark;
kl_status kl_cache_keep(const kl_cache *cache, int64_t slot, kl_cache_mark **mark);
kl_status kl_cache_rewind(kl_cache *cache, int64_t slot, const kl_cache_mark *mark);
void kl_cache_mark_free(kl_cache_mark *mark);

/* One slot to and from a file: versioned, layout-tagged, checksummed; another model's, version's or layout's file is
 * refused by name, a damaged one too; the slot is untouched when loading fails. Saving is atomic. */
kl_status kl_cache_save(const kl_cache *cache, int64_t slot, const char *path);
kl_status kl_cache_load(kl_cache *cache, int64_t slot, const char *path);
kl_status kl_cache_load_memory(kl_cache *cache, int64_t slot, const void *bytes, size_t size, const char *name);

#endif
