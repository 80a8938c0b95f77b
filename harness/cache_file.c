/* One slot of a cache to and from a file.
 *
 *     header    magic, version, byte order, layout tag, fingerprint of the configuration, identity of the model, tokens,
 *               bytes of each kind of part, checksum of the payload, checksum of the header before it
 *     payload   the parts in the order of kl_cache_each_part
 *
 * Checksums follow 64-bit FNV-1a, eight bytes at a time, the rest byte by byte. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "harness/cache_internal.h"
#include "harness/file.h"
#include "harness/model_internal.h"

enum { VERSION = 1, TAG = 64 };
static const char MAGIC[8] = "KLCACHE";
static const uint32_t BYTE_ORDER_MARK = 0x01020304u;
static const char LAYOUT[TAG] = "kda f32 HV,K,V; tail q|k|v P,W-1; latent T,R+Dr ";

typedef struct header {
    char magic[8];
    uint32_t version, order;
    char layout[TAG];
    uint64_t fingerprint, model;
    int64_t length;
    uint64_t bytes[KL_PARTS];
    uint64_t payload_sum, header_sum;
} header;

/* ---- checksums ---- */

static const uint64_t FNV_START = 0xcbf29ce484222325u, FNV_PRIME = 0x100000001b3u;

static uint64_t fnv(uint64_t sum, const void *data, size_t bytes)
{
    const unsigned char *p = data;
    size_t i = 0;
    for (; i + 8 <= bytes; i += 8) {
        uint64_t word;
        memcpy(&word, p + i, 8);
        sum = (sum ^ word) * FNV_PRIME;
        sum ^= sum >> 32; /* a product alone never carries a high bit down */
    }
    for (; i < bytes; i++)
        sum = (sum ^ p[i]) * FNV_PRIME;
    return sum;
}

typedef struct tally {
    uint64_t bytes[KL_PARTS], sum;
} tally;

static void count_part(void *user, kl_cache_part part, void *data, size_t bytes)
{
    (void)data;
    ((tally *)user)->bytes[part] += bytes;
}

static void sum_part(void *user, kl_cache_part part, void *data, size_t bytes)
{
    (void)part;
    ((tally *)user)->sum = fnv(((tally *)user)->sum, data, bytes);
}

static void layout_tag(const kl_cache *cache, char tag[TAG])
{
    memset(tag, 0, TAG);
    snprintf(tag, TAG, "%s%s", LAYOUT, kl_dtype_name(cache->latent_dtype));
}

/* ---- saving ---- */

typedef struct output {
    kl_writer writer;
    kl_status status;
} output;

static void write_part(void *user, kl_cache_part part, void *data, size_t bytes)
{
    output *o = user;
    (void)part;
    if (!kl_failed(o->status) && bytes)
        o->status = kl_writer_write(&o->writer, data, bytes);
}

kl_status kl_cache_save(const kl_cache *cache, int64_t slot, const char *path)
{
    KL_REQUIRE(cache, "cache: expected one, got NULL");
    KL_REQUIRE(path, "path: expected a file name, got NULL");
    KL_REQUIRE(slot >= 0 && slot < cache->slots, "slot: expected 0 to %lld, got %lld", (long long)(cache->slots - 1), (long long)slot);
    int64_t length = cache->length[slot];
    tally t = {.sum = FNV_START};
    kl_cache_each_part(cache, slot, length, count_part, &t);
    kl_cache_each_part(cache, slot, length, sum_part, &t);
    header h;
    memset(&h, 0, sizeof h);
    memcpy(h.magic, MAGIC, sizeof h.magic);
    h.version = VERSION;
    h.order = BYTE_ORDER_MARK;
    layout_tag(cache, h.layout);
    h.fingerprint = kl_model_fingerprint(&cache->config);
    h.model = cache->model;
    h.length = length;
    memcpy(h.bytes, t.bytes, sizeof h.bytes);
    h.payload_sum = t.sum;
    h.header_sum = fnv(FNV_START, &h, offsetof(header, header_sum));

    output o;
    KL_TRY(kl_writer_open(&o.writer, path));
    o.status = kl_writer_write(&o.writer, &h, sizeof h);
    kl_cache_each_part(cache, slot, length, write_part, &o);
    if (kl_failed(o.status)) {
        kl_writer_abandon(&o.writer);
        return o.status;
    }
    return kl_writer_commit(&o.writer);
}

/* ---- loading ---- */

#define BAD(...) return kl_error(KL_EFORMAT, __VA_ARGS__)

static kl_status check_header(const kl_cache *cache, const header *h, size_t size, const char *name)
{
    static const char *const kinds[KL_PARTS] = {"KDA states", "convolution tails", "latents"};
    if (memcmp(h->magic, MAGIC, sizeof MAGIC) != 0)
        BAD("%s: expected a cache file, which begins with %s", name, MAGIC);
    if (h->order != BYTE_ORDER_MARK)
        BAD("%s: expected byte order mark %08x, got %08x", name, BYTE_ORDER_MARK, h->order);
    if (h->version != VERSION)
        BAD("%s: expected a cache file of version %d, got version %u", name, VERSION, h->version);
    if (fnv(FNV_START, h, offsetof(header, header_sum)) != h->header_sum)
        BAD("%s: the header is damaged: its checksum does not match", name);
    char tag[TAG];
    layout_tag(cache, tag);
    if (memcmp(h->layout, tag, TAG) != 0)
        BAD("%s: expected layout \"%s\", got \"%.*s\"", name, tag, TAG, h->layout);
    if (h->fingerprint != kl_model_fingerprint(&cache->config))
        BAD("%s: expected a cache of this model's configuration (fingerprint %016llx), got another's (%016llx)", name,
            (unsigned long long)kl_model_fingerprint(&cache->config), (unsigned long long)h->fingerprint);
    if (cache->model && h->model && cache->model != h->model)
        BAD("%s: expected a cache of this model (%016llx), got one of another model of the same configuration (%016llx)", name,
            (unsigned long long)cache->model, (unsigned long long)h->model);
    if (h->length < 0 || h->length > cache->capacity)
        BAD("%s: expected at most %lld tokens, the cache's capacity, got %lld", name, (long long)cache->capacity, (long long)h->length);
    tally t = {.sum = 0};
    kl_cache_each_part(cache, 0, h->length, count_part, &t);
    uint64_t total = sizeof *h;
    for (int i = 0; i < KL_PARTS; i++) {
        if (h->bytes[i] != t.bytes[i])
            BAD("%s: expected %llu bytes of %s, got %llu", name, (unsigned long long)t.bytes[i], kinds[i], (unsigned long long)h->bytes[i]);
        total += t.bytes[i];
    }
    if (size != total)
        BAD("%s: expected %llu bytes in all, got %zu", name, (unsigned long long)total, size);
    return kl_ok();
}

static void read_part(void *user, kl_cache_part part, void *data, size_t bytes)
{
    const char **from = user;
    (void)part;
    if (bytes)
        memcpy(data, *from, bytes);
    *from += bytes;
}

typedef struct source {
    const char *at;
    uint64_t sum;
} source;

static void sum_source(void *user, kl_cache_part part, void *data, size_t bytes)
{
    source *s = user;
    (void)part;
    (void)data;
    s->sum = fnv(s->sum, s->at, bytes);
    s->at += bytes;
}

kl_status kl_cache_load_memory(kl_cache *cache, int64_t slot, const void *bytes, size_t size, const char *name)
{
    KL_REQUIRE(cache, "cache: expected one, got NULL");
    KL_REQUIRE(bytes || size == 0, "bytes: expected %zu bytes, got NULL", size);
    KL_REQUIRE(slot >= 0 && slot < cache->slots, "slot: expected 0 to %lld, got %lld", (long long)(cache->slots - 1), (long long)slot);
    if (!name)
        name = "cache file";
    header h;
    if (size < sizeof h)
        BAD("%s: expected at least the %zu bytes of a cache file's header, got %zu", name, sizeof h, size);
    memcpy(&h, bytes, sizeof h);
    KL_TRY(check_header(cache, &h, size, name));
    source s = {.at = (const char *)bytes + sizeof h, .sum = FNV_START};
    kl_cache_each_part(cache, slot, h.length, sum_source, &s);
    if (s.sum != h.payload_sum)
        BAD("%s: the content is damaged: its checksum does not match", name);
    const char *from = (const char *)bytes + sizeof h;
    kl_cache_each_part(cache, slot, h.length, read_part, &from);
    kl_cache_replace(cache, slot, h.length);
    if (h.model)
        cache->model = h.model;
    return kl_ok();
}

kl_status kl_cache_load(kl_cache *cache, int64_t slot, const char *path)
{
    KL_REQUIRE(path, "path: expected a file name, got NULL");
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return kl_error_errno("%s", path);
    struct stat st;
    if (fstat(fd, &st) != 0) {
        kl_status s = kl_error_errno("%s", path);
        close(fd);
        return s;
    }
    if (!S_ISREG(st.st_mode) || st.st_size <= 0) {
        close(fd);
        return kl_error(KL_EFORMAT, "%s: expected a cache file, got %s", path, S_ISREG(st.st_mode) ? "an empty one" : "no regular file");
    }
    size_t size = (size_t)st.st_size;
    void *bytes = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    kl_status s = bytes == MAP_FAILED ? kl_error_errno("%s", path) : kl_ok();
    close(fd);
    if (kl_failed(s))
        return s;
    s = kl_cache_load_memory(cache, slot, bytes, size, path);
    munmap(bytes, size);
    return s;
}
