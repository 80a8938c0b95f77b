/* The released pattern and the slicing before it. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <stdlib.h>

#include "harness/tokenizer_parts.h"

enum { SLICE_CHARACTERS = 400000, RUN_CHARACTERS = 25000, JIT_STACK_START = 64 << 10, JIT_STACK_MAX = 64 << 20 };

/* White space as Unicode defines it, spelt out because \s of PCRE2 has U+180E as well; the script, not its extensions. */
#define SPACE "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define HAN "\\p{sc:Han}"
#define UPPER "(?:(?!" HAN ")[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}])"
#define LOWER "(?:(?!" HAN ")[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}])"
#define LEAD "[^\\r\\n\\p{L}\\p{N}]?"
#define SUFFIX "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

static const char pattern[] = HAN "+"
                              "|" LEAD UPPER "*" LOWER "+" SUFFIX
                              "|" LEAD UPPER "+" LOWER "*" SUFFIX
                              "|\\p{N}{1,3}"
                              "| ?[^" SPACE "\\p{L}\\p{N}]+[\\r\\n]*"
                              "|[" SPACE "]*[\\r\\n]+"
                              "|[" SPACE "]+(?![^" SPACE "])"
                              "|[" SPACE "]+";

struct kl_splitter {
    pcre2_code *code;
};

kl_status kl_splitter_make(kl_splitter **s)
{
    int error;
    size_t where;
    *s = malloc(sizeof **s);
    if (!*s)
        return kl_error(KL_ENOMEM, "no memory for the tokenizer's pattern");
    (*s)->code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_ANCHORED, &error, &where, NULL);
    if (!(*s)->code) {
        char text[120];
        pcre2_get_error_message(error, (PCRE2_UCHAR *)text, sizeof text);
        free(*s);
        *s = NULL;
        return kl_error(KL_EUNSUPPORTED, "tokenizer pattern: %s at %zu (PCRE2 10.40 or newer is needed)", text, where);
    }
    (void)pcre2_jit_compile((*s)->code, PCRE2_JIT_COMPLETE); /* without it matching is only slower */
    return kl_ok();
}

void kl_splitter_free(kl_splitter *s)
{
    if (s)
        pcre2_code_free(s->code);
    free(s);
}

static kl_status match_all(const kl_splitter *s, pcre2_match_data *data, pcre2_match_context *context, const char *text, size_t length,
                           kl_piece_fn fn, void *user)
{
    for (size_t at = 0; at < length;) {
        int found = pcre2_match(s->code, (PCRE2_SPTR)text, length, at, PCRE2_NO_UTF_CHECK, data, context);
        size_t end = found > 0 ? pcre2_get_ovector_pointer(data)[1] : at;
        if (end <= at) {
            char message[120] = "no progress";
            if (found < 0)
                pcre2_get_error_message(found, (PCRE2_UCHAR *)message, sizeof message);
            return kl_error(KL_EFORMAT, "tokenizer pattern at byte %zu of a slice: %s", at, message);
        }
        KL_TRY(fn(user, text + at, end - at));
        at = end;
    }
    return kl_ok();
}

kl_status kl_splitter_each(const kl_splitter *s, const char *text, size_t length, kl_piece_fn fn, void *user)
{
    pcre2_match_data *data = pcre2_match_data_create(1, NULL);
    pcre2_match_context *context = pcre2_match_context_create(NULL);
    pcre2_jit_stack *stack = pcre2_jit_stack_create(JIT_STACK_START, JIT_STACK_MAX, NULL);
    kl_status status = kl_error(KL_ENOMEM, "no memory to match the tokenizer's pattern");
    if (data && context) {
        pcre2_jit_stack_assign(context, NULL, stack);
        status = match_all(s, data, context, text, length, fn, user);
    }
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
    return status;
}

/* The code point at p, which is valid UTF-8, and its length. */
static uint32_t code_point(const unsigned char *p, size_t *length)
{
    *length = p[0] < 0x80 ? 1 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
    uint32_t c = *length == 1 ? p[0] : p[0] & (0x7fu >> *length);
    for (size_t i = 1; i < *length; i++)
        c = c << 6 | (p[i] & 0x3f);
    return c;
}

/* For slicing the four separators U+001C .. U+001F count as space too, unlike in the pattern. */
static bool is_space(uint32_t c)
{
    return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 ||
           c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

kl_status kl_slices_each(const char *text, size_t length, kl_piece_fn fn, void *user)
{
    size_t start = 0, at = 0, characters = 0, run = 0, bytes;
    bool run_space = false;
    while (at < length) {
        bool space = is_space(code_point((const unsigned char *)text + at, &bytes));
        bool block_ends = characters == SLICE_CHARACTERS, run_ends = space == run_space && run == RUN_CHARACTERS;
        if (block_ends || run_ends) {
            KL_TRY(fn(user, text + start, at - start));
            start = at;
        }
        characters = block_ends ? 1 : characters + 1;
        run = block_ends || run_ends || space != run_space ? 1 : run + 1;
        run_space = space;
        at += bytes;
    }
    return start < length ? fn(user, text + start, length - start) : kl_ok();
}
