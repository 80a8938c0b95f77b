/* The short convolution against its reference, on the CPU and as CUDA kernels. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "kda/conv.h"
#include "reference/conv.h"
#include "tests/around_support.h"

/* ---- calls ---- */

/* The problem as the call finds it, and its gradients when g is given. */
static void lend_conv(mirror *m, kda_conv_problem *p, kda_conv_grads *g)
{
    int64_t tokens = p->B * p->T, keep = p->D * (p->W - 1), slots = p->state_pool ? p->state_pool : p->N;
    size_t size = kl_dtype_size(p->dtype), tail = kl_dtype_size(p->tail_dtype), x_bytes = (size_t)(tokens * (p->x_stride ? p->x_stride : p->D)) * size;
    size_t y_bytes = (size_t)(tokens * (p->y_stride ? p->y_stride : p->D)) * size, gradient = (size_t)(p->N * keep) * sizeof(float);
    p->x = lend(m, p->x, x_bytes);
    p->y = lend(m, p->y, y_bytes);
    p->weight = lend(m, p->weight, (size_t)(p->D * p->W) * kl_dtype_size(p->weight_dtype));
    p->tail_in = lend(m, p->tail_in, (size_t)(slots * keep) * tail);
    p->tail_out = lend(m, p->tail_out, (size_t)(slots * keep) * tail);
    p->state_index = lend(m, p->state_index, (size_t)p->N * sizeof *p->state_index);
    if (!g)
        return;
    g->dy = lend(m, g->dy, y_bytes);
    g->dx = lend(m, g->dx, x_bytes);
    g->dweight = lend(m, g->dweight, (size_t)(p->D * p->W) * sizeof(float));
    g->dtail_out = lend(m, g->dtail_out, gradient);
    g->dtail_in = lend(m, g->dtail_in, gradient);
}

/* Backward with gradients, forward without. */
static kl_status conv(kl_ctx *ctx, const kda_conv_problem *given, const kda_conv_grads *grads)
{
    mirror m = {.ctx = ctx};
    kda_conv_problem p = *given;
    kda_conv_grads g = grads ? *grads : (kda_conv_grads){0};
    p.workspace_bytes = kda_conv_workspace(ctx, &p, grads ? KL_BACKWARD : KL_FORWARD);
    unsigned char *workspace = open_workspace(p.workspace_bytes);
    lend_conv(&m, &p, grads ? &g : NULL);
    p.workspace = lend(&m, workspace, p.workspace_bytes + GUARD);
    kl_status s = grads ? kda_conv_backward(ctx, &p, &g) : kda_conv_forward(ctx, &p);
    take_back(&m);
    close_workspace(workspace, p.workspace_bytes);
    return s;
}
static kl_status conv_forward(kl_ctx *ctx, const kda_conv_problem *p) { return conv(ctx, p, NULL); }
static kl_status conv_backward(kl_ctx *ctx, const kda_conv_problem *p, const kda_conv_grads *g) { return conv(ctx, p, g); }

/* ---- a random problem and its reference ---- */

typedef struct conv_case {
    kda_conv_problem p;
    kda_conv_grads g;
    int64_t tokens;
    float *x, *weight, *tail_in, *dy, *dtail_out;
} conv_case;

static conv_case new_conv(int64_t N, int64_t T, const int64_t *cu_seqlens, int64_t D, int64_t W, int64_t gap, bool silu, uint64_t seed)
{
    kl_rng r = kl_rng_make(seed, 1);
    conv_case c = {.tokens = cu_seqlens ? cu_seqlens[N] : N * T};
    c.x = normal(&r, c.tokens * (D + gap));
    c.weight = normal(&r, D * W);
    c.tail_in = normal(&r, N * D * (W - 1));
    c.dy = normal(&r, c.tokens * (D + gap));
    c.dtail_out = normal(&r, N * D * (W - 1));
    c.p = (kda_conv_problem){.B = cu_seqlens ? 1 : N, .T = cu_seqlens ? c.tokens : T, .N = N, .cu_seqlens = cu_seqlens, .D = D, .W = W,
                             .silu = silu, .x = c.x, .x_stride = D + gap, .weight = c.weight, .y = poisoned(c.tokens * (D + gap)),
                             .y_stride = D + gap, .tail_in = c.tail_in, .tail_out = poisoned(N * D * (W - 1))};
    c.g = (kda_conv_grads){.dy = c.dy, .dtail_out = c.dtail_out, .dx = poisoned(c.tokens * (D + gap)),
                           .dweight = calloc((size_t)(D * W), sizeof(float)), .dtail_in = poisoned(N * D * (W - 1))};
    return c;
}

static void free_conv(conv_case *c)
{
    FREE_ALL(c->x, c->weight, c->tail_in, c->dy, c->dtail_out, c->p.y, c->p.tail_out, c->g.dx, c->g.dweight, c->g.dtail_in);
}

static double *dense(const float *x, int64_t begin, int64_t count, int64_t D, int64_t stride)
{
    double *y = ref_zeros(count * D);
    for (int64_t t = 0; t < count; t++)
        for (int64_t d = 0; d < D; d++)
            y[t * D + d] = x[(begin + t) * stride + d];
    return y;
}

static double strided_error(const float *x, const double *ref, int64_t begin, int64_t count, int64_t D, int64_t stride)
{
    float *y = malloc((size_t)(count * D + 1) * sizeof *y);
    for (int64_t t = 0; t < count; t++)
        memcpy(y + t * D, x + (begin + t) * stride, (size_t)D * sizeof(float));
    double e = kl_rel_err(y, ref, (size_t)(count * D));
    free(y);
    return e;
}

static void check_conv(conv_case *c)
{
    const kda_conv_problem *p = &c->p;
    kl_ctx *ctx = context(2);
    assert_ok(conv_forward(ctx, p));
    assert_ok(conv_backward(ctx, p, &c->g));
    double *dw = ref_zeros(p->D * p->W), *w = widen(c->weight, p->D * p->W);
    int64_t keep = p->W - 1;
    for (int64_t n = 0; n < p->N; n++) {
        int64_t t0 = p->cu_seqlens ? p->cu_seqlens[n] : n * p->T, T = p->cu_seqlens ? p->cu_seqlens[n + 1] - t0 : p->T;
        double *x = dense(c->x, t0, T, p->D, p->x_stride), *dy = dense(c->dy, t0, T, p->D, p->y_stride);
        double *tail = widen(c->tail_in + n * p->D * keep, p->D * keep), *dtail_out = widen(c->dtail_out + n * p->D * keep, p->D * keep);
        double *y = ref_zeros(T * p->D), *tail_out = ref_zeros(p->D * keep), *dx = ref_zeros(T * p->D), *dtail = ref_zeros(p->D * keep);
        ref_conv ref = {.T = T, .C = p->D, .W = p->W, .silu = p->silu, .x = x, .w = w, .tail = tail};
        ref_conv_forward(&ref, y, tail_out);
        ref_conv_backward(&ref, dy, dtail_out, dx, dw, dtail);
        assert_true(kl_within(strided_error((const float *)p->y, y, t0, T, p->D, p->y_stride), kl_tol_kda_f32.forward));
        assert_true(kl_within(strided_error((const float *)c->g.dx, dx, t0, T, p->D, p->x_stride), kl_tol_kda_f32.gradient));
        assert_true(kl_within(kl_rel_err((const float *)p->tail_out + n * p->D * keep, tail_out, (size_t)(p->D * keep)), 0.0));
        assert_true(kl_within(kl_rel_err(c->g.dtail_in + n * p->D * keep, dtail, (size_t)(p->D * keep)), kl_tol_kda_f32.gradient));
        FREE_ALL(x, dy, tail, dtail_out, y, tail_out, dx, dtail);
    }
    assert_true(kl_within(kl_rel_err(c->g.dweight, dw, (size_t)(p->D * p->W)), kl_tol_kda_f32.gradient));
    free(dw);
    free(w);
    kl_ctx_destroy(ctx);
}

static void agrees_with_the_reference(void **state)
{
    NEEDS_ITS_DEVICE();
    const int64_t widths[] = {1, 2, 3, 4, 7, 16}, channels[] = {1, 16, 60, 264}, lengths[] = {1, 2, 3, 4, 5, 33, 300};
    uint64_t seed = 1;
    for (size_t w = 0; w < 6; w++)
        for (size_t d = 0; d < 4; d++)
            for (size_t t = 0; t < 7; t++, seed++) {
                if (device == KL_CUDA && (w + t) % 4 != d) /* emulated, every fourth is enough: each pair of sizes once */
                    continue;
                conv_case c = new_conv(2, lengths[t], NULL, channels[d], widths[w], seed % 3 ? 0 : seed % 2 ? 8 : 5, seed % 2, seed);
                check_conv(&c);
                free_conv(&c);
            }
}

static void packed_and_empty_sequences(void **state)
{
    NEEDS_ITS_DEVICE();
    const int64_t cu_seqlens[] = {0, 0, 1, 3, 3, 259, 560, 560};
    for (int64_t W = 1; W <= 5; W++) {
        conv_case c = new_conv(7, 0, cu_seqlens, W % 2 ? 64 : 70, W, W % 2 ? 0 : 2, true, (uint64_t)W);
        check_conv(&c);
        free_conv(&c);
    }
}

static void sequences_shorter_than_the_taps(void **state)
{
    NEEDS_ITS_DEVICE();
    for (int64_t T = 1; T < 8; T++) {
        conv_case c = new_conv(3, T, NULL, 20, 8, 0, true, (uint64_t)T);
        check_conv(&c);
        free_conv(&c);
    }
}

static void in_place_tail_through_an_index(void **state)
{
    NEEDS_ITS_DEVICE();
    enum { D = 33, W = 4, T = 2, N = 3, POOL = 7 };
    conv_case c = new_conv(N, T, NULL, D, W, 0, true, 5);
    kl_ctx *ctx = context(2);
    assert_ok(conv_forward(ctx, &c.p));
    const int64_t index[N] = {6, 0, 3};
    float *pool = poisoned(POOL * D * (W - 1)), *y = poisoned(N * T * D);
    for (int64_t n = 0; n < N; n++)
        memcpy(pool + index[n] * D * (W - 1), c.tail_in + n * D * (W - 1), D * (W - 1) * sizeof(float));
    kda_conv_problem p = c.p;
    p.tail_in = p.tail_out = pool;
    p.state_index = index;
    p.state_pool = POOL;
    p.y = y;
    assert_ok(conv_forward(ctx, &p));
    assert_memory_equal(y, c.p.y, N * T * D * sizeof(float));
    for (int64_t n = 0; n < N; n++)
        assert_memory_equal(pool + index[n] * D * (W - 1), (const float *)c.p.tail_out + n * D * (W - 1), D * (W - 1) * sizeof(float));
    for (int64_t i = 0; i < D * (W - 1); i++)
        assert_true(isnan(pool[1 * D * (W - 1) + i]));
    free(pool);
    free(y);
    free_conv(&c);
    kl_ctx_destroy(ctx);
}

static void split_anywhere_has_the_same_bits(void **state)
{
    NEEDS_ITS_DEVICE();
    enum { D = 50, W = 4, T = 21 };
    conv_case c = new_conv(1, T, NULL, D, W, 0, true, 9);
    kl_ctx *ctx = context(1);
    assert_ok(conv_forward(ctx, &c.p));
    for (int64_t s = 0; s <= T; s++) {
        float *tail = poisoned(D * (W - 1)), *y = poisoned(T * D);
        kda_conv_problem first = c.p, second = c.p;
        first.T = s;
        first.y = y;
        first.tail_out = tail;
        second.T = T - s;
        second.x = (const float *)second.x + s * D;
        second.y = y + s * D;
        second.tail_in = second.tail_out = tail;
        assert_ok(conv_forward(ctx, &first));
        assert_ok(conv_forward(ctx, &second));
        assert_memory_equal(y, c.p.y, T * D * sizeof(float));
        assert_memory_equal(tail, c.p.tail_out, D * (W - 1) * sizeof(float));
        free(tail);
        free(y);
    }
    free_conv(&c);
    kl_ctx_destroy(ctx);
}

/* Inputs and tails that bf16 holds exactly: kept in bf16, the split still has the same bits. */
static void tail_in_bf16(void **state)
{
    NEEDS_ITS_DEVICE();
    enum { D = 50, W = 4, T = 9, TAIL = D * (W - 1) };
    conv_case c = new_conv(1, T, NULL, D, W, 0, true, 11);
    uint16_t before[TAIL], tail[TAIL];
    for (int64_t i = 0; i < T * D; i++)
        c.x[i] = kl_bf16_to_f32(kl_f32_to_bf16(c.x[i]));
    kl_from_f32(before, KL_BF16, c.tail_in, TAIL);
    kl_to_f32(c.tail_in, before, KL_BF16, TAIL);
    kl_ctx *ctx = context(1);
    assert_ok(conv_forward(ctx, &c.p));
    for (int64_t s = 0; s <= T; s++) {
        float *y = poisoned(T * D), wide[TAIL];
        memcpy(tail, before, sizeof tail);
        kda_conv_problem first = c.p, second = c.p;
        first.tail_dtype = second.tail_dtype = KL_BF16;
        first.tail_in = second.tail_in = tail;
        first.tail_out = second.tail_out = tail;
        first.T = s;
        first.y = y;
        second.T = T - s;
        second.x = (const float *)second.x + s * D;
        second.y = y + s * D;
        assert_ok(conv_forward(ctx, &first));
        assert_ok(conv_forward(ctx, &second));
        assert_memory_equal(y, c.p.y, T * D * sizeof(float));
        kl_to_f32(wide, tail, KL_BF16, TAIL);
        assert_memory_equal(wide, c.p.tail_out, sizeof wide);
        free(y);
    }
    free_conv(&c);
    kl_ctx_destroy(ctx);
}

static void does_not_depend_on_the_thread_count(void **state)
{
    NEEDS_ITS_DEVICE();
    conv_case c = new_conv(2, 300, NULL, 200, 4, 0, true, 3);
    float *y = poisoned(c.tokens * 200), *dx = poisoned(c.tokens * 200), dweight[200 * 4];
    for (int threads = 1; threads <= 3; threads++) {
        kl_ctx *ctx = context(threads);
        memset(c.g.dweight, 0, sizeof dweight);
        assert_ok(conv_forward(ctx, &c.p));
        assert_ok(conv_backward(ctx, &c.p, &c.g));
        if (threads == 1) {
            memcpy(y, c.p.y, (size_t)c.tokens * 200 * sizeof(float));
            memcpy(dx, c.g.dx, (size_t)c.tokens * 200 * sizeof(float));
            memcpy(dweight, c.g.dweight, sizeof dweight);
        }
        assert_memory_equal(y, c.p.y, (size_t)c.tokens * 200 * sizeof(float));
        assert_memory_equal(dx, c.g.dx, (size_t)c.tokens * 200 * sizeof(float));
        assert_memory_equal(dweight, c.g.dweight, sizeof dweight);
        kl_ctx_destroy(ctx);
    }
    free(y);
    free(dx);
    free_conv(&c);
}

static void weights_in_bf16_and_f16(void **state)
{
    NEEDS_ITS_DEVICE();
    conv_case c = new_conv(1, 40, NULL, 30, 4, 0, false, 11);
    kl_ctx *ctx = context(1);
    const kl_dtype types[] = {KL_BF16, KL_F16};
    for (int i = 0; i < 2; i++) {
        uint16_t narrow[30 * 4];
        kl_from_f32(narrow, types[i], c.weight, 30 * 4);
        kl_to_f32(c.weight, narrow, types[i], 30 * 4);
        float *y = poisoned(40 * 30);
        kda_conv_problem p = c.p;
        p.weight = narrow;
        p.weight_dtype = types[i];
        p.y = y;
        assert_ok(conv_forward(ctx, &p));
        assert_ok(conv_forward(ctx, &c.p));
        assert_memory_equal(y, c.p.y, 40 * 30 * sizeof(float));
        free(y);
    }
    free_conv(&c);
    kl_ctx_destroy(ctx);
}

static void refuses_by_name(void **state)
{
    NEEDS_ITS_DEVICE();
    conv_case c = new_conv(2, 4, NULL, 8, 4, 0, true, 1);
    kl_ctx *ctx = context(1);
    kda_conv_problem p = c.p;
#define REFUSED(change, name)                                      \
    do {                                                           \
        p = c.p;                                                   \
        change;                                                    \
        expect_error(kda_conv_forward(ctx, &p), KL_EINVAL, name);  \
    } while (0)
    REFUSED(p.W = 17, "W:");
    REFUSED(p.W = 0, "W:");
    REFUSED(p.D = 0, "D:");
    REFUSED(p.x_stride = 7, "x_stride");
    REFUSED(p.y_stride = 7, "y_stride");
    REFUSED(p.N = 3, "N:");
    REFUSED(p.T = -1, "T:");
    REFUSED(p.weight_dtype = KL_I32, "weight_dtype");
    REFUSED(p.y = (float *)p.x, "y:");
    REFUSED(p.weight = NULL, "weight:");
    free_conv(&c);
    kl_ctx_destroy(ctx);
}

/* bf16 activations against the float ones that hold the same numbers. */
static void activations_in_bf16(void **state)
{
    NEEDS_ITS_DEVICE();
    const int64_t channels[] = {64, 33};
    for (int i = 0; i < 2; i++) {
        conv_case c = new_conv(2, 70, NULL, channels[i], 4, 0, true, 21);
        int64_t n = c.tokens * channels[i];
        kda_conv_problem p = c.p;
        kda_conv_grads g = c.g;
        p.dtype = KL_BF16;
        void *x = rounded(c.x, n), *dy = rounded(c.dy, n);
        p.x = x;
        g.dy = dy;
        p.y = malloc((size_t)n * 2);
        g.dx = malloc((size_t)n * 2);
        g.dweight = calloc((size_t)(channels[i] * 4), sizeof(float));
        p.tail_out = poisoned(2 * channels[i] * 3);
        kl_ctx *ctx = context(1);
        assert_ok(conv_forward(ctx, &p));
        assert_ok(conv_backward(ctx, &p, &g));
        assert_ok(conv_forward(ctx, &c.p));
        assert_ok(conv_backward(ctx, &c.p, &c.g));
        float *y = poisoned(n), *dx = poisoned(n);
        widened(y, p.y, n);
        widened(dx, g.dx, n);
        assert_true(kl_within(kl_rel_err_f32(y, c.p.y, (size_t)n), kl_tol_kda_bf16.forward));
        assert_true(kl_within(kl_rel_err_f32(dx, c.g.dx, (size_t)n), kl_tol_kda_bf16.gradient));
        assert_memory_equal(p.tail_out, c.p.tail_out, (size_t)(2 * channels[i] * 3) * sizeof(float));
        assert_memory_equal(g.dweight, c.g.dweight, (size_t)(channels[i] * 4) * sizeof(float));
        kl_ctx_destroy(ctx);
        FREE_ALL(x, dy, y, dx, g.dweight, p.tail_out);
        free_conv(&c);
    }
}


static void bf16_is_refused_on_the_cpu(void **state)
{
    (void)state;
    float x[8] = {0}, y[8], weight[8] = {0};
    kl_ctx *ctx = context(1);
    kda_conv_problem p = {.B = 1, .T = 1, .N = 1, .D = 8, .W = 1, .dtype = KL_BF16, .x = x, .y = y, .weight = weight};
    expect_error(kda_conv_forward(ctx, &p), KL_EUNSUPPORTED, "dtype:");
    kl_ctx_destroy(ctx);
}

static void a_missing_workspace_is_refused(void **state)
{
    NEEDS_ITS_DEVICE();
    const int64_t cu_seqlens[] = {0, 1, 1};
    float x[8] = {0}, y[8], weight[8] = {0};
    kl_ctx *ctx = context(1);
    kda_conv_problem p = {.B = 1, .T = 1, .N = 2, .cu_seqlens = cu_seqlens, .D = 8, .W = 1, .x = x, .y = y, .weight = weight};
    expect_error(kda_conv_forward(ctx, &p), KL_EINVAL, "workspace:");
    kl_ctx_destroy(ctx);
}

#define ON_BOTH                                               \
    cmocka_unit_test(agrees_with_the_reference),              \
        cmocka_unit_test(packed_and_empty_sequences),         \
        cmocka_unit_test(sequences_shorter_than_the_taps),    \
        cmocka_unit_test(in_place_tail_through_an_index),     \
        cmocka_unit_test(split_anywhere_has_the_same_bits),   \
        cmocka_unit_test(tail_in_bf16),                       \
        cmocka_unit_test(weights_in_bf16_and_f16),            \
        cmocka_unit_test(refuses_by_name)

int main(void)
{
    const struct CMUnitTest cpu[] = {ON_BOTH, cmocka_unit_test(does_not_depend_on_the_thread_count), cmocka_unit_test(bf16_is_refused_on_the_cpu)};
    const struct CMUnitTest cuda[] = {ON_BOTH, cmocka_unit_test(activations_in_bf16), cmocka_unit_test(a_missing_workspace_is_refused)};
    int failed = cmocka_run_group_tests_name("kda_conv", cpu, on_cpu, NULL);
    return failed + cmocka_run_group_tests_name("kda_conv on cuda", cuda, on_cuda, NULL);
}
