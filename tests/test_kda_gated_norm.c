/* The norm and output gate after the recurrence against their reference, on the CPU and as CUDA kernels. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>

#include "kda/gated_norm.h"
#include "tests/around_support.h"

/* ---- calls ---- */

/* Backward with gradients, forward without. */
static kl_status norm(kl_ctx *ctx, const kda_gated_norm_problem *given, const kda_gated_norm_grads *grads)
{
    mirror m = {.ctx = ctx};
    kda_gated_norm_problem p = *given;
    kda_gated_norm_grads g = grads ? *grads : (kda_gated_norm_grads){0};
    size_t bytes = (size_t)(p.rows * p.V) * kl_dtype_size(p.dtype);
    p.workspace_bytes = kda_gated_norm_workspace(ctx, &p, grads ? KL_BACKWARD : KL_FORWARD);
    unsigned char *workspace = open_workspace(p.workspace_bytes);
    p.workspace = lend(&m, workspace, p.workspace_bytes + GUARD);
    p.x = lend(&m, p.x, bytes);
    p.gate = lend(&m, p.gate, bytes);
    p.weight = lend(&m, p.weight, (size_t)p.V * kl_dtype_size(p.weight_dtype));
    p.y = lend(&m, p.y, bytes);
    g.dy = lend(&m, g.dy, bytes);
    g.dx = lend(&m, g.dx, bytes);
    g.dgate = lend(&m, g.dgate, bytes);
    g.dweight = lend(&m, g.dweight, (size_t)p.V * sizeof(float));
    kl_status s = grads ? kda_gated_norm_backward(ctx, &p, &g) : kda_gated_norm_forward(ctx, &p);
    take_back(&m);
    close_workspace(workspace, p.workspace_bytes);
    return s;
}
static kl_status norm_forward(kl_ctx *ctx, const kda_gated_norm_problem *p) { return norm(ctx, p, NULL); }
static kl_status norm_backward(kl_ctx *ctx, const kda_gated_norm_problem *p, const kda_gated_norm_grads *g) { return norm(ctx, p, g); }

/* ---- tests ---- */

static void check_norm(int64_t rows, int64_t V, kda_output_gate kind, int threads, uint64_t seed)
{
    kl_rng r = kl_rng_make(seed, 2);
    int64_t n = rows * V;
    bool gated = kind != KDA_OUT_NONE;
    float *x = normal(&r, n), *z = normal(&r, n), *weight = normal(&r, V), *dy = normal(&r, n), *y = poisoned(n), *dx = poisoned(n);
    float *dz = poisoned(n), *dw = calloc((size_t)V, sizeof(float));
    double *rx = widen(x, n), *rz = widen(z, n), *rw = widen(weight, V), *rdy = widen(dy, n);
    double *ry = ref_zeros(n), *rdx = ref_zeros(n), *rdz = ref_zeros(n), *rdw = ref_zeros(V);
    ref_gated_rmsnorm_forward(rows, V, 1e-5, (ref_output_gate)kind, rx, rw, rz, ry);
    ref_gated_rmsnorm_backward(rows, V, 1e-5, (ref_output_gate)kind, rx, rw, rz, rdy, rdx, rdw, rdz);
    kl_ctx *ctx = context(threads);
    kda_gated_norm_problem p = {.rows = rows, .V = V, .gate_kind = kind, .eps = 1e-5f, .x = x, .gate = gated ? z : NULL,
                                .weight = weight, .y = y};
    kda_gated_norm_grads g = {.dy = dy, .dx = dx, .dgate = gated ? dz : NULL, .dweight = dw};
    assert_ok(norm_forward(ctx, &p));
    assert_ok(norm_backward(ctx, &p, &g));
    assert_true(kl_within(kl_rel_err(y, ry, (size_t)n), kl_tol_kda_f32.forward));
    assert_true(kl_within(kl_rel_err(dx, rdx, (size_t)n), kl_tol_kda_f32.gradient));
    assert_true(kl_within(kl_rel_err(dw, rdw, (size_t)V), kl_tol_kda_f32.gradient));
    if (gated)
        assert_true(kl_within(kl_rel_err(dz, rdz, (size_t)n), kl_tol_kda_f32.gradient));
    /* y may be x, dx may be dy */
    p.y = x;
    g.dx = dy;
    assert_ok(norm_backward(ctx, &p, &g));
    assert_memory_equal(dy, dx, (size_t)n * sizeof(float));
    assert_ok(norm_forward(ctx, &p));
    assert_memory_equal(x, y, (size_t)n * sizeof(float));
    kl_ctx_destroy(ctx);
    FREE_ALL(x, z, weight, dy, y, dx, dz, dw, rx, rz, rw, rdy, ry, rdx, rdz, rdw);
}

static void agrees_with_the_reference(void **state)
{
    NEEDS_ITS_DEVICE();
    const int64_t widths[] = {2, 8, 60, 64, 128, 256, 300};
    uint64_t seed = 1;
    for (int kind = 0; kind < 3; kind++)
        for (size_t i = 0; i < 7; i++)
            for (int64_t rows = 1; rows < 400; rows = rows * 5 + 1)
                check_norm(rows, widths[i], (kda_output_gate)kind, 2, seed++);
}

static void does_not_depend_on_the_thread_count(void **state)
{
    NEEDS_ITS_DEVICE();
    enum { ROWS = 1000, V = 40 };
    kl_rng r = kl_rng_make(4, 4);
    float *x = normal(&r, ROWS * V), *z = normal(&r, ROWS * V), *dy = normal(&r, ROWS * V), weight[V], dw[4][V] = {{0}};
    kl_fill_normal(&r, weight, V, 0.0f, 1.0f);
    for (int threads = 1; threads <= 3; threads++) {
        kl_ctx *ctx = context(threads);
        kda_gated_norm_problem p = {.rows = ROWS, .V = V, .eps = 1e-5f, .x = x, .gate = z, .weight = weight};
        assert_ok(norm_backward(ctx, &p, &(kda_gated_norm_grads){.dy = dy, .dweight = dw[threads]}));
        assert_memory_equal(dw[threads], dw[1], sizeof dw[1]);
        kl_ctx_destroy(ctx);
    }
    free(x);
    free(z);
    free(dy);
}

static void refuses_by_name(void **state)
{
    NEEDS_ITS_DEVICE();
    float x[8] = {0}, w[8] = {0};
    kl_ctx *ctx = context(1);
    kda_gated_norm_problem good = {.rows = 1, .V = 8, .gate_kind = KDA_OUT_NONE, .eps = 1e-5f, .x = x, .weight = w, .y = x}, p;
    assert_ok(norm_forward(ctx, &good));
#define REFUSED(change, name)                                            \
    do {                                                                 \
        p = good;                                                        \
        change;                                                          \
        expect_error(kda_gated_norm_forward(ctx, &p), KL_EINVAL, name);  \
    } while (0)
    REFUSED(p.gate = x, "gate:");
    REFUSED(p.gate_kind = KDA_OUT_SWISH, "gate:");
    REFUSED(p.gate_kind = (kda_output_gate)7, "gate_kind");
    REFUSED(p.V = 0, "V:");
    REFUSED(p.eps = NAN, "eps");
    REFUSED(p.rows = -1, "rows");
    kl_ctx_destroy(ctx);
}

static void activations_in_bf16(void **state)
{
    NEEDS_ITS_DEVICE();
    enum { ROWS = 150 };
    for (int64_t V = 100; V <= 128; V += 28) {
        int64_t n = ROWS * V;
        kl_rng r = kl_rng_make(9, (uint64_t)V);
        float *x = normal(&r, n), *z = normal(&r, n), *dy = normal(&r, n), *weight = normal(&r, V), *y = poisoned(n), *dx = poisoned(n), *dz = poisoned(n);
        float *wide = poisoned(n), *dw = calloc((size_t)V, sizeof *dw), *dw16 = calloc((size_t)V, sizeof *dw);
        uint16_t *x16 = rounded(x, n), *z16 = rounded(z, n), *dy16 = rounded(dy, n), *y16 = malloc((size_t)n * 2), *dz16 = malloc((size_t)n * 2);
        kda_gated_norm_problem p = {.rows = ROWS, .V = V, .eps = 1e-5f, .x = x, .gate = z, .weight = weight, .y = y}, p16 = p;
        kda_gated_norm_grads g = {.dy = dy, .dx = dx, .dgate = dz, .dweight = dw}, g16 = {.dy = dy16, .dx = dy16, .dgate = dz16, .dweight = dw16};
        p16.dtype = KL_BF16;
        p16.x = x16;
        p16.gate = z16;
        p16.y = y16;
        kl_ctx *ctx = context(1);
        assert_ok(norm_forward(ctx, &p));
        assert_ok(norm_backward(ctx, &p, &g));
        assert_ok(norm_forward(ctx, &p16));
        assert_ok(norm_backward(ctx, &p16, &g16));
        widened(wide, y16, n);
        assert_true(kl_within(kl_rel_err_f32(wide, y, (size_t)n), kl_tol_kda_bf16.forward));
        widened(wide, dy16, n);
        assert_true(kl_within(kl_rel_err_f32(wide, dx, (size_t)n), kl_tol_kda_bf16.gradient));
        widened(wide, dz16, n);
        assert_true(kl_within(kl_rel_err_f32(wide, dz, (size_t)n), kl_tol_kda_bf16.gradient));
        assert_memory_equal(dw16, dw, (size_t)V * sizeof *dw);
        kl_ctx_destroy(ctx);
        FREE_ALL(x, z, dy, weight, y, dx, dz, wide, dw, dw16, x16, z16);
    }
}


static void bf16_is_refused_on_the_cpu(void **state)
{
    (void)state;
    float x[8] = {0}, y[8], weight[8] = {0};
    kl_ctx *ctx = context(1);
    kda_gated_norm_problem p = {.rows = 1, .V = 8, .gate_kind = KDA_OUT_NONE, .dtype = KL_BF16, .x = x, .y = y, .weight = weight};
    expect_error(kda_gated_norm_forward(ctx, &p), KL_EUNSUPPORTED, "dtype:");
    kl_ctx_destroy(ctx);
}

static void a_missing_workspace_is_refused(void **state)
{
    NEEDS_ITS_DEVICE();
    float x[8] = {0}, y[8], weight[8] = {0};
    kl_ctx *ctx = context(1);
    kda_gated_norm_problem p = {.rows = 1, .V = 8, .gate_kind = KDA_OUT_NONE, .x = x, .weight = weight};
    expect_error(kda_gated_norm_backward(ctx, &p, &(kda_gated_norm_grads){.dy = y, .dx = y, .dweight = weight}), KL_EINVAL, "workspace:");
    kl_ctx_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest cpu[] = {
        cmocka_unit_test(agrees_with_the_reference),
        cmocka_unit_test(does_not_depend_on_the_thread_count),
        cmocka_unit_test(refuses_by_name),
        cmocka_unit_test(bf16_is_refused_on_the_cpu),
    };
    const struct CMUnitTest cuda[] = {
        cmocka_unit_test(agrees_with_the_reference),
        cmocka_unit_test(activations_in_bf16),
        cmocka_unit_test(refuses_by_name),
        cmocka_unit_test(a_missing_workspace_is_refused),
    };
    int failed = cmocka_run_group_tests_name("kda_gated_norm", cpu, on_cpu, NULL);
    return failed + cmocka_run_group_tests_name("kda_gated_norm on cuda", cuda, on_cuda, NULL);
}
