#include "reference/moe.h"

#include "reference/activation.h"
#include "reference/linear.h"
#include "reference/mlp.h"
#include "reference/scratch.h"

/* What the router decides about one token. */
typedef struct {
    real *score;      /* [E] s */
    real *biased;     /* [E] s + bias */
    real *choice;     /* [E] s + bias, -inf where the group is not chosen and where the expert is already taken */
    real *group;      /* [n_group] score of a group, -inf once chosen */
    int64_t *id;      /* [top_k], freed by free() */
    real *weight;     /* [top_k] */
    real sum;         /* what the chosen scores were divided by */
} route;

static route take_route(const ref_moe *p, ref_scratch *s)
{
    route r = { .score = ref_take(s, p->E), .biased = ref_take(s, p->E), .choice = ref_take(s, p->E), .group = ref_take(s, p->n_group),
                .id = calloc((size_t)p->top_k + 1, sizeof(int64_t)), .weight = ref_take(s, p->top_k) };
    if (!r.id)
        s->status = -1;
    return r;
}

/* The index of the largest of x[0..n-1], the lowest among equals. */
static int64_t argmax(int64_t n, const real *x)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

/* s = sigmoid(l) or softmax(l), l = W_router x */
static void router_scores(const ref_moe *p, const real *x, real *s)
{
    ref_linear_forward(1, p->D, p->E, x, p->w_router, s);
    if (p->router == REF_ROUTER_SIGMOID) {
        for (int64_t e = 0; e < p->E; e++)
            s[e] = ref_sigmoid(s[e]);
        return;
    }
    real max = s[argmax(p->E, s)], sum = 0;
    for (int64_t e = 0; e < p->E; e++) {
        s[e] = exp(s[e] - max);
        sum += s[e];
    }
    for (int64_t e = 0; e < p->E; e++)
        s[e] /= sum;
}

/* The sum of the two largest of x[0..n-1], or of the one there is. */
static real top_two(int64_t n, const real *x)
{
    int64_t best = argmax(n, x), second = -1;
    for (int64_t i = 0; i < n; i++)
        if (i != best && (second < 0 || x[i] > x[second]))
            second = i;
    return x[best] + (second < 0 ? 0 : x[second]);
}

/* choice = biased for the experts of the topk_group best groups, -inf for the others */
static void choose_groups(const ref_moe *p, route *r)
{
    int64_t groups = p->n_group > 1 ? p->n_group : 1, kept = p->n_group > 1 ? p->topk_group : 1, size = p->E / groups;
    for (int64_t e = 0; e < p->E; e++)
        r->choice[e] = -INFINITY;
    for (int64_t i = 0; i < groups; i++)
        r->group[i] = top_two(size, r->biased + i * size);
    for (int64_t n = 0; n < kept; n++) {
        int64_t i = argmax(groups, r->group);
        r->group[i] = -INFINITY;
        ref_copy(size, r->biased + i * size, r->choice + i * size);
    }
}

static real scaling_of(const ref_moe *p)
{
    return p->scaling != 0 ? p->scaling : 1;
}

/* The best top_k experts and their weights. */
static void route_token(const ref_moe *p, const real *x, route *r)
{
    if (p->E == 0)
        return;
    router_scores(p, x, r->score);
    for (int64_t e = 0; e < p->E; e++)
        r->biased[e] = r->score[e] + (p->bias ? p->bias[e] : 0);
    choose_groups(p, r);

    r->sum = 0;
    for (int64_t n = 0; n < p->top_k; n++) {
        int64_t e = argmax(p->E, r->choice);
        r->choice[e] = -INFINITY;
        r->id[n] = e;
        r->weight[n] = p->biased_weights ? r->biased[e] : r->score[e];
        r->sum += r->weight[n];
    }
    r->sum = p->renormalize ? r->sum + 1e-20 : 1;
    for (int64_t n = 0; n < p->top_k; n++)
        r->weight[n] *= scaling_of(p) / r->sum;
}

/* dweight [top_k] -> dx, dw_router (either may be NULL). ds [E] is scratch. */
static void route_backward(const ref_moe *p, const real *x, const route *r, const real *dweight, real *ds, real *dx, real *dw_router)
{
    if (p->E == 0)
        return;
    /* weight_n = scaling s_n / (sum_m s_m + 1e-20):  ds_n = (scaling dweight_n - sum_m dweight_m weight_m) / sum */
    real mean = p->renormalize ? ref_dot(p->top_k, dweight, r->weight) : 0;
    memset(ds, 0, (size_t)p->E * sizeof(real));
    for (int64_t n = 0; n < p->top_k; n++)
        ds[r->id[n]] = (scaling_of(p) * dweight[n] - mean) / r->sum;

    real *dl = ds;
    if (p->router == REF_ROUTER_SIGMOID) {
        /* s = sigmoid(l):  dl = s (1 - s) ds */
        for (int64_t e = 0; e < p->E; e++)
            dl[e] = r->score[e] * (1 - r->score[e]) * ds[e];
    } else {
        /* s = softmax(l):  dl = s (ds - sum s ds) */
        real total = ref_dot(p->E, r->score, ds);
        for (int64_t e = 0; e < p->E; e++)
            dl[e] = r->score[e] * (ds[e] - total);
    }
    /* l = W_router x */
    ref_linear_backward(1, p->D, p->E, x, p->w_router, dl, dx, dw_router);
}

static ref_mlp expert(const ref_moe *p, int64_t e)
{
    return (ref_mlp){ .D = p->D, .I = p->I, .w1 = p->w1[e], .w2 = p->w2[e], .w3 = p->w3[e] };
}

static ref_mlp_grad expert_grad(const ref_moe_grad *d, int64_t e)
{
    return (ref_mlp_grad){ .dw1 = d->dw1 ? d->dw1[e] : NULL, .dw2 = d->dw2 ? d->dw2[e] : NULL, .dw3 = d->dw3 ? d->dw3[e] : NULL };
}

static ref_mlp shared_expert(const ref_moe *p)
{
    return (ref_mlp){ .D = p->D, .I = p->Is, .w1 = p->s1, .w2 = p->s2, .w3 = p->s3 };
}

int ref_moe_route(const ref_moe *p, int64_t *ids, real *weights)
{
    ref_scratch s = { 0 };
    route r = take_route(p, &s);
    for (int64_t t = 0; t < p->T && s.status == 0; t++) {
        route_token(p, p->x + t * p->D, &r);
        memcpy(ids + t * p->top_k, r.id, (size_t)p->top_k * sizeof(int64_t));
        ref_copy(p->top_k, r.weight, weights + t * p->top_k);
    }
    free(r.id);
    return ref_release(&s);
}

int ref_moe_forward(const ref_moe *p, real *y)
{
    ref_scratch s = { 0 };
    route r = take_route(p, &s);
    real *y_e = ref_take(&s, p->D);
    for (int64_t t = 0; t < p->T && s.status == 0; t++) {
        const real *x_t = p->x + t * p->D;
        real *y_t = y + t * p->D;
        memset(y_t, 0, (size_t)p->D * sizeof(real));
        if (p->Is > 0) {
            ref_mlp shared = shared_expert(p);
            s.status |= ref_mlp_forward(&shared, x_t, y_t);
        }
        route_token(p, x_t, &r);
        for (int64_t n = 0; n < p->top_k; n++) {
            /* y += weight_n expert_n(x) */
            ref_mlp chosen = expert(p, r.id[n]);
            s.status |= ref_mlp_forward(&chosen, x_t, y_e);
            for (int64_t i = 0; i < p->D; i++)
                y_t[i] += r.weight[n] * y_e[i];
        }
    }
    free(r.id);
    return ref_release(&s);
}

/* One token. y_e and dy_e [D], dweight [top_k] and ds [E] are scratch. */
static int token_backward(const ref_moe *p, const real *x, const real *dy, real *dx, const ref_moe_grad *d, route *r,
                          real *y_e, real *dy_e, real *dweight, real *ds)
{
    int status = 0;
    /* y = shared(x) + ... */
    if (p->Is > 0) {
        ref_mlp shared = shared_expert(p);
        ref_mlp_grad dshared = { .dw1 = d->ds1, .dw2 = d->ds2, .dw3 = d->ds3 };
        status |= ref_mlp_backward(&shared, x, dy, dx, &dshared);
    }
    route_token(p, x, r);
    for (int64_t n = 0; n < p->top_k; n++) {
        /* ... + weight_n expert_n(x):  dweight_n = dy . expert_n(x),  dexpert_n = weight_n dy */
        ref_mlp chosen = expert(p, r->id[n]);
        ref_mlp_grad dchosen = expert_grad(d, r->id[n]);
        status |= ref_mlp_forward(&chosen, x, y_e);
        dweight[n] = ref_dot(p->D, dy, y_e);
        for (int64_t i = 0; i < p->D; i++)
            dy_e[i] = r->weight[n] * dy[i];
        status |= ref_mlp_backward(&chosen, x, dy_e, dx, &dchosen);
    }
    route_backward(p, x, r, dweight, ds, dx, d->dw_router);
    return status;
}

int ref_moe_backward(const ref_moe *p, const real *dy, const ref_moe_grad *d)
{
    ref_scratch s = { 0 };
    route r = take_route(p, &s);
    real *y_e = ref_take(&s, p->D), *dy_e = ref_take(&s, p->D), *dweight = ref_take(&s, p->top_k), *ds = ref_take(&s, p->E);
    for (int64_t t = 0; t < p->T && s.status == 0; t++)
        s.status = token_backward(p, p->x + t * p->D, dy + t * p->D, d->dx ? d->dx + t * p->D : NULL, d, &r, y_e, dy_e, dweight, ds);
    free(r.id);
    return ref_release(&s);
}
