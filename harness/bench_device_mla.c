/* MLA on a device: single rows (a query of one head) are scored, each worked out from the latents themselves in double
 * precision, which come to the host a piece at a time: a cache of a million keys never lies there as a whole. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "harness/bench_device.h"

/* Latents on the host at a time; rows of the sample. */
enum { PIECE = 16384, MOST_ROWS = 64 };

static kl_status complete(kl_workload *w)
{
    kl_shape *s = &w->shape;
    s->N = s->length_count ? s->length_count : s->N ? s->N : 1;
    s->Tq = w->decode && !s->Tq ? 1 : s->Tq;
    s->latent = s->weight = KL_BF16;
    KL_REQUIRE(s->R && s->Dn + s->Dr && s->Dv, "--shapes: mla: expected R, Dn + Dr and Dv of at least 1");
    return kl_ok();
}

/* ---- tensors ---- */

/* cu_q [N+1], kv_start [N], kv_len [N], one sequence behind the other. */
static kl_status tables(kl_workload *w)
{
    const kl_shape *s = &w->shape;
    int64_t *cu_q = malloc((size_t)(3 * s->N + 1) * sizeof *cu_q), *start = cu_q + s->N + 1, *length = start + s->N;
    if (!cu_q)
        return kl_error(KL_ENOMEM, "bench: out of memory");
    w->host_table = cu_q;
    cu_q[0] = 0;
    for (int64_t n = 0; n < s->N; n++) {
        length[n] = s->length_count ? s->lengths[n] : s->T;
        start[n] = n ? start[n - 1] + length[n - 1] : 0;
        cu_q[n + 1] = cu_q[n] + (s->Tq && s->Tq < length[n] ? s->Tq : length[n]);
    }
    return kl_ok();
}

static void lay_out(const kl_workload *w, kl_tensors *t, kl_arena *a)
{
    const kl_shape *s = &w->shape;
    const int64_t *cu_q = w->host_table, *start = cu_q + s->N + 1, *length = start + s->N;
    int64_t queries = cu_q[s->N], keys = start[s->N - 1] + length[s->N - 1], weights = s->H * (s->Dn + s->Dv) * s->R;
    mla_problem *p = &t->problem.mla;
    mla_grads *d = &t->grads.mla;
    *p = (mla_problem){.N = s->N, .H = s->H, .R = s->R, .Dn = s->Dn, .Dr = s->Dr, .Dv = s->Dv, .cu_q = cu_q, .kv_start = start, .kv_len = length,
                       .dtype = KL_BF16, .latent_dtype = KL_BF16, .weight_dtype = KL_BF16, .q = KL_TAKE(a, uint16_t, queries * s->H * (s->Dn + s->Dr)),
                       .latent = KL_TAKE(a, uint16_t, keys * (s->R + s->Dr)), .latent_rows = keys, .kv_b = KL_TAKE(a, uint16_t, weights)};
    *d = (mla_grads){.d_o = w->backward ? KL_TAKE(a, uint16_t, queries * s->H * s->Dv) : NULL};
    t->outputs_at = a->used;
    p->o = KL_TAKE(a, uint16_t, queries * s->H * s->Dv);
    p->lse = KL_TAKE(a, float, queries * s->H);
    if (!w->backward)
        return;
    d->o = s->again ? NULL : p->o;
    d->lse = s->again ? NULL : p->lse;
    d->dq = KL_TAKE(a, uint16_t, queries * s->H * (s->Dn + s->Dr));
    d->dlatent = KL_TAKE(a, float, keys * (s->R + s->Dr));
    d->dkv_b = KL_TAKE(a, float, weights);
    t->cleared_count = 1;
    t->cleared[0].at = d->dkv_b;
    t->cleared[0].bytes = (size_t)weights * sizeof(float);
}

static kl_status fill(const kl_workload *w, const kl_tensors *t, uint64_t seed)
{
    const mla_problem *p = &t->problem.mla;
    int64_t queries = p->cu_q[p->N];
    const struct { const void *x; int64_t count; float stddev; } drawn[] = {
        {p->q, queries * p->H * (p->Dn + p->Dr), 1.0f}, {p->latent, p->latent_rows * (p->R + p->Dr), 1.0f},
        {p->kv_b, p->H * (p->Dn + p->Dv) * p->R, 1.0f / sqrtf((float)p->R)}, {t->grads.mla.d_o, queries * p->H * p->Dv, 1.0f}};
    for (size_t i = 0; i < sizeof drawn / sizeof *drawn; i++)
        if (drawn[i].x)
            KL_TRY(kl_device_normal(w->b->ctx, (void *)drawn[i].x, KL_BF16, drawn[i].count, drawn[i].stddev, 4 * seed + i));
    return kl_ok();
}

static kl_status before(const kl_workload *w, int set)
{
    const kl_tensors *t = &w->set[set];
    return t->grads.mla.o ? w->variant->forward(w->b->ctx, &t->problem, w->workspace, w->workspace_bytes) : kl_ok();
}

/* ---- the sample ---- */

/* Query i of sequence n with head h, absorbed: scores s_j = scale q . c_j, dp_j = u . c_j over the keys that it sees. */
typedef struct row {
    int64_t n, token, h, keys; /* token: a row of q and o */
    double *q, *u;             /* [R+Dr] each: [Wk_h^T q_n | q_r]; [Wv_h^T do | 0] */
    double *a, *b;             /* [R+Dr] each: sum_j e^(s_j - m) c_j; sum_j ds_j c_j */
    double m, l, delta;
    double *d_o;               /* [Dv] */
} row;

typedef struct sample {
    int64_t count;
    row row[MOST_ROWS];
    double score[PIECE];
    uint16_t piece[];          /* [PIECE,R+Dr] latents, or the weights of one head */
} sample;

static double as_double(uint16_t x) { return (double)kl_bf16_to_f32(x); }

static kl_status pull(const kl_workload *w, void *host, const void *device, size_t element, int64_t first, int64_t count)
{
    return kl_gpu_copy(w->b->ctx, host, (const char *)device + (size_t)first * element, (size_t)count * element);
}

/* Rows spread evenly over all, as many as fit what the reference may do. */
static void choose_rows(kl_workload *w, sample *x)
{
    const mla_problem *p = &w->set[0].problem.mla;
    int64_t all = p->cu_q[p->N] * p->H, longest = 1;
    for (int64_t n = 0; n < p->N; n++)
        longest = p->kv_len[n] > longest ? p->kv_len[n] : longest;
    double each = 4.0 * (double)longest * (double)(p->R + p->Dr) * (w->backward ? 2.0 : 1.0);
    int64_t fit = (int64_t)(kl_reference_flops / each), most = all < MOST_ROWS ? all : MOST_ROWS;
    x->count = fit < 2 ? (most < 2 ? most : 2) : fit < most ? fit : most;
    for (int64_t i = 0, n = 0; i < x->count; i++) {
        int64_t at = x->count > 1 ? i * (all - 1) / (x->count - 1) : 0;
        row *r = &x->row[i];
        r->token = at / p->H;
        r->h = at % p->H;
        while (r->token >= p->cu_q[n + 1])
            n++;
        r->n = n;
        r->keys = p->kv_len[n] - (p->cu_q[n + 1] - 1 - r->token);
    }
    w->rows = x->count < all ? x->count : 0;
}

/* out[r] = sum_d x[d] w[d][r], w: `rows` rows of R from row `first` of the head. */
static void into_latent(const sample *s, int64_t R, int64_t first, int64_t rows, const uint16_t *x, double *out)
{
    memset(out, 0, (size_t)R * sizeof *out);
    for (int64_t d = 0; d < rows; d++)
        for (int64_t r = 0; r < R; r++)
            out[r] += as_double(x[d]) * as_double(s->piece[(first + d) * R + r]);
}

/* out[d] = w[d] . a */
static void out_of_latent(const sample *s, int64_t R, int64_t first, int64_t rows, const double *a, double *out)
{
    for (int64_t d = 0; d < rows; d++) {
        out[d] = 0.0;
        for (int64_t r = 0; r < R; r++)
            out[d] += a[r] * as_double(s->piece[(first + d) * R + r]);
    }
}

static kl_status pull_weights(const kl_workload *w, sample *x, int64_t h)
{
    const mla_problem *p = &w->set[0].problem.mla;
    int64_t size = (p->Dn + p->Dv) * p->R;
    return pull(w, x->piece, p->kv_b, 2, h * size, size);
}

static kl_status absorb(const kl_workload *w, sample *x, row *r)
{
    const mla_problem *p = &w->set[0].problem.mla;
    uint16_t in[4 * 4096];
    int64_t head = p->Dn + p->Dr, at = r->token * p->H + r->h;
    KL_TRY(pull_weights(w, x, r->h));
    KL_TRY(pull(w, in, p->q, 2, at * head, head));
    into_latent(x, p->R, 0, p->Dn, in, r->q);
    for (int64_t e = 0; e < p->Dr; e++)
        r->q[p->R + e] = as_double(in[p->Dn + e]);
    if (!w->backward)
        return kl_ok();
    KL_TRY(pull(w, in, w->set[0].grads.mla.d_o, 2, at * p->Dv, p->Dv));
    into_latent(x, p->R, p->Dn, p->Dv, in, r->u);
    for (int64_t e = 0; e < p->Dv; e++)
        r->d_o[e] = as_double(in[e]);
    return kl_ok();
}

/* score[j] = x . c_j */
static void scores(sample *s, const double *x, int64_t width, int64_t keys)
{
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < keys; j++) {
        const uint16_t *c = s->piece + j * width;
        double sum[4] = {0};
        for (int64_t e = 0; e < width; e++)
            sum[e % 4] += x[e] * as_double(c[e]);
        s->score[j] = sum[0] + sum[1] + sum[2] + sum[3];
    }
}

/* out += sum_j score[j] c_j */
static void add_up(const sample *s, int64_t width, int64_t keys, double *out)
{
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < width; first += 32)
        for (int64_t j = 0; j < keys; j++)
            for (int64_t e = first; e < first + 32 && e < width; e++)
                out[e] += s->score[j] * as_double(s->piece[j * width + e]);
}

static double softmax_scale(const mla_problem *p) { return p->scale != 0.0f ? (double)p->scale : 1.0 / sqrt((double)(p->Dn + p->Dr)); }

/* m, l and a of `keys` more keys. */
static void attend(sample *s, const mla_problem *p, row *r, int64_t keys)
{
    int64_t width = p->R + p->Dr;
    double top = r->m, scale = softmax_scale(p);
    scores(s, r->q, width, keys);
    for (int64_t j = 0; j < keys; j++)
        top = fmax(top, scale * s->score[j]);
    double factor = exp(r->m - top);
    r->l *= factor;
    for (int64_t e = 0; e < width; e++)
        r->a[e] *= factor;
    for (int64_t j = 0; j < keys; j++)
        r->l += s->score[j] = exp(scale * s->score[j] - top);
    add_up(s, width, keys, r->a);
    r->m = top;
}

/* b += sum_j ds_j c_j,  ds_j = scale p_j (dp_j - delta) */
static kl_status attend_back(sample *s, const mla_problem *p, row *r, int64_t keys)
{
    int64_t width = p->R + p->Dr;
    double scale = softmax_scale(p), *probability = malloc((size_t)keys * sizeof *probability);
    if (!probability)
        return kl_error(KL_ENOMEM, "bench: out of memory");
    scores(s, r->q, width, keys);
    for (int64_t j = 0; j < keys; j++)
        probability[j] = exp(scale * s->score[j] - r->m) / r->l;
    scores(s, r->u, width, keys);
    for (int64_t j = 0; j < keys; j++)
        s->score[j] = scale * probability[j] * (s->score[j] - r->delta);
    free(probability);
    add_up(s, width, keys, r->b);
    return kl_ok();
}

/* Every piece of the latents that some row sees, for each of those rows. */
static kl_status walk(const kl_workload *w, sample *x, kl_pass pass)
{
    const mla_problem *p = &w->set[0].problem.mla;
    int64_t width = p->R + p->Dr;
    for (int64_t first = 0, last = 0; first < x->count; first = last) {
        int64_t n = x->row[first].n, keys = 0;
        for (; last < x->count && x->row[last].n == n; last++)
            keys = x->row[last].keys > keys ? x->row[last].keys : keys;
        for (int64_t j = 0; j < keys; j += PIECE) {
            KL_TRY(pull(w, x->piece, p->latent, 2, (p->kv_start[n] + j) * width, (keys - j < PIECE ? keys - j : PIECE) * width));
            for (row *r = x->row + first; r < x->row + last; r++) {
                int64_t seen = r->keys - j < PIECE ? r->keys - j : PIECE;
                if (seen > 0 && pass == KL_FORWARD)
                    attend(x, p, r, seen);
                else if (seen > 0)
                    KL_TRY(attend_back(x, p, r, seen));
            }
        }
    }
    return kl_ok();
}

static kl_status want(kl_case_tensor *t, const char *name, int64_t rows, int64_t width, bool gradient, float **out)
{
    *t = (kl_case_tensor){.name = name, .out = *out, .want = calloc((size_t)(rows * width), sizeof(double)), .T = rows, .H = 1, .D = width, .gradient = gradient};
    *out += rows * width;
    return t->want ? kl_ok() : kl_error(KL_ENOMEM, "bench: out of memory");
}

/* o, lse and, backward, dq of the sampled rows. */
static kl_status expect_rows(kl_workload *w, sample *x)
{
    const mla_problem *p = &w->set[0].problem.mla;
    kl_case *c = &w->sample;
    float *out = c->memory;
    KL_TRY(want(&c->tensor[c->count++], "o", x->count, p->Dv, false, &out));
    KL_TRY(want(&c->tensor[c->count++], "lse", x->count, 1, false, &out));
    for (int64_t i = 0; i < x->count; i++)
        KL_TRY(absorb(w, x, &x->row[i]));
    KL_TRY(walk(w, x, KL_FORWARD));
    for (int64_t i = 0; i < x->count; i++) {
        row *r = &x->row[i];
        double *o = c->tensor[0].want + i * p->Dv;
        KL_TRY(pull_weights(w, x, r->h));
        out_of_latent(x, p->R, p->Dn, p->Dv, r->a, o);
        for (int64_t e = 0; e < p->Dv; e++) {
            o[e] /= r->l;
            r->delta += w->backward ? o[e] * r->d_o[e] : 0.0;
        }
        c->tensor[1].want[i] = r->m + log(r->l);
    }
    if (!w->backward)
        return kl_ok();
    KL_TRY(want(&c->tensor[c->count++], "dq", x->count, p->Dn + p->Dr, true, &out));
    KL_TRY(walk(w, x, KL_BACKWARD));
    for (int64_t i = 0; i < x->count; i++) {
        double *dq = c->tensor[2].want + i * (p->Dn + p->Dr);
        KL_TRY(pull_weights(w, x, x->row[i].h));
        out_of_latent(x, p->R, 0, p->Dn, x->row[i].b, dq);
        memcpy(dq + p->Dn, x->row[i].b + p->R, (size_t)p->Dr * sizeof *dq);
    }
    return kl_ok();
}

static kl_status expect(kl_workload *w)
{
    const mla_problem *p = &w->set[0].problem.mla;
    int64_t width = p->R + p->Dr, weights = (p->Dn + p->Dv) * p->R, vectors = 4 * width + p->Dv;
    size_t shorts = (size_t)(PIECE * width > weights ? PIECE * width : weights);
    sample *x = calloc(1, sizeof *x + shorts * sizeof *x->piece);
    w->own = x;
    w->sample = (kl_case){.family = KL_FAMILY_MLA, .tolerance = kl_tol_mla_bf16, .backward = w->backward};
    w->sample.memory = calloc(MOST_ROWS, (size_t)(p->Dv + 1 + p->Dn + p->Dr) * sizeof(float));
    double *vector = calloc(MOST_ROWS, (size_t)vectors * sizeof *vector);
    kl_status s = x && vector && w->sample.memory ? kl_ok() : kl_error(KL_ENOMEM, "bench: out of memory");
    for (int64_t i = 0; !kl_failed(s) && i < MOST_ROWS; i++) {
        double *v = vector + i * vectors;
        x->row[i] = (row){.q = v, .u = v + width, .a = v + 2 * width, .b = v + 3 * width, .d_o = v + 4 * width, .m = -INFINITY};
    }
    if (!kl_failed(s)) {
        choose_rows(w, x);
        s = expect_rows(w, x);
    }
    free(vector);
    return s;
}

static kl_status fetch(const kl_workload *w, kl_pass pass)
{
    const mla_problem *p = &w->set[0].problem.mla;
    const sample *x = w->own;
    uint16_t in[4096 * 2];
    const kl_case_tensor *t = w->sample.tensor;
    int64_t head = p->Dn + p->Dr;
    for (int64_t i = 0; i < x->count; i++) {
        int64_t at = x->row[i].token * p->H + x->row[i].h, wide = pass == KL_BACKWARD ? head : p->Dv;
        KL_TRY(pull(w, in, pass == KL_BACKWARD ? w->set[0].grads.mla.dq : p->o, 2, at * wide, wide));
        kl_to_f32(t[pass == KL_BACKWARD ? 2 : 0].out + i * wide, in, KL_BF16, (size_t)wide);
        if (pass == KL_FORWARD)
            KL_TRY(pull(w, t[1].out + i, p->lse, sizeof(float), at, 1));
    }
    return kl_ok();
}

const kl_bench_ops kl_bench_mla = {complete, tables, lay_out, fill, before, expect, fetch};
