/* What the four steps of the backward pass hand to each other, tile after tile of 32 tokens of one value head.
 *
 * With S the state before the tile, dS' the gradient of the state after it, P(j->i) the product of the decays of tokens j+1..i,
 * k and q after norm, q with the scale, Akk[i,j] = k_i . P(j->i) k_j (j < i), Aqk[i,j] = q_i . P(j->i) k_j (j <= i):
 *
 *     T' = (I + Akk Diag(beta))^-1          w' = T' (k_i P(-1->i))      r  = T' v - w' S           u = beta r
 *     T  = (I + Diag(beta) Akk)^-1          kg_j = k_j P(j->end)        S' = Diag(P(-1->end)) S + kg^T u
 *     qg_i = q_i P(-1->i)                                               du = Aqk^T do + kg dS'     x = T^T du,  dv = beta x
 *                                                                       dS = Diag(P(-1->end)) dS' + qg^T do - w'^T (beta du)
 *
 * r is what the state did not know about k, x its gradient before beta: both are kept, so dbeta = x . r needs no division.
 *
 *     prepare_bwd   T', w', kg, qg, Aqk, T, decay and the rows' factors                     every tile alone
 *     walk_bwd      r and the states S forwards; du and the gradients dS' backwards         every 16 columns of V alone
 *     chunk_bwd     all gradients of the tile from S, dS', r, du                            every tile alone
 *
 * Matrices are bf16 images, row after row, that ldmatrix reads along either index: 16-byte pieces of a row are permuted by its
 * number so that eight rows in a column of pieces lie in eight different places of the banks. */
#ifndef KL_KDA_CUDA_TILE_BWD_CUH
#define KL_KDA_CUDA_TILE_BWD_CUH

#include "kda/cuda/sequences.cuh"

enum { KDA_BWD_TOKENS = 32, KDA_SMALL_BYTES = 32 * 64, KDA_PANEL_BYTES = 32 * 32 };

/* A prepared tile: the walk forwards reads up to qg, the walk backwards from w to T. */
template <int KP> struct kda_bwd_tile {
    static constexpr int matrix = 32 * KP * 2;
    static constexpr int Tr = 0 /* T' */, w = KDA_SMALL_BYTES, kg = w + matrix, decay = kg + matrix /* float [KP]: P(-1->end) */,
                         rows = decay + 4 * KP /* float [3][32]: beta; factors of the rows of q and of k */, qg = rows + 384,
                         Aqk = qg + matrix, T = Aqk + KDA_SMALL_BYTES, bytes = T + KDA_SMALL_BYTES;
};
static inline int kda_bwd_padded(int64_t K) { return K <= 64 ? 64 : K <= 128 ? 128 : 256; }

/* Byte offset of piece `piece` (8 elements) of row `row` in an image of `width` channels, 64 or more of them. */
__device__ __forceinline__ int kda_wide_at(int width, int row, int piece) { return row * width * 2 + 16 * (piece ^ (row & 7)); }
/* The same in a [32][32] image. */
__device__ __forceinline__ int kda_small_at(int row, int piece) { return row * 64 + 16 * (piece ^ (row >> 1 & 3)); }
/* The same in a panel: 32 tokens of 16 columns of V. */
__device__ __forceinline__ int kda_panel_at(int token, int piece) { return token * 32 + 16 * (piece ^ (token >> 2 & 1)); }

/* Where lane's address lies among the four 8 x 8 matrices of a 16 x 16 block: rows first, then columns (A of mma from rows;
 * B from columns when transposed) ... */
__device__ __forceinline__ int kda_down_row(int lane) { return lane & 15; }
__device__ __forceinline__ int kda_down_piece(int lane) { return lane >> 4; }
/* ... or columns first (B of mma from rows, A from columns when transposed). */
__device__ __forceinline__ int kda_across_row(int lane) { return (lane & 7) + (lane >> 4 << 3); }
__device__ __forceinline__ int kda_across_piece(int lane) { return lane >> 3 & 1; }

/* ---- the problem as the kernels see it ---- */

struct kda_bwd_args {
    kda_sequences sequences;
    int64_t tiles;
    const uint16_t *q, *k, *v, *g, *beta, *d_o;
    const float *A_log, *dt_bias, *h0, *dht;
    const int64_t *state_index;
    int64_t state_pool;
    int q_stride, k_stride, v_stride, g_stride, beta_stride, o_stride;
    uint16_t *dq, *dk, *dv, *dg, *dbeta;
    float *dA_log, *ddt_bias, *dh0;
    int H, HV, K, V, G, group; /* group: value heads a query head */
    int VP;                    /* V rounded up to 16 */
    int gate, beta_kind;
    float scale, lower_bound;
    bool l2norm, no_delta, value_first;
    bool v_wide, o_wide;       /* rows of v and dv, of d_o, are whole aligned 16-byte pieces */
    /* A slice: query heads [first, first + heads), their value heads counted from 0 in what follows. */
    int first, heads;
    unsigned char *tile;       /* [tiles][slice's value heads] kda_bwd_tile */
    unsigned char *state;      /* [tiles][value heads][S, dS'][VP][KP] bf16 */
    unsigned char *panel;      /* [tiles][value heads][r, du][VP/16] panels */
    float *sum;                /* [tiles][value heads][G+1]: a tile's part of ddt_bias and dA_log */
    float *keys;               /* [tiles][heads][dq, dk][32][KP]: of the value heads so far, where there are several */
};

struct kda_bwd_rows {
    int64_t token; /* the tile's first, of the packed tensors */
    int count;     /* 1..32 */
};

__device__ __forceinline__ kda_bwd_rows kda_bwd_rows_of(const kda_bwd_args &a, int64_t tile)
{
    kda_place s = kda_place_of(a.sequences, kda_sequence_of_tile(a.sequences, tile));
    int64_t first = (tile - s.tile) * KDA_BWD_TOKENS, left = s.length - first;
    return {s.begin + first, left < KDA_BWD_TOKENS ? (int)left : (int)KDA_BWD_TOKENS};
}

/* Where tile and value head lie in the workspace. */
__device__ __forceinline__ int64_t kda_bwd_slot(const kda_bwd_args &a, int64_t tile, int hv) { return tile * (a.heads * a.group) + hv; }
__device__ __forceinline__ unsigned char *kda_bwd_state(const kda_bwd_args &a, int KP, int64_t slot, int which)
{
    return a.state + (slot * 2 + which) * ((int64_t)a.VP * KP * 2);
}
__device__ __forceinline__ unsigned char *kda_bwd_panel(const kda_bwd_args &a, int64_t slot, int which)
{
    return a.panel + (slot * 2 + which) * ((int64_t)a.VP / 16 * KDA_PANEL_BYTES);
}

/* Asks for columns [16 panel, 16 panel + 16) of a tile's rows of v or d_o, a row a lane; zeros beyond the sequence and V.
 * x is the first row, at the head's first column; NULL: zeros. */
__device__ __forceinline__ void kda_panel_copy(unsigned char *out, const uint16_t *x, int stride, int count, int V, int panel, bool wide)
{
    int t = kl_lane();
    const uint16_t *row = x + (int64_t)t * stride + 16 * panel;
    for (int piece = 0; piece < 2; piece++) {
        int left = x && t < count ? V - 16 * panel - 8 * piece : 0;
        uint16_t *to = (uint16_t *)(out + kda_panel_at(t, piece));
        if (wide && left > 0) {
            kl_copy16(to, row + 8 * piece);
        } else {
            uint32_t pair[4];
            for (int i = 0; i < 4; i++)
                pair[i] = (2 * i < left ? row[8 * piece + 2 * i] : 0) | (uint32_t)(2 * i + 1 < left ? row[8 * piece + 2 * i + 1] : 0) << 16;
            *(uint4 *)to = make_uint4(pair[0], pair[1], pair[2], pair[3]);
        }
    }
}

#endif
