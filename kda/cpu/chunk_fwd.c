/* Chunkwise forward: within a chunk every token's correction u comes from one triangular system, so that the state is
 * read twice and written once a chunk instead of once a token. Chunks start at the start of each sequence. */
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tile.h"
#include "kda/cpu/chunk.h"
#include "kda/cpu/state.h"

typedef struct scratch {
    kda_chunk chunk;
    float *S; /* [Kp,Vp] */
} scratch;

static scratch take_scratch(kl_arena *a, const kda_problem *p)
{
    scratch s = {.chunk = kda_chunk_take(a, p)};
    s.S = KL_TAKE(a, float, kl_tile_pad(p->K) * kda_leading(kl_tile_pad(p->V)));
    return s;
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
    const kda_problem *p = w->p;
    int64_t K = p->K, V = p->V, size = K * V, head = kda_slot(p, w->n) * p->HV + w->hv;
    kda_span span = kda_sequence(p->T, p->cu_seqlens, w->n);
    kda_state_load(p->state_layout, K, V, p->h0 ? (const float *)p->h0 + head * size : NULL, w->v0, w->columns, w->Kp, s->S, w->Vl);
    for (int64_t i = 0; i < span.length; i += w->C) {
        int64_t t = span.begin + i, count = span.length - i < w->C ? span.length - i : w->C;
        if (p->chunk_states)
            kda_state_store(p->state_layout, K, V, s->S, w->Vl, w->v0, w->columns,
                            p->chunk_states + ((first_chunk + i / w->C) * p->HV + w->hv) * size);
        kda_chunk_load(w, t, count, &s->chunk);
        kda_chunk_prepare(w, count, &s->chunk);
        int64_t next = i + w->C, left = span.length - next;
        if (left > 0)
            kda_chunk_look_ahead(w, span.begin + next, left < w->C ? left : w->C, &s->chunk);
        kda_chunk_apply(w, count, KDA_READ | KDA_WRITE, s->S, &s->chunk, NULL);
        store_output(w, t, count, s->chunk.o);
    }
    if (p->ht)
        kda_state_store(p->state_layout, K, V, s->S, w->Vl, w->v0, w->columns, (float *)p->ht + head * size);
}

static size_t scratch_bytes(const kda_problem *p)
{
    kl_arena a = kl_arena_count();
    take_scratch(&a, p);
    return a.used;
}

size_t kda_cpu_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const kda_problem *p = problem;
    if (pass == KL_BACKWARD)
        return kda_cpu_chunk_backward_workspace(ctx, p);
    kl_arena a = kl_arena_count();
    KL_TAKE(&a, int64_t, p->N);
    kl_arena_take(&a, (size_t)ctx->threads, scratch_bytes(p));
    return a.used;
}

kl_status kda_cpu_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = problem;
    kl_arena a = kl_arena_over(workspace, bytes);
    int64_t *first_chunk = KL_TAKE(&a, int64_t, p->N);
    size_t each = scratch_bytes(p);
    char *scratches = kl_arena_take(&a, (size_t)ctx->threads, each);
    KL_REQUIRE(!a.overflow, "kda: workspace: expected %zu bytes, got %zu", kda_cpu_chunk_workspace(ctx, p, KL_FORWARD), bytes);
    kda_first_chunks(p, first_chunk);
    int64_t panels = kda_panels_a_head(p->N * p->HV, p->V, ctx->threads), width = kl_tile_pad(kl_ceil_div(p->V, panels)), tasks = p->N * p->HV * panels;
    bool split = kda_chunk_splits(p);
#pragma omp parallel num_threads(ctx->threads)
    {
        if (split)
            kl_split_begin();
        unsigned mode = kl_flush_subnormals();
        kl_arena mine = kl_arena_over(scratches + (size_t)omp_get_thread_num() * each, each);
        scratch s = take_scratch(&mine, p);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            int64_t head = i / panels, v0 = i % panels * width, n = head / p->HV;
            if (v0 >= p->V)
                continue;
            kda_panel w = kda_panel_make(p, n, head % p->HV, v0, p->V - v0 < width ? p->V - v0 : width, split);
            w.Vl = kda_leading(w.Vp);
            run_panel(&w, first_chunk[n], &s);
        }
        if (split)
            kl_split_end();
        kl_restore_subnormals(mode);
    }
    return kl_ok();
}
