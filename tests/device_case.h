/* Cases of verify as tests run them on a device: the memory that references work in, a KDA case and where its tensors lie.
 * Include after cmocka.h. */
#ifndef TESTS_DEVICE_CASE_H
#define TESTS_DEVICE_CASE_H

#include "harness/reference_variants.h"
#include "tests/device.h"
#include "tests/expect.h"

static kl_scratch scratch;

static inline int open_device(void **state)
{
    (void)state;
    return open_ctx();
}
static inline int close_device(void **state)
{
    (void)state;
    kl_scratch_free(&scratch);
    return close_ctx();
}

static inline void new_case(kl_case *c, kl_kda_spec spec, const kl_placement *at)
{
    spec.seed = spec.seed ? spec.seed : 1;
    assert_ok(kl_case_kda(c, &spec));
    assert_ok(kl_case_place(c, at, NULL));
}

#endif
