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
    kl_dtype tail_dtype;        /* likewise */
    float **kda_state;          /* [layers] -> [slots,HV,K,V]; NULL for MLA layers */
    void **conv_tail;           /* [layers] -> [3,slots,P,W-1]: q, k, v, each a pool of its own; NULL for MLA layers or without convolution */
    void **latent;              /* [layers] -> [slots,capacity,R+Dr]; NULL for KDA layers */
    void *memory;               /* the one block behind all of them; pages never written cost nothing */
    size_t bytes;               /* of that block: slots times kl_cache_bytes */
    uint64_t model;             /* identity of the model that fills it; 0: none has yet */
    uint64_t *written;          /* [slots,capacity] which write put each token there: how a mark tells its tokens from others */
    uint64_t writes;            /* so far */
} kl_cache;

/* Bytes for one sequence of `capacity` tokens, exactly; the parts are reported where not NULL. Latents in 2 bytes for BF16.
 * SIZE_MAX: more than size_t can say. */
size_t kl_cache_bytes(const kl_config *c, int64_t capacity, size_t *kda_state, size_t *conv_tail, size_t *latents);

kl_status kl_cache_create(kl_cache **cache, const kl_config *c, int64_t slots, int64_t capacity);
void kl_cache_destroy(kl_cache *cache);
void kl_cache_reset(kl_cache *cache, int64_t slot);
/* Can a model of this configuration use the cache? KL_EINVAL names the first difference. */
kl_status kl_cache_matches(const kl_cache *cache, const kl_config *c);
/* The model has written `tokens` more into the slot. */
void kl_cache_advance(kl_cache *cache, int64_t slot, int64_t tokens);
kl_status kl_cache_fork(kl_cache *cache, int64_t from, int64_t to); /* slot `to` becomes a copy of slot `from` */

/* A kept checkpoint: KDA states and tails copied, latents by length. Rewinding to one that is longer than the slot
 * is now, of another cache or slot, or whose tokens have been overwritten since, is refused. */
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
