/* KDA and its general form on a device: a few heads (outputs of a head depend on that head alone) come back to be scored
 * against the reference, on the very numbers that the device computed with. */
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "harness/bench_device.h"
#include "harness/reference_variants.h"

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static kl_status complete(kl_workload *w)
{
    kl_shape *s = &w->shape;
    s->B = s->B ? s->B : 1;
    s->HV = s->HV ? s->HV : s->H;
    s->V = s->V ? s->V : s->K;
    s->G = s->G == 0 ? s->K : s->G;
    s->N = s->length_count ? s->length_count : s->B;
    KL_REQUIRE(s->HV % s->H == 0, "--shapes: HV: expected a multiple of H = %lld, got %lld", (long long)s->H, (long long)s->HV);
    KL_REQUIRE(w->family == KL_FAMILY_KDA || (!s->raw && !s->value_first && s->HV == s->H),
               "--shapes: dplr: expected raw = 0, value_first = 0 and HV = H beside it");
    return kl_ok();
}

/* ---- tensors ---- */

/* bf16 throughout, float states and gate parameters. */
static void lay_out(const kl_workload *w, kl_tensors *t, kl_arena *a)
{
    const kl_shape *s = &w->shape;
    bool gated = s->raw && s->G > 0, dplr = w->family == KL_FAMILY_DPLR;
    int64_t B = s->length_count ? 1 : s->B, N = s->length_count ? s->length_count : s->B, G = s->G < 0 ? 0 : s->G;
    int64_t tokens = B * s->T, keys = tokens * s->H * s->K, values = tokens * s->HV * s->V, gates = tokens * s->HV * G;
    int64_t slots = w->decode ? N + 1 : N, state = s->HV * s->K * s->V;
    kda_problem *p = &t->problem.kda;
    kda_grads *d = &t->grads.kda;
    *p = (kda_problem){
        .B = B, .T = s->T, .N = N, .H = s->H, .HV = s->HV, .K = s->K, .V = s->V, .G = G, .cu_seqlens = w->host_table, .dtype = KL_BF16, .chunk = s->C,
        .state_layout = s->value_first ? KDA_STATE_VK : KDA_STATE_KV,
        .gate = gated ? KDA_GATE_BOUNDED : KDA_GATE_LOG, .lower_bound = gated ? -5.0f : 0.0f, .beta_kind = s->raw ? KDA_BETA_SIGMOID : KDA_BETA_PLAIN,
        .qk_l2norm = s->raw, .q = KL_TAKE(a, uint16_t, keys), .k = KL_TAKE(a, uint16_t, keys), .v = KL_TAKE(a, uint16_t, values),
        .g = G ? KL_TAKE(a, uint16_t, gates) : NULL, .beta = KL_TAKE(a, uint16_t, tokens * s->HV),
        .A_log = gated ? KL_TAKE(a, float, s->HV) : NULL, .dt_bias = gated ? KL_TAKE(a, float, s->HV * G) : NULL,
        .h0 = KL_TAKE(a, float, slots * state)};
    *d = (kda_grads){0};
    if (w->backward) {
        d->d_o = KL_TAKE(a, uint16_t, values);
        d->dht = KL_TAKE(a, float, N * state);
    }
    if (dplr) {
        int64_t all = tokens * s->HV * s->K;
        t->general = (dplr_problem){.B = B, .T = s->T, .N = N, .H = s->HV, .K = s->K, .V = s->V, .cu_seqlens = w->host_table, .dtype = KL_BF16,
                              .q = KL_TAKE(a, uint16_t, all), .k = KL_TAKE(a, uint16_t, all), .a = KL_TAKE(a, uint16_t, all),
                              .b = KL_TAKE(a, uint16_t, all), .g = KL_TAKE(a, uint16_t, all), .v = KL_TAKE(a, uint16_t, values), .h0 = p->h0};
    }
    t->outputs_at = a->used;
    p->o = KL_TAKE(a, uint16_t, values);
    p->ht = w->decode ? (void *)p->h0 : KL_TAKE(a, float, N * state);
    if (w->decode) {
        p->state_index = w->device_table;
        p->state_pool = slots;
    }
    t->general.o = p->o;
    t->general.ht = p->ht;
    if (!w->backward)
        return;
    d->dq = KL_TAKE(a, uint16_t, keys);
    d->dk = KL_TAKE(a, uint16_t, keys);
    d->dv = KL_TAKE(a, uint16_t, values);
    d->dg = G ? KL_TAKE(a, uint16_t, gates) : NULL;
    d->dbeta = KL_TAKE(a, uint16_t, tokens * s->HV);
    d->dA_log = gated ? KL_TAKE(a, float, s->HV) : NULL;
    d->ddt_bias = gated ? KL_TAKE(a, float, s->HV * G) : NULL;
    d->dh0 = KL_TAKE(a, float, N * state);
    t->cleared_count = gated ? 2 : 0;
    t->cleared[0].at = d->dA_log;
    t->cleared[0].bytes = (size_t)s->HV * sizeof(float);
    t->cleared[1].at = d->ddt_bias;
    t->cleared[1].bytes = (size_t)(s->HV * G) * sizeof(float);
}

static kl_status fill(const kl_workload *w, const kl_tensors *t, uint64_t seed)
{
    const kl_ctx *ctx = w->b->ctx;
    KL_TRY(kl_device_inputs(ctx, &t->problem.kda, w->backward ? &t->grads.kda : NULL, w->b->regime, seed));
    return w->family == KL_FAMILY_DPLR ? kl_device_general(ctx, &t->problem.kda, &t->general) : kl_ok();
}

/* Packed sequences on the host; for decoding, slots in reverse on the device. */
static kl_status tables(kl_workload *w)
{
    const kl_shape *s = &w->shape;
    int64_t N = s->length_count ? s->length_count : s->B;
    int64_t *index = malloc((size_t)(N + 1) * sizeof *index);
    if (!index)
        return kl_error(KL_ENOMEM, "bench: out of memory");
    if (s->length_count) {
        index[0] = 0;
        for (int64_t n = 0; n < N; n++)
            index[n + 1] = index[n] + s->lengths[n];
        w->host_table = index;
        return kl_ok();
    }
    for (int64_t n = 0; n < N; n++)
        index[n] = N - n;
    kl_status status = kl_ok();
    if (w->decode)
        status = kl_gpu_alloc(w->b->ctx, (void **)&w->device_table, (size_t)N * sizeof *index);
    if (w->decode && !kl_failed(status))
        status = kl_gpu_copy(w->b->ctx, w->device_table, index, (size_t)N * sizeof *index);
    free(index);
    return status;
}

/* ---- the sample ---- */

/* Heads from first to last, as many as the reference can be given. */
static void choose_heads(kl_workload *w)
{
    const kl_shape *s = &w->shape;
    double tokens = (double)(s->length_count ? 1 : s->B) * (double)s->T, group = (double)(s->HV / s->H);
    double each = 7.0 * tokens * group * (double)(s->K * s->V) * (w->backward ? 7.0 : 1.0);
    int64_t fit = (int64_t)(kl_reference_flops / each), n = fit < 1 ? 1 : fit > 4 ? 4 : fit;
    w->heads = (int)(n < s->H ? n : s->H);
    for (int i = 0; i < w->heads; i++)
        w->head[i] = w->heads == 1 ? s->H / 2 : i * (s->H - 1) / (w->heads - 1);
}

static kl_status make_sample(kl_workload *w)
{
    const kl_shape *s = &w->shape;
    const kda_problem *p = &w->set[0].problem.kda;
    int64_t group = s->HV / s->H;
    kl_kda_spec spec = {.B = p->B, .T = s->T, .H = w->heads, .HV = w->heads * group, .K = s->K, .V = s->V, .G = s->G, .chunk = s->C,
                        .lengths = s->length_count ? s->lengths : NULL, .sequences = s->length_count, .regime = w->b->regime,
                        .gate = p->gate, .state_layout = p->state_layout, .beta_kind = p->beta_kind, .qk_l2norm = p->qk_l2norm, .state = true,
                        .backward = w->backward, .blank = true, .seed = 1};
    kl_case kda;
    KL_TRY(kl_case_kda(&kda, &spec));
    if (w->family == KL_FAMILY_DPLR) {
        kl_status status = kl_case_dplr(&w->sample, &kda);
        kl_case_free(&kda);
        KL_TRY(status);
        w->sample.problem.dplr.cu_seqlens = w->host_table;
    } else {
        w->sample = kda;
    }
    w->sample.tolerance = w->b->regime == KL_REGIME_SLOW ? kl_tol_kda_bf16_corr : kl_tol_kda_bf16;
    int64_t tokens = p->B * s->T, width = most(s->K, group * most(s->K, s->V));
    return kl_gpu_alloc(w->b->ctx, (void **)&w->slice, (size_t)(w->heads * most(tokens * width, p->N * group * s->K * s->V)) * sizeof(float));
}

/* A tensor of the device's and its place in the sample: `width` elements for each sampled query head. */
typedef enum role { INPUT, OUTPUT, GRADIENT } role;
typedef struct pull {
    role role;
    const void *device;
    kl_dtype dtype;
    const void *host;
    int64_t rows, width;
    const int64_t *index;
} pull;

static kl_status pull_one(const kl_workload *w, const pull *x)
{
    if (!x->device || !x->host)
        return kl_ok();
    kl_slice s = {.tensor = x->device, .dtype = x->dtype, .rows = x->rows, .width = x->width, .index = x->index, .pitch = w->shape.H * x->width, .count = w->heads};
    memcpy(s.head, w->head, sizeof s.head);
    KL_TRY(kl_device_slice(w->b->ctx, w->slice, &s));
    return kl_gpu_copy(w->b->ctx, (void *)x->host, w->slice, (size_t)(x->rows * w->heads * x->width) * sizeof(float));
}

static kl_status pull_all(const kl_workload *w, role role, const pull *list, int count)
{
    for (int i = 0; i < count; i++)
        if (list[i].role == role)
            KL_TRY(pull_one(w, &list[i]));
    return kl_ok();
}

static kl_status pull_kda(const kl_workload *w, role role)
{
    const kda_problem *p = &w->set[0].problem.kda, *h = &w->sample.problem.kda;
    const kda_grads *g = &w->set[0].grads.kda, *hg = &w->sample.grads.kda;
    int64_t tokens = p->B * p->T, group = p->HV / p->H, K = p->K, V = p->V, G = p->G, state = group * K * V;
    const int64_t *slot = p->state_index;
    const pull list[] = {
        {INPUT, p->q, KL_BF16, h->q, tokens, K, NULL}, {INPUT, p->k, KL_BF16, h->k, tokens, K, NULL},
        {INPUT, p->v, KL_BF16, h->v, tokens, group * V, NULL}, {INPUT, p->g, KL_BF16, h->g, tokens, group * G, NULL},
        {INPUT, p->beta, KL_BF16, h->beta, tokens, group, NULL}, {INPUT, p->A_log, KL_F32, h->A_log, 1, group, NULL},
        {INPUT, p->dt_bias, KL_F32, h->dt_bias, 1, group * G, NULL}, {INPUT, p->h0, KL_F32, h->h0, p->N, state, slot},
        {INPUT, g->d_o, KL_BF16, hg->d_o, tokens, group * V, NULL}, {INPUT, g->dht, KL_F32, hg->dht, p->N, state, NULL},
        {OUTPUT, p->o, KL_BF16, h->o, tokens, group * V, NULL}, {OUTPUT, p->ht, KL_F32, h->ht, p->N, state, slot},
        {GRADIENT, g->dq, KL_BF16, hg->dq, tokens, K, NULL}, {GRADIENT, g->dk, KL_BF16, hg->dk, tokens, K, NULL},
        {GRADIENT, g->dv, KL_BF16, hg->dv, tokens, group * V, NULL}, {GRADIENT, g->dg, KL_BF16, hg->dg, tokens, group * G, NULL},
        {GRADIENT, g->dbeta, KL_BF16, hg->dbeta, tokens, group, NULL}, {GRADIENT, g->dA_log, KL_F32, hg->dA_log, 1, group, NULL},
        {GRADIENT, g->ddt_bias, KL_F32, hg->ddt_bias, 1, group * G, NULL}, {GRADIENT, g->dh0, KL_F32, hg->dh0, p->N, state, NULL}};
    return pull_all(w, role, list, sizeof list / sizeof *list);
}

static kl_status pull_dplr(const kl_workload *w, role role)
{
    const dplr_problem *p = &w->set[0].general, *h = &w->sample.problem.dplr;
    int64_t tokens = p->B * p->T, K = p->K, V = p->V;
    const pull list[] = {
        {INPUT, p->q, KL_BF16, h->q, tokens, K, NULL}, {INPUT, p->k, KL_BF16, h->k, tokens, K, NULL}, {INPUT, p->a, KL_BF16, h->a, tokens, K, NULL},
        {INPUT, p->b, KL_BF16, h->b, tokens, K, NULL}, {INPUT, p->g, KL_BF16, h->g, tokens, K, NULL}, {INPUT, p->v, KL_BF16, h->v, tokens, V, NULL},
        {INPUT, p->h0, KL_F32, h->h0, p->N, K * V, NULL}, {OUTPUT, p->o, KL_BF16, h->o, tokens, V, NULL}, {OUTPUT, p->ht, KL_F32, h->ht, p->N, K * V, NULL}};
    return pull_all(w, role, list, sizeof list / sizeof *list);
}

static kl_status pull_role(const kl_workload *w, role role) { return w->family == KL_FAMILY_DPLR ? pull_dplr(w, role) : pull_kda(w, role); }

/* The reference on the sampled heads. */
static kl_status expect(kl_workload *w)
{
    const kl_variant *r = kl_reference_variant(w->family);
    choose_heads(w);
    KL_TRY(make_sample(w));
    KL_TRY(pull_role(w, INPUT));
    for (kl_pass pass = kl_first_pass(w); pass <= kl_last_pass(w); pass++) {
        KL_TRY(kl_case_run(w->b->ctx, &w->sample, r, pass, &w->scratch));
        KL_TRY(kl_case_keep(&w->sample, pass));
    }
    return kl_ok();
}

static kl_status fetch(const kl_workload *w, kl_pass pass) { return pull_role(w, pass == KL_BACKWARD ? GRADIENT : OUTPUT); }

const kl_bench_ops kl_bench_kda = {complete, tables, lay_out, fill, NULL, expect, fetch};
