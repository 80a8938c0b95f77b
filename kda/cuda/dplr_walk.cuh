/* The walk of the general recurrence over the tiles of one sequence and head. Columns of V never meet, so a block takes 32
 * of them; the blocks of a head run side by side and find its tiles in the second cache.
 *
 *   warps 0, 1  the state: S^T [16 x KP] of 16 columns each in accumulators from the first tile to the last
 *   warps 2, 3  the outputs of the same columns, from S^T and u that the state warps leave, in bf16, in two alternating places
 *   warp 4      the loader: tiles and rows of v into a ring of stages */
#ifndef KL_KDA_CUDA_DPLR_WALK_CUH
#define KL_KDA_CUDA_DPLR_WALK_CUH

#include "kda/cuda/dplr_tile.cuh"

namespace dplr {

enum { COLUMNS = 32, GROUPS = COLUMNS / 16, WALK_THREADS = 32 * (2 * GROUPS + 1) };

template <int KP> struct walk_shared {
    static constexpr int stages = KP <= 128 ? 4 : 2;
    static constexpr int v = dplr_tile<KP>::bytes, stage = v + 32 * COLUMNS * 2;
    static constexpr int u = KP * 32, hand = u + 2 * KDA_BLOCK_BYTES; /* S^T, then u, as A fragments */
    static constexpr int hands = stages * stage, o = hands + GROUPS * 2 * hand, barriers = o + GROUPS * 1024,
                         bytes = barriers + 16 * stages;
};

/* What a warp needs to know of its place. */
struct walker {
    kda_place place;
    int64_t head;  /* n H + h */
    int64_t h;
    int v0, columns; /* of this block */
};

__device__ __forceinline__ int full_id(int group, int buffer) { return 1 + 4 * group + 2 * buffer; }
__device__ __forceinline__ int empty_id(int group, int buffer) { return full_id(group, buffer) + 1; }

/* Byte offset of a 16-byte piece of a token's 32 columns of v. */
__device__ __forceinline__ int value_at(int token, int piece) { return token * COLUMNS * 2 + 16 * (piece ^ (token >> 1 & 3)); }

/* v^T of 16 columns as A operand, tokens 0..15 and 16..31. */
__device__ __forceinline__ void load_v(uint32_t v[2][4], const unsigned char *rows, int group)
{
    int lane = kl_lane();
    for (int half = 0; half < 2; half++)
        kl_ldmatrix4_trans(v[half], rows + value_at(16 * half + (lane & 7) + 8 * (lane >> 4), 2 * group + (lane >> 3 & 1)));
}

/* c [16 x 32] += x^T [16 x 32] triangle^T */
__device__ __forceinline__ void multiply_triangle(float c[4][4], const uint32_t x[2][4], const unsigned char *triangle)
{
#pragma unroll
    for (int b = 0; b < 3; b++) {
        uint32_t f[4];
        kda_read_block(f, triangle, b);
        int half = b == 2, n = b == 0 ? 0 : 2;
        kl_mma(c[n], x[half], f);
        kl_mma(c[n + 1], x[half], f + 2);
    }
}

/* S^T [16 x KP] += x^T [16 x 32] keys [32 x KP] */
template <int KP> __device__ __forceinline__ void add_outer(float S[KP / 8][4], const uint32_t x[2][4], const unsigned char *keys)
{
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int c = 0; c < KP / 16; c++) {
            uint32_t f[4];
            kda_read_block(f, keys, half * (KP / 16) + c);
            kl_mma(S[2 * c], x[half], f);
            kl_mma(S[2 * c + 1], x[half], f + 2);
        }
}

__device__ __forceinline__ void pack(uint32_t a[4], const float left[4], const float right[4])
{
    a[0] = kl_pack_bf16(left[0], left[1]);
    a[1] = kl_pack_bf16(left[2], left[3]);
    a[2] = kl_pack_bf16(right[0], right[1]);
    a[3] = kl_pack_bf16(right[2], right[3]);
}

/* Element (channel, column) of S for accumulator x of lane; valid ones go through f(offset, value). */
template <int KP, class F> __device__ __forceinline__ void each_state(const dplr_view &p, const walker &w, int group, float S[KP / 8][4], F f)
{
    int g = kl_lane() >> 2, t = kl_lane() & 3;
    for (int m = 0; m < KP / 8; m++)
#pragma unroll
        for (int x = 0; x < 4; x++) {
            int channel = 8 * m + 2 * t + (x & 1), column = 16 * group + g + 8 * (x >> 1);
            bool valid = channel < p.K && column < w.columns;
            f(valid, (w.head * p.K + channel) * p.V + w.v0 + column, S[m][x]);
        }
}

template <int KP> __device__ __forceinline__ void walk_state(const dplr_view &p, const walker &w, int group, unsigned char *shared)
{
    using L = walk_shared<KP>;
    using tile = dplr_tile<KP>;
    uint64_t *full = (uint64_t *)(shared + L::barriers), *empty = full + L::stages;
    int lane = kl_lane();
    float S[KP / 8][4];
    each_state<KP>(p, w, group, S, [&](bool valid, int64_t at, float &x) { x = valid && p.h0 ? p.h0[at] : 0.0f; });
    for (int64_t i = 0; i < w.place.tiles; i++) {
        int s = (int)(i % L::stages), buffer = (int)(i & 1);
        unsigned char *stage = shared + s * L::stage, *hand = shared + L::hands + (2 * group + buffer) * L::hand;
        kl_mbar_wait(full + s, (int)(i / L::stages & 1));
        if (i >= 2)
            kl_barrier(empty_id(group, buffer), 64);

        /* u = M v + W S: two sums, so that eight chains run at once */
        uint32_t v[2][4], u[2][4];
        float R[2][4][4] = {};
        load_v(v, stage + L::v, group);
        multiply_triangle(R[0], v, stage + tile::M);
        constexpr int run = KP / 16 < 8 ? KP / 16 : 8; /* packed and stored ahead of the loads, which may not pass stores */
#pragma unroll
        for (int first = 0; first < KP / 16; first += run) {
            uint32_t a[run][4], f[4];
#pragma unroll
            for (int k = 0; k < run; k++) {
                pack(a[k], S[2 * (first + k)], S[2 * (first + k) + 1]);
                *(uint4 *)(hand + (first + k) * KDA_BLOCK_BYTES + 16 * lane) = make_uint4(a[k][0], a[k][1], a[k][2], a[k][3]);
            }
#pragma unroll
            for (int k = 0; k < run; k++)
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    kda_read_block(f, stage + tile::W, 2 * (first + k) + n);
                    kl_mma(R[k & 1][2 * n], a[k], f);
                    kl_mma(R[k & 1][2 * n + 1], a[k], f + 2);
                }
        }

        /* S <- Diag(decay) S + kg^T v + bg^T u */
        int t = lane & 3;
#pragma unroll
        for (int m = 0; m < KP / 8; m++) {
            float2 d = *(const float2 *)(stage + tile::decay + 4 * (8 * m + 2 * t));
            S[m][0] *= d.x;
            S[m][1] *= d.y;
            S[m][2] *= d.x;
            S[m][3] *= d.y;
        }
        add_outer<KP>(S, v, stage + tile::kg);
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int x = 0; x < 4; x++)
                R[0][n][x] += R[1][n][x];
        for (int half = 0; half < 2; half++) {
            pack(u[half], R[0][2 * half], R[0][2 * half + 1]);
            *(uint4 *)(hand + L::u + half * KDA_BLOCK_BYTES + 16 * lane) = make_uint4(u[half][0], u[half][1], u[half][2], u[half][3]);
        }
        kl_barrier_arrive(full_id(group, buffer), 64);
        add_outer<KP>(S, u, stage + tile::bg);
        kl_mbar_arrive(empty + s);
    }
    for (int64_t i = w.place.tiles < 2 ? 0 : w.place.tiles - 2; i < w.place.tiles; i++)
        kl_barrier(empty_id(group, (int)(i & 1)), 64);
    if (p.ht)
        each_state<KP>(p, w, group, S, [&](bool valid, int64_t at, float &x) {
            if (valid)
                p.ht[at] = x;
        });
}

/* Rows of 16 columns from shared memory to o, a token a lane. */
__device__ __forceinline__ void store_o(const dplr_view &p, const walker &w, int group, int64_t token, int count, const unsigned char *rows)
{
    int lane = kl_lane(), left = w.columns - 16 * group;
    if (lane >= count || left <= 0)
        return;
    uint16_t *to = p.o + ((token + lane) * p.H + w.h) * p.V + w.v0 + 16 * group;
    const uint16_t *from = (const uint16_t *)(rows + 32 * lane);
    if (p.values_by_16) {
        *(uint4 *)to = *(const uint4 *)from;
        if (left > 8)
            *(uint4 *)(to + 8) = *(const uint4 *)(from + 8);
        return;
    }
    for (int c = 0; c < 16 && c < left; c++)
        to[c] = from[c];
}

/* o = qg S + Aqk v + Aqb u */
template <int KP> __device__ __forceinline__ void walk_output(const dplr_view &p, const walker &w, int group, unsigned char *shared)
{
    using L = walk_shared<KP>;
    using tile = dplr_tile<KP>;
    uint64_t *full = (uint64_t *)(shared + L::barriers), *empty = full + L::stages;
    unsigned char *rows = shared + L::o + 1024 * group;
    int lane = kl_lane();
    for (int64_t i = 0; i < w.place.tiles; i++) {
        int s = (int)(i % L::stages), buffer = (int)(i & 1);
        unsigned char *stage = shared + s * L::stage, *hand = shared + L::hands + (2 * group + buffer) * L::hand;
        kl_mbar_wait(full + s, (int)(i / L::stages & 1));
        uint32_t v[2][4], u[2][4];
        float o[4][4] = {};
        load_v(v, stage + L::v, group);
        multiply_triangle(o, v, stage + tile::Aqk);
        kl_barrier(full_id(group, buffer), 64);
#pragma unroll
        for (int k = 0; k < KP / 16; k++) {
            uint32_t f[4];
            uint4 a = *(const uint4 *)(hand + k * KDA_BLOCK_BYTES + 16 * lane);
            uint32_t x[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int n = 0; n < 2; n++) {
                kda_read_block(f, stage + tile::qg, 2 * k + n);
                kl_mma(o[2 * n], x, f);
                kl_mma(o[2 * n + 1], x, f + 2);
            }
        }
        for (int half = 0; half < 2; half++) {
            uint4 a = *(const uint4 *)(hand + L::u + half * KDA_BLOCK_BYTES + 16 * lane);
            u[half][0] = a.x, u[half][1] = a.y, u[half][2] = a.z, u[half][3] = a.w;
        }
        multiply_triangle(o, u, stage + tile::Aqb);
        kl_barrier_arrive(empty_id(group, buffer), 64);
        kl_mbar_arrive(empty + s);

        for (int half = 0; half < 2; half++) {
            uint32_t r[4] = {kl_pack_bf16(o[2 * half][0], o[2 * half][1]), kl_pack_bf16(o[2 * half][2], o[2 * half][3]),
                             kl_pack_bf16(o[2 * half + 1][0], o[2 * half + 1][1]), kl_pack_bf16(o[2 * half + 1][2], o[2 * half + 1][3])};
            kl_stmatrix4_trans(rows + (16 * half + (lane & 7) + 8 * (lane >> 4)) * 32 + 16 * (lane >> 3 & 1), r);
        }
        __syncwarp();
        int64_t left = w.place.length - 32 * i;
        store_o(p, w, group, w.place.begin + 32 * i, left < 32 ? (int)left : 32, rows);
        __syncwarp();
    }
}

/* The rows of v of one tile, this block's columns, zeros around them; every lane arrives at full. */
__device__ __forceinline__ void load_values(const dplr_view &p, const walker &w, int64_t token, int count, unsigned char *rows, uint64_t *full)
{
    int lane = kl_lane();
    const uint16_t *from = p.v + (token * p.H + w.h) * p.V + w.v0;
    for (int i = lane; i < 32 * COLUMNS / 8; i += 32) {
        int row = i / (COLUMNS / 8), piece = i % (COLUMNS / 8);
        int64_t at = row * p.H * p.V + 8 * piece;
        bool valid = row < count && 8 * piece < w.columns;
        if (p.values_by_16) {
            kl_copy16(rows + value_at(row, piece), valid ? from + at : p.v, valid);
            continue;
        }
        uint16_t *eight = (uint16_t *)(rows + value_at(row, piece));
        for (int c = 0; c < 8; c++)
            eight[c] = valid && 8 * piece + c < w.columns ? from[at + c] : (uint16_t)0;
    }
    if (p.values_by_16)
        kl_copy_arrive(full);
    else
        kl_mbar_arrive(full);
}

template <int KP> __device__ __forceinline__ void load_tiles(const dplr_view &p, const walker &w, unsigned char *shared)
{
    using L = walk_shared<KP>;
    using tile = dplr_tile<KP>;
    uint64_t *full = (uint64_t *)(shared + L::barriers), *empty = full + L::stages;
    for (int64_t i = 0; i < w.place.tiles; i++) {
        int s = (int)(i % L::stages);
        unsigned char *stage = shared + s * L::stage;
        if (i >= L::stages)
            kl_mbar_wait(empty + s, (int)((i / L::stages - 1) & 1));
        if (kl_lane() == 0) {
            kl_mbar_expect(full + s, tile::bytes);
            kl_bulk_load(stage, p.tiles + ((w.place.tile + i) * p.H + w.h) * tile::bytes, tile::bytes, full + s);
            kl_bulk_issued(full + s);
        }
        __syncwarp();
        int64_t left = w.place.length - 32 * i;
        load_values(p, w, w.place.begin + 32 * i, left < 32 ? (int)left : 32, stage + L::v, full + s);
    }
}

} // namespace dplr

#endif
