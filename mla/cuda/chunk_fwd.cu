/* The chunk forward: causal attention over expanded keys and values, online softmax in powers of two. With c = scale log2 e, per row and tile of keys
 *
 *     m' = max(m, max_j s_j)      p_j = 2^(c (s_j - m'))      l = l f + sum_j p_j      o = o f + sum_j p_j v_j      f = 2^(c (m - m'))
 *
 * and o / l, lse = (c m + log2 l) ln 2 at the end. The tiles of a row come in descending order: the one that the diagonal crosses first.
 *
 * A block: one warp loads, two warpgroups compute, each 64 of the 128 queries.
 *
 *     loader     load Q                          per tile: wait k_empty, load K; wait v_empty, load V
 *     computing  S = Q K^T of a tile and O += P V of the tile before are issued together, in turns of the two warpgroups: while one computes
 *                its exponentials the other's products run. */
#include "mla/cuda/chunk.cuh"

namespace {

enum { GROUPS = 2, GROUP = 128, THREADS = (GROUPS + 1) * GROUP, COMPUTING = 240, LOADING = 24 };
enum { KEYS = 128, STAGES = 2, TURN = 1 /* barriers TURN, TURN + 1 */ };
enum { BUDGET_MEGABYTES = 1024 };

struct arguments {
    mla_reads in;
    int64_t o_heads, o_head0;
    uint16_t *o;
    float *lse;
};

struct shared {
    alignas(1024) unsigned char q[MLA_PANELS][MLA_BLOCK * 128];
    alignas(1024) unsigned char k[STAGES][MLA_PANELS][KEYS * 128];
    alignas(1024) unsigned char v[STAGES][MLA_V_PANELS][KEYS * 128];
    uint64_t q_full, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};
static_assert(sizeof(shared) <= 232448, "a block has 227 KB");

/* ---- loading: one lane ---- */

__device__ void load(shared &m, const arguments &a)
{
    mla_item it = mla_find_item<false>(a.in.sequences, blockIdx.x);
    mla_stretch t = mla_stretch_of<KEYS>(it);
    int q_row = (int)it.s.q_row + it.block * MLA_BLOCK, head = a.in.head0 + it.head;
    kl_mbar_expect(&m.q_full, sizeof m.q);
    kl_tensor_load(m.q[0], &a.in.q, 0, head, q_row, &m.q_full);
    kl_tensor_load(m.q[1], &a.in.q, 64, head, q_row, &m.q_full);
    kl_tensor_load(m.q[2], &a.in.q_pe, a.in.q_pe_column, head, q_row, &m.q_full);
    for (int j = t.tiles - 1, n = 0; j >= 0; j--, n++) {
        int i = n % STAGES, phase = (n / STAGES & 1) ^ 1, row = (int)it.s.key_row + j * KEYS;
        kl_mbar_wait(&m.k_empty[i], phase);
        kl_mbar_expect(&m.k_full[i], sizeof m.k[i]);
        kl_tensor_load(m.k[i][0], &a.in.k, 0, it.head, row, &m.k_full[i]);
        kl_tensor_load(m.k[i][1], &a.in.k, 64, it.head, row, &m.k_full[i]);
        kl_tensor_load(m.k[i][2], &a.in.pe, a.in.pe_column, 0, (int)it.s.pe_row + j * KEYS, &m.k_full[i]);
        kl_mbar_wait(&m.v_empty[i], phase);
        kl_mbar_expect(&m.v_full[i], sizeof m.v[i]);
        kl_tensor_load(m.v[i][0], &a.in.v, 0, it.head, row, &m.v_full[i]);
        kl_tensor_load(m.v[i][1], &a.in.v, 64, it.head, row, &m.v_full[i]);
    }
}

/* ---- computing: a warpgroup ---- */

/* What a thread keeps of rows g and g + 8 of its warp's 16: sums, and the probabilities of the tile before. */
struct rows {
    float o[MLA_DV / 2], m[2], l[2];
    uint32_t p[KEYS / 16][4];
};

/* Scores of keys beyond what the row sees become -inf. last: the last key, counted from the tile's first, that row g of the warp sees. */
__device__ __forceinline__ void hide(float *s, int last)
{
    int column = 2 * (kl_lane() & 3);
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        if (i / 4 * 8 + column + (i & 1) > last + 8 * (i >> 1 & 1))
            s[i] = -INFINITY;
}

/* m, l, and the probabilities in place of s; f: by what the sums so far are to be scaled. */
template <bool hidden> __device__ __forceinline__ void soften(rows &r, float *s, float f[2], float c)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = r.m[h];
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            top = fmaxf(top, s[i / 2 * 4 + 2 * h + i % 2]);
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        float zero = c * (hidden && top == -INFINITY ? 0.0f : top), sum = 0.0f;
        f[h] = kl_exp2(fmaf(r.m[h], c, -zero));
        r.m[h] = top;
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) {
            float &x = s[i / 2 * 4 + 2 * h + i % 2];
            x = kl_exp2(fmaf(x, c, -zero));
            sum += x;
        }
        r.l[h] = r.l[h] * f[h] + sum;
    }
}

__device__ __forceinline__ void scale_sums(rows &r, const float f[2])
{
#pragma unroll
    for (int i = 0; i < MLA_DV / 2; i++)
        r.o[i] *= f[i >> 1 & 1];
}

__device__ __forceinline__ void await_keys(shared &m, int n) { kl_mbar_wait(&m.k_full[n % STAGES], n / STAGES & 1); }

/* Tile n, the successor of a tile whose probabilities wait: S of this one and O of that one together. The next tile's keys are waited
 * for (if `more` come) before the products: the compiler would else draw the wait for those in front of the exponentials. */
template <bool hidden> __device__ __forceinline__ void step(rows &r, shared &m, int group, int n, bool more, int last, float c)
{
    n = mla_uniform(n);
    float s[KEYS / 2] = {}, f[2];
    int i = n % STAGES, before = (n - 1) % STAGES;
    kl_barrier(TURN + group, GROUPS * GROUP);
    kl_pin(s);
    kl_pin(r.p);
    kl_pin(r.o);
    kl_wgmma_fence();
    mla_multiply_rows<KEYS, MLA_PANELS>(s, m.q[0] + group * 64 * 128, sizeof m.q[0], m.k[i][0], sizeof m.k[i][0]);
    kl_wgmma_commit();
    kl_mbar_wait(&m.v_full[before], (n - 1) / STAGES & 1);
    kl_wgmma_fence();
    mla_add_columns<MLA_DV, KEYS / 16>(r.o, r.p, m.v[before][0], sizeof m.v[before][0]);
    kl_wgmma_commit();
    kl_barrier_arrive(TURN + (group ^ 1), GROUPS * GROUP);
    kl_wgmma_wait<1>();
    kl_pin(s);
    kl_mbar_arrive(&m.k_empty[i]);
    if (hidden)
        hide(s, last);
    soften<hidden>(r, s, f, c);
    kl_pin(s);
    if (more)
        await_keys(m, n + 1);
    kl_wgmma_wait<0>();
    kl_pin(r.p);
    kl_pin(r.o);
    kl_mbar_arrive(&m.v_empty[before]);
    scale_sums(r, f);
    mla_pack<KEYS / 16>(r.p, s);
}

/* o / l and lse of the rows that exist. */
__device__ __forceinline__ void finish(const rows &r, const arguments &a, const mla_item &it, int row, int count)
{
    int lane = kl_lane();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float l = r.l[h];
        l += __shfl_xor_sync(0xffffffffu, l, 1);
        l += __shfl_xor_sync(0xffffffffu, l, 2);
        int i = row + 8 * h;
        if (i >= count)
            continue;
        int64_t at = (it.s.q_row + it.block * MLA_BLOCK + i) * a.o_heads + a.o_head0 + it.head;
        float inverse = 1.0f / l;
        uint16_t *o = a.o + at * a.in.Dv + 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < MLA_DV / 8; j++)
            if (8 * j < a.in.Dv)
                *(uint32_t *)(o + 8 * j) = kl_pack_bf16(r.o[4 * j + 2 * h] * inverse, r.o[4 * j + 2 * h + 1] * inverse);
        if (a.lse && (lane & 3) == 0)
            a.lse[at] = (a.in.scale_log2 * r.m[h] + kl_log2(l)) * 0.693147181f;
    }
}

__device__ __forceinline__ void compute(shared &m, const arguments &a, int group)
{
    mla_item it = mla_find_item<false>(a.in.sequences, blockIdx.x);
    mla_stretch t = mla_stretch_of<KEYS>(it);
    int n = 0, j = t.tiles - 1, row = group * 64 + (int)threadIdx.x / 32 % 4 * 16 + kl_lane() / 4;
    float s[KEYS / 2] = {}, f[2], c = a.in.scale_log2;
    rows r = {};
    r.m[0] = r.m[1] = -INFINITY;
    if (group == 1)
        kl_barrier_arrive(TURN, GROUPS * GROUP);
    kl_mbar_wait(&m.q_full, 0);
    await_keys(m, 0);
    kl_pin(s);
    kl_wgmma_fence();
    mla_multiply_rows<KEYS, MLA_PANELS>(s, m.q[0] + group * 64 * 128, sizeof m.q[0], m.k[0][0], sizeof m.k[0][0]);
    kl_wgmma_commit();
    kl_wgmma_wait<0>();
    kl_pin(s);
    kl_mbar_arrive(&m.k_empty[0]);
    hide(s, t.first + row - j * KEYS);
    soften<true>(r, s, f, c);
    mla_pack<KEYS / 16>(r.p, s);
    if (j > 0)
        await_keys(m, 1);
    for (j--, n++; j >= t.whole; j--, n++)
        step<true>(r, m, group, n, j > 0, t.first + row - j * KEYS, c);
    for (; j >= 0; j--, n++)
        step<false>(r, m, group, n, j > 0, 0, c);
    int last = (n - 1) % STAGES;
    kl_mbar_wait(&m.v_full[last], (n - 1) / STAGES & 1);
    kl_wgmma_fence();
    mla_add_columns<MLA_DV, KEYS / 16>(r.o, r.p, m.v[last][0], sizeof m.v[last][0]);
    kl_wgmma_commit();
    kl_wgmma_wait<0>();
    kl_pin(r.o);
    finish(r, a, it, row, t.rows);
}

__global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ arguments a)
{
    KL_SHARED(memory);
    shared &m = *(shared *)memory;
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP, 0);
    if (threadIdx.x == 0) {
        kl_mbar_init(&m.q_full, 1);
        for (int i = 0; i < STAGES; i++) {
            kl_mbar_init(&m.k_full[i], 1);
            kl_mbar_init(&m.v_full[i], 1);
            kl_mbar_init(&m.k_empty[i], GROUPS * GROUP);
            kl_mbar_init(&m.v_empty[i], GROUPS * GROUP);
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

/* ---- on the host ---- */

struct workspace {
    unsigned char *product;
    mla_sequence *table; /* [N] */
    uint16_t *expanded;  /* [most rows times heads, Dn + Dv] */
};

size_t row_bytes(const mla_problem *p) { return (size_t)(p->Dn + p->Dv) * 2; }

workspace carve(const mla_problem *p, kl_arena *a)
{
    workspace w;
    w.product = KL_TAKE(a, unsigned char, KL_PRODUCT_WORKSPACE + 256);
    w.product += -(uintptr_t)w.product % 256; /* as the library wants it */
    w.table = KL_TAKE(a, mla_sequence, p->N);
    w.expanded = KL_TAKE(a, uint16_t, kl_mul(mla_most_rows(p, row_bytes(p), (size_t)BUDGET_MEGABYTES << 20), (size_t)(p->Dn + p->Dv), &a->overflow));
    return w;
}

} // namespace

kl_status mla_attend(kl_ctx *ctx, const mla_problem *p, const mla_piece &x, uint16_t *o, float *lse, int64_t o_heads, int64_t o_head0)
{
    kl_range range("mla attend");
    arguments a = {};
    KL_TRY(mla_describe(&a.in, p, x, MLA_BLOCK, KEYS));
    a.o = o;
    a.lse = lse;
    a.o_heads = o_heads;
    a.o_head0 = o_head0;
    kl_grid g;
    g.threads = THREADS;
    g.shared = sizeof(shared);
    g.x = (int64_t)x.sequences.blocks * x.heads;
    return kl_launch(ctx, "mla chunk_fwd", g, attend, a);
}

static kl_status run(kl_ctx *ctx, const mla_problem *p, const workspace &w, const mla_batch &b)
{
    mla_sequences sequences;
    KL_TRY(mla_upload_sequences(ctx, p, b, false, w.table, &sequences));
    for (int64_t h = 0; h < p->H; h += b.heads) {
        mla_piece x = mla_piece_of(p, b, sequences, h, w.expanded);
        KL_TRY(mla_expand_rows(ctx, p, b, h, x.heads, w.expanded, w.product));
        KL_TRY(mla_attend(ctx, p, x, (uint16_t *)p->o, p->lse, p->H, h));
    }
    return kl_ok();
}

kl_status mla_cuda_chunk_check(const void *problem, kl_pass)
{
    return mla_check_chunk((const mla_problem *)problem);
}

size_t mla_cuda_chunk_workspace(const kl_ctx *, const void *problem, kl_pass pass)
{
    kl_arena a = kl_arena_count();
    if (pass == KL_BACKWARD)
        return mla_chunk_bwd_workspace((const mla_problem *)problem);
    carve((const mla_problem *)problem, &a);
    return mla_arena_bytes(&a);
}

kl_status mla_cuda_chunk_forward(kl_ctx *ctx, const void *problem, void *memory, size_t bytes)
{
    const mla_problem *p = (const mla_problem *)problem;
    KL_TRY(mla_enter_cuda(ctx, p, "chunk", true));
    KL_TRY(mla_check_chunk(p));
    KL_TRY(mla_check_workspace(memory, bytes, mla_cuda_chunk_workspace(ctx, p, KL_FORWARD)));
    kl_arena a = kl_arena_over(memory, bytes);
    workspace w = carve(p, &a);
    for (int64_t n = 0; n < p->N;) {
        mla_batch b = mla_next_batch(p, n, row_bytes(p), (size_t)BUDGET_MEGABYTES << 20);
        n = b.n1;
        if (b.rows)
            KL_TRY(run(ctx, p, w, b));
    }
    return kl_ok();
}
