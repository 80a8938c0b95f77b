/* A decode step: queries into the latent space, attention in parts, the parts joined, results out of the latent space. */
#include "common/gpu.h"
#include "mla/cuda/join.cuh"
#include "mla/cuda/schedule.h"

namespace {

struct workspace {
    void *table;
    uint16_t *q, *a;
    float *sum, *sum_lse;
};

int64_t tokens_of(const mla_problem *p) { return p->N ? p->cu_q[p->N] - p->cu_q[0] : 0; }

int parts_at_most(const kl_ctx *ctx) { return (int)mla_min(kl_gpu_multiprocessors(ctx), MLA_MOST_PARTS); }

/* Rows of the largest tile. */
int64_t room_of(const mla_problem *p)
{
    int64_t most = 1;
    for (int64_t n = 0; n < p->N; n++)
        most = mla_max(most, mla_queries(p, n) * p->H);
    return mla_min(most, MLA_TILE_ROWS);
}

workspace carve(const kl_ctx *ctx, const mla_problem *p, kl_arena *a)
{
    int64_t rows = tokens_of(p) * p->H, slots = 2 * parts_at_most(ctx) * room_of(p);
    workspace w;
    w.table = kl_arena_take(a, mla_table_bytes(p), 1);
    w.q = KL_TAKE(a, uint16_t, rows * MLA_WIDTH);
    w.a = KL_TAKE(a, uint16_t, rows * MLA_R);
    w.sum = KL_TAKE(a, float, slots * MLA_R);
    w.sum_lse = KL_TAKE(a, float, slots);
    return w;
}

/* A matrix of 576 columns as the 9 panels of 64 that a tile in shared memory has. */
kl_status describe(kl_tensor_map *map, const char *name, const void *base, int64_t rows)
{
    kl_tensor_shape s;
    s.dims = 3;
    s.size[0] = s.box[0] = 64;
    s.size[1] = rows;
    s.box[1] = MLA_TILE_ROWS;
    s.size[2] = s.box[2] = PANELS;
    s.stride[1] = MLA_WIDTH;
    s.stride[2] = 64;
    return kl_tensor_describe(map, name, base, s);
}

kl_status launch_attend(const kl_ctx *ctx, const attention &p)
{
    kl_range range("mla attend");
    kl_grid g;
    g.x = p.table.parts;
    g.threads = THREADS;
    g.shared = sizeof(shared);
    g.overlap = true;
    return kl_launch(ctx, "mla attend", g, attend, p);
}

template <int WARPS> kl_status launch_join(const kl_ctx *ctx, const attention &p)
{
    kl_range range("mla join");
    kl_grid g;
    g.x = (int64_t)p.table.joins * p.table.room * QUARTERS;
    g.threads = 32 * WARPS;
    g.shared = sizeof(join_room<WARPS>);
    g.overlap = true;
    return kl_launch(ctx, "mla join", g, join<WARPS>, p);
}

} // namespace

kl_status mla_cuda_recurrent_check(const void *problem, kl_pass pass)
{
    const mla_problem *p = (const mla_problem *)problem;
    if (pass != KL_FORWARD)
        return kl_error(KL_EUNSUPPORTED, "pass: mla recurrent on cuda offers forward, got backward");
    KL_TRY(mla_check_bf16(p, "recurrent"));
    if (p->R != MLA_R || p->Dr != MLA_DR)
        return kl_error(KL_EUNSUPPORTED, "R, Dr: mla recurrent on cuda offers %d and %d, got %lld and %lld", MLA_R, MLA_DR, (long long)p->R, (long long)p->Dr);
    if (p->Dn > MLA_MOST_DN)
        return kl_error(KL_EUNSUPPORTED, "Dn: mla recurrent on cuda offers at most %d, got %lld", MLA_MOST_DN, (long long)p->Dn);
    return kl_ok();
}

size_t mla_cuda_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass)
{
    const mla_problem *p = (const mla_problem *)problem;
    kl_arena a = kl_arena_count();
    carve(ctx, p, &a);
    return mla_arena_bytes(&a);
}

kl_status mla_cuda_recurrent_forward(kl_ctx *ctx, const void *problem, void *memory, size_t bytes)
{
    const mla_problem *p = (const mla_problem *)problem;
    KL_TRY(mla_enter_cuda(ctx, p, "recurrent", true));
    KL_TRY(mla_cuda_recurrent_check(p, KL_FORWARD));
    KL_TRY(mla_check_workspace(memory, bytes, mla_cuda_recurrent_workspace(ctx, p, KL_FORWARD)));
    int64_t rows = tokens_of(p) * p->H;
    if (rows > INT32_MAX)
        return kl_error(KL_EUNSUPPORTED, "cu_q: mla recurrent on cuda offers at most %d rows of a query and a head, got %lld", INT32_MAX, (long long)rows);
    if (!rows)
        return kl_ok();
    kl_arena arena = kl_arena_over(memory, bytes);
    workspace w = carve(ctx, p, &arena);
    attention x = {};
    mla_schedule schedule;
    mla_cut_up(p, parts_at_most(ctx), &schedule);
    x.table.room = (int)room_of(p);
    x.a = w.a;
    x.lse = p->lse ? p->lse + p->cu_q[0] * p->H : nullptr;
    x.sum = w.sum;
    x.sum_lse = w.sum_lse;
    KL_TRY(describe(&x.q, "workspace", w.q, rows));
    KL_TRY(describe(&x.latent, "latent", p->latent, p->latent_rows));
    KL_TRY(mla_make_table(ctx, p, &schedule, w.table, &x.table));
    KL_TRY(mla_cuda_absorb(ctx, p, w.q));
    KL_TRY(launch_attend(ctx, x));
    bool few = (int64_t)x.table.joins * x.table.room * QUARTERS <= 2 * kl_gpu_multiprocessors(ctx);
    KL_TRY(few ? launch_join<16>(ctx, x) : launch_join<4>(ctx, x));
    return mla_cuda_project(ctx, p, w.a);
}
