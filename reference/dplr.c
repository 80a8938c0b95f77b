#include "reference/dplr.h"

#include "reference/scratch.h"

static real scale_of(const ref_dplr *p)
{
    return p->scale != 0 ? p->scale : 1 / sqrt((real)p->K);
}

/* w = S^T x */
static void read_state(const ref_dplr *p, const real *S, const real *x, real *w)
{
    for (int64_t j = 0; j < p->V; j++)
        w[j] = 0;
    for (int64_t c = 0; c < p->K; c++)
        for (int64_t j = 0; j < p->V; j++)
            w[j] += S[c * p->V + j] * x[c];
}

/* S1 = Diag(e^g) S0 + b w^T + k v^T with w = S0^T a, for token t of head h. w [V] is scratch. S1 may be S0. */
static void step(const ref_dplr *p, int64_t t, int64_t h, const real *S0, real *S1, real *w)
{
    int64_t K = p->K, V = p->V, row = t * p->H + h;
    const real *k = p->k + row * K, *a = p->a + row * K, *b = p->b + row * K, *g = p->g + row * K, *v = p->v + row * V;
    read_state(p, S0, a, w);
    for (int64_t c = 0; c < K; c++) {
        real decay = exp(g[c]);
        for (int64_t j = 0; j < V; j++)
            S1[c * V + j] = decay * S0[c * V + j] + b[c] * w[j] + k[c] * v[j];
    }
}

int ref_dplr_forward(const ref_dplr *p, real *o, real *ht)
{
    int64_t size = p->K * p->V;
    ref_scratch s = { 0 };
    real *w = ref_take(&s, p->V), *S = ref_take(&s, size);
    for (int64_t h = 0; h < p->H && s.status == 0; h++) {
        memset(S, 0, (size_t)size * sizeof(real));
        ref_add(size, p->h0 ? p->h0 + h * size : NULL, S);
        for (int64_t t = 0; t < p->T; t++) {
            int64_t row = t * p->H + h;
            step(p, t, h, S, S, w);
            if (o) {
                /* o = S^T (scale q) */
                read_state(p, S, p->q + row * p->K, o + row * p->V);
                for (int64_t j = 0; j < p->V; j++)
                    o[row * p->V + j] *= scale_of(p);
            }
        }
        if (ht)
            ref_copy(size, S, ht + h * size);
    }
    return ref_release(&s);
}

static void accumulate(real *d, int64_t n, real x)
{
    if (d)
        d[n] += x;
}

/* One token of one head. S0 and S are the states before and after it; dS is the gradient of S on entry and of S0 on return. */
static void step_backward(const ref_dplr *p, const ref_dplr_grad *d, int64_t t, int64_t h, const real *S0, const real *S,
                          real *dS, real *w, real *dw)
{
    int64_t K = p->K, V = p->V, row = t * p->H + h;
    const real *q = p->q + row * K, *k = p->k + row * K, *a = p->a + row * K, *b = p->b + row * K, *g = p->g + row * K;
    const real *v = p->v + row * V;
    real scale = scale_of(p);
    read_state(p, S0, a, w);

    /* o = S^T (scale q):  dq = scale S do,  dS += scale q do^T */
    if (d->d_o) {
        const real *d_o = d->d_o + row * V;
        for (int64_t c = 0; c < K; c++) {
            accumulate(d->dq, row * K + c, scale * ref_dot(V, S + c * V, d_o));
            for (int64_t j = 0; j < V; j++)
                dS[c * V + j] += scale * q[c] * d_o[j];
        }
    }

    /* S = Diag(e^g) S0 + b w^T + k v^T:  dv = dS^T k,  dk = dS v,  dw = dS^T b,  db = dS w,  dg[c] = e^g[c] sum_j dS[c,j] S0[c,j] */
    for (int64_t j = 0; j < V; j++)
        for (int64_t c = 0; c < K; c++)
            accumulate(d->dv, row * V + j, dS[c * V + j] * k[c]);
    read_state(p, dS, b, dw);
    for (int64_t c = 0; c < K; c++) {
        accumulate(d->dk, row * K + c, ref_dot(V, dS + c * V, v));
        accumulate(d->db, row * K + c, ref_dot(V, dS + c * V, w));
        accumulate(d->dg, row * K + c, exp(g[c]) * ref_dot(V, dS + c * V, S0 + c * V));
    }

    /* w = S0^T a:  da = S0 dw,  dS0 = Diag(e^g) dS + a dw^T */
    for (int64_t c = 0; c < K; c++) {
        accumulate(d->da, row * K + c, ref_dot(V, S0 + c * V, dw));
        for (int64_t j = 0; j < V; j++)
            dS[c * V + j] = exp(g[c]) * dS[c * V + j] + a[c] * dw[j];
    }
}

int ref_dplr_backward(const ref_dplr *p, const ref_dplr_grad *d)
{
    int64_t size = p->K * p->V;
    ref_scratch s = { 0 };
    real *w = ref_take(&s, p->V), *dw = ref_take(&s, p->V), *dS = ref_take(&s, size), *S = ref_take(&s, (p->T + 1) * size);
    for (int64_t h = 0; h < p->H && s.status == 0; h++) {
        memset(S, 0, (size_t)size * sizeof(real));
        ref_add(size, p->h0 ? p->h0 + h * size : NULL, S);
        for (int64_t t = 0; t < p->T; t++)
            step(p, t, h, S + t * size, S + (t + 1) * size, w);

        memset(dS, 0, (size_t)size * sizeof(real));
        ref_add(size, d->dht ? d->dht + h * size : NULL, dS);
        for (int64_t t = p->T - 1; t >= 0; t--)
            step_backward(p, d, t, h, S + t * size, S + (t + 1) * size, dS, w, dw);
        ref_add(size, dS, d->dh0 ? d->dh0 + h * size : NULL);
    }
    return ref_release(&s);
}
