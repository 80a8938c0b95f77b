/* What the tests of the model share: contexts, small models, golden checkpoints, packed batches. */
#ifndef TESTS_MODEL_SUPPORT_H
#define TESTS_MODEL_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/compare.h"
#include "harness/model.h"
#include "tests/expect.h"
#include "tests/folder.h"

#define WITHIN(err, limit, what)                                                     \
    do {                                                                             \
        double err_ = (err), limit_ = (limit);                                       \
        if (!(err_ <= limit_))                                                       \
            fail_msg("%s: error %.3g, at most %.3g allowed", what, err_, limit_);    \
    } while (0)

static inline kl_ctx *make_ctx(int threads)
{
    kl_ctx *ctx;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.threads = threads}));
    return ctx;
}

/* The tests' small model with the given "key=value" changes, ending in NULL. */
static inline kl_config small_config(const char *const *changes)
{
    kl_config c;
    assert_ok(kl_config_preset(&c, "tiny"));
    for (; changes && *changes; changes++)
        assert_ok(kl_config_set(&c, *changes));
    return c;
}

/* Random weights whose norm weights, convolutions and choice biases are random too: what initialisation leaves equal hides
 * mistakes. */
static inline kl_status shake_one(void *user, const kl_param_info *info, kl_param *p)
{
    kl_rng *r = user;
    float *x = p->data;
    size_t n = (size_t)(p->rows * p->columns);
    if (!info->trained)
        kl_fill_normal(r, x, n, 0.0f, 0.2f);
    else if (info->init_kind == KL_INIT_ONES)
        kl_fill_uniform(r, x, n, 0.5f, 1.5f);
    else if (info->init_kind == KL_INIT_NORMAL && info->layer < 0)
        for (size_t i = 0; i < n; i++)
            x[i] *= 10.0f; /* embeddings of the size of what layers add */
    return kl_ok();
}

static inline kl_model *random_model(kl_ctx *ctx, const kl_config *c, uint64_t seed)
{
    kl_model *m;
    kl_rng r = kl_rng_make(seed, 1u << 30);
    assert_ok(kl_model_random(&m, ctx, c, seed));
    assert_ok(kl_weights_each(c, &m->weights, shake_one, &r));
    return m;
}

static inline int32_t *random_ids(uint64_t seed, int64_t n, int64_t vocab)
{
    kl_rng r = kl_rng_make(seed, 7);
    int32_t *ids = malloc((size_t)(n + 1) * sizeof *ids);
    assert_non_null(ids);
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)kl_rng_below(&r, (uint64_t)vocab);
    return ids;
}

static inline float *floats(size_t n)
{
    float *x = malloc((n + 1) * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = __builtin_nanf(""); /* what is not written fails every comparison */
    return x;
}

/* Logits of every token without a cache; free() them. */
static inline float *all_logits(kl_model *m, int64_t N, const int64_t *cu, const int32_t *ids)
{
    float *logits = floats((size_t)(cu[N] * m->config.vocab_size));
    assert_ok(kl_model_forward(m, &(kl_batch){.N = N, .cu = cu, .ids = ids}, NULL, &(kl_outputs){.logits = logits}));
    return logits;
}

#endif
