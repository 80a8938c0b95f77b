/* Token by token. A token's experts and the shared one are so many rows of gate and up, then D rows of down: the work is
 * dealt out in blocks of weight rows, so that a single token uses all threads and every weight streams once.
 *
 *     h_s = silu(w1_s x) (.) w3_s x  for each of the token's experts s;   y_d = sum_s w_s (w2_s h_s)_d */
#include "common/blas.h"
#include "common/parallel.h"
#include "moe/cpu/moe_cpu.h"

enum { ROWS = 64 };

typedef struct recurrent_buffers {
    moe_routes routes; /* of one token */
    float *h;          /* [top_k I + Is] */
} recurrent_buffers;

static recurrent_buffers carve(kl_arena *a, const moe_problem *p)
{
    recurrent_buffers b = {0};
    if (p->E)
        b.routes = moe_routes_carve(a, p, 1, 1);
    size_t routed = kl_mul((size_t)moe_top_k(p), (size_t)p->I, &a->overflow);
    b.h = KL_TAKE(a, float, routed + (size_t)p->Is);
    return b;
}

size_t moe_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    if (pass == KL_BACKWARD || kl_failed(moe_validate(NULL, problem)))
        return 0;
    (void)ctx;
    kl_arena a = kl_arena_count();
    carve(&a, problem);
    return a.overflow ? SIZE_MAX : a.used;
}

/* h = silu(w1 x) (.) w3 x for n <= ROWS rows */
static void gate_up(const moe_problem *p, moe_expert w, int64_t row, int64_t n, const float *x, float *h)
{
    float a[ROWS] = {0}, b[ROWS] = {0};
    kl_linear_serial(1, n, p->D, x, p->D, moe_weight_at(p, w.w1, row * p->D), p->weight_dtype, p->D, 0.0f, a, n);
    kl_linear_serial(1, n, p->D, x, p->D, moe_weight_at(p, w.w3, row * p->D), p->weight_dtype, p->D, 0.0f, b, n);
    for (int64_t i = 0; i < ROWS; i += KL_LANES) {
        kl_v ai = kl_vload(a + i);
        kl_vstore(a + i, ai * kl_vsigmoid(ai) * kl_vload(b + i));
    }
    memcpy(h, a, (size_t)n * sizeof(float));
}

/* y[d..d+n-1] of one token: shared first, then the experts in order of choice */
static void down(const moe_problem *p, const recurrent_buffers *b, int64_t d, int64_t n, float *y)
{
    float sum[ROWS] = {0}, part[ROWS] = {0};
    int64_t routed = moe_top_k(p);
    if (p->Is)
        kl_linear_serial(1, n, p->Is, b->h + routed * p->I, p->Is, moe_weight_at(p, p->shared_w2, d * p->Is), p->weight_dtype, p->Is, 0.0f, sum, n);
    for (int64_t s = 0; s < routed; s++) {
        moe_expert w = moe_expert_of(p, b->routes.id[s]);
        kl_linear_serial(1, n, p->I, b->h + s * p->I, p->I, moe_weight_at(p, w.w2, d * p->I), p->weight_dtype, p->I, 0.0f, part, n);
        for (int64_t i = 0; i < n; i++)
            sum[i] += b->routes.weight[s] * part[i];
    }
    memcpy(y + d, sum, (size_t)n * sizeof(float));
}

/* One token, inside a team of threads. */
static void token(const moe_problem *p, const recurrent_buffers *b, int64_t t)
{
    const float *x = (const float *)p->x + t * p->D;
    float *y = (float *)p->y + t * p->D;
    int64_t routed = moe_top_k(p);
    if (p->E) {
#pragma omp for schedule(static)
        for (int64_t e = 0; e < p->E; e += ROWS)
            moe_logits(p, t, 1, e, p->E - e < ROWS ? p->E - e : ROWS, b->routes.score);
#pragma omp single
        {
            moe_choose(p, &b->routes, 0, 0);
            moe_report(p, t, 0, &b->routes);
        }
    }
    int64_t a_slot = kl_ceil_div(p->I, ROWS), blocks = routed * a_slot + kl_ceil_div(p->Is, ROWS);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; i++) {
        int64_t slot = a_slot && i < routed * a_slot ? i / a_slot : routed, row = (i - slot * a_slot) * ROWS;
        moe_expert w = moe_expert_of(p, slot < routed ? b->routes.id[slot] : p->E);
        gate_up(p, w, row, w.width - row < ROWS ? w.width - row : ROWS, x, b->h + slot * p->I + row);
    }
#pragma omp for schedule(static)
    for (int64_t d = 0; d < p->D; d += ROWS)
        down(p, b, d, p->D - d < ROWS ? p->D - d : ROWS, y);
}

kl_status moe_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const moe_problem *p = problem;
    KL_TRY(moe_enter_forward(ctx, p));
    KL_TRY(moe_enter(workspace, bytes, moe_recurrent_workspace(ctx, p, KL_FORWARD)));
    kl_arena arena = kl_arena_over(workspace, bytes);
    recurrent_buffers b = carve(&arena, p);
#pragma omp parallel num_threads(ctx->threads) if (p->T > 0 && moe_worth_threads(p, 1))
    for (int64_t t = 0; t < p->T; t++)
        token(p, &b, t);
    return kl_ok();
}
