/* The right answers of the layers' cases, by the functions in reference/. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness/layers_case.h"
#include "reference/activation.h"
#include "reference/linear.h"
#include "reference/loss.h"
#include "reference/norm.h"
#include "reference/optimizer.h"

/* The tensor of that name; NULL where the case has none. */
static layers_case_tensor *find(layers_case *c, const char *name)
{
    for (int i = 0; i < c->count; i++)
        if (c->tensor[i].there && strcmp(c->tensor[i].is.name, name) == 0)
            return &c->tensor[i];
    return NULL;
}
static double *given(layers_case *c, const char *name)
{
    layers_case_tensor *t = find(c, name);
    return t ? t->given : NULL;
}
/* Where an answer goes: what is added to starts from what was given, the rest from nothing. */
static double *answer(layers_case *c, const char *name)
{
    layers_case_tensor *t = find(c, name);
    if (!t)
        return NULL;
    size_t bytes = (size_t)(t->is.rows * t->is.columns) * sizeof *t->want;
    if (t->is.accumulates || t->is.role == LAYERS_UPDATED)
        memcpy(t->want, t->given, bytes);
    else
        memset(t->want, 0, bytes);
    return t->want;
}

static void solve_rmsnorm(layers_case *c, kl_pass pass)
{
    const layers_rmsnorm *p = &c->p.rmsnorm;
    int64_t n = p->T * p->D;
    double *x = given(c, "x"), *more = given(c, "add"), *weight = given(c, "weight");
    layers_case_tensor *sum = find(c, "sum");
    if (pass == KL_BACKWARD) {
        double *dx = answer(c, "dx");
        ref_rmsnorm_backward(p->T, p->D, p->eps, more ? sum->given : x, weight, given(c, "dy"), dx, answer(c, "dweight"));
        ref_add(n, given(c, "dsum"), dx);
        return;
    }
    for (int64_t i = 0; more && i < n; i++) {
        sum->want[i] = x[i] + more[i];
        sum->given[i] = layers_rounded(sum->want[i], sum->is.dtype);
    }
    ref_rmsnorm_forward(p->T, p->D, p->eps, more ? sum->want : x, weight, answer(c, "y"));
}

static void solve_embed(layers_case *c, kl_pass pass)
{
    const layers_embed *p = &c->p.embed;
    const double *ids = given(c, "ids");
    double *y = pass == KL_FORWARD ? answer(c, "y") : given(c, "dy"), *table = pass == KL_FORWARD ? given(c, "weight") : answer(c, "dweight");
    for (int64_t t = 0; t < p->T; t++) {
        int64_t id = (int64_t)ids[t];
        if (pass == KL_FORWARD)
            ref_embedding_forward(1, p->D, &id, table, y + t * p->D);
        else
            ref_embedding_backward(1, p->D, &id, y + t * p->D, table);
    }
}

static void solve_swiglu(layers_case *c, kl_pass pass)
{
    const double *gate = given(c, "gate"), *up = given(c, "up");
    double *y = answer(c, "y"), *dgate = pass == KL_BACKWARD ? answer(c, "dgate") : NULL, *dup = pass == KL_BACKWARD ? answer(c, "dup") : NULL;
    for (int64_t i = 0; i < c->p.swiglu.T * c->p.swiglu.I; i++) {
        if (y)
            y[i] = ref_silu(gate[i]) * up[i];
        if (pass == KL_FORWARD)
            continue;
        dgate[i] = given(c, "dy")[i] * up[i] * ref_silu_derivative(gate[i]);
        dup[i] = given(c, "dy")[i] * ref_silu(gate[i]);
    }
}

static kl_status solve_linear(layers_case *c, kl_pass pass)
{
    const layers_linear *p = &c->p.linear;
    if (pass == KL_BACKWARD) {
        ref_linear_backward(p->T, p->K, p->N, given(c, "x"), given(c, "weight"), given(c, "dy"), answer(c, "dx"), answer(c, "dweight"));
        return kl_ok();
    }
    double *y = answer(c, "y"), *product = ref_zeros(p->T * p->N);
    if (!product)
        return kl_error(KL_ENOMEM, "linear reference: out of memory");
    ref_linear_forward(p->T, p->K, p->N, given(c, "x"), given(c, "weight"), product);
    ref_add(p->T * p->N, product, y);
    free(product);
    return kl_ok();
}

/* Gate and up are what the device keeps of them: rounded. */
static kl_status solve_mlp(layers_case *c, kl_pass pass)
{
    const layers_mlp *p = &c->p.mlp;
    int64_t T = p->T, D = p->D, I = p->I;
    double *x = given(c, "x"), *gate_up = given(c, "gate_up"), *down = given(c, "down"), *unit = ref_zeros(T * I), *dunit = ref_zeros(T * I), *dhidden = ref_zeros(2 * T * I);
    layers_case_tensor *hidden = find(c, "hidden");
    if (unit && dunit && dhidden && pass == KL_FORWARD)
        ref_linear_forward(T, D, 2 * I, x, gate_up, hidden->want);
    for (int64_t i = 0; pass == KL_FORWARD && i < 2 * T * I; i++)
        hidden->given[i] = layers_rounded(hidden->want[i], p->dtype);
    const double *h = pass == KL_FORWARD ? hidden->want : hidden->given;
    for (int64_t i = 0; unit && i < T * I; i++)
        unit[i] = ref_silu(h[i / I * 2 * I + i % I]) * h[i / I * 2 * I + I + i % I];
    if (unit && dunit && dhidden && pass == KL_FORWARD) {
        ref_linear_forward(T, I, D, unit, down, answer(c, "y"));
    } else if (unit && dunit && dhidden) {
        ref_linear_backward(T, I, D, unit, down, given(c, "dy"), dunit, answer(c, "ddown"));
        for (int64_t i = 0; i < T * I; i++) {
            int64_t at = i / I * 2 * I + i % I;
            dhidden[at] = dunit[i] * h[at + I] * ref_silu_derivative(h[at]);
            dhidden[at + I] = dunit[i] * ref_silu(h[at]);
        }
        ref_linear_backward(T, D, 2 * I, x, gate_up, dhidden, answer(c, "dx"), answer(c, "dgate_up"));
    }
    bool done = unit && dunit && dhidden;
    free(unit);
    free(dunit);
    free(dhidden);
    return done ? kl_ok() : kl_error(KL_ENOMEM, "mlp reference: out of memory");
}

static kl_status solve_head_loss(layers_case *c, kl_pass pass)
{
    const layers_head_loss *p = &c->p.head_loss;
    const double *targets = given(c, "targets"), *x = given(c, "x"), *weight = given(c, "weight");
    double *loss = answer(c, "loss"), *sum = answer(c, "sum"), *logits = ref_zeros(p->vocab), *dlogits = ref_zeros(p->vocab);
    double *dx = pass == KL_BACKWARD ? answer(c, "dx") : NULL, *dweight = pass == KL_BACKWARD ? answer(c, "dweight") : NULL;
    for (int64_t t = 0; logits && dlogits && t < p->T; t++) {
        int64_t target = (int64_t)targets[t];
        ref_linear_forward(1, p->D, p->vocab, x + t * p->D, weight, logits);
        double l = ref_cross_entropy_forward(1, p->vocab, logits, &target);
        if (loss)
            loss[t] = l;
        if (sum) {
            sum[0] += l;
            sum[1] += target >= 0;
        }
        memset(dlogits, 0, (size_t)p->vocab * sizeof *dlogits);
        ref_cross_entropy_backward(1, p->vocab, logits, &target, p->grad_scale, dlogits);
        if (dx || dweight)
            ref_linear_backward(1, p->D, p->vocab, x + t * p->D, weight, dlogits, dx ? dx + t * p->D : NULL, dweight);
    }
    bool done = logits && dlogits;
    free(logits);
    free(dlogits);
    return done ? kl_ok() : kl_error(KL_ENOMEM, "head_loss reference: out of memory");
}

/* The gradient as the optimizer sees it, clipped. */
static double *clipped(layers_case *c, double clip, int64_t n)
{
    double *g = ref_zeros(n), norm = given(c, "sumsq") ? sqrt(*given(c, "sumsq")) : 0.0;
    for (int64_t i = 0; g && i < n; i++)
        g[i] = given(c, "g")[i] * (norm > clip ? clip / norm : 1.0);
    return g;
}

static kl_status solve_optimizer(layers_case *c)
{
    const layers_adamw *a = &c->p.adamw;
    const layers_muon *m = &c->p.muon;
    bool muon = c->p.op == LAYERS_MUON;
    int64_t matrix = m->rows * m->columns, n = muon ? (m->count ? m->count : 1) * matrix : a->n;
    double *g = clipped(c, muon ? m->clip : a->clip, n), *w = answer(c, "w"), *copy = answer(c, "copy");
    int failed = !g;
    double *momentum = answer(c, "m");
    for (int64_t at = 0; g && muon && at < n; at += matrix)
        failed |= ref_muon(m->rows, m->columns, w + at, g + at, momentum + at, m->lr, m->momentum, m->decay, m->steps ? m->steps : LAYERS_MUON_STEPS);
    if (g && !muon)
        ref_adamw(n, w, g, momentum, answer(c, "v"), a->lr, a->beta1, a->beta2, a->eps, a->decay, a->step);
    if (copy)
        memcpy(copy, w, (size_t)n * sizeof *copy);
    free(g);
    return failed ? kl_error(KL_ENOMEM, "optimizer reference: out of memory") : kl_ok();
}

kl_status layers_case_solve(layers_case *c, kl_pass pass)
{
    switch (c->p.op) {
    case LAYERS_RMSNORM: solve_rmsnorm(c, pass); return kl_ok();
    case LAYERS_EMBED: solve_embed(c, pass); return kl_ok();
    case LAYERS_SWIGLU: solve_swiglu(c, pass); return kl_ok();
    case LAYERS_LINEAR: return solve_linear(c, pass);
    case LAYERS_MLP: return solve_mlp(c, pass);
    case LAYERS_HEAD_LOSS: return solve_head_loss(c, pass);
    case LAYERS_SUMSQ: {
        double *sum = answer(c, "sum");
        *sum += ref_dot(c->p.sumsq.n, given(c, "x"), given(c, "x"));
        return kl_ok();
    }
    default: return solve_optimizer(c);
    }
}
