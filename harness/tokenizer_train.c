/* Learning a vocabulary: distinct pieces are counted once, then the most frequent adjacent pair is merged, again and
 * again, with the pair counts kept up to date. */
#include <stdlib.h>
#include <string.h>

#include "harness/file.h"
#include "harness/json.h"
#include "harness/tokenizer_parts.h"

enum { RANKS_MAX = 1 << 20, PAIR_COUNT_MIN = 2 };

/* A distinct piece of the text as symbols, shrinking while they merge. */
typedef struct {
    const char *text;
    int32_t *symbols;
    size_t bytes, length; /* of text; of symbols now */
    int64_t count;
} word;

typedef struct {
    int32_t a, b;
    int64_t count;
    int32_t *words; /* that had the pair when it came up; may repeat */
    size_t word_count, capacity;
    bool raised;    /* its count grew in this step: it needs a new place in the heap */
} pair;

typedef struct {
    int64_t count; /* of the pair when it was put here: at least what it is now */
    size_t pair;
} waiting;

typedef struct {
    char *bytes;
    size_t length;
} symbol;

/* Open addressing over indices of an array: index + 1, 0 for empty. */
typedef struct {
    uint32_t *slots;
    size_t size, used;
} table;

typedef struct {
    word *words;
    size_t word_count, word_capacity;
    table word_table;
    pair *pairs;
    size_t pair_count, pair_capacity;
    table pair_table;
    waiting *heap;
    size_t heap_count, heap_capacity;
    size_t *raised;
    size_t raised_count, raised_capacity;
    int32_t *symbol_memory;
    symbol *symbols; /* [size wanted] */
    int64_t symbol_count;
} training;

/* Room for one more element of an array that doubles. */
static bool grow(void **array, size_t *capacity, size_t count, size_t element)
{
    if (count < *capacity)
        return true;
    size_t wanted = *capacity ? 2 * *capacity : 64, bytes;
    void *larger = __builtin_mul_overflow(wanted, element, &bytes) ? NULL : realloc(*array, bytes);
    if (!larger)
        return false;
    *array = larger;
    *capacity = wanted;
    return true;
}

static kl_status no_memory(void) { return kl_error(KL_ENOMEM, "no memory to learn a vocabulary"); }

/* ---- tables ---- */

static uint64_t mix(uint64_t h)
{
    h = (h ^ h >> 32) * 0xd6e8feb86659fd93u;
    h = (h ^ h >> 32) * 0xd6e8feb86659fd93u;
    return h ^ h >> 32;
}

static uint64_t hash_word(const char *text, size_t bytes)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < bytes; i++)
        h = (h ^ (unsigned char)text[i]) * 0x100000001b3u;
    return mix(h);
}

static uint64_t hash_pair(int32_t a, int32_t b) { return mix((uint64_t)(uint32_t)a << 32 | (uint32_t)b); }

static uint64_t hash_of_word(const training *k, size_t i) { return hash_word(k->words[i].text, k->words[i].bytes); }
static uint64_t hash_of_pair(const training *k, size_t i) { return hash_pair(k->pairs[i].a, k->pairs[i].b); }

/* Keeps the table at most half full. */
static bool table_reserve(const training *k, table *t, uint64_t (*hash)(const training *, size_t))
{
    if (2 * (t->used + 1) <= t->size)
        return true;
    table larger = {.size = t->size ? 2 * t->size : 4096, .used = t->used};
    larger.slots = calloc(larger.size, sizeof *larger.slots);
    if (!larger.slots)
        return false;
    for (size_t i = 0; i < t->size; i++) {
        if (!t->slots[i])
            continue;
        size_t slot = hash(k, t->slots[i] - 1) & (larger.size - 1);
        while (larger.slots[slot])
            slot = (slot + 1) & (larger.size - 1);
        larger.slots[slot] = t->slots[i];
    }
    free(t->slots);
    *t = larger;
    return true;
}

/* ---- counting the pieces ---- */

static kl_status count_piece(void *user, const char *text, size_t bytes)
{
    training *k = user;
    if (bytes < 2)
        return kl_ok();
    if (k->word_count >= INT32_MAX || !table_reserve(k, &k->word_table, hash_of_word))
        return no_memory();
    table *t = &k->word_table;
    size_t slot = hash_word(text, bytes) & (t->size - 1);
    for (; t->slots[slot]; slot = (slot + 1) & (t->size - 1)) {
        word *w = &k->words[t->slots[slot] - 1];
        if (w->bytes == bytes && memcmp(w->text, text, bytes) == 0) {
            w->count++;
            return kl_ok();
        }
    }
    if (!grow((void **)&k->words, &k->word_capacity, k->word_count, sizeof *k->words))
        return no_memory();
    k->words[k->word_count++] = (word){.text = text, .bytes = bytes, .length = bytes, .count = 1};
    t->slots[slot] = (uint32_t)k->word_count;
    t->used++;
    return kl_ok();
}

typedef struct {
    const kl_splitter *splitter;
    training *k;
} counting;

static kl_status count_slice(void *user, const char *text, size_t length)
{
    counting *c = user;
    return kl_splitter_each(c->splitter, text, length, count_piece, c->k);
}

static kl_status count_text(training *k, const char *text, size_t length)
{
    counting c = {.k = k};
    kl_splitter *splitter;
    KL_TRY(kl_splitter_make(&splitter));
    c.splitter = splitter;
    kl_status s = kl_slices_each(text, length, count_slice, &c);
    kl_splitter_free(splitter);
    return s;
}

/* ---- the heap: most frequent first; of equals the pair whose first part, then second part, is smaller as bytes ---- */

static int compare_symbols(const symbol *x, const symbol *y)
{
    int order = memcmp(x->bytes, y->bytes, x->length < y->length ? x->length : y->length);
    return order ? order : x->length < y->length ? -1 : x->length > y->length;
}

static bool before(const training *k, waiting x, waiting y)
{
    if (x.count != y.count)
        return x.count > y.count;
    const pair *p = &k->pairs[x.pair], *q = &k->pairs[y.pair];
    int order = compare_symbols(&k->symbols[p->a], &k->symbols[q->a]);
    return (order ? order : compare_symbols(&k->symbols[p->b], &k->symbols[q->b])) < 0;
}

static bool push(training *k, size_t index)
{
    if (!grow((void **)&k->heap, &k->heap_capacity, k->heap_count, sizeof *k->heap))
        return false;
    waiting x = {k->pairs[index].count, index};
    size_t i = k->heap_count++;
    for (; i > 0 && before(k, x, k->heap[(i - 1) / 2]); i = (i - 1) / 2)
        k->heap[i] = k->heap[(i - 1) / 2];
    k->heap[i] = x;
    return true;
}

static waiting pop(training *k)
{
    waiting top = k->heap[0], last = k->heap[--k->heap_count];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < k->heap_count) {
        child += child + 1 < k->heap_count && before(k, k->heap[child + 1], k->heap[child]);
        if (!before(k, k->heap[child], last))
            break;
        k->heap[i] = k->heap[child];
        i = child;
    }
    k->heap[i] = last;
    return top;
}

/* ---- the pairs ---- */

static pair *find_pair(training *k, int32_t a, int32_t b)
{
    if (k->pair_count >= INT32_MAX || !table_reserve(k, &k->pair_table, hash_of_pair))
        return NULL;
    table *t = &k->pair_table;
    size_t slot = hash_pair(a, b) & (t->size - 1);
    for (; t->slots[slot]; slot = (slot + 1) & (t->size - 1)) {
        pair *p = &k->pairs[t->slots[slot] - 1];
        if (p->a == a && p->b == b)
            return p;
    }
    if (!grow((void **)&k->pairs, &k->pair_capacity, k->pair_count, sizeof *k->pairs))
        return NULL;
    k->pairs[k->pair_count++] = (pair){.a = a, .b = b};
    t->slots[slot] = (uint32_t)k->pair_count;
    t->used++;
    return &k->pairs[k->pair_count - 1];
}

/* Counts the pairs of a word sign times; those that `fresh` is part of (any, if negative) learn that the word has them. */
static bool count_pairs(training *k, int32_t index, int sign, int32_t fresh)
{
    const word *w = &k->words[index];
    for (size_t i = 0; i + 1 < w->length; i++) {
        int32_t a = w->symbols[i], b = w->symbols[i + 1];
        pair *p = find_pair(k, a, b);
        if (!p)
            return false;
        p->count += sign * w->count;
        if (sign < 0 || (fresh >= 0 && a != fresh && b != fresh))
            continue;
        bool known = p->word_count && p->words[p->word_count - 1] == index;
        if (!known && !grow((void **)&p->words, &p->capacity, p->word_count, sizeof *p->words))
            return false;
        if (!known)
            p->words[p->word_count++] = index;
        if (!p->raised && !grow((void **)&k->raised, &k->raised_capacity, k->raised_count, sizeof *k->raised))
            return false;
        if (!p->raised)
            k->raised[k->raised_count++] = (size_t)(p - k->pairs);
        p->raised = true;
    }
    return true;
}

static bool push_raised(training *k)
{
    for (size_t i = 0; i < k->raised_count; i++) {
        k->pairs[k->raised[i]].raised = false;
        if (!push(k, k->raised[i]))
            return false;
    }
    k->raised_count = 0;
    return true;
}

static bool word_has(const word *w, int32_t a, int32_t b)
{
    for (size_t i = 0; i + 1 < w->length; i++)
        if (w->symbols[i] == a && w->symbols[i + 1] == b)
            return true;
    return false;
}

static void rewrite(word *w, int32_t a, int32_t b, int32_t made)
{
    size_t to = 0;
    for (size_t i = 0; i < w->length; i++) {
        bool here = i + 1 < w->length && w->symbols[i] == a && w->symbols[i + 1] == b;
        w->symbols[to++] = here ? made : w->symbols[i];
        i += here;
    }
    w->length = to;
}

static bool merge_everywhere(training *k, size_t index, int32_t made)
{
    int32_t a = k->pairs[index].a, b = k->pairs[index].b, *words = k->pairs[index].words;
    size_t n = k->pairs[index].word_count;
    k->pairs[index].words = NULL; /* a pair of the same name may come up again */
    k->pairs[index].word_count = k->pairs[index].capacity = 0;
    bool good = true;
    for (size_t i = 0; i < n && good; i++) {
        if (!word_has(&k->words[words[i]], a, b))
            continue;
        good = count_pairs(k, words[i], -1, made);
        rewrite(&k->words[words[i]], a, b, made);
        good = good && count_pairs(k, words[i], 1, made);
    }
    free(words);
    return good && push_raised(k);
}

/* ---- the symbols ---- */

/* The symbol with the bytes of a and b joined: an old one where two ways lead to the same bytes, else a new one. -1: no memory. */
static int32_t join(training *k, int32_t a, int32_t b)
{
    const symbol *x = &k->symbols[a], *y = &k->symbols[b];
    symbol s = {malloc(x->length + y->length), x->length + y->length};
    if (!s.bytes)
        return -1;
    memcpy(s.bytes, x->bytes, x->length);
    memcpy(s.bytes + x->length, y->bytes, y->length);
    for (int64_t i = 0; i < k->symbol_count; i++)
        if (k->symbols[i].length == s.length && memcmp(k->symbols[i].bytes, s.bytes, s.length) == 0) {
            free(s.bytes);
            return (int32_t)i;
        }
    k->symbols[k->symbol_count] = s;
    return (int32_t)k->symbol_count++;
}

static kl_status start_symbols(training *k, int64_t size)
{
    size_t total = 0;
    for (size_t i = 0; i < k->word_count; i++)
        total += k->words[i].bytes;
    k->symbols = calloc((size_t)size, sizeof *k->symbols);
    k->symbol_memory = malloc((total + 1) * sizeof *k->symbol_memory);
    if (!k->symbols || !k->symbol_memory)
        return no_memory();
    for (k->symbol_count = 0; k->symbol_count < 256; k->symbol_count++) {
        symbol *s = &k->symbols[k->symbol_count];
        *s = (symbol){malloc(1), 1};
        if (!s->bytes)
            return no_memory();
        s->bytes[0] = (char)k->symbol_count;
    }
    int32_t *at = k->symbol_memory;
    for (size_t i = 0; i < k->word_count; i++) {
        word *w = &k->words[i];
        w->symbols = at;
        for (size_t j = 0; j < w->bytes; j++)
            *at++ = (unsigned char)w->text[j];
    }
    return kl_ok();
}

static kl_status learn(training *k, int64_t size)
{
    KL_TRY(start_symbols(k, size));
    for (size_t i = 0; i < k->word_count; i++)
        if (!count_pairs(k, (int32_t)i, 1, -1))
            return no_memory();
    if (!push_raised(k))
        return no_memory();
    while (k->symbol_count < size && k->heap_count) {
        waiting top = pop(k);
        const pair *p = &k->pairs[top.pair];
        if (p->count != top.count) { /* it has become rarer meanwhile: back to where it belongs */
            if (p->count >= PAIR_COUNT_MIN && p->count < top.count && !push(k, top.pair))
                return no_memory();
            continue;
        }
        if (p->count < PAIR_COUNT_MIN)
            break;
        int32_t made = join(k, p->a, p->b);
        if (made < 0 || !merge_everywhere(k, top.pair, made))
            return no_memory();
    }
    if (k->symbol_count < size)
        return kl_error(KL_EINVAL, "size: the text gives %lld ranks at most, asked for %lld", (long long)k->symbol_count, (long long)size);
    return kl_ok();
}

/* ---- writing ---- */

static kl_status write_base64(kl_writer *w, const symbol *s)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < s->length; i += 3) {
        size_t n = s->length - i < 3 ? s->length - i : 3;
        uint32_t bits = 0;
        for (size_t j = 0; j < 3; j++)
            bits = bits << 8 | (j < n ? (unsigned char)s->bytes[i + j] : 0);
        char group[4];
        for (size_t j = 0; j < 4; j++)
            group[j] = j <= n ? digits[bits >> (18 - 6 * j) & 63] : '=';
        KL_TRY(kl_writer_write(w, group, 4));
    }
    return kl_ok();
}

static kl_status write_model(const training *k, const char *path)
{
    kl_writer w;
    KL_TRY(kl_writer_open(&w, path));
    kl_status s = kl_ok();
    for (int64_t i = 0; i < k->symbol_count && !kl_failed(s); i++) {
        char rank[32];
        int n = snprintf(rank, sizeof rank, " %lld\n", (long long)i);
        s = write_base64(&w, &k->symbols[i]);
        if (!kl_failed(s))
            s = kl_writer_write(&w, rank, (size_t)n);
    }
    if (!kl_failed(s))
        s = kl_writer_commit(&w);
    kl_writer_abandon(&w);
    return s;
}

static void free_training(training *k)
{
    for (size_t i = 0; i < k->pair_count; i++)
        free(k->pairs[i].words);
    for (int64_t i = 0; k->symbols && i < k->symbol_count; i++)
        free(k->symbols[i].bytes);
    free(k->words);
    free(k->pairs);
    free(k->heap);
    free(k->raised);
    free(k->symbols);
    free(k->symbol_memory);
    free(k->word_table.slots);
    free(k->pair_table.slots);
}

kl_status kl_tokenizer_train(const char *text, size_t length, int64_t size, const char *path)
{
    KL_REQUIRE(size >= 256 && size <= RANKS_MAX, "size: expected 256 to %d ranks, got %lld", RANKS_MAX, (long long)size);
    size_t valid = kl_utf8_valid(text, length);
    if (valid != length)
        return kl_error(KL_EFORMAT, "text: expected UTF-8, byte %zu (0x%02x) is not", valid, (unsigned char)text[valid]);
    training k = {0};
    kl_status s = count_text(&k, text, length);
    if (!kl_failed(s))
        s = learn(&k, size);
    if (!kl_failed(s))
        s = write_model(&k, path);
    free_training(&k);
    return s;
}
