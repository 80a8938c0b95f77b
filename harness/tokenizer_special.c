/* Special tokens: ids after the ranks, never the result of merging. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness/json.h"
#include "harness/tokenizer_parts.h"

enum { RELEASED_RANKS = 163584, RELEASED_SPECIALS = 256, SPECIALS_MAX = 1 << 16, NAME_BYTES_MAX = 256 };

typedef struct {
    int place; /* id - ranks */
    const char *name;
} named;

static const named released_set[] = {
    {0, "[BOS]"}, {1, "[EOS]"}, {2, "<|im_end|>"}, {3, "<|im_user|>"}, {4, "<|im_assistant|>"}, {6, "<|start_header_id|>"}, {7, "<|end_header_id|>"},
    {9, "[EOT]"}, {10, "<|im_system|>"}, {11, "<|tool_calls_section_begin|>"}, {12, "<|tool_calls_section_end|>"}, {13, "<|tool_call_begin|>"},
    {14, "<|tool_call_argument_begin|>"}, {15, "<|tool_call_end|>"}, {17, "<|im_middle|>"}, {254, "[UNK]"}, {255, "[PAD]"},
};
static const named small_set[] = {
    {0, "[BOS]"}, {1, "[EOS]"}, {2, "<|im_end|>"}, {3, "<|im_user|>"}, {4, "<|im_assistant|>"}, {5, "<|im_system|>"}, {6, "<|im_middle|>"},
    {7, "[UNK]"}, {8, "[PAD]"},
};

void kl_specials_free(kl_specials *s)
{
    for (int64_t i = 0; i < s->count; i++)
        free(s->items[i].name);
    free(s->items);
    *s = (kl_specials){0};
}

static kl_status reserve(kl_specials *s, int64_t first, int64_t count)
{
    *s = (kl_specials){.first = first, .items = calloc((size_t)count + 1, sizeof *s->items)};
    if (!s->items)
        return kl_error(KL_ENOMEM, "no memory for %lld special tokens", (long long)count);
    s->count = count;
    return kl_ok();
}

static kl_status put(kl_specials *s, int64_t place, const char *name)
{
    s->items[place].name = strdup(name);
    s->items[place].length = strlen(name);
    s->starts[(unsigned char)name[0]] = true;
    return s->items[place].name ? kl_ok() : kl_error(KL_ENOMEM, "no memory for a special token");
}

/* Ids that nothing names. */
static kl_status fill_reserved(kl_specials *s)
{
    for (int64_t i = 0; i < s->count; i++) {
        char name[48];
        snprintf(name, sizeof name, "<|reserved_token_%lld|>", (long long)(s->first + i));
        if (!s->items[i].name)
            KL_TRY(put(s, i, name));
    }
    return kl_ok();
}

kl_status kl_specials_default(kl_specials *s, int64_t ranks)
{
    bool released = ranks == RELEASED_RANKS;
    const named *set = released ? released_set : small_set;
    int n = released ? sizeof released_set / sizeof *released_set : sizeof small_set / sizeof *small_set;
    KL_TRY(reserve(s, ranks, released ? RELEASED_SPECIALS : n));
    for (int i = 0; i < n; i++)
        KL_TRY(put(s, set[i].place, set[i].name));
    return fill_reserved(s);
}

/* Two names alike would make the id of one unreachable. */
static int compare_items(const void *a, const void *b) { return strcmp((*(const kl_special *const *)a)->name, (*(const kl_special *const *)b)->name); }

static kl_status check_distinct(const kl_specials *s)
{
    const kl_special **order = malloc(((size_t)s->count + 1) * sizeof *order);
    if (!order)
        return kl_error(KL_ENOMEM, "no memory for %lld special tokens", (long long)s->count);
    for (int64_t i = 0; i < s->count; i++)
        order[i] = &s->items[i];
    qsort(order, (size_t)s->count, sizeof *order, compare_items);
    kl_status status = kl_ok();
    for (int64_t i = 1; i < s->count && !kl_failed(status); i++)
        if (strcmp(order[i - 1]->name, order[i]->name) == 0)
            status = kl_error(KL_EFORMAT, "special token '%.80s' has two ids", order[i]->name);
    free(order);
    return status;
}

/* One special token as it is given from outside. */
static kl_status check_given(int64_t ranks, int64_t id, const char *name)
{
    if (id < ranks || id >= ranks + SPECIALS_MAX)
        return kl_error(KL_EFORMAT, "special token id: expected %lld, the number of ranks, to %lld, got %lld", (long long)ranks,
                        (long long)ranks + SPECIALS_MAX - 1, (long long)id);
    if (!name || !name[0] || strlen(name) > NAME_BYTES_MAX)
        return kl_error(KL_EFORMAT, "special token %lld: expected a name of 1 to %d bytes", (long long)id, NAME_BYTES_MAX);
    return kl_ok();
}

static kl_status put_given(kl_specials *s, int64_t id, const char *name)
{
    if (s->items[id - s->first].name)
        return kl_error(KL_EFORMAT, "special token id %lld stands twice", (long long)id);
    return put(s, id - s->first, name);
}

kl_status kl_specials_given(kl_specials *s, int64_t ranks, const char *const *names, const int64_t *ids, int count)
{
    int64_t size = 0;
    *s = (kl_specials){0};
    for (int i = 0; i < count; i++) {
        KL_TRY(check_given(ranks, ids[i], names[i]));
        if (ids[i] - ranks + 1 > size)
            size = ids[i] - ranks + 1;
    }
    KL_TRY(reserve(s, ranks, size));
    for (int i = 0; i < count; i++)
        KL_TRY(put_given(s, ids[i], names[i]));
    KL_TRY(fill_reserved(s));
    return check_distinct(s);
}

/* ---- tokenizer_config.json ---- */

/* The decimal id that an entry's key is; -1 where it is none. */
static int64_t parse_id(const char *text)
{
    int64_t id = 0;
    size_t n = strlen(text);
    if (n == 0 || n > 9)
        return -1;
    for (size_t i = 0; i < n; i++) {
        if (text[i] < '0' || text[i] > '9')
            return -1;
        id = id * 10 + (text[i] - '0');
    }
    return id;
}

static kl_status read_added(kl_specials *s, int64_t ranks, const cJSON *added)
{
    int64_t id, size = ranks == RELEASED_RANKS ? RELEASED_SPECIALS : 0;
    for (const cJSON *entry = added->child; entry; entry = entry->next) {
        const cJSON *content = cJSON_IsObject(entry) ? kl_json_get(entry, "content") : NULL;
        if ((id = parse_id(entry->string)) < 0)
            return kl_error(KL_EFORMAT, "expected an id, got '%.20s'", entry->string);
        if (!cJSON_IsString(content))
            return kl_error(KL_EFORMAT, "special token %lld: content: expected a name", (long long)id);
        KL_TRY(check_given(ranks, id, content->valuestring));
        if (id - ranks + 1 > size)
            size = id - ranks + 1;
    }
    KL_TRY(reserve(s, ranks, size));
    for (const cJSON *entry = added->child; entry; entry = entry->next)
        KL_TRY(put_given(s, parse_id(entry->string), kl_json_get(entry, "content")->valuestring));
    KL_TRY(fill_reserved(s));
    return check_distinct(s);
}

kl_status kl_specials_parse(kl_specials *s, int64_t ranks, const char *text, size_t size, const char *name)
{
    cJSON *json;
    *s = (kl_specials){0};
    KL_TRY(kl_json_parse(&json, text, size, name));
    const cJSON *added = kl_json_get(json, "added_tokens_decoder");
    kl_status status;
    if (!added)
        status = kl_specials_default(s, ranks);
    else if (!cJSON_IsObject(added))
        status = kl_error(KL_EFORMAT, "%s: added_tokens_decoder: expected an object", name);
    else
        status = kl_error_in(read_added(s, ranks, added), "%s: added_tokens_decoder", name);
    cJSON_Delete(json);
    return status;
}

int64_t kl_specials_match(const kl_specials *s, const char *text, size_t length)
{
    int64_t best = -1;
    if (length == 0 || !s->starts[(unsigned char)text[0]])
        return best;
    for (int64_t i = 0; i < s->count; i++) {
        const kl_special *k = &s->items[i];
        if (k->length <= length && (best < 0 || k->length > s->items[best].length) && memcmp(k->name, text, k->length) == 0)
            best = i;
    }
    return best;
}
