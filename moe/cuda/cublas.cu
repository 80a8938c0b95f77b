/* The plain way, as a baseline: rows copied into the order of their experts, three products by the library, rows of a token added up.
 *
 * How many rows an expert has is known on the device alone, and the library's products of unequal sizes take sizes from the host. So all products
 * are of tiles of one size, as many as any routing can need, in one batch whose addresses the device writes: an expert's
 * last tile reads on into the next expert's rows, whose products nobody looks at, and tiles that are not needed repeat the first expert's. Tiles of
 * results lie apart. Every routing fits, nothing waits for the host, and the weights may lie anywhere. */
#include "common/gpu.h"
#include "moe/cuda/chunk.cuh"

namespace {

enum { THREADS = 256, LIBRARY_BYTES = 4 << 20, W1 = 0, W3, W2, WEIGHTS };

/* Addresses of every tile's operands, [tiles] each. */
struct addresses {
    const uint16_t **x, **w[WEIGHTS], **h;
    uint16_t **gate, **up, **y;
};

struct tiles {
    int rows, most;               /* of a tile; tiles that there may be */
    moe_cut cut;
    const uint16_t *const *weight; /* [WEIGHTS,E] */
    uint16_t *x;                  /* [rows of all + rows,D] sorted by expert */
    uint16_t *gate, *up, *y;      /* [most,rows,I], the same, [most,rows,D]; gate becomes h */
    int *place;                   /* [rows of all] a sorted row's place among the tiles' */
    addresses at;
};

/* A block a tile. */
__global__ void __launch_bounds__(THREADS) write_addresses(const __grid_constant__ tiles s, int E, int D, int I)
{
    int n = (int)blockIdx.x, thread = (int)threadIdx.x;
    int64_t first = (int64_t)n * s.rows;
    kl_grid_wait();
    kl_grid_release();
    moe_group g = n < *s.cut.groups ? s.cut.group[n] : moe_group{0, 0, 0, 0};
    for (int i = thread; i < g.rows; i += THREADS)
        s.place[g.row + i] = (int)first + i;
    if (thread > 0)
        return;
    s.at.x[n] = s.x + (int64_t)g.row * D;
    for (int w = 0; w < WEIGHTS; w++)
        s.at.w[w][n] = s.weight[w * E + g.expert];
    s.at.h[n] = s.at.gate[n] = s.gate + first * I;
    s.at.up[n] = s.up + first * I;
    s.at.y[n] = s.y + first * D;
}

/* A warp a row, zeros behind the last; then row_of, a thread a choice. */
__global__ void __launch_bounds__(THREADS) gather(const uint16_t *x, uint16_t *to, const int *token, const int *place, int *row_of, int rows, int all, int D)
{
    int r = (int)(blockIdx.x * (THREADS / 32) + threadIdx.x / 32), i = (int)(blockIdx.x * (THREADS / 32) + threadIdx.x);
    kl_grid_wait();
    kl_grid_release();
    if (threadIdx.x < THREADS / 32 && i < rows)
        row_of[i] = place[row_of[i]];
    if (r >= all)
        return;
    const uint4 *from = (const uint4 *)(x + (r < rows ? (int64_t)token[r] * D : 0));
    for (int piece = kl_lane(); piece < D / 8; piece += 32)
        ((uint4 *)(to + (int64_t)r * D))[piece] = r < rows ? from[piece] : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ uint32_t silu_pair(uint32_t a, uint32_t b)
{
    float a0 = kl_bf16_low(a), a1 = kl_bf16_high(a);
    return kl_pack_bf16(a0 * kl_rcp(1.0f + kl_exp2(-1.44269504f * a0)) * kl_bf16_low(b), a1 * kl_rcp(1.0f + kl_exp2(-1.44269504f * a1)) * kl_bf16_high(b));
}

/* gate = silu(gate) (.) up, eight numbers a thread. */
__global__ void __launch_bounds__(THREADS) swiglu(uint16_t *gate, const uint16_t *up, int64_t pieces)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    kl_grid_wait();
    kl_grid_release();
    if (i >= pieces)
        return;
    uint4 a = ((const uint4 *)gate)[i], b = ((const uint4 *)up)[i];
    ((uint4 *)gate)[i] = make_uint4(silu_pair(a.x, b.x), silu_pair(a.y, b.y), silu_pair(a.z, b.z), silu_pair(a.w, b.w));
}

kl_status multiply_gates(const kl_ctx *ctx, uint16_t *gate, const uint16_t *up, int64_t count)
{
    kl_grid g;
    g.x = moe_ceil(count / 8, THREADS);
    g.threads = THREADS;
    g.overlap = true;
    return kl_launch(ctx, "moe swiglu", g, swiglu, gate, up, count / 8);
}

/* ---- the host's side ---- */

struct buffers {
    moe_device_routes routes;
    moe_device_rows rows;
    tiles s;
    uint16_t *shared_gate, *shared_up;
    void *library;
};

/* Of so many rows on average, an expert's last tile is not mostly empty. */
int tile_rows(int64_t rows, int64_t E)
{
    int tile = 128;
    while (tile > 16 && rows < tile * E)
        tile /= 2;
    return tile;
}

buffers carve(kl_arena *a, const moe_problem *p)
{
    buffers b = {};
    int64_t tokens = moe_block_of(p, 0), rows = p->E ? tokens * p->top_k : 0;
    if (p->E) {
        tiles &s = b.s;
        s.rows = tile_rows(rows, p->E);
        s.most = (int)(rows / s.rows + (rows < p->E ? rows : p->E));
        b.routes = moe_device_routes_carve(a, p, tokens);
        b.rows = moe_device_rows_carve(a, p, tokens);
        s.cut = moe_cut_carve(a, p, tokens, 1, s.rows);
        s.weight = KL_TAKE(a, const uint16_t *, WEIGHTS * p->E);
        s.x = KL_TAKE(a, uint16_t, (rows + s.rows) * p->D);
        s.gate = KL_TAKE(a, uint16_t, (int64_t)s.most * s.rows * p->I);
        s.up = KL_TAKE(a, uint16_t, (int64_t)s.most * s.rows * p->I);
        s.y = KL_TAKE(a, uint16_t, (int64_t)s.most * s.rows * p->D);
        s.place = KL_TAKE(a, int, rows);
        const uint16_t ***in[] = {&s.at.x, &s.at.w[W1], &s.at.w[W3], &s.at.w[W2], &s.at.h};
        uint16_t ***out[] = {&s.at.gate, &s.at.up, &s.at.y};
        for (const uint16_t ***at : in)
            *at = KL_TAKE(a, const uint16_t *, s.most);
        for (uint16_t ***at : out)
            *at = KL_TAKE(a, uint16_t *, s.most);
    }
    b.shared_gate = KL_TAKE(a, uint16_t, tokens * p->Is);
    b.shared_up = KL_TAKE(a, uint16_t, tokens * p->Is);
    b.library = kl_arena_take(a, LIBRARY_BYTES, 1);
    return b;
}

/* y = x w^T: rows [rows,K] by [N,K] */
kl_product product_of(int64_t rows, int64_t N, int64_t K)
{
    kl_product s = {};
    s.M = rows, s.N = N, s.K = K;
    s.a_stride = s.b_stride = K;
    s.y_stride = N;
    s.b_transposed = true;
    s.y_dtype = KL_BF16;
    return s;
}

kl_status shared_expert(kl_ctx *ctx, const moe_problem *p, const buffers &b, int64_t t, int64_t count)
{
    kl_range range("moe shared expert");
    const uint16_t *x = (const uint16_t *)p->x + t * p->D;
    kl_product inner = product_of(count, p->Is, p->D), outer = product_of(count, p->D, p->Is);
    KL_TRY(kl_gpu_product(ctx, &inner, 1.0f, x, p->shared_w1, 0.0f, nullptr, b.shared_gate, b.library, LIBRARY_BYTES));
    KL_TRY(kl_gpu_product(ctx, &inner, 1.0f, x, p->shared_w3, 0.0f, nullptr, b.shared_up, b.library, LIBRARY_BYTES));
    KL_TRY(multiply_gates(ctx, b.shared_gate, b.shared_up, count * p->Is));
    return kl_gpu_product(ctx, &outer, 1.0f, b.shared_gate, p->shared_w2, 0.0f, nullptr, (uint16_t *)p->y + t * p->D, b.library, LIBRARY_BYTES);
}

kl_status upload_weights(const kl_ctx *ctx, const moe_problem *p, const tiles &s)
{
    const void *const *table[WEIGHTS] = {p->w1, p->w3, p->w2};
    static const char *const name[WEIGHTS] = {"w1", "w3", "w2"};
    for (int w = 0; w < WEIGHTS; w++)
        for (int64_t e = 0; e < p->E; e++)
            if ((uintptr_t)table[w][e] % 16)
                return kl_error(KL_EUNSUPPORTED, "moe: %s[%lld]: expected an address that is a multiple of 16, got %p", name[w], (long long)e, table[w][e]);
    for (int w = 0; w < WEIGHTS; w++)
        KL_TRY(kl_upload(ctx, (void *)(s.weight + w * p->E), table[w], (size_t)p->E * sizeof(void *)));
    return kl_ok();
}

kl_status sort_rows(const kl_ctx *ctx, const moe_problem *p, const buffers &b, int64_t t, int64_t count)
{
    kl_range range("moe gather");
    int rows = (int)(count * p->top_k), all = rows + b.s.rows;
    kl_grid g;
    g.threads = THREADS;
    g.overlap = true;
    g.x = b.s.most;
    KL_TRY(kl_launch(ctx, "moe addresses", g, write_addresses, b.s, (int)p->E, (int)p->D, (int)p->I));
    g.x = moe_ceil(all, THREADS / 32);
    return kl_launch(ctx, "moe gather", g, gather, (const uint16_t *)p->x + t * p->D, b.s.x, (const int *)b.rows.token, (const int *)b.s.place, b.rows.row_of, rows, all, (int)p->D);
}

kl_status products(kl_ctx *ctx, const moe_problem *p, const buffers &b)
{
    const tiles &s = b.s;
    kl_product inner = product_of(s.rows, p->I, p->D), outer = product_of(s.rows, p->D, p->I);
    inner.count = outer.count = s.most;
    inner.scattered = outer.scattered = true;
    kl_gpu_range_push("moe gate_up");
    kl_status status = kl_gpu_product(ctx, &inner, 1.0f, s.at.x, s.at.w[W1], 0.0f, nullptr, s.at.gate, b.library, LIBRARY_BYTES);
    if (!kl_failed(status))
        status = kl_gpu_product(ctx, &inner, 1.0f, s.at.x, s.at.w[W3], 0.0f, nullptr, s.at.up, b.library, LIBRARY_BYTES);
    if (!kl_failed(status))
        status = multiply_gates(ctx, s.gate, s.up, (int64_t)s.most * s.rows * p->I);
    kl_gpu_range_pop();
    KL_TRY(status);
    kl_range range("moe down");
    return kl_gpu_product(ctx, &outer, 1.0f, s.at.h, s.at.w[W2], 0.0f, nullptr, s.at.y, b.library, LIBRARY_BYTES);
}

kl_status routed_experts(kl_ctx *ctx, const moe_problem *p, const buffers &b, int64_t t, int64_t count)
{
    KL_TRY(moe_device_route(ctx, p, t, count, &b.routes));
    KL_TRY(moe_device_group(ctx, p, count, &b.routes, &b.rows, &b.s.cut));
    KL_TRY(sort_rows(ctx, p, b, t, count));
    KL_TRY(products(ctx, p, b));
    return moe_device_combine(ctx, p, t, count, b.rows.row_of, b.routes.weight, b.s.y);
}

} // namespace

size_t moe_cuda_cublas_workspace(const kl_ctx *, const void *problem, kl_pass pass)
{
    const moe_problem *p = (const moe_problem *)problem;
    if (pass == KL_BACKWARD || kl_failed(moe_cuda_takes(p)))
        return 0;
    kl_arena a = kl_arena_count();
    carve(&a, p);
    return a.overflow ? SIZE_MAX : a.used;
}

kl_status moe_cuda_cublas_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const moe_problem *p = (const moe_problem *)problem;
    KL_TRY(moe_cuda_enter(ctx, p));
    kl_arena a = kl_arena_over(workspace, bytes);
    buffers b = carve(&a, p);
    if (a.overflow)
        return kl_error(KL_EINVAL, "moe: workspace: expected %zu bytes, got %zu", moe_cuda_cublas_workspace(ctx, p, KL_FORWARD), bytes);
    if (p->T > 0 && p->E)
        KL_TRY(upload_weights(ctx, p, b.s));
    return moe_each_block(
        ctx, p, [&](int64_t t, int64_t count) { return shared_expert(ctx, p, b, t, count); },
        [&](int64_t t, int64_t count) { return routed_experts(ctx, p, b, t, count); });
}
