/* Sequences cut into parts that are walked over at the same time.
 *
 * A part starts from the state before it, which comes from one of four places:
 *
 *     h0        the first part of a sequence
 *     zero      a tile or a few before the part, where the tiles' own matrices prove that nothing older is left (truncate.cuh)
 *     carried   every `span`-th part: from the summaries of what lies before it (summary.cuh, carry.cuh)
 *     walked    all others: whoever walks over the part before goes on through this one
 *
 * Which one depends on nothing after the part's first token. Parts begin at multiples of `tiles` tiles of their sequence, and
 * those that a chunk's state is wanted in at multiples of the chunk. */
#ifndef KL_KDA_CUDA_PARTS_CUH
#define KL_KDA_CUDA_PARTS_CUH

#include "kda/cuda/walk.cuh"

/* Sequences are numbered here in the order in which kda_path_of takes them. */
struct kda_parts {
    int tiles, span;  /* of a part; parts from one carried state to the next */
    int most;         /* parts of the longest sequence */
    int sequences;
    int first[KDA_ORDERED_SEQUENCES + 1];   /* parts before each sequence, which has one at least */
    int carried[KDA_ORDERED_SEQUENCES + 1]; /* parts 0, span, 2 span, .. before each sequence */
};

/* Parts of so many tiles, rounded up to whole chunks where their states are wanted; span 0: nothing is carried. */
kda_parts kda_parts_cut(const kda_problem *p, int64_t tiles, int64_t span);
/* The parts that cost least, and the nanoseconds that they should take; sequences 0: none, or the problem cannot be cut. */
kda_parts kda_parts_of(const kl_ctx *ctx, const kda_problem *p, int64_t *time);

/* Looks where parts may start (below), and copies h0 to `kept`, [sequences][HV][K,V] in kda_path_of's order, unless that is NULL. */
kl_status kda_look(const kl_ctx *ctx, const kda_problem *p, const kda_parts &parts, const kda_walk &walk, const unsigned char *tiles, int *start, float *kept);
/* ht takes the place of h0, which other parts may read later. */
static inline bool kda_keeps_h0(const kda_problem *p) { return p->h0 && p->h0 == p->ht; }

/* The state before a sequence's head; NULL: zero. */
__device__ __forceinline__ const float *kda_first_state(const kda_walk &p, const float *kept, const kda_path &path, int64_t pair)
{
    int64_t size = (int64_t)p.K * p.V;
    return kept ? kept + pair * size : p.h0 ? p.h0 + (path.slot * p.HV + path.head) * size : nullptr;
}

/* One of the parts of one head. */
struct kda_part {
    kda_path path;
    int number, count; /* among the parts of its sequence */
    int64_t pair;      /* as kda_path_of counts them */
    int64_t at, apart; /* where its start is in a table [most][sequences][HV], and from part to part */
    int64_t carried;   /* where the states carried into its sequence are in a table [carried][HV] */
};

/* The last sequence s with before(s) <= x. */
template <class F> __device__ __forceinline__ int kda_find_sequence(const kda_parts &parts, int x, F before)
{
    int low = 0, high = parts.sequences;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (before(middle) <= x ? low : high) = middle;
    }
    return low;
}

/* Part `number` of sequence s, head `head`. */
__device__ __forceinline__ kda_part kda_part_of(const kda_walk &p, const kda_parts &parts, int s, int number, int head)
{
    kda_part part;
    part.pair = s * p.HV + head;
    part.path = kda_path_of(p, part.pair);
    part.number = number;
    part.count = parts.first[s + 1] - parts.first[s];
    part.apart = parts.sequences * p.HV;
    part.at = number * part.apart + part.pair;
    part.carried = parts.carried[s] * p.HV + head;
    return part;
}

/* ---- where parts start: start[most][sequences][HV], the tile from which the walk may begin with zero state, -1: nothing is proven ---- */

__device__ __forceinline__ int kda_start_of(const int *start, const kda_part &part, int number)
{
    return start[part.at + (number - part.number) * part.apart];
}

/* All lanes of a warp: the first part behind this one that does not start where its neighbour ends. */
__device__ __forceinline__ int kda_next_start(const int *start, const kda_parts &parts, const kda_part &part)
{
    for (int first = part.number + 1; first < part.count; first += 32) {
        int i = first + kl_lane();
        uint32_t starts = __ballot_sync(0xffffffffu, i < part.count && (i % parts.span == 0 || kda_start_of(start, part, i) >= 0));
        if (starts)
            return first + __ffs(starts) - 1;
    }
    return part.count;
}

/* All lanes of a warp: the last part from this one to `end` - 1 that starts from h0 or zero, -1: none. */
__device__ __forceinline__ int kda_last_start(const int *start, const kda_part &part, int end)
{
    for (int last = end - 1; last >= part.number; last -= 32) {
        int i = last - kl_lane();
        uint32_t starts = __ballot_sync(0xffffffffu, i >= part.number && kda_start_of(start, part, i) >= 0);
        if (starts)
            return last - (__ffs(starts) - 1);
    }
    return -1;
}

#endif
