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

/* Bytes of the pieces in device memory at most, and their way there; *pieces points into memory. */
size_t mla_pieces_bytes(const mla_problem *p);
kl_status mla_upload_pieces(const kl_ctx *ctx, const mla_problem *p, const mla_schedule *s, void *memory, mla_pieces *pieces);

#endif
