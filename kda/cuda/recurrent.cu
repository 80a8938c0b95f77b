/* Equation 1, token by token: the decode step (T = 1), several tokens a step, prefill of few tokens. A block owns columns of one
 * head of one sequence: it loads them, walks over the tokens, stores them. Heads of 128 x 128 are taken whole, others in strips. */
#include "kda/cuda/head.cuh"
#include "kda/cuda/sequences.cuh"

#include <type_traits>

namespace {

/* How the columns of a head are shared out: a strip a warp. [V,K]: 8 rows of memory. [K,V]: 32 columns, pieces of 128 bytes;
 * more of them in flight than registers for two blocks a multiprocessor would spill. */
template <int KP_, bool VK_> struct strips {
    static constexpr int KP = KP_, STRIP = VK_ ? 8 : KP == 128 ? 32 : 16, THREADS = VK_ ? 128 : 64, BLOCK = THREADS / 32 * STRIP;
    static constexpr int BLOCKS = KP > 128 ? 2 : 4; /* of a multiprocessor, at least */
    static constexpr bool known = false;            /* K = V = KP, rows at whole addresses */
    using holder = kda_strip<KP, VK_, STRIP>;
};
/* Of 128 x 128, where the compiler knows every offset: in [V,K] the same strips, in [K,V] the whole head. */
struct known_strips : strips<KDA_HEAD, true> {
    static constexpr bool known = true;
};
struct whole_head {
    static constexpr int KP = KDA_HEAD, STRIP = 0, THREADS = 32 * KDA_HEAD_WARPS, BLOCK = KDA_HEAD, BLOCKS = 2;
    static constexpr bool known = true;
    using holder = kda_rows;
};
/* Channels of a thread. */
template <class X> constexpr int EACH = (X::KP + X::THREADS - 1) / X::THREADS;

struct arguments {
    kda_problem p;       /* strides, scale, chunk and pool resolved */
    kda_sequences sequences;
    int blocks;          /* of a head */
    int group, width;    /* value heads a head of q and k; channels a gate value (0: no gates) */
    bool vector;         /* every state and row of it at an address of whole quads */
};

/* What one thread fetches of a token: channels of q, k, g; a column of v. */
template <class X> struct fetched {
    uint32_t q[EACH<X>], k[EACH<X>], g[EACH<X>], v, beta;
};

template <class X> struct shared_memory {
    kda_token<X::KP> token[2];
    alignas(16) float v[2][X::BLOCK];
    typename X::holder::shared between;
};

/* What a block owns: columns v0.. of a value head of a sequence. */
struct part {
    int64_t n, hv, h;
    int v0;
};

template <class X> __device__ __forceinline__ fetched<X> fetch(const arguments &a, const part &at, int64_t t)
{
    const kda_problem &p = a.p;
    fetched<X> x = {};
    bool bf16 = p.dtype == KL_BF16;
    int thread = (int)threadIdx.x;
#pragma unroll
    for (int i = 0; i < EACH<X>; i++) {
        int c = thread + X::THREADS * i;
        if (c < p.K) {
            x.q[i] = kda_fetch(p.q, t * p.q_stride + at.h * p.K + c, bf16);
            x.k[i] = kda_fetch(p.k, t * p.k_stride + at.h * p.K + c, bf16);
            x.g[i] = a.width ? kda_fetch(p.g, t * p.g_stride + at.hv * p.G + c / a.width, bf16) : 0;
        }
    }
    if (thread < X::BLOCK && at.v0 + thread < p.V)
        x.v = kda_fetch(p.v, t * p.v_stride + at.hv * p.V + at.v0 + thread, bf16);
    x.beta = kda_fetch(p.beta, t * p.beta_stride + at.hv, bf16);
    return x;
}

/* The gate's parameters of this thread's channels. */
template <class X> struct gate_parameters {
    float A, bias[EACH<X>];
};
template <class X> __device__ __forceinline__ gate_parameters<X> fetch_gate(const arguments &a, const part &at)
{
    const kda_problem &p = a.p;
    gate_parameters<X> x = {};
    x.A = p.gate != KDA_GATE_LOG ? p.A_log[at.hv] : 0.0f;
#pragma unroll
    for (int i = 0; i < EACH<X>; i++) {
        int c = (int)threadIdx.x + X::THREADS * i;
        x.bias[i] = p.dt_bias && c < p.K ? p.dt_bias[at.hv * p.G + c / a.width] : 0.0f;
    }
    return x;
}

template <class X>
__device__ __forceinline__ void publish(const kda_problem &p, const fetched<X> &x, const gate_parameters<X> &gate, kda_token<X::KP> &token, float *v)
{
    bool bf16 = p.dtype == KL_BF16;
    float eA = expf(gate.A);
#pragma unroll
    for (int i = 0; i < EACH<X>; i++) {
        int c = (int)threadIdx.x + X::THREADS * i;
        if (X::KP % X::THREADS && c >= X::KP)
            continue;
        token.q[c] = kda_fetched(x.q[i], bf16);
        token.k[c] = kda_fetched(x.k[i], bf16);
        token.decay[c] = p.G ? expf(kda_log_decay(p.gate, eA, p.lower_bound, kda_fetched(x.g[i], bf16) + gate.bias[i])) : 1.0f;
    }
    if (threadIdx.x < X::BLOCK)
        v[threadIdx.x] = kda_fetched(x.v, bf16);
}

template <class X, class S> __global__ void __launch_bounds__(X::THREADS, X::BLOCKS) recurrent(const __grid_constant__ arguments a)
{
    KL_SHARED(memory);
    shared_memory<X> &m = *(shared_memory<X> *)memory;
    const kda_problem &p = a.p;
    unsigned blocks = X::known ? X::KP / X::BLOCK : (unsigned)a.blocks, head = blockIdx.x / blocks, HV = (unsigned)p.HV;
    part at = {head / HV, head % HV, head % HV / (unsigned)a.group, (int)(blockIdx.x % blocks) * X::BLOCK};
    kl_grid_release();
    kl_grid_wait();
    kda_place here = kda_place_of(a.sequences, at.n);
    int K = X::known ? X::KP : (int)p.K, V = X::known ? X::KP : (int)p.V;
    int64_t slot = p.state_index ? p.state_index[at.n] : at.n, size = (int64_t)K * V, C = p.chunk;
    bool vector = X::known || a.vector;
    gate_parameters<X> gate = fetch_gate<X>(a, at);
    fetched<X> next = {};
    if (here.length > 0)
        next = fetch<X>(a, at, here.begin);
    if (slot < 0 || slot >= p.state_pool)
        return;
    int mine = (int)threadIdx.x / 32 * X::STRIP; /* the warp's first column of the block's */
    typename X::holder strip(K, V, at.v0 + mine);
    strip.load(p.h0 ? (const S *)p.h0 + (slot * p.HV + at.hv) * size : NULL, vector);

    float *checkpoint = p.chunk_states ? p.chunk_states + (here.chunk * p.HV + at.hv) * size : NULL;
    kda_step with = {p.scale, 0.0f, p.qk_l2norm, p.no_delta};
    for (int64_t i = 0, within = 0; i < here.length; i++, within = within + 1 == C ? 0 : within + 1) {
        int64_t t = here.begin + i;
        if (checkpoint && within == 0) {
            strip.store(checkpoint, vector);
            checkpoint += p.HV * size;
        }
        kda_token<X::KP> &token = m.token[i & 1];
        float *v = m.v[i & 1], o[strip.columns];
        publish<X>(p, next, gate, token, v);
        with.beta = kda_beta_of(p.beta_kind, kda_fetched(next.beta, p.dtype == KL_BF16));
        if (i + 1 < here.length)
            next = fetch<X>(a, at, t + 1);
        __syncthreads();
        strip.step(token, v + mine, with, o, m.between);
        int column = at.v0 + mine + strip.own_column();
        if (strip.own_column() >= 0 && column < V)
            kda_put_number(p.o, t * p.o_stride + at.hv * p.V + column, p.dtype == KL_BF16, strip.own(o));
        if (p.token_states)
            strip.store(p.token_states + (t * p.HV + at.hv) * size, vector);
    }
    if (p.ht)
        strip.store((S *)p.ht + (slot * p.HV + at.hv) * size, vector);
}

/* The problem with every default resolved, and equal lengths counted: they need no table. */
kda_problem resolved(const kda_problem *given)
{
    kda_problem p = *given;
    p.q_stride = kda_stride(p.q_stride, p.H * p.K);
    p.k_stride = kda_stride(p.k_stride, p.H * p.K);
    p.v_stride = kda_stride(p.v_stride, p.HV * p.V);
    p.g_stride = kda_stride(p.g_stride, p.HV * p.G);
    p.beta_stride = kda_stride(p.beta_stride, p.HV);
    p.o_stride = kda_stride(p.o_stride, p.HV * p.V);
    p.scale = kda_scale(p.scale, p.K);
    p.chunk = kda_chunk_tokens(&p);
    p.state_pool = p.state_pool ? p.state_pool : p.N;
    bool equal = p.cu_seqlens && p.N > 0;
    for (int64_t n = 1; equal && n < p.N; n++)
        equal = p.cu_seqlens[n + 1] - p.cu_seqlens[n] == p.cu_seqlens[1];
    if (equal) {
        p.T = p.cu_seqlens[1];
        p.cu_seqlens = NULL;
    }
    return p;
}

/* Rows of whole quads, and every head of every state at an address of whole quads. */
bool in_quads(const kda_problem *p)
{
    uintptr_t unit = 4 * kl_dtype_size(p->state_dtype);
    int64_t row = p->state_layout == KDA_STATE_VK ? p->K : p->V;
    return row % 4 == 0 && (uintptr_t)p->h0 % unit == 0 && (uintptr_t)p->ht % unit == 0 && (uintptr_t)p->chunk_states % 16 == 0 &&
           (uintptr_t)p->token_states % 16 == 0;
}

template <class X, class S> kl_status launch(kl_ctx *ctx, arguments a)
{
    a.blocks = (int)kda_ceil(a.p.V, X::BLOCK);
    kl_grid grid;
    grid.x = a.p.N * a.p.HV * a.blocks;
    grid.threads = X::THREADS;
    grid.shared = sizeof(shared_memory<X>);
    grid.overlap = true;
    return kl_launch(ctx, "kda recurrent", grid, recurrent<X, S>, a);
}

template <bool VK, class S> kl_status launch_for_K(kl_ctx *ctx, const arguments &a)
{
    if (a.p.K == KDA_HEAD && a.p.V == KDA_HEAD && a.vector)
        return launch<std::conditional_t<VK, known_strips, whole_head>, S>(ctx, a);
    return a.p.K <= 128 ? launch<strips<128, VK>, S>(ctx, a) : launch<strips<256, VK>, S>(ctx, a);
}

template <bool VK> kl_status launch_for_state(kl_ctx *ctx, const arguments &a)
{
    return a.p.state_dtype == KL_BF16 ? launch_for_K<VK, uint16_t>(ctx, a) : launch_for_K<VK, float>(ctx, a);
}

} // namespace

size_t kda_cuda_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    (void)ctx;
    kda_problem p = resolved((const kda_problem *)problem);
    return pass == KL_FORWARD ? kda_sequences_bytes(&p) : 0;
}

kl_status kda_cuda_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    arguments a = {};
    a.p = resolved((const kda_problem *)problem);
    const kda_problem &p = a.p;
    size_t wanted = kda_sequences_bytes(&p);
    KL_REQUIRE(wanted == 0 || (workspace && bytes >= wanted), "kda: workspace: expected %zu bytes, got %zu", wanted, workspace ? bytes : 0);
    a.sequences = kda_sequences_of(&p, workspace);
    a.vector = in_quads(&p);
    a.group = (int)(p.HV / p.H);
    a.width = p.G ? (int)(p.K / p.G) : 0;
    KL_TRY(kda_sequences_upload(ctx, &p, workspace));
    return p.state_layout == KDA_STATE_VK ? launch_for_state<true>(ctx, a) : launch_for_state<false>(ctx, a);
}
