/* Equation 1, token by token: the decode step (T = 1), several tokens a step, prefill of few tokens. A block owns one strip
 * of one head of one sequence: it loads the strip, walks over the tokens, stores the strip. */
#include "common/arena.h"
#include "kda/cuda/strip.cuh"
#include "kda/internal.h"

namespace {

/* Where a sequence begins, in tokens and in chunks; it ends where the next one begins. */
struct start {
    int64_t token, chunk;
};

struct arguments {
    kda_problem p;       /* strides, scale, chunk and pool resolved */
    const start *starts; /* [N+1] device; NULL: N sequences of T tokens */
    int strips;          /* of a head */
    int group, width;    /* value heads a head of q and k; channels a gate value (0: no gates) */
    int64_t chunks;      /* of each sequence, without a table */
    bool vector;         /* every state and row of it at an address of whole quads */
};

/* What one thread fetches of a token: one channel of q, k, g for each 128 of KP; one column of v. */
template <int KP> struct fetched {
    uint32_t q[KP / 128], k[KP / 128], g[KP / 128], v, beta;
};

template <int KP> struct shared_memory {
    kda_token<KP> token[2];
    float v[2][KDA_STRIP];
    kda_sums sums;
};

struct place {
    int64_t n, hv, h;
    int v0;
};

template <int KP> __device__ __forceinline__ fetched<KP> fetch(const arguments &a, const place &at, int64_t t)
{
    const kda_problem &p = a.p;
    fetched<KP> x = {};
    bool bf16 = p.dtype == KL_BF16;
    int thread = (int)threadIdx.x;
#pragma unroll
    for (int i = 0; i < KP / 128; i++) {
        int c = thread + 128 * i;
        if (c < p.K) {
            x.q[i] = kda_fetch(p.q, t * p.q_stride + at.h * p.K + c, bf16);
            x.k[i] = kda_fetch(p.k, t * p.k_stride + at.h * p.K + c, bf16);
            x.g[i] = a.width ? kda_fetch(p.g, t * p.g_stride + at.hv * p.G + c / a.width, bf16) : 0;
        }
    }
    if (thread < KDA_STRIP && at.v0 + thread < p.V)
        x.v = kda_fetch(p.v, t * p.v_stride + at.hv * p.V + at.v0 + thread, bf16);
    x.beta = kda_fetch(p.beta, t * p.beta_stride + at.hv, bf16);
    return x;
}

/* The gate's parameters of this thread's channels. */
template <int KP> struct gate_parameters {
    float eA, bias[KP / 128];
};
template <int KP> __device__ __forceinline__ gate_parameters<KP> fetch_gate(const arguments &a, const place &at)
{
    const kda_problem &p = a.p;
    gate_parameters<KP> x = {};
    x.eA = p.gate != KDA_GATE_LOG ? expf(p.A_log[at.hv]) : 0.0f;
#pragma unroll
    for (int i = 0; i < KP / 128; i++) {
        int c = (int)threadIdx.x + 128 * i;
        x.bias[i] = p.dt_bias && c < p.K ? p.dt_bias[at.hv * p.G + c / a.width] : 0.0f;
    }
    return x;
}

template <int KP>
__device__ __forceinline__ void publish(const kda_problem &p, const fetched<KP> &x, const gate_parameters<KP> &gate, kda_token<KP> &token, float *v)
{
    bool bf16 = p.dtype == KL_BF16;
#pragma unroll
    for (int i = 0; i < KP / 128; i++) {
        int c = (int)threadIdx.x + 128 * i;
        token.q[c] = kda_fetched(x.q[i], bf16);
        token.k[c] = kda_fetched(x.k[i], bf16);
        token.decay[c] = p.G ? expf(kda_log_decay(p.gate, gate.eA, p.lower_bound, kda_fetched(x.g[i], bf16) + gate.bias[i])) : 1.0f;
    }
    if (threadIdx.x < KDA_STRIP)
        v[threadIdx.x] = kda_fetched(x.v, bf16);
}

template <int KP, bool VK, class S> __global__ void __launch_bounds__(KDA_STRIP_THREADS, KP == 128 ? 5 : 2)
recurrent(const __grid_constant__ arguments a)
{
    KL_SHARED(memory);
    shared_memory<KP> &m = *(shared_memory<KP> *)memory;
    const kda_problem &p = a.p;
    unsigned head = blockIdx.x / (unsigned)a.strips, HV = (unsigned)p.HV;
    place at = {head / HV, head % HV, head % HV / (unsigned)a.group, (int)(blockIdx.x % (unsigned)a.strips) * KDA_STRIP};
    int64_t begin = a.starts ? a.starts[at.n].token : at.n * p.T, length = a.starts ? a.starts[at.n + 1].token - begin : p.T;
    int64_t slot = p.state_index ? p.state_index[at.n] : at.n, size = p.K * p.V, C = p.chunk;
    gate_parameters<KP> gate = fetch_gate<KP>(a, at);
    fetched<KP> next = {};
    if (length > 0)
        next = fetch<KP>(a, at, begin);
    if (slot < 0 || slot >= p.state_pool)
        return;
    kda_strip<KP, VK> strip((int)threadIdx.x, (int)p.K, (int)p.V, at.v0);
    strip.load(p.h0 ? (const S *)p.h0 + (slot * p.HV + at.hv) * size : NULL, a.vector);

    float *checkpoint = p.chunk_states ? p.chunk_states + ((a.starts ? a.starts[at.n].chunk : at.n * a.chunks) * p.HV + at.hv) * size : NULL;
    kda_step with = {p.scale, 0.0f, p.qk_l2norm, p.no_delta};
    for (int64_t i = 0, within = 0; i < length; i++, within = within + 1 == C ? 0 : within + 1) {
        int64_t t = begin + i;
        if (checkpoint && within == 0) {
            strip.store(checkpoint, a.vector);
            checkpoint += p.HV * size;
        }
        kda_token<KP> &token = m.token[i & 1];
        float *v = m.v[i & 1], o[strip.columns];
        publish<KP>(p, next, gate, token, v);
        with.beta = kda_beta_of(p.beta_kind, kda_fetched(next.beta, p.dtype == KL_BF16));
        if (i + 1 < length)
            next = fetch<KP>(a, at, t + 1);
        __syncthreads();
        strip.step(token, v, with, m.sums, 0, o);
        int column = strip.own_column();
        if (column >= 0 && at.v0 + column < p.V)
            kda_put_number(p.o, t * p.o_stride + at.hv * p.V + at.v0 + column, p.dtype == KL_BF16, strip.own(o));
        if (p.token_states)
            strip.store(p.token_states + (t * p.HV + at.hv) * size, a.vector);
    }
    if (p.ht)
        strip.store((S *)p.ht + (slot * p.HV + at.hv) * size, a.vector);
}

/* Equal lengths need no table. */
bool equal_lengths(const kda_problem *p)
{
    for (int64_t n = 1; p->cu_seqlens && n < p->N; n++)
        if (p->cu_seqlens[n + 1] - p->cu_seqlens[n] != p->cu_seqlens[1])
            return false;
    return true;
}

kl_status upload_starts(const kl_ctx *ctx, const kda_problem *p, start *starts)
{
    enum { PIECE = 240 };
    start piece[PIECE];
    int64_t chunk = 0;
    for (int64_t n = 0; n <= p->N; n++) {
        piece[n % PIECE] = {p->cu_seqlens[n], chunk};
        if (n < p->N)
            chunk += (p->cu_seqlens[n + 1] - p->cu_seqlens[n] + p->chunk - 1) / p->chunk;
        if (n % PIECE == PIECE - 1 || n == p->N)
            KL_TRY(kl_upload(ctx, starts + n / PIECE * PIECE, piece, (size_t)(n % PIECE + 1) * sizeof(start)));
    }
    return kl_ok();
}

/* Rows of whole quads, and every head of every state at an address of whole quads. */
bool in_quads(const kda_problem *p)
{
    uintptr_t unit = 4 * kl_dtype_size(p->state_dtype);
    int64_t row = p->state_layout == KDA_STATE_VK ? p->K : p->V;
    return row % 4 == 0 && (uintptr_t)p->h0 % unit == 0 && (uintptr_t)p->ht % unit == 0 && (uintptr_t)p->chunk_states % 16 == 0 &&
           (uintptr_t)p->token_states % 16 == 0;
}

template <int KP, bool VK, class S> kl_status launch(kl_ctx *ctx, const arguments &a)
{
    kl_grid grid;
    grid.x = a.p.N * a.p.HV * a.strips;
    grid.threads = KDA_STRIP_THREADS;
    grid.shared = sizeof(shared_memory<KP>);
    return kl_launch(ctx, "kda recurrent", grid, recurrent<KP, VK, S>, a);
}

template <bool VK, class S> kl_status launch_for_K(kl_ctx *ctx, const arguments &a)
{
    return a.p.K <= 128 ? launch<128, VK, S>(ctx, a) : launch<256, VK, S>(ctx, a);
}

template <bool VK> kl_status launch_for_state(kl_ctx *ctx, const arguments &a)
{
    return a.p.state_dtype == KL_BF16 ? launch_for_K<VK, uint16_t>(ctx, a) : launch_for_K<VK, float>(ctx, a);
}

} // namespace

size_t kda_cuda_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    (void)ctx;
    const kda_problem *p = (const kda_problem *)problem;
    kl_arena arena = kl_arena_count();
    if (pass == KL_FORWARD && !equal_lengths(p))
        KL_TAKE(&arena, start, p->N + 1);
    return arena.used;
}

kl_status kda_cuda_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    arguments a = {};
    kda_problem &p = a.p;
    p = *(const kda_problem *)problem;
    p.q_stride = kda_stride(p.q_stride, p.H * p.K);
    p.k_stride = kda_stride(p.k_stride, p.H * p.K);
    p.v_stride = kda_stride(p.v_stride, p.HV * p.V);
    p.g_stride = kda_stride(p.g_stride, p.HV * p.G);
    p.beta_stride = kda_stride(p.beta_stride, p.HV);
    p.o_stride = kda_stride(p.o_stride, p.HV * p.V);
    p.scale = kda_scale(p.scale, p.K);
    p.chunk = kda_chunk_tokens(&p);
    p.state_pool = p.state_pool ? p.state_pool : p.N;
    a.strips = (int)((p.V + KDA_STRIP - 1) / KDA_STRIP);
    a.vector = in_quads(&p);
    a.group = (int)(p.HV / p.H);
    a.width = p.G ? (int)(p.K / p.G) : 0;
    if (equal_lengths(&p)) {
        p.T = p.cu_seqlens && p.N ? p.cu_seqlens[1] : p.T;
        a.chunks = (p.T + p.chunk - 1) / p.chunk;
    } else {
        kl_arena arena = kl_arena_over(workspace, bytes);
        start *starts = KL_TAKE(&arena, start, p.N + 1);
        KL_REQUIRE(workspace && !arena.overflow, "kda: workspace: expected %zu bytes, got %zu",
                   kda_cuda_recurrent_workspace(ctx, problem, KL_FORWARD), workspace ? bytes : 0);
        KL_TRY(upload_starts(ctx, &p, starts));
        a.starts = starts;
    }
    p.cu_seqlens = NULL;
    return p.state_layout == KDA_STATE_VK ? launch_for_state<true>(ctx, a) : launch_for_state<false>(ctx, a);
}
