#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness/problem_build.h"

/* With z = g + dt_bias: ddt_bias is the sum over the tokens of dz, which is dg, and dA_log over tokens and gates of
 *
 *     softplus   a = -exp(A) softplus(z):       dA = a da = dz softplus(z) / sigmoid(z)
 *     bounded    a = lb sigmoid(exp(A) z):      dA = z dz */
static double term_of_A(const kda_problem *p, double z, double dz)
{
    if (p->gate == KDA_GATE_BOUNDED)
        return z * dz;
    double up = exp(z); /* for z far below 0 both functions are exp(z) */
    return z > 20.0 ? z * dz : z < -30.0 ? dz : dz * log1p(up) * (1.0 + up) / up;
}

static kl_case_tensor *find(kl_case *c, const char *name)
{
    for (int i = 0; i < c->count; i++)
        if (strcmp(c->tensor[i].name, name) == 0)
            return &c->tensor[i];
    return NULL;
}

static kl_status make_room(kl_case_tensor *t)
{
    free(t->terms);
    t->terms = calloc((size_t)(t->T * t->H * t->D) + 1, sizeof *t->terms);
    return t->terms ? kl_ok() : kl_error(KL_ENOMEM, "%s: out of memory for its terms", t->name);
}

kl_status kl_case_kda_terms(kl_case *c)
{
    const kda_problem *p = &c->problem.kda;
    kl_case_tensor *A = find(c, "dA_log"), *bias = find(c, "ddt_bias");
    const kl_case_tensor *dg = find(c, "dg");
    if (!A || !bias || !dg)
        return kl_ok();
    KL_TRY(make_room(A));
    KL_TRY(make_room(bias));
    int64_t gates = p->HV * p->G;
    const float *g = p->g;
    for (int64_t i = 0; i < p->B * p->T * gates; i++) {
        double z = (double)g[i] + p->dt_bias[i % gates];
        bias->terms[i % gates] += fabs(dg->want[i]);
        A->terms[i % gates / p->G] += fabs(term_of_A(p, z, dg->want[i]));
    }
    return kl_ok();
}
