/* The general recurrence on a device, in two launches: every tile prepared into the workspace, then a walk over the tiles
 * of each sequence and head. Any K, V up to 256; tensors bf16, states float. */
#include "kda/cuda/dplr_intra.cuh"
#include "kda/cuda/dplr_walk.cuh"

#include "common/arena.h"

namespace {

using namespace dplr;

template <int KP> __global__ void __launch_bounds__(KP + 32) prepare(const __grid_constant__ dplr_view p)
{
    using S = intra_shared<KP>;
    using tile = dplr_tile<KP>;
    KL_SHARED(shared);
    int64_t number = blockIdx.x / (unsigned)p.H, h = blockIdx.x % (unsigned)p.H;
    int64_t n = kda_sequence_of_tile(p.sequences, number);
    kda_place place = kda_place_of(p.sequences, n);
    int64_t token = 32 * (number - place.tile), first = ((place.begin + token) * p.H + h) * p.K;
    int count = place.length - token < 32 ? (int)(place.length - token) : 32;
    int *far = (int *)(shared + S::far);
    unsigned char *to = p.tiles + (int64_t)blockIdx.x * tile::bytes;
    bool sender = threadIdx.x == KP;

    if (threadIdx.x < 2)
        far[threadIdx.x] = 0;
    load_rows<KP>(p, first, count, shared);
    __syncthreads();
    decays<KP>(p, shared);
    kl_fence_async_shared();
    __syncthreads();
    if (sender) {
        kl_bulk_store(to + tile::qg, shared + S::out, 3 * S::rows);
        kl_bulk_commit();
    }
    if ((int)threadIdx.x < KP) {
        const float *whole = (const float *)(shared + S::whole);
        ((float *)(to + tile::decay))[threadIdx.x] = whole[threadIdx.x] * whole[KP + threadIdx.x];
    }
    products<KP>(shared);
    __syncthreads();
    if (far[0] + far[1]) {
        pairwise<KP>(p, first, count, shared);
        __syncthreads();
    }
    solve<KP>(shared);
    kl_fence_async_shared();
    __syncthreads();
    if (sender) {
        kl_bulk_store(to + tile::W, shared + S::k, S::rows);
        kl_bulk_store(to + tile::M, shared + S::b, tile::triangle);
        kl_bulk_store(to + tile::Aqk, shared + S::Aqk, 2 * tile::triangle);
        kl_bulk_commit();
        kl_bulk_wait_read<0>();
    }
}

template <int KP> __global__ void __launch_bounds__(WALK_THREADS) walk(const __grid_constant__ dplr_view p, int strips)
{
    using L = walk_shared<KP>;
    KL_SHARED(shared);
    uint64_t *full = (uint64_t *)(shared + L::barriers), *empty = full + L::stages;
    int warp = (int)threadIdx.x >> 5;
    walker w;
    w.head = blockIdx.x / (unsigned)strips;
    w.h = w.head % p.H;
    w.v0 = COLUMNS * (int)(blockIdx.x % (unsigned)strips);
    w.columns = min(p.V - w.v0, (int)COLUMNS);
    if (threadIdx.x == 0) {
        for (int s = 0; s < L::stages; s++) {
            kl_mbar_init(full + s, 33);
            kl_mbar_init(empty + s, 2 * GROUPS * 32);
        }
        kl_mbar_init_fence();
    }
    __syncthreads();
    kl_grid_wait();
    w.place = kda_place_of(p.sequences, w.head / p.H);

    if (warp < GROUPS)
        walk_state<KP>(p, w, warp, shared);
    else if (warp < 2 * GROUPS)
        walk_output<KP>(p, w, warp - GROUPS, shared);
    else
        load_tiles<KP>(p, w, shared);
}

kda_problem lengths_of(const dplr_problem *p)
{
    kda_problem like = {};
    like.B = p->B;
    like.T = p->T;
    like.N = p->N;
    like.cu_seqlens = p->cu_seqlens;
    return like;
}

struct carved {
    unsigned char *tiles;
    void *table;
};

size_t tile_bytes(int64_t K)
{
    int KP = kda_padded(K);
    return KP == 64 ? dplr_tile<64>::bytes : KP == 128 ? dplr_tile<128>::bytes : dplr_tile<256>::bytes;
}

carved carve(kl_arena *a, const dplr_problem *p)
{
    kda_problem like = lengths_of(p);
    carved c;
    size_t tiles = kl_mul((size_t)kda_tile_count(&like), (size_t)p->H, &a->overflow);
    c.tiles = (unsigned char *)kl_arena_take(a, tiles, tile_bytes(p->K));
    c.table = kl_arena_take(a, 1, kda_sequences_bytes(&like));
    return c;
}

bool by_16(const void *x, int64_t row) { return row % 8 == 0 && (uintptr_t)x % 16 == 0; }

dplr_view view_of(const dplr_problem *p, const carved &c)
{
    kda_problem like = lengths_of(p);
    dplr_view v = {};
    v.q = (const uint16_t *)p->q;
    v.k = (const uint16_t *)p->k;
    v.a = (const uint16_t *)p->a;
    v.b = (const uint16_t *)p->b;
    v.g = (const uint16_t *)p->g;
    v.v = (const uint16_t *)p->v;
    v.h0 = p->h0;
    v.ht = p->ht;
    v.o = (uint16_t *)p->o;
    v.H = p->H;
    v.K = (int)p->K;
    v.V = (int)p->V;
    v.scale = kda_scale(p->scale, p->K);
    v.keys_by_16 = by_16(p->q, p->K) && by_16(p->k, p->K) && by_16(p->a, p->K) && by_16(p->b, p->K) && by_16(p->g, p->K);
    v.values_by_16 = by_16(p->v, p->V) && by_16(p->o, p->V);
    v.sequences = kda_sequences_of(&like, c.table);
    v.tiles = c.tiles;
    return v;
}

template <int KP> kl_status launch(const kl_ctx *ctx, const dplr_problem *p, const dplr_view &view, int64_t tiles)
{
    kl_grid g;
    g.x = tiles * p->H;
    g.threads = KP + 32;
    g.shared = intra_shared<KP>::bytes;
    KL_TRY(kl_launch(ctx, "dplr prepare", g, prepare<KP>, view));
    int strips = (int)kda_ceil(p->V, COLUMNS);
    g = kl_grid();
    g.x = p->N * p->H * strips;
    g.threads = WALK_THREADS;
    g.shared = walk_shared<KP>::bytes;
    g.overlap = tiles > 0;
    return kl_launch(ctx, "dplr walk", g, walk<KP>, view, strips);
}

} // namespace

size_t dplr_cuda_chunk_workspace(const kl_ctx *, const void *problem, kl_pass pass)
{
    if (pass != KL_FORWARD)
        return 0;
    kl_arena a = kl_arena_count();
    carve(&a, (const dplr_problem *)problem);
    return a.overflow ? SIZE_MAX : a.used;
}

kl_status dplr_cuda_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const dplr_problem *p = (const dplr_problem *)problem;
    size_t needed = dplr_cuda_chunk_workspace(ctx, p, KL_FORWARD);
    KL_REQUIRE(needed == 0 || (workspace && bytes >= needed), "dplr: workspace: expected %zu bytes, got %zu", needed, workspace ? bytes : 0);
    kl_arena a = kl_arena_over(workspace, bytes);
    carved c = carve(&a, p);
    dplr_view view = view_of(p, c);
    kda_problem like = lengths_of(p);
    KL_TRY(kda_sequences_upload(ctx, &like, c.table));
    int64_t tiles = kda_tile_count(&like);
    switch (kda_padded(p->K)) {
    case 64: return launch<64>(ctx, p, view, tiles);
    case 128: return launch<128>(ctx, p, view, tiles);
    default: return launch<256>(ctx, p, view, tiles);
    }
}
