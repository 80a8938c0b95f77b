#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness/file.h"
#include "harness/problem_build.h"
#include "harness/safetensors.h"

/* The specification with its defaults filled in, and where the inputs went. */
typedef struct kda_layout {
    kl_kda_spec s;
    int64_t N, chunks;
    int64_t *cu;
    float *q, *k, *v, *g, *beta, *A_log, *dt_bias, *h0, *d_o, *dht;
} kda_layout;

static void lay_out(kl_case *c, const void *spec, kl_arena *a)
{
    kda_layout *l = (kda_layout *)spec;
    const kl_kda_spec *s = &l->s;
    int64_t tokens = s->B * s->T, state = l->N * s->HV * s->K * s->V;
    bool gated = s->G && s->gate != KDA_GATE_LOG;
    l->cu = s->lengths ? KL_TAKE(a, int64_t, l->N + 1) : NULL;
    l->q = KL_TAKE(a, float, tokens * s->H * s->K);
    l->k = KL_TAKE(a, float, tokens * s->H * s->K);
    l->v = KL_TAKE(a, float, tokens * s->HV * s->V);
    l->g = s->G ? KL_TAKE(a, float, tokens * s->HV * s->G) : NULL;
    l->beta = KL_TAKE(a, float, tokens * s->HV);
    l->A_log = gated ? KL_TAKE(a, float, s->HV) : NULL;
    l->dt_bias = gated ? KL_TAKE(a, float, s->HV * s->G) : NULL;
    l->h0 = s->state ? KL_TAKE(a, float, state) : NULL;
    l->d_o = s->backward ? KL_TAKE(a, float, tokens * s->HV * s->V) : NULL;
    l->dht = s->backward && s->state ? KL_TAKE(a, float, state) : NULL;

    kda_problem *p = &c->problem.kda;
    *p = (kda_problem){
        .B = s->B, .T = s->T, .N = l->N, .H = s->H, .HV = s->HV, .K = s->K, .V = s->V, .G = s->G, .cu_seqlens = l->cu,
        .state_layout = s->state_layout, .gate = s->gate, .lower_bound = s->gate == KDA_GATE_BOUNDED ? -5.0f : 0.0f,
        .beta_kind = s->beta_kind, .qk_l2norm = s->qk_l2norm, .no_delta = s->no_delta, .chunk = s->chunk,
        .q = l->q, .k = l->k, .v = l->v, .g = l->g, .beta = l->beta, .A_log = l->A_log, .dt_bias = l->dt_bias, .h0 = l->h0};
    p->o = kl_case_output(c, a, "o", tokens, s->HV, s->V, false, false);
    p->ht = kl_case_output(c, a, "ht", l->N, s->HV, s->K * s->V, false, false);
    if (s->chunk_states)
        p->chunk_states = kl_case_output(c, a, "chunk_states", l->chunks, s->HV, s->K * s->V, false, false);
    if (s->token_states)
        p->token_states = kl_case_output(c, a, "token_states", tokens, s->HV, s->K * s->V, false, false);
    c->grads.kda = (kda_grads){0};
    if (!s->backward)
        return;
    kda_grads *d = &c->grads.kda;
    d->d_o = l->d_o;
    d->dht = l->dht;
    d->dq = kl_case_output(c, a, "dq", tokens, s->H, s->K, true, false);
    d->dk = kl_case_output(c, a, "dk", tokens, s->H, s->K, true, false);
    d->dv = kl_case_output(c, a, "dv", tokens, s->HV, s->V, true, false);
    d->dg = s->G ? kl_case_output(c, a, "dg", tokens, s->HV, s->G, true, false) : NULL;
    d->dbeta = kl_case_output(c, a, "dbeta", tokens, s->HV, 1, true, false);
    d->dA_log = gated ? kl_case_output(c, a, "dA_log", 1, s->HV, 1, true, true) : NULL;
    d->ddt_bias = gated ? kl_case_output(c, a, "ddt_bias", 1, s->HV, s->G, true, true) : NULL;
    d->dh0 = s->state ? kl_case_output(c, a, "dh0", l->N, s->HV, s->K * s->V, true, false) : NULL;
}

static double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

/* Every row of n floats to length 1. */
static void unit_rows(float *x, int64_t rows, int64_t n)
{
    for (int64_t r = 0; r < rows; r++, x += n) {
        double sum = 0.0;
        for (int64_t i = 0; i < n; i++)
            sum += (double)x[i] * x[i];
        float scale = (float)(1.0 / sqrt(sum > 0.0 ? sum : 1.0));
        for (int64_t i = 0; i < n; i++)
            x[i] *= scale;
    }
}

/* Keys of one head at cosine 0.8 to each other: k = sqrt(0.8) c + sqrt(0.2) n, c the head's own direction. */
static void correlate_keys(float *k, const kl_kda_spec *s, int64_t tokens)
{
    kl_rng r = kl_rng_make(s->seed, 20);
    float *common = malloc((size_t)(s->H * s->K) * sizeof *common);
    if (!common)
        return;
    kl_fill_normal(&r, common, (size_t)(s->H * s->K), 0.0f, 1.0f);
    unit_rows(common, s->H, s->K);
    unit_rows(k, tokens * s->H, s->K);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < s->H * s->K; i++)
            k[t * s->H * s->K + i] = 0.894427191f * common[i] + 0.447213595f * k[t * s->H * s->K + i];
    free(common);
}

/* -decay of one gate value: in (0, 0.01) slow, in (0, 5) strong. */
static double draw_decay(kl_rng *r, const kl_kda_spec *s, int64_t t, int64_t head, int64_t j)
{
    bool first_third = s->G < 3 ? head % 2 == 0 : 3 * j < s->G;
    if (s->regime == KL_REGIME_ZERO || s->regime == KL_REGIME_FIVE)
        return s->regime == KL_REGIME_ZERO ? 0.0 : 5.0;
    if (s->regime == KL_REGIME_EXTREME)
        return (head + j) % 3 == 0 ? 60.0 : 0.0;
    if (s->regime == KL_REGIME_THOUSAND && (t + head) % 7 == 0)
        return 1000.0;
    bool slow = s->regime == KL_REGIME_SLOW || (s->regime == KL_REGIME_MIXED && first_third);
    return slow ? 0.01 * (1e-3 + 0.998 * kl_rng_uniform(r)) : 5.0 * sigmoid(kl_rng_normal(r));
}

/* What goes into g so that the gate gives that decay. */
static double before_gate(const kda_layout *l, int64_t head, int64_t j, double decay)
{
    if (l->s.gate == KDA_GATE_LOG)
        return -decay;
    double a = exp((double)l->A_log[head]);
    double x = l->s.gate == KDA_GATE_SOFTPLUS ? log(expm1(decay / a)) : log(decay / (5.0 - decay)) / a;
    return x - l->dt_bias[head * l->s.G + j];
}

static void fill_gates(const kda_layout *l, int64_t tokens)
{
    const kl_kda_spec *s = &l->s;
    kl_rng r = kl_rng_make(s->seed, 4);
    if (l->A_log) {
        bool softplus = s->gate == KDA_GATE_SOFTPLUS;
        kl_rng parameters = kl_rng_make(s->seed, 5);
        kl_fill_uniform(&parameters, l->A_log, (size_t)s->HV, softplus ? 0.0f : -0.5f, softplus ? 2.77f : 0.5f);
        kl_fill_normal(&parameters, l->dt_bias, (size_t)(s->HV * s->G), 0.0f, 1.0f);
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < s->HV; h++)
            for (int64_t j = 0; j < s->G; j++)
                l->g[(t * s->HV + h) * s->G + j] = (float)before_gate(l, h, j, draw_decay(&r, s, t, h, j));
}

static void fill_beta(const kda_layout *l, int64_t count)
{
    const kl_kda_spec *s = &l->s;
    kl_rng r = kl_rng_make(s->seed, 6);
    double top = s->beta_kind == KDA_BETA_SIGMOID2 ? 2.0 : 1.0;
    for (int64_t i = 0; i < count; i++) {
        double beta = s->regime == KL_REGIME_SLOW ? 0.93 + 0.04 * kl_rng_uniform(&r) : top * sigmoid(kl_rng_normal(&r));
        l->beta[i] = (float)(s->beta_kind == KDA_BETA_PLAIN ? beta : log(beta / (top - beta)));
    }
}

static void pack(const kda_layout *l)
{
    l->cu[0] = 0;
    for (int64_t n = 0; n < l->N; n++)
        l->cu[n + 1] = l->cu[n] + l->s.lengths[n];
}

static void fill(const kda_layout *l)
{
    const kl_kda_spec *s = &l->s;
    int64_t tokens = s->B * s->T, qk = tokens * s->H * s->K, v = tokens * s->HV * s->V, state = l->N * s->HV * s->K * s->V;
    if (l->cu)
        pack(l);
    struct { float *x; int64_t count; } normal[] = {{l->q, qk}, {l->k, qk}, {l->v, v}, {l->h0, state}, {l->d_o, v}, {l->dht, state}};
    for (int i = 0; i < 6; i++) {
        kl_rng r = kl_rng_make(s->seed, 10 + (uint64_t)i);
        if (normal[i].x)
            kl_fill_normal(&r, normal[i].x, (size_t)normal[i].count, 0.0f, 1.0f);
    }
    if (s->regime == KL_REGIME_SLOW)
        correlate_keys(l->k, s, tokens);
    if (!s->qk_l2norm) {
        unit_rows(l->q, tokens * s->H, s->K);
        unit_rows(l->k, tokens * s->H, s->K);
    }
    fill_gates(l, tokens);
    fill_beta(l, tokens * s->HV);
}

static kl_status with_defaults(kda_layout *l, const kl_kda_spec *given)
{
    *l = (kda_layout){.s = *given};
    kl_kda_spec *s = &l->s;
    s->B = s->B ? s->B : 1;
    s->HV = s->HV ? s->HV : s->H;
    s->V = s->V ? s->V : s->K;
    s->G = s->G == 0 ? s->K : s->G < 0 ? 0 : s->G;
    l->N = s->lengths ? s->sequences : s->B;
    for (int64_t n = s->T = s->lengths ? 0 : s->T; s->lengths && n < l->N; n++) {
        KL_REQUIRE(s->lengths[n] >= 0 && s->lengths[n] < INT64_C(1) << 40, "lengths[%lld]: expected 0 to 2^40 tokens, got %lld",
                   (long long)n, (long long)s->lengths[n]);
        s->T += s->lengths[n];
    }
    KL_REQUIRE(s->T >= 0, "T: expected at least 0, got %lld", (long long)s->T);
    KL_REQUIRE(s->H >= 1 && s->HV >= 1 && s->K >= 1 && s->V >= 1 && s->B >= 1,
               "B, H, HV, K, V: expected at least 1 each, got %lld, %lld, %lld, %lld, %lld", (long long)s->B, (long long)s->H,
               (long long)s->HV, (long long)s->K, (long long)s->V);
    int64_t sizes[] = {s->B, s->T, s->HV > s->H ? s->HV : s->H, s->K, s->V, l->N, 8};
    KL_REQUIRE(kl_sizes_fit(sizes, 7), "problem: B T HV K V is beyond 2^62");
    for (int64_t n = 0, C = s->chunk ? s->chunk : KDA_DEFAULT_CHUNK; n < l->N; n++)
        l->chunks += ((s->lengths ? s->lengths[n] : s->T) + C - 1) / C;
    return kl_ok();
}

kl_status kl_case_kda(kl_case *c, const kl_kda_spec *given)
{
    kda_layout l;
    *c = (kl_case){.family = KL_FAMILY_KDA, .tolerance = kl_tol_kda_f32, .backward = given->backward};
    KL_TRY(with_defaults(&l, given));
    KL_TRY(kl_case_build(c, lay_out, &l));
    if (!given->blank)
        fill(&l);
    else if (l.cu)
        pack(&l);
    const kl_kda_spec *s = &l.s;
    /* Among few channels any two keys are close, and the worst head and window is an extreme of few roundings, not a mean of many. */
    c->correlated = s->regime == KL_REGIME_SLOW || s->K <= 8;
    static const char *const gates[] = {"", " softplus", " bounded"};
    int used = snprintf(c->name, sizeof c->name, "%s%s T%lld H%lld HV%lld K%lld V%lld", kl_regime_name(s->regime), gates[s->gate],
                        (long long)s->T, (long long)s->H, (long long)s->HV, (long long)s->K, (long long)s->V);
    if (s->G != s->K)
        used += snprintf(c->name + used, sizeof c->name - (size_t)used, " G%lld", (long long)s->G);
    if (l.N != 1)
        used += snprintf(c->name + used, sizeof c->name - (size_t)used, " N%lld", (long long)l.N);
    snprintf(c->name + used, sizeof c->name - (size_t)used, "%s%s%s%s", s->state_layout == KDA_STATE_VK ? " value-first" : "",
             s->qk_l2norm ? " l2norm" : "", s->no_delta ? " no-delta" : "", s->beta_kind == KDA_BETA_SIGMOID2 ? " 2sigmoid" : "");
    kl_status status = kda_validate(NULL, &c->problem.kda);
    if (kl_failed(status))
        kl_case_free(c);
    return status;
}

/* ---- general DPLR from KDA ---- */

typedef struct dplr_layout {
    const kda_problem *p;
    float *q, *k, *a, *b, *g, *v, *h0;
} dplr_layout;

static void lay_out_dplr(kl_case *c, const void *spec, kl_arena *a)
{
    dplr_layout *l = (dplr_layout *)spec;
    const kda_problem *p = l->p;
    int64_t tokens = p->B * p->T, keys = tokens * p->HV * p->K;
    float **part[] = {&l->q, &l->k, &l->a, &l->b, &l->g};
    for (int i = 0; i < 5; i++)
        *part[i] = KL_TAKE(a, float, keys);
    l->v = KL_TAKE(a, float, tokens * p->HV * p->V);
    l->h0 = p->h0 ? KL_TAKE(a, float, p->N * p->HV * p->K * p->V) : NULL;
    c->problem.dplr = (dplr_problem){
        .B = p->B, .T = p->T, .N = p->N, .H = p->HV, .K = p->K, .V = p->V, .cu_seqlens = p->cu_seqlens, .scale = p->scale,
        .q = l->q, .k = l->k, .a = l->a, .b = l->b, .v = l->v, .g = l->g, .h0 = l->h0};
    c->problem.dplr.o = kl_case_output(c, a, "o", tokens, p->HV, p->V, false, false);
    c->problem.dplr.ht = kl_case_output(c, a, "ht", p->N, p->HV, p->K * p->V, false, false);
}

kl_status kl_case_dplr(kl_case *c, const kl_case *kda)
{
    const kda_problem *p = &kda->problem.kda;
    KL_REQUIRE(kda->family == KL_FAMILY_KDA && p->gate == KDA_GATE_LOG && p->beta_kind == KDA_BETA_PLAIN && !p->qk_l2norm &&
               !p->no_delta && p->state_layout == KDA_STATE_KV && !p->state_index && p->dtype == KL_F32 && p->state_dtype == KL_F32,
               "dplr: expected a KDA problem with a log gate, plain beta, the delta rule, [K,V] state, all float32");
    *c = (kl_case){.family = KL_FAMILY_DPLR, .tolerance = kl_tol_kda_f32, .correlated = kda->correlated};
    dplr_layout l = {.p = p};
    KL_TRY(kl_case_build(c, lay_out_dplr, &l));
    snprintf(c->name, sizeof c->name, "%s", kda->name);
    const float *q = p->q, *k = p->k, *g = p->g, *beta = p->beta;
    for (int64_t t = 0; t < p->B * p->T; t++) {
        for (int64_t h = 0; h < p->HV; h++) {
            int64_t from = (t * p->H + h / (p->HV / p->H)) * p->K, to = (t * p->HV + h) * p->K;
            for (int64_t i = 0; i < p->K; i++) {
                float decay = p->G ? g[(t * p->HV + h) * p->G + i / (p->K / p->G)] : 0.0f;
                l.q[to + i] = q[from + i];
                l.k[to + i] = beta[t * p->HV + h] * k[from + i];
                l.a[to + i] = k[from + i] * expf(decay);
                l.b[to + i] = -beta[t * p->HV + h] * k[from + i];
                l.g[to + i] = decay;
            }
        }
    }
    memcpy(l.v, p->v, (size_t)(p->B * p->T * p->HV * p->V) * sizeof(float));
    if (l.h0)
        memcpy(l.h0, p->h0, (size_t)(p->N * p->HV * p->K * p->V) * sizeof(float));
    for (int i = 0; i < 2; i++) {
        size_t bytes = (size_t)(c->tensor[i].T * c->tensor[i].H * c->tensor[i].D) * sizeof(double);
        const double *want = kda->tensor[i].want;
        if (want && (c->tensor[i].want = malloc(bytes + 1)))
            memcpy(c->tensor[i].want, want, bytes);
    }
    return kl_ok();
}

/* ---- golden ---- */

static kl_status golden_tensor(const kl_tensors *file, const char *name, int ndim, const int64_t *shape, const kl_tensor **out)
{
    const kl_tensor *t = kl_tensors_find(file, name);
    if (!t)
        return kl_error(KL_EFORMAT, "tensor '%s' is missing", name);
    if (t->dtype != KL_F32)
        return kl_error(KL_EFORMAT, "tensor '%s': expected float32, got %s", name, kl_dtype_name(t->dtype));
    bool same = t->ndim == ndim;
    for (int i = 0; same && i < ndim; i++)
        same = shape[i] < 0 || t->shape[i] == shape[i];
    if (!same)
        return kl_error(KL_EFORMAT, "tensor '%s': its shape does not fit q, v and g", name);
    *out = t;
    return kl_ok();
}

static kl_status read_golden(kl_case *c, const kl_tensors *file)
{
    const kl_tensor *q, *v, *t;
    KL_TRY(golden_tensor(file, "q", 3, (int64_t[]){-1, -1, -1}, &q));
    int64_t T = q->shape[0], H = q->shape[1], K = q->shape[2];
    KL_TRY(golden_tensor(file, "v", 3, (int64_t[]){T, -1, -1}, &v));
    int64_t HV = v->shape[1], V = v->shape[2];
    kda_layout l;
    KL_TRY(with_defaults(&l, &(kl_kda_spec){.T = T, .H = H, .HV = HV, .K = K, .V = V, .state = true, .backward = true}));
    struct { const char *name; int ndim; int64_t shape[3]; } part[] = {
        {"q", 3, {T, H, K}}, {"k", 3, {T, H, K}}, {"v", 3, {T, HV, V}}, {"g", 3, {T, HV, K}}, {"beta", 2, {T, HV}},
        {"h0", 3, {HV, K, V}}, {"do", 3, {T, HV, V}}, {"dht", 3, {HV, K, V}}, {"o", 3, {T, HV, V}}, {"ht", 3, {HV, K, V}},
        {"dq", 3, {T, H, K}}, {"dk", 3, {T, H, K}}, {"dv", 3, {T, HV, V}}, {"dg", 3, {T, HV, K}}, {"dbeta", 2, {T, HV}}, {"dh0", 3, {HV, K, V}}};
    for (size_t i = 0; i < sizeof part / sizeof *part; i++)
        KL_TRY(golden_tensor(file, part[i].name, part[i].ndim, part[i].shape, &t));
    KL_TRY(kl_case_build(c, lay_out, &l));
    float *input[] = {l.q, l.k, l.v, l.g, l.beta, l.h0, l.d_o, l.dht};
    for (int i = 0; i < 8; i++) {
        t = kl_tensors_find(file, part[i].name);
        memcpy(input[i], t->data, kl_tensor_bytes(t));
    }
    for (int i = 0; i < c->count; i++) {
        t = kl_tensors_find(file, c->tensor[i].name);
        memcpy(c->tensor[i].out, t->data, kl_tensor_bytes(t));
    }
    KL_TRY(kl_case_keep(c, KL_FORWARD));
    KL_TRY(kl_case_keep(c, KL_BACKWARD));
    return kda_validate(NULL, &c->problem.kda);
}

kl_status kl_case_kda_golden(kl_case *c, const char *path)
{
    *c = (kl_case){.family = KL_FAMILY_KDA, .tolerance = kl_tol_kda_f32, .backward = true};
    kl_tensors *file;
    KL_TRY(kl_tensors_open(&file, path));
    kl_status s = read_golden(c, file);
    kl_tensors_close(file);
    if (kl_failed(s)) {
        kl_case_free(c);
        return kl_error_in(s, "%s", path);
    }
    const char *base = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    snprintf(c->name, sizeof c->name, "%.*s", (int)strcspn(base, "."), base);
    c->correlated = strstr(c->name, "slow_corr") != NULL;
    return kl_ok();
}
