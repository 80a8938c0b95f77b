/* Philox4x32-10 (Salmon et al., SC 2011): the one source of randomness.
 * Counter-based: word i of stream s under seed k is a pure function of
 * (k, s, i), so results depend on no thread count and no call order. */
#ifndef KL_COMMON_RNG_H
#define KL_COMMON_RNG_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* out[0..3] = Philox4x32-10(counter = (block, stream), key = seed). */
void kl_philox(uint64_t seed, uint64_t stream, uint64_t block, uint32_t out[4]);

/* A cursor over one stream. Copying it forks the sequence; its four fields are its whole state. */
typedef struct kl_rng {
    uint64_t seed, stream;
    uint64_t next; /* words already drawn */
    uint32_t buffer[4];
} kl_rng;

kl_rng kl_rng_make(uint64_t seed, uint64_t stream);
uint32_t kl_rng_u32(kl_rng *r);
double kl_rng_uniform(kl_rng *r);                 /* in [0, 1), 53 bits */
double kl_rng_normal(kl_rng *r);                  /* mean 0, variance 1; draws four words */
uint64_t kl_rng_below(kl_rng *r, uint64_t bound); /* in [0, bound), unbiased; bound >= 1 */

void kl_fill_normal(kl_rng *r, float *x, size_t n, float mean, float stddev);
void kl_fill_uniform(kl_rng *r, float *x, size_t n, float low, float high);

#ifdef __cplusplus
}
#endif
#endif
