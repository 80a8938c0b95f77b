#include <math.h>

#include "common/blas.h"
#include "common/parallel.h"
#include "moe/cpu/moe_cpu.h"

/* Per thread: s + bias where an expert may be chosen, and the groups' scores. */
static size_t scratch_floats(const moe_problem *p) { return 2 * (size_t)p->E + 2 * KL_LANES; }

moe_routes moe_routes_carve(kl_arena *a, const moe_problem *p, int64_t tokens, int threads)
{
    size_t n = (size_t)tokens, k = (size_t)p->top_k;
    moe_routes r;
    r.score = KL_TAKE(a, float, kl_mul(n, (size_t)p->E, &a->overflow));
    r.weight = KL_TAKE(a, float, kl_mul(n, k, &a->overflow));
    r.sum = KL_TAKE(a, float, n);
    r.id = KL_TAKE(a, int32_t, kl_mul(n, k, &a->overflow));
    r.scratch = KL_TAKE(a, float, kl_mul((size_t)threads, scratch_floats(p), &a->overflow));
    return r;
}

void moe_logits(const moe_problem *p, int64_t t, int64_t rows, int64_t e, int64_t experts, float *score)
{
    const char *router = (const char *)p->router + (size_t)(e * p->D) * kl_dtype_size(p->router_dtype);
    kl_linear_serial(rows, experts, p->D, (const float *)p->x + t * p->D, p->D, router, p->router_dtype, p->D, 0.0f, score + e, p->E);
}

/* The index of the largest of x[0..n-1], the lowest among equals. */
static int64_t argmax(int64_t n, const float *x)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

/* s = sigmoid(l) or softmax(l) in place */
static void scores(const moe_problem *p, float *s)
{
    float lane[KL_LANES];
    if (p->router_kind == MOE_SIGMOID) {
        for (int64_t e = 0; e < p->E; e += KL_LANES) {
            int64_t n = p->E - e < KL_LANES ? p->E - e : KL_LANES;
            kl_vstore(lane, kl_vsigmoid(kl_vload_n(s + e, n)));
            memcpy(s + e, lane, (size_t)n * sizeof(float));
        }
        return;
    }
    float max = s[argmax(p->E, s)];
    double sum = 0.0;
    for (int64_t e = 0; e < p->E; e++) {
        s[e] = expf(s[e] - max);
        sum += (double)s[e];
    }
    float inverse = (float)(1.0 / sum);
    for (int64_t e = 0; e < p->E; e++)
        s[e] *= inverse;
}

/* The sum of the two largest, or the one there is. */
static float top_two(int64_t n, const float *x)
{
    float best = -INFINITY, second = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        if (x[i] > best) {
            second = best;
            best = x[i];
        } else if (x[i] > second) {
            second = x[i];
        }
    }
    return n > 1 ? best + second : best;
}

/* choice <- -inf outside the topk_group best groups. group: scratch [n_group] */
static void choose_groups(const moe_problem *p, float *choice, float *group)
{
    if (p->n_group <= 1 || p->topk_group == p->n_group)
        return;
    int64_t size = p->E / p->n_group;
    for (int64_t i = 0; i < p->n_group; i++)
        group[i] = top_two(size, choice + i * size);
    for (int64_t n = 0; n < p->topk_group; n++)
        group[argmax(p->n_group, group)] = -INFINITY;
    for (int64_t i = 0; i < p->n_group; i++)
        if (group[i] != -INFINITY)
            for (int64_t e = i * size; e < (i + 1) * size; e++)
                choice[e] = -INFINITY;
}

/* The best of choice, the lowest index among equals; taken ones are -inf. When nothing compares (NaN), the lowest id not in id[0..n-1]. */
static int32_t best_left(int64_t E, const float *choice, const int32_t *id, int64_t n)
{
    float max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int64_t e = 0; e < E; e++)
        max = choice[e] > max ? choice[e] : max;
    if (max > -INFINITY)
        for (int64_t e = 0; e < E; e++)
            if (choice[e] == max)
                return (int32_t)e;
    for (int32_t e = 0;; e++) {
        bool taken = false;
        for (int64_t i = 0; i < n; i++)
            taken |= id[i] == e;
        if (!taken)
            return e;
    }
}

void moe_choose(const moe_problem *p, const moe_routes *r, int64_t i, int thread)
{
    float *s = r->score + i * p->E, *weight = r->weight + i * p->top_k;
    int32_t *id = r->id + i * p->top_k;
    float *choice = r->scratch + (size_t)thread * scratch_floats(p), *group = choice + p->E + KL_LANES;
    scores(p, s);
    for (int64_t e = 0; e < p->E; e++)
        choice[e] = s[e] + (p->bias ? p->bias[e] : 0.0f);
    choose_groups(p, choice, group);
    /* w_n = scale s_n / (sum_m s_m + 1e-20) */
    double sum = 0.0;
    for (int64_t n = 0; n < p->top_k; n++) {
        int32_t e = id[n] = best_left(p->E, choice, id, n);
        weight[n] = p->biased_weights ? s[e] + (p->bias ? p->bias[e] : 0.0f) : s[e];
        choice[e] = -INFINITY;
        sum += (double)weight[n];
    }
    sum = p->renormalize ? sum + 1e-20 : 1.0;
    float scale = p->scale != 0.0f ? p->scale : 1.0f;
    for (int64_t n = 0; n < p->top_k; n++)
        weight[n] = (float)((double)(scale * weight[n]) / sum);
    r->sum[i] = (float)sum;
}

/* w_n = scale s_n / sum:  ds_n = (scale dw_n - sum_m dw_m w_m) / sum;
 * s = sigmoid(l):  dl = s (1 - s) ds;   s = softmax(l):  dl = s (ds - sum s ds) */
void moe_choose_backward(const moe_problem *p, const moe_routes *r, int64_t i, const float *dweight, int thread)
{
    float *s = r->score + i * p->E, *ds = r->scratch + (size_t)thread * scratch_floats(p), *at = ds + p->E + KL_LANES;
    const float *weight = r->weight + i * p->top_k;
    const int32_t *id = r->id + i * p->top_k;
    float scale = p->scale != 0.0f ? p->scale : 1.0f;
    double mean = 0.0, total = 0.0;
    for (int64_t n = 0; n < p->top_k && p->renormalize; n++)
        mean += (double)dweight[n] * (double)weight[n];
    for (int64_t n = 0; n < p->top_k; n++) {
        ds[n] = (float)(((double)scale * (double)dweight[n] - mean) / (double)r->sum[i]);
        at[n] = s[id[n]];
        total += (double)at[n] * (double)ds[n];
    }
    for (int64_t e = 0; e < p->E; e++)
        s[e] = p->router_kind == MOE_SOFTMAX ? -s[e] * (float)total : 0.0f;
    for (int64_t n = 0; n < p->top_k; n++)
        s[id[n]] += p->router_kind == MOE_SOFTMAX ? at[n] * ds[n] : at[n] * (1.0f - at[n]) * ds[n];
}

void moe_report(const moe_problem *p, int64_t t, int64_t i, const moe_routes *r)
{
    size_t k = (size_t)p->top_k;
    if (p->chosen)
        memcpy(p->chosen + (size_t)t * k, r->id + (size_t)i * k, k * sizeof(int32_t));
    if (p->chosen_weight)
        memcpy(p->chosen_weight + (size_t)t * k, r->weight + (size_t)i * k, k * sizeof(float));
}

void moe_route(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const moe_routes *r)
{
    int64_t tiles = kl_ceil_div(count, KL_FEW_ROWS);
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (tiles > 1 && count * p->E * p->D > 1 << 17)
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t i = tile * KL_FEW_ROWS, rows = count - i < KL_FEW_ROWS ? count - i : KL_FEW_ROWS;
        moe_logits(p, t + i, rows, 0, p->E, r->score + i * p->E);
        for (int64_t n = i; n < i + rows; n++) {
            moe_choose(p, r, n, omp_get_thread_num());
            moe_report(p, t + n, n, r);
        }
    }
}
