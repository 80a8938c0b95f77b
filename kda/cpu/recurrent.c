/* Equation 1, token by token: prefill of few tokens, the decode step (T = 1), and several tokens a step with the
 * state after each. Columns of V never talk to each other, so a head may be cut into panels without changing a bit. */
#include "common/parallel.h"
#include "common/simd.h"
#include "kda/cpu/chunk.h"
#include "kda/cpu/gates.h"
#include "kda/cpu/state.h"

typedef struct token {
    float decay[KDA_MAX_DIM], k[KDA_MAX_DIM], q[KDA_MAX_DIM], dk[KDA_MAX_DIM]; /* dk = decay k */
    float v[KDA_MAX_DIM], o[KDA_MAX_DIM];
    float beta;
} token;

/* Sixteen times `vectors` columns: two passes over the state, the second of which writes it. from may be to. */
KL_INLINE void step_columns(int vectors, const kda_problem *p, token *x, const float *from, int64_t ld_from, float *to, int64_t ld_to,
                         int64_t column)
{
    from += column;
    to += column;
    /* w = (Diag(e^g) S)^T k */
    kl_v w[8] = {{0}};
    if (!p->no_delta)
        for (int64_t c = 0; c < p->K; c++)
#pragma GCC unroll 8
            for (int j = 0; j < vectors; j++)
                w[j] += kl_vload(from + c * ld_from + j * KL_LANES) * x->dk[c];
    /* u = beta (v - w) */
    kl_v u[8], o[8] = {{0}};
#pragma GCC unroll 8
    for (int j = 0; j < vectors; j++)
        u[j] = x->beta * (kl_vload(x->v + column + j * KL_LANES) - w[j]);
    /* S <- Diag(e^g) S + k u^T;   o = S^T q */
    for (int64_t c = 0; c < p->K; c++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) {
            kl_v s = kl_vload(from + c * ld_from + j * KL_LANES) * x->decay[c] + u[j] * x->k[c];
            kl_vstore(to + c * ld_to + j * KL_LANES, s);
            o[j] += s * x->q[c];
        }
#pragma GCC unroll 8
    for (int j = 0; j < vectors; j++)
        kl_vstore(x->o + column + j * KL_LANES, o[j]);
}

static void step(const kda_problem *p, token *x, const float *from, int64_t ld_from, float *to, int64_t ld_to, int64_t columns)
{
    int64_t j = 0, end = kl_tile_pad(columns);
    for (; j + 8 * KL_LANES <= end; j += 8 * KL_LANES)
        step_columns(8, p, x, from, ld_from, to, ld_to, j);
    for (; j + 4 * KL_LANES <= end; j += 4 * KL_LANES)
        step_columns(4, p, x, from, ld_from, to, ld_to, j);
    for (; j < end; j += KL_LANES)
        step_columns(1, p, x, from, ld_from, to, ld_to, j);
}

static void load_token(const kda_problem *p, int64_t t, int64_t hv, int64_t v0, int64_t columns, token *x)
{
    int64_t K = p->K, h = hv / (p->HV / p->H);
    const float *q = (const float *)p->q + t * kda_stride(p->q_stride, p->H * K) + h * K;
    const float *k = (const float *)p->k + t * kda_stride(p->k_stride, p->H * K) + h * K;
    const float *v = (const float *)p->v + t * kda_stride(p->v_stride, p->HV * p->V) + hv * p->V + v0;
    kda_unit_row(p->qk_l2norm, K, kda_scale(p->scale, K), q, x->q);
    kda_unit_row(p->qk_l2norm, K, 1.0f, k, x->k);
    const float *g = p->G ? (const float *)p->g + t * kda_stride(p->g_stride, p->HV * p->G) + hv * p->G : NULL;
    kda_decay_row(p, hv, g, x->decay);
    for (int64_t c = 0; c < kl_tile_pad(K); c += KL_LANES)
        kl_vstore(x->dk + c, kl_vload(x->decay + c) * kl_vload(x->k + c));
    x->beta = kda_beta_value(p->beta_kind, ((const float *)p->beta)[t * kda_stride(p->beta_stride, p->HV) + hv]);
    memcpy(x->v, v, (size_t)columns * sizeof(float));
    memset(x->v + columns, 0, (size_t)(kl_tile_pad(columns) - columns) * sizeof(float));
}

/* One panel of one head of one sequence. The state goes from slot to slot without a copy where the caller's layout
 * is the one that the steps use. */
static void run_panel(const kda_problem *p, int64_t n, int64_t first_chunk, int64_t hv, int64_t v0, int64_t columns, float *scratch)
{
    int64_t K = p->K, V = p->V, C = kda_chunk_tokens(p), size = K * V;
    kda_span span = kda_sequence(p->T, p->cu_seqlens, n);
    int64_t slot = kda_slot(p, n) * p->HV + hv, ld = kl_tile_pad(columns);
    const float *h0 = p->h0 ? (const float *)p->h0 + slot * size : NULL;
    float *ht = p->ht ? (float *)p->ht + slot * size : NULL;
    bool direct = p->state_layout == KDA_STATE_KV && columns % KL_LANES == 0;

    const float *S = scratch;
    int64_t ld_S = ld;
    if (direct && h0) {
        S = h0 + v0;
        ld_S = V;
    } else {
        kda_state_load(p->state_layout, K, V, h0, v0, columns, K, scratch, ld);
    }
    token x;
    for (int64_t i = 0; i < span.length; i++) {
        int64_t t = span.begin + i;
        if (p->chunk_states && i % C == 0)
            kda_state_store(p->state_layout, K, V, S, ld_S, v0, columns, p->chunk_states + ((first_chunk + i / C) * p->HV + hv) * size);
        float *after = p->token_states ? p->token_states + (t * p->HV + hv) * size : i == span.length - 1 ? ht : NULL;
        float *to = direct && after ? after + v0 : scratch;
        int64_t ld_to = direct && after ? V : ld;
        load_token(p, t, hv, v0, columns, &x);
        step(p, &x, S, ld_S, to, ld_to, columns);
        S = to;
        ld_S = ld_to;
        if (after && !direct)
            kda_state_store(p->state_layout, K, V, S, ld_S, v0, columns, after);
        memcpy((float *)p->o + t * kda_stride(p->o_stride, p->HV * V) + hv * V + v0, x.o, (size_t)columns * sizeof(float));
    }
    if (ht && (span.length == 0 || p->token_states) && S != ht + v0)
        kda_state_store(p->state_layout, K, V, S, ld_S, v0, columns, ht);
}

static int64_t scratch_floats(const kda_problem *p) { return p->K * kl_tile_pad(p->V); }

size_t kda_cpu_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const kda_problem *p = problem;
    if (pass != KL_FORWARD)
        return 0;
    kl_arena a = kl_arena_count();
    KL_TAKE(&a, float, scratch_floats(p) * ctx->threads);
    KL_TAKE(&a, int64_t, p->N);
    return a.used;
}

kl_status kda_cpu_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = problem;
    kl_arena a = kl_arena_over(workspace, bytes);
    float *scratch = KL_TAKE(&a, float, scratch_floats(p) * ctx->threads);
    int64_t *first_chunk = KL_TAKE(&a, int64_t, p->N);
    KL_REQUIRE(!a.overflow, "kda: workspace: expected %zu bytes, got %zu", kda_cpu_recurrent_workspace(ctx, p, KL_FORWARD), bytes);
    kda_first_chunks(p, first_chunk);
    int64_t panels = kda_panels_a_head(p->N * p->HV, p->V, ctx->threads), width = kl_tile_pad(kl_ceil_div(p->V, panels)), tasks = p->N * p->HV * panels;
#pragma omp parallel num_threads(ctx->threads)
    {
        unsigned mode = kl_flush_subnormals();
        float *mine = scratch + omp_get_thread_num() * scratch_floats(p);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            int64_t head = i / panels, v0 = i % panels * width;
            if (v0 < p->V)
                run_panel(p, head / p->HV, first_chunk[head / p->HV], head % p->HV, v0, p->V - v0 < width ? p->V - v0 : width, mine);
        }
        kl_restore_subnormals(mode);
    }
    return kl_ok();
}
