/* The other end of a tile's gradients: a thread has one channel of one block of 16 tokens, takes dq, dk and the gradient of the decay
 * from the rows that the products left, and passes them through the gate and the norms. */
#ifndef KL_KDA_CUDA_CHANNELS_BWD_CUH
#define KL_KDA_CUDA_CHANNELS_BWD_CUH

#include "kda/cuda/products_bwd.cuh"

namespace {

/* Where a tile's dq (0) and dk (1) of a group are summed: a thread adds to its own channel. */
template <int KP> __device__ __forceinline__ float *keys_of(const kda_bwd_args &a, int which)
{
    return a.keys + ((int64_t)blockIdx.x * 2 + which) * 32 * KP;
}

template <int KP> __device__ void channel_backward(const kda_bwd_args &a, const head_tile &w, bool first_head, unsigned char *shared)
{
    using room = kda_grads_room<KP>;
    int channel = (int)threadIdx.x % KP, block = (int)threadIdx.x / KP;
    kda_column_of column = kda_column_make(a, channel, block, w.rows.count);
    const float *whole = (const float *)(shared + room::whole), *edges = (const float *)(shared + room::edges);
    float *q = (float *)(shared + room::q) + 16 * block * KP + channel;
    float *row = (float *)shared + 16 * block * room::row + channel;
    constexpr int dkP = room::dkP / 4, dkg = room::dkg / 4;
    float k[16], d[16], dq[16], dk[16], da[16];
    {
        kda_column x = kda_column_keys(a, column, w.h, w.rows.token);
        scale_column(x, (const float *)(shared + room::rows) + 16 * block);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            q[i * KP] = x.q[i];
            k[i] = x.k[i];
        }
    }
    uint16_t *kept = (uint16_t *)(shared + room::z) + 16 * block * KP + channel;
    kda_column_gate(a, column, w.hv, w.rows.token, d);
#pragma unroll
    for (int i = 0; i < 16; i++)
        kept[i * KP] = kl_to_bf16(d[i]);
    float bias = kda_column_bias(a, column, w.hv);
    kda_column_decay(a, column, w.hv, d, bias, d);
    /* P(-1->end) (S . dS') crosses every token */
    float across = edges[block * KP + channel] + whole[channel] * whole[KP + channel] * edges[2 * KP + channel];
    block_backward<KP>(k, d, q, row, row + dkP, row + dkg, (const float2 *)(shared + room::dA) + 16 * block * (room::dA_row + 1), across, dq, dk, da);

    if (a.group == 1) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            row[i * room::row] = dq[i];
            row[dkP + i * room::row] = dk[i];
        }
    } else {
        float *sum = keys_of<KP>(a, 0) + 16 * block * KP + channel;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            sum[i * KP] = (first_head ? 0.0f : sum[i * KP]) + dq[i];
            sum[(32 + i) * KP] = (first_head ? 0.0f : sum[(32 + i) * KP]) + dk[i];
        }
    }
    if (a.G < a.K) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            row[dkg + i * room::row] = da[i];
        return;
    }
    float dbias = 0.0f, dA = 0.0f;
    kda_gate_of gate = kda_gate_make(a, w.hv);
    uint16_t *dg = a.dg ? a.dg + (w.rows.token + column.first) * a.g_stride + (int64_t)w.hv * a.G + channel : nullptr;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float part, dz = kda_log_decay_backward(gate, kl_load_bf16(kept + i * KP) + bias, da[i], &part);
        bool real = kda_column_real(column, i);
        dbias += real ? dz : 0.0f;
        dA += real ? part : 0.0f;
        if (real && dg)
            dg[(int64_t)i * a.g_stride] = kl_to_bf16(dz);
    }
    float *parts = (float *)(shared + room::parts);
    parts[threadIdx.x] = dbias;
    parts[2 * KP + threadIdx.x] = dA;
}

/* One gate value decays K/G channels: its gradient is the sum of theirs. Parts are [32 tokens][G] here. */
template <int KP> __device__ void shared_gate_backward(const kda_bwd_args &a, const head_tile &w, unsigned char *shared)
{
    using room = kda_grads_room<KP>;
    int width = a.K / a.G;
    kda_gate_of gate = kda_gate_make(a, w.hv);
    float *da = (float *)(shared + room::dkg), *dA = da + 32 * room::row;
    for (int at = (int)threadIdx.x; at < 32 * a.G; at += 2 * KP) {
        int i = at / a.G, j = at % a.G;
        float sum = 0.0f, part = 0.0f, dz = 0.0f;
        if (i < w.rows.count) {
            for (int c = 0; c < width; c++)
                sum += da[i * room::row + j * width + c];
            float z = kl_load_bf16(a.g + (w.rows.token + i) * a.g_stride + (int64_t)w.hv * a.G + j) +
                      (a.dt_bias ? a.dt_bias[(int64_t)w.hv * a.G + j] : 0.0f);
            dz = kda_log_decay_backward(gate, z, sum, &part);
            if (a.dg)
                a.dg[(w.rows.token + i) * a.g_stride + (int64_t)w.hv * a.G + j] = kl_to_bf16(dz);
        }
        da[i * room::row + j * width] = dz; /* nobody else reads these channels of this token */
        dA[i * KP + j] = part;              /* over the rows of q */
    }
    __syncthreads();
    float *parts = (float *)(shared + room::parts);
    for (int j = (int)threadIdx.x; j < 2 * KP; j += 2 * KP) {
        float dbias = 0.0f, sum = 0.0f;
        for (int i = 0; i < 32 && j < a.G; i++) {
            dbias += da[i * room::row + j * width];
            sum += dA[i * KP + j];
        }
        parts[j] = dbias;
        parts[2 * KP + j] = sum;
    }
}

/* This tile's part of ddt_bias [G] and dA_log, in that order. */
template <int KP> __device__ void store_parts(const kda_bwd_args &a, const head_tile &w, const unsigned char *shared)
{
    const float *parts = (const float *)(shared + kda_grads_room<KP>::parts);
    float *out = a.sum + w.slot * (a.G + 1);
    int j = (int)threadIdx.x;
    if (j < a.G)
        out[j] = parts[j] + parts[KP + j];
    if (j < 32) {
        float sum = 0.0f;
        for (int c = j; c < 2 * KP; c += 32)
            sum += parts[2 * KP + c];
        sum = kl_warp_sum(sum);
        if (j == 0)
            out[a.G] = sum;
    }
}

/* y = factor r x, r = (x . x + 1e-6)^-1/2:  dx = factor r (dy - r^2 (x . dy) x). A warp takes its rows four at a time, so that they are
 * read together. */
template <int KP>
__device__ __forceinline__ void store_key_rows(const kda_bwd_args &a, int count, float factor, const uint16_t *x, int x_stride, const float *dy,
                                               int dy_stride, uint16_t *dx)
{
    constexpr int warps = KP / 16, rows = 4;
    for (int first = (int)threadIdx.x / 32; first < count; first += rows * warps) {
        uint16_t raw[rows][KP / 32];
#pragma unroll
        for (int m = 0; m < rows; m++)
#pragma unroll
            for (int n = 0; n < KP / 32; n++)
                raw[m][n] = x[(int64_t)min(first + m * warps, count - 1) * x_stride + min(kl_lane() + 32 * n, a.K - 1)];
#pragma unroll
        for (int m = 0; m < rows; m++) {
            int i = first + m * warps;
            float value[KP / 32], grad[KP / 32], square = 0.0f, projection = 0.0f, f = factor;
#pragma unroll
            for (int n = 0; n < KP / 32; n++) {
                int c = kl_lane() + 32 * n;
                value[n] = a.l2norm && c < a.K ? __uint_as_float((uint32_t)raw[m][n] << 16) : 0.0f;
                grad[n] = dy[min(i, count - 1) * dy_stride + c];
                square += value[n] * value[n];
                projection += value[n] * grad[n];
            }
            if (a.l2norm) {
                float r = kl_rsqrt(kl_warp_sum(square) + 1e-6f);
                projection = kl_warp_sum(projection) * r * r;
                f *= r;
            }
#pragma unroll
            for (int n = 0; n < KP / 32; n++) {
                int c = kl_lane() + 32 * n;
                if (c < a.K && i < count)
                    dx[(int64_t)i * x_stride + c] = kl_to_bf16(f * (grad[n] - projection * value[n]));
            }
        }
    }
}

template <int KP> __device__ void store_keys(const kda_bwd_args &a, const head_tile &w, const unsigned char *shared)
{
    using room = kda_grads_room<KP>;
    const float *dq = a.group == 1 ? (const float *)(shared + room::dqg) : keys_of<KP>(a, 0);
    const float *dk = a.group == 1 ? (const float *)(shared + room::dkP) : keys_of<KP>(a, 1);
    int stride = a.group == 1 ? room::row : KP;
    int64_t q = w.rows.token * a.q_stride + (int64_t)w.h * a.K, k = w.rows.token * a.k_stride + (int64_t)w.h * a.K;
    if (a.dq)
        store_key_rows<KP>(a, w.rows.count, a.scale, a.q + q, a.q_stride, dq, stride, a.dq + q);
    if (a.dk)
        store_key_rows<KP>(a, w.rows.count, 1.0f, a.k + k, a.k_stride, dk, stride, a.dk + k);
}

} // namespace

#endif
