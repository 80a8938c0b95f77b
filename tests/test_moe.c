/* The mixture of experts: every variant against the naive reference, and the promises of moe.h one by one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/moe_case.h"

static int64_t one_of(kl_rng *rng, const int64_t *list, size_t n) { return list[kl_rng_below(rng, n)]; }
#define ONE_OF(rng, ...) one_of(rng, (const int64_t[]){__VA_ARGS__}, sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t))

static moe_problem random_problem(kl_rng *rng)
{
    moe_problem p = {.T = ONE_OF(rng, 0, 1, 2, 3, 7, 8, 9, 17, 64, 130, 300), .D = ONE_OF(rng, 1, 8, 24, 33, 64, 100),
                     .E = ONE_OF(rng, 0, 1, 2, 4, 8, 12, 16), .Is = ONE_OF(rng, 0, 0, 1, 16, 50, 300)};
    if (p.E) {
        p.I = ONE_OF(rng, 1, 8, 20, 48, 96, 260);
        p.n_group = p.E % 4 == 0 ? ONE_OF(rng, 0, 1, 2, 4) : 0;
        p.topk_group = p.n_group > 1 ? 1 + (int64_t)kl_rng_below(rng, (uint64_t)p.n_group) : 0;
        int64_t reach = p.n_group > 1 ? p.topk_group * p.E / p.n_group : p.E;
        p.top_k = 1 + (int64_t)kl_rng_below(rng, (uint64_t)(reach < 8 ? reach : 8));
    }
    p.router_kind = kl_rng_below(rng, 2) ? MOE_SOFTMAX : MOE_SIGMOID;
    p.renormalize = kl_rng_below(rng, 4) != 0;
    p.biased_weights = kl_rng_below(rng, 4) == 0;
    p.scale = kl_rng_below(rng, 2) ? 2.446f : 0.0f;
    p.weight_dtype = (kl_dtype)ONE_OF(rng, KL_F32, KL_BF16, KL_F16);
    p.router_dtype = (kl_dtype)ONE_OF(rng, KL_F32, KL_BF16, KL_F16);
    return p;
}

static void test_random_problems(void **state)
{
    (void)state;
    uint64_t seed = seed_from_environment();
    print_message("SEED=%llu\n", (unsigned long long)seed);
    for (uint64_t i = 0; i < 60; i++) {
        kl_rng rng = kl_rng_make(seed, i);
        moe_problem p = random_problem(&rng);
        moe_case c = make_clear_case(&rng, p);
        check_all(&c, ctx_of[1 + i % 3]);
        free_case(&c);
    }
}

/* The shape that a layer of a real model has, only smaller: several tiles in every direction. */
static void test_many_tiles(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 1000);
    moe_problem p = {.T = 300, .D = 320, .E = 6, .I = 288, .top_k = 2, .Is = 520, .renormalize = true, .scale = 2.446f, .weight_dtype = KL_BF16};
    moe_case c = make_clear_case(&rng, p);
    check_forward(moe_pick(KL_CPU, "chunk", &p, KL_FORWARD), ctx_of[2], &c);
    check_backward(moe_pick(KL_CPU, "chunk", &p, KL_BACKWARD), ctx_of[2], &c);
    free_case(&c);
}

/* More tokens than one block of the chunk variant holds. */
static void test_many_tokens(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 1001);
    moe_problem p = {.T = 8192 * 2 + 77, .D = 8, .E = 4, .I = 8, .top_k = 2, .Is = 8, .renormalize = true};
    moe_case c = make_case(&rng, p);
    for (int64_t t = 0; t < p.T; t++) /* few distinct tokens, so that the choice of none of them is close */
        for (int64_t d = 0; d < p.D; d++) {
            ((float *)c.x.stored)[t * p.D + d] = ((float *)c.x.stored)[t % 16 * p.D + d];
            c.x.exact[t * p.D + d] = c.x.exact[t % 16 * p.D + d];
        }
    check_all(&c, ctx_of[2]);
    free_case(&c);
}

/* ---- the router's promises ---- */

static void set_router(moe_case *c, float value)
{
    for (size_t i = 0; i < c->router.n; i++) {
        ((float *)c->router.stored)[i] = value;
        c->router.exact[i] = (double)value;
    }
}

static void set_bias(moe_case *c, const float *bias)
{
    for (size_t e = 0; e < c->bias.n; e++) {
        ((float *)c->bias.stored)[e] = bias[e];
        c->bias.exact[e] = (double)bias[e];
    }
}

static void check_chosen(const moe_case *c, const int32_t *expected)
{
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        results r = run_forward(&v[i], ctx_of[2], c);
        for (size_t s = 0; s < r.slots; s++)
            assert_int_equal(r.chosen[s], expected[s % (size_t)c->p.top_k]);
        free_results(r);
    }
}

static void test_ties_go_to_the_lowest_index(void **state)
{
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        kl_rng rng = kl_rng_make(1, 2);
        moe_case c = make_case(&rng, (moe_problem){.T = 5, .D = 8, .E = 8, .I = 8, .top_k = 3, .router_kind = (moe_router)kind, .renormalize = true});
        set_router(&c, 0.0f);
        set_bias(&c, (const float[8]){0});
        check_chosen(&c, (const int32_t[]){0, 1, 2});
        set_bias(&c, (const float[8]){0, 0, 1, 0, 0, 1, 0, 0});
        check_chosen(&c, (const int32_t[]){2, 5, 0});
        check_all(&c, ctx_of[2]);
        free_case(&c);
    }
}

static void test_groups_by_their_two_best(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(1, 3);
    moe_case c = make_case(&rng, (moe_problem){.T = 3, .D = 8, .E = 8, .I = 8, .top_k = 3, .n_group = 4, .topk_group = 2, .renormalize = true});
    set_router(&c, 0.0f);
    /* sums of two: 0.9, 1.0, 0.8, 1.0: the groups 1 and 3, although the best expert is in group 0 */
    set_bias(&c, (const float[8]){0.9f, 0.0f, 0.5f, 0.5f, 0.4f, 0.4f, 0.2f, 0.8f});
    check_chosen(&c, (const int32_t[]){7, 2, 3});
    /* groups that tie: the lowest */
    set_bias(&c, (const float[8]){0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f});
    check_chosen(&c, (const int32_t[]){0, 1, 2});
    check_all(&c, ctx_of[2]);
    free_case(&c);
}

static void test_the_bias_chooses_but_does_not_weigh(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(1, 4);
    moe_case c = make_case(&rng, (moe_problem){.T = 4, .D = 8, .E = 4, .I = 8, .top_k = 2, .renormalize = true, .scale = 2.0f});
    set_router(&c, 0.0f);
    set_bias(&c, (const float[4]){0.0f, 3.0f, 0.0f, 1.0f});
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int biased = 0; biased < 2; biased++) {
        c.p.biased_weights = biased != 0;
        c.r.biased_weights = biased;
        for (int i = 0; i < count; i++) {
            results r = run_forward(&v[i], ctx_of[1], &c);
            for (size_t t = 0; t < 4; t++) {
                assert_int_equal(r.chosen[2 * t], 1);
                assert_int_equal(r.chosen[2 * t + 1], 3);
                /* every s is 1/2: (1/2)/1 2, or with bias (3 1/2)/5 2 and (1 1/2)/5 2 */
                assert_true(fabsf(r.weight[2 * t] - (biased ? 1.4f : 1.0f)) < 1e-6f);
                assert_true(fabsf(r.weight[2 * t + 1] - (biased ? 0.6f : 1.0f)) < 1e-6f);
            }
            free_results(r);
        }
        check_all(&c, ctx_of[2]);
    }
    free_case(&c);
}

static void test_all_tokens_to_one_expert(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 5);
    moe_case c = make_case(&rng, (moe_problem){.T = 200, .D = 24, .E = 5, .I = 40, .top_k = 1, .scale = 1.5f});
    set_bias(&c, (const float[5]){0, 0, 0, 10.0f, 0});
    check_chosen(&c, (const int32_t[]){3});
    check_all(&c, ctx_of[2]);
    gradients g = run_backward(moe_pick(KL_CPU, "chunk", &c.p, KL_BACKWARD), ctx_of[2], &c);
    for (int i = 2; i < 5; i++)
        for (size_t j = 0; j < g.size[i]; j++)
            if (j / (24 * 40) != 3)
                assert_true(g.all[g.start[i] + j] == 1.0f); /* experts without tokens are left alone */
    free_gradients(g);
    free_case(&c);
}

static void test_all_experts_and_one_expert(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 6);
    for (int64_t E = 1; E <= 7; E += 3) {
        moe_case c = make_clear_case(&rng, (moe_problem){.T = 33, .D = 16, .E = E, .I = 24, .top_k = E, .Is = 8, .renormalize = true});
        check_all(&c, ctx_of[3]);
        free_case(&c);
    }
}

static void test_large_logits_stay_finite(void **state)
{
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        kl_rng rng = kl_rng_make(seed_from_environment(), 7);
        moe_case c = make_case(&rng, (moe_problem){.T = 40, .D = 16, .E = 6, .I = 8, .top_k = 2, .router_kind = (moe_router)kind, .renormalize = true});
        for (size_t i = 0; i < c.router.n; i++)
            ((float *)c.router.stored)[i] *= 1e6f;
        int count;
        const kl_variant *v = cpu_variants(&count);
        results first = {0};
        for (int i = 0; i < count; i++) {
            results r = run_forward(&v[i], ctx_of[1], &c);
            for (size_t j = 0; j < r.n; j++)
                assert_true(isfinite(r.y[j]));
            for (size_t j = 0; j < r.slots; j++)
                assert_true(r.weight[j] >= 0.0f && r.weight[j] <= 1.0f);
            if (i == 0)
                first = r;
            else {
                assert_memory_equal(first.chosen, r.chosen, r.slots * 4);
                assert_true(kl_within(kl_rel_err_f32(r.y, first.y, r.n), kl_tol_moe_f32.forward));
                free_results(r);
            }
        }
        free_results(first);
        gradients g = run_backward(moe_pick(KL_CPU, "chunk", &c.p, KL_BACKWARD), ctx_of[1], &c);
        for (size_t i = 0; i < g.total; i++)
            assert_true(isfinite(g.all[i]));
        free_gradients(g);
        free_case(&c);
    }
}

static void test_a_broken_token_breaks_only_itself(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 8);
    moe_case c = make_case(&rng, (moe_problem){.T = 40, .D = 16, .E = 6, .I = 8, .top_k = 3, .Is = 8, .renormalize = true});
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        results whole = run_forward(&v[i], ctx_of[2], &c);
        float kept = ((float *)c.x.stored)[17 * 16];
        ((float *)c.x.stored)[17 * 16] = NAN;
        results broken = run_forward(&v[i], ctx_of[2], &c);
        ((float *)c.x.stored)[17 * 16] = kept;
        for (size_t t = 0; t < 40; t++) {
            for (size_t d = 0; d < 16; d++)
                assert_true(t == 17 ? isnan(broken.y[t * 16 + d]) : fabsf(broken.y[t * 16 + d] - whole.y[t * 16 + d]) < 1e-5f);
            for (size_t k = 0; k < 3; k++)
                assert_in_range(broken.chosen[t * 3 + k], 0, 5);
            assert_true(broken.chosen[t * 3] != broken.chosen[t * 3 + 1] && broken.chosen[t * 3] != broken.chosen[t * 3 + 2]);
        }
        free_results(whole);
        free_results(broken);
    }
    free_case(&c);
}

/* However a prompt is cut, a token is routed alike, bit for bit: a flipped expert would be more than rounding. */
static void test_routing_does_not_depend_on_the_neighbours(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 9);
    moe_case c = make_case(&rng, (moe_problem){.T = 50, .D = 72, .E = 16, .I = 8, .top_k = 4, .renormalize = true, .router_dtype = KL_BF16});
    results whole = run_forward(moe_pick(KL_CPU, "chunk", &c.p, KL_FORWARD), ctx_of[2], &c);
    for (int64_t t = 0; t < 50; t++) {
        moe_case one = c;
        one.p.T = 1;
        one.p.x = (const float *)c.p.x + t * 72;
        results r = run_forward(moe_pick(KL_CPU, t % 2 ? "recurrent" : "chunk", &one.p, KL_FORWARD), ctx_of[1 + t % 3], &one);
        assert_memory_equal(r.chosen, whole.chosen + t * 4, 16);
        assert_memory_equal(r.weight, whole.weight + t * 4, 16);
        free_results(r);
    }
    free_results(whole);
    free_case(&c);
}

static void test_same_bits_whatever_the_thread_count(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 10);
    const moe_problem problems[] = {
        {.T = 301, .D = 100, .E = 8, .I = 96, .top_k = 3, .Is = 130, .renormalize = true, .weight_dtype = KL_BF16},
        {.T = 6, .D = 128, .E = 16, .I = 64, .top_k = 4, .Is = 64, .renormalize = true},
        {.T = 100, .D = 60, .Is = 200},
    };
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (size_t i = 0; i < sizeof problems / sizeof *problems; i++) {
        moe_case c = make_case(&rng, problems[i]);
        for (int n = 0; n < count; n++) {
            results one = run_forward(&v[n], ctx_of[1], &c);
            for (int threads = 1; threads <= 3; threads++) {
                results r = run_forward(&v[n], ctx_of[threads], &c);
                assert_memory_equal(r.y, one.y, one.n * 4);
                assert_memory_equal(r.weight, one.weight, one.slots * 4);
                free_results(r);
            }
            free_results(one);
            if (!v[n].backward)
                continue;
            gradients first = run_backward(&v[n], ctx_of[1], &c);
            for (int threads = 1; threads <= 3; threads++) {
                gradients g = run_backward(&v[n], ctx_of[threads], &c);
                assert_memory_equal(g.all, first.all, first.total * 4);
                free_gradients(g);
            }
            free_gradients(first);
        }
        free_case(&c);
    }
}

/* Any gradient may be absent; those that are there do not change. */
static void test_absent_gradients(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 11);
    moe_case c = make_case(&rng, (moe_problem){.T = 20, .D = 16, .E = 4, .I = 24, .top_k = 2, .Is = 8, .renormalize = true});
    const kl_variant *v = moe_pick(KL_CPU, "chunk", &c.p, KL_BACKWARD);
    gradients whole = run_backward(v, ctx_of[2], &c);
    for (int part = 0; part < PARTS; part++) {
        gradients some = make_gradients(&c.p, c.dy);
        moe_grads only = {.dy = c.dy};
        switch (part) {
        case 0: only.dx = some.g.dx; break;
        case 1: only.drouter = some.g.drouter; break;
        case 2: only.dw1 = some.g.dw1; break;
        case 3: only.dw3 = some.g.dw3; break;
        case 4: only.dw2 = some.g.dw2; break;
        case 5: only.dshared_w1 = some.g.dshared_w1; break;
        case 6: only.dshared_w3 = some.g.dshared_w3; break;
        case 7: only.dshared_w2 = some.g.dshared_w2; break;
        }
        assert_ok(backward(v, ctx_of[2], &c.p, &only));
        assert_memory_equal(some.all + some.start[part], whole.all + whole.start[part], some.size[part] * 4);
        free_gradients(some);
    }
    free_gradients(whole);
    free_case(&c);
}

/* ---- dispatch and refusals ---- */

static void test_dispatch(void **state)
{
    (void)state;
    moe_problem p = {.T = 1, .D = 8, .E = 2, .I = 8, .top_k = 1};
    assert_string_equal(moe_pick(KL_CPU, NULL, &p, KL_FORWARD)->name, "recurrent");
    assert_string_equal(moe_pick(KL_CPU, NULL, &p, KL_BACKWARD)->name, "chunk");
    p.T = 4096;
    assert_string_equal(moe_pick(KL_CPU, NULL, &p, KL_FORWARD)->name, "chunk");
    assert_string_equal(moe_pick(KL_CPU, "recurrent", &p, KL_FORWARD)->name, "recurrent");
    assert_null(moe_pick(KL_CPU, "nonesuch", &p, KL_FORWARD));
    kl_status s = moe_pick(KL_CPU, "recurrent", &p, KL_FORWARD)->check(&p, KL_BACKWARD);
    assert_int_equal(s.code, KL_EUNSUPPORTED);
    assert_non_null(strstr(s.message, "recurrent"));
    kl_cost one = moe_variants(NULL)->cost(&p, KL_FORWARD);
    assert_true(one.flops == 4096.0 * (2 * 2 * 8 + 6 * 8 * 8));
    assert_true(one.bytes == 4.0 * (2 * 4096 * 8 + 2 * 3 * 8 * 8 + 2 * 8));
}

static void test_refusals_name_the_argument(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(1, 12);
    moe_case c = make_case(&rng, (moe_problem){.T = 3, .D = 8, .E = 4, .I = 8, .top_k = 2, .Is = 8, .renormalize = true});
    float y[24];
    c.p.y = y;
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        moe_problem p;
#define REFUSED(word, ...) do { p = c.p; __VA_ARGS__; expect_refusal(forward(&v[i], ctx_of[1], &p), word); } while (0)
        REFUSED("dtype", p.dtype = KL_BF16);
        REFUSED("weight_dtype", p.weight_dtype = KL_I32);
        REFUSED("router_dtype", p.router_dtype = KL_F64);
        REFUSED("T:", p.T = -1);
        REFUSED("D:", p.D = 0);
        REFUSED("E:", p.E = -1);
        REFUSED("I:", p.I = 0);
        REFUSED("Is:", p.Is = -2);
        REFUSED("top_k", p.top_k = 0);
        REFUSED("top_k", p.top_k = 5);
        REFUSED("n_group", p.n_group = 3, p.topk_group = 1);
        REFUSED("topk_group", p.n_group = 2, p.topk_group = 3);
        REFUSED("top_k", p.n_group = 4, p.topk_group = 1);
        REFUSED("router_kind", p.router_kind = (moe_router)7);
        REFUSED("scale", p.scale = NAN);
        REFUSED("x:", p.x = NULL);
        REFUSED("y:", p.y = NULL);
        REFUSED("y:", p.y = (void *)p.x);
        REFUSED("router:", p.router = NULL);
        REFUSED("w1:", p.w1 = NULL);
        const void *holes[4] = {y, y, NULL, y};
        REFUSED("w2[2]", p.w2 = holes);
        REFUSED("shared_w3", p.shared_w3 = NULL);
        p = c.p;
        size_t need = v[i].workspace(ctx_of[1], &p, KL_FORWARD);
        assert_true(need > 0);
        void *workspace = poisoned(need);
        expect_refusal(v[i].forward(ctx_of[1], &p, workspace, need - 1), "workspace");
        expect_refusal(v[i].forward(ctx_of[1], &p, NULL, need), "workspace");
        expect_refusal(v[i].forward(NULL, &p, workspace, need), "ctx");
        expect_refusal(v[i].forward(ctx_of[1], NULL, workspace, need), "problem");
        free(workspace);
    }
    const kl_variant *chunk = moe_pick(KL_CPU, "chunk", &c.p, KL_BACKWARD);
    expect_refusal(backward(chunk, ctx_of[1], &c.p, &(moe_grads){0}), "dy");
    expect_refusal(backward(chunk, ctx_of[1], &c.p, &(moe_grads){.dy = c.dy, .dx = (void *)c.p.x}), "dx");
    expect_refusal(moe_validate_grads(&c.p, NULL), "grads");
    free_case(&c);
}

static void test_no_tokens(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(1, 13);
    moe_case c = make_case(&rng, (moe_problem){.T = 0, .D = 8, .E = 4, .I = 8, .top_k = 2, .Is = 8});
    check_all(&c, ctx_of[2]);
    c.p.x = NULL;
    size_t bytes = moe_workspace(ctx_of[1], &c.p, KL_FORWARD);
    void *workspace = poisoned(bytes);
    assert_ok(moe_forward(ctx_of[1], &c.p, workspace, bytes));
    free(workspace);
    free_case(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_problems),
        cmocka_unit_test(test_many_tiles),
        cmocka_unit_test(test_many_tokens),
        cmocka_unit_test(test_ties_go_to_the_lowest_index),
        cmocka_unit_test(test_groups_by_their_two_best),
        cmocka_unit_test(test_the_bias_chooses_but_does_not_weigh),
        cmocka_unit_test(test_all_tokens_to_one_expert),
        cmocka_unit_test(test_all_experts_and_one_expert),
        cmocka_unit_test(test_large_logits_stay_finite),
        cmocka_unit_test(test_a_broken_token_breaks_only_itself),
        cmocka_unit_test(test_routing_does_not_depend_on_the_neighbours),
        cmocka_unit_test(test_same_bits_whatever_the_thread_count),
        cmocka_unit_test(test_absent_gradients),
        cmocka_unit_test(test_dispatch),
        cmocka_unit_test(test_refusals_name_the_argument),
        cmocka_unit_test(test_no_tokens),
    };
    return cmocka_run_group_tests(tests, open_contexts, close_contexts);
}
