/* The products over columns of V that the gradients of a tile begin with: x, dv and dbeta from du; dqg, dkP, dkg from the states; the
 * gradients of Aqk and Akk. Each warp has 16 channels (of the states) or 16 columns of V (of the values). */
#ifndef KL_KDA_CUDA_PRODUCTS_BWD_CUH
#define KL_KDA_CUDA_PRODUCTS_BWD_CUH

#include "kda/cuda/intra_bwd.cuh"

namespace {

/* One value head of a tile. */
struct head_tile {
    kda_bwd_rows rows;
    int64_t slot;
    int hv, h;
};

/* ---- values: x = T^T du, y = dv = beta x, dbeta = x . r ---- */

template <int KP> __device__ void values_backward(int panels, unsigned char *shared)
{
    using room = kda_grads_room<KP>;
    int lane = kl_lane();
    const float *beta = (const float *)(shared + room::rows);
    for (int p = (int)threadIdx.x / 32; p < panels; p += KP / 16) {
        unsigned char *du = shared + room::y + p * KDA_PANEL_BYTES;
        const unsigned char *r = shared + room::r + p * KDA_PANEL_BYTES;
        float x[2][2][4] = {};
        for (int i = 0; i < 2; i++) {
            uint32_t b[4], t[4];
            kl_ldmatrix4_trans(b, du + kda_panel_at(16 * i + kda_down_row(lane), kda_down_piece(lane)));
            for (int j = 0; j <= i; j++) {
                kl_ldmatrix4_trans(t, shared + room::T + kda_small_at(16 * i + kda_across_row(lane), 2 * j + kda_across_piece(lane)));
                kl_mma(x[j][0], t, b);
                kl_mma(x[j][1], t, b + 2);
            }
        }
        __syncwarp();
        for (int j = 0; j < 2; j++) {
            uint32_t y[4];
            for (int half = 0; half < 2; half++) {
                int token = 16 * j + lane / 4 + 8 * half;
                float sum = 0.0f;
                for (int n = 0; n < 2; n++) {
                    uint32_t pair = *(const uint32_t *)(r + kda_panel_at(token, n) + 4 * (lane & 3));
                    float x0 = x[j][n][2 * half], x1 = x[j][n][2 * half + 1];
                    sum += x0 * kl_bf16_low(pair) + x1 * kl_bf16_high(pair);
                    y[2 * n + half] = kl_pack_bf16(beta[token] * x0, beta[token] * x1);
                }
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if ((lane & 3) == 0)
                    ((float *)(shared + room::dbeta))[p * 32 + token] = sum;
            }
            kl_stmatrix4(du + kda_panel_at(16 * j + kda_down_row(lane), kda_down_piece(lane)), y);
        }
    }
}

/* Columns [first, first + 16 panels) of dv. */
template <int KP> __device__ void store_values(const kda_bwd_args &a, const head_tile &w, int first, int panels, const unsigned char *shared)
{
    for (int at = (int)threadIdx.x; at < w.rows.count * 2 * panels; at += 2 * KP) {
        int token = at / (2 * panels), piece = at % (2 * panels), v = first + 8 * piece;
        uint4 x = *(const uint4 *)(shared + kda_grads_room<KP>::y + (piece >> 1) * KDA_PANEL_BYTES + kda_panel_at(token, piece & 1));
        uint16_t *dv = a.dv + (w.rows.token + token) * a.v_stride + (int64_t)w.hv * a.V + v;
        if (a.v_wide && v < a.V) {
            *(uint4 *)dv = x;
            continue;
        }
        uint32_t pair[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (v + i < a.V)
                dv[i] = (uint16_t)(pair[i / 2] >> 16 * (i & 1));
    }
}

/* ---- products over columns of V ---- */

/* dqg = do S^T, dkP = -y S^T, dkg = r dS'^T of a warp's 16 channels, and S . dS' of each. */
template <int KP> __device__ __forceinline__ void state_products(int panels, const unsigned char *shared, grad_tile &x, float across[2])
{
    using room = kda_grads_room<KP>;
    int lane = kl_lane(), warp = (int)threadIdx.x / 32;
#pragma unroll 2
    for (int p = 0; p < panels; p++) {
        uint32_t S[4], dS[4];
        int at = kda_wide_at(KP, 16 * p + kda_down_row(lane), 2 * warp + kda_down_piece(lane));
        kl_ldmatrix4_trans(S, shared + room::S + at);
        kl_ldmatrix4_trans(dS, shared + room::dS + at);
#pragma unroll
        for (int r = 0; r < 4; r++)
            across[r >> 1] += kl_bf16_low(S[r]) * kl_bf16_low(dS[r]) + kl_bf16_high(S[r]) * kl_bf16_high(dS[r]);
#pragma unroll
        for (int m = 0; m < 2; m++) {
            uint32_t d_o[4], y[4], r[4];
            int panel = p * KDA_PANEL_BYTES + kda_panel_at(16 * m + kda_down_row(lane), kda_down_piece(lane));
            kl_ldmatrix4(d_o, shared + room::d_o + panel);
            kl_ldmatrix4(y, shared + room::y + panel);
            kl_ldmatrix4(r, shared + room::r + panel);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                kl_mma(x.dqg[m][n], d_o, S + 2 * n);
                kl_mma(x.dkP[m][n], y, S + 2 * n);
                kl_mma(x.dkg[m][n], r, dS + 2 * n);
            }
        }
    }
}

/* do r^T and y r^T, three blocks of 16 x 16 each: job 0..5 is block job / 2, and do or y. */
enum { MATRIX_JOBS = 6 };
__device__ __forceinline__ int job_row(int job) { return job >= 2; }
__device__ __forceinline__ int job_column(int job) { return job >= 4; }

template <int KP> __device__ __forceinline__ void matrix_products(int panels, int job, const unsigned char *shared, float x[2][4])
{
    using room = kda_grads_room<KP>;
    int lane = kl_lane();
    for (int p = 0; p < panels; p++) {
        uint32_t rows[4], r[4];
        kl_ldmatrix4(rows, shared + (job & 1 ? room::y : room::d_o) + p * KDA_PANEL_BYTES +
                               kda_panel_at(16 * job_row(job) + kda_down_row(lane), kda_down_piece(lane)));
        kl_ldmatrix4(r, shared + room::r + p * KDA_PANEL_BYTES + kda_panel_at(16 * job_column(job) + kda_across_row(lane), kda_across_piece(lane)));
        kl_mma(x[0], rows, r);
        kl_mma(x[1], rows, r + 2);
    }
}

/* u = beta r:  dAqk[i,j] = do_i . u_j (j <= i),  dAkk[i,j] = -y_i . u_j (j < i) */
template <int KP> __device__ __forceinline__ void store_matrix(bool no_delta, int job, const float x[2][4], unsigned char *shared)
{
    using room = kda_grads_room<KP>;
    int lane = kl_lane();
    const float *beta = (const float *)(shared + room::rows);
    for (int n = 0; n < 2; n++)
        for (int e = 0; e < 4; e++) {
            int i = 16 * job_row(job) + lane / 4 + 8 * (e >> 1), j = 16 * job_column(job) + 8 * n + 2 * (lane & 3) + (e & 1);
            float value = job & 1 ? (j < i && !no_delta ? -beta[j] * x[n][e] : 0.0f) : j <= i ? beta[j] * x[n][e] : 0.0f;
            ((float *)(shared + room::dA))[2 * (j * room::dA_row + i) + (job & 1)] = value;
        }
}

/* The accumulators as rows of floats, for the threads that own channels. */
template <int KP> __device__ __forceinline__ void store_rows(const grad_tile &x, unsigned char *shared)
{
    using room = kda_grads_room<KP>;
    int lane = kl_lane(), warp = (int)threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                int at = (16 * m + lane / 4 + 4 * e) * room::row + 16 * warp + 8 * n + 2 * (lane & 3);
                *(float2 *)((float *)(shared + room::dqg) + at) = make_float2(x.dqg[m][n][e], x.dqg[m][n][e + 1]);
                *(float2 *)((float *)(shared + room::dkP) + at) = make_float2(x.dkP[m][n][e], x.dkP[m][n][e + 1]);
                *(float2 *)((float *)(shared + room::dkg) + at) = make_float2(x.dkg[m][n][e], x.dkg[m][n][e + 1]);
            }
}

} // namespace

#endif
