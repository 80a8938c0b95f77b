/* The device of a test program: opened by the group's setup, NULL where there is none, and then its tests are skipped. */
#ifndef TESTS_DEVICE_H
#define TESTS_DEVICE_H

#include "common/gpu.h"

static kl_ctx *ctx;

static inline int open_ctx(void) { return kl_gpu_count() > 0 && kl_failed(kl_ctx_create(&ctx, &(kl_ctx_options){.device = KL_CUDA})); }
static inline int close_ctx(void)
{
    kl_ctx_destroy(ctx);
    ctx = NULL;
    return 0;
}

/* The same as fixtures of a group of tests that needs nothing else. */
static inline int set_up_device(void **state)
{
    (void)state;
    return open_ctx();
}
static inline int tear_down_device(void **state)
{
    (void)state;
    return close_ctx();
}

#define NEEDS_DEVICE() \
    do {               \
        (void)state;   \
        if (!ctx)      \
            skip();    \
    } while (0)

#endif
