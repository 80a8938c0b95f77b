/* The chunk form of MLA on a device, forward and backward, against the reference: lengths that fill no tile, queries in the middle of
 * their keys, smaller heads, logits far apart. On an emulated device the kernels run on the host. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>

#include "harness/reference_variants.h"
#include "tests/device.h"
#include "tests/expect.h"

static kl_ctx *host;
static const kl_variant *variant;

static int open_device(void **state)
{
    (void)state;
    variant = mla_pick(KL_CUDA, "chunk", NULL, KL_BACKWARD);
    return open_ctx() || (ctx && (!variant || kl_failed(kl_ctx_create(&host, NULL))));
}

static int close_device(void **state)
{
    (void)state;
    kl_ctx_destroy(host);
    return close_ctx();
}

/* size: what queries are multiplied by, so that logits grow; limits: of the worst tensor. */
static void check(kl_mla_spec spec, float size, double forward, double backward)
{
    kl_case c;
    kl_scratch scratch = {0};
    spec.latent_dtype = spec.weight_dtype = KL_BF16;
    spec.backward = backward > 0.0;
    spec.seed = 5;
    assert_ok(kl_case_mla(&c, &spec));
    float *q = (float *)c.problem.mla.q;
    for (int64_t i = 0; i < c.problem.mla.cu_q[c.problem.mla.N] * spec.H * (spec.Dn + spec.Dr); i++)
        q[i] *= size;
    assert_ok(kl_case_place(&c, &(kl_placement){.dtype = KL_BF16}, NULL));
    for (kl_pass pass = KL_FORWARD; pass <= (spec.backward ? KL_BACKWARD : KL_FORWARD); pass++) {
        assert_ok(kl_case_run(host, &c, &kl_reference_mla, pass, &scratch));
        assert_ok(kl_case_keep(&c, pass));
        assert_ok(pass == KL_FORWARD ? kl_case_give(&c) : kl_ok());
        assert_ok(kl_case_run(ctx, &c, variant, pass, &scratch));
        double err = kl_case_worst(&c, pass, NULL), limit = pass == KL_FORWARD ? forward : backward;
        if (!kl_within(err, limit))
            fail_msg("%s, pass %d: error %g beyond %g", c.name, (int)pass, err, limit);
    }
    kl_scratch_free(&scratch);
    kl_case_free(&c);
}

static void the_released_heads(void **state)
{
    NEEDS_DEVICE();
    check((kl_mla_spec){.lengths = (const int64_t[]){129, 1, 64}, .N = 3, .H = 3, .R = 64, .Dn = 128, .Dr = 64, .Dv = 128}, 1.0f, 5e-3, 8e-3);
}

/* More tiles than a block holds at a time. */
static void tiles_come_round(void **state)
{
    NEEDS_DEVICE();
    check((kl_mla_spec){.T = 420, .H = 1, .R = 64, .Dn = 128, .Dr = 64, .Dv = 128, .given = true}, 1.0f, 5e-3, 8e-3);
}

static void queries_in_the_middle_of_their_keys(void **state)
{
    NEEDS_DEVICE();
    check((kl_mla_spec){.lengths = (const int64_t[]){300, 40}, .N = 2, .Tq = 37, .H = 2, .R = 64, .Dn = 128, .Dr = 64, .Dv = 128, .given = true}, 1.0f, 5e-3, 8e-3);
    check((kl_mla_spec){.T = 270, .Tq = 130, .H = 1, .R = 64, .Dn = 128, .Dr = 64, .Dv = 128}, 1.0f, 5e-3, 8e-3);
}

static void smaller_heads_are_padded(void **state)
{
    NEEDS_DEVICE();
    check((kl_mla_spec){.N = 2, .T = 70, .H = 4, .R = 32, .Dn = 24, .Dr = 8, .Dv = 24}, 1.0f, 5e-3, 8e-3);
    check((kl_mla_spec){.T = 140, .H = 2, .R = 64, .Dn = 32, .Dr = 16, .Dv = 32}, 1.0f, 5e-3, 8e-3);
    check((kl_mla_spec){.T = 70, .H = 1, .R = 40, .Dn = 72, .Dr = 0, .Dv = 104}, 1.0f, 5e-3, 8e-3);
}

/* Keys are rounded to bfloat16 before a score is made of them: at logits of some hundred that is an error of one. */
static void large_logits_stay_finite(void **state)
{
    NEEDS_DEVICE();
    check((kl_mla_spec){.T = 200, .H = 1, .R = 64, .Dn = 128, .Dr = 64, .Dv = 128}, 100.0f, 0.1, 0.0);
}

static void what_it_lacks_is_named(void **state)
{
    NEEDS_DEVICE();
    int64_t cu_q[] = {0, 1}, start[] = {0}, keys[] = {1};
    mla_problem p = {.N = 1, .H = 1, .R = 64, .Dn = 128, .Dr = 64, .Dv = 128, .cu_q = cu_q, .kv_start = start, .kv_len = keys, .dtype = KL_BF16,
                     .latent_dtype = KL_BF16, .weight_dtype = KL_BF16, .latent_rows = 1};
    assert_ok(variant->check(&p, KL_FORWARD));
    mla_problem bad = p;
    bad.dtype = KL_F32;
    expect_error(variant->check(&bad, KL_FORWARD), KL_EUNSUPPORTED, "dtype: mla chunk on cuda offers bfloat16");
    bad = p, bad.Dn = 136;
    expect_error(variant->check(&bad, KL_FORWARD), KL_EUNSUPPORTED, "Dn: mla chunk on cuda offers at most 128, got 136");
    bad = p, bad.Dv = 100;
    expect_error(variant->check(&bad, KL_FORWARD), KL_EUNSUPPORTED, "Dv: mla chunk on cuda offers multiples of 8, got 100");
    bad = p, bad.scale = -1.0f;
    expect_error(variant->check(&bad, KL_FORWARD), KL_EUNSUPPORTED, "scale: mla chunk on cuda offers positive ones");
}

/* Queries of three heads in the middle of wider rows; the rest of a row stays as it is. */
static void queries_are_rotated_as_on_the_cpu(void **state)
{
    NEEDS_DEVICE();
    enum { ROWS = 40, HEADS = 3, DR = 16, D = 24, SIZE = ROWS * HEADS * D };
    float x[SIZE], got[SIZE];
    uint16_t bf16[SIZE];
    int64_t position[ROWS], *positions;
    void *there;
    for (int i = 0; i < SIZE; i++)
        x[i] = kl_bf16_to_f32(bf16[i] = kl_f32_to_bf16((float)(i % 37) / 16.0f - 1.0f));
    for (int t = 0; t < ROWS; t++)
        position[t] = 100003 * t;
    assert_ok(kl_gpu_alloc(ctx, &there, sizeof x));
    assert_ok(kl_gpu_alloc(ctx, (void **)&positions, sizeof position));
    assert_ok(kl_gpu_copy(ctx, positions, position, sizeof position));
    for (int inverse = 0; inverse < 2; inverse++) {
        assert_ok(kl_gpu_copy(ctx, there, x, sizeof x));
        assert_ok(mla_rope(ctx, (float *)there + D - DR, ROWS, HEADS, DR, HEADS * D, D, positions, 10000.0f, inverse));
        assert_ok(kl_gpu_copy(ctx, got, there, sizeof x));
        assert_ok(kl_gpu_copy(ctx, there, bf16, sizeof bf16));
        assert_ok(mla_rope_bf16(ctx, (uint16_t *)there + D - DR, ROWS, HEADS, DR, HEADS * D, D, positions, 10000.0f, inverse));
        assert_ok(kl_gpu_copy(ctx, bf16, there, sizeof bf16));
        assert_ok(mla_rope(host, x + D - DR, ROWS, HEADS, DR, HEADS * D, D, position, 10000.0f, inverse));
        assert_true(kl_within(kl_rel_err_f32(got, x, SIZE), 1e-6));
        kl_to_f32(got, bf16, KL_BF16, SIZE);
        assert_true(kl_within(kl_rel_err_f32(got, x, SIZE), 4e-3));
    }
    expect_error(mla_rope_bf16(host, bf16, 1, 1, 2, 2, 2, position, 1.0f, false), KL_EINVAL, "dtype: expected float32 on the cpu");
    kl_gpu_free(ctx, there);
    kl_gpu_free(ctx, positions);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_released_heads),       cmocka_unit_test(tiles_come_round),
        cmocka_unit_test(queries_in_the_middle_of_their_keys), cmocka_unit_test(smaller_heads_are_padded),
        cmocka_unit_test(large_logits_stay_finite), cmocka_unit_test(what_it_lacks_is_named),              cmocka_unit_test(queries_are_rotated_as_on_the_cpu),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
