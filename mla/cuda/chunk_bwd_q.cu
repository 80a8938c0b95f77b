/* The chunk backward for the queries: a block's 128 queries against the keys that they see, 64 at a time.
 *
 *     p_ij = 2^(c s_ij - lse2_i)      dp_ij = do_i . v_j      ds_ij = p_ij (dp_ij - delta_i)      dq_i = scale sum_j ds_ij k_j
 *
 * lse2 = lse log2 e and delta_i = o_i . do_i come as pairs. Two warpgroups compute, each 64 queries; one warp loads. Issued together
 * are S = Q K^T and dP = dO V^T of a tile and dQ += dS K of the tile before: the exponentials run under the last two, dS under the last. */
#include "mla/cuda/chunk_bwd.cuh"

namespace {

enum { GROUPS = 2, GROUP = 128, THREADS = (GROUPS + 1) * GROUP, COMPUTING = 240, LOADING = 24 };
enum { KEYS = 64, STAGES = 3, DQ = MLA_DN + MLA_DR };

struct arguments {
    mla_bwd_reads in;
    uint16_t *dq;
    int64_t dq_stride;
};

struct shared {
    alignas(1024) unsigned char q[MLA_PANELS][MLA_BLOCK * 128];
    alignas(1024) unsigned char d_o[MLA_V_PANELS][MLA_BLOCK * 128];
    struct {
        alignas(1024) unsigned char k[MLA_PANELS][KEYS * 128], v[MLA_V_PANELS][KEYS * 128];
    } tile[STAGES];
    uint64_t q_full, full[STAGES], empty[STAGES];
};
static_assert(sizeof(shared) <= 232448, "a block has 227 KB");
static_assert(STAGES >= 3, "the next tile is waited for before the last one is released");

__device__ void load(shared &m, const arguments &a)
{
    mla_item it = mla_find_item<false>(a.in.sequences, blockIdx.x);
    mla_stretch t = mla_stretch_of<KEYS>(it);
    int q_row = (int)it.s.q_row + it.block * MLA_BLOCK, head = a.in.head0 + it.head;
    kl_mbar_expect(&m.q_full, sizeof m.q + sizeof m.d_o);
    kl_tensor_load(m.q[0], &a.in.q, 0, head, q_row, &m.q_full);
    kl_tensor_load(m.q[1], &a.in.q, 64, head, q_row, &m.q_full);
    kl_tensor_load(m.q[2], &a.in.q_pe, a.in.q_pe_column, head, q_row, &m.q_full);
    kl_tensor_load(m.d_o[0], &a.in.d_o, 0, head, q_row, &m.q_full);
    kl_tensor_load(m.d_o[1], &a.in.d_o, 64, head, q_row, &m.q_full);
    for (int j = t.tiles - 1, n = 0; j >= 0; j--, n++) {
        auto &tile = m.tile[n % STAGES];
        uint64_t *full = &m.full[n % STAGES];
        int row = (int)it.s.key_row + j * KEYS;
        kl_mbar_wait(&m.empty[n % STAGES], (n / STAGES & 1) ^ 1);
        kl_mbar_expect(full, sizeof tile);
        kl_tensor_load(tile.k[0], &a.in.k, 0, it.head, row, full);
        kl_tensor_load(tile.k[1], &a.in.k, 64, it.head, row, full);
        kl_tensor_load(tile.k[2], &a.in.pe, a.in.pe_column, 0, (int)it.s.pe_row + j * KEYS, full);
        kl_tensor_load(tile.v[0], &a.in.v, 0, it.head, row, full);
        kl_tensor_load(tile.v[1], &a.in.v, 64, it.head, row, full);
    }
}

/* What a thread keeps of rows g and g + 8 of its warp's 16: sums, and dS of the tile before. */
struct rows {
    float dq[DQ / 2], lse2[2], delta[2];
    uint32_t ds[KEYS / 16][4];
};

__device__ __forceinline__ void await_tile(shared &m, int n) { kl_mbar_wait(&m.full[n % STAGES], n / STAGES & 1); }

__device__ __forceinline__ void add_keys(rows &r, const shared &m, int n)
{
    mla_add_columns<DQ, KEYS / 16>(r.dq, r.ds, m.tile[n % STAGES].k[0], sizeof m.tile[0].k[0]);
    kl_wgmma_commit();
}

/* Tile n, which has come. last: the last key, counted from the tile's first, that row g of the warp sees. */
template <bool first, bool hidden> __device__ __forceinline__ void step(rows &r, shared &m, int group, int n, bool more, int last, float c)
{
    n = mla_uniform(n);
    auto &tile = m.tile[n % STAGES];
    float s[KEYS / 2] = {}, dp[KEYS / 2] = {};
    kl_pin(s);
    kl_pin(dp);
    kl_pin(r.ds);
    kl_pin(r.dq);
    kl_wgmma_fence();
    mla_multiply_rows<KEYS, MLA_PANELS>(s, m.q[0] + group * 64 * 128, sizeof m.q[0], tile.k[0], sizeof tile.k[0]);
    kl_wgmma_commit();
    mla_multiply_rows<KEYS, MLA_V_PANELS>(dp, m.d_o[0] + group * 64 * 128, sizeof m.d_o[0], tile.v[0], sizeof tile.v[0]);
    kl_wgmma_commit();
    if (!first)
        add_keys(r, m, n - 1);
    kl_wgmma_wait<first ? 1 : 2>();
    kl_pin(s);
    int column = 2 * (kl_lane() & 3);
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
        int h = i >> 1 & 1;
        s[i] = kl_exp2(fmaf(s[i], c, -r.lse2[h]));
        if (hidden && i / 4 * 8 + column + (i & 1) > last + 8 * h)
            s[i] = 0.0f;
    }
    kl_pin(s);
    if (more)
        await_tile(m, n + 1);
    kl_wgmma_wait<first ? 0 : 1>();
    kl_pin(dp);
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        dp[i] = s[i] * (dp[i] - r.delta[i >> 1 & 1]);
    kl_pin(dp);
    kl_wgmma_wait<0>();
    kl_pin(r.ds);
    kl_pin(r.dq);
    if (!first)
        kl_mbar_arrive(&m.empty[(n - 1) % STAGES]);
    mla_pack<KEYS / 16>(r.ds, dp);
}

__device__ __forceinline__ void finish(const rows &r, const arguments &a, const mla_item &it, int row, int count)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int i = row + 8 * h, width = a.in.Dn + a.in.Dr;
        if (i >= count)
            continue;
        uint16_t *dq = a.dq + (it.s.q_row + it.block * MLA_BLOCK + i) * a.dq_stride + (int64_t)(a.in.head0 + it.head) * width + 2 * (kl_lane() & 3);
#pragma unroll
        for (int j = 0; j < DQ / 8; j++) {
            int within = 8 * j < MLA_DN ? 8 * j : 8 * j - MLA_DN, part = 8 * j < MLA_DN ? a.in.Dn : a.in.Dr;
            if (within < part)
                *(uint32_t *)(dq + (8 * j < MLA_DN ? within : a.in.Dn + within)) =
                    kl_pack_bf16(r.dq[4 * j + 2 * h] * a.in.scale, r.dq[4 * j + 2 * h + 1] * a.in.scale);
        }
    }
}

__device__ __forceinline__ void compute(shared &m, const arguments &a, int group)
{
    mla_item it = mla_find_item<false>(a.in.sequences, blockIdx.x);
    mla_stretch t = mla_stretch_of<KEYS>(it);
    int n = 0, j = t.tiles - 1, row = group * 64 + (int)threadIdx.x / 32 % 4 * 16 + kl_lane() / 4;
    float c = a.in.scale_log2;
    rows r = {};
    for (int h = 0; h < 2; h++) {
        float2 stat = {};
        if (row + 8 * h < t.rows)
            stat = a.in.stats[(it.s.q_row + it.block * MLA_BLOCK + row + 8 * h) * a.in.sequences.heads + it.head];
        r.lse2[h] = stat.x;
        r.delta[h] = stat.y;
    }
    kl_mbar_wait(&m.q_full, 0);
    await_tile(m, 0);
    step<true, true>(r, m, group, n, j > 0, t.first + row - j * KEYS, c);
    for (j--, n++; j >= t.whole; j--, n++)
        step<false, true>(r, m, group, n, j > 0, t.first + row - j * KEYS, c);
    for (; j >= 0; j--, n++)
        step<false, false>(r, m, group, n, j > 0, 0, c);
    kl_pin(r.ds);
    kl_pin(r.dq);
    kl_wgmma_fence();
    add_keys(r, m, n - 1);
    kl_wgmma_wait<0>();
    kl_pin(r.dq);
    finish(r, a, it, row, t.rows);
}

__global__ void __launch_bounds__(THREADS, 1) query_gradients(const __grid_constant__ arguments a)
{
    KL_SHARED(memory);
    shared &m = *(shared *)memory;
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP, 0);
    if (threadIdx.x == 0) {
        kl_mbar_init(&m.q_full, 1);
        for (int i = 0; i < STAGES; i++) {
            kl_mbar_init(&m.full[i], 1);
            kl_mbar_init(&m.empty[i], GROUPS * GROUP);
        }
        kl_mbar_init_fence();
    }
    __syncthreads();
    if (group == GROUPS) {
        kl_registers_fewer<LOADING>();
        if (threadIdx.x == GROUPS * GROUP)
            load(m, a);
    } else {
        kl_registers_more<COMPUTING>();
        compute(m, a, group);
    }
}

} // namespace

kl_status mla_query_gradients(kl_ctx *ctx, const mla_problem *p, const mla_piece &x, const uint16_t *d_o, const float2 *stats, uint16_t *dq)
{
    kl_range range("mla dq");
    arguments a = {};
    KL_TRY(mla_describe_bwd(&a.in, p, x, d_o, stats, MLA_BLOCK, KEYS));
    a.dq = dq;
    a.dq_stride = mla_q_stride(p);
    kl_grid g;
    g.threads = THREADS;
    g.shared = sizeof(shared);
    g.x = (int64_t)x.sequences.blocks * x.heads;
    return kl_launch(ctx, "mla chunk_bwd_q", g, query_gradients, a);
}
