/* Contexts of one, two and three threads, for what must not depend on their number. Include after cmocka.h. */
#ifndef TESTS_CONTEXTS_H
#define TESTS_CONTEXTS_H

#include "common/context.h"

static kl_ctx *ctx_of[4]; /* [n]: of n threads */

static inline int open_contexts(void **state)
{
    (void)state;
    for (int n = 1; n <= 3; n++)
        if (kl_failed(kl_ctx_create(&ctx_of[n], &(kl_ctx_options){.threads = n})))
            return -1;
    return 0;
}

static inline int close_contexts(void **state)
{
    (void)state;
    for (int n = 1; n <= 3; n++)
        kl_ctx_destroy(ctx_of[n]);
    return 0;
}

#endif
