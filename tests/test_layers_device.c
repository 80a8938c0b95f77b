/* The operations around the families as CUDA kernels, where those run on the host (make EMULATE=1), against their references. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>

#include "harness/layers_case.h"
#include "reference/optimizer.h"
#include "tests/device.h"
#include "tests/expect.h"

static void score(const layers_case *c, kl_pass pass)
{
    const char *tensor;
    const kl_tolerance *limit = layers_case_tolerance(c);
    double err = layers_case_worst(c, pass, &tensor), most = pass == KL_BACKWARD ? limit->gradient : limit->forward;
    if (!kl_within(err, most))
        fail_msg("%s %s: error %.2e of %s, %.2e allowed", c->name, pass == KL_BACKWARD ? "backward" : "forward", err, tensor, most);
}

/* Both passes, right, and the same bits twice. */
static void check(layers_spec *spec)
{
    if (!ctx)
        skip();
    layers_case c;
    spec->seed = 7;
    spec->backward = layers_has_backward(spec->p.op);
    assert_ok(layers_case_create(&c, ctx, spec));
    const kl_variant *v = layers_pick(KL_CUDA, spec->p.op);
    assert_non_null(v);
    for (kl_pass pass = KL_FORWARD; pass <= (c.backward ? KL_BACKWARD : KL_FORWARD); pass++) {
        static float first[LAYERS_TENSORS][1 << 14];
        assert_ok(layers_case_solve(&c, pass));
        for (int turn = 0; turn < 2; turn++) {
            assert_ok(layers_case_run(&c, v, pass));
            for (int i = 0; i < c.count; i++) {
                size_t n = (size_t)(c.tensor[i].is.rows * c.tensor[i].is.columns) * sizeof(float);
                if (!layers_case_writes(&c.tensor[i], pass) || n > sizeof first[i])
                    continue;
                if (turn)
                    assert_memory_equal(c.tensor[i].out, first[i], n);
                memcpy(first[i], c.tensor[i].out, n);
            }
        }
        score(&c, pass);
    }
    layers_case_free(&c);
}

static const kl_dtype pairs[3][2] = {{KL_BF16, KL_BF16}, {KL_F32, KL_BF16}, {KL_F32, KL_F32}};

static void rmsnorm(void **state)
{
    (void)state;
    static const struct { int64_t T, D, gap; bool residual; } shape[] = {{37, 264, 0, true}, {5, 2304, 0, true}, {9, 512, 64, false}, {3, 70, 3, true}, {0, 64, 0, true}};
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int t = 0; t < 3; t++) {
            int64_t D = shape[i].D, stride = shape[i].gap ? D + shape[i].gap : 0;
            void *wanted = shape[i].residual ? LAYERS_WANTED : NULL;
            layers_spec s = {.p = {.op = LAYERS_RMSNORM, .rmsnorm = {.T = shape[i].T, .D = D, .eps = 1e-5f, .x_dtype = pairs[t][0], .y_dtype = pairs[t][1], .weight_dtype = pairs[t][1],
                                                                    .x_stride = stride, .y_stride = stride, .add = wanted, .sum = wanted}},
                             .g.rmsnorm = {.dsum = wanted, .dx = LAYERS_WANTED, .dweight = LAYERS_WANTED}};
            check(&s);
        }
}

/* Few ids, so that some reach across runs; many tokens of one id; widths of cells and not. */
static void embed(void **state)
{
    (void)state;
    static const int64_t shape[][3] = {{100, 264, 5}, {33, 60, 1}, {7, 8, 40}, {0, 8, 4}};
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int t = 0; t < 2; t++) {
            layers_spec s = {.p = {.op = LAYERS_EMBED, .embed = {.T = shape[i][0], .D = shape[i][1], .vocab = shape[i][2], .dtype = pairs[2 * t][1], .weight_dtype = pairs[t][0]}}};
            check(&s);
        }
}

/* An id from nowhere: NaN, and no gradient. */
static void embed_refuses_by_nan(void **state)
{
    NEEDS_DEVICE();
    layers_spec s = {.p = {.op = LAYERS_EMBED, .embed = {.T = 3, .D = 8, .vocab = 4, .dtype = KL_F32, .weight_dtype = KL_F32}}, .backward = true, .seed = 1};
    layers_case c;
    assert_ok(layers_case_create(&c, ctx, &s));
    static const double ids[] = {-1, 2, 4};
    memcpy(c.tensor[0].given, ids, sizeof ids);
    const kl_variant *v = layers_pick(KL_CUDA, LAYERS_EMBED);
    assert_ok(layers_case_run(&c, v, KL_FORWARD));
    for (int i = 0; i < 24; i++)
        assert_int_equal(isnan(c.tensor[2].out[i]) != 0, i / 8 != 1);
    assert_ok(layers_case_run(&c, v, KL_BACKWARD));
    for (int i = 0; i < 32; i++)
        assert_true(c.tensor[4].out[i] == (float)(c.tensor[4].given[i] + (i / 8 == 2 ? c.tensor[3].given[8 + i % 8] : 0.0)));
    layers_case_free(&c);
}

static void swiglu(void **state)
{
    (void)state;
    static const int64_t shape[][3] = {{5, 1032, 2064}, {3, 35, 0}, {2, 64, 70}};
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int t = 0; t < 2; t++) {
            layers_spec s = {.p = {.op = LAYERS_SWIGLU, .swiglu = {.T = shape[i][0], .I = shape[i][1], .dtype = pairs[t][0], .in_stride = shape[i][2], .y = LAYERS_WANTED}}};
            check(&s);
        }
}

static void linear(void **state)
{
    (void)state;
    for (int t = 0; t < 3; t++)
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            layers_spec s = {.p = {.op = LAYERS_LINEAR, .linear = {.T = 19, .N = 33, .K = 24, .x_dtype = pairs[t][0], .y_dtype = pairs[t][1], .weight_dtype = pairs[t][0],
                                                                  .x_stride = accumulate ? 30 : 0, .y_stride = accumulate ? 40 : 0, .accumulate = accumulate}},
                             .g.linear = {.dx = LAYERS_WANTED, .dweight = LAYERS_WANTED, .accumulate = accumulate}};
            check(&s);
        }
}

static void mlp(void **state)
{
    (void)state;
    for (int t = 0; t < 2; t++) {
        kl_dtype type = t ? KL_F32 : KL_BF16;
        layers_spec s = {.p = {.op = LAYERS_MLP, .mlp = {.T = 21, .D = 24, .I = 40, .dtype = type, .weight_dtype = type}},
                         .g.mlp = {.dx = LAYERS_WANTED, .dgate_up = LAYERS_WANTED, .ddown = LAYERS_WANTED, .accumulate = t}};
        check(&s);
    }
}

static void head_loss(void **state)
{
    (void)state;
    static const int64_t shape[][3] = {{6, 40, 333}, {3, 8, 1}, {2, 16, 64}};
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        layers_spec s = {.p = {.op = LAYERS_HEAD_LOSS, .head_loss = {.T = shape[i][0], .D = shape[i][1], .vocab = shape[i][2], .x_dtype = pairs[i][0], .weight_dtype = pairs[i][1],
                                                                    .grad_scale = 0.25f, .loss = i ? NULL : LAYERS_WANTED, .sum = LAYERS_WANTED}},
                         .g.head_loss = {.dx = LAYERS_WANTED, .dweight = LAYERS_WANTED}};
        check(&s);
    }
}

static void optimizers(void **state)
{
    (void)state;
    static const int64_t shape[][2] = {{24, 40}, {51, 23}};
    for (int i = 0; i < 2; i++) {
        int64_t R = shape[i][0], C = shape[i][1];
        void *wanted = i ? NULL : LAYERS_WANTED;
        layers_spec adamw = {.p = {.op = LAYERS_ADAMW, .adamw = {.n = R * C, .step = 3, .lr = 0.1, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .clip = 1.0,
                                                                 .g_dtype = pairs[i][0], .sumsq = wanted, .copy = wanted}}};
        layers_spec muon = {.p = {.op = LAYERS_MUON, .muon = {.rows = R, .columns = C, .count = i ? 2 : 0, .lr = 1.0, .momentum = 0.95, .decay = 0.1, .clip = 1.0, .g_dtype = pairs[i][0],
                                                              .sumsq = wanted, .copy = wanted}}};
        layers_spec sumsq = {.p = {.op = LAYERS_SUMSQ, .sumsq = {.n = R * C, .dtype = pairs[i][0], .accumulate = i}}};
        check(&adamw);
        check(&muon);
        check(&sumsq);
    }
}

/* Five steps leave every singular value near 1, whatever it was: here those of a diagonal matrix, and of a rotated one. */
static void newton_schulz(void **state)
{
    (void)state;
    double X[3 * 4] = {5, 0, 0, 0, 0, 0.5, 0, 0, 0, 0, 0.3, 0}, Y[2 * 2] = {0.6, -0.8, 1.6, 1.2};
    assert_int_equal(ref_orthogonalise(3, 4, 5, X), 0);
    for (int i = 0; i < 12; i++)
        assert_true(i % 5 == 0 && i < 11 ? X[i] > 0.65 && X[i] < 1.25 : X[i] == 0.0);
    assert_int_equal(ref_orthogonalise(2, 2, 5, Y), 0);
    double s0 = Y[0] * 0.6 - Y[1] * 0.8, s1 = Y[2] * 0.8 + Y[3] * 0.6;
    assert_true(s0 > 0.65 && s0 < 1.25 && s1 > 0.65 && s1 < 1.25);
    assert_true(fabs(Y[0] * Y[2] + Y[1] * Y[3]) < 1e-12);
}

static void refusals(void **state)
{
    NEEDS_DEVICE();
    float x[8] = {0};
    const kl_variant *norm = layers_pick(KL_CUDA, LAYERS_RMSNORM), *adamw = layers_pick(KL_CUDA, LAYERS_ADAMW);
    layers_problem p = {.op = LAYERS_RMSNORM, .rmsnorm = {.T = 1, .D = 8, .x = x, .y = x}};
    expect_error(norm->forward(ctx, &p, NULL, 0), KL_EINVAL, "rmsnorm: weight: expected [1,8], got NULL");
    p.rmsnorm.weight = x;
    p.rmsnorm.x_stride = 7;
    expect_error(norm->forward(ctx, &p, NULL, 0), KL_EINVAL, "rmsnorm: x: expected a stride of 0 or at least 8, got 7");
    p.rmsnorm.x_stride = 0;
    p.rmsnorm.x_dtype = p.rmsnorm.y_dtype = KL_F16;
    expect_error(norm->forward(ctx, &p, NULL, 0), KL_EINVAL, "expected float32 or bfloat16, got float16");
    p.rmsnorm.x_dtype = p.rmsnorm.y_dtype = KL_F32;
    layers_grads g = {.rmsnorm = {.dy = x, .dx = x, .dweight = x}};
    expect_error(norm->backward(ctx, &p, &g, NULL, 0), KL_EINVAL, "rmsnorm: workspace: expected");
    p = (layers_problem){.op = LAYERS_ADAMW, .adamw = {.n = 1, .step = 0}};
    expect_error(adamw->forward(ctx, &p, NULL, 0), KL_EINVAL, "adamw: step: expected at least 1, got 0");
    expect_error(adamw->check(&p, KL_BACKWARD), KL_EUNSUPPORTED, "adamw has no backward pass");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rmsnorm),       cmocka_unit_test(embed),      cmocka_unit_test(embed_refuses_by_nan), cmocka_unit_test(swiglu),
        cmocka_unit_test(linear),        cmocka_unit_test(mlp),       cmocka_unit_test(head_loss),  cmocka_unit_test(optimizers),           cmocka_unit_test(newton_schulz),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, set_up_device, tear_down_device);
}
