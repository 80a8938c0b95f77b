/* The general recurrence: against its reference, and KDA as its special case. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "kda/dplr.h"
#include "reference/dplr.h"
#include "tests/kda_case.h"

static void run(dplr_problem *p, int threads)
{
    kl_ctx *ctx;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.threads = threads}));
    size_t bytes = dplr_workspace(ctx, p);
    void *workspace = aligned_alloc(64, bytes + 64);
    memset(workspace, 0xff, bytes);
    assert_ok(dplr_forward(ctx, p, workspace, bytes));
    free(workspace);
    kl_ctx_destroy(ctx);
}

static float *filled(kl_rng *r, int64_t n, float deviation)
{
    float *x = malloc((size_t)(n + 1) * sizeof *x);
    kl_fill_normal(r, x, (size_t)n, 0.0f, deviation);
    return x;
}

static double *widen(const float *x, int64_t n)
{
    double *y = ref_zeros(n);
    for (int64_t i = 0; i < n; i++)
        y[i] = x[i];
    return y;
}

static void check(int64_t N, const int64_t *cu_seqlens, int64_t H, int64_t K, int64_t V, int64_t chunk, float strongest, uint64_t seed)
{
    kl_rng r = kl_rng_make(seed, 1);
    int64_t T = cu_seqlens[N], nk = T * H * K, nv = T * H * V, ns = H * K * V;
    float small = 0.7f / sqrtf((float)K);
    float *q = filled(&r, nk, 1.0f), *k = filled(&r, nk, small), *a = filled(&r, nk, small), *b = filled(&r, nk, small);
    float *v = filled(&r, nv, 1.0f), *g = filled(&r, nk, 1.0f), *h0 = filled(&r, N * ns, 1.0f), *ht = filled(&r, N * ns, 1.0f), *o = filled(&r, nv, 1.0f);
    for (int64_t i = 0; i < nk; i++)
        g[i] = -fabsf(g[i]) * (i % 3 ? 0.05f : strongest);
    dplr_problem p = {.B = 1, .T = T, .N = N, .H = H, .K = K, .V = V, .cu_seqlens = cu_seqlens, .chunk = chunk, .q = q, .k = k, .a = a,
                      .b = b, .v = v, .g = g, .h0 = h0, .ht = ht, .o = o};
    run(&p, 1);
    float *o_1 = malloc((size_t)nv * sizeof *o_1);
    memcpy(o_1, o, (size_t)nv * sizeof *o);
    run(&p, 3);
    assert_memory_equal(o, o_1, (size_t)nv * sizeof *o);
    double *rq = widen(q, nk), *rk = widen(k, nk), *ra = widen(a, nk), *rb = widen(b, nk), *rg = widen(g, nk), *rv = widen(v, nv), *rh = widen(h0, N * ns);
    double *ro = ref_zeros(nv), *rht = ref_zeros(N * ns);
    for (int64_t n = 0; n < N; n++) {
        int64_t t = cu_seqlens[n], at = t * H * K;
        ref_dplr ref = {.T = cu_seqlens[n + 1] - t, .H = H, .K = K, .V = V, .q = rq + at, .k = rk + at, .a = ra + at, .b = rb + at,
                        .g = rg + at, .v = rv + t * H * V, .h0 = rh + n * ns};
        assert_int_equal(ref_dplr_forward(&ref, ro + t * H * V, rht + n * ns), 0);
    }
    assert_true(kl_within(kl_rel_err(o, ro, (size_t)nv), kl_tol_kda_f32.forward));
    assert_true(kl_within(kl_rel_err(ht, rht, (size_t)(N * ns)), kl_tol_kda_f32.forward));
    void *all[] = {q, k, a, b, v, g, h0, ht, o, o_1, rq, rk, ra, rb, rg, rv, rh, ro, rht};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static void dplr_agrees_with_the_reference(void **state)
{
    (void)state;
    const int64_t cu_seqlens[] = {0, 1, 1, 17, 150, 152, 300}, dims[] = {1, 8, 24, 60, 64, 128};
    uint64_t seed = 1;
    for (int i = 0; i < 6; i++)
        for (int64_t chunk = 16; chunk <= 64; chunk *= 2)
            check(6, cu_seqlens, 1 + i % 3, dims[i], dims[(i + 2) % 6], chunk, i % 2 ? 60.0f : 1.0f, seed++);
}

/* KDA is a = k (.) e^g, b = -beta k, and beta k in the place of k. */
static void kda_is_a_special_case_of_dplr(void **state)
{
    (void)state;
    enum { T = 130, H = 2, K = 32, V = 24 };
    kda_case *c = case_new((case_options){.B = 1, .T = T, .H = H, .K = K, .V = V, .G = K, .decay = DECAY_MIXED, .seed = 1});
    assert_ok(case_run(c, "chunk", KL_FORWARD, 2));
    float *a = case_floats(c, T * H * K), *b = case_floats(c, T * H * K), *k = case_floats(c, T * H * K);
    float *o = case_floats(c, T * H * V), *ht = case_floats(c, H * K * V);
    for (int64_t n = 0; n < T * H; n++)
        for (int64_t i = 0; i < K; i++) {
            float key = ((const float *)c->p.k)[n * K + i], beta = ((const float *)c->p.beta)[n];
            a[n * K + i] = key * expf(((const float *)c->p.g)[n * K + i]);
            b[n * K + i] = -beta * key;
            k[n * K + i] = beta * key;
        }
    dplr_problem p = {.B = 1, .T = T, .N = 1, .H = H, .K = K, .V = V, .q = c->p.q, .k = k, .a = a, .b = b, .v = c->p.v, .g = c->p.g,
                      .h0 = c->p.h0, .ht = ht, .o = o};
    run(&p, 2);
    assert_true(kl_within(kl_rel_err_f32(o, c->p.o, T * H * V), kl_tol_kda_f32.forward));
    assert_true(kl_within(kl_rel_err_f32(ht, c->p.ht, H * K * V), kl_tol_kda_f32.forward));
    case_free(c);
}

static void dplr_refuses_by_name(void **state)
{
    (void)state;
    float x[64] = {0}, workspace[16];
    kl_ctx *ctx;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.threads = 1}));
    dplr_problem good = {.B = 1, .T = 2, .N = 1, .H = 1, .K = 4, .V = 4, .q = x, .k = x, .a = x, .b = x, .v = x, .g = x, .o = x + 32}, p;
#define REFUSED(change, name)                                                   \
    do {                                                                        \
        p = good;                                                               \
        change;                                                                 \
        kl_status s = dplr_forward(ctx, &p, workspace, sizeof workspace);       \
        assert_int_equal(s.code, KL_EINVAL);                                    \
        assert_non_null(strstr(s.message, name));                               \
    } while (0)
    REFUSED(p.chunk = 128, "chunk");
    REFUSED(p.K = 0, "K:");
    REFUSED(p.V = 300, "V:");
    REFUSED(p.H = 0, "H:");
    REFUSED(p.N = 2, "N:");
    REFUSED(p.a = NULL, "a:");
    REFUSED(p.scale = INFINITY, "scale");
    REFUSED((void)p, "workspace");
    kl_ctx_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dplr_agrees_with_the_reference),
        cmocka_unit_test(kda_is_a_special_case_of_dplr),
        cmocka_unit_test(dplr_refuses_by_name),
    };
    return cmocka_run_group_tests_name("kda_dplr", tests, NULL, NULL);
}
