/* Preparation of one tile of one head by a group: four warps that meet at a named barrier of their own, so that several
 * groups can work in one block.
 *
 *     kda_tile_rows rows = kda_locate_rows(source, hv, token, tokens, thread);
 *     kda_prepare_ahead ahead = kda_prepare_load<KP>(source, rows, room, thread);
 *     kda_prepare_tile<KP>(source, head, ahead, tokens, room, tile, thread, barrier, [&] { wait for tile }, [&] { the next load });
 *
 * load starts asynchronous copies of the raw rows into the group's room and returns at once; tile waits for them and makes
 * the tile (tile.cuh) at a 16-byte aligned shared address. Before it first writes there it calls back in all threads of
 * the group (whoever stores from the tile waits for the reads there), and again as soon as the rows in the room may be
 * overwritten. thread counts 0..127 within the group. All threads of the group call both. On return the tile is complete
 * and visible to bulk copies issued by any thread of the group. */
#ifndef KL_KDA_CUDA_PREPARE_CUH
#define KL_KDA_CUDA_PREPARE_CUH

#include "kda/cuda/prepare_levels.cuh"
#include "kda/cuda/prepare_operands.cuh"
#include "kda/cuda/prepare_rows.cuh"
#include "kda/internal.h"

enum { KDA_GROUP = 128 }; /* threads of a group */

kda_tile_source kda_tile_source_of(const kda_problem *p);

/* What a thread keeps of a value head: the gate's parameters for its channels. */
template <int KP> struct kda_prepare_head {
    int hv;
    float A_log;
    kda_pair dt_bias[kda_owner<KP>::units];
};

/* What a thread carries from load to tile. */
struct kda_prepare_ahead {
    uint32_t beta; /* threads 0..31: of token `thread` */
};

/* A group's room, in bytes from a 1024-byte aligned start. */
template <int KP> struct kda_prepare_room {
    static constexpr int rows = 32 * KP * 2;
    static constexpr int q = 0, k = rows, g = 2 * rows, block_decay = 3 * rows /* float [2][KP] */,
                         T = block_decay + 8 * KP, norm = T + KDA_T_BYTES /* float [2][32]: of k, of q */,
                         beta = norm + 256 /* float [32] */, vote = beta + 128 /* int [4]: first deep row by warp */, bytes = vote + 16;
};

__device__ __forceinline__ int kda_gate_index(const kda_tile_source &s, int c) { return s.G == s.K ? c : c / (s.K / s.G); }

template <int KP>
__device__ __forceinline__ kda_prepare_head<KP> kda_prepare_head_of(const kda_tile_source &s, int hv, int thread)
{
    kda_prepare_head<KP> head = {};
    head.hv = hv;
    if (s.A_log)
        head.A_log = s.A_log[hv];
    if (s.dt_bias) {
        const float *bias = s.dt_bias + (int64_t)hv * s.G;
#pragma unroll
        for (int u = 0; u < kda_owner<KP>::units; u++) {
            int c = kda_owner<KP>(thread, u).c;
            head.dt_bias[u] = {c < s.K ? bias[kda_gate_index(s, c)] : 0.0f, c + 1 < s.K ? bias[kda_gate_index(s, c + 1)] : 0.0f};
        }
    }
    return head;
}

template <int KP>
__device__ __forceinline__ kda_prepare_ahead kda_prepare_load(const kda_tile_source &s, const kda_tile_rows &rows, unsigned char *room, int thread)
{
    using at = kda_prepare_room<KP>;
    kda_load_rows<KP>(s, rows, room + at::q, room + at::k, room + at::g, thread);
    return {thread < rows.tokens ? s.beta[(rows.token + thread) * s.beta_stride + rows.hv] : 0u};
}

/* Factors that bring 16 rows to length one, and q to its scale, by the lanes that hold the squares. */
__device__ __forceinline__ void kda_write_norms(float *norm, const float squares[2], float scale)
{
    int g = kl_lane() >> 2;
    if (g >> 1 == (kl_lane() & 3)) {
        norm[g] = scale * kl_rsqrt(squares[0] + 1e-6f);
        norm[g + 8] = scale * kl_rsqrt(squares[1] + 1e-6f);
    }
}

/* The diagonal blocks by levels; c is this warp's block. 128 KP bytes of scratch. */
template <int KP>
__device__ __forceinline__ void kda_diagonal_by_levels(float c[8], const kda_tile_source &s, const kda_prepare_head<KP> &head, const kda_gate_scale &scale,
                                                       kda_pair a[16], unsigned char *room, unsigned char *scratch, int thread, int barrier)
{
    using at = kda_prepare_room<KP>;
    using own_t = kda_owner<KP>;
    const float *norm = (const float *)(room + at::norm);
    unsigned char *x = scratch, *y = scratch + at::rows;
    int b = thread >> 5 & 1, of_q = thread >> 6;
#pragma unroll 1
    for (int m = 16; m;) {
        m /= 2;
#pragma unroll
        for (int u = 0; u < own_t::units; u++) {
            own_t own(thread, u);
            if (own.idle())
                continue;
            if (own_t::units > 1)
                kda_decays(s.gate, a, room + at::g, own, scale, kda_gate_biases(s.gate, scale, head.dt_bias[u]));
            kda_make_level(m, a, norm + 16 * own.block, norm + 32 + 16 * own.block, room + at::k, room + at::q, x, y, own);
        }
        kl_barrier(barrier, KDA_GROUP);
        float part[8];
        kda_rows_product<KP>(part, of_q ? y : x, 16 * b, x, 16 * b);
        kda_take_level(c, part, m);
        kl_barrier(barrier, KDA_GROUP);
    }
}

template <class Form, class Wait, class Free>
__device__ __forceinline__ void kda_prepare_tile(const kda_tile_source &s, const kda_prepare_head<Form::KP> &head, kda_prepare_ahead ahead, int tokens,
                                                 unsigned char *room, unsigned char *tile, int thread, int barrier, Wait tile_is_free, Free rows_are_free)
{
    constexpr int KP = Form::KP;
    using at = kda_prepare_room<KP>;
    using own_t = kda_owner<KP>;
    int warp = thread >> 5, b = warp & 1, of_q = warp >> 1;
    float *norm = (float *)(room + at::norm), *beta = (float *)(room + at::beta), *T = (float *)(room + at::T);
    float *block_decay = (float *)(room + at::block_decay);
    int *vote = (int *)(room + at::vote);
    kda_gate_scale scale = kda_gate_scale_of(s.gate, head.A_log, s.lower_bound);

    kl_copy_wait<0>();
    kl_barrier(barrier, KDA_GROUP);

    /* Norms, decays of the blocks, beta. */
    float squares[2] = {};
    if (s.qk_l2norm)
        kda_rows_squares<KP>(squares, room + (of_q ? at::q : at::k), 16 * b);
    kda_pair a[16];
    int first_deep = 16;
#pragma unroll
    for (int u = 0; u < own_t::units; u++) {
        own_t own(thread, u);
        if (own.idle())
            continue;
        kda_pair sum = kda_decays(s.gate, a, room + at::g, own, scale, kda_gate_biases(s.gate, scale, head.dt_bias[u]));
        if (__any_sync(0xffffffffu, fminf(sum.x, sum.y) < 1 - KDA_DEEP))
            first_deep = min(first_deep, kda_first_deep(a));
        *(float2 *)(block_decay + own.block * KP + own.c) = make_float2(kl_exp2(sum.x), kl_exp2(sum.y));
    }
    if (s.qk_l2norm)
        kda_write_norms(norm + 32 * of_q + 16 * b, squares, of_q ? s.scale : 1.0f);
    else if (kl_lane() < 16)
        norm[32 * of_q + 16 * b + kl_lane()] = of_q ? s.scale : 1.0f;
    if (thread < 32)
        beta[thread] = thread < tokens ? kda_beta_of(s.beta_kind, kl_bf16_low(ahead.beta)) : 0.0f;
    if (__any_sync(0xffffffffu, first_deep < 16))
        for (int m = 16; m; m /= 2)
            first_deep = min(first_deep, __shfl_xor_sync(0xffffffffu, first_deep, m));
    if (kl_lane() == 0)
        vote[warp] = first_deep;
    tile_is_free();
    kl_barrier(barrier, KDA_GROUP);

    /* Operands; before them the deep rows of this warp's diagonal block: k (warps 0, 1) or q (2, 3) against k. */
    float c[8] = {}, deep_rows[8] = {};
    first_deep = min(vote[b], vote[b + 2]);
    if (__builtin_expect(min(first_deep, min(vote[1 - b], vote[3 - b])) < 16, 0))
        kda_diagonal_by_levels(deep_rows, s, head, scale, a, room, tile, thread, barrier);
#pragma unroll
    for (int u = 0; u < own_t::units; u++) {
        own_t own(thread, u);
        if (own.idle())
            continue;
        if (own_t::units > 1)
            kda_decays(s.gate, a, room + at::g, own, scale, kda_gate_biases(s.gate, scale, head.dt_bias[u]));
        float2 mine = *(const float2 *)(block_decay + own.block * KP + own.c), other = *(const float2 *)(block_decay + (1 - own.block) * KP + own.c);
        if (own.block)
            *(float2 *)(tile + Form::tile::decay + 4 * own.c) = make_float2(mine.x * other.x, mine.y * other.y);
        kda_make_operands<Form>(a, {other.x, other.y}, norm + 16 * own.block, norm + 32 + 16 * own.block, room + at::k, room + at::q, room + at::g, tile, own);
    }
    kl_barrier(barrier, KDA_GROUP);

    unsigned char *kr = room + at::k, *qr_or_ke = room + at::q, *kd = room + at::g;
    if (warp == 2)
        kda_product<KP>(c, [&](uint32_t f[4], int n) { Form::read_qg(f, tile, n); }, kd, 0);
    else
        kda_rows_product<KP>(c, of_q ? qr_or_ke : kr, 16 * b, kd, 16 * b);
    if (first_deep < 16)
#pragma unroll
        for (int e = 0; e < 8; e++)
            c[e] = kda_block_row(e) < first_deep ? c[e] : deep_rows[e];
    uint32_t f[4];
    if (of_q) {
#pragma unroll
        for (int e = 0; e < 8; e++)
            c[e] = kda_block_column(e) <= kda_block_row(e) ? c[e] : 0.0f;
        kda_packed_block(f, c);
        Form::write_Aqk(tile, b, b, f);
    } else {
#pragma unroll
        for (int e = 0; e < 8; e++)
            c[e] = s.no_delta ? 0.0f : c[e];
        kda_write_lower(T, b, c, beta + 16 * b);
    }
    kl_barrier(barrier, KDA_GROUP);

    /* T of the diagonal blocks, beside what goes from block 0 to block 1. */
    constexpr int count = KP / 64;
    kda_w<count> w;
    w.read(kr, warp * count);
    if (warp == 0)
        kda_invert_diagonal(T);
    if (warp == 1) {
        kda_rows_product<KP>(c, qr_or_ke, 0, kr, 16);
#pragma unroll
        for (int e = 0; e < 8; e++)
            c[e] = s.no_delta ? 0.0f : c[e];
    }
    if (warp == 2) {
        kda_rows_product<KP>(c, qr_or_ke, 16, qr_or_ke, 0);
        kda_packed_block(f, c);
        Form::write_Aqk(tile, 1, 0, f);
    }
    if (warp == 3)
        Form::clear_above_diagonal(tile);
    kl_barrier(barrier, KDA_GROUP);

    /* From block 0 to block 1, beside all of w that does not need it. */
    float T00[8], T11[8];
    uint32_t Tb00[4], Tb11[4];
    kda_read_diagonal(T00, T, 0);
    kda_read_diagonal(T11, T, 1);
    if (warp == 1) {
        kda_invert_across(c, c, T11, T, beta + 16);
        kda_scaled(f, c, beta);
        Form::write_Tb(tile, 1, 0, f);
    }
    kda_scaled(Tb00, T00, beta);
    kda_scaled(Tb11, T11, beta + 16);
    if (warp == 2)
        Form::write_Tb(tile, 0, 0, Tb00);
    if (warp == 3)
        Form::write_Tb(tile, 1, 1, Tb11);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        Tb00[e] = Form::signed_pair(Tb00[e]);
        Tb11[e] = Form::signed_pair(Tb11[e]);
    }
    w.begin(Tb00, Tb11, block_decay, warp * count);
    rows_are_free();
    kl_barrier(barrier, KDA_GROUP);

    Form::read_Tb(f, tile, 1, 0);
#pragma unroll
    for (int e = 0; e < 4; e++)
        f[e] = Form::signed_pair(f[e]);
    w.end(f);
#pragma unroll
    for (int n = 0; n < count; n++)
#pragma unroll
        for (int block = 0; block < 2; block++) {
            kda_packed_block(f, block ? w.w1[n] : w.w0[n]);
#pragma unroll
            for (int e = 0; e < 4; e++)
                f[e] = s.no_delta ? 0 : f[e];
            Form::write_w(tile, block, warp * count + n, f);
        }
    kl_fence_async_shared();
    kl_barrier(barrier, KDA_GROUP);
}

/* Every tile of every head into tiles [tile number][HV], in the core form (K up to 128) or else the form of blocks. table:
 * kda_sequences_upload's. What is launched next with kl_grid.overlap may start when the last tiles have been begun. */
kl_status kda_cuda_prepare(const kl_ctx *ctx, const kda_problem *p, const void *table, void *tiles, bool core = false);

#endif
