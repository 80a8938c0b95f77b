/* The block products of the recurrent form in float, in the compiler's vectors: a group's 16 rows lie in the lanes for
 * the scores, 16 latent dimensions for the weighted sum; every loaded number meets several accumulators. */
#include "mla/cpu/recurrent.h"

/* Accumulators: SCORE_KEYS x SCORE_GROUPS for the scores, SUM_ROWS x SUM_VECTORS for the sum. */
#if defined(__AVX512F__)
enum { SCORE_KEYS = 6, SCORE_GROUPS = 2, SUM_ROWS = 8, SUM_VECTORS = 2 };
#else
enum { SCORE_KEYS = 4, SCORE_GROUPS = 1, SUM_ROWS = 4, SUM_VECTORS = 1 };
#endif
enum { DEPTH = 192 }; /* latent dimensions of packed rows that stay in the first-level cache */

static size_t packed_bytes(const mla_problem *p)
{
    return (size_t)(p->R + p->Dr) * MLA_GROUP * sizeof(float);
}
static size_t scratch_bytes(const mla_problem *p, int64_t groups)
{
    (void)groups;
    return p->latent_dtype == KL_F32 ? 0 : (size_t)(p->R + p->Dr) * MLA_BLOCK * sizeof(float);
}

/* packed[d][r] = rows[r][d] */
static void pack(const mla_problem *p, const float *rows, void *packed)
{
    int64_t width = p->R + p->Dr;
    for (int64_t d = 0; d < width; d++)
        for (int64_t r = 0; r < MLA_GROUP; r++)
            ((float *)packed)[d * MLA_GROUP + r] = rows[r * width + d];
}

/* s[g][j] (+)= sum_d c_j[d] q[g][d], for `keys` keys and `groups` groups */
static inline __attribute__((always_inline)) void score_tile(int keys, int groups, const float *c, int64_t width, const float *q, int64_t ldq,
                                                             int64_t depth, bool first, float *s)
{
    kl_v sum[SCORE_KEYS][SCORE_GROUPS];
    for (int j = 0; j < keys; j++)
        for (int g = 0; g < groups; g++)
            sum[j][g] = first ? (kl_v){0} : kl_vload(s + (g * MLA_BLOCK + j) * MLA_GROUP);
    for (int64_t d = 0; d < depth; d++) {
        for (int g = 0; g < groups; g++) {
            kl_v lanes = kl_vload(q + g * ldq + d * MLA_GROUP);
            for (int j = 0; j < keys; j++)
                sum[j][g] += c[j * width + d] * lanes;
        }
    }
    for (int j = 0; j < keys; j++)
        for (int g = 0; g < groups; g++)
            kl_vstore(s + (g * MLA_BLOCK + j) * MLA_GROUP, sum[j][g]);
}

static inline __attribute__((always_inline)) void score_groups(int groups, const float *c, int64_t width, int64_t keys, const float *q,
                                                               int64_t ldq, int64_t depth, bool first, float *s)
{
    int64_t j = 0;
    for (; j + SCORE_KEYS <= keys; j += SCORE_KEYS)
        score_tile(SCORE_KEYS, groups, c + j * width, width, q, ldq, depth, first, s + j * MLA_GROUP);
    for (; j < keys; j++)
        score_tile(1, groups, c + j * width, width, q, ldq, depth, first, s + j * MLA_GROUP);
}

static const float *float_block(const mla_problem *p, int64_t row, int64_t keys, void *scratch, bool convert)
{
    const void *c = mla_latent_at(p, row, 0);
    if (p->latent_dtype == KL_F32)
        return c;
    if (convert)
        kl_to_f32(scratch, c, p->latent_dtype, (size_t)keys * (size_t)(p->R + p->Dr));
    return scratch;
}

static void score(const mla_problem *p, int64_t row, int64_t keys, int64_t ahead, int64_t groups, const void *packed, void *scratch, float *s)
{
    (void)ahead;
    const float *c = float_block(p, row, keys, scratch, true);
    int64_t width = p->R + p->Dr, ldq = width * MLA_GROUP;
    for (int64_t d = 0; d < width; d += DEPTH) {
        int64_t depth = mla_min(DEPTH, width - d), g = 0;
        for (; g + SCORE_GROUPS <= groups; g += SCORE_GROUPS)
            score_groups(SCORE_GROUPS, c + d, width, keys, (const float *)packed + g * ldq + d * MLA_GROUP, ldq, depth, d == 0,
                         s + g * MLA_BLOCK * MLA_GROUP);
        for (; g < groups; g++)
            score_groups(1, c + d, width, keys, (const float *)packed + g * ldq + d * MLA_GROUP, ldq, depth, d == 0,
                         s + g * MLA_BLOCK * MLA_GROUP);
    }
}

/* o[r][0 .. 16 vectors) (+)= sum_j P[j][r] c_j, for SUM_ROWS rows */
static inline __attribute__((always_inline)) void sum_tile(int vectors, const float *c, int64_t width, int64_t keys, const float *probability,
                                                           bool first, float *o, int64_t R)
{
    kl_v sum[SUM_ROWS][SUM_VECTORS];
    for (int r = 0; r < SUM_ROWS; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = first ? (kl_v){0} : kl_vload(o + r * R + v * KL_LANES);
    for (int64_t j = 0; j < keys; j++) {
        for (int v = 0; v < vectors; v++) {
            kl_v lanes = kl_vload(c + j * width + v * KL_LANES);
            for (int r = 0; r < SUM_ROWS; r++)
                sum[r][v] += probability[j * MLA_GROUP + r] * lanes;
        }
    }
    for (int r = 0; r < SUM_ROWS; r++)
        for (int v = 0; v < vectors; v++)
            kl_vstore(o + r * R + v * KL_LANES, sum[r][v]);
}

/* The same for the last size < 16 dimensions. */
static void sum_rest(int64_t size, const float *c, int64_t width, int64_t keys, const float *probability, bool first, float *o, int64_t R)
{
    for (int r = 0; r < SUM_ROWS; r++) {
        kl_v sum = first ? (kl_v){0} : kl_vload_n(o + r * R, size);
        for (int64_t j = 0; j < keys; j++)
            sum += probability[j * MLA_GROUP + r] * kl_vload_n(c + j * width, size);
        kl_vstore_n(o + r * R, sum, size);
    }
}

static void accumulate(const mla_problem *p, int64_t row, int64_t keys, int64_t groups, float *s, void *scratch, bool first, float *o)
{
    const float *c = float_block(p, row, keys, scratch, false);
    int64_t width = p->R + p->Dr, R = p->R;
    for (int64_t d = 0; d < R;) {
        int64_t left = R - d, step = left >= SUM_VECTORS * KL_LANES ? SUM_VECTORS * KL_LANES : mla_min(left, KL_LANES);
        for (int64_t g = 0; g < groups; g++) {
            for (int64_t r = 0; r < MLA_GROUP; r += SUM_ROWS) {
                const float *probability = s + g * MLA_BLOCK * MLA_GROUP + r;
                float *out = o + (g * MLA_GROUP + r) * R + d;
                if (step == SUM_VECTORS * KL_LANES)
                    sum_tile(SUM_VECTORS, c + d, width, keys, probability, first, out, R);
                else if (step == KL_LANES)
                    sum_tile(1, c + d, width, keys, probability, first, out, R);
                else
                    sum_rest(step, c + d, width, keys, probability, first, out, R);
            }
        }
        d += step;
    }
}

const mla_block_ops mla_block_portable = {"float", packed_bytes, scratch_bytes, 0, KL_LANES, NULL, NULL, pack, score, NULL, accumulate, NULL};
