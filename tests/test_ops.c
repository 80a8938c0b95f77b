/* The CPU's table of operations against the naive reference, and over thread counts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "common/blas.h"
#include "reference/linear.h"
#include "reference/loss.h"
#include "reference/norm.h"
#include "tests/ops_support.h"

/* ---- embedding ---- */

static void test_embed(void **state)
{
    (void)state;
    int64_t T = 500, vocab = 37, D = 100;
    int32_t ids[500];
    int64_t ids64[500];
    for (int64_t t = 0; t < T; t++)
        ids64[t] = ids[t] = (int32_t)kl_rng_below(&rng, (uint64_t)vocab);
    for (int i = 0; i < TYPES; i++) {
        double *wd, *yd = calloc((size_t)(T * D), sizeof(double));
        kl_param w = parameter(float_types[i], vocab, D, 1.0f, &wd);
        float *y = poisoned((size_t)(T * D));
        assert_ok(ops->embed(ctx_of[2], &w, ids, T, y));
        ref_embedding_forward(T, D, ids64, wd, yd);
        close_to(y, yd, (size_t)(T * D), 0.0, "embed");
        free(wd), free(yd), free(y), free(w.data);
    }
    float *dy = floats((size_t)(T * D), 1.0f), *first = NULL;
    double *dyd = exact(dy, (size_t)(T * D)), *dwd = calloc((size_t)(vocab * D), sizeof(double));
    ref_embedding_backward(T, D, ids64, dyd, dwd);
    for (size_t i = 0; i < (size_t)(vocab * D); i++)
        dwd[i] += 1.0;
    for (int threads = 1; threads <= 3; threads++) {
        kl_param dw = {ones((size_t)(vocab * D)), KL_F32, vocab, D};
        assert_ok(ops->embed_backward(ctx_of[threads], &dw, ids, T, dy));
        close_to(dw.data, dwd, (size_t)(vocab * D), GRADIENT, "embed_backward");
        if (first) {
            assert_memory_equal(first, dw.data, (size_t)(vocab * D) * 4);
            free(dw.data);
        } else {
            first = dw.data;
        }
    }
    free(first), free(dy), free(dyd), free(dwd);
}

/* ---- linear ---- */

static void check_linear(int64_t T, int64_t N, int64_t K, kl_dtype dtype)
{
    size_t nx = (size_t)(T * K), ny = (size_t)(T * N), nw = (size_t)(N * K);
    double *wd;
    kl_param w = parameter(dtype, N, K, 1.0f, &wd);
    float *x = floats(nx, 1.0f), *dy = floats(ny, 1.0f);
    double *xd = exact(x, nx), *dyd = exact(dy, ny);
    double *yd = calloc(ny + 1, 8), *dxd = calloc(nx + 1, 8), *dwd = calloc(nw + 1, 8);
    ref_linear_forward(T, K, N, xd, wd, yd);
    ref_linear_backward(T, K, N, xd, wd, dyd, dxd, dwd);
    float *kept[3] = {0};
    for (int threads = 1; threads <= 3; threads++) {
        kl_ctx *ctx = ctx_of[threads];
        float *y = poisoned(ny), *dx = poisoned(nx);
        kl_param dw = {ones(nw), KL_F32, N, K};
        assert_ok(ops->linear(ctx, &w, T, x, y, false));
        close_to(y, yd, ny, FORWARD, "linear");
        assert_ok(ops->linear_backward(ctx, &w, T, x, dy, dx, false, &dw));
        close_to(dx, dxd, nx, GRADIENT, "linear_backward dx");
        for (size_t i = 0; i < nw; i++)
            dwd[i] += threads == 1 ? 1.0 : 0.0;
        close_to(dw.data, dwd, nw, GRADIENT, "linear_backward dw");
        float *now[3] = {y, dx, dw.data};
        size_t size[3] = {ny, nx, nw};
        for (int i = 0; i < 3; i++) {
            if (threads == 1) {
                kept[i] = now[i];
                continue;
            }
            assert_memory_equal(kept[i], now[i], size[i] * 4);
            free(now[i]);
        }
    }
    /* once more on top of what is there: twice the result */
    assert_ok(ops->linear(ctx_of[2], &w, T, x, kept[0], true));
    assert_ok(ops->linear_backward(ctx_of[2], &w, T, NULL, dy, kept[1], true, NULL));
    for (size_t i = 0; i < ny; i++)
        yd[i] *= 2.0;
    for (size_t i = 0; i < nx; i++)
        dxd[i] *= 2.0;
    close_to(kept[0], yd, ny, FORWARD, "linear, accumulated");
    close_to(kept[1], dxd, nx, GRADIENT, "linear_backward, accumulated");
    for (int i = 0; i < 3; i++)
        free(kept[i]);
    free(w.data), free(wd), free(x), free(dy), free(xd), free(dyd), free(yd), free(dxd), free(dwd);
}

static void test_linear(void **state)
{
    (void)state;
    static const int64_t Ts[] = {0, 1, 2, 3, 5, 8, 9, 15, 16, 33, 64, 130, 300}, sides[] = {1, 7, 16, 24, 31, 96, 130, 257, 384};
    for (size_t i = 0; i < sizeof Ts / sizeof *Ts; i++)
        for (int type = 0; type < TYPES; type++) {
            int64_t N = sides[kl_rng_below(&rng, 9)], K = sides[kl_rng_below(&rng, 9)];
            check_linear(Ts[i], N, K, float_types[type]);
        }
    check_linear(300, 530, 300, KL_BF16);
    check_linear(600, 96, 24, KL_F32);
    check_linear(1, 600, 1030, KL_BF16);
    check_linear(1, 600, 1030, KL_F32);
}

/* Up to KL_FEW_ROWS rows, an element's bits depend on its own two rows alone. */
static void test_few_rows_do_not_mix(void **state)
{
    (void)state;
    int64_t N = 70, K = 333;
    for (int type = 0; type < TYPES; type++) {
        double *wd;
        kl_param w = parameter(float_types[type], N, K, 1.0f, &wd);
        float *x = floats((size_t)(KL_FEW_ROWS * K), 1.0f), *y = poisoned((size_t)(KL_FEW_ROWS * N)), *one = poisoned((size_t)N);
        for (int64_t M = 1; M <= KL_FEW_ROWS; M++) {
            assert_ok(ops->linear(ctx_of[2], &w, M, x, y, false));
            for (int64_t m = 0; m < M; m++) {
                kl_linear_serial(1, N, K, x + m * K, K, w.data, w.dtype, K, 0.0f, one, N);
                assert_memory_equal(one, y + m * N, (size_t)N * 4);
                kl_param part = {(char *)w.data + (size_t)(13 * K) * kl_dtype_size(w.dtype), w.dtype, 3, K};
                assert_ok(ops->linear(ctx_of[1], &part, 1, x + m * K, one, false));
                assert_memory_equal(one, y + m * N + 13, 3 * 4);
            }
        }
        free(w.data), free(wd), free(x), free(y), free(one);
    }
}

static void test_gemm(void **state)
{
    (void)state;
    static const int64_t sizes[][3] = {{1, 1, 1}, {7, 5, 3}, {64, 96, 24}, {130, 257, 40}, {300, 33, 301}, {3, 200, 0}, {513, 300, 70}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int variant = 0; variant < 8; variant++) {
            int64_t M = sizes[i][0], N = sizes[i][1], K = sizes[i][2];
            bool ta = variant & 1, tb = variant & 2;
            float beta = variant & 4 ? 0.5f : 0.0f, alpha = 1.25f;
            size_t nc = (size_t)(M * N);
            float *A = floats((size_t)(M * K), 1.0f), *B = floats((size_t)(K * N), 1.0f), *first = NULL;
            double *Cd = calloc(nc, 8);
            for (int64_t m = 0; m < M; m++)
                for (int64_t n = 0; n < N; n++) {
                    for (int64_t k = 0; k < K; k++)
                        Cd[m * N + n] += (double)A[ta ? k * M + m : m * K + k] * (double)B[tb ? n * K + k : k * N + n];
                    Cd[m * N + n] = (double)alpha * Cd[m * N + n] + (double)beta;
                }
            for (int threads = 1; threads <= 3; threads++) {
                float *C = beta == 0.0f ? poisoned(nc) : ones(nc);
                kl_gemm(ctx_of[threads], ta ? KL_T : KL_N, tb ? KL_T : KL_N, M, N, K, alpha, A, ta ? M : K, B, tb ? K : N, beta, C, N);
                close_to(C, Cd, nc, FORWARD, "kl_gemm");
                if (first) {
                    assert_memory_equal(first, C, nc * 4);
                    free(C);
                } else {
                    first = C;
                }
            }
            free(A), free(B), free(Cd), free(first);
        }
}

/* ---- normalisation ---- */

static void check_norm(int64_t T, int64_t D, float eps, int64_t gap, kl_dtype dtype)
{
    int64_t stride = D + gap;
    size_t n = (size_t)(T * D), wide = (size_t)(T * stride);
    double *wd;
    kl_param w = parameter(dtype, 1, D, 1.0f, &wd);
    float *x = floats(wide, 1.0f), *dy = floats(n, 1.0f);
    double *xd = malloc((n + 1) * 8), *dyd = exact(dy, n), *yd = calloc(n + 1, 8), *dxd = calloc(n + 1, 8), *dwd = calloc((size_t)D, 8);
    for (int64_t t = 0; t < T; t++)
        for (int64_t d = 0; d < D; d++)
            xd[t * D + d] = (double)x[t * stride + d];
    ref_rmsnorm_forward(T, D, (double)eps, xd, wd, yd);
    ref_rmsnorm_backward(T, D, (double)eps, xd, wd, dyd, dxd, dwd);
    for (int64_t d = 0; d < D; d++)
        dwd[d] += 1.0;
    float *kept_dx = NULL, *kept_dw = NULL;
    for (int threads = 1; threads <= 3; threads++) {
        float *y = poisoned(n), *dx = poisoned(n);
        kl_param dw = {ones((size_t)D), KL_F32, 1, D};
        assert_ok(ops->rmsnorm(ctx_of[threads], &w, eps, T, D, x, stride, y, D));
        close_to(y, yd, n, FORWARD, "rmsnorm");
        assert_ok(ops->rmsnorm_backward(ctx_of[threads], &w, eps, T, D, x, stride, dy, D, dx, D, false, &dw));
        close_to(dx, dxd, n, GRADIENT, "rmsnorm_backward dx");
        close_to(dw.data, dwd, (size_t)D, GRADIENT, "rmsnorm_backward dw");
        if (kept_dx) {
            assert_memory_equal(kept_dx, dx, n * 4);
            assert_memory_equal(kept_dw, dw.data, (size_t)D * 4);
            free(dx), free(dw.data);
        } else {
            kept_dx = dx, kept_dw = dw.data;
        }
        free(y);
    }
    /* into a wide row that keeps its gap, and added to what is there */
    float *sum = ones(wide);
    assert_ok(ops->rmsnorm_backward(ctx_of[2], &w, eps, T, D, x, stride, dy, D, sum, stride, true, NULL));
    for (int64_t t = 0; t < T; t++) {
        for (int64_t d = 0; d < stride; d++)
            assert_true(fabsf(sum[t * stride + d] - 1.0f - (d < D ? kept_dx[t * D + d] : 0.0f)) <= 1e-5f * (1.0f + fabsf(sum[t * stride + d])));
    }
    free(sum), free(kept_dx), free(kept_dw), free(w.data), free(wd), free(x), free(dy), free(xd), free(dyd), free(yd), free(dxd), free(dwd);
}

static void test_rmsnorm(void **state)
{
    (void)state;
    static const int64_t Ts[] = {0, 1, 2, 17, 600}, Ds[] = {2, 3, 16, 31, 32, 100, 512};
    for (size_t i = 0; i < 5; i++)
        for (size_t j = 0; j < 7; j++)
            check_norm(Ts[i], Ds[j], 1e-5f, (int64_t)kl_rng_below(&rng, 2) * 5, float_types[kl_rng_below(&rng, TYPES)]);
    check_norm(1, 1, 0.5f, 0, KL_F32); /* with a small eps, the gradient of a single element is nothing but cancellation */
}

/* ---- the small ones ---- */

static void test_adamw(void **state)
{
    (void)state;
    enum { n = 40000 };
    double lr = 1e-2, b1 = 0.9, b2 = 0.95, eps = 1e-8, decay = 0.1, clip = 0.7;
    float *w = floats(n, 1.0f), *m = calloc(n, 4), *v = calloc(n, 4), *w1 = malloc(n * 4), *m1 = calloc(n, 4), *v1 = calloc(n, 4);
    memcpy(w1, w, n * 4);
    double *wd = exact(w, n), *md = calloc(n, 8), *vd = calloc(n, 8);
    for (int64_t step = 1; step <= 3; step++) {
        float *g = floats(n, 1.0f);
        g[5] = 0.0f;
        assert_ok(ops->adamw(ctx_of[2], n, w, g, m, v, lr, b1, b2, eps, decay, clip, step));
        assert_ok(ops->adamw(ctx_of[1], n, w1, g, m1, v1, lr, b1, b2, eps, decay, clip, step));
        for (size_t i = 0; i < n; i++) {
            double gi = clip * (double)g[i];
            md[i] = b1 * md[i] + (1 - b1) * gi;
            vd[i] = b2 * vd[i] + (1 - b2) * gi * gi;
            double mh = md[i] / (1 - pow(b1, (double)step)), vh = vd[i] / (1 - pow(b2, (double)step));
            wd[i] -= lr * (mh / (sqrt(vh) + eps) + decay * wd[i]);
        }
        free(g);
    }
    close_to(w, wd, n, 1e-6, "adamw w");
    assert_true(kl_within(kl_rel_err(m, md, n), 1e-6) && kl_within(kl_rel_err(v, vd, n), 1e-6));
    assert_memory_equal(w, w1, n * 4);
    assert_memory_equal(v, v1, n * 4);
    expect_refusal(ops->adamw(ctx_of[1], n, w, NULL, m, v, lr, b1, b2, eps, decay, clip, 1), "g:");
    expect_refusal(ops->adamw(ctx_of[1], n, w, w1, m, v, lr, 1.0, b2, eps, decay, clip, 1), "beta1");
    expect_refusal(ops->adamw(ctx_of[1], n, w, w1, m, v, lr, b1, b2, eps, decay, clip, 0), "step");
    free(w), free(m), free(v), free(w1), free(m1), free(v1), free(wd), free(md), free(vd);
}

static void test_sumsq(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 7, 64, 1000, 100003};
    for (size_t i = 0; i < 6; i++) {
        size_t n = sizes[i];
        float *x = floats(n, 3.0f);
        double expected = 0.0, first = 0.0;
        for (size_t j = 0; j < n; j++)
            expected += (double)x[j] * (double)x[j];
        for (int threads = 1; threads <= 3; threads++) {
            double sum = NAN;
            assert_ok(ops->sumsq(ctx_of[threads], n, x, &sum));
            assert_true(fabs(sum - expected) <= 1e-12 * expected);
            if (threads == 1)
                first = sum;
            assert_true(sum == first);
        }
        if (n) {
            x[n / 2] = NAN;
            double sum = 0.0;
            assert_ok(ops->sumsq(ctx_of[2], n, x, &sum));
            assert_true(isnan(sum));
        }
        free(x);
    }
}

static void test_memory(void **state)
{
    (void)state;
    void *p, *q;
    assert_ok(ops->alloc(ctx_of[1], &p, 1000));
    assert_ok(ops->alloc(ctx_of[1], &q, 0));
    assert_non_null(q);
    assert_int_equal((uintptr_t)p % 64, 0);
    char text[1000];
    memset(text, 7, sizeof text);
    assert_ok(ops->copy(ctx_of[1], p, text, 1000));
    assert_memory_equal(p, text, 1000);
    assert_ok(ops->zero(ctx_of[1], p, 999));
    assert_int_equal(((char *)p)[998], 0);
    assert_int_equal(((char *)p)[999], 7);
    ops->release(ctx_of[1], p);
    ops->release(ctx_of[1], q);
    kl_status s = ops->alloc(ctx_of[1], &p, SIZE_MAX - 5);
    assert_int_equal(s.code, KL_ENOMEM);
    assert_null(p);
    size_t n = 100001;
    float *x = floats(n, 1.0f), *y = ones(n);
    assert_ok(ops->add(ctx_of[2], y, x, n));
    for (size_t i = 0; i < n; i++)
        assert_true(y[i] == 1.0f + x[i]);
    free(x), free(y);
}

static void test_store_latent(void **state)
{
    (void)state;
    int64_t T = 50, width = 72, slots = 120, index[50];
    float *rows = floats((size_t)(T * width), 1.0f);
    for (int64_t t = 0; t < T; t++)
        index[t] = 2 * (T - 1 - t) + 1;
    for (int type = 0; type < 2; type++) {
        float *cache = poisoned((size_t)(slots * width));
        assert_ok(ops->store_latent(ctx_of[2], rows, T, width, index, cache, float_types[type]));
        for (int64_t t = 0; t < T; t++)
            for (int64_t d = 0; d < width; d++) {
                size_t at = (size_t)(index[t] * width + d);
                float got = type ? kl_bf16_to_f32(((uint16_t *)cache)[at]) : cache[at];
                float expected = type ? kl_bf16_to_f32(kl_f32_to_bf16(rows[t * width + d])) : rows[t * width + d];
                assert_true(got == expected);
            }
        free(cache);
    }
    index[3] = -1;
    expect_refusal(ops->store_latent(ctx_of[1], rows, T, width, index, rows, KL_F32), "row_index[3]");
    expect_refusal(ops->store_latent(ctx_of[1], rows, T, width, index, rows, KL_F16), "type");
    free(rows);
}

static void test_the_table_is_full(void **state)
{
    (void)state;
    assert_string_equal(ops->name, "cpu");
    assert_null(kl_ops_for((kl_device)7));
    const void *entry[sizeof *ops / sizeof(void *)];
    memcpy(entry, ops, sizeof *ops);
    for (size_t i = 0; i < sizeof *ops / sizeof(void *); i++)
        assert_non_null(entry[i]);
}

static void test_refusals_name_the_argument(void **state)
{
    (void)state;
    kl_ctx *ctx = ctx_of[1];
    float f[64] = {0};
    int32_t ids[2] = {0, 8}, targets[2] = {0, 8};
    double loss;
    int64_t counted;
    kl_param w = {f, KL_F32, 8, 8}, empty = {NULL, KL_F32, 8, 8}, odd = {f, KL_I32, 8, 8}, wrong = {f, KL_F32, 8, 7}, half = {f, KL_BF16, 8, 8};
    expect_refusal(ops->embed(ctx, &w, ids, 2, f), "ids[1]");
    expect_refusal(ops->embed(ctx, &empty, ids, 1, f), "embed: w");
    expect_refusal(ops->embed(ctx, &w, ids, -1, f), "T:");
    expect_refusal(ops->embed(NULL, &w, ids, 1, f), "ctx");
    expect_refusal(ops->embed_backward(ctx, &half, ids, 1, f), "dw: expected float32");
    expect_refusal(ops->linear(ctx, &odd, 1, f, f, false), "w:");
    expect_refusal(ops->linear(ctx, &w, 1, NULL, f, false), "x:");
    expect_refusal(ops->linear(ctx, &w, 1, f, NULL, false), "y:");
    expect_refusal(ops->linear_backward(ctx, &w, 1, f, NULL, f, false, NULL), "dy:");
    expect_refusal(ops->linear_backward(ctx, &w, 1, f, f, NULL, false, &wrong), "dw: expected shape [8,8], got [8,7]");
    expect_refusal(ops->linear_backward(ctx, &w, 1, NULL, f, NULL, false, &w), "x:");
    kl_param norm = {f, KL_F32, 1, 8};
    expect_refusal(ops->rmsnorm(ctx, &norm, 1e-5f, 1, 9, f, 9, f, 9), "w: expected [9]");
    expect_refusal(ops->rmsnorm(ctx, &norm, 1e-5f, 1, 8, f, 7, f, 8), "x_stride");
    expect_refusal(ops->rmsnorm(ctx, &norm, -1.0f, 1, 8, f, 8, f, 8), "eps");
    expect_refusal(ops->rmsnorm_backward(ctx, &norm, 1e-5f, 1, 8, f, 8, f, 8, f, 5, false, NULL), "dx_stride");
    expect_refusal(ops->head_loss(ctx, &w, 2, f, targets, &loss, &counted, 1.0f, NULL, NULL, f, sizeof f), "targets[1]");
    expect_refusal(ops->head_loss(ctx, &w, 1, f, targets, &loss, &counted, 1.0f, NULL, NULL, f, 8), "workspace");
    expect_refusal(ops->head_loss(ctx, &w, 1, f, targets, NULL, &counted, 1.0f, NULL, NULL, f, sizeof f), "loss_sum");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_table_is_full),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_embed),
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_few_rows_do_not_mix),
        cmocka_unit_test(test_gemm),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_sumsq),
        cmocka_unit_test(test_store_latent),
        cmocka_unit_test(test_refusals_name_the_argument),
    };
    return cmocka_run_group_tests(tests, open_ops, close_contexts);
}
