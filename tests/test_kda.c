/* KDA on the CPU against golden data and against the reference. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/golden.h"
#include "tests/kda_case.h"

/* ---- golden data ---- */

static const char *const golden_cases[] = {
    "00_kimi_T1_H1_HV1_K8_V8",          "01_kimi_T15_H2_HV2_K16_V16",      "02_strong_T16_H2_HV2_K16_V16",
    "03_slow_T17_H1_HV1_K16_V24",       "04_kimi_T64_H2_HV2_K32_V32",      "05_bounded_T65_H2_HV4_K16_V16",
    "06_kimi_T130_H1_HV1_K128_V128",    "07_slow_corr_T96_H1_HV1_K128_V128", "08_extreme_T80_H1_HV2_K64_V64",
    "09_strong_T130_H2_HV2_K128_V128",
};

static void check_golden(const golden *g, const char *name, const float *x, double limit)
{
    golden_tensor t = golden_find(g, name);
    double *ref = golden_doubles(g, name), error = kl_rel_err(x, ref, (size_t)t.count);
    free(ref);
    if (!kl_within(error, limit))
        fail_msg("%s: %s: error %.3g, limit %.3g", g->path, name, error, limit);
}

static void run_golden(const char *name, const kl_variant *v, int64_t chunk)
{
    char path[256];
    snprintf(path, sizeof path, "tests/golden/kda/%s.safetensors", name);
    golden g = golden_open(path);
    golden_tensor q = golden_find(&g, "q"), vt = golden_find(&g, "v");
    int64_t T = q.shape[0], H = q.shape[1], K = q.shape[2], HV = vt.shape[1], V = vt.shape[2];
    const char *const names[] = {"q", "k", "v", "g", "beta", "h0", "do", "dht"};
    float *in[8], *out[8];
    for (int i = 0; i < 8; i++)
        in[i] = golden_floats(&g, names[i]);
    const int64_t sizes[] = {T * HV * V, HV * K * V, T * H * K, T * H * K, T * HV * V, T * HV * K, T * HV, HV * K * V};
    const char *const results[] = {"o", "ht", "dq", "dk", "dv", "dg", "dbeta", "dh0"};
    for (int i = 0; i < 8; i++) {
        out[i] = malloc((size_t)sizes[i] * sizeof(float));
        memset(out[i], 0xff, (size_t)sizes[i] * sizeof(float));
    }
    kda_problem p = {.B = 1, .T = T, .N = 1, .H = H, .HV = HV, .K = K, .V = V, .G = K, .chunk = chunk, .q = in[0], .k = in[1],
                     .v = in[2], .g = in[3], .beta = in[4], .h0 = in[5], .o = out[0], .ht = out[1]};
    kda_grads d = {.d_o = in[6], .dht = in[7], .dq = out[2], .dk = out[3], .dv = out[4], .dg = out[5], .dbeta = out[6], .dh0 = out[7]};
    kl_ctx *ctx;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.threads = 2}));
    for (kl_pass pass = KL_FORWARD; pass <= KL_BACKWARD; pass++) {
        if (pass == KL_BACKWARD && !v->backward)
            continue;
        size_t bytes = v->workspace(ctx, &p, pass);
        void *workspace = aligned_alloc(64, bytes + 64);
        memset(workspace, 0xff, bytes);
        assert_ok(pass == KL_FORWARD ? v->forward(ctx, &p, workspace, bytes) : v->backward(ctx, &p, &d, workspace, bytes));
        free(workspace);
        for (int i = pass == KL_FORWARD ? 0 : 2; i < (pass == KL_FORWARD ? 2 : 8); i++)
            check_golden(&g, results[i], out[i], pass == KL_FORWARD ? kl_tol_kda_f32.forward : kl_tol_kda_f32.gradient);
    }
    kl_ctx_destroy(ctx);
    for (int i = 0; i < 8; i++) {
        free(in[i]);
        free(out[i]);
    }
    golden_close(&g);
}

static void golden_data_every_variant(void **state)
{
    (void)state;
    int count;
    const kl_variant *v = kda_variants(&count);
    for (int i = 0; i < count; i++)
        for (size_t c = 0; c < sizeof golden_cases / sizeof *golden_cases; c++)
            for (int64_t chunk = 16; chunk <= 128 && v[i].device == KL_CPU; chunk *= 2)
                run_golden(golden_cases[c], &v[i], chunk);
}

/* ---- random problems ---- */

/* Forward by both variants, backward by chunk. */
static void check(case_options opt)
{
    const char *const variants[] = {"recurrent", "chunk"};
    for (int i = 0; i < 2; i++) {
        if (opt.token_states && i == 1)
            continue;
        kda_case *c = case_new(opt);
        case_reference(c, i == 1 && !opt.in_place);
        assert_ok(case_run(c, variants[i], KL_FORWARD, 2));
        double error = case_forward_error(c);
        if (!kl_within(error, kl_tol_kda_f32.forward))
            fail_msg("seed %llu: %s forward: error %.3g", (unsigned long long)opt.seed, variants[i], error);
        if (i == 1 && !opt.in_place) {
            assert_ok(case_run(c, "chunk", KL_BACKWARD, 2));
            error = case_backward_error(c);
            if (!kl_within(error, kl_tol_kda_f32.gradient))
                fail_msg("seed %llu: chunk backward: error %.3g", (unsigned long long)opt.seed, error);
        }
        case_free(c);
    }
}

static int64_t one_of(kl_rng *r, const int64_t *values, uint64_t count) { return values[kl_rng_below(r, count)]; }

static case_options random_options(uint64_t seed)
{
    static const int64_t dims[] = {1, 2, 7, 8, 16, 24, 33, 60, 64, 100}, chunks[] = {0, 16, 32, 64, 128};
    static const int64_t lengths[] = {0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129};
    static int64_t packed[8];
    kl_rng r = kl_rng_make(seed, 3);
    case_options o = {.seed = seed, .H = 1 + (int64_t)kl_rng_below(&r, 3), .K = one_of(&r, dims, 10), .V = one_of(&r, dims, 10),
                      .chunk = one_of(&r, chunks, 5), .B = 1 + (int64_t)kl_rng_below(&r, 3), .T = one_of(&r, lengths, 13)};
    o.HV = o.H * (1 + (int64_t)kl_rng_below(&r, 3));
    int64_t divisors[8], count = 0;
    for (int64_t d = 1; d <= o.K && count < 8; d++)
        if (o.K % d == 0)
            divisors[count++] = d;
    o.G = kl_rng_below(&r, 2) ? o.K : kl_rng_below(&r, 5) ? one_of(&r, divisors, (uint64_t)count) : 0;
    o.gate = o.G ? (kda_gate)kl_rng_below(&r, 3) : KDA_GATE_LOG;
    o.beta_kind = (kda_beta)kl_rng_below(&r, 3);
    o.decay = (case_decay)kl_rng_below(&r, 7);
    o.layout = (kda_state_layout)kl_rng_below(&r, 2);
    o.l2norm = o.K > 1 && kl_rng_below(&r, 2); /* the gradient of one channel's norm is what rounding leaves of zero */
    o.no_delta = kl_rng_below(&r, 5) == 0;
    o.correlated = kl_rng_below(&r, 4) == 0;
    o.no_h0 = kl_rng_below(&r, 3) == 0;
    o.no_bias = kl_rng_below(&r, 3) == 0;
    o.no_d_o = kl_rng_below(&r, 5) == 0;
    o.no_dht = kl_rng_below(&r, 3) == 0;
    o.no_ht = kl_rng_below(&r, 5) == 0;
    o.gap = kl_rng_below(&r, 2) ? 0 : 5;
    o.pool = kl_rng_below(&r, 3) == 0;
    o.chunk_states = kl_rng_below(&r, 2);
    o.in_place = !o.no_h0 && !o.no_ht && kl_rng_below(&r, 3) == 0;
    if (kl_rng_below(&r, 2)) {
        o.B = 1 + (int64_t)kl_rng_below(&r, 6);
        for (int64_t n = 0; n < o.B; n++)
            packed[n] = one_of(&r, lengths, 13);
        o.lengths = packed;
    }
    /* beta above 1 with correlated keys and no decay grows without bound: not a problem that anyone has */
    if (o.beta_kind == KDA_BETA_SIGMOID2)
        o.correlated = false;
    return o;
}

static void reference_recurrent_and_chunk_agree_on_random_problems(void **state)
{
    (void)state;
    const char *set = getenv("KL_TEST_SEED");
    uint64_t seed = set ? strtoull(set, NULL, 10) : 20260101;
    print_message("random problems from seed %llu (KL_TEST_SEED sets it)\n", (unsigned long long)seed);
    for (uint64_t i = 0; i < 100; i++)
        check(random_options(seed + i));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_data_every_variant),
        cmocka_unit_test(reference_recurrent_and_chunk_agree_on_random_problems),
    };
    return cmocka_run_group_tests_name("kda", tests, NULL, NULL);
}
