/* Preparation for the backward pass: one block makes one tile of one value head (tile_bwd.cuh).
 *
 * A thread owns one channel of one block of 16 tokens, so running products of decays stay in registers. The matrices between
 * tokens are summed level by level, as on the CPU: at level h = 1, 2, 4, 8, 16 every run of 2h tokens is halved, and for a row i
 * of the second half and a column j of the first
 *
 *     P(j->i) = P(j->m) P(m->i),  m the last token of the first half,
 *
 * where both factors are at most 1. A level has 16 rows and 16 columns whatever h is: one product of the matrix unit, of which
 * the pairs of one run are kept. No exponential of a difference, no anchor that a strong gate could overflow. */
#ifndef KL_KDA_CUDA_PREPARE_BWD_CUH
#define KL_KDA_CUDA_PREPARE_BWD_CUH

#include "kda/cuda/gates_bwd.cuh"

template <int KP> struct kda_prepare_bwd_room {
    static constexpr int operand = 16 * KP * 2; /* rows of q, rows of k, columns of k at one level */
    static constexpr int level = 0, kP = 15 * operand, tile = kP + 32 * KP * 2, A = tile + kda_bwd_tile<KP>::bytes /* float [2][32][33]: Akk, Aqk */,
                         whole = A + 2 * 32 * 33 * 4 /* float [2][KP] */, sums = whole + 8 * KP /* float [KP/16][48] */,
                         bytes = sums + KP / 16 * 48 * 4;
    /* Over the levels when they have been multiplied: */
    static constexpr int inverse = level /* float [2][32][33]: T, T' */, middle = inverse + 2 * 32 * 33 * 4 /* float [2][16][16] */,
                         low = middle + 2048 /* image: what rounding T' leaves over */;
};

namespace {

/* Sums over 2 half lanes of as many values at once, half of them changing hands: lane l gets that of value l % (2 half). */
template <int half> __device__ __forceinline__ float sum_of_many(const float *v)
{
    bool upper = kl_lane() & half;
    float w[half];
#pragma unroll
    for (int i = 0; i < half; i++) {
        float low = v[i], high = v[i + half];
        w[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, half);
    }
    if constexpr (half > 1)
        return sum_of_many<half / 2>(w);
    else
        return w[0];
}

/* Squares of the rows of q and k and their product, over all channels; then the factors of the rows, beta, and q_i . k_i. */
template <int KP>
__device__ __forceinline__ void prepare_rows(const kda_bwd_args &a, int hv, kda_bwd_rows rows, const kda_column &x, unsigned char *shared)
{
    using room = kda_prepare_bwd_room<KP>;
    int warp = (int)threadIdx.x / 32, lane = kl_lane();
    float *sums = (float *)(shared + room::sums), square[32], product[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        square[i] = x.q[i] * x.q[i];
        square[16 + i] = x.k[i] * x.k[i];
        product[i] = x.q[i] * x.k[i];
    }
    float s = sum_of_many<16>(square), p = sum_of_many<8>(product);
    p += __shfl_xor_sync(0xffffffffu, p, 16);
    sums[warp * 48 + lane] = s;
    if (lane < 16)
        sums[warp * 48 + 32 + lane] = p;
    __syncthreads();
    int i = (int)threadIdx.x;
    if (i < 32) {
        const float *mine = sums + i / 16 * (KP / 32) * 48 + i % 16;
        float qq = 0.0f, kk = 0.0f, qk = 0.0f;
        for (int w = 0; w < KP / 32; w++, mine += 48) {
            qq += mine[0];
            kk += mine[16];
            qk += mine[32];
        }
        float *row = (float *)(shared + room::tile + kda_bwd_tile<KP>::rows);
        bool real = i < rows.count;
        row[i] = real ? kda_beta_of(a.beta_kind, kl_load_bf16(a.beta + (rows.token + i) * a.beta_stride + hv)) : 0.0f;
        row[32 + i] = a.scale * (a.l2norm ? kl_rsqrt(qq + 1e-6f) : 1.0f);
        row[64 + i] = a.l2norm ? kl_rsqrt(kk + 1e-6f) : 1.0f;
        float *A = (float *)(shared + room::A);
        for (int j = 0; j < 32; j++)
            A[i * 33 + j] = A[(32 + i) * 33 + j] = 0.0f;
        A[(32 + i) * 33 + i] = qk * row[32 + i] * row[64 + i];
    }
    __syncthreads();
}

template <int KP> __device__ __forceinline__ void store_channel(unsigned char *image, int row, int channel, float x)
{
    *(uint16_t *)(image + kda_wide_at(KP, row, channel >> 3) + 2 * (channel & 7)) = kl_to_bf16(x);
}

/* One level h < 16 of a thread's 16 tokens: rows q_i P(m->i), k_i P(m->i), columns k_j P(j->m). */
template <int KP, int h>
__device__ __forceinline__ void write_level(const kda_column &x, const float d[16], int block, int channel, unsigned char *level)
{
    constexpr int operand = kda_prepare_bwd_room<KP>::operand;
#pragma unroll
    for (int run = 0; run < 8 / h; run++) {
        int first = 2 * h * run, at = 8 * block + h * run;
        float f = 1.0f;
#pragma unroll
        for (int i = 0; i < h; i++) {
            f *= d[first + h + i];
            store_channel<KP>(level, at + i, channel, x.q[first + h + i] * f);
            store_channel<KP>(level + operand, at + i, channel, x.k[first + h + i] * f);
        }
        f = 1.0f;
#pragma unroll
        for (int j = h - 1; j >= 0; j--) {
            store_channel<KP>(level + 2 * operand, at + j, channel, x.k[first + j] * f);
            f *= d[first + j];
        }
    }
}

/* All operands, and what reaches into the tile and out of it: qg, kP, kg and the decay of the whole tile. */
template <int KP>
__device__ __forceinline__ void prepare_operands(const kda_column &x, const float d[16], int block, int channel, unsigned char *shared)
{
    using room = kda_prepare_bwd_room<KP>;
    using tile = kda_bwd_tile<KP>;
    unsigned char *level = shared + room::level;
    write_level<KP, 1>(x, d, block, channel, level);
    write_level<KP, 2>(x, d, block, channel, level + 3 * room::operand);
    write_level<KP, 4>(x, d, block, channel, level + 6 * room::operand);
    write_level<KP, 8>(x, d, block, channel, level + 9 * room::operand);
    level += 12 * room::operand;
    float f = 1.0f;
    if (block == 1) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            f *= d[i];
            store_channel<KP>(level, i, channel, x.q[i] * f);
            store_channel<KP>(level + room::operand, i, channel, x.k[i] * f);
        }
    } else {
#pragma unroll
        for (int j = 15; j >= 0; j--) {
            store_channel<KP>(level + 2 * room::operand, j, channel, x.k[j] * f);
            f *= d[j];
        }
    }
    float *whole = (float *)(shared + room::whole);
    whole[block * KP + channel] = f;
    __syncthreads();
    float before = block ? whole[channel] : 1.0f, after = block ? 1.0f : whole[KP + channel];
    f = before;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        f *= d[i];
        store_channel<KP>(shared + room::tile + tile::qg, 16 * block + i, channel, x.q[i] * f);
        store_channel<KP>(shared + room::kP, 16 * block + i, channel, x.k[i] * f);
    }
    if (block == 1)
        ((float *)(shared + room::tile + tile::decay))[channel] = f;
    f = after;
#pragma unroll
    for (int j = 15; j >= 0; j--) {
        store_channel<KP>(shared + room::tile + tile::kg, 16 * block + j, channel, x.k[j] * f);
        f *= d[j];
    }
}

/* Akk and Aqk: a warp a level. */
template <int KP> __device__ void prepare_matrices(bool no_delta, unsigned char *shared)
{
    using room = kda_prepare_bwd_room<KP>;
    int lane = kl_lane();
    float *A = (float *)(shared + room::A);
    for (int l = (int)threadIdx.x / 32; l < 5; l += KP / 16) {
        const unsigned char *level = shared + room::level + 3 * l * room::operand;
        float q[2][4] = {}, k[2][4] = {};
        for (int c = 0; c < KP / 16; c++) {
            uint32_t aq[4], ak[4], b[4];
            int down = kda_wide_at(KP, kda_down_row(lane), 2 * c + kda_down_piece(lane));
            kl_ldmatrix4(aq, level + down);
            kl_ldmatrix4(ak, level + room::operand + down);
            kl_ldmatrix4(b, level + 2 * room::operand + kda_wide_at(KP, kda_across_row(lane), 2 * c + kda_across_piece(lane)));
            for (int n = 0; n < 2; n++) {
                kl_mma(q[n], aq, b + 2 * n);
                kl_mma(k[n], ak, b + 2 * n);
            }
        }
        for (int n = 0; n < 2; n++)
            for (int e = 0; e < 4; e++) {
                int row = lane / 4 + 8 * (e >> 1), column = 8 * n + 2 * (lane & 3) + (e & 1), h = 1 << l;
                if (row >> l != column >> l)
                    continue;
                int i = (row >> l) * 2 * h + h + (row & (h - 1)), j = (column >> l) * 2 * h + (column & (h - 1));
                A[i * 33 + j] = no_delta ? 0.0f : k[n][e];
                A[(32 + i) * 33 + j] = q[n][e];
            }
    }
}

/* T and T' by forward substitution on the diagonal blocks, T10 = -T11 A10 T00 between them. which 0: T, A = Diag(beta) Akk;
 * which 1: T', A = Akk Diag(beta). */
template <int KP> __device__ void prepare_inverses(unsigned char *shared)
{
    using room = kda_prepare_bwd_room<KP>;
    int warp = (int)threadIdx.x / 32, lane = kl_lane();
    const float *A = (const float *)(shared + room::A), *beta = (const float *)(shared + room::tile + kda_bwd_tile<KP>::rows);
    float *T = (float *)(shared + room::inverse), *middle = (float *)(shared + room::middle);
    if (warp < 2) {
        int which = lane >> 4, column = lane & 15, first = 16 * warp;
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float s = 0.0f;
#pragma unroll
            for (int j = 0; j < i; j++)
                s += A[(first + i) * 33 + first + j] * x[j];
            s = (i == column ? 1.0f : 0.0f) - (which ? s : s * beta[first + i]);
            T[(which * 32 + first + i) * 33 + first + column] = s;
            x[i] = which ? s * beta[first + i] : s;
        }
    }
    __syncthreads();
    for (int at = (int)threadIdx.x; at < 512; at += 2 * KP) {
        int which = at >> 8, i = at >> 4 & 15, c = at & 15;
        float s = 0.0f;
        for (int j = 0; j < 16; j++)
            s += A[(16 + i) * 33 + j] * T[(which * 32 + j) * 33 + c] * (j < c ? 0.0f : which ? beta[j] : beta[16 + i]);
        middle[at] = s;
    }
    __syncthreads();
    for (int at = (int)threadIdx.x; at < 512; at += 2 * KP) {
        int which = at >> 8, i = at >> 4 & 15, c = at & 15;
        float s = 0.0f;
        for (int j = 0; j <= i; j++)
            s += T[(which * 32 + 16 + i) * 33 + 16 + j] * middle[which * 256 + j * 16 + c];
        T[(which * 32 + 16 + i) * 33 + c] = -s;
    }
    __syncthreads();
}

/* T', T and Aqk as images; what rounding T' leaves over as one more, for w'. */
template <int KP> __device__ void store_small(unsigned char *shared)
{
    using room = kda_prepare_bwd_room<KP>;
    using tile = kda_bwd_tile<KP>;
    const float *A = (const float *)(shared + room::A), *T = (const float *)(shared + room::inverse);
    for (int at = (int)threadIdx.x; at < 1024; at += 2 * KP) {
        int i = at >> 5, j = at & 31, to = kda_small_at(i, j >> 3) + 2 * (j & 7);
        float x = j <= i ? T[(32 + i) * 33 + j] : 0.0f;
        uint16_t high = kl_to_bf16(x);
        *(uint16_t *)(shared + room::tile + tile::Tr + to) = high;
        *(uint16_t *)(shared + room::low + to) = kl_to_bf16(x - __uint_as_float((uint32_t)high << 16));
        *(uint16_t *)(shared + room::tile + tile::T + to) = kl_to_bf16(j <= i ? T[i * 33 + j] : 0.0f);
        *(uint16_t *)(shared + room::tile + tile::Aqk + to) = kl_to_bf16(A[(32 + i) * 33 + j]);
    }
}

/* w' = T' kP: a warp 16 channels. */
template <int KP> __device__ void prepare_w(bool no_delta, unsigned char *shared)
{
    using room = kda_prepare_bwd_room<KP>;
    int warp = (int)threadIdx.x / 32, lane = kl_lane();
    float w[2][2][4] = {};
    for (int j = 0; j < 2 && !no_delta; j++) {
        uint32_t b[4];
        kl_ldmatrix4_trans(b, shared + room::kP + kda_wide_at(KP, 16 * j + kda_down_row(lane), 2 * warp + kda_down_piece(lane)));
        for (int i = j; i < 2; i++) {
            uint32_t high[4], low[4];
            int at = kda_small_at(16 * i + kda_down_row(lane), 2 * j + kda_down_piece(lane));
            kl_ldmatrix4(high, shared + room::tile + kda_bwd_tile<KP>::Tr + at);
            kl_ldmatrix4(low, shared + room::low + at);
            for (int n = 0; n < 2; n++) {
                kl_mma(w[i][n], low, b + 2 * n);
                kl_mma(w[i][n], high, b + 2 * n);
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        uint32_t r[4];
        for (int e = 0; e < 4; e++)
            r[e] = kl_pack_bf16(w[i][e >> 1][2 * (e & 1)], w[i][e >> 1][2 * (e & 1) + 1]);
        kl_stmatrix4(shared + room::tile + kda_bwd_tile<KP>::w + kda_wide_at(KP, 16 * i + kda_down_row(lane), 2 * warp + kda_down_piece(lane)), r);
    }
}

template <int KP> __global__ void __launch_bounds__(2 * KP) prepare_bwd(const __grid_constant__ kda_bwd_args a)
{
    KL_SHARED(shared);
    using room = kda_prepare_bwd_room<KP>;
    int heads = a.heads * a.group, mine = (int)(blockIdx.x % (unsigned)heads), hv = a.first * a.group + mine;
    int64_t tile = blockIdx.x / (unsigned)heads;
    kda_bwd_rows rows = kda_bwd_rows_of(a, tile);
    int channel = (int)threadIdx.x % KP, block = (int)threadIdx.x / KP;
    kda_column_of column = kda_column_make(a, channel, block, rows.count);
    kda_column x = kda_column_keys(a, column, hv / a.group, rows.token);
    float d[16];
    kda_column_gate(a, column, hv, rows.token, d);
    kda_column_decay(a, column, hv, d, kda_column_bias(a, column, hv), d);
    prepare_rows<KP>(a, hv, rows, x, shared);
    const float *row = (const float *)(shared + room::tile + kda_bwd_tile<KP>::rows) + 16 * block;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        x.q[i] *= row[32 + i];
        x.k[i] *= row[64 + i];
    }
    prepare_operands<KP>(x, d, block, channel, shared);
    __syncthreads();
    prepare_matrices<KP>(a.no_delta, shared);
    __syncthreads();
    prepare_inverses<KP>(shared);
    store_small<KP>(shared);
    __syncthreads();
    prepare_w<KP>(a.no_delta, shared);
    kl_fence_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        kl_bulk_store(a.tile + kda_bwd_slot(a, tile, mine) * kda_bwd_tile<KP>::bytes, shared + room::tile, kda_bwd_tile<KP>::bytes);
        kl_bulk_commit();
        kl_bulk_wait<0>();
    }
}

} // namespace

#endif
