/* Generation: prompts go in by chunks that pack pieces of several sequences, then all live sequences step together. */
#include "harness/generate.h"

#include <stdlib.h>
#include <string.h>

#include "common/timer.h"

/* Above DECODE_WORKSPACE bytes the prompt's workspace goes back before decoding begins. */
enum { DEFAULT_CHUNK = 512, DECODE_WORKSPACE = 32 << 20 };

typedef struct sequence {
    const int32_t *prompt;
    int64_t length, fed;  /* prompt tokens; how many the model has seen */
    int32_t *out;
    int64_t *count;       /* new tokens so far */
    int32_t *seen;        /* prompt and new tokens, for the penalty */
    kl_rng rng;
    bool live;
} sequence;

typedef struct generator {
    kl_model *m;
    kl_cache *cache;
    const kl_generation *options;
    int64_t N, chunk;
    sequence *seq;
    int64_t *cu, *slot, *owner; /* of the call being packed: [N+1], [N], [N] */
    int32_t *ids;               /* [max(chunk, N)] */
    float *logits;              /* [N,vocab] */
    int32_t *scratch;           /* [vocab] */
    int32_t *seen;              /* every sequence's seen ids */
} generator;

static kl_status check(const kl_model *m, const kl_cache *cache, int64_t N, const int32_t *const *ids, const int64_t *lengths,
                       const kl_generation *o, int32_t *const *new_ids, int64_t *new_counts)
{
    KL_REQUIRE(m, "model: expected one, got NULL");
    KL_REQUIRE(cache, "cache: expected one, got NULL");
    KL_REQUIRE(o, "options: expected some, got NULL");
    KL_TRY(kl_cache_matches(cache, &m->config));
    KL_TRY(kl_sampling_validate(&o->sampling));
    KL_REQUIRE(N >= 0 && N <= cache->slots, "N: expected 0 to the cache's %lld slots, got %lld", (long long)cache->slots, (long long)N);
    KL_REQUIRE(N == 0 || (ids && lengths && new_ids && new_counts), "prompts: expected ids, lengths, new_ids and new_counts, got NULL");
    KL_REQUIRE(o->max_new >= 0, "max_new: expected at least 0, got %lld", (long long)o->max_new);
    KL_REQUIRE(o->prefill_chunk >= 0, "prefill_chunk: expected 0 (%d) or more, got %lld", DEFAULT_CHUNK, (long long)o->prefill_chunk);
    KL_REQUIRE(o->stop_count >= 0 && (o->stop_ids || o->stop_count == 0), "stop_ids: expected %d ids, got NULL", o->stop_count);
    for (int64_t n = 0; n < N; n++) {
        KL_REQUIRE(ids[n] && lengths[n] >= 1, "prompt %lld: expected at least 1 token, got %lld", (long long)n, (long long)(ids[n] ? lengths[n] : 0));
        int64_t room = cache->capacity - cache->length[n];
        KL_REQUIRE(lengths[n] <= room, "prompt %lld: expected at most %lld tokens, what is left of the cache's %lld, got %lld", (long long)n,
                   (long long)room, (long long)cache->capacity, (long long)lengths[n]);
        int64_t left = m->config.max_length - cache->length[n];
        KL_REQUIRE(m->config.max_length <= 0 || lengths[n] <= left,
                   "prompt %lld: expected at most %lld tokens, what is left of the model's context of %lld, got %lld", (long long)n,
                   (long long)left, (long long)m->config.max_length, (long long)lengths[n]);
        for (int64_t t = 0; t < lengths[n]; t++)
            KL_REQUIRE(ids[n][t] >= 0 && ids[n][t] < m->config.vocab_size, "prompt %lld: ids[%lld]: expected an id from 0 to %lld, got %d",
                       (long long)n, (long long)t, (long long)(m->config.vocab_size - 1), (int)ids[n][t]);
    }
    return kl_ok();
}

static bool is_stop(const kl_generation *o, int32_t id)
{
    for (int i = 0; i < o->stop_count; i++)
        if (o->stop_ids[i] == id)
            return true;
    return false;
}

/* Takes the next token of sequence n from its logits and decides whether it goes on. */
static kl_status choose(generator *g, int64_t n, float *logits)
{
    sequence *s = &g->seq[n];
    int64_t vocab = g->m->config.vocab_size;
    if (*s->count >= g->options->max_new) {
        s->live = false;
        return kl_ok();
    }
    int32_t id = kl_sample(&g->options->sampling, &s->rng, logits, vocab, s->seen, s->length + *s->count, g->scratch);
    if (id < 0)
        return kl_error(KL_EINVAL, "sequence %lld: expected logits that are numbers, got none", (long long)n);
    s->out[*s->count] = id;
    s->seen[s->length + *s->count] = id;
    ++*s->count;
    s->live = !is_stop(g->options, id);
    if (g->options->on_token && !g->options->on_token(g->options->user, n, id))
        s->live = false;
    /* A token is fed back only when there is room for it and a use for what follows. */
    int64_t length = g->cache->length[n], limit = g->cache->capacity;
    if (g->m->config.max_length > 0 && g->m->config.max_length < limit)
        limit = g->m->config.max_length;
    if (*s->count >= g->options->max_new || length >= limit)
        s->live = false;
    return kl_ok();
}

/* One call over the packed tokens; then a token for each sequence whose prompt is complete. */
static kl_status step(generator *g, int64_t count)
{
    bool wanted = false;
    for (int64_t i = 0; i < count; i++)
        wanted = wanted || g->seq[g->owner[i]].fed >= g->seq[g->owner[i]].length;
    kl_batch batch = {.N = count, .cu = g->cu, .ids = g->ids, .slot = g->slot};
    kl_outputs out = {.logits = wanted ? g->logits : NULL, .last_only = true};
    KL_TRY(kl_model_forward(g->m, &batch, g->cache, &out));
    for (int64_t i = 0; i < count; i++)
        if (g->seq[g->owner[i]].fed >= g->seq[g->owner[i]].length)
            KL_TRY(choose(g, g->owner[i], g->logits + i * g->m->config.vocab_size));
    return kl_ok();
}

static void pack(generator *g, int64_t *count, int64_t n, const int32_t *ids, int64_t tokens)
{
    int64_t at = g->cu[*count];
    memcpy(g->ids + at, ids, (size_t)tokens * sizeof *ids);
    g->slot[*count] = n;
    g->owner[*count] = n;
    g->cu[++*count] = at + tokens;
}

/* Pieces of prompts, one after the other, `chunk` tokens a call. */
static kl_status prefill(generator *g)
{
    int64_t n = 0;
    while (n < g->N) {
        int64_t count = 0, room = g->chunk;
        while (n < g->N && room > 0) {
            sequence *s = &g->seq[n];
            int64_t left = s->length - s->fed, tokens = left < room ? left : room;
            pack(g, &count, n, s->prompt + s->fed, tokens);
            s->fed += tokens;
            room -= tokens;
            if (s->fed == s->length)
                n++;
        }
        KL_TRY(step(g, count));
    }
    return kl_ok();
}

static kl_status decode(generator *g, int64_t *steps)
{
    for (;; ++*steps) {
        int64_t count = 0;
        for (int64_t n = 0; n < g->N; n++)
            if (g->seq[n].live)
                pack(g, &count, n, &g->seq[n].out[*g->seq[n].count - 1], 1);
        if (count == 0)
            return kl_ok();
        KL_TRY(step(g, count));
    }
}

static kl_status set_up(generator *g, const int32_t *const *ids, const int64_t *lengths, int32_t *const *new_ids, int64_t *new_counts)
{
    size_t N = (size_t)g->N, vocab = (size_t)g->m->config.vocab_size, total = 0;
    int64_t longest = 0;
    for (size_t n = 0; n < N; n++) {
        if (__builtin_add_overflow(total, (size_t)lengths[n] + (size_t)g->options->max_new, &total))
            return kl_error(KL_ENOMEM, "max_new: %lld tokens are more than can be addressed", (long long)g->options->max_new);
        longest += lengths[n];
    }
    if (g->chunk > longest)
        g->chunk = longest;
    g->seq = calloc(N + 1, sizeof *g->seq);
    g->cu = calloc(N + 1, sizeof *g->cu);
    g->slot = calloc(N + 1, sizeof *g->slot);
    g->owner = calloc(N + 1, sizeof *g->owner);
    g->ids = calloc((size_t)g->chunk + N + 1, sizeof *g->ids);
    g->logits = calloc(N * vocab + 1, sizeof *g->logits);
    g->scratch = calloc(vocab + 1, sizeof *g->scratch);
    g->seen = total < SIZE_MAX / 8 ? calloc(total + 1, sizeof *g->seen) : NULL;
    if (!g->seq || !g->cu || !g->slot || !g->owner || !g->ids || !g->logits || !g->scratch || !g->seen)
        return kl_error(KL_ENOMEM, "generate: out of memory for %lld sequences and %lld new tokens each", (long long)g->N,
                        (long long)g->options->max_new);
    int32_t *seen = g->seen;
    for (size_t n = 0; n < N; n++) {
        g->seq[n] = (sequence){.prompt = ids[n], .length = lengths[n], .out = new_ids[n], .count = &new_counts[n], .seen = seen,
                               .rng = kl_rng_make(g->options->sampling.seed, n)};
        new_counts[n] = 0;
        memcpy(seen, ids[n], (size_t)lengths[n] * sizeof *seen);
        seen += lengths[n] + g->options->max_new;
    }
    return kl_ok();
}

static kl_status run(generator *g, kl_generation_stats *stats)
{
    double start = kl_now();
    KL_TRY(prefill(g));
    kl_model_trim(g->m, DECODE_WORKSPACE);
    double middle = kl_now();
    int64_t steps = 0;
    KL_TRY(decode(g, &steps));
    if (!stats)
        return kl_ok();
    *stats = (kl_generation_stats){.prefill_seconds = middle - start, .decode_seconds = kl_now() - middle, .decode_steps = steps,
                                   .cache_bytes = g->cache->bytes};
    for (int64_t n = 0; n < g->N; n++) {
        stats->prompt_tokens += g->seq[n].length;
        stats->new_tokens += *g->seq[n].count;
    }
    return kl_ok();
}

kl_status kl_generate(kl_model *m, kl_cache *cache, int64_t N, const int32_t *const *ids, const int64_t *lengths,
                      const kl_generation *options, int32_t *const *new_ids, int64_t *new_counts, kl_generation_stats *stats)
{
    KL_TRY(check(m, cache, N, ids, lengths, options, new_ids, new_counts));
    generator g = {.m = m, .cache = cache, .options = options, .N = N, .chunk = options->prefill_chunk ? options->prefill_chunk : DEFAULT_CHUNK};
    kl_status s = set_up(&g, ids, lengths, new_ids, new_counts);
    if (!kl_failed(s))
        s = run(&g, stats);
    free(g.seq);
    free(g.cu);
    free(g.slot);
    free(g.owner);
    free(g.ids);
    free(g.logits);
    free(g.scratch);
    free(g.seen);
    return s;
}
