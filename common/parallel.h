/* Threads are OpenMP's; work is cut into tiles that depend on the problem alone, never on the thread
 * count, so that results do not either. */
#ifndef KL_COMMON_PARALLEL_H
#define KL_COMMON_PARALLEL_H

#include <omp.h>
#include <stdint.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

/* Products of many decays underflow by design. Inside a thread's share of such work, subnormals are
 * flushed to zero (they cost a hundred cycles each and carry nothing); the caller's mode comes back. */
static inline unsigned kl_flush_subnormals(void)
{
#if defined(__SSE2__)
    unsigned old = _mm_getcsr();
    _mm_setcsr(old | 0x8040u); /* FTZ | DAZ */
    return old;
#else
    return 0;
#endif
}

static inline void kl_restore_subnormals(unsigned old)
{
#if defined(__SSE2__)
    _mm_setcsr(old);
#else
    (void)old;
#endif
}

static inline int64_t kl_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
