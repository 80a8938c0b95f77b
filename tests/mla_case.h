/* A random MLA problem with its reference in double: what its tests build, run on poisoned memory and compare. Include after cmocka.h. */
#ifndef TESTS_MLA_CASE_H
#define TESTS_MLA_CASE_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/compare.h"
#include "common/rng.h"
#include "mla/mla.h"
#include "reference/mla.h"

static inline uint64_t first_seed(void)
{
    const char *given = getenv("KL_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 10) : 20251030;
    print_message("seed %llu (set KL_SEED to change it)\n", (unsigned long long)seed);
    return seed;
}

/* The variants on the cpu, which come first in the table. */
static inline const kl_variant *cpu_variants(int *count)
{
    const kl_variant *all = mla_variants(count);
    for (int i = 0; i < *count; i++)
        if (all[i].device != KL_CPU)
            *count = i;
    return all;
}

/* ---- a random problem with everything that it owns; unused latent rows, outputs and workspaces are NaN ---- */

typedef struct shape {
    int64_t N, H, R, Dn, Dr, Dv;
    int64_t queries[8], keys[8]; /* [N] */
    kl_dtype latent, weight;
    float size;                  /* of the entries of q: 1 gives logits near 1 */
    int64_t stride;              /* extra floats from token to token of q */
} shape;

typedef struct problem {
    mla_problem p;
    mla_grads g;
    int64_t cu_q[9], kv_start[8], kv_len[8], tokens;
    float *q, *latent, *weights;              /* as float, rounded to what the problem holds */
    void *latent_stored, *weights_stored;
    float *o, *lse, *d_o, *dq, *dlatent, *dkv_b;
} problem;

static inline size_t latent_size(const problem *x) { return (size_t)(x->p.latent_rows * (x->p.R + x->p.Dr)); }
static inline size_t weight_size(const problem *x) { return (size_t)(x->p.H * (x->p.Dn + x->p.Dv) * x->p.R); }
static inline size_t out_size(const problem *x) { return (size_t)(x->tokens * x->p.H * x->p.Dv); }
static inline size_t q_stride(const problem *x) { return (size_t)(x->p.q_stride ? x->p.q_stride : x->p.H * (x->p.Dn + x->p.Dr)); }
static inline size_t q_size(const problem *x) { return (size_t)x->tokens * q_stride(x); }

static inline void *allocate(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    assert_non_null(p);
    return p;
}

static inline float *poisoned(size_t n)
{
    float *x = allocate(n * sizeof(float));
    for (size_t i = 0; i < n; i++)
        x[i] = NAN;
    return x;
}

static inline void *stored(float *x, size_t n, kl_dtype type)
{
    void *copy = allocate(n * kl_dtype_size(type));
    kl_from_f32(copy, type, x, n);
    kl_to_f32(x, copy, type, n);
    return copy;
}

static inline problem make(const shape *s, uint64_t seed)
{
    problem x = {.p = {.N = s->N, .H = s->H, .R = s->R, .Dn = s->Dn, .Dr = s->Dr, .Dv = s->Dv, .latent_dtype = s->latent, .weight_dtype = s->weight}};
    kl_rng r = kl_rng_make(seed, 7);
    int64_t width = s->R + s->Dr, row = 1;
    for (int64_t n = 0; n < s->N; n++) {
        x.cu_q[n + 1] = x.cu_q[n] + s->queries[n];
        x.kv_len[n] = s->keys[n];
        x.kv_start[n] = row;
        row += s->keys[n] + 1; /* one unused row between sequences */
    }
    x.tokens = x.cu_q[s->N];
    x.p.latent_rows = row;
    x.p.q_stride = s->stride ? s->H * (s->Dn + s->Dr) + s->stride : 0;
    x.q = poisoned(q_size(&x));
    for (int64_t t = 0; t < x.tokens; t++)
        kl_fill_normal(&r, x.q + (size_t)t * q_stride(&x), (size_t)(s->H * (s->Dn + s->Dr)), 0.0f, s->size);
    x.latent = poisoned(latent_size(&x));
    for (int64_t n = 0; n < s->N; n++)
        kl_fill_normal(&r, x.latent + x.kv_start[n] * width, (size_t)(s->keys[n] * width), 0.0f, 1.0f);
    x.weights = poisoned(weight_size(&x));
    kl_fill_normal(&r, x.weights, weight_size(&x), 0.0f, 1.0f / sqrtf((float)s->R));
    x.d_o = poisoned(out_size(&x));
    kl_fill_normal(&r, x.d_o, out_size(&x), 0.0f, 1.0f);
    x.latent_stored = stored(x.latent, latent_size(&x), s->latent);
    x.weights_stored = stored(x.weights, weight_size(&x), s->weight);
    x.o = poisoned(out_size(&x));
    x.lse = poisoned((size_t)(x.tokens * s->H));
    x.dq = poisoned(q_size(&x));
    x.dlatent = poisoned(latent_size(&x));
    x.dkv_b = poisoned(weight_size(&x));
    x.p.q = x.q, x.p.latent = x.latent_stored, x.p.kv_b = x.weights_stored, x.p.o = x.o, x.p.lse = x.lse;
    return x;
}

/* The arrays of a problem live in the struct: point at them after it has its final place. */
static inline void bind(problem *x)
{
    x->p.cu_q = x->cu_q, x->p.kv_start = x->kv_start, x->p.kv_len = x->kv_len;
    x->g = (mla_grads){.d_o = x->d_o, .dq = x->dq, .dlatent = x->dlatent, .dkv_b = x->dkv_b};
}

static inline void drop(problem *x)
{
    void *all[] = {x->q, x->latent, x->weights, x->latent_stored, x->weights_stored, x->o, x->lse, x->d_o, x->dq, x->dlatent, x->dkv_b};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* ---- the reference on the same rounded numbers ---- */

typedef struct answer {
    double *o, *lse, *dq, *dlatent, *dkv_b; /* dq without the stride */
} answer;

static inline double *to_double(const float *x, size_t n)
{
    double *y = calloc(n + 1, sizeof *y);
    assert_non_null(y);
    for (size_t i = 0; i < n; i++)
        y[i] = x[i];
    return y;
}

static inline answer reference(const problem *x, bool backward)
{
    const mla_problem *p = &x->p;
    size_t head = (size_t)(p->H * (p->Dn + p->Dr)), out = (size_t)(p->H * p->Dv), width = (size_t)(p->R + p->Dr);
    answer a = {calloc(out_size(x) + 1, 8), calloc((size_t)(x->tokens * p->H) + 1, 8), calloc((size_t)x->tokens * head + 1, 8),
                calloc(latent_size(x) + 1, 8), calloc(weight_size(x) + 1, 8)};
    double *W = to_double(x->weights, weight_size(x)), *d_o = to_double(x->d_o, out_size(x));
    for (int64_t n = 0; n < p->N; n++) {
        size_t first = (size_t)p->cu_q[n], queries = (size_t)(p->cu_q[n + 1] - p->cu_q[n]), row = (size_t)p->kv_start[n];
        double *q = calloc(queries * head + 1, 8), *c = to_double(x->latent + row * width, (size_t)p->kv_len[n] * width);
        for (size_t t = 0; t < queries; t++)
            for (size_t i = 0; i < head; i++)
                q[t * head + i] = x->q[(first + t) * q_stride(x) + i];
        ref_mla r = {.Tq = (int64_t)queries, .Tk = p->kv_len[n], .H = p->H, .Dn = p->Dn, .Dr = p->Dr, .Dv = p->Dv, .R = p->R,
                     .scale = p->scale, .q = q, .c = c, .W = W};
        assert_int_equal(ref_mla_forward(&r, a.o + first * out, a.lse + first * (size_t)p->H), 0);
        if (backward)
            assert_int_equal(ref_mla_backward(&r, d_o + first * out, a.dq + first * head, a.dlatent + row * width, a.dkv_b), 0);
        free(q);
        free(c);
    }
    free(W);
    free(d_o);
    return a;
}

static inline void forget(answer *a)
{
    free(a->o);
    free(a->lse);
    free(a->dq);
    free(a->dlatent);
    free(a->dkv_b);
}

/* ---- running ---- */

static inline kl_ctx *context(int threads)
{
    kl_ctx *ctx;
    kl_status s = kl_ctx_create(&ctx, &(kl_ctx_options){.threads = threads});
    assert_false(kl_failed(s));
    return ctx;
}

static inline void poison(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = NAN;
}

/* Runs with exactly the workspace that was asked for, full of NaN, and a guard behind it. */
static inline kl_status run(const kl_variant *v, problem *x, kl_pass pass, int threads)
{
    kl_ctx *ctx = context(threads);
    size_t bytes = v->workspace(ctx, &x->p, pass), guard = 64;
    unsigned char *workspace = allocate(bytes + guard);
    memset(workspace, 0xff, bytes + guard);
    kl_status s = pass == KL_FORWARD ? v->forward(ctx, &x->p, workspace, bytes) : v->backward(ctx, &x->p, &x->g, workspace, bytes);
    for (size_t i = 0; i < guard; i++)
        assert_int_equal(workspace[bytes + i], 0xff);
    free(workspace);
    kl_ctx_destroy(ctx);
    return s;
}

static inline void forward(const kl_variant *v, problem *x, int threads)
{
    poison(x->o, out_size(x));
    poison(x->lse, (size_t)(x->tokens * x->p.H));
    kl_status s = run(v, x, KL_FORWARD, threads);
    if (kl_failed(s))
        fail_msg("%s: %s", v->name, s.message);
}

static inline void backward(const kl_variant *v, problem *x, int threads)
{
    poison(x->dq, q_size(x));
    poison(x->dlatent, latent_size(x));
    for (size_t i = 0; i < weight_size(x); i++)
        x->dkv_b[i] = 0.0f;
    kl_status s = run(v, x, KL_BACKWARD, threads);
    if (kl_failed(s))
        fail_msg("%s: %s", v->name, s.message);
}

/* ---- comparing ---- */

static inline void near(const char *what, const char *name, uint64_t seed, double err, double limit)
{
    if (!kl_within(err, limit))
        fail_msg("%s of %s, seed %llu: error %.3g, at most %.3g", what, name, (unsigned long long)seed, err, limit);
}

/* Rows that belong to a sequence without gaps; rows between sequences must still be NaN in a gradient. */
static inline void near_rows(const problem *x, const char *name, uint64_t seed, const double *expected, double limit)
{
    size_t width = (size_t)(x->p.R + x->p.Dr);
    double diff = 0.0, all = 0.0;
    for (int64_t n = 0, row = 0; n <= x->p.N; n++) {
        for (int64_t end = n < x->p.N ? x->kv_start[n] : x->p.latent_rows; row < end; row++)
            for (size_t d = 0; d < width; d++)
                assert_true(isnan(x->dlatent[(size_t)row * width + d]));
        for (int64_t end = n < x->p.N ? row + x->kv_len[n] : row; row < end; row++)
            for (size_t d = 0; d < width; d++) {
                double e = expected[(size_t)row * width + d], delta = x->dlatent[(size_t)row * width + d] - e;
                diff += delta * delta;
                all += e * e;
            }
    }
    near("dlatent", name, seed, sqrt(diff / (all > 0 ? all : 1.0)), limit);
}

static inline void check_forward(const kl_variant *v, problem *x, const answer *a, uint64_t seed, double limit)
{
    size_t T = (size_t)x->tokens, H = (size_t)x->p.H;
    near("o", v->name, seed, kl_rel_err_blocks(x->o, a->o, T, H, (size_t)x->p.Dv, 16), limit);
    near("lse", v->name, seed, kl_rel_err(x->lse, a->lse, T * H), limit);
}

static inline void check_backward(const kl_variant *v, problem *x, const answer *a, uint64_t seed, double limit)
{
    size_t head = (size_t)(x->p.H * (x->p.Dn + x->p.Dr));
    float *dq = allocate((size_t)x->tokens * head * sizeof(float));
    for (size_t t = 0; t < (size_t)x->tokens; t++) {
        memcpy(dq + t * head, x->dq + t * q_stride(x), head * sizeof(float));
        for (size_t i = head; i < q_stride(x); i++)
            assert_true(isnan(x->dq[t * q_stride(x) + i])); /* between tokens nothing is written */
    }
    near("dq", v->name, seed, kl_rel_err(dq, a->dq, (size_t)x->tokens * head), limit);
    near("dkv_b", v->name, seed, kl_rel_err(x->dkv_b, a->dkv_b, weight_size(x)), limit);
    near_rows(x, v->name, seed, a->dlatent, limit);
    free(dq);
}

static inline void check_all(const shape *s, uint64_t seed, double slack)
{
    problem x = make(s, seed);
    bind(&x);
    answer a = reference(&x, true);
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        forward(&v[i], &x, 2);
        check_forward(&v[i], &x, &a, seed, slack * kl_tol_mla_f32.forward);
        if (v[i].backward) {
            backward(&v[i], &x, 2);
            check_backward(&v[i], &x, &a, seed, slack * kl_tol_mla_f32.gradient);
        }
    }
    forward(mla_pick(KL_CPU, NULL, &x.p, KL_FORWARD), &x, 2);
    check_forward(mla_pick(KL_CPU, NULL, &x.p, KL_FORWARD), &x, &a, seed, slack * kl_tol_mla_f32.forward);
    forget(&a);
    drop(&x);
}

#endif
