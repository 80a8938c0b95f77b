/* What verify stands on: the problem builders, the scoring, and that a wrong variant, a wrong file and a wrong model are found. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>

#include "harness/reference_variants.h"
#include "harness/verify.h"
#include "tests/expect.h"
#include "tests/shell.h"

static kl_ctx *ctx;
static char scratch[128];

static int set_up(void **state)
{
    (void)state;
    make_folder(scratch, sizeof scratch);
    return kl_failed(kl_ctx_create(&ctx, &(kl_ctx_options){.threads = 1}));
}

static int tear_down(void **state)
{
    (void)state;
    kl_ctx_destroy(ctx);
    remove_folder(scratch);
    return 0;
}

/* ---- problems ---- */

static void regimes_are_what_they_are_called(void **state)
{
    (void)state;
    static const kda_gate gates[] = {KDA_GATE_LOG, KDA_GATE_SOFTPLUS, KDA_GATE_BOUNDED};
    for (int regime = 0; regime < 3; regime++) {
        for (int gate = 0; gate < 3; gate++) {
            kl_case c;
            assert_ok(kl_case_kda(&c, &(kl_kda_spec){.T = 40, .H = 2, .K = 24, .regime = (kl_regime)regime, .gate = gates[gate], .seed = 3}));
            const kda_problem *p = &c.problem.kda;
            const float *g = p->g;
            for (int64_t i = 0; i < 40 * 2 * 24; i++) {
                int64_t h = i / 24 % 2, j = i % 24;
                double x = (double)g[i] + (p->dt_bias ? (double)p->dt_bias[h * 24 + j] : 0.0), a = p->A_log ? exp((double)p->A_log[h]) : 0.0;
                double decay = gate == 0 ? x : gate == 1 ? -a * log1p(exp(x)) : -5.0 / (1.0 + exp(-a * x));
                bool slow = regime == KL_REGIME_SLOW || (regime == KL_REGIME_MIXED && j < 8);
                assert_true(decay < 0.0 && decay > (slow ? -0.0101 : -5.0001));
            }
            kl_case_free(&c);
        }
    }
}

static void slow_keys_have_cosine_four_fifths(void **state)
{
    (void)state;
    kl_case c;
    assert_ok(kl_case_kda(&c, &(kl_kda_spec){.T = 200, .H = 1, .K = 128, .regime = KL_REGIME_SLOW, .seed = 4}));
    const float *k = c.problem.kda.k, *beta = c.problem.kda.beta;
    double cosine = 0.0, mean = 0.0;
    for (int64_t t = 0; t < 200; t++) {
        mean += (double)beta[t] / 200.0;
        for (int64_t i = 0; t && i < 128; i++)
            cosine += (double)k[t * 128 + i] * (double)k[(t - 1) * 128 + i] / 199.0;
    }
    assert_true(fabs(cosine - 0.8) < 0.02);
    assert_true(fabs(mean - 0.95) < 0.01);
    kl_case_free(&c);
}

static void a_seed_is_a_problem(void **state)
{
    (void)state;
    kl_case a, b, c;
    kl_kda_spec spec = {.T = 20, .H = 1, .K = 8, .backward = true, .state = true, .seed = 9};
    assert_ok(kl_case_kda(&a, &spec));
    assert_ok(kl_case_kda(&b, &spec));
    spec.seed = 10;
    assert_ok(kl_case_kda(&c, &spec));
    assert_memory_equal(a.problem.kda.q, b.problem.kda.q, 20 * 8 * sizeof(float));
    assert_memory_not_equal(a.problem.kda.q, c.problem.kda.q, 20 * 8 * sizeof(float));
    kl_case_free(&a);
    kl_case_free(&b);
    kl_case_free(&c);
}

static void absurd_sizes_are_refused(void **state)
{
    (void)state;
    kl_case c;
    kl_status s = kl_case_kda(&c, &(kl_kda_spec){.T = INT64_MAX / 4, .H = 1 << 20, .K = 256});
    assert_true(kl_failed(s));
    s = kl_case_kda(&c, &(kl_kda_spec){.T = INT64_C(1) << 34, .H = 64, .K = 128});
    assert_int_equal(s.code, KL_ENOMEM);
    s = kl_case_mla(&c, &(kl_mla_spec){.T = INT64_C(1) << 34, .H = 64, .R = 512, .Dn = 128, .Dr = 64, .Dv = 128});
    assert_int_equal(s.code, KL_ENOMEM);
    s = kl_case_moe(&c, &(kl_moe_spec){.T = 8, .D = 1 << 20, .E = 1 << 20, .I = 1 << 20, .top_k = 2});
    assert_true(kl_failed(s));
}

/* DPLR built from KDA has the answer that KDA has. */
static void the_identity_holds(void **state)
{
    (void)state;
    for (int regime = 0; regime < 3; regime++) {
        kl_case kda, general;
        kl_scratch s = {0};
        assert_ok(kl_case_kda(&kda, &(kl_kda_spec){.T = 70, .H = 2, .HV = 4, .K = 24, .V = 16, .G = 6, .regime = (kl_regime)regime, .state = true, .seed = 5}));
        assert_ok(kl_case_run(ctx, &kda, &kl_reference_kda, KL_FORWARD, &s));
        assert_ok(kl_case_keep(&kda, KL_FORWARD));
        assert_ok(kl_case_dplr(&general, &kda));
        assert_ok(kl_case_run(ctx, &general, &kl_reference_dplr, KL_FORWARD, &s));
        assert_true(kl_within(kl_case_worst(&general, KL_FORWARD, NULL), 1e-6));
        kl_case_free(&kda);
        kl_case_free(&general);
        kl_scratch_free(&s);
    }
}

/* ---- a variant that is wrong in one way ---- */

static enum { RIGHT, LEAVES_ONE_OUT, WRITES_NAN, ONE_PERCENT_IN_A_HEAD, WRITES_TOO_FAR } fault;

static kl_status faulty_check(const void *problem, kl_pass pass) { return kl_reference_kda.check(problem, pass); }
static size_t faulty_workspace(const kl_ctx *c, const void *problem, kl_pass pass) { return kl_reference_kda.workspace(c, problem, pass); }
static kl_cost faulty_cost(const void *problem, kl_pass pass) { return kl_reference_kda.cost(problem, pass); }

static kl_status faulty_forward(kl_ctx *c, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = problem;
    float *o = p->o, before = o[5];
    KL_TRY(kl_reference_kda.forward(c, problem, workspace, bytes));
    if (fault == LEAVES_ONE_OUT)
        o[5] = before;
    if (fault == WRITES_NAN)
        o[p->T * p->HV * p->V - 1] = NAN;
    for (int64_t t = 0; fault == ONE_PERCENT_IN_A_HEAD && t < p->T; t++)
        o[t * p->HV * p->V] *= 1.01f;
    if (fault == WRITES_TOO_FAR)
        ((char *)workspace)[bytes + 3] = 1;
    return kl_ok();
}

static void faults_are_found(void **state)
{
    (void)state;
    const kl_variant faulty = {"kda", "faulty", KL_CPU, "", faulty_check, faulty_workspace, faulty_forward, NULL, faulty_cost};
    kl_case c;
    kl_scratch s = {0};
    assert_ok(kl_case_kda(&c, &(kl_kda_spec){.T = 33, .H = 2, .K = 8, .seed = 6}));
    assert_ok(kl_case_run(ctx, &c, &kl_reference_kda, KL_FORWARD, &s));
    assert_ok(kl_case_keep(&c, KL_FORWARD));
    for (fault = RIGHT; fault <= WRITES_TOO_FAR; fault++) {
        kl_status status = kl_case_run(ctx, &c, &faulty, KL_FORWARD, &s);
        bool found = kl_failed(status) || !kl_within(kl_case_worst(&c, KL_FORWARD, NULL), c.tolerance.forward);
        assert_int_equal(found, fault != RIGHT);
    }
    kl_case_free(&c);
    kl_scratch_free(&s);
}

/* A row fails when its error is too large or not a number, and then so does the whole. */
static void a_failed_row_fails_the_whole(void **state)
{
    (void)state;
    const double errors[] = {1e-9, 1.0, NAN, INFINITY};
    for (int i = 0; i < 4; i++) {
        kl_verifier v = {.ctx = ctx};
        kl_verify_row(&v, &(kl_check){"case", "variant", "tensor", errors[i], NAN, 1e-6, NULL});
        assert_int_equal(kl_failed(kl_verify_finish(&v)), i > 0);
    }
    kl_verifier nothing = {.ctx = ctx};
    assert_true(kl_failed(kl_verify_finish(&nothing)));
}

/* ---- the program on golden data, and on copies with something changed ---- */

static void verifies(const char *arguments, int status, const char *says)
{
    shell_result *r = shell("%s/kl verify %s", shell_build(), arguments);
    if (r->status != status || !strstr(r->text, says))
        fail_msg("kl verify %s: expected status %d and \"%s\"; status %d, said:\n%s", arguments, status, says, r->status, r->text);
    free(r);
}

static void prepare(const char *commands)
{
    shell_result *r = shell("cd '%s' && %s", scratch, commands);
    if (r->status != 0)
        fail_msg("%s: %s", commands, r->text);
    free(r);
}

static void copy(const char *from, const char *to)
{
    shell_result *r = shell("rm -rf '%s/%s' && cp -r '%s' '%s/%s' && chmod -R u+w '%s/%s'", scratch, to, from, scratch, to, scratch, to);
    assert_int_equal(r->status, 0);
    free(r);
}

static void golden_kda(void **state)
{
    (void)state;
    verifies("kda tests/golden/kda", 0, ", 0 failed");
    char arguments[256];
    copy("tests/golden/kda/01_kimi_T15_H2_HV2_K16_V16.safetensors", "bad.safetensors");
    prepare("printf '\\100\\100\\100\\100' | dd of=bad.safetensors bs=1 seek=$(($(wc -c < bad.safetensors) - 4)) conv=notrunc 2>/dev/null");
    snprintf(arguments, sizeof arguments, "kda '%s/bad.safetensors'", scratch);
    verifies(arguments, 1, "FAIL");
    copy("tests/golden/kda/01_kimi_T15_H2_HV2_K16_V16.safetensors", "bad.safetensors");
    prepare("sed -i 's/\"beta\"/\"bets\"/' bad.safetensors");
    verifies(arguments, 1, "'beta' is missing");
    prepare("head -c 500 bad.safetensors > cut.safetensors");
    snprintf(arguments, sizeof arguments, "kda '%s/cut.safetensors'", scratch);
    verifies(arguments, 1, "cut.safetensors");
}

static void golden_model(void **state)
{
    (void)state;
    verifies("model tests/golden/models/tiny --variant default", 0, ", 0 failed");
    char arguments[256];
    copy("tests/golden/models/tiny", "tiny");
    prepare("printf '\\100\\100\\100\\100' | dd of=tiny/model.safetensors bs=1 seek=$(($(wc -c < tiny/model.safetensors) - 4)) conv=notrunc 2>/dev/null");
    snprintf(arguments, sizeof arguments, "model '%s/tiny' --variant default", scratch);
    verifies(arguments, 1, "FAIL");
    verifies("model tests/golden/models/tiny --variant nonsense", 1, "nonsense");
}

static void golden_tokenizer(void **state)
{
    (void)state;
    verifies("tokenizer tests/golden/tokenizer", 0, ", 0 failed");
    char arguments[256];
    copy("tests/golden/tokenizer", "tokenizer");
    prepare("sed -i '0,/97/s//98/' tokenizer/expected.json");
    snprintf(arguments, sizeof arguments, "tokenizer '%s/tokenizer'", scratch);
    verifies(arguments, 1, "FAIL");
}

static void random_problems(void **state)
{
    (void)state;
    verifies("kda --random --cases 15 --seed 11", 0, ", 0 failed");
    verifies("mla --random --cases 12 --seed 12", 0, ", 0 failed");
    verifies("moe --random --cases 12 --seed 13", 0, ", 0 failed");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(regimes_are_what_they_are_called),
        cmocka_unit_test(slow_keys_have_cosine_four_fifths),
        cmocka_unit_test(a_seed_is_a_problem),
        cmocka_unit_test(absurd_sizes_are_refused),
        cmocka_unit_test(the_identity_holds),
        cmocka_unit_test(faults_are_found),
        cmocka_unit_test(a_failed_row_fails_the_whole),
        cmocka_unit_test(golden_kda),
        cmocka_unit_test(golden_model),
        cmocka_unit_test(golden_tokenizer),
        cmocka_unit_test(random_problems),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
