/* Problems in a device's memory: what a variant is handed there, what comes back, and what it must leave alone. The
 * device is the one that is there (emulated in an EMULATE=1 build, where the reference can play a variant on it). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>

#include "common/gpu.h"
#include "harness/around.h"
#include "harness/bench.h"
#include "harness/device_inputs.h"
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

/* Latents and weights keep the type that they have on the host. */
static void latents_lie_there_as_on_the_host(void **state)
{
    (void)state;
    if (!ctx)
        skip();
    static const kl_mla_spec mla = {.N = 2, .T = 9, .Tq = 5, .H = 3, .R = 24, .Dn = 8, .Dr = 4, .Dv = 16, .latent_dtype = KL_BF16,
                                    .weight_dtype = KL_F16, .backward = true, .seed = 5};
    kl_variant v = kl_reference_mla;
    v.device = KL_CUDA;
    for (int i = 0; i < 2; i++) {
        kl_scratch scratch = {0};
        kl_case c;
        assert_ok(kl_case_mla(&c, &mla));
        assert_ok(kl_case_place(&c, &(kl_placement){.dtype = i ? KL_BF16 : KL_F32, .gap = 8 * i}, NULL));
        for (kl_pass pass = KL_FORWARD; pass <= KL_BACKWARD; pass++) {
            assert_ok(kl_case_run(ctx, &c, &kl_reference_mla, pass, &scratch));
            assert_ok(kl_case_keep(&c, pass));
            assert_ok(kl_case_run(ctx, &c, &v, pass, &scratch));
            double err = kl_case_worst(&c, pass, NULL);
            if (!kl_within(err, i ? 2.5e-3 : 1e-6))
                fail_msg("%s pass %d: error %g", c.name, (int)pass, err);
        }
        kl_scratch_free(&scratch);
        kl_case_free(&c);
    }
}

/* Convolution, gated norm and decode step against the CPU's, and as rows of the bench. */
static void what_is_around_the_recurrence(void **state)
{
    (void)state;
    if (!ctx)
        skip();
    kl_verifier v = {.ctx = ctx};
    assert_ok(kl_verify_around(&v));
    assert_int_equal(v.failed, 0);
    assert_true(v.rows >= 40);
    kl_bench b = {.ctx = ctx, .quiet = true, .runs = 1};
    assert_ok(kl_bench_around(&b));
    assert_int_equal(b.rows, 10);
    assert_false(b.wrong);
    kl_lines_free(&b.lines);
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

/* ---- inputs made on the device, and the bench that uses them ---- */

enum { TOKENS = 200, HEADS = 3, DIM = 16, GATES = TOKENS * HEADS * DIM };

/* `count` heads of a tensor, on the host. */
static float *slice(const void *tensor, int64_t rows, int64_t width, int64_t head)
{
    float *host = malloc((size_t)(rows * width) * sizeof *host);
    void *there;
    assert_ok(kl_gpu_alloc(ctx, &there, (size_t)(rows * width) * sizeof *host));
    assert_ok(kl_device_slice(ctx, there, &(kl_slice){.tensor = tensor, .dtype = KL_BF16, .rows = rows, .pitch = HEADS * width, .width = width, .count = 1, .head = {head}}));
    assert_ok(kl_gpu_copy(ctx, host, there, (size_t)(rows * width) * sizeof *host));
    kl_gpu_free(ctx, there);
    return host;
}

static double dot(const float *a, const float *b)
{
    double sum = 0.0;
    for (int i = 0; i < DIM; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

static void inputs_are_of_the_regime_asked_for(void **state)
{
    (void)state;
    if (!ctx)
        skip();
    uint16_t *q, *k, *v, *g, *beta;
    void **all[] = {(void **)&q, (void **)&k, (void **)&v, (void **)&g, (void **)&beta};
    for (int i = 0; i < 5; i++)
        assert_ok(kl_gpu_alloc(ctx, all[i], GATES * sizeof(uint16_t)));
    kda_problem p = {.B = 1, .T = TOKENS, .N = 1, .H = HEADS, .HV = HEADS, .K = DIM, .V = DIM, .G = DIM, .dtype = KL_BF16, .q = q, .k = k, .v = v, .g = g, .beta = beta};
    for (kl_regime r = KL_REGIME_STRONG; r <= KL_REGIME_MIXED; r++) {
        assert_ok(kl_device_inputs(ctx, &p, NULL, r, 7));
        float *keys = slice(k, TOKENS, DIM, 1), *decay = slice(g, TOKENS, DIM, 2), *b = slice(beta, TOKENS, 1, 0);
        double cosine = 0.0, deepest = 0.0;
        for (int t = 0; t < TOKENS; t++) {
            assert_true(fabs(dot(keys + t * DIM, keys + t * DIM) - 1.0) < 0.02);
            cosine += t ? dot(keys + t * DIM, keys + (t - 1) * DIM) / (TOKENS - 1) : 0.0;
            for (int j = 0; j < DIM; j++) {
                bool slow = r == KL_REGIME_SLOW || (r == KL_REGIME_MIXED && 3 * j < DIM);
                assert_true(decay[t * DIM + j] < 0.0f && decay[t * DIM + j] >= (slow ? -0.0101f : -5.0f));
                deepest = fmin(deepest, decay[t * DIM + j]);
            }
            assert_true(b[t] > 0.0f && b[t] < 1.0f && (r != KL_REGIME_SLOW || b[t] > 0.92f));
        }
        assert_true(r == KL_REGIME_SLOW ? fabs(cosine - 0.8) < 0.1 : fabs(cosine) < 0.1);
        assert_true(r == KL_REGIME_SLOW || deepest < -4.0);
        free(keys);
        free(decay);
        free(b);
    }
    for (int i = 0; i < 5; i++)
        kl_gpu_free(ctx, *all[i]);
}

static void a_row_of_the_bench_is_whole(void **state)
{
    (void)state;
    if (!ctx)
        skip();
    kl_bench b = {.ctx = ctx, .quiet = true, .runs = 1, .regime = KL_REGIME_MIXED, .pass = {[KL_BENCH_FWD] = true}};
    kl_shape list[KL_SHAPES];
    int count, rows = 0;
    assert_ok(kl_ceilings_measure(ctx, &b.ceilings));
    assert_ok(kl_shapes_parse("kda", "T=21,H=6,K=16,N=2,dplr=1;raw=1,dplr=0", &(kl_shape){0}, list, &count));
    assert_ok(kl_bench_family(&b, KL_FAMILY_KDA, list, count));
    assert_false(b.wrong);
    char *text = calloc(1, b.lines.size + 1);
    assert_non_null(text);
    memcpy(text, b.lines.text, b.lines.size);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"), rows++) {
        static const char *const wanted[] = {"family", "pass", "variant", "gate", "T", "N", "lengths", "call_us", "pipelined_us", "host_us", "sets", "min_us", "max_us", "runs", "bytes",
                                             "flops", "ceiling", "copy_gbps", "err", "err_limit", "err_worst_part", "err_heads", "workspace_bytes", "peak_bytes", "device", "commit", "command"};
        cJSON *row = cJSON_Parse(line);
        for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
            if (!cJSON_HasObjectItem(row, wanted[i]))
                fail_msg("a row has no '%s': %s", wanted[i], line);
        assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(row, "lengths")), 2);
        assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(row, "err_heads")), 4);
        cJSON_Delete(row);
    }
    assert_true(rows >= 3);
    free(text);
    kl_lines_free(&b.lines);
}

/* Rows worked out from the latents agree with what the device decodes. */
static void decoding_is_benched_by_rows(void **state)
{
    (void)state;
    if (!ctx)
        skip();
    kl_bench b = {.ctx = ctx, .quiet = true, .runs = 1, .variant = "recurrent", .pass = {[KL_BENCH_DECODE] = true}};
    kl_shape list[KL_SHAPES];
    int count;
    assert_ok(kl_ceilings_measure(ctx, &b.ceilings));
    assert_ok(kl_shapes_parse("mla", "T=70,N=2,H=2", &(kl_shape){.R = 512, .Dn = 128, .Dr = 64, .Dv = 128}, list, &count));
    assert_ok(kl_bench_family(&b, KL_FAMILY_MLA, list, count));
    assert_int_equal(b.rows, 1);
    assert_false(b.wrong);
    kl_lines_free(&b.lines);
}

static void experts_are_benched_by_tokens(void **state)
{
    (void)state;
    if (!ctx)
        skip();
    kl_bench b = {.ctx = ctx, .quiet = true, .runs = 1, .pass = {[KL_BENCH_FWD] = true, [KL_BENCH_BWD] = true}};
    kl_shape list[KL_SHAPES];
    int count, variants;
    const kl_variant *v = moe_variants(&variants);
    assert_ok(kl_ceilings_measure(ctx, &b.ceilings));
    assert_ok(kl_shapes_parse("moe", "T=20,Is=16;T=1,Is=0", &(kl_shape){.D = 64, .E = 8, .I = 48, .top_k = 2}, list, &count));
    assert_ok(kl_bench_family(&b, KL_FAMILY_MOE, list, count));
    int rows = 0;
    for (int i = 0; i < variants; i++)
        rows += v[i].device == KL_CUDA ? count * (v[i].backward ? 2 : 1) : 0;
    assert_int_equal(b.rows, rows - 1); /* 20 tokens are too many for recurrent */
    assert_false(b.wrong);
    kl_lines_free(&b.lines);
}

/* All lists parse, and each has a pass. */
static void the_lists_of_shapes_are_sound(void **state)
{
    (void)state;
    int lists, count;
    const kl_shape_list *list = kl_shape_lists(&lists);
    for (int i = 0; i < lists; i++) {
        kl_shape shape[KL_SHAPES];
        bool any = false;
        assert_ok(kl_shapes_parse(list[i].family, list[i].shapes, &(kl_shape){.K = 128}, shape, &count));
        for (int p = 0; p < KL_BENCH_PASSES; p++)
            any |= list[i].pass[p];
        assert_true(any && count > 0);
        for (int n = 0; n < count; n++) {
            int64_t tokens = 0;
            for (int64_t j = 0; j < shape[n].length_count; j++)
                tokens += shape[n].lengths[j];
            assert_true(!shape[n].length_count || tokens == shape[n].T || shape[n].T == 8192);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rounding_forgets_what_was_wanted),
        cmocka_unit_test(every_placement_gives_the_same_numbers),
        cmocka_unit_test(latents_lie_there_as_on_the_host),
        cmocka_unit_test(what_is_around_the_recurrence),
        cmocka_unit_test(what_a_variant_must_not_touch_is_watched),
        cmocka_unit_test(inputs_are_of_the_regime_asked_for),
        cmocka_unit_test(a_row_of_the_bench_is_whole),
        cmocka_unit_test(decoding_is_benched_by_rows),
        cmocka_unit_test(experts_are_benched_by_tokens),
        cmocka_unit_test(the_lists_of_shapes_are_sound),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
