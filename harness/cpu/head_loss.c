#include <math.h>

#include "common/arena.h"
#include "common/blas.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "harness/cpu/ops_cpu.h"

/* Counted tokens go through in tiles whose logits take at most about 64 MiB, whatever T is. */
enum { LOGITS_IN_A_TILE = 1 << 24, TILE_MIN = 32, TILE_MAX = 1024, SUM_BLOCK = 256 };

typedef struct tile_buffers {
    float *x, *dx, *logits; /* [tile,D], [tile,D], [tile,vocab] */
    int64_t *token;         /* [tile] row of x */
    double *loss;           /* [tile] */
} tile_buffers;

static int64_t tile_tokens(const kl_param *w, int64_t T)
{
    int64_t tile = LOGITS_IN_A_TILE / (w->rows > 0 ? w->rows : 1);
    tile = tile < TILE_MIN ? TILE_MIN : tile > TILE_MAX ? TILE_MAX : tile;
    return T < tile ? T : tile;
}

static tile_buffers carve(kl_arena *a, const kl_param *w, int64_t T)
{
    size_t tile = (size_t)tile_tokens(w, T), D = (size_t)w->columns;
    tile_buffers b;
    b.x = KL_TAKE(a, float, kl_mul(tile, D, &a->overflow));
    b.dx = KL_TAKE(a, float, kl_mul(tile, D, &a->overflow));
    b.logits = KL_TAKE(a, float, kl_mul(tile, (size_t)w->rows, &a->overflow));
    b.token = KL_TAKE(a, int64_t, tile);
    b.loss = KL_TAKE(a, double, tile);
    return b;
}

size_t cpu_head_loss_workspace(const kl_ctx *ctx, const kl_param *w, int64_t T)
{
    (void)ctx;
    if (!w || T <= 0 || w->rows <= 0 || w->columns <= 0)
        return 0;
    kl_arena a = kl_arena_count();
    carve(&a, w, T);
    return a.overflow ? SIZE_MAX : a.used;
}

static float largest(const float *l, int64_t n)
{
    kl_v top = kl_vset(-INFINITY);
    int64_t i = 0;
    for (; i + KL_LANES <= n; i += KL_LANES)
        top = kl_vmax(top, kl_vload(l + i));
    float max = kl_vmax_lane(top);
    for (; i < n; i++)
        max = l[i] > max ? l[i] : max;
    return max;
}

/* l <- e^(l - max) in place; their sum in double, block by block */
static double exponentials(float *l, int64_t n, float max)
{
    double sum = 0.0;
    for (int64_t b = 0; b < n; b += SUM_BLOCK) {
        kl_v part = {0};
        for (int64_t i = b; i < n && i < b + SUM_BLOCK; i += KL_LANES) {
            int64_t left = n - i < KL_LANES ? n - i : KL_LANES;
            kl_v e = {0};
            if (left == KL_LANES) {
                e = kl_vexp(kl_vload(l + i) - max);
                kl_vstore(l + i, e);
            } else {
                float lane[KL_LANES] = {0};
                kl_vstore(lane, kl_vexp(kl_vload_n(l + i, left) - max));
                e = kl_vload_n(lane, left);
                kl_vstore_n(l + i, e, left);
            }
            part += e;
        }
        sum += (double)kl_vsum(part);
    }
    return sum;
}

/* loss = log sum_i e^l_i - l_target;  dl_i = (e^l_i / sum - [i = target]) grad_scale, in place of the logits */
static double token_loss(float *l, int64_t n, int32_t target, float grad_scale)
{
    float max = largest(l, n), at_target = l[target];
    double sum = exponentials(l, n, max);
    float scale = (float)(grad_scale / sum);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        l[i] *= scale;
    l[target] -= grad_scale;
    return log(sum) + (double)max - (double)at_target;
}

/* dx of the tile back to its tokens */
static void scatter(const tile_buffers *b, int64_t count, int64_t D, float *dx)
{
    for (int64_t i = 0; i < count; i++)
        memcpy(dx + b->token[i] * D, b->dx + i * D, (size_t)D * sizeof(float));
}

static kl_status check(const kl_ctx *ctx, const kl_param *w, int64_t T, const float *x, const int32_t *targets,
                       const double *loss_sum, const int64_t *counted, const kl_param *dw, const void *workspace, size_t bytes)
{
    KL_TRY(check_tokens("head_loss", ctx, T));
    KL_TRY(check_weight("head_loss", w));
    KL_REQUIRE(w->rows >= 1 && w->columns >= 1, "head_loss: w: expected [vocab,D], got [%lld,%lld]", (long long)w->rows, (long long)w->columns);
    KL_REQUIRE(x || T == 0, "head_loss: x: expected [%lld,%lld], got NULL", (long long)T, (long long)w->columns);
    KL_REQUIRE(targets || T == 0, "head_loss: targets: expected %lld ids, got NULL", (long long)T);
    KL_REQUIRE(loss_sum && counted, "head_loss: %s: expected a place for it, got NULL", loss_sum ? "counted" : "loss_sum");
    for (int64_t t = 0; t < T; t++)
        KL_REQUIRE(targets[t] >= -1 && targets[t] < w->rows, "head_loss: targets[%lld]: expected -1 to %lld, got %d", (long long)t,
                   (long long)w->rows - 1, (int)targets[t]);
    if (dw)
        KL_TRY(check_gradient("head_loss", dw, w->rows, w->columns));
    size_t need = cpu_head_loss_workspace(ctx, w, T);
    KL_REQUIRE(need == 0 || (workspace && bytes >= need), "head_loss: workspace: expected %zu bytes, got %zu", need, workspace ? bytes : (size_t)0);
    return kl_ok();
}

kl_status cpu_head_loss(kl_ctx *ctx, const kl_param *w, int64_t T, const float *x, const int32_t *targets, double *loss_sum,
                        int64_t *counted, float grad_scale, float *dx, kl_param *dw, void *workspace, size_t bytes)
{
    KL_TRY(check(ctx, w, T, x, targets, loss_sum, counted, dw, workspace, bytes));
    int64_t vocab = w->rows, D = w->columns, tile = tile_tokens(w, T);
    kl_arena arena = kl_arena_over(workspace, bytes);
    tile_buffers b = carve(&arena, w, T);
    *loss_sum = 0.0;
    *counted = 0;
    if (dx && T > 0)
        memset(dx, 0, (size_t)T * (size_t)D * sizeof(float));
    for (int64_t t = 0; t < T;) {
        int64_t count = 0;
        for (; t < T && count < tile; t++) {
            if (targets[t] < 0)
                continue;
            memcpy(b.x + count * D, x + t * D, (size_t)D * sizeof(float));
            b.token[count++] = t;
        }
        if (count == 0)
            break;
        kl_linear(ctx, count, vocab, D, b.x, D, w->data, w->dtype, D, 0.0f, b.logits, vocab);
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (count * vocab > 1 << 14)
        for (int64_t i = 0; i < count; i++)
            b.loss[i] = token_loss(b.logits + i * vocab, vocab, targets[b.token[i]], grad_scale);
        for (int64_t i = 0; i < count; i++)
            *loss_sum += b.loss[i];
        *counted += count;
        /* logits = x w^T:  dx = dlogits w,  dw += dlogits^T x */
        if (dx) {
            kl_linear_dx(ctx, count, vocab, D, b.logits, vocab, w->data, w->dtype, D, 0.0f, b.dx, D);
            scatter(&b, count, D, dx);
        }
        if (dw)
            kl_gemm(ctx, KL_T, KL_N, vocab, D, count, 1.0f, b.logits, vocab, b.x, D, 1.0f, dw->data, D);
    }
    return kl_ok();
}
