/* The mixture of experts on a device, every variant against the reference on the same rounded numbers. On an emulated device the
 * kernels run on the host, so that this needs no GPU; with one, it runs there. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "tests/device_case.h"

/* ---- running ---- */

static void build(kl_case *c, kl_moe_spec spec)
{
    spec.seed = spec.seed ? spec.seed : 1;
    spec.weight_dtype = KL_BF16;
    assert_ok(kl_case_moe(c, &spec));
    assert_ok(kl_case_place(c, &(kl_placement){.dtype = KL_BF16}, NULL));
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

static void check_pass(kl_case *c, kl_pass pass)
{
    int count, ran = 0;
    const kl_variant *v = moe_variants(&count);
    assert_ok(kl_case_run(ctx, c, &kl_reference_moe, pass, &scratch));
    assert_ok(kl_case_keep(c, pass));
    for (int i = 0; i < count; i++) {
        if (!offered(c, &v[i], pass))
            continue;
        const char *tensor;
        assert_ok(kl_case_run(ctx, c, &v[i], pass, &scratch));
        double err = kl_case_worst(c, pass, &tensor), limit = pass == KL_BACKWARD ? c->tolerance.gradient : c->tolerance.forward;
        if (!kl_within(err, limit))
            fail_msg("%s: %s: %s: error %.3g, limit %.3g", c->name, v[i].name, tensor, err, limit);
        ran++;
    }
    assert_true(ran > 0);
}

static void check(kl_moe_spec spec)
{
    kl_case c;
    build(&c, spec);
    assert_ok(kl_case_upload(ctx, &c));
    check_pass(&c, KL_FORWARD);
    if (spec.backward)
        check_pass(&c, KL_BACKWARD);
    kl_case_free(&c);
}

/* ---- against the reference ---- */

static void presets(void **state)
{
    NEEDS_DEVICE();
    check((kl_moe_spec){.T = 5, .D = 96, .E = 8, .I = 48, .top_k = 2, .Is = 48, .renormalize = true, .scale = 2.446f, .backward = true});
    check((kl_moe_spec){.T = 40, .D = 128, .E = 4, .I = 64, .top_k = 2, .Is = 64, .renormalize = true, .scale = 2.446f});
    check((kl_moe_spec){.T = 3, .D = 512, .E = 16, .I = 176, .top_k = 4, .Is = 176, .renormalize = true, .scale = 2.446f});
}

static void one_token(void **state)
{
    NEEDS_DEVICE();
    for (int64_t k = 1; k <= 8; k++)
        check((kl_moe_spec){.T = 1, .D = 64, .E = 8, .I = 40, .top_k = k, .Is = k % 2 ? 24 : 0, .renormalize = k > 1});
}

/* As many as the recurrent form takes. */
static void a_few_tokens(void **state)
{
    NEEDS_DEVICE();
    check((kl_moe_spec){.T = 8, .D = 264, .E = 8, .I = 72, .top_k = 2, .Is = 40, .renormalize = true});
    check((kl_moe_spec){.T = 3, .D = 1032, .E = 3, .I = 520, .top_k = 1});
    check((kl_moe_spec){.T = 2, .D = 64, .E = 16, .I = 40, .top_k = 3, .n_group = 4, .topk_group = 2, .router_kind = MOE_SOFTMAX});
}

static void no_token(void **state)
{
    NEEDS_DEVICE();
    check((kl_moe_spec){.T = 0, .D = 64, .E = 8, .I = 40, .top_k = 2, .Is = 8, .backward = true});
}

static void experts_that_are_no_power_of_two(void **state)
{
    NEEDS_DEVICE();
    check((kl_moe_spec){.T = 33, .D = 72, .E = 5, .I = 40, .top_k = 3, .renormalize = true, .backward = true});
    check((kl_moe_spec){.T = 7, .D = 8, .E = 67, .I = 8, .top_k = 32, .Is = 16, .renormalize = true});
}

static void groups_softmax_and_biased_weights(void **state)
{
    NEEDS_DEVICE();
    check((kl_moe_spec){.T = 35, .D = 64, .E = 16, .I = 24, .top_k = 4, .n_group = 4, .topk_group = 2, .renormalize = true});
    check((kl_moe_spec){.T = 18, .D = 64, .E = 12, .I = 24, .top_k = 3, .n_group = 3, .topk_group = 1, .router_kind = MOE_SOFTMAX, .biased_weights = true, .renormalize = true, .backward = true});
    check((kl_moe_spec){.T = 18, .D = 64, .E = 40, .I = 24, .top_k = 6, .router_kind = MOE_SOFTMAX, .scale = 1.5f});
}

static void shared_expert_alone(void **state)
{
    NEEDS_DEVICE();
    check((kl_moe_spec){.T = 9, .D = 256, .Is = 1024});
    check((kl_moe_spec){.T = 230, .D = 64, .Is = 136, .backward = true});
}

/* Few experts with many tokens: pairs of blocks share weights. */
static void many_rows_an_expert(void **state)
{
    NEEDS_DEVICE();
    check((kl_moe_spec){.T = 420, .D = 72, .E = 2, .I = 136, .top_k = 1, .Is = 72, .backward = true});
    check((kl_moe_spec){.T = 150, .D = 264, .E = 2, .I = 40, .top_k = 2, .renormalize = true});
}

/* ---- choices ---- */

typedef struct choices {
    int32_t *id;
    float *weight, *y;
} choices;

/* The default variant on the case's problem from token t on. */
static choices run_choices(const kl_case *c, int64_t t, int64_t count)
{
    moe_problem p = *(const moe_problem *)kl_case_problem(c, KL_CUDA);
    size_t n = (size_t)(count * p.top_k), wide = (size_t)(count * p.D);
    choices got = {malloc(n * 4), malloc(n * 4), malloc(wide * 4)};
    uint16_t *y = malloc(wide * 2);
    void *workspace;
    p.T = count;
    p.x = (const uint16_t *)p.x + t * p.D;
    size_t bytes = moe_workspace(ctx, &p, KL_FORWARD);
    assert_ok(kl_gpu_alloc(ctx, &workspace, bytes));
    assert_ok(kl_gpu_alloc(ctx, (void **)&p.chosen, n * 4));
    assert_ok(kl_gpu_alloc(ctx, (void **)&p.chosen_weight, n * 4));
    assert_ok(kl_gpu_alloc(ctx, &p.y, wide * 2));
    assert_ok(moe_forward(ctx, &p, workspace, bytes));
    assert_ok(kl_gpu_copy(ctx, got.id, p.chosen, n * 4));
    assert_ok(kl_gpu_copy(ctx, got.weight, p.chosen_weight, n * 4));
    assert_ok(kl_gpu_copy(ctx, y, p.y, wide * 2));
    kl_to_f32(got.y, y, KL_BF16, wide);
    kl_gpu_free(ctx, p.chosen);
    kl_gpu_free(ctx, p.chosen_weight);
    kl_gpu_free(ctx, p.y);
    kl_gpu_free(ctx, workspace);
    free(y);
    return got;
}

static void forget(choices c)
{
    free(c.id);
    free(c.weight);
    free(c.y);
}

static float *host(const void *tensor) { return (float *)tensor; }

static void among_equals_the_lowest_index_wins(void **state)
{
    NEEDS_DEVICE();
    kl_case c;
    build(&c, (kl_moe_spec){.T = 3, .D = 64, .E = 40, .I = 8, .top_k = 6, .renormalize = true});
    memset(host(c.problem.moe.router), 0, 40 * 64 * sizeof(float));
    memset(host(c.problem.moe.bias), 0, 40 * sizeof(float));
    host(c.problem.moe.bias)[35] = 1.0f;
    assert_ok(kl_case_upload(ctx, &c));
    choices got = run_choices(&c, 0, 3);
    for (int i = 0; i < 18; i++) {
        assert_int_equal(got.id[i], i % 6 ? i % 6 - 1 : 35);
        assert_true(fabsf(got.weight[i] - 1.0f / 6.0f) < 1e-6f);
    }
    forget(got);
    kl_case_free(&c);
}

static void all_tokens_to_one_expert(void **state)
{
    NEEDS_DEVICE();
    kl_case c;
    build(&c, (kl_moe_spec){.T = 70, .D = 64, .E = 8, .I = 40, .top_k = 1, .renormalize = true});
    host(c.problem.moe.bias)[5] = 10.0f;
    assert_ok(kl_case_upload(ctx, &c));
    check_pass(&c, KL_FORWARD);
    choices got = run_choices(&c, 0, 70);
    for (int i = 0; i < 70; i++)
        assert_int_equal(got.id[i], 5);
    forget(got);
    kl_case_free(&c);
}

/* Scores of 0 and 1 exactly, whatever the logits were. */
static void very_large_logits(void **state)
{
    NEEDS_DEVICE();
    kl_case c;
    build(&c, (kl_moe_spec){.T = 4, .D = 64, .E = 16, .I = 8, .top_k = 8, .renormalize = true});
    float *router = host(c.problem.moe.router), *x = host(c.problem.moe.x), *bias = host(c.problem.moe.bias);
    memset(bias, 0, 16 * sizeof(float));
    for (int i = 0; i < 16 * 64; i++)
        router[i] = i / 64 % 2 ? 1e4f : -1e4f;
    for (int i = 0; i < 4 * 64; i++)
        x[i] = i / 64 % 2 ? 512.0f : -512.0f;
    assert_ok(kl_case_place(&c, &(kl_placement){.dtype = KL_BF16}, NULL));
    assert_ok(kl_case_upload(ctx, &c));
    choices got = run_choices(&c, 0, 4);
    for (int i = 0; i < 4 * 8; i++) {
        assert_int_equal(got.id[i], i % 8 * 2 + i / 8 % 2);
        assert_true(got.weight[i] == 0.125f);
    }
    for (int i = 0; i < 4 * 64; i++)
        assert_true(isfinite(got.y[i]));
    forget(got);
    kl_case_free(&c);
}

static void routing_depends_on_the_token_alone(void **state)
{
    NEEDS_DEVICE();
    kl_case c;
    build(&c, (kl_moe_spec){.T = 300, .D = 136, .E = 12, .I = 8, .top_k = 4, .renormalize = true});
    assert_ok(kl_case_upload(ctx, &c));
    choices all = run_choices(&c, 0, 300);
    for (int64_t t = 1; t < 300; t += 149) {
        choices one = run_choices(&c, t, 1);
        assert_memory_equal(one.id, all.id + t * 4, 16);
        assert_memory_equal(one.weight, all.weight + t * 4, 16);
        forget(one);
    }
    forget(all);
    kl_case_free(&c);
}

/* ---- what is refused ---- */

/* The baseline takes experts that lie anywhere. */
static void anywhere_for_cublas(const moe_problem *p)
{
    const kl_variant *v = moe_pick(KL_CUDA, "cublas", p, KL_FORWARD);
    size_t bytes = v->workspace(ctx, p, KL_FORWARD);
    void *workspace;
    assert_ok(kl_gpu_alloc(ctx, &workspace, bytes));
    assert_ok(v->forward(ctx, p, workspace, bytes));
    assert_ok(kl_gpu_sync(ctx));
    kl_gpu_free(ctx, workspace);
}

static void refusals(void **state)
{
    NEEDS_DEVICE();
    kl_case c;
    build(&c, (kl_moe_spec){.T = 2, .D = 64, .E = 4, .I = 8, .top_k = 2});
    assert_ok(kl_case_upload(ctx, &c));
    moe_problem good = *(const moe_problem *)kl_case_problem(&c, KL_CUDA), p = good;
    const void *uneven[] = {good.w2[0], good.w2[2], good.w2[1], good.w2[3]};
    const kl_variant *v = moe_pick(KL_CUDA, "chunk", &p, KL_FORWARD);
    size_t bytes = v->workspace(ctx, &p, KL_FORWARD);
    void *workspace;
    assert_ok(kl_gpu_alloc(ctx, &workspace, bytes));
    assert_ok(v->forward(ctx, &p, workspace, bytes));
    expect_error(v->forward(ctx, &p, workspace, bytes - 64), KL_EINVAL, "moe: workspace: expected");
    p.D = 60;
    expect_error(v->forward(ctx, &p, workspace, bytes), KL_EUNSUPPORTED, "D: expected a multiple of 8");
    p = good, p.weight_dtype = KL_F16;
    expect_error(v->forward(ctx, &p, workspace, bytes), KL_EUNSUPPORTED, "weight_dtype: expected bfloat16");
    p = good, p.y = NULL;
    expect_error(v->forward(ctx, &p, workspace, bytes), KL_EINVAL, "y: expected");
    p = good, p.x = (const char *)good.x + 2;
    expect_error(v->forward(ctx, &p, workspace, bytes), KL_EINVAL, "x: expected an address");
    p = good, p.w2 = uneven;
    expect_error(v->forward(ctx, &p, workspace, bytes), KL_EUNSUPPORTED, "w2: expected experts at even distances");
    anywhere_for_cublas(&p);
    kl_gpu_free(ctx, workspace);
    kl_case_free(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(presets),
        cmocka_unit_test(one_token),
        cmocka_unit_test(a_few_tokens),
        cmocka_unit_test(no_token),
        cmocka_unit_test(experts_that_are_no_power_of_two),
        cmocka_unit_test(groups_softmax_and_biased_weights),
        cmocka_unit_test(shared_expert_alone),
        cmocka_unit_test(many_rows_an_expert),
        cmocka_unit_test(among_equals_the_lowest_index_wins),
        cmocka_unit_test(all_tokens_to_one_expert),
        cmocka_unit_test(very_large_logits),
        cmocka_unit_test(routing_depends_on_the_token_alone),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
