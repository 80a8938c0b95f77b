/* RMSNorm with the residual sum before it. A warp has a row in registers, cells of 8 columns dealt to its lanes: each tensor
 * passes by once. Backward, blocks own shares of the rows, cut the same way on every device, and keep their share of dweight
 * in registers until its end. */
#include "harness/cuda/cells.cuh"

namespace {

/* SHARES: of the rows backward; with 4 warps each they fill an H100 twice over. */
enum { WARPS = 4, THREADS = 32 * WARPS, SHARES = 264, WIDEST = 9 * 32 * CELL };
/* Rows ahead of a warp, backward, and the shared memory that two blocks of a multiprocessor may have for them. */
enum { MOST_STAGES = 8, BARRIERS = WARPS * MOST_STAGES * (int)sizeof(uint64_t), ROOM = 110 * 1024 };

struct arguments {
    layers_rmsnorm p; /* strides resolved */
    layers_rmsnorm_grads g;
    float *share;     /* [shares,D] of dweight */
    float *r;         /* [T], where rows do not come in cells */
    int stages;
};

template <class X, class Y, int CELLS> __global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ arguments a)
{
    const layers_rmsnorm &p = a.p;
    int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, row = t * p.x_stride;
    if (t >= p.T)
        return;
    kda_row<X, CELL> x[CELLS], add[CELLS];
#pragma unroll
    for (int c = 0; c < CELLS; c++) {
        int d = (c * 32 + kl_lane()) * CELL;
        x[c] = {};
        add[c] = {};
        if (d >= p.D)
            continue;
        x[c].fetch((const X *)p.x + row + d);
        if (p.add)
            add[c].fetch((const X *)p.add + row + d);
    }
    float v[CELLS][CELL], total = 0.0f;
#pragma unroll
    for (int c = 0; c < CELLS; c++) {
        int d = (c * 32 + kl_lane()) * CELL;
        float more[CELL];
        x[c].get(v[c]);
        add[c].get(more);
#pragma unroll
        for (int i = 0; i < CELL; i++) {
            v[c][i] += more[i];
            total += v[c][i] * v[c][i];
        }
        if (p.add && d < p.D)
            kda_row<X, CELL>::put((X *)p.sum + row + d, v[c]);
    }
    float r = rsqrtf(kl_warp_sum(total) / (float)p.D + p.eps);
#pragma unroll
    for (int c = 0; c < CELLS; c++) {
        int d = (c * 32 + kl_lane()) * CELL;
        float w[CELL];
        if (d >= p.D)
            continue;
        get_weights(w, p.weight, d, p.weight_dtype);
#pragma unroll
        for (int i = 0; i < CELL; i++)
            v[c][i] *= r * w[i];
        kda_row<Y, CELL>::put((Y *)p.y + t * p.y_stride + d, v[c]);
    }
}

/* The rows that a warp of the backward pass has next, brought into shared memory by bulk copies, `stages` of them ahead. */
template <class X, class Y> struct ring {
    const arguments &a;
    uint64_t *full; /* [stages], the warp's own */
    char *memory;   /* [stages][bytes]: s, dy, dsum of a row */
    int64_t first, end;

    static __host__ __device__ int64_t bytes(int64_t D) { return D * (int64_t)(2 * sizeof(X) + sizeof(Y)); }
    __device__ __forceinline__ X *s(int i) const { return (X *)(memory + i % a.stages * bytes(a.p.D)); }
    __device__ __forceinline__ X *dsum(int i) const { return s(i) + a.p.D; }
    __device__ __forceinline__ Y *dy(int i) const { return (Y *)(s(i) + 2 * a.p.D); }
    __device__ __forceinline__ int64_t row(int i) const { return first + (int64_t)i * WARPS; }
    __device__ __forceinline__ void bring(int i) const
    {
        int64_t t = row(i);
        int x = (int)(a.p.D * sizeof(X)), y = (int)(a.p.D * sizeof(Y));
        uint64_t *bar = full + i % a.stages;
        if (t >= end)
            return;
        kl_mbar_expect(bar, (a.g.dsum ? 2 * x : x) + y);
        kl_bulk_load(s(i), (const X *)a.p.sum + t * a.p.x_stride, x, bar);
        kl_bulk_load(dy(i), (const Y *)a.g.dy + t * a.p.y_stride, y, bar);
        if (a.g.dsum)
            kl_bulk_load(dsum(i), (const X *)a.g.dsum + t * a.p.x_stride, x, bar);
        kl_bulk_issued(bar);
    }
    __device__ __forceinline__ void wait(int i) const { kl_mbar_wait(full + i % a.stages, i / a.stages % 2); }
};

/* y = s r (.) w,  r = (mean s^2 + eps)^-1/2:  dweight += dy s r,  ds = dy (.) w r - s r^3 mean(dy w s) + dsum */
template <class X, class Y, int CELLS> __global__ void __launch_bounds__(THREADS) backward(const __grid_constant__ arguments a)
{
    KL_SHARED(memory);
    const layers_rmsnorm &p = a.p;
    int warp = (int)threadIdx.x / 32, lane = kl_lane();
    kl_grid_release();
    int64_t begin = p.T * blockIdx.x / gridDim.x, end = p.T * (blockIdx.x + 1) / gridDim.x;
    ring<X, Y> rows = {a, (uint64_t *)memory + warp * a.stages, (char *)memory + BARRIERS + warp * a.stages * ring<X, Y>::bytes(p.D), begin + warp, end};
    if (lane == 0) {
        for (int i = 0; i < a.stages; i++)
            kl_mbar_init(rows.full + i, 1);
        kl_mbar_init_fence();
        for (int i = 0; i < a.stages; i++)
            rows.bring(i);
    }
    __syncwarp();
    /* Beyond D a lane reads its row's first cell, for nothing: no branch keeps the loads of a row apart. */
    float w[CELLS][CELL], dw[CELLS][CELL] = {};
    int at[CELLS];
#pragma unroll
    for (int c = 0; c < CELLS; c++) {
        int d = (c * 32 + lane) * CELL;
        at[c] = d < p.D ? d : 0;
        get_weights(w[c], p.weight, at[c], p.weight_dtype);
    }
    for (int step = 0; rows.row(step) < end; step++) {
        const X *s = rows.s(step), *dsum = rows.dsum(step);
        const Y *dy = rows.dy(step);
        float squares = 0.0f, dot = 0.0f;
        rows.wait(step);
#pragma unroll
        for (int c = 0; c < CELLS; c++) {
            bool there = (c * 32 + lane) * CELL < p.D;
            float x[CELL], e[CELL], part = 0.0f, along = 0.0f;
            fetch_cell<X>(s, at[c]).get(x);
            fetch_cell<Y>(dy, at[c]).get(e);
#pragma unroll
            for (int i = 0; i < CELL; i++) {
                part += x[i] * x[i];
                along += e[i] * w[c][i] * x[i];
            }
            squares += there ? part : 0.0f;
            dot += there ? along : 0.0f;
        }
        float r = rsqrtf(kl_warp_sum(squares) / (float)p.D + p.eps), back = kl_warp_sum(dot) / (float)p.D * r * r * r;
#pragma unroll
        for (int c = 0; c < CELLS; c++) {
            int d = (c * 32 + lane) * CELL;
            float x[CELL], e[CELL], more[CELL] = {};
            fetch_cell<X>(s, at[c]).get(x);
            fetch_cell<Y>(dy, at[c]).get(e);
            if (a.g.dsum)
                fetch_cell<X>(dsum, at[c]).get(more);
#pragma unroll
            for (int i = 0; i < CELL; i++) {
                dw[c][i] += e[i] * x[i] * r;
                x[i] = e[i] * w[c][i] * r - x[i] * back + more[i];
            }
            if (a.g.dx && d < p.D)
                kda_row<X, CELL>::put((X *)a.g.dx + rows.row(step) * p.x_stride + d, x);
        }
        __syncwarp();
        if (lane == 0)
            rows.bring(step + a.stages);
    }
    if (!a.share)
        return;
    /* The block's share: its warps' sums in order, where the rows were. Element i of a lane's cell c lies at [c][i][lane]. */
    float *all = (float *)(memory + BARRIERS); /* [WARPS][CELLS][CELL][32] */
    __syncthreads();
#pragma unroll
    for (int c = 0; c < CELLS; c++)
#pragma unroll
        for (int i = 0; i < CELL; i++)
            all[((warp * CELLS + c) * CELL + i) * 32 + lane] = dw[c][i];
    __syncthreads();
    for (int j = (int)threadIdx.x; j < CELLS * CELL * 32; j += THREADS) {
        int d = (j / (CELL * 32) * 32 + j % 32) * CELL + j / 32 % CELL;
        float sum = all[j];
        for (int w = 1; w < WARPS; w++)
            sum += all[w * CELLS * CELL * 32 + j];
        if (d < p.D)
            a.share[blockIdx.x * p.D + d] = sum;
    }
}

/* ---- rows of any width ---- */

template <class X> __device__ __forceinline__ float sum_at(const layers_rmsnorm &p, int64_t i)
{
    return kda_number(p.x, i, sizeof(X) == 2) + (p.add ? kda_number(p.add, i, sizeof(X) == 2) : 0.0f);
}

template <class X, class Y> __global__ void __launch_bounds__(THREADS) forward_any(const __grid_constant__ arguments a)
{
    const layers_rmsnorm &p = a.p;
    int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, row = t * p.x_stride;
    if (t >= p.T)
        return;
    float squares = 0.0f;
    for (int64_t d = kl_lane(); d < p.D; d += 32) {
        float x = sum_at<X>(p, row + d);
        squares += x * x;
    }
    float r = rsqrtf(kl_warp_sum(squares) / (float)p.D + p.eps);
    for (int64_t d = kl_lane(); d < p.D; d += 32) {
        float x = sum_at<X>(p, row + d);
        if (p.add)
            kda_put_number(p.sum, row + d, sizeof(X) == 2, x);
        kda_put_number(p.y, t * p.y_stride + d, sizeof(Y) == 2, x * r * kda_weight(p.weight, d, p.weight_dtype));
    }
}

template <class X, class Y> __global__ void __launch_bounds__(THREADS) backward_any(const __grid_constant__ arguments a)
{
    const layers_rmsnorm &p = a.p;
    int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, row = t * p.x_stride;
    if (t >= p.T)
        return;
    float squares = 0.0f, dot = 0.0f;
    for (int64_t d = kl_lane(); d < p.D; d += 32) {
        float x = kda_number(p.sum, row + d, sizeof(X) == 2);
        squares += x * x;
        dot += kda_number(a.g.dy, t * p.y_stride + d, sizeof(Y) == 2) * kda_weight(p.weight, d, p.weight_dtype) * x;
    }
    float r = rsqrtf(kl_warp_sum(squares) / (float)p.D + p.eps), back = kl_warp_sum(dot) / (float)p.D * r * r * r;
    if (kl_lane() == 0)
        a.r[t] = r;
    for (int64_t d = kl_lane(); a.g.dx && d < p.D; d += 32) {
        float e = kda_number(a.g.dy, t * p.y_stride + d, sizeof(Y) == 2), more = a.g.dsum ? kda_number(a.g.dsum, row + d, sizeof(X) == 2) : 0.0f;
        kda_put_number(a.g.dx, row + d, sizeof(X) == 2,
                       e * kda_weight(p.weight, d, p.weight_dtype) * r - kda_number(p.sum, row + d, sizeof(X) == 2) * back + more);
    }
}

template <class X, class Y> __global__ void __launch_bounds__(THREADS) shares_any(const __grid_constant__ arguments a)
{
    const layers_rmsnorm &p = a.p;
    int64_t begin = p.T * blockIdx.x / gridDim.x, end = p.T * (blockIdx.x + 1) / gridDim.x;
    for (int64_t d = threadIdx.x; d < p.D; d += THREADS) {
        float sum = 0.0f;
        for (int64_t t = begin; t < end; t++)
            sum += kda_number(a.g.dy, t * p.y_stride + d, sizeof(Y) == 2) * kda_number(p.sum, t * p.x_stride + d, sizeof(X) == 2) * a.r[t];
        a.share[blockIdx.x * p.D + d] = sum;
    }
}

/* dweight += the shares: 32 columns a block, the shares of a column dealt to 32 warps, theirs added in order. All loads of a
 * thread are under way together. */
__global__ void __launch_bounds__(1024) add_shares(const float *share, float *dweight, int64_t D, int shares)
{
    enum { EACH = (SHARES + 31) / 32 };
    KL_SHARED(memory);
    float *part = (float *)memory, x[EACH], sum = 0.0f; /* [32][32] */
    int64_t d = (int64_t)blockIdx.x * 32 + kl_lane();
    int warp = (int)threadIdx.x / 32;
    kl_grid_wait();
#pragma unroll
    for (int i = 0; i < EACH; i++)
        x[i] = d < D && i * 32 + warp < shares ? share[(i * 32 + warp) * D + d] : 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        sum += x[i];
    part[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || d >= D)
        return;
#pragma unroll
    for (int i = 1; i < 32; i++)
        sum += part[i * 32 + threadIdx.x];
    dweight[d] += sum;
}

/* ---- launching ---- */

int64_t shares_of(int64_t T) { return divided(T < SHARES * WARPS ? T : SHARES * WARPS, WARPS); }

bool whole_cells(const arguments &a)
{
    const layers_rmsnorm &p = a.p;
    uintptr_t at = (uintptr_t)p.x | (uintptr_t)p.add | (uintptr_t)p.sum | (uintptr_t)p.weight | (uintptr_t)p.y | (uintptr_t)a.g.dy | (uintptr_t)a.g.dsum | (uintptr_t)a.g.dx;
    return p.D <= WIDEST && p.weight_dtype != KL_F16 && in_cells(p.D, p.x_stride | p.y_stride, at);
}

template <class X, class Y> kl_status run_forward(kl_ctx *ctx, const arguments &a)
{
    kl_grid grid = grid_of(divided(a.p.T, WARPS), THREADS);
    if (!whole_cells(a))
        return kl_launch(ctx, "rmsnorm", grid, forward_any<X, Y>, a);
    int64_t cells = divided(a.p.D, 32 * CELL);
    return kl_launch(ctx, "rmsnorm", grid, cells <= 2 ? forward<X, Y, 2> : cells <= 5 ? forward<X, Y, 5> : forward<X, Y, 9>, a);
}

template <class X, class Y> kl_status run_backward(kl_ctx *ctx, arguments &a)
{
    kl_grid grid = grid_of(shares_of(a.p.T), THREADS), none = grid;
    bool fits = whole_cells(a);
    int64_t cells = divided(a.p.D, 32 * CELL);
    if (fits) {
        int64_t stages = ROOM / (WARPS * ring<X, Y>::bytes(a.p.D)), sums = (cells <= 2 ? 2 : cells <= 5 ? 5 : 9) * CELL * 32 * (int64_t)sizeof(float);
        a.stages = stages < 2 ? 2 : stages > MOST_STAGES ? (int)MOST_STAGES : (int)stages;
        int64_t rows = a.stages * ring<X, Y>::bytes(a.p.D);
        grid.shared = (size_t)(BARRIERS + WARPS * (rows > sums ? rows : sums));
        fits = grid.shared <= ctx->shared_most;
    }
    if (fits) {
        KL_TRY(kl_launch(ctx, "rmsnorm backward", grid, cells <= 2 ? backward<X, Y, 2> : cells <= 5 ? backward<X, Y, 5> : backward<X, Y, 9>, a));
    } else {
        KL_TRY(kl_launch(ctx, "rmsnorm backward", grid_of(divided(a.p.T, WARPS), THREADS), backward_any<X, Y>, a));
        if (a.share)
            KL_TRY(kl_launch(ctx, "rmsnorm backward", none, shares_any<X, Y>, a));
    }
    if (!a.share || a.p.T == 0)
        return kl_ok();
    kl_grid add = grid_of(divided(a.p.D, 32), 1024, 1024 * sizeof(float));
    add.overlap = true;
    return kl_launch(ctx, "rmsnorm dweight", add, add_shares, (const float *)a.share, a.g.dweight, a.p.D, (int)grid.x);
}

arguments resolved(const layers_rmsnorm *p)
{
    arguments a = {};
    a.p = *p;
    a.p.x_stride = stride_or(p->x_stride, p->D);
    a.p.y_stride = stride_or(p->y_stride, p->D);
    return a;
}

void carve(kl_arena *arena, const layers_rmsnorm *p, arguments *a)
{
    a->share = KL_TAKE(arena, float, shares_of(p->T) * p->D);
    a->r = KL_TAKE(arena, float, p->T);
}

} // namespace

size_t cuda_rmsnorm_workspace(const layers_rmsnorm *p, kl_pass pass)
{
    kl_arena arena = kl_arena_count();
    arguments a;
    if (pass == KL_BACKWARD)
        carve(&arena, p, &a);
    return arena.used;
}

kl_status cuda_rmsnorm(kl_ctx *ctx, const layers_rmsnorm *p)
{
    arguments a = resolved(p);
    if (p->x_dtype == KL_F32)
        return p->y_dtype == KL_F32 ? run_forward<float, float>(ctx, a) : run_forward<float, uint16_t>(ctx, a);
    return run_forward<uint16_t, uint16_t>(ctx, a);
}

kl_status cuda_rmsnorm_backward(kl_ctx *ctx, const layers_rmsnorm *p, const layers_rmsnorm_grads *g, void *workspace, size_t bytes)
{
    arguments a = resolved(p);
    kl_arena arena = kl_arena_over(workspace, bytes);
    carve(&arena, p, &a);
    a.g = *g;
    a.p.sum = p->add ? p->sum : (void *)p->x;
    if (!g->dweight)
        a.share = NULL;
    if (p->x_dtype == KL_F32)
        return p->y_dtype == KL_F32 ? run_backward<float, float>(ctx, a) : run_backward<float, uint16_t>(ctx, a);
    return run_backward<uint16_t, uint16_t>(ctx, a);
}
