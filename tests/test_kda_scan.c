/* The chunk forward with sequences cut into parts: against the reference in every layout, and where parts may start from zero
 * state. On an emulated device the kernels run on the host. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>

#include "common/compare.h"
#include "common/gpu.h"
#include "kda/internal.h"
#include "tests/device_case.h"

/* ---- the scan with the parts that a test asks for, as a variant ---- */

static int64_t cut_tiles, cut_span;
static int64_t cut_first, cut_each; /* first not 0: parts walked over while others are prepared */
static const int *start; /* on the device */

#ifdef KL_HAVE_CUDA
static size_t cut_workspace(const kl_ctx *c, const void *problem, kl_pass pass)
{
    (void)c, (void)pass;
    return cut_first ? kda_cuda_follow_cut_workspace(problem, cut_first, cut_each) : kda_cuda_scan_cut_workspace(problem, cut_tiles, cut_span);
}
static kl_status cut_forward(kl_ctx *c, const void *problem, void *workspace, size_t bytes)
{
    if (cut_first)
        return kda_cuda_follow_cut(c, problem, cut_first, cut_each, workspace, bytes);
    return kda_cuda_scan_cut(c, problem, cut_tiles, cut_span, workspace, bytes, &start);
}
#else
static size_t cut_workspace(const kl_ctx *c, const void *problem, kl_pass pass)
{
    (void)c, (void)problem, (void)pass;
    return 0;
}
static kl_status cut_forward(kl_ctx *c, const void *problem, void *workspace, size_t bytes)
{
    (void)c, (void)problem, (void)workspace, (void)bytes;
    return kl_ok();
}
#endif

static kl_status any(const void *problem, kl_pass pass)
{
    (void)problem, (void)pass;
    return kl_ok();
}
static const kl_variant cut = {.family = "kda", .name = "cut", .device = KL_CUDA, .check = any, .workspace = cut_workspace, .forward = cut_forward};

static const kl_placement bf16 = {.dtype = KL_BF16};

static void run(kl_case *c, int64_t tiles, int64_t span)
{
    cut_tiles = tiles;
    cut_span = span;
    assert_ok(kl_case_run(ctx, c, &cut, KL_FORWARD, &scratch));
}

static void run_following(kl_case *c, int64_t first, int64_t each)
{
    cut_first = first;
    cut_each = each;
    kl_status s = kl_case_run(ctx, c, &cut, KL_FORWARD, &scratch);
    cut_first = 0;
    assert_ok(s);
}

/* Against the reference, for several cuts: parts of one and more tiles, states carried to all, to some, to none. */
static void check_at(kl_case *c)
{
    static const int64_t cuts[][2] = {{1, 1}, {1, 2}, {2, 0}};
    assert_ok(kl_case_upload(ctx, c));
    assert_ok(kl_case_run(ctx, c, &kl_reference_kda, KL_FORWARD, &scratch));
    assert_ok(kl_case_keep(c, KL_FORWARD));
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        const char *tensor;
        run(c, cuts[i][0], cuts[i][1]);
        double err = kl_case_worst(c, KL_FORWARD, &tensor);
        if (!kl_within(err, c->tolerance.forward))
            fail_msg("%s, parts of %d tiles, every %d carried: error of %s %g", c->name, (int)cuts[i][0], (int)cuts[i][1], tensor, err);
    }
    for (int64_t first = 1; first <= 3; first++) {
        const char *tensor;
        run_following(c, first, 3 - first / 2);
        double err = kl_case_worst(c, KL_FORWARD, &tensor);
        if (!kl_within(err, c->tolerance.forward))
            fail_msg("%s, %d tiles and parts of %d: error of %s %g", c->name, (int)first, (int)(3 - first / 2), tensor, err);
    }
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

/* How many of the parts but each sequence's first may start from zero; *parts: how many there are. */
static int proven(const kl_case *c, int *parts)
{
    const kda_problem *p = &c->problem.kda;
    int tiles = (int)((p->T + 31) / 32), count = (int)((tiles + cut_tiles - 1) / cut_tiles), starts = 0;
    int *host = malloc((size_t)(count * p->HV) * sizeof *host);
    assert_non_null(host);
    assert_ok(kl_gpu_copy(ctx, host, start, (size_t)(count * p->HV) * sizeof *host));
    for (int64_t i = p->HV; i < count * p->HV; i++) {
        starts += host[i] >= 0;
        assert_true(host[i] < 0 || (host[i] < i / p->HV * cut_tiles && host[i] >= i / p->HV * cut_tiles - 4));
    }
    free(host);
    *parts = (count - 1) * (int)p->HV;
    return starts;
}

/* ---- the tests ---- */

static void every_regime(void **state)
{
    NEEDS_DEVICE();
    for (kl_regime r = 0; r < KL_REGIMES; r++)
        check((kl_kda_spec){.T = 130, .H = 1, .K = 64, .V = 32, .regime = r}, bf16);
    check((kl_kda_spec){.T = 100, .H = 1, .K = 128, .regime = KL_REGIME_SLOW}, bf16);
    check((kl_kda_spec){.T = 100, .H = 1, .HV = 2, .K = 100, .V = 140, .regime = KL_REGIME_MIXED}, bf16);
}

static void packed_empty_and_short(void **state)
{
    NEEDS_DEVICE();
    check((kl_kda_spec){.H = 1, .HV = 2, .K = 24, .V = 16, .lengths = (const int64_t[]){0, 1, 70, 0, 200}, .sequences = 5, .regime = KL_REGIME_MIXED}, bf16);
    check((kl_kda_spec){.B = 3, .T = 65, .H = 2, .K = 32, .regime = KL_REGIME_STRONG}, bf16);
    check((kl_kda_spec){.H = 1, .K = 16, .lengths = (const int64_t[]){0, 0}, .sequences = 2}, bf16);
}

static void layouts_and_pools(void **state)
{
    NEEDS_DEVICE();
    check((kl_kda_spec){.T = 110, .H = 2, .K = 24, .V = 40, .state_layout = KDA_STATE_VK, .regime = KL_REGIME_SLOW}, bf16);
    check((kl_kda_spec){.B = 2, .T = 97, .H = 1, .K = 32, .regime = KL_REGIME_MIXED}, (kl_placement){.pool = true, .in_place = true});
    check((kl_kda_spec){.T = 97, .H = 2, .K = 32, .regime = KL_REGIME_STRONG}, (kl_placement){.in_place = true, .gap = 8});
}

static void states_on_the_way(void **state)
{
    NEEDS_DEVICE();
    for (int64_t chunk = 16; chunk <= 128; chunk *= 2)
        for (kl_regime r = KL_REGIME_STRONG; r <= KL_REGIME_SLOW; r++)
            check((kl_kda_spec){.H = 1, .K = 32, .chunk = chunk, .lengths = (const int64_t[]){70, 0, 159}, .sequences = 3, .regime = r, .chunk_states = true}, bf16);
}

/* Strong gates are told, and what is left out is below the rounding of float: the states do not change by more. */
static void strong_gates_start_from_zero(void **state)
{
    NEEDS_DEVICE();
    enum { T = 300, K = 64, HV = 2 };
    kl_case c;
    int parts, starts;
    float *whole = malloc(HV * K * K * sizeof *whole);
    assert_non_null(whole);
    new_case(&c, (kl_kda_spec){.T = T, .H = 1, .HV = HV, .K = K, .regime = KL_REGIME_STRONG, .state = true}, &bf16);
    assert_ok(kl_case_upload(ctx, &c));
    run(&c, 100, 0);
    assert_ok(kl_case_keep(&c, KL_FORWARD));
    memcpy(whole, c.problem.kda.ht, HV * K * K * sizeof *whole);
    for (int64_t span = 0; span <= 2; span++) {
        run(&c, 2, span);
        starts = proven(&c, &parts);
        assert_int_equal(starts, parts);
        assert_true(kl_within(kl_rel_err_f32(c.problem.kda.ht, whole, HV * K * K), 1e-6));
        assert_true(kl_within(kl_case_worst(&c, KL_FORWARD, NULL), 1e-3));
    }
    free(whole);
    kl_case_free(&c);
}

static void set(kl_case *c, void (*change)(kda_problem *, int64_t token))
{
    for (int64_t t = 0; t < c->problem.kda.T; t++)
        change(&c->problem.kda, t);
}
static void one_slow_channel(kda_problem *p, int64_t t) { ((float *)p->g)[t * p->K + 37] = -1.0f / 128; }
/* Every key the same, longer than 1: along it a token multiplies the state by e^-1 (1 - 1.9 1.8), -0.9. */
static void growing(kda_problem *p, int64_t t)
{
    for (int64_t i = 0; i < p->K; i++) {
        ((float *)p->k)[t * p->K + i] = i ? 0.0f : 1.34375f;
        ((float *)p->g)[t * p->K + i] = -1.0f;
    }
    ((float *)p->beta)[t] = 1.8984375f;
}
static void no_gate(kda_problem *p, int64_t t) { (void)p, (void)t; }

static void what_may_be_remembered_is_carried(void **state)
{
    NEEDS_DEVICE();
    const struct { kl_regime regime; void (*change)(kda_problem *, int64_t); } cases[] = {
        {KL_REGIME_SLOW, no_gate}, {KL_REGIME_MIXED, no_gate}, {KL_REGIME_STRONG, one_slow_channel}, {KL_REGIME_STRONG, growing}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kl_case c;
        int parts;
        new_case(&c, (kl_kda_spec){.T = 130, .H = 1, .K = 64, .V = 16, .regime = cases[i].regime, .state = true}, &bf16);
        set(&c, cases[i].change);
        assert_ok(kl_case_upload(ctx, &c));
        assert_ok(kl_case_run(ctx, &c, &kl_reference_kda, KL_FORWARD, &scratch));
        assert_ok(kl_case_keep(&c, KL_FORWARD));
        for (int64_t span = 0; span <= 2; span++) {
            run(&c, 1, span);
            if (proven(&c, &parts) != 0)
                fail_msg("case %d: a part starts from zero", (int)i);
            assert_true(kl_within(kl_case_worst(&c, KL_FORWARD, NULL), c.tolerance.forward));
        }
        kl_case_free(&c);
    }
}

/* Where a part starts depends on nothing after it: the bits before the change stay. */
static void a_later_token_never_changes_an_earlier_output(void **state)
{
    NEEDS_DEVICE();
    enum { T = 200, K = 32, CUT = 100 };
    for (int x = 0; x < 2 * (KL_REGIME_MIXED - KL_REGIME_STRONG + 1); x++) {
        kl_regime r = (kl_regime)(KL_REGIME_STRONG + x / 2);
        kl_case c;
        float before[CUT * K];
        new_case(&c, (kl_kda_spec){.T = T, .H = 1, .K = K, .regime = r, .state = true}, &bf16);
        for (int changed = 0; changed < 2; changed++) {
            for (int64_t i = CUT * K; i < T * K && changed; i++)
                ((float *)c.problem.kda.g)[i] = r == KL_REGIME_STRONG ? 0.0f : -40.0f;
            assert_ok(kl_case_upload(ctx, &c));
            if (x % 2)
                run_following(&c, 2, 1);
            else
                run(&c, 1, 2);
            if (changed)
                assert_memory_equal(before, c.problem.kda.o, sizeof before);
            memcpy(before, c.problem.kda.o, sizeof before);
        }
        kl_case_free(&c);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_regime),
        cmocka_unit_test(packed_empty_and_short),
        cmocka_unit_test(layouts_and_pools),
        cmocka_unit_test(states_on_the_way),
        cmocka_unit_test(strong_gates_start_from_zero),
        cmocka_unit_test(what_may_be_remembered_is_carried),
        cmocka_unit_test(a_later_token_never_changes_an_earlier_output),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
