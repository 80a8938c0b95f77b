/* The ground floor: element types, random numbers, vector arithmetic, comparison, status, workspace carving, timing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/arena.h"
#include "common/compare.h"
#include "common/context.h"
#include "common/dtype.h"
#include "common/gpu.h"
#include "common/rng.h"
#include "common/simd.h"
#include "common/timer.h"

static uint32_t bits_of(float f)
{
    uint32_t b;
    memcpy(&b, &f, 4);
    return b;
}

static float float_of(uint32_t b)
{
    float f;
    memcpy(&f, &b, 4);
    return f;
}

/* ---- element types ---- */

static void test_bf16_every_pattern(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 65536; i++) {
        float f = kl_bf16_to_f32((uint16_t)i);
        assert_int_equal(bits_of(f), i << 16);
        assert_int_equal(kl_f32_to_bf16(f), isnan(f) ? (i | 0x40) : i); /* a NaN comes back quiet */
    }
}

/* What the sixteen bits of an IEEE half mean, by its definition. */
static double half_value(uint32_t h)
{
    int exponent = (int)(h >> 10 & 31), mantissa = (int)(h & 1023);
    double sign = h & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31)
        return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24));
}

static void test_f16_every_pattern(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 65536; i++) {
        float f = kl_f16_to_f32((uint16_t)i);
        double expected = half_value(i);
        assert_true(isnan(expected) ? isnan(f) : (double)f == expected);
        assert_int_equal(bits_of(f) >> 31, i >> 15);
        assert_int_equal(kl_f32_to_f16(f), isnan(f) ? (i | 0x200) : i);
    }
}

/* Between neighbours the nearer one; halfway the even one. */
static void check_rounding(uint16_t (*narrow)(float), float (*widen)(uint16_t), uint32_t last_finite)
{
    for (uint32_t i = 0; i < last_finite; i++) {
        float a = widen((uint16_t)i), b = widen((uint16_t)(i + 1)), middle = (float)(0.5 * ((double)a + (double)b));
        assert_int_equal(narrow(middle), i & 1 ? i + 1 : i);
        assert_int_equal(narrow(nextafterf(middle, -INFINITY)), i);
        assert_int_equal(narrow(nextafterf(middle, INFINITY)), i + 1);
        assert_int_equal(narrow(-middle), 0x8000 | (i & 1 ? i + 1 : i));
    }
}

static uint16_t to_bf16(float f) { return kl_f32_to_bf16(f); }
static float from_bf16(uint16_t h) { return kl_bf16_to_f32(h); }

static void test_narrowing_rounds_to_nearest_even(void **state)
{
    (void)state;
    check_rounding(to_bf16, from_bf16, 0x7f7f);
    check_rounding(kl_f32_to_f16, kl_f16_to_f32, 0x7bff);
    assert_int_equal(kl_f32_to_f16(65519.0f), 0x7bff);
    assert_int_equal(kl_f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(kl_f32_to_f16(-1e30f), 0xfc00);
    assert_int_equal(kl_f32_to_bf16(3.4e38f), 0x7f80);
    assert_int_equal(kl_f32_to_bf16(-INFINITY), 0xff80);
    assert_true(isnan(kl_bf16_to_f32(kl_f32_to_bf16(NAN))) && isnan(kl_f16_to_f32(kl_f32_to_f16(float_of(0x7f800001)))));
}

static void test_arrays_convert_like_elements(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(1, 1);
    float x[70], back[70];
    unsigned char stored[70 * 8];
    const kl_dtype types[] = {KL_F32, KL_BF16, KL_F16, KL_F64};
    for (size_t n = 0; n <= 67; n++)
        for (int i = 0; i < 4; i++) {
            kl_fill_normal(&rng, x, n, 0.0f, 100.0f);
            memset(stored, 0x5a, sizeof stored);
            back[n] = 77.0f;
            kl_from_f32(stored, types[i], x, n);
            assert_int_equal(stored[n * kl_dtype_size(types[i])], 0x5a);
            kl_to_f32(back, stored, types[i], n);
            assert_true(back[n] == 77.0f);
            for (size_t j = 0; j < n; j++) {
                float expected = types[i] == KL_BF16 ? kl_bf16_to_f32(kl_f32_to_bf16(x[j])) : types[i] == KL_F16 ? kl_f16_to_f32(kl_f32_to_f16(x[j])) : x[j];
                assert_true(back[j] == expected);
            }
        }
    assert_int_equal(kl_dtype_size(KL_I64), 8);
    assert_int_equal(kl_dtype_size(KL_I32), 4);
    assert_int_equal(kl_dtype_size(KL_U8), 1);
    assert_int_equal(kl_dtype_size((kl_dtype)99), 0);
    assert_string_equal(kl_dtype_name(KL_BF16), "bfloat16");
    assert_string_equal(kl_dtype_name((kl_dtype)99), "unknown");
}

/* ---- random numbers ---- */

/* The known answers that come with Random123: counter, key, result. */
static void test_philox_known_answers(void **state)
{
    (void)state;
    static const uint32_t answers[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1},
    };
    for (int i = 0; i < 3; i++) {
        const uint32_t *a = answers[i];
        uint32_t out[4];
        kl_philox((uint64_t)a[5] << 32 | a[4], (uint64_t)a[3] << 32 | a[2], (uint64_t)a[1] << 32 | a[0], out);
        assert_memory_equal(out, a + 6, 16);
    }
}

static void test_streams(void **state)
{
    (void)state;
    kl_rng a = kl_rng_make(7, 3);
    for (uint64_t block = 0; block < 5; block++) {
        uint32_t out[4];
        kl_philox(7, 3, block, out);
        for (int i = 0; i < 4; i++)
            assert_int_equal(kl_rng_u32(&a), out[i]);
    }
    kl_rng_u32(&a);
    kl_rng fork = a, other = kl_rng_make(7, 4);
    int same = 0;
    for (int i = 0; i < 100; i++) {
        uint32_t x = kl_rng_u32(&a);
        assert_int_equal(x, kl_rng_u32(&fork));
        same += x == kl_rng_u32(&other);
    }
    assert_true(same < 3);
}

static void test_distributions(void **state)
{
    (void)state;
    kl_rng r = kl_rng_make(5, 5);
    enum { N = 200000 };
    double sum = 0, square = 0, fourth = 0, uniform = 0;
    for (int i = 0; i < N; i++) {
        double x = kl_rng_normal(&r), u = kl_rng_uniform(&r);
        assert_true(u >= 0.0 && u < 1.0);
        sum += x, square += x * x, fourth += x * x * x * x, uniform += u;
    }
    assert_true(fabs(sum / N) < 0.01 && fabs(square / N - 1.0) < 0.02 && fabs(fourth / N - 3.0) < 0.15);
    assert_true(fabs(uniform / N - 0.5) < 0.005);
    int count[6] = {0};
    for (int i = 0; i < 60000; i++)
        count[kl_rng_below(&r, 6)]++;
    for (int i = 0; i < 6; i++)
        assert_in_range(count[i], 9600, 10400);
    assert_int_equal(kl_rng_below(&r, 1), 0);
    assert_true(kl_rng_below(&r, UINT64_MAX) < UINT64_MAX);
    float x[1000];
    kl_fill_uniform(&r, x, 1000, -2.0f, 3.0f);
    for (int i = 0; i < 1000; i++)
        assert_true(x[i] >= -2.0f && x[i] <= 3.0f);
}

/* ---- vectors ---- */

static double ulps(float got, double expected)
{
    int exponent;
    frexp(expected, &exponent);
    return fabs((double)got - expected) / ldexp(1.0, exponent - 24 < -149 ? -149 : exponent - 24);
}

static void test_exp_within_its_bound(void **state)
{
    (void)state;
    double worst = 0.0;
    kl_rng rng = kl_rng_make(3, 3);
    for (int i = 0; i < 60000; i++) {
        float lane[KL_LANES], y[KL_LANES];
        for (int j = 0; j < KL_LANES; j++)
            lane[j] = i & 1 ? (float)(kl_rng_uniform(&rng) * 2.0 - 1.0) : (float)(kl_rng_uniform(&rng) * 176.0 - 87.3);
        kl_vstore(y, kl_vexp(kl_vload(lane)));
        for (int j = 0; j < KL_LANES; j++)
            worst = fmax(worst, ulps(y[j], exp((double)lane[j])));
    }
    print_message("kl_vexp: at most %.3f ulp\n", worst);
    assert_true(worst <= 1.2);
}

static float exp_of(float x)
{
    float y[KL_LANES];
    kl_vstore(y, kl_vexp(kl_vset(x)));
    for (int i = 1; i < KL_LANES; i++)
        assert_int_equal(bits_of(y[i]), bits_of(y[0]));
    return y[0];
}

static void test_exp_at_its_ends(void **state)
{
    (void)state;
    assert_true(exp_of(0.0f) == 1.0f && exp_of(-0.0f) == 1.0f);
    assert_true(exp_of(-INFINITY) == 0.0f && exp_of(-1000.0f) == 0.0f && exp_of(-104.5f) == 0.0f);
    assert_true(exp_of(INFINITY) == INFINITY && exp_of(1000.0f) == INFINITY && exp_of(88.8f) == INFINITY);
    assert_true(isnan(exp_of(NAN)) && isnan(exp_of(-NAN)));
    assert_true(isfinite(exp_of(88.7f)));
    for (float x = -103.0f; x < -87.4f; x += 0.1f) /* subnormal: steps of 2^-149 */
        assert_true(fabs((double)exp_of(x) - exp((double)x)) <= 2.0 * 0x1p-149 + 2.0 * 0x1p-24 * exp((double)x));
    float s[KL_LANES];
    const float at[] = {-INFINITY, -200.0f, -5.0f, 0.0f, 5.0f, 200.0f, INFINITY};
    for (int i = 0; i < 7; i++) {
        kl_vstore(s, kl_vsigmoid(kl_vset(at[i])));
        double expected = 1.0 / (1.0 + exp(-(double)at[i]));
        assert_true(fabs((double)s[3] - expected) <= 4e-7 * expected + 1e-38);
    }
}

static void test_partial_loads_and_stores(void **state)
{
    (void)state;
    for (int64_t n = 0; n <= KL_LANES; n++) {
        float *exact = malloc((size_t)n * 4 + 1); /* nothing behind it: a sanitizer sees a read past the end */
        float lane[KL_LANES], stored[KL_LANES];
        for (int64_t i = 0; i < n; i++)
            exact[i] = (float)(i + 1);
        kl_vstore(lane, kl_vload_n(exact, n));
        for (int64_t i = 0; i < KL_LANES; i++) {
            assert_true(lane[i] == (i < n ? (float)(i + 1) : 0.0f));
            stored[i] = -1.0f;
        }
        kl_vstore_n(stored, kl_vset(9.0f), n);
        for (int64_t i = 0; i < KL_LANES; i++)
            assert_true(stored[i] == (i < n ? 9.0f : -1.0f));
        free(exact);
    }
}

static void test_loads_in_the_stored_type(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(9, 9);
    float x[64], lane[KL_LANES], expected[KL_LANES];
    unsigned char stored[64 * 4];
    const kl_dtype types[] = {KL_F32, KL_BF16, KL_F16};
    kl_fill_normal(&rng, x, 64, 0.0f, 1.0f);
    for (int type = 0; type < 3; type++) {
        kl_from_f32(stored, types[type], x, 64);
        for (int64_t k = 0; k < 20; k++)
            for (int64_t n = 1; n <= KL_LANES; n++) {
                memset(expected, 0, sizeof expected);
                kl_to_f32(expected, stored + (size_t)k * kl_dtype_size(types[type]), types[type], (size_t)n);
                kl_vstore(lane, kl_vload_as(stored, types[type], k, n));
                assert_memory_equal(lane, expected, sizeof lane);
            }
    }
}

static void test_lanes_fold_in_a_fixed_order(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(4, 4);
    for (int trial = 0; trial < 100; trial++) {
        float x[KL_LANES], t[KL_LANES];
        kl_fill_normal(&rng, x, KL_LANES, 0.0f, 1.0f);
        memcpy(t, x, sizeof t);
        for (int width = KL_LANES / 2; width; width /= 2)
            for (int i = 0; i < width; i++)
                t[i] += t[i + width];
        assert_int_equal(bits_of(kl_vsum(kl_vload(x))), bits_of(t[0]));
        float max = x[0];
        for (int i = 1; i < KL_LANES; i++)
            max = fmaxf(max, x[i]);
        assert_true(kl_vmax_lane(kl_vload(x)) == max);
    }
}

/* ---- comparison ---- */

static void test_compare_fails_on_nan(void **state)
{
    (void)state;
    float x[4] = {1, 2, 3, 4}, nan_x[4] = {1, NAN, 3, 4}, inf_x[4] = {1, 2, INFINITY, 4};
    double ref[4] = {1, 2, 3, 4}, nan_ref[4] = {1, NAN, 3, 4}, inf_ref[4] = {1, 2, INFINITY, 4}, zero[4] = {0};
    assert_true(kl_within(kl_rel_err(x, ref, 4), 0.0));
    assert_false(kl_within(kl_rel_err(nan_x, ref, 4), 1e9));
    assert_false(kl_within(kl_rel_err(inf_x, ref, 4), 1e9));
    assert_false(kl_within(kl_rel_err(x, nan_ref, 4), 1e9));
    assert_false(kl_within(kl_rel_err(nan_x, nan_ref, 4), 1e9));
    assert_false(kl_within(kl_rel_err(inf_x, inf_ref, 4), 1e9));
    assert_true(fabs(kl_rel_err(x, zero, 4) - sqrt(30.0)) < 1e-12);
    assert_true(kl_rel_err(x, ref, 0) == 0.0);
    float y[4] = {1, 2, 3, 5};
    assert_true(fabs(kl_rel_err_f32(y, x, 4) - 1.0 / sqrt(30.0)) < 1e-12);
    assert_false(kl_within(NAN, 1.0));
}

/* One head of eight is wrong in one stretch of time: the whole hardly shows it, its block does. */
static void test_compare_by_blocks(void **state)
{
    (void)state;
    enum { T = 64, H = 8, D = 16 };
    static float x[T * H * D];
    static double ref[T * H * D];
    kl_rng rng = kl_rng_make(2, 2);
    kl_fill_normal(&rng, x, T * H * D, 0.0f, 1.0f);
    for (int i = 0; i < T * H * D; i++)
        ref[i] = (double)x[i];
    assert_true(kl_rel_err_blocks(x, ref, T, H, D, 16) == 0.0);
    for (int t = 16; t < 32; t++)
        for (int d = 0; d < D; d++)
            x[(t * H + 5) * D + d] *= 1.5f;
    assert_true(kl_rel_err(x, ref, T * H * D) < 0.12);
    assert_true(fabs(kl_rel_err_blocks(x, ref, T, H, D, 16) - 0.5) < 1e-6);
    x[77] = NAN;
    assert_false(kl_within(kl_rel_err_blocks(x, ref, T, H, D, 16), 1e9));
    assert_true(kl_rel_err_blocks(x, ref, 0, H, D, 16) == 0.0);
}

/* A sum of which enough is left is scored against itself, one that has cancelled against a tenth of its terms. */
static void test_sums_that_cancel(void **state)
{
    (void)state;
    const double ref[] = {3.0, 0.001}, terms[] = {4.0, 40.0}, small[] = {4.0, 0.001};
    const float x[] = {3.0f, 0.051f}, bad[] = {3.0f, NAN};
    assert_true(fabs(kl_rel_err_sums(x, ref, terms, 2) - 0.05 / 5.0) < 1e-6);
    assert_true(fabs(kl_rel_err_sums(x, ref, small, 2) - kl_rel_err(x, ref, 2)) < 1e-9);
    assert_false(kl_within(kl_rel_err_sums(bad, ref, terms, 2), 1e9));
}

/* ---- status ---- */

static void test_status(void **state)
{
    (void)state;
    kl_status ok = kl_ok();
    assert_false(kl_failed(ok));
    assert_string_equal(ok.message, "");
    char text[700];
    memset(text, 'a', sizeof text);
    text[699] = '\0';
    kl_status s = kl_error(KL_EFORMAT, "%s", text);
    assert_int_equal(strlen(s.message), KL_MESSAGE_MAX - 1);
    assert_string_equal(s.message + KL_MESSAGE_MAX - 4, "...");
    text[KL_MESSAGE_MAX - 1] = '\0'; /* the longest that fits whole */
    s = kl_error(KL_EFORMAT, "%s", text);
    assert_string_equal(s.message, text);
    s = kl_error_in(kl_error(KL_EFORMAT, "w: expected %d, got %d", 3, 4), "layer %d", 7);
    assert_string_equal(s.message, "layer 7: w: expected 3, got 4");
    assert_int_equal(s.code, KL_EFORMAT);
    assert_false(kl_failed(kl_error_in(kl_ok(), "layer 7")));
    errno = ENOENT;
    s = kl_error_errno("open %s", "x");
    assert_int_equal(s.code, KL_EIO);
    assert_non_null(strstr(s.message, "open x: "));
    assert_non_null(strstr(s.message, strerror(ENOENT)));
    errno = ENOMEM;
    assert_int_equal(kl_error_errno("map").code, KL_ENOMEM);
    for (int a = KL_OK; a <= KL_EINTR; a++) {
        assert_string_not_equal(kl_code_name((kl_code)a), "unknown");
        for (int b = KL_OK; b < a; b++)
            assert_string_not_equal(kl_code_name((kl_code)a), kl_code_name((kl_code)b));
    }
    assert_string_equal(kl_code_name((kl_code)99), "unknown");
}

/* ---- workspace ---- */

typedef struct pieces {
    char *a;
    double *b;
    float *none;
    int32_t *c;
} pieces;

static pieces carve(kl_arena *arena)
{
    pieces p;
    p.a = KL_TAKE(arena, char, 1);
    p.b = KL_TAKE(arena, double, 100);
    p.none = KL_TAKE(arena, float, 0);
    p.c = KL_TAKE(arena, int32_t, 17);
    return p;
}

static void test_arena(void **state)
{
    (void)state;
    kl_arena count = kl_arena_count();
    carve(&count);
    assert_false(count.overflow);
    assert_int_equal(count.used, 64 + 832 + 0 + 128);
    char *memory = aligned_alloc(64, count.used);
    kl_arena over = kl_arena_over(memory, count.used);
    pieces p = carve(&over);
    assert_false(over.overflow);
    assert_int_equal(over.used, count.used);
    assert_int_equal((uintptr_t)p.b % 64, 0);
    assert_int_equal((uintptr_t)p.c % 64, 0);
    assert_true((char *)p.b >= p.a + 1 && (char *)p.c >= (char *)(p.b + 100) && (char *)(p.c + 17) <= memory + count.used);
    assert_null(KL_TAKE(&over, char, 1));
    assert_true(over.overflow);
    kl_arena small = kl_arena_over(memory, count.used - 1);
    carve(&small);
    assert_true(small.overflow);
    free(memory);
    const size_t huge[][2] = {{SIZE_MAX / 4, 8}, {SIZE_MAX - 3, 1}, {SIZE_MAX, SIZE_MAX}};
    for (int i = 0; i < 3; i++) {
        kl_arena a = kl_arena_count();
        assert_null(kl_arena_take(&a, huge[i][0], huge[i][1]));
        assert_true(a.overflow);
        assert_null(kl_arena_take(&a, 1, 1)); /* and stays so */
        assert_true(a.overflow);
    }
    bool overflow = false;
    assert_int_equal(kl_mul(1u << 20, 1u << 20, &overflow), (size_t)1 << 40);
    assert_false(overflow);
    kl_mul(SIZE_MAX, 2, &overflow);
    assert_true(overflow);
}

/* ---- time, context ---- */

static void test_spread(void **state)
{
    (void)state;
    double odd[] = {3, 1, 2}, even[] = {4, 1, 3, 2}, one[] = {7};
    kl_spread s = kl_spread_of(odd, 3);
    assert_true(s.median == 2 && s.min == 1 && s.max == 3 && s.runs == 3);
    s = kl_spread_of(even, 4);
    assert_true(s.median == 2.5 && s.min == 1 && s.max == 4);
    s = kl_spread_of(one, 1);
    assert_true(s.median == 7 && s.min == 7 && s.max == 7);
    s = kl_spread_of(NULL, 0);
    assert_true(isnan(s.median) && isnan(s.min) && isnan(s.max) && s.runs == 0);
    double a = kl_now(), b = kl_now();
    assert_true(b >= a);
}

static void test_context(void **state)
{
    (void)state;
    kl_ctx *ctx = (kl_ctx *)1;
    assert_int_equal(kl_ctx_create(NULL, NULL).code, KL_EINVAL);
    kl_status s = kl_ctx_create(&ctx, &(kl_ctx_options){.threads = -1});
    assert_int_equal(s.code, KL_EINVAL);
    assert_non_null(strstr(s.message, "threads"));
    assert_null(ctx);
    s = kl_ctx_create(&ctx, &(kl_ctx_options){.device = (kl_device)9});
    assert_non_null(strstr(s.message, "device"));
    s = kl_ctx_create(&ctx, NULL);
    assert_false(kl_failed(s));
    assert_true(ctx->threads >= 1 && ctx->device == KL_CPU);
    kl_ctx_destroy(ctx);
    kl_ctx_destroy(NULL);
    assert_string_equal(kl_device_name(KL_CPU), "cpu");
    assert_string_equal(kl_device_name(KL_CUDA), "cuda");
    if (kl_gpu_count() == 0) {
        s = kl_ctx_create(&ctx, &(kl_ctx_options){.device = KL_CUDA});
        assert_int_equal(s.code, KL_EDEVICE);
        assert_null(ctx);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bf16_every_pattern),
        cmocka_unit_test(test_f16_every_pattern),
        cmocka_unit_test(test_narrowing_rounds_to_nearest_even),
        cmocka_unit_test(test_arrays_convert_like_elements),
        cmocka_unit_test(test_philox_known_answers),
        cmocka_unit_test(test_streams),
        cmocka_unit_test(test_distributions),
        cmocka_unit_test(test_exp_within_its_bound),
        cmocka_unit_test(test_exp_at_its_ends),
        cmocka_unit_test(test_partial_loads_and_stores),
        cmocka_unit_test(test_loads_in_the_stored_type),
        cmocka_unit_test(test_lanes_fold_in_a_fixed_order),
        cmocka_unit_test(test_compare_fails_on_nan),
        cmocka_unit_test(test_compare_by_blocks),
        cmocka_unit_test(test_sums_that_cancel),
        cmocka_unit_test(test_status),
        cmocka_unit_test(test_arena),
        cmocka_unit_test(test_spread),
        cmocka_unit_test(test_context),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
