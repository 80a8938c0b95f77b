/* The first pass of the chunk kernels: every tile of every head, into memory. */
#include "kda/cuda/prepare.cuh"
#include "kda/cuda/sequences.cuh"

#include "common/arena.h"
#include "common/gpu.h"

namespace {

template <int KP> constexpr int ROOM = (kda_prepare_room<KP>::bytes + 1023) / 1024 * 1024;
enum { RESIDENT = 2 }; /* groups a multiprocessor: more fight over memory */

/* gridDim.x as so many tiles of all heads and so many heads. */
struct walk_step {
    int tiles, heads;
};

/* A walk over (tile, head) pairs, `gridDim.x` of them at a step, heads innermost. Tiles take 15 KB each, so int counts them. */
struct walk {
    int tile, hv, n, end; /* the tile is of sequence n, whose tiles end before `end` */

    __device__ __forceinline__ void find(const kda_sequences &s)
    {
        n = (int)kda_sequence_of_tile(s, tile);
        kda_place place = kda_place_of(s, n);
        end = (int)(place.tile + place.tiles);
    }
    __device__ __forceinline__ walk(const kda_sequences &s, int HV) : tile((int)blockIdx.x / HV), hv((int)blockIdx.x % HV) { find(s); }
    __device__ __forceinline__ bool next(const kda_sequences &s, int tiles, int HV, walk_step step)
    {
        tile += step.tiles;
        hv += step.heads;
        if (hv >= HV) {
            tile++;
            hv -= HV;
        }
        if (tile >= end && tile < tiles)
            find(s);
        return tile < tiles;
    }
    __device__ __forceinline__ kda_tile_rows rows(const kda_tile_source &source, const kda_sequences &s, int thread) const
    {
        kda_place place = kda_place_of(s, n);
        int64_t first = (tile - place.tile) * s.tile;
        return kda_locate_rows(source, hv, place.begin + first, (int)min((int64_t)s.tile, place.length - first), thread);
    }
};

/* Groups walk over the pairs, a block each, the next pair's rows on their way while one is made. */
template <class Form>
__global__ void __launch_bounds__(KDA_GROUP, RESIDENT)
prepare_tiles(const __grid_constant__ kda_tile_source source, const __grid_constant__ kda_sequences sequences, int tile_count, int HV, walk_step step, unsigned char *tiles)
{
    constexpr int KP = Form::KP, BYTES = Form::tile::bytes;
    KL_SHARED(shared);
    unsigned char *room = shared, *tile = shared + ROOM<KP>;
    int thread = (int)threadIdx.x;
    walk at(sequences, HV);
    kda_tile_rows rows = at.rows(source, sequences, thread);
    kda_prepare_ahead ahead = kda_prepare_load<KP>(source, rows, room, thread);
    kda_prepare_head<KP> head = kda_prepare_head_of<KP>(source, at.hv, thread);
    for (bool more = true; more;) {
        unsigned char *to = tiles + ((int64_t)at.tile * HV + at.hv) * BYTES;
        int tokens = rows.tokens;
        more = at.next(sequences, tile_count, HV, step);
        if (more) {
            rows = at.rows(source, sequences, thread);
            kda_fetch_rows<KP>(source, rows, thread);
        } else
            kl_grid_release();
        auto wait_for_tile = [&] {
            if (thread == 0)
                kl_bulk_wait_read<0>();
        };
        auto load_next = [&] {
            if (!more)
                return;
            ahead = kda_prepare_load<KP>(source, rows, room, thread);
            head = kda_prepare_head_of<KP>(source, at.hv, thread);
        };
        kda_prepare_tile<Form>(source, head, ahead, tokens, room, tile, thread, 1, wait_for_tile, load_next);
        if (thread == 0) {
            kl_bulk_store(to, tile, BYTES);
            kl_bulk_commit();
        }
    }
    if (thread == 0)
        kl_bulk_wait<0>();
}

template <class Form> kl_status launch(const kl_ctx *ctx, const kda_problem *p, const void *table, void *tiles)
{
    int64_t count = kda_tile_count(p), resident = (int64_t)kl_gpu_multiprocessors(ctx) * RESIDENT;
    kl_grid g;
    g.x = count * p->HV < resident ? count * p->HV : resident;
    walk_step step = {(int)(g.x / p->HV), (int)(g.x % p->HV)};
    g.threads = KDA_GROUP;
    g.shared = ROOM<Form::KP> + Form::tile::bytes;
    return kl_launch(ctx, "kda_prepare", g, prepare_tiles<Form>, kda_tile_source_of(p), kda_sequences_of(p, table), (int)count, (int)p->HV, step,
                     (unsigned char *)tiles);
}

bool aligned(const void *x, int64_t stride) { return (uintptr_t)x % 16 == 0 && stride % 8 == 0; }

} // namespace

kda_tile_source kda_tile_source_of(const kda_problem *p)
{
    kda_tile_source s = {};
    s.q = (const uint16_t *)p->q;
    s.k = (const uint16_t *)p->k;
    s.g = (const uint16_t *)p->g;
    s.beta = (const uint16_t *)p->beta;
    s.A_log = p->A_log;
    s.dt_bias = p->dt_bias;
    s.q_stride = kda_stride(p->q_stride, p->H * p->K);
    s.k_stride = kda_stride(p->k_stride, p->H * p->K);
    s.g_stride = kda_stride(p->g_stride, p->HV * p->G);
    s.beta_stride = kda_stride(p->beta_stride, p->HV);
    s.K = (int)p->K;
    s.G = (int)p->G;
    s.share = (int)(p->HV / p->H);
    s.gate = p->gate;
    s.beta_kind = p->beta_kind;
    s.lower_bound = p->lower_bound;
    s.scale = kda_scale(p->scale, p->K);
    s.qk_l2norm = p->qk_l2norm;
    s.no_delta = p->no_delta;
    bool whole = p->K == kda_padded(p->K);
    s.wide = whole && aligned(p->q, s.q_stride) && aligned(p->k, s.k_stride);
    s.g_wide = whole && p->G == p->K && aligned(p->g, s.g_stride);
    s.g_cells = whole && !s.g_wide && (p->G == 0 || p->K / p->G % 8 == 0);
    return s;
}

kl_status kda_cuda_prepare(const kl_ctx *ctx, const kda_problem *p, const void *table, void *tiles, bool core)
{
    switch (kda_padded(p->K)) {
    case 64:
        return core ? launch<kda_core_form<64>>(ctx, p, table, tiles) : launch<kda_block_form<64>>(ctx, p, table, tiles);
    case 128:
        return core ? launch<kda_core_form<128>>(ctx, p, table, tiles) : launch<kda_block_form<128>>(ctx, p, table, tiles);
    default:
        if (core)
            return kl_error(KL_EUNSUPPORTED, "kda tiles: K: expected at most 128 in the core form, got %lld", (long long)p->K);
        return launch<kda_block_form<256>>(ctx, p, table, tiles);
    }
}

static void carve(kl_arena *a, const kda_problem *p, bool core, void **table, void **tiles)
{
    *table = kl_arena_take(a, kda_sequences_bytes(p), 1);
    *tiles = kl_arena_take(a, kl_mul((size_t)kda_tile_count(p), (size_t)p->HV, &a->overflow), core ? kda_core_tile_bytes(p->K) : kda_tile_bytes(p->K));
}

size_t kda_cuda_tiles_workspace(const kda_problem *p, bool core)
{
    kl_arena a = kl_arena_count();
    void *table, *tiles;
    carve(&a, p, core, &table, &tiles);
    return a.overflow ? SIZE_MAX : a.used;
}

kl_status kda_cuda_tiles(const kl_ctx *ctx, const kda_problem *p, bool core, void *workspace, size_t bytes, const void **tiles)
{
    kl_arena a = kl_arena_over(workspace, bytes);
    void *table, *memory;
    carve(&a, p, core, &table, &memory);
    if (a.overflow)
        return kl_error(KL_EINVAL, "kda tiles: workspace: expected %zu bytes, got %zu", kda_cuda_tiles_workspace(p, core), bytes);
    KL_TRY(kda_sequences_upload(ctx, p, table));
    *tiles = memory;
    return kda_cuda_prepare(ctx, p, table, memory, core);
}
