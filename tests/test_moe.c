/* The mixture of experts: every variant against the naive reference, and the promises of moe.h one by one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/compare.h"
#include "common/rng.h"
#include "moe/moe.h"
#include "reference/moe.h"

/* The variants on the cpu, which come first in the table. */
static const kl_variant *cpu_variants(int *count)
{
    const kl_variant *all = moe_variants(count);
    for (int i = 0; i < *count; i++)
        if (all[i].device != KL_CPU)
            *count = i;
    return all;
}

static kl_ctx *ctx_of[4]; /* [n]: a context of n threads */

static uint64_t seed_from_environment(void)
{
    const char *text = getenv("SEED");
    return text ? strtoull(text, NULL, 10) : 1;
}

static int setup(void **state)
{
    (void)state;
    for (int n = 1; n <= 3; n++)
        if (kl_failed(kl_ctx_create(&ctx_of[n], &(kl_ctx_options){.threads = n})))
            return -1;
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    for (int n = 1; n <= 3; n++)
        kl_ctx_destroy(ctx_of[n]);
    return 0;
}

static void assert_ok(kl_status s)
{
    if (kl_failed(s))
        fail_msg("%s", s.message);
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

static twin make_twin(kl_rng *rng, size_t n, float deviation, kl_dtype dtype)
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

static void free_twin(twin w)
{
    free(w.stored);
    free(w.exact);
}

/* p brings sizes and options; everything else is random. */
static moe_case make_case(kl_rng *rng, moe_problem p)
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

static void free_case(moe_case *c)
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
static bool choice_is_close(const moe_case *c, kl_rng *rng)
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
static moe_case make_clear_case(kl_rng *rng, moe_problem p)
{
    for (;;) {
        moe_case c = make_case(rng, p);
        if (!choice_is_close(&c, rng))
            return c;
        free_case(&c);
    }
}

/* ---- running a variant on poisoned memory ---- */

static void *poisoned(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
    memset(p, 0xff, (bytes + 127) & ~(size_t)63); /* floats: NaN */
    return p;
}

static kl_status forward(const kl_variant *v, kl_ctx *ctx, const moe_problem *p)
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

static results run_forward(const kl_variant *v, kl_ctx *ctx, const moe_case *c)
{
    moe_problem p = c->p;
    results r = {.n = (size_t)(p.T * p.D), .slots = p.E ? (size_t)(p.T * p.top_k) : 0};
    p.y = r.y = poisoned(r.n * 4);
    p.chosen_weight = r.weight = poisoned(r.slots * 4);
    p.chosen = r.chosen = poisoned(r.slots * 4);
    assert_ok(forward(v, ctx, &p));
    return r;
}

static void free_results(results r)
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

static gradients make_gradients(const moe_problem *p, const float *dy)
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

static void free_gradients(gradients g)
{
    free(g.all);
    for (int i = 0; i < 3; i++)
        free(g.list[i]);
}

static kl_status backward(const kl_variant *v, kl_ctx *ctx, const moe_problem *p, const moe_grads *g)
{
    size_t bytes = v->workspace(ctx, p, KL_BACKWARD);
    void *workspace = poisoned(bytes);
    kl_status s = v->backward(ctx, p, g, workspace, bytes);
    free(workspace);
    return s;
}

static gradients run_backward(const kl_variant *v, kl_ctx *ctx, const moe_case *c)
{
    gradients g = make_gradients(&c->p, c->dy);
    assert_ok(backward(v, ctx, &c->p, &g.g));
    return g;
}

/* ---- comparing with the reference ---- */

static void describe(const char *variant, const char *what, const moe_problem *p, double err)
{
    print_error("%s %s: error %.3g at T %lld D %lld E %lld I %lld top_k %lld Is %lld groups %lld/%lld router %d renormalize %d biased %d %s\n",
                variant, what, err, (long long)p->T, (long long)p->D, (long long)p->E, (long long)p->I, (long long)p->top_k, (long long)p->Is,
                (long long)p->topk_group, (long long)p->n_group, (int)p->router_kind, p->renormalize, p->biased_weights, kl_dtype_name(p->weight_dtype));
}

static void check(double err, double limit, const char *variant, const char *what, const moe_problem *p)
{
    if (!kl_within(err, limit))
        describe(variant, what, p, err);
    assert_true(kl_within(err, limit));
}

static void check_forward(const kl_variant *v, kl_ctx *ctx, const moe_case *c)
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
static double *reference_gradients(const moe_case *c, const gradients *like)
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

static void check_backward(const kl_variant *v, kl_ctx *ctx, const moe_case *c)
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

static void check_all(const moe_case *c, kl_ctx *ctx)
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

static int64_t one_of(kl_rng *rng, const int64_t *list, size_t n) { return list[kl_rng_below(rng, n)]; }
#define ONE_OF(rng, ...) one_of(rng, (const int64_t[]){__VA_ARGS__}, sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t))

static moe_problem random_problem(kl_rng *rng)
{
    moe_problem p = {.T = ONE_OF(rng, 0, 1, 2, 3, 7, 8, 9, 17, 64, 130, 300), .D = ONE_OF(rng, 1, 8, 24, 33, 64, 100),
                     .E = ONE_OF(rng, 0, 1, 2, 4, 8, 12, 16), .Is = ONE_OF(rng, 0, 0, 1, 16, 50, 300)};
    if (p.E) {
        p.I = ONE_OF(rng, 1, 8, 20, 48, 96, 260);
        p.n_group = p.E % 4 == 0 ? ONE_OF(rng, 0, 1, 2, 4) : 0;
        p.topk_group = p.n_group > 1 ? 1 + (int64_t)kl_rng_below(rng, (uint64_t)p.n_group) : 0;
        int64_t reach = p.n_group > 1 ? p.topk_group * p.E / p.n_group : p.E;
        p.top_k = 1 + (int64_t)kl_rng_below(rng, (uint64_t)(reach < 8 ? reach : 8));
    }
    p.router_kind = kl_rng_below(rng, 2) ? MOE_SOFTMAX : MOE_SIGMOID;
    p.renormalize = kl_rng_below(rng, 4) != 0;
    p.biased_weights = kl_rng_below(rng, 4) == 0;
    p.scale = kl_rng_below(rng, 2) ? 2.446f : 0.0f;
    p.weight_dtype = (kl_dtype)ONE_OF(rng, KL_F32, KL_BF16, KL_F16);
    p.router_dtype = (kl_dtype)ONE_OF(rng, KL_F32, KL_BF16, KL_F16);
    return p;
}

static void test_random_problems(void **state)
{
    (void)state;
    uint64_t seed = seed_from_environment();
    print_message("SEED=%llu\n", (unsigned long long)seed);
    for (uint64_t i = 0; i < 60; i++) {
        kl_rng rng = kl_rng_make(seed, i);
        moe_problem p = random_problem(&rng);
        moe_case c = make_clear_case(&rng, p);
        check_all(&c, ctx_of[1 + i % 3]);
        free_case(&c);
    }
}

/* The shape that a layer of a real model has, only smaller: several tiles in every direction. */
static void test_many_tiles(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 1000);
    moe_problem p = {.T = 300, .D = 320, .E = 6, .I = 288, .top_k = 2, .Is = 520, .renormalize = true, .scale = 2.446f, .weight_dtype = KL_BF16};
    moe_case c = make_clear_case(&rng, p);
    check_forward(moe_pick(KL_CPU, "chunk", &p, KL_FORWARD), ctx_of[2], &c);
    check_backward(moe_pick(KL_CPU, "chunk", &p, KL_BACKWARD), ctx_of[2], &c);
    free_case(&c);
}

/* More tokens than one block of the chunk variant holds. */
static void test_many_tokens(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 1001);
    moe_problem p = {.T = 8192 * 2 + 77, .D = 8, .E = 4, .I = 8, .top_k = 2, .Is = 8, .renormalize = true};
    moe_case c = make_case(&rng, p);
    for (int64_t t = 0; t < p.T; t++) /* few distinct tokens, so that the choice of none of them is close */
        for (int64_t d = 0; d < p.D; d++) {
            ((float *)c.x.stored)[t * p.D + d] = ((float *)c.x.stored)[t % 16 * p.D + d];
            c.x.exact[t * p.D + d] = c.x.exact[t % 16 * p.D + d];
        }
    check_all(&c, ctx_of[2]);
    free_case(&c);
}

/* ---- the router's promises ---- */

static void set_router(moe_case *c, float value)
{
    for (size_t i = 0; i < c->router.n; i++) {
        ((float *)c->router.stored)[i] = value;
        c->router.exact[i] = (double)value;
    }
}

static void set_bias(moe_case *c, const float *bias)
{
    for (size_t e = 0; e < c->bias.n; e++) {
        ((float *)c->bias.stored)[e] = bias[e];
        c->bias.exact[e] = (double)bias[e];
    }
}

static void check_chosen(const moe_case *c, const int32_t *expected)
{
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        results r = run_forward(&v[i], ctx_of[2], c);
        for (size_t s = 0; s < r.slots; s++)
            assert_int_equal(r.chosen[s], expected[s % (size_t)c->p.top_k]);
        free_results(r);
    }
}

static void test_ties_go_to_the_lowest_index(void **state)
{
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        kl_rng rng = kl_rng_make(1, 2);
        moe_case c = make_case(&rng, (moe_problem){.T = 5, .D = 8, .E = 8, .I = 8, .top_k = 3, .router_kind = (moe_router)kind, .renormalize = true});
        set_router(&c, 0.0f);
        set_bias(&c, (const float[8]){0});
        check_chosen(&c, (const int32_t[]){0, 1, 2});
        set_bias(&c, (const float[8]){0, 0, 1, 0, 0, 1, 0, 0});
        check_chosen(&c, (const int32_t[]){2, 5, 0});
        check_all(&c, ctx_of[2]);
        free_case(&c);
    }
}

static void test_groups_by_their_two_best(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(1, 3);
    moe_case c = make_case(&rng, (moe_problem){.T = 3, .D = 8, .E = 8, .I = 8, .top_k = 3, .n_group = 4, .topk_group = 2, .renormalize = true});
    set_router(&c, 0.0f);
    /* sums of two: 0.9, 1.0, 0.8, 1.0: the groups 1 and 3, although the best expert is in group 0 */
    set_bias(&c, (const float[8]){0.9f, 0.0f, 0.5f, 0.5f, 0.4f, 0.4f, 0.2f, 0.8f});
    check_chosen(&c, (const int32_t[]){7, 2, 3});
    /* groups that tie: the lowest */
    set_bias(&c, (const float[8]){0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f});
    check_chosen(&c, (const int32_t[]){0, 1, 2});
    check_all(&c, ctx_of[2]);
    free_case(&c);
}

static void test_the_bias_chooses_but_does_not_weigh(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(1, 4);
    moe_case c = make_case(&rng, (moe_problem){.T = 4, .D = 8, .E = 4, .I = 8, .top_k = 2, .renormalize = true, .scale = 2.0f});
    set_router(&c, 0.0f);
    set_bias(&c, (const float[4]){0.0f, 3.0f, 0.0f, 1.0f});
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int biased = 0; biased < 2; biased++) {
        c.p.biased_weights = biased != 0;
        c.r.biased_weights = biased;
        for (int i = 0; i < count; i++) {
            results r = run_forward(&v[i], ctx_of[1], &c);
            for (size_t t = 0; t < 4; t++) {
                assert_int_equal(r.chosen[2 * t], 1);
                assert_int_equal(r.chosen[2 * t + 1], 3);
                /* every s is 1/2: (1/2)/1 2, or with bias (3 1/2)/5 2 and (1 1/2)/5 2 */
                assert_true(fabsf(r.weight[2 * t] - (biased ? 1.4f : 1.0f)) < 1e-6f);
                assert_true(fabsf(r.weight[2 * t + 1] - (biased ? 0.6f : 1.0f)) < 1e-6f);
            }
            free_results(r);
        }
        check_all(&c, ctx_of[2]);
    }
    free_case(&c);
}

static void test_all_tokens_to_one_expert(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 5);
    moe_case c = make_case(&rng, (moe_problem){.T = 200, .D = 24, .E = 5, .I = 40, .top_k = 1, .scale = 1.5f});
    set_bias(&c, (const float[5]){0, 0, 0, 10.0f, 0});
    check_chosen(&c, (const int32_t[]){3});
    check_all(&c, ctx_of[2]);
    gradients g = run_backward(moe_pick(KL_CPU, "chunk", &c.p, KL_BACKWARD), ctx_of[2], &c);
    for (int i = 2; i < 5; i++)
        for (size_t j = 0; j < g.size[i]; j++)
            if (j / (24 * 40) != 3)
                assert_true(g.all[g.start[i] + j] == 1.0f); /* experts without tokens are left alone */
    free_gradients(g);
    free_case(&c);
}

static void test_all_experts_and_one_expert(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 6);
    for (int64_t E = 1; E <= 7; E += 3) {
        moe_case c = make_clear_case(&rng, (moe_problem){.T = 33, .D = 16, .E = E, .I = 24, .top_k = E, .Is = 8, .renormalize = true});
        check_all(&c, ctx_of[3]);
        free_case(&c);
    }
}

static void test_large_logits_stay_finite(void **state)
{
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        kl_rng rng = kl_rng_make(seed_from_environment(), 7);
        moe_case c = make_case(&rng, (moe_problem){.T = 40, .D = 16, .E = 6, .I = 8, .top_k = 2, .router_kind = (moe_router)kind, .renormalize = true});
        for (size_t i = 0; i < c.router.n; i++)
            ((float *)c.router.stored)[i] *= 1e6f;
        int count;
        const kl_variant *v = cpu_variants(&count);
        results first = {0};
        for (int i = 0; i < count; i++) {
            results r = run_forward(&v[i], ctx_of[1], &c);
            for (size_t j = 0; j < r.n; j++)
                assert_true(isfinite(r.y[j]));
            for (size_t j = 0; j < r.slots; j++)
                assert_true(r.weight[j] >= 0.0f && r.weight[j] <= 1.0f);
            if (i == 0)
                first = r;
            else {
                assert_memory_equal(first.chosen, r.chosen, r.slots * 4);
                assert_true(kl_within(kl_rel_err_f32(r.y, first.y, r.n), kl_tol_moe_f32.forward));
                free_results(r);
            }
        }
        free_results(first);
        gradients g = run_backward(moe_pick(KL_CPU, "chunk", &c.p, KL_BACKWARD), ctx_of[1], &c);
        for (size_t i = 0; i < g.total; i++)
            assert_true(isfinite(g.all[i]));
        free_gradients(g);
        free_case(&c);
    }
}

static void test_a_broken_token_breaks_only_itself(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 8);
    moe_case c = make_case(&rng, (moe_problem){.T = 40, .D = 16, .E = 6, .I = 8, .top_k = 3, .Is = 8, .renormalize = true});
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        results whole = run_forward(&v[i], ctx_of[2], &c);
        float kept = ((float *)c.x.stored)[17 * 16];
        ((float *)c.x.stored)[17 * 16] = NAN;
        results broken = run_forward(&v[i], ctx_of[2], &c);
        ((float *)c.x.stored)[17 * 16] = kept;
        for (size_t t = 0; t < 40; t++) {
            for (size_t d = 0; d < 16; d++)
                assert_true(t == 17 ? isnan(broken.y[t * 16 + d]) : fabsf(broken.y[t * 16 + d] - whole.y[t * 16 + d]) < 1e-5f);
            for (size_t k = 0; k < 3; k++)
                assert_in_range(broken.chosen[t * 3 + k], 0, 5);
            assert_true(broken.chosen[t * 3] != broken.chosen[t * 3 + 1] && broken.chosen[t * 3] != broken.chosen[t * 3 + 2]);
        }
        free_results(whole);
        free_results(broken);
    }
    free_case(&c);
}

/* However a prompt is cut, a token is routed alike, bit for bit: a flipped expert would be more than rounding. */
static void test_routing_does_not_depend_on_the_neighbours(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 9);
    moe_case c = make_case(&rng, (moe_problem){.T = 50, .D = 72, .E = 16, .I = 8, .top_k = 4, .renormalize = true, .router_dtype = KL_BF16});
    results whole = run_forward(moe_pick(KL_CPU, "chunk", &c.p, KL_FORWARD), ctx_of[2], &c);
    for (int64_t t = 0; t < 50; t++) {
        moe_case one = c;
        one.p.T = 1;
        one.p.x = (const float *)c.p.x + t * 72;
        results r = run_forward(moe_pick(KL_CPU, t % 2 ? "recurrent" : "chunk", &one.p, KL_FORWARD), ctx_of[1 + t % 3], &one);
        assert_memory_equal(r.chosen, whole.chosen + t * 4, 16);
        assert_memory_equal(r.weight, whole.weight + t * 4, 16);
        free_results(r);
    }
    free_results(whole);
    free_case(&c);
}

static void test_same_bits_whatever_the_thread_count(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 10);
    const moe_problem problems[] = {
        {.T = 301, .D = 100, .E = 8, .I = 96, .top_k = 3, .Is = 130, .renormalize = true, .weight_dtype = KL_BF16},
        {.T = 6, .D = 128, .E = 16, .I = 64, .top_k = 4, .Is = 64, .renormalize = true},
        {.T = 100, .D = 60, .Is = 200},
    };
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (size_t i = 0; i < sizeof problems / sizeof *problems; i++) {
        moe_case c = make_case(&rng, problems[i]);
        for (int n = 0; n < count; n++) {
            results one = run_forward(&v[n], ctx_of[1], &c);
            for (int threads = 1; threads <= 3; threads++) {
                results r = run_forward(&v[n], ctx_of[threads], &c);
                assert_memory_equal(r.y, one.y, one.n * 4);
                assert_memory_equal(r.weight, one.weight, one.slots * 4);
                free_results(r);
            }
            free_results(one);
            if (!v[n].backward)
                continue;
            gradients first = run_backward(&v[n], ctx_of[1], &c);
            for (int threads = 1; threads <= 3; threads++) {
                gradients g = run_backward(&v[n], ctx_of[threads], &c);
                assert_memory_equal(g.all, first.all, first.total * 4);
                free_gradients(g);
            }
            free_gradients(first);
        }
        free_case(&c);
    }
}

/* Any gradient may be absent; those that are there do not change. */
static void test_absent_gradients(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(seed_from_environment(), 11);
    moe_case c = make_case(&rng, (moe_problem){.T = 20, .D = 16, .E = 4, .I = 24, .top_k = 2, .Is = 8, .renormalize = true});
    const kl_variant *v = moe_pick(KL_CPU, "chunk", &c.p, KL_BACKWARD);
    gradients whole = run_backward(v, ctx_of[2], &c);
    for (int part = 0; part < PARTS; part++) {
        gradients some = make_gradients(&c.p, c.dy);
        moe_grads only = {.dy = c.dy};
        switch (part) {
        case 0: only.dx = some.g.dx; break;
        case 1: only.drouter = some.g.drouter; break;
        case 2: only.dw1 = some.g.dw1; break;
        case 3: only.dw3 = some.g.dw3; break;
        case 4: only.dw2 = some.g.dw2; break;
        case 5: only.dshared_w1 = some.g.dshared_w1; break;
        case 6: only.dshared_w3 = some.g.dshared_w3; break;
        case 7: only.dshared_w2 = some.g.dshared_w2; break;
        }
        assert_ok(backward(v, ctx_of[2], &c.p, &only));
        assert_memory_equal(some.all + some.start[part], whole.all + whole.start[part], some.size[part] * 4);
        free_gradients(some);
    }
    free_gradients(whole);
    free_case(&c);
}

/* ---- dispatch and refusals ---- */

static void test_dispatch(void **state)
{
    (void)state;
    moe_problem p = {.T = 1, .D = 8, .E = 2, .I = 8, .top_k = 1};
    assert_string_equal(moe_pick(KL_CPU, NULL, &p, KL_FORWARD)->name, "recurrent");
    assert_string_equal(moe_pick(KL_CPU, NULL, &p, KL_BACKWARD)->name, "chunk");
    p.T = 4096;
    assert_string_equal(moe_pick(KL_CPU, NULL, &p, KL_FORWARD)->name, "chunk");
    assert_string_equal(moe_pick(KL_CPU, "recurrent", &p, KL_FORWARD)->name, "recurrent");
    assert_null(moe_pick(KL_CPU, "nonesuch", &p, KL_FORWARD));
    kl_status s = moe_pick(KL_CPU, "recurrent", &p, KL_FORWARD)->check(&p, KL_BACKWARD);
    assert_int_equal(s.code, KL_EUNSUPPORTED);
    assert_non_null(strstr(s.message, "recurrent"));
    kl_cost one = moe_variants(NULL)->cost(&p, KL_FORWARD);
    assert_true(one.flops == 4096.0 * (2 * 2 * 8 + 6 * 8 * 8));
    assert_true(one.bytes == 4.0 * (2 * 4096 * 8 + 2 * 3 * 8 * 8 + 2 * 8));
}

static void refused(kl_status s, const char *word)
{
    if (!kl_failed(s) || !strstr(s.message, word))
        fail_msg("expected a refusal naming \"%s\", got \"%s\"", word, s.message);
}

static void test_refusals_name_the_argument(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(1, 12);
    moe_case c = make_case(&rng, (moe_problem){.T = 3, .D = 8, .E = 4, .I = 8, .top_k = 2, .Is = 8, .renormalize = true});
    float y[24];
    c.p.y = y;
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        moe_problem p;
#define REFUSED(word, ...) do { p = c.p; __VA_ARGS__; refused(forward(&v[i], ctx_of[1], &p), word); } while (0)
        REFUSED("dtype", p.dtype = KL_BF16);
        REFUSED("weight_dtype", p.weight_dtype = KL_I32);
        REFUSED("router_dtype", p.router_dtype = KL_F64);
        REFUSED("T:", p.T = -1);
        REFUSED("D:", p.D = 0);
        REFUSED("E:", p.E = -1);
        REFUSED("I:", p.I = 0);
        REFUSED("Is:", p.Is = -2);
        REFUSED("top_k", p.top_k = 0);
        REFUSED("top_k", p.top_k = 5);
        REFUSED("n_group", p.n_group = 3, p.topk_group = 1);
        REFUSED("topk_group", p.n_group = 2, p.topk_group = 3);
        REFUSED("top_k", p.n_group = 4, p.topk_group = 1);
        REFUSED("router_kind", p.router_kind = (moe_router)7);
        REFUSED("scale", p.scale = NAN);
        REFUSED("x:", p.x = NULL);
        REFUSED("y:", p.y = NULL);
        REFUSED("y:", p.y = (void *)p.x);
        REFUSED("router:", p.router = NULL);
        REFUSED("w1:", p.w1 = NULL);
        const void *holes[4] = {y, y, NULL, y};
        REFUSED("w2[2]", p.w2 = holes);
        REFUSED("shared_w3", p.shared_w3 = NULL);
        p = c.p;
        size_t need = v[i].workspace(ctx_of[1], &p, KL_FORWARD);
        assert_true(need > 0);
        void *workspace = poisoned(need);
        refused(v[i].forward(ctx_of[1], &p, workspace, need - 1), "workspace");
        refused(v[i].forward(ctx_of[1], &p, NULL, need), "workspace");
        refused(v[i].forward(NULL, &p, workspace, need), "ctx");
        refused(v[i].forward(ctx_of[1], NULL, workspace, need), "problem");
        free(workspace);
    }
    const kl_variant *chunk = moe_pick(KL_CPU, "chunk", &c.p, KL_BACKWARD);
    refused(backward(chunk, ctx_of[1], &c.p, &(moe_grads){0}), "dy");
    refused(backward(chunk, ctx_of[1], &c.p, &(moe_grads){.dy = c.dy, .dx = (void *)c.p.x}), "dx");
    refused(moe_validate_grads(&c.p, NULL), "grads");
    free_case(&c);
}

static void test_no_tokens(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(1, 13);
    moe_case c = make_case(&rng, (moe_problem){.T = 0, .D = 8, .E = 4, .I = 8, .top_k = 2, .Is = 8});
    check_all(&c, ctx_of[2]);
    c.p.x = NULL;
    size_t bytes = moe_workspace(ctx_of[1], &c.p, KL_FORWARD);
    void *workspace = poisoned(bytes);
    assert_ok(moe_forward(ctx_of[1], &c.p, workspace, bytes));
    free(workspace);
    free_case(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_problems),
        cmocka_unit_test(test_many_tiles),
        cmocka_unit_test(test_many_tokens),
        cmocka_unit_test(test_ties_go_to_the_lowest_index),
        cmocka_unit_test(test_groups_by_their_two_best),
        cmocka_unit_test(test_the_bias_chooses_but_does_not_weigh),
        cmocka_unit_test(test_all_tokens_to_one_expert),
        cmocka_unit_test(test_all_experts_and_one_expert),
        cmocka_unit_test(test_large_logits_stay_finite),
        cmocka_unit_test(test_a_broken_token_breaks_only_itself),
        cmocka_unit_test(test_routing_does_not_depend_on_the_neighbours),
        cmocka_unit_test(test_same_bits_whatever_the_thread_count),
        cmocka_unit_test(test_absent_gradients),
        cmocka_unit_test(test_dispatch),
        cmocka_unit_test(test_refusals_name_the_argument),
        cmocka_unit_test(test_no_tokens),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
