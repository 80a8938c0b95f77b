/* Byte-level BPE from a tiktoken.model file, with the released pattern (PCRE2) and special tokens. */
#ifndef KL_HARNESS_TOKENIZER_H
#define KL_HARNESS_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

typedef struct kl_tokenizer kl_tokenizer;

/* dir/tiktoken.model with the special tokens that dir/tokenizer_config.json lists in added_tokens_decoder. Without that
 * list: after 163,584 ranks the 256 released ones, after any other number [BOS] [EOS] <|im_end|> <|im_user|> <|im_assistant|>
 * <|im_system|> <|im_middle|> [UNK] [PAD] in this order. Ids between them that nothing names are <|reserved_token_ID|>.
 * A directory without tiktoken.model gives the byte-level fallback: ids 0..255 are bytes, then the nine. */
kl_status kl_tokenizer_open(kl_tokenizer **t, const char *dir);
kl_status kl_tokenizer_open_memory(kl_tokenizer **t, const char *model, size_t size); /* with the default specials */
kl_status kl_tokenizer_bytes(kl_tokenizer **t);
void kl_tokenizer_close(kl_tokenizer *t);
/* These special tokens and no others from now on: names are copied; ids are distinct, not below the number of ranks. */
kl_status kl_tokenizer_set_specials(kl_tokenizer *t, const char *const *names, const int64_t *ids, int count);

int64_t kl_tokenizer_size(const kl_tokenizer *t); /* ids are below this */
int64_t kl_tokenizer_special(const kl_tokenizer *t, const char *name); /* id, or -1 */

/* *ids is malloc'ed. specials: recognise special tokens in the text; otherwise they are text. Invalid UTF-8 is
 * refused with the byte offset. */
kl_status kl_tokenizer_encode(const kl_tokenizer *t, const char *text, size_t length, bool specials, int32_t **ids, int64_t *count);
/* The bytes of one id (may be part of a character); NULL when out of range. */
const char *kl_tokenizer_piece(const kl_tokenizer *t, int64_t id, size_t *length);
bool kl_tokenizer_is_special(const kl_tokenizer *t, int64_t id);
/* *text is malloc'ed and NUL-terminated. */
kl_status kl_tokenizer_decode(const kl_tokenizer *t, const int32_t *ids, int64_t count, char **text, size_t *length);

/* One chat turn list rendered as the released template does; *text is malloc'ed. */
typedef struct kl_message {
    const char *role; /* "system", "user", "assistant" */
    const char *content;
} kl_message;
kl_status kl_chat_render(const kl_message *messages, int count, bool add_generation_prompt, char **text);

/* Learn a vocabulary of `size` ranks (>= 256) by byte-pair encoding over text split by the same pattern; writes path in
 * tiktoken format, atomically. Ties: the pair whose first part, then second part, is smaller as bytes. Refuses a text that
 * has fewer pairs seen twice than that. */
kl_status kl_tokenizer_train(const char *text, size_t length, int64_t size, const char *path);

#endif
