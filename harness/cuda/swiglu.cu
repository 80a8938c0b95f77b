/* The gated unit: y = silu(gate) (.) up, cell by cell. */
#include "harness/cuda/cells.cuh"

namespace {

enum { THREADS = 128 };

struct arguments {
    layers_swiglu p; /* in_stride resolved */
    layers_swiglu_grads g;
    int64_t across;  /* blocks along a row */
};

/* Where a thread stands: its row and its first column. */
struct stand {
    int64_t t, i;
    template <int N> static __device__ __forceinline__ stand of(const arguments &a)
    {
        return {blockIdx.x / a.across, (blockIdx.x % a.across * THREADS + threadIdx.x) * (int64_t)N};
    }
};

template <class A, int N> __global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ arguments a)
{
    const layers_swiglu &p = a.p;
    stand at = stand::of<N>(a);
    if (at.i >= p.I)
        return;
    float gate[N], up[N];
    auto x = fetch_cell<A, N>(p.gate, at.t * p.in_stride + at.i), z = fetch_cell<A, N>(p.up, at.t * p.in_stride + at.i);
    x.get(gate);
    z.get(up);
#pragma unroll
    for (int j = 0; j < N; j++)
        up[j] *= gate[j] * kda_sigmoid_fast(gate[j]);
    kda_row<A, N>::put((A *)p.y + at.t * p.I + at.i, up);
}

/* y = gate s up,  s = sigmoid(gate):  dup = dy gate s,  dgate = dy up (s + gate s (1 - s)) */
template <class A, int N> __global__ void __launch_bounds__(THREADS) backward(const __grid_constant__ arguments a)
{
    const layers_swiglu &p = a.p;
    stand at = stand::of<N>(a);
    if (at.i >= p.I)
        return;
    int64_t in = at.t * p.in_stride + at.i, out = at.t * p.I + at.i;
    float gate[N], up[N], dy[N], y[N];
    auto x = fetch_cell<A, N>(p.gate, in), z = fetch_cell<A, N>(p.up, in), e = fetch_cell<A, N>(a.g.dy, out);
    x.get(gate);
    z.get(up);
    e.get(dy);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float s = kda_sigmoid_fast(gate[j]), silu = gate[j] * s;
        y[j] = silu * up[j];
        gate[j] = dy[j] * up[j] * (s + silu * (1.0f - s));
        up[j] = dy[j] * silu;
    }
    kda_row<A, N>::put((A *)a.g.dgate + in, gate);
    kda_row<A, N>::put((A *)a.g.dup + in, up);
    if (p.y)
        kda_row<A, N>::put((A *)p.y + out, y);
}

template <class A, int N> kl_status run(kl_ctx *ctx, arguments &a)
{
    a.across = divided(a.p.I, THREADS * N);
    kl_grid grid = grid_of(a.p.T * a.across, THREADS);
    return a.g.dy ? kl_launch(ctx, "swiglu backward", grid, backward<A, N>, a) : kl_launch(ctx, "swiglu", grid, forward<A, N>, a);
}

kl_status run_any(kl_ctx *ctx, const layers_swiglu *p, const layers_swiglu_grads &g)
{
    arguments a = {};
    a.p = *p;
    a.g = g;
    a.p.in_stride = stride_or(p->in_stride, p->I);
    uintptr_t at = (uintptr_t)p->gate | (uintptr_t)p->up | (uintptr_t)p->y | (uintptr_t)g.dy | (uintptr_t)g.dgate | (uintptr_t)g.dup;
    bool cells = in_cells(p->I, a.p.in_stride, at);
    if (p->dtype == KL_BF16)
        return cells ? run<uint16_t, CELL>(ctx, a) : run<uint16_t, 1>(ctx, a);
    return cells ? run<float, CELL>(ctx, a) : run<float, 1>(ctx, a);
}

} // namespace

kl_status cuda_swiglu(kl_ctx *ctx, const layers_swiglu *p) { return run_any(ctx, p, {}); }
kl_status cuda_swiglu_backward(kl_ctx *ctx, const layers_swiglu *p, const layers_swiglu_grads *g) { return run_any(ctx, p, *g); }
