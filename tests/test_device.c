/* Problems in a device's memory: what a variant is handed there, what comes back, and what it must leave alone. The
 * device is the one that is there (emulated in an EMULATE=1 build, where the reference can play a variant on it). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "common/gpu.h"
#include "harness/reference_variants.h"
#include "tests/expect.h"

static kl_ctx *ctx;

static int open_device(void **state)
{
    (void)state;
    if (!kl_gpu_emulated())
        return 0;
    return kl_failed(kl_ctx_create(&ctx, &(kl_ctx_options){.device = KL_CUDA}));
}

static int close_device(void **state)
{
    (void)state;
    kl_ctx_destroy(ctx);
    ctx = NULL;
    return 0;
}

/* An emulated device's memory is the host's: the reference stands in for a kernel. */
static kl_variant stand_in(void)
{
    kl_variant v = kl_reference_kda;
    v.name = "stand-in";
    v.device = KL_CUDA;
    return v;
}

static const kl_kda_spec spec = {.T = 37, .H = 2, .HV = 4, .K = 24, .V = 16, .lengths = (const int64_t[]){5, 0, 1, 31}, .sequences = 4,
                                 .regime = KL_REGIME_MIXED, .state = true, .seed = 3};

static void run(kl_case *c, const kl_variant *v, kl_pass pass, kl_scratch *s)
{
    assert_ok(kl_case_run(ctx, c, &kl_reference_kda, pass, s));
    assert_ok(kl_case_keep(c, pass));
    assert_ok(kl_case_run(ctx, c, v, pass, s));
}

static void every_placement_gives_the_same_numbers(void **state)
{
    (void)state;
    if (!ctx)
        skip();
    static const kl_placement places[] = {{0}, {.dtype = KL_BF16}, {.gap = 5}, {.dtype = KL_BF16, .gap = 8, .pool = true},
                                          {.pool = true, .state_dtype = KL_BF16}, {.in_place = true}, {.in_place = true, .pool = true, .dtype = KL_BF16}};
    kl_variant v = stand_in();
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        kl_kda_spec with = spec;
        kl_scratch scratch = {0};
        kl_case c;
        with.backward = !places[i].in_place;
        with.chunk_states = with.token_states = true;
        assert_ok(kl_case_kda(&c, &with));
        assert_ok(kl_case_place(&c, &places[i], NULL));
        bool coarse = places[i].dtype == KL_BF16 || places[i].state_dtype == KL_BF16;
        for (kl_pass pass = KL_FORWARD; pass <= (with.backward ? KL_BACKWARD : KL_FORWARD); pass++) {
            run(&c, &v, pass, &scratch);
            double err = kl_case_worst(&c, pass, NULL);
            if (!kl_within(err, coarse ? 2.5e-3 : 1e-6))
                fail_msg("%s pass %d: error %g", c.name, (int)pass, err);
        }
        kl_scratch_free(&scratch);
        kl_case_free(&c);
    }
}

/* Kernels with one fault each. */
enum { FAULT_INPUT, FAULT_GAP, FAULT_SLOT, FAULT_WORKSPACE, FAULT_OMISSION, FAULTS };
static int fault;

static kl_status faulty(kl_ctx *on, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = problem;
    KL_TRY(kl_reference_kda.forward(on, p, workspace, bytes));
    int64_t state = p->HV * p->K * p->V;
    switch (fault) {
    case FAULT_INPUT: ((float *)p->k)[3] = 1.0f; break;
    case FAULT_GAP: ((float *)p->o)[p->HV * p->V] = 1.0f; break;
    case FAULT_SLOT: ((float *)p->ht)[2 * state] = 1.0f; break;
    case FAULT_WORKSPACE: ((char *)workspace)[bytes] = 0; break;
    case FAULT_OMISSION: memset(p->o, 0xff, 4); break;
    }
    return kl_ok();
}

static void what_a_variant_must_not_touch_is_watched(void **state)
{
    (void)state;
    if (!ctx)
        skip();
    static const char *const message[FAULTS] = {"k: was written", "o: was written between", "ht: was written between", "beyond its workspace", ""};
    kl_variant v = stand_in();
    v.forward = faulty;
    for (fault = 0; fault < FAULTS; fault++) {
        kl_scratch scratch = {0};
        kl_case c;
        assert_ok(kl_case_kda(&c, &spec));
        assert_ok(kl_case_place(&c, &(kl_placement){.gap = 5, .pool = true}, NULL));
        assert_ok(kl_case_run(ctx, &c, &kl_reference_kda, KL_FORWARD, &scratch));
        assert_ok(kl_case_keep(&c, KL_FORWARD));
        kl_status s = kl_case_run(ctx, &c, &v, KL_FORWARD, &scratch);
        if (fault == FAULT_OMISSION)
            assert_false(kl_within(kl_case_worst(&c, KL_FORWARD, NULL), 1.0));
        else if (!kl_failed(s) || !strstr(s.message, message[fault]))
            fail_msg("fault %d: expected '%s', got '%s'", fault, message[fault], s.message);
        kl_scratch_free(&scratch);
        kl_case_free(&c);
    }
}

/* Inputs are rounded before anything is computed from them. */
static void rounding_forgets_what_was_wanted(void **state)
{
    (void)state;
    kl_case c;
    bool changed;
    assert_ok(kl_case_kda(&c, &spec));
    kl_case_poison(&c, KL_FORWARD);
    assert_ok(kl_case_keep(&c, KL_FORWARD));
    assert_ok(kl_case_place(&c, &(kl_placement){0}, &changed));
    assert_false(changed);
    assert_non_null(c.tensor[0].want);
    assert_ok(kl_case_place(&c, &(kl_placement){.dtype = KL_BF16}, &changed));
    assert_true(changed);
    assert_null(c.tensor[0].want);
    const float *q = c.problem.kda.q;
    for (int i = 0; i < 48; i++)
        assert_true(kl_bf16_to_f32(kl_f32_to_bf16(q[i])) == q[i]);
    kl_case_free(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rounding_forgets_what_was_wanted),
        cmocka_unit_test(every_placement_gives_the_same_numbers),
        cmocka_unit_test(what_a_variant_must_not_touch_is_watched),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
