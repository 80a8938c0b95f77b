/* Every case and bug class of the operator, by name, for every variant that a device offers. On an emulated device the
 * kernels run on the host, so that this needs no GPU; with one, it runs there. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>

#include "tests/device_case.h"

/* ---- running ---- */

static void build(kl_case *c, kl_kda_spec spec, const kl_placement *at)
{
    new_case(c, spec, at);
    assert_ok(kl_case_upload(ctx, c));
}

static bool offered(const kl_case *c, const kl_variant *v, kl_pass pass)
{
    if (v->device != KL_CUDA || (pass == KL_BACKWARD && !v->backward))
        return false;
    kl_status s = v->check(kl_case_problem(c, KL_CUDA), pass);
    if (s.code == KL_EUNSUPPORTED)
        return false;
    assert_ok(s);
    return true;
}

/* The next variant from *i on that offers the pass, or NULL. */
static const kl_variant *next_offered(const kl_case *c, kl_pass pass, int *i)
{
    int count;
    const kl_variant *v = kda_variants(&count);
    for (; *i < count; ++*i)
        if (offered(c, &v[*i], pass))
            return &v[(*i)++];
    return NULL;
}

/* Against the reference, both passes; at least one variant must offer the forward pass. */
static void check_at(kl_kda_spec spec, const kl_placement *at)
{
    kl_case c;
    build(&c, spec, at);
    for (kl_pass pass = KL_FORWARD; pass <= (spec.backward ? KL_BACKWARD : KL_FORWARD); pass++) {
        int i = 0, ran = 0;
        assert_ok(kl_case_run(ctx, &c, &kl_reference_kda, pass, &scratch));
        assert_ok(kl_case_keep(&c, pass));
        for (const kl_variant *v; (v = next_offered(&c, pass, &i)); ran++) {
            const char *tensor;
            kl_status s = kl_case_run(ctx, &c, v, pass, &scratch);
            if (s.code == KL_EUNSUPPORTED && !ctx->hopper)
                continue;
            if (kl_failed(s))
                fail_msg("%s, %s, pass %d: %s", c.name, v->name, (int)pass, s.message);
            double err = kl_case_worst(&c, pass, &tensor);
            if (!kl_within(err, pass == KL_BACKWARD ? c.tolerance.gradient : c.tolerance.forward))
                fail_msg("%s, %s: error of %s %g", c.name, v->name, tensor, err);
        }
        if (pass == KL_FORWARD && !ran)
            fail_msg("%s: no variant offers it", c.name);
    }
    kl_case_free(&c);
}

static const kl_placement bf16 = {.dtype = KL_BF16};
static void check(kl_kda_spec spec) { check_at(spec, &bf16); }

/* ---- sizes ---- */

static void token_counts(void **state)
{
    NEEDS_DEVICE();
    static const int64_t counts[] = {0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        check((kl_kda_spec){.T = counts[i], .H = 1, .K = 32, .regime = (kl_regime)(i % 3), .state = true, .backward = true});
    check((kl_kda_spec){.T = 1000, .H = 1, .K = 8, .regime = KL_REGIME_MIXED, .state = true, .backward = true});
}

static void head_dimensions(void **state)
{
    NEEDS_DEVICE();
    static const int64_t dims[] = {1, 8, 24, 60, 64, 100, 128, 256};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
        check((kl_kda_spec){.T = 35, .H = 1, .K = dims[i], .V = dims[7 - i], .regime = dims[i] == 1 ? KL_REGIME_STRONG : KL_REGIME_MIXED, .state = true,
                            .backward = true});
    check((kl_kda_spec){.T = 35, .H = 1, .K = 128, .regime = KL_REGIME_MIXED, .state = true, .backward = true});
}

static void value_heads_together_with_packing(void **state)
{
    NEEDS_DEVICE();
    check((kl_kda_spec){.H = 2, .HV = 4, .K = 24, .V = 16, .lengths = (const int64_t[]){20, 0, 33}, .sequences = 3, .regime = KL_REGIME_MIXED,
                        .state = true, .backward = true});
    check((kl_kda_spec){.B = 2, .T = 34, .H = 1, .HV = 3, .K = 64, .V = 32, .regime = KL_REGIME_STRONG, .state = true, .backward = true});
}

static void packed_lengths_with_empty_sequences(void **state)
{
    NEEDS_DEVICE();
    check((kl_kda_spec){.H = 1, .K = 16, .lengths = (const int64_t[]){0, 1, 15, 256, 0, 300}, .sequences = 6, .regime = KL_REGIME_SLOW, .state = true,
                        .backward = true});
    check((kl_kda_spec){.H = 1, .K = 16, .lengths = (const int64_t[]){0, 0}, .sequences = 2, .state = true, .backward = true});
    check((kl_kda_spec){.H = 2, .K = 64, .lengths = (const int64_t[]){1, 1, 2, 1, 3, 1}, .sequences = 6, .regime = KL_REGIME_MIXED, .state = true, .backward = true});
}

static void zero_length_sequences_keep_their_state(void **state)
{
    NEEDS_DEVICE();
    kl_case c;
    int i = 0;
    build(&c, (kl_kda_spec){.H = 1, .K = 16, .lengths = (const int64_t[]){0, 5, 0}, .sequences = 3, .state = true}, &bf16);
    for (const kl_variant *v; (v = next_offered(&c, KL_FORWARD, &i));) {
        assert_ok(kl_case_run(ctx, &c, v, KL_FORWARD, &scratch));
        const float *ht = c.problem.kda.ht, *h0 = c.problem.kda.h0;
        assert_memory_equal(ht, h0, 256 * sizeof(float));
        assert_memory_equal(ht + 512, h0 + 512, 256 * sizeof(float));
    }
    kl_case_free(&c);
}

static void without_an_initial_state(void **state)
{
    NEEDS_DEVICE();
    check((kl_kda_spec){.T = 40, .H = 1, .K = 64, .regime = KL_REGIME_MIXED, .backward = true});
}

/* More than fit into two dimensions of a grid. An emulated device checks the launches; a real one computes. */
static void more_than_65535_sequences_and_chunks(void **state)
{
    NEEDS_DEVICE();
    enum { N = 65600 };
    int64_t *lengths = malloc(N * sizeof *lengths);
    assert_non_null(lengths);
    for (int64_t n = 0; n < N; n++)
        lengths[n] = 1;
    kl_case c;
    int i = 0;
    build(&c, (kl_kda_spec){.H = 1, .K = 1, .lengths = lengths, .sequences = N, .regime = KL_REGIME_STRONG, .state = true}, &bf16);
    assert_ok(kl_case_run(ctx, &c, &kl_reference_kda, KL_FORWARD, &scratch));
    assert_ok(kl_case_keep(&c, KL_FORWARD));
    kl_gpu_emulate(90, (size_t)4 << 30, false);
    for (const kl_variant *v; (v = next_offered(&c, KL_FORWARD, &i));) {
        assert_ok(kl_case_run(ctx, &c, v, KL_FORWARD, &scratch));
        assert_true(kl_gpu_emulated() || kl_within(kl_case_worst(&c, KL_FORWARD, NULL), c.tolerance.forward));
    }
    kl_gpu_emulate(90, (size_t)4 << 30, true);
    kl_case_free(&c);
    free(lengths);
}

/* ---- layouts ---- */

static void value_first_states(void **state)
{
    NEEDS_DEVICE();
    check((kl_kda_spec){.T = 40, .H = 2, .K = 24, .V = 40, .state_layout = KDA_STATE_VK, .regime = KL_REGIME_MIXED, .state = true, .backward = true, .chunk_states = true});
}

static void strides_and_what_lies_between(void **state)
{
    NEEDS_DEVICE();
    for (int64_t gap = 8; gap <= 64; gap *= 8)
        check_at((kl_kda_spec){.T = 37, .H = 2, .HV = 4, .K = 24, .V = 16, .G = 6, .gate = KDA_GATE_SOFTPLUS, .state = true, .backward = true},
                 &(kl_placement){.dtype = KL_BF16, .gap = gap});
}

static void states_in_a_pool(void **state)
{
    NEEDS_DEVICE();
    check_at((kl_kda_spec){.B = 3, .T = 1, .H = 2, .K = 64, .regime = KL_REGIME_MIXED, .state = true}, &(kl_placement){.dtype = KL_BF16, .pool = true, .in_place = true});
    check_at((kl_kda_spec){.B = 3, .T = 33, .H = 1, .K = 32, .regime = KL_REGIME_MIXED, .state = true, .backward = true}, &(kl_placement){.dtype = KL_BF16, .pool = true});
    check_at((kl_kda_spec){.B = 2, .T = 33, .H = 1, .K = 32, .state = true}, &(kl_placement){.dtype = KL_BF16, .in_place = true});
}

static void states_stored_as_bfloat16(void **state)
{
    NEEDS_DEVICE();
    check_at((kl_kda_spec){.B = 2, .T = 3, .H = 2, .K = 64, .V = 48, .regime = KL_REGIME_SLOW, .state = true}, &(kl_placement){.dtype = KL_BF16, .state_dtype = KL_BF16});
    check_at((kl_kda_spec){.B = 2, .T = 3, .H = 2, .K = 64, .V = 48, .regime = KL_REGIME_SLOW, .state = true}, &(kl_placement){.state_dtype = KL_BF16, .pool = true});
}

static void float32_tensors(void **state)
{
    NEEDS_DEVICE();
    check_at((kl_kda_spec){.T = 20, .H = 2, .K = 60, .V = 24, .regime = KL_REGIME_MIXED, .state = true}, &(kl_placement){0});
}

static void states_on_the_way(void **state)
{
    NEEDS_DEVICE();
    for (int64_t chunk = 16; chunk <= 128; chunk *= 2)
        check((kl_kda_spec){.H = 1, .K = 32, .chunk = chunk, .lengths = (const int64_t[]){70, 0, 129}, .sequences = 3, .regime = KL_REGIME_MIXED, .state = true,
                            .chunk_states = true});
    check((kl_kda_spec){.T = 5, .B = 2, .H = 1, .K = 32, .regime = KL_REGIME_MIXED, .state = true, .token_states = true});
}

/* ---- gates and options ---- */

static void gates_from_none_to_extinction(void **state)
{
    NEEDS_DEVICE();
    for (kl_regime r = 0; r < KL_REGIMES; r++)
        check((kl_kda_spec){.T = 70, .H = 2, .K = 64, .regime = r, .state = true, .backward = true});
    check((kl_kda_spec){.T = 70, .H = 1, .K = 128, .regime = KL_REGIME_EXTREME, .state = true, .backward = true});
}

static void gates_inside_the_kernel(void **state)
{
    NEEDS_DEVICE();
    for (kda_gate gate = KDA_GATE_SOFTPLUS; gate <= KDA_GATE_BOUNDED; gate++)
        for (kl_regime r = 0; r <= KL_REGIME_MIXED; r++)
            check((kl_kda_spec){.T = 35, .H = 2, .K = 32, .regime = r, .gate = gate, .beta_kind = KDA_BETA_SIGMOID, .qk_l2norm = true, .state = true, .backward = true});
}

static void gates_of_a_head_of_blocks_and_none(void **state)
{
    NEEDS_DEVICE();
    static const int64_t G[] = {1, 4, 16, -1};
    for (int i = 0; i < 4; i++)
        check((kl_kda_spec){.T = 35, .H = 2, .K = 32, .G = G[i], .regime = KL_REGIME_MIXED, .state = true, .backward = true});
}

static void negative_eigenvalues_and_no_erasing(void **state)
{
    NEEDS_DEVICE();
    check((kl_kda_spec){.T = 35, .H = 1, .K = 32, .beta_kind = KDA_BETA_SIGMOID2, .regime = KL_REGIME_MIXED, .state = true, .backward = true});
    check((kl_kda_spec){.T = 35, .H = 1, .K = 32, .no_delta = true, .regime = KL_REGIME_MIXED, .state = true, .backward = true});
    check((kl_kda_spec){.T = 35, .H = 1, .K = 32, .G = 1, .no_delta = true, .regime = KL_REGIME_STRONG, .state = true, .backward = true});
}

/* ---- what may and may not change ---- */

static float *outputs_of(kl_case *c, const kl_variant *v, int64_t count)
{
    float *copy = malloc((size_t)count * sizeof *copy);
    assert_non_null(copy);
    assert_ok(kl_case_upload(ctx, c));
    assert_ok(kl_case_run(ctx, c, v, KL_FORWARD, &scratch));
    memcpy(copy, c->problem.kda.o, (size_t)count * sizeof *copy);
    return copy;
}

/* Tokens [t0, t1) get other keys and gates. */
static void change(kl_case *c, int64_t t0, int64_t t1, float gate)
{
    const kda_problem *p = &c->problem.kda;
    for (int64_t i = t0 * p->H * p->K; i < t1 * p->H * p->K; i++)
        ((float *)p->k)[i] *= -2.0f;
    for (int64_t i = t0 * p->HV * p->G; i < t1 * p->HV * p->G; i++)
        ((float *)p->g)[i] = gate;
}

/* Outputs before the cut with and without the change: the same bits. */
static void check_causality(int64_t cut, float gate)
{
    enum { T = 70, WIDTH = 32 };
    const kl_kda_spec spec = {.T = T, .H = 1, .K = WIDTH, .regime = KL_REGIME_MIXED, .state = true};
    kl_case c, d;
    int at = 0;
    build(&c, spec, &bf16);
    build(&d, spec, &bf16);
    change(&d, cut, T, gate);
    for (const kl_variant *v; (v = next_offered(&c, KL_FORWARD, &at));) {
        float *before = outputs_of(&c, v, T * WIDTH), *after = outputs_of(&d, v, T * WIDTH);
        if (memcmp(before, after, (size_t)(cut * WIDTH) * sizeof(float)))
            fail_msg("%s: gates of %g from token %lld on change earlier outputs", v->name, (double)gate, (long long)cut);
        assert_true(memcmp(before, after, T * WIDTH * sizeof(float)) != 0);
        free(before);
        free(after);
    }
    kl_case_free(&c);
    kl_case_free(&d);
}

static void a_later_token_never_changes_an_earlier_output(void **state)
{
    NEEDS_DEVICE();
    static const int64_t cuts[] = {1, 16, 31, 33, 64, 69};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        check_causality(cuts[i], -1.0f);
        check_causality(cuts[i], -40.0f);
    }
}

static void a_sequence_never_depends_on_its_neighbours(void **state)
{
    NEEDS_DEVICE();
    static const int64_t lengths[] = {20, 45, 17};
    const kl_kda_spec spec = {.H = 1, .K = 32, .lengths = lengths, .sequences = 3, .regime = KL_REGIME_MIXED, .state = true};
    kl_case c, d;
    int at = 0;
    build(&c, spec, &bf16);
    build(&d, spec, &bf16);
    change(&d, 0, 20, -40.0f);
    change(&d, 65, 82, -40.0f);
    for (const kl_variant *v; (v = next_offered(&c, KL_FORWARD, &at));) {
        float *before = outputs_of(&c, v, 82 * 32), *after = outputs_of(&d, v, 82 * 32);
        assert_memory_equal(before + 20 * 32, after + 20 * 32, 45 * 32 * sizeof(float));
        free(before);
        free(after);
    }
    kl_case_free(&c);
    kl_case_free(&d);
}

static void the_same_call_twice_gives_the_same_bits(void **state)
{
    NEEDS_DEVICE();
    kl_case c;
    build(&c, (kl_kda_spec){.T = 70, .H = 2, .K = 32, .regime = KL_REGIME_MIXED, .state = true, .backward = true}, &bf16);
    for (kl_pass pass = KL_FORWARD; pass <= KL_BACKWARD; pass++) {
        int at = 0;
        for (const kl_variant *v; (v = next_offered(&c, pass, &at));) {
            assert_ok(kl_case_run(ctx, &c, v, pass, &scratch));
            assert_ok(kl_case_keep(&c, pass));
            assert_ok(kl_case_run(ctx, &c, v, pass, &scratch));
            assert_true(kl_case_worst(&c, pass, NULL) == 0.0);
        }
    }
    kl_case_free(&c);
}

/* Tokens [from, from + T) of the whole case as a case of its own. */
static void cut_out(kl_case *part, const kl_case *whole, int64_t from, int64_t T, const float *h0)
{
    const kda_problem *w = &whole->problem.kda, *p = &part->problem.kda;
    assert_ok(kl_case_kda(part, &(kl_kda_spec){.T = T, .H = 1, .K = w->K, .regime = KL_REGIME_MIXED, .state = true, .blank = true}));
    struct { const void *to, *from; int64_t width; } all[] = {{p->q, w->q, w->K}, {p->k, w->k, w->K}, {p->v, w->v, w->V}, {p->g, w->g, w->K}, {p->beta, w->beta, 1}};
    for (int i = 0; i < 5; i++)
        memcpy((void *)all[i].to, (const float *)all[i].from + from * all[i].width, (size_t)(T * all[i].width) * sizeof(float));
    memcpy((void *)p->h0, h0, (size_t)(w->K * w->V) * sizeof(float));
    assert_ok(kl_case_place(part, &bf16, NULL));
}

static void split_anywhere(void **state)
{
    NEEDS_DEVICE();
    enum { T = 70, D = 32 };
    static const int64_t cuts[] = {1, 17, 32, 50, 69};
    kl_case c;
    int at = 0;
    build(&c, (kl_kda_spec){.T = T, .H = 1, .K = D, .regime = KL_REGIME_MIXED, .state = true}, &bf16);
    for (const kl_variant *v; (v = next_offered(&c, KL_FORWARD, &at));) {
        float *o = outputs_of(&c, v, T * D);
        for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
            kl_case first, second;
            cut_out(&first, &c, 0, cuts[i], c.problem.kda.h0);
            float *head = outputs_of(&first, v, cuts[i] * D);
            cut_out(&second, &c, cuts[i], T - cuts[i], first.problem.kda.ht);
            float *tail = outputs_of(&second, v, (T - cuts[i]) * D);
            assert_true(kl_within(kl_rel_err_f32(head, o, (size_t)(cuts[i] * D)), kl_tol_kda_bf16.forward));
            assert_true(kl_within(kl_rel_err_f32(tail, o + cuts[i] * D, (size_t)((T - cuts[i]) * D)), kl_tol_kda_bf16.forward));
            assert_true(kl_within(kl_rel_err_f32(second.problem.kda.ht, c.problem.kda.ht, D * D), kl_tol_kda_bf16.forward));
            free(head);
            free(tail);
            kl_case_free(&first);
            kl_case_free(&second);
        }
        free(o);
    }
    kl_case_free(&c);
}

/* Any subset of upstream gradients. */
static void missing_upstream_gradients(void **state)
{
    NEEDS_DEVICE();
    for (int missing = 0; missing < 4; missing++) {
        kl_case c;
        int at = 0;
        assert_ok(kl_case_kda(&c, &(kl_kda_spec){.T = 40, .H = 1, .K = 32, .regime = KL_REGIME_MIXED, .state = true, .backward = true, .seed = 1}));
        if (missing & 1)
            c.grads.kda.d_o = NULL;
        if (missing & 2)
            c.grads.kda.dht = NULL;
        assert_ok(kl_case_place(&c, &bf16, NULL));
        assert_ok(kl_case_upload(ctx, &c));
        assert_ok(kl_case_run(ctx, &c, &kl_reference_kda, KL_BACKWARD, &scratch));
        assert_ok(kl_case_keep(&c, KL_BACKWARD));
        for (const kl_variant *v; (v = next_offered(&c, KL_BACKWARD, &at));) {
            assert_ok(kl_case_run(ctx, &c, v, KL_BACKWARD, &scratch));
            assert_true(kl_within(kl_case_worst(&c, KL_BACKWARD, NULL), c.tolerance.gradient));
        }
        kl_case_free(&c);
    }
}

/* ---- devices ---- */

/* Bulk copies, clusters and overlap of launches in their plain form, the others' shared memory. */
static void a_device_that_is_not_hopper(void **state)
{
    NEEDS_DEVICE();
    if (!kl_gpu_emulated())
        skip();
    kl_ctx *hopper = ctx;
    const int capabilities[] = {80, 86, 100};
    for (int i = 0; i < 3; i++) {
        kl_gpu_emulate(capabilities[i], (size_t)4 << 30, true);
        assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.device = KL_CUDA}));
        check((kl_kda_spec){.H = 1, .HV = 2, .K = 64, .V = 40, .lengths = (const int64_t[]){40, 0, 130}, .sequences = 3, .regime = KL_REGIME_MIXED, .state = true,
                            .backward = true});
        check((kl_kda_spec){.T = 70, .H = 1, .K = 128, .regime = KL_REGIME_SLOW, .state = true, .backward = i != 1});
        kl_ctx_destroy(ctx);
    }
    ctx = hopper;
    kl_gpu_emulate(90, (size_t)4 << 30, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(token_counts),
        cmocka_unit_test(head_dimensions),
        cmocka_unit_test(value_heads_together_with_packing),
        cmocka_unit_test(packed_lengths_with_empty_sequences),
        cmocka_unit_test(zero_length_sequences_keep_their_state),
        cmocka_unit_test(without_an_initial_state),
        cmocka_unit_test(more_than_65535_sequences_and_chunks),
        cmocka_unit_test(value_first_states),
        cmocka_unit_test(strides_and_what_lies_between),
        cmocka_unit_test(states_in_a_pool),
        cmocka_unit_test(states_stored_as_bfloat16),
        cmocka_unit_test(float32_tensors),
        cmocka_unit_test(states_on_the_way),
        cmocka_unit_test(gates_from_none_to_extinction),
        cmocka_unit_test(gates_inside_the_kernel),
        cmocka_unit_test(gates_of_a_head_of_blocks_and_none),
        cmocka_unit_test(negative_eigenvalues_and_no_erasing),
        cmocka_unit_test(a_later_token_never_changes_an_earlier_output),
        cmocka_unit_test(a_sequence_never_depends_on_its_neighbours),
        cmocka_unit_test(the_same_call_twice_gives_the_same_bits),
        cmocka_unit_test(split_anywhere),
        cmocka_unit_test(missing_upstream_gradients),
        cmocka_unit_test(a_device_that_is_not_hopper),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
