/* What the CPU variants of MLA share: row addresses, tiles as float, the variants' own functions. */
#ifndef KL_MLA_INTERNAL_H
#define KL_MLA_INTERNAL_H

#include <math.h>

#include "common/arena.h"
#include "common/parallel.h"
#include "mla/mla.h"

/* Rows of queries and of keys in one tile of the chunk form. */
enum { MLA_QUERY_TILE = 128, MLA_KEY_TILE = 256 };

static inline int64_t mla_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t mla_max(int64_t a, int64_t b) { return a > b ? a : b; }

static inline float mla_scale(const mla_problem *p)
{
    return p->scale != 0.0f ? p->scale : 1.0f / sqrtf((float)(p->Dn + p->Dr));
}
static inline int64_t mla_q_stride(const mla_problem *p) { return p->q_stride ? p->q_stride : p->H * (p->Dn + p->Dr); }
static inline int64_t mla_queries(const mla_problem *p, int64_t n) { return p->cu_q[n + 1] - p->cu_q[n]; }

/* The address of element `column` of latent row `row`. */
static inline const void *mla_latent_at(const mla_problem *p, int64_t row, int64_t column)
{
    size_t element = (size_t)row * (size_t)(p->R + p->Dr) + (size_t)column;
    return (const char *)p->latent + element * kl_dtype_size(p->latent_dtype);
}
/* The address of row `row` (0 .. Dn+Dv-1) of the weights of head h, at `column`. */
static inline const void *mla_weight_at(const mla_problem *p, int64_t h, int64_t row, int64_t column)
{
    size_t element = ((size_t)h * (size_t)(p->Dn + p->Dv) + (size_t)row) * (size_t)p->R + (size_t)column;
    return (const char *)p->kv_b + element * kl_dtype_size(p->weight_dtype);
}

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

/* mla_validate() without p->o, which a backward pass does not need. */
kl_status mla_validate_inputs(const kl_ctx *ctx, const mla_problem *p);
/* What every CPU entry point checks first: that the context is the cpu's, then the problem. */
kl_status mla_enter_cpu(const kl_ctx *ctx, const mla_problem *p, bool writes_o);
/* The workspace of a call: present, aligned and large enough. */
kl_status mla_check_workspace(const void *workspace, size_t bytes, size_t needed);
/* Bytes of a carved arena; SIZE_MAX where they do not fit, so that no workspace is ever enough. */
static inline size_t mla_arena_bytes(const kl_arena *a) { return a->overflow ? SIZE_MAX : a->used; }

/* ---- chunk: a unit is one head of one sequence, u = n H + h ---- */

/* Floats of one expanded key row: [k (Dn) | pe (Dr) | v (Dv)]. */
static inline int64_t mla_row(const mla_problem *p) { return p->Dn + p->Dr + p->Dv; }
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

/* ---- entry points of the variants ---- */

/* Does the recurrent form run on AMX tiles here, for these sizes? */
bool mla_has_tiles(const mla_problem *p);

size_t mla_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status mla_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);

size_t mla_chunk_forward_workspace(const kl_ctx *ctx, const mla_problem *p);
size_t mla_chunk_backward_workspace(const kl_ctx *ctx, const mla_problem *p);
kl_status mla_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
kl_status mla_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes);

#endif
