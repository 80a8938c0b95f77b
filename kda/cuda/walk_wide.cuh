/* The walk by a warpgroup: it owns 64 columns of V and keeps their state S^T [64, KP] in its accumulators. Per tile, with the
 * matrices of core_tile.cuh read from shared memory by the matrix unit itself,
 *
 *     u^T = v^T Tb^T - S^T w^T      o^T = S^T qg^T + u^T Aqk^T      S^T <- S^T Diag(decay) + u^T kg
 *
 * A tile waits for S w of the one before it and then for u kg. Behind either of these, in the one queue that the matrix unit
 * has for a warp, stand products whose results are not wanted soon:
 *
 *     S w, S qg | u kg, u Aqk, Tb v of the next tile | S w, ...
 *
 * so that it has work while u is rounded and while S is rounded and decays. Two warps beside the four bring tiles and v, and
 * store o.
 *
 * ptxas keeps products in flight only where it can follow them: none over a loop's end and no way out of the middle of a
 * loop. So the last tile takes in its own v once more, for nothing. */
#ifndef KL_KDA_CUDA_WALK_WIDE_CUH
#define KL_KDA_CUDA_WALK_WIDE_CUH

#include "kda/cuda/core_tile.cuh"
#include "kda/cuda/walk.cuh"

enum { KDA_WIDE_COLUMNS = 64, KDA_WIDE_THREADS = 192, KDA_WIDE_ROW = 2 * KDA_WIDE_COLUMNS, KDA_WIDE_ROWS = KDA_TILE * KDA_WIDE_ROW };

/* Shared memory of a block that walks so. Tiles are numbered in the order in which they are walked: n lies in slot n % SLOTS
 * with its v, its o in place n % 2. PARTS warpgroups, 64 columns each, share the slots and their loader, each with a storer.
 *
 *     loader      wait empty[slot]; copy tile and v; they arrive at full[slot]
 *     warpgroup   wait full[slot]; use; arrive at empty[slot]; wait stored[place]; write o; arrive at written[place]
 *     storer      wait written[place]; store o; arrive at stored[place] */
template <int KP_, int SLOTS_, int PARTS_ = 1> struct kda_wide_ring {
    static constexpr int KP = KP_, SLOTS = SLOTS_, PARTS = PARTS_, TILE = kda_core_tile<KP>::bytes;
    struct {
        alignas(128) unsigned char v[PARTS][KDA_WIDE_ROWS], tile[TILE];
    } slot[SLOTS];
    alignas(128) unsigned char o[PARTS][2][KDA_WIDE_ROWS];
    uint64_t full[SLOTS], empty[SLOTS], written[PARTS][2], stored[PARTS][2];
};

/* By one thread, before the block synchronises. */
template <class Ring> __device__ __forceinline__ void kda_wide_init(Ring &r)
{
    for (int i = 0; i < Ring::SLOTS; i++) {
        kl_mbar_init(&r.full[i], 33); /* the tile, and the loader's 32 threads with v */
        kl_mbar_init(&r.empty[i], 128 * Ring::PARTS);
    }
    for (int part = 0; part < Ring::PARTS; part++)
        for (int i = 0; i < 2; i++) {
            kl_mbar_init(&r.written[part][i], 128);
            kl_mbar_init(&r.stored[part][i], 32);
        }
    kl_mbar_init_fence();
}

/* What a block walks over in one go: tiles [begin, end) of a path. Of those before `from` only the state is wanted. */
struct kda_stretch {
    int begin, from, end;
    int number;      /* of tile `begin`: how many the block has walked over before */
    const float *h0; /* this head's state before, as p says; NULL: zero */
    float *ht;       /* after; NULL: not wanted */
};

/* A whole path that is not left out. */
__device__ __forceinline__ kda_stretch kda_whole(const kda_walk &p, const kda_path &path, int number)
{
    int64_t state = (path.slot * p.HV + path.head) * p.K * p.V;
    return {0, 0, path.tiles, number, p.h0 ? p.h0 + state : nullptr, p.ht ? p.ht + state : nullptr};
}

/* ---- rows of v and o in shared memory: 8 cells of 8 columns, permuted by the row ---- */

__device__ __forceinline__ int kda_wide_cell(int row, int cell) { return KDA_WIDE_ROW * row + 16 * (cell ^ (row & 7)); }

/* Where a warp's 16 columns lie for ldmatrix and stmatrix: tokens 0..15, those from 16 on 16 rows further. */
__device__ __forceinline__ int kda_wide_fragment(int warp)
{
    int lane = kl_lane();
    return kda_wide_cell(8 * (lane >> 4) + (lane & 7), 2 * warp + (lane >> 3 & 1));
}

/* A lane moves a cell of every fourth row of each tile: rows row, row + 4, ... */
struct kda_wide_cells {
    int64_t at, stride, left; /* of the first row: its offset, tokens to the sequence's end; elements from token to token */
    int row, rows, columns;   /* rows of a tile; columns from the cell on that exist */
    int first;                /* place of the first row's cell */

    __device__ __forceinline__ kda_wide_cells(const kda_walk &p, const kda_path &path, int64_t stride, int column, int tile)
        : stride(stride), row(kl_lane() >> 3), rows(p.sequences.tile)
    {
        int cell = kl_lane() & 7;
        int64_t token = (int64_t)tile * rows + row;
        at = (path.place.begin + token) * stride + path.head * p.V + column + 8 * cell;
        left = path.place.length - token;
        columns = p.V - column - 8 * cell;
        first = kda_wide_cell(row, cell);
    }
    /* How far down, from the first row, there is something. */
    __device__ __forceinline__ int depth() const { return columns > 0 ? (int)min(left, (int64_t)(rows - row)) : 0; }
    __device__ __forceinline__ int place(int i) const { return (first ^ (i & 1) * 64) + 4 * KDA_WIDE_ROW * i; }
    __device__ __forceinline__ void next()
    {
        at += rows * stride;
        left -= rows;
    }
    /* The same rows, `parts` times 64 columns to the right. */
    __device__ __forceinline__ kda_wide_cells right(int parts) const
    {
        kda_wide_cells x = *this;
        x.at += KDA_WIDE_COLUMNS * parts;
        x.columns -= KDA_WIDE_COLUMNS * parts;
        return x;
    }
};

enum { KDA_WIDE_CELLS = KDA_TILE / 4 }; /* of a lane */

/* Starts the copies of a tile's v, zeros where there is nothing. */
__device__ __forceinline__ void kda_wide_take(unsigned char *rows, const kda_walk &p, const kda_wide_cells &x)
{
    const uint16_t *from = p.v + x.at;
    int depth = x.depth();
    if (p.v_aligned) {
#pragma unroll
        for (int i = 0; i < KDA_WIDE_CELLS; i++) {
            kl_copy16(rows + x.place(i), 4 * i < depth ? from : p.v, 4 * i < depth);
            from += 4 * x.stride;
        }
    } else {
#pragma unroll 1
        for (int e = 0; e < KDA_WIDE_CELLS * 8; e++) {
            int i = e / 8, c = e % 8;
            ((uint16_t *)(rows + x.place(i)))[c] = 4 * i < depth && c < x.columns ? from[4 * i * x.stride + c] : (uint16_t)0;
        }
    }
}

/* What this thread has taken so far arrives at the barrier. */
__device__ __forceinline__ void kda_wide_taken(const kda_walk &p, uint64_t *bar)
{
    if (p.v_aligned)
        kl_copy_arrive(bar);
    else
        kl_mbar_arrive(bar);
}

/* Stores a tile's o; `read` is called when all of it has been read. */
template <class Read> __device__ __forceinline__ void kda_wide_give(const unsigned char *rows, const kda_walk &p, const kda_wide_cells &x, Read read)
{
    uint16_t *to = p.o + x.at;
    int depth = x.depth();
    if (p.o_aligned) {
        uint4 cell[KDA_WIDE_CELLS];
#pragma unroll
        for (int i = 0; i < KDA_WIDE_CELLS; i++)
            cell[i] = *(const uint4 *)(rows + x.place(i));
        read();
#pragma unroll
        for (int i = 0; i < KDA_WIDE_CELLS; i++) {
            if (4 * i < depth)
                *(uint4 *)to = cell[i];
            to += 4 * x.stride;
        }
    } else {
#pragma unroll 1
        for (int e = 0; e < KDA_WIDE_CELLS * 8; e++) {
            int i = e / 8, c = e % 8;
            if (4 * i < depth && c < x.columns)
                to[4 * i * x.stride + c] = ((const uint16_t *)(rows + x.place(i)))[c];
        }
        read();
    }
}

/* ---- the warps beside; column: the block's first, or the part's ---- */

/* fetch(i), called by one thread before tile i of the path is loaded, gives its address. */
template <class Ring, class Fetch>
__device__ __forceinline__ void kda_wide_load(Ring &m, const kda_walk &p, const kda_path &path, const kda_stretch &x, int column, Fetch fetch)
{
    enum { SLOTS = Ring::SLOTS };
    kda_wide_cells cells(p, path, p.v_stride, column, x.begin);
    for (int i = x.begin, n = x.number; i < x.end; i++, n++) {
        int slot = n % SLOTS;
        if (n >= SLOTS)
            kl_mbar_wait(&m.empty[slot], (n / SLOTS - 1) & 1);
        if (kl_lane() == 0) {
            kl_mbar_expect(&m.full[slot], Ring::TILE);
            kl_bulk_load(m.slot[slot].tile, fetch(i), Ring::TILE, &m.full[slot]);
            kl_bulk_issued(&m.full[slot]);
        }
        __syncwarp();
#pragma unroll
        for (int part = 0; part < Ring::PARTS; part++)
            kda_wide_take(m.slot[slot].v[part], p, cells.right(part));
        kda_wide_taken(p, &m.full[slot]);
        cells.next();
    }
}

/* done(i), called by one thread after its stores of o of tile i. */
template <class Ring, class Done>
__device__ __forceinline__ void kda_wide_store(Ring &m, const kda_walk &p, const kda_path &path, const kda_stretch &x, int column, Done done, int part = 0)
{
    kda_wide_cells cells(p, path, p.o_stride, column, x.begin);
    for (int i = x.begin, n = x.number; i < x.end; i++, n++) {
        int place = n & 1;
        kl_mbar_wait(&m.written[part][place], n >> 1 & 1);
        auto read = [&] { kl_mbar_arrive(&m.stored[part][place]); };
        if (i >= x.from)
            kda_wide_give(m.o[part][place], p, cells, read);
        else
            read();
        cells.next();
        if (kl_lane() == 0)
            done(i);
    }
}

/* ---- the warpgroup ---- */

/* A fragments of accumulators c [16 x 16 count], count of them. */
template <int count> __device__ __forceinline__ void kda_wide_pack(uint32_t a[count][4], const float *c)
{
#pragma unroll
    for (int i = 0; i < count; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            a[i][j] = kl_pack_bf16(c[8 * i + 2 * j], c[8 * i + 2 * j + 1]);
}

/* What a warp holds: s, r (u in float) and o as accumulators, their rounded copies, and v as operands. */
template <class Ring> struct kda_wide_warp {
    static constexpr int KP = Ring::KP, STEPS = KP / 16, SLOTS = Ring::SLOTS;
    using at = kda_core_tile<KP>;
    Ring &m;
    int part, lane, fragment;
    float s[KP / 8][4], r[4][4], o[4][4];
    uint32_t rounded_s[STEPS][4], u[2][4], v[2][4], rounded_o[2][4];

    __device__ __forceinline__ kda_wide_warp(Ring &m, int part, int warp) : m(m), part(part), lane(kl_lane()), fragment(kda_wide_fragment(warp)) {}
    __device__ __forceinline__ kl_operand operand(int n, int offset, int row) const
    {
        return kl_operand_of(m.slot[(unsigned)n % SLOTS].tile + offset, row, 128);
    }
    __device__ __forceinline__ bool is_full(int n) const { return kl_mbar_test(&m.full[(unsigned)n % SLOTS], (unsigned)n / SLOTS & 1); }
    __device__ __forceinline__ void await_full(int n) const { kl_mbar_wait(&m.full[(unsigned)n % SLOTS], (unsigned)n / SLOTS & 1); }

    __device__ __forceinline__ void load_v(int n)
    {
#pragma unroll
        for (int j = 0; j < 2; j++)
            kl_ldmatrix4_trans(v[j], m.slot[(unsigned)n % SLOTS].v[part] + fragment + 16 * KDA_WIDE_ROW * j);
    }
    /* r = v^T Tb^T */
    __device__ __forceinline__ void input(int n)
    {
        kl_operand Tb = operand(n, at::Tb, at::T_row);
        kl_wgmma<32, false>(&r[0][0], v[0], Tb);
        kl_wgmma<32>(&r[0][0], v[1], kl_operand_at(Tb, 2 * at::T_row));
        kl_wgmma_commit();
    }
    /* r -= S^T w^T */
    __device__ __forceinline__ void correct(int n)
    {
        kl_operand w = operand(n, at::RO, at::RO_row);
        kl_wgmma_fence();
#pragma unroll
        for (int c = 0; c < STEPS; c++)
            kl_wgmma<32>(&r[0][0], rounded_s[c], kl_operand_at(w, 2 * c * at::RO_row));
        kl_wgmma_commit();
    }
    /* o = S^T qg^T */
    __device__ __forceinline__ void read(int n)
    {
        kl_operand qg = operand(n, at::RO + kda_core_qg<KP>(0, 0), at::RO_row);
        kl_wgmma_fence();
        kl_wgmma<32, false>(&o[0][0], rounded_s[0], qg);
#pragma unroll
        for (int c = 1; c < STEPS; c++)
            kl_wgmma<32>(&o[0][0], rounded_s[c], kl_operand_at(qg, 2 * c * at::RO_row));
        kl_wgmma_commit();
    }
    __device__ __forceinline__ void decay(int n)
    {
        const float *decay = (const float *)(m.slot[(unsigned)n % SLOTS].tile + at::decay) + 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < KP / 8; j++) {
            float2 d = *(const float2 *)(decay + 8 * j);
            s[j][0] *= d.x, s[j][1] *= d.y, s[j][2] *= d.x, s[j][3] *= d.y;
        }
    }
    /* S^T += u^T kg, o += u^T Aqk^T: two groups of products */
    __device__ __forceinline__ void update(int n)
    {
        kl_operand kg = operand(n, at::G, at::G_row), Aqk = operand(n, at::Aqk, at::T_row);
        kda_wide_pack<2>(u, &r[0][0]);
        kl_wgmma_fence();
#pragma unroll
        for (int j = 0; j < 2; j++)
            kl_wgmma<KP>(&s[0][0], u[j], kl_operand_at(kg, 2 * j * at::G_row));
        kl_wgmma_commit();
#pragma unroll
        for (int j = 0; j < 2; j++)
            kl_wgmma<32>(&o[0][0], u[j], kl_operand_at(Aqk, 2 * j * at::T_row));
        kl_wgmma_commit();
    }
    /* The o of tile n may be stored. */
    __device__ __forceinline__ void hand_over(int n)
    {
        int place = n & 1;
        /* matrices of 8 tokens x 8 columns */
#pragma unroll
        for (int b = 0; b < 2; b++)
            kl_stmatrix4_trans(m.o[part][place] + fragment + 16 * KDA_WIDE_ROW * b, rounded_o[b]);
        kl_mbar_arrive(&m.written[part][place]);
    }

    /* Tiles first to last. Whether a barrier has been passed is asked ahead of the use. */
    __device__ __forceinline__ void walk(int first, int last)
    {
        await_full(first);
        load_v(first);
        kl_wgmma_fence();
        input(first);
        kl_wgmma_wait<0>();
        kda_wide_pack<STEPS>(rounded_s, &s[0][0]);
#pragma unroll 1
        for (int n = first; n <= last; n++) {
            int next = min(n + 1, last), before = n - 1, phase = (before >> 1 & 1) ^ 1;
            bool full = is_full(next), stored = kl_mbar_test(&m.stored[part][before & 1], phase);
            correct(n);
            kda_wide_pack<2>(rounded_o, &o[0][0]);
            read(n);
            decay(n);
            if (!full)
                await_full(next);
            load_v(next);
            kl_wgmma_wait<1>();
            update(n);
            input(next);
            if (n > first) {
                if (!stored)
                    kl_mbar_wait(&m.stored[part][before & 1], phase);
                hand_over(before);
            }
            kl_wgmma_wait<2>();
            kda_wide_pack<STEPS>(rounded_s, &s[0][0]);
            kl_wgmma_wait<0>();
            kl_mbar_arrive(&m.empty[(unsigned)n % SLOTS]);
        }
        kda_wide_pack<2>(rounded_o, &o[0][0]);
        kl_mbar_wait(&m.stored[part][last & 1], (last >> 1 & 1) ^ 1);
        hand_over(last);
    }
};

/* All 128 threads of the warpgroup; warp: 0 to 3, the same for all of a warp by __shfl_sync. load and store: the warp's state
 * before and after, s and its first column. */
template <class Ring, class Load, class Store>
__device__ __forceinline__ void kda_wide_compute(Ring &m, const kda_walk &p, const kda_path &path, const kda_stretch &x, int column, int warp, int part,
                                                 Load load, Store store)
{
    constexpr int KP = Ring::KP;
    int tiles_a_chunk = p.sequences.chunk / p.sequences.tile;
    int64_t size = (int64_t)p.K * p.V;
    kda_wide_warp<Ring> own(m, part, warp);
    column += KDA_COLUMNS * warp;
    load(own.s, column);
    for (int i = x.begin, end; i < x.end; i = end) {
        end = x.end;
        if (p.chunk_states) {
            int chunk = i / tiles_a_chunk;
            if (i >= x.from && i % tiles_a_chunk == 0)
                kda_store_state<KP>(own.s, p, p.chunk_states + ((path.place.chunk + chunk) * p.HV + path.head) * size, column);
            end = min(end, (chunk + 1) * tiles_a_chunk);
        }
        own.walk(x.number + i - x.begin, x.number + end - 1 - x.begin);
    }
    store(own.s, column);
}
template <class Ring>
__device__ __forceinline__ void kda_wide_compute(Ring &m, const kda_walk &p, const kda_path &path, const kda_stretch &x, int column, int warp, int part = 0)
{
    constexpr int KP = Ring::KP;
    auto load = [&](float s[KP / 8][4], int c) { kda_load_state<KP>(s, p, x.h0, c); };
    auto store = [&](const float s[KP / 8][4], int c) {
        if (x.ht)
            kda_store_state<KP>(s, p, x.ht, c);
    };
    kda_wide_compute(m, p, path, x, column, warp, part, load, store);
}

#endif
