/* The cache of generation: sizes, memory, fork, keep and rewind. Files are in cache_file.c. */
#include "harness/cache_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common/arena.h"

struct kl_cache_mark {
    const kl_cache *cache;
    int64_t slot, length;
    uint64_t written; /* stamp of the last token */
    char *states;     /* per KDA layer: state, then the three tails */
};

static size_t state_count(const kl_config *c) { return (size_t)(c->kda_heads * c->kda_head_dim * c->kda_head_dim); }
/* Of one of q, k, v. */
static size_t tail_count(const kl_config *c)
{
    return c->conv_width > 1 ? (size_t)(c->kda_heads * c->kda_head_dim * (c->conv_width - 1)) : 0;
}
static size_t row_count(const kl_config *c) { return (size_t)(c->kv_lora_rank + c->qk_rope_head_dim); }
/* Of what is kept of the tokens themselves: latents and convolution tails. */
static kl_dtype kept_type(const kl_config *c) { return c->dtype == KL_BF16 ? KL_BF16 : KL_F32; }

static size_t layers_of(const kl_config *c, kl_mixer mixer)
{
    size_t n = 0;
    for (int64_t l = 0; l < c->num_layers; l++)
        n += c->mixer[l] == mixer;
    return n;
}

size_t kl_cache_bytes(const kl_config *c, int64_t capacity, size_t *kda_state, size_t *conv_tail, size_t *latents)
{
    bool overflow = capacity < 0;
    size_t kda = layers_of(c, KL_MIX_KDA), mla = layers_of(c, KL_MIX_MLA);
    size_t states = kl_mul(kda, kl_mul(state_count(c), sizeof(float), &overflow), &overflow);
    size_t tails = kl_mul(kda, kl_mul(3 * tail_count(c), kl_dtype_size(kept_type(c)), &overflow), &overflow);
    size_t rows = kl_mul(mla, kl_mul((size_t)capacity, row_count(c) * kl_dtype_size(kept_type(c)), &overflow), &overflow);
    if (overflow)
        states = tails = rows = SIZE_MAX;
    if (kda_state)
        *kda_state = states;
    if (conv_tail)
        *conv_tail = tails;
    if (latents)
        *latents = rows;
    size_t total;
    if (overflow || __builtin_add_overflow(states, tails, &total) || __builtin_add_overflow(total, rows, &total))
        return SIZE_MAX;
    return total;
}

/* Zeroed pages that cost nothing until they are written. */
static void *map_block(size_t bytes)
{
    void *p = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static void lay_out(kl_cache *cache)
{
    const kl_config *c = &cache->config;
    size_t slots = (size_t)cache->slots;
    char *at = cache->memory;
    for (int64_t l = 0; l < c->num_layers; l++)
        if (c->mixer[l] == KL_MIX_KDA) {
            cache->kda_state[l] = (float *)at;
            at += slots * state_count(c) * sizeof(float);
        }
    for (int64_t l = 0; l < c->num_layers; l++)
        if (c->mixer[l] == KL_MIX_KDA && tail_count(c)) {
            cache->conv_tail[l] = at;
            at += slots * 3 * tail_count(c) * kl_dtype_size(cache->tail_dtype);
        }
    for (int64_t l = 0; l < c->num_layers; l++)
        if (c->mixer[l] == KL_MIX_MLA) {
            cache->latent[l] = at;
            at += slots * (size_t)cache->capacity * row_count(c) * kl_dtype_size(cache->latent_dtype);
        }
}

kl_status kl_cache_create(kl_cache **out, const kl_config *c, int64_t slots, int64_t capacity)
{
    KL_REQUIRE(out, "cache: expected a place for it, got NULL");
    *out = NULL;
    KL_REQUIRE(c, "config: expected one, got NULL");
    KL_TRY(kl_config_validate(c));
    KL_REQUIRE(slots >= 1, "slots: expected at least 1, got %lld", (long long)slots);
    KL_REQUIRE(capacity >= 1, "capacity: expected at least 1 token, got %lld", (long long)capacity);
    bool overflow = false;
    size_t each = kl_cache_bytes(c, capacity, NULL, NULL, NULL);
    size_t stamps = kl_mul(kl_mul((size_t)slots, (size_t)capacity, &overflow), sizeof(uint64_t), &overflow);
    size_t bytes = kl_mul((size_t)slots, each, &overflow);
    if (overflow || each == SIZE_MAX || bytes > SIZE_MAX / 2)
        return kl_error(KL_ENOMEM, "cache: %lld slots of %lld tokens need more memory than can be addressed", (long long)slots,
                        (long long)capacity);
    kl_cache *cache = calloc(1, sizeof *cache);
    if (!cache)
        return kl_error(KL_ENOMEM, "cache: out of memory");
    size_t L = (size_t)c->num_layers;
    cache->config = *c;
    cache->slots = slots;
    cache->capacity = capacity;
    cache->latent_dtype = cache->tail_dtype = kept_type(c);
    cache->bytes = bytes;
    cache->length = calloc((size_t)slots, sizeof *cache->length);
    cache->kda_state = calloc(L, sizeof *cache->kda_state);
    cache->conv_tail = calloc(L, sizeof *cache->conv_tail);
    cache->latent = calloc(L, sizeof *cache->latent);
    cache->memory = map_block(bytes);
    cache->written = map_block(stamps);
    if (!cache->length || !cache->kda_state || !cache->conv_tail || !cache->latent || !cache->memory || !cache->written) {
        kl_cache_destroy(cache);
        return kl_error(KL_ENOMEM, "cache: out of memory for %zu bytes", bytes);
    }
    lay_out(cache);
    *out = cache;
    return kl_ok();
}

void kl_cache_destroy(kl_cache *cache)
{
    if (!cache)
        return;
    if (cache->memory)
        munmap(cache->memory, cache->bytes ? cache->bytes : 1);
    if (cache->written)
        munmap(cache->written, (size_t)cache->slots * (size_t)cache->capacity * sizeof *cache->written);
    free(cache->length);
    free(cache->kda_state);
    free(cache->conv_tail);
    free(cache->latent);
    free(cache);
}

/* ---- the parts of one slot ---- */

static float *state_of(const kl_cache *cache, int64_t l, int64_t slot)
{
    return cache->kda_state[l] + (size_t)slot * state_count(&cache->config);
}

/* which: 0 q, 1 k, 2 v. */
static size_t tail_bytes(const kl_cache *cache) { return tail_count(&cache->config) * kl_dtype_size(cache->tail_dtype); }

static void *tail_of(const kl_cache *cache, int64_t l, int which, int64_t slot)
{
    return (char *)cache->conv_tail[l] + ((size_t)which * (size_t)cache->slots + (size_t)slot) * tail_bytes(cache);
}

static char *rows_of(const kl_cache *cache, int64_t l, int64_t slot)
{
    return (char *)cache->latent[l] + (size_t)slot * (size_t)cache->capacity * row_count(&cache->config) * kl_dtype_size(cache->latent_dtype);
}

void kl_cache_each_part(const kl_cache *cache, int64_t slot, int64_t length, kl_cache_part_fn fn, void *user)
{
    const kl_config *c = &cache->config;
    for (int64_t l = 0; l < c->num_layers; l++) {
        if (!cache->kda_state[l])
            continue;
        fn(user, KL_PART_STATE, state_of(cache, l, slot), state_count(c) * sizeof(float));
        for (int which = 0; which < 3 && cache->conv_tail[l]; which++)
            fn(user, KL_PART_TAIL, tail_of(cache, l, which, slot), tail_bytes(cache));
    }
    for (int64_t l = 0; l < c->num_layers; l++)
        if (cache->latent[l])
            fn(user, KL_PART_LATENT, rows_of(cache, l, slot), (size_t)length * row_count(c) * kl_dtype_size(cache->latent_dtype));
}

static bool has_slot(const kl_cache *cache, int64_t slot) { return slot >= 0 && slot < cache->slots; }

static kl_status check_slot(const kl_cache *cache, const char *name, int64_t slot)
{
    KL_REQUIRE(cache, "cache: expected one, got NULL");
    KL_REQUIRE(has_slot(cache, slot), "%s: expected a slot from 0 to %lld, got %lld", name, (long long)(cache->slots - 1), (long long)slot);
    return kl_ok();
}

static void clear_part(void *user, kl_cache_part part, void *data, size_t bytes)
{
    (void)user;
    if (part != KL_PART_LATENT)
        memset(data, 0, bytes);
}

void kl_cache_reset(kl_cache *cache, int64_t slot)
{
    if (!cache || !has_slot(cache, slot))
        return;
    kl_cache_each_part(cache, slot, 0, clear_part, NULL);
    cache->length[slot] = 0;
}

static void stamp(kl_cache *cache, int64_t slot, int64_t from, int64_t to)
{
    cache->writes++;
    for (int64_t t = from; t < to; t++)
        cache->written[slot * cache->capacity + t] = cache->writes;
}

void kl_cache_advance(kl_cache *cache, int64_t slot, int64_t tokens)
{
    stamp(cache, slot, cache->length[slot], cache->length[slot] + tokens);
    cache->length[slot] += tokens;
}

void kl_cache_replace(kl_cache *cache, int64_t slot, int64_t length)
{
    stamp(cache, slot, 0, length);
    cache->length[slot] = length;
}

kl_status kl_cache_fork(kl_cache *cache, int64_t from, int64_t to)
{
    KL_TRY(check_slot(cache, "from", from));
    KL_TRY(check_slot(cache, "to", to));
    if (from == to)
        return kl_ok();
    const kl_config *c = &cache->config;
    size_t rows = (size_t)cache->length[from] * row_count(c) * kl_dtype_size(cache->latent_dtype);
    for (int64_t l = 0; l < c->num_layers; l++) {
        if (cache->kda_state[l])
            memcpy(state_of(cache, l, to), state_of(cache, l, from), state_count(c) * sizeof(float));
        for (int which = 0; which < 3 && cache->conv_tail[l]; which++)
            memcpy(tail_of(cache, l, which, to), tail_of(cache, l, which, from), tail_bytes(cache));
        if (cache->latent[l])
            memcpy(rows_of(cache, l, to), rows_of(cache, l, from), rows);
    }
    kl_cache_replace(cache, to, cache->length[from]);
    return kl_ok();
}

/* ---- keep and rewind ---- */

static void save_part(void *user, kl_cache_part part, void *data, size_t bytes)
{
    char **at = user;
    if (part == KL_PART_LATENT)
        return;
    memcpy(*at, data, bytes);
    *at += bytes;
}

static void restore_part(void *user, kl_cache_part part, void *data, size_t bytes)
{
    const char **at = user;
    if (part == KL_PART_LATENT)
        return;
    memcpy(data, *at, bytes);
    *at += bytes;
}

static uint64_t last_stamp(const kl_cache *cache, int64_t slot, int64_t length)
{
    return length ? cache->written[slot * cache->capacity + length - 1] : 0;
}

kl_status kl_cache_keep(const kl_cache *cache, int64_t slot, kl_cache_mark **out)
{
    KL_REQUIRE(out, "mark: expected a place for it, got NULL");
    *out = NULL;
    KL_TRY(check_slot(cache, "slot", slot));
    size_t states, tails;
    kl_cache_bytes(&cache->config, cache->capacity, &states, &tails, NULL);
    kl_cache_mark *mark = calloc(1, sizeof *mark);
    char *copy = malloc(states + tails + 1);
    if (!mark || !copy) {
        free(mark);
        free(copy);
        return kl_error(KL_ENOMEM, "mark: out of memory for %zu bytes", states + tails);
    }
    *mark = (kl_cache_mark){.cache = cache, .slot = slot, .length = cache->length[slot], .states = copy,
                            .written = last_stamp(cache, slot, cache->length[slot])};
    kl_cache_each_part(cache, slot, 0, save_part, &copy);
    *out = mark;
    return kl_ok();
}

kl_status kl_cache_rewind(kl_cache *cache, int64_t slot, const kl_cache_mark *mark)
{
    KL_TRY(check_slot(cache, "slot", slot));
    KL_REQUIRE(mark, "mark: expected one, got NULL");
    KL_REQUIRE(mark->cache == cache, "mark: expected one of this cache, got another's");
    KL_REQUIRE(mark->slot == slot, "mark: expected one of slot %lld, got one of slot %lld", (long long)slot, (long long)mark->slot);
    KL_REQUIRE(mark->length <= cache->length[slot], "mark: expected at most the slot's %lld tokens, got %lld",
               (long long)cache->length[slot], (long long)mark->length);
    KL_REQUIRE(mark->written == last_stamp(cache, slot, mark->length),
               "mark: expected the tokens it was made of, but slot %lld has been overwritten since", (long long)slot);
    const char *from = mark->states;
    kl_cache_each_part(cache, slot, 0, restore_part, &from);
    cache->length[slot] = mark->length;
    return kl_ok();
}

void kl_cache_mark_free(kl_cache_mark *mark)
{
    if (!mark)
        return;
    free(mark->states);
    free(mark);
}

/* ---- does it fit? ---- */

#define SAME(field, key)                                                                                        \
    KL_REQUIRE(a->field == b->field, "cache: expected one made for " key " %lld, got one for %lld", (long long)b->field, \
               (long long)a->field)

kl_status kl_cache_matches(const kl_cache *cache, const kl_config *b)
{
    const kl_config *a = &cache->config;
    SAME(num_layers, "num_hidden_layers");
    for (int64_t l = 0; l < b->num_layers; l++)
        KL_REQUIRE(a->mixer[l] == b->mixer[l], "cache: layer %lld: expected %s, got %s", (long long)l,
                   b->mixer[l] == KL_MIX_MLA ? "MLA" : "KDA", a->mixer[l] == KL_MIX_MLA ? "MLA" : "KDA");
    if (layers_of(b, KL_MIX_KDA)) {
        SAME(kda_heads, "linear_attn_config.num_heads");
        SAME(kda_head_dim, "linear_attn_config.head_dim");
        SAME(conv_width, "short_conv_kernel_size");
    }
    if (layers_of(b, KL_MIX_MLA)) {
        SAME(kv_lora_rank, "kv_lora_rank");
        SAME(qk_rope_head_dim, "qk_rope_head_dim");
        KL_REQUIRE(cache->latent_dtype == kept_type(b), "cache: expected latents in %s, got %s", kl_dtype_name(kept_type(b)),
                   kl_dtype_name(cache->latent_dtype));
    }
    return kl_ok();
}
