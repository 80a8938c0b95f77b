#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness/bench.h"
#include "harness/info.h"
#include "harness/model.h"

typedef struct run {
    kl_bench *b;
    kl_model *m;
    const kl_shape *s;
    kl_cache *cache;
    int64_t B, T, chunk, at; /* at: where the decoding token stands in ids */
    int32_t *ids, *step_ids, *targets; /* [B,T+new], [B], [B*T] */
    int64_t *cu;             /* [B+1] */
    float *logits;           /* [B,vocab] */
    kl_weights grads;
} run;

/* The most that the process has held, in bytes. */
static size_t peak_memory(void)
{
    char line[256];
    size_t kilobytes = 0;
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "VmHWM: %zu", &kilobytes) == 1)
            break;
    if (file)
        fclose(file);
    return kilobytes * 1024;
}

/* count tokens of every row from position `from` on, in one call. */
static kl_status feed(run *r, int64_t from, int64_t count)
{
    int64_t length = r->T + r->s->new_tokens;
    int32_t *ids = malloc((size_t)(r->B * count) * sizeof *ids);
    if (!ids)
        return kl_error(KL_ENOMEM, "out of memory");
    for (int64_t n = 0; n <= r->B; n++)
        r->cu[n] = n * count;
    for (int64_t n = 0; n < r->B; n++)
        memcpy(ids + n * count, r->ids + n * length + from, (size_t)count * sizeof *ids);
    kl_status s = kl_model_forward(r->m, &(kl_batch){r->B, r->cu, ids, NULL}, r->cache, &(kl_outputs){r->logits, true, NULL});
    free(ids);
    return s;
}

static kl_status prefill(void *user)
{
    run *r = user;
    for (int64_t n = 0; n < r->B; n++)
        kl_cache_reset(r->cache, n);
    for (int64_t t = 0; t < r->T; t += r->chunk)
        KL_TRY(feed(r, t, r->T - t < r->chunk ? r->T - t : r->chunk));
    return kl_ok();
}

static kl_status train_step(void *user)
{
    run *r = user;
    double loss;
    int64_t counted;
    int64_t length = r->T + r->s->new_tokens;
    int32_t *ids = malloc((size_t)(r->B * r->T) * sizeof *ids);
    if (!ids)
        return kl_error(KL_ENOMEM, "out of memory");
    for (int64_t n = 0; n <= r->B; n++)
        r->cu[n] = n * r->T;
    for (int64_t n = 0; n < r->B; n++) {
        for (int64_t t = 0; t < r->T; t++) {
            ids[n * r->T + t] = r->ids[n * length + t];
            r->targets[n * r->T + t] = r->ids[n * length + t + 1];
        }
    }
    kl_status s = kl_model_loss(r->m, &(kl_batch){r->B, r->cu, ids, NULL}, r->targets, &loss, &counted, &r->grads, 1.0f);
    free(ids);
    return s;
}

/* Last logits of every row without a cache, against those that came step by step. */
static kl_status decoding_error(run *r, double *err)
{
    int64_t vocab = r->m->config.vocab_size, length = r->T + r->s->new_tokens;
    float *whole = malloc((size_t)(r->B * vocab) * sizeof *whole);
    if (!whole)
        return kl_error(KL_ENOMEM, "out of memory");
    for (int64_t n = 0; n <= r->B; n++)
        r->cu[n] = n * length;
    kl_status s = kl_model_forward(r->m, &(kl_batch){r->B, r->cu, r->ids, NULL}, NULL, &(kl_outputs){whole, true, NULL});
    *err = kl_failed(s) ? NAN : kl_rel_err_f32(r->logits, whole, (size_t)(r->B * vocab));
    free(whole);
    return s;
}

/* Every new token is one sample: the cache moves on, so a call cannot be repeated. */
static kl_status time_decode(run *r, kl_spread *seconds)
{
    double *sample = malloc((size_t)r->s->new_tokens * sizeof *sample);
    if (!sample)
        return kl_error(KL_ENOMEM, "out of memory");
    kl_status s = prefill(r);
    for (int64_t i = 0; !kl_failed(s) && i < r->s->new_tokens; i++) {
        double start = kl_now();
        s = feed(r, r->T + i, 1);
        sample[i] = kl_now() - start;
    }
    if (!kl_failed(s))
        *seconds = kl_spread_of(sample, (int)r->s->new_tokens);
    free(sample);
    return s;
}

/* Two operations a weight and token; all active weights, and the cache of what came before, pass by once a call. */
static kl_status cost_of(const run *r, kl_bench_pass pass, kl_cost *cost)
{
    kl_param_count n = kl_config_params(&r->m->config);
    double stored, tokens = (double)r->B * (pass == KL_BENCH_DECODE ? 1.0 : (double)r->T);
    KL_TRY(kl_info_bytes(&r->m->config, &stored));
    double element = r->m->weights.mapping ? stored / (double)n.total : 4.0;
    double weights = element * (double)(pass == KL_BENCH_DECODE && r->B == 1 ? n.active : n.total);
    double cache = (double)r->B * (double)kl_cache_bytes(&r->m->config, r->T, NULL, NULL, NULL);
    *cost = (kl_cost){2.0 * tokens * (double)n.active, weights + cache};
    if (pass == KL_BENCH_FWDBWD)
        *cost = (kl_cost){6.0 * tokens * (double)n.active, 3.0 * weights};
    return kl_ok();
}

static kl_status measure(run *r, kl_bench_pass pass)
{
    kl_shape shape = {.B = r->B, .T = r->T, .D = 0, .C = pass == KL_BENCH_PREFILL ? r->chunk : 0};
    kl_bench_row row = {.family = "model", .variant = "default", .pass = pass, .shape = &shape, .memory_gbps = r->b->ceilings.read_gbps,
                        .memory_name = "read", .err = NAN};
    if (pass == KL_BENCH_DECODE) {
        KL_TRY(time_decode(r, &row.seconds));
        KL_TRY(decoding_error(r, &row.err));
        row.err_limit = kl_tol_model_f32.forward;
    } else {
        KL_TRY(kl_bench_time(r->b, pass == KL_BENCH_PREFILL ? prefill : train_step, r, &row.seconds));
    }
    KL_TRY(cost_of(r, pass, &row.cost));
    row.workspace_bytes = r->m->workspace_bytes;
    row.peak_bytes = peak_memory();
    KL_TRY(kl_bench_emit(r->b, &row));
    if (!r->b->quiet) {
        double tokens = (double)r->B * (pass == KL_BENCH_DECODE ? 1.0 : (double)r->T);
        printf("  model %s T %lld: %.1f tokens/s\n", kl_bench_pass_name(pass), (long long)r->T, tokens / row.seconds.median);
    }
    return kl_ok();
}

static void run_free(run *r)
{
    free(r->ids);
    free(r->targets);
    free(r->cu);
    free(r->logits);
    kl_weights_free(&r->grads);
    kl_cache_destroy(r->cache);
}

static kl_status bench_shape(kl_bench *b, kl_model *m, const kl_shape *s)
{
    const kl_config *c = &m->config;
    run r = {.b = b, .m = m, .s = s, .B = s->B ? s->B : 1, .T = s->T, .chunk = s->C ? s->C : 512};
    KL_REQUIRE(s->T >= 1 && s->T + s->new_tokens <= c->max_length, "--shapes: T + new: expected 2 to the model's %lld tokens, got %lld",
               (long long)c->max_length, (long long)(s->T + s->new_tokens));
    KL_REQUIRE(r.B * (s->T + s->new_tokens) < INT64_C(1) << 31, "--shapes: B (T + new) is beyond 2^31 tokens");
    int64_t count = r.B * (s->T + s->new_tokens);
    r.ids = malloc((size_t)count * sizeof *r.ids);
    r.targets = malloc((size_t)count * sizeof *r.targets);
    r.cu = malloc((size_t)(r.B + 1) * sizeof *r.cu);
    r.logits = malloc((size_t)(r.B * c->vocab_size) * sizeof *r.logits);
    kl_status status = r.ids && r.targets && r.cu && r.logits ? kl_ok() : kl_error(KL_ENOMEM, "out of memory");
    kl_rng rng = kl_rng_make(7, 0);
    for (int64_t i = 0; !kl_failed(status) && i < count; i++)
        r.ids[i] = (int32_t)kl_rng_below(&rng, (uint64_t)c->vocab_size);
    if (!kl_failed(status))
        status = kl_cache_create(&r.cache, c, r.B, s->T + s->new_tokens);
    if (!kl_failed(status) && b->pass[KL_BENCH_FWDBWD])
        status = kl_weights_zeros(&r.grads, c);
    static const kl_bench_pass order[] = {KL_BENCH_PREFILL, KL_BENCH_DECODE, KL_BENCH_FWDBWD};
    for (int i = 0; !kl_failed(status) && i < 3; i++)
        if (b->pass[order[i]])
            status = measure(&r, order[i]);
    run_free(&r);
    return status;
}

kl_status kl_bench_model(kl_bench *b, kl_model *m, const kl_shape *shapes, int count)
{
    for (int i = 0; i < count; i++)
        KL_TRY(bench_shape(b, m, &shapes[i]));
    return kl_ok();
}
