/* Inside the recurrent form: jobs, and the two products against a block of latent rows, which have a portable and an
 * AMX implementation behind one small table. A row is one head of one query token; rows go in groups of MLA_GROUP. */
#ifndef KL_MLA_RECURRENT_H
#define KL_MLA_RECURRENT_H

#include "common/simd.h"
#include "mla/cpu/internal.h"

enum { MLA_GROUP = KL_LANES, MLA_BLOCK = 128 };

/* Up to a few query tokens of one sequence with all their heads: row = token H + head. The keys that its last token
 * sees are cut into pieces that are computed on their own and combined in order. */
typedef struct mla_job {
    int64_t n, i0, tokens; /* queries i0 .. i0+tokens-1 of sequence n */
    int64_t keys;          /* that the last of them sees */
    int64_t piece, pieces; /* keys in a piece (a multiple of MLA_BLOCK), number of pieces */
    int64_t groups;        /* of rows */
    int64_t row;           /* its first row in the round: a multiple of MLA_GROUP */
    int64_t part;          /* its first row in the round's partial results, [pieces, groups MLA_GROUP] */
} mla_job;

/* A block whose scores are known, but not yet their exponentials. */
typedef struct mla_scored {
    float *s;           /* [groups, MLA_BLOCK, MLA_GROUP] */
    int64_t keys;
    const float *m;     /* [groups, MLA_GROUP] what the exponents count from, this block included */
    float *l;           /* [groups, MLA_GROUP] sums so far, this block left out */
} mla_scored;

/* Products of packed rows with `keys` <= MLA_BLOCK latent rows. s, then P in its place: [groups, MLA_BLOCK, MLA_GROUP].
 * Vector v (16 dimensions) of the sum of row r of a group lies at r row_step + v vector_step floats of the group's R MLA_GROUP
 * floats; row_step 0 stands for R. scratch: scratch_bytes() of the calling thread; what score() leaves there accumulate() finds. */
typedef struct mla_block_ops {
    const char *name;
    size_t (*packed_bytes)(const mla_problem *p);                  /* of one group; a multiple of 64 */
    size_t (*scratch_bytes)(const mla_problem *p, int64_t groups); /* of one thread, for jobs of so many groups */
    int64_t row_step, vector_step;
    void (*begin)(void);                                           /* around the blocks of a piece; may be NULL */
    void (*end)(void);
    /* rows [MLA_GROUP,R+Dr] of absorbed queries, scale included -> packed */
    void (*pack)(const mla_problem *p, const float *rows, void *packed);
    /* s[g][j][r] = row (g,r) . c_j, for the block that begins with latent row `row`; the next block, which begins with
     * row + keys and has `ahead` keys, may be prefetched */
    void (*score)(const mla_problem *p, int64_t row, int64_t keys, int64_t ahead, int64_t groups, const void *packed, void *scratch, float *s);
    /* As score() for the next block (keys 0: there is none) and meanwhile P of this one, for accumulate(), its sums added
     * to l. NULL: the caller does one after the other. */
    void (*overlap)(const mla_problem *p, int64_t row, int64_t keys, int64_t ahead, int64_t groups, const void *packed, void *scratch, float *s,
                    const mla_scored *now);
    /* o[g][r][:R] (+)= sum_j P[g][j][r] c_j[:R]; overwrites when first; may use up s */
    void (*accumulate)(const mla_problem *p, int64_t row, int64_t keys, int64_t groups, float *s, void *scratch, bool first, float *o);
    void (*order)(const mla_problem *p, float *row);               /* puts the dimensions of a finished row in order; may be NULL */
} mla_block_ops;

extern const mla_block_ops mla_block_portable;
/* The AMX table where this CPU, this system and these sizes allow it, else NULL. */
const mla_block_ops *mla_block_amx(const mla_problem *p);

/* e = e^(s - m) for `keys` keys of one group, l += their sum; m = -inf: rows that have seen nothing yet. e may be s. */
void mla_exponentials(const float *s, int64_t keys, const float *m, float *l, float *e);

/* rows[row][0..R) = scale Wk_h^T q[:Dn], rows[row][R..R+Dr) = scale q[Dn:]. Work-shared: every thread of the team calls.
 * scratch: mla_absorb_scratch() floats of the calling thread. */
void mla_absorb(const mla_problem *p, const mla_job *jobs, int64_t count, float *scratch, float *rows);
/* o = Wv_h rows[row][0..R). Work-shared likewise. */
void mla_project(const mla_problem *p, const mla_job *jobs, int64_t count, float *scratch, const float *rows);
int64_t mla_absorb_scratch(const mla_problem *p);

#endif
