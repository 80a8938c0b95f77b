#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/blas.h"
#include "harness/problem_build.h"

typedef struct moe_layout {
    kl_moe_spec s;
    float *x, *router, *bias, *dy;
    char *w1, *w3, *w2, *s1, *s3, *s2;
    const void **w1s, **w3s, **w2s;
    float **dw1s, **dw3s, **dw2s;
} moe_layout;

static void lay_out_gradients(kl_case *c, moe_layout *l, kl_arena *a)
{
    const kl_moe_spec *s = &l->s;
    moe_grads *d = &c->grads.moe;
    d->dy = l->dy;
    d->dx = kl_case_output(c, a, "dx", s->T, 1, s->D, true, false);
    if (s->E) {
        float *dw1, *dw3, *dw2;
        d->drouter = kl_case_output(c, a, "drouter", 1, s->E, s->D, true, true);
        dw1 = kl_case_output(c, a, "dw1", 1, s->E, s->I * s->D, true, true);
        dw3 = kl_case_output(c, a, "dw3", 1, s->E, s->I * s->D, true, true);
        dw2 = kl_case_output(c, a, "dw2", 1, s->E, s->D * s->I, true, true);
        for (int64_t e = 0; dw2 && a->base && e < s->E; e++) {
            l->dw1s[e] = dw1 + e * s->I * s->D;
            l->dw3s[e] = dw3 + e * s->I * s->D;
            l->dw2s[e] = dw2 + e * s->I * s->D;
        }
        d->dw1 = l->dw1s;
        d->dw3 = l->dw3s;
        d->dw2 = l->dw2s;
    }
    if (s->Is) {
        d->dshared_w1 = kl_case_output(c, a, "dshared_w1", 1, 1, s->Is * s->D, true, true);
        d->dshared_w3 = kl_case_output(c, a, "dshared_w3", 1, 1, s->Is * s->D, true, true);
        d->dshared_w2 = kl_case_output(c, a, "dshared_w2", 1, 1, s->D * s->Is, true, true);
    }
}

static void lay_out(kl_case *c, const void *spec, kl_arena *a)
{
    moe_layout *l = (moe_layout *)spec;
    const kl_moe_spec *s = &l->s;
    size_t element = kl_dtype_size(s->weight_dtype);
    size_t expert = (size_t)(s->I * s->D), shared = (size_t)(s->Is * s->D);
    l->x = KL_TAKE(a, float, s->T * s->D);
    l->dy = s->backward ? KL_TAKE(a, float, s->T * s->D) : NULL;
    l->router = KL_TAKE(a, float, s->E * s->D);
    l->bias = KL_TAKE(a, float, s->E);
    char **routed[] = {&l->w1, &l->w3, &l->w2}, **common[] = {&l->s1, &l->s3, &l->s2};
    const void ***table[] = {&l->w1s, &l->w3s, &l->w2s};
    for (int i = 0; i < 3; i++) {
        *routed[i] = kl_arena_take(a, (size_t)s->E * expert, element);
        *common[i] = kl_arena_take(a, shared, element);
        *table[i] = KL_TAKE(a, const void *, s->E);
        for (int64_t e = 0; a->base && e < s->E; e++)
            (*table[i])[e] = *routed[i] + (size_t)e * expert * element;
    }
    l->dw1s = KL_TAKE(a, float *, s->E);
    l->dw3s = KL_TAKE(a, float *, s->E);
    l->dw2s = KL_TAKE(a, float *, s->E);
    moe_problem *p = &c->problem.moe;
    *p = (moe_problem){.T = s->T, .D = s->D, .E = s->E, .I = s->I, .top_k = s->top_k, .Is = s->Is, .n_group = s->n_group,
                       .topk_group = s->topk_group, .router_kind = s->router_kind, .renormalize = s->renormalize,
                       .biased_weights = s->biased_weights, .scale = s->scale, .weight_dtype = s->weight_dtype, .x = l->x};
    if (s->E) {
        p->router = l->router;
        p->bias = l->bias;
        p->w1 = l->w1s;
        p->w3 = l->w3s;
        p->w2 = l->w2s;
    }
    if (s->Is) {
        p->shared_w1 = l->s1;
        p->shared_w3 = l->s3;
        p->shared_w2 = l->s2;
    }
    p->y = kl_case_output(c, a, "y", s->T, 1, s->D, false, false);
    c->grads.moe = (moe_grads){0};
    if (s->backward)
        lay_out_gradients(c, l, a);
}

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* The smallest difference, among the best n + 1 of count scores, between what is chosen and what comes next. */
static float gap_after(float *score, int64_t count, int64_t n)
{
    if (n >= count)
        return INFINITY;
    qsort(score, (size_t)count, sizeof *score, descending);
    return score[n - 1] - score[n];
}

/* How far token x stands from another choice: of groups, of experts within all groups. */
static float choice_margin(const kl_moe_spec *s, const float *logit, const float *bias, float *scratch)
{
    float top = -INFINITY, sum = 0.0f;
    for (int64_t e = 0; e < s->E; e++)
        top = logit[e] > top ? logit[e] : top;
    for (int64_t e = 0; e < s->E; e++)
        sum += expf(logit[e] - top);
    float *score = scratch, *copy = scratch + s->E;
    for (int64_t e = 0; e < s->E; e++)
        score[e] = (s->router_kind == MOE_SOFTMAX ? expf(logit[e] - top) / sum : 1.0f / (1.0f + expf(-logit[e]))) + bias[e];
    int64_t groups = s->n_group > 1 ? s->n_group : 1, size = s->E / groups;
    float margin = INFINITY, group[64];
    if (groups > 1 && groups <= 64) {
        for (int64_t g = 0; g < groups; g++) {
            memcpy(copy, score + g * size, (size_t)size * sizeof *copy);
            qsort(copy, (size_t)size, sizeof *copy, descending);
            group[g] = copy[0] + (size > 1 ? copy[1] : 0.0f);
        }
        margin = gap_after(group, groups, s->topk_group);
    }
    /* Any two neighbouring scores apart is enough whatever the groups, and needed without them only at top_k. */
    memcpy(copy, score, (size_t)s->E * sizeof *copy);
    if (groups == 1)
        return fminf(margin, gap_after(copy, s->E, s->top_k));
    qsort(copy, (size_t)s->E, sizeof *copy, descending);
    for (int64_t e = 0; e + 1 < s->E; e++)
        margin = fminf(margin, copy[e] - copy[e + 1]);
    return margin;
}

/* Redraws tokens until none stands near another choice. */
static kl_status separate(const moe_layout *l)
{
    const kl_moe_spec *s = &l->s;
    float *scratch = malloc((size_t)(3 * s->E + 1) * sizeof *scratch);
    if (!scratch)
        return kl_error(KL_ENOMEM, "problem: out of memory");
    float *logit = scratch + 2 * s->E, wanted = s->n_group > 1 ? 1e-5f : 1e-4f;
    kl_rng r = kl_rng_make(s->seed, 30);
    bool apart = true;
    for (int64_t t = 0; t < s->T; t++) {
        apart = false;
        for (int attempt = 0; attempt < 200 && !apart; attempt++) {
            float *x = l->x + t * s->D;
            kl_gemm_serial(KL_N, KL_T, 1, s->E, s->D, 1.0f, x, s->D, l->router, s->D, 0.0f, logit, s->E);
            apart = choice_margin(s, logit, l->bias, scratch) > wanted;
            if (!apart)
                kl_fill_normal(&r, x, (size_t)s->D, 0.0f, 1.0f);
        }
        if (!apart)
            break;
    }
    free(scratch);
    return apart ? kl_ok() : kl_error(KL_EINVAL, "problem: no token was found whose choice of experts is clear");
}

kl_status kl_case_moe(kl_case *c, const kl_moe_spec *given)
{
    *c = (kl_case){.family = KL_FAMILY_MOE, .tolerance = kl_tol_moe_f32, .backward = given->backward};
    moe_layout l = {.s = *given};
    const kl_moe_spec *s = &l.s;
    KL_REQUIRE(s->T >= 0 && s->D >= 1 && s->E >= 0 && s->I >= 0 && s->Is >= 0 && s->top_k >= 0,
               "T, E, I, Is, top_k: expected at least 0, and D at least 1; got %lld, %lld, %lld, %lld, %lld and %lld", (long long)s->T,
               (long long)s->E, (long long)s->I, (long long)s->Is, (long long)s->top_k, (long long)s->D);
    KL_REQUIRE(s->E == 0 || (s->top_k >= 1 && s->top_k <= s->E), "top_k: expected 1 to E = %lld, got %lld", (long long)s->E, (long long)s->top_k);
    KL_REQUIRE(s->n_group <= 1 || (s->E % s->n_group == 0 && s->topk_group >= 1 && s->topk_group <= s->n_group),
               "n_group: expected a divisor of E = %lld and topk_group in 1..n_group, got %lld and %lld", (long long)s->E,
               (long long)s->n_group, (long long)s->topk_group);
    int64_t sizes[] = {s->E, s->I > s->Is ? s->I : s->Is, s->D, 32}, tokens[] = {s->T, s->D, 32};
    KL_REQUIRE(kl_sizes_fit(sizes, 4) && kl_sizes_fit(tokens, 3), "problem: E I D or T D is beyond 2^62");
    KL_TRY(kl_case_build(c, lay_out, &l));
    float by_d = 1.0f / sqrtf((float)s->D), by_i = s->I ? 1.0f / sqrtf((float)s->I) : 0.0f, by_is = s->Is ? 1.0f / sqrtf((float)s->Is) : 0.0f;
    int64_t expert = s->E * s->I * s->D, shared = s->Is * s->D;
    kl_fill_typed(s->seed, 1, l.x, KL_F32, s->T * s->D, 1.0f);
    kl_fill_typed(s->seed, 2, l.router, KL_F32, s->E * s->D, by_d);
    kl_fill_typed(s->seed, 3, l.bias, KL_F32, s->E, 0.1f);
    kl_fill_typed(s->seed, 4, l.w1, s->weight_dtype, expert, by_d);
    kl_fill_typed(s->seed, 5, l.w3, s->weight_dtype, expert, by_d);
    kl_fill_typed(s->seed, 6, l.w2, s->weight_dtype, expert, by_i);
    kl_fill_typed(s->seed, 7, l.s1, s->weight_dtype, shared, by_d);
    kl_fill_typed(s->seed, 8, l.s3, s->weight_dtype, shared, by_d);
    kl_fill_typed(s->seed, 9, l.s2, s->weight_dtype, shared, by_is);
    if (l.dy)
        kl_fill_typed(s->seed, 10, l.dy, KL_F32, s->T * s->D, 1.0f);
    kl_status status = s->E ? separate(&l) : kl_ok();
    if (!kl_failed(status))
        status = moe_validate(NULL, &c->problem.moe);
    if (kl_failed(status)) {
        kl_case_free(c);
        return status;
    }
    int used = snprintf(c->name, sizeof c->name, "%s T%lld D%lld E%lld I%lld top%lld shared%lld weight %s",
                        s->router_kind == MOE_SOFTMAX ? "softmax" : "sigmoid", (long long)s->T, (long long)s->D, (long long)s->E,
                        (long long)s->I, (long long)s->top_k, (long long)s->Is, kl_dtype_name(s->weight_dtype));
    if (s->n_group > 1)
        snprintf(c->name + used, sizeof c->name - (size_t)used, " groups %lld of %lld", (long long)s->topk_group, (long long)s->n_group);
    return kl_ok();
}
