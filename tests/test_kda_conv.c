/* The short convolution and the gated norm around the recurrence, against their references: on the CPU, and as CUDA kernels
 * where those run on the host (make EMULATE=1). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "common/compare.h"
#include "common/gpu.h"
#include "common/rng.h"
#include "kda/conv.h"
#include "kda/gated_norm.h"
#include "reference/conv.h"
#include "reference/norm.h"

static kl_device device = KL_CPU;

static kl_ctx *context(int threads)
{
    kl_ctx *ctx;
    assert_int_equal(kl_ctx_create(&ctx, &(kl_ctx_options){.device = device, .threads = threads}).code, KL_OK);
    return ctx;
}

static float *poisoned(int64_t n)
{
    float *x = malloc((size_t)(n + 1) * sizeof *x);
    assert_non_null(x);
    memset(x, 0xff, (size_t)(n + 1) * sizeof *x);
    return x;
}
static float *normal(kl_rng *r, int64_t n)
{
    float *x = poisoned(n);
    kl_fill_normal(r, x, (size_t)n, 0.0f, 1.0f);
    return x;
}
static double *widen(const float *x, int64_t n)
{
    double *y = ref_zeros(n);
    for (int64_t i = 0; i < n; i++)
        y[i] = x[i];
    return y;
}

/* ---- calls with the workspace that they ask for: NaN before, nothing written beyond it ---- */

enum { GUARD = 64 };

static void *open_workspace(size_t bytes)
{
    void *workspace = aligned_alloc(64, bytes + GUARD);
    assert_non_null(workspace);
    return memset(workspace, 0xff, bytes + GUARD);
}
static void close_workspace(void *workspace, size_t bytes)
{
    for (size_t i = 0; i < GUARD; i++)
        assert_int_equal(((unsigned char *)workspace)[bytes + i], 0xff);
    free(workspace);
}

static kl_status conv_forward(kl_ctx *ctx, const kda_conv_problem *given)
{
    kda_conv_problem p = *given;
    p.workspace_bytes = kda_conv_workspace(ctx, &p, KL_FORWARD);
    p.workspace = open_workspace(p.workspace_bytes);
    kl_status s = kda_conv_forward(ctx, &p);
    close_workspace(p.workspace, p.workspace_bytes);
    return s;
}
static kl_status conv_backward(kl_ctx *ctx, const kda_conv_problem *given, const kda_conv_grads *g)
{
    kda_conv_problem p = *given;
    p.workspace_bytes = kda_conv_workspace(ctx, &p, KL_BACKWARD);
    p.workspace = open_workspace(p.workspace_bytes);
    kl_status s = kda_conv_backward(ctx, &p, g);
    close_workspace(p.workspace, p.workspace_bytes);
    return s;
}
static kl_status gated_norm_backward(kl_ctx *ctx, const kda_gated_norm_problem *given, const kda_gated_norm_grads *g)
{
    kda_gated_norm_problem p = *given;
    p.workspace_bytes = kda_gated_norm_workspace(ctx, &p, KL_BACKWARD);
    p.workspace = open_workspace(p.workspace_bytes);
    kl_status s = kda_gated_norm_backward(ctx, &p, g);
    close_workspace(p.workspace, p.workspace_bytes);
    return s;
}

/* ---- convolution ---- */

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
    void *all[] = {c->x, c->weight, c->tail_in, c->dy, c->dtail_out, c->p.y, c->p.tail_out, c->g.dx, c->g.dweight, c->g.dtail_in};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
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
    assert_int_equal(conv_forward(ctx, p).code, KL_OK);
    assert_int_equal(conv_backward(ctx, p, &c->g).code, KL_OK);
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
        void *all[] = {x, dy, tail, dtail_out, y, tail_out, dx, dtail};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            free(all[i]);
    }
    assert_true(kl_within(kl_rel_err(c->g.dweight, dw, (size_t)(p->D * p->W)), kl_tol_kda_f32.gradient));
    free(dw);
    free(w);
    kl_ctx_destroy(ctx);
}

static void conv_agrees_with_the_reference(void **state)
{
    (void)state;
    const int64_t widths[] = {1, 2, 4, 7, 16}, channels[] = {1, 16, 60, 130}, lengths[] = {1, 2, 3, 4, 5, 33, 300};
    uint64_t seed = 1;
    for (size_t w = 0; w < 5; w++)
        for (size_t d = 0; d < 4; d++)
            for (size_t t = 0; t < 7; t++, seed++) {
                conv_case c = new_conv(2, lengths[t], NULL, channels[d], widths[w], seed % 3 ? 0 : 5, seed % 2, seed);
                check_conv(&c);
                free_conv(&c);
            }
}

static void conv_of_packed_and_empty_sequences(void **state)
{
    (void)state;
    const int64_t cu_seqlens[] = {0, 0, 1, 3, 3, 259, 560, 560};
    for (int64_t W = 1; W <= 5; W++) {
        conv_case c = new_conv(7, 0, cu_seqlens, 70, W, 2, true, (uint64_t)W);
        check_conv(&c);
        free_conv(&c);
    }
}

static void conv_shorter_than_its_width(void **state)
{
    (void)state;
    for (int64_t T = 1; T < 8; T++) {
        conv_case c = new_conv(3, T, NULL, 20, 8, 0, true, (uint64_t)T);
        check_conv(&c);
        free_conv(&c);
    }
}

static void conv_in_place_tail_through_an_index(void **state)
{
    (void)state;
    enum { D = 33, W = 4, T = 2, N = 3, POOL = 7 };
    conv_case c = new_conv(N, T, NULL, D, W, 0, true, 5);
    kl_ctx *ctx = context(2);
    assert_int_equal(conv_forward(ctx, &c.p).code, KL_OK);
    const int64_t index[N] = {6, 0, 3};
    float *pool = poisoned(POOL * D * (W - 1)), *y = poisoned(N * T * D);
    for (int64_t n = 0; n < N; n++)
        memcpy(pool + index[n] * D * (W - 1), c.tail_in + n * D * (W - 1), D * (W - 1) * sizeof(float));
    kda_conv_problem p = c.p;
    p.tail_in = p.tail_out = pool;
    p.state_index = index;
    p.y = y;
    assert_int_equal(conv_forward(ctx, &p).code, KL_OK);
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

static void conv_split_anywhere_has_the_same_bits(void **state)
{
    (void)state;
    enum { D = 50, W = 4, T = 21 };
    conv_case c = new_conv(1, T, NULL, D, W, 0, true, 9);
    kl_ctx *ctx = context(1);
    assert_int_equal(conv_forward(ctx, &c.p).code, KL_OK);
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
        assert_int_equal(conv_forward(ctx, &first).code, KL_OK);
        assert_int_equal(conv_forward(ctx, &second).code, KL_OK);
        assert_memory_equal(y, c.p.y, T * D * sizeof(float));
        assert_memory_equal(tail, c.p.tail_out, D * (W - 1) * sizeof(float));
        free(tail);
        free(y);
    }
    free_conv(&c);
    kl_ctx_destroy(ctx);
}

/* Inputs and tails that bf16 holds exactly: kept in bf16, the split still has the same bits. */
static void conv_tail_in_bf16(void **state)
{
    (void)state;
    enum { D = 50, W = 4, T = 9, TAIL = D * (W - 1) };
    conv_case c = new_conv(1, T, NULL, D, W, 0, true, 11);
    uint16_t before[TAIL], tail[TAIL];
    for (int64_t i = 0; i < T * D; i++)
        c.x[i] = kl_bf16_to_f32(kl_f32_to_bf16(c.x[i]));
    kl_from_f32(before, KL_BF16, c.tail_in, TAIL);
    kl_to_f32(c.tail_in, before, KL_BF16, TAIL);
    kl_ctx *ctx = context(1);
    assert_int_equal(conv_forward(ctx, &c.p).code, KL_OK);
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
        assert_int_equal(conv_forward(ctx, &first).code, KL_OK);
        assert_int_equal(conv_forward(ctx, &second).code, KL_OK);
        assert_memory_equal(y, c.p.y, T * D * sizeof(float));
        kl_to_f32(wide, tail, KL_BF16, TAIL);
        assert_memory_equal(wide, c.p.tail_out, sizeof wide);
        free(y);
    }
    free_conv(&c);
    kl_ctx_destroy(ctx);
}

static void conv_does_not_depend_on_the_thread_count(void **state)
{
    (void)state;
    conv_case c = new_conv(2, 300, NULL, 200, 4, 0, true, 3);
    float *y = poisoned(c.tokens * 200), *dx = poisoned(c.tokens * 200), dweight[200 * 4];
    for (int threads = 1; threads <= 3; threads++) {
        kl_ctx *ctx = context(threads);
        memset(c.g.dweight, 0, sizeof dweight);
        assert_int_equal(conv_forward(ctx, &c.p).code, KL_OK);
        assert_int_equal(conv_backward(ctx, &c.p, &c.g).code, KL_OK);
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

static void conv_weights_in_bf16_and_f16(void **state)
{
    (void)state;
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
        assert_int_equal(conv_forward(ctx, &p).code, KL_OK);
        assert_int_equal(conv_forward(ctx, &c.p).code, KL_OK);
        assert_memory_equal(y, c.p.y, 40 * 30 * sizeof(float));
        free(y);
    }
    free_conv(&c);
    kl_ctx_destroy(ctx);
}

static void conv_refuses_by_name(void **state)
{
    (void)state;
    conv_case c = new_conv(2, 4, NULL, 8, 4, 0, true, 1);
    kl_ctx *ctx = context(1);
    kda_conv_problem p = c.p;
#define REFUSED(change, name)                                   \
    do {                                                        \
        p = c.p;                                                \
        change;                                                 \
        kl_status s = conv_forward(ctx, &p);                \
        assert_int_equal(s.code, KL_EINVAL);                    \
        assert_non_null(strstr(s.message, name));               \
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

/* ---- gated norm ---- */

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
    assert_int_equal(kda_gated_norm_forward(ctx, &p).code, KL_OK);
    assert_int_equal(gated_norm_backward(ctx, &p, &g).code, KL_OK);
    assert_true(kl_within(kl_rel_err(y, ry, (size_t)n), kl_tol_kda_f32.forward));
    assert_true(kl_within(kl_rel_err(dx, rdx, (size_t)n), kl_tol_kda_f32.gradient));
    assert_true(kl_within(kl_rel_err(dw, rdw, (size_t)V), kl_tol_kda_f32.gradient));
    if (gated)
        assert_true(kl_within(kl_rel_err(dz, rdz, (size_t)n), kl_tol_kda_f32.gradient));
    /* y may be x, dx may be dy */
    p.y = x;
    g.dx = dy;
    assert_int_equal(gated_norm_backward(ctx, &p, &g).code, KL_OK);
    assert_memory_equal(dy, dx, (size_t)n * sizeof(float));
    assert_int_equal(kda_gated_norm_forward(ctx, &p).code, KL_OK);
    assert_memory_equal(x, y, (size_t)n * sizeof(float));
    kl_ctx_destroy(ctx);
    void *all[] = {x, z, weight, dy, y, dx, dz, dw, rx, rz, rw, rdy, ry, rdx, rdz, rdw};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static void gated_norm_agrees_with_the_reference(void **state)
{
    (void)state;
    const int64_t widths[] = {2, 8, 24, 60, 128, 256};
    uint64_t seed = 1;
    for (int kind = 0; kind < 3; kind++)
        for (size_t i = 0; i < 6; i++)
            for (int64_t rows = 1; rows < 400; rows = rows * 5 + 1)
                check_norm(rows, widths[i], (kda_output_gate)kind, 2, seed++);
}

static void gated_norm_does_not_depend_on_the_thread_count(void **state)
{
    (void)state;
    enum { ROWS = 1000, V = 40 };
    kl_rng r = kl_rng_make(4, 4);
    float *x = normal(&r, ROWS * V), *z = normal(&r, ROWS * V), *dy = normal(&r, ROWS * V), weight[V], dw[4][V] = {{0}};
    kl_fill_normal(&r, weight, V, 0.0f, 1.0f);
    for (int threads = 1; threads <= 3; threads++) {
        kl_ctx *ctx = context(threads);
        kda_gated_norm_problem p = {.rows = ROWS, .V = V, .eps = 1e-5f, .x = x, .gate = z, .weight = weight};
        assert_int_equal(gated_norm_backward(ctx, &p, &(kda_gated_norm_grads){.dy = dy, .dweight = dw[threads]}).code, KL_OK);
        assert_memory_equal(dw[threads], dw[1], sizeof dw[1]);
        kl_ctx_destroy(ctx);
    }
    free(x);
    free(z);
    free(dy);
}

static void gated_norm_refuses_by_name(void **state)
{
    (void)state;
    float x[8] = {0}, w[8] = {0};
    kl_ctx *ctx = context(1);
    kda_gated_norm_problem good = {.rows = 1, .V = 8, .gate_kind = KDA_OUT_NONE, .eps = 1e-5f, .x = x, .weight = w, .y = x}, p;
    assert_int_equal(kda_gated_norm_forward(ctx, &good).code, KL_OK);
#define REFUSED_NORM(change, name)                              \
    do {                                                        \
        p = good;                                               \
        change;                                                 \
        kl_status s = kda_gated_norm_forward(ctx, &p);          \
        assert_int_equal(s.code, KL_EINVAL);                    \
        assert_non_null(strstr(s.message, name));               \
    } while (0)
    REFUSED_NORM(p.gate = x, "gate:");
    REFUSED_NORM(p.gate_kind = KDA_OUT_SWISH, "gate:");
    REFUSED_NORM(p.gate_kind = (kda_output_gate)7, "gate_kind");
    REFUSED_NORM(p.V = 0, "V:");
    REFUSED_NORM(p.eps = NAN, "eps");
    REFUSED_NORM(p.rows = -1, "rows");
    kl_ctx_destroy(ctx);
}

/* ---- on CUDA ---- */

static void only_emulated(void)
{
    if (!kl_gpu_emulated())
        skip();
}

static void conv_on_cuda(void **state)
{
    only_emulated();
    device = KL_CUDA;
    const int64_t widths[] = {1, 3, 4, 7, 16}, channels[] = {8, 60, 264, 1, 16}, lengths[] = {1, 3, 5, 33, 300};
    uint64_t seed = 1;
    for (size_t w = 0; w < 5; w++)
        for (size_t t = 0; t < 5; t++, seed++) {
            conv_case c = new_conv(2, lengths[t], NULL, channels[(w + t) % 5], widths[w], seed % 3 ? 0 : 8, seed % 2, seed);
            check_conv(&c);
            free_conv(&c);
        }
    const int64_t cu_seqlens[] = {0, 0, 1, 3, 3, 259, 560, 560};
    for (int64_t W = 1; W <= 5; W++) {
        conv_case c = new_conv(7, 0, cu_seqlens, W % 2 ? 64 : 70, W, 0, true, (uint64_t)W);
        check_conv(&c);
        free_conv(&c);
    }
    conv_shorter_than_its_width(state);
    conv_in_place_tail_through_an_index(state);
    conv_split_anywhere_has_the_same_bits(state);
    conv_tail_in_bf16(state);
    conv_weights_in_bf16_and_f16(state);
    conv_refuses_by_name(state);
    device = KL_CPU;
}

/* Rounds n floats where they lie and returns them as bf16. */
static uint16_t *rounded(float *x, int64_t n)
{
    uint16_t *y = malloc((size_t)(n + 1) * sizeof *y);
    assert_non_null(y);
    kl_from_f32(y, KL_BF16, x, (size_t)n);
    kl_to_f32(x, y, KL_BF16, (size_t)n);
    return y;
}
static void widened(float *x, void *y, int64_t n)
{
    kl_to_f32(x, y, KL_BF16, (size_t)n);
    free(y);
}

/* bf16 activations against the float ones that hold the same numbers. */
static void conv_on_cuda_in_bf16(void **state)
{
    (void)state;
    only_emulated();
    device = KL_CUDA;
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
        assert_int_equal(conv_forward(ctx, &p).code, KL_OK);
        assert_int_equal(conv_backward(ctx, &p, &g).code, KL_OK);
        assert_int_equal(conv_forward(ctx, &c.p).code, KL_OK);
        assert_int_equal(conv_backward(ctx, &c.p, &c.g).code, KL_OK);
        float *y = poisoned(n), *dx = poisoned(n);
        widened(y, p.y, n);
        widened(dx, g.dx, n);
        assert_true(kl_within(kl_rel_err_f32(y, c.p.y, (size_t)n), kl_tol_kda_bf16.forward));
        assert_true(kl_within(kl_rel_err_f32(dx, c.g.dx, (size_t)n), kl_tol_kda_bf16.gradient));
        assert_memory_equal(p.tail_out, c.p.tail_out, (size_t)(2 * channels[i] * 3) * sizeof(float));
        assert_memory_equal(g.dweight, c.g.dweight, (size_t)(channels[i] * 4) * sizeof(float));
        kl_ctx_destroy(ctx);
        void *all[] = {x, dy, y, dx, g.dweight, p.tail_out};
        for (size_t j = 0; j < sizeof all / sizeof *all; j++)
            free(all[j]);
        free_conv(&c);
    }
    device = KL_CPU;
}

static void gated_norm_on_cuda(void **state)
{
    only_emulated();
    device = KL_CUDA;
    const int64_t widths[] = {2, 60, 64, 128, 256, 300};
    uint64_t seed = 1;
    for (int kind = 0; kind < 3; kind++)
        for (size_t i = 0; i < 6; i++)
            for (int64_t rows = 1; rows < 400; rows = rows * 12 + 1)
                check_norm(rows, widths[i], (kda_output_gate)kind, 1, seed++);
    gated_norm_refuses_by_name(state);
    device = KL_CPU;
}

static void gated_norm_on_cuda_in_bf16(void **state)
{
    (void)state;
    only_emulated();
    device = KL_CUDA;
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
        assert_int_equal(kda_gated_norm_forward(ctx, &p).code, KL_OK);
        assert_int_equal(gated_norm_backward(ctx, &p, &g).code, KL_OK);
        assert_int_equal(kda_gated_norm_forward(ctx, &p16).code, KL_OK);
        assert_int_equal(gated_norm_backward(ctx, &p16, &g16).code, KL_OK);
        widened(wide, y16, n);
        assert_true(kl_within(kl_rel_err_f32(wide, y, (size_t)n), kl_tol_kda_bf16.forward));
        widened(wide, dy16, n);
        assert_true(kl_within(kl_rel_err_f32(wide, dx, (size_t)n), kl_tol_kda_bf16.gradient));
        widened(wide, dz16, n);
        assert_true(kl_within(kl_rel_err_f32(wide, dz, (size_t)n), kl_tol_kda_bf16.gradient));
        assert_memory_equal(dw16, dw, (size_t)V * sizeof *dw);
        kl_ctx_destroy(ctx);
        void *all[] = {x, z, dy, weight, y, dx, dz, wide, dw, dw16, x16, z16};
        for (size_t j = 0; j < sizeof all / sizeof *all; j++)
            free(all[j]);
    }
    device = KL_CPU;
}

/* The CPU computes in float, and says so; CUDA wants the workspace that it asks for. */
static void device_types_and_workspaces_are_refused_by_name(void **state)
{
    (void)state;
    float x[8] = {0}, y[8], w[8] = {0};
    kl_ctx *ctx = context(1);
    kl_status s = kda_conv_forward(ctx, &(kda_conv_problem){.B = 1, .T = 1, .N = 1, .D = 8, .W = 1, .dtype = KL_BF16, .x = x, .y = y, .weight = w});
    assert_int_equal(s.code, KL_EUNSUPPORTED);
    assert_non_null(strstr(s.message, "dtype:"));
    s = kda_gated_norm_forward(ctx, &(kda_gated_norm_problem){.rows = 1, .V = 8, .gate_kind = KDA_OUT_NONE, .dtype = KL_BF16, .x = x, .y = y, .weight = w});
    assert_int_equal(s.code, KL_EUNSUPPORTED);
    assert_non_null(strstr(s.message, "dtype:"));
    kl_ctx_destroy(ctx);
    only_emulated();
    device = KL_CUDA;
    ctx = context(1);
    s = kda_gated_norm_backward(ctx, &(kda_gated_norm_problem){.rows = 1, .V = 8, .gate_kind = KDA_OUT_NONE, .x = x, .weight = w},
                                &(kda_gated_norm_grads){.dy = y, .dx = y, .dweight = w});
    assert_int_equal(s.code, KL_EINVAL);
    assert_non_null(strstr(s.message, "workspace:"));
    const int64_t cu_seqlens[] = {0, 1, 1};
    s = kda_conv_forward(ctx, &(kda_conv_problem){.B = 1, .T = 1, .N = 2, .cu_seqlens = cu_seqlens, .D = 8, .W = 1, .x = x, .y = y, .weight = w});
    assert_int_equal(s.code, KL_EINVAL);
    assert_non_null(strstr(s.message, "workspace:"));
    kl_ctx_destroy(ctx);
    device = KL_CPU;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(conv_agrees_with_the_reference),
        cmocka_unit_test(conv_of_packed_and_empty_sequences),
        cmocka_unit_test(conv_shorter_than_its_width),
        cmocka_unit_test(conv_in_place_tail_through_an_index),
        cmocka_unit_test(conv_split_anywhere_has_the_same_bits),
        cmocka_unit_test(conv_tail_in_bf16),
        cmocka_unit_test(conv_does_not_depend_on_the_thread_count),
        cmocka_unit_test(conv_weights_in_bf16_and_f16),
        cmocka_unit_test(conv_refuses_by_name),
        cmocka_unit_test(gated_norm_agrees_with_the_reference),
        cmocka_unit_test(gated_norm_does_not_depend_on_the_thread_count),
        cmocka_unit_test(gated_norm_refuses_by_name),
        cmocka_unit_test(conv_on_cuda),
        cmocka_unit_test(conv_on_cuda_in_bf16),
        cmocka_unit_test(gated_norm_on_cuda),
        cmocka_unit_test(gated_norm_on_cuda_in_bf16),
        cmocka_unit_test(device_types_and_workspaces_are_refused_by_name),
    };
    return cmocka_run_group_tests_name("kda_conv", tests, NULL, NULL);
}
