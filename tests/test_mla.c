/* MLA: recurrent = chunk = reference, gradients, and the contract of the entry points. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cmocka.h>

#include "common/compare.h"
#include "common/rng.h"
#include "mla/mla.h"
#include "reference/mla.h"

/* The variants on the cpu, which come first in the table. */
static const kl_variant *cpu_variants(int *count)
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

static size_t latent_size(const problem *x) { return (size_t)(x->p.latent_rows * (x->p.R + x->p.Dr)); }
static size_t weight_size(const problem *x) { return (size_t)(x->p.H * (x->p.Dn + x->p.Dv) * x->p.R); }
static size_t out_size(const problem *x) { return (size_t)(x->tokens * x->p.H * x->p.Dv); }
static size_t q_stride(const problem *x) { return (size_t)(x->p.q_stride ? x->p.q_stride : x->p.H * (x->p.Dn + x->p.Dr)); }
static size_t q_size(const problem *x) { return (size_t)x->tokens * q_stride(x); }

static void *allocate(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    assert_non_null(p);
    return p;
}

static float *poisoned(size_t n)
{
    float *x = allocate(n * sizeof(float));
    for (size_t i = 0; i < n; i++)
        x[i] = NAN;
    return x;
}

static void *stored(float *x, size_t n, kl_dtype type)
{
    void *copy = allocate(n * kl_dtype_size(type));
    kl_from_f32(copy, type, x, n);
    kl_to_f32(x, copy, type, n);
    return copy;
}

static problem make(const shape *s, uint64_t seed)
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
static void bind(problem *x)
{
    x->p.cu_q = x->cu_q, x->p.kv_start = x->kv_start, x->p.kv_len = x->kv_len;
    x->g = (mla_grads){.d_o = x->d_o, .dq = x->dq, .dlatent = x->dlatent, .dkv_b = x->dkv_b};
}

static void drop(problem *x)
{
    void *all[] = {x->q, x->latent, x->weights, x->latent_stored, x->weights_stored, x->o, x->lse, x->d_o, x->dq, x->dlatent, x->dkv_b};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* ---- the reference on the same rounded numbers ---- */

typedef struct answer {
    double *o, *lse, *dq, *dlatent, *dkv_b; /* dq without the stride */
} answer;

static double *to_double(const float *x, size_t n)
{
    double *y = calloc(n + 1, sizeof *y);
    assert_non_null(y);
    for (size_t i = 0; i < n; i++)
        y[i] = x[i];
    return y;
}

static answer reference(const problem *x, bool backward)
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

static void forget(answer *a)
{
    free(a->o);
    free(a->lse);
    free(a->dq);
    free(a->dlatent);
    free(a->dkv_b);
}

/* ---- running ---- */

static kl_ctx *context(int threads)
{
    kl_ctx *ctx;
    kl_status s = kl_ctx_create(&ctx, &(kl_ctx_options){.threads = threads});
    assert_false(kl_failed(s));
    return ctx;
}

static void poison(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = NAN;
}

/* Runs with exactly the workspace that was asked for, full of NaN, and a guard behind it. */
static kl_status run(const kl_variant *v, problem *x, kl_pass pass, int threads)
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

static void forward(const kl_variant *v, problem *x, int threads)
{
    poison(x->o, out_size(x));
    poison(x->lse, (size_t)(x->tokens * x->p.H));
    kl_status s = run(v, x, KL_FORWARD, threads);
    if (kl_failed(s))
        fail_msg("%s: %s", v->name, s.message);
}

static void backward(const kl_variant *v, problem *x, int threads)
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

static void near(const char *what, const char *name, uint64_t seed, double err, double limit)
{
    if (!kl_within(err, limit))
        fail_msg("%s of %s, seed %llu: error %.3g, at most %.3g", what, name, (unsigned long long)seed, err, limit);
}

/* Rows that belong to a sequence without gaps; rows between sequences must still be NaN in a gradient. */
static void near_rows(const problem *x, const char *name, uint64_t seed, const double *expected, double limit)
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

static void check_forward(const kl_variant *v, problem *x, const answer *a, uint64_t seed, double limit)
{
    size_t T = (size_t)x->tokens, H = (size_t)x->p.H;
    near("o", v->name, seed, kl_rel_err_blocks(x->o, a->o, T, H, (size_t)x->p.Dv, 16), limit);
    near("lse", v->name, seed, kl_rel_err(x->lse, a->lse, T * H), limit);
}

static void check_backward(const kl_variant *v, problem *x, const answer *a, uint64_t seed, double limit)
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

static void check_all(const shape *s, uint64_t seed, double slack)
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

/* ---- tests ---- */

static uint64_t first_seed(void)
{
    const char *given = getenv("KL_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 10) : 20251030;
    print_message("seed %llu (set KL_SEED to change it)\n", (unsigned long long)seed);
    return seed;
}

static shape random_shape(kl_rng *r)
{
    static const kl_dtype types[] = {KL_F32, KL_BF16, KL_F16};
    shape s = {.N = 1 + (int64_t)kl_rng_below(r, 4), .H = 1 + (int64_t)kl_rng_below(r, 5), .R = 1 + (int64_t)kl_rng_below(r, 70),
               .Dn = 1 + (int64_t)kl_rng_below(r, 40), .Dr = (int64_t)kl_rng_below(r, 20), .Dv = 1 + (int64_t)kl_rng_below(r, 40),
               .latent = types[kl_rng_below(r, 2)], .weight = types[kl_rng_below(r, 3)], .size = 1.0f, .stride = (int64_t)kl_rng_below(r, 2) * 5};
    for (int64_t n = 0; n < s.N; n++) {
        s.keys[n] = (int64_t)kl_rng_below(r, 160);
        s.queries[n] = (int64_t)kl_rng_below(r, 4) == 0 ? s.keys[n] : (int64_t)kl_rng_below(r, (uint64_t)(s.keys[n] < 8 ? s.keys[n] + 1 : 8));
    }
    return s;
}

static void random_problems(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    for (uint64_t i = 0; i < 40; i++) {
        kl_rng r = kl_rng_make(seed + i, 1);
        shape s = random_shape(&r);
        check_all(&s, seed + i, 1.0);
    }
}

/* Sizes that the tiles of the AMX path take: one and several groups of rows, whole and broken blocks, several pieces. */
static void tile_sizes(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    static const shape shapes[] = {
        {.N = 2, .H = 32, .R = 64, .Dn = 16, .Dr = 32, .Dv = 16, .queries = {1, 3}, .keys = {700, 131}, .size = 1.0f},
        {.N = 3, .H = 5, .R = 96, .Dn = 16, .Dr = 0, .Dv = 16, .queries = {8, 1, 2}, .keys = {40, 1, 600}, .size = 1.0f},
        {.N = 1, .H = 48, .R = 32, .Dn = 8, .Dr = 64, .Dv = 8, .queries = {2}, .keys = {300}, .size = 1.0f},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int type = 0; type < 2; type++) {
            shape s = shapes[i];
            s.latent = type ? KL_BF16 : KL_F32;
            check_all(&s, seed + i, 1.0);
        }
}

/* Logits near 1e4: exponents stay <= 0, and the softmax is one-hot. The keys are drawn apart so that float sees the same maximum. */
static void huge_logits(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    for (int sizes = 0; sizes < 2; sizes++) {
        shape s = {.N = 1, .H = 3, .R = sizes ? 64 : 17, .Dn = 12, .Dr = sizes ? 32 : 5, .Dv = 9, .queries = {20}, .keys = {300}, .size = 1.0f};
        problem x = make(&s, seed);
        bind(&x);
        int64_t width = s.R + s.Dr, head = s.Dn + s.Dr;
        /* Key j's first shared entry is a step of its own; only that entry of q is large: logits of either sign up to 1e4, 60 apart. */
        for (int64_t j = 0; j < s.keys[0]; j++)
            x.latent[(x.kv_start[0] + j) * width + s.R] = (float)((j * 7919) % 300 - 150) / 150.0f;
        for (int64_t t = 0; t < x.tokens * s.H; t++)
            x.q[t * head + s.Dn] = (t % 2 ? 1e4f : -1e4f) * sqrtf((float)head);
        kl_from_f32(x.latent_stored, KL_F32, x.latent, latent_size(&x));
        answer a = reference(&x, true);
        int count;
        const kl_variant *v = cpu_variants(&count);
        for (int i = 0; i < count; i++) {
            forward(&v[i], &x, 2);
            check_forward(&v[i], &x, &a, seed, kl_tol_mla_f32.forward);
            if (v[i].backward) { /* ds is the difference of equal numbers: all that can be asked is that it stays finite and dW right */
                backward(&v[i], &x, 2);
                near("dkv_b", v[i].name, seed, kl_rel_err(x.dkv_b, a.dkv_b, weight_size(&x)), kl_tol_mla_f32.gradient);
            }
        }
        forget(&a);
        drop(&x);
    }
}

/* A prompt in one piece, and the same in pieces of 1, 7, 64 ... tokens against the growing cache. */
static void split_anywhere(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    shape s = {.N = 1, .H = 4, .R = 64, .Dn = 24, .Dr = 32, .Dv = 20, .queries = {200}, .keys = {230}, .latent = KL_BF16, .size = 1.0f};
    problem x = make(&s, seed);
    bind(&x);
    answer a = reference(&x, false);
    static const int64_t cuts[] = {1, 8, 15, 79, 80, 143, 200};
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        poison(x.o, out_size(&x));
        poison(x.lse, (size_t)(x.tokens * s.H));
        for (size_t c = 0, from = 0; c < sizeof cuts / sizeof *cuts; from = (size_t)cuts[c++]) {
            problem part = x;
            bind(&part);
            part.cu_q[0] = (int64_t)from; /* rows of q, o and lse are found by cu_q */
            part.cu_q[1] = cuts[c];
            part.kv_len[0] = s.keys[0] - s.queries[0] + cuts[c];
            assert_false(kl_failed(run(&v[i], &part, KL_FORWARD, 2)));
        }
        check_forward(&v[i], &x, &a, seed, kl_tol_mla_f32.forward);
    }
    forget(&a);
    drop(&x);
}

static void same_bits(const char *what, const float *x, const float *y, size_t n)
{
    if (memcmp(x, y, n * sizeof(float)) != 0)
        fail_msg("%s: the bits differ", what);
}

/* 1, 2 and 3 threads: the same bits. */
static void same_for_any_threads(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    static const shape shapes[] = {
        {.N = 3, .H = 3, .R = 40, .Dn = 24, .Dr = 9, .Dv = 20, .queries = {300, 1, 5}, .keys = {300, 700, 90}, .weight = KL_BF16, .size = 1.0f},
        {.N = 2, .H = 20, .R = 64, .Dn = 24, .Dr = 32, .Dv = 20, .queries = {5, 1}, .keys = {300, 700}, .latent = KL_BF16, .size = 1.0f},
    };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        problem x = make(&shapes[k], seed), y = make(&shapes[k], seed);
        bind(&x);
        bind(&y);
        int count;
        const kl_variant *v = cpu_variants(&count);
        for (int i = 0; i < count; i++) {
            forward(&v[i], &x, 1);
            for (int threads = 2; threads <= 3; threads++) {
                forward(&v[i], &y, threads);
                same_bits("o", x.o, y.o, out_size(&x));
                same_bits("lse", x.lse, y.lse, (size_t)(x.tokens * x.p.H));
            }
            if (!v[i].backward)
                continue;
            backward(&v[i], &x, 1);
            for (int threads = 2; threads <= 3; threads++) {
                backward(&v[i], &y, threads);
                same_bits("dq", x.dq, y.dq, q_size(&x));
                same_bits("dlatent", x.dlatent, y.dlatent, latent_size(&x));
                same_bits("dkv_b", x.dkv_b, y.dkv_b, weight_size(&x));
            }
        }
        drop(&x);
        drop(&y);
    }
}

/* A sequence alone and among others of other lengths gets the same bits, under dispatch too. */
static void neighbours_do_not_matter(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    shape s = {.N = 5, .H = 4, .R = 32, .Dn = 12, .Dr = 32, .Dv = 16, .queries = {130, 1, 0, 3, 90}, .keys = {130, 600, 4, 333, 90}, .size = 1.0f};
    problem x = make(&s, seed);
    bind(&x);
    float *alone = poisoned(out_size(&x)), *lse = poisoned((size_t)(x.tokens * s.H)), *dq = poisoned(q_size(&x)), *dlatent = poisoned(latent_size(&x));
    int count;
    const kl_variant *table = cpu_variants(&count);
    for (int i = 0; i <= count; i++) {
        const kl_variant *v = i < count ? &table[i] : mla_pick(KL_CPU, NULL, &x.p, KL_FORWARD);
        if (i == count)
            assert_string_equal(v->name, "mixed"); /* this batch has sequences for either */
        forward(v, &x, 2);
        for (int64_t n = 0; n < s.N; n++) {
            problem one = x;
            bind(&one);
            one.p.N = 1;
            one.p.cu_q += n, one.p.kv_start += n, one.p.kv_len += n;
            one.p.o = alone, one.p.lse = lse;
            const kl_variant *w = i < count ? v : mla_pick(KL_CPU, NULL, &one.p, KL_FORWARD);
            assert_false(kl_failed(run(w, &one, KL_FORWARD, 2)));
        }
        same_bits("o", alone, x.o, out_size(&x));
        same_bits("lse", lse, x.lse, (size_t)(x.tokens * s.H));
        if (i < count && v->backward) {
            backward(v, &x, 2);
            for (int64_t n = 0; n < s.N; n++) {
                problem one = x;
                bind(&one);
                one.p.N = 1;
                one.p.cu_q += n, one.p.kv_start += n, one.p.kv_len += n;
                one.g.dq = dq, one.g.dlatent = dlatent, one.g.dkv_b = NULL;
                assert_false(kl_failed(run(v, &one, KL_BACKWARD, 2)));
            }
            same_bits("dq", dq, x.dq, q_size(&x));
            same_bits("dlatent", dlatent, x.dlatent, latent_size(&x));
        }
    }
    free(alone);
    free(lse);
    free(dq);
    free(dlatent);
    drop(&x);
}

/* Any subset of the gradients is what it is among all of them; dkv_b is added to. */
static void subsets_of_gradients(void **state)
{
    (void)state;
    shape s = {.N = 2, .H = 3, .R = 20, .Dn = 8, .Dr = 4, .Dv = 12, .queries = {40, 5}, .keys = {60, 30}, .weight = KL_F16, .size = 1.0f};
    problem x = make(&s, 5), y = make(&s, 5);
    bind(&x);
    bind(&y);
    const kl_variant *v = mla_pick(KL_CPU, NULL, &x.p, KL_BACKWARD);
    backward(v, &x, 2);
    y.p.o = NULL, y.p.lse = NULL; /* not read, not needed */
    for (int wanted = 0; wanted < 8; wanted++) {
        poison(y.dq, q_size(&y));
        poison(y.dlatent, latent_size(&y));
        for (size_t i = 0; i < weight_size(&y); i++)
            y.dkv_b[i] = 0.0f;
        y.g = (mla_grads){.d_o = y.d_o, .dq = wanted & 1 ? y.dq : NULL, .dlatent = wanted & 2 ? y.dlatent : NULL, .dkv_b = wanted & 4 ? y.dkv_b : NULL};
        assert_false(kl_failed(run(v, &y, KL_BACKWARD, 2)));
        if (wanted & 1)
            same_bits("dq", x.dq, y.dq, q_size(&x));
        if (wanted & 2)
            same_bits("dlatent", x.dlatent, y.dlatent, latent_size(&x));
        if (wanted & 4)
            same_bits("dkv_b", x.dkv_b, y.dkv_b, weight_size(&x));
    }
    y.g = (mla_grads){.d_o = y.d_o, .dkv_b = y.dkv_b};
    assert_false(kl_failed(run(v, &y, KL_BACKWARD, 2)));
    for (size_t i = 0; i < weight_size(&y); i++)
        assert_true(fabsf(y.dkv_b[i] - 2.0f * x.dkv_b[i]) <= 1e-5f * (1.0f + fabsf(x.dkv_b[i])));
    drop(&x);
    drop(&y);
}

/* Given what the forward pass wrote, the gradients are those that are found without. */
static void given_what_the_forward_pass_wrote(void **state)
{
    (void)state;
    shape s = {.N = 2, .H = 3, .R = 20, .Dn = 8, .Dr = 4, .Dv = 13, .queries = {40, 5}, .keys = {60, 30}, .size = 1.0f};
    problem x = make(&s, 5);
    bind(&x);
    const kl_variant *v = mla_pick(KL_CPU, NULL, &x.p, KL_BACKWARD);
    answer a = reference(&x, true);
    forward(mla_pick(KL_CPU, NULL, &x.p, KL_FORWARD), &x, 2);
    x.g.o = x.o, x.g.lse = x.lse;
    backward(v, &x, 2);
    check_backward(v, &x, &a, 5, kl_tol_mla_f32.gradient);
    forget(&a);
    drop(&x);
}

/* More expanded rows than the budget holds: heads in several groups, one head in several stretches of keys. The reference
 * takes the last five queries alone: they see what they see among all. */
static void long_sequences(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    shape groups = {.N = 1, .H = 2, .R = 8, .Dn = 300, .Dr = 8, .Dv = 2000, .queries = {6}, .keys = {4000}, .size = 1.0f};
    shape stretches = {.N = 1, .H = 1, .R = 8, .Dn = 10, .Dr = 0, .Dv = 3000, .queries = {130}, .keys = {6000}, .size = 1.0f};
    const shape *shapes[] = {&groups, &stretches};
    const kl_variant *v = mla_pick(KL_CPU, "chunk", NULL, KL_FORWARD);
    kl_ctx *ctx = context(2);
    for (int i = 0; i < 2; i++) {
        problem x = make(shapes[i], seed), last = x;
        bind(&x);
        bind(&last);
        assert_true(v->workspace(ctx, &x.p, KL_FORWARD) < (size_t)80 << 20);
        last.cu_q[0] = x.tokens - 5;
        answer a = reference(&last, false);
        forward(v, &x, 2);
        size_t skip = (size_t)((x.tokens - 5) * x.p.H), Dv = (size_t)x.p.Dv;
        for (size_t t = 0; t < out_size(&x); t++)
            assert_true(isfinite(x.o[t]));
        near("o", v->name, seed, kl_rel_err_blocks(x.o + skip * Dv, a.o + skip * Dv, 5, (size_t)x.p.H, Dv, 1), kl_tol_mla_f32.forward);
        near("lse", v->name, seed, kl_rel_err(x.lse + skip, a.lse + skip, 5 * (size_t)x.p.H), kl_tol_mla_f32.forward);
        forget(&a);
        drop(&x);
    }
    kl_ctx_destroy(ctx);
}

/* Latent rows beyond 2^31 elements: a cache of 10 GB of which only the last pages exist. */
static void beyond_two_to_the_31(void **state)
{
    (void)state;
    shape s = {.N = 1, .H = 2, .R = 64, .Dn = 8, .Dr = 32, .Dv = 8, .queries = {3}, .keys = {200}, .size = 1.0f};
    problem x = make(&s, 9);
    bind(&x);
    int count;
    const kl_variant *v = cpu_variants(&count);
    size_t width = (size_t)(s.R + s.Dr), rows = ((size_t)1 << 31) / width + 5000, bytes = rows * width * sizeof(float);
    float *cache = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cache == MAP_FAILED) {
        drop(&x);
        skip();
    }
    float *o = poisoned(out_size(&x));
    for (int i = 0; i < count; i++) {
        forward(&v[i], &x, 2);
        memcpy(o, x.o, out_size(&x) * sizeof(float));
        problem far = x;
        bind(&far);
        far.kv_start[0] = (int64_t)rows - s.keys[0];
        memcpy(cache + (size_t)far.kv_start[0] * width, x.latent + (size_t)x.kv_start[0] * width, (size_t)s.keys[0] * width * sizeof(float));
        far.p.latent = cache;
        far.p.latent_rows = (int64_t)rows;
        forward(&v[i], &far, 2);
        same_bits("o", o, far.o, out_size(&x));
    }
    free(o);
    munmap(cache, bytes);
    drop(&x);
}

/* ---- refusals ---- */

static void refuse(const kl_variant *v, const problem *x, kl_pass pass, const char *name)
{
    problem y = *x;
    kl_ctx *ctx = context(1);
    static _Alignas(64) char workspace[64];
    kl_status s = pass == KL_FORWARD ? v->forward(ctx, &y.p, workspace, 0) : v->backward(ctx, &y.p, &y.g, workspace, 0);
    kl_ctx_destroy(ctx);
    if (!kl_failed(s) || strncmp(s.message, name, strlen(name)) != 0)
        fail_msg("%s: expected a refusal that begins with '%s', got '%s'", v->name, name, s.message);
}

static void bad_arguments(void **state)
{
    (void)state;
    shape s = {.N = 2, .H = 3, .R = 20, .Dn = 8, .Dr = 4, .Dv = 12, .queries = {4, 5}, .keys = {6, 30}, .size = 1.0f};
    problem x = make(&s, 5);
    bind(&x);
    int count;
    const kl_variant *table = cpu_variants(&count);
#define BAD(name, change)                                             \
    do {                                                              \
        problem y = x;                                                \
        bind(&y);                                                     \
        change;                                                       \
        for (int i = 0; i < count; i++)                               \
            refuse(&table[i], &y, KL_FORWARD, name);                  \
        refuse(mla_pick(KL_CPU, NULL, &y.p, KL_FORWARD), &y, KL_FORWARD, name); \
    } while (0)
#define BIND_BAD(name, change) BAD(name, change; y.p.cu_q = y.cu_q; y.p.kv_start = y.kv_start; y.p.kv_len = y.kv_len)
    BAD("dtype", y.p.dtype = KL_BF16);
    BAD("latent_dtype", y.p.latent_dtype = KL_F16);
    BAD("weight_dtype", y.p.weight_dtype = KL_I32);
    BAD("N:", y.p.N = -1);
    BAD("H:", y.p.H = 0);
    BAD("R:", y.p.R = 0);
    BAD("R:", y.p.R = (int64_t)1 << 40);
    BAD("Dn:", y.p.Dn = 0);
    BAD("Dr:", y.p.Dr = -1);
    BAD("Dv:", y.p.Dv = 0);
    BAD("H Dv:", y.p.H = 1 << 20; y.p.Dv = 1 << 20);
    BAD("q_stride:", y.p.q_stride = s.H * (s.Dn + s.Dr) - 1);
    BAD("latent_rows:", y.p.latent_rows = -1);
    BAD("latent_rows:", y.p.latent_rows = INT64_MAX);
    BAD("cu_q:", y.p.cu_q = NULL);
    BAD("kv_start:", y.p.kv_start = NULL);
    BAD("kv_len:", y.p.kv_len = NULL);
    BIND_BAD("cu_q[0]", y.cu_q[0] = -1);
    BIND_BAD("cu_q[2]", y.cu_q[2] = 1);
    BIND_BAD("kv_len[1]", y.kv_len[1] = 4);
    BIND_BAD("kv_len[1]", y.kv_len[1] = 1000);
    BIND_BAD("kv_start[0]", y.kv_start[0] = -1);
    BIND_BAD("kv_start[0]", y.kv_start[0] = 1000);
    BAD("q:", y.p.q = NULL);
    BAD("latent:", y.p.latent = NULL);
    BAD("kv_b:", y.p.kv_b = NULL);
    BAD("scale:", y.p.scale = NAN);
    BAD("o:", y.p.o = NULL);
    BAD("workspace:", (void)0); /* refuse() offers none */
#undef BAD
    const kl_variant *v = mla_pick(KL_CPU, "chunk", NULL, KL_BACKWARD);
    problem y = x;
    bind(&y);
    refuse(v, &y, KL_BACKWARD, "workspace:");
    y.g.d_o = NULL;
    refuse(v, &y, KL_BACKWARD, "d_o:");
    y = x;
    bind(&y);
    y.g.o = y.o;
    refuse(v, &y, KL_BACKWARD, "lse:");
    y.g.o = NULL, y.g.lse = y.lse;
    refuse(v, &y, KL_BACKWARD, "o:");
    y = x;
    bind(&y);
    y.kv_start[1] = y.kv_start[0] + 3;
    refuse(v, &y, KL_BACKWARD, "kv_start[1]:");
    y.p.latent = NULL;
    refuse(v, &y, KL_BACKWARD, "latent:");
    kl_ctx *ctx = context(1);
    assert_true(kl_failed(v->backward(ctx, &x.p, NULL, NULL, 0)));
    assert_true(kl_failed(v->forward(NULL, &x.p, NULL, 0)));
    assert_true(kl_failed(v->forward(ctx, NULL, NULL, 0)));
    assert_true(kl_failed(table[0].check(&x.p, KL_BACKWARD))); /* recurrent has no backward */
    assert_null(mla_pick(KL_CPU, "recurrent", &x.p, KL_BACKWARD));
    assert_null(mla_pick(KL_CPU, "no such", &x.p, KL_FORWARD));
    /* an address off by 32 */
    size_t bytes = v->workspace(ctx, &x.p, KL_FORWARD);
    char *workspace = allocate(bytes + 64);
    kl_status status = v->forward(ctx, &x.p, workspace + 32, bytes);
    assert_true(kl_failed(status) && strncmp(status.message, "workspace:", 10) == 0);
    free(workspace);
    kl_ctx_destroy(ctx);
    drop(&x);
}

static void nothing_to_do(void **state)
{
    (void)state;
    kl_ctx *ctx = context(2);
    mla_problem none = {.H = 1, .R = 1, .Dn = 1, .Dv = 1};
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        size_t bytes = v[i].workspace(ctx, &none, KL_FORWARD);
        void *workspace = allocate(bytes);
        assert_false(kl_failed(v[i].forward(ctx, &none, workspace, bytes)));
        free(workspace);
    }
    kl_ctx_destroy(ctx);
}

/* Few queries on many keys go the recurrent way, a prompt the chunk way. */
static void dispatch(void **state)
{
    (void)state;
    shape decode = {.N = 2, .H = 4, .R = 512, .Dn = 128, .Dr = 64, .Dv = 128, .queries = {1, 4}, .keys = {300, 500}, .size = 1.0f};
    shape prompt = decode;
    prompt.queries[0] = prompt.keys[0], prompt.queries[1] = prompt.keys[1];
    problem x = make(&decode, 1), y = make(&prompt, 1);
    bind(&x);
    bind(&y);
    assert_string_equal(mla_pick(KL_CPU, NULL, &x.p, KL_FORWARD)->name, "recurrent");
    assert_string_equal(mla_pick(KL_CPU, NULL, &y.p, KL_FORWARD)->name, "chunk");
    assert_string_equal(mla_pick(KL_CPU, NULL, &x.p, KL_BACKWARD)->name, "chunk");
    drop(&x);
    drop(&y);
}

/* ---- rotary embedding ---- */

static void rotary(void **state)
{
    (void)state;
    enum { T = 9, H = 3, D = 14, Dr = 6, OFFSET = 100000 };
    kl_ctx *ctx = context(2);
    kl_rng r = kl_rng_make(3, 3);
    float x[T * H * D], before[T * H * D];
    double y[T * H * D];
    int64_t position[T];
    kl_fill_normal(&r, x, T * H * D, 0.0f, 1.0f);
    memcpy(before, x, sizeof x);
    for (int i = 0; i < T * H * D; i++)
        y[i] = x[i];
    for (int t = 0; t < T; t++)
        position[t] = OFFSET + t;
    ref_rope_forward(T, H, D, Dr, 10000.0, OFFSET, y);
    assert_false(kl_failed(mla_rope(ctx, x + D - Dr, T, H, Dr, H * D, D, position, 10000.0f, false)));
    assert_true(kl_within(kl_rel_err(x, y, T * H * D), 1e-6));
    assert_false(kl_failed(mla_rope(ctx, x + D - Dr, T, H, Dr, H * D, D, position, 10000.0f, true)));
    assert_true(kl_within(kl_rel_err_f32(x, before, T * H * D), 1e-6));
    assert_true(kl_failed(mla_rope(ctx, x, T, H, 5, H * D, D, position, 10000.0f, false)));
    assert_true(kl_failed(mla_rope(ctx, x, T, H, Dr, H * D, D, position, 0.0f, false)));
    assert_true(kl_failed(mla_rope(ctx, x, T, H, Dr, H * D, D, NULL, 1.0f, false)));
    assert_true(kl_failed(mla_rope(ctx, x, T, H, Dr, H * D, 2, position, 1.0f, false)));
    assert_false(kl_failed(mla_rope(ctx, NULL, 0, H, Dr, H * D, D, NULL, 1.0f, false)));
    kl_ctx_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_problems),
        cmocka_unit_test(tile_sizes),
        cmocka_unit_test(huge_logits),
        cmocka_unit_test(split_anywhere),
        cmocka_unit_test(same_for_any_threads),
        cmocka_unit_test(neighbours_do_not_matter),
        cmocka_unit_test(subsets_of_gradients),
        cmocka_unit_test(given_what_the_forward_pass_wrote),
        cmocka_unit_test(long_sequences),
        cmocka_unit_test(beyond_two_to_the_31),
        cmocka_unit_test(bad_arguments),
        cmocka_unit_test(nothing_to_do),
        cmocka_unit_test(dispatch),
        cmocka_unit_test(rotary),
    };
    return cmocka_run_group_tests_name("mla", tests, NULL, NULL);
}
