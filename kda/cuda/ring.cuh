/* The shared memory of a block that walks over tiles: a ring of slots that tiles arrive in, and what the warps hand each other.
 *
 * Tiles are numbered from 0 in the order in which they are walked. Tile n lies in slot n % SLOTS. A slot's `full` barrier counts the
 * bytes that arrive, its `empty` barrier the warps that are done with the tile. */
#ifndef KL_KDA_CUDA_RING_CUH
#define KL_KDA_CUDA_RING_CUH

#include "kda/cuda/tile.cuh"

enum { KDA_V_TILES = 4, KDA_COLUMNS = 16 }; /* tiles of v on their way; columns of V a warp owns */

/* WARPS of 16 columns, each with two warps beside it: one for the input's part of u, one for the output. Per tile n
 *
 *     input    wait handed(n-2), full(n); write `input`; arrive at given(n)
 *     state    wait given(n), read(n-1); write `state`; arrive at written(n); write `u`; arrive at handed(n), release the slot
 *     output   wait written(n); read `state`; arrive at read(n); wait handed(n); read `u`; arrive at given(n+2); release the slot */
template <int KP_, int WARPS_, int SLOTS_> struct kda_ring {
    static constexpr int KP = KP_, WARPS = WARPS_, SLOTS = SLOTS_;

    unsigned char slot[SLOTS][kda_tile<KP>::bytes];
    struct {
        uint4 state[KP / 16][32], u[2][2][32]; /* A fragments of S^T and of u^T, bf16 */
        float4 input[2][4][32];                /* accumulators of -Tb v */
        unsigned char v[KDA_V_TILES][KDA_TILE * 2 * KDA_COLUMNS], o[KDA_TILE * 2 * KDA_COLUMNS];
        uint64_t given[2], handed[2], written, read;
    } column[WARPS];
    uint64_t full[SLOTS], empty[SLOTS];
};

/* By one thread, before the block synchronises. Lanes arrive each for itself. */
template <class Ring> __device__ __forceinline__ void kda_ring_init(Ring &r)
{
    for (int i = 0; i < Ring::SLOTS; i++) {
        kl_mbar_init(&r.full[i], 1);
        kl_mbar_init(&r.empty[i], 32 * 2 * Ring::WARPS);
    }
    for (int w = 0; w < Ring::WARPS; w++) {
        for (int i = 0; i < 2; i++) {
            kl_mbar_init(&r.column[w].given[i], 2 * 32);
            kl_mbar_init(&r.column[w].handed[i], 32);
        }
        kl_mbar_init(&r.column[w].written, 32);
        kl_mbar_init(&r.column[w].read, 32);
    }
    kl_mbar_init_fence();
    for (int i = 0; i < Ring::SLOTS; i++)
        kl_mbar_expect(&r.full[i], kda_tile<Ring::KP>::bytes);
    for (int w = 0; w < Ring::WARPS; w++)
        for (int i = 0; i < 2 * 32; i++)
            kl_mbar_arrive(&r.column[w].given[i & 1]); /* nothing to read before tiles 0 and 1 */
}

/* Producer: until slot n % SLOTS is free. */
template <class Ring> __device__ __forceinline__ void kda_ring_reserve(Ring &r, int n)
{
    if (n >= Ring::SLOTS)
        kl_mbar_wait(&r.empty[n % Ring::SLOTS], (n / Ring::SLOTS - 1) & 1);
}

/* Consumer warp: until tile n has come. */
template <class Ring> __device__ __forceinline__ void kda_ring_await(Ring &r, int n)
{
    kl_mbar_wait(&r.full[n % Ring::SLOTS], n / Ring::SLOTS & 1);
}

/* One thread of the block, after it awaited tile n: the slot's next tile may be counted. */
template <class Ring> __device__ __forceinline__ void kda_ring_rearm(Ring &r, int n)
{
    kl_mbar_expect(&r.full[n % Ring::SLOTS], kda_tile<Ring::KP>::bytes);
}

/* Consumer warp: done with tile n. */
template <class Ring> __device__ __forceinline__ void kda_ring_release(Ring &r, int n)
{
    kl_mbar_arrive(&r.empty[n % Ring::SLOTS]);
}

#endif
