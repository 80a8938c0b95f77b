/* Chunkwise forward: within a chunk every token's correction u comes from one triangular system, so that the state is
 * read twice and written once a chunk instead of once a token. Chunks start at the start of each sequence. */
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tile.h"
#include "kda/cpu/chunk_split.h"
#include "kda/cpu/state.h"

/* On the matrix unit a thread takes a few neighbouring heads of a sequence through their chunks side by side: what it reads
 * of a token lies together, so that pages and the processor's own looking ahead serve all of them. As many as leave the
 * threads equally busy. */
enum { HEADS_ABREAST = 4 };

static int64_t heads_abreast(const kda_problem *p, int threads)
{
    int64_t heads = HEADS_ABREAST, least = kl_ceil_div(p->N * p->HV, threads);
    while (heads > 1 && kl_ceil_div(p->N * kl_ceil_div(p->HV, heads), threads) * heads > least)
        heads--;
    return heads;
}

typedef struct scratch {
    kda_chunk chunk;
    kda_split split;
    float *S[HEADS_ABREAST]; /* [Kp,Vp] */
} scratch;

static scratch take_scratch(kl_arena *a, const kda_problem *p, int threads)
{
    bool split = kda_chunk_splits(p);
    scratch s = {0};
    if (split)
        s.split = kda_split_take(a, p);
    else
        s.chunk = kda_chunk_take(a, p);
    for (int64_t i = 0; i < (split ? heads_abreast(p, threads) : 1); i++)
        s.S[i] = KL_TAKE(a, float, kl_tile_pad(p->K) * kda_leading(kl_tile_pad(p->V)));
    return s;
}

static void load_state(const kda_panel *w, float *S)
{
    const kda_problem *p = w->p;
    int64_t size = p->K * p->V;
    const float *h0 = p->h0 ? (const float *)p->h0 + (kda_slot(p, w->n) * p->HV + w->hv) * size : NULL;
    kda_state_load(p->state_layout, p->K, p->V, h0, w->v0, w->columns, w->Kp, S, w->Vl);
}

static void store_state(const kda_panel *w, const float *S)
{
    const kda_problem *p = w->p;
    if (p->ht)
        kda_state_store(p->state_layout, p->K, p->V, S, w->Vl, w->v0, w->columns,
                        (float *)p->ht + (kda_slot(p, w->n) * p->HV + w->hv) * p->K * p->V);
}

static void store_chunk_state(const kda_panel *w, int64_t chunk, const float *S)
{
    const kda_problem *p = w->p;
    if (p->chunk_states)
        kda_state_store(p->state_layout, p->K, p->V, S, w->Vl, w->v0, w->columns, p->chunk_states + (chunk * p->HV + w->hv) * p->K * p->V);
}

/* Rows that are whole cache lines go past the caches: nobody reads them here, and a line is not fetched to be overwritten. */
static void store_output(const kda_panel *w, int64_t t, int64_t count, const float *o)
{
    const kda_problem *p = w->p;
    int64_t stride = kda_stride(p->o_stride, p->HV * p->V);
    float *to = (float *)p->o + t * stride + w->hv * p->V + w->v0;
    bool lines = (uintptr_t)to % 64 == 0 && stride % 16 == 0 && w->columns % 16 == 0;
    for (int64_t i = 0; i < count; i++, to += stride, o += w->Vl) {
        if (lines && w->split)
            for (int64_t j = 0; j < w->columns; j += KL_LANES)
                kl_vstore_past(to + j, kl_vload(o + j));
        else
            memcpy(to, o, (size_t)w->columns * sizeof(float));
    }
}

static void run_panel(const kda_panel *w, int64_t first_chunk, scratch *s)
{
    kda_span span = kda_sequence(w->p->T, w->p->cu_seqlens, w->n);
    load_state(w, s->S[0]);
    for (int64_t i = 0; i < span.length; i += w->C) {
        int64_t t = span.begin + i, count = span.length - i < w->C ? span.length - i : w->C;
        store_chunk_state(w, first_chunk + i / w->C, s->S[0]);
        kda_chunk_load(w, t, count, &s->chunk);
        kda_chunk_prepare(w, count, &s->chunk);
        kda_chunk_apply(w, count, KDA_READ | KDA_WRITE, s->S[0], &s->chunk, NULL);
        store_output(w, t, count, s->chunk.o);
    }
    store_state(w, s->S[0]);
}

/* All chunks of so many heads, chunk after chunk. */
static void run_heads(const kda_panel *w, int64_t heads, int64_t first_chunk, scratch *s)
{
    kda_span span = kda_sequence(w->p->T, w->p->cu_seqlens, w->n);
    kda_split *x = &s->split;
    for (int64_t h = 0; h < heads; h++)
        load_state(w + h, s->S[h]);
    for (int64_t i = 0; i < span.length; i += w->C)
        for (int64_t h = 0; h < heads; h++) {
            int64_t next = h + 1 < heads ? i : i + w->C, left = span.length - next, count = span.length - i < w->C ? span.length - i : w->C;
            kda_split_look_ahead(w + (h + 1) % heads, span.begin + next, left < w->C ? left : w->C, x);
            store_chunk_state(w + h, first_chunk + i / w->C, s->S[h]);
            kda_split_chunk(w + h, span.begin + i, count, s->S[h], x);
            store_output(w + h, span.begin + i, count, x->chunk.o);
        }
    for (int64_t h = 0; h < heads; h++)
        store_state(w + h, s->S[h]);
}

static size_t scratch_bytes(const kda_problem *p, int threads)
{
    kl_arena a = kl_arena_count();
    take_scratch(&a, p, threads);
    return a.used;
}

size_t kda_cpu_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const kda_problem *p = problem;
    if (pass == KL_BACKWARD)
        return kda_cpu_chunk_backward_workspace(ctx, p);
    kl_arena a = kl_arena_count();
    KL_TAKE(&a, int64_t, p->N);
    kl_arena_take(&a, (size_t)ctx->threads, scratch_bytes(p, ctx->threads));
    return a.used;
}

kl_status kda_cpu_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = problem;
    kl_arena a = kl_arena_over(workspace, bytes);
    int64_t *first_chunk = KL_TAKE(&a, int64_t, p->N);
    size_t each = scratch_bytes(p, ctx->threads);
    char *scratches = kl_arena_take(&a, (size_t)ctx->threads, each);
    KL_REQUIRE(!a.overflow, "kda: workspace: expected %zu bytes, got %zu", kda_cpu_chunk_workspace(ctx, p, KL_FORWARD), bytes);
    kda_first_chunks(p, first_chunk);
    bool split = kda_chunk_splits(p);
    int64_t panels = kda_panels_a_head(p->N * p->HV, p->V, ctx->threads), width = kl_tile_pad(kl_ceil_div(p->V, panels));
    int64_t abreast = split ? heads_abreast(p, ctx->threads) : 1, groups = kl_ceil_div(p->HV, abreast), tasks = p->N * groups * panels;
#pragma omp parallel num_threads(ctx->threads)
    {
        if (split)
            kl_split_begin();
        unsigned mode = kl_flush_subnormals();
        kl_arena mine = kl_arena_over(scratches + (size_t)omp_get_thread_num() * each, each);
        scratch s = take_scratch(&mine, p, ctx->threads);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            int64_t group = i / panels, v0 = i % panels * width, n = group / groups, hv = group % groups * abreast;
            if (v0 >= p->V)
                continue;
            kda_panel w[HEADS_ABREAST];
            int64_t heads = p->HV - hv < abreast ? p->HV - hv : abreast;
            for (int64_t h = 0; h < heads; h++) {
                w[h] = kda_panel_make(p, n, hv + h, v0, p->V - v0 < width ? p->V - v0 : width, split);
                w[h].Vl = kda_leading(w[h].Vp);
            }
            if (split)
                run_heads(w, heads, first_chunk[n], &s);
            else
                run_panel(w, first_chunk[n], &s);
        }
        if (split)
            kl_split_end();
        kl_restore_subnormals(mode);
    }
    return kl_ok();
}
