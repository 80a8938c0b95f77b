/* What MLA refuses and by which name, dispatch, nothing to do, and the rotary embedding. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/mla_case.h"

static void refuse(const kl_variant *v, const problem *x, kl_pass pass, const char *name)
{
    problem y = *x;
    kl_ctx *ctx = context(1);
    static _Alignas(64) char workspace[64];
    kl_status s = pass == KL_FORWARD ? v->forward(ctx, &y.p, workspace, 0) : v->backward(ctx, &y.p, &y.g, workspace, 0);
    kl_ctx_destroy(ctx);
    if (!kl_failed(s) || strncmp(s.message, name, strlen(name)) != 0)
        fail_msg("%s: expected a refusal that begins with '%s', got '%s'", v->name, name, s.message);
}

static void bad_arguments(void **state)
{
    (void)state;
    shape s = {.N = 2, .H = 3, .R = 20, .Dn = 8, .Dr = 4, .Dv = 12, .queries = {4, 5}, .keys = {6, 30}, .size = 1.0f};
    problem x = make(&s, 5);
    bind(&x);
    int count;
    const kl_variant *table = cpu_variants(&count);
#define BAD(name, change)                                             \
    do {                                                              \
        problem y = x;                                                \
        bind(&y);                                                     \
        change;                                                       \
        for (int i = 0; i < count; i++)                               \
            refuse(&table[i], &y, KL_FORWARD, name);                  \
        refuse(mla_pick(KL_CPU, NULL, &y.p, KL_FORWARD), &y, KL_FORWARD, name); \
    } while (0)
#define BIND_BAD(name, change) BAD(name, change; y.p.cu_q = y.cu_q; y.p.kv_start = y.kv_start; y.p.kv_len = y.kv_len)
    BAD("dtype", y.p.dtype = KL_BF16);
    BAD("latent_dtype", y.p.latent_dtype = KL_F16);
    BAD("weight_dtype", y.p.weight_dtype = KL_I32);
    BAD("N:", y.p.N = -1);
    BAD("H:", y.p.H = 0);
    BAD("R:", y.p.R = 0);
    BAD("R:", y.p.R = (int64_t)1 << 40);
    BAD("Dn:", y.p.Dn = 0);
    BAD("Dr:", y.p.Dr = -1);
    BAD("Dv:", y.p.Dv = 0);
    BAD("H Dv:", y.p.H = 1 << 20; y.p.Dv = 1 << 20);
    BAD("q_stride:", y.p.q_stride = s.H * (s.Dn + s.Dr) - 1);
    BAD("latent_rows:", y.p.latent_rows = -1);
    BAD("latent_rows:", y.p.latent_rows = INT64_MAX);
    BAD("cu_q:", y.p.cu_q = NULL);
    BAD("kv_start:", y.p.kv_start = NULL);
    BAD("kv_len:", y.p.kv_len = NULL);
    BIND_BAD("cu_q[0]", y.cu_q[0] = -1);
    BIND_BAD("cu_q[2]", y.cu_q[2] = 1);
    BIND_BAD("kv_len[1]", y.kv_len[1] = 4);
    BIND_BAD("kv_len[1]", y.kv_len[1] = 1000);
    BIND_BAD("kv_start[0]", y.kv_start[0] = -1);
    BIND_BAD("kv_start[0]", y.kv_start[0] = 1000);
    BAD("q:", y.p.q = NULL);
    BAD("latent:", y.p.latent = NULL);
    BAD("kv_b:", y.p.kv_b = NULL);
    BAD("scale:", y.p.scale = NAN);
    BAD("o:", y.p.o = NULL);
    BAD("workspace:", (void)0); /* refuse() offers none */
#undef BAD
    const kl_variant *v = mla_pick(KL_CPU, "chunk", NULL, KL_BACKWARD);
    problem y = x;
    bind(&y);
    refuse(v, &y, KL_BACKWARD, "workspace:");
    y.g.d_o = NULL;
    refuse(v, &y, KL_BACKWARD, "d_o:");
    y = x;
    bind(&y);
    y.g.o = y.o;
    refuse(v, &y, KL_BACKWARD, "lse:");
    y.g.o = NULL, y.g.lse = y.lse;
    refuse(v, &y, KL_BACKWARD, "o:");
    y = x;
    bind(&y);
    y.kv_start[1] = y.kv_start[0] + 3;
    refuse(v, &y, KL_BACKWARD, "kv_start[1]:");
    y.p.latent = NULL;
    refuse(v, &y, KL_BACKWARD, "latent:");
    kl_ctx *ctx = context(1);
    assert_true(kl_failed(v->backward(ctx, &x.p, NULL, NULL, 0)));
    assert_true(kl_failed(v->forward(NULL, &x.p, NULL, 0)));
    assert_true(kl_failed(v->forward(ctx, NULL, NULL, 0)));
    assert_true(kl_failed(table[0].check(&x.p, KL_BACKWARD))); /* recurrent has no backward */
    assert_null(mla_pick(KL_CPU, "recurrent", &x.p, KL_BACKWARD));
    assert_null(mla_pick(KL_CPU, "no such", &x.p, KL_FORWARD));
    /* an address off by 32 */
    size_t bytes = v->workspace(ctx, &x.p, KL_FORWARD);
    char *workspace = allocate(bytes + 64);
    kl_status status = v->forward(ctx, &x.p, workspace + 32, bytes);
    assert_true(kl_failed(status) && strncmp(status.message, "workspace:", 10) == 0);
    free(workspace);
    kl_ctx_destroy(ctx);
    drop(&x);
}

static void nothing_to_do(void **state)
{
    (void)state;
    kl_ctx *ctx = context(2);
    mla_problem none = {.H = 1, .R = 1, .Dn = 1, .Dv = 1};
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        size_t bytes = v[i].workspace(ctx, &none, KL_FORWARD);
        void *workspace = allocate(bytes);
        assert_false(kl_failed(v[i].forward(ctx, &none, workspace, bytes)));
        free(workspace);
    }
    kl_ctx_destroy(ctx);
}

/* Few queries on many keys go the recurrent way, a prompt the chunk way. */
static void dispatch(void **state)
{
    (void)state;
    shape decode = {.N = 2, .H = 4, .R = 512, .Dn = 128, .Dr = 64, .Dv = 128, .queries = {1, 4}, .keys = {300, 500}, .size = 1.0f};
    shape prompt = decode;
    prompt.queries[0] = prompt.keys[0], prompt.queries[1] = prompt.keys[1];
    problem x = make(&decode, 1), y = make(&prompt, 1);
    bind(&x);
    bind(&y);
    assert_string_equal(mla_pick(KL_CPU, NULL, &x.p, KL_FORWARD)->name, "recurrent");
    assert_string_equal(mla_pick(KL_CPU, NULL, &y.p, KL_FORWARD)->name, "chunk");
    assert_string_equal(mla_pick(KL_CPU, NULL, &x.p, KL_BACKWARD)->name, "chunk");
    drop(&x);
    drop(&y);
}

/* ---- rotary embedding ---- */

static void rotary(void **state)
{
    (void)state;
    enum { T = 9, H = 3, D = 14, Dr = 6, OFFSET = 100000 };
    kl_ctx *ctx = context(2);
    kl_rng r = kl_rng_make(3, 3);
    float x[T * H * D], before[T * H * D];
    double y[T * H * D];
    int64_t position[T];
    kl_fill_normal(&r, x, T * H * D, 0.0f, 1.0f);
    memcpy(before, x, sizeof x);
    for (int i = 0; i < T * H * D; i++)
        y[i] = x[i];
    for (int t = 0; t < T; t++)
        position[t] = OFFSET + t;
    ref_rope_forward(T, H, D, Dr, 10000.0, OFFSET, y);
    assert_false(kl_failed(mla_rope(ctx, x + D - Dr, T, H, Dr, H * D, D, position, 10000.0f, false)));
    assert_true(kl_within(kl_rel_err(x, y, T * H * D), 1e-6));
    assert_false(kl_failed(mla_rope(ctx, x + D - Dr, T, H, Dr, H * D, D, position, 10000.0f, true)));
    assert_true(kl_within(kl_rel_err_f32(x, before, T * H * D), 1e-6));
    assert_true(kl_failed(mla_rope(ctx, x, T, H, 5, H * D, D, position, 10000.0f, false)));
    assert_true(kl_failed(mla_rope(ctx, x, T, H, Dr, H * D, D, position, 0.0f, false)));
    assert_true(kl_failed(mla_rope(ctx, x, T, H, Dr, H * D, D, NULL, 1.0f, false)));
    assert_true(kl_failed(mla_rope(ctx, x, T, H, Dr, H * D, 2, position, 1.0f, false)));
    assert_false(kl_failed(mla_rope(ctx, NULL, 0, H, Dr, H * D, D, NULL, 1.0f, false)));
    kl_ctx_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_arguments),
        cmocka_unit_test(nothing_to_do),
        cmocka_unit_test(dispatch),
        cmocka_unit_test(rotary),
    };
    return cmocka_run_group_tests_name("mla_contract", tests, NULL, NULL);
}
