/* The forward pass: what a call is checked for, and the way through the layers. */
#include <stdlib.h>
#include <string.h>

#include "harness/model_internal.h"

/* ---- a call ---- */

static kl_status check_batch(const kl_model *m, const kl_batch *b)
{
    KL_REQUIRE(m, "model: expected one, got NULL");
    KL_REQUIRE(b, "batch: expected one, got NULL");
    KL_REQUIRE(b->N >= 0, "batch.N: expected at least 0 sequences, got %lld", (long long)b->N);
    KL_REQUIRE(b->cu, "batch.cu: expected [N+1] offsets, got NULL");
    KL_REQUIRE(b->cu[0] == 0, "batch.cu[0]: expected 0, got %lld", (long long)b->cu[0]);
    for (int64_t n = 0; n < b->N; n++)
        KL_REQUIRE(b->cu[n + 1] >= b->cu[n], "batch.cu[%lld]: expected at least cu[%lld] = %lld, got %lld", (long long)(n + 1),
                   (long long)n, (long long)b->cu[n], (long long)b->cu[n + 1]);
    int64_t T = b->cu[b->N], vocab = m->config.vocab_size;
    KL_REQUIRE(b->ids || T == 0, "batch.ids: expected %lld ids, got NULL", (long long)T);
    for (int64_t t = 0; t < T; t++)
        KL_REQUIRE(b->ids[t] >= 0 && b->ids[t] < vocab, "batch.ids[%lld]: expected an id from 0 to %lld, got %d", (long long)t,
                   (long long)(vocab - 1), (int)b->ids[t]);
    return kl_ok();
}

static int64_t slot_of(const kl_batch *b, int64_t n) { return b->slot ? b->slot[n] : n; }

static int compare_slots(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* scratch: [N]. */
static kl_status check_slots(const kl_batch *b, const kl_cache *cache, int64_t *scratch)
{
    if (!b->slot) {
        KL_REQUIRE(b->N <= cache->slots, "batch.N: expected at most the cache's %lld slots, got %lld", (long long)cache->slots,
                   (long long)b->N);
        return kl_ok();
    }
    for (int64_t n = 0; n < b->N; n++) {
        KL_REQUIRE(b->slot[n] >= 0 && b->slot[n] < cache->slots, "batch.slot[%lld]: expected 0 to %lld, got %lld", (long long)n,
                   (long long)(cache->slots - 1), (long long)b->slot[n]);
        scratch[n] = b->slot[n];
    }
    qsort(scratch, (size_t)b->N, sizeof *scratch, compare_slots);
    for (int64_t n = 1; n < b->N; n++)
        KL_REQUIRE(scratch[n] != scratch[n - 1], "batch.slot: expected distinct slots, got %lld twice", (long long)scratch[n]);
    return kl_ok();
}

static kl_status check_lengths(const kl_model *m, const kl_batch *b, const kl_cache *cache)
{
    for (int64_t n = 0; n < b->N; n++) {
        int64_t before = cache ? cache->length[slot_of(b, n)] : 0, added = b->cu[n + 1] - b->cu[n];
        if (cache)
            KL_REQUIRE(added <= cache->capacity - before,
                       "sequence %lld: expected at most the cache's capacity of %lld tokens, got %lld and %lld more", (long long)n,
                       (long long)cache->capacity, (long long)before, (long long)added);
        KL_REQUIRE(m->config.max_length <= 0 || added <= m->config.max_length - before,
                   "sequence %lld: expected at most model_max_length = %lld tokens, got %lld and %lld more", (long long)n,
                   (long long)m->config.max_length, (long long)before, (long long)added);
    }
    return kl_ok();
}

/* The model's index array holds position [T], row [T], kv_start [N], kv_len [N]. */
static kl_status reserve_index(kl_model *m, int64_t T, int64_t N)
{
    size_t count = 2 * (size_t)T + 2 * (size_t)N + 1;
    if (count <= m->index_count)
        return kl_ok();
    count += count / 2;
    int64_t *grown = realloc(m->index, count * sizeof *grown);
    if (!grown)
        return kl_error(KL_ENOMEM, "index of %zu tokens: out of memory", (size_t)T);
    m->index = grown;
    m->index_count = count;
    return kl_ok();
}

kl_status kl_call_begin(kl_call *c, kl_model *m, const kl_batch *batch, kl_cache *cache)
{
    KL_TRY(check_batch(m, batch));
    int64_t N = batch->N, T = batch->cu[N];
    KL_TRY(reserve_index(m, T, N));
    *c = (kl_call){.m = m, .cache = cache, .N = N, .T = T, .cu = batch->cu, .ids = batch->ids, .slot = batch->slot,
                   .position = m->index, .row = m->index + T, .kv_start = m->index + 2 * T, .kv_len = m->index + 2 * T + N};
    if (cache) {
        KL_TRY(kl_cache_matches(cache, &m->config));
        KL_TRY(kl_model_identify(m));
        KL_REQUIRE(!cache->model || cache->model == m->identity,
                   "cache: expected one that this model filled (%016llx), got another's of the same configuration (%016llx)",
                   (unsigned long long)m->identity, (unsigned long long)cache->model);
        KL_TRY(check_slots(batch, cache, c->kv_start));
    }
    KL_TRY(check_lengths(m, batch, cache));
    for (int64_t n = 0; n < N; n++) {
        int64_t slot = slot_of(batch, n), before = cache ? cache->length[slot] : 0;
        c->kv_start[n] = cache ? slot * cache->capacity : c->cu[n];
        c->kv_len[n] = before + c->cu[n + 1] - c->cu[n];
        for (int64_t t = c->cu[n]; t < c->cu[n + 1]; t++) {
            c->position[t] = before + t - c->cu[n];
            c->row[t] = c->kv_start[n] + c->position[t];
        }
    }
    return kl_ok();
}

/* ---- a layer ---- */

void kl_layer_carve(kl_arena *a, const kl_config *c, int64_t T, bool backward, bool chosen, kl_layer_acts *acts)
{
    size_t n = kl_mul((size_t)T, (size_t)c->hidden_size, &a->overflow);
    bool kda = false, mla = false;
    for (int64_t l = 0; l < c->num_layers; l++) {
        kda = kda || c->mixer[l] == KL_MIX_KDA;
        mla = mla || c->mixer[l] == KL_MIX_MLA;
    }
    *acts = (kl_layer_acts){0};
    acts->h_mix = KL_TAKE(a, float, n);
    acts->h_mlp = backward ? KL_TAKE(a, float, n) : acts->h_mix;
    acts->mid = backward ? KL_TAKE(a, float, n) : NULL;
    acts->y = KL_TAKE(a, float, n);
    if (chosen)
        acts->chosen = KL_TAKE(a, int32_t, kl_mul((size_t)T, (size_t)c->top_k, &a->overflow));
    /* A layer is one or the other: they share their place. */
    kl_arena second = *a;
    if (kda)
        kl_kda_carve(a, c, T, backward, &acts->kda);
    if (mla)
        kl_mla_carve(&second, c, T, &acts->mla);
    a->used = a->used > second.used ? a->used : second.used;
    a->overflow = a->overflow || second.overflow;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

size_t kl_layer_scratch(const kl_call *c, const kl_layer_acts *a, kl_pass pass)
{
    const kl_config *k = &c->m->config;
    size_t most = 0;
    bool asked[2][2] = {{false}}; /* layers of one kind have one shape */
    for (int64_t l = 0; l < k->num_layers; l++) {
        bool mla = k->mixer[l] == KL_MIX_MLA, sparse = k->sparse[l];
        if (!asked[0][mla])
            most = larger(most, mla ? kl_mla_scratch(c, l, &a->mla, pass) : kl_kda_scratch(c, l, &a->kda, pass));
        if (!asked[1][sparse])
            most = larger(most, kl_mlp_scratch(c, l, a, pass));
        asked[0][mla] = asked[1][sparse] = true;
    }
    return most;
}

kl_status kl_layer_forward(const kl_call *c, int64_t l, const float *in, const kl_layer_acts *a, float *out)
{
    const kl_ops *ops = c->m->ops;
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    kl_ctx *ctx = c->m->ctx;
    int64_t T = c->T, D = k->hidden_size;
    size_t n = (size_t)(T * D);
    float *mid = a->mid ? a->mid : out;

    /* mid = in + mixer(norm(in)) */
    KL_TRY(ops->rmsnorm(ctx, &w->input_norm, k->rms_norm_eps, T, D, in, D, a->h_mix, D));
    if (mid != in)
        KL_TRY(ops->copy(ctx, mid, in, n * sizeof *mid));
    kl_status s = k->mixer[l] == KL_MIX_MLA ? kl_mla_layer(c, l, a->h_mix, &a->mla, mid) : kl_kda_layer(c, l, a->h_mix, &a->kda, mid);
    if (kl_failed(s))
        return kl_error_in(s, "layer %lld", (long long)l);

    /* out = mid + mlp(norm(mid)) */
    KL_TRY(ops->rmsnorm(ctx, &w->post_norm, k->rms_norm_eps, T, D, mid, D, a->h_mlp, D));
    s = kl_mlp_layer(c, l, a);
    if (kl_failed(s))
        return kl_error_in(s, "layer %lld", (long long)l);
    if (out != mid)
        KL_TRY(ops->copy(ctx, out, mid, n * sizeof *out));
    return ops->add(ctx, out, a->y, n);
}

/* ---- the model ---- */

typedef struct buffers {
    float *x;            /* [T,D] the stream */
    float *last;         /* [N,D] */
    kl_layer_acts acts;
} buffers;

static size_t carve(kl_arena a, const kl_call *c, buffers *b)
{
    const kl_config *k = &c->m->config;
    size_t D = (size_t)k->hidden_size;
    b->x = KL_TAKE(&a, float, kl_mul((size_t)c->T, D, &a.overflow));
    b->last = KL_TAKE(&a, float, kl_mul((size_t)c->N, D, &a.overflow));
    kl_layer_carve(&a, k, c->T, false, false, &b->acts);
    return a.overflow ? SIZE_MAX : a.used;
}

static kl_status lay_out(kl_call *c, buffers *b)
{
    size_t acts = carve(kl_arena_count(), c, b);
    if (acts == SIZE_MAX)
        return kl_error(KL_ENOMEM, "workspace: %lld tokens need more memory than can be addressed", (long long)c->T);
    KL_TRY(kl_model_reserve(c->m, acts));
    carve(kl_arena_over(c->m->workspace, acts), c, b);
    c->scratch_bytes = kl_layer_scratch(c, &b->acts, KL_FORWARD);
    if (c->scratch_bytes > SIZE_MAX - acts)
        return kl_error(KL_ENOMEM, "workspace: %lld tokens need more memory than can be addressed", (long long)c->T);
    KL_TRY(kl_model_reserve(c->m, acts + c->scratch_bytes));
    carve(kl_arena_over(c->m->workspace, acts), c, b);
    c->scratch = (char *)c->m->workspace + acts;
    return kl_ok();
}

static kl_status keep_hidden(const kl_call *c, const kl_outputs *out, int64_t i, const float *x)
{
    if (!out || !out->hidden || !out->hidden[i])
        return kl_ok();
    return c->m->ops->copy(c->m->ctx, out->hidden[i], x, (size_t)(c->T * c->m->config.hidden_size) * sizeof *x);
}

/* Final norm and head. Rows of the stream are spent. */
static kl_status finish(const kl_call *c, const buffers *b, const kl_outputs *out)
{
    if (!out)
        return kl_ok();
    const kl_ops *ops = c->m->ops;
    const kl_config *k = &c->m->config;
    const kl_weights *w = &c->m->weights;
    kl_ctx *ctx = c->m->ctx;
    int64_t D = k->hidden_size;
    float *normed = b->acts.h_mix;
    bool hidden = out->hidden && out->hidden[k->num_layers];
    if (hidden || (out->logits && (!out->last_only || c->T == c->N)))
        KL_TRY(ops->rmsnorm(ctx, &w->norm, k->rms_norm_eps, c->T, D, b->x, D, normed, D));
    KL_TRY(keep_hidden(c, out, k->num_layers, normed));
    if (!out->logits)
        return kl_ok();
    bool each_one = true;
    for (int64_t n = 0; n < c->N; n++)
        each_one = each_one && c->cu[n + 1] - c->cu[n] == 1;
    if (!out->last_only || each_one)
        return ops->linear(ctx, &w->lm_head, c->T, normed, out->logits, false);
    for (int64_t n = 0; n < c->N; n++) {
        /* Runs of sequences that have a token: their rows are neighbours in the output too. */
        int64_t first = n;
        for (; n < c->N && c->cu[n + 1] > c->cu[n]; n++)
            KL_TRY(ops->rmsnorm(ctx, &w->norm, k->rms_norm_eps, 1, D, b->x + (c->cu[n + 1] - 1) * D, D, b->last + n * D, D));
        KL_TRY(ops->linear(ctx, &w->lm_head, n - first, b->last + first * D, out->logits + first * k->vocab_size, false));
    }
    return kl_ok();
}

kl_status kl_model_forward(kl_model *m, const kl_batch *batch, kl_cache *cache, const kl_outputs *out)
{
    kl_call c;
    KL_TRY(kl_call_begin(&c, m, batch, cache));
    if (c.T == 0)
        return kl_ok();
    buffers b;
    KL_TRY(lay_out(&c, &b));
    KL_TRY(m->ops->embed(m->ctx, &m->weights.embed, c.ids, c.T, b.x));
    for (int64_t l = 0; l < m->config.num_layers; l++) {
        KL_TRY(keep_hidden(&c, out, l, b.x));
        KL_TRY(kl_layer_forward(&c, l, b.x, &b.acts, b.x));
    }
    KL_TRY(finish(&c, &b, out));
    if (!cache)
        return kl_ok();
    cache->model = m->identity;
    for (int64_t n = 0; n < c.N; n++)
        kl_cache_advance(cache, slot_of(batch, n), c.cu[n + 1] - c.cu[n]);
    return kl_ok();
}
