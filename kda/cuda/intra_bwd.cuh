/* The gradients of what lies between the tokens of a tile: from those of qg, kP, kg (which the states gave) and of Aqk, Akk to
 * those of q, k and the log-decays.
 *
 * A tile is two blocks of 16. The state stands before the first; for rows of the second, the tokens of the first are one more
 * thing that was there before, and for columns of the first, those of the second one more thing that comes after:
 *
 *     dq_i = P(m->i) (P(-1->m) dqg_i + sum_{j<=m} dAqk[i,j] k_j P(j->m)),   m the first block's last token,
 *
 * so the products between the blocks are added to the accumulators that the states' products left (add_between). Within a block
 * every pair is taken by itself, in float, by the thread that owns the channel.
 *
 * The gradient of the log-decay of token t gathers every path from before t to t or later: sums that only grow. Nothing is
 * subtracted, and the pairs i = j, which no decay touches, never enter. */
#ifndef KL_KDA_CUDA_INTRA_BWD_CUH
#define KL_KDA_CUDA_INTRA_BWD_CUH

#include "kda/cuda/gates_bwd.cuh"

template <int KP> struct kda_grads_room {
    static constexpr int wide = 2 * 128 * KP * 2 /* S, dS */, panels = 3 * 8 * KDA_PANEL_BYTES /* r, du then y, do: of 128 columns of V */;
    static constexpr int S = 0, dS = wide / 2, r = wide, y = r + 8 * KDA_PANEL_BYTES, d_o = y + 8 * KDA_PANEL_BYTES, images = wide + panels;
    /* Over them when they are done with: */
    static constexpr int row = KP + 8 /* floats */, dqg = 0, dkP = 32 * row * 4, dkg = 2 * 32 * row * 4, q = 3 * 32 * row * 4 /* [32][KP] */,
                         z = q + 32 * KP * 4 /* bf16 [32][KP]: g as given */;
    static_assert(z + 32 * KP * 2 <= images, "the float rows must fit into the states' room");
    /* [16][KP] bf16: q_i P(m->i) and k_i P(m->i) of block 1, k_j P(j->m) of block 0; later the parts of ddt_bias and dA_log */
    static constexpr int qr = images, kr = qr + 32 * KP, kd = kr + 32 * KP, parts = images;
    static constexpr int dA_row = 34 /* pairs of floats */, dA = kd + 32 * KP /* [32 j][34 i] {dAqk, dAkk} */, T = dA /* until then */,
                         rows = dA + 32 * dA_row * 8, whole = rows + 384 /* float [2][KP] */,
                         edges = whole + 8 * KP /* float [3][KP]: across block 0, across block 1, across the tile */, dbeta = edges /* float [8][32], until then */,
                         bar = edges + (12 * KP > 1024 ? 12 * KP : 1024), bytes = bar + 64;
};

namespace {

__device__ __forceinline__ void scale_column(kda_column &x, const float *rows)
{
#pragma unroll
    for (int i = 0; i < 16; i++) {
        x.q[i] *= rows[32 + i];
        x.k[i] *= rows[64 + i];
    }
}

/* The operands of the products between the blocks, and the decay of each block. */
template <int KP> __device__ __forceinline__ void between_operands(const kda_column &x, const float d[16], int block, int channel, unsigned char *shared)
{
    using room = kda_grads_room<KP>;
    auto put = [&](int image, int i, float v) {
        *(uint16_t *)(shared + image + kda_wide_at(KP, i, channel >> 3) + 2 * (channel & 7)) = kl_to_bf16(v);
    };
    float f = 1.0f;
#pragma unroll
    for (int n = 0; n < 16; n++) {
        if (block == 1) {
            f *= d[n];
            put(room::qr, n, x.q[n] * f);
            put(room::kr, n, x.k[n] * f);
        } else {
            put(room::kd, 15 - n, x.k[15 - n] * f);
            f *= d[15 - n];
        }
    }
    ((float *)(shared + room::whole))[block * KP + channel] = f;
}

/* dqg, dkP and dkg of a warp's 16 channels [block of tokens][block of channels][element]. */
struct grad_tile {
    float dqg[2][2][4], dkP[2][2][4], dkg[2][2][4];
};

/* Scales rows of block 1 by the decay of block 0 and columns of block 0 by that of block 1; sums what crosses a whole block;
 * adds the products between the blocks. */
template <int KP> __device__ void add_between(grad_tile &x, unsigned char *shared)
{
    using room = kda_grads_room<KP>;
    int lane = kl_lane(), warp = (int)threadIdx.x / 32, g = lane / 4, t = lane & 3;
    const float *whole = (const float *)(shared + room::whole);
    float *edges = (float *)(shared + room::edges);
#pragma unroll
    for (int n = 0; n < 2; n++) {
        int c = 16 * warp + 8 * n + 2 * t;
        float2 P0 = *(const float2 *)(whole + c), P1 = *(const float2 *)(whole + KP + c);
        float in[2] = {}, out[2] = {};
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            int at = kda_wide_at(KP, g + 4 * e, c >> 3) + 2 * (c & 7);
            uint32_t q = *(const uint32_t *)(shared + room::qr + at), k = *(const uint32_t *)(shared + room::kr + at),
                     kd = *(const uint32_t *)(shared + room::kd + at);
            x.dqg[1][n][e] *= P0.x;
            x.dqg[1][n][e + 1] *= P0.y;
            x.dkP[1][n][e] *= P0.x;
            x.dkP[1][n][e + 1] *= P0.y;
            x.dkg[0][n][e] *= P1.x;
            x.dkg[0][n][e + 1] *= P1.y;
            in[0] += kl_bf16_low(q) * x.dqg[1][n][e] + kl_bf16_low(k) * x.dkP[1][n][e];
            in[1] += kl_bf16_high(q) * x.dqg[1][n][e + 1] + kl_bf16_high(k) * x.dkP[1][n][e + 1];
            out[0] += kl_bf16_low(kd) * x.dkg[0][n][e];
            out[1] += kl_bf16_high(kd) * x.dkg[0][n][e + 1];
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            for (int m = 4; m < 32; m *= 2) {
                in[e] += __shfl_xor_sync(0xffffffffu, in[e], m);
                out[e] += __shfl_xor_sync(0xffffffffu, out[e], m);
            }
            if (g == 0) {
                edges[c + e] = in[e];
                edges[KP + c + e] = out[e];
            }
        }
    }

    /* dqg_i += sum_j dAqk[i,j] kd_j;  dkP_i += sum_j dAkk[i,j] kd_j;  dkg_j += sum_i dAqk[i,j] qr_i + dAkk[i,j] kr_i */
    const float2 *dA = (const float2 *)(shared + room::dA);
    uint32_t rq[4], rk[4], cq[4], ck[4], b[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int i = 16 + g + 8 * (r & 1), j = 2 * t + 8 * (r >> 1);
        float2 first = dA[j * room::dA_row + i], second = dA[(j + 1) * room::dA_row + i];
        rq[r] = kl_pack_bf16(first.x, second.x);
        rk[r] = kl_pack_bf16(first.y, second.y);
        float4 pair = *(const float4 *)(dA + (g + 8 * (r & 1)) * room::dA_row + 16 + 2 * t + 8 * (r >> 1));
        cq[r] = kl_pack_bf16(pair.x, pair.z);
        ck[r] = kl_pack_bf16(pair.y, pair.w);
    }
    int at = kda_wide_at(KP, kda_down_row(lane), 2 * warp + kda_down_piece(lane));
    kl_ldmatrix4_trans(b, shared + room::kd + at);
    for (int n = 0; n < 2; n++) {
        kl_mma(x.dqg[1][n], rq, b + 2 * n);
        kl_mma(x.dkP[1][n], rk, b + 2 * n);
    }
    kl_ldmatrix4_trans(b, shared + room::qr + at);
    for (int n = 0; n < 2; n++)
        kl_mma(x.dkg[0][n], cq, b + 2 * n);
    kl_ldmatrix4_trans(b, shared + room::kr + at);
    for (int n = 0; n < 2; n++)
        kl_mma(x.dkg[0][n], ck, b + 2 * n);
}

/* One channel of one block of 16 tokens: dq, dk (after norm and scale) and da, the gradient of the log-decay. q, dqg, dkP, dkg
 * are the channel's column of the block's rows in shared memory, dA the block's first pair, across what passes over the block. */
template <int KP>
__device__ __forceinline__ void block_backward(const float k[16], const float d[16], const float *q, const float *dqg, const float *dkP,
                                               const float *dkg, const float2 *dA, float across, float dq[16], float dk[16], float da[16])
{
    constexpr int row = kda_grads_room<KP>::row, dA_row = kda_grads_room<KP>::dA_row;
    float m[16], f = 1.0f, sum = 0.0f;
    /* qg_i = q_i P(->i), kP_i = k_i P(->i):  dq_i = P dqg_i, dk_i = P dkP_i;  da_t gathers i >= t */
#pragma unroll
    for (int i = 0; i < 16; i++) {
        f *= d[i];
        dq[i] = f * dqg[i * row];
        dk[i] = f * dkP[i * row];
        da[i] = q[i * KP] * dq[i] + k[i] * dk[i];
    }
#pragma unroll
    for (int i = 15; i >= 0; i--)
        da[i] = sum += da[i];
    /* kg_j = k_j P(j->):  dk_j += P dkg_j;  da_t gathers j < t */
    f = 1.0f;
#pragma unroll
    for (int j = 15; j >= 0; j--) {
        float x = f * dkg[j * row];
        dk[j] += x;
        m[j] = k[j] * x;
        f *= d[j];
    }
    sum = across;
#pragma unroll
    for (int t = 0; t < 16; t++) {
        da[t] += sum;
        sum += m[t];
    }
    /* A[i,j] = x_i P(j->i) k_j:  with w_i = dAqk[i,j] q_i + dAkk[i,j] k_i and W_i = w_i + P(i->i+1) W_{i+1}, the sum over the rows
     * from i on seen from i:  da_i += k_j P(j->i) W_i,  dk_j += P(j->j+1) W_{j+1} */
#pragma unroll
    for (int j = 0; j < 16; j++) {
        float2 a = dA[j * dA_row + j];
        dq[j] += a.x * k[j];
        dk[j] += a.x * q[j * KP];
        m[j] = k[j];
#pragma unroll
        for (int i = j + 1; i < 16; i++)
            m[i] = m[i - 1] * d[i];
        float W = 0.0f;
#pragma unroll
        for (int i = 15; i > j; i--) {
            a = dA[j * dA_row + i];
            dq[i] += a.x * m[i];
            dk[i] += a.y * m[i];
            W += a.x * q[i * KP] + a.y * k[i];
            da[i] += m[i] * W;
            W *= d[i];
        }
        dk[j] += W;
    }
}

} // namespace

#endif
