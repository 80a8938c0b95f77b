/* What the tokenizer's files share: the vocabulary, the splitter, the merging, the special tokens. */
#ifndef KL_HARNESS_TOKENIZER_PARTS_H
#define KL_HARNESS_TOKENIZER_PARTS_H

#include <stdbool.h>

#include "harness/tokenizer.h"

/* ---- text into pieces (tokenizer_split.c) ---- */

typedef kl_status (*kl_piece_fn)(void *user, const char *piece, size_t length);

/* The compiled pattern; read-only once made, so threads may share it. */
typedef struct kl_splitter kl_splitter;
kl_status kl_splitter_make(kl_splitter **s);
void kl_splitter_free(kl_splitter *s);
/* The pieces of one slice of valid UTF-8, in order; together they are all of it. */
kl_status kl_splitter_each(const kl_splitter *s, const char *text, size_t length, kl_piece_fn fn, void *user);
/* Cuts valid UTF-8 every 400,000 characters and inside runs of space or non-space beyond 25,000. */
kl_status kl_slices_each(const char *text, size_t length, kl_piece_fn fn, void *user);

/* ---- the ranks (tokenizer_ranks.c) ---- */

typedef struct kl_ranks {
    int64_t count;
    char *bytes;        /* all tokens one after another */
    uint32_t *offset;   /* [count+1] */
    uint32_t *table;    /* open addressing: rank + 1, 0 for empty */
    uint32_t mask;      /* slots of the table - 1 */
    size_t longest;     /* bytes of the longest token */
} kl_ranks;

/* From a tiktoken.model file's text; name is for messages. On failure free it too. */
kl_status kl_ranks_parse(kl_ranks *r, const char *text, size_t size, const char *name);
kl_status kl_ranks_bytes(kl_ranks *r); /* the 256 bytes, nothing else */
void kl_ranks_free(kl_ranks *r);
int64_t kl_ranks_find(const kl_ranks *r, const char *bytes, size_t length); /* -1: no such token */

/* ---- merging (tokenizer_merge.c) ---- */

typedef struct kl_merger {
    int32_t *next, *previous; /* [capacity] of the part that begins at a byte */
    uint32_t *rank;           /* [capacity] of that part merged with the next one */
    uint64_t *heap;           /* [3 capacity] rank << 32 | where the pair begins */
    size_t capacity, heap_count;
} kl_merger;

void kl_merger_free(kl_merger *m);
/* Appends the ids of one piece to ids, which has room for length more. */
kl_status kl_merge(const kl_ranks *r, kl_merger *m, const char *piece, size_t length, int32_t *ids, int64_t *count);

/* ---- special tokens (tokenizer_special.c) ---- */

typedef struct kl_special {
    char *name;
    size_t length;
} kl_special;

typedef struct kl_specials {
    int64_t first, count; /* ids first .. first + count - 1 */
    kl_special *items;    /* [count] */
    bool starts[256];     /* some name begins with that byte */
} kl_specials;

/* The default set after that many ranks. On failure of any of these free s too. */
kl_status kl_specials_default(kl_specials *s, int64_t ranks);
/* added_tokens_decoder of a tokenizer_config.json; without one the default set. */
kl_status kl_specials_parse(kl_specials *s, int64_t ranks, const char *text, size_t size, const char *name);
kl_status kl_specials_given(kl_specials *s, int64_t ranks, const char *const *names, const int64_t *ids, int count);
void kl_specials_free(kl_specials *s);
/* The longest special token that text begins with: its index, or -1. */
int64_t kl_specials_match(const kl_specials *s, const char *text, size_t length);

#endif
