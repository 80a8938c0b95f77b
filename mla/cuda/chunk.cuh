/* What the chunk kernels share: how keys and values are expanded, piece by piece, and which block works on what.
 *
 * Sequences are taken in batches, and of a batch as many heads at a time as a fixed budget holds expanded:
 *
 *     expanded [rows of the batch, heads, Dn + Dv]        k_jh = [expanded_jh[:Dn] | pe_j]        v_jh = expanded_jh[Dn:]
 *
 * The kernels are written for heads of 192 and 128; smaller ones are padded with zeros by the copies. */
#ifndef KL_MLA_CUDA_CHUNK_CUH
#define KL_MLA_CUDA_CHUNK_CUH

#include "common/device.cuh"
#include "common/gpu.h"
#include "mla/internal.h"

/* Queries, or keys, of an item; the widest head, which has PANELS of 64 query columns and V_PANELS of 64 value columns. */
enum { MLA_BLOCK = 128, MLA_DN = 128, MLA_DR = 64, MLA_DV = 128, MLA_PANELS = 3, MLA_V_PANELS = 2 };

/* Sequences of one upload; no more than these are put in order, longest first. */
enum { MLA_ORDERED_SEQUENCES = 64 };

/* A sequence that has queries, as a kernel sees it. */
struct mla_sequence {
    int64_t q_row, key_row, latent_row, pe_row; /* first rows in q and o, expanded, latent, and what pe is read from */
    int queries, keys;
    int blocks_before, key_blocks_before; /* blocks of queries, of keys, of the sequences before it */
    int gathered; /* heads whose blocks are worked on side by side, so that what they share stays in the second cache */
};
struct mla_sequences {
    const mla_sequence *row;
    int count, heads, blocks, key_blocks;
};

/* What one block, or cluster, works on: queries or keys MLA_BLOCK block .. of one head. */
struct mla_item {
    mla_sequence s;
    int head, block;
};

/* Item x of blocks * heads: sequence by sequence, `gathered` heads at a time, of these the longest first: the last queries, which see
 * most keys; the first keys, which most queries see. */
template <bool of_keys> __device__ __forceinline__ mla_item mla_find_item(const mla_sequences &all, int64_t x)
{
    int low = 0, high = all.count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        int before = of_keys ? all.row[middle].key_blocks_before : all.row[middle].blocks_before;
        if ((int64_t)before * all.heads <= x)
            low = middle;
        else
            high = middle;
    }
    mla_item it;
    it.s = all.row[low];
    int blocks = ((of_keys ? it.s.keys : it.s.queries) + MLA_BLOCK - 1) / MLA_BLOCK;
    int64_t within = x - (int64_t)(of_keys ? it.s.key_blocks_before : it.s.blocks_before) * all.heads;
    int first = (int)(within / ((int64_t)blocks * it.s.gathered)) * it.s.gathered, side = min(it.s.gathered, all.heads - first);
    int rest = (int)(within - (int64_t)first * blocks);
    it.block = of_keys ? rest / side : blocks - 1 - rest / side;
    it.head = first + rest % side;
    return it;
}

/* Where an item's queries stand among its keys, which come in tiles: query i sees the keys up to first + i. */
struct mla_stretch {
    int first, rows, tiles, whole; /* rows: queries that exist; tiles: that anyone sees; whole: that all see entirely */
};
template <int KEYS> __device__ __forceinline__ mla_stretch mla_stretch_of(const mla_item &it)
{
    mla_stretch t;
    t.first = it.s.keys - it.s.queries + it.block * MLA_BLOCK;
    t.rows = min((int)MLA_BLOCK, it.s.queries - it.block * MLA_BLOCK);
    t.tiles = (t.first + t.rows + KEYS - 1) / KEYS;
    t.whole = (t.first + 1) / KEYS;
    return t;
}

/* What all lanes know to be the same, said so that the compiler knows it too: addresses made of it go to the matrix unit without detours. */
__device__ __forceinline__ int mla_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

/* Piece of 16 bytes of a row of 128, as swizzled copies leave them. */
__device__ __forceinline__ const unsigned char *mla_piece_at(const unsigned char *rows, int row, int piece) { return rows + row * 128 + ((piece ^ (row & 7)) << 4); }

/* c [64 x N] = a b^T: a [64 x 64 panels], b [N x 64 panels] in panels of 64 columns. */
template <int N, int panels>
__device__ __forceinline__ void mla_multiply_rows(float *c, const unsigned char *a, int a_panel, const unsigned char *b, int b_panel)
{
#pragma unroll
    for (int i = 0; i < 4 * panels; i++)
        kl_wgmma<N>(c, kl_operand_at(kl_operand_rows(a + i / 4 * a_panel), i % 4 * 32), kl_operand_at(kl_operand_rows(b + i / 4 * b_panel), i % 4 * 32), i > 0);
}
/* The same with a in registers. */
template <int N, int panels> __device__ __forceinline__ void mla_multiply_rows(float *c, const uint32_t (*a)[4], const unsigned char *b, int b_panel)
{
#pragma unroll
    for (int i = 0; i < 4 * panels; i++)
        kl_wgmma<N>(c, a[i], kl_operand_at(kl_operand_rows(b + i / 4 * b_panel), i % 4 * 32), i > 0);
}
/* c [64 x N] += a b: a [64 x 16 steps] in registers, b [16 steps x N] in panels of 64 columns. */
template <int N, int steps> __device__ __forceinline__ void mla_add_columns(float *c, const uint32_t (*a)[4], const unsigned char *b, int b_panel)
{
#pragma unroll
    for (int i = 0; i < steps; i++)
        kl_wgmma<N>(c, a[i], kl_operand_at(kl_operand_columns(b, b_panel), i * 16 * 128));
}
/* Sums [64 x 16 steps] as such an operand. */
template <int steps> __device__ __forceinline__ void mla_pack(uint32_t (*a)[4], const float *c)
{
#pragma unroll
    for (int i = 0; i < 4 * steps; i++)
        a[i / 4][i % 4] = kl_pack_bf16(c[2 * i], c[2 * i + 1]);
}

/* ---- on the host ---- */

/* Sequences n0 .. n1-1 have `rows` keys in all; heads: how many of them are expanded at a time. */
struct mla_batch {
    int64_t n0, n1, rows, heads;
};
/* The batch that begins with sequence n0, of which `bytes` a row and head are kept, at most `budget` of them where one sequence allows it. */
mla_batch mla_next_batch(const mla_problem *p, int64_t n0, size_t bytes, size_t budget);
/* Most rows times heads of a batch. */
size_t mla_most_rows(const mla_problem *p, size_t bytes, size_t budget);
/* The batch's table, in memory of the device for as many sequences as the batch has. pe is read from the latent rows, or from a copy beside expanded. */
kl_status mla_upload_sequences(const kl_ctx *ctx, const mla_problem *p, const mla_batch &b, bool pe_copied, mla_sequence *table, mla_sequences *out);
/* Sequences n .. next-1 have queries and follow one another among the latents; row: where the batch keeps the first's expanded rows. next: n1 where
 * none is left. */
struct mla_run {
    int64_t n, next, row, rows, latent_row;
};
mla_run mla_first_run(const mla_problem *p, const mla_batch &b);
mla_run mla_next_run(const mla_problem *p, const mla_batch &b, const mla_run &last);
/* expanded [rows, heads, Dn + Dv] of heads head0 .. head0+heads-1. workspace: KL_PRODUCT_WORKSPACE bytes. */
kl_status mla_expand_rows(kl_ctx *ctx, const mla_problem *p, const mla_batch &b, int64_t head0, int64_t heads, void *expanded, void *workspace);

/* A tensor [rows, heads, ..] of which `columns` from `column` on are read in boxes of 64 columns of `box` rows. A part of no columns
 * becomes one that lies beyond its tensor, and is read as zeros from column 64 on. */
kl_status mla_map_heads(kl_tensor_map *map, const char *name, const void *base, int64_t rows, int64_t row_stride, int64_t heads, int64_t head_stride,
                        int64_t column, int64_t columns, int box);

/* What a launch works on: a batch's sequences, some heads, their expanded rows, pe [pe_rows, pe_stride]. */
struct mla_piece {
    mla_sequences sequences;
    int64_t rows, head0, heads;
    const uint16_t *expanded, *pe;
    int64_t pe_rows, pe_stride;
};
mla_piece mla_piece_of(const mla_problem *p, const mla_batch &b, const mla_sequences &s, int64_t head0, const uint16_t *expanded);
/* What every kernel reads of it. q_pe_column, pe_column: where those begin, beyond the tensor where Dr is 0; head0: of q. */
struct mla_reads {
    kl_tensor_map q, q_pe, k, pe, v;
    int q_pe_column, pe_column, head0, Dn, Dr, Dv;
    mla_sequences sequences;
    float scale, scale_log2; /* scale log2 e */
};
/* queries, keys: rows of a box. */
kl_status mla_describe(mla_reads *r, const mla_problem *p, const mla_piece &x, int queries, int keys);
/* o [Tq, o_heads, Dv], lse [Tq, o_heads] or NULL: heads from o_head0 on. */
kl_status mla_attend(kl_ctx *ctx, const mla_problem *p, const mla_piece &x, uint16_t *o, float *lse, int64_t o_heads, int64_t o_head0);

kl_status mla_check_chunk(const mla_problem *p);
size_t mla_chunk_bwd_workspace(const mla_problem *p);

#endif
