#include "common/dtype.h"

float kl_f16_to_f32(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16;
    uint32_t exponent = (x >> 10) & 0x1fu;
    uint32_t mantissa = x & 0x3ffu;
    uint32_t bits;
    if (exponent == 0x1f) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    } else {
        float f = (float)mantissa * 0x1p-24f; /* subnormal */
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

uint16_t kl_f32_to_f16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) /* rounds to 2^16 or more */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: subnormal or zero */
        float scaled;
        memcpy(&scaled, &magnitude, 4);
        scaled = scaled + 0x1p-1f; /* the addition rounds to units of 2^-24 */
        uint32_t s;
        memcpy(&s, &scaled, 4);
        return (uint16_t)(sign | (s - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

void kl_to_f32(float *restrict dst, const void *restrict src, kl_dtype type, size_t n)
{
    switch (type) {
    case KL_F32: memcpy(dst, src, n * sizeof(float)); break;
    case KL_F64:
        for (size_t i = 0; i < n; i++)
            dst[i] = (float)((const double *)src)[i];
        break;
    case KL_BF16:
        for (size_t i = 0; i < n; i++)
            dst[i] = kl_bf16_to_f32(((const uint16_t *)src)[i]);
        break;
    case KL_F16:
        for (size_t i = 0; i < n; i++)
            dst[i] = kl_f16_to_f32(((const uint16_t *)src)[i]);
        break;
    default: break;
    }
}

void kl_from_f32(void *restrict dst, kl_dtype type, const float *restrict src, size_t n)
{
    switch (type) {
    case KL_F32: memcpy(dst, src, n * sizeof(float)); break;
    case KL_F64:
        for (size_t i = 0; i < n; i++)
            ((double *)dst)[i] = src[i];
        break;
    case KL_BF16:
        for (size_t i = 0; i < n; i++)
            ((uint16_t *)dst)[i] = kl_f32_to_bf16(src[i]);
        break;
    case KL_F16:
        for (size_t i = 0; i < n; i++)
            ((uint16_t *)dst)[i] = kl_f32_to_f16(src[i]);
        break;
    default: break;
    }
}
