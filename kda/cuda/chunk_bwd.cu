/* Chunkwise backward: prepare_bwd, walk_bwd, then here all gradients of a tile from the state before it and the gradient of the
 * state after it. Heads are taken in slices, so that what lies between the steps stays small however long the sequences are.
 *
 * One block makes one tile of one query head and takes its value heads in order, so the gradients of q and k are summed in an
 * order that nothing changes; those of the gate's parameters are written tile by tile and summed by kernels of their own. */
#include "common/arena.h"
#include "common/gpu.h"
#include "kda/cuda/channels_bwd.cuh"
#include "kda/cuda/prepare_bwd.cuh"
#include "kda/cuda/walk_bwd.cuh"

namespace {

/* ---- one value head of a tile ---- */

__device__ __forceinline__ int panels_from(const kda_bwd_args &a, int first) { return (a.VP - first < 128 ? a.VP - first : 128) / 16; }

/* Asks for columns [first, first + 128) of what the steps before left and of do. */
template <int KP> __device__ void ask_for(const kda_bwd_args &a, const head_tile &w, int first, unsigned char *shared)
{
    using room = kda_grads_room<KP>;
    using tile = kda_bwd_tile<KP>;
    int panels = panels_from(a, first);
    if (threadIdx.x == 0) {
        uint64_t *bar = (uint64_t *)(shared + room::bar);
        int state = panels * 16 * KP * 2, values = panels * KDA_PANEL_BYTES;
        kl_mbar_expect(bar, 2 * state + 2 * values + (first ? 0 : KDA_SMALL_BYTES));
        for (int which = 0; which < 2; which++) {
            kl_bulk_load(shared + (which ? room::y : room::r), kda_bwd_panel(a, w.slot, which) + first / 16 * KDA_PANEL_BYTES, values, bar);
            kl_bulk_load(shared + (which ? room::dS : room::S), kda_bwd_state(a, KP, w.slot, which) + first * KP * 2, state, bar);
        }
        if (!first)
            kl_bulk_load(shared + room::T, a.tile + w.slot * tile::bytes + tile::T, KDA_SMALL_BYTES, bar);
        kl_bulk_issued(bar);
    }
    const uint16_t *d_o = a.d_o ? a.d_o + w.rows.token * a.o_stride + (int64_t)w.hv * a.V + first : nullptr;
    for (int p = (int)threadIdx.x / 32; p < panels; p += KP / 16)
        kda_panel_copy(shared + room::d_o + p * KDA_PANEL_BYTES, d_o, a.o_stride, w.rows.count, a.V - first, p, a.o_wide);
    kl_copy_commit();
}

template <int KP> __device__ void prepare_between(const kda_bwd_args &a, const head_tile &w, unsigned char *shared)
{
    int channel = (int)threadIdx.x % KP, block = (int)threadIdx.x / KP;
    kda_column_of column = kda_column_make(a, channel, block, w.rows.count);
    kda_column keys = kda_column_keys(a, column, w.h, w.rows.token);
    float d[16];
    kda_column_gate(a, column, w.hv, w.rows.token, d);
    kda_column_decay(a, column, w.hv, d, kda_column_bias(a, column, w.hv), d);
    scale_column(keys, (const float *)(shared + kda_grads_room<KP>::rows) + 16 * block);
    between_operands<KP>(keys, d, block, channel, shared);
}

template <int KP> __device__ void head_backward(const kda_bwd_args &a, const head_tile &w, bool first_head, int *phase, unsigned char *shared)
{
    using room = kda_grads_room<KP>;
    constexpr int warps = KP / 16, jobs = (MATRIX_JOBS + warps - 1) / warps;
    int warp = (int)threadIdx.x / 32, lane = kl_lane();
    uint64_t *bar = (uint64_t *)(shared + room::bar);
    float *rows = (float *)(shared + room::rows);
    if (threadIdx.x < 96)
        rows[threadIdx.x] = ((const float *)(a.tile + w.slot * kda_bwd_tile<KP>::bytes + kda_bwd_tile<KP>::rows))[threadIdx.x];
    ask_for<KP>(a, w, 0, shared);
    __syncthreads();
    prepare_between<KP>(a, w, shared);
    float dbeta = 0.0f, matrix[jobs][2][4] = {}, across[2] = {};
    grad_tile x = {};
    for (int first = 0; first < a.VP; first += 128) {
        int panels = panels_from(a, first);
        if (first)
            ask_for<KP>(a, w, first, shared);
        kl_copy_wait<0>();
        kl_mbar_wait(bar, (*phase)++ & 1);
        __syncthreads();
        values_backward<KP>(panels, shared);
        __syncthreads();
        if (threadIdx.x < 32)
            for (int p = 0; p < panels; p++)
                dbeta += ((const float *)(shared + room::dbeta))[p * 32 + lane];
        if (a.dv)
            store_values<KP>(a, w, first, panels, shared);
        state_products<KP>(panels, shared, x, across);
        for (int n = 0; n < jobs; n++)
            if (warp + n * warps < MATRIX_JOBS)
                matrix_products<KP>(panels, warp + n * warps, shared, matrix[n]);
        kl_fence_async_shared();
        __syncthreads();
    }
    if (a.dbeta && (int)threadIdx.x < w.rows.count) {
        int64_t at = (w.rows.token + lane) * a.beta_stride + w.hv;
        a.dbeta[at] = kl_to_bf16(dbeta * kda_beta_slope(a.beta_kind, kl_load_bf16(a.beta + at)));
    }
    for (int n = 0; n < jobs; n++)
        if (warp + n * warps < MATRIX_JOBS)
            store_matrix<KP>(a.no_delta, warp + n * warps, matrix[n], shared);
    __syncthreads();

#pragma unroll
    for (int n = 0; n < 2; n++) {
        across[n] += __shfl_xor_sync(0xffffffffu, across[n], 1);
        across[n] += __shfl_xor_sync(0xffffffffu, across[n], 2);
        if ((lane & 3) == 0)
            ((float *)(shared + room::edges))[2 * KP + 16 * warp + 8 * n + lane / 4] = across[n];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                x.dkP[m][n][e] *= a.no_delta ? 0.0f : -1.0f;
                x.dkg[m][n][e] *= rows[16 * m + lane / 4 + 8 * (e >> 1)];
            }
    }
    add_between<KP>(x, shared);
    store_rows<KP>(x, shared);
    __syncthreads();
    channel_backward<KP>(a, w, first_head, shared);
    __syncthreads();
    if (a.G > 0 && a.G < a.K) {
        shared_gate_backward<KP>(a, w, shared);
        __syncthreads();
    }
    if (a.G > 0 && a.sum)
        store_parts<KP>(a, w, shared);
}

template <int KP> __global__ void __launch_bounds__(2 * KP, KP == 128 ? 2 : 1) tile_bwd(const __grid_constant__ kda_bwd_args a)
{
    KL_SHARED(shared);
    uint64_t *bar = (uint64_t *)(shared + kda_grads_room<KP>::bar);
    if (threadIdx.x == 0) {
        kl_mbar_init(bar, 1);
        kl_mbar_init_fence();
    }
    __syncthreads();
    int mine = (int)(blockIdx.x % (unsigned)a.heads), phase = 0;
    int64_t tile = blockIdx.x / (unsigned)a.heads;
    head_tile w;
    w.rows = kda_bwd_rows_of(a, tile);
    w.h = a.first + mine;
    for (int i = 0; i < a.group; i++) {
        w.hv = w.h * a.group + i;
        w.slot = kda_bwd_slot(a, tile, mine * a.group + i);
        head_backward<KP>(a, w, i == 0, &phase, shared);
        kl_fence_async_shared();
        __syncthreads();
    }
    store_keys<KP>(a, w, shared);
}

/* Adds the tiles' parts up, in runs of tiles and then the runs in order: a block takes 32 of a value head's G + 1 sums. */
enum { SUM_RUNS = 8 };
__global__ void __launch_bounds__(32 * SUM_RUNS) sum_parts(const __grid_constant__ kda_bwd_args a)
{
    KL_SHARED(shared);
    float *runs = (float *)shared;
    int width = a.G + 1, blocks = (width + 31) / 32, mine = (int)blockIdx.x / blocks, lane = kl_lane(), run = (int)threadIdx.x / 32;
    int j = (int)blockIdx.x % blocks * 32 + lane, hv = a.first * a.group + mine, heads = a.heads * a.group;
    float sum = 0.0f;
    if (j < width)
        for (int64_t tile = a.tiles * run / SUM_RUNS; tile < a.tiles * (run + 1) / SUM_RUNS; tile++)
            sum += a.sum[(tile * heads + mine) * width + j];
    runs[threadIdx.x] = sum;
    __syncthreads();
    if (run > 0 || j >= width)
        return;
    for (int r = 1; r < SUM_RUNS; r++)
        sum += runs[32 * r + lane];
    if (j < a.G && a.ddt_bias)
        a.ddt_bias[(int64_t)hv * a.G + j] += sum;
    if (j == a.G && a.dA_log)
        a.dA_log[hv] += sum;
}

/* ---- on the host ---- */

/* Heads are taken in slices of at most this much memory, or one by one. */
const size_t SLICE = (size_t)960 << 20;

struct plan {
    kda_problem p; /* as tiles of 32 tokens see it */
    int64_t tiles, heads, slices;
    int KP, VP;
};

size_t head_bytes(const plan &s, int64_t group)
{
    size_t tile = s.KP == 64 ? kda_bwd_tile<64>::bytes : s.KP == 128 ? kda_bwd_tile<128>::bytes : kda_bwd_tile<256>::bytes;
    tile += (size_t)s.VP * s.KP * 4 + (size_t)s.VP / 16 * KDA_PANEL_BYTES * 2 + (size_t)(s.p.G + 1) * 4;
    return (tile * (size_t)group + (group > 1 ? 2 * 32 * (size_t)s.KP * 4 : 0)) * (size_t)s.tiles;
}

plan plan_of(const kda_problem *problem)
{
    plan s;
    s.p = *problem;
    s.p.chunk_states = nullptr;
    s.tiles = kda_tile_count(&s.p);
    s.KP = kda_bwd_padded(s.p.K);
    s.VP = (int)(s.p.V + 15) / 16 * 16;
    size_t head = head_bytes(s, s.p.HV / s.p.H);
    int64_t most = head ? (int64_t)(SLICE / head) : s.p.H;
    s.slices = kda_ceil(s.p.H, most < 1 ? 1 : most < s.p.H ? most : s.p.H);
    s.heads = kda_ceil(s.p.H, s.slices);
    return s;
}

void *carve(kl_arena *m, const plan &s, kda_bwd_args *a)
{
    int64_t slots = s.tiles * s.heads * (s.p.HV / s.p.H);
    size_t tile = s.KP == 64 ? kda_bwd_tile<64>::bytes : s.KP == 128 ? kda_bwd_tile<128>::bytes : kda_bwd_tile<256>::bytes;
    void *table = kl_arena_take(m, kda_sequences_bytes(&s.p), 1);
    a->tile = (unsigned char *)kl_arena_take(m, (size_t)slots, tile);
    a->state = (unsigned char *)kl_arena_take(m, (size_t)slots, (size_t)s.VP * (size_t)s.KP * 4);
    a->panel = (unsigned char *)kl_arena_take(m, (size_t)slots, (size_t)s.VP / 16 * KDA_PANEL_BYTES * 2);
    a->sum = (float *)kl_arena_take(m, (size_t)slots, (size_t)(s.p.G + 1) * sizeof(float));
    a->keys = (float *)kl_arena_take(m, s.p.HV > s.p.H ? (size_t)(s.tiles * s.heads) : 0, 2 * 32 * (size_t)s.KP * sizeof(float));
    return table;
}

bool wide(const void *x, int64_t stride, int64_t width) { return (uintptr_t)x % 16 == 0 && stride % 8 == 0 && width % 8 == 0; }

/* Kernels step from token to token by 32-bit strides (offsets are of 64). */
kl_status check_strides(const kda_problem *p)
{
    const struct { const char *name; int64_t stride; } all[] = {{"q_stride", p->q_stride}, {"k_stride", p->k_stride}, {"v_stride", p->v_stride},
        {"g_stride", p->g_stride}, {"beta_stride", p->beta_stride}, {"o_stride", p->o_stride}};
    for (const auto &x : all)
        if (x.stride > INT32_MAX)
            return kl_error(KL_EUNSUPPORTED, "kda: %s: variant chunk on cuda offers backward up to %d, got %lld", x.name, INT32_MAX, (long long)x.stride);
    return kl_ok();
}

kda_bwd_args args_of(const plan &s, const kda_grads *g, const void *table)
{
    const kda_problem *p = &s.p;
    kda_bwd_args a = {};
    a.sequences = kda_sequences_of(p, table);
    a.tiles = s.tiles;
    a.q = (const uint16_t *)p->q;
    a.k = (const uint16_t *)p->k;
    a.v = (const uint16_t *)p->v;
    a.g = (const uint16_t *)p->g;
    a.beta = (const uint16_t *)p->beta;
    a.d_o = (const uint16_t *)g->d_o;
    a.A_log = p->A_log;
    a.dt_bias = p->dt_bias;
    a.h0 = (const float *)p->h0;
    a.dht = g->dht;
    a.state_index = p->state_index;
    a.state_pool = p->state_pool ? p->state_pool : p->N;
    a.q_stride = (int)kda_stride(p->q_stride, p->H * p->K);
    a.k_stride = (int)kda_stride(p->k_stride, p->H * p->K);
    a.v_stride = (int)kda_stride(p->v_stride, p->HV * p->V);
    a.g_stride = (int)kda_stride(p->g_stride, p->HV * p->G);
    a.beta_stride = (int)kda_stride(p->beta_stride, p->HV);
    a.o_stride = (int)kda_stride(p->o_stride, p->HV * p->V);
    a.dq = (uint16_t *)g->dq;
    a.dk = (uint16_t *)g->dk;
    a.dv = (uint16_t *)g->dv;
    a.dg = (uint16_t *)g->dg;
    a.dbeta = (uint16_t *)g->dbeta;
    a.dA_log = g->dA_log;
    a.ddt_bias = g->ddt_bias;
    a.dh0 = g->dh0;
    a.H = (int)p->H;
    a.HV = (int)p->HV;
    a.K = (int)p->K;
    a.V = (int)p->V;
    a.G = (int)p->G;
    a.group = (int)(p->HV / p->H);
    a.VP = s.VP;
    a.gate = p->gate;
    a.beta_kind = p->beta_kind;
    a.scale = kda_scale(p->scale, p->K);
    a.lower_bound = p->lower_bound;
    a.l2norm = p->qk_l2norm;
    a.no_delta = p->no_delta;
    a.value_first = p->state_layout == KDA_STATE_VK;
    a.v_wide = wide(p->v, a.v_stride, p->V) && wide(g->dv, a.v_stride, p->V);
    a.o_wide = wide(g->d_o, a.o_stride, p->V);
    return a;
}

/* Warps that share a ring of tiles in the walk: more read less, fewer fill the machine when heads are few. */
int walkers(const kl_ctx *ctx, const plan &s, int64_t heads)
{
    int64_t room = kl_gpu_multiprocessors(ctx), panels = s.VP / 16, most = panels < 4 ? panels : 4;
    while (most > 1 && 2 * s.p.N * heads * kda_ceil(panels, most) < room / 2)
        most = (most + 1) / 2;
    return (int)most;
}

template <int KP> kl_status run_slice(kl_ctx *ctx, const plan &s, const kda_bwd_args &a)
{
    int64_t heads = (int64_t)a.heads * a.group, panels = a.VP / 16;
    kl_grid g;
    g.x = a.tiles * heads;
    g.threads = 2 * KP;
    g.shared = kda_prepare_bwd_room<KP>::bytes;
    KL_TRY(kl_launch(ctx, "kda prepare_bwd", g, prepare_bwd<KP>, a));
    int workers = walkers(ctx, s, heads);
    g.x = 2 * s.p.N * heads * kda_ceil(panels, workers);
    g.threads = 32 * (workers + 1);
    g.shared = (size_t)kda_walk_bwd_room<KP>::bytes(workers);
    KL_TRY(kl_launch(ctx, "kda walk_bwd", g, walk_bwd<KP>, a));
    g.x = a.tiles * a.heads;
    g.threads = 2 * KP;
    g.shared = kda_grads_room<KP>::bytes;
    KL_TRY(kl_launch(ctx, "kda tile_bwd", g, tile_bwd<KP>, a));
    if (!a.sum)
        return kl_ok();
    g.x = heads * ((a.G + 1 + 31) / 32);
    g.threads = 32 * SUM_RUNS;
    g.shared = 4 * 32 * SUM_RUNS;
    return kl_launch(ctx, "kda sum_parts", g, sum_parts, a);
}

} // namespace

size_t kda_cuda_chunk_backward_workspace(const kl_ctx *, const kda_problem *p)
{
    plan s = plan_of(p);
    kda_bwd_args a;
    kl_arena m = kl_arena_count();
    carve(&m, s, &a);
    return m.overflow ? SIZE_MAX : m.used;
}

kl_status kda_cuda_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes)
{
    const kda_grads *g = (const kda_grads *)grads;
    plan s = plan_of((const kda_problem *)problem);
    kda_bwd_args pieces = {};
    kl_arena m = kl_arena_over(workspace, bytes);
    void *table = carve(&m, s, &pieces);
    KL_REQUIRE(!m.overflow, "kda: workspace: expected %zu bytes, got %zu", kda_cuda_chunk_backward_workspace(ctx, &s.p), bytes);
    KL_TRY(check_strides(&s.p));
    KL_TRY(kda_sequences_upload(ctx, &s.p, table));
    kda_bwd_args a = args_of(s, g, table);
    a.tile = pieces.tile;
    a.state = pieces.state;
    a.panel = pieces.panel;
    a.keys = pieces.keys;
    a.sum = g->dA_log || g->ddt_bias ? pieces.sum : nullptr;
    for (a.first = 0; a.first < a.H; a.first += a.heads) {
        a.heads = (int)(s.p.H - a.first < s.heads ? s.p.H - a.first : s.heads);
        KL_TRY(s.KP == 64 ? run_slice<64>(ctx, s, a) : s.KP == 128 ? run_slice<128>(ctx, s, a) : run_slice<256>(ctx, s, a));
    }
    return kl_ok();
}
