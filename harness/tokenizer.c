#include "harness/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "harness/file.h"
#include "harness/json.h"
#include "harness/tokenizer_parts.h"

enum { MODEL_BYTES_MAX = 256 << 20, CONFIG_BYTES_MAX = 8 << 20 };

struct kl_tokenizer {
    kl_ranks ranks;
    kl_specials specials;
    kl_splitter *splitter;
};

/* ---- opening ---- */

static kl_status make(kl_tokenizer **t, const char *model, size_t size, const char *name, const char *config, size_t config_size, const char *config_name)
{
    *t = NULL;
    kl_tokenizer *made = calloc(1, sizeof *made);
    if (!made)
        return kl_error(KL_ENOMEM, "no memory for a tokenizer");
    kl_status s = model ? kl_ranks_parse(&made->ranks, model, size, name) : kl_ranks_bytes(&made->ranks);
    if (!kl_failed(s))
        s = config ? kl_specials_parse(&made->specials, made->ranks.count, config, config_size, config_name)
                   : kl_specials_default(&made->specials, made->ranks.count);
    if (!kl_failed(s))
        s = kl_splitter_make(&made->splitter);
    if (kl_failed(s))
        kl_tokenizer_close(made);
    else
        *t = made;
    return s;
}

static kl_status read_if_there(const char *path, size_t limit, char **bytes, size_t *size)
{
    struct stat st;
    *bytes = NULL;
    *size = 0;
    return stat(path, &st) == 0 ? kl_file_read(path, limit, bytes, size) : kl_ok();
}

kl_status kl_tokenizer_open(kl_tokenizer **t, const char *dir)
{
    char model_path[4096], config_path[4096], *model = NULL, *config = NULL;
    size_t model_size, config_size;
    struct stat st;
    *t = NULL;
    KL_REQUIRE(strlen(dir) < sizeof model_path - 32, "%s: path too long", dir);
    snprintf(model_path, sizeof model_path, "%s/tiktoken.model", dir);
    snprintf(config_path, sizeof config_path, "%s/tokenizer_config.json", dir);
    if (stat(dir, &st) != 0)
        return kl_error_errno("%s", dir);
    KL_REQUIRE(S_ISDIR(st.st_mode), "%s: expected a directory", dir);
    kl_status s = read_if_there(model_path, MODEL_BYTES_MAX, &model, &model_size);
    if (!kl_failed(s) && model)
        s = read_if_there(config_path, CONFIG_BYTES_MAX, &config, &config_size);
    if (!kl_failed(s))
        s = make(t, model, model_size, model_path, config, config_size, config_path);
    free(model);
    free(config);
    return s;
}

kl_status kl_tokenizer_open_memory(kl_tokenizer **t, const char *model, size_t size) { return make(t, model, size, "tiktoken.model", NULL, 0, NULL); }

kl_status kl_tokenizer_bytes(kl_tokenizer **t) { return make(t, NULL, 0, NULL, NULL, 0, NULL); }

void kl_tokenizer_close(kl_tokenizer *t)
{
    if (!t)
        return;
    kl_ranks_free(&t->ranks);
    kl_specials_free(&t->specials);
    kl_splitter_free(t->splitter);
    free(t);
}

kl_status kl_tokenizer_set_specials(kl_tokenizer *t, const char *const *names, const int64_t *ids, int count)
{
    kl_specials given;
    kl_status s = kl_specials_given(&given, t->ranks.count, names, ids, count);
    if (kl_failed(s)) {
        kl_specials_free(&given);
        return s;
    }
    kl_specials_free(&t->specials);
    t->specials = given;
    return s;
}

int64_t kl_tokenizer_size(const kl_tokenizer *t) { return t->specials.first + t->specials.count; }

int64_t kl_tokenizer_special(const kl_tokenizer *t, const char *name)
{
    for (int64_t i = 0; i < t->specials.count; i++)
        if (strcmp(t->specials.items[i].name, name) == 0)
            return t->specials.first + i;
    return -1;
}

/* ---- text to ids ---- */

typedef struct {
    const kl_tokenizer *t;
    kl_merger merger;
    bool specials;
    int32_t *ids;
    int64_t count, capacity;
} encoding;

static kl_status reserve(encoding *e, size_t more)
{
    if ((size_t)(e->capacity - e->count) >= more)
        return kl_ok();
    size_t capacity = (size_t)e->count + more + (size_t)e->capacity / 2 + 64;
    int32_t *ids = capacity <= SIZE_MAX / sizeof *ids ? realloc(e->ids, capacity * sizeof *ids) : NULL;
    if (!ids)
        return kl_error(KL_ENOMEM, "no memory for %zu ids", capacity);
    e->ids = ids;
    e->capacity = (int64_t)capacity;
    return kl_ok();
}

static kl_status encode_piece(void *user, const char *piece, size_t length)
{
    encoding *e = user;
    KL_TRY(reserve(e, length));
    return kl_merge(&e->t->ranks, &e->merger, piece, length, e->ids, &e->count);
}

/* Text without special tokens. */
static kl_status encode_plain(encoding *e, const char *text, size_t length)
{
    if (e->t->ranks.longest > 1)
        return kl_splitter_each(e->t->splitter, text, length, encode_piece, e);
    KL_TRY(reserve(e, length)); /* only bytes: nothing to split or to merge */
    for (size_t i = 0; i < length; i++)
        e->ids[e->count++] = (int32_t)kl_ranks_find(&e->t->ranks, text + i, 1);
    return kl_ok();
}

static kl_status encode_slice(void *user, const char *text, size_t length)
{
    encoding *e = user;
    size_t start = 0;
    for (size_t at = 0; e->specials && at < length;) {
        int64_t found = kl_specials_match(&e->t->specials, text + at, length - at);
        if (found < 0) {
            at++;
            continue;
        }
        if (at > start)
            KL_TRY(encode_plain(e, text + start, at - start));
        KL_TRY(reserve(e, 1));
        e->ids[e->count++] = (int32_t)(e->t->specials.first + found);
        start = at += e->t->specials.items[found].length;
    }
    return start < length ? encode_plain(e, text + start, length - start) : kl_ok();
}

kl_status kl_tokenizer_encode(const kl_tokenizer *t, const char *text, size_t length, bool specials, int32_t **ids, int64_t *count)
{
    *ids = NULL;
    *count = 0;
    size_t valid = kl_utf8_valid(text, length);
    if (valid != length)
        return kl_error(KL_EFORMAT, "text: expected UTF-8, byte %zu (0x%02x) is not", valid, (unsigned char)text[valid]);
    encoding e = {.t = t, .specials = specials};
    kl_status s = reserve(&e, length / 3 + 1);
    if (!kl_failed(s))
        s = kl_slices_each(text, length, encode_slice, &e);
    kl_merger_free(&e.merger);
    if (kl_failed(s)) {
        free(e.ids);
        return s;
    }
    *ids = e.ids;
    *count = e.count;
    return s;
}

/* ---- ids to text ---- */

const char *kl_tokenizer_piece(const kl_tokenizer *t, int64_t id, size_t *length)
{
    *length = 0;
    if (id < 0 || id >= kl_tokenizer_size(t))
        return NULL;
    if (id >= t->specials.first) {
        const kl_special *k = &t->specials.items[id - t->specials.first];
        *length = k->length;
        return k->name;
    }
    *length = t->ranks.offset[id + 1] - t->ranks.offset[id];
    return t->ranks.bytes + t->ranks.offset[id];
}

bool kl_tokenizer_is_special(const kl_tokenizer *t, int64_t id) { return id >= t->specials.first && id < kl_tokenizer_size(t); }

kl_status kl_tokenizer_decode(const kl_tokenizer *t, const int32_t *ids, int64_t count, char **text, size_t *length)
{
    size_t total = 0, n;
    *text = NULL;
    *length = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!kl_tokenizer_piece(t, ids[i], &n))
            return kl_error(KL_EINVAL, "ids[%lld]: expected 0 to %lld, got %d", (long long)i, (long long)kl_tokenizer_size(t) - 1, ids[i]);
        total += n;
    }
    char *out = malloc(total + 1);
    if (!out)
        return kl_error(KL_ENOMEM, "no memory for %zu bytes of text", total);
    size_t at = 0;
    for (int64_t i = 0; i < count; i++) {
        const char *piece = kl_tokenizer_piece(t, ids[i], &n);
        memcpy(out + at, piece, n);
        at += n;
    }
    out[total] = '\0';
    *text = out;
    *length = total;
    return kl_ok();
}
