/* The chunk forward with sequences cut into parts (parts.cuh), for heads too few to fill the device: all tiles are prepared, then
 *
 *     look        which parts may start from zero state, warmed up by a few tiles before them     start[part]
 *     summarise   what a part between carried states makes of the state before it                 M, B
 *     carry       the states carried from part to part
 *     walk        every part from its own start
 *
 * The same launches whatever the gates: where a start is proven, what would have carried the state there returns at once. */
#include "common/arena.h"
#include "common/gpu.h"
#include "kda/cuda/carry.cuh"
#include "kda/cuda/parts.cuh"
#include "kda/cuda/prepare.cuh"
#include "kda/cuda/summary.cuh"

namespace {

struct work {
    kda_walk walk;
    kda_parts parts;
    const unsigned char *tiles;
    int *start;     /* [most][sequences][HV] */
    int *product;   /* [carried][HV]: carried state c is M carried state c - 1 + B */
    const float *h0; /* [sequences][HV][K,V]: a copy of it where ht takes its place; NULL: none */
    float *state;   /* [carried][HV][K,V]: carried states */
    float *M;       /* [carried][HV][KP KP]: of the part that begins with this carried state */
};

__device__ __forceinline__ int64_t size_of(const kda_walk &p) { return (int64_t)p.K * p.V; }
__device__ __forceinline__ float *state_of(const work &p, const kda_part &part, int c) { return p.state + (part.carried + c * p.walk.HV) * size_of(p.walk); }
template <int KP> __device__ __forceinline__ float *M_of(const work &p, const kda_part &part, int c)
{
    return p.M + (part.carried + c * p.walk.HV) * KP * KP;
}
__device__ __forceinline__ int64_t slot_of(const work &p, const kda_part &part) { return (part.path.slot * p.walk.HV + part.path.head) * size_of(p.walk); }
/* The state before the sequence; NULL: zero. */
__device__ __forceinline__ const float *first_state(const work &p, const kda_part &part)
{
    return kda_first_state(p.walk, p.h0, part.path, part.pair);
}
template <int KP> __device__ __forceinline__ const unsigned char *tile_of(const work &p, const kda_part &part, int tile)
{
    return p.tiles + (size_t)((part.path.place.tile + tile) * p.walk.HV + part.path.head) * kda_core_tile<KP>::bytes;
}
template <int KP> __device__ __forceinline__ int64_t tiles_apart(const work &p) { return p.walk.HV * kda_core_tile<KP>::bytes; }

/* A block: 128 columns of V, or all of K, through the parts between two carried states. */
template <int KP> __global__ void __launch_bounds__(KDA_SUMMARY_THREADS, 1) summarise(const __grid_constant__ work p)
{
    using ring = kda_summary_ring<KP, 5>;
    KL_SHARED(memory);
    ring &m = *(ring *)memory;
    const kda_parts &parts = p.parts;
    int splits = (p.walk.V + KDA_SUMMARY_COLUMNS - 1) / KDA_SUMMARY_COLUMNS, split = (int)blockIdx.x % (splits + 1), pair = (int)blockIdx.x / (splits + 1);
    int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0), HV = (int)p.walk.HV, number = pair / HV;
    int s = kda_find_sequence(parts, number, [&](int i) { return parts.carried[i]; });
    bool of_K = split == splits;
    kda_summary_init(m, !of_K);
    __syncthreads();
    kl_grid_wait();
    kl_grid_release();
    int c = number - parts.carried[s], last = (c + 1) * parts.span;
    kda_part part = kda_part_of(p.walk, parts, s, c * parts.span, pair % HV);
    bool wanted = last < part.count && part.path.tiles > 0 && kda_start_of(p.start, part, last) < 0;
    int since = wanted ? kda_last_start(p.start, part, last) : 0;
    if (of_K && threadIdx.x == 0 && last < part.count)
        p.product[part.carried + (c + 1) * HV] = wanted && since < 0;
    if (!wanted || (of_K && since >= 0))
        return;
    int begin = since > 0 ? kda_start_of(p.start, part, since) : part.number * parts.tiles, end = last * parts.tiles;
    int column = of_K ? 0 : split * KDA_SUMMARY_COLUMNS;
    if (warp >= 8) {
        kda_summary_load(m, p.walk, part.path, begin, end, tile_of<KP>(p, part, 0), tiles_apart<KP>(p), column + (warp - 8) * KDA_WIDE_COLUMNS, warp - 8, !of_K);
        return;
    }
    column += warp * KDA_COLUMNS;
    kda_summary_warp<ring> own(m, warp);
    if (of_K)
        kda_identity<KP>(own.s, column);
    else
        kda_load_state<KP>(own.s, p.walk, since == 0 ? first_state(p, part) : nullptr, column);
    own.walk(end - begin);
    if (of_K)
        kda_store_summary<KP>(own.s, M_of<KP>(p, part, c), column);
    else
        kda_store_state<KP>(own.s, p.walk, state_of(p, part, c + 1), column);
}

/* A block: 8 columns of V of a head. */
template <int KP> __global__ void __launch_bounds__(2 * KP, 1) carry(const __grid_constant__ work p)
{
    KL_SHARED(memory);
    const kda_parts &parts = p.parts;
    int splits = (p.walk.V + KDA_CARRY_COLUMNS - 1) / KDA_CARRY_COLUMNS, pair = (int)blockIdx.x / splits, s = pair / (int)p.walk.HV;
    kl_grid_wait();
    kl_grid_release();
    kda_part part = kda_part_of(p.walk, parts, s, 0, pair % (int)p.walk.HV);
    if (part.path.tiles <= 0)
        return;
    kda_carried at;
    at.state = state_of(p, part, 0);
    at.M = M_of<KP>(p, part, 0);
    at.product = p.product + part.carried;
    at.state_apart = p.walk.HV * size_of(p.walk);
    at.M_apart = p.walk.HV * KP * KP;
    at.product_apart = p.walk.HV;
    at.count = parts.carried[s + 1] - parts.carried[s];
    at.column = (int)blockIdx.x % splits * KDA_CARRY_COLUMNS;
    kda_carry<KP>(*(kda_carry_room<KP> *)memory, p.walk, at);
}

/* A block: 64 columns of V of a part, and of those after it that nothing else starts. Parts that always start are taken first, so
 * that they are spread over the device. */
template <int KP> __global__ void __launch_bounds__(KDA_WIDE_THREADS) walk(const __grid_constant__ work p)
{
    using ring = kda_wide_ring<KP, 5>;
    KL_SHARED(memory);
    ring &m = *(ring *)memory;
    const kda_parts &parts = p.parts;
    int splits = (p.walk.V + KDA_WIDE_COLUMNS - 1) / KDA_WIDE_COLUMNS, split = (int)blockIdx.x % splits, pair = (int)blockIdx.x / splits;
    int HV = (int)p.walk.HV, x = pair / HV, always = parts.carried[parts.sequences], s, number;
    if (x < always) {
        s = kda_find_sequence(parts, x, [&](int i) { return parts.carried[i]; });
        number = (x - parts.carried[s]) * parts.span;
    } else {
        x -= always;
        s = kda_find_sequence(parts, x, [&](int i) { return parts.first[i] - parts.carried[i]; });
        x -= parts.first[s] - parts.carried[s];
        number = x + x / (parts.span - 1) + 1;
    }
    if (threadIdx.x == 0)
        kda_wide_init(m);
    __syncthreads();
    kl_grid_wait();
    kda_part part = kda_part_of(p.walk, parts, s, number, pair % HV);
    int start = p.start[part.at], next = kda_next_start(p.start, parts, part);
    if (part.path.tiles < 0 || (start < 0 && number % parts.span))
        return;
    int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0), column = split * KDA_WIDE_COLUMNS;
    kda_stretch at = {};
    at.from = number * parts.tiles;
    at.begin = start < 0 || number == 0 ? at.from : start;
    at.end = next < part.count ? next * parts.tiles : part.path.tiles;
    at.h0 = number == 0 ? first_state(p, part) : start < 0 ? state_of(p, part, number / parts.span) : nullptr;
    at.ht = p.walk.ht && next == part.count ? p.walk.ht + slot_of(p, part) : nullptr;
    if (warp < 4)
        kda_wide_compute(m, p.walk, part.path, at, column, warp);
    else if (warp == 4)
        kda_wide_load(m, p.walk, part.path, at, column, [&](int i) { return tile_of<KP>(p, part, i); });
    else
        kda_wide_store(m, p.walk, part.path, at, column, [](int) {});
}

/* ---- the host's side ---- */

struct memory {
    void *table;
    unsigned char *tiles;
    int *start, *product;
    float *kept, *state, *M;
};

memory carve(kl_arena *a, const kda_problem *p, const kda_parts &parts)
{
    memory m = {};
    size_t starts = (size_t)parts.most * parts.sequences * p->HV, carried = (size_t)parts.carried[parts.sequences] * p->HV;
    m.table = kl_arena_take(a, kda_sequences_bytes(p), 1);
    m.tiles = (unsigned char *)kl_arena_take(a, kl_mul((size_t)kda_tile_count(p), (size_t)p->HV, &a->overflow), kda_core_tile_bytes(p->K));
    m.start = KL_TAKE(a, int, starts);
    m.product = KL_TAKE(a, int, carried);
    m.kept = kda_keeps_h0(p) ? KL_TAKE(a, float, (size_t)(p->N * p->HV) * (size_t)(p->K * p->V)) : nullptr;
    m.state = KL_TAKE(a, float, carried *(size_t)(p->K * p->V));
    m.M = KL_TAKE(a, float, carried *(size_t)(kda_padded(p->K) * kda_padded(p->K)));
    return m;
}

kl_grid grid(int64_t blocks, int threads, size_t shared)
{
    kl_grid g;
    g.x = blocks;
    g.threads = threads;
    g.shared = shared;
    g.overlap = true;
    return g;
}

template <int KP> kl_status launch(const kl_ctx *ctx, const work &w)
{
    int64_t parts = w.parts.first[w.parts.sequences], carried = w.parts.carried[w.parts.sequences], HV = w.walk.HV, V = w.walk.V;
    if (carried > w.parts.sequences) {
        KL_TRY(kl_launch(ctx, "kda summarise", grid(carried * HV * (kda_ceil(V, KDA_SUMMARY_COLUMNS) + 1), KDA_SUMMARY_THREADS, sizeof(kda_summary_ring<KP, 5>)),
                         summarise<KP>, w));
        KL_TRY(kl_launch(ctx, "kda carry", grid(w.parts.sequences * HV * kda_ceil(V, KDA_CARRY_COLUMNS), 2 * KP,
                                                sizeof(kda_carry_room<KP>) + sizeof(int) * kda_ceil(w.parts.most, w.parts.span)), carry<KP>, w));
    }
    return kl_launch(ctx, "kda walk parts", grid(parts * HV * kda_ceil(V, KDA_WIDE_COLUMNS), KDA_WIDE_THREADS, sizeof(kda_wide_ring<KP, 5>)), walk<KP>, w);
}

size_t room(const kda_problem *p, const kda_parts &parts)
{
    kl_arena a = kl_arena_count();
    carve(&a, p, parts);
    return a.overflow ? SIZE_MAX : a.used;
}

kl_status forward(const kl_ctx *ctx, const kda_problem *p, const kda_parts &parts, void *workspace, size_t bytes, const int **start)
{
    kl_arena a = kl_arena_over(workspace, bytes);
    memory m = carve(&a, p, parts);
    if (a.overflow)
        return kl_error(KL_EINVAL, "kda: workspace: expected %zu bytes, got %zu", room(p, parts), bytes);
    KL_TRY(kda_sequences_upload(ctx, p, m.table));
    work w = {};
    w.walk = kda_walk_of(p, m.table);
    w.parts = parts;
    w.tiles = m.tiles;
    w.start = m.start;
    w.product = m.product;
    w.state = m.state;
    w.M = m.M;
    w.h0 = m.kept;
    if (start)
        *start = m.start;
    KL_TRY(kda_cuda_prepare(ctx, p, m.table, m.tiles, true));
    KL_TRY(kda_look(ctx, p, parts, w.walk, m.tiles, w.start, m.kept));
    return kda_padded(p->K) == 64 ? launch<64>(ctx, w) : launch<128>(ctx, w);
}

} // namespace

size_t kda_cuda_scan_cut_workspace(const kda_problem *p, int64_t tiles, int64_t span) { return room(p, kda_parts_cut(p, tiles, span)); }

kl_status kda_cuda_scan_cut(const kl_ctx *ctx, const kda_problem *p, int64_t tiles, int64_t span, void *workspace, size_t bytes, const int **start)
{
    return forward(ctx, p, kda_parts_cut(p, tiles, span), workspace, bytes, start);
}

int64_t kda_cuda_scan_time(const kl_ctx *ctx, const kda_problem *p)
{
    int64_t time;
    kda_parts_of(ctx, p, &time);
    return time;
}

size_t kda_cuda_scan_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const kda_problem *p = (const kda_problem *)problem;
    int64_t time;
    kda_parts parts = kda_parts_of(ctx, p, &time);
    return parts.sequences ? room(p, parts) : kda_cuda_two_pass_workspace(ctx, p, pass);
}

kl_status kda_cuda_scan_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const kda_problem *p = (const kda_problem *)problem;
    int64_t time;
    kda_parts parts = kda_parts_of(ctx, p, &time);
    return parts.sequences ? forward(ctx, p, parts, workspace, bytes, nullptr) : kda_cuda_two_pass_forward(ctx, p, workspace, bytes);
}
