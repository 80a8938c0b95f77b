/* From 32 tokens of one head to a tile of the general recurrence. A block of KP + 32 threads:
 *
 *   load       rows of q, k, a, b, g, bf16, to shared memory
 *   decays     thread = 2 channels x 16 tokens: running products of e^g, never a difference of sums, so every factor that
 *              leaves here is at most 1 in decay but one: a column divided by its decay from the block's start, allowed
 *              while that decay stays above 2^-116
 *   products   the four matrices by mma, a warp each, in blocks of 16 x 16 tokens: diagonal ones anchored at their first
 *              row, the one below them at the boundary
 *   pairwise   rows of the diagonal blocks from the first on whose decay fell below: one product of decays for each pair.
 *              Which rows depends on no later token, so that no later token moves a bit of an earlier output
 *   substitute thread = column of W or of M: X_i = R_i + sum_{j<i} Aab[i,j] X_j, in float */
#ifndef KL_KDA_CUDA_DPLR_INTRA_CUH
#define KL_KDA_CUDA_DPLR_INTRA_CUH

#include "kda/cuda/dplr_tile.cuh"

namespace dplr {

/* Shared memory of the preparation. Rows of 32 x KP bf16 are swizzled by 16-byte pieces; Aab and Aak are [16][16] above
 * [16][32] floats. Once the products are taken, W lies over k and M over b. */
template <int KP> struct intra_shared {
    static constexpr int rows = 32 * KP * 2, corner = 768;
    static constexpr int q = 0, k = rows, a = 2 * rows, b = 3 * rows, g = 4 * rows, edge = g, out = 5 * rows, Aqk = out + 3 * rows,
                         Aqb = Aqk + dplr_tile<KP>::triangle, Aab = Aqb + dplr_tile<KP>::triangle, Aak = Aab + 4 * corner,
                         whole = Aak + 4 * corner, far = whole + 8 * KP, bytes = far + 16;
    static_assert(rows == dplr_tile<KP>::matrix, "W takes the place of k's rows");
};

__device__ __forceinline__ int corner_at(int i, int j) { return i < 16 ? i * 16 + j : 256 + (i - 16) * 32 + j; }

/* Byte offset of 16-byte piece `piece` of a row. */
template <int KP> __device__ __forceinline__ int piece_at(int row, int piece)
{
    return row * KP * 2 + 16 * (piece ^ (row & 7) ^ (row >> 4 & 1) << 2);
}
template <int KP> __device__ __forceinline__ uint32_t *pair_at(unsigned char *rows, int row, int channel)
{
    return (uint32_t *)(rows + piece_at<KP>(row, channel >> 3) + 2 * (channel & 7));
}

/* Rows of one tensor that are not whole 16-byte pieces; zeros beyond K and beyond the sequence. */
template <int KP> __device__ __forceinline__ void load_elements(const dplr_view &p, const uint16_t *from, int64_t first, int count, unsigned char *rows)
{
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < 32 * KP; i += (int)blockDim.x) {
        int row = i / KP, channel = i % KP;
        bool valid = row < count && channel < p.K;
        ((uint16_t *)(rows + piece_at<KP>(row, channel >> 3)))[channel & 7] = valid ? from[first + row * p.H * p.K + channel] : (uint16_t)0;
    }
}

/* Rows of the tile to shared memory. A thread takes one piece of every eighth row. */
template <int KP> __device__ __forceinline__ void load_rows(const dplr_view &p, int64_t first, int count, unsigned char *shared)
{
    using S = intra_shared<KP>;
    int row0 = (int)threadIdx.x / (KP / 8), piece = (int)threadIdx.x % (KP / 8);
    const uint16_t *from[5] = {p.q, p.k, p.a, p.b, p.g};
    int64_t stride = p.H * p.K, at = first + row0 * stride + 8 * piece;
    if (!p.keys_by_16) {
        load_elements<KP>(p, p.q, first, count, shared + S::q);
        load_elements<KP>(p, p.k, first, count, shared + S::k);
        load_elements<KP>(p, p.a, first, count, shared + S::a);
        load_elements<KP>(p, p.b, first, count, shared + S::b);
        load_elements<KP>(p, p.g, first, count, shared + S::g);
        return;
    }
    if ((int)threadIdx.x >= KP)
        return;
#pragma unroll
    for (int x = 0; x < 4; x++, at += 8 * stride) {
        bool valid = row0 + 8 * x < count && 8 * piece < p.K;
        unsigned char *to = shared + piece_at<KP>(row0 + 8 * x, piece);
#pragma unroll
        for (int m = 0; m < 5; m++)
            kl_copy16(to + m * S::rows, from[m] + (valid ? at : first), valid);
    }
    kl_copy_commit();
    kl_copy_wait<0>();
}

/* Local rows of q and a in their places, k and b divided by their decay likewise, k and b of block 0 at its end in edge;
 * qg, kg, bg to out; the decay of each block to whole. Raises far[block] to 16 - (first row to be done pairwise). */
template <int KP> __device__ __forceinline__ void decays(const dplr_view &p, unsigned char *shared)
{
    using S = intra_shared<KP>;
    unsigned char *q = shared + S::q, *k = shared + S::k, *a = shared + S::a, *b = shared + S::b, *out = shared + S::out;
    float *whole = (float *)(shared + S::whole);
    int lane = kl_lane(), block = lane >> 4, c = 32 * (int)(threadIdx.x >> 5) + 2 * (lane & 15), row0 = 16 * block;
    bool mine = (int)threadIdx.x < KP;
    float2 e[16], P = make_float2(1.0f, 1.0f), other = P;
    if (mine) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            uint32_t g = *pair_at<KP>(shared + S::g, row0 + i, c);
            e[i] = make_float2(kl_exp(kl_bf16_low(g)), kl_exp(kl_bf16_high(g)));
            P.x *= e[i].x;
            P.y *= e[i].y;
        }
        *(float2 *)(whole + block * KP + c) = P;
    }
    __syncthreads();
    if (!mine)
        return;
    other = *(float2 *)(whole + (1 - block) * KP + c);

    /* k_j P(j->end), b_j P(j->end) */
    float2 after = make_float2(1.0f, 1.0f), beyond = block == 0 ? other : after, odd_k = after, odd_b = after;
#pragma unroll
    for (int i = 15; i >= 0; i--) {
        uint32_t kw = *pair_at<KP>(k, row0 + i, c), bw = *pair_at<KP>(b, row0 + i, c);
        float2 ke = make_float2(kl_bf16_low(kw) * after.x, kl_bf16_high(kw) * after.y);
        float2 be = make_float2(kl_bf16_low(bw) * after.x, kl_bf16_high(bw) * after.y);
        if (block == 0) {
            *pair_at<KP>(shared + S::edge, i, c) = kl_pack_bf16(ke.x, ke.y);
            *pair_at<KP>(shared + S::edge, 16 + i, c) = kl_pack_bf16(be.x, be.y);
        }
        ke = make_float2(ke.x * beyond.x, ke.y * beyond.y);
        be = make_float2(be.x * beyond.x, be.y * beyond.y);
        if (i % 2) {
            odd_k = ke;
            odd_b = be;
        } else {
            int at = block * (KP / 16) + c / 16;
            dplr_put(out + S::rows, at, i, c & 15, kl_pack_bf16(ke.x, odd_k.x));
            dplr_put(out + S::rows, at, i, (c & 15) + 1, kl_pack_bf16(ke.y, odd_k.y));
            dplr_put(out + 2 * S::rows, at, i, c & 15, kl_pack_bf16(be.x, odd_b.x));
            dplr_put(out + 2 * S::rows, at, i, (c & 15) + 1, kl_pack_bf16(be.y, odd_b.y));
        }
        after.x *= e[i].x;
        after.y *= e[i].y;
    }

    /* q_i P(start->i), a_i P(start->i-1), k_j / P(start->j), b_j / P(start->j) */
    constexpr float least = 0x1p-116f, most = 0x1p120f;
    float2 E = make_float2(1.0f, 1.0f), before = block == 1 ? other : E;
    int near = 16;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        uint32_t aw = *pair_at<KP>(a, row0 + i, c), qw = *pair_at<KP>(q, row0 + i, c);
        uint32_t kw = *pair_at<KP>(k, row0 + i, c), bw = *pair_at<KP>(b, row0 + i, c);
        *pair_at<KP>(a, row0 + i, c) = kl_pack_bf16(kl_bf16_low(aw) * E.x, kl_bf16_high(aw) * E.y);
        E.x *= e[i].x;
        E.y *= e[i].y;
        float2 qr = make_float2(kl_bf16_low(qw) * p.scale * E.x, kl_bf16_high(qw) * p.scale * E.y);
        *pair_at<KP>(q, row0 + i, c) = kl_pack_bf16(qr.x, qr.y);
        dplr_put(out, c / 16 * 2 + block, c & 15, i, kl_pack_bf16(qr.x * before.x, qr.y * before.y));
        float2 inverse = make_float2(kl_rcp(E.x), kl_rcp(E.y));
        float2 kd = make_float2(kl_bf16_low(kw) * inverse.x, kl_bf16_high(kw) * inverse.y);
        float2 bd = make_float2(kl_bf16_low(bw) * inverse.x, kl_bf16_high(bw) * inverse.y);
        float size = fmaxf(fmaxf(fabsf(kd.x), fabsf(kd.y)), fmaxf(fabsf(bd.x), fabsf(bd.y)));
        if (near == 16 && !(fminf(E.x, E.y) >= least && size <= most))
            near = i;
        *pair_at<KP>(k, row0 + i, c) = kl_pack_bf16(kd.x, kd.y);
        *pair_at<KP>(b, row0 + i, c) = kl_pack_bf16(bd.x, bd.y);
    }
    if (near < 16)
        atomicMax((int *)(shared + S::far) + block, 16 - near);
}

/* c [16 x 16] += rows [16, KP] columns [16, KP]^T, both as stored. */
template <int KP> __device__ __forceinline__ void multiply(float c[2][4], const unsigned char *rows, int row0, const unsigned char *columns, int column0)
{
    int lane = kl_lane(), at = lane & 7, second = lane >> 3 & 1, fourth = lane >> 4;
#pragma unroll
    for (int s = 0; s < KP / 16; s++) {
        uint32_t x[4], y[4];
        kl_ldmatrix4(x, rows + piece_at<KP>(row0 + at + 8 * second, 2 * s + fourth));
        kl_ldmatrix4(y, columns + piece_at<KP>(column0 + at + 8 * fourth, 2 * s + second));
        kl_mma(c[0], x, y);
        kl_mma(c[1], x, y + 2);
    }
}

/* Zero where j > i - strict, for a diagonal block. */
__device__ __forceinline__ void keep_lower(float c[2][4], int strict)
{
    int g = kl_lane() >> 2, t = kl_lane() & 3;
    for (int m = 0; m < 2; m++)
        for (int x = 0; x < 4; x++)
            if (8 * m + 2 * t + (x & 1) > g + 8 * (x >> 1) - strict)
                c[m][x] = 0.0f;
}

__device__ __forceinline__ void store_block(float c[2][4], unsigned char *triangle, int j, int i)
{
    uint32_t f[4] = {kl_pack_bf16(c[0][0], c[0][1]), kl_pack_bf16(c[1][0], c[1][1]), kl_pack_bf16(c[0][2], c[0][3]),
                     kl_pack_bf16(c[1][2], c[1][3])};
    kda_write_block(triangle, dplr_triangle_block(j, i), f);
}

__device__ __forceinline__ void store_corner(float c[2][4], float *corner, int j, int i)
{
    int g = kl_lane() >> 2, t = kl_lane() & 3;
    for (int m = 0; m < 2; m++)
        for (int x = 0; x < 2; x++)
            *(float2 *)(corner + corner_at(16 * i + g + 8 * x, 16 * j + 8 * m + 2 * t)) = make_float2(c[m][2 * x], c[m][2 * x + 1]);
}

/* Aqk, Aqb, Aak, Aab: one a warp. */
template <int KP> __device__ __forceinline__ void products(unsigned char *shared)
{
    using S = intra_shared<KP>;
    for (int kind = (int)threadIdx.x >> 5; kind < 4; kind += (int)blockDim.x >> 5) {
        bool of_a = kind >= 2, with_b = kind == 1 || kind == 3;
        const unsigned char *rows = shared + (of_a ? S::a : S::q), *columns = shared + (with_b ? S::b : S::k);
        unsigned char *triangle = shared + (with_b ? S::Aqb : S::Aqk);
        float *corner = (float *)(shared + (with_b ? S::Aab : S::Aak));
        for (int block = 0; block < 3; block++) {
            int i = block != 0, j = block == 2;
            float c[2][4] = {};
            if (i == j)
                multiply<KP>(c, rows, 16 * i, columns, 16 * j);
            else
                multiply<KP>(c, rows, 16, shared + S::edge, with_b ? 16 : 0);
            if (i == j)
                keep_lower(c, of_a);
            if (of_a)
                store_corner(c, corner, j, i);
            else
                store_block(c, triangle, j, i);
        }
    }
}

/* Sums of four numbers over the lanes of a warp; lane 8 m + anything gets that of x[m]. */
__device__ __forceinline__ float four_sums(const float x[4])
{
    bool upper = kl_lane() & 16, odd = kl_lane() & 8;
    float y[2];
    for (int m = 0; m < 2; m++)
        y[m] = (upper ? x[2 + m] : x[m]) + __shfl_xor_sync(0xffffffffu, upper ? x[m] : x[2 + m], 16);
    float z = (odd ? y[1] : y[0]) + __shfl_xor_sync(0xffffffffu, odd ? y[0] : y[1], 8);
    for (int m = 4; m; m >>= 1)
        z += __shfl_xor_sync(0xffffffffu, z, m);
    return z;
}

/* Rows 16 - far.. of the diagonal blocks again: x_i . P(j->i) y_j with the product of the decays walked pair by pair, from
 * the tensors themselves. A warp a row. */
template <int KP> __device__ void pairwise(const dplr_view &p, int64_t first, int count, unsigned char *shared)
{
    using S = intra_shared<KP>;
    const int *far = (const int *)(shared + S::far);
    int lane = kl_lane(), warps = (int)blockDim.x >> 5;
    for (int row = (int)threadIdx.x >> 5; row < 32; row += warps) {
        int block = row >> 4;
        if ((row & 15) < 16 - far[block])
            continue;
        constexpr int width = KP / 32;
        int64_t stride = p.H * p.K;
        float q[width], a[width], between[width], own[width];
        for (int c = 0; c < width; c++) {
            int channel = lane + 32 * c;
            bool valid = row < count && channel < p.K;
            int64_t at = first + row * stride + channel;
            q[c] = valid ? kl_load_bf16(p.q + at) * p.scale : 0.0f;
            a[c] = valid ? kl_load_bf16(p.a + at) : 0.0f;
            own[c] = valid ? kl_exp(kl_load_bf16(p.g + at)) : 1.0f;
            between[c] = 1.0f;
        }
        for (int j = row; j >= 16 * block; j--) {
            float sum[4] = {};
            for (int c = 0; c < width; c++) {
                int channel = lane + 32 * c;
                int64_t at = first + j * stride + channel;
                bool valid = row < count && channel < p.K;
                float k = valid ? kl_load_bf16(p.k + at) * between[c] : 0.0f, b = valid ? kl_load_bf16(p.b + at) * between[c] : 0.0f;
                float x = j < row ? q[c] * own[c] : q[c];
                sum[0] += x * k;
                sum[1] += x * b;
                sum[2] += a[c] * k;
                sum[3] += a[c] * b;
                if (valid && j < row)
                    between[c] *= kl_exp(kl_load_bf16(p.g + at));
            }
            float total = four_sums(sum);
            int kind = lane >> 3, b = dplr_triangle_block(block, block), half = j & 1;
            if (lane & 7)
                continue;
            if (kind < 2) {
                unsigned char *triangle = shared + (kind == 1 ? S::Aqb : S::Aqk);
                int slot = kda_slot_of(b, 4 * (row & 7) + (j >> 1 & 3)), word = kda_word_of(b, (row >> 3 & 1) * 2 + (j >> 3 & 1));
                ((uint16_t *)(triangle + slot + 4 * word))[half] = kl_to_bf16(total);
            } else if (j < row) {
                ((float *)(shared + (kind == 3 ? S::Aab : S::Aak)))[corner_at(row, j)] = total;
            }
        }
    }
}

/* x_i += sum_{j<i} Aab[i,j] x_j, i rising. */
__device__ __forceinline__ void substitute(float x[32], const float *Aab)
{
#pragma unroll
    for (int i = 1; i < 32; i++) {
        float sum[4] = {x[i], 0.0f, 0.0f, 0.0f};
        const float4 *row = (const float4 *)(Aab + corner_at(i, 0));
#pragma unroll
        for (int j = 0; j < i; j += 4) {
            float4 A = row[j / 4];
            sum[0] += A.x * x[j];
            if (j + 1 < i)
                sum[1] += A.y * x[j + 1];
            if (j + 2 < i)
                sum[2] += A.z * x[j + 2];
            if (j + 3 < i)
                sum[3] += A.w * x[j + 3];
        }
        x[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}

/* Column r (k of the blocks) of a matrix [32 tokens], in pairs with the neighbouring lane's: even lanes put tokens 0..15. */
template <class Put> __device__ __forceinline__ void put_column(const float x[32], Put put)
{
    bool odd = kl_lane() & 1;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float given = __shfl_xor_sync(0xffffffffu, odd ? x[i] : x[16 + i], 1);
        put(odd ? 16 + i : i, odd ? kl_pack_bf16(given, x[16 + i]) : kl_pack_bf16(x[i], given));
    }
}

template <int KP> __device__ __forceinline__ void solve(unsigned char *shared)
{
    using S = intra_shared<KP>;
    const float *Aab = (const float *)(shared + S::Aab), *Aak = (const float *)(shared + S::Aak), *whole = (const float *)(shared + S::whole);
    int r = (int)threadIdx.x;
    float x[32];
    if (r < KP) {
        float before = whole[r];
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float a = kl_load_bf16((const uint16_t *)(shared + S::a + piece_at<KP>(i, r >> 3)) + (r & 7));
            x[i] = i < 16 ? a : a * before;
        }
    } else {
        r -= KP;
#pragma unroll
        for (int i = 0; i < 32; i++)
            x[i] = r < i ? Aak[corner_at(i, r)] : 0.0f;
    }
    substitute(x, Aab);
    unsigned char *W = shared + S::k, *M = shared + S::b;
    if ((int)threadIdx.x < KP)
        put_column(x, [=](int i, uint32_t pair) { dplr_put(W, r / 16 * 2 + i / 16, r & 14, i & 15, pair); });
    else
        put_column(x, [=](int i, uint32_t pair) {
            if (i >= 16 || r < 16)
                dplr_put(M, dplr_triangle_block(r / 16, i / 16), r & 14, i & 15, pair);
        });
}

} // namespace dplr

#endif
