#include "common/rng.h"

#include <math.h>

void kl_philox(uint64_t seed, uint64_t stream, uint64_t block, uint32_t out[4])
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32);
    uint32_t c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0;
        uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

kl_rng kl_rng_make(uint64_t seed, uint64_t stream)
{
    return (kl_rng){.seed = seed, .stream = stream};
}

uint32_t kl_rng_u32(kl_rng *r)
{
    unsigned lane = r->next & 3;
    if (lane == 0)
        kl_philox(r->seed, r->stream, r->next >> 2, r->buffer);
    r->next++;
    return r->buffer[lane];
}

double kl_rng_uniform(kl_rng *r)
{
    uint64_t high = kl_rng_u32(r) >> 5, low = kl_rng_u32(r) >> 6;
    return (double)((high << 26) | low) * 0x1p-53;
}

/* Box-Muller; the sine half is dropped so that one call is one value. */
double kl_rng_normal(kl_rng *r)
{
    double u = 1.0 - kl_rng_uniform(r); /* in (0, 1] */
    double v = kl_rng_uniform(r);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

uint64_t kl_rng_below(kl_rng *r, uint64_t bound)
{
    uint64_t limit = UINT64_MAX - UINT64_MAX % bound;
    for (;;) {
        uint64_t x = (uint64_t)kl_rng_u32(r) << 32;
        x |= kl_rng_u32(r);
        if (x < limit)
            return x % bound;
    }
}

void kl_fill_normal(kl_rng *r, float *x, size_t n, float mean, float stddev)
{
    for (size_t i = 0; i < n; i++)
        x[i] = mean + stddev * (float)kl_rng_normal(r);
}

void kl_fill_uniform(kl_rng *r, float *x, size_t n, float low, float high)
{
    for (size_t i = 0; i < n; i++)
        x[i] = low + (high - low) * (float)kl_rng_uniform(r);
}
