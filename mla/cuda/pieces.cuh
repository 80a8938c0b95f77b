/* How the work of a decode step is cut. A tile is up to 64 rows (a query token with a head) of one sequence; it reads the keys
 * that its last row sees, in blocks of 64. All blocks of all tiles stand in one row, which is cut into parts of about the
 * same length, one for each multiprocessor:
 *
 *     sequence 0                           sequence 1              2
 *     |-----------------------------------|----------------------|---|     blocks
 *     |  part 0     |  part 1     |  part 2     |  part 3     | part 4     a part ends with a sequence when that is near
 *
 * A tile within one part is finished there. Of others each part leaves a weighted sum and its log-sum-exp, and those are joined. */
#ifndef KL_MLA_CUDA_PIECES_CUH
#define KL_MLA_CUDA_PIECES_CUH

#include "common/device.cuh"

enum { MLA_TILE_ROWS = 64, MLA_BLOCK_KEYS = 64, MLA_MOST_PARTS = 256, MLA_TABLE_INTS = 1920 };

/* Token: its first query, counted over the batch; start: the latent row of its first key. */
struct mla_sequence {
    int token, start, keys;
};
/* A block: of sequence n and its tile. */
struct mla_cut {
    int n, tile, block;
};
/* A tile that several parts share: `rows` rows from `row` on, of parts part .. part + parts - 1. */
struct mla_join {
    int row, rows, part, parts;
};

/* All of these, one kind behind the other, in kernel parameters while they fit there and else in device memory. */
struct mla_table {
    int N, H, parts, joins;
    int room;                     /* rows kept for a tile's sums */
    const int *memory;            /* NULL: number[] */
    int number[MLA_TABLE_INTS];
};

struct mla_pieces {
    const mla_cut *cut;           /* [parts+1] where the parts begin, and where the last one ends */
    const mla_join *join;         /* [joins] */
    const mla_sequence *sequence; /* [N+1], the last one's token is their number */
    int N, H, room;
};
__device__ inline mla_pieces mla_pieces_of(const mla_table &t)
{
    mla_pieces p;
    p.cut = (const mla_cut *)(t.memory ? t.memory : t.number);
    p.join = (const mla_join *)(p.cut + t.parts + 1);
    p.sequence = (const mla_sequence *)(p.join + t.joins);
    p.N = t.N;
    p.H = t.H;
    p.room = t.room;
    return p;
}

/* Keys that the last row of a tile sees, of a sequence with `tokens` queries. */
__host__ __device__ inline int mla_tile_keys(int keys, int tokens, int H, int tile)
{
    int last = (tile * MLA_TILE_ROWS + MLA_TILE_ROWS - 1) / H;
    return keys - (last < tokens ? tokens - 1 - last : 0);
}
__host__ __device__ inline int mla_tiles(int tokens, int H) { return (tokens * H + MLA_TILE_ROWS - 1) / MLA_TILE_ROWS; }
__host__ __device__ inline int mla_blocks(int keys) { return (keys + MLA_BLOCK_KEYS - 1) / MLA_BLOCK_KEYS; }

/* Where a part leaves its sums of a tile that it shares: it begins at most one such tile, and goes on with at most one. */
__host__ __device__ inline int mla_slot(int part, bool begins) { return 2 * part + begins; }

/* What a part does of one tile. */
struct mla_span {
    int row, rows;      /* its rows in the batch: token H + head */
    int token, tokens;  /* the token of its first row, and how many the sequence has */
    int start, keys;    /* of the sequence */
    int begin, end;     /* blocks */
    int slot;           /* -1: the whole tile is done here */
};

/* The span at `at`, which moves on; false when the part is done. */
__device__ inline bool mla_next_span(const mla_pieces &p, int part, mla_cut &at, const mla_cut &end, mla_span &s)
{
    if (at.n == end.n && at.tile == end.tile && at.block == end.block)
        return false;
    mla_sequence q = p.sequence[at.n];
    int tokens = p.sequence[at.n + 1].token - q.token, first = at.tile * MLA_TILE_ROWS, blocks = mla_blocks(mla_tile_keys(q.keys, tokens, p.H, at.tile));
    s.row = q.token * p.H + first;
    s.rows = min(tokens * p.H - first, (int)MLA_TILE_ROWS);
    s.token = first / p.H;
    s.tokens = tokens;
    s.start = q.start;
    s.keys = q.keys;
    s.begin = at.block;
    s.end = at.n == end.n && at.tile == end.tile ? end.block : blocks;
    s.slot = s.begin == 0 && s.end == blocks ? -1 : mla_slot(part, s.begin == 0);
    at.block = s.end;
    if (s.end < blocks)
        return true;
    at.block = 0;
    if (++at.tile < mla_tiles(tokens, p.H))
        return true;
    at.tile = 0;
    do
        at.n++;
    while (at.n < p.N && p.sequence[at.n + 1].token == p.sequence[at.n].token);
    return true;
}

#endif
