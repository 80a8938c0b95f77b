/* The short convolution. A thread owns 4 adjacent channels (or one, where channels do not come in fours) and walks over a
 * run of tokens with the last taps in registers; each input is read once but for the few before a run. */
#include "common/arena.h"
#include "kda/cuda/numbers.cuh"
#include "kda/cuda/sequences.cuh"

namespace {

/* ACROSS: channels of a thread, which has few taps; RUN: its tokens forward, and the least backward, where blocks take as many as leave
 * BLOCKS of them, in at most SLABS shares of dweight. */
enum { WARPS = 4, THREADS = 32 * WARPS, ACROSS = 4, FEW_TAPS = 4, RUN = 32, BLOCKS = 1536, SLABS = 64 };

struct arguments {
    kda_conv_problem p; /* strides resolved */
    kda_sequences sequences;
    int64_t tokens, run;
    unsigned across; /* blocks over the channels */
    bool whole;      /* load_weight */
};

struct gradients {
    kda_conv_grads g;
    float *share; /* [slabs,D,W] of dweight; NULL: not wanted */
};

/* The sequence that a walk over packed tokens is in: tokens begin..end-1. */
struct cursor {
    int64_t n, begin, end;
};

__device__ __forceinline__ cursor sequence_of(const kda_sequences &s, int64_t t)
{
    if (!s.row) {
        int64_t n = t / s.T;
        return {n, n * s.T, (n + 1) * s.T};
    }
    int64_t low = 0, high = s.N; /* row[low].begin <= t < row[high].begin */
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        (s.row[middle].begin <= t ? low : high) = middle;
    }
    return {low, s.row[low].begin, s.row[low + 1].begin};
}

/* The next sequence that has a token. */
__device__ __forceinline__ cursor sequence_after(const kda_sequences &s, cursor at)
{
    if (!s.row)
        return {at.n + 1, at.end, at.end + s.T};
    int64_t n = at.n + 1;
    while (s.row[n + 1].begin == at.end)
        n++;
    return {n, at.end, s.row[n + 1].begin};
}

/* -1: the sequence is left out. */
__device__ __forceinline__ int64_t slot_of(const kda_conv_problem &p, int64_t n)
{
    int64_t slot = p.state_index ? p.state_index[n] : n;
    return slot < 0 || (p.state_pool && slot >= p.state_pool) ? -1 : slot;
}

__device__ __forceinline__ float kept(const kda_conv_problem &p, int64_t slot, int64_t d, int64_t m)
{
    return p.tail_in && slot >= 0 ? kda_number(p.tail_in, (slot * p.D + d) * (p.W - 1) + m, p.tail_dtype == KL_BF16) : 0.0f;
}

/* The inputs of N channels before a token, oldest first: TAPS - 1 of them, of which W - 1 count. */
template <class A, int N, int TAPS> struct window {
    float x[TAPS - 1][N];

    /* Before token t of the sequence `at`. */
    __device__ __forceinline__ void open(const arguments &a, const cursor &at, int64_t t, int64_t d)
    {
        const kda_conv_problem &p = a.p;
        int64_t slot = slot_of(p, at.n);
#pragma unroll
        for (int m = 0; m < TAPS - 1; m++) {
            int64_t from = t - (TAPS - 1) + m;
#pragma unroll
            for (int i = 0; i < N; i++)
                x[m][i] = 0.0f;
            if (m < TAPS - p.W)
                continue;
            if (from >= at.begin) {
                kda_row<A, N> row;
                row.fetch((const A *)p.x + from * p.x_stride + d);
                row.get(x[m]);
            } else {
#pragma unroll
                for (int i = 0; i < N; i++)
                    x[m][i] = kept(p, slot, d + i, from - at.begin + p.W - 1);
            }
        }
    }
    __device__ __forceinline__ void push(const float now[N])
    {
#pragma unroll
        for (int m = 0; m < TAPS - 1; m++)
#pragma unroll
            for (int i = 0; i < N; i++)
                x[m][i] = m + 1 < TAPS - 1 ? x[m + 1][i] : now[i];
    }
};

/* weight[d,j], right-aligned: taps that are not there are 0. whole: all are there, in 16-bit or 32-bit cells at whole addresses. */
template <int N, int TAPS> __device__ __forceinline__ void load_weight(float w[TAPS][N], const arguments &a, int64_t d)
{
    const kda_conv_problem &p = a.p;
    if constexpr (N == ACROSS)
        if (a.whole) {
            float flat[N * TAPS];
#pragma unroll
            for (int i = 0; i < N * TAPS; i += 8)
                kda_eight_numbers(flat + i, p.weight, d * TAPS + i, p.weight_dtype == KL_BF16);
#pragma unroll
            for (int i = 0; i < N; i++)
#pragma unroll
                for (int j = 0; j < TAPS; j++)
                    w[j][i] = flat[i * TAPS + j];
            return;
        }
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int j = 0; j < TAPS; j++)
            w[j][i] = j >= TAPS - p.W ? kda_weight(p.weight, (d + i) * p.W + j - (TAPS - p.W), p.weight_dtype) : 0.0f;
}

/* z = sum_j weight[j] x[j], the last input being now */
template <class A, int N, int TAPS>
__device__ __forceinline__ void convolve(float z[N], const float w[TAPS][N], const window<A, N, TAPS> &before, const float now[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        z[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++)
            z[i] += w[j][i] * before.x[j][i];
        z[i] += w[TAPS - 1][i] * now[i];
    }
}

/* COUNT rows from token t on, as far as they come before stop. */
template <class A, int N, int COUNT>
__device__ __forceinline__ void fetch_rows(kda_row<A, N> row[COUNT], const void *x, int64_t stride, int64_t d, int64_t t, int64_t stop)
{
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        row[i] = {};
        if (t + i < stop)
            row[i].fetch((const A *)x + (t + i) * stride + d);
    }
}

/* Tokens from..stop-1, all of the sequence `at`: a few rows are under way while those before them are computed with. */
template <class A, int N, int TAPS>
__device__ __forceinline__ void walk(const arguments &a, const cursor &at, int64_t from, int64_t stop, int64_t d, const float w[TAPS][N])
{
    enum { BATCH = 8 };
    const kda_conv_problem &p = a.p;
    window<A, N, TAPS> before;
    kda_row<A, N> row[BATCH], next[BATCH];
    fetch_rows<A, N, BATCH>(next, p.x, p.x_stride, d, from, stop);
    before.open(a, at, from, d);
    for (int64_t start = from; start < stop; start += BATCH) {
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            row[i] = next[i];
        fetch_rows<A, N, BATCH>(next, p.x, p.x_stride, d, start + BATCH, stop);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            float now[N], z[N];
            row[i].get(now);
            convolve<A, N, TAPS>(z, w, before, now);
            before.push(now);
#pragma unroll
            for (int c = 0; c < N; c++)
                z[c] = p.silu ? z[c] * kda_sigmoid_fast(z[c]) : z[c];
            if (start + i < stop)
                kda_row<A, N>::put((A *)p.y + (start + i) * p.y_stride + d, z);
        }
    }
}

template <class A, int N, int TAPS> __global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ arguments a)
{
    const kda_conv_problem &p = a.p;
    int64_t d = ((int64_t)(blockIdx.x % a.across) * 32 + kl_lane()) * N;
    int64_t t = ((int64_t)(blockIdx.x / a.across) * WARPS + threadIdx.x / 32) * a.run, last = t + a.run < a.tokens ? t + a.run : a.tokens;
    kl_grid_release();
    if (d >= p.D || t >= last)
        return;
    float w[TAPS][N];
    load_weight<N, TAPS>(w, a, d);
    for (cursor at = sequence_of(a.sequences, t);; at = sequence_after(a.sequences, at)) {
        int64_t stop = at.end < last ? at.end : last;
        if (slot_of(p, at.n) >= 0)
            walk<A, N, TAPS>(a, at, t, stop, d, w);
        if ((t = stop) == last)
            return;
    }
}

/* tail_out: the last W-1 of tail_in and x together, oldest first. One thread a channel of a sequence. */
template <class A> __global__ void __launch_bounds__(256) hand_out_tails(const __grid_constant__ arguments a)
{
    const kda_conv_problem &p = a.p;
    int64_t task = (int64_t)blockIdx.x * 256 + threadIdx.x, n = task / p.D, d = task % p.D, keep = p.W - 1;
    kl_grid_wait();
    int64_t slot = n < p.N ? slot_of(p, n) : -1;
    if (slot < 0)
        return;
    kda_place here = kda_place_of(a.sequences, n);
    float after[KDA_CONV_TAPS - 1];
#pragma unroll
    for (int m = 0; m < KDA_CONV_TAPS - 1; m++) {
        int64_t position = here.length - keep + m;
        if (m < keep)
            after[m] = position >= 0 ? kda_number(p.x, (here.begin + position) * p.x_stride + d, sizeof(A) == 2) : kept(p, slot, d, m + here.length);
    }
#pragma unroll
    for (int m = 0; m < KDA_CONV_TAPS - 1; m++)
        if (m < keep)
            kda_put_number(p.tail_out, (slot * p.D + d) * keep + m, p.tail_dtype == KL_BF16, after[m]);
}

/* ---- backward ---- */

/* y = z sigmoid(z):  dz = dy (sigmoid(z) + z sigmoid(z) (1 - sigmoid(z))) */
__device__ __forceinline__ float silu_backward(float z, float dy)
{
    float up = kda_sigmoid_fast(z);
    return dy * (up + z * up * (1.0f - up));
}

/* z[t] = sum_j weight[j] x[t-W+1+j]:  dweight[j] += dz[t] x[t-W+1+j],  dx[t-W+1+j] += dz[t] weight[j].
 * The tokens from..last-1 of the sequence `at` are the walk's own; it goes on over those behind them that its own inputs reach.
 * pending holds the dx that are not complete. */
template <class A, int N, int TAPS>
__device__ __forceinline__ void walk_back(const arguments &a, const gradients &b, const cursor &at, int64_t from, int64_t last, int64_t d,
                                          const float w[TAPS][N], float dw[TAPS][N])
{
    enum { BATCH = 4 };
    const kda_conv_problem &p = a.p;
    int64_t stop = last + TAPS - 1 < at.end ? last + TAPS - 1 : at.end;
    float pending[TAPS - 1][N] = {};
    window<A, N, TAPS> before;
    kda_row<A, N> row[BATCH], drow[BATCH], next[BATCH], dnext[BATCH];
    fetch_rows<A, N, BATCH>(next, p.x, p.x_stride, d, from, stop);
    fetch_rows<A, N, BATCH>(dnext, b.g.dy, p.y_stride, d, from, stop);
    before.open(a, at, from, d);
    for (int64_t start = from; start < stop; start += BATCH) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            row[i] = next[i];
            drow[i] = dnext[i];
        }
        fetch_rows<A, N, BATCH>(next, p.x, p.x_stride, d, start + BATCH, stop);
        fetch_rows<A, N, BATCH>(dnext, b.g.dy, p.y_stride, d, start + BATCH, stop);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int64_t t = start + i, done = t - (TAPS - 1);
            if (t >= stop)
                break;
            float now[N], dz[N], z[N], ready[N];
            row[i].get(now);
            drow[i].get(dz);
            if (p.silu) {
                convolve<A, N, TAPS>(z, w, before, now);
#pragma unroll
                for (int c = 0; c < N; c++)
                    dz[c] = silu_backward(z[c], dz[c]);
            }
            if (t < last)
#pragma unroll
                for (int c = 0; c < N; c++) {
#pragma unroll
                    for (int j = 0; j < TAPS - 1; j++)
                        dw[j][c] += dz[c] * before.x[j][c];
                    dw[TAPS - 1][c] += dz[c] * now[c];
                }
            before.push(now);
#pragma unroll
            for (int c = 0; c < N; c++) {
                ready[c] = pending[0][c] + dz[c] * w[0][c];
#pragma unroll
                for (int m = 0; m < TAPS - 1; m++)
                    pending[m][c] = (m + 1 < TAPS - 1 ? pending[m + 1][c] : 0.0f) + dz[c] * w[m + 1][c];
            }
            if (done >= from && done < last)
                kda_row<A, N>::put((A *)b.g.dx + done * p.x_stride + d, ready);
        }
    }
    if (stop < at.end)
        return;
    /* tail_out[m] is the input at position length - (W-1) + m */
#pragma unroll
    for (int m = 0; m < TAPS - 1; m++) {
        int64_t own = at.end - (TAPS - 1) + m, kept = m - (TAPS - p.W);
#pragma unroll
        for (int c = 0; c < N; c++)
            if (b.g.dtail_out && kept >= 0)
                pending[m][c] += b.g.dtail_out[(at.n * p.D + d + c) * (p.W - 1) + kept];
        if (own >= from && own < last)
            kda_row<A, N>::put((A *)b.g.dx + own * p.x_stride + d, pending[m]);
    }
}

template <class A, int N, int TAPS> __global__ void __launch_bounds__(THREADS, sizeof(A) == 2 ? 4 : 1) backward(const __grid_constant__ arguments a, const __grid_constant__ gradients b)
{
    KL_SHARED(memory);
    const kda_conv_problem &p = a.p;
    int warp = (int)threadIdx.x / 32, lane = kl_lane();
    int64_t d = ((int64_t)(blockIdx.x % a.across) * 32 + lane) * N, slab = blockIdx.x / a.across;
    int64_t t = (slab * WARPS + warp) * a.run, last = t + a.run < a.tokens ? t + a.run : a.tokens;
    float dw[TAPS][N] = {};
    kl_grid_release();
    if (d < p.D && t < last) {
        float w[TAPS][N];
        load_weight<N, TAPS>(w, a, d);
        for (cursor at = sequence_of(a.sequences, t);; at = sequence_after(a.sequences, at)) {
            int64_t own = at.end < last ? at.end : last;
            walk_back<A, N, TAPS>(a, b, at, t, own, d, w, dw);
            if ((t = own) == last)
                break;
        }
    }
    if (!b.share)
        return;
    /* The block's share: its warps' in order. */
    float *all = (float *)memory; /* [WARPS][TAPS N][32] */
#pragma unroll
    for (int j = 0; j < TAPS; j++)
#pragma unroll
        for (int c = 0; c < N; c++)
            all[(warp * TAPS * N + j * N + c) * 32 + lane] = dw[j][c];
    __syncthreads();
    for (int i = warp; i < TAPS * N; i += WARPS) {
        int j = i / N - (TAPS - (int)p.W), c = i % N;
        float sum = 0.0f;
        for (int from = 0; from < WARPS; from++)
            sum += all[(from * TAPS * N + i) * 32 + lane];
        if (j >= 0 && d < p.D)
            b.share[(slab * p.D + d + c) * p.W + j] = sum;
    }
}

__global__ void __launch_bounds__(256) add_shares(const float *share, float *dweight, int64_t size, int slabs)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    kl_grid_wait();
    if (i >= size)
        return;
    float sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < slabs; s++)
        sum += share[s * size + i];
    dweight[i] += sum;
}

/* dtail_in[m], the input at position m - (W-1): what the first tokens take from it, or what tail_out took over. */
template <class A> __global__ void __launch_bounds__(256) tail_gradients(const __grid_constant__ arguments a, const __grid_constant__ gradients b)
{
    enum { TAPS = KDA_CONV_TAPS };
    const kda_conv_problem &p = a.p;
    int64_t task = (int64_t)blockIdx.x * 256 + threadIdx.x, n = task / p.D, d = task % p.D, keep = p.W - 1;
    kl_grid_wait();
    if (n >= p.N)
        return;
    kda_place here = kda_place_of(a.sequences, n);
    cursor at = {n, here.begin, here.begin + here.length};
    float w[TAPS][1], sum[TAPS - 1] = {};
    load_weight<1, TAPS>(w, a, d);
    window<A, 1, TAPS> before;
    before.open(a, at, here.begin, d);
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++) {
        if (i >= keep || i >= here.length)
            break;
        float now[1] = {kda_number(p.x, (here.begin + i) * p.x_stride + d, sizeof(A) == 2)}, z[1];
        float dz = kda_number(b.g.dy, (here.begin + i) * p.y_stride + d, sizeof(A) == 2);
        if (p.silu) {
            convolve<A, 1, TAPS>(z, w, before, now);
            dz = silu_backward(z[0], dz);
        }
        before.push(now);
        /* tap j of token i takes the input m = i + j; taps are right-aligned */
#pragma unroll
        for (int m = 0; m < TAPS - 1; m++)
#pragma unroll
            for (int j = 0; j < TAPS; j++)
                if (m - i == j - (TAPS - (int)p.W))
                    sum[m] += dz * w[j][0];
    }
#pragma unroll
    for (int m = 0; m < TAPS - 1; m++)
        if (m < keep) {
            float over = b.g.dtail_out && m >= here.length ? b.g.dtail_out[(n * p.D + d) * keep + m - here.length] : 0.0f;
            b.g.dtail_in[(n * p.D + d) * keep + m] = sum[m] + over;
        }
}

/* ---- launching ---- */

/* As much of a problem as says where its sequences lie. */
kda_problem sequences_of(const kda_conv_problem *p)
{
    kda_problem s = {};
    s.B = p->B, s.T = p->T, s.N = p->N;
    s.cu_seqlens = p->cu_seqlens;
    return s;
}

/* Tokens of a thread in the backward pass. */
int64_t run_back(const kda_conv_problem *p)
{
    const int64_t most = SLABS, least = RUN, slabs = kda_ceil(BLOCKS, kda_ceil(p->D, 32 * ACROSS));
    int64_t run = kda_ceil(p->B * p->T, WARPS * (slabs < most ? slabs : most));
    return run > least ? run : least;
}

kl_status prepare(kl_ctx *ctx, const kda_conv_problem *given, int64_t run, arguments *a)
{
    a->p = *given;
    kda_conv_problem &p = a->p;
    p.x_stride = kda_stride(p.x_stride, p.D);
    p.y_stride = kda_stride(p.y_stride, p.D);
    a->tokens = p.B * p.T;
    a->run = run;
    a->whole = p.W == FEW_TAPS && p.weight_dtype != KL_F16 && (uintptr_t)p.weight % 16 == 0;
    kda_problem s = sequences_of(&p);
    a->sequences = kda_sequences_of(&s, p.workspace);
    return kda_sequences_upload(ctx, &s, p.workspace);
}

/* Do channels come in fours, at addresses of whole vectors? */
bool in_fours(const kda_conv_problem &p, const void *in, const void *out)
{
    return p.W <= FEW_TAPS && p.D % ACROSS == 0 && p.x_stride % ACROSS == 0 && p.y_stride % ACROSS == 0 &&
           ((uintptr_t)p.x | (uintptr_t)in | (uintptr_t)out) % 16 == 0;
}

kl_grid grid_over(arguments *a, int64_t channels)
{
    a->across = (unsigned)kda_ceil(a->p.D, 32 * channels);
    kl_grid grid;
    grid.x = a->across * kda_ceil(a->tokens, a->run * WARPS);
    grid.threads = THREADS;
    return grid;
}

template <class A> kl_status run_forward(kl_ctx *ctx, arguments a)
{
    if (in_fours(a.p, a.p.y, NULL))
        KL_TRY(kl_launch(ctx, "conv", grid_over(&a, ACROSS), forward<A, ACROSS, FEW_TAPS>, a));
    else
        KL_TRY(kl_launch(ctx, "conv", grid_over(&a, 1), forward<A, 1, KDA_CONV_TAPS>, a));
    if (!a.p.tail_out || a.p.W == 1)
        return kl_ok();
    kl_grid tails;
    tails.x = kda_ceil(a.p.N * a.p.D, 256);
    tails.threads = 256;
    tails.overlap = true;
    return kl_launch(ctx, "conv tails", tails, hand_out_tails<A>, a);
}

template <class A, int N, int TAPS> kl_status run_backward_of(kl_ctx *ctx, arguments a, const gradients &b)
{
    kl_grid grid = grid_over(&a, N);
    grid.shared = sizeof(float) * THREADS * TAPS * N;
    return kl_launch(ctx, "conv backward", grid, backward<A, N, TAPS>, a, b);
}

template <class A> kl_status run_backward(kl_ctx *ctx, const arguments &a, const gradients &b)
{
    if (in_fours(a.p, b.g.dy, b.g.dx))
        KL_TRY((run_backward_of<A, ACROSS, FEW_TAPS>(ctx, a, b)));
    else
        KL_TRY((run_backward_of<A, 1, KDA_CONV_TAPS>(ctx, a, b)));
    kl_grid grid;
    grid.threads = 256;
    grid.overlap = true;
    if (b.share && a.tokens) {
        int64_t size = a.p.D * a.p.W;
        grid.x = kda_ceil(size, 256);
        KL_TRY(kl_launch(ctx, "conv dweight", grid, add_shares, (const float *)b.share, b.g.dweight, size, (int)kda_ceil(a.tokens, a.run * WARPS)));
    }
    if (!b.g.dtail_in || a.p.W == 1)
        return kl_ok();
    grid.x = kda_ceil(a.p.N * a.p.D, 256);
    return kl_launch(ctx, "conv dtail", grid, tail_gradients<A>, a, b);
}

} // namespace

size_t kda_cuda_conv_workspace(const kda_conv_problem *p, kl_pass pass)
{
    kda_problem s = sequences_of(p);
    kl_arena arena = kl_arena_count();
    kl_arena_take(&arena, kda_sequences_bytes(&s), 1);
    if (pass == KL_BACKWARD)
        KL_TAKE(&arena, float, kda_ceil(p->B * p->T, run_back(p) * WARPS) * p->D * p->W);
    return arena.used;
}

kl_status kda_cuda_conv_forward(kl_ctx *ctx, const kda_conv_problem *p)
{
    arguments a;
    KL_TRY(prepare(ctx, p, RUN, &a));
    return p->dtype == KL_BF16 ? run_forward<uint16_t>(ctx, a) : run_forward<float>(ctx, a);
}

kl_status kda_cuda_conv_backward(kl_ctx *ctx, const kda_conv_problem *p, const kda_conv_grads *g)
{
    arguments a;
    KL_TRY(prepare(ctx, p, run_back(p), &a));
    kda_problem s = sequences_of(p);
    kl_arena arena = kl_arena_over(p->workspace, p->workspace_bytes);
    kl_arena_take(&arena, kda_sequences_bytes(&s), 1);
    gradients b = {*g, NULL};
    if (g->dweight)
        b.share = KL_TAKE(&arena, float, kda_ceil(a.tokens, a.run * WARPS) * p->D * p->W);
    return p->dtype == KL_BF16 ? run_backward<uint16_t>(ctx, a, b) : run_backward<float>(ctx, a, b);
}
