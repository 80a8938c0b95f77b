/* A KDA layer: projections, short convolutions, the operator, gated norm, output projection. */
#include "reference/activation.h"
#include "reference/conv.h"
#include "reference/linear.h"
#include "reference/mixer.h"
#include "reference/scratch.h"

/* What the layer computes on its way, for N = B*T tokens and P = heads * head dimension; the gradients have the same shapes. */
typedef struct {
    real *q0, *k0, *v0;   /* [N,P] projected */
    real *q, *k, *v;      /* [N,P] after the convolution and SiLU */
    real *f, *g;          /* [N,r], [N,heads*G] forget gate, before its activation */
    real *beta;           /* [N,heads] before its sigmoid */
    real *o;              /* [N,P] of the operator */
    real *z0, *z;         /* [N,r], [N,P] output gate, before its activation */
    real *y;              /* [N,P] normed and gated */
} activations;

static activations take_activations(const ref_config *c, int64_t N, ref_scratch *s)
{
    int64_t H = c->kda_heads, r = c->kda_head_dim, P = H * r;
    return (activations){ .q0 = ref_take(s, N * P), .k0 = ref_take(s, N * P), .v0 = ref_take(s, N * P),
                          .q = ref_take(s, N * P), .k = ref_take(s, N * P), .v = ref_take(s, N * P),
                          .f = ref_take(s, N * r), .g = ref_take(s, N * H * c->G), .beta = ref_take(s, N * H),
                          .o = ref_take(s, N * P), .z0 = ref_take(s, N * r), .z = ref_take(s, N * P), .y = ref_take(s, N * P) };
}

/* y = silu(conv(x)), row by row; without a convolution y = silu(x) */
static void short_conv(const ref_config *c, const real *w, int64_t B, int64_t T, const real *x, real *y)
{
    int64_t P = c->kda_heads * c->kda_head_dim;
    for (int64_t b = 0; b < B; b++) {
        ref_conv p = { .T = T, .C = P, .W = c->conv_width, .silu = 1, .x = x + b * T * P, .w = w };
        if (c->conv_width > 0)
            ref_conv_forward(&p, y + b * T * P, NULL);
    }
    if (c->conv_width == 0)
        for (int64_t n = 0; n < B * T * P; n++)
            y[n] = ref_silu(x[n]);
}

static void short_conv_backward(const ref_config *c, const real *w, int64_t B, int64_t T, const real *x, const real *dy, real *dx, real *dw)
{
    int64_t P = c->kda_heads * c->kda_head_dim;
    for (int64_t b = 0; b < B; b++) {
        ref_conv p = { .T = T, .C = P, .W = c->conv_width, .silu = 1, .x = x + b * T * P, .w = w };
        if (c->conv_width > 0)
            ref_conv_backward(&p, dy + b * T * P, NULL, dx + b * T * P, dw, NULL);
    }
    if (c->conv_width == 0)
        for (int64_t n = 0; n < B * T * P; n++)
            dx[n] += dy[n] * ref_silu_derivative(x[n]);
}

/* The operator's problem of batch row b. */
static ref_kda problem(const ref_config *c, const ref_layer *w, int64_t T, const activations *a, int64_t b)
{
    int64_t H = c->kda_heads, r = c->kda_head_dim, first = b * T;
    return (ref_kda){ .T = T, .H = H, .HV = H, .K = r, .V = r, .G = c->G, .gate = c->gate, .lower_bound = c->lower_bound,
                      .beta_kind = c->beta_kind, .qk_l2norm = 1, .q = a->q + first * H * r, .k = a->k + first * H * r,
                      .v = a->v + first * H * r, .g = a->g + first * H * c->G, .beta = a->beta + first * H,
                      .A_log = w->A_log, .dt_bias = w->dt_bias };
}

static int forward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, activations *a)
{
    int64_t N = B * T, D = c->D, H = c->kda_heads, r = c->kda_head_dim, P = H * r;
    int status = 0;
    ref_linear_forward(N, D, P, x, w->q_proj, a->q0);
    ref_linear_forward(N, D, P, x, w->k_proj, a->k0);
    ref_linear_forward(N, D, P, x, w->v_proj, a->v0);
    short_conv(c, w->q_conv, B, T, a->q0, a->q);
    short_conv(c, w->k_conv, B, T, a->k0, a->k);
    short_conv(c, w->v_conv, B, T, a->v0, a->v);
    if (c->G > 0) {
        ref_linear_forward(N, D, r, x, w->f_a, a->f);
        ref_linear_forward(N, r, H * c->G, a->f, w->f_b, a->g);
    }
    ref_linear_forward(N, D, H, x, w->b_proj, a->beta);
    for (int64_t b = 0; b < B; b++) {
        ref_kda p = problem(c, w, T, a, b);
        status |= ref_kda_forward(&p, a->o + b * T * P, NULL, NULL);
    }
    if (c->output_gate != REF_OUTPUT_GATE_NONE) {
        ref_linear_forward(N, D, r, x, w->g_a, a->z0);
        ref_linear_forward(N, r, P, a->z0, w->g_b, a->z);
    }
    ref_gated_rmsnorm_forward(N * H, r, c->norm_eps, c->output_gate, a->o, w->o_norm, a->z, a->y);
    return status;
}

int ref_kda_layer_forward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, real *out)
{
    int64_t N = B * T, P = c->kda_heads * c->kda_head_dim;
    ref_scratch s = { 0 };
    activations a = take_activations(c, N, &s);
    if (s.status == 0)
        s.status = forward(c, w, B, T, x, &a);
    if (s.status == 0)
        ref_linear_forward(N, P, c->D, a.y, w->o_proj, out);
    return ref_release(&s);
}

/* Every line differentiates the line of the same name in forward(), from the last to the first. d is zero on entry but for d->y. */
static int backward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, const activations *a,
                    activations *d, real *dx, const ref_layer *dw)
{
    int64_t N = B * T, D = c->D, H = c->kda_heads, r = c->kda_head_dim, P = H * r;
    int status = ref_gated_rmsnorm_backward(N * H, r, c->norm_eps, c->output_gate, a->o, w->o_norm, a->z, d->y, d->o, dw->o_norm, d->z);
    if (c->output_gate != REF_OUTPUT_GATE_NONE) {
        ref_linear_backward(N, r, P, a->z0, w->g_b, d->z, d->z0, dw->g_b);
        ref_linear_backward(N, D, r, x, w->g_a, d->z0, dx, dw->g_a);
    }
    for (int64_t b = 0; b < B; b++) {
        ref_kda p = problem(c, w, T, a, b);
        int64_t first = b * T;
        ref_kda_grad grad = { .d_o = d->o + first * P, .dq = d->q + first * P, .dk = d->k + first * P, .dv = d->v + first * P,
                              .dg = d->g + first * H * c->G, .dbeta = d->beta + first * H, .dA_log = dw->A_log, .ddt_bias = dw->dt_bias };
        status |= ref_kda_backward(&p, &grad);
    }
    ref_linear_backward(N, D, H, x, w->b_proj, d->beta, dx, dw->b_proj);
    if (c->G > 0) {
        ref_linear_backward(N, r, H * c->G, a->f, w->f_b, d->g, d->f, dw->f_b);
        ref_linear_backward(N, D, r, x, w->f_a, d->f, dx, dw->f_a);
    }
    short_conv_backward(c, w->v_conv, B, T, a->v0, d->v, d->v0, dw->v_conv);
    short_conv_backward(c, w->k_conv, B, T, a->k0, d->k, d->k0, dw->k_conv);
    short_conv_backward(c, w->q_conv, B, T, a->q0, d->q, d->q0, dw->q_conv);
    ref_linear_backward(N, D, P, x, w->v_proj, d->v0, dx, dw->v_proj);
    ref_linear_backward(N, D, P, x, w->k_proj, d->k0, dx, dw->k_proj);
    ref_linear_backward(N, D, P, x, w->q_proj, d->q0, dx, dw->q_proj);
    return status;
}

int ref_kda_layer_backward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, const real *dout, real *dx,
                           const ref_layer *dw)
{
    int64_t N = B * T, P = c->kda_heads * c->kda_head_dim;
    ref_scratch s = { 0 }, ds = { 0 };
    activations a = take_activations(c, N, &s), d = take_activations(c, N, &ds);
    int status = s.status | ds.status;
    if (status == 0)
        status = forward(c, w, B, T, x, &a);
    if (status == 0) {
        /* out = o_proj y */
        ref_linear_backward(N, P, c->D, a.y, w->o_proj, dout, d.y, dw->o_proj);
        status = backward(c, w, B, T, x, &a, &d, dx, dw);
    }
    ref_release(&s);
    ref_release(&ds);
    return status;
}
