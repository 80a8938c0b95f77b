/* The fused projection and cross-entropy of the CPU's table of operations: against the naive reference, over thread counts, bounded in
 * memory, and by finite differences through norm and embedding. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "reference/linear.h"
#include "reference/loss.h"
#include "tests/ops_support.h"

typedef struct loss_case {
    int64_t T, vocab, D, counted;
    int32_t *targets;
    int64_t *targets64;
    kl_param w;
    float *x;
    double *wd, *xd;
} loss_case;

static loss_case make_loss(int64_t T, int64_t vocab, int64_t D, kl_dtype dtype, float deviation)
{
    loss_case c = {.T = T, .vocab = vocab, .D = D};
    c.targets = malloc((size_t)(T + 1) * 4);
    c.targets64 = malloc((size_t)(T + 1) * 8);
    for (int64_t t = 0; t < T; t++) {
        c.targets64[t] = c.targets[t] = (int32_t)kl_rng_below(&rng, (uint64_t)vocab + 1) - 1;
        if (kl_rng_below(&rng, 4) == 0)
            c.targets64[t] = c.targets[t] = -1;
        c.counted += c.targets[t] >= 0;
    }
    c.w = parameter(dtype, vocab, D, deviation, &c.wd);
    c.x = floats((size_t)(T * D), 1.0f);
    c.xd = exact(c.x, (size_t)(T * D));
    return c;
}

static void free_loss(loss_case *c)
{
    free(c->targets), free(c->targets64), free(c->w.data), free(c->x), free(c->wd), free(c->xd);
}

static double run_loss(kl_ctx *ctx, const loss_case *c, float grad_scale, float *dx, kl_param *dw)
{
    size_t bytes = ops->head_loss_workspace(ctx, &c->w, c->T);
    void *workspace;
    assert_ok(ops->alloc(ctx, &workspace, bytes));
    memset(workspace, 0xff, bytes);
    double loss = NAN;
    int64_t counted = -1;
    assert_ok(ops->head_loss(ctx, &c->w, c->T, c->x, c->targets, &loss, &counted, grad_scale, dx, dw, workspace, bytes));
    assert_int_equal(counted, c->counted);
    ops->release(ctx, workspace);
    return loss;
}

static void check_loss(int64_t T, int64_t vocab, int64_t D, kl_dtype dtype, float deviation)
{
    loss_case c = make_loss(T, vocab, D, dtype, deviation);
    size_t nx = (size_t)(T * D), nw = (size_t)(vocab * D), nl = (size_t)(T * vocab);
    double *logits = calloc(nl + 1, 8), *dlogits = calloc(nl + 1, 8), *dxd = calloc(nx + 1, 8), *dwd = calloc(nw + 1, 8);
    ref_linear_forward(T, D, vocab, c.xd, c.wd, logits);
    double expected = ref_cross_entropy_forward(T, vocab, logits, c.targets64) * (double)c.counted;
    float grad_scale = c.counted ? 3.0f / (float)c.counted : 1.0f; /* 3 times the mean */
    ref_cross_entropy_backward(T, vocab, logits, c.targets64, 3.0, dlogits);
    ref_linear_backward(T, D, vocab, c.xd, c.wd, dlogits, dxd, dwd);
    for (size_t i = 0; i < nw; i++)
        dwd[i] += 1.0;
    float *kept_dx = NULL, *kept_dw = NULL;
    double kept_loss = 0.0;
    for (int threads = 1; threads <= 3; threads++) {
        float *dx = poisoned(nx);
        kl_param dw = {ones(nw), KL_F32, vocab, D};
        double loss = run_loss(ctx_of[threads], &c, grad_scale, dx, &dw);
        assert_true(fabs(loss - expected) <= 2e-6 * (fabs(expected) + (double)c.counted));
        close_to(dx, dxd, nx, 2e-5, "head_loss dx");
        close_to(dw.data, dwd, nw, 2e-5, "head_loss dw");
        assert_true(loss == run_loss(ctx_of[threads], &c, 1.0f, NULL, NULL));
        if (kept_dx) {
            assert_true(loss == kept_loss);
            assert_memory_equal(kept_dx, dx, nx * 4);
            assert_memory_equal(kept_dw, dw.data, nw * 4);
            free(dx), free(dw.data);
        } else {
            kept_dx = dx, kept_dw = dw.data, kept_loss = loss;
        }
    }
    free(kept_dx), free(kept_dw), free(logits), free(dlogits), free(dxd), free(dwd);
    free_loss(&c);
}

static void test_head_loss(void **state)
{
    (void)state;
    check_loss(0, 5, 8, KL_F32, 0.3f);
    check_loss(1, 1, 1, KL_F32, 0.3f);
    check_loss(3, 2, 7, KL_BF16, 0.3f);
    check_loss(50, 17, 24, KL_F16, 0.3f);
    check_loss(200, 300, 33, KL_BF16, 0.3f);
    check_loss(2100, 40, 16, KL_F32, 0.3f); /* more counted tokens than a tile holds */
    check_loss(40, 1000, 16, KL_F32, 30.0f); /* logits of several hundred: the exponentials would overflow unshifted */
}

static void test_head_loss_with_nothing_counted(void **state)
{
    (void)state;
    loss_case c = make_loss(10, 7, 8, KL_F32, 0.3f);
    for (int t = 0; t < 10; t++)
        c.targets[t] = -1;
    c.counted = 0;
    float *dx = poisoned(80);
    kl_param dw = {ones(56), KL_F32, 7, 8};
    assert_true(run_loss(ctx_of[2], &c, 1.0f, dx, &dw) == 0.0);
    for (int i = 0; i < 80; i++)
        assert_true(dx[i] == 0.0f);
    for (int i = 0; i < 56; i++)
        assert_true(((float *)dw.data)[i] == 1.0f);
    free(dx), free(dw.data);
    free_loss(&c);
}

/* Not all logits at once: at the released vocabulary, 65,536 tokens would take 40 GiB. */
static void test_head_loss_workspace_is_bounded(void **state)
{
    (void)state;
    kl_param w = {NULL, KL_BF16, 163840, 2304};
    assert_in_range(ops->head_loss_workspace(ctx_of[1], &w, 65536), 1, (size_t)96 << 20);
}

/* ---- the loss of head, norm and embedding together ---- */

/* loss(head, norm, embedding) along a random direction: (L(h) - L(-h)) / 2h against the product of gradient and direction. */
typedef struct chain {
    int64_t T, vocab, D;
    int32_t ids[24], targets[24];
    kl_param embed, norm, head;
} chain;

static double chain_loss(const chain *c, kl_param *dembed, kl_param *dnorm, kl_param *dhead)
{
    size_t n = (size_t)(c->T * c->D);
    float *x = poisoned(n), *y = poisoned(n), *dy = poisoned(n), *dx = poisoned(n);
    void *workspace;
    size_t bytes = ops->head_loss_workspace(ctx_of[2], &c->head, c->T);
    double loss;
    int64_t counted;
    assert_ok(ops->alloc(ctx_of[2], &workspace, bytes));
    assert_ok(ops->embed(ctx_of[2], &c->embed, c->ids, c->T, x));
    assert_ok(ops->rmsnorm(ctx_of[2], &c->norm, 1e-5f, c->T, c->D, x, c->D, y, c->D));
    assert_ok(ops->head_loss(ctx_of[2], &c->head, c->T, y, c->targets, &loss, &counted, 1.0f, dembed ? dy : NULL, dhead, workspace, bytes));
    if (dembed) {
        assert_ok(ops->rmsnorm_backward(ctx_of[2], &c->norm, 1e-5f, c->T, c->D, x, c->D, dy, c->D, dx, c->D, false, dnorm));
        assert_ok(ops->embed_backward(ctx_of[2], dembed, c->ids, c->T, dx));
    }
    ops->release(ctx_of[2], workspace);
    free(x), free(y), free(dy), free(dx);
    return loss;
}

static void test_finite_differences(void **state)
{
    (void)state;
    chain c = {.T = 24, .vocab = 11, .D = 12};
    double *unused;
    c.embed = parameter(KL_F32, c.vocab, c.D, 1.0f, &unused), free(unused);
    c.norm = parameter(KL_F32, 1, c.D, 1.0f, &unused), free(unused);
    c.head = parameter(KL_F32, c.vocab, c.D, 0.5f, &unused), free(unused);
    for (int t = 0; t < 24; t++) {
        c.ids[t] = (int32_t)kl_rng_below(&rng, 11);
        c.targets[t] = (int32_t)kl_rng_below(&rng, 12) - 1;
    }
    kl_param *weight[3] = {&c.embed, &c.norm, &c.head}, grad[3];
    for (int i = 0; i < 3; i++) {
        grad[i] = *weight[i];
        grad[i].data = calloc((size_t)(grad[i].rows * grad[i].columns), 4);
    }
    chain_loss(&c, &grad[0], &grad[1], &grad[2]);
    for (int i = 0; i < 3; i++) {
        size_t n = (size_t)(grad[i].rows * grad[i].columns);
        float *w = weight[i]->data, *before = malloc(n * 4), *g = grad[i].data, h = 1e-2f;
        memcpy(before, w, n * 4);
        /* along the gradient itself, so that nothing cancels */
        double norm = 0.0, slope = 0.0, loss[2];
        for (size_t j = 0; j < n; j++)
            norm += (double)g[j] * (double)g[j];
        norm = sqrt(norm);
        for (int side = 0; side < 2; side++) {
            for (size_t j = 0; j < n; j++)
                w[j] = before[j] + (side ? h : -h) * g[j] / (float)norm;
            loss[side] = chain_loss(&c, NULL, NULL, NULL);
        }
        memcpy(w, before, n * 4);
        slope = (loss[1] - loss[0]) / (2.0 * (double)h);
        if (!(fabs(slope - norm) <= 2e-3 * norm))
            fail_msg("parameter %d: slope %g along a gradient of length %g", i, slope, norm);
        free(before), free(grad[i].data);
    }
    free(c.embed.data), free(c.norm.data), free(c.head.data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_head_loss),
        cmocka_unit_test(test_head_loss_with_nothing_counted),
        cmocka_unit_test(test_head_loss_workspace_is_bounded),
        cmocka_unit_test(test_finite_differences),
    };
    return cmocka_run_group_tests(tests, open_ops, close_contexts);
}
