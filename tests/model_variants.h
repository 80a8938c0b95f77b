/* The configurations that the model's tests walk over, each small. Include first. */
#ifndef TESTS_MODEL_VARIANTS_H
#define TESTS_MODEL_VARIANTS_H

#include "tests/model_support.h"

static const char *const VARIANTS[][4] = {
    {"hybrid=3:1"},
    {"hybrid=0:1"},
    {"hybrid=1:1", "rope=1"},
    {"hybrid=n:0"},
    {"gate=block:8"},
    {"gate=head"},
    {"gate=none"},
    {"gate_kind=bounded:-5"},
    {"output_gate=swish"},
    {"output_gate=none"},
    {"conv=0"},
    {"conv=2", "biased_weights=1"},
};
enum { VARIANT_COUNT = sizeof VARIANTS / sizeof *VARIANTS, LAYERS = 4 };

static inline kl_config variant_config(int i)
{
    kl_config c = small_config((const char *[]){"layers=4", NULL});
    for (int j = 0; j < 3 && VARIANTS[i][j]; j++)
        assert_ok(kl_config_set(&c, VARIANTS[i][j]));
    assert_ok(kl_config_validate(&c));
    return c;
}

#endif
