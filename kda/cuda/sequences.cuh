/* Where the sequences of a problem, their tiles and their chunks lie. Sequences of one length are counted; packed ones
 * have a table on the device, one row a sequence and one beyond the last, written by kda_sequences_upload. */
#ifndef KL_KDA_CUDA_SEQUENCES_CUH
#define KL_KDA_CUDA_SEQUENCES_CUH

#include "common/device.cuh"
#include "kda/internal.h"

enum { KDA_ORDERED_SEQUENCES = 119 }; /* so many, and no more, are taken longest first; their table is one upload */

/* What lies before a sequence; order: the sequence that comes here when the longest go first. */
struct kda_sequence_row {
    int64_t begin, tile, chunk, order;
};

struct kda_sequences {
    const kda_sequence_row *row; /* [N+1], device; NULL: N sequences of T tokens */
    int64_t N, T;
    int tile, chunk; /* tokens of a tile, of a chunk */
};

struct kda_place {
    int64_t begin, length; /* tokens */
    int64_t tile, tiles;   /* the first one's number, and how many */
    int64_t chunk;         /* the first one's number */
};

static inline int64_t kda_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Tokens of a tile: 32, or the chunk when its states are wanted and it is shorter. */
static inline int kda_tile_tokens(const kda_problem *p)
{
    return p->chunk_states && kda_chunk_tokens(p) < 32 ? (int)kda_chunk_tokens(p) : 32;
}

static inline int64_t kda_tile_count(const kda_problem *p)
{
    int tile = kda_tile_tokens(p);
    if (!p->cu_seqlens)
        return p->N * kda_ceil(p->T, tile);
    int64_t count = 0;
    for (int64_t n = 0; n < p->N; n++)
        count += kda_ceil(p->cu_seqlens[n + 1] - p->cu_seqlens[n], tile);
    return count;
}

/* Bytes of the table: 0 without cu_seqlens. */
static inline size_t kda_sequences_bytes(const kda_problem *p)
{
    return p->cu_seqlens ? (size_t)(p->N + 1) * sizeof(kda_sequence_row) : 0;
}
/* The same where tiles follow it: up to their alignment. */
static inline size_t kda_sequences_room(const kda_problem *p) { return (kda_sequences_bytes(p) + 1023) / 1024 * 1024; }
kda_sequences kda_sequences_of(const kda_problem *p, const void *table);
void kda_sequences_order(const kda_problem *p, int64_t *order); /* [N], at most KDA_ORDERED_SEQUENCES */
kl_status kda_sequences_upload(const kl_ctx *ctx, const kda_problem *p, void *table);

/* ceil(a / b), b a power of two. */
__device__ __forceinline__ int64_t kda_pieces(int64_t a, int b) { return (a + b - 1) >> (__ffs((uint32_t)b) - 1); }

__device__ __forceinline__ kda_place kda_place_of(const kda_sequences &s, int64_t n)
{
    if (!s.row) {
        int64_t tiles = kda_pieces(s.T, s.tile);
        return {n * s.T, s.T, n * tiles, tiles, n * kda_pieces(s.T, s.chunk)};
    }
    kda_sequence_row a = s.row[n], b = s.row[n + 1];
    return {a.begin, b.begin - a.begin, a.tile, b.tile - a.tile, a.chunk};
}

/* Tokens of a place's tile i. */
__device__ __forceinline__ int kda_tokens_of(const kda_sequences &s, const kda_place &place, int i)
{
    int64_t left = place.length - (int64_t)i * s.tile;
    return left < s.tile ? (int)left : s.tile;
}

/* The sequence that holds a tile. */
__device__ __forceinline__ int64_t kda_sequence_of_tile(const kda_sequences &s, int64_t tile)
{
    if (!s.row)
        return tile / kda_pieces(s.T, s.tile);
    int64_t low = 0, high = s.N; /* row[low].tile <= tile < row[high].tile */
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        (s.row[middle].tile <= tile ? low : high) = middle;
    }
    return low;
}

#endif
