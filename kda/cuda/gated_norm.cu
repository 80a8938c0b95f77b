/* The norm and gate over rows of V. Rows of 64, 128 or 256 lie across 8, 16 or 32 lanes, 8 numbers a lane; other widths take
 * a warp a row and read it twice. */
#include "common/arena.h"
#include "kda/cuda/numbers.cuh"
#include "kda/internal.h"

namespace {

/* ROWS: rows of a lane in flight together; SHARES: blocks, at most, that hold a share of dweight: those that run at a time, two a
 * multiprocessor; SUMMED: shares that are added at a time. */
enum { THREADS = 256, WARPS = THREADS / 32, ROWS = 4, LEAST_ROWS = 32, SHARES = 264, SUMMED = 32 };

struct arguments {
    kda_gated_norm_problem p;
    kda_gated_norm_grads g;
    int64_t rows; /* of a block */
    float *share; /* [blocks,V] of dweight; NULL: not wanted */
    float *r;     /* [rows]: rsqrt(mean x^2 + eps), where a second kernel needs it */
};

__device__ __forceinline__ float act(kda_output_gate kind, float z)
{
    float up = kda_sigmoid_fast(z);
    return kind == KDA_OUT_SIGMOID ? up : kind == KDA_OUT_SWISH ? z * up : 1.0f;
}
__device__ __forceinline__ float act_derivative(kda_output_gate kind, float z)
{
    float up = kda_sigmoid_fast(z), slope = up * (1.0f - up);
    return kind == KDA_OUT_SIGMOID ? slope : up + z * slope;
}

__device__ __forceinline__ float sum_over(float x, int lanes)
{
    for (int m = lanes / 2; m; m /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, m);
    return x;
}

/* Where a lane stands when rows lie across `lanes` lanes: its row among those of a block's turn, and its first column. */
struct stand {
    int lanes, row, column, turn; /* turn: rows that a block has in hand at a time */
    __device__ __forceinline__ stand(int64_t V) : lanes((int)V / 8), row((int)threadIdx.x / lanes), column(8 * ((int)threadIdx.x % lanes)), turn(THREADS / lanes) {}
};

template <class A> __global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ arguments a)
{
    const kda_gated_norm_problem &p = a.p;
    stand at(p.V);
    int64_t first = blockIdx.x * (int64_t)(ROWS * at.turn) + at.row;
    kda_row<A, 8> row[ROWS], gate[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        int64_t t = first + i * at.turn;
        row[i] = {};
        gate[i] = {};
        if (t < p.rows) {
            row[i].fetch((const A *)p.x + t * p.V + at.column);
            if (p.gate)
                gate[i].fetch((const A *)p.gate + t * p.V + at.column);
        }
    }
    float w[8];
#pragma unroll
    for (int c = 0; c < 8; c++)
        w[c] = kda_weight(p.weight, at.column + c, p.weight_dtype);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        int64_t t = first + i * at.turn;
        float x[8], z[8], sum = 0.0f;
        row[i].get(x);
        gate[i].get(z);
#pragma unroll
        for (int c = 0; c < 8; c++)
            sum += x[c] * x[c];
        /* y = x rsqrt(mean x^2 + eps) weight act(z) */
        float r = rsqrtf(sum_over(sum, at.lanes) / (float)p.V + p.eps);
#pragma unroll
        for (int c = 0; c < 8; c++)
            x[c] *= r * w[c] * act(p.gate_kind, z[c]);
        if (t < p.rows)
            kda_row<A, 8>::put((A *)p.y + t * p.V + at.column, x);
    }
}

/* What a lane reads of a row of x, gate and dy. */
template <class A> struct rows {
    kda_row<A, 8> x, gate, dy;
};
/* Of `count` turns from row `start` on, as far as they come before end. */
template <class A, int count> __device__ __forceinline__ void fetch(rows<A> row[count], const arguments &a, const stand &at, int64_t start, int64_t end)
{
    const kda_gated_norm_problem &p = a.p;
#pragma unroll
    for (int i = 0; i < count; i++) {
        int64_t t = start + i * at.turn + at.row;
        row[i] = {};
        if (t < end) {
            row[i].x.fetch((const A *)p.x + t * p.V + at.column);
            row[i].dy.fetch((const A *)a.g.dy + t * p.V + at.column);
            if (p.gate)
                row[i].gate.fetch((const A *)p.gate + t * p.V + at.column);
        }
    }
}

/* With xh = x r, dn = dy act(z):  dweight = dn xh,  dz = dy xh weight act'(z),  dx = r (dn weight - xh mean(dn weight xh)) */
template <class A> __global__ void __launch_bounds__(THREADS, 2) backward(const __grid_constant__ arguments a)
{
    enum { AHEAD = 4 / sizeof(A) };
    KL_SHARED(memory);
    const kda_gated_norm_problem &p = a.p;
    stand at(p.V);
    kl_grid_release();
    int64_t begin = blockIdx.x * a.rows, end = begin + a.rows < p.rows ? begin + a.rows : p.rows;
    float w[8], dw[8] = {};
#pragma unroll
    for (int c = 0; c < 8; c++)
        w[c] = kda_weight(p.weight, at.column + c, p.weight_dtype);
    rows<A> next[AHEAD];
    fetch<A, AHEAD>(next, a, at, begin, end);
    for (int64_t start = begin; start < end; start += AHEAD * at.turn) {
        rows<A> here[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            here[i] = next[i];
        fetch<A, AHEAD>(next, a, at, start + AHEAD * at.turn, end);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int64_t t = start + i * at.turn + at.row;
            float x[8], z[8], dy[8], sum = 0.0f, dot = 0.0f;
            here[i].x.get(x);
            here[i].gate.get(z);
            here[i].dy.get(dy);
#pragma unroll
            for (int c = 0; c < 8; c++)
                sum += x[c] * x[c];
            float r = rsqrtf(sum_over(sum, at.lanes) / (float)p.V + p.eps);
#pragma unroll
            for (int c = 0; c < 8; c++) {
                x[c] *= r;
                float dn = dy[c] * act(p.gate_kind, z[c]);
                z[c] = dy[c] * x[c] * w[c] * act_derivative(p.gate_kind, z[c]);
                dw[c] += dn * x[c];
                dy[c] = dn * w[c];
                dot += dy[c] * x[c];
            }
            float mean = sum_over(dot, at.lanes) / (float)p.V;
#pragma unroll
            for (int c = 0; c < 8; c++)
                x[c] = r * (dy[c] - x[c] * mean);
            if (t < end) {
                if (a.g.dx)
                    kda_row<A, 8>::put((A *)a.g.dx + t * p.V + at.column, x);
                if (a.g.dgate)
                    kda_row<A, 8>::put((A *)a.g.dgate + t * p.V + at.column, z);
            }
        }
    }
    if (!a.share)
        return;
    /* The block's share of dweight: its rows' in order. */
    float *all = (float *)memory; /* [turn][V] */
#pragma unroll
    for (int c = 0; c < 8; c++)
        all[at.row * p.V + at.column + c] = dw[c];
    __syncthreads();
    for (int c = (int)threadIdx.x; c < p.V; c += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < at.turn; i++)
            sum += all[i * p.V + c];
        a.share[blockIdx.x * p.V + c] = sum;
    }
}

/* ---- any width ---- */

template <class A> __device__ __forceinline__ float inverse_rms(const kda_gated_norm_problem &p, int64_t t)
{
    float sum = 0.0f;
    for (int64_t c = kl_lane(); c < p.V; c += 32) {
        float x = kda_number(p.x, t * p.V + c, sizeof(A) == 2);
        sum += x * x;
    }
    return rsqrtf(kl_warp_sum(sum) / (float)p.V + p.eps);
}

template <class A> __global__ void __launch_bounds__(THREADS) forward_any(const __grid_constant__ arguments a)
{
    const kda_gated_norm_problem &p = a.p;
    constexpr bool bf16 = sizeof(A) == 2;
    int64_t t = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    if (t >= p.rows)
        return;
    float r = inverse_rms<A>(p, t);
    for (int64_t c = kl_lane(), i = t * p.V + c; c < p.V; c += 32, i += 32) {
        float gate = p.gate ? act(p.gate_kind, kda_number(p.gate, i, bf16)) : 1.0f;
        kda_put_number(p.y, i, bf16, kda_number(p.x, i, bf16) * r * kda_weight(p.weight, c, p.weight_dtype) * gate);
    }
}

/* One row: dgate, and dx after the shares of dweight have read dy, which dx may be. */
template <class A> __global__ void __launch_bounds__(THREADS) backward_any(const __grid_constant__ arguments a, bool last)
{
    const kda_gated_norm_problem &p = a.p;
    constexpr bool bf16 = sizeof(A) == 2;
    int64_t t = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    if (t >= p.rows)
        return;
    float r = inverse_rms<A>(p, t), dot = 0.0f;
    if (!last) {
        if (kl_lane() == 0)
            a.r[t] = r;
        return;
    }
    for (int64_t c = kl_lane(), i = t * p.V + c; c < p.V; c += 32, i += 32) {
        float xh = kda_number(p.x, i, bf16) * r, w = kda_weight(p.weight, c, p.weight_dtype), dy = kda_number(a.g.dy, i, bf16);
        float z = p.gate ? kda_number(p.gate, i, bf16) : 0.0f;
        dot += dy * act(p.gate_kind, z) * w * xh;
        if (a.g.dgate)
            kda_put_number(a.g.dgate, i, bf16, dy * xh * w * act_derivative(p.gate_kind, z));
    }
    float mean = kl_warp_sum(dot) / (float)p.V;
    for (int64_t c = kl_lane(), i = t * p.V + c; a.g.dx && c < p.V; c += 32, i += 32) {
        float xh = kda_number(p.x, i, bf16) * r, w = kda_weight(p.weight, c, p.weight_dtype), dy = kda_number(a.g.dy, i, bf16);
        float z = p.gate ? kda_number(p.gate, i, bf16) : 0.0f;
        kda_put_number(a.g.dx, i, bf16, r * (dy * act(p.gate_kind, z) * w - xh * mean));
    }
}

template <class A> __global__ void __launch_bounds__(THREADS) shares_any(const __grid_constant__ arguments a)
{
    const kda_gated_norm_problem &p = a.p;
    constexpr bool bf16 = sizeof(A) == 2;
    int64_t begin = blockIdx.x * a.rows, end = begin + a.rows < p.rows ? begin + a.rows : p.rows;
    for (int64_t c = threadIdx.x; c < p.V; c += THREADS) {
        float sum = 0.0f;
        for (int64_t t = begin; t < end; t++) {
            float z = p.gate ? kda_number(p.gate, t * p.V + c, bf16) : 0.0f;
            sum += kda_number(a.g.dy, t * p.V + c, bf16) * act(p.gate_kind, z) * kda_number(p.x, t * p.V + c, bf16) * a.r[t];
        }
        a.share[blockIdx.x * p.V + c] = sum;
    }
}

/* dweight += the shares: 32 columns a block, the shares of a column dealt to SUMMED threads, theirs added in order. */
__global__ void __launch_bounds__(32 * SUMMED) add_shares(const float *share, float *dweight, int V, int shares)
{
    KL_SHARED(memory);
    float *part = (float *)memory; /* [SUMMED][32] */
    kl_grid_wait();
    int c = (int)blockIdx.x * 32 + (int)threadIdx.x % 32, from = (int)threadIdx.x / 32;
    float sum = 0.0f;
#pragma unroll 8
    for (int s = from; c < V && s < shares; s += SUMMED)
        sum += share[(int64_t)s * V + c];
    part[threadIdx.x] = sum;
    __syncthreads();
    if (from > 0 || c >= V)
        return;
    for (int i = 1; i < SUMMED; i++)
        sum += part[i * 32 + threadIdx.x];
    dweight[c] += sum;
}

/* ---- launching ---- */

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t share_rows(int64_t rows) { return divided(rows > SHARES * LEAST_ROWS ? rows : SHARES * LEAST_ROWS, SHARES * LEAST_ROWS) * LEAST_ROWS; }

bool across_lanes(const kda_gated_norm_problem *p, const kda_gated_norm_grads &g)
{
    uintptr_t all = (uintptr_t)p->x | (uintptr_t)p->gate | (uintptr_t)p->y | (uintptr_t)g.dy | (uintptr_t)g.dx | (uintptr_t)g.dgate;
    return (p->V == 64 || p->V == 128 || p->V == 256) && all % 16 == 0;
}

kl_grid grid_of(int64_t blocks, size_t shared = 0)
{
    kl_grid grid;
    grid.x = blocks;
    grid.threads = THREADS;
    grid.shared = shared;
    return grid;
}

template <class A> kl_status run_forward(kl_ctx *ctx, const arguments &a)
{
    if (!across_lanes(&a.p, a.g))
        return kl_launch(ctx, "gated norm", grid_of(divided(a.p.rows, WARPS)), forward_any<A>, a);
    return kl_launch(ctx, "gated norm", grid_of(divided(a.p.rows, ROWS * THREADS * 8 / a.p.V)), forward<A>, a);
}

template <class A> kl_status run_backward(kl_ctx *ctx, const arguments &a)
{
    int64_t blocks = divided(a.p.rows, a.rows);
    if (across_lanes(&a.p, a.g)) {
        KL_TRY(kl_launch(ctx, "gated norm backward", grid_of(blocks, THREADS * 8 * sizeof(float)), backward<A>, a));
    } else {
        int64_t warps = divided(a.p.rows, WARPS);
        if (a.share) {
            KL_TRY(kl_launch(ctx, "gated norm backward", grid_of(warps), backward_any<A>, a, false));
            KL_TRY(kl_launch(ctx, "gated norm backward", grid_of(blocks), shares_any<A>, a));
        }
        KL_TRY(kl_launch(ctx, "gated norm backward", grid_of(warps), backward_any<A>, a, true));
    }
    if (!a.share || blocks == 0)
        return kl_ok();
    kl_grid sum = grid_of(divided(a.p.V, 32), 32 * SUMMED * sizeof(float));
    sum.threads = 32 * SUMMED;
    sum.overlap = true;
    return kl_launch(ctx, "gated norm dweight", sum, add_shares, (const float *)a.share, a.g.dweight, (int)a.p.V, (int)blocks);
}

struct pieces {
    float *share, *r;
};
pieces carve(kl_arena *arena, const kda_gated_norm_problem *p)
{
    pieces m;
    m.share = KL_TAKE(arena, float, divided(p->rows, share_rows(p->rows)) * p->V);
    m.r = KL_TAKE(arena, float, p->rows);
    return m;
}

} // namespace

size_t kda_cuda_gated_norm_workspace(const kda_gated_norm_problem *p, kl_pass pass)
{
    kl_arena arena = kl_arena_count();
    if (pass == KL_BACKWARD)
        carve(&arena, p);
    return arena.used;
}

kl_status kda_cuda_gated_norm_forward(kl_ctx *ctx, const kda_gated_norm_problem *p)
{
    arguments a = {};
    a.p = *p;
    return p->dtype == KL_BF16 ? run_forward<uint16_t>(ctx, a) : run_forward<float>(ctx, a);
}

kl_status kda_cuda_gated_norm_backward(kl_ctx *ctx, const kda_gated_norm_problem *p, const kda_gated_norm_grads *g)
{
    kl_arena arena = kl_arena_over(p->workspace, p->workspace_bytes);
    pieces m = carve(&arena, p);
    arguments a = {*p, *g, share_rows(p->rows), g->dweight ? m.share : NULL, m.r};
    return p->dtype == KL_BF16 ? run_backward<uint16_t>(ctx, a) : run_backward<float>(ctx, a);
}
