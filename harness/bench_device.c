/* The device's variants at one shape. Inputs are made on the device; a few heads (outputs of a head depend on that head
 * alone) come back to be scored against the reference, on the very numbers that the device computed with. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/arena.h"
#include "common/gpu.h"
#include "harness/bench.h"
#include "harness/device_inputs.h"
#include "harness/reference_variants.h"

/* Tensors of one call. Sets take turns until together they are larger than any cache. */
enum { MOST_SETS = 32, COLD_BYTES = 192 << 20 };
/* Work that the reference may be given: about a second. */
static const double reference_flops = 6e9;

typedef struct tensors {
    kda_problem p;
    kda_grads g;
    dplr_problem d;
    void *memory;
    size_t bytes, outputs_at; /* all of it; where inputs end */
} tensors;

typedef struct workload {
    kl_bench *b;
    kl_family family;
    kl_shape shape;
    bool forward, backward, decode;
    const kl_variant *variant;
    int64_t *cu, *slot;        /* on the host; on the device */
    int sets;
    tensors set[MOST_SETS];
    int heads;
    int64_t head[KL_SLICE_HEADS];
    kl_case sample;            /* those heads alone, on the host */
    kl_scratch scratch;        /* of the reference */
    void *workspace;
    size_t workspace_bytes;
    float *slice;              /* on the device */
} workload;

/* ---- tensors ---- */

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* bf16 throughout, float states and gate parameters. Runs over NULL to count, then over device memory. */
static void lay_out(const workload *w, tensors *t, kl_arena *a)
{
    const kl_shape *s = &w->shape;
    bool gated = s->raw && s->G > 0, dplr = w->family == KL_FAMILY_DPLR;
    int64_t B = s->length_count ? 1 : s->B, N = s->length_count ? s->length_count : s->B, G = s->G < 0 ? 0 : s->G;
    int64_t tokens = B * s->T, keys = tokens * s->H * s->K, values = tokens * s->HV * s->V, gates = tokens * s->HV * G;
    int64_t slots = w->decode ? N + 1 : N, state = s->HV * s->K * s->V;
    t->p = (kda_problem){
        .B = B, .T = s->T, .N = N, .H = s->H, .HV = s->HV, .K = s->K, .V = s->V, .G = G, .cu_seqlens = w->cu, .dtype = KL_BF16, .chunk = s->C,
        .gate = gated ? KDA_GATE_BOUNDED : KDA_GATE_LOG, .lower_bound = gated ? -5.0f : 0.0f, .beta_kind = s->raw ? KDA_BETA_SIGMOID : KDA_BETA_PLAIN,
        .qk_l2norm = s->raw, .q = KL_TAKE(a, uint16_t, keys), .k = KL_TAKE(a, uint16_t, keys), .v = KL_TAKE(a, uint16_t, values),
        .g = G ? KL_TAKE(a, uint16_t, gates) : NULL, .beta = KL_TAKE(a, uint16_t, tokens * s->HV),
        .A_log = gated ? KL_TAKE(a, float, s->HV) : NULL, .dt_bias = gated ? KL_TAKE(a, float, s->HV * G) : NULL,
        .h0 = KL_TAKE(a, float, slots * state)};
    t->g = (kda_grads){0};
    if (w->backward) {
        t->g.d_o = KL_TAKE(a, uint16_t, values);
        t->g.dht = KL_TAKE(a, float, N * state);
    }
    if (dplr) {
        int64_t all = tokens * s->HV * s->K;
        t->d = (dplr_problem){.B = B, .T = s->T, .N = N, .H = s->HV, .K = s->K, .V = s->V, .cu_seqlens = w->cu, .dtype = KL_BF16,
                              .q = KL_TAKE(a, uint16_t, all), .k = KL_TAKE(a, uint16_t, all), .a = KL_TAKE(a, uint16_t, all),
                              .b = KL_TAKE(a, uint16_t, all), .g = KL_TAKE(a, uint16_t, all), .v = KL_TAKE(a, uint16_t, values), .h0 = t->p.h0};
    }
    t->outputs_at = a->used;
    t->p.o = KL_TAKE(a, uint16_t, values);
    t->p.ht = w->decode ? (void *)t->p.h0 : KL_TAKE(a, float, N * state);
    if (w->decode) {
        t->p.state_index = w->slot;
        t->p.state_pool = slots;
    }
    t->d.o = t->p.o;
    t->d.ht = t->p.ht;
    if (!w->backward)
        return;
    t->g.dq = KL_TAKE(a, uint16_t, keys);
    t->g.dk = KL_TAKE(a, uint16_t, keys);
    t->g.dv = KL_TAKE(a, uint16_t, values);
    t->g.dg = G ? KL_TAKE(a, uint16_t, gates) : NULL;
    t->g.dbeta = KL_TAKE(a, uint16_t, tokens * s->HV);
    t->g.dA_log = gated ? KL_TAKE(a, float, s->HV) : NULL;
    t->g.ddt_bias = gated ? KL_TAKE(a, float, s->HV * G) : NULL;
    t->g.dh0 = KL_TAKE(a, float, N * state);
}

static kl_status fill(const workload *w, const tensors *t, uint64_t seed)
{
    const kl_ctx *ctx = w->b->ctx;
    KL_TRY(kl_device_inputs(ctx, &t->p, w->backward ? &t->g : NULL, w->b->regime, seed));
    return w->family == KL_FAMILY_DPLR ? kl_device_general(ctx, &t->p, &t->d) : kl_ok();
}

static kl_status make_tensors(workload *w)
{
    kl_arena a = kl_arena_count();
    tensors size;
    lay_out(w, &size, &a);
    KL_REQUIRE(!a.overflow, "bench: the tensors do not fit size_t");
    w->sets = (int)most(1, (int64_t)((COLD_BYTES + a.used - 1) / a.used));
    w->sets = kl_gpu_emulated() && w->sets > 2 ? 2 : w->sets > MOST_SETS ? MOST_SETS : w->sets;
    for (int i = 0; i < w->sets; i++) {
        tensors *t = &w->set[i];
        KL_TRY(kl_gpu_alloc(w->b->ctx, &t->memory, a.used));
        kl_arena over = kl_arena_over(t->memory, a.used);
        lay_out(w, t, &over);
        t->bytes = a.used;
        KL_TRY(fill(w, t, (uint64_t)i + 1));
    }
    return kl_ok();
}

/* Packed sequences on the host; for decoding, slots in reverse on the device. */
static kl_status make_indices(workload *w)
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
        w->cu = index;
        return kl_ok();
    }
    for (int64_t n = 0; n < N; n++)
        index[n] = N - n;
    kl_status status = kl_ok();
    if (w->decode)
        status = kl_gpu_alloc(w->b->ctx, (void **)&w->slot, (size_t)N * sizeof *index);
    if (w->decode && !kl_failed(status))
        status = kl_gpu_copy(w->b->ctx, w->slot, index, (size_t)N * sizeof *index);
    free(index);
    return status;
}

static void finish(workload *w)
{
    for (int i = 0; i < w->sets; i++)
        if (w->set[i].memory)
            kl_gpu_free(w->b->ctx, w->set[i].memory);
    if (w->slot)
        kl_gpu_free(w->b->ctx, w->slot);
    if (w->slice)
        kl_gpu_free(w->b->ctx, w->slice);
    if (w->workspace)
        kl_gpu_free(w->b->ctx, w->workspace);
    kl_case_free(&w->sample);
    kl_scratch_free(&w->scratch);
    free(w->cu);
}

/* ---- the sample ---- */

/* Heads from first to last, as many as the reference can be given. */
static void choose_heads(workload *w)
{
    const kl_shape *s = &w->shape;
    double tokens = (double)(s->length_count ? 1 : s->B) * (double)s->T, group = (double)(s->HV / s->H);
    double each = 7.0 * tokens * group * (double)(s->K * s->V) * (w->backward ? 7.0 : 1.0);
    int64_t fit = (int64_t)(reference_flops / each), n = fit < 1 ? 1 : fit > 4 ? 4 : fit;
    w->heads = (int)(n < s->H ? n : s->H);
    for (int i = 0; i < w->heads; i++)
        w->head[i] = w->heads == 1 ? s->H / 2 : i * (s->H - 1) / (w->heads - 1);
}

static kl_status make_sample(workload *w)
{
    const kl_shape *s = &w->shape;
    const tensors *t = &w->set[0];
    int64_t group = s->HV / s->H;
    kl_kda_spec spec = {.B = t->p.B, .T = s->T, .H = w->heads, .HV = w->heads * group, .K = s->K, .V = s->V, .G = s->G, .chunk = s->C,
                        .lengths = s->length_count ? s->lengths : NULL, .sequences = s->length_count, .regime = w->b->regime,
                        .gate = t->p.gate, .beta_kind = t->p.beta_kind, .qk_l2norm = t->p.qk_l2norm, .state = true,
                        .backward = w->backward, .blank = true, .seed = 1};
    kl_case kda;
    KL_TRY(kl_case_kda(&kda, &spec));
    if (w->family == KL_FAMILY_DPLR) {
        kl_status status = kl_case_dplr(&w->sample, &kda);
        kl_case_free(&kda);
        KL_TRY(status);
        w->sample.problem.dplr.cu_seqlens = w->cu;
    } else {
        w->sample = kda;
    }
    w->sample.tolerance = w->b->regime == KL_REGIME_SLOW ? kl_tol_kda_bf16_corr : kl_tol_kda_bf16;
    int64_t tokens = t->p.B * s->T, width = most(s->K, group * most(s->K, s->V));
    return kl_gpu_alloc(w->b->ctx, (void **)&w->slice, (size_t)(w->heads * most(tokens * width, t->p.N * group * s->K * s->V)) * sizeof(float));
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

static kl_status pull_one(const workload *w, const pull *x)
{
    if (!x->device || !x->host)
        return kl_ok();
    kl_slice s = {.tensor = x->device, .dtype = x->dtype, .rows = x->rows, .width = x->width, .index = x->index, .pitch = w->shape.H * x->width, .count = w->heads};
    memcpy(s.head, w->head, sizeof s.head);
    KL_TRY(kl_device_slice(w->b->ctx, w->slice, &s));
    return kl_gpu_copy(w->b->ctx, (void *)x->host, w->slice, (size_t)(x->rows * w->heads * x->width) * sizeof(float));
}

static kl_status pull_all(const workload *w, role role, const pull *list, int count)
{
    for (int i = 0; i < count; i++)
        if (list[i].role == role)
            KL_TRY(pull_one(w, &list[i]));
    return kl_ok();
}

static kl_status pull_kda(const workload *w, role role)
{
    const kda_problem *p = &w->set[0].p, *h = &w->sample.problem.kda;
    const kda_grads *g = &w->set[0].g, *hg = &w->sample.grads.kda;
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

static kl_status pull_dplr(const workload *w, role role)
{
    const dplr_problem *p = &w->set[0].d, *h = &w->sample.problem.dplr;
    int64_t tokens = p->B * p->T, K = p->K, V = p->V;
    const pull list[] = {
        {INPUT, p->q, KL_BF16, h->q, tokens, K, NULL}, {INPUT, p->k, KL_BF16, h->k, tokens, K, NULL}, {INPUT, p->a, KL_BF16, h->a, tokens, K, NULL},
        {INPUT, p->b, KL_BF16, h->b, tokens, K, NULL}, {INPUT, p->g, KL_BF16, h->g, tokens, K, NULL}, {INPUT, p->v, KL_BF16, h->v, tokens, V, NULL},
        {INPUT, p->h0, KL_F32, h->h0, p->N, K * V, NULL}, {OUTPUT, p->o, KL_BF16, h->o, tokens, V, NULL}, {OUTPUT, p->ht, KL_F32, h->ht, p->N, K * V, NULL}};
    return pull_all(w, role, list, sizeof list / sizeof *list);
}

static kl_status pull_role(const workload *w, role role) { return w->family == KL_FAMILY_DPLR ? pull_dplr(w, role) : pull_kda(w, role); }

static kl_status reference(workload *w)
{
    const kl_variant *r = kl_reference_variant(w->family);
    KL_TRY(pull_role(w, INPUT));
    for (kl_pass pass = w->forward ? KL_FORWARD : KL_BACKWARD; pass <= (w->backward ? KL_BACKWARD : KL_FORWARD); pass++) {
        KL_TRY(kl_case_run(w->b->ctx, &w->sample, r, pass, &w->scratch));
        KL_TRY(kl_case_keep(&w->sample, pass));
    }
    return kl_ok();
}

/* ---- running ---- */

static const void *problem(const workload *w, int set)
{
    return w->family == KL_FAMILY_DPLR ? (const void *)&w->set[set].d : &w->set[set].p;
}

static kl_status launch(void *user, int set)
{
    const workload *w = user;
    if (w->forward)
        KL_TRY(w->variant->forward(w->b->ctx, problem(w, set), w->workspace, w->workspace_bytes));
    return w->backward ? w->variant->backward(w->b->ctx, problem(w, set), &w->set[set].g, w->workspace, w->workspace_bytes) : kl_ok();
}

static kl_status clear_gradients(const workload *w)
{
    const kda_problem *p = &w->set[0].p;
    const kda_grads *g = &w->set[0].g;
    if (g->dA_log)
        KL_TRY(kl_gpu_fill(w->b->ctx, g->dA_log, 0, (size_t)p->HV * sizeof(float)));
    return g->ddt_bias ? kl_gpu_fill(w->b->ctx, g->ddt_bias, 0, (size_t)(p->HV * p->G) * sizeof(float)) : kl_ok();
}

/* Runs once on fresh inputs and poisoned outputs and workspace, and scores the sampled heads. */
static kl_status score(workload *w, kl_bench_row *row)
{
    const tensors *t = &w->set[0];
    const kl_ctx *ctx = w->b->ctx;
    KL_TRY(fill(w, t, 1));
    KL_TRY(kl_gpu_fill(ctx, (char *)t->memory + t->outputs_at, 0xff, t->bytes - t->outputs_at));
    KL_TRY(kl_gpu_fill(ctx, w->workspace, 0xff, w->workspace_bytes));
    KL_TRY(clear_gradients(w));
    KL_TRY(launch(w, 0));
    KL_TRY(kl_gpu_sync(ctx));
    for (kl_pass pass = w->forward ? KL_FORWARD : KL_BACKWARD; pass <= (w->backward ? KL_BACKWARD : KL_FORWARD); pass++) {
        const kl_tolerance *limit = &w->sample.tolerance;
        KL_TRY(pull_role(w, pass == KL_BACKWARD ? GRADIENT : OUTPUT));
        double err = kl_case_worst(&w->sample, pass, NULL), most = pass == KL_BACKWARD ? limit->gradient : limit->forward;
        for (int i = 0; i < w->sample.count; i++)
            if (w->sample.tensor[i].gradient == (pass == KL_BACKWARD))
                row->err_part = fmax(row->err_part, kl_case_error_blocks(&w->sample.tensor[i]));
        /* Of two passes the one that is closer to its limit. */
        if (row->err_limit == 0.0 || !(err / most <= row->err / row->err_limit)) {
            row->err = err;
            row->err_limit = most;
        }
    }
    return kl_ok();
}

static kl_status offers(const workload *w)
{
    KL_TRY(w->forward ? w->variant->check(problem(w, 0), KL_FORWARD) : kl_ok());
    if (w->backward && !w->variant->backward)
        return kl_error(KL_EUNSUPPORTED, "it has no backward pass");
    return w->backward ? w->variant->check(problem(w, 0), KL_BACKWARD) : kl_ok();
}

static kl_status make_workspace(workload *w)
{
    size_t need = 0;
    for (kl_pass pass = w->forward ? KL_FORWARD : KL_BACKWARD; w->variant->workspace && pass <= (w->backward ? KL_BACKWARD : KL_FORWARD); pass++) {
        size_t bytes = w->variant->workspace(w->b->ctx, problem(w, 0), pass);
        need = bytes > need ? bytes : need;
    }
    if (w->workspace)
        kl_gpu_free(w->b->ctx, w->workspace);
    w->workspace = NULL;
    w->workspace_bytes = need;
    return kl_gpu_alloc(w->b->ctx, &w->workspace, need);
}

static kl_status bench_variant(workload *w, kl_bench_pass pass, double *seconds)
{
    kl_device_times times;
    const kl_variant *v = w->variant;
    kl_bench_row row = {.family = v->family, .variant = v->name, .gate = kl_regime_name(w->b->regime), .pass = pass, .shape = &w->shape,
                        .device = &times, .memory_gbps = w->b->ceilings.copy_gbps, .memory_name = "copy"};
    KL_TRY(make_workspace(w));
    KL_TRY(score(w, &row));
    KL_TRY(kl_bench_time_device(w->b, launch, w, w->sets, &times));
    row.seconds = times.graph.runs ? times.graph : times.pipelined;
    if (strcmp(v->name, "chunk") == 0)
        *seconds = row.seconds.median;
    for (kl_pass half = w->forward ? KL_FORWARD : KL_BACKWARD; half <= (w->backward ? KL_BACKWARD : KL_FORWARD); half++) {
        kl_cost cost = v->cost(problem(w, 0), half);
        row.cost.flops += cost.flops;
        row.cost.bytes += cost.bytes;
    }
    if (w->heads < w->shape.H) {
        row.err_head_count = w->heads;
        memcpy(row.err_heads, w->head, sizeof row.err_heads);
    }
    row.workspace_bytes = w->workspace_bytes;
    row.peak_bytes = w->set[0].bytes + w->workspace_bytes;
    return kl_bench_emit(w->b, &row);
}

static kl_status bench_all(workload *w, kl_bench_pass pass, double *seconds)
{
    int count, offered = 0;
    const kl_variant *list = kl_family_variants(w->family, &count);
    bool prepared = false;
    for (int i = 0; i < count; i++) {
        if (list[i].device != KL_CUDA || (w->b->variant && strcmp(w->b->variant, list[i].name) != 0))
            continue;
        if (!prepared) {
            KL_TRY(make_indices(w));
            KL_TRY(make_tensors(w));
            choose_heads(w);
            KL_TRY(make_sample(w));
            prepared = true;
        }
        w->variant = &list[i];
        kl_status s = offers(w);
        if (s.code == KL_EUNSUPPORTED) {
            if (!w->b->quiet)
                printf("%-6s %-7s %-11s not offered: %s\n", list[i].family, kl_bench_pass_name(pass), list[i].name, s.message);
            continue;
        }
        KL_TRY(s);
        if (!offered++)
            KL_TRY(reference(w));
        KL_TRY(kl_error_in(bench_variant(w, pass, seconds), "%s %s", list[i].family, list[i].name));
    }
    return kl_ok();
}

kl_status kl_bench_device(kl_bench *b, kl_family family, const kl_shape *s, kl_bench_pass pass, double *seconds)
{
    *seconds = 0.0;
    workload *w = calloc(1, sizeof *w);
    if (!w)
        return kl_error(KL_ENOMEM, "bench: out of memory");
    *w = (workload){.b = b, .family = family, .shape = *s, .decode = pass == KL_BENCH_DECODE, .forward = pass != KL_BENCH_BWD,
                    .backward = pass == KL_BENCH_BWD || pass == KL_BENCH_FWDBWD};
    kl_shape *shape = &w->shape;
    shape->B = shape->B ? shape->B : 1;
    shape->HV = shape->HV ? shape->HV : shape->H;
    shape->V = shape->V ? shape->V : shape->K;
    shape->G = shape->G == 0 ? shape->K : shape->G;
    shape->N = shape->length_count ? shape->length_count : shape->B;
    kl_status status = kl_ok();
    if (shape->HV % shape->H)
        status = kl_error(KL_EINVAL, "--shapes: HV: expected a multiple of H = %lld, got %lld", (long long)shape->H, (long long)shape->HV);
    if (!kl_failed(status) && family == KL_FAMILY_DPLR && (shape->raw || shape->HV != shape->H))
        status = kl_error(KL_EINVAL, "--shapes: dplr: expected raw = 0 and HV = H beside it");
    if (!kl_failed(status))
        status = bench_all(w, pass, seconds);
    finish(w);
    free(w);
    return status;
}
