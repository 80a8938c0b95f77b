/* Sixteen floats at a time in the compiler's own vector type: one zmm register with AVX-512, two ymm
 * with AVX2, four xmm with SSE2, from the same source. */
#ifndef KL_COMMON_SIMD_H
#define KL_COMMON_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define KL_AVX512 1
#endif

/* Everything here is inlined: how such a vector would be passed on a machine without its registers does not matter. */
#pragma GCC diagnostic ignored "-Wpsabi"

typedef float kl_v __attribute__((vector_size(64)));
typedef int32_t kl_vi __attribute__((vector_size(64)));
typedef uint16_t kl_vh __attribute__((vector_size(32)));
typedef uint32_t kl_vu __attribute__((vector_size(64)));
typedef float kl_v_unaligned __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t kl_vh_unaligned __attribute__((vector_size(32), aligned(2), may_alias));

enum { KL_LANES = 16 };

/* Before a loop over registers: its trip count is known once everything around it is inlined. */
#if defined(__clang__)
#define KL_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KL_UNROLL _Pragma("GCC unroll 16")
#endif
#define KL_INLINE static inline __attribute__((always_inline))

static inline kl_v kl_vload(const float *p) { return *(const kl_v_unaligned *)p; }
static inline void kl_vstore(float *p, kl_v x) { *(kl_v_unaligned *)p = x; }
/* To whole cache lines (p a multiple of 64 bytes) that will not be read soon. Ordered by the end of a parallel region. */
static inline void kl_vstore_past(float *p, kl_v x)
{
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#else
    kl_vstore(p, x);
#endif
}
static inline kl_v kl_vset(float x) { return x - (kl_v){0}; }

/* The first n <= 16 elements; the others read as 0 and are never touched in memory. */
#ifdef KL_AVX512
static inline kl_v kl_vload_n(const float *p, int64_t n) { return (kl_v)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
static inline void kl_vstore_n(float *p, kl_v x, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x); }
static inline kl_vh kl_vload_half_n(const uint16_t *p, int64_t n) { return (kl_vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p); }
#else
/* n <= 16 elements by powers of two: copies of a fixed size are single instructions. */
static inline void kl_copy_n(char *to, const char *from, int64_t n, size_t element)
{
#define KL_COPY(power)                                                      \
    if (n & (power)) {                                                      \
        element == 4 ? memcpy(to, from, 4 * (power)) : memcpy(to, from, 2 * (power)); \
        to += (power) * element;                                            \
        from += (power) * element;                                          \
    }
    KL_COPY(16) KL_COPY(8) KL_COPY(4) KL_COPY(2) KL_COPY(1)
#undef KL_COPY
}
static inline kl_v kl_vload_n(const float *p, int64_t n)
{
    kl_v x = {0};
    kl_copy_n((char *)&x, (const char *)p, n, 4);
    return x;
}
static inline void kl_vstore_n(float *p, kl_v x, int64_t n) { kl_copy_n((char *)p, (const char *)&x, n, 4); }
static inline kl_vh kl_vload_half_n(const uint16_t *p, int64_t n)
{
    kl_vh x = {0};
    kl_copy_n((char *)&x, (const char *)p, n, 2);
    return x;
}
#endif

/* Sixteen, or the n that are left of a row. */
static inline kl_v kl_vload_up_to(const float *p, int64_t n) { return n >= KL_LANES ? kl_vload(p) : kl_vload_n(p, n); }
static inline void kl_vstore_up_to(float *p, kl_v x, int64_t n)
{
    if (n >= KL_LANES)
        kl_vstore(p, x);
    else
        kl_vstore_n(p, x, n);
}

static inline kl_v kl_vwiden_bf16(kl_vh x)
{
#ifdef KL_AVX512
    kl_vu wide = (kl_vu)_mm512_cvtepu16_epi32((__m256i)x); /* gcc 12 makes four instructions of the conversion below */
#else
    kl_vu wide = __builtin_convertvector(x, kl_vu);
#endif
    return (kl_v)(wide << 16);
}
static inline kl_v kl_vload_bf16(const uint16_t *p)
{
    return kl_vwiden_bf16(*(const kl_vh_unaligned *)p);
}

/* n <= 16 elements from element k on of a row in its stored type (F32, BF16, F16); the other lanes read as 0. */
static inline __attribute__((always_inline)) kl_v kl_vload_as(const void *row, kl_dtype type, int64_t k, int64_t n)
{
    if (type == KL_BF16)
        return n == KL_LANES ? kl_vload_bf16((const uint16_t *)row + k) : kl_vwiden_bf16(kl_vload_half_n((const uint16_t *)row + k, n));
    if (type == KL_F32)
        return n == KL_LANES ? kl_vload((const float *)row + k) : kl_vload_n((const float *)row + k, n);
#ifdef KL_AVX512
    return (kl_v)_mm512_cvtph_ps((__m256i)kl_vload_half_n((const uint16_t *)row + k, n));
#endif
    float lanes[KL_LANES] = {0};
    kl_to_f32(lanes, (const char *)row + (size_t)k * kl_dtype_size(type), type, (size_t)n);
    return kl_vload(lanes);
}

static inline kl_v kl_vmax(kl_v a, kl_v b)
{
    kl_vi pick = a > b;
    return (kl_v)(((kl_vi)a & pick) | ((kl_vi)b & ~pick));
}
static inline kl_v kl_vmin(kl_v a, kl_v b)
{
    kl_vi pick = a < b;
    return (kl_v)(((kl_vi)a & pick) | ((kl_vi)b & ~pick));
}

/* Pairwise, in a fixed order: lane i and i + 8, then i + 4, i + 2, i + 1. */
static inline float kl_vsum(kl_v x)
{
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
    v8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    v4 c = b + __builtin_shufflevector(b, b, 2, 3, 2, 3);
    return c[0] + c[1];
}
static inline float kl_vmax_lane(kl_v x)
{
    float lane[KL_LANES];
    memcpy(lane, &x, sizeof lane);
    for (int width = KL_LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
}

/* Rows a and b exchange the lanes that a transpose at this distance moves: a keeps the lanes whose distance bit is 0. */
#define KL_EXCHANGE(name, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15) \
    KL_INLINE void name(kl_v *a, kl_v *b) \
    { \
        kl_v low = __builtin_shufflevector(*a, *b, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15); \
        kl_v high = __builtin_shufflevector(*a, *b, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15); \
        *a = low; \
        *b = high; \
    }
KL_EXCHANGE(kl_vexchange_1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
KL_EXCHANGE(kl_vexchange_2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
KL_EXCHANGE(kl_vexchange_4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
KL_EXCHANGE(kl_vexchange_8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)

#undef KL_EXCHANGE
/* x[i][j] becomes x[j][i]. */
KL_INLINE void kl_vtranspose(kl_v x[16])
{
KL_UNROLL
    for (int i = 0; i < 8; i++)
        kl_vexchange_8(&x[i], &x[i + 8]);
KL_UNROLL
    for (int i = 0; i < 16; i++)
        if (!(i & 4))
            kl_vexchange_4(&x[i], &x[i + 4]);
KL_UNROLL
    for (int i = 0; i < 16; i++)
        if (!(i & 2))
            kl_vexchange_2(&x[i], &x[i + 2]);
KL_UNROLL
    for (int i = 0; i < 16; i++)
        if (!(i & 1))
            kl_vexchange_1(&x[i], &x[i + 1]);
}

/* e^x within 1.2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, then scale e^r by 2^n. Below -104 the result is 0, above 88.7
 * infinity; NaN stays NaN. */

/* e^r = 1 + r + r^2 q(r); q of degree 4 meets its function at the Chebyshev points of the interval: 1.1e-8 at most. */
static inline kl_v kl_vexp_reduced(kl_v r)
{
    kl_v p = kl_vset(1.39262131e-3f);
    p = p * r + 8.36320315e-3f;
    p = p * r + 4.16665561e-2f;
    p = p * r + 1.66665763e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    return p * r + 1.0f;
}

#ifdef KL_AVX512
/* The scaling by 2^n, with its underflow and overflow, is one instruction; max() hands on NaN, its second argument. */
static inline kl_v kl_vexp(kl_v x)
{
    kl_v low = (kl_v)_mm512_max_ps((__m512)kl_vset(-110.0f), (__m512)x);
    kl_v n = (kl_v)_mm512_roundscale_ps((__m512)(low * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    n = (kl_v)_mm512_min_ps((__m512)kl_vset(130.0f), (__m512)n);
    kl_v r = low - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    return (kl_v)_mm512_scalef_ps((__m512)kl_vexp_reduced(r), (__m512)n);
}
#else
static inline kl_v kl_vexp(kl_v x)
{
    kl_v clamped = kl_vmin(kl_vmax(x, kl_vset(-104.0f)), kl_vset(89.0f));
    kl_v shifted = clamped * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    kl_v n = shifted - 12582912.0f;
    kl_v r = clamped - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    kl_vi e = __builtin_convertvector(n, kl_vi);
    kl_vi half = e >> 1; /* in two halves: 2^n alone may be out of range */
    kl_v low = (kl_v)((half + 127) << 23), high = (kl_v)((e - half + 127) << 23);
    kl_v y = kl_vexp_reduced(r) * low * high;
    kl_vi under = x < -104.0f, nan = x != x;
    kl_vi bits = (kl_vi)y & ~under;
    return (kl_v)((bits & ~nan) | ((kl_vi)x & nan));
}
#endif

static inline kl_v kl_vsigmoid(kl_v x) { return 1.0f / (1.0f + kl_vexp(-x)); }

#endif
