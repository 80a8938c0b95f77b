#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "harness/generate.h"
#include "harness/verify_model.h"

static int32_t best_of(const float *logits, int64_t vocab)
{
    int64_t best = 0;
    for (int64_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best])
            best = i;
    return (int32_t)best;
}

static int64_t differing(const int32_t *a, const int32_t *b, int64_t n)
{
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; i++)
        wrong += a[i] != b[i];
    return wrong;
}

static void ids_row(kl_verifier *v, const char *variant, int64_t wrong)
{
    kl_verify_row(v, &(kl_check){"model", variant, "greedy ids that differ", (double)wrong, NAN, 0.0, NULL});
}

/* Every token anew from the whole text before it. */
static kl_status greedy_without_cache(kl_verifier *v, const kl_golden_model *g, int32_t *ids, float *logits)
{
    int64_t vocab = g->model->config.vocab_size;
    memcpy(ids, g->greedy, (size_t)g->prompt_count * sizeof *ids);
    for (int64_t n = g->prompt_count; n < g->greedy_count; n++) {
        int64_t cu[2] = {0, n};
        KL_TRY(kl_model_forward(g->model, &(kl_batch){1, cu, ids, NULL}, NULL, &(kl_outputs){logits, true, NULL}));
        ids[n] = best_of(logits, vocab);
    }
    ids_row(v, "no cache", differing(ids, g->greedy, g->greedy_count));
    return kl_ok();
}

static kl_status greedy_with_cache(kl_verifier *v, const kl_golden_model *g, kl_cache *cache, int32_t *ids)
{
    const int64_t chunks[] = {0, 1, 7};
    for (int i = 0; i < 3; i++) {
        kl_generation options = {.max_new = g->greedy_count - g->prompt_count, .prefill_chunk = chunks[i], .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
        const int32_t *prompt[] = {g->greedy};
        int32_t *new_ids[] = {ids};
        int64_t lengths[] = {g->prompt_count}, counts[] = {0};
        kl_generation_stats stats;
        kl_cache_reset(cache, 0);
        KL_TRY(kl_generate(g->model, cache, 1, prompt, lengths, &options, new_ids, counts, &stats));
        int64_t expected = g->greedy_count - g->prompt_count, common = counts[0] < expected ? counts[0] : expected;
        char name[32];
        snprintf(name, sizeof name, chunks[i] ? "chunks %lld" : "cache", (long long)chunks[i]);
        ids_row(v, name, differing(ids, g->greedy + g->prompt_count, common) + expected - common);
    }
    return kl_ok();
}

/* Logits of every token when the rows arrive in pieces of `chunk` tokens. */
static kl_status chunked_prefill(kl_verifier *v, const kl_golden_model *g, kl_cache *cache, int64_t chunk, float *logits)
{
    int64_t vocab = g->model->config.vocab_size;
    double worst = 0.0;
    for (int64_t n = 0; n < g->rows; n++) {
        kl_cache_reset(cache, 0);
        for (int64_t t = 0; t < g->T; t += chunk) {
            int64_t count = g->T - t < chunk ? g->T - t : chunk, cu[2] = {0, count};
            KL_TRY(kl_model_forward(g->model, &(kl_batch){1, cu, g->ids + n * g->T + t, NULL}, cache, &(kl_outputs){logits + t * vocab, false, NULL}));
        }
        double err = kl_rel_err_f32(logits, g->logits + n * g->T * vocab, (size_t)(g->T * vocab));
        worst = err <= worst ? worst : err;
    }
    char name[48];
    snprintf(name, sizeof name, "chunks %lld", (long long)chunk);
    kl_verify_row(v, &(kl_check){"model", name, "logits, chunked prefill", worst, NAN, kl_tol_model_f32.forward, NULL});
    return kl_ok();
}

/* Three more tokens in a slot, their logits into out [3,vocab]. */
static kl_status step(const kl_golden_model *g, kl_cache *cache, int64_t slot, float *out)
{
    int64_t half = g->T / 2, cu[2] = {0, 3};
    return kl_model_forward(g->model, &(kl_batch){1, cu, g->ids + half, &slot}, cache, &(kl_outputs){out, false, NULL});
}

static void same_bits(kl_verifier *v, const char *how, const float *a, const float *b, int64_t n)
{
    bool same = memcmp(a, b, (size_t)n * sizeof *a) == 0;
    kl_verify_row(v, &(kl_check){"model", how, "logits after it, same bits", same ? 0.0 : fmax(kl_rel_err_f32(a, b, (size_t)n), 1e-30), NAN, 0.0, NULL});
}

static kl_status save_and_load(kl_verifier *v, const kl_golden_model *g, kl_cache *cache, const char *path, float *out, const float *want, int64_t n)
{
    KL_TRY(kl_cache_save(cache, 1, path));
    kl_cache_reset(cache, 0);
    KL_TRY(kl_cache_load(cache, 0, path));
    KL_TRY(step(g, cache, 0, out));
    same_bits(v, "save, load", out, want, n);
    return kl_ok();
}

/* Half a row in slot 0; forked to slot 1; slot 0 goes on; then slot 1 is saved, loaded, and slot 0 rewound. */
static kl_status cache_operations(kl_verifier *v, const kl_golden_model *g, kl_cache *cache, float *want, float *out)
{
    int64_t half = g->T / 2, n = 3 * g->model->config.vocab_size, cu[2] = {0, half};
    kl_cache_reset(cache, 0);
    KL_TRY(kl_model_forward(g->model, &(kl_batch){1, cu, g->ids, NULL}, cache, &(kl_outputs){0}));
    KL_TRY(kl_cache_fork(cache, 0, 1));
    kl_cache_mark *mark;
    KL_TRY(kl_cache_keep(cache, 0, &mark));
    kl_status s = step(g, cache, 0, want);
    if (!kl_failed(s))
        s = kl_cache_rewind(cache, 0, mark);
    if (!kl_failed(s))
        s = step(g, cache, 0, out);
    if (!kl_failed(s))
        same_bits(v, "rewind", out, want, n);
    kl_cache_mark_free(mark);
    KL_TRY(s);
    char path[4096];
    const char *base = getenv("TMPDIR");
    KL_REQUIRE(snprintf(path, sizeof path, "%s/kl-cache-XXXXXX", base && *base ? base : "/tmp") < (int)sizeof path, "TMPDIR: path too long");
    int fd = mkstemp(path);
    if (fd < 0)
        return kl_error_errno("%s", path);
    close(fd);
    s = save_and_load(v, g, cache, path, out, want, n);
    unlink(path);
    KL_TRY(s);
    KL_TRY(step(g, cache, 1, out));
    same_bits(v, "fork", out, want, n);
    return kl_ok();
}

kl_status kl_verify_model_cache(kl_verifier *v, const kl_golden_model *g)
{
    int64_t vocab = g->model->config.vocab_size, capacity = (g->greedy_count > g->T ? g->greedy_count : g->T) + 8;
    kl_cache *cache;
    KL_TRY(kl_cache_create(&cache, &g->model->config, 2, capacity));
    int32_t *ids = malloc((size_t)g->greedy_count * sizeof *ids);
    float *logits = malloc((size_t)((g->T + 6) * vocab) * sizeof *logits);
    kl_status s = ids && logits ? greedy_without_cache(v, g, ids, logits) : kl_error(KL_ENOMEM, "out of memory");
    if (!kl_failed(s))
        s = greedy_with_cache(v, g, cache, ids);
    const int64_t chunks[] = {1, 7, 16, 64};
    for (int i = 0; !kl_failed(s) && i < 4; i++)
        s = chunked_prefill(v, g, cache, chunks[i], logits);
    if (!kl_failed(s))
        s = cache_operations(v, g, cache, logits, logits + 3 * vocab);
    free(ids);
    free(logits);
    kl_cache_destroy(cache);
    return s;
}
