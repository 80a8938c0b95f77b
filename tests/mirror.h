/* A test's host arrays, lent to a call on a device: copied there before it and back after it, with their gaps and guards. On the CPU
 * they are handed over as they are. Include after cmocka.h. */
#ifndef TESTS_MIRROR_H
#define TESTS_MIRROR_H

#include "common/gpu.h"
#include "tests/expect.h"

enum { MIRROR_BLOCKS = 64 };

typedef struct mirror {
    const kl_ctx *ctx;
    int count;
    struct {
        char *host, *device;
        size_t bytes;
    } block[MIRROR_BLOCKS];
} mirror;

/* Where the call finds what lies at that host address: inside a block that has been lent, or else where it is. */
static inline void *mirrored(const mirror *m, const void *host)
{
    const char *at = host;
    for (int i = 0; i < m->count; i++)
        if (at >= m->block[i].host && at < m->block[i].host + m->block[i].bytes)
            return m->block[i].device + (at - m->block[i].host);
    return (void *)host;
}

/* Lends an array, or part of one that has been lent already; says where the call finds it. */
static inline void *lend(mirror *m, const void *host, size_t bytes)
{
    if (m->ctx->device == KL_CPU || !host || bytes == 0 || mirrored(m, host) != host)
        return mirrored(m, host);
    assert_true(m->count < MIRROR_BLOCKS);
    int i = m->count++;
    void *device;
    assert_ok(kl_gpu_alloc(m->ctx, &device, bytes));
    m->block[i].host = (char *)host;
    m->block[i].device = device;
    m->block[i].bytes = bytes;
    assert_ok(kl_gpu_copy(m->ctx, device, host, bytes));
    return device;
}

static inline void take_back(mirror *m)
{
    while (m->count) {
        int i = --m->count;
        assert_ok(kl_gpu_copy(m->ctx, m->block[i].host, m->block[i].device, m->block[i].bytes));
        kl_gpu_free(m->ctx, m->block[i].device);
    }
}

#endif
