/* Muon: momentum, its direction made orthogonal by Newton and Schulz in bfloat16 products, and the step. The products run on
 * the smaller side: with rows <= columns X is multiplied from the left, otherwise from the right. */
#include <cmath>

#include "common/gpu.h"
#include "harness/cuda/optimizer.cuh"

namespace {

enum { THREADS = 256 };

template <class G, int N> __global__ void __launch_bounds__(THREADS) gather_momentum(const __grid_constant__ layers_muon p, int64_t n, uint16_t *x)
{
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * N;
    if (i >= n)
        return;
    auto fetched_g = fetch_cell<G, N>(p.g, i);
    auto fetched_m = fetch_cell<float, N>(p.m, i);
    float scale = kl_clip(p.sumsq, p.clip), momentum = (float)p.momentum, g[N], m[N];
    fetched_g.get(g);
    fetched_m.get(m);
#pragma unroll
    for (int j = 0; j < N; j++) {
        g[j] *= scale;
        m[j] = momentum * m[j] + g[j];
        g[j] += momentum * m[j];
    }
    kda_row<float, N>::put(p.m + i, m);
    kda_row<uint16_t, N>::put(x + i, g);
}

/* X <- X / |X|, each matrix by its own norm; of nothing comes nothing. */
template <int N> __global__ void __launch_bounds__(THREADS) normalise(uint16_t *x, int64_t matrix, int64_t across, const double *sumsq)
{
    int64_t which = blockIdx.x / across, at = (blockIdx.x % across * THREADS + threadIdx.x) * (int64_t)N, i = which * matrix + at;
    if (at >= matrix)
        return;
    float squares = (float)sumsq[which], scale = squares > 0.0f ? rsqrtf(squares) : 0.0f, v[N];
    fetch_cell<uint16_t, N>(x, i).get(v);
#pragma unroll
    for (int j = 0; j < N; j++)
        v[j] *= scale;
    kda_row<uint16_t, N>::put(x + i, v);
}

template <int N> __global__ void __launch_bounds__(THREADS) take_step(const __grid_constant__ layers_muon p, int64_t n, const uint16_t *x, float rate, float keep)
{
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * N;
    if (i >= n)
        return;
    auto fetched_x = fetch_cell<uint16_t, N>(x, i);
    auto fetched_w = fetch_cell<float, N>(p.w, i);
    float v[N], w[N];
    fetched_x.get(v);
    fetched_w.get(w);
#pragma unroll
    for (int j = 0; j < N; j++)
        w[j] = keep * w[j] - rate * v[j];
    kda_row<float, N>::put(p.w + i, w);
    if (p.copy)
        kda_row<uint16_t, N>::put(p.copy + i, w);
}

struct pieces {
    uint16_t *x, *next; /* [count,rows,columns] */
    uint16_t *a, *b;    /* [count,side,side] */
    double *sumsq;      /* [count] */
    void *sums, *product;
};

layers_sumsq squares_of(const layers_muon *p, const pieces &m, int64_t which)
{
    layers_sumsq s = {};
    s.n = p->rows * p->columns;
    s.dtype = KL_BF16;
    s.x = m.x + which * s.n;
    s.sum = m.sumsq + which;
    return s;
}

int64_t count_of(const layers_muon *p) { return p->count ? p->count : 1; }
int64_t side_of(const layers_muon *p) { return p->rows < p->columns ? p->rows : p->columns; }

pieces carve(kl_arena *arena, const layers_muon *p)
{
    pieces m = {};
    int64_t count = count_of(p), n = count * p->rows * p->columns, side = side_of(p);
    m.x = KL_TAKE(arena, uint16_t, n);
    m.next = KL_TAKE(arena, uint16_t, n);
    m.a = KL_TAKE(arena, uint16_t, count * side * side);
    m.b = KL_TAKE(arena, uint16_t, count * side * side);
    m.sumsq = KL_TAKE(arena, double, count);
    layers_sumsq s = squares_of(p, m, 0);
    m.sums = KL_TAKE(arena, char, cuda_sumsq_workspace(&s));
    m.product = KL_TAKE(arena, char, KL_PRODUCT_WORKSPACE);
    return m;
}

/* A = X X^T,  B = b A + c A A,  X <- a X + B X;  of tall matrices A = X^T X and X <- a X + X B. */
kl_status orthogonalise(kl_ctx *ctx, const layers_muon *p, pieces *m)
{
    const float a = (float)LAYERS_MUON_A, b = (float)LAYERS_MUON_B, c = (float)LAYERS_MUON_C;
    bool tall = p->rows > p->columns;
    int64_t side = side_of(p), other = tall ? p->rows : p->columns;
    kl_product gram = {}, square = {}, turn = {};
    gram.M = gram.N = side, gram.K = other;
    gram.a_stride = gram.b_stride = p->columns, gram.y_stride = side;
    gram.a_transposed = tall, gram.b_transposed = !tall;
    square.M = square.N = square.K = square.a_stride = square.b_stride = square.y_stride = side;
    turn.M = p->rows, turn.N = p->columns, turn.K = side;
    turn.a_stride = tall ? p->columns : side, turn.b_stride = tall ? side : p->columns, turn.y_stride = p->columns;
    gram.count = square.count = turn.count = count_of(p);
    gram.a_next = gram.b_next = turn.y_next = p->rows * p->columns;
    gram.y_next = square.a_next = square.b_next = square.y_next = side * side;
    turn.a_next = tall ? gram.a_next : gram.y_next, turn.b_next = tall ? gram.y_next : gram.a_next;
    gram.y_dtype = square.y_dtype = turn.y_dtype = KL_BF16;
    for (int i = 0; i < (p->steps ? p->steps : LAYERS_MUON_STEPS); i++) {
        KL_TRY(kl_gpu_product(ctx, &gram, 1.0f, m->x, m->x, 0.0f, NULL, m->a, m->product, KL_PRODUCT_WORKSPACE));
        KL_TRY(kl_gpu_product(ctx, &square, c, m->a, m->a, b, m->a, m->b, m->product, KL_PRODUCT_WORKSPACE));
        KL_TRY(kl_gpu_product(ctx, &turn, 1.0f, tall ? m->x : m->b, tall ? m->b : m->x, a, m->x, m->next, m->product, KL_PRODUCT_WORKSPACE));
        uint16_t *spent = m->x;
        m->x = m->next;
        m->next = spent;
    }
    return kl_ok();
}

} // namespace

size_t cuda_muon_workspace(const layers_muon *p)
{
    kl_arena arena = kl_arena_count();
    carve(&arena, p);
    return arena.used;
}

kl_status cuda_muon(kl_ctx *ctx, const layers_muon *p, void *workspace, size_t bytes)
{
    kl_arena arena = kl_arena_over(workspace, bytes);
    pieces m = carve(&arena, p);
    int64_t count = count_of(p), matrix = p->rows * p->columns, n = count * matrix;
    bool cells = in_cells(matrix, 0, (uintptr_t)p->w | (uintptr_t)p->m | (uintptr_t)p->g | (uintptr_t)p->copy);
    kl_grid grid = grid_of(divided(n, THREADS * (cells ? CELL : 1)), THREADS);
    if (p->g_dtype == KL_BF16)
        KL_TRY(kl_launch(ctx, "muon", grid, cells ? gather_momentum<uint16_t, CELL> : gather_momentum<uint16_t, 1>, *p, n, m.x));
    else
        KL_TRY(kl_launch(ctx, "muon", grid, cells ? gather_momentum<float, CELL> : gather_momentum<float, 1>, *p, n, m.x));
    for (int64_t i = 0; i < count; i++) {
        layers_sumsq squares = squares_of(p, m, i);
        KL_TRY(cuda_sumsq(ctx, &squares, m.sums, cuda_sumsq_workspace(&squares)));
    }
    int64_t across = divided(matrix, THREADS * (cells ? CELL : 1));
    KL_TRY(kl_launch(ctx, "muon", grid_of(count * across, THREADS), cells ? normalise<CELL> : normalise<1>, m.x, matrix, across, (const double *)m.sumsq));
    KL_TRY(orthogonalise(ctx, p, &m));
    float rate = (float)(p->lr * LAYERS_MUON_SCALE * sqrt((double)(p->rows > p->columns ? p->rows : p->columns))), keep = (float)(1.0 - p->lr * p->decay);
    return kl_launch(ctx, "muon", grid, cells ? take_step<CELL> : take_step<1>, *p, n, (const uint16_t *)m.x, rate, keep);
}
