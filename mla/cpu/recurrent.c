/* The recurrent (absorbed) form. With the keys' weights moved to the query, every head of a token is one query against
 * the latent rows themselves:
 *
 *     s_j = scale [Wk_h^T q_n | q_r] . [latent_j | pe_j],   a_h = sum_j softmax_j(s_j) latent_j,   o_h = Wv_h a_h
 *
 * The keys are cut into pieces whose number depends on the sequence alone; each piece keeps (m, l, sum) of its own, and
 * the pieces are combined in order: the bits depend neither on the threads nor on the neighbours. */
#include "mla/cpu/recurrent.h"

enum {
    JOB_ROWS = 64,                    /* rows that share one reading of the latents */
    MOST_PIECES = 64, LEAST_KEYS = 256, /* of a piece */
    ROUND_JOBS = 256,
};
static const int64_t budget = (int64_t)32 << 20; /* bytes of partial results in a round */

/* One pass over some jobs; also the sizes that its buffers need. */
typedef struct round_size {
    int64_t jobs, rows, parts, most_pieces, most_groups;
} round_size;

typedef struct workspace {
    mla_job *jobs;    /* [jobs] */
    float *rows;      /* [rows,R+Dr]: absorbed queries, later the weighted latents */
    char *packed;     /* [rows / MLA_GROUP] packed groups */
    float *m, *l;     /* [parts] */
    float *o;         /* [parts,R] */
    float *s;         /* [threads, 2, most_groups, MLA_BLOCK, MLA_GROUP] */
    char *scratch;    /* [threads] */
    size_t packed_bytes, scratch_bytes;
    int64_t s_size;
} workspace;

/* Where the next job begins. */
typedef struct cursor {
    int64_t n, i;
} cursor;

static bool next_job(const mla_problem *p, cursor *at, mla_job *job)
{
    while (at->n < p->N && at->i >= mla_queries(p, at->n)) {
        at->n++;
        at->i = 0;
    }
    if (at->n == p->N)
        return false;
    int64_t queries = mla_queries(p, at->n), tokens = mla_min(mla_max(JOB_ROWS / p->H, 1), queries - at->i);
    int64_t keys = p->kv_len[at->n] - queries + at->i + tokens;
    int64_t piece = mla_max(kl_ceil_div(kl_ceil_div(keys, MOST_PIECES), MLA_BLOCK) * MLA_BLOCK, LEAST_KEYS);
    *job = (mla_job){.n = at->n, .i0 = at->i, .tokens = tokens, .keys = keys, .piece = piece, .pieces = kl_ceil_div(keys, piece),
                     .groups = kl_ceil_div(tokens * p->H, MLA_GROUP)};
    return true;
}

/* The jobs of the round that begins at *at, which moves on; jobs may be NULL. No jobs: the end. */
static round_size next_round(const mla_problem *p, cursor *at, mla_job *jobs)
{
    round_size round = {0};
    mla_job job;
    while (round.jobs < ROUND_JOBS && next_job(p, at, &job)) {
        int64_t parts = job.pieces * job.groups * MLA_GROUP;
        if (round.jobs && round.parts + parts > budget / (p->R * (int64_t)sizeof(float)))
            break;
        job.row = round.rows;
        job.part = round.parts;
        if (jobs)
            jobs[round.jobs] = job;
        round.jobs++;
        round.rows += job.groups * MLA_GROUP;
        round.parts += parts;
        round.most_pieces = mla_max(round.most_pieces, job.pieces);
        round.most_groups = mla_max(round.most_groups, job.groups);
        at->i += job.tokens;
    }
    return round;
}

/* The largest round in each respect. */
static round_size largest_round(const mla_problem *p)
{
    round_size most = {0};
    cursor at = {0, 0};
    for (round_size round = next_round(p, &at, NULL); round.jobs; round = next_round(p, &at, NULL)) {
        most.jobs = mla_max(most.jobs, round.jobs);
        most.rows = mla_max(most.rows, round.rows);
        most.parts = mla_max(most.parts, round.parts);
        most.most_groups = mla_max(most.most_groups, round.most_groups);
    }
    return most;
}

bool mla_has_tiles(const mla_problem *p) { return mla_block_amx(p) != NULL; }

static const mla_block_ops *block_ops(const mla_problem *p)
{
    const mla_block_ops *amx = mla_block_amx(p);
    return amx ? amx : &mla_block_portable;
}

static workspace carve(const kl_ctx *ctx, const mla_problem *p, const mla_block_ops *ops, kl_arena *a)
{
    workspace w = {0};
    round_size most = largest_round(p);
    w.packed_bytes = ops->packed_bytes(p);
    w.s_size = 2 * most.most_groups * MLA_BLOCK * MLA_GROUP;
    w.scratch_bytes = (mla_max((int64_t)ops->scratch_bytes(p, most.most_groups), mla_absorb_scratch(p) * (int64_t)sizeof(float)) + 63) / 64 * 64;
    w.jobs = KL_TAKE(a, mla_job, most.jobs);
    w.rows = KL_TAKE(a, float, kl_mul((size_t)most.rows, (size_t)(p->R + p->Dr), &a->overflow));
    w.packed = KL_TAKE(a, char, kl_mul((size_t)(most.rows / MLA_GROUP), w.packed_bytes, &a->overflow));
    w.m = KL_TAKE(a, float, most.parts);
    w.l = KL_TAKE(a, float, most.parts);
    w.o = KL_TAKE(a, float, kl_mul((size_t)most.parts, (size_t)p->R, &a->overflow));
    w.s = KL_TAKE(a, float, kl_mul((size_t)ctx->threads, (size_t)w.s_size, &a->overflow));
    w.scratch = KL_TAKE(a, char, kl_mul((size_t)ctx->threads, w.scratch_bytes, &a->overflow));
    return w;
}

size_t mla_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    kl_arena a = kl_arena_count();
    if (pass == KL_FORWARD)
        carve(ctx, problem, block_ops(problem), &a);
    return mla_arena_bytes(&a);
}

/* How far scores may exceed m before it follows: sums e^8 times as large are as precise, and moving m costs a pass over o. */
static const float slack = 8.0f;

/* m' = max(m, max_j s_j) where that is more than slack above m, else m; m <- m' and l <- e^(m - m') l, one lane a row. Keys j >= *seen
 * (NULL: all are visible) and those that fill up the last 32 become -inf. Returns e^(m - m'). */
static kl_v raise_top(float *s, int64_t keys, const kl_vi *seen, float *m, float *l)
{
    kl_v old = kl_vload(m), hidden = kl_vset(-INFINITY), most[4] = {old, old, old, old}; /* four chains */
    int64_t padded = kl_ceil_div(keys, 32) * 32;
    for (int64_t j = 0; seen && j < keys; j++) {
        kl_vi show = (int32_t)j < *seen, x = (kl_vi)kl_vload(s + j * MLA_GROUP);
        kl_vstore(s + j * MLA_GROUP, (kl_v)((x & show) | ((kl_vi)hidden & ~show)));
    }
    for (int64_t j = keys; j < padded; j++)
        kl_vstore(s + j * MLA_GROUP, hidden);
    for (int64_t j = 0; j < padded; j += 4)
        for (int64_t c = 0; c < 4; c++)
            most[c] = kl_vmax(kl_vload(s + (j + c) * MLA_GROUP), most[c]);
    kl_v top = kl_vmax(kl_vmax(most[0], most[1]), kl_vmax(most[2], most[3]));
    kl_vi finite = top > hidden, rises = top > old + slack;
    top = (kl_v)(((kl_vi)top & rises) | ((kl_vi)old & ~rises));
    kl_v factor = kl_vexp(old - (kl_v)((kl_vi)top & finite));
    kl_vstore(m, top);
    kl_vstore(l, kl_vload(l) * factor);
    return factor;
}

void mla_exponentials(const float *s, int64_t keys, const float *m, float *l, float *e)
{
    kl_v top = kl_vload(m), sum = {0};
    kl_vi finite = top > kl_vset(-INFINITY);
    kl_v shift = (kl_v)((kl_vi)top & finite); /* 0 where nothing is visible yet */
    for (int64_t j = 0; j < keys; j++) {
        kl_v x = kl_vexp(kl_vload(s + j * MLA_GROUP) - shift);
        kl_vstore(e + j * MLA_GROUP, x);
        sum += x;
    }
    kl_vstore(l, kl_vload(l) + sum);
}

/* a[0..R) = factor o (+ a unless first), where o has the layout of ops. */
static void gather_row(const mla_block_ops *ops, int64_t R, const float *o, float factor, bool first, float *a)
{
    int64_t v = 0;
    for (; v + KL_LANES <= R; v += KL_LANES, o += ops->vector_step)
        kl_vstore(a + v, factor * kl_vload(o) + (first ? (kl_v){0} : kl_vload(a + v)));
    for (int64_t x = 0; v + x < R; x++)
        a[v + x] = factor * o[x] + (first ? 0.0f : a[v + x]);
}

static int64_t row_step(const mla_block_ops *ops, int64_t R) { return ops->row_step ? ops->row_step : R; }

static void rescale(const mla_block_ops *ops, int64_t R, kl_v factor, float *o)
{
    for (int r = 0; r < MLA_GROUP; r++) {
        float f = factor[r], *row = o + r * row_step(ops, R);
        if (f == 1.0f)
            continue;
        int64_t v = 0;
        for (; v + KL_LANES <= R; v += KL_LANES, row += ops->vector_step)
            kl_vstore(row, f * kl_vload(row));
        for (int64_t x = 0; v + x < R; x++)
            row[x] *= f;
    }
}

/* Keys that row r of group g sees, counted from key `from`; rows that only fill up the group see all. */
static kl_vi seen_lanes(const mla_problem *p, const mla_job *job, int64_t g, int64_t from)
{
    kl_vi seen;
    for (int r = 0; r < MLA_GROUP; r++) {
        int64_t token = mla_min((g * MLA_GROUP + r) / p->H, job->tokens - 1);
        seen[r] = (int32_t)mla_max(mla_min(job->keys - job->tokens + token + 1 - from, INT32_MAX), 0);
    }
    return seen;
}

/* The maxima of a block, whose first key is j, and what they mean for the sums so far. */
static void raise_tops(const mla_problem *p, const mla_block_ops *ops, const mla_job *job, int64_t j, bool first, const mla_scored *now, float *m, float *o)
{
    bool all_visible = j + now->keys <= job->keys - job->tokens + 1;
    for (int64_t g = 0; g < job->groups; g++) {
        kl_vi seen = {0};
        if (!all_visible)
            seen = seen_lanes(p, job, g, j);
        kl_v factor = raise_top(now->s + g * MLA_BLOCK * MLA_GROUP, now->keys, all_visible ? NULL : &seen, m + g * MLA_GROUP, now->l + g * MLA_GROUP);
        if (!first)
            rescale(ops, p->R, factor, o + g * MLA_GROUP * p->R);
    }
}

static void run_piece(const mla_problem *p, const mla_block_ops *ops, const workspace *w, const mla_job *job, int64_t piece, float *s, void *scratch)
{
    int64_t begin = piece * job->piece, end = mla_min(begin + job->piece, job->keys), lanes = job->groups * MLA_GROUP;
    size_t part = (size_t)(job->part + piece * lanes);
    float *m = w->m + part, *l = w->l + part, *o = w->o + part * (size_t)p->R, *other = s + job->groups * MLA_BLOCK * MLA_GROUP;
    const void *packed = w->packed + (size_t)(job->row / MLA_GROUP) * w->packed_bytes;
    for (int64_t r = 0; r < lanes; r++) {
        m[r] = -INFINITY;
        l[r] = 0.0f;
    }
    if (ops->begin)
        ops->begin();
    for (int64_t j = begin; j < end; j += MLA_BLOCK) {
        int64_t keys = mla_min(MLA_BLOCK, end - j), next = mla_min(MLA_BLOCK, end - j - keys), row = p->kv_start[job->n] + j;
        if (j == begin || !ops->overlap)
            ops->score(p, row, keys, next, job->groups, packed, scratch, s);
        mla_scored now = {s, keys, m, l};
        raise_tops(p, ops, job, j, j == begin, &now, m, o);
        if (ops->overlap)
            ops->overlap(p, row + keys, next, mla_min(MLA_BLOCK, end - j - keys - next), job->groups, packed, scratch, other, &now);
        for (int64_t g = 0; g < job->groups && !ops->overlap; g++)
            mla_exponentials(s + g * MLA_BLOCK * MLA_GROUP, keys, m + g * MLA_GROUP, l + g * MLA_GROUP, s + g * MLA_BLOCK * MLA_GROUP);
        ops->accumulate(p, row, keys, job->groups, s, scratch, j == begin, o);
        float *done = s;
        s = other;
        other = done;
    }
    if (ops->end)
        ops->end();
}

/* m = max_p m_p,  l = sum_p e^(m_p - m) l_p,  a = sum_p e^(m_p - m) sum_p / l */
static void combine_row(const mla_problem *p, const mla_block_ops *ops, const workspace *w, const mla_job *job, int64_t r)
{
    int64_t lanes = job->groups * MLA_GROUP;
    float top = -INFINITY, l = 0.0f, weight[MOST_PIECES], *a = w->rows + (size_t)(job->row + r) * (size_t)(p->R + p->Dr);
    for (int64_t x = 0; x < job->pieces; x++)
        top = fmaxf(top, w->m[job->part + x * lanes + r]);
    for (int64_t x = 0; x < job->pieces; x++) {
        weight[x] = expf(w->m[job->part + x * lanes + r] - top);
        l += weight[x] * w->l[job->part + x * lanes + r];
    }
    for (int64_t x = 0; x < job->pieces; x++) {
        const float *o = w->o + (size_t)(job->part + x * lanes + r / MLA_GROUP * MLA_GROUP) * (size_t)p->R;
        gather_row(ops, p->R, o + r % MLA_GROUP * row_step(ops, p->R), weight[x] / l, x == 0, a);
    }
    if (ops->order)
        ops->order(p, a);
    if (p->lse)
        p->lse[(size_t)(p->cu_q[job->n] + job->i0) * (size_t)p->H + (size_t)r] = top + logf(l);
}

static void run_round(const kl_ctx *ctx, const mla_problem *p, const mla_block_ops *ops, const workspace *w, round_size round)
{
#pragma omp parallel num_threads(ctx->threads)
    {
        size_t thread = (size_t)omp_get_thread_num();
        float *s = w->s + thread * (size_t)w->s_size;
        char *scratch = w->scratch + thread * w->scratch_bytes;
        mla_absorb(p, w->jobs, round.jobs, (float *)scratch, w->rows);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < round.rows / MLA_GROUP; g++)
            ops->pack(p, w->rows + (size_t)(g * MLA_GROUP) * (size_t)(p->R + p->Dr), w->packed + (size_t)g * w->packed_bytes);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < round.jobs; i++)
            for (int64_t x = 0; x < round.most_pieces; x++)
                if (x < w->jobs[i].pieces)
                    run_piece(p, ops, w, &w->jobs[i], x, s, scratch);
#pragma omp for collapse(2) schedule(static)
        for (int64_t i = 0; i < round.jobs; i++)
            for (int64_t r = 0; r < round.most_groups * MLA_GROUP; r++)
                if (r < w->jobs[i].tokens * p->H)
                    combine_row(p, ops, w, &w->jobs[i], r);
        mla_project(p, w->jobs, round.jobs, (float *)scratch, w->rows);
    }
}

kl_status mla_recurrent_forward(kl_ctx *ctx, const void *problem, void *memory, size_t bytes)
{
    const mla_problem *p = problem;
    KL_TRY(mla_enter_cpu(ctx, p, true));
    KL_TRY(mla_check_workspace(memory, bytes, mla_recurrent_workspace(ctx, p, KL_FORWARD)));
    const mla_block_ops *ops = block_ops(p);
    kl_arena a = kl_arena_over(memory, bytes);
    workspace w = carve(ctx, p, ops, &a);
    cursor at = {0, 0};
    for (round_size round = next_round(p, &at, w.jobs); round.jobs; round = next_round(p, &at, w.jobs))
        run_round(ctx, p, ops, &w, round);
    return kl_ok();
}
