/* The walk of walk_wide.cuh by one warpgroup for 128 columns of V, 64 after 64, which also stores o. It has as long for a tile as
 * others in the block need to prepare one, so nothing here is done side by side. */
#ifndef KL_KDA_CUDA_FUSED_WALK_CUH
#define KL_KDA_CUDA_FUSED_WALK_CUH

#include "kda/cuda/prepare.cuh"
#include "kda/cuda/walk_wide.cuh"

enum { KDA_FUSED_GROUPS = 2 /* that prepare, by turns */, KDA_FUSED_SLOTS = 4 };

/* One of the tiles that a block goes through. */
struct kda_fused_tile {
    int64_t begin, length, slot; /* tokens of its sequence; where the state is */
    int turn, head;              /* its head is the block's turn-th one */
    int tile, tiles;             /* its number within the sequence, and how many there are */

    __device__ __forceinline__ int64_t token() const { return begin + (int64_t)tile * KDA_TILE; }
    __device__ __forceinline__ int tokens() const { return (int)min((int64_t)KDA_TILE, length - (int64_t)tile * KDA_TILE); }
};

/* Shared memory of a block. Tiles are numbered in the order in which they are walked; n lies in slot n % SLOTS with its v.
 *
 *     group       wait rows[group]; wait empty[slot]; copy v, prepare the tile, both arrive at full[slot]; meanwhile copy the next rows
 *     warpgroup   wait full[slot]; use; arrive at empty[slot] */
template <int KP_> struct kda_fused_ring {
    static constexpr int KP = KP_, SLOTS = KDA_FUSED_SLOTS, PARTS = 2, TILE = kda_core_tile<KP>::bytes;
    struct {
        alignas(1024) unsigned char v[2][KDA_WIDE_ROWS];
        alignas(128) unsigned char tile[TILE];
        kda_fused_tile at;
    } slot[SLOTS];
    alignas(1024) unsigned char room[KDA_FUSED_GROUPS][(kda_prepare_room<KP>::bytes + 1023) / 1024 * 1024];
    alignas(128) unsigned char o[2][2][KDA_WIDE_ROWS]; /* by turns, [half] */
    kda_fused_tile next[KDA_FUSED_GROUPS][2]; /* of each group, by turns */
    uint64_t full[SLOTS], empty[SLOTS], rows[KDA_FUSED_GROUPS];
};

/* By one thread, before the block synchronises. */
template <class Ring> __device__ __forceinline__ void kda_fused_init(Ring &m)
{
    for (int i = 0; i < Ring::SLOTS; i++) {
        kl_mbar_init(&m.full[i], KDA_GROUP + 1); /* the tile by all of its group, and v */
        kl_mbar_init(&m.empty[i], 128);
    }
    for (int i = 0; i < KDA_FUSED_GROUPS; i++)
        kl_mbar_init(&m.rows[i], 1);
    kl_mbar_init_fence();
}

/* A thread's cells of a tile's rows of v or o: 8 columns of rows thread / 8 and 16 further, of either half. */
struct kda_fused_cells {
    int64_t at, stride; /* offset of the first */
    int row, place, columns, rows;

    __device__ __forceinline__ kda_fused_cells(const kda_walk &p, const kda_fused_tile &x, int64_t stride, int thread)
        : stride(stride), row(thread >> 3), place(kda_wide_cell(thread >> 3, thread & 7)), columns(p.V - 8 * (thread & 7)), rows(x.tokens())
    {
        at = (x.token() + row) * stride + (int64_t)x.head * p.V + 8 * (thread & 7);
    }
    __device__ __forceinline__ bool there(int half, int i) const { return row + 16 * i < rows && columns > KDA_WIDE_COLUMNS * half; }
    __device__ __forceinline__ int64_t offset(int half, int i) const { return at + 16 * i * stride + KDA_WIDE_COLUMNS * half; }
    __device__ __forceinline__ int cell(int i) const { return place + 16 * KDA_WIDE_ROW * i; }
};

/* Starts the copies of a tile's v, zeros where there is nothing. */
__device__ __forceinline__ void kda_fused_take(unsigned char v[2][KDA_WIDE_ROWS], const kda_walk &p, const kda_fused_tile &x, int thread)
{
    kda_fused_cells c(p, x, p.v_stride, thread);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            kl_copy16(v[half] + c.cell(i), c.there(half, i) ? p.v + c.offset(half, i) : p.v, c.there(half, i));
}

/* Stores a tile's o. */
__device__ __forceinline__ void kda_fused_give(const unsigned char o[2][KDA_WIDE_ROWS], const kda_walk &p, const kda_fused_tile &x, int thread)
{
    kda_fused_cells c(p, x, p.o_stride, thread);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint4 first = *(const uint4 *)(o[half] + c.cell(0)), second = *(const uint4 *)(o[half] + c.cell(1));
        if (c.there(half, 0))
            *(uint4 *)(p.o + c.offset(half, 0)) = first;
        if (c.there(half, 1))
            *(uint4 *)(p.o + c.offset(half, 1)) = second;
    }
}

/* What a warp holds: two halves, of which one at a time has more than its state. */
template <class Ring> struct kda_fused_warp {
    static constexpr int STEPS = Ring::KP / 16;
    Ring &m;
    kda_wide_warp<Ring> a, b;

    __device__ __forceinline__ kda_fused_warp(Ring &m, int warp) : m(m), a(m, 0, warp), b(m, 1, warp) {}
    __device__ __forceinline__ void put(kda_wide_warp<Ring> &own, int n)
    {
        kda_wide_pack<2>(own.rounded_o, &own.o[0][0]);
#pragma unroll
        for (int i = 0; i < 2; i++)
            kl_stmatrix4_trans(m.o[n & 1][own.part] + own.fragment + 16 * KDA_WIDE_ROW * i, own.rounded_o[i]);
    }
    __device__ __forceinline__ void half(kda_wide_warp<Ring> &own, int n)
    {
        own.load_v(n);
        kda_wide_pack<STEPS>(own.rounded_s, &own.s[0][0]);
        kl_wgmma_fence();
        own.input(n);
        own.correct(n);
        own.read(n);
        own.decay(n);
        kl_wgmma_wait<1>();
        own.update(n);
        kl_wgmma_wait<0>();
        put(own, n);
    }
    /* Tile n: its o to shared memory. */
    __device__ __forceinline__ void step(int n)
    {
        half(a, n);
        half(b, n);
    }
};

#endif
