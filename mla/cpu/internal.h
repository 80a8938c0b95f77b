/* What the CPU variants of MLA share beyond mla/internal.h: tiles as float, expanded keys and values. */
#ifndef KL_MLA_CPU_INTERNAL_H
#define KL_MLA_CPU_INTERNAL_H

#include "common/parallel.h"
#include "mla/internal.h"

/* Rows of queries and of keys in one tile of the chunk form. */
enum { MLA_QUERY_TILE = 128, MLA_KEY_TILE = 256 };

/* rows x columns of a matrix whose rows are ld elements apart, as float: in place when it is float already,
 * else converted into scratch (rows * columns floats). *ld_out: floats from row to row of the answer. */
static inline const float *mla_float_tile(const void *source, kl_dtype type, int64_t ld, int64_t rows, int64_t columns,
                                          float *scratch, int64_t *ld_out)
{
    *ld_out = ld;
    if (type == KL_F32)
        return (const float *)source;
    for (int64_t r = 0; r < rows; r++)
        kl_to_f32(scratch + r * columns, (const char *)source + (size_t)(r * ld) * kl_dtype_size(type), type, (size_t)columns);
    *ld_out = columns;
    return scratch;
}

/* ---- chunk: a unit is one head of one sequence, u = n H + h ---- */

/* The first of the expanded rows of unit u, counted over all units before it; key_sum[n]: keys of the sequences before n. */
static inline int64_t mla_unit_row(const mla_problem *p, const int64_t *key_sum, int64_t u)
{
    return u == p->N * p->H ? key_sum[p->N] * p->H : key_sum[u / p->H] * p->H + u % p->H * p->kv_len[u / p->H];
}
/* key_sum [N+1]; returns the largest number of keys of a sequence. */
int64_t mla_sum_keys(const mla_problem *p, int64_t *key_sum);
/* One past the last unit of the group that begins with u: as many as `rows` expanded rows hold, at least one. */
int64_t mla_group_end(const mla_problem *p, const int64_t *key_sum, int64_t u, int64_t rows);

/* The expanded rows of keys j0 .. j0+rows-1 (at most MLA_KEY_TILE) of unit u. scratch: mla_expand_scratch() floats. */
void mla_expand(const mla_problem *p, int64_t u, int64_t j0, int64_t rows, float *scratch, float *out);
int64_t mla_expand_scratch(const mla_problem *p);

#endif
