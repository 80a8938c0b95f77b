/* What the files of the family share: the problem's defaults resolved, and the functions behind the
 * rows of the variant table. No part of the contract. */
#ifndef KL_KDA_INTERNAL_H
#define KL_KDA_INTERNAL_H

#include <math.h>

#include "kda/conv.h"
#include "kda/decode_layer.h"
#include "kda/dplr.h"
#include "kda/gated_norm.h"
#include "kda/kda.h"

/* Tokens [begin, begin + length) of the packed tensors. */
typedef struct kda_span {
    int64_t begin, length;
} kda_span;

static inline kda_span kda_sequence(int64_t T, const int64_t *cu_seqlens, int64_t n)
{
    if (!cu_seqlens)
        return (kda_span){n * T, T};
    return (kda_span){cu_seqlens[n], cu_seqlens[n + 1] - cu_seqlens[n]};
}

static inline int64_t kda_chunk_tokens(const kda_problem *p) { return p->chunk ? p->chunk : (int64_t)KDA_DEFAULT_CHUNK; }
static inline float kda_scale(float scale, int64_t K) { return scale != 0.0f ? scale : 1.0f / sqrtf((float)K); }
static inline int64_t kda_stride(int64_t stride, int64_t width) { return stride ? stride : width; }
static inline int64_t kda_slot(const kda_problem *p, int64_t n) { return p->state_index ? p->state_index[n] : n; }

/* Panels of columns that a head is cut into: one, or enough for the threads when there are fewer heads; none thinner
 * than 32 columns. */
static inline int64_t kda_panels_a_head(int64_t heads, int64_t V, int threads)
{
    int64_t most = (V + 31) / 32, wanted = heads ? (threads + heads - 1) / heads : 1;
    return wanted < most ? wanted : most;
}

#ifdef __cplusplus
extern "C" {
#endif

/* Tokens of the longest sequence. */
int64_t kda_longest(int64_t T, int64_t N, const int64_t *cu_seqlens);

/* The checks that KDA, DPLR and the convolution share: N against B or cu_seqlens, and cu_seqlens itself. */
kl_status kda_validate_sequences(const char *who, int64_t B, int64_t T, int64_t N, const int64_t *cu_seqlens);

/* The one of two calls that is for the context's device. */
#ifdef KL_HAVE_CUDA
#define KDA_ON_DEVICE(ctx, cpu, cuda) ((ctx)->device == KL_CUDA ? (cuda) : (cpu))
#else
#define KDA_ON_DEVICE(ctx, cpu, cuda) ((void)(ctx), (cpu))
#endif

/* ---- around the recurrence ---- */
enum { KDA_CONV_TAPS = 16, KDA_NORM_WIDTH = 4096 }; /* at most */
kl_status kda_validate_workspace(const char *who, const void *workspace, size_t bytes, size_t wanted);
kl_status kda_cpu_conv_forward(kl_ctx *ctx, const kda_conv_problem *p);
kl_status kda_cpu_conv_backward(kl_ctx *ctx, const kda_conv_problem *p, const kda_conv_grads *g);
kl_status kda_cpu_gated_norm_forward(kl_ctx *ctx, const kda_gated_norm_problem *p);
kl_status kda_cpu_gated_norm_backward(kl_ctx *ctx, const kda_gated_norm_problem *p, const kda_gated_norm_grads *g);
size_t kda_cuda_conv_workspace(const kda_conv_problem *p, kl_pass pass);
kl_status kda_cuda_conv_forward(kl_ctx *ctx, const kda_conv_problem *p);
kl_status kda_cuda_conv_backward(kl_ctx *ctx, const kda_conv_problem *p, const kda_conv_grads *g);
size_t kda_cuda_gated_norm_workspace(const kda_gated_norm_problem *p, kl_pass pass);
bool kda_cuda_decode_fits(const kda_decode_problem *p);
kl_status kda_cuda_decode(kl_ctx *ctx, const kda_decode_problem *p);
kl_status kda_cuda_gated_norm_forward(kl_ctx *ctx, const kda_gated_norm_problem *p);
kl_status kda_cuda_gated_norm_backward(kl_ctx *ctx, const kda_gated_norm_problem *p, const kda_gated_norm_grads *g);

/* ---- CPU variants ---- */
size_t kda_cpu_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status kda_cpu_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
size_t kda_cpu_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status kda_cpu_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
size_t kda_cpu_chunk_backward_workspace(const kl_ctx *ctx, const kda_problem *p);
kl_status kda_cpu_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes);
size_t dplr_cpu_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status dplr_cpu_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);

/* ---- CUDA variants ---- */
size_t kda_cuda_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status kda_cuda_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
size_t dplr_cuda_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status dplr_cuda_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);

/* The tiles (kda/cuda/tile.cuh, or core_tile.cuh) of every sequence and value head, [tile][HV], behind the table of packed sequences: what the
 * walk reads, by itself for tests and timings. *tiles is where in the workspace they begin. */
size_t kda_cuda_tiles_workspace(const kda_problem *p, bool core);
kl_status kda_cuda_tiles(const kl_ctx *ctx, const kda_problem *p, bool core, void *workspace, size_t bytes, const void **tiles);
/* Nanoseconds that a form should take, INT64_MAX: it is not to be had. */
int64_t kda_cuda_persistent_time(const kl_ctx *ctx, const kda_problem *p);
size_t kda_cuda_persistent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status kda_cuda_persistent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
/* Preparation and walk at the same time, in two kernels. */
int64_t kda_cuda_follow_time(const kl_ctx *ctx, const kda_problem *p);
size_t kda_cuda_follow_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status kda_cuda_follow_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
/* The same with a first part and later ones of so many tiles, for tests and timings. */
size_t kda_cuda_follow_cut_workspace(const kda_problem *p, int64_t first, int64_t each);
kl_status kda_cuda_follow_cut(const kl_ctx *ctx, const kda_problem *p, int64_t first, int64_t each, void *workspace, size_t bytes);
/* Preparation and walk in one block, whole heads, tiles in shared memory alone; nanoseconds that it should take, INT64_MAX: it is not to be had. */
int64_t kda_cuda_fused_time(const kl_ctx *ctx, const kda_problem *p);
size_t kda_cuda_fused_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status kda_cuda_fused_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
/* Sequences cut into parts that are walked over at the same time (kda/cuda/parts.cuh). */
int64_t kda_cuda_scan_time(const kl_ctx *ctx, const kda_problem *p);
size_t kda_cuda_scan_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status kda_cuda_scan_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
/* The same with parts of so many tiles and a carried state every `span` parts (0: none), for tests and timings. *start is where in
 * the workspace the tiles are from which parts start with zero state, int [part][sequence, longest first][HV], -1: elsewhere. */
size_t kda_cuda_scan_cut_workspace(const kda_problem *p, int64_t tiles, int64_t span);
kl_status kda_cuda_scan_cut(const kl_ctx *ctx, const kda_problem *p, int64_t tiles, int64_t span, void *workspace, size_t bytes, const int **start);
size_t kda_cuda_two_pass_shared(const kda_problem *p);
size_t kda_cuda_two_pass_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status kda_cuda_two_pass_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
size_t kda_cuda_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status kda_cuda_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
size_t kda_cuda_chunk_backward_workspace(const kl_ctx *ctx, const kda_problem *p);
kl_status kda_cuda_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes);

#ifdef __cplusplus
}
#endif

#endif
