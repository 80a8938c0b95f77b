/* Up to three texts separated by NUL: a tiktoken.model, a text to encode with it, a tokenizer_config.json. Whatever is
 * encoded decodes to itself. The whole input is encoded with the byte-level fallback as well. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "harness/tokenizer.h"
#include "harness/tokenizer_parts.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void round_trip(const kl_tokenizer *t, const char *text, size_t length)
{
    for (int specials = 0; specials < 2; specials++) {
        int32_t *ids;
        int64_t count;
        if (kl_failed(kl_tokenizer_encode(t, text, length, specials, &ids, &count)))
            return;
        char *back;
        size_t n;
        if (kl_failed(kl_tokenizer_decode(t, ids, count, &back, &n)) || n != length || memcmp(back, text, n) != 0)
            abort();
        free(back);
        free(ids);
    }
}

static void try_specials(const char *text, size_t length)
{
    kl_specials s;
    (void)kl_specials_parse(&s, 256, text, length, "fuzz");
    kl_specials_free(&s);
}

/* The text up to the next NUL; *at moves beyond it. */
static const char *next_part(const char *data, size_t size, size_t *at, size_t *length)
{
    const char *part = data + *at, *end = *at < size ? memchr(part, '\0', size - *at) : NULL;
    *length = end ? (size_t)(end - part) : size - *at;
    *at = end ? *at + *length + 1 : size;
    return part;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static kl_tokenizer *bytes;
    if (!bytes && kl_failed(kl_tokenizer_bytes(&bytes)))
        abort();
    round_trip(bytes, (const char *)data, size);
    size_t at = 0, model_size, text_size, config_size;
    const char *model = next_part((const char *)data, size, &at, &model_size);
    const char *text = next_part((const char *)data, size, &at, &text_size);
    const char *config = next_part((const char *)data, size, &at, &config_size);
    kl_tokenizer *t;
    if (!kl_failed(kl_tokenizer_open_memory(&t, model, model_size))) {
        round_trip(t, text, text_size);
        kl_tokenizer_close(t);
    }
    try_specials(config, config_size);
    return 0;
}
