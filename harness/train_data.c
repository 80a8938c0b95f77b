/* The training text: tokenized once, then cut into windows that depend on nothing but seed and step. */
#include <stdlib.h>
#include <string.h>

#include "harness/file.h"
#include "harness/tokenizer.h"
#include "harness/train_internal.h"

enum { HELD_OUT_TOKENS = 32768 };
static const size_t TEXT_LIMIT = (size_t)4 << 30;
static const uint64_t WINDOW_STREAM = (uint64_t)1 << 63; /* streams of training steps: apart from those of weights */

static uint64_t sum_ids(const int32_t *ids, int64_t n)
{
    uint64_t sum = 0xcbf29ce484222325u;
    for (int64_t i = 0; i < n; i++)
        sum = (sum ^ (uint32_t)ids[i]) * 0x100000001b3u;
    return sum;
}

static kl_status tokenize(kl_corpus *c, const kl_train_options *o, int64_t vocab, const kl_tokenizer *t, const char *text, size_t size)
{
    KL_TRY(kl_tokenizer_encode(t, text, size, false, &c->ids, &c->total));
    for (int64_t i = 0; i < c->total; i++)
        if (c->ids[i] < 0 || c->ids[i] >= vocab)
            return kl_error(KL_EINVAL, "%s: expected ids below the model's vocab_size of %lld, but the tokenizer gave %d", o->data,
                            (long long)vocab, (int)c->ids[i]);
    c->checksum = sum_ids(c->ids, c->total);
    int64_t held = (int64_t)((double)c->total * o->validation);
    c->train = c->total - held;
    if (c->train < o->context + 1)
        return kl_error(KL_EINVAL, "%s: expected at least context + 1 = %lld tokens to learn from, got %lld", o->data,
                        (long long)(o->context + 1), (long long)c->train);
    if (o->validation > 0.0 && held < o->context + 1)
        return kl_error(KL_EINVAL, "%s: validation %g: expected to hold out at least context + 1 = %lld tokens, got %lld", o->data,
                        o->validation, (long long)(o->context + 1), (long long)held);
    return kl_ok();
}

kl_status kl_corpus_open(kl_corpus *c, const kl_train_options *o, int64_t vocab)
{
    *c = (kl_corpus){0};
    char *text;
    size_t size;
    KL_TRY(kl_file_read(o->data, TEXT_LIMIT, &text, &size));
    kl_tokenizer *t = NULL;
    kl_status s = o->tokenizer_dir ? kl_tokenizer_open(&t, o->tokenizer_dir) : kl_tokenizer_bytes(&t);
    if (!kl_failed(s))
        s = kl_error_in(tokenize(c, o, vocab, t, text, size), "training text");
    kl_tokenizer_close(t);
    free(text);
    if (kl_failed(s))
        kl_corpus_close(c);
    return s;
}

void kl_corpus_close(kl_corpus *c)
{
    free(c->ids);
    *c = (kl_corpus){0};
}

/* The window's ids, and for each the one that follows. */
static void window(const kl_corpus *c, int64_t start, int64_t context, int32_t *ids, int32_t *targets)
{
    memcpy(ids, c->ids + start, (size_t)context * sizeof *ids);
    memcpy(targets, c->ids + start + 1, (size_t)context * sizeof *targets);
}

void kl_corpus_draw(const kl_corpus *c, const kl_train_options *o, int64_t step, int32_t *ids, int32_t *targets)
{
    kl_rng rng = kl_rng_make(o->seed, WINDOW_STREAM | (uint64_t)step);
    for (int64_t b = 0; b < o->batch; b++) {
        int64_t start = (int64_t)kl_rng_below(&rng, (uint64_t)(c->train - o->context));
        window(c, start, o->context, ids + b * o->context, targets + b * o->context);
    }
}

bool kl_corpus_held_out(const kl_corpus *c, const kl_train_options *o, int64_t i, int32_t *ids, int32_t *targets)
{
    int64_t start = c->train + i * o->context;
    if (start + o->context + 1 > c->total || (i > 0 && (i + 1) * o->context > HELD_OUT_TOKENS))
        return false;
    window(c, start, o->context, ids, targets);
    return true;
}
