#include "reference/kda.h"

#include "reference/activation.h"
#include "reference/norm.h"
#include "reference/scratch.h"

/* What the recurrence reads: queries and keys normalised, one decay a channel, beta after its sigmoid. */
typedef struct {
    real *q, *k;   /* [T,H,K] */
    real *g;       /* [T,HV,K] */
    real *beta;    /* [T,HV] */
} operands;

/* One token of one value head. Of the gradients dx only q, k and g are used. */
typedef struct {
    real *q, *k, *g;   /* [K] */
    const real *v;     /* [V] */
    real beta;
} token;

/* ---- around the recurrence: l2norm, gate, sigmoid ---- */

static operands take_operands(const ref_kda *p, ref_scratch *m)
{
    return (operands){ .q = ref_take(m, p->T * p->H * p->K), .k = ref_take(m, p->T * p->H * p->K),
                       .g = ref_take(m, p->T * p->HV * p->K), .beta = ref_take(m, p->T * p->HV) };
}

static ref_gate gate_of(const ref_kda *p)
{
    return (ref_gate){ .T = p->T, .HV = p->HV, .K = p->K, .G = p->G, .kind = p->gate, .lower_bound = p->lower_bound,
                       .g = p->g, .A_log = p->A_log, .dt_bias = p->dt_bias };
}

static real beta_of(const ref_kda *p, real logit)
{
    switch (p->beta_kind) {
    case REF_BETA_SIGMOID:
        return ref_sigmoid(logit);
    case REF_BETA_TWICE_SIGMOID:
        return 2 * ref_sigmoid(logit);
    case REF_BETA_PLAIN:
        break;
    }
    return logit;
}

static real beta_derivative(const ref_kda *p, real logit)
{
    switch (p->beta_kind) {
    case REF_BETA_SIGMOID:
        return ref_sigmoid_derivative(logit);
    case REF_BETA_TWICE_SIGMOID:
        return 2 * ref_sigmoid_derivative(logit);
    case REF_BETA_PLAIN:
        break;
    }
    return 1;
}

static void prepare(const ref_kda *p, operands *x)
{
    int64_t rows = p->T * p->H;
    if (p->qk_l2norm) {
        ref_l2norm_forward(rows, p->K, REF_L2NORM_EPS, p->q, x->q);
        ref_l2norm_forward(rows, p->K, REF_L2NORM_EPS, p->k, x->k);
    } else {
        ref_copy(rows * p->K, p->q, x->q);
        ref_copy(rows * p->K, p->k, x->k);
    }
    ref_gate gate = gate_of(p);
    ref_gate_forward(&gate, x->g);
    for (int64_t n = 0; n < p->T * p->HV; n++)
        x->beta[n] = p->beta ? beta_of(p, p->beta[n]) : 1;
}

static void prepare_backward(const ref_kda *p, const operands *dx, const ref_kda_grad *d)
{
    int64_t rows = p->T * p->H;
    if (p->qk_l2norm) {
        /* q = l2norm(p->q),  k = l2norm(p->k) */
        ref_l2norm_backward(rows, p->K, REF_L2NORM_EPS, p->q, dx->q, d->dq);
        ref_l2norm_backward(rows, p->K, REF_L2NORM_EPS, p->k, dx->k, d->dk);
    } else {
        ref_add(rows * p->K, dx->q, d->dq);
        ref_add(rows * p->K, dx->k, d->dk);
    }
    /* g = gate(p->g, A_log, dt_bias) */
    ref_gate gate = gate_of(p);
    ref_gate_backward(&gate, dx->g, d->dg, d->dA_log, d->ddt_bias);
    /* beta = sigmoid(p->beta) */
    if (p->beta && d->dbeta)
        for (int64_t n = 0; n < p->T * p->HV; n++)
            d->dbeta[n] += dx->beta[n] * beta_derivative(p, p->beta[n]);
}

/* ---- the recurrence ---- */

static token token_at(const ref_kda *p, const operands *x, int64_t t, int64_t i)
{
    int64_t h = i / (p->HV / p->H), row = t * p->HV + i;
    return (token){ .q = x->q + (t * p->H + h) * p->K, .k = x->k + (t * p->H + h) * p->K, .g = x->g + row * p->K,
                    .v = p->v + row * p->V, .beta = x->beta[row] };
}

static real scale_of(const ref_kda *p)
{
    return p->scale != 0 ? p->scale : 1 / sqrt((real)p->K);
}

/* w = S^T k */
static void read_state(const ref_kda *p, const real *S, const real *k, real *w)
{
    for (int64_t j = 0; j < p->V; j++)
        w[j] = 0;
    for (int64_t c = 0; c < p->K; c++)
        for (int64_t j = 0; j < p->V; j++)
            w[j] += S[c * p->V + j] * k[c];
}

/* S += k u^T */
static void write_state(const ref_kda *p, real *S, const real *k, const real *u)
{
    for (int64_t c = 0; c < p->K; c++)
        for (int64_t j = 0; j < p->V; j++)
            S[c * p->V + j] += k[c] * u[j];
}

/* S <- Diag(e^g) S */
static void decay_state(const ref_kda *p, real *S, const real *g)
{
    for (int64_t c = 0; c < p->K; c++) {
        real decay = exp(g[c]);
        for (int64_t j = 0; j < p->V; j++)
            S[c * p->V + j] *= decay;
    }
}

/* u = beta (v - w) with w = S'^T k, or w = 0 without the delta rule; u and w are [V] */
static void correction(const ref_kda *p, token x, const real *S, real *w, real *u)
{
    if (p->no_delta)
        memset(w, 0, (size_t)p->V * sizeof(real));
    else
        read_state(p, S, x.k, w);
    for (int64_t j = 0; j < p->V; j++)
        u[j] = x.beta * (x.v[j] - w[j]);
}

/* Equation 1: the state S after the token, from the state before it. w and u are scratch. */
static void step(const ref_kda *p, token x, real *S, real *w, real *u)
{
    decay_state(p, S, x.g);          /* S' = Diag(e^g) S */
    correction(p, x, S, w, u);       /* u  = beta (v - S'^T k) */
    write_state(p, S, x.k, u);       /* S  = S' + k u^T */
}

static void initial_state(const ref_kda *p, int64_t i, real *S)
{
    int64_t size = p->K * p->V;
    if (p->h0)
        ref_copy(size, p->h0 + i * size, S);
    else
        memset(S, 0, (size_t)size * sizeof(real));
}

int ref_kda_forward(const ref_kda *p, real *o, real *ht, real *states)
{
    ref_scratch m = { 0 };
    int64_t size = p->K * p->V;
    operands x = take_operands(p, &m);
    real *S = ref_take(&m, size), *w = ref_take(&m, p->V), *u = ref_take(&m, p->V);
    if (m.status == 0) {
        prepare(p, &x);
        for (int64_t i = 0; i < p->HV; i++) {
            initial_state(p, i, S);
            for (int64_t t = 0; t < p->T; t++) {
                token x_t = token_at(p, &x, t, i);
                step(p, x_t, S, w, u);
                if (o) {
                    /* o = S^T (scale q) */
                    real *o_t = o + (t * p->HV + i) * p->V;
                    read_state(p, S, x_t.q, o_t);
                    for (int64_t j = 0; j < p->V; j++)
                        o_t[j] *= scale_of(p);
                }
                if (states)
                    ref_copy(size, S, states + (t * p->HV + i) * size);
            }
            if (ht)
                ref_copy(size, S, ht + i * size);
        }
    }
    return ref_release(&m);
}

/* ---- the recurrence, backward ---- */

/* Backward keeps the states of SEGMENT tokens at a time, and recomputes them from the state kept before each segment. */
enum { SEGMENT = 64 };

typedef struct {
    real *kept;            /* [segments,K,V] the state before each segment */
    real *S;               /* [SEGMENT+1,K,V] S[0] before the segment, S[s+1] after its token s */
    real *S1;              /* [K,V] S' */
    real *dS;              /* [K,V] gradient of the state, on its way from the last token to the first */
    real *w, *u, *dw, *du; /* [V] */
} buffers;

static buffers take_buffers(const ref_kda *p, ref_scratch *m)
{
    int64_t size = p->K * p->V;
    return (buffers){ .kept = ref_take(m, (p->T / SEGMENT + 1) * size), .S = ref_take(m, (SEGMENT + 1) * size),
                      .S1 = ref_take(m, size), .dS = ref_take(m, size), .w = ref_take(m, p->V), .u = ref_take(m, p->V),
                      .dw = ref_take(m, p->V), .du = ref_take(m, p->V) };
}

/* y += factor S x, with x [V] and y [K] */
static void add_state_times(const ref_kda *p, const real *S, const real *x, real factor, real *y)
{
    for (int64_t c = 0; c < p->K; c++)
        y[c] += factor * ref_dot(p->V, S + c * p->V, x);
}

/* One token, from its last line to its first. S0 and S are the states before and after it; s->dS is the gradient of S on entry
 * and of S0 on return. d_o [V] may be NULL; dv [V] may be NULL; dx and *dbeta are added to. */
static void step_backward(const ref_kda *p, token x, const real *S0, const real *S, const real *d_o, buffers *s,
                          token dx, real *dv, real *dbeta)
{
    int64_t K = p->K, V = p->V;
    real *S1 = s->S1, *dS = s->dS, scale = scale_of(p);
    ref_copy(K * V, S0, S1);
    decay_state(p, S1, x.g);
    correction(p, x, S1, s->w, s->u);

    /* o = S^T (scale q):  dq = scale S do,  dS += scale q do^T */
    if (d_o) {
        add_state_times(p, S, d_o, scale, dx.q);
        for (int64_t c = 0; c < K; c++)
            for (int64_t j = 0; j < V; j++)
                dS[c * V + j] += scale * x.q[c] * d_o[j];
    }

    /* S = S' + k u^T:  dk = dS u,  du = dS^T k,  dS' = dS */
    add_state_times(p, dS, s->u, 1, dx.k);
    read_state(p, dS, x.k, s->du);

    /* u = beta (v - w):  dv = beta du,  dw = -beta du,  dbeta = du . (v - w) */
    for (int64_t j = 0; j < V; j++) {
        if (dv)
            dv[j] += x.beta * s->du[j];
        s->dw[j] = -x.beta * s->du[j];
        *dbeta += s->du[j] * (x.v[j] - s->w[j]);
    }

    /* w = S'^T k:  dk += S' dw,  dS' += k dw^T */
    if (!p->no_delta) {
        add_state_times(p, S1, s->dw, 1, dx.k);
        write_state(p, dS, x.k, s->dw);
    }

    /* S' = Diag(e^g) S0:  dg[c] = sum_j dS'[c,j] S'[c,j],  dS0 = Diag(e^g) dS' */
    for (int64_t c = 0; c < K; c++)
        dx.g[c] += ref_dot(V, dS + c * V, S1 + c * V);
    decay_state(p, dS, x.g);
}

/* The states before and after each of the tokens [first, last) of head i, into s->S. */
static void states_of_segment(const ref_kda *p, const operands *x, int64_t i, int64_t first, int64_t last, buffers *s)
{
    int64_t size = p->K * p->V;
    ref_copy(size, s->kept + first / SEGMENT * size, s->S);
    for (int64_t t = first; t < last; t++) {
        real *S = s->S + (t - first + 1) * size;
        ref_copy(size, S - size, S);
        step(p, token_at(p, x, t, i), S, s->w, s->u);
    }
}

static void head_backward(const ref_kda *p, const operands *x, int64_t i, const ref_kda_grad *d, const operands *dx, buffers *s)
{
    int64_t size = p->K * p->V;

    initial_state(p, i, s->S);
    for (int64_t t = 0; t < p->T; t++) {
        if (t % SEGMENT == 0)
            ref_copy(size, s->S, s->kept + t / SEGMENT * size);
        step(p, token_at(p, x, t, i), s->S, s->w, s->u);
    }

    memset(s->dS, 0, (size_t)size * sizeof(real));
    ref_add(size, d->dht ? d->dht + i * size : NULL, s->dS);
    for (int64_t last = p->T; last > 0;) {
        int64_t first = (last - 1) / SEGMENT * SEGMENT;
        states_of_segment(p, x, i, first, last, s);
        for (int64_t t = last - 1; t >= first; t--) {
            int64_t row = t * p->HV + i;
            const real *S0 = s->S + (t - first) * size, *S = S0 + size;
            step_backward(p, token_at(p, x, t, i), S0, S, d->d_o ? d->d_o + row * p->V : NULL, s,
                          token_at(p, dx, t, i), d->dv ? d->dv + row * p->V : NULL, dx->beta + row);
        }
        last = first;
    }
    ref_add(size, s->dS, d->dh0 ? d->dh0 + i * size : NULL);
}

int ref_kda_backward(const ref_kda *p, const ref_kda_grad *d)
{
    ref_scratch m = { 0 };
    operands x = take_operands(p, &m), dx = take_operands(p, &m);
    buffers s = take_buffers(p, &m);
    if (m.status == 0) {
        prepare(p, &x);
        for (int64_t i = 0; i < p->HV; i++)
            head_backward(p, &x, i, d, &dx, &s);
        prepare_backward(p, &dx, d);
    }
    return ref_release(&m);
}
