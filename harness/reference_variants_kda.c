#include "common/arena.h"
#include "harness/reference_variants.h"
#include "reference/dplr.h"
#include "reference/kda.h"

/* One sequence in double. */
typedef struct kda_wide {
    double *q, *k, *v, *g, *beta, *A_log, *dt_bias, *h0, *o, *ht, *states;
    double *d_o, *dht, *dq, *dk, *dv, *dg, *dbeta, *dA_log, *ddt_bias, *dh0;
} kda_wide;

/* Sequence n: first row among all tokens, and how many. */
static int64_t first_token(const kda_problem *p, int64_t n) { return p->cu_seqlens ? p->cu_seqlens[n] : n * p->T; }
static int64_t token_count(const kda_problem *p, int64_t n) { return p->cu_seqlens ? p->cu_seqlens[n + 1] - p->cu_seqlens[n] : p->T; }

static int64_t longest(const kda_problem *p)
{
    int64_t most = 0;
    for (int64_t n = 0; n < p->N; n++)
        most = token_count(p, n) > most ? token_count(p, n) : most;
    return most;
}

static kda_wide lay_out(const kda_problem *p, kl_pass pass, kl_arena *a)
{
    int64_t T = longest(p), qk = T * p->H * p->K, v = T * p->HV * p->V, g = T * p->HV * p->G, S = p->HV * p->K * p->V;
    kda_wide w = {0};
    w.q = KL_TAKE(a, double, qk);
    w.k = KL_TAKE(a, double, qk);
    w.v = KL_TAKE(a, double, v);
    w.g = KL_TAKE(a, double, g);
    w.beta = KL_TAKE(a, double, T * p->HV);
    w.A_log = KL_TAKE(a, double, p->HV);
    w.dt_bias = KL_TAKE(a, double, p->HV * p->G);
    w.h0 = KL_TAKE(a, double, S);
    if (pass == KL_FORWARD) {
        w.o = KL_TAKE(a, double, v);
        w.ht = KL_TAKE(a, double, S);
        w.states = p->chunk_states || p->token_states ? KL_TAKE(a, double, T * S) : NULL;
        return w;
    }
    w.d_o = KL_TAKE(a, double, v);
    w.dht = KL_TAKE(a, double, S);
    w.dq = KL_TAKE(a, double, qk);
    w.dk = KL_TAKE(a, double, qk);
    w.dv = KL_TAKE(a, double, v);
    w.dg = KL_TAKE(a, double, g);
    w.dbeta = KL_TAKE(a, double, T * p->HV);
    w.dA_log = KL_TAKE(a, double, p->HV);
    w.ddt_bias = KL_TAKE(a, double, p->HV * p->G);
    w.dh0 = KL_TAKE(a, double, S);
    return w;
}

/* T rows of width elements from row t0 on, at the tensor's stride. */
static void widen(double *y, const void *x, kl_dtype type, int64_t t0, int64_t T, int64_t width, int64_t stride)
{
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < width; i++)
            y[t * width + i] = kl_element(x, type, (t0 + t) * (stride ? stride : width) + i);
}

static void narrow(void *y, kl_dtype type, const double *x, int64_t t0, int64_t T, int64_t width, int64_t stride)
{
    for (int64_t t = 0; y && t < T; t++)
        for (int64_t i = 0; i < width; i++)
            kl_set_element(y, type, (t0 + t) * (stride ? stride : width) + i, x[t * width + i]);
}

/* Where element (h, i, j) of the state in slot n lies. */
static int64_t state_at(const kda_problem *p, int64_t n, int64_t h, int64_t i, int64_t j)
{
    int64_t inner = p->state_layout == KDA_STATE_VK ? j * p->K + i : i * p->V + j;
    return (n * p->HV + h) * p->K * p->V + inner;
}

static void state_in(const kda_problem *p, double *y, const void *x, kl_dtype type, int64_t n)
{
    for (int64_t h = 0; h < p->HV; h++)
        for (int64_t i = 0; i < p->K; i++)
            for (int64_t j = 0; j < p->V; j++)
                y[(h * p->K + i) * p->V + j] = kl_element(x, type, state_at(p, n, h, i, j));
}

static void state_out(const kda_problem *p, void *y, kl_dtype type, const double *x, int64_t n)
{
    for (int64_t h = 0; y && h < p->HV; h++)
        for (int64_t i = 0; i < p->K; i++)
            for (int64_t j = 0; j < p->V; j++)
                kl_set_element(y, type, state_at(p, n, h, i, j), x[(h * p->K + i) * p->V + j]);
}

/* The reference's view of sequence n. */
static ref_kda sequence(const kda_problem *p, const kda_wide *w, int64_t n)
{
    int64_t t0 = first_token(p, n), T = token_count(p, n), slot = p->state_index ? p->state_index[n] : n;
    widen(w->q, p->q, p->dtype, t0, T, p->H * p->K, p->q_stride);
    widen(w->k, p->k, p->dtype, t0, T, p->H * p->K, p->k_stride);
    widen(w->v, p->v, p->dtype, t0, T, p->HV * p->V, p->v_stride);
    widen(w->beta, p->beta, p->dtype, t0, T, p->HV, p->beta_stride);
    if (p->G)
        widen(w->g, p->g, p->dtype, t0, T, p->HV * p->G, p->g_stride);
    if (p->A_log)
        widen(w->A_log, p->A_log, KL_F32, 0, 1, p->HV, 0);
    if (p->dt_bias)
        widen(w->dt_bias, p->dt_bias, KL_F32, 0, 1, p->HV * p->G, 0);
    if (p->h0)
        state_in(p, w->h0, p->h0, p->state_dtype, slot);
    static const ref_gate_kind gate[] = {REF_GATE_LOG, REF_GATE_SOFTPLUS, REF_GATE_BOUNDED};
    static const ref_beta_kind beta[] = {REF_BETA_PLAIN, REF_BETA_SIGMOID, REF_BETA_TWICE_SIGMOID};
    return (ref_kda){.T = T, .H = p->H, .HV = p->HV, .K = p->K, .V = p->V, .G = p->G, .scale = p->scale, .gate = gate[p->gate],
                     .lower_bound = p->lower_bound, .beta_kind = beta[p->beta_kind], .qk_l2norm = p->qk_l2norm, .no_delta = p->no_delta,
                     .q = w->q, .k = w->k, .v = w->v, .g = p->G ? w->g : NULL, .beta = w->beta, .A_log = w->A_log,
                     .dt_bias = p->dt_bias ? w->dt_bias : NULL, .h0 = p->h0 ? w->h0 : NULL};
}

static kl_status check(const void *problem, kl_pass pass)
{
    const kda_problem *p = problem;
    (void)pass;
    if (p->dtype != KL_F32 && p->dtype != KL_BF16 && p->dtype != KL_F16 && p->dtype != KL_F64)
        return kl_error(KL_EUNSUPPORTED, "dtype: expected a floating type, got %s", kl_dtype_name(p->dtype));
    return kl_ok();
}

static size_t workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    (void)ctx;
    kl_arena a = kl_arena_count();
    lay_out(problem, pass, &a);
    return a.overflow ? SIZE_MAX : a.used;
}

static kl_status forward(kl_ctx *ctx, const void *problem, void *memory, size_t bytes)
{
    const kda_problem *p = problem;
    KL_TRY(kda_validate(ctx, p));
    kl_arena a = kl_arena_over(memory, bytes);
    kda_wide w = lay_out(p, KL_FORWARD, &a);
    KL_REQUIRE(!a.overflow, "workspace: expected %zu bytes, got %zu", workspace(ctx, p, KL_FORWARD), bytes);
    int64_t chunk = p->chunk ? p->chunk : KDA_DEFAULT_CHUNK, row = 0, S = p->HV * p->K * p->V;
    for (int64_t n = 0; n < p->N; n++) {
        ref_kda r = sequence(p, &w, n);
        int64_t t0 = first_token(p, n);
        if (ref_kda_forward(&r, w.o, w.ht, w.states) != 0)
            return kl_error(KL_ENOMEM, "kda reference: out of memory");
        narrow(p->o, p->dtype, w.o, t0, r.T, p->HV * p->V, p->o_stride);
        state_out(p, p->ht, p->state_dtype, w.ht, p->state_index ? p->state_index[n] : n);
        for (int64_t t = 0; p->token_states && t < r.T; t++)
            state_out(p, p->token_states, KL_F32, w.states + t * S, t0 + t);
        if (!r.h0)
            memset(w.h0, 0, (size_t)S * sizeof(double));
        for (int64_t t = 0; p->chunk_states && t < r.T; t += chunk)
            state_out(p, p->chunk_states, KL_F32, t ? w.states + (t - 1) * S : w.h0, row++);
    }
    return kl_ok();
}

static kl_status backward(kl_ctx *ctx, const void *problem, const void *grads, void *memory, size_t bytes)
{
    const kda_problem *p = problem;
    const kda_grads *g = grads;
    KL_TRY(kda_validate(ctx, p));
    KL_TRY(kda_validate_grads(p, g));
    kl_arena a = kl_arena_over(memory, bytes);
    kda_wide w = lay_out(p, KL_BACKWARD, &a);
    KL_REQUIRE(!a.overflow, "workspace: expected %zu bytes, got %zu", workspace(ctx, p, KL_BACKWARD), bytes);
    kl_clear(w.dA_log, p->HV);
    kl_clear(w.ddt_bias, p->HV * p->G);
    for (int64_t n = 0; n < p->N; n++) {
        ref_kda r = sequence(p, &w, n);
        int64_t t0 = first_token(p, n), T = r.T, qk = p->H * p->K, v = p->HV * p->V, S = p->HV * p->K * p->V;
        if (g->d_o)
            widen(w.d_o, g->d_o, p->dtype, t0, T, v, p->o_stride);
        if (g->dht)
            state_in(p, w.dht, g->dht, KL_F32, n);
        kl_clear(w.dq, T * qk);
        kl_clear(w.dk, T * qk);
        kl_clear(w.dv, T * v);
        kl_clear(w.dg, T * p->HV * p->G);
        kl_clear(w.dbeta, T * p->HV);
        kl_clear(w.dh0, S);
        ref_kda_grad d = {.d_o = g->d_o ? w.d_o : NULL, .dht = g->dht ? w.dht : NULL, .dq = w.dq, .dk = w.dk, .dv = w.dv,
                          .dg = p->G ? w.dg : NULL, .dbeta = w.dbeta, .dA_log = p->A_log ? w.dA_log : NULL,
                          .ddt_bias = p->dt_bias ? w.ddt_bias : NULL, .dh0 = w.dh0};
        if (ref_kda_backward(&r, &d) != 0)
            return kl_error(KL_ENOMEM, "kda reference: out of memory");
        narrow(g->dq, p->dtype, w.dq, t0, T, qk, p->q_stride);
        narrow(g->dk, p->dtype, w.dk, t0, T, qk, p->k_stride);
        narrow(g->dv, p->dtype, w.dv, t0, T, v, p->v_stride);
        narrow(g->dg, p->dtype, w.dg, t0, T, p->HV * p->G, p->g_stride);
        narrow(g->dbeta, p->dtype, w.dbeta, t0, T, p->HV, p->beta_stride);
        state_out(p, g->dh0, KL_F32, w.dh0, n);
    }
    kl_add_to(g->dA_log, w.dA_log, p->HV);
    kl_add_to(g->ddt_bias, w.ddt_bias, p->HV * p->G);
    return kl_ok();
}

/* S is read, decayed, read for S^T k, written and read for S^T q: 7 operations an element and token; backward about three times that. */
static kl_cost cost(const void *problem, kl_pass pass)
{
    const kda_problem *p = problem;
    double tokens = (double)p->B * (double)p->T, S = (double)p->HV * (double)p->K * (double)p->V;
    double activations = 2.0 * (double)(p->H * p->K) + 2.0 * (double)(p->HV * p->V) + (double)(p->HV * (p->G + 1));
    double states = (double)p->N * S * ((p->h0 ? 1.0 : 0.0) + (p->ht ? 1.0 : 0.0));
    double passes = pass == KL_BACKWARD ? 3.0 : 1.0;
    return (kl_cost){7.0 * passes * tokens * S, 4.0 * passes * (tokens * activations + states)};
}

const kl_variant kl_reference_kda = {"kda", "reference", KL_CPU, "token by token in double precision, to be read beside the report",
                                     check, workspace, forward, backward, cost};

/* ---- DPLR ---- */

typedef struct dplr_wide {
    double *q, *k, *a, *b, *g, *v, *h0, *o, *ht;
} dplr_wide;

static int64_t dplr_tokens(const dplr_problem *p, int64_t n) { return p->cu_seqlens ? p->cu_seqlens[n + 1] - p->cu_seqlens[n] : p->T; }

static dplr_wide lay_out_dplr(const dplr_problem *p, kl_arena *a)
{
    int64_t T = 0;
    for (int64_t n = 0; n < p->N; n++)
        T = dplr_tokens(p, n) > T ? dplr_tokens(p, n) : T;
    int64_t keys = T * p->H * p->K, values = T * p->H * p->V, S = p->H * p->K * p->V;
    dplr_wide w;
    double **key[] = {&w.q, &w.k, &w.a, &w.b, &w.g};
    for (int i = 0; i < 5; i++)
        *key[i] = KL_TAKE(a, double, keys);
    w.v = KL_TAKE(a, double, values);
    w.o = KL_TAKE(a, double, values);
    w.h0 = KL_TAKE(a, double, S);
    w.ht = KL_TAKE(a, double, S);
    return w;
}

static kl_status check_dplr(const void *problem, kl_pass pass)
{
    (void)problem;
    return pass == KL_FORWARD ? kl_ok() : kl_error(KL_EUNSUPPORTED, "dplr: forward only");
}

static size_t workspace_dplr(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    (void)ctx, (void)pass;
    kl_arena a = kl_arena_count();
    lay_out_dplr(problem, &a);
    return a.overflow ? SIZE_MAX : a.used;
}

static kl_status forward_dplr(kl_ctx *ctx, const void *problem, void *memory, size_t bytes)
{
    const dplr_problem *p = problem;
    KL_TRY(dplr_validate(ctx, p));
    kl_arena a = kl_arena_over(memory, bytes);
    dplr_wide w = lay_out_dplr(p, &a);
    KL_REQUIRE(!a.overflow, "workspace: expected %zu bytes, got %zu", workspace_dplr(ctx, p, KL_FORWARD), bytes);
    int64_t keys = p->H * p->K, values = p->H * p->V, S = p->H * p->K * p->V;
    for (int64_t n = 0; n < p->N; n++) {
        int64_t t0 = p->cu_seqlens ? p->cu_seqlens[n] : n * p->T, T = dplr_tokens(p, n);
        const void *from[] = {p->q, p->k, p->a, p->b, p->g};
        double *to[] = {w.q, w.k, w.a, w.b, w.g};
        for (int i = 0; i < 5; i++)
            widen(to[i], from[i], p->dtype, t0, T, keys, 0);
        widen(w.v, p->v, p->dtype, t0, T, values, 0);
        if (p->h0)
            widen(w.h0, p->h0, KL_F32, n, 1, S, 0);
        ref_dplr r = {.T = T, .H = p->H, .K = p->K, .V = p->V, .scale = p->scale, .q = w.q, .k = w.k, .a = w.a, .b = w.b,
                      .g = w.g, .v = w.v, .h0 = p->h0 ? w.h0 : NULL};
        if (ref_dplr_forward(&r, w.o, w.ht) != 0)
            return kl_error(KL_ENOMEM, "dplr reference: out of memory");
        narrow(p->o, p->dtype, w.o, t0, T, values, 0);
        narrow(p->ht, KL_F32, w.ht, n, 1, S, 0);
    }
    return kl_ok();
}

/* As KDA, with two more inputs of [T,H,K] and two operations more an element. */
static kl_cost cost_dplr(const void *problem, kl_pass pass)
{
    const dplr_problem *p = problem;
    (void)pass;
    double tokens = (double)p->B * (double)p->T, S = (double)p->H * (double)p->K * (double)p->V;
    double states = (double)p->N * S * ((p->h0 ? 1.0 : 0.0) + (p->ht ? 1.0 : 0.0));
    double inputs = tokens * (double)p->H * (double)(5 * p->K + 2 * p->V) * (double)kl_dtype_size(p->dtype);
    return (kl_cost){9.0 * tokens * S, inputs + 4.0 * states};
}

const kl_variant kl_reference_dplr = {"dplr", "reference", KL_CPU, "token by token in double precision", check_dplr, workspace_dplr,
                                      forward_dplr, NULL, cost_dplr};
