#include "reference/gate.h"

#include "reference/activation.h"

/* g + dt_bias of gate j of head i at token t */
static real gate_input(const ref_gate *p, int64_t t, int64_t i, int64_t j)
{
    real g_tij = p->g[(t * p->HV + i) * p->G + j];
    return p->dt_bias && p->kind != REF_GATE_LOG ? g_tij + p->dt_bias[i * p->G + j] : g_tij;
}

static real activate(const ref_gate *p, int64_t i, real z)
{
    switch (p->kind) {
    case REF_GATE_SOFTPLUS:
        return -exp(p->A_log[i]) * ref_softplus(z);
    case REF_GATE_BOUNDED:
        return p->lower_bound * ref_sigmoid(exp(p->A_log[i]) * z);
    case REF_GATE_LOG:
        break;
    }
    return z;
}

/* da -> *dz and *dA of one gate */
static void activate_backward(const ref_gate *p, int64_t i, real z, real da, real *dz, real *dA)
{
    *dz = da;
    *dA = 0;
    if (p->kind == REF_GATE_SOFTPLUS) {
        /* a = -exp(A) softplus(z) */
        *dz = -exp(p->A_log[i]) * ref_softplus_derivative(z) * da;
        *dA = -exp(p->A_log[i]) * ref_softplus(z) * da;
    } else if (p->kind == REF_GATE_BOUNDED) {
        /* a = lb sigmoid(y),  y = exp(A) z */
        real y = exp(p->A_log[i]) * z;
        real dy = p->lower_bound * ref_sigmoid_derivative(y) * da;
        *dz = exp(p->A_log[i]) * dy;
        *dA = y * dy;
    }
}

void ref_gate_forward(const ref_gate *p, real *a)
{
    if (p->G == 0) {
        for (int64_t n = 0; n < p->T * p->HV * p->K; n++)
            a[n] = 0;
        return;
    }
    int64_t block = p->K / p->G;
    for (int64_t t = 0; t < p->T; t++)
        for (int64_t i = 0; i < p->HV; i++)
            for (int64_t j = 0; j < p->G; j++) {
                real a_tij = activate(p, i, gate_input(p, t, i, j));
                for (int64_t c = j * block; c < (j + 1) * block; c++)
                    a[(t * p->HV + i) * p->K + c] = a_tij;
            }
}

void ref_gate_backward(const ref_gate *p, const real *da, real *dg, real *dA_log, real *ddt_bias)
{
    if (p->G == 0)
        return;
    int64_t block = p->K / p->G;
    for (int64_t t = 0; t < p->T; t++)
        for (int64_t i = 0; i < p->HV; i++)
            for (int64_t j = 0; j < p->G; j++) {
                /* a[t,i,c] = a_tij for every channel c of block j */
                real da_tij = 0;
                for (int64_t c = j * block; c < (j + 1) * block; c++)
                    da_tij += da[(t * p->HV + i) * p->K + c];

                /* a_tij = activate(A_log[i], g[t,i,j] + dt_bias[i,j]) */
                real dz, dA;
                activate_backward(p, i, gate_input(p, t, i, j), da_tij, &dz, &dA);
                if (dg)
                    dg[(t * p->HV + i) * p->G + j] += dz;
                if (dA_log)
                    dA_log[i] += dA;
                if (ddt_bias && p->kind != REF_GATE_LOG)
                    ddt_bias[i * p->G + j] += dz;
            }
}
