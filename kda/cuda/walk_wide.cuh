/* The walk by warpgroups: one of them owns 64 columns of V and keeps their state S^T [64, KP] in its accumulators. Per tile,
 * with the matrices of core_tile.cuh read from shared memory by the matrix unit itself,
 *
 *     [u | o] = [Tb v | 0] + S^T [-w | qg]        S <- Diag(decay) S
 *     S += kg^T u                                 o += Aqk u
 *
 * The first line's products are one chain; the state decays beside them. */
#ifndef KL_KDA_CUDA_WALK_WIDE_CUH
#define KL_KDA_CUDA_WALK_WIDE_CUH

#include "kda/cuda/core_tile.cuh"
#include "kda/cuda/walk.cuh"

/* Shared memory of a block that walks so: a ring of slots, tile n in slot n % SLOTS. `full` counts the bytes that arrive,
 * `empty` the four warps that are done. */
template <int KP_, int SLOTS_> struct kda_wide_ring {
    static constexpr int KP = KP_, SLOTS = SLOTS_, TILE = kda_core_tile<KP>::bytes;
    alignas(16) unsigned char slot[SLOTS][TILE];
    struct {
        alignas(16) unsigned char v[KDA_V_TILES][KDA_TILE * 2 * KDA_COLUMNS], o[KDA_TILE * 2 * KDA_COLUMNS];
    } warp[4];
    uint64_t full[SLOTS], empty[SLOTS];
};

/* By one thread, before the block synchronises. */
template <class Ring> __device__ __forceinline__ void kda_wide_init(Ring &r)
{
    for (int i = 0; i < Ring::SLOTS; i++) {
        kl_mbar_init(&r.full[i], 1);
        kl_mbar_init(&r.empty[i], 4);
    }
    kl_mbar_init_fence();
}

/* The loader, one thread: waits until tile n's slot is free, and says how many bytes will come. */
template <class Ring> __device__ __forceinline__ void kda_wide_reserve(Ring &r, int n)
{
    if (n >= Ring::SLOTS)
        kl_mbar_wait(&r.empty[n % Ring::SLOTS], (n / Ring::SLOTS - 1) & 1);
    kl_mbar_expect(&r.full[n % Ring::SLOTS], Ring::TILE);
}

/* a, two A fragments [16 columns of V x 32 tokens] of what rows hold. */
__device__ __forceinline__ void kda_wide_columns(uint32_t a[2][4], unsigned char *rows)
{
    int lane = kl_lane();
#pragma unroll
    for (int j = 0; j < 2; j++)
        kl_ldmatrix4_trans(a[j], kda_row_half(rows, 16 * j + 8 * (lane >> 4) + (lane & 7), lane >> 3 & 1));
}

/* A fragments of accumulators c [16 x 16 count], count of them. */
template <int count> __device__ __forceinline__ void kda_wide_pack(uint32_t a[count][4], const float *c)
{
#pragma unroll
    for (int i = 0; i < count; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            a[i][j] = kl_pack_bf16(c[8 * i + 2 * j], c[8 * i + 2 * j + 1]);
}

/* All 128 threads of the warpgroup; first: the number of the path's first tile; column: of the warp's 16. */
template <class Ring> __device__ __forceinline__ void kda_walk_wide(Ring &m, const kda_walk &p, const kda_path &path, int first, int warp, int column)
{
    constexpr int KP = Ring::KP;
    using at = kda_core_tile<KP>;
    if (path.tiles < 0)
        return;
    auto &own = m.warp[warp];
    int lane = kl_lane(), tiles_a_chunk = p.sequences.chunk / p.sequences.tile;
    int64_t size = (int64_t)p.K * p.V, state = (path.slot * p.HV + path.head) * size;
    kda_lane_row from = kda_lane_row_of(p, path, p.v_stride, column), to = kda_lane_row_of(p, path, p.o_stride, column);
    float s[KP / 8][4];
    uint32_t a[KP / 16][4];
    kda_load_state<KP>(s, p, p.h0 ? p.h0 + state : nullptr, column);
    kda_wide_pack<KP / 16>(a, &s[0][0]);
    for (int i = 0; i < KDA_V_TILES; i++)
        kda_fetch_v(own.v[i], p, from);
    for (int i = 0; i < path.tiles; i++) {
        int n = first + i;
        unsigned char *tile = m.slot[n % Ring::SLOTS], *rows = own.v[i % KDA_V_TILES];
        if (p.chunk_states && i % tiles_a_chunk == 0)
            kda_store_state<KP>(s, p, p.chunk_states + ((path.place.chunk + i / tiles_a_chunk) * p.HV + path.head) * size, column);
        float u0[4][4], uo[8][4];
        uint32_t x[2][4];
        kl_copy_wait<KDA_V_TILES - 1>();
        __syncwarp();
        kda_wide_columns(x, rows);
        kl_mbar_wait(&m.full[n % Ring::SLOTS], n / Ring::SLOTS & 1);

        kl_operand RO = kl_operand_of(tile + at::RO, at::RO_row, 128), Tb = kl_operand_of(tile + at::Tb, at::T_row, 128);
        kl_wgmma_fence();
        kl_wgmma<32, false>(&u0[0][0], x[0], Tb);
        kl_wgmma<32>(&u0[0][0], x[1], kl_operand_at(Tb, 2 * at::T_row));
        kl_wgmma<64, false>(&uo[0][0], a[0], RO);
#pragma unroll
        for (int c = 1; c < KP / 16; c++)
            kl_wgmma<64>(&uo[0][0], a[c], kl_operand_at(RO, 2 * c * at::RO_row));
        kl_wgmma_commit();
        kl_wgmma_wait<0>();
        const float *decay = (const float *)(tile + at::decay) + 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < KP / 8; j++) {
            float2 d = *(const float2 *)(decay + 8 * j);
            s[j][0] *= d.x, s[j][1] *= d.y, s[j][2] *= d.x, s[j][3] *= d.y;
        }

        uint32_t u[2][4];
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                u0[j][e] += uo[j][e];
        kda_wide_pack<2>(u, &u0[0][0]);
        kl_operand G = kl_operand_of(tile + at::G, at::G_row, 128), Aqk = kl_operand_of(tile + at::Aqk, at::T_row, 128);
        kl_wgmma_fence();
#pragma unroll
        for (int j = 0; j < 2; j++)
            kl_wgmma<KP>(&s[0][0], u[j], kl_operand_at(G, 2 * j * at::G_row));
        kl_wgmma_commit();
        kl_wgmma<32, false>(&u0[0][0], u[0], Aqk);
        kl_wgmma<32>(&u0[0][0], u[1], kl_operand_at(Aqk, 2 * at::T_row));
        kl_wgmma_commit();
        kda_fetch_v(rows, p, from);
        kl_wgmma_wait<1>();
        kda_wide_pack<KP / 16>(a, &s[0][0]);
        kl_wgmma_wait<0>();
        if (lane == 0)
            kl_mbar_arrive(&m.empty[n % Ring::SLOTS]);

        /* matrices of 8 tokens x 8 columns: lane 8 q + row gives the row of token 8 (2 b + (q >> 1)) + row, half q & 1 */
        uint32_t o[2][4];
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                u0[j][e] += uo[4 + j][e];
        kda_wide_pack<2>(o, &u0[0][0]);
#pragma unroll
        for (int b = 0; b < 2; b++)
            kl_stmatrix4_trans(kda_row_half(own.o, 16 * b + 8 * (lane >> 4) + (lane & 7), lane >> 3 & 1), o[b]);
        __syncwarp();
        kda_put_o(own.o, p, to);
        __syncwarp();
    }
    if (p.ht)
        kda_store_state<KP>(s, p, p.ht + state, column);
}

#endif
