/* Element types, their sizes, and the conversions between them. */
#ifndef KL_COMMON_DTYPE_H
#define KL_COMMON_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kl_dtype {
    KL_F32 = 0, /* zero, so that a cleared struct means float */
    KL_BF16,
    KL_F16,
    KL_F64,
    KL_I32,
    KL_I64,
    KL_U8,
} kl_dtype;

static inline size_t kl_dtype_size(kl_dtype t)
{
    switch (t) {
    case KL_F64: case KL_I64: return 8;
    case KL_F32: case KL_I32: return 4;
    case KL_BF16: case KL_F16: return 2;
    case KL_U8: return 1;
    }
    return 0;
}

static inline const char *kl_dtype_name(kl_dtype t)
{
    static const char *const names[] = {"float32", "bfloat16", "float16", "float64", "int32", "int64", "uint8"};
    return (unsigned)t < sizeof names / sizeof *names ? names[t] : "unknown";
}

static inline float kl_bf16_to_f32(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Round to nearest, ties to even; NaN stays a (quiet) NaN. */
static inline uint16_t kl_f32_to_bf16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float kl_f16_to_f32(uint16_t x);
uint16_t kl_f32_to_f16(float f); /* nearest even; overflow gives infinity */

/* n elements of a floating type to float, and back. Ranges must not overlap.
 * Other types are left alone: callers check the type first. */
void kl_to_f32(float *dst, const void *src, kl_dtype type, size_t n);
void kl_from_f32(void *dst, kl_dtype type, const float *src, size_t n);

#ifdef __cplusplus
}
#endif
#endif
