#include "reference/mla.h"

#include "reference/scratch.h"

static real scale_of(const ref_mla *p)
{
    return p->scale != 0 ? p->scale : 1 / sqrt((real)(p->Dn + p->Dr));
}

/* kv [Tk,H,Dn+Dv]: kv[j,h] = W_h c_j[:R], the key's Dn entries and then the value */
static void expand(const ref_mla *p, real *kv)
{
    int64_t rows = p->H * (p->Dn + p->Dv);
    for (int64_t j = 0; j < p->Tk; j++)
        for (int64_t n = 0; n < rows; n++)
            kv[j * rows + n] = ref_dot(p->R, p->W + n * p->R, p->c + j * (p->R + p->Dr));
}

static void expand_backward(const ref_mla *p, const real *dkv, real *dc, real *dW)
{
    int64_t rows = p->H * (p->Dn + p->Dv), width = p->R + p->Dr;
    for (int64_t j = 0; j < p->Tk; j++)
        for (int64_t n = 0; n < rows; n++)
            for (int64_t r = 0; r < p->R; r++) {
                /* kv[j,n] = sum_r W[n,r] c[j,r] */
                if (dc)
                    dc[j * width + r] += dkv[j * rows + n] * p->W[n * p->R + r];
                if (dW)
                    dW[n * p->R + r] += dkv[j * rows + n] * p->c[j * width + r];
            }
}

/* The number of keys that query i sees. */
static int64_t seen(const ref_mla *p, int64_t i)
{
    return p->Tk - p->Tq + i + 1;
}

/* prob[j] = softmax over the seen keys j of s_ij; returns the log of the sum of e^s_ij */
static real softmax_row(const ref_mla *p, const real *kv, int64_t i, int64_t h, real *prob)
{
    const real *q = p->q + (i * p->H + h) * (p->Dn + p->Dr);
    real max = -INFINITY, sum = 0;
    for (int64_t j = 0; j < seen(p, i); j++) {
        const real *k = kv + (j * p->H + h) * (p->Dn + p->Dv), *shared = p->c + j * (p->R + p->Dr) + p->R;
        prob[j] = scale_of(p) * (ref_dot(p->Dn, q, k) + ref_dot(p->Dr, q + p->Dn, shared));
        max = fmax(max, prob[j]);
    }
    for (int64_t j = 0; j < seen(p, i); j++) {
        prob[j] = exp(prob[j] - max);
        sum += prob[j];
    }
    for (int64_t j = 0; j < seen(p, i); j++)
        prob[j] /= sum;
    return max + log(sum);
}

int ref_mla_forward(const ref_mla *p, real *o, real *lse)
{
    ref_scratch s = { 0 };
    real *kv = ref_take(&s, p->Tk * p->H * (p->Dn + p->Dv)), *prob = ref_take(&s, p->Tk);
    if (s.status == 0)
        expand(p, kv);
    for (int64_t i = 0; i < p->Tq && s.status == 0; i++)
        for (int64_t h = 0; h < p->H; h++) {
            real lse_ih = softmax_row(p, kv, i, h, prob), *o_ih = o + (i * p->H + h) * p->Dv;
            if (lse)
                lse[i * p->H + h] = lse_ih;
            /* o_i = sum_j p_ij v_j */
            memset(o_ih, 0, (size_t)p->Dv * sizeof(real));
            for (int64_t j = 0; j < seen(p, i); j++)
                for (int64_t e = 0; e < p->Dv; e++)
                    o_ih[e] += prob[j] * kv[(j * p->H + h) * (p->Dn + p->Dv) + p->Dn + e];
        }
    return ref_release(&s);
}

/* Query i of head h. prob [Tk] and dprob [Tk] are scratch; dkv [Tk,H,Dn+Dv], dq and dc (dq and dc may be NULL) are added to. */
static void row_backward(const ref_mla *p, const real *kv, int64_t i, int64_t h, const real *d_o, real *prob, real *dprob,
                         real *dkv, real *dq, real *dc)
{
    int64_t Dn = p->Dn, Dr = p->Dr, Dv = p->Dv;
    const real *q = p->q + (i * p->H + h) * (Dn + Dr), *d_oi = d_o + (i * p->H + h) * Dv;
    real *dq_i = dq ? dq + (i * p->H + h) * (Dn + Dr) : NULL;
    softmax_row(p, kv, i, h, prob);

    /* o_i = sum_j p_ij v_j:  dv_j += p_ij do_i,  dp_ij = do_i . v_j */
    real mean = 0;
    for (int64_t j = 0; j < seen(p, i); j++) {
        const real *v = kv + (j * p->H + h) * (Dn + Dv) + Dn;
        real *dv = dkv + (j * p->H + h) * (Dn + Dv) + Dn;
        for (int64_t e = 0; e < Dv; e++)
            dv[e] += prob[j] * d_oi[e];
        dprob[j] = ref_dot(Dv, d_oi, v);
        mean += prob[j] * dprob[j];
    }
    for (int64_t j = 0; j < seen(p, i); j++) {
        const real *k = kv + (j * p->H + h) * (Dn + Dv), *shared = p->c + j * (p->R + Dr) + p->R;
        real *dk = dkv + (j * p->H + h) * (Dn + Dv), *dshared = dc ? dc + j * (p->R + Dr) + p->R : NULL;

        /* p_ij = e^s_ij / sum_l e^s_il:  ds_ij = p_ij (dp_ij - sum_l p_il dp_il) */
        real ds = scale_of(p) * prob[j] * (dprob[j] - mean);

        /* s_ij = scale (q_i[:Dn] . k_j + q_i[Dn:] . c_j[R:]) */
        for (int64_t e = 0; e < Dn; e++) {
            dk[e] += ds * q[e];
            if (dq_i)
                dq_i[e] += ds * k[e];
        }
        for (int64_t e = 0; e < Dr; e++) {
            if (dshared)
                dshared[e] += ds * q[Dn + e];
            if (dq_i)
                dq_i[Dn + e] += ds * shared[e];
        }
    }
}

int ref_mla_backward(const ref_mla *p, const real *d_o, real *dq, real *dc, real *dW)
{
    int64_t size = p->Tk * p->H * (p->Dn + p->Dv);
    ref_scratch s = { 0 };
    real *kv = ref_take(&s, size), *dkv = ref_take(&s, size), *prob = ref_take(&s, p->Tk), *dprob = ref_take(&s, p->Tk);
    if (s.status == 0) {
        expand(p, kv);
        for (int64_t i = 0; i < p->Tq; i++)
            for (int64_t h = 0; h < p->H; h++)
                row_backward(p, kv, i, h, d_o, prob, dprob, dkv, dq, dc);
        expand_backward(p, dkv, dc, dW);
    }
    return ref_release(&s);
}

/* Turns the pair (x[i], x[i + Dr/2]) of every head of every token by direction * position * theta^(-2i/Dr). */
static void rotate(int64_t T, int64_t H, int64_t D, int64_t Dr, real theta, int64_t offset, real direction, real *x)
{
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t i = 0; i < Dr / 2; i++) {
                real *a = x + (t * H + h) * D + (D - Dr) + i, *b = a + Dr / 2;
                real angle = direction * (offset + t) * pow(theta, -2 * (real)i / Dr);
                real a0 = *a, b0 = *b;
                *a = a0 * cos(angle) - b0 * sin(angle);
                *b = b0 * cos(angle) + a0 * sin(angle);
            }
}

void ref_rope_forward(int64_t T, int64_t H, int64_t D, int64_t Dr, real theta, int64_t offset, real *x)
{
    rotate(T, H, D, Dr, theta, offset, 1, x);
}

void ref_rope_backward(int64_t T, int64_t H, int64_t D, int64_t Dr, real theta, int64_t offset, real *dx)
{
    rotate(T, H, D, Dr, theta, offset, -1, dx);
}
