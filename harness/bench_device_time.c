/* Clocks for what a device does, and its ceilings. */
#include <stdlib.h>

#include "common/gpu.h"
#include "harness/bench.h"
#include "harness/device_inputs.h"

enum { SAMPLES = 64, BATCH = 64 };

typedef struct timing {
    const kl_bench *b;
    kl_launch_fn launch;
    void *user;
    int sets, batch, samples;
    kl_gpu_clock *clock;
    double sample[SAMPLES];
} timing;

/* `count` calls, from set `first` on or all on it. */
static kl_status calls(const timing *t, int first, int count, bool turns)
{
    for (int i = 0; i < count; i++)
        KL_TRY(t->launch(t->user, turns ? (first + i) % t->sets : first));
    return kl_ok();
}

static kl_status time_calls(timing *t, kl_spread *call)
{
    for (int i = 0; i < t->samples; i++) {
        KL_TRY(kl_gpu_clock_start(t->b->ctx, t->clock));
        KL_TRY(calls(t, i % t->sets, 1, false));
        KL_TRY(kl_gpu_clock_stop(t->b->ctx, t->clock, &t->sample[i]));
    }
    *call = kl_spread_of(t->sample, t->samples);
    return kl_ok();
}

static kl_status time_pipelined(timing *t, kl_spread *pipelined)
{
    for (int i = 0; i < t->samples; i++) {
        KL_TRY(kl_gpu_clock_start(t->b->ctx, t->clock));
        KL_TRY(calls(t, 0, t->batch, true));
        KL_TRY(kl_gpu_clock_stop(t->b->ctx, t->clock, &t->sample[i]));
        t->sample[i] /= t->batch;
    }
    *pipelined = kl_spread_of(t->sample, t->samples);
    return kl_ok();
}

/* An empty queue before each call, so that none waits for room in it. */
static kl_status time_host(timing *t, kl_spread *host)
{
    for (int i = 0; i < t->samples; i++) {
        KL_TRY(kl_gpu_sync(t->b->ctx));
        double start = kl_now();
        KL_TRY(calls(t, i % t->sets, 1, false));
        t->sample[i] = kl_now() - start;
    }
    KL_TRY(kl_gpu_sync(t->b->ctx));
    *host = kl_spread_of(t->sample, t->samples);
    return kl_ok();
}

static kl_status replay(timing *t, kl_gpu_graph *g, kl_spread *spread)
{
    KL_TRY(kl_gpu_graph_launch(t->b->ctx, g));
    KL_TRY(kl_gpu_sync(t->b->ctx));
    for (int i = 0; i < t->samples; i++) {
        KL_TRY(kl_gpu_clock_start(t->b->ctx, t->clock));
        KL_TRY(kl_gpu_graph_launch(t->b->ctx, g));
        KL_TRY(kl_gpu_clock_stop(t->b->ctx, t->clock, &t->sample[i]));
        t->sample[i] /= t->batch;
    }
    *spread = kl_spread_of(t->sample, t->samples);
    return kl_ok();
}

static kl_status time_graph(timing *t, bool turns, kl_spread *spread)
{
    kl_gpu_graph *g;
    kl_status s = kl_gpu_graph_begin(t->b->ctx);
    if (s.code == KL_EUNSUPPORTED) {
        *spread = (kl_spread){0};
        return kl_ok();
    }
    KL_TRY(s);
    s = calls(t, 0, t->batch, turns);
    kl_status ended = kl_gpu_graph_end(t->b->ctx, &g);
    if (!kl_failed(s))
        s = ended;
    if (!kl_failed(s))
        s = replay(t, g, spread);
    kl_gpu_graph_destroy(g);
    return s;
}

/* Batches of about a millisecond, a multiple of the sets; samples that fit a tenth of a second, at least 5. */
static void plan(timing *t, double once)
{
    int wanted = once < 1e-3 / BATCH ? BATCH : (int)(1e-3 / once);
    t->batch = (wanted + t->sets - 1) / t->sets * t->sets;
    t->batch = t->batch < 1 ? 1 : t->batch;
    double span = t->batch * once;
    t->samples = t->b->runs ? t->b->runs : span < 0.1 / SAMPLES ? SAMPLES : (int)(0.1 / span);
    t->samples = t->samples < 5 && !t->b->runs ? 5 : t->samples > SAMPLES ? SAMPLES : t->samples;
}

kl_status kl_bench_time_device(const kl_bench *b, kl_launch_fn launch, void *user, int sets, kl_device_times *times)
{
    timing t = {.b = b, .launch = launch, .user = user, .sets = sets, .samples = 2};
    *times = (kl_device_times){.sets = sets};
    KL_TRY(kl_gpu_clock_create(b->ctx, &t.clock));
    kl_status s = time_calls(&t, &times->call);
    plan(&t, times->call.min);
    if (!kl_failed(s))
        s = time_calls(&t, &times->call);
    if (!kl_failed(s))
        s = time_host(&t, &times->host);
    if (!kl_failed(s))
        s = time_pipelined(&t, &times->pipelined);
    if (!kl_failed(s))
        s = time_graph(&t, true, &times->graph);
    if (!kl_failed(s) && sets > 1)
        s = time_graph(&t, false, &times->warm);
    kl_gpu_clock_destroy(t.clock);
    return s;
}

/* ---- ceilings ---- */

enum { PRODUCT = 8192, RUNS = 9 };

static kl_status time_copies(kl_ctx *ctx, kl_gpu_clock *clock, void *a, void *b, size_t bytes, double *gbps)
{
    double sample[RUNS];
    for (int i = -1; i < RUNS; i++) {
        double seconds;
        KL_TRY(kl_gpu_clock_start(ctx, clock));
        KL_TRY(kl_gpu_move(ctx, b, a, bytes));
        KL_TRY(kl_gpu_clock_stop(ctx, clock, &seconds));
        if (i >= 0)
            sample[i] = seconds;
    }
    *gbps = 2e-9 * (double)bytes / kl_spread_of(sample, RUNS).median;
    return kl_ok();
}

static kl_status time_products(kl_ctx *ctx, kl_gpu_clock *clock, char *a, char *b, double *tflops)
{
    const kl_product shape = {.M = PRODUCT, .N = PRODUCT, .K = PRODUCT, .a_stride = PRODUCT, .b_stride = PRODUCT, .y_stride = PRODUCT, .y_dtype = KL_BF16};
    size_t matrix = (size_t)2 * PRODUCT * PRODUCT;
    double sample[RUNS];
    if (kl_gpu_emulated())
        return kl_ok();
    for (int i = -2; i < RUNS; i++) {
        double seconds = 0.0;
        KL_TRY(kl_gpu_clock_start(ctx, clock));
        kl_status s = kl_gpu_product(ctx, &shape, 1.0f, a, a + matrix, 0.0f, NULL, b, b + matrix, KL_PRODUCT_WORKSPACE);
        if (s.code == KL_EUNSUPPORTED)
            return kl_ok();
        KL_TRY(s);
        KL_TRY(kl_gpu_clock_stop(ctx, clock, &seconds));
        if (i >= 0)
            sample[i] = seconds;
    }
    *tflops = 2e-12 * PRODUCT * PRODUCT * (double)PRODUCT / kl_spread_of(sample, RUNS).median;
    return kl_ok();
}

/* Random numbers throughout: both clocks would run fast on zeros. */
kl_status kl_ceilings_measure_device(kl_ctx *ctx, kl_ceilings *c)
{
    size_t bytes = kl_gpu_emulated() ? (size_t)1 << 20 : (size_t)1 << 30;
    void *a = NULL, *b = NULL;
    kl_gpu_clock *clock = NULL;
    kl_status s = kl_gpu_alloc(ctx, &a, bytes);
    if (!kl_failed(s))
        s = kl_gpu_alloc(ctx, &b, bytes);
    if (!kl_failed(s))
        s = kl_device_normal(ctx, a, KL_BF16, (int64_t)(bytes / 2), 1.0f, 1);
    if (!kl_failed(s))
        s = kl_gpu_clock_create(ctx, &clock);
    if (!kl_failed(s))
        s = time_copies(ctx, clock, a, b, bytes, &c->copy_gbps);
    if (!kl_failed(s))
        s = time_products(ctx, clock, a, b, &c->gemm_tflops);
    kl_gpu_clock_destroy(clock);
    if (a)
        kl_gpu_free(ctx, a);
    if (b)
        kl_gpu_free(ctx, b);
    return s;
}
