/* The decode step in one launch: a block takes one head of one sequence through everything. Thread c owns channel c of q, k
 * and v for the convolutions and the gate; then each of four warps owns 32 columns of the state. */
#include "kda/cuda/strip.cuh"
#include "kda/internal.h"

namespace {

enum { DIM = 128, TAPS = 4, WIDTH = 32 };

struct shared_memory {
    kda_token<DIM> token[2];
    float v[2][DIM], square[2][4]; /* square: sums of o^2, one a warp */
};

/* One channel of one of q, k, v: its taps, right-aligned, and the inputs before the next token. */
struct channel {
    float w[TAPS], x[TAPS - 1];

    __device__ __forceinline__ void open(const kda_decode_problem &p, int which, int64_t slot, int64_t d, int64_t D)
    {
        int absent = TAPS - (int)p.W;
#pragma unroll
        for (int j = 0; j < TAPS; j++)
            w[j] = j >= absent ? kda_weight(p.weight[which], d * p.W + j - absent, p.weight_dtype) : 0.0f;
#pragma unroll
        for (int m = 0; m < TAPS - 1; m++)
            x[m] = m >= absent ? kda_number(p.tail[which], (slot * D + d) * (p.W - 1) + m - absent, p.tail_dtype == KL_BF16) : 0.0f;
    }
    /* z = sum_j weight[j] x[j];  z sigmoid(z) */
    __device__ __forceinline__ float next(float now)
    {
        float z = w[TAPS - 1] * now;
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++)
            z += w[j] * x[j];
#pragma unroll
        for (int m = 0; m < TAPS - 2; m++)
            x[m] = x[m + 1];
        x[TAPS - 2] = now;
        return z * kda_sigmoid_fast(z);
    }
    __device__ __forceinline__ void close(const kda_decode_problem &p, int which, int64_t slot, int64_t d, int64_t D) const
    {
        int absent = TAPS - (int)p.W;
#pragma unroll
        for (int m = 0; m < TAPS - 1; m++)
            if (m >= absent)
                kda_put_number(p.tail[which], (slot * D + d) * (p.W - 1) + m - absent, p.tail_dtype == KL_BF16, x[m]);
    }
};

/* y = o r weight act(z) */
__device__ __forceinline__ float gated(const kda_decode_problem &p, float o, float r, int column, int64_t at)
{
    float y = o * r * kda_weight(p.norm_weight, column, p.norm_weight_dtype);
    if (p.output_gate == KDA_OUT_NONE)
        return y;
    float z = kda_number(p.z, at, p.kda.dtype == KL_BF16), up = kda_sigmoid_fast(z);
    return y * (p.output_gate == KDA_OUT_SWISH ? z * up : up);
}

template <bool VK> __global__ void __launch_bounds__(DIM, 2) decode(const __grid_constant__ kda_decode_problem p)
{
    KL_SHARED(memory);
    shared_memory &m = *(shared_memory *)memory;
    const kda_problem &k = p.kda;
    kl_grid_release();
    kl_grid_wait();
    int c = (int)threadIdx.x, warp = c / 32;
    int64_t n = blockIdx.x / (unsigned)k.H, h = blockIdx.x % (unsigned)k.H, d = h * DIM + c, D = k.H * DIM;
    int64_t slot = k.state_index ? k.state_index[n] : n;
    if (slot < 0 || slot >= k.state_pool)
        return;
    float *state = (float *)k.ht + (slot * k.H + h) * (DIM * DIM);
    kda_strip<DIM, VK, WIDTH> strip(DIM, DIM, warp * WIDTH);
    strip.load(state, true);
    channel q, key, v;
    q.open(p, 0, slot, d, D);
    key.open(p, 1, slot, d, D);
    v.open(p, 2, slot, d, D);
    bool bf16 = k.dtype == KL_BF16, activated = k.gate != KDA_GATE_LOG;
    int64_t gate = k.G ? h * k.G + c / (DIM / (int)k.G) : 0;
    float eA = activated ? expf(k.A_log[h]) : 0.0f, bias = k.dt_bias ? k.dt_bias[gate] : 0.0f;
    kda_step with = {k.scale, 0.0f, k.qk_l2norm, k.no_delta};
    for (int64_t i = 0; i < k.T; i++) {
        int64_t t = n * k.T + i;
        kda_token<DIM> &token = m.token[i & 1];
        token.q[c] = q.next(kda_number(k.q, t * k.q_stride + d, bf16));
        token.k[c] = key.next(kda_number(k.k, t * k.k_stride + d, bf16));
        m.v[i & 1][c] = v.next(kda_number(k.v, t * k.v_stride + d, bf16));
        token.decay[c] = k.G ? expf(kda_log_decay(k.gate, eA, k.lower_bound, kda_number(k.g, t * k.g_stride + gate, bf16) + bias)) : 1.0f;
        with.beta = kda_beta_of(k.beta_kind, kda_number(k.beta, t * k.beta_stride + h, bf16));
        __syncthreads();
        float all[strip.columns];
        strip.step(token, m.v[i & 1] + warp * WIDTH, with, all);
        if (i + 1 == k.T)
            strip.store(state, true);
        float o = strip.own(all), square = kl_warp_sum(o * o);
        if (kl_lane() == 0)
            m.square[i & 1][warp] = square;
        __syncthreads();
        const float *part = m.square[i & 1];
        float r = rsqrtf((part[0] + part[1] + (part[2] + part[3])) / DIM + p.eps);
        int column = warp * WIDTH + strip.own_column();
        kda_put_number(p.y, t * D + h * DIM + column, bf16, gated(p, o, r, column, t * D + h * DIM + column));
    }
    q.close(p, 0, slot, d, D);
    key.close(p, 1, slot, d, D);
    v.close(p, 2, slot, d, D);
}

} // namespace

bool kda_cuda_decode_fits(const kda_decode_problem *p)
{
    const kda_problem *k = &p->kda;
    return k->K == DIM && k->V == DIM && k->H == k->HV && k->T > 0 && p->W <= TAPS && k->state_dtype == KL_F32 && (uintptr_t)k->ht % 16 == 0;
}

kl_status kda_cuda_decode(kl_ctx *ctx, const kda_decode_problem *given)
{
    kda_decode_problem p = *given;
    kda_problem &k = p.kda;
    int64_t D = k.H * DIM;
    k.q_stride = kda_stride(k.q_stride, D);
    k.k_stride = kda_stride(k.k_stride, D);
    k.v_stride = kda_stride(k.v_stride, D);
    k.g_stride = kda_stride(k.g_stride, k.H * k.G);
    k.beta_stride = kda_stride(k.beta_stride, k.H);
    k.scale = kda_scale(k.scale, DIM);
    k.state_pool = k.state_pool ? k.state_pool : k.N;
    kl_grid grid;
    grid.x = k.N * k.H;
    grid.threads = DIM;
    grid.shared = sizeof(shared_memory);
    grid.overlap = true;
    return k.state_layout == KDA_STATE_VK ? kl_launch(ctx, "kda decode", grid, decode<true>, p) : kl_launch(ctx, "kda decode", grid, decode<false>, p);
}
