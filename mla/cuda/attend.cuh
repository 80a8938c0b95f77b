/* Attention of absorbed queries on the latents themselves. A block of three roles on every multiprocessor, each latent row read once:
 *
 *     loader    a warp: Q of a tile (64 x 576), then its keys, 64 latent rows at a time, into a ring of two
 *     groups    two warpgroups, each: S = Q K^T (64 x 64); P = 2^(S - m); O += P latent for 256 of the 512 columns
 *
 * Both groups compute all of S: that costs the matrix unit a third more, which it has to spare, and nothing has to be handed over. */
#ifndef KL_MLA_CUDA_ATTEND_CUH
#define KL_MLA_CUDA_ATTEND_CUH

#include "mla/cuda/absorb.cuh"
#include "mla/cuda/pieces.cuh"

namespace {

enum { GROUPS = 2, WARPS = 4 * GROUPS, THREADS = 32 * (WARPS + 4), STAGES = 2, COLUMNS = MLA_R / GROUPS };
/* Registers a thread of the loader's warpgroup and of the others. */
enum { LOADING = 24, ATTENDING = 240 };
enum { PANEL = MLA_TILE_ROWS * 128, PANELS = MLA_WIDTH / 64, TILE_BYTES = PANELS * PANEL };
/* How far, in powers of two, a row's scores may rise above what its exponents count from before the sums are rescaled. */
constexpr float LAG = 8.0f;

struct attention {
    kl_tensor_map q, latent;
    mla_table table;
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

__device__ void load(const attention &p, const mla_pieces &pieces, shared &s, int part)
{
    mla_cut at = pieces.cut[part], end = pieces.cut[part + 1];
    mla_span span;
    for (int tiles = 0, turn = 0; mla_next_span(pieces, part, at, end, span); tiles++) {
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
        int token = (span.row + row + 8 * h) / p.table.H - (span.row / p.table.H - span.token);
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
            int64_t slot = (int64_t)span.slot * p.table.room + at;
            if (teller)
                p.sum_lse[slot] = lse;
            float *sum = p.sum + slot * MLA_R + group * COLUMNS + 2 * t;
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; i++)
                *(float2 *)(sum + 8 * i) = make_float2(o[4 * i + 2 * h] * share, o[4 * i + 2 * h + 1] * share);
        }
    }
}

__device__ void attend_all(const attention &p, const mla_pieces &pieces, shared &s, int part, int warp)
{
    mla_cut at = pieces.cut[part], end = pieces.cut[part + 1];
    mla_span span;
    int group = warp / 4, row = warp % 4 * 16 + kl_lane() / 4;
    float o[COLUMNS / 2];
    row_state r;
    for (int tiles = 0, turn = 0; mla_next_span(pieces, part, at, end, span); tiles++) {
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
            kl_mbar_arrive(&s.empty[stage]);
        }
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
        kl_mbar_init(&s.q_empty, 32 * WARPS);
        for (int i = 0; i < STAGES; i++) {
            kl_mbar_init(&s.full[i], 1);
            kl_mbar_init(&s.empty[i], 32 * WARPS);
        }
        kl_mbar_init_fence();
    }
    __syncthreads();
    kl_grid_release();
    mla_pieces pieces = mla_pieces_of(p.table);
    if (warp >= WARPS) {
        kl_registers_fewer<LOADING>();
        if (warp == WARPS && kl_lane() == 0)
            load(p, pieces, s, part);
    } else {
        kl_registers_more<ATTENDING>();
        attend_all(p, pieces, s, part, warp);
    }
}

} // namespace

#endif
