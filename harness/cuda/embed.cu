/* The embedding: rows gathered; backward, tokens sorted by their id, so that a row's gradients are added in the order of the
 * tokens, without atomics.
 *
 * A warp has a run of sorted tokens and 256 columns. Ids that lie within its run it adds to dweight; of an id that reaches
 * across runs it leaves the run's part, and the run where the id begins adds the parts of those behind it in order. */
#include "common/gpu.h"
#include "harness/cuda/cells.cuh"

namespace {

enum { WARPS = 4, THREADS = 32 * WARPS, BATCH = 9, RUN = 8, COLUMNS = 32 * CELL };

struct arguments {
    layers_embed p;
    layers_embed_grads g;
    uint32_t *key, *sorted; /* [T]: the id, or vocab where there is none */
    int32_t *token, *order; /* [T] */
    float *part;            /* [2][runs][D]: of the id that reaches into a run, of the one that reaches out of it */
    int64_t runs, across;
};

template <class W, class Y> __global__ void __launch_bounds__(THREADS) gather(const __grid_constant__ layers_embed p)
{
    int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (t >= p.T)
        return;
    int id = p.ids[t];
    bool there = id >= 0 && id < p.vocab;
    for (int64_t base = 0; base < p.D; base += BATCH * COLUMNS) {
        kda_row<W, CELL> row[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int64_t d = base + (i * 32 + kl_lane()) * CELL;
            row[i] = {};
            if (there && d < p.D)
                row[i].fetch((const W *)p.weight + id * p.D + d);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int64_t d = base + (i * 32 + kl_lane()) * CELL;
            float x[CELL];
            row[i].get(x);
#pragma unroll
            for (int j = 0; j < CELL; j++)
                x[j] = there ? x[j] : __uint_as_float(0x7fc00000u);
            if (d < p.D)
                kda_row<Y, CELL>::put((Y *)p.y + t * p.D + d, x);
        }
    }
}

__global__ void __launch_bounds__(THREADS) gather_any(const __grid_constant__ layers_embed p)
{
    int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (t >= p.T)
        return;
    int id = p.ids[t];
    for (int64_t d = kl_lane(); d < p.D; d += 32)
        kda_put_number(p.y, t * p.D + d, p.dtype == KL_BF16,
                       id >= 0 && id < p.vocab ? kda_weight(p.weight, id * p.D + d, p.weight_dtype) : __uint_as_float(0x7fc00000u));
}

__global__ void __launch_bounds__(THREADS) name_tokens(const __grid_constant__ arguments a)
{
    int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (t >= a.p.T)
        return;
    int id = a.p.ids[t];
    a.key[t] = id >= 0 && id < a.p.vocab ? (uint32_t)id : (uint32_t)a.p.vocab;
    a.token[t] = (int32_t)t;
}

/* N columns of a lane. */
template <int N> __device__ __forceinline__ void add_to(float *p, const float x[N])
{
    float y[N];
    fetch_cell<float, N>(p, 0).get(y);
#pragma unroll
    for (int i = 0; i < N; i++)
        y[i] += x[i];
    kda_row<float, N>::put(p, y);
}

template <class Y, int N> __global__ void __launch_bounds__(THREADS) add_runs(const __grid_constant__ arguments a)
{
    int64_t warp = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, run = warp / a.across, d = (warp % a.across * 32 + kl_lane()) * N;
    int64_t first = run * RUN, last = first + RUN < a.p.T ? first + RUN : a.p.T, vocab = a.p.vocab, D = a.p.D;
    kl_grid_release();
    if (run >= a.runs || d >= D)
        return;
    uint32_t id[RUN];
    kda_row<Y, N> dy[RUN];
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        id[i] = first + i < last ? a.sorted[first + i] : (uint32_t)vocab;
        dy[i] = {};
        if (id[i] < vocab)
            dy[i].fetch((const Y *)a.g.dy + a.order[first + i] * D + d);
    }
    bool reaches_in = first > 0 && a.sorted[first - 1] == id[0], reaches_out = last < a.p.T && a.sorted[last] == id[RUN - 1];
    float sum[N] = {};
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        float x[N];
        dy[i].get(x);
#pragma unroll
        for (int j = 0; j < N; j++)
            sum[j] += x[j];
        bool ends = i + 1 == RUN || id[i + 1] != id[i];
        if (!ends || id[i] >= vocab)
            continue;
        if (reaches_in)
            kda_row<float, N>::put(a.part + run * D + d, sum);
        else if (i + 1 == RUN && reaches_out)
            kda_row<float, N>::put(a.part + (a.runs + run) * D + d, sum);
        else
            add_to<N>(a.g.dweight + id[i] * D + d, sum);
        reaches_in = false;
#pragma unroll
        for (int j = 0; j < N; j++)
            sum[j] = 0.0f;
    }
}

/* The run where an id begins that reaches out of it. */
template <int N> __global__ void __launch_bounds__(THREADS) join_runs(const __grid_constant__ arguments a)
{
    int64_t warp = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, run = warp / a.across, d = (warp % a.across * 32 + kl_lane()) * N, D = a.p.D;
    int64_t next = (run + 1) * RUN;
    kl_grid_wait();
    if (next >= a.p.T || d >= D)
        return;
    uint32_t id = a.sorted[next];
    bool begins_here = a.sorted[next - 1] == id && (a.sorted[run * RUN] != id || run == 0 || a.sorted[run * RUN - 1] != id);
    if (!begins_here || id >= a.p.vocab)
        return;
    float sum[N];
    fetch_cell<float, N>(a.part, (a.runs + run) * D + d).get(sum);
#pragma unroll 8
    for (int64_t r = run + 1; r < a.runs && a.sorted[r * RUN] == id; r++) {
        float x[N];
        fetch_cell<float, N>(a.part, r * D + d).get(x);
#pragma unroll
        for (int j = 0; j < N; j++)
            sum[j] += x[j];
    }
    add_to<N>(a.g.dweight + id * D + d, sum);
}

/* ---- launching ---- */

template <class Y, int N> kl_status run_backward(kl_ctx *ctx, arguments &a)
{
    a.across = divided(a.p.D, 32 * N);
    kl_grid grid = grid_of(divided(a.runs * a.across, WARPS), THREADS);
    KL_TRY(kl_launch(ctx, "embed backward", grid, add_runs<Y, N>, a));
    grid.overlap = true;
    return kl_launch(ctx, "embed backward", grid, join_runs<N>, a);
}

int bits_of(int64_t vocab)
{
    int bits = 1;
    while (vocab >> bits)
        bits++;
    return bits;
}

void *carve(kl_arena *arena, const layers_embed *p, arguments *a, size_t sort)
{
    a->runs = divided(p->T, RUN);
    a->key = KL_TAKE(arena, uint32_t, p->T);
    a->sorted = KL_TAKE(arena, uint32_t, p->T);
    a->token = KL_TAKE(arena, int32_t, p->T);
    a->order = KL_TAKE(arena, int32_t, p->T);
    a->part = KL_TAKE(arena, float, 2 * a->runs * p->D);
    return KL_TAKE(arena, char, sort);
}

} // namespace

size_t cuda_embed_workspace(const kl_ctx *ctx, const layers_embed *p, kl_pass pass)
{
    kl_arena arena = kl_arena_count();
    arguments a;
    if (pass == KL_BACKWARD)
        carve(&arena, p, &a, kl_gpu_sort_workspace(ctx, p->T, bits_of(p->vocab)));
    return arena.used;
}

kl_status cuda_embed(kl_ctx *ctx, const layers_embed *p)
{
    kl_grid grid = grid_of(divided(p->T, WARPS), THREADS);
    if (p->weight_dtype == KL_F16 || !in_cells(p->D, 0, (uintptr_t)p->weight | (uintptr_t)p->y))
        return kl_launch(ctx, "embed", grid, gather_any, *p);
    if (p->weight_dtype == KL_BF16)
        return kl_launch(ctx, "embed", grid, p->dtype == KL_BF16 ? gather<uint16_t, uint16_t> : gather<uint16_t, float>, *p);
    return kl_launch(ctx, "embed", grid, p->dtype == KL_BF16 ? gather<float, uint16_t> : gather<float, float>, *p);
}

kl_status cuda_embed_backward(kl_ctx *ctx, const layers_embed *p, const layers_embed_grads *g, void *workspace, size_t bytes)
{
    if (p->T == 0 || p->D == 0)
        return kl_ok();
    arguments a = {};
    a.p = *p;
    a.g = *g;
    int bits = bits_of(p->vocab);
    size_t sort = kl_gpu_sort_workspace(ctx, p->T, bits);
    kl_arena arena = kl_arena_over(workspace, bytes);
    void *memory = carve(&arena, p, &a, sort);
    KL_TRY(kl_launch(ctx, "embed tokens", grid_of(divided(p->T, THREADS), THREADS), name_tokens, a));
    KL_TRY(kl_gpu_sort(ctx, p->T, bits, a.key, a.sorted, a.token, a.order, memory, sort));
    bool cells = in_cells(p->D, 0, (uintptr_t)g->dy | (uintptr_t)g->dweight);
    if (p->dtype == KL_BF16)
        return cells ? run_backward<uint16_t, CELL>(ctx, a) : run_backward<uint16_t, 1>(ctx, a);
    return cells ? run_backward<float, CELL>(ctx, a) : run_backward<float, 1>(ctx, a);
}
