/* The cache that the fuzzer loads into and that its seed files were saved from. */
#ifndef TESTS_FUZZ_SMALL_CACHE_H
#define TESTS_FUZZ_SMALL_CACHE_H

#include "harness/cache.h"

static inline kl_status small_cache(kl_cache **cache)
{
    static const char *const sizes[] = {"layers=2", "hidden=8", "kda_heads=1", "head_dim=4", "mla_heads=1", "latent=4", "nope_dim=4", "rope_dim=2", "v_dim=4",
                                        "conv=2", "hybrid=1:1"};
    kl_config c;
    KL_TRY(kl_config_preset(&c, "tiny"));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        KL_TRY(kl_config_set(&c, sizes[i]));
    return kl_cache_create(cache, &c, 2, 8);
}

#endif
