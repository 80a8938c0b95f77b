/* The decode step in one launch: a block takes one head of one sequence through everything. Thread c owns channel c of q, k
 * and v for the convolutions and the gate, as far as there are channels; the block holds the state. */
#include "kda/cuda/head.cuh"
#include "kda/internal.h"

namespace {

enum { DIM = KDA_HEAD, TAPS = 4, THREADS = 32 * KDA_HEAD_WARPS };

template <class Head> struct shared_memory {
    kda_token<DIM> token[2];
    alignas(16) float v[2][DIM];
    float square[2][KDA_HEAD_WARPS]; /* sums of o^2, one a warp */
    typename Head::shared between;
};

/* One channel of one of q, k, v: the inputs before the next token, right-aligned like its taps. What is absent of TAPS is fetched
 * from where something is, so that all loads are under way at once. */
struct channel {
    float x[TAPS - 1];
    int64_t at; /* of the channel, among all of its kind */
    int which, absent;

    __device__ __forceinline__ channel(const kda_decode_problem &p, int which, int64_t tail, int64_t at) : at(at), which(which), absent(TAPS - (int)p.W)
    {
        bool bf16 = p.tail_dtype == KL_BF16;
        uint32_t bits[TAPS - 1];
#pragma unroll
        for (int m = 0; m < TAPS - 1; m++)
            bits[m] = p.W > 1 ? kda_fetch(p.tail[which], tail * (p.W - 1) + max(m - absent, 0), bf16) : 0;
#pragma unroll
        for (int m = 0; m < TAPS - 1; m++)
            x[m] = m >= absent ? kda_fetched(bits[m], bf16) : 0.0f;
    }
    /* z = sum_j weight[j] x[j];  z sigmoid(z) */
    __device__ __forceinline__ float next(const kda_decode_problem &p, uint32_t now)
    {
        uint32_t bits[TAPS];
#pragma unroll
        for (int j = 0; j < TAPS; j++)
            bits[j] = kda_fetch(p.weight[which], at * p.W + max(j - absent, 0), p.weight_dtype != KL_F32);
        float z = 0.0f, input = kda_fetched(now, p.kda.dtype == KL_BF16);
#pragma unroll
        for (int j = 0; j < TAPS; j++)
            z += (j >= absent ? kda_weight_fetched(bits[j], p.weight_dtype) : 0.0f) * (j < TAPS - 1 ? x[j] : input);
#pragma unroll
        for (int m = 0; m < TAPS - 2; m++)
            x[m] = x[m + 1];
        x[TAPS - 2] = input;
        return z * kda_sigmoid_fast(z);
    }
    __device__ __forceinline__ void close(const kda_decode_problem &p, int64_t tail) const
    {
#pragma unroll
        for (int m = 0; m < TAPS - 1; m++)
            if (m >= absent)
                kda_put_number(p.tail[which], tail * (p.W - 1) + m - absent, p.tail_dtype == KL_BF16, x[m]);
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

/* The slot of the pool that sequence n has its state in; negative: the sequence is left out. */
__device__ __forceinline__ int64_t slot_of(const kda_problem &k, int64_t n)
{
    int64_t slot = k.state_index ? k.state_index[n] : n;
    return slot < k.state_pool ? slot : -1;
}

/* Starts the block's head on its way to the second cache. */
__device__ __forceinline__ void ask_for_state(const kda_problem &k)
{
    int64_t slot = slot_of(k, blockIdx.x / (unsigned)k.H), head = blockIdx.x % (unsigned)k.H;
    const float *state = (const float *)k.ht + (slot * k.H + head) * (DIM * DIM);
    for (int line = (int)threadIdx.x; slot >= 0 && line < DIM * DIM / 32; line += THREADS)
        kl_prefetch(state + 32 * line);
}

template <bool VK> __global__ void __launch_bounds__(THREADS, 2) decode(const __grid_constant__ kda_decode_problem p)
{
    using Head = typename kda_head_of<VK>::type;
    KL_SHARED(memory);
    shared_memory<Head> &m = *(shared_memory<Head> *)memory;
    const kda_problem &k = p.kda;
    kl_grid_release();
    kl_grid_wait();
    ask_for_state(k);
    bool lower = threadIdx.x < DIM;
    int c = (int)threadIdx.x % DIM, warp = (int)threadIdx.x / 32, mine = VK ? warp * KDA_HEAD_ROWS : 0;
    int64_t n = blockIdx.x / (unsigned)k.H, h = blockIdx.x % (unsigned)k.H, d = h * DIM + c, D = k.H * DIM;
    int64_t slot = slot_of(k, n);
    if (slot < 0)
        return;
    float *state = (float *)k.ht + (slot * k.H + h) * (DIM * DIM);
    Head head(DIM, DIM, mine);
    channel x(p, lower ? 0 : 1, slot * D + d, d), v(p, lower ? 2 : 1, slot * D + d, d);
    bool bf16 = k.dtype == KL_BF16, activated = k.gate != KDA_GATE_LOG;
    int64_t gate = k.G ? h * k.G + c / (DIM / (int)k.G) : 0;
    float eA = activated ? expf(k.A_log[h]) : 0.0f, bias = k.dt_bias ? k.dt_bias[gate] : 0.0f;
    kda_step with = {k.scale, 0.0f, k.qk_l2norm, k.no_delta};
    for (int64_t i = 0; i < k.T; i++) {
        int64_t t = n * k.T + i;
        kda_token<DIM> &token = m.token[i & 1];
        (lower ? token.q : token.k)[c] = x.next(p, kda_fetch(lower ? k.q : k.k, t * (lower ? k.q_stride : k.k_stride) + d, bf16));
        if (lower)
            m.v[i & 1][c] = v.next(p, kda_fetch(k.v, t * k.v_stride + d, bf16));
        else
            token.decay[c] = k.G ? expf(kda_log_decay(k.gate, eA, k.lower_bound, kda_number(k.g, t * k.g_stride + gate, bf16) + bias)) : 1.0f;
        with.beta = kda_beta_of(k.beta_kind, kda_number(k.beta, t * k.beta_stride + h, bf16));
        if (i + 1 == k.T) {
            x.close(p, slot * D + d);
            if (lower)
                v.close(p, slot * D + d);
        }
        __syncthreads();
        if (i == 0)
            head.load(state, true);
        float all[Head::columns];
        head.step(token, m.v[i & 1] + mine, with, all, m.between);
        if (i + 1 == k.T)
            head.store(state, true);
        int column = head.own_column();
        float o = head.own(all), square = kl_warp_sum(column >= 0 ? o * o : 0.0f);
        if (kl_lane() == 0)
            m.square[i & 1][warp] = square;
        __syncthreads();
        float sum = 0.0f;
        for (int w = 0; w < KDA_HEAD_WARPS; w++)
            sum += m.square[i & 1][w];
        if (column < 0)
            continue;
        int64_t at = t * D + h * DIM + mine + column;
        kda_put_number(p.y, at, bf16, gated(p, o, rsqrtf(sum / DIM + p.eps), mine + column, at));
    }
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
    grid.threads = THREADS;
    bool value_first = k.state_layout == KDA_STATE_VK;
    grid.shared = value_first ? sizeof(shared_memory<kda_head_of<true>::type>) : sizeof(shared_memory<kda_head_of<false>::type>);
    grid.overlap = true;
    return kl_launch(ctx, "kda decode", grid, value_first ? decode<true> : decode<false>, p);
}
