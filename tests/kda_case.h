/* A random KDA problem with its reference in double: what the KDA tests build, run and compare. Outputs, the gaps between
 * strided tokens, unused state slots and the workspace are NaN before a run, so that what is not written, or is read
 * beyond its end, shows. */
#ifndef TESTS_KDA_CASE_H
#define TESTS_KDA_CASE_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/compare.h"
#include "common/rng.h"
#include "kda/kda.h"
#include "reference/kda.h"
#include "tests/mirror.h"

typedef enum { DECAY_SLOW, DECAY_MIXED, DECAY_STRONG, DECAY_ZERO, DECAY_FIVE, DECAY_SIXTY_OR_ZERO, DECAY_THOUSAND } case_decay;

typedef struct case_options {
    int64_t B, T, H, HV, K, V, G, chunk;
    const int64_t *lengths; /* packed: B sequences of these lengths, T is ignored */
    kda_gate gate;
    kda_beta beta_kind;
    kda_state_layout layout;
    case_decay decay;
    bool l2norm, no_delta, correlated, no_h0, no_ht, no_bias, no_d_o, no_dht, chunk_states, token_states, in_place, pool;
    int64_t gap;            /* floats between a token's end and the next token */
    uint64_t seed;
} case_options;

typedef struct kda_case {
    case_options opt;
    kda_problem p;
    kda_grads g;
    int64_t tokens, N, chunks;
    int64_t *cu_seqlens, *state_index;
    /* reference results, dense, state [K,V] */
    double *o, *ht, *after, *dq, *dk, *dv, *dg, *dbeta, *dA_log, *ddt_bias, *dh0;
    struct {
        void *at;
        size_t bytes;
    } owned[64];
    int owned_count;
} kda_case;

static inline void *case_alloc(kda_case *c, int64_t count, size_t size, int byte)
{
    size_t bytes = ((size_t)(count > 0 ? count : 1) * size + 63) / 64 * 64;
    void *x = aligned_alloc(64, bytes);
    if (!x || c->owned_count == 64)
        abort();
    memset(x, byte, bytes);
    c->owned[c->owned_count].at = x;
    c->owned[c->owned_count++].bytes = bytes;
    return x;
}
static inline float *case_floats(kda_case *c, int64_t n) { return case_alloc(c, n, sizeof(float), 0xff); }
static inline double *case_doubles(kda_case *c, int64_t n) { return case_alloc(c, n, sizeof(double), 0); }

/* Frees what was allocated after the first `kept`. */
static inline void case_release(kda_case *c, int kept)
{
    while (c->owned_count > kept)
        free(c->owned[--c->owned_count].at);
}

static inline void case_free(kda_case *c)
{
    case_release(c, 0);
    free(c);
}

/* [tokens, width] normal numbers, tokens `width + gap` apart. */
static inline float *case_tensor(kda_case *c, kl_rng *r, int64_t width, float mean, float deviation)
{
    int64_t stride = width + c->opt.gap;
    float *x = case_floats(c, c->tokens * stride);
    for (int64_t t = 0; t < c->tokens; t++)
        kl_fill_normal(r, x + t * stride, (size_t)width, mean, deviation);
    return x;
}

static inline float case_log_decay(case_decay kind, kl_rng *r, int64_t channel)
{
    float strong = (float)(-5.0 / (1.0 + exp(-kl_rng_normal(r)))), slow = (float)(-0.01 * kl_rng_uniform(r));
    switch (kind) {
    case DECAY_SLOW: return slow;
    case DECAY_MIXED: return channel % 3 == 0 ? slow : strong;
    case DECAY_STRONG: return strong;
    case DECAY_ZERO: return 0.0f;
    case DECAY_FIVE: return -5.0f;
    case DECAY_SIXTY_OR_ZERO: return kl_rng_u32(r) & 1 ? -60.0f : 0.0f;
    case DECAY_THOUSAND: return kl_rng_u32(r) % 4 == 0 ? -1000.0f : -0.5f;
    }
    return 0.0f;
}

static inline float *case_unit_rows(kda_case *c, kl_rng *r, int64_t H, int64_t K, bool correlated)
{
    float common[KDA_MAX_DIM], *x = case_tensor(c, r, H * K, 0.0f, 1.0f);
    kl_fill_normal(r, common, (size_t)K, 0.0f, 1.0f);
    for (int64_t t = 0; t < c->tokens; t++)
        for (int64_t h = 0; h < H; h++) {
            float *row = x + t * (H * K + c->opt.gap) + h * K, norm = 0.0f;
            for (int64_t i = 0; i < K; i++) {
                row[i] = correlated ? 2.0f * common[i] + row[i] : row[i]; /* cosine 4/5 between rows */
                norm += row[i] * row[i];
            }
            for (int64_t i = 0; i < K && !c->opt.l2norm; i++)
                row[i] /= sqrtf(norm);
        }
    return x;
}

static inline kda_case *case_new(case_options opt)
{
    kda_case *c = calloc(1, sizeof *c);
    if (!c)
        abort();
    opt.HV = opt.HV ? opt.HV : opt.H;
    c->opt = opt;
    int64_t H = opt.H, HV = opt.HV, K = opt.K, V = opt.V, G = opt.G, size = K * V;
    c->N = opt.B;
    c->tokens = opt.B * opt.T;
    if (opt.lengths) {
        c->cu_seqlens = case_alloc(c, c->N + 1, sizeof(int64_t), 0);
        for (int64_t n = 0; n < c->N; n++)
            c->cu_seqlens[n + 1] = c->cu_seqlens[n] + opt.lengths[n];
        c->tokens = c->cu_seqlens[c->N];
    }
    kl_rng rng = kl_rng_make(opt.seed, 7), *r = &rng;
    float *g = NULL, *A_log = NULL, *dt_bias = NULL;
    float *q = case_unit_rows(c, r, H, K, false), *k = case_unit_rows(c, r, H, K, opt.correlated);
    if (G) {
        g = case_tensor(c, r, HV * G, 0.0f, 1.0f);
        for (int64_t t = 0; t < c->tokens && opt.gate == KDA_GATE_LOG; t++)
            for (int64_t i = 0; i < HV * G; i++)
                g[t * (HV * G + opt.gap) + i] = case_log_decay(opt.decay, r, i);
    }
    if (opt.gate != KDA_GATE_LOG) {
        A_log = case_floats(c, HV);
        kl_fill_normal(r, A_log, (size_t)HV, 0.0f, 0.7f);
        dt_bias = opt.no_bias ? NULL : case_floats(c, HV * G);
        if (dt_bias)
            kl_fill_normal(r, dt_bias, (size_t)(HV * G), -1.0f, 1.0f);
    }
    float *beta = case_tensor(c, r, HV, opt.correlated ? 3.0f : 0.0f, opt.correlated ? 0.2f : 1.0f);
    for (int64_t t = 0; t < c->tokens && opt.beta_kind == KDA_BETA_PLAIN; t++)
        for (int64_t i = 0; i < HV; i++) {
            float *b = beta + t * (HV + opt.gap) + i;
            *b = 1.0f / (1.0f + expf(-*b));
        }
    int64_t pool = opt.pool ? 2 * c->N + 1 : c->N;
    float *h0 = NULL, *ht = opt.no_ht ? NULL : case_floats(c, pool * HV * size);
    if (opt.pool) {
        c->state_index = case_alloc(c, c->N, sizeof(int64_t), 0);
        for (int64_t n = 0; n < c->N; n++)
            c->state_index[n] = 2 * (c->N - n) - 1;
    }
    if (!opt.no_h0) {
        h0 = opt.in_place ? ht : case_floats(c, pool * HV * size);
        for (int64_t n = 0; n < c->N; n++)
            kl_fill_normal(r, h0 + (opt.pool ? c->state_index[n] : n) * HV * size, (size_t)(HV * size), 0.0f, 0.3f);
    }
    c->p = (kda_problem){
        .B = opt.lengths ? 1 : opt.B, .T = opt.lengths ? c->tokens : opt.T, .N = c->N, .H = H, .HV = HV, .K = K, .V = V, .G = G,
        .cu_seqlens = c->cu_seqlens, .state_layout = opt.layout, .gate = opt.gate,
        .lower_bound = opt.gate == KDA_GATE_BOUNDED ? -5.0f : 0.0f, .beta_kind = opt.beta_kind, .qk_l2norm = opt.l2norm,
        .no_delta = opt.no_delta, .chunk = opt.chunk, .q = q, .k = k, .g = g, .beta = beta, .A_log = A_log, .dt_bias = dt_bias,
        .h0 = h0, .ht = ht, .state_index = c->state_index, .state_pool = opt.pool ? pool : 0,
        .v = case_tensor(c, r, HV * V, 0.0f, 1.0f), .o = case_floats(c, c->tokens * (HV * V + opt.gap))};
    if (opt.gap) {
        c->p.q_stride = c->p.k_stride = H * K + opt.gap;
        c->p.v_stride = c->p.o_stride = HV * V + opt.gap;
        c->p.g_stride = HV * G + opt.gap;
        c->p.beta_stride = HV + opt.gap;
    }
    c->chunks = kda_chunk_count(&c->p);
    if (opt.chunk_states)
        c->p.chunk_states = case_floats(c, c->chunks * HV * size);
    if (opt.token_states)
        c->p.token_states = case_floats(c, c->tokens * HV * size);
    /* gradients */
    if (!opt.no_d_o)
        c->g.d_o = case_tensor(c, r, HV * V, 0.0f, 1.0f);
    if (!opt.no_dht) {
        float *dht = case_floats(c, c->N * HV * size);
        kl_fill_normal(r, dht, (size_t)(c->N * HV * size), 0.0f, 0.5f);
        c->g.dht = dht;
    }
    c->g.dq = case_floats(c, c->tokens * (H * K + opt.gap));
    c->g.dk = case_floats(c, c->tokens * (H * K + opt.gap));
    c->g.dv = case_floats(c, c->tokens * (HV * V + opt.gap));
    c->g.dg = G ? case_floats(c, c->tokens * (HV * G + opt.gap)) : NULL;
    c->g.dbeta = case_floats(c, c->tokens * (HV + opt.gap));
    c->g.dh0 = case_floats(c, c->N * HV * size);
    if (A_log) {
        c->g.dA_log = case_floats(c, HV);
        memset(c->g.dA_log, 0, (size_t)HV * sizeof(float));
    }
    if (dt_bias) {
        c->g.ddt_bias = case_floats(c, HV * G);
        memset(c->g.ddt_bias, 0, (size_t)(HV * G) * sizeof(float));
    }
    return c;
}

/* ---- the reference, sequence by sequence ---- */

/* Tokens [begin, begin + count) of a strided float tensor as dense doubles. */
static inline double *case_dense(kda_case *c, const void *x, int64_t begin, int64_t count, int64_t width)
{
    if (!x)
        return NULL;
    double *y = case_doubles(c, count * width);
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < width; i++)
            y[t * width + i] = ((const float *)x)[(begin + t) * (width + c->opt.gap) + i];
    return y;
}

/* One sequence's states [HV,K,V] in double, from the caller's layout. */
static inline double *case_state(kda_case *c, const float *x)
{
    if (!x)
        return NULL;
    int64_t HV = c->p.HV, K = c->p.K, V = c->p.V;
    double *y = case_doubles(c, HV * K * V);
    for (int64_t i = 0; i < HV; i++)
        for (int64_t a = 0; a < K; a++)
            for (int64_t b = 0; b < V; b++)
                y[(i * K + a) * V + b] = x[i * K * V + (c->p.state_layout == KDA_STATE_KV ? a * V + b : b * K + a)];
    return y;
}

static inline void case_reference(kda_case *c, bool backward)
{
    const kda_problem *p = &c->p;
    int64_t H = p->H, HV = p->HV, K = p->K, V = p->V, G = p->G, size = HV * K * V;
    c->o = case_doubles(c, c->tokens * HV * V);
    c->ht = case_doubles(c, c->N * size);
    if (p->token_states || p->chunk_states)
        c->after = case_doubles(c, c->tokens * size);
    if (backward) {
        c->dq = case_doubles(c, c->tokens * H * K);
        c->dk = case_doubles(c, c->tokens * H * K);
        c->dv = case_doubles(c, c->tokens * HV * V);
        c->dg = case_doubles(c, c->tokens * HV * G);
        c->dbeta = case_doubles(c, c->tokens * HV);
        c->dA_log = case_doubles(c, HV);
        c->ddt_bias = case_doubles(c, HV * G);
        c->dh0 = case_doubles(c, c->N * size);
    }
    for (int64_t n = 0; n < c->N; n++) {
        int kept = c->owned_count;
        int64_t t0 = c->cu_seqlens ? c->cu_seqlens[n] : n * p->T, T = c->cu_seqlens ? c->cu_seqlens[n + 1] - t0 : p->T;
        int64_t slot = c->state_index ? c->state_index[n] : n;
        double *A_log = NULL, *dt_bias = NULL;
        if (p->A_log) {
            A_log = case_doubles(c, HV);
            for (int64_t i = 0; i < HV; i++)
                A_log[i] = p->A_log[i];
        }
        if (p->dt_bias) {
            dt_bias = case_doubles(c, HV * G);
            for (int64_t i = 0; i < HV * G; i++)
                dt_bias[i] = p->dt_bias[i];
        }
        ref_kda ref = {.T = T, .H = H, .HV = HV, .K = K, .V = V, .G = G, .scale = p->scale, .gate = (ref_gate_kind)p->gate,
                       .lower_bound = p->lower_bound, .beta_kind = (ref_beta_kind)p->beta_kind, .qk_l2norm = p->qk_l2norm,
                       .no_delta = p->no_delta, .q = case_dense(c, p->q, t0, T, H * K), .k = case_dense(c, p->k, t0, T, H * K),
                       .v = case_dense(c, p->v, t0, T, HV * V), .g = case_dense(c, p->g, t0, T, HV * G),
                       .beta = case_dense(c, p->beta, t0, T, HV), .A_log = A_log, .dt_bias = dt_bias,
                       .h0 = p->h0 ? case_state(c, (const float *)p->h0 + slot * size) : NULL};
        if (ref_kda_forward(&ref, c->o + t0 * HV * V, c->ht + n * size, c->after ? c->after + t0 * size : NULL))
            abort();
        if (backward) {
            ref_kda_grad d = {.d_o = case_dense(c, c->g.d_o, t0, T, HV * V),
                              .dht = c->g.dht ? case_state(c, c->g.dht + n * size) : NULL,
                              .dq = c->dq + t0 * H * K, .dk = c->dk + t0 * H * K, .dv = c->dv + t0 * HV * V,
                              .dg = G ? c->dg + t0 * HV * G : NULL, .dbeta = c->dbeta + t0 * HV, .dA_log = c->dA_log,
                              .ddt_bias = c->ddt_bias, .dh0 = c->dh0 + n * size};
            if (ref_kda_backward(&ref, &d))
                abort();
        }
        case_release(c, kept);
    }
}

/* ---- running and comparing ---- */

enum { CASE_GUARD = 64 };

/* Everything that the case owns; on the CPU nothing. */
static inline void case_lend(mirror *m, const kda_case *c)
{
    for (int i = 0; i < c->owned_count; i++)
        lend(m, c->owned[i].at, c->owned[i].bytes);
}

/* The problem as a call on the mirror's device finds it. */
static inline kda_problem case_mirrored(const mirror *m, const kda_problem *given)
{
    kda_problem p = *given;
    const void **in[] = {&p.q, &p.k, &p.v, &p.g, &p.beta, (const void **)&p.A_log, (const void **)&p.dt_bias, &p.h0, (const void **)&p.state_index};
    void **out[] = {&p.o, &p.ht, (void **)&p.chunk_states, (void **)&p.token_states};
    for (size_t i = 0; i < sizeof in / sizeof *in; i++)
        *in[i] = mirrored(m, *in[i]);
    for (size_t i = 0; i < sizeof out / sizeof *out; i++)
        *out[i] = mirrored(m, *out[i]);
    return p;
}

/* Runs with the workspace that was asked for, NaN, and a guard behind it. Backward on the CPU alone. */
static inline kl_status case_run_on(kl_device device, kda_case *c, const char *variant, kl_pass pass, int threads)
{
    kl_ctx *ctx;
    kl_status s = kl_ctx_create(&ctx, &(kl_ctx_options){.device = device, .threads = threads});
    if (kl_failed(s))
        return s;
    const kl_variant *v = kda_pick(device, variant, &c->p, pass);
    size_t bytes = v->workspace(ctx, &c->p, pass);
    unsigned char *workspace = case_alloc(c, (int64_t)bytes + CASE_GUARD, 1, 0xff);
    mirror m = {.ctx = ctx};
    case_lend(&m, c);
    kda_problem p = case_mirrored(&m, &c->p);
    void *there = mirrored(&m, workspace);
    s = pass == KL_FORWARD ? v->forward(ctx, &p, there, bytes) : v->backward(ctx, &p, &c->g, there, bytes);
    take_back(&m);
    for (size_t i = 0; i < CASE_GUARD; i++)
        if (workspace[bytes + i] != 0xff)
            s = kl_error(KL_EINVAL, "workspace: written beyond its end");
    case_release(c, c->owned_count - 1);
    kl_ctx_destroy(ctx);
    return s;
}

static inline kl_status case_run(kda_case *c, const char *variant, kl_pass pass, int threads)
{
    return case_run_on(KL_CPU, c, variant, pass, threads);
}

/* Relative error of a strided float tensor against a dense reference; NaN when a gap was written. */
static inline double case_error(kda_case *c, const void *tensor, const double *ref, int64_t width)
{
    const float *x = tensor;
    double diff = 0.0, norm = 0.0;
    for (int64_t t = 0; t < c->tokens; t++) {
        for (int64_t i = 0; i < width; i++) {
            double d = x[t * (width + c->opt.gap) + i] - ref[t * width + i];
            diff += d * d;
            norm += ref[t * width + i] * ref[t * width + i];
        }
        for (int64_t i = width; i < width + c->opt.gap; i++)
            if (!isnan(x[t * (width + c->opt.gap) + i]))
                return NAN;
    }
    return sqrt(diff / (norm > 0.0 ? norm : 1.0));
}

/* States are scored together: one sequence's may be nothing but what is left of a cancellation. */
typedef struct case_norms {
    double diff, ref;
} case_norms;

static inline void case_add_state(kda_case *c, case_norms *s, const float *state, const double *ref)
{
    double *x = case_state(c, state);
    for (int64_t i = 0; i < c->p.HV * c->p.K * c->p.V; i++) {
        s->diff += (x[i] - ref[i]) * (x[i] - ref[i]);
        s->ref += ref[i] * ref[i];
    }
    case_release(c, c->owned_count - 1);
}

static inline double case_score(case_norms s) { return sqrt(s.diff / (s.ref > 0.0 ? s.ref : 1.0)); }

static inline double case_worse(double a, double b) { return b <= a ? a : b; } /* NaN wins */

/* The worst error of the forward results, or of the gradients. */
static inline double case_forward_error(kda_case *c)
{
    const kda_problem *p = &c->p;
    int64_t size = p->HV * p->K * p->V, C = p->chunk ? p->chunk : 64, chunk = 0;
    case_norms final = {0}, token = {0}, before = {0};
    for (int64_t n = 0; n < c->N; n++) {
        int64_t t0 = c->cu_seqlens ? c->cu_seqlens[n] : n * p->T, T = c->cu_seqlens ? c->cu_seqlens[n + 1] - t0 : p->T;
        int64_t slot = c->state_index ? c->state_index[n] : n;
        if (p->ht)
            case_add_state(c, &final, (float *)p->ht + slot * size, c->ht + n * size);
        for (int64_t t = 0; t < T && p->token_states; t++)
            case_add_state(c, &token, p->token_states + (t0 + t) * size, c->after + (t0 + t) * size);
        for (int64_t t = 0; t < T && p->chunk_states; t += C, chunk++)
            if (t > 0) /* the first is h0 itself */
                case_add_state(c, &before, p->chunk_states + chunk * size, c->after + (t0 + t - 1) * size);
    }
    double worst = case_worse(case_score(final), case_error(c, p->o, c->o, p->HV * p->V));
    return case_worse(case_worse(worst, case_score(token)), case_score(before));
}

static inline double case_backward_error(kda_case *c)
{
    const kda_problem *p = &c->p;
    int64_t size = p->HV * p->K * p->V;
    double worst = case_error(c, c->g.dq, c->dq, p->H * p->K);
    worst = case_worse(worst, case_error(c, c->g.dk, c->dk, p->H * p->K));
    worst = case_worse(worst, case_error(c, c->g.dv, c->dv, p->HV * p->V));
    if (c->g.dg)
        worst = case_worse(worst, case_error(c, c->g.dg, c->dg, p->HV * p->G));
    worst = case_worse(worst, case_error(c, c->g.dbeta, c->dbeta, p->HV));
    case_norms dh0 = {0};
    for (int64_t n = 0; n < c->N; n++)
        case_add_state(c, &dh0, c->g.dh0 + n * size, c->dh0 + n * size);
    /* Without d_o, dh0 is dht after all the decays, possibly 1e-100 of it: it is scored against a hundredth of dht. */
    for (int64_t i = 0; c->g.dht && i < c->N * size; i++)
        dh0.ref += 1e-4 * c->g.dht[i] * c->g.dht[i];
    worst = case_worse(worst, case_score(dh0));
    if (c->g.dA_log)
        worst = case_worse(worst, kl_rel_err(c->g.dA_log, c->dA_log, (size_t)p->HV));
    if (c->g.ddt_bias)
        worst = case_worse(worst, kl_rel_err(c->g.ddt_bias, c->ddt_bias, (size_t)(p->HV * p->G)));
    return worst;
}

#endif
