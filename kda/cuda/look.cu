/* Which parts may start from zero state. */
#include "kda/cuda/parts.cuh"
#include "kda/cuda/truncate.cuh"

namespace {

enum { THREADS = 128, KEPT = 16 * THREADS /* floats of h0 a block copies */ };

struct work {
    kda_walk walk;
    kda_parts parts;
    const unsigned char *tiles;
    int *start;
    float *kept;
};

__device__ __forceinline__ void keep_h0(const work &p, int x)
{
    int64_t size = (int64_t)p.walk.K * p.walk.V;
    int pieces = (int)((size + KEPT - 1) / KEPT), pair = x / pieces;
    kda_path path = kda_path_of(p.walk, pair);
    if (path.tiles < 0)
        return;
    const float *from = p.walk.h0 + (path.slot * p.walk.HV + path.head) * size;
    float *to = p.kept + pair * size;
    int64_t first = (int64_t)(x % pieces) * KEPT + threadIdx.x;
#pragma unroll
    for (int i = 0; i < KEPT; i += THREADS)
        if (first + i < size)
            to[first + i] = from[first + i];
}

/* A block a part, and blocks for h0. */
template <int KP> __global__ void __launch_bounds__(THREADS) look(const __grid_constant__ work p)
{
    KL_SHARED(memory);
    int pairs = p.parts.sequences * (int)p.walk.HV, at = (int)blockIdx.x, number = at / pairs, begin = number * p.parts.tiles;
    kl_grid_wait();
    kl_grid_release();
    if (number >= p.parts.most) {
        keep_h0(p, at - p.parts.most * pairs);
        return;
    }
    kda_path path = kda_path_of(p.walk, at % pairs);
    int64_t apart = p.walk.HV * kda_core_tile<KP>::bytes;
    int start = number == 0 ? 0 : -1;
    if (number > 0 && begin < path.tiles)
        start = kda_forgotten_since<KP>(p.tiles + (path.place.tile * p.walk.HV + path.head) * kda_core_tile<KP>::bytes, apart, begin, *(kda_look_room *)memory);
    if (threadIdx.x == 0)
        p.start[at] = start;
}

} // namespace

kl_status kda_look(const kl_ctx *ctx, const kda_problem *p, const kda_parts &parts, const kda_walk &walk, const unsigned char *tiles, int *start, float *kept)
{
    work w = {walk, parts, tiles, start, kept};
    int64_t pairs = p->N * p->HV;
    kl_grid g;
    g.x = pairs * (parts.most + (kept ? kda_ceil(p->K * p->V, KEPT) : 0));
    g.threads = THREADS;
    g.shared = sizeof(kda_look_room);
    g.overlap = true;
    return kl_launch(ctx, "kda look", g, kda_padded(p->K) == 64 ? look<64> : look<128>, w);
}
