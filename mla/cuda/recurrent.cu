/* Attention of absorbed queries on the latents themselves. A block of three roles on every multiprocessor, each latent row read once:
 *
 *     loader    a warp: Q of a tile (64 x 576), then its keys, 64 latent rows at a time, into a ring of two
 *     groups    two warpgroups, each: S = Q K^T (64 x 64); P = 2^(S - m); O += P latent for 256 of the 512 columns
 *
 * Both groups compute all of S: that costs the matrix unit a third more, which it has to spare, and nothing has to be handed over. */
#include "common/gpu.h"
#include "mla/cuda/absorb.cuh"
#include "mla/cuda/schedule.h"

namespace {

enum { GROUPS = 2, WARPS = 4 * GROUPS, THREADS = 32 * (WARPS + 4), STAGES = 2, COLUMNS = MLA_R / GROUPS };
/* Registers a thread of the loader's warpgroup and of the others. */
enum { LOADING = 24, ATTENDING = 240 };
enum { PANEL = MLA_TILE_ROWS * 128, PANELS = MLA_WIDTH / 64, TILE_BYTES = PANELS * PANEL };
/* How far, in powers of two, a row's scores may rise above what its exponents count from before the sums are rescaled. */
constexpr float LAG = 8.0f;

struct attention {
    kl_tensor_map q, latent;
    mla_pieces pieces;
    uint16_t *a;       /* [rows,512] of finished tiles */
    float *lse;        /* [rows] natural; may be NULL */
    float *sum;        /* [slots][room][512] */
    float *sum_lse;    /* [slots][room] base 2 */
};

struct shared {
    alignas(1024) unsigned char q[TILE_BYTES];
    alignas(1024) unsigned char latent[STAGES][TILE_BYTES];
    uint64_t q_full, q_empty, full[STAGES], empty[STAGES];
};

/* ---- loading ---- */

__device__ void load(const attention &p, shared &s, int part)
{
    mla_cut at = p.pieces.cut[part], end = p.pieces.cut[part + 1];
    mla_span span;
    for (int tiles = 0, turn = 0; mla_next_span(p.pieces, part, at, end, span); tiles++) {
        int ahead = tiles ? 0 : min(span.end - span.begin, (int)STAGES) - 1; /* the first keys come before the queries are ready */
        for (int block = span.begin; block < span.end; block++, turn++) {
            int stage = turn % STAGES;
            if (block - span.begin == ahead) {
                if (!tiles)
                    kl_grid_wait();
                kl_mbar_wait(&s.q_empty, ~tiles & 1);
                kl_mbar_expect(&s.q_full, TILE_BYTES);
                kl_tensor_load(s.q, &p.q, 0, span.row, 0, &s.q_full);
            }
            kl_mbar_wait(&s.empty[stage], ~(turn / STAGES) & 1);
            kl_mbar_expect(&s.full[stage], TILE_BYTES);
            kl_tensor_load(s.latent[stage], &p.latent, 0, span.start + block * MLA_BLOCK_KEYS, 0, &s.full[stage]);
        }
    }
}

/* ---- one block of keys ---- */

/* S = Q K^T */
__device__ __forceinline__ void scores(float x[32], const unsigned char *q, const unsigned char *latent)
{
    kl_wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4 * PANELS; i++) {
        kl_operand a = kl_operand_at(kl_operand_rows(q + i / 4 * PANEL), i % 4 * 32), b = kl_operand_at(kl_operand_rows(latent + i / 4 * PANEL), i % 4 * 32);
        kl_wgmma<64>(x, a, b, i > 0);
    }
    kl_wgmma_commit();
    kl_wgmma_wait<0>();
}

/* O += P latent[:, 256 group ..] */
__device__ __forceinline__ void accumulate(float o[COLUMNS / 2], const uint32_t a[4][4], const unsigned char *latent, int group)
{
    kl_wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++)
        kl_wgmma<COLUMNS>(o, a[i], kl_operand_at(kl_operand_columns(latent + group * (COLUMNS / 64) * PANEL, PANEL), i * 16 * 128));
    kl_wgmma_commit();
    kl_wgmma_wait<0>();
}

/* What lies behind a sequence's last key may be anything, and 0 times anything is not 0. */
__device__ void clear_beyond(unsigned char *latent, int keys)
{
    const uint4 none = {0, 0, 0, 0};
    int pieces = (MLA_BLOCK_KEYS - keys) * 8;
    for (int i = (int)threadIdx.x; i < pieces * (MLA_R / 64); i += 32 * WARPS)
        *(uint4 *)(latent + i / pieces * PANEL + keys * 128 + i % pieces * 16) = none;
    kl_fence_async_shared();
    kl_barrier(1, 32 * WARPS);
}

/* A row's state: what exponents count from, and its own lane's share of the sum. The rows of a lane: 16 warp + g and + 8. */
struct row_state {
    float m[2], l[2];
    int seen[2]; /* keys that the row sees */
};

/* -inf for keys from `first` on that a row does not see. */
__device__ __forceinline__ void hide(float x[32], const row_state &r, int first)
{
#pragma unroll
    for (int i = 0; i < 32; i++)
        x[i] = first + i / 4 * 8 + kl_lane() % 4 * 2 + i % 2 < r.seen[i / 2 % 2] ? x[i] : -INFINITY;
}

/* P = 2^(S - m) as the next product takes it; m follows the rows' maxima when they lead by more than LAG. */
__device__ __forceinline__ void exponentials(float x[32], row_state &r, float o[COLUMNS / 2], uint32_t a[4][4])
{
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 32; i++)
        top[i / 2 % 2] = fmaxf(top[i / 2 % 2], x[i]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
    }
    if (__any_sync(0xffffffffu, top[0] > r.m[0] + LAG || top[1] > r.m[1] + LAG)) {
        float factor[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float m = top[h] > r.m[h] + LAG ? top[h] : r.m[h];
            factor[h] = m > -INFINITY ? kl_exp2(r.m[h] - m) : 1.0f;
            r.l[h] *= factor[h];
            r.m[h] = m;
        }
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++)
            o[i] *= factor[i / 2 % 2];
    }
    float base[2] = {r.m[0] > -INFINITY ? r.m[0] : 0.0f, r.m[1] > -INFINITY ? r.m[1] : 0.0f};
#pragma unroll
    for (int i = 0; i < 32; i++) {
        x[i] = kl_exp2(x[i] - base[i / 2 % 2]);
        r.l[i / 2 % 2] += x[i];
    }
#pragma unroll
    for (int i = 0; i < 16; i++)
        a[i / 4][i % 4] = kl_pack_bf16(x[2 * i], x[2 * i + 1]);
}

/* ---- a tile ---- */

__device__ __forceinline__ void begin_tile(const attention &p, const mla_span &span, int row, row_state &r, float o[COLUMNS / 2])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int token = (span.row + row + 8 * h) / p.pieces.H - (span.row / p.pieces.H - span.token);
        r.seen[h] = span.keys - span.tokens + min(token, span.tokens - 1) + 1;
        r.m[h] = -INFINITY;
        r.l[h] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++)
        o[i] = 0.0f;
}

/* The weighted sums, divided by their weight, and its logarithm: to where the tile's results are, or where they are joined. */
__device__ __forceinline__ void end_tile(const attention &p, const mla_span &span, int row, int group, row_state &r, float o[COLUMNS / 2])
{
    int t = kl_lane() % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float l = r.l[h];
        l += __shfl_xor_sync(0xffffffffu, l, 1);
        l += __shfl_xor_sync(0xffffffffu, l, 2);
        float share = l > 0.0f ? 1.0f / l : 0.0f, lse = l > 0.0f ? r.m[h] + kl_log2(l) : -INFINITY;
        int at = row + 8 * h;
        if (at >= span.rows)
            continue;
        bool teller = group == 0 && t == 0;
        if (span.slot < 0) {
            if (teller && p.lse)
                p.lse[span.row + at] = lse * 0.693147181f;
            uint16_t *a = p.a + (int64_t)(span.row + at) * MLA_R + group * COLUMNS + 2 * t;
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; i++)
                *(uint32_t *)(a + 8 * i) = kl_pack_bf16(o[4 * i + 2 * h] * share, o[4 * i + 2 * h + 1] * share);
        } else {
            int64_t slot = (int64_t)span.slot * p.pieces.room + at;
            if (teller)
                p.sum_lse[slot] = lse;
            float *sum = p.sum + slot * MLA_R + group * COLUMNS + 2 * t;
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; i++)
                *(float2 *)(sum + 8 * i) = make_float2(o[4 * i + 2 * h] * share, o[4 * i + 2 * h + 1] * share);
        }
    }
}

__device__ void attend_all(const attention &p, shared &s, int part, int warp)
{
    mla_cut at = p.pieces.cut[part], end = p.pieces.cut[part + 1];
    mla_span span;
    int group = warp / 4, row = warp % 4 * 16 + kl_lane() / 4;
    float o[COLUMNS / 2];
    row_state r;
    for (int tiles = 0, turn = 0; mla_next_span(p.pieces, part, at, end, span); tiles++) {
        begin_tile(p, span, row, r, o);
        int all_see = span.keys - span.tokens + span.token + 1; /* keys that every row sees */
        kl_mbar_wait(&s.q_full, tiles & 1);
        for (int block = span.begin; block < span.end; block++, turn++) {
            int stage = turn % STAGES, first = block * MLA_BLOCK_KEYS;
            float x[32];
            uint32_t a[4][4];
            kl_mbar_wait(&s.full[stage], turn / STAGES & 1);
            if (span.keys - first < MLA_BLOCK_KEYS)
                clear_beyond(s.latent[stage], span.keys - first);
            scores(x, s.q, s.latent[stage]);
            if (first + MLA_BLOCK_KEYS > all_see)
                hide(x, r, first);
            exponentials(x, r, o, a);
            accumulate(o, a, s.latent[stage], group);
            if (kl_lane() == 0)
                kl_mbar_arrive(&s.empty[stage]);
        }
        if (kl_lane() == 0)
            kl_mbar_arrive(&s.q_empty);
        end_tile(p, span, row, group, r, o);
    }
}

__global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ attention p)
{
    KL_SHARED(memory);
    shared &s = *(shared *)memory;
    int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0), part = (int)blockIdx.x;
    if (threadIdx.x == 0) {
        kl_mbar_init(&s.q_full, 1);
        kl_mbar_init(&s.q_empty, WARPS);
        for (int i = 0; i < STAGES; i++) {
            kl_mbar_init(&s.full[i], 1);
            kl_mbar_init(&s.empty[i], WARPS);
        }
        kl_mbar_init_fence();
    }
    __syncthreads();
    kl_grid_release();
    if (warp >= WARPS) {
        kl_registers_fewer<LOADING>();
        if (warp == WARPS && kl_lane() == 0)
            load(p, s, part);
    } else {
        kl_registers_more<ATTENDING>();
        attend_all(p, s, part, warp);
    }
}

/* ---- joining: a = sum_i 2^(lse_i - lse) a_i; a block takes 128 columns of one row, its warps a part each in turn ---- */

enum { JOIN_THREADS = 256, JOIN_WARPS = JOIN_THREADS / 32, QUARTERS = MLA_R / 128, AT_ONCE = 16 };

struct join_room {
    float4 sum[JOIN_WARPS][32];
    float weight[MLA_MOST_PARTS];
};

__device__ int64_t slot_row(const attention &p, const mla_join &j, int i, int r) { return (int64_t)mla_slot(j.part + i, i == 0) * p.pieces.room + r; }

/* Weights of the parts; done by one warp. */
__device__ void weigh(const attention &p, const mla_join &j, int r, bool tell, float *weight)
{
    float top = -INFINITY, sum = 0.0f;
    for (int i = kl_lane(); i < j.parts; i += 32)
        top = fmaxf(top, p.sum_lse[slot_row(p, j, i, r)]);
    for (int m = 16; m; m >>= 1)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, m));
    for (int i = kl_lane(); i < j.parts; i += 32) {
        weight[i] = kl_exp2(p.sum_lse[slot_row(p, j, i, r)] - top);
        sum += weight[i];
    }
    sum = kl_warp_sum(sum);
    for (int i = kl_lane(); i < j.parts; i += 32)
        weight[i] /= sum;
    if (tell && p.lse && kl_lane() == 0)
        p.lse[j.row + r] = (top + kl_log2(sum)) * 0.693147181f;
}

__device__ void join_row(const attention &p, const mla_join &j, int r, int quarter, join_room &s)
{
    int warp = (int)threadIdx.x / 32, lane = kl_lane();
    if (warp == 0)
        weigh(p, j, r, quarter == 0, s.weight);
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f}, x[AT_ONCE];
    for (int first = warp; first < j.parts || first == warp; first += AT_ONCE * JOIN_WARPS) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + i * JOIN_WARPS < j.parts)
                x[i] = *(const float4 *)(p.sum + slot_row(p, j, first + i * JOIN_WARPS, r) * MLA_R + quarter * 128 + 4 * lane);
        if (first == warp)
            __syncthreads();
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + i * JOIN_WARPS < j.parts) {
                float w = s.weight[first + i * JOIN_WARPS];
                sum.x += w * x[i].x, sum.y += w * x[i].y, sum.z += w * x[i].z, sum.w += w * x[i].w;
            }
    }
    s.sum[warp][lane] = sum;
    __syncthreads();
    if (warp)
        return;
    for (int i = 1; i < JOIN_WARPS; i++) {
        float4 other = s.sum[i][lane];
        sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    *(uint2 *)(p.a + (int64_t)(j.row + r) * MLA_R + quarter * 128 + 4 * lane) = make_uint2(kl_pack_bf16(sum.x, sum.y), kl_pack_bf16(sum.z, sum.w));
}

__global__ void __launch_bounds__(JOIN_THREADS) join(const __grid_constant__ attention p)
{
    KL_SHARED(memory);
    int quarter = (int)(blockIdx.x % QUARTERS), r = (int)(blockIdx.x / QUARTERS) % p.pieces.room;
    mla_join j = p.pieces.join[blockIdx.x / (QUARTERS * p.pieces.room)];
    kl_grid_wait();
    kl_grid_release();
    if (r < j.rows)
        join_row(p, j, r, quarter, *(join_room *)memory);
}

/* ---- the step ---- */

struct workspace {
    void *pieces;
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
    w.pieces = kl_arena_take(a, mla_pieces_bytes(p), 1);
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
    kl_grid g;
    g.x = p.pieces.parts;
    g.threads = THREADS;
    g.shared = sizeof(shared);
    g.overlap = true;
    return kl_launch(ctx, "mla attend", g, attend, p);
}

kl_status launch_join(const kl_ctx *ctx, const attention &p)
{
    kl_grid g;
    g.x = (int64_t)p.pieces.joins * p.pieces.room * QUARTERS;
    g.threads = JOIN_THREADS;
    g.shared = sizeof(join_room);
    g.overlap = true;
    return kl_launch(ctx, "mla join", g, join, p);
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
    x.pieces.room = (int)room_of(p);
    x.a = w.a;
    x.lse = p->lse ? p->lse + p->cu_q[0] * p->H : nullptr;
    x.sum = w.sum;
    x.sum_lse = w.sum_lse;
    KL_TRY(describe(&x.q, "workspace", w.q, rows));
    KL_TRY(describe(&x.latent, "latent", p->latent, p->latent_rows));
    KL_TRY(mla_upload_pieces(ctx, p, &schedule, w.pieces, &x.pieces));
    KL_TRY(mla_cuda_absorb(ctx, p, w.q));
    KL_TRY(launch_attend(ctx, x));
    KL_TRY(launch_join(ctx, x));
    return mla_cuda_project(ctx, p, w.a);
}
