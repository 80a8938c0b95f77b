/* A mixture of experts on a device: some tokens are scored, and one feature of one expert's weight gradients, each worked out in double
 * precision from the inputs that the device has. Weights come to the host an expert at a time. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "harness/bench_device.h"

/* Tokens of the sample; choices a token; what a choice must stand apart for rounding not to change it. */
enum { MOST_TOKENS = 4, MOST_CHOICES = 64 };
static const double CLEAR = 1e-4;

static kl_status complete(kl_workload *w)
{
    kl_shape *s = &w->shape;
    s->weight = KL_BF16;
    KL_REQUIRE(s->D >= 1 && (s->E == 0 || s->I >= 1), "--shapes: moe: expected D and I of at least 1");
    KL_REQUIRE(s->E == 0 || (s->top_k >= 1 && s->top_k <= s->E && s->top_k <= MOST_CHOICES), "--shapes: moe: top_k: expected 1 to E and at most %d", MOST_CHOICES);
    return kl_ok();
}

/* ---- tensors ---- */

enum { W1, W3, W2, DW1, DW3, DW2, TABLES };

/* For every set, and for counting: pointers [TABLES,E]. */
static kl_status tables(kl_workload *w)
{
    w->host_table = calloc((size_t)((KL_MOST_SETS + 1) * TABLES * w->shape.E + 1), sizeof *w->host_table);
    return w->host_table ? kl_ok() : kl_error(KL_ENOMEM, "bench: out of memory");
}

static void **table_of(const kl_workload *w, const kl_tensors *t, int which)
{
    int set = 0;
    while (set < KL_MOST_SETS && t != &w->set[set])
        set++;
    return (void **)w->host_table + (set * TABLES + which) * w->shape.E;
}

static void *take_experts(const kl_workload *w, const kl_tensors *t, kl_arena *a, int which)
{
    const kl_shape *s = &w->shape;
    size_t size = which < DW1 ? sizeof(uint16_t) : sizeof(float), expert = (size_t)(s->D * s->I) * size;
    char *memory = kl_arena_take(a, (size_t)s->E, expert);
    void **table = table_of(w, t, which);
    for (int64_t e = 0; memory && e < s->E; e++)
        table[e] = memory + (size_t)e * expert;
    return table;
}

static void lay_out(const kl_workload *w, kl_tensors *t, kl_arena *a)
{
    const kl_shape *s = &w->shape;
    int64_t tokens = s->T * s->D, choices = s->E ? s->T * s->top_k : 0, shared = s->D * s->Is;
    moe_problem *p = &t->problem.moe;
    moe_grads *d = &t->grads.moe;
    *p = (moe_problem){.T = s->T, .D = s->D, .E = s->E, .I = s->E ? s->I : 0, .top_k = s->E ? s->top_k : 0, .Is = s->Is, .renormalize = true, .scale = 2.446f,
                       .dtype = KL_BF16, .weight_dtype = KL_BF16, .router_dtype = KL_BF16, .x = KL_TAKE(a, uint16_t, tokens),
                       .router = KL_TAKE(a, uint16_t, s->E * s->D), .bias = KL_TAKE(a, float, s->E), .w1 = take_experts(w, t, a, W1),
                       .w3 = take_experts(w, t, a, W3), .w2 = take_experts(w, t, a, W2), .shared_w1 = KL_TAKE(a, uint16_t, shared),
                       .shared_w3 = KL_TAKE(a, uint16_t, shared), .shared_w2 = KL_TAKE(a, uint16_t, shared)};
    *d = (moe_grads){.dy = w->backward ? KL_TAKE(a, uint16_t, tokens) : NULL};
    t->outputs_at = a->used;
    p->y = KL_TAKE(a, uint16_t, tokens);
    p->chosen = KL_TAKE(a, int32_t, choices);
    p->chosen_weight = KL_TAKE(a, float, choices);
    if (!w->backward)
        return;
    d->dx = KL_TAKE(a, uint16_t, tokens);
    size_t from = a->used;
    d->drouter = KL_TAKE(a, float, s->E * s->D);
    d->dw1 = take_experts(w, t, a, DW1);
    d->dw3 = take_experts(w, t, a, DW3);
    d->dw2 = take_experts(w, t, a, DW2);
    d->dshared_w1 = KL_TAKE(a, float, shared);
    d->dshared_w3 = KL_TAKE(a, float, shared);
    d->dshared_w2 = KL_TAKE(a, float, shared);
    t->cleared_count = 1;
    t->cleared[0].at = d->drouter;
    t->cleared[0].bytes = a->used - from;
}

/* No bias: random routers are even enough without. */
static kl_status fill(const kl_workload *w, const kl_tensors *t, uint64_t seed)
{
    const kl_shape *s = &w->shape;
    const moe_problem *p = &t->problem.moe;
    int64_t expert = s->E * s->I * s->D, shared = s->Is * s->D, tokens = s->T * s->D;
    float by_d = 1.0f / sqrtf((float)s->D), by_i = s->I ? 1.0f / sqrtf((float)s->I) : 0.0f, by_is = s->Is ? 1.0f / sqrtf((float)s->Is) : 0.0f;
    const struct { const void *x; int64_t count; float stddev; } drawn[] = {
        {p->x, tokens, 1.0f}, {p->router, s->E * s->D, by_d}, {s->E ? p->w1[0] : NULL, expert, by_d}, {s->E ? p->w3[0] : NULL, expert, by_d},
        {s->E ? p->w2[0] : NULL, expert, by_i}, {p->shared_w1, shared, by_d}, {p->shared_w3, shared, by_d}, {p->shared_w2, shared, by_is},
        {t->grads.moe.dy, tokens, 1.0f}};
    KL_TRY(kl_gpu_fill(w->b->ctx, (void *)p->bias, 0, (size_t)s->E * sizeof(float)));
    for (size_t i = 0; i < sizeof drawn / sizeof *drawn; i++)
        if (drawn[i].x && drawn[i].count)
            KL_TRY(kl_device_normal(w->b->ctx, (void *)drawn[i].x, KL_BF16, drawn[i].count, drawn[i].stddev, 16 * seed + i));
    return kl_ok();
}

/* ---- the sample ---- */

typedef struct token {
    int64_t at;
    int64_t id[MOST_CHOICES];
    double score[MOST_CHOICES], weight[MOST_CHOICES], dc[MOST_CHOICES], sum;
} token;

typedef struct sample {
    int64_t count, expert, feature; /* whose gradients are looked at; expert -1: none's */
    token token[MOST_TOKENS];
    uint16_t *router, *w1, *w3, *w2; /* [E,D]; of one expert at a time [width,D], [width,D], [D,width] */
    double *x, *dy, *y, *dx;         /* of one token [D] */
    double *a, *b, *dm;              /* [width] */
    uint16_t *row;                   /* [D] */
    int32_t *chosen;                 /* [T,top_k], as the device chose */
} sample;

static double as_double(uint16_t x) { return (double)kl_bf16_to_f32(x); }

static kl_status pull(const kl_workload *w, void *host, const void *device, size_t element, int64_t first, int64_t count)
{
    return kl_gpu_copy(w->b->ctx, host, (const char *)device + (size_t)first * element, (size_t)count * element);
}

static kl_status pull_row(const kl_workload *w, sample *s, const void *rows, int64_t t, double *out)
{
    KL_TRY(pull(w, s->row, rows, 2, t * w->shape.D, w->shape.D));
    for (int64_t d = 0; d < w->shape.D; d++)
        out[d] = as_double(s->row[d]);
    return kl_ok();
}

static double dot(const uint16_t *w, const double *x, int64_t n)
{
    double sum[4] = {0};
    for (int64_t i = 0; i < n; i++)
        sum[i % 4] += as_double(w[i]) * x[i];
    return sum[0] + sum[1] + sum[2] + sum[3];
}

/* y [rows] = w x;  y [columns] += w^T x */
static void times(const uint16_t *w, int64_t rows, int64_t columns, const double *x, double *y)
{
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++)
        y[i] = dot(w + i * columns, x, columns);
}
static void add_transposed(const uint16_t *w, int64_t rows, int64_t columns, const double *x, double *y)
{
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < columns; first += 32)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = first; j < first + 32 && j < columns; j++)
                y[j] += x[i] * as_double(w[i * columns + j]);
}

/* The top_k of sigmoid(router x), and how far the next one is from the last of them. */
static double route(const kl_workload *w, const sample *s, token *t)
{
    const moe_problem *p = &w->set[0].problem.moe;
    double *score = malloc((size_t)p->E * sizeof *score), last = 0.0;
    times(s->router, p->E, p->D, s->x, score);
    for (int64_t e = 0; e < p->E; e++)
        score[e] = 1.0 / (1.0 + exp(-score[e]));
    t->sum = 1e-20;
    for (int64_t k = 0; k <= p->top_k && k < p->E; k++) {
        int64_t best = 0;
        for (int64_t e = 1; e < p->E; e++)
            if (score[e] > score[best])
                best = e;
        if (k == p->top_k) {
            last -= score[best];
            break;
        }
        t->id[k] = best;
        t->sum += t->score[k] = last = score[best];
        score[best] = -1.0;
    }
    for (int64_t k = 0; k < p->top_k; k++)
        t->weight[k] = (double)p->scale * t->score[k] / t->sum;
    free(score);
    return last;
}

/* Tokens spread evenly over all, moved on where a choice is not clear. */
static kl_status choose_tokens(kl_workload *w, sample *s)
{
    const moe_problem *p = &w->set[0].problem.moe;
    int64_t count = p->T < MOST_TOKENS ? p->T : MOST_TOKENS;
    for (int64_t i = 0, from = 0; i < count; i++) {
        int64_t even = count > 1 ? i * (p->T - 1) / (count - 1) : 0;
        for (int64_t t = even < from ? from : even; t < p->T; t++) {
            token *at = &s->token[s->count];
            *at = (token){.at = t};
            KL_TRY(pull_row(w, s, p->x, t, s->x));
            from = t + 1;
            if (p->E == 0 || route(w, s, at) > CLEAR) {
                s->count++;
                break;
            }
        }
    }
    KL_REQUIRE(s->count > 0 || p->T == 0, "bench: no token was found whose choice of experts is clear");
    w->rows = s->count < p->T ? s->count : 0;
    return kl_ok();
}

static kl_status pull_expert(const kl_workload *w, sample *s, int64_t e)
{
    const moe_problem *p = &w->set[0].problem.moe;
    int64_t size = p->D * (e < 0 ? p->Is : p->I);
    KL_TRY(pull(w, s->w1, e < 0 ? p->shared_w1 : p->w1[e], 2, 0, size));
    KL_TRY(pull(w, s->w3, e < 0 ? p->shared_w3 : p->w3[e], 2, 0, size));
    return pull(w, s->w2, e < 0 ? p->shared_w2 : p->w2[e], 2, 0, size);
}

/* y += c expert(x) */
static void add_expert(sample *s, int64_t D, int64_t width, double c)
{
    times(s->w1, width, D, s->x, s->a);
    times(s->w3, width, D, s->x, s->b);
    for (int64_t i = 0; i < width; i++)
        s->a[i] *= s->b[i] / (1.0 + exp(-s->a[i]));
#pragma omp parallel for schedule(static)
    for (int64_t d = 0; d < D; d++)
        s->y[d] += c * dot(s->w2 + d * width, s->a, width);
}

/* dx += w1^T da + w3^T db, as moe/README.md has it; dc. */
static double add_expert_back(sample *s, int64_t D, int64_t width, double c)
{
    double dc = 0.0;
    times(s->w1, width, D, s->x, s->a);
    times(s->w3, width, D, s->x, s->b);
    memset(s->dm, 0, (size_t)width * sizeof *s->dm);
    add_transposed(s->w2, D, width, s->dy, s->dm);
    for (int64_t i = 0; i < width; i++) {
        double a = s->a[i], b = s->b[i], t = 1.0 / (1.0 + exp(-a)), dm = c * s->dm[i];
        dc += s->dm[i] * a * t * b;
        s->a[i] = dm * b * (t + a * t * (1.0 - t));
        s->b[i] = dm * a * t;
    }
    add_transposed(s->w1, width, D, s->a, s->dx);
    add_transposed(s->w3, width, D, s->b, s->dx);
    return dc;
}

/* y of a sampled token, or dx. */
static kl_status work_out(const kl_workload *w, sample *s, token *t)
{
    const moe_problem *p = &w->set[0].problem.moe;
    double mean = 0.0;
    KL_TRY(pull_row(w, s, p->x, t->at, s->x));
    if (w->backward)
        KL_TRY(pull_row(w, s, w->set[0].grads.moe.dy, t->at, s->dy));
    for (int64_t k = p->Is ? -1 : 0; k < p->top_k; k++) {
        int64_t width = k < 0 ? p->Is : p->I;
        double c = k < 0 ? 1.0 : t->weight[k], dc = 0.0;
        KL_TRY(pull_expert(w, s, k < 0 ? -1 : t->id[k]));
        if (w->backward)
            dc = add_expert_back(s, p->D, width, c);
        else
            add_expert(s, p->D, width, c);
        if (k >= 0)
            mean += (t->dc[k] = dc) * c;
    }
    for (int64_t k = 0; w->backward && k < p->top_k; k++) {
        double ds = ((double)p->scale * t->dc[k] - mean) / t->sum, dl = t->score[k] * (1.0 - t->score[k]) * ds;
        add_transposed(s->router + t->id[k] * p->D, 1, p->D, &dl, s->dx);
    }
    return kl_ok();
}

static kl_status want(kl_case_tensor *t, const char *name, int64_t rows, int64_t width, bool gradient, float **out)
{
    *t = (kl_case_tensor){.name = name, .out = *out, .want = calloc((size_t)(rows * width), sizeof(double)), .T = rows, .H = 1, .D = width, .gradient = gradient};
    *out += rows * width;
    return t->want ? kl_ok() : kl_error(KL_ENOMEM, "bench: out of memory");
}

/* Row `feature` of dw1 and dw3 and column `feature` of dw2 of one expert, over the tokens that the device gave it. */
static kl_status expect_feature(kl_workload *w, sample *s, double *dw1, double *dw3, double *dw2)
{
    const moe_problem *p = &w->set[0].problem.moe;
    int64_t D = p->D, I = p->I, i = s->feature;
    float *weight = malloc((size_t)(p->T * p->top_k) * sizeof *weight);
    kl_status status = weight ? pull(w, weight, p->chosen_weight, sizeof *weight, 0, p->T * p->top_k) : kl_error(KL_ENOMEM, "bench: out of memory");
    if (!kl_failed(status))
        status = pull_expert(w, s, s->expert);
    for (int64_t n = 0; !kl_failed(status) && n < p->T * p->top_k; n++) {
        if (s->chosen[n] != s->expert)
            continue;
        status = pull_row(w, s, p->x, n / p->top_k, s->x);
        if (!kl_failed(status))
            status = pull_row(w, s, w->set[0].grads.moe.dy, n / p->top_k, s->dy);
        double a = dot(s->w1 + i * D, s->x, D), b = dot(s->w3 + i * D, s->x, D), c = (double)weight[n], t = 1.0 / (1.0 + exp(-a)), dm = 0.0;
        for (int64_t d = 0; d < D; d++)
            dm += as_double(s->w2[d * I + i]) * s->dy[d];
        for (int64_t d = 0; d < D; d++) {
            dw1[d] += c * dm * b * (t + a * t * (1.0 - t)) * s->x[d];
            dw3[d] += c * dm * a * t * s->x[d];
            dw2[d] += c * a * t * b * s->dy[d];
        }
    }
    free(weight);
    return status;
}

/* How the device routes, for what a token of the sample alone cannot tell: who comes with it, and which experts nobody chose. */
static kl_status ask_device(kl_workload *w, sample *s)
{
    const moe_problem *p = &w->set[0].problem.moe;
    size_t bytes = moe_workspace(w->b->ctx, p, KL_FORWARD);
    void *workspace;
    KL_TRY(kl_gpu_alloc(w->b->ctx, &workspace, bytes));
    kl_status status = moe_forward(w->b->ctx, p, workspace, bytes);
    if (!kl_failed(status))
        status = pull(w, s->chosen, p->chosen, sizeof *s->chosen, 0, p->T * p->top_k);
    kl_gpu_free(w->b->ctx, workspace);
    KL_TRY(status);
    bool *met = calloc((size_t)p->E + 1, sizeof *met);
    if (!met)
        return kl_error(KL_ENOMEM, "bench: out of memory");
    int64_t idle = p->E < p->T * p->top_k ? p->E : p->T * p->top_k;
    for (int64_t n = 0; n < p->T * p->top_k; n++) {
        int32_t e = s->chosen[n];
        if (e >= 0 && e < p->E && !met[e]) {
            met[e] = true;
            idle--;
        }
    }
    free(met);
    double weights = 3.0 * (double)idle * (double)(p->D * p->I);
    w->spared[KL_FORWARD].bytes = 2.0 * weights;
    w->spared[KL_BACKWARD].bytes = (2.0 + 8.0) * weights;
    return kl_ok();
}

static kl_status expect_all(kl_workload *w, sample *s)
{
    const moe_problem *p = &w->set[0].problem.moe;
    kl_case *c = &w->sample;
    float *out = c->memory;
    int64_t D = p->D;
    if (p->E) {
        KL_TRY(pull(w, s->router, p->router, 2, 0, p->E * D));
        KL_TRY(ask_device(w, s));
    }
    KL_TRY(choose_tokens(w, s));
    KL_TRY(want(&c->tensor[c->count++], w->backward ? "dx" : "y", s->count, D, w->backward, &out));
    for (int64_t i = 0; i < s->count; i++) {
        s->y = s->dx = c->tensor[0].want + i * D;
        KL_TRY(work_out(w, s, &s->token[i]));
    }
    s->expert = -1;
    if (!w->backward || !p->E || !s->count)
        return kl_ok();
    static const char *const names[] = {"dw1", "dw3", "dw2"};
    s->expert = s->token[0].id[0];
    s->feature = p->I / 2;
    for (int i = 0; i < 3; i++)
        KL_TRY(want(&c->tensor[c->count++], names[i], 1, D, true, &out));
    return expect_feature(w, s, c->tensor[1].want, c->tensor[2].want, c->tensor[3].want);
}

static kl_status expect(kl_workload *w)
{
    const moe_problem *p = &w->set[0].problem.moe;
    int64_t D = p->D, width = p->I > p->Is ? p->I : p->Is;
    kl_arena a = kl_arena_count();
    for (int real = 0; real < 2; real++) {
        sample *s = KL_TAKE(&a, sample, 1);
        sample made = {.router = KL_TAKE(&a, uint16_t, p->E * D), .w1 = KL_TAKE(&a, uint16_t, width * D), .w3 = KL_TAKE(&a, uint16_t, width * D),
                       .w2 = KL_TAKE(&a, uint16_t, width * D), .x = KL_TAKE(&a, double, D), .dy = KL_TAKE(&a, double, D), .a = KL_TAKE(&a, double, width),
                       .b = KL_TAKE(&a, double, width), .dm = KL_TAKE(&a, double, width), .row = KL_TAKE(&a, uint16_t, D),
                       .chosen = KL_TAKE(&a, int32_t, p->T * p->top_k)};
        if (real) {
            *s = made;
            break;
        }
        w->own = malloc(a.used);
        if (!w->own)
            return kl_error(KL_ENOMEM, "bench: out of memory");
        a = kl_arena_over(w->own, a.used);
    }
    w->sample = (kl_case){.family = KL_FAMILY_MOE, .tolerance = kl_tol_moe_bf16, .backward = w->backward};
    w->sample.memory = calloc(MOST_TOKENS + 3, (size_t)D * sizeof(float));
    return w->sample.memory ? expect_all(w, w->own) : kl_error(KL_ENOMEM, "bench: out of memory");
}

static kl_status fetch(const kl_workload *w, kl_pass pass)
{
    const moe_problem *p = &w->set[0].problem.moe;
    const moe_grads *g = &w->set[0].grads.moe;
    sample *s = w->own;
    const kl_case_tensor *t = w->sample.tensor;
    int64_t D = p->D, I = p->I;
    if ((pass == KL_BACKWARD) != w->backward)
        return kl_ok();
    for (int64_t i = 0; i < s->count; i++) {
        KL_TRY(pull(w, s->row, pass == KL_BACKWARD ? g->dx : p->y, 2, s->token[i].at * D, D));
        kl_to_f32(t[0].out + i * D, s->row, KL_BF16, (size_t)D);
    }
    if (pass == KL_FORWARD || s->expert < 0)
        return kl_ok();
    KL_TRY(pull(w, t[1].out, g->dw1[s->expert], sizeof(float), s->feature * D, D));
    KL_TRY(pull(w, t[2].out, g->dw3[s->expert], sizeof(float), s->feature * D, D));
    for (int64_t d = 0; d < D; d++)
        KL_TRY(pull(w, t[3].out + d, g->dw2[s->expert], sizeof(float), d * I + s->feature, 1));
    return kl_ok();
}

const kl_bench_ops kl_bench_moe = {complete, tables, lay_out, fill, NULL, expect, fetch};
