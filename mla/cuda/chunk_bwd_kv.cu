/* The chunk backward for keys and values: a block's 64 keys against the queries that see them, 64 at a time, everything transposed so that
 * P and dS are operands where they are made.
 *
 *     p_ij = 2^(c s_ij - lse2_i)      dv_j = sum_i p_ij do_i      ds_ij = p_ij (do_i . v_j - delta_i)      dk_j = scale sum_i ds_ij q_i
 *
 * One warpgroup takes the left half, with K in registers: S^T = K Q^T of a tile is issued together with dV += P^T dO of the tile before, under
 * which the exponentials run. The other takes the right half likewise, with V: dP^T = V dO^T with dK += dS^T Q. P goes from each warp of the one
 * to the same warp of the other through shared memory, as each thread holds it.
 *
 * Two blocks, with neighbouring keys of a head, form a cluster: each loads one half of every tile of queries, for both. A block waits for all
 * that the other sends it, so either may end first. */
#include "mla/cuda/chunk_bwd.cuh"

namespace {

enum { BLOCKS = 2 /* of a cluster */, GROUPS = 2, GROUP = 128, THREADS = (GROUPS + 1) * GROUP, COMPUTING = 232, LOADING = 40 };
enum { KEYS = MLA_BLOCK / BLOCKS, QUERIES = 64, SHARE = QUERIES / BLOCKS, STAGES = 4, PLACES = 2 /* that P has */, DK = MLA_DN + MLA_DR };
enum { TURN_OF_VALUES = 1, TURN_OF_KEYS }; /* barriers: who may issue products */

struct arguments {
    mla_bwd_reads in;
    uint16_t *dexpanded, *dpe;
};

struct shared {
    alignas(1024) unsigned char k[MLA_PANELS][KEYS * 128];
    alignas(1024) unsigned char v[MLA_V_PANELS][KEYS * 128];
    struct {
        alignas(1024) unsigned char q[MLA_PANELS][QUERIES * 128], d_o[MLA_V_PANELS][QUERIES * 128];
    } tile[STAGES];
    uint4 p[PLACES][QUERIES / 16][GROUP];
    struct {
        alignas(8) float lse2[QUERIES], delta[QUERIES];
    } stats[STAGES];
    uint64_t keys_full, full[STAGES], empty[STAGES];
    uint64_t granted[STAGES];                              /* by the other block: its stage is empty too */
    uint64_t p_full[PLACES][4], p_empty[PLACES][4];        /* of each warp */
};
static_assert(sizeof(shared) <= 232448, "a block has 227 KB");
static_assert(STAGES >= 3, "the next tile is waited for before the last one is released");

/* What a block works on. Query i sees the keys up to first + i. Tiles of queries begin .. end-1 see some of the cluster's keys, those from `whole`
 * on all of the block's. */
struct task {
    mla_item it;
    int key, first, begin, whole, end;
};

__device__ __forceinline__ task task_of(const arguments &a, int rank)
{
    task t;
    t.it = mla_find_item<true>(a.in.sequences, blockIdx.x / BLOCKS);
    t.key = t.it.block * MLA_BLOCK + rank * KEYS;
    t.first = t.it.s.keys - t.it.s.queries;
    t.begin = max(t.it.block * MLA_BLOCK - t.first, 0) / QUERIES;
    t.end = (t.it.s.queries + QUERIES - 1) / QUERIES;
    t.whole = min((max(t.key + KEYS - 1 - t.first, 0) + QUERIES - 1) / QUERIES, t.end);
    return t;
}

/* ---- loading: one lane, and a warp for the statistics ---- */

__device__ __forceinline__ void load_keys(shared &m, const arguments &a, const task &t)
{
    int row = (int)t.it.s.key_row + t.key;
    kl_mbar_expect(&m.keys_full, sizeof m.k + sizeof m.v);
    kl_tensor_load(m.k[0], &a.in.k, 0, t.it.head, row, &m.keys_full);
    kl_tensor_load(m.k[1], &a.in.k, 64, t.it.head, row, &m.keys_full);
    kl_tensor_load(m.k[2], &a.in.pe, a.in.pe_column, 0, (int)t.it.s.pe_row + t.key, &m.keys_full);
    kl_tensor_load(m.v[0], &a.in.v, 0, t.it.head, row, &m.keys_full);
    kl_tensor_load(m.v[1], &a.in.v, 64, t.it.head, row, &m.keys_full);
}

/* This block's half of a tile of queries from q_row on, to both. The other block may fill this one's stage before it is asked to. */
__device__ __forceinline__ void load_half(shared &m, const arguments &a, int stage, int head, int q_row, int rank, int phase)
{
    enum { BOTH = (1 << BLOCKS) - 1 };
    auto &tile = m.tile[stage];
    uint64_t *full = &m.full[stage];
    int row = q_row + rank * SHARE, at = rank * SHARE * 128;
    kl_mbar_expect(full, sizeof tile);
    kl_mbar_arrive_at(&m.granted[stage], rank ^ 1);
    kl_mbar_wait(&m.granted[stage], phase);
    kl_tensor_load_multicast(tile.q[0] + at, &a.in.q, 0, head, row, full, BOTH);
    kl_tensor_load_multicast(tile.q[1] + at, &a.in.q, 64, head, row, full, BOTH);
    kl_tensor_load_multicast(tile.q[2] + at, &a.in.q_pe, a.in.q_pe_column, head, row, full, BOTH);
    kl_tensor_load_multicast(tile.d_o[0] + at, &a.in.d_o, 0, head, row, full, BOTH);
    kl_tensor_load_multicast(tile.d_o[1] + at, &a.in.d_o, 64, head, row, full, BOTH);
}

__device__ void load(shared &m, const arguments &a, int rank)
{
    task t = task_of(a, rank);
    load_keys(m, a, t);
    for (int i = t.begin, n = 0; i < t.end; i++, n++) {
        kl_mbar_wait(&m.empty[n % STAGES], (n / STAGES & 1) ^ 1);
        load_half(m, a, n % STAGES, a.in.head0 + t.it.head, (int)t.it.s.q_row + i * QUERIES, rank, n / STAGES & 1);
    }
}

/* lse2 and delta of the tiles' queries; of one that does not exist lse2 is infinite: it sees nothing. */
__device__ void load_stats(shared &m, const arguments &a, int rank)
{
    task t = task_of(a, rank);
    for (int i = t.begin, n = 0; i < t.end; i++, n++) {
        auto &stats = m.stats[n % STAGES];
        kl_mbar_wait(&m.empty[n % STAGES], (n / STAGES & 1) ^ 1);
        for (int j = kl_lane(); j < QUERIES; j += 32) {
            int query = i * QUERIES + j;
            float2 stat = make_float2(INFINITY, 0.0f);
            if (query < t.it.s.queries)
                stat = a.in.stats[(t.it.s.q_row + query) * a.in.sequences.heads + t.it.head];
            stats.lse2[j] = stat.x;
            stats.delta[j] = stat.y;
        }
        kl_mbar_arrive(&m.full[n % STAGES]);
    }
}

/* ---- computing: a warpgroup ---- */

__device__ __forceinline__ void await_tile(shared &m, int n) { kl_mbar_wait(&m.full[n % STAGES], n / STAGES & 1); }

/* Of a thread: sums [64 x N], rows (keys) g and g + 8 of its warp's 16; the operand of the tile before; and its keys, [64 x 64 panels]. */
template <int N, int panels> struct rows {
    float sum[N / 2];
    uint32_t factor[QUERIES / 16][4], kept[4 * panels][4];
};
using value_rows = rows<MLA_DV, MLA_PANELS>;
using key_rows = rows<DK, MLA_V_PANELS>;

template <int N, int panels> __device__ __forceinline__ void pin(rows<N, panels> &r)
{
    kl_pin(r.sum);
    kl_pin(r.factor);
}

template <int N, int panels> __device__ __forceinline__ void keep(rows<N, panels> &r, const unsigned char *from)
{
    int row = (int)threadIdx.x / 32 % 4 * 16 + (kl_lane() & 15);
#pragma unroll
    for (int i = 0; i < 4 * panels; i++)
        kl_ldmatrix4(r.kept[i], mla_piece_at(from + i / 4 * (KEYS * 128), row, i % 4 * 2 + kl_lane() / 16));
}

/* c = kept b^T of this tile, and sum += factor last of the one before, which goes on. */
template <bool first, int N, int panels>
__device__ __forceinline__ void begin_tile(rows<N, panels> &r, float (&c)[QUERIES / 2], const unsigned char *b, const unsigned char *last, int turn)
{
    kl_barrier(turn, GROUPS * GROUP);
    kl_pin(c);
    pin(r);
    kl_wgmma_fence();
    mla_multiply_rows<QUERIES, panels>(c, r.kept, b, QUERIES * 128);
    kl_wgmma_commit();
    if (!first) {
        mla_add_columns<N, QUERIES / 16>(r.sum, r.factor, last, QUERIES * 128);
        kl_wgmma_commit();
    }
    kl_barrier_arrive(TURN_OF_VALUES + TURN_OF_KEYS - turn, GROUPS * GROUP);
}

/* A thread's share of a statistic of a tile's queries. */
struct shares {
    float2 of[QUERIES / 8];
};
__device__ __forceinline__ shares shares_of(const float *stat)
{
    shares s;
#pragma unroll
    for (int j = 0; j < QUERIES / 8; j++)
        s.of[j] = *(const float2 *)(stat + 8 * j + 2 * (kl_lane() & 3));
    return s;
}

/* The tile before is done with. Tile n + 1, if more come, is waited for first: the compiler would else draw the products' wait further ahead. */
template <bool first, int N, int panels> __device__ __forceinline__ void end_tile(rows<N, panels> &r, shared &m, int n, bool more)
{
    if (more)
        await_tile(m, n + 1);
    kl_wgmma_wait<0>();
    pin(r);
    if (!first)
        kl_mbar_arrive(&m.empty[(n - 1) % STAGES]);
}

template <int N, int panels> __device__ __forceinline__ void add_last(rows<N, panels> &r, const unsigned char *b)
{
    pin(r);
    kl_wgmma_fence();
    mla_add_columns<N, QUERIES / 16>(r.sum, r.factor, b, QUERIES * 128);
    kl_wgmma_commit();
    kl_wgmma_wait<0>();
    pin(r);
}

/* P^T of tile n, which has come, and dV of the tile before. least: the first query, counted from the tile's first, that sees key g of the warp. */
template <bool first, bool hidden> __device__ __forceinline__ void value_step(value_rows &r, shared &m, int n, bool more, int least, float c)
{
    n = mla_uniform(n);
    int column = 2 * (kl_lane() & 3), thread = (int)threadIdx.x % GROUP, stage = n % STAGES, place = n % PLACES;
    float s[QUERIES / 2] = {};
    uint4(*p)[GROUP] = m.p[place];
    begin_tile<first>(r, s, m.tile[stage].q[0], m.tile[(n + STAGES - 1) % STAGES].d_o[0], TURN_OF_VALUES);
    shares lse2 = shares_of(m.stats[stage].lse2);
    kl_wgmma_wait<first ? 0 : 1>();
    kl_pin(s);
#pragma unroll
    for (int i = 0; i < QUERIES / 2; i++) {
        s[i] = kl_exp2(fmaf(s[i], c, i & 1 ? -lse2.of[i / 4].y : -lse2.of[i / 4].x));
        if (hidden && i / 4 * 8 + column + (i & 1) < least + 8 * (i >> 1 & 1))
            s[i] = 0.0f;
    }
    kl_pin(s);
    kl_mbar_wait(&m.p_empty[place][thread / 32], (n / PLACES & 1) ^ 1);
#pragma unroll
    for (int i = 0; i < QUERIES / 16; i++)
        p[i][thread] = make_uint4(kl_pack_bf16(s[8 * i], s[8 * i + 1]), kl_pack_bf16(s[8 * i + 2], s[8 * i + 3]), kl_pack_bf16(s[8 * i + 4], s[8 * i + 5]),
                                  kl_pack_bf16(s[8 * i + 6], s[8 * i + 7]));
    kl_mbar_arrive(&m.p_full[place][thread / 32]);
    end_tile<first>(r, m, n, more);
#pragma unroll
    for (int i = 0; i < QUERIES / 16; i++) { /* not sooner: the product that reads the last ones was under way */
        uint4 x = p[i][thread];
        r.factor[i][0] = x.x, r.factor[i][1] = x.y, r.factor[i][2] = x.z, r.factor[i][3] = x.w;
    }
}

/* dS^T of tile n, which has come, and dK of the tile before. */
template <bool first> __device__ __forceinline__ void key_step(key_rows &r, shared &m, int n, bool more)
{
    n = mla_uniform(n);
    int thread = (int)threadIdx.x % GROUP, stage = n % STAGES, place = n % PLACES;
    float dp[QUERIES / 2] = {};
    begin_tile<first>(r, dp, m.tile[stage].d_o[0], m.tile[(n + STAGES - 1) % STAGES].q[0], TURN_OF_KEYS);
    shares delta = shares_of(m.stats[stage].delta);
    kl_wgmma_wait<first ? 0 : 1>();
    kl_pin(dp);
    kl_mbar_wait(&m.p_full[place][thread / 32], n / PLACES & 1);
#pragma unroll
    for (int i = 0; i < QUERIES / 16; i++) {
        uint4 p = m.p[place][i][thread];
        const uint32_t pair[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float2 d = delta.of[2 * i + (e >> 1)];
            float *x = dp + 8 * i + 2 * e;
            x[0] = kl_bf16_low(pair[e]) * (x[0] - d.x);
            x[1] = kl_bf16_high(pair[e]) * (x[1] - d.y);
        }
    }
    kl_pin(dp);
    kl_mbar_arrive(&m.p_empty[place][thread / 32]);
    end_tile<first>(r, m, n, more);
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

__device__ __forceinline__ void compute_values(shared &m, const arguments &a, int rank)
{
    task t = task_of(a, rank);
    value_rows r = {};
    int i = t.begin, n = 0, key = t.key + (int)threadIdx.x / 32 % 4 * 16 + kl_lane() / 4;
    float c = a.in.scale_log2;
    kl_mbar_wait(&m.keys_full, 0);
    keep(r, m.k[0]);
    await_tile(m, 0);
    value_step<true, true>(r, m, n, i + 1 < t.end, key - t.first - i * QUERIES, c);
    for (i++, n++; i < t.whole; i++, n++)
        value_step<false, true>(r, m, n, i + 1 < t.end, key - t.first - i * QUERIES, c);
    for (; i < t.end; i++, n++)
        value_step<false, false>(r, m, n, i + 1 < t.end, 0, c);
    add_last(r, m.tile[(n - 1) % STAGES].d_o[0]);
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (key + 8 * h < t.it.s.keys)
            store<MLA_DV / 8>(a.dexpanded + ((t.it.s.key_row + key + 8 * h) * a.in.sequences.heads + t.it.head) * (a.in.Dn + a.in.Dv) + a.in.Dn, r.sum + 2 * h, a.in.Dv,
                              1.0f);
}

__device__ __forceinline__ void compute_keys(shared &m, const arguments &a, int rank)
{
    task t = task_of(a, rank);
    key_rows r = {};
    int i = t.begin, n = 0, key = t.key + (int)threadIdx.x / 32 % 4 * 16 + kl_lane() / 4;
    kl_barrier_arrive(TURN_OF_VALUES, GROUPS * GROUP);
    kl_mbar_wait(&m.keys_full, 0);
    keep(r, m.v[0]);
    await_tile(m, 0);
    key_step<true>(r, m, n, i + 1 < t.end);
    for (i++, n++; i < t.end; i++, n++)
        key_step<false>(r, m, n, i + 1 < t.end);
    add_last(r, m.tile[(n - 1) % STAGES].q[0]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (key + 8 * h >= t.it.s.keys)
            continue;
        int64_t at = (t.it.s.key_row + key + 8 * h) * a.in.sequences.heads + t.it.head;
        store<MLA_DN / 8>(a.dexpanded + at * (a.in.Dn + a.in.Dv), r.sum + 2 * h, a.in.Dn, a.in.scale);
        store<MLA_DR / 8>(a.dpe + at * a.in.Dr, r.sum + MLA_DN / 2 + 2 * h, a.in.Dr, a.in.scale);
    }
}

__global__ void __launch_bounds__(THREADS, 1) key_gradients(const __grid_constant__ arguments a)
{
    KL_SHARED(memory);
    shared &m = *(shared *)memory;
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP, 0), rank = kl_cluster_rank();
    if (threadIdx.x == 0) {
        kl_mbar_init(&m.keys_full, 1);
        for (int i = 0; i < STAGES; i++) {
            kl_mbar_init(&m.full[i], 1 + 32);
            kl_mbar_init(&m.empty[i], GROUPS * GROUP);
            kl_mbar_init(&m.granted[i], 1);
        }
        for (int i = 0; i < PLACES * 4; i++) {
            kl_mbar_init(&m.p_full[i / 4][i % 4], 32);
            kl_mbar_init(&m.p_empty[i / 4][i % 4], 32);
        }
        kl_mbar_init_fence();
    }
    kl_cluster_sync();
    if (group == GROUPS) {
        kl_registers_fewer<LOADING>();
        int warp = (int)threadIdx.x / 32 - GROUPS * GROUP / 32;
        if (warp == 0 && kl_lane() == 0)
            load(m, a, rank);
        if (warp == 1)
            load_stats(m, a, rank);
    } else {
        kl_registers_more<COMPUTING>();
        if (group == 0)
            compute_values(m, a, rank);
        else
            compute_keys(m, a, rank);
    }
}

} // namespace

kl_status mla_key_gradients(kl_ctx *ctx, const mla_problem *p, const mla_piece &x, const uint16_t *d_o, const float2 *stats, uint16_t *dexpanded, uint16_t *dpe)
{
    kl_range range("mla dk dv");
    arguments a = {};
    KL_TRY(mla_describe_bwd(&a.in, p, x, d_o, stats, SHARE, KEYS));
    a.dexpanded = dexpanded;
    a.dpe = dpe;
    kl_grid g;
    g.threads = THREADS;
    g.shared = sizeof(shared);
    g.cluster = BLOCKS;
    g.x = (int64_t)x.sequences.key_blocks * x.heads * BLOCKS;
    return kl_launch(ctx, "mla chunk_bwd_kv", g, key_gradients, a);
}
