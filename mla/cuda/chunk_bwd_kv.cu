/* The chunk backward for keys and values: a block's 64 keys against the queries that see them, 64 at a time, everything transposed so that
 * P and dS are operands where they are made.
 *
 *     p_ij = 2^(c s_ij - lse2_i)      dv_j = sum_i p_ij do_i      ds_ij = p_ij (do_i . v_j - delta_i)      dk_j = scale sum_i ds_ij q_i
 *
 * One warpgroup takes the left half: S^T = K Q^T of a tile is issued together with dV += P^T dO of the tile before, under which the
 * exponentials run. The other takes the right half likewise: dP^T = V dO^T with dK += dS^T Q. P goes from the one to the other through
 * shared memory, as each thread holds it. One warp loads. */
#include "mla/cuda/chunk_bwd.cuh"

namespace {

enum { GROUPS = 2, GROUP = 128, THREADS = (GROUPS + 1) * GROUP, COMPUTING = 240, LOADING = 24 };
enum { QUERIES = 64, STAGES = 4, DK = MLA_DN + MLA_DR };
enum { P_READY = 1, P_TAKEN }; /* barriers */

struct arguments {
    kl_tensor_map q, q_pe, d_o, k, pe, v;
    int q_pe_column, pe_column;
    mla_sequences sequences;
    int64_t items;
    float scale_log2, scale;
    int head0, Dn, Dr, Dv;
    const float2 *stats; /* [Tq, sequences.heads] lse2, delta */
    uint16_t *dexpanded, *dpe;
};

struct shared {
    alignas(1024) unsigned char k[MLA_PANELS][MLA_KEY_BLOCK * 128];
    alignas(1024) unsigned char v[MLA_V_PANELS][MLA_KEY_BLOCK * 128];
    struct {
        alignas(1024) unsigned char q[MLA_PANELS][QUERIES * 128], d_o[MLA_V_PANELS][QUERIES * 128];
    } tile[STAGES];
    uint4 p[QUERIES / 16][GROUP];
    struct {
        alignas(8) float lse2[QUERIES], delta[QUERIES];
    } stats[STAGES];
    uint64_t k_full, k_empty, full[STAGES], empty[STAGES];
};
static_assert(sizeof(shared) <= 232448, "a block has 227 KB");
static_assert(STAGES >= 3, "the next tile is waited for before the last one is released");

/* Query i sees the keys up to first + i. Tiles of queries begin .. end-1 see some of the block's keys, those from `whole` on all. */
struct stretch {
    int first, begin, whole, end;
};

__device__ __forceinline__ stretch stretch_of(const mla_item &it)
{
    stretch t;
    int key = it.block * MLA_KEY_BLOCK;
    t.first = it.s.keys - it.s.queries;
    t.begin = max(key - t.first, 0) / QUERIES;
    t.whole = (max(key + MLA_KEY_BLOCK - 1 - t.first, 0) + QUERIES - 1) / QUERIES;
    t.end = (it.s.queries + QUERIES - 1) / QUERIES;
    return t;
}

/* ---- loading: one warp ---- */

/* lse2 and delta of a tile's queries; of one that does not exist lse2 is infinite: it sees nothing. */
__device__ __forceinline__ void load_stats(shared &m, const arguments &a, const mla_item &it, int tile, int stage)
{
    for (int i = kl_lane(); i < QUERIES; i += 32) {
        int query = tile * QUERIES + i;
        float2 stat = make_float2(INFINITY, 0.0f);
        if (query < it.s.queries)
            stat = a.stats[(it.s.q_row + query) * a.sequences.heads + it.head];
        m.stats[stage].lse2[i] = stat.x;
        m.stats[stage].delta[i] = stat.y;
    }
    kl_mbar_arrive(&m.full[stage]);
}

__device__ void load(shared &m, const arguments &a)
{
    int n = 0, round = 0, lane = kl_lane();
    for (int64_t x = blockIdx.x; x < a.items; x += gridDim.x, round++) {
        mla_item it = mla_find_item<true>(a.sequences, x);
        stretch t = stretch_of(it);
        int row = (int)it.s.key_row + it.block * MLA_KEY_BLOCK, head = a.head0 + it.head;
        kl_mbar_wait(&m.k_empty, (round & 1) ^ 1);
        if (lane == 0) {
            kl_mbar_expect(&m.k_full, sizeof m.k + sizeof m.v);
            kl_tensor_load(m.k[0], &a.k, 0, it.head, row, &m.k_full);
            kl_tensor_load(m.k[1], &a.k, 64, it.head, row, &m.k_full);
            kl_tensor_load(m.k[2], &a.pe, a.pe_column, 0, (int)it.s.pe_row + it.block * MLA_KEY_BLOCK, &m.k_full);
            kl_tensor_load(m.v[0], &a.v, 0, it.head, row, &m.k_full);
            kl_tensor_load(m.v[1], &a.v, 64, it.head, row, &m.k_full);
        }
        for (int i = t.begin; i < t.end; i++, n++) {
            int stage = n % STAGES, q_row = (int)it.s.q_row + i * QUERIES;
            auto &tile = m.tile[stage];
            uint64_t *full = &m.full[stage];
            kl_mbar_wait(&m.empty[stage], (n / STAGES & 1) ^ 1);
            if (lane == 0) {
                kl_mbar_expect(full, sizeof tile);
                kl_tensor_load(tile.q[0], &a.q, 0, head, q_row, full);
                kl_tensor_load(tile.q[1], &a.q, 64, head, q_row, full);
                kl_tensor_load(tile.q[2], &a.q_pe, a.q_pe_column, head, q_row, full);
                kl_tensor_load(tile.d_o[0], &a.d_o, 0, head, q_row, full);
                kl_tensor_load(tile.d_o[1], &a.d_o, 64, head, q_row, full);
            }
            load_stats(m, a, it, i, stage);
        }
    }
}

/* ---- computing: a warpgroup ---- */

__device__ __forceinline__ void await_tile(shared &m, int n) { kl_mbar_wait(&m.full[n % STAGES], n / STAGES & 1); }

/* Sums [64 x N] of a thread: rows (keys) g and g + 8 of its warp's 16; and the operand of the tile before. */
template <int N> struct rows {
    float sum[N / 2];
    uint32_t factor[QUERIES / 16][4];
};
template <int N> __device__ __forceinline__ void pin(rows<N> &r)
{
    kl_pin(r.sum);
    kl_pin(r.factor);
}
/* sum += factor b, b [queries x N]. */
template <int N> __device__ __forceinline__ void add_queries(rows<N> &r, const unsigned char *b)
{
    mla_add_columns<N, QUERIES / 16>(r.sum, r.factor, b, QUERIES * 128);
    kl_wgmma_commit();
}
template <int N> __device__ __forceinline__ void add_last(rows<N> &r, const unsigned char *b)
{
    pin(r);
    kl_wgmma_fence();
    add_queries(r, b);
    kl_wgmma_wait<0>();
    pin(r);
}

/* P^T of tile n, which has come, and dV of the tile before. least: the first query, counted from the tile's first, that sees key g of the warp. */
template <bool first, bool hidden> __device__ __forceinline__ void value_step(rows<MLA_DV> &r, shared &m, int n, bool more, int least, float c)
{
    auto &tile = m.tile[n % STAGES];
    const float *stats = m.stats[n % STAGES].lse2;
    int column = 2 * (kl_lane() & 3), thread = (int)threadIdx.x % GROUP;
    float s[QUERIES / 2] = {};
    kl_pin(s);
    pin(r);
    kl_wgmma_fence();
    mla_multiply_rows<QUERIES, MLA_PANELS>(s, m.k[0], sizeof m.k[0], tile.q[0], sizeof tile.q[0]);
    kl_wgmma_commit();
    if (!first)
        add_queries(r, m.tile[(n - 1) % STAGES].d_o[0]);
    kl_wgmma_wait<first ? 0 : 1>();
    kl_pin(s);
#pragma unroll
    for (int j = 0; j < QUERIES / 8; j++) {
        float2 lse2 = *(const float2 *)(stats + 8 * j + column);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float &x = s[4 * j + e];
            x = kl_exp2(fmaf(x, c, e & 1 ? -lse2.y : -lse2.x));
            if (hidden && 8 * j + column + (e & 1) < least + 8 * (e >> 1))
                x = 0.0f;
        }
    }
    kl_pin(s);
    if (more)
        await_tile(m, n + 1);
    kl_wgmma_wait<0>();
    pin(r);
    if (!first)
        mla_release(&m.empty[(n - 1) % STAGES]);
    mla_pack<QUERIES / 16>(r.factor, s);
    kl_barrier(P_TAKEN, GROUPS * GROUP);
#pragma unroll
    for (int i = 0; i < QUERIES / 16; i++)
        m.p[i][thread] = make_uint4(r.factor[i][0], r.factor[i][1], r.factor[i][2], r.factor[i][3]);
    kl_barrier_arrive(P_READY, GROUPS * GROUP);
}

/* dS^T of tile n, which has come, and dK of the tile before. */
template <bool first> __device__ __forceinline__ void key_step(rows<DK> &r, shared &m, int n, bool more)
{
    auto &tile = m.tile[n % STAGES];
    const float *stats = m.stats[n % STAGES].delta;
    int column = 2 * (kl_lane() & 3), thread = (int)threadIdx.x % GROUP;
    float dp[QUERIES / 2] = {};
    kl_pin(dp);
    pin(r);
    kl_wgmma_fence();
    mla_multiply_rows<QUERIES, MLA_V_PANELS>(dp, m.v[0], sizeof m.v[0], tile.d_o[0], sizeof tile.d_o[0]);
    kl_wgmma_commit();
    if (!first)
        add_queries(r, m.tile[(n - 1) % STAGES].q[0]);
    kl_wgmma_wait<first ? 0 : 1>();
    kl_pin(dp);
    kl_barrier(P_READY, GROUPS * GROUP);
#pragma unroll
    for (int i = 0; i < QUERIES / 16; i++) {
        uint4 p = m.p[i][thread];
        const uint32_t pair[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float2 delta = *(const float2 *)(stats + 16 * i + 8 * (e >> 1) + column);
            float *x = dp + 8 * i + 2 * e;
            x[0] = kl_bf16_low(pair[e]) * (x[0] - delta.x);
            x[1] = kl_bf16_high(pair[e]) * (x[1] - delta.y);
        }
    }
    kl_pin(dp);
    kl_barrier_arrive(P_TAKEN, GROUPS * GROUP);
    if (more)
        await_tile(m, n + 1);
    kl_wgmma_wait<0>();
    pin(r);
    if (!first)
        mla_release(&m.empty[(n - 1) % STAGES]);
    mla_pack<QUERIES / 16>(r.factor, dp);
}

/* Columns [8 count] of one row of sums, where the tensor has them. */
template <int count> __device__ __forceinline__ void store(uint16_t *row, const float *c, int columns, float scale)
{
    int column = 2 * (kl_lane() & 3);
#pragma unroll
    for (int j = 0; j < count; j++)
        if (8 * j < columns)
            *(uint32_t *)(row + 8 * j + column) = kl_pack_bf16(c[4 * j] * scale, c[4 * j + 1] * scale);
}

__device__ __forceinline__ void compute_values(shared &m, const arguments &a)
{
    int n = 0, round = 0, row = (int)threadIdx.x / 32 % 4 * 16 + kl_lane() / 4;
    for (int64_t x = blockIdx.x; x < a.items; x += gridDim.x, round++) {
        mla_item it = mla_find_item<true>(a.sequences, x);
        stretch t = stretch_of(it);
        rows<MLA_DV> r = {};
        int i = t.begin, key = it.block * MLA_KEY_BLOCK + row;
        kl_mbar_wait(&m.k_full, round & 1);
        await_tile(m, n);
        value_step<true, true>(r, m, n, i + 1 < t.end, key - t.first - i * QUERIES, a.scale_log2);
        n++;
        for (i++; i < min(t.whole, t.end); i++, n++)
            value_step<false, true>(r, m, n, i + 1 < t.end, key - t.first - i * QUERIES, a.scale_log2);
        for (; i < t.end; i++, n++)
            value_step<false, false>(r, m, n, i + 1 < t.end, 0, a.scale_log2);
        add_last(r, m.tile[(n - 1) % STAGES].d_o[0]);
        mla_release(&m.empty[(n - 1) % STAGES]);
        mla_release(&m.k_empty);
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (key + 8 * h < it.s.keys)
                store<MLA_DV / 8>(a.dexpanded + ((it.s.key_row + key + 8 * h) * a.sequences.heads + it.head) * (a.Dn + a.Dv) + a.Dn, r.sum + 2 * h, a.Dv, 1.0f);
    }
}

__device__ __forceinline__ void compute_keys(shared &m, const arguments &a)
{
    int n = 0, round = 0, row = (int)threadIdx.x / 32 % 4 * 16 + kl_lane() / 4;
    kl_barrier_arrive(P_TAKEN, GROUPS * GROUP);
    for (int64_t x = blockIdx.x; x < a.items; x += gridDim.x, round++) {
        mla_item it = mla_find_item<true>(a.sequences, x);
        stretch t = stretch_of(it);
        rows<DK> r = {};
        kl_mbar_wait(&m.k_full, round & 1);
        await_tile(m, n);
        int i = t.begin;
        key_step<true>(r, m, n, i + 1 < t.end);
        n++;
        for (i++; i < t.end; i++, n++)
            key_step<false>(r, m, n, i + 1 < t.end);
        add_last(r, m.tile[(n - 1) % STAGES].q[0]);
        mla_release(&m.empty[(n - 1) % STAGES]);
        mla_release(&m.k_empty);
        int key = it.block * MLA_KEY_BLOCK + row;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (key + 8 * h >= it.s.keys)
                continue;
            int64_t at = (it.s.key_row + key + 8 * h) * a.sequences.heads + it.head;
            store<MLA_DN / 8>(a.dexpanded + at * (a.Dn + a.Dv), r.sum + 2 * h, a.Dn, a.scale);
            store<MLA_DR / 8>(a.dpe + at * a.Dr, r.sum + MLA_DN / 2 + 2 * h, a.Dr, a.scale);
        }
    }
}

__global__ void __launch_bounds__(THREADS, 1) key_gradients(const __grid_constant__ arguments a)
{
    KL_SHARED(memory);
    shared &m = *(shared *)memory;
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP, 0);
    if (threadIdx.x == 0) {
        kl_mbar_init(&m.k_full, 1);
        kl_mbar_init(&m.k_empty, GROUPS * 4);
        for (int i = 0; i < STAGES; i++) {
            kl_mbar_init(&m.full[i], 1 + 32);
            kl_mbar_init(&m.empty[i], GROUPS * 4);
        }
        kl_mbar_init_fence();
    }
    __syncthreads();
    if (group == GROUPS) {
        kl_registers_fewer<LOADING>();
        if (threadIdx.x < GROUPS * GROUP + 32)
            load(m, a);
    } else {
        kl_registers_more<COMPUTING>();
        if (group == 0)
            compute_values(m, a);
        else
            compute_keys(m, a);
    }
}

} // namespace

kl_status mla_key_gradients(kl_ctx *ctx, const mla_problem *p, const mla_piece &x, const uint16_t *d_o, const float2 *stats, uint16_t *dexpanded, uint16_t *dpe)
{
    arguments a = {};
    int64_t tokens = p->cu_q[p->N], head = p->Dn + p->Dr, expanded = p->Dn + p->Dv, stride = mla_q_stride(p);
    KL_TRY(mla_map_heads(&a.q, "q", p->q, tokens, stride, p->H, head, 0, p->Dn, QUERIES));
    KL_TRY(mla_map_heads(&a.q_pe, "q", p->q, tokens, stride, p->H, head, p->Dn, p->Dr, QUERIES));
    KL_TRY(mla_map_heads(&a.d_o, "d_o", d_o, tokens, p->H * p->Dv, p->H, p->Dv, 0, p->Dv, QUERIES));
    KL_TRY(mla_map_heads(&a.k, "workspace", x.expanded, x.rows, x.heads * expanded, x.heads, expanded, 0, p->Dn, MLA_KEY_BLOCK));
    KL_TRY(mla_map_heads(&a.v, "workspace", x.expanded, x.rows, x.heads * expanded, x.heads, expanded, p->Dn, p->Dv, MLA_KEY_BLOCK));
    KL_TRY(mla_map_heads(&a.pe, "workspace", x.pe, x.pe_rows, x.pe_stride, 1, x.pe_stride, 0, p->Dr, MLA_KEY_BLOCK));
    a.q_pe_column = a.pe_column = p->Dr ? 0 : 64;
    a.sequences = x.sequences;
    a.items = x.sequences.key_blocks * x.heads;
    a.scale = mla_scale(p);
    a.scale_log2 = a.scale * 1.44269504f;
    a.head0 = (int)x.head0;
    a.Dn = (int)p->Dn;
    a.Dr = (int)p->Dr;
    a.Dv = (int)p->Dv;
    a.stats = stats;
    a.dexpanded = dexpanded;
    a.dpe = dpe;
    kl_grid g;
    g.threads = THREADS;
    g.shared = sizeof(shared);
    g.x = a.items;
    return kl_launch(ctx, "mla chunk_bwd_kv", g, key_gradients, a);
}
