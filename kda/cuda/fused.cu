/* The chunk forward in one kernel whose tiles never leave a block, for heads enough to fill the device: a block goes through whole
 * heads, one after the other. Two groups prepare its tiles side by side, step by step together, so that instructions are fetched once
 * for both; a warpgroup walks over them.
 *
 * Heads are dealt out longest first, there and back: block b takes heads b, 2 B - 1 - b, 2 B + b, .. of B blocks. */
#define KL_LANE_ANEW
#include <algorithm>

#include "common/gpu.h"
#include "kda/cuda/fused_walk.cuh"

namespace {

enum { THREADS = (1 + KDA_FUSED_GROUPS) * KDA_GROUP, WALKING = 232, PREPARING = 136 };
/* Named barriers: of a group, of all of them, of the warpgroup that walks. */
enum { GROUP = 1, GROUPS = GROUP + KDA_FUSED_GROUPS, WALK };

struct work {
    kda_walk walk;
    kda_tile_source source;
    kl_tensor_map q, k, g, v; /* [tokens][heads' channels], boxes of 32 x 64 */
    int pairs;
};

__host__ __device__ __forceinline__ int64_t pair_of(int block, int blocks, int turn)
{
    return turn % 2 ? (turn + 1) * (int64_t)blocks - 1 - block : turn * (int64_t)blocks + block;
}

/* The block's turn-th head, from its first tile on; no tiles where there is nothing to walk over. */
__device__ __forceinline__ kda_fused_tile head_of(const work &p, int turn)
{
    kda_fused_tile x = {};
    int64_t pair = pair_of((int)blockIdx.x, (int)gridDim.x, turn);
    x.turn = turn;
    if (pair < p.pairs) {
        kda_path path = kda_path_of(p.walk, pair);
        x.begin = path.place.begin;
        x.length = path.place.length;
        x.slot = path.slot;
        x.head = (int)path.head;
        x.tiles = max(path.tiles, 0);
    }
    return x;
}
__device__ __forceinline__ int turns_of(const work &p) { return (p.pairs + (int)gridDim.x - 1) / (int)gridDim.x; }

/* `count` tiles further. */
__device__ __forceinline__ void move(kda_fused_tile &x, const work &p, int count)
{
    x.tile += count;
    while (x.tile >= x.tiles && x.turn < turns_of(p)) {
        int beyond = x.tile - x.tiles;
        x = head_of(p, x.turn + 1);
        x.tile = beyond;
    }
}

/* Tiles of the block, by a warp. */
__device__ __forceinline__ int count_tiles(const work &p)
{
    int count = 0;
    for (int turn = kl_lane(); turn < turns_of(p); turn += 32)
        count += head_of(p, turn).tiles;
    for (int m = 16; m; m /= 2)
        count += __shfl_xor_sync(0xffffffffu, count, m);
    return count;
}

/* ---- preparing ---- */

/* The rows of a tile that its sequence does not fill: what lies beyond is not read. */
template <int KP> __device__ __forceinline__ void load_last_rows(const kda_tile_source &s, const kda_fused_tile &x, unsigned char *room, int thread)
{
    using at = kda_prepare_room<KP>;
    kda_tile_rows rows = kda_locate_rows(s, x.head, x.token(), x.tokens(), thread);
    bool there = thread >> 2 < rows.tokens;
    uint32_t rest = kda_gate_rest(s.gate);
#pragma unroll 1
    for (int j = 0; j < KP / 32; j++) {
        int to = kda_cell(thread >> 2, (thread & 3) + 4 * j);
        kl_copy16(room + at::k + to, there ? rows.k + 32 * j : s.k, there);
        kl_copy16(room + at::q + to, there ? rows.q + 32 * j : s.q, there);
        if (there)
            kl_copy16(room + at::g + to, rows.g + 32 * j);
        else
            *(uint4 *)(room + at::g + to) = make_uint4(rest, rest, rest, rest);
    }
    kl_copy_commit();
}

/* The rows of a whole tile, by one thread. */
template <int KP> __device__ __forceinline__ void load_whole_rows(const work &p, const kda_fused_tile &x, unsigned char *room, uint64_t *bar)
{
    using at = kda_prepare_room<KP>;
    int token = (int)x.token(), key = (int)kda_key_head(p.source, x.head) * KP, value = x.head * KP;
    kl_fence_async_shared();
    kl_mbar_expect(bar, 3 * at::rows);
#pragma unroll
    for (int c = 0; c < KP; c += 64) {
        int to = 64 * c; /* 32 rows of 128 bytes for 64 channels */
        kl_tensor_load(room + at::g + to, &p.g, value + c, token, bar);
        kl_tensor_load(room + at::k + to, &p.k, key + c, token, bar);
        kl_tensor_load(room + at::q + to, &p.q, key + c, token, bar);
    }
    kl_bulk_issued(bar);
}

/* Tiles group, group + GROUPS, .. of the block. */
template <int KP> __device__ __forceinline__ void prepare(kda_fused_ring<KP> &m, const work &p, uint32_t group, uint32_t thread)
{
    using ring = kda_fused_ring<KP>;
    kda_fused_tile *at = m.next[group]; /* of even and of odd turns */
    kda_prepare_head<KP> head = {};
    kda_prepare_ahead ahead = {};
    auto load = [&](const kda_fused_tile &x) {
        head = kda_prepare_head_of<KP>(p.source, x.head, thread);
        ahead = {(int)thread < x.tokens() ? p.source.beta[(x.token() + thread) * p.source.beta_stride + x.head] : 0u};
        if (x.tokens() < KDA_TILE)
            load_last_rows<KP>(p.source, x, m.room[group], thread);
        else if (thread == 0)
            load_whole_rows<KP>(p, x, m.room[group], &m.rows[group]);
    };
    int count = count_tiles(p), phase = 0;
    if ((int)group < count) {
        kda_fused_tile first = head_of(p, 0);
        move(first, p, group);
        if (thread == 0)
            at[0] = first;
        load(first);
        kl_barrier(GROUP + group, KDA_GROUP);
    }
#pragma unroll 1
    for (int n = (int)group, turn = 0; n < count; n += KDA_FUSED_GROUPS, turn++) {
        kl_pin(group); /* addresses are worked out again, not kept in registers */
        kl_pin(thread);
        if (n - (int)group + KDA_FUSED_GROUPS <= count) /* all groups have a tile */
            kl_barrier(GROUPS, KDA_FUSED_GROUPS * KDA_GROUP);
        int slot = n % ring::SLOTS;
        bool whole = at[turn & 1].tokens() == KDA_TILE;
        if (whole) {
            kl_mbar_wait(&m.rows[group], phase);
            phase ^= 1;
        }
        auto wait_for_place = [&] {
            if (n >= ring::SLOTS)
                kl_mbar_wait(&m.empty[slot], (n / ring::SLOTS - 1) & 1);
            if (!whole)
                kda_fused_take(m.slot[slot].v, p.walk, at[turn & 1], thread);
            if (thread == 0) {
                kda_fused_tile next = m.slot[slot].at = at[turn & 1];
                if (whole) {
                    kl_mbar_expect(&m.full[slot], sizeof m.slot[slot].v);
                    for (int half = 0; half < 2; half++)
                        kl_tensor_load(m.slot[slot].v[half], &p.v, next.head * p.walk.V + KDA_WIDE_COLUMNS * half, (int)next.token(), &m.full[slot]);
                    kl_bulk_issued(&m.full[slot]);
                }
                move(next, p, KDA_FUSED_GROUPS);
                at[(turn + 1) & 1] = next;
            }
        };
        auto load_next = [&] {
            if (n + KDA_FUSED_GROUPS < count)
                load(at[(turn + 1) & 1]);
        };
        kda_prepare_tile<kda_core_form<KP>>(p.source, head, ahead, at[turn & 1].tokens(), m.room[group], m.slot[slot].tile, (int)thread, GROUP + (int)group,
                                            wait_for_place, load_next);
        if (!whole) {
            kl_copy_wait<0>();
            kl_barrier(GROUP + group, KDA_GROUP);
        }
        kl_mbar_arrive(&m.full[slot]);
        if (!whole && thread == 0)
            kl_mbar_arrive(&m.full[slot]);
    }
}

/* ---- walking ---- */

/* Sequences without tokens keep their state. */
__device__ __forceinline__ void keep_empty(const work &p, int thread)
{
    const kda_walk &w = p.walk;
    if (!w.sequences.row || !w.ht || w.ht == w.h0)
        return;
    int64_t size = (int64_t)w.K * w.V;
    for (int64_t pair = blockIdx.x; pair < p.pairs; pair += gridDim.x) {
        kda_path path = kda_path_of(w, pair);
        int64_t at = (path.slot * w.HV + path.head) * size;
        for (int64_t i = thread; path.tiles == 0 && i < size; i += KDA_GROUP)
            w.ht[at + i] = w.h0 ? w.h0[at + i] : 0.0f;
    }
}

template <int KP> __device__ __forceinline__ void walk(kda_fused_ring<KP> &m, const work &p, int warp, int thread)
{
    using ring = kda_fused_ring<KP>;
    const kda_walk &w = p.walk;
    keep_empty(p, thread);
    int count = count_tiles(p), column = KDA_COLUMNS * warp;
    auto state_of = [&](const kda_fused_tile &x) { return (x.slot * w.HV + x.head) * w.K * w.V; };
    kda_fused_warp<ring> own(m, warp);
    kda_load_state<KP>(own.a.s, w, nullptr, column);
    kda_load_state<KP>(own.b.s, w, nullptr, column);
#pragma unroll 1
    for (int n = 0; n < count; n++) {
        int slot = n % ring::SLOTS;
        kl_mbar_wait(&m.full[slot], n / ring::SLOTS & 1);
        if (m.slot[slot].at.tile == 0) {
            const float *h0 = w.h0 ? w.h0 + state_of(m.slot[slot].at) : nullptr;
            kda_load_state<KP>(own.a.s, w, h0, column);
            kda_load_state<KP>(own.b.s, w, h0, column + KDA_WIDE_COLUMNS);
        }
        own.step(n);
        kda_fused_tile at = m.slot[slot].at;
        kl_mbar_arrive(&m.empty[slot]);
        kl_barrier(WALK, KDA_GROUP);
        kda_fused_give(m.o[n & 1], w, at, thread);
        if (w.ht && at.tile == at.tiles - 1) {
            kda_store_state<KP>(own.a.s, w, w.ht + state_of(at), column);
            kda_store_state<KP>(own.b.s, w, w.ht + state_of(at), column + KDA_WIDE_COLUMNS);
        }
    }
}

template <int KP> __global__ void __launch_bounds__(THREADS, 1) fused(const __grid_constant__ work p)
{
    KL_SHARED(memory);
    kda_fused_ring<KP> &m = *(kda_fused_ring<KP> *)memory;
    int role = __shfl_sync(0xffffffffu, (int)threadIdx.x / KDA_GROUP, 0), warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    if (threadIdx.x == 0)
        kda_fused_init(m);
    __syncthreads();
    if (role == 0) {
        kl_registers_more<WALKING>();
        walk<KP>(m, p, warp, (int)threadIdx.x);
    } else {
        kl_registers_fewer<PREPARING>();
        prepare<KP>(m, p, role - 1, threadIdx.x % KDA_GROUP);
    }
}

/* ---- the host's side ---- */

/* Measured nanoseconds: of a block for a tile; before the first and after the last. */
enum { TILE = 2800, START = 9000 };

int blocks_of(const kl_ctx *ctx, const kda_problem *p) { return (int)std::min<int64_t>(p->N * p->HV, kl_gpu_multiprocessors(ctx)); }

/* Rows of whole pieces of 16 bytes that the tensor copies can describe. */
bool offers(const kl_ctx *ctx, const kda_problem *p)
{
    kda_tile_source s = kda_tile_source_of(p);
    kda_walk w = kda_walk_of(p, nullptr);
    return ctx->hopper && s.wide && s.g_wide && w.v_aligned && w.o_aligned && p->K <= 128 && p->V <= 2 * KDA_WIDE_COLUMNS && !p->chunk_states &&
           p->N <= KDA_ORDERED_SEQUENCES && kda_tile_count(p) > 0 && p->B * p->T <= INT32_MAX && p->N * p->HV <= INT32_MAX;
}

kl_status describe(kl_tensor_map *map, const char *name, const void *base, int64_t tokens, int64_t width, int64_t stride)
{
    kl_tensor_shape s;
    s.size[0] = width;
    s.size[1] = tokens;
    s.stride[1] = stride;
    s.box[0] = 64;
    s.box[1] = KDA_TILE;
    return kl_tensor_describe(map, name, base, s);
}

template <int KP> kl_status launch(const kl_ctx *ctx, const work &w, int blocks)
{
    kl_grid g;
    g.x = blocks;
    g.threads = THREADS;
    g.shared = sizeof(kda_fused_ring<KP>);
    return kl_launch(ctx, "kda fused", g, fused<KP>, w);
}

} // namespace

int64_t kda_cuda_fused_time(const kl_ctx *ctx, const kda_problem *p)
{
    if (!offers(ctx, p))
        return INT64_MAX;
    int64_t order[KDA_ORDERED_SEQUENCES], most = 0, pairs = p->N * p->HV;
    int blocks = blocks_of(ctx, p);
    if (p->cu_seqlens)
        kda_sequences_order(p, order);
    for (int b = 0; b < blocks; b++) {
        int64_t tiles = 0;
        for (int turn = 0; turn * (int64_t)blocks < pairs; turn++) {
            int64_t pair = pair_of(b, blocks, turn);
            if (pair < pairs)
                tiles += kda_ceil(kda_sequence(p->T, p->cu_seqlens, p->cu_seqlens ? order[pair / p->HV] : 0).length, KDA_TILE);
        }
        most = std::max(most, tiles);
    }
    return START + most * TILE;
}

size_t kda_cuda_fused_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const kda_problem *p = (const kda_problem *)problem;
    return offers(ctx, p) ? kda_sequences_bytes(p) : kda_cuda_two_pass_workspace(ctx, p, pass);
}

kl_status kda_cuda_fused_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = (const kda_problem *)problem;
    if (!offers(ctx, p))
        return kda_cuda_two_pass_forward(ctx, p, workspace, bytes);
    size_t need = kda_sequences_bytes(p);
    KL_REQUIRE(!need || (workspace && bytes >= need), "kda: workspace: expected %zu bytes, got %zu", need, workspace ? bytes : 0);
    KL_TRY(kda_sequences_upload(ctx, p, workspace));
    work w = {};
    w.walk = kda_walk_of(p, workspace);
    w.source = kda_tile_source_of(p);
    w.pairs = (int)(p->N * p->HV);
    KL_TRY(describe(&w.q, "kda: q", p->q, p->B * p->T, p->H * p->K, w.source.q_stride));
    KL_TRY(describe(&w.k, "kda: k", p->k, p->B * p->T, p->H * p->K, w.source.k_stride));
    KL_TRY(describe(&w.g, "kda: g", p->g, p->B * p->T, p->HV * p->K, w.source.g_stride));
    KL_TRY(describe(&w.v, "kda: v", p->v, p->B * p->T, p->HV * p->V, w.walk.v_stride));
    return p->K == 64 ? launch<64>(ctx, w, blocks_of(ctx, p)) : launch<128>(ctx, w, blocks_of(ctx, p));
}
