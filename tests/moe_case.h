/* A random mixture of experts with its reference in double: what its tests build, run on poisoned memory and compare. Include after
 * cmocka.h. */
#ifndef TESTS_MOE_CASE_H
#define TESTS_MOE_CASE_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/compare.h"
#include "common/rng.h"
#include "moe/moe.h"
#include "reference/moe.h"
#include "tests/contexts.h"
#include "tests/expect.h"

/* The variants on the cpu, which come first in the table. */
static const kl_variant *cpu_variants(int *count)
{
    const kl_variant *all = moe_variants(count);
    for (int i = 0; i < *count; i++)
        if (all[i].device != KL_CPU)
            *count = i;
    return all;
}

static inline uint64_t seed_from_environment(void)
{
    const char *text = getenv("SEED");
    return text ? strtoull(text, NULL, 10) : 1;
}


/* ---- a problem, its reference twin in double, and its results ---- */

typedef struct twin {
    void *stored;  /* in its dtype */
    double *exact; /* the same numbers */
    size_t n;
} twin;

typedef struct moe_case {
    moe_problem p;
    ref_moe r;
    twin x, router, bias, shared[3];
    twin *expert[3]; /* w1, w3, w2: [E] */
    const void **stored[3];
    const double **exact[3];
    float *dy;
    double *dy_exact;
} moe_case;

static inline twin make_twin(kl_rng *rng, size_t n, float deviation, kl_dtype dtype)
{
    twin w = {malloc(n * 4 + 1), malloc((n + 1) * sizeof(double)), n};
    float *f = malloc((n + 1) * sizeof(float));
    kl_fill_normal(rng, f, n, 0.0f, deviation);
    kl_from_f32(w.stored, dtype, f, n);
    kl_to_f32(f, w.stored, dtype, n);
    for (size_t i = 0; i < n; i++)
        w.exact[i] = f[i];
    free(f);
    return w;
}

static inline void free_twin(twin w)
{
    free(w.stored);
    free(w.exact);
}

/* p brings sizes and options; everything else is random. */
static inline moe_case make_case(kl_rng *rng, moe_problem p)
{
    moe_case c = {.p = p};
    size_t T = (size_t)p.T, D = (size_t)p.D, E = (size_t)p.E, I = (size_t)p.I, Is = (size_t)p.Is;
    float out_of_D = 1.0f / sqrtf((float)p.D), out_of_I = 1.0f / sqrtf((float)(p.I + 1)), out_of_Is = 1.0f / sqrtf((float)(p.Is + 1));
    c.x = make_twin(rng, T * D, 1.0f, KL_F32);
    c.router = make_twin(rng, E * D, 2.0f * out_of_D, p.router_dtype);
    c.bias = make_twin(rng, E, 0.1f, KL_F32);
    for (int i = 0; i < 3; i++) {
        c.expert[i] = calloc(E + 1, sizeof(twin));
        c.stored[i] = calloc(E + 1, sizeof(void *));
        c.exact[i] = calloc(E + 1, sizeof(double *));
        for (size_t e = 0; e < E; e++) {
            c.expert[i][e] = make_twin(rng, I * D, i == 2 ? out_of_I : out_of_D, p.weight_dtype);
            c.stored[i][e] = c.expert[i][e].stored;
            c.exact[i][e] = c.expert[i][e].exact;
        }
        c.shared[i] = make_twin(rng, Is * D, i == 2 ? out_of_Is : out_of_D, p.weight_dtype);
    }
    c.dy = malloc((T * D + 1) * sizeof(float));
    c.dy_exact = malloc((T * D + 1) * sizeof(double));
    kl_fill_normal(rng, c.dy, T * D, 0.0f, 1.0f);
    for (size_t i = 0; i < T * D; i++)
        c.dy_exact[i] = c.dy[i];
    c.p.x = c.x.stored, c.p.router = c.router.stored, c.p.bias = c.bias.stored;
    c.p.w1 = c.stored[0], c.p.w3 = c.stored[1], c.p.w2 = c.stored[2];
    c.p.shared_w1 = c.shared[0].stored, c.p.shared_w3 = c.shared[1].stored, c.p.shared_w2 = c.shared[2].stored;
    c.r = (ref_moe){.T = p.T, .D = p.D, .E = p.E, .I = p.I, .Is = p.Is, .top_k = p.E ? p.top_k : 0, .n_group = p.n_group,
                    .topk_group = p.topk_group, .router = p.router_kind == MOE_SOFTMAX ? REF_ROUTER_SOFTMAX : REF_ROUTER_SIGMOID,
                    .renormalize = p.renormalize, .biased_weights = p.biased_weights, .scaling = (double)p.scale,
                    .x = c.x.exact, .w_router = c.router.exact, .bias = c.bias.exact, .w1 = c.exact[0], .w3 = c.exact[1], .w2 = c.exact[2],
                    .s1 = c.shared[0].exact, .s3 = c.shared[1].exact, .s2 = c.shared[2].exact};
    return c;
}

static inline void free_case(moe_case *c)
{
    free_twin(c->x), free_twin(c->router), free_twin(c->bias);
    for (int i = 0; i < 3; i++) {
        for (int64_t e = 0; e < c->p.E; e++)
            free_twin(c->expert[i][e]);
        free(c->expert[i]);
        free(c->stored[i]);
        free(c->exact[i]);
        free_twin(c->shared[i]);
    }
    free(c->dy);
    free(c->dy_exact);
}

/* Would the reference choose otherwise if the scores were a little different? Then float may, too, and rightly. */
static inline bool choice_is_close(const moe_case *c, kl_rng *rng)
{
    if (c->p.E == 0)
        return false;
    size_t n = (size_t)(c->p.T * c->p.top_k), E = (size_t)c->p.E;
    int64_t *id = malloc((n + 1) * sizeof *id), *id2 = malloc((n + 1) * sizeof *id);
    double *weight = malloc((n + 1) * sizeof *weight), *bias = malloc(E * sizeof *bias);
    bool close = false;
    assert_int_equal(ref_moe_route(&c->r, id, weight), 0);
    for (int trial = 0; trial < 4; trial++) {
        ref_moe r = c->r;
        for (size_t e = 0; e < E; e++)
            bias[e] = c->bias.exact[e] + 1e-5 * (kl_rng_uniform(rng) - 0.5);
        r.bias = bias;
        assert_int_equal(ref_moe_route(&r, id2, weight), 0);
        close |= memcmp(id, id2, n * sizeof *id) != 0;
    }
    free(id), free(id2), free(weight), free(bias);
    return close;
}

/* As make_case, drawn again until every choice is clear. */
static inline moe_case make_clear_case(kl_rng *rng, moe_problem p)
{
    for (;;) {
        moe_case c = make_case(rng, p);
        if (!choice_is_close(&c, rng))
            return c;
        free_case(&c);
    }
}

/* ---- running a variant on poisoned memory ---- */

static inline void *poisoned(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    memset(p, 0xff, (bytes + 127) & ~(size_t)63); /* floats: NaN */
    return p;
}

static inline kl_status forward(const kl_variant *v, kl_ctx *ctx, const moe_problem *p)
{
    size_t bytes = v->workspace(ctx, p, KL_FORWARD);
    void *workspace = poisoned(bytes);
    kl_status s = v->forward(ctx, p, workspace, bytes);
    for (size_t i = bytes; i < ((bytes + 127) & ~(size_t)63); i++)
        assert_int_equal(((unsigned char *)workspace)[i], 0xff);
    free(workspace);
    return s;
}

typedef struct results {
    size_t n, slots;
    float *y, *weight;
    int32_t *chosen;
} results;

static inline results run_forward(const kl_variant *v, kl_ctx *ctx, const moe_case *c)
{
    moe_problem p = c->p;
    results r = {.n = (size_t)(p.T * p.D), .slots = p.E ? (size_t)(p.T * p.top_k) : 0};
    p.y = r.y = poisoned(r.n * 4);
    p.chosen_weight = r.weight = poisoned(r.slots * 4);
    p.chosen = r.chosen = poisoned(r.slots * 4);
    assert_ok(forward(v, ctx, &p));
    return r;
}

static inline void free_results(results r)
{
    free(r.y), free(r.weight), free(r.chosen);
}

enum { PARTS = 8 };
static const char *const part_name[PARTS] = {"dx", "drouter", "dw1", "dw3", "dw2", "dshared_w1", "dshared_w3", "dshared_w2"};

/* All gradients in one block of floats: dx | drouter | dw1 | dw3 | dw2 (each all experts) | the shared three */
typedef struct gradients {
    size_t size[PARTS], start[PARTS], total;
    float *all;
    float **list[3];
    moe_grads g;
} gradients;

static inline gradients make_gradients(const moe_problem *p, const float *dy)
{
    size_t D = (size_t)p->D, E = (size_t)p->E, ID = (size_t)p->I * D, shared = (size_t)p->Is * D;
    gradients g = {.size = {(size_t)p->T * D, E * D, E * ID, E * ID, E * ID, shared, shared, shared}};
    for (int i = 0; i < PARTS; i++) {
        g.start[i] = g.total;
        g.total += g.size[i];
    }
    g.all = poisoned(g.total * 4);
    for (size_t i = g.start[1]; i < g.total; i++)
        g.all[i] = 1.0f; /* parameters accumulate, dx overwrites */
    for (int i = 0; i < 3; i++) {
        g.list[i] = calloc(E + 1, sizeof(float *));
        for (size_t e = 0; e < E; e++)
            g.list[i][e] = g.all + g.start[2 + i] + e * ID;
    }
    g.g = (moe_grads){.dy = dy, .dx = g.all, .drouter = g.all + g.start[1], .dw1 = g.list[0], .dw3 = g.list[1], .dw2 = g.list[2],
                      .dshared_w1 = g.all + g.start[5], .dshared_w3 = g.all + g.start[6], .dshared_w2 = g.all + g.start[7]};
    return g;
}

static inline void free_gradients(gradients g)
{
    free(g.all);
    for (int i = 0; i < 3; i++)
        free(g.list[i]);
}

static inline kl_status backward(const kl_variant *v, kl_ctx *ctx, const moe_problem *p, const moe_grads *g)
{
    size_t bytes = v->workspace(ctx, p, KL_BACKWARD);
    void *workspace = poisoned(bytes);
    kl_status s = v->backward(ctx, p, g, workspace, bytes);
    free(workspace);
    return s;
}

static inline gradients run_backward(const kl_variant *v, kl_ctx *ctx, const moe_case *c)
{
    gradients g = make_gradients(&c->p, c->dy);
    assert_ok(backward(v, ctx, &c->p, &g.g));
    return g;
}

/* ---- comparing with the reference ---- */

static inline void describe(const char *variant, const char *what, const moe_problem *p, double err)
{
    print_error("%s %s: error %.3g at T %lld D %lld E %lld I %lld top_k %lld Is %lld groups %lld/%lld router %d renormalize %d biased %d %s\n",
                variant, what, err, (long long)p->T, (long long)p->D, (long long)p->E, (long long)p->I, (long long)p->top_k, (long long)p->Is,
                (long long)p->topk_group, (long long)p->n_group, (int)p->router_kind, p->renormalize, p->biased_weights, kl_dtype_name(p->weight_dtype));
}

static inline void check(double err, double limit, const char *variant, const char *what, const moe_problem *p)
{
    if (!kl_within(err, limit))
        describe(variant, what, p, err);
    assert_true(kl_within(err, limit));
}

static inline void check_forward(const kl_variant *v, kl_ctx *ctx, const moe_case *c)
{
    results got = run_forward(v, ctx, c);
    double *y = malloc((got.n + 1) * sizeof(double)), *weight = malloc((got.slots + 1) * sizeof(double));
    int64_t *id = malloc((got.slots + 1) * sizeof(int64_t));
    assert_int_equal(ref_moe_forward(&c->r, y), 0);
    check(kl_rel_err_blocks(got.y, y, (size_t)c->p.T, 1, (size_t)c->p.D, 1), kl_tol_moe_f32.forward, v->name, "y", &c->p);
    if (got.slots) {
        assert_int_equal(ref_moe_route(&c->r, id, weight), 0);
        for (size_t i = 0; i < got.slots; i++)
            assert_int_equal(got.chosen[i], id[i]);
        check(kl_rel_err(got.weight, weight, got.slots), kl_tol_moe_f32.forward, v->name, "weights", &c->p);
    }
    free(y), free(weight), free(id);
    free_results(got);
}

/* The reference's gradients in the order of `gradients`, from zero. */
static inline double *reference_gradients(const moe_case *c, const gradients *like)
{
    size_t E = (size_t)c->p.E, ID = (size_t)(c->p.I * c->p.D);
    double *all = calloc(like->total + 1, sizeof(double)), **list[3];
    for (int i = 0; i < 3; i++) {
        list[i] = calloc(E + 1, sizeof(double *));
        for (size_t e = 0; e < E; e++)
            list[i][e] = all + like->start[2 + i] + e * ID;
    }
    ref_moe_grad d = {.dx = all, .dw_router = all + like->start[1], .dw1 = list[0], .dw3 = list[1], .dw2 = list[2],
                      .ds1 = all + like->start[5], .ds3 = all + like->start[6], .ds2 = all + like->start[7]};
    assert_int_equal(ref_moe_backward(&c->r, c->dy_exact, &d), 0);
    for (int i = 0; i < 3; i++)
        free(list[i]);
    return all;
}

static inline void check_backward(const kl_variant *v, kl_ctx *ctx, const moe_case *c)
{
    gradients got = run_backward(v, ctx, c);
    double *expected = reference_gradients(c, &got);
    for (size_t i = got.start[1]; i < got.total; i++)
        expected[i] += 1.0; /* what was there before */
    for (int i = 0; i < PARTS; i++) {
        size_t blocks = i == 0 ? (size_t)c->p.T : i < 5 ? (size_t)c->p.E : 1;
        if (blocks && got.size[i])
            check(kl_rel_err_blocks(got.all + got.start[i], expected + got.start[i], blocks, 1, got.size[i] / blocks, 1),
                  kl_tol_moe_f32.gradient, v->name, part_name[i], &c->p);
    }
    free(expected);
    free_gradients(got);
}

static inline void check_all(const moe_case *c, kl_ctx *ctx)
{
    int count;
    const kl_variant *v = cpu_variants(&count);
    assert_true(count >= 2);
    for (int i = 0; i < count; i++) {
        if (v[i].device != KL_CPU)
            continue;
        check_forward(&v[i], ctx, c);
        if (v[i].backward)
            check_backward(&v[i], ctx, c);
    }
}

#endif
