/* The cuts and joins of a decode step, worked out on the host without memory of its own. */
#ifndef KL_MLA_CUDA_SCHEDULE_H
#define KL_MLA_CUDA_SCHEDULE_H

#include "mla/cuda/pieces.cuh"
#include "mla/internal.h"

struct mla_schedule {
    int parts, joins;
    mla_cut cut[MLA_MOST_PARTS + 1];
    mla_join join[MLA_MOST_PARTS];
};

/* Parts for so many multiprocessors. */
void mla_cut_up(const mla_problem *p, int multiprocessors, mla_schedule *s);

/* Bytes that the table may need in device memory, and the table, brought there if it must be. */
size_t mla_table_bytes(const mla_problem *p);
kl_status mla_make_table(const kl_ctx *ctx, const mla_problem *p, const mla_schedule *s, void *memory, mla_table *table);

#endif
