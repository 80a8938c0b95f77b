/* The matrices between the tokens of a tile: A, Aqk, T = (I + A)^-1 and w, by a group of four warps.
 *
 * Operands lie in shared memory as rows of bf16, [64 channels][token], 128 bytes a row, cut into cells of 8 channels which
 * are permuted by the token's number: the owner of a channel pair going down the tokens, ldmatrix across tokens, and
 * 16-byte copies along a row all meet no bank twice. */
#ifndef KL_KDA_CUDA_INTRA_CUH
#define KL_KDA_CUDA_INTRA_CUH

#include "kda/cuda/tile.cuh"

/* Byte offset of the cell of channels 8 c .. 8 c + 7. */
__device__ __forceinline__ int kda_cell(int token, int c) { return (c >> 3) * 4096 + token * 128 + (((c ^ token) & 7) << 4); }

/* Fragments of tokens t..t+15 (t a multiple of 16) and channels 16 s.. from rows of cells: rows and columns give a lane's
 * offset for s = 0, at moves it on. */
struct kda_fragments {
    int offset;
    /* ldmatrix gives an A fragment of the rows; transposed, {r0, r1} and {r2, r3} are B fragments [token x channel]. */
    static __device__ __forceinline__ kda_fragments rows(int t) { return {kda_cell(t + (kl_lane() & 15), kl_lane() >> 4)}; }
    /* {r0, r1} and {r2, r3} are B fragments [channel x token] of the first and the last 8 tokens. */
    static __device__ __forceinline__ kda_fragments columns(int t)
    {
        return {kda_cell(t + (kl_lane() & 7) + (kl_lane() >> 4 << 3), kl_lane() >> 3 & 1)};
    }
    __device__ __forceinline__ int at(int s) const { return (offset ^ (s & 3) << 5) + 4096 * (s >> 2); }
};

/* A 16 x 16 block in C fragments: c[0..3] columns 0..7, c[4..7] columns 8..15. */
__device__ __forceinline__ int kda_block_row(int e) { return (kl_lane() >> 2) + 8 * (e >> 1 & 1); }
__device__ __forceinline__ int kda_block_column(int e) { return 2 * (kl_lane() & 3) + (e & 1) + 8 * (e >> 2); }

/* c[i,j] = x_i . y_(u+j) over all channels, 16 x 16; read_x gives the A fragments of 16 channels. */
template <int KP, class Read> __device__ __forceinline__ void kda_product(float c[8], Read read_x, const unsigned char *y, int u)
{
    float part[4][4] = {};
    kda_fragments columns = kda_fragments::columns(u);
#pragma unroll
    for (int s = 0; s < KP / 16; s++) {
        uint32_t a[4], r[4];
        read_x(a, s);
        kl_ldmatrix4(r, y + columns.at(s));
        kl_mma(part[2 * (s & 1)], a, r);
        kl_mma(part[2 * (s & 1) + 1], a, r + 2);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        c[e] = part[0][e] + part[2][e];
        c[4 + e] = part[1][e] + part[3][e];
    }
}

/* x_(t+i) . y_(u+j) */
template <int KP>
__device__ __forceinline__ void kda_rows_product(float c[8], const unsigned char *x, int t, const unsigned char *y, int u)
{
    kda_fragments rows = kda_fragments::rows(t);
    kda_product<KP>(c, [&](uint32_t a[4], int s) { kl_ldmatrix4(a, x + rows.at(s)); }, y, u);
}

/* |x_(t+i)|^2 of rows g and g + 8, g = lane / 4, in the lanes t = g / 2 that hold the diagonal of the products. */
template <int KP> __device__ __forceinline__ void kda_rows_squares(float squares[2], const unsigned char *x, int t)
{
    float part[4][4] = {};
    kda_fragments rows = kda_fragments::rows(t);
#pragma unroll
    for (int s = 0; s < KP / 16; s++) {
        uint32_t a[4];
        kl_ldmatrix4(a, x + rows.at(s));
        uint32_t left[2] = {a[0], a[2]}, right[2] = {a[1], a[3]};
        kl_mma(part[2 * (s & 1)], a, left);
        kl_mma(part[2 * (s & 1) + 1], a, right);
    }
    bool odd = kl_lane() & 4;
    squares[0] = odd ? part[0][1] + part[2][1] : part[0][0] + part[2][0];
    squares[1] = odd ? part[1][3] + part[3][3] : part[1][2] + part[3][2];
}

/* C fragments as an A fragment of the same matrix. */
__device__ __forceinline__ void kda_packed_block(uint32_t a[4], const float c[8])
{
#pragma unroll
    for (int e = 0; e < 4; e++)
        a[e] = kl_pack_bf16(c[2 * e], c[2 * e + 1]);
}

/* ---- T ----
 * Two blocks of float, column after column: element (i, j) of block b at b * KDA_T_BLOCK + j * KDA_T_COLUMN + i. */
enum { KDA_T_COLUMN = 20, KDA_T_BLOCK = 16 * KDA_T_COLUMN + 4, KDA_T_BYTES = 8 * KDA_T_BLOCK };

/* Diag(beta) A strictly below the diagonal, to where T will be; beta of the block's 16 tokens. */
__device__ __forceinline__ void kda_write_lower(float *T, int b, const float c[8], const float *beta)
{
#pragma unroll
    for (int e = 0; e < 8; e++) {
        int i = kda_block_row(e), j = kda_block_column(e);
        T[b * KDA_T_BLOCK + j * KDA_T_COLUMN + i] = j < i ? beta[i] * c[e] : 0.0f;
    }
}

/* One warp turns both blocks L into (I + L)^-1 by forward substitution, a column a lane:
 *     x = e_j;  for m: x_i -= L[i,m] x_m, i > m */
__device__ __forceinline__ void kda_invert_diagonal(float *T)
{
    int j = kl_lane() & 15;
    float *L = T + (kl_lane() >> 4) * KDA_T_BLOCK;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; i++)
        x[i] = i == j ? 1.0f : 0.0f;
#pragma unroll
    for (int m = 0; m < 15; m++)
#pragma unroll
        for (int q = (m + 1) / 4; q < 4; q++) {
            float4 l = *(const float4 *)(L + m * KDA_T_COLUMN + 4 * q);
            x[4 * q] = 4 * q > m ? fmaf(-l.x, x[m], x[4 * q]) : x[4 * q];
            x[4 * q + 1] = 4 * q + 1 > m ? fmaf(-l.y, x[m], x[4 * q + 1]) : x[4 * q + 1];
            x[4 * q + 2] = 4 * q + 2 > m ? fmaf(-l.z, x[m], x[4 * q + 2]) : x[4 * q + 2];
            x[4 * q + 3] = fmaf(-l.w, x[m], x[4 * q + 3]);
        }
    __syncwarp();
#pragma unroll
    for (int q = 0; q < 4; q++)
        *(float4 *)(L + j * KDA_T_COLUMN + 4 * q) = make_float4(x[4 * q], x[4 * q + 1], x[4 * q + 2], x[4 * q + 3]);
}

/* T[i,j] of a diagonal block in the order of C fragments. */
__device__ __forceinline__ void kda_read_diagonal(float c[8], const float *T, int b)
{
#pragma unroll
    for (int e = 0; e < 8; e++)
        c[e] = T[b * KDA_T_BLOCK + kda_block_column(e) * KDA_T_COLUMN + kda_block_row(e)];
}

/* high + low = x up to 2^-17 */
__device__ __forceinline__ void kda_split(uint32_t &high, uint32_t &low, float x, float y)
{
    high = kl_pack_bf16(x, y);
    low = kl_pack_bf16(x - kl_bf16_low(high), y - kl_bf16_high(high));
}

/* c += x y, 16 x 16 each, x in C fragments, y in the B fragments {first, second} of columns 0..7, then 8..15; nearly in float. */
__device__ __forceinline__ void kda_split_product(float c[8], const float x[8], const float y[2][4])
{
    uint32_t high[4], low[4];
#pragma unroll
    for (int e = 0; e < 4; e++)
        kda_split(high[e], low[e], x[2 * e], x[2 * e + 1]); /* C's order of pairs is A's */
#pragma unroll
    for (int n = 0; n < 2; n++) {
        uint32_t h[2], l[2];
        kda_split(h[0], l[0], y[n][0], y[n][1]);
        kda_split(h[1], l[1], y[n][2], y[n][3]);
        float small[4] = {}, cross[4] = {};
        kl_mma(small, low, h);
        kl_mma(cross, high, l);
        kl_mma(c + 4 * n, high, h);
#pragma unroll
        for (int e = 0; e < 4; e++)
            c[4 * n + e] += small[e] + cross[e];
    }
}

/* c = T10 = -T11 A10 T00 with A10 transposed in C fragments [j x i]; beta of the second block's tokens scales its rows. c may be
 * A10t. */
__device__ __forceinline__ void kda_invert_across(float c[8], const float A10t[8], const float T11[8], const float *T, const float *beta)
{
    int g = kl_lane() >> 2, t = kl_lane() & 3;
    float b[4] = {beta[2 * t], beta[2 * t + 1], beta[2 * t + 8], beta[2 * t + 9]};
    float A10[2][4], T00[2][4], y[8] = {};
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            A10[n][e] = -b[e] * A10t[4 * (e >> 1) + 2 * n + (e & 1)];
    kda_split_product(y, T11, A10);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float2 x = *(const float2 *)(T + (g + 8 * n) * KDA_T_COLUMN + 2 * t + 8 * h);
            T00[n][2 * h] = x.x;
            T00[n][2 * h + 1] = x.y;
        }
#pragma unroll
    for (int e = 0; e < 8; e++)
        c[e] = 0.0f;
    kda_split_product(c, y, T00);
}

/* Tb = T Diag(beta): a block of T, beta of its columns, as an A fragment [i x j]. */
__device__ __forceinline__ void kda_scaled(uint32_t a[4], const float T[8], const float *beta)
{
    float2 left = *(const float2 *)(beta + 2 * (kl_lane() & 3)), right = *(const float2 *)(beta + 2 * (kl_lane() & 3) + 8);
    a[0] = kl_pack_bf16(left.x * T[0], left.y * T[1]);
    a[1] = kl_pack_bf16(left.x * T[2], left.y * T[3]);
    a[2] = kl_pack_bf16(right.x * T[4], right.y * T[5]);
    a[3] = kl_pack_bf16(right.x * T[6], right.y * T[7]);
}

/* ---- w ----
 * w_0 = Tb00 kr_0,  w_1 = (Tb11 kr_1) P_0 + Tb10 kr_0, where kr counts decays from its own block's start and P_0 is the
 * first block's decay; a warp makes 16 count channels from 16 s on. */
template <int count> struct kda_w {
    uint32_t kr0[count][4], kr1[count][4];
    float w0[count][8], w1[count][8];

    __device__ __forceinline__ void read(const unsigned char *kr, int s)
    {
        kda_fragments first = kda_fragments::rows(0), second = kda_fragments::rows(16);
#pragma unroll
        for (int n = 0; n < count; n++) {
            kl_ldmatrix4_trans(kr0[n], kr + first.at(s + n));
            kl_ldmatrix4_trans(kr1[n], kr + second.at(s + n));
        }
    }
    /* All but what needs Tb10. */
    __device__ __forceinline__ void begin(const uint32_t Tb00[4], const uint32_t Tb11[4], const float *P0, int s)
    {
#pragma unroll
        for (int n = 0; n < count; n++) {
#pragma unroll
            for (int e = 0; e < 8; e++)
                w0[n][e] = w1[n][e] = 0.0f;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float2 p = *(const float2 *)(P0 + 16 * (s + n) + 8 * h + 2 * (kl_lane() & 3));
                kl_mma(w1[n] + 4 * h, Tb11, kr1[n] + 2 * h);
                kl_mma(w0[n] + 4 * h, Tb00, kr0[n] + 2 * h);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    w1[n][4 * h + e] *= e & 1 ? p.y : p.x;
            }
        }
    }
    __device__ __forceinline__ void end(const uint32_t Tb10[4])
    {
#pragma unroll
        for (int n = 0; n < count; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                kl_mma(w1[n] + 4 * h, Tb10, kr0[n] + 2 * h);
    }
};

#endif
