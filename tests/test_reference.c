/* The references around KDA: convolution, norms, MLA and its rotary embedding, feed-forward, MoE, embedding, linear, cross-entropy.
 * Forward passes are held to values worked out by hand or by another route, backward passes to finite differences. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "reference/activation.h"
#include "reference/conv.h"
#include "reference/linear.h"
#include "reference/loss.h"
#include "reference/mla.h"
#include "reference/mlp.h"
#include "reference/moe.h"
#include "reference/norm.h"
#include "tests/fd.h"

static const double SAME_LIMIT = 1e-12; /* two orders of summation of the same numbers in double */

/* ---- convolution ---- */

typedef struct {
    ref_conv p;
    real *x, *w, *tail, *y, *tail_out, *dy, *dtail_out;
} conv_case;

static conv_case make_conv(fd_rng *r, int64_t T, int64_t C, int64_t W, int silu)
{
    conv_case c = { .x = fd_randoms(r, T * C, 1), .w = fd_randoms(r, C * W, 0.7), .tail = fd_randoms(r, C * (W - 1), 1),
                    .y = fd_zeros(T * C), .tail_out = fd_zeros(C * (W - 1)), .dy = fd_randoms(r, T * C, 1),
                    .dtail_out = fd_randoms(r, C * (W - 1), 1) };
    c.p = (ref_conv){ .T = T, .C = C, .W = W, .silu = silu, .x = c.x, .w = c.w, .tail = c.tail };
    return c;
}

static void free_conv(conv_case *c)
{
    real *all[] = { c->x, c->w, c->tail, c->y, c->tail_out, c->dy, c->dtail_out };
    for (size_t n = 0; n < sizeof all / sizeof *all; n++)
        free(all[n]);
}

static double conv_loss(void *context)
{
    conv_case *c = context;
    ref_conv_forward(&c->p, c->y, c->tail_out);
    return ref_dot(c->p.T * c->p.C, c->y, c->dy) + ref_dot(c->p.C * (c->p.W - 1), c->tail_out, c->dtail_out);
}

static void test_conv_by_hand(void **state)
{
    (void)state;
    real x[] = { 1, 2, 3 }, w[] = { 100, 10, 1 }, tail[] = { 7, 5 }, y[3], tail_out[2];
    ref_conv p = { .T = 3, .C = 1, .W = 3, .x = x, .w = w, .tail = tail };
    ref_conv_forward(&p, y, tail_out);
    assert_true(y[0] == 751 && y[1] == 512 && y[2] == 123);
    assert_true(tail_out[0] == 2 && tail_out[1] == 3);
    p.T = 1;
    ref_conv_forward(&p, y, tail); /* in place, fewer tokens than the tail is long */
    assert_true(y[0] == 751 && tail[0] == 5 && tail[1] == 1);
    p.T = 0;
    ref_conv_forward(&p, y, tail_out);
    assert_true(tail_out[0] == 5 && tail_out[1] == 1);
    p.T = 3, p.tail = NULL;
    ref_conv_forward(&p, y, NULL);
    assert_true(y[0] == 1 && y[1] == 12 && y[2] == 123);
}

static void test_conv_gradients(void **state)
{
    (void)state;
    fd_rng r = fd_start("convolution backward");
    const int64_t shapes[][2] = { { 6, 4 }, { 2, 4 }, { 0, 4 }, { 5, 1 }, { 1, 7 } }; /* T, W */
    for (int n = 0; n < 10; n++) {
        int64_t T = shapes[n / 2][0], W = shapes[n / 2][1];
        conv_case c = make_conv(&r, T, 3, W, n % 2);
        real *dx = fd_zeros(T * 3), *dw = fd_zeros(3 * W), *dtail = fd_zeros(3 * (W - 1));
        ref_conv_backward(&c.p, c.dy, c.dtail_out, dx, dw, dtail);
        fd_assert_gradient("convolution", "x", c.x, dx, T * 3, conv_loss, &c);
        fd_assert_gradient("convolution", "w", c.w, dw, 3 * W, conv_loss, &c);
        fd_assert_gradient("convolution", "tail", c.tail, dtail, 3 * (W - 1), conv_loss, &c);
        free(dx);
        free(dw);
        free(dtail);
        free_conv(&c);
    }
}

static void test_conv_split_anywhere(void **state)
{
    (void)state;
    fd_rng r = fd_start("convolution split anywhere");
    conv_case c = make_conv(&r, 9, 3, 4, 1);
    conv_loss(&c);
    for (int64_t s = 0; s <= 9; s++) {
        real y[27], tail[9];
        ref_conv head = c.p, rest = c.p;
        head.T = s;
        rest.T = 9 - s, rest.x += s * 3, rest.tail = tail;
        ref_conv_forward(&head, y, tail);
        ref_conv_forward(&rest, y + s * 3, tail);
        fd_assert_close("y", 27, y, c.y, 0);
        fd_assert_close("tail", 9, tail, c.tail_out, 0);
    }
    free_conv(&c);
}

/* ---- norms ---- */

typedef struct {
    int kind; /* 0 RMS, 1 L2, 2.. gated RMS with gate kind - 2 */
    int64_t N, D;
    real *x, *w, *z, *y, *dy;
} norm_case;

static double norm_loss(void *context)
{
    norm_case *c = context;
    if (c->kind == 0)
        ref_rmsnorm_forward(c->N, c->D, 1e-5, c->x, c->w, c->y);
    else if (c->kind == 1)
        ref_l2norm_forward(c->N, c->D, 1e-6, c->x, c->y);
    else
        ref_gated_rmsnorm_forward(c->N, c->D, 1e-5, (ref_output_gate)(c->kind - 2), c->x, c->w, c->z, c->y);
    return ref_dot(c->N * c->D, c->y, c->dy);
}

static void test_norms_by_hand(void **state)
{
    (void)state;
    real x[] = { 3, 4 }, w[] = { 2, 1 }, z[] = { 0, 1 }, y[2], expected[2];
    ref_l2norm_forward(1, 2, 0, x, y);
    fd_assert_close("l2norm", 2, y, (real[]){ 0.6, 0.8 }, SAME_LIMIT);
    ref_rmsnorm_forward(1, 2, 0.5, x, w, y);
    expected[0] = 6 / sqrt(13), expected[1] = 4 / sqrt(13);
    fd_assert_close("rmsnorm", 2, y, expected, SAME_LIMIT);
    ref_gated_rmsnorm_forward(1, 2, 0.5, REF_OUTPUT_GATE_SIGMOID, x, w, z, y);
    expected[0] = 3 / sqrt(13), expected[1] = 4 / sqrt(13) / (1 + exp(-1));
    fd_assert_close("sigmoid gate", 2, y, expected, SAME_LIMIT);
    ref_gated_rmsnorm_forward(1, 2, 0.5, REF_OUTPUT_GATE_SWISH, x, w, z, y);
    expected[0] = 0;
    fd_assert_close("swish gate", 2, y, expected, SAME_LIMIT);
}

static void test_norm_gradients(void **state)
{
    (void)state;
    fd_rng r = fd_start("norms backward");
    for (int kind = 0; kind < 5; kind++) {
        int64_t N = 4, D = 7, n = N * D;
        norm_case c = { .kind = kind, .N = N, .D = D, .x = fd_randoms(&r, n, 1), .w = fd_randoms(&r, D, 1),
                        .z = fd_randoms(&r, n, 1), .y = fd_zeros(n), .dy = fd_randoms(&r, n, 1) };
        real *dx = fd_zeros(n), *dw = fd_zeros(D), *dz = fd_zeros(n);
        if (kind == 0)
            ref_rmsnorm_backward(N, D, 1e-5, c.x, c.w, c.dy, dx, dw);
        else if (kind == 1)
            ref_l2norm_backward(N, D, 1e-6, c.x, c.dy, dx);
        else
            assert_int_equal(ref_gated_rmsnorm_backward(N, D, 1e-5, (ref_output_gate)(kind - 2), c.x, c.w, c.z, c.dy, dx, dw, dz), 0);
        fd_assert_gradient("norm", "x", c.x, dx, n, norm_loss, &c);
        fd_assert_gradient("norm", "w", c.w, dw, D, norm_loss, &c);
        fd_assert_gradient("norm", "z", c.z, dz, n, norm_loss, &c);
        real *all[] = { c.x, c.w, c.z, c.y, c.dy, dx, dw, dz };
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            free(all[i]);
    }
}

static void test_activations_at_the_extremes(void **state)
{
    (void)state;
    assert_true(ref_sigmoid(-800) == 0 && ref_sigmoid(800) == 1);
    assert_true(ref_silu(-800) == 0 && ref_silu(800) == 800);
    assert_true(fabs(ref_sigmoid(0.3) - 1 / (1 + exp(-0.3))) <= 1e-15);
    assert_true(fabs(ref_softplus(-40) - exp(-40)) <= 1e-15 * exp(-40));
}

/* ---- MLA ---- */

typedef struct {
    ref_mla p;
    int64_t nq, nc, nw, no;
    real *q, *c, *W, *o, *lse, *d_o, *dq, *dc, *dW;
} mla_case;

static mla_case make_mla(fd_rng *r, ref_mla p)
{
    mla_case m = { .p = p, .nq = p.Tq * p.H * (p.Dn + p.Dr), .nc = p.Tk * (p.R + p.Dr), .nw = p.H * (p.Dn + p.Dv) * p.R, .no = p.Tq * p.H * p.Dv };
    m.q = fd_randoms(r, m.nq, 1), m.c = fd_randoms(r, m.nc, 1), m.W = fd_randoms(r, m.nw, 0.5), m.d_o = fd_randoms(r, m.no, 1);
    m.o = fd_zeros(m.no), m.lse = fd_zeros(p.Tq * p.H), m.dq = fd_zeros(m.nq), m.dc = fd_zeros(m.nc), m.dW = fd_zeros(m.nw);
    m.p.q = m.q, m.p.c = m.c, m.p.W = m.W;
    return m;
}

static void free_mla(mla_case *m)
{
    real *all[] = { m->q, m->c, m->W, m->o, m->lse, m->d_o, m->dq, m->dc, m->dW };
    for (size_t n = 0; n < sizeof all / sizeof *all; n++)
        free(all[n]);
}

static double mla_loss(void *context)
{
    mla_case *m = context;
    assert_int_equal(ref_mla_forward(&m->p, m->o, m->lse), 0);
    return ref_dot(m->no, m->o, m->d_o);
}

/* The absorbed form: q Wk_h is a query against the latent itself, and the mean latent goes through Wv_h last. */
static void absorbed_row(const ref_mla *p, int64_t i, int64_t h, real *o, real *lse)
{
    int64_t width = p->R + p->Dr, seen = p->Tk - p->Tq + i + 1;
    const real *q = p->q + (i * p->H + h) * (p->Dn + p->Dr), *W = p->W + h * (p->Dn + p->Dv) * p->R;
    real *query = fd_zeros(width), *mean = fd_zeros(p->R), sum = 0;
    for (int64_t n = 0; n < p->R; n++)
        for (int64_t e = 0; e < p->Dn; e++)
            query[n] += q[e] * W[e * p->R + n];
    for (int64_t e = 0; e < p->Dr; e++)
        query[p->R + e] = q[p->Dn + e];
    for (int64_t j = 0; j < seen; j++) {
        real weight = exp(ref_dot(width, query, p->c + j * width) / sqrt((double)(p->Dn + p->Dr)));
        sum += weight;
        for (int64_t n = 0; n < p->R; n++)
            mean[n] += weight * p->c[j * width + n];
    }
    for (int64_t e = 0; e < p->Dv; e++)
        o[e] = ref_dot(p->R, W + (p->Dn + e) * p->R, mean) / sum;
    *lse = log(sum);
    free(query);
    free(mean);
}

static void test_mla_equals_the_absorbed_form(void **state)
{
    (void)state;
    fd_rng r = fd_start("MLA = its absorbed form");
    for (int64_t Tq = 1; Tq <= 6; Tq++) {
        mla_case m = make_mla(&r, (ref_mla){ .Tq = Tq, .Tk = 6, .H = 3, .Dn = 4, .Dr = Tq % 2 ? 2 : 0, .Dv = 5, .R = 7 });
        real *o = fd_zeros(m.no), *lse = fd_zeros(Tq * 3);
        mla_loss(&m);
        for (int64_t i = 0; i < Tq; i++)
            for (int64_t h = 0; h < 3; h++)
                absorbed_row(&m.p, i, h, o + (i * 3 + h) * 5, lse + i * 3 + h);
        fd_assert_close("o", m.no, m.o, o, SAME_LIMIT);
        fd_assert_close("lse", Tq * 3, m.lse, lse, SAME_LIMIT);
        free(o);
        free(lse);
        free_mla(&m);
    }
}

/* The last queries alone give what they give among all; a later key never changes an earlier output. */
static void test_mla_is_causal(void **state)
{
    (void)state;
    fd_rng r = fd_start("MLA split anywhere");
    mla_case m = make_mla(&r, (ref_mla){ .Tq = 8, .Tk = 8, .H = 2, .Dn = 3, .Dr = 2, .Dv = 4, .R = 5 });
    mla_loss(&m);
    for (int64_t s = 0; s <= 8; s++) {
        real o[64];
        ref_mla head = m.p, rest = m.p;
        head.Tq = head.Tk = s;
        rest.Tq = 8 - s, rest.q += s * 2 * 5;
        assert_int_equal(ref_mla_forward(&head, o, NULL), 0);
        assert_int_equal(ref_mla_forward(&rest, o + s * 8, NULL), 0);
        fd_assert_close("o", 64, o, m.o, 0);
    }
    free_mla(&m);
}

static void test_mla_gradients(void **state)
{
    (void)state;
    fd_rng r = fd_start("MLA backward");
    const ref_mla shapes[] = {
        { .Tq = 5, .Tk = 5, .H = 2, .Dn = 4, .Dr = 2, .Dv = 3, .R = 6 },
        { .Tq = 2, .Tk = 6, .H = 2, .Dn = 4, .Dr = 2, .Dv = 3, .R = 6, .scale = 0.9 },
        { .Tq = 4, .Tk = 4, .H = 1, .Dn = 3, .Dr = 0, .Dv = 2, .R = 2 },
        { .Tq = 1, .Tk = 1, .H = 1, .Dn = 1, .Dr = 1, .Dv = 1, .R = 1 },
    };
    for (int n = 0; n < 4; n++) {
        mla_case m = make_mla(&r, shapes[n]);
        assert_int_equal(ref_mla_backward(&m.p, m.d_o, m.dq, m.dc, m.dW), 0);
        fd_assert_gradient("MLA", "q", m.q, m.dq, m.nq, mla_loss, &m);
        fd_assert_gradient("MLA", "c", m.c, m.dc, m.nc, mla_loss, &m);
        fd_assert_gradient("MLA", "W", m.W, m.dW, m.nw, mla_loss, &m);
        free_mla(&m);
    }
}

static void test_mla_large_scores(void **state)
{
    (void)state;
    real q[] = { 1e4 }, c[] = { 1, -1 }, W[] = { 1, 1 }, o, lse;
    ref_mla p = { .Tq = 1, .Tk = 2, .H = 1, .Dn = 1, .Dr = 0, .Dv = 1, .R = 1, .q = q, .c = c, .W = W };
    assert_int_equal(ref_mla_forward(&p, &o, &lse), 0);
    assert_true(o == 1 && lse == 1e4);
}

/* <q rotated at i, k rotated at j> depends on i - j alone; backward undoes forward; pairs are (e, e + Dr/2); the rest stays. */
static void test_rope(void **state)
{
    (void)state;
    fd_rng r = fd_start("rotary embedding");
    enum { T = 6, H = 2, D = 7, DR = 4 };
    real *x = fd_randoms(&r, T * H * D, 1), *y = fd_zeros(T * H * D), *z = fd_zeros(T * H * D);
    ref_copy(T * H * D, x, y);
    ref_copy(T * H * D, x, z);
    ref_rope_forward(T, H, D, DR, 10000, 3, y);
    for (int64_t row = 0; row < T * H; row++) {
        const real *a = x + row * D, *b = y + row * D;
        assert_true(a[0] == b[0] && a[1] == b[1] && a[2] == b[2]);
        for (int e = 0; e < 2; e++) {
            double angle = (double)(3 + row / H) * (e ? 0.01 : 1);
            assert_true(fabs(b[3 + e] - (a[3 + e] * cos(angle) - a[5 + e] * sin(angle))) <= 1e-14);
            assert_true(fabs(b[5 + e] - (a[5 + e] * cos(angle) + a[3 + e] * sin(angle))) <= 1e-14);
        }
    }
    ref_rope_forward(T, H, D, DR, 10000, 100, z);
    real near = ref_dot(DR, y + 3, y + 4 * H * D + 3), far = ref_dot(DR, z + 3, z + 4 * H * D + 3);
    assert_true(fabs(near - far) <= 1e-12);
    ref_rope_backward(T, H, D, DR, 10000, 3, y);
    fd_assert_close("there and back", T * H * D, y, x, SAME_LIMIT);
    free(x);
    free(y);
    free(z);
}

/* ---- MoE ---- */

typedef struct {
    ref_moe p;
    real *x, *w_router, *bias, *w[3][16], *s[3], *y, *dy;
    real *dx, *dw_router, *dw[3][16], *ds[3];
    int64_t chosen[16]; /* what the router chose first */
    int flipped;        /* it has chosen otherwise since */
} moe_case;

static moe_case *make_moe(fd_rng *r, ref_moe p)
{
    moe_case *m = calloc(1, sizeof *m);
    m->p = p;
    m->x = fd_randoms(r, p.T * p.D, 1), m->w_router = fd_randoms(r, p.E * p.D, 0.7), m->bias = fd_randoms(r, p.E, 0.2);
    m->dx = fd_zeros(p.T * p.D), m->dw_router = fd_zeros(p.E * p.D);
    m->y = fd_zeros(p.T * p.D), m->dy = fd_randoms(r, p.T * p.D, 1);
    for (int n = 0; n < 3; n++) {
        for (int64_t e = 0; e < p.E; e++) {
            m->w[n][e] = fd_randoms(r, p.I * p.D, 0.5);
            m->dw[n][e] = fd_zeros(p.I * p.D);
        }
        m->s[n] = fd_randoms(r, p.Is * p.D, 0.5);
        m->ds[n] = fd_zeros(p.Is * p.D);
    }
    m->p.x = m->x, m->p.w_router = m->w_router, m->p.bias = m->bias;
    m->p.w1 = (const real *const *)m->w[0], m->p.w2 = (const real *const *)m->w[1], m->p.w3 = (const real *const *)m->w[2];
    m->p.s1 = m->s[0], m->p.s2 = m->s[1], m->p.s3 = m->s[2];
    real weights[16];
    assert_true(p.T * p.top_k <= 16);
    assert_int_equal(ref_moe_route(&m->p, m->chosen, weights), 0);
    return m;
}

static void free_moe(moe_case *m)
{
    real *all[] = { m->x, m->w_router, m->bias, m->dx, m->dw_router, m->y, m->dy };
    for (size_t n = 0; n < sizeof all / sizeof *all; n++)
        free(all[n]);
    for (int n = 0; n < 3; n++) {
        for (int64_t e = 0; e < m->p.E; e++) {
            free(m->w[n][e]);
            free(m->dw[n][e]);
        }
        free(m->s[n]);
        free(m->ds[n]);
    }
    free(m);
}

static double moe_loss(void *context)
{
    moe_case *m = context;
    int64_t chosen[16];
    real weights[16];
    assert_int_equal(ref_moe_route(&m->p, chosen, weights), 0);
    for (int64_t n = 0; n < m->p.T * m->p.top_k; n++)
        m->flipped |= chosen[n] != m->chosen[n];
    assert_int_equal(ref_moe_forward(&m->p, m->y), 0);
    return ref_dot(m->p.T * m->p.D, m->y, m->dy);
}

/* Router logits are the inputs themselves when D = E and the router's weights are the identity. */
static void check_route(ref_moe p, const real *logits, const real *bias, const int64_t *ids, const real *weights)
{
    real *identity = fd_zeros(p.E * p.E), weight[8];
    int64_t id[8];
    for (int64_t e = 0; e < p.E; e++)
        identity[e * p.E + e] = 1;
    p.T = 1, p.D = p.E, p.x = logits, p.bias = bias, p.w_router = identity;
    assert_int_equal(ref_moe_route(&p, id, weight), 0);
    for (int64_t n = 0; n < p.top_k; n++)
        assert_int_equal(id[n], ids[n]);
    fd_assert_close("weights", p.top_k, weight, weights, SAME_LIMIT);
    free(identity);
}

static void test_router_by_hand(void **state)
{
    (void)state;
    const real l[] = { 0, 1, -1, 2 }, s0 = 0.5, s1 = ref_sigmoid(1), s3 = ref_sigmoid(2);
    ref_moe p = { .E = 4, .top_k = 2, .renormalize = 1, .scaling = 3 };
    check_route(p, l, NULL, (int64_t[]){ 3, 1 }, (real[]){ 3 * s3 / (s3 + s1), 3 * s1 / (s3 + s1) });
    p.renormalize = 0, p.scaling = 0;
    check_route(p, l, NULL, (int64_t[]){ 3, 1 }, (real[]){ s3, s1 });
    /* the bias chooses; the weights do not see it, unless asked to */
    const real bias[] = { 5, 0, 0, 1 };
    check_route(p, l, bias, (int64_t[]){ 0, 3 }, (real[]){ s0, s3 });
    p.biased_weights = 1;
    check_route(p, l, bias, (int64_t[]){ 0, 3 }, (real[]){ s0 + 5, s3 + 1 });
    p.biased_weights = 0, p.router = REF_ROUTER_SOFTMAX;
    real sum = exp(0) + exp(1) + exp(-1) + exp(2);
    check_route(p, l, NULL, (int64_t[]){ 3, 1 }, (real[]){ exp(2) / sum, exp(1) / sum });
    /* among equals the lowest index */
    p.router = REF_ROUTER_SIGMOID, p.top_k = 3;
    check_route(p, (real[]){ 0, 1, 1, 1 }, NULL, (int64_t[]){ 1, 2, 3 }, (real[]){ s1, s1, s1 });
    check_route(p, (real[]){ 1, 1, 1, 1 }, NULL, (int64_t[]){ 0, 1, 2 }, (real[]){ s1, s1, s1 });
}

static void test_router_groups_by_hand(void **state)
{
    (void)state;
    /* groups {0,1} {2,3} {4,5}: the best expert, 0, stands in the group with the smallest sum of two */
    const real l[] = { 3, -9, 1, 1, 0.5, 2 };
    ref_moe p = { .E = 6, .top_k = 2, .n_group = 3, .topk_group = 1 };
    check_route(p, l, NULL, (int64_t[]){ 5, 4 }, (real[]){ ref_sigmoid(2), ref_sigmoid(0.5) });
    p.topk_group = 2;
    check_route(p, l, NULL, (int64_t[]){ 5, 2 }, (real[]){ ref_sigmoid(2), ref_sigmoid(1) });
    p.topk_group = 3;
    check_route(p, l, NULL, (int64_t[]){ 0, 5 }, (real[]){ ref_sigmoid(3), ref_sigmoid(2) });
    /* groups are scored with the bias; negative scores of a chosen group still beat what is ruled out */
    const real bias[] = { -8, -8, -4, -4, -9, -9 };
    p.topk_group = 1;
    check_route(p, l, bias, (int64_t[]){ 2, 3 }, (real[]){ ref_sigmoid(1), ref_sigmoid(1) });
    /* equal groups: the lowest; groups of one expert score that expert */
    check_route(p, (real[]){ 1, 1, 1, 1, 1, 1 }, NULL, (int64_t[]){ 0, 1 }, (real[]){ ref_sigmoid(1), ref_sigmoid(1) });
    p.n_group = 6, p.topk_group = 2;
    check_route(p, l, NULL, (int64_t[]){ 0, 5 }, (real[]){ ref_sigmoid(3), ref_sigmoid(2) });
}

/* y is the shared expert plus the weighted sum over what the router chose. */
static void test_moe_is_a_weighted_sum(void **state)
{
    (void)state;
    fd_rng r = fd_start("MoE = weighted sum of experts");
    moe_case *m = make_moe(&r, (ref_moe){ .T = 4, .D = 5, .E = 6, .I = 3, .Is = 4, .top_k = 2, .renormalize = 1, .scaling = 2.5 });
    int64_t ids[8];
    real weights[8], y[20] = { 0 }, y_e[5];
    moe_loss(m);
    assert_int_equal(ref_moe_route(&m->p, ids, weights), 0);
    for (int64_t t = 0; t < 4; t++) {
        ref_mlp shared = { .D = 5, .I = 4, .w1 = m->s[0], .w2 = m->s[1], .w3 = m->s[2] };
        assert_int_equal(ref_mlp_forward(&shared, m->x + t * 5, y_e), 0);
        ref_add(5, y_e, y + t * 5);
        for (int64_t n = t * 2; n < t * 2 + 2; n++) {
            ref_mlp expert = { .D = 5, .I = 3, .w1 = m->w[0][ids[n]], .w2 = m->w[1][ids[n]], .w3 = m->w[2][ids[n]] };
            assert_int_equal(ref_mlp_forward(&expert, m->x + t * 5, y_e), 0);
            for (int64_t i = 0; i < 5; i++)
                y[t * 5 + i] += weights[n] * y_e[i];
        }
    }
    fd_assert_close("y", 20, m->y, y, SAME_LIMIT);
    free_moe(m);
}

/* The largest error of all gradients of one random problem; *flipped: a step of the finite differences changed the router's choice,
 * where the loss is not continuous. */
static double moe_gradient_error(fd_rng *r, ref_moe p, int *flipped)
{
    moe_case *m = make_moe(r, p);
    ref_moe_grad d = { .dx = m->dx, .dw_router = m->dw_router, .dw1 = m->dw[0], .dw2 = m->dw[1], .dw3 = m->dw[2],
                       .ds1 = m->ds[0], .ds2 = m->ds[1], .ds3 = m->ds[2] };
    assert_int_equal(ref_moe_backward(&m->p, m->dy, &d), 0);
    double worst = fd_error(m->x, m->dx, p.T * p.D, 40, FD_STEP, FD_FLOOR, moe_loss, m);
    worst = fmax(worst, fd_error(m->w_router, m->dw_router, p.E * p.D, 40, FD_STEP, FD_FLOOR, moe_loss, m));
    for (int n = 0; n < 3; n++) {
        for (int64_t e = 0; e < p.E; e++)
            worst = fmax(worst, fd_error(m->w[n][e], m->dw[n][e], p.I * p.D, 40, FD_STEP, FD_FLOOR, moe_loss, m));
        worst = fmax(worst, fd_error(m->s[n], m->ds[n], p.Is * p.D, 40, FD_STEP, FD_FLOOR, moe_loss, m));
    }
    *flipped = m->flipped;
    free_moe(m);
    return worst;
}

static void check_moe_gradients(fd_rng *r, const char *label, ref_moe p)
{
    int flipped = 1;
    double error = INFINITY;
    for (int draw = 0; draw < 10 && flipped; draw++)
        error = moe_gradient_error(r, p, &flipped);
    if (flipped || !(error <= FD_LIMIT))
        fail_msg("%s: finite differences disagree by %.3g, limit %.3g", label, error, FD_LIMIT);
}

static void test_moe_gradients(void **state)
{
    (void)state;
    fd_rng r = fd_start("MoE backward");
    ref_moe base = { .T = 5, .D = 4, .E = 6, .I = 3, .Is = 5, .top_k = 2, .renormalize = 1, .scaling = 2.446 }, p = base;
    check_moe_gradients(&r, "sigmoid, renormalised", p);
    p.renormalize = 0;
    check_moe_gradients(&r, "sigmoid", p);
    p.router = REF_ROUTER_SOFTMAX;
    check_moe_gradients(&r, "softmax", p);
    p.renormalize = 1;
    check_moe_gradients(&r, "softmax, renormalised", p);
    p = base, p.biased_weights = 1;
    check_moe_gradients(&r, "biased weights", p);
    p = base, p.n_group = 3, p.topk_group = 2;
    check_moe_gradients(&r, "groups", p);
    p = base, p.Is = 0;
    check_moe_gradients(&r, "no shared expert", p);
    p = base, p.E = 0, p.top_k = 0;
    check_moe_gradients(&r, "the shared expert alone", p);
}

/* ---- embedding, linear, cross-entropy ---- */

typedef struct {
    int64_t N, D, vocab;
    int64_t *ids, *targets;
    real *table, *W, *x, *logits;
} ends_case;

/* cross-entropy of a linear map of embeddings */
static double ends_loss(void *context)
{
    ends_case *c = context;
    ref_embedding_forward(c->N, c->D, c->ids, c->table, c->x);
    ref_linear_forward(c->N, c->D, c->vocab, c->x, c->W, c->logits);
    return ref_cross_entropy_forward(c->N, c->vocab, c->logits, c->targets);
}

static void test_embedding_linear_cross_entropy_gradients(void **state)
{
    (void)state;
    fd_rng r = fd_start("embedding, linear, cross-entropy backward");
    enum { N = 6, D = 4, VOCAB = 7 };
    int64_t ids[N] = { 0, 3, 3, 6, 1, 2 }, targets[N] = { 3, -1, 6, 0, 0, -1 };
    ends_case c = { N, D, VOCAB, ids, targets, fd_randoms(&r, VOCAB * D, 1), fd_randoms(&r, VOCAB * D, 1), fd_zeros(N * D), fd_zeros(N * VOCAB) };
    real *dlogits = fd_zeros(N * VOCAB), *dx = fd_zeros(N * D), *dW = fd_zeros(VOCAB * D), *dtable = fd_zeros(VOCAB * D);
    ends_loss(&c);
    ref_cross_entropy_backward(N, VOCAB, c.logits, targets, 1, dlogits);
    ref_linear_backward(N, D, VOCAB, c.x, c.W, dlogits, dx, dW);
    ref_embedding_backward(N, D, ids, dx, dtable);
    fd_assert_gradient("ends", "table", c.table, dtable, VOCAB * D, ends_loss, &c);
    fd_assert_gradient("ends", "W", c.W, dW, VOCAB * D, ends_loss, &c);
    real *all[] = { c.table, c.W, c.x, c.logits, dlogits, dx, dW, dtable };
    for (size_t n = 0; n < sizeof all / sizeof *all; n++)
        free(all[n]);
}

static void test_cross_entropy_by_hand(void **state)
{
    (void)state;
    const real logits[] = { 0, 0, 5, 5, 1000, 0 };
    real d[6] = { 0 };
    assert_true(fabs(ref_cross_entropy_forward(2, 2, logits, (int64_t[]){ 0, 1 }) - log(2)) <= 1e-15);
    assert_true(fabs(ref_cross_entropy_forward(3, 2, logits, (int64_t[]){ -1, 1, 1 }) - (log(2) + 1000) / 2) <= 1e-12);
    assert_true(ref_cross_entropy_forward(3, 2, logits, (int64_t[]){ -1, -1, -1 }) == 0);
    ref_cross_entropy_backward(3, 2, logits, (int64_t[]){ -1, -1, -1 }, 1, d);
    for (int n = 0; n < 6; n++)
        assert_true(d[n] == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conv_by_hand),
        cmocka_unit_test(test_conv_gradients),
        cmocka_unit_test(test_conv_split_anywhere),
        cmocka_unit_test(test_norms_by_hand),
        cmocka_unit_test(test_norm_gradients),
        cmocka_unit_test(test_activations_at_the_extremes),
        cmocka_unit_test(test_mla_equals_the_absorbed_form),
        cmocka_unit_test(test_mla_is_causal),
        cmocka_unit_test(test_mla_gradients),
        cmocka_unit_test(test_mla_large_scores),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_router_by_hand),
        cmocka_unit_test(test_router_groups_by_hand),
        cmocka_unit_test(test_moe_is_a_weighted_sum),
        cmocka_unit_test(test_moe_gradients),
        cmocka_unit_test(test_embedding_linear_cross_entropy_gradients),
        cmocka_unit_test(test_cross_entropy_by_hand),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
