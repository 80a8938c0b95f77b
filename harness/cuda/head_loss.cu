/* The loss over logits = x w^T, a tile of tokens at a time: a product, the softmax of its rows, and two products back.
 *
 * Logits are float. A cluster of blocks has a row between them: each finds the largest logit and the sum of its slice, they
 * exchange these, and read the slice once more for the gradient, which the second cache still holds, since no more than a
 * wave of rows is under way. Gradients of logits are bfloat16, operands of the products back. */
#include "common/gpu.h"
#include "harness/cuda/cells.cuh"

namespace {

/* LOGITS: of a tile, at most; 6 bytes each. FEWEST, MOST_TOKENS: of a tile. */
enum { CLUSTER = 8, THREADS = 512, BATCH = 4 };
const int64_t LOGITS = (int64_t)2048 * 163840, FEWEST_TOKENS = 128, MOST_TOKENS = 2048;

struct tile {
    layers_head_loss p;
    int blocks;                    /* of a cluster; 1 where there are none */
    int64_t first, tokens, stride; /* tokens first .. first + tokens - 1; elements from row to row of logits */
    const float *logits;
    uint16_t *dlogits;             /* NULL: not wanted */
};

/* The largest of some numbers and the sum of e^(x - largest). */
struct softmax {
    float most, sum;
};
__device__ __forceinline__ softmax joined(softmax a, softmax b)
{
    float most = fmaxf(a.most, b.most);
    return {most, (a.sum > 0.0f ? a.sum * kl_exp(a.most - most) : 0.0f) + (b.sum > 0.0f ? b.sum * kl_exp(b.most - most) : 0.0f)};
}

__device__ __forceinline__ softmax of_slice(const float *l, int64_t begin, int64_t end)
{
    softmax s = {-3.4e38f, 0.0f};
    for (int64_t base = begin + threadIdx.x * 4; base < end; base += BATCH * THREADS * 4) {
        float4 x[BATCH];
        float v[BATCH][4], most = s.most, sum = 0.0f;
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (base + b * THREADS * 4 < end)
                x[b] = *(const float4 *)(l + base + b * THREADS * 4);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int64_t i = base + b * THREADS * 4;
            float y[4] = {x[b].x, x[b].y, x[b].z, x[b].w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                v[b][j] = i + j < end ? y[j] : -INFINITY;
                most = fmaxf(most, v[b][j]);
            }
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                sum += kl_exp(v[b][j] - most);
        s.sum = s.sum * kl_exp(s.most - most) + sum;
        s.most = most;
    }
    return s;
}

/* Over the cluster; every thread gets the same. */
__device__ __forceinline__ softmax of_row(softmax s, softmax *memory, int blocks)
{
    for (int m = 16; m; m >>= 1)
        s = joined(s, {__shfl_xor_sync(0xffffffffu, s.most, m), __shfl_xor_sync(0xffffffffu, s.sum, m)});
    if (kl_lane() == 0)
        memory[1 + threadIdx.x / 32] = s;
    __syncthreads();
    s = memory[1];
    for (int w = 1; w < THREADS / 32; w++)
        s = joined(s, memory[1 + w]);
    if (threadIdx.x == 0)
        memory[0] = s;
    kl_cluster_sync();
    s = *kl_peer(memory, 0);
    for (int block = 1; block < blocks; block++)
        s = joined(s, *kl_peer(memory, block));
    kl_cluster_sync();
    return s;
}

/* loss = log sum_i e^l_i - l_target;  dl_i = (e^l_i / sum - [i = target]) grad_scale */
__global__ void __launch_bounds__(THREADS) rows(const __grid_constant__ tile a)
{
    KL_SHARED(memory);
    const layers_head_loss &p = a.p;
    int64_t row = blockIdx.x / a.blocks, slice = (p.vocab + 4 * a.blocks - 1) / (4 * a.blocks) * 4;
    int64_t begin = kl_cluster_rank() * slice, end = begin + slice < p.vocab ? begin + slice : p.vocab;
    int target = p.targets[a.first + row];
    const float *l = a.logits + row * a.stride;
    bool counts = target >= 0 && target < p.vocab;
    softmax s = of_row(of_slice(l, begin, end), (softmax *)memory, a.blocks);
    if (kl_cluster_rank() == 0 && threadIdx.x == 0)
        p.loss[a.first + row] = counts ? logf(s.sum) + (s.most - l[target]) : target < 0 ? 0.0f : __uint_as_float(0x7fc00000u);
    if (!a.dlogits)
        return;
    float scale = counts ? p.grad_scale : 0.0f, over = scale / s.sum;
    uint16_t *dl = a.dlogits + row * a.stride;
    for (int64_t base = begin + threadIdx.x * 4; base < end; base += BATCH * THREADS * 4) {
        float4 x[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (base + b * THREADS * 4 < end)
                x[b] = *(const float4 *)(l + base + b * THREADS * 4);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int64_t i = base + b * THREADS * 4;
            float y[4] = {x[b].x, x[b].y, x[b].z, x[b].w};
            if (i >= end)
                continue;
#pragma unroll
            for (int j = 0; j < 4; j++)
                y[j] = kl_exp(y[j] - s.most) * over - (i + j == target ? scale : 0.0f);
            *(uint2 *)(dl + i) = make_uint2(kl_pack_bf16(y[0], y[1]), kl_pack_bf16(y[2], y[3]));
        }
    }
}

/* The sum of the losses in a fixed order, and how many targets counted. */
__global__ void __launch_bounds__(1024) add_losses(const __grid_constant__ layers_head_loss p)
{
    KL_SHARED(memory);
    double sum = 0.0, count = 0.0;
    for (int64_t t = threadIdx.x; t < p.T; t += 1024) {
        sum += p.loss[t];
        count += p.targets[t] >= 0;
    }
    sum = block_sum(sum, (double *)memory);
    count = block_sum(count, (double *)memory);
    if (threadIdx.x == 0) {
        p.sum[0] = sum;
        p.sum[1] = count;
    }
}

/* ---- launching ---- */

int64_t padded(int64_t vocab) { return divided(vocab, CELL) * CELL; }

int64_t tile_tokens(const layers_head_loss *p)
{
    int64_t fit = LOGITS / (p->vocab > 0 ? p->vocab : 1) / FEWEST_TOKENS * FEWEST_TOKENS;
    fit = fit < FEWEST_TOKENS ? FEWEST_TOKENS : fit > MOST_TOKENS ? MOST_TOKENS : fit;
    return p->T < fit ? p->T : fit;
}

struct pieces {
    float *logits;
    float *loss;
    uint16_t *dlogits, *x, *weight;
    void *product;
};

pieces carve(kl_arena *arena, const layers_head_loss *p, kl_pass pass)
{
    pieces m = {};
    int64_t tile = tile_tokens(p), stride = padded(p->vocab);
    m.logits = KL_TAKE(arena, float, tile * stride);
    m.loss = KL_TAKE(arena, float, p->T);
    if (pass == KL_BACKWARD)
        m.dlogits = KL_TAKE(arena, uint16_t, tile * stride);
    if (p->x_dtype == KL_F32)
        m.x = KL_TAKE(arena, uint16_t, tile * p->D);
    if (p->weight_dtype == KL_F32)
        m.weight = KL_TAKE(arena, uint16_t, p->vocab * p->D);
    m.product = KL_TAKE(arena, char, KL_PRODUCT_WORKSPACE);
    return m;
}

/* logits = x w^T:  dx = dlogits w,  dw += dlogits^T x */
kl_status products_back(kl_ctx *ctx, const tile &a, const layers_head_loss_grads *g, const uint16_t *x, const uint16_t *weight, void *memory)
{
    const layers_head_loss &p = a.p;
    kl_product dx = {}, dw = {};
    dx.M = a.tokens, dx.N = p.D, dx.K = p.vocab;
    dx.a_stride = a.stride, dx.b_stride = dx.y_stride = p.D;
    dx.y_dtype = p.x_dtype;
    if (g->dx)
        KL_TRY(kl_gpu_product(ctx, &dx, 1.0f, a.dlogits, weight, 0.0f, NULL, (char *)g->dx + (size_t)(a.first * p.D) * kl_dtype_size(p.x_dtype),
                              memory, KL_PRODUCT_WORKSPACE));
    dw.M = p.vocab, dw.N = p.D, dw.K = a.tokens;
    dw.a_transposed = true;
    dw.a_stride = a.stride, dw.b_stride = dw.y_stride = p.D;
    dw.y_dtype = KL_F32;
    return g->dweight ? kl_gpu_product(ctx, &dw, 1.0f, a.dlogits, x, 1.0f, g->dweight, g->dweight, memory, KL_PRODUCT_WORKSPACE) : kl_ok();
}

} // namespace

size_t cuda_head_loss_workspace(const layers_head_loss *p, kl_pass pass)
{
    kl_arena arena = kl_arena_count();
    carve(&arena, p, pass);
    return arena.used;
}

kl_status cuda_head_loss(kl_ctx *ctx, const layers_head_loss *p, const layers_head_loss_grads *g, void *workspace, size_t bytes)
{
    kl_arena arena = kl_arena_over(workspace, bytes);
    pieces m = carve(&arena, p, g ? KL_BACKWARD : KL_FORWARD);
    tile a = {};
    a.p = *p;
    a.p.loss = p->loss ? p->loss : m.loss;
    a.blocks = ctx->hopper ? CLUSTER : 1;
    a.stride = padded(p->vocab);
    a.logits = m.logits;
    a.dlogits = g ? m.dlogits : NULL;
    const uint16_t *weight = p->weight_dtype == KL_F32 ? m.weight : (const uint16_t *)p->weight;
    if (p->weight_dtype == KL_F32)
        KL_TRY(cuda_round(ctx, p->vocab, p->D, (const float *)p->weight, p->D, m.weight));
    for (int64_t each = tile_tokens(p); a.first < p->T; a.first += each) {
        a.tokens = p->T - a.first < each ? p->T - a.first : each;
        const uint16_t *x = p->x_dtype == KL_F32 ? m.x : (const uint16_t *)p->x + a.first * p->D;
        if (p->x_dtype == KL_F32)
            KL_TRY(cuda_round(ctx, a.tokens, p->D, (const float *)p->x + a.first * p->D, p->D, m.x));
        kl_product logits = {};
        logits.M = a.tokens, logits.N = p->vocab, logits.K = p->D;
        logits.a_stride = logits.b_stride = p->D, logits.y_stride = a.stride;
        logits.b_transposed = true;
        logits.y_dtype = KL_F32;
        KL_TRY(kl_gpu_product(ctx, &logits, 1.0f, x, weight, 0.0f, NULL, m.logits, m.product, KL_PRODUCT_WORKSPACE));
        kl_grid grid = grid_of(a.tokens * a.blocks, THREADS, (1 + THREADS / 32) * sizeof(softmax));
        grid.cluster = a.blocks;
        KL_TRY(kl_launch(ctx, "head loss", grid, rows, a));
        if (g)
            KL_TRY(products_back(ctx, a, g, x, weight, m.product));
    }
    return p->sum ? kl_launch(ctx, "head loss sum", grid_of(1, 1024, 32 * sizeof(double)), add_losses, a.p) : kl_ok();
}
