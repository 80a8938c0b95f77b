/* The vocabulary: tiktoken.model files, and finding the rank of some bytes. */
#include <stdlib.h>
#include <string.h>

#include "harness/tokenizer_parts.h"

enum { RANKS_MAX = 1 << 24 };

static uint64_t hash_bytes(const char *bytes, size_t length)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < length; i++)
        h = (h ^ (unsigned char)bytes[i]) * 0x100000001b3u;
    return h ^ h >> 29;
}

static const char *token(const kl_ranks *r, int64_t rank, size_t *length)
{
    *length = r->offset[rank + 1] - r->offset[rank];
    return r->bytes + r->offset[rank];
}

/* The slot that holds these bytes, or the empty one where they belong. */
static uint32_t find_slot(const kl_ranks *r, const char *bytes, size_t length)
{
    uint32_t slot = (uint32_t)hash_bytes(bytes, length) & r->mask;
    while (r->table[slot]) {
        size_t n;
        const char *here = token(r, (int64_t)r->table[slot] - 1, &n);
        if (n == length && memcmp(here, bytes, n) == 0)
            break;
        slot = (slot + 1) & r->mask;
    }
    return slot;
}

int64_t kl_ranks_find(const kl_ranks *r, const char *bytes, size_t length)
{
    return length > r->longest ? -1 : (int64_t)r->table[find_slot(r, bytes, length)] - 1;
}

void kl_ranks_free(kl_ranks *r)
{
    free(r->bytes);
    free(r->offset);
    free(r->table);
    *r = (kl_ranks){0};
}

/* ---- reading ---- */

static int base64_digit(char c)
{
    if (c >= 'A' && c <= 'Z')
        return c - 'A';
    if (c >= 'a' && c <= 'z')
        return c - 'a' + 26;
    if (c >= '0' && c <= '9')
        return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* Strict: whole groups of four, at most two '=' and only at the end, unused bits zero. Bytes written, or -1. */
static int64_t decode_base64(const char *text, size_t length, char *out)
{
    if (length == 0 || length % 4 != 0)
        return -1;
    size_t padding = (text[length - 1] == '=') + (text[length - 1] == '=' && text[length - 2] == '=');
    char *start = out;
    uint32_t bits = 0;
    for (size_t i = 0; i < length; i++) {
        int digit = i >= length - padding ? 0 : base64_digit(text[i]);
        if (digit < 0)
            return -1;
        bits = bits << 6 | (uint32_t)digit;
        if (i % 4 != 3)
            continue;
        size_t n = i + 1 == length ? 3 - padding : 3;
        if (bits & ((1u << (8 * (3 - n))) - 1))
            return -1;
        for (size_t k = 0; k < n; k++)
            *out++ = (char)(bits >> (16 - 8 * k));
        bits = 0;
    }
    return out - start;
}

typedef struct {
    const char *base64;
    size_t length;
} entry; /* a line of the file, at its rank */

/* One line "base64 rank" without its newline. */
static kl_status read_line(const char *line, size_t length, int64_t number, const char *name, entry *entries, int64_t count)
{
    const char *space = memchr(line, ' ', length);
    size_t first = space ? (size_t)(space - line) : 0, digits = space ? length - first - 1 : 0;
    int64_t rank = 0;
    bool good = first > 0 && digits > 0 && digits <= 8;
    for (size_t i = 0; good && i < digits; i++) {
        good = space[1 + i] >= '0' && space[1 + i] <= '9';
        rank = rank * 10 + (space[1 + i] - '0');
    }
    if (!good)
        return kl_error(KL_EFORMAT, "%s: line %lld: expected \"base64 rank\"", name, (long long)number);
    if (rank >= count)
        return kl_error(KL_EFORMAT, "%s: line %lld: rank %lld: expected below %lld, the number of lines", name, (long long)number, (long long)rank,
                        (long long)count);
    if (entries[rank].base64)
        return kl_error(KL_EFORMAT, "%s: line %lld: rank %lld stands twice", name, (long long)number, (long long)rank);
    entries[rank] = (entry){line, first};
    return kl_ok();
}

/* Calls for every line that is not empty; with entries NULL it only counts them. */
static kl_status read_lines(const char *text, size_t size, const char *name, entry *entries, int64_t *count)
{
    int64_t number = 0, lines = 0;
    for (size_t at = 0; at < size;) {
        const char *end = memchr(text + at, '\n', size - at);
        size_t length = end ? (size_t)(end - text) - at : size - at;
        number++;
        if (length > 0) {
            lines++;
            if (entries)
                KL_TRY(read_line(text + at, length, number, name, entries, *count));
        }
        at += length + 1;
    }
    *count = lines;
    return kl_ok();
}

/* Tokens one after another by rank, the table over them. */
static kl_status fill(kl_ranks *r, const entry *entries, const char *name)
{
    uint32_t used = 0;
    for (int64_t i = 0; i < r->count; i++) {
        int64_t n = decode_base64(entries[i].base64, entries[i].length, r->bytes + used);
        if (n <= 0)
            return kl_error(KL_EFORMAT, "%s: rank %lld: expected base64 of 1 byte or more, got '%.*s'", name, (long long)i,
                            entries[i].length > 60 ? 60 : (int)entries[i].length, entries[i].base64);
        r->offset[i] = used;
        r->offset[i + 1] = used + (uint32_t)n;
        if ((size_t)n > r->longest)
            r->longest = (size_t)n;
        uint32_t slot = find_slot(r, r->bytes + used, (size_t)n);
        if (r->table[slot])
            return kl_error(KL_EFORMAT, "%s: ranks %lld and %lld are the same bytes", name, (long long)r->table[slot] - 1, (long long)i);
        r->table[slot] = (uint32_t)i + 1;
        used += (uint32_t)n;
    }
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        if (kl_ranks_find(r, &byte, 1) < 0)
            return kl_error(KL_EFORMAT, "%s: byte 0x%02x has no rank: expected all 256", name, b);
    }
    return kl_ok();
}

static kl_status reserve(kl_ranks *r, int64_t count, size_t bytes)
{
    uint32_t slots = 1024;
    while (slots < 2 * (uint64_t)count)
        slots *= 2;
    r->count = count;
    r->mask = slots - 1;
    r->bytes = malloc(bytes + 1);
    r->offset = calloc((size_t)count + 1, sizeof *r->offset);
    r->table = calloc(slots, sizeof *r->table);
    return r->bytes && r->offset && r->table ? kl_ok() : kl_error(KL_ENOMEM, "no memory for %lld ranks", (long long)count);
}

kl_status kl_ranks_parse(kl_ranks *r, const char *text, size_t size, const char *name)
{
    int64_t count = 0;
    *r = (kl_ranks){0};
    KL_TRY(read_lines(text, size, name, NULL, &count));
    if (count < 256 || count > RANKS_MAX)
        return kl_error(KL_EFORMAT, "%s: expected 256 to %d ranks, got %lld", name, RANKS_MAX, (long long)count);
    entry *entries = calloc((size_t)count, sizeof *entries);
    kl_status s = entries ? reserve(r, count, size) : kl_error(KL_ENOMEM, "%s: no memory for %lld ranks", name, (long long)count);
    if (!kl_failed(s))
        s = read_lines(text, size, name, entries, &count);
    if (!kl_failed(s))
        s = fill(r, entries, name);
    free(entries);
    return s;
}

kl_status kl_ranks_bytes(kl_ranks *r)
{
    *r = (kl_ranks){0};
    KL_TRY(reserve(r, 256, 256));
    r->longest = 1;
    for (int b = 0; b < 256; b++) {
        r->bytes[b] = (char)b;
        r->offset[b + 1] = (uint32_t)b + 1;
        r->table[find_slot(r, r->bytes + b, 1)] = (uint32_t)b + 1;
    }
    return kl_ok();
}
