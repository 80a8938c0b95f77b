/* The chunk forward whose tiles stay in a block: against the reference in every layout, with fewer and with more heads than blocks. On an
 * emulated device, of nine multiprocessors, the kernels run on the host. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>

#include "common/compare.h"
#include "kda/internal.h"
#include "tests/device_case.h"

static const kl_variant *fused;

static int open_fused(void **state)
{
    int count;
    const kl_variant *v = kda_variants(&count);
    for (int i = 0; i < count; i++)
        if (v[i].device == KL_CUDA && !strcmp(v[i].name, "chunk_fused"))
            fused = &v[i];
    return fused && open_device(state);
}

static const kl_placement bf16 = {.dtype = KL_BF16};

static void check_at(kl_case *c)
{
    const char *tensor;
    assert_ok(kl_case_upload(ctx, c));
    assert_ok(kl_case_run(ctx, c, &kl_reference_kda, KL_FORWARD, &scratch));
    assert_ok(kl_case_keep(c, KL_FORWARD));
    assert_ok(kl_case_run(ctx, c, fused, KL_FORWARD, &scratch));
    double err = kl_case_worst(c, KL_FORWARD, &tensor);
    if (!kl_within(err, c->tolerance.forward))
        fail_msg("%s: error of %s %g", c->name, tensor, err);
    kl_case_free(c);
}

static void check(kl_kda_spec spec, kl_placement at)
{
    kl_case c;
    at.dtype = KL_BF16;
    spec.state = true;
    new_case(&c, spec, &at);
    check_at(&c);
}

/* ---- the tests ---- */

static void every_regime(void **state)
{
    NEEDS_DEVICE();
    for (kl_regime r = 0; r < KL_REGIMES; r++)
        check((kl_kda_spec){.T = 260, .H = 1, .HV = 2, .K = 64, .V = 32, .regime = r}, bf16);
    check((kl_kda_spec){.T = 200, .H = 2, .K = 128, .regime = KL_REGIME_STRONG}, bf16);
    check((kl_kda_spec){.B = 3, .T = 65, .H = 7, .K = 64, .V = 104, .regime = KL_REGIME_STRONG}, bf16);
}

static void packed_empty_and_short(void **state)
{
    NEEDS_DEVICE();
    check((kl_kda_spec){.H = 1, .HV = 2, .K = 64, .V = 16, .lengths = (const int64_t[]){0, 1, 70, 0, 200, 0}, .sequences = 6, .regime = KL_REGIME_STRONG}, bf16);
    check((kl_kda_spec){.H = 1, .HV = 3, .K = 64, .V = 16, .lengths = (const int64_t[]){40, 0, 300, 33, 64, 1, 96, 128}, .sequences = 8, .regime = KL_REGIME_MIXED}, bf16);
    check((kl_kda_spec){.H = 1, .K = 64, .lengths = (const int64_t[]){0, 0}, .sequences = 2}, bf16);
}

static void layouts_and_pools(void **state)
{
    NEEDS_DEVICE();
    check((kl_kda_spec){.T = 330, .H = 2, .K = 64, .V = 40, .state_layout = KDA_STATE_VK, .regime = KL_REGIME_STRONG}, bf16);
    check((kl_kda_spec){.B = 2, .T = 197, .H = 1, .K = 64, .regime = KL_REGIME_STRONG}, (kl_placement){.pool = true, .in_place = true});
    check((kl_kda_spec){.T = 197, .H = 2, .K = 64, .regime = KL_REGIME_STRONG}, (kl_placement){.in_place = true, .gap = 8});
    check((kl_kda_spec){.T = 330, .H = 2, .K = 64, .V = 40, .state_layout = KDA_STATE_VK, .regime = KL_REGIME_SLOW}, (kl_placement){.in_place = true});
}

static void a_later_token_never_changes_an_earlier_output(void **state)
{
    NEEDS_DEVICE();
    enum { T = 500, K = 64, CUT = 290 };
    for (kl_regime r = KL_REGIME_STRONG; r <= KL_REGIME_SLOW; r++) {
        kl_case c;
        float *before = malloc(CUT * K * sizeof *before);
        assert_non_null(before);
        new_case(&c, (kl_kda_spec){.T = T, .H = 1, .K = K, .regime = r, .state = true}, &bf16);
        for (int changed = 0; changed < 2; changed++) {
            for (int64_t i = CUT * K; i < T * K && changed; i++)
                ((float *)c.problem.kda.g)[i] = r == KL_REGIME_STRONG ? 0.0f : -40.0f;
            assert_ok(kl_case_upload(ctx, &c));
            assert_ok(kl_case_run(ctx, &c, fused, KL_FORWARD, &scratch));
            if (changed)
                assert_memory_equal(before, c.problem.kda.o, CUT * K * sizeof *before);
            memcpy(before, c.problem.kda.o, CUT * K * sizeof *before);
        }
        free(before);
        kl_case_free(&c);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_regime),
        cmocka_unit_test(packed_empty_and_short),
        cmocka_unit_test(layouts_and_pools),
        cmocka_unit_test(a_later_token_never_changes_an_earlier_output),
    };
    return cmocka_run_group_tests(tests, open_fused, close_device);
}
