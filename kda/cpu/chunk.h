/* What the chunk kernels share: one chunk of one head read from the caller's tensors into padded scratch. */
#ifndef KL_KDA_CPU_CHUNK_H
#define KL_KDA_CPU_CHUNK_H

#include "common/arena.h"
#include "common/split.h"
#include "kda/cpu/intra.h"
#include "kda/internal.h"

/* Where a task works: the columns [v0, v0 + columns) of value head hv of sequence n. Columns of V never talk to each
 * other, and no element's sum depends on how many are worked on together: cutting a head changes no bit. */
typedef struct kda_panel {
    const kda_problem *p;
    int64_t n, hv, v0, columns;
    int64_t C, Kp, Vp; /* tokens a chunk; K and columns padded to 16 */
    int64_t Kl;        /* from row to row of [C,Kp] scratch */
    int64_t Vl;        /* and of S, u and o */
    bool split;        /* products with the state go through the matrix unit */
} kda_panel;

kda_panel kda_panel_make(const kda_problem *p, int64_t n, int64_t hv, int64_t v0, int64_t columns, bool split);
/* Whether they shall: where there is such a unit and heads are wide enough to fill its tiles. */
bool kda_chunk_splits(const kda_problem *p);
/* For each sequence the number of chunks before it. */
void kda_first_chunks(const kda_problem *p, int64_t *first_chunk);

/* Scratch of one thread. Matrices over K have rows w->Kl apart, those over V w->Vl. */
typedef struct kda_chunk {
    float *q, *k, *decay; /* [C,Kp] q normalised and scaled, k normalised, e^g */
    float *qg, *kg, *ke;  /* [C,Kp] q P(-1->i), k P(-1->i), k P(i->end) */
    float *whole;         /* [Kp] P(-1->end) */
    float *beta;          /* [C] */
    float *u, *o;         /* [C,Vp] */
    float *Aqk, *Akk;     /* [C,C]; upper triangles are never read */
    kda_level_scratch level;
    struct {
        char *kg, *ke, *Akk; /* left operands; ke is [Kp,C] */
        char *S, *u;         /* right operands, KDA_PIECE columns at a time */
    } packed;
} kda_chunk;

/* On the matrix unit so many columns of V are taken from u to the next state at a time; fewer would fit the first cache,
 * but changes between the unit and the vectors cost more. Within a chunk it works on groups of so many tokens. */
enum { KDA_PIECE = 128, KDA_GROUP = 32 };

kda_chunk kda_chunk_take(kl_arena *a, const kda_problem *p);
/* Only q, k, decay, whole, beta, u, o, Aqk and Akk; the rest is NULL. */
kda_chunk kda_chunk_take_shared(kl_arena *a, const kda_problem *p);
/* q, k, decay, beta, and v into u, of tokens [t, t + count). */
void kda_chunk_load(const kda_panel *w, int64_t t, int64_t count, kda_chunk *x);
/* In two parts, tokens [t, t + count) to the rows from `first` on: all but v, and v; where the row of v of token t begins. */
void kda_chunk_load_keys(const kda_panel *w, int64_t t, int64_t first, int64_t count, kda_chunk *x);
void kda_chunk_load_values(const kda_panel *w, int64_t t, int64_t first, int64_t count, kda_chunk *x);
const float *kda_chunk_values(const kda_panel *w, int64_t t);
/* All that the state does not enter: qg, kg, ke, whole, Aqk, Akk. */
void kda_chunk_prepare(const kda_panel *w, int64_t count, kda_chunk *x);
/* Of that only what the state after the chunk needs: kg, ke, whole, Akk. */
void kda_chunk_prepare_write(const kda_panel *w, int64_t count, kda_chunk *x);
/* With the state S [Kp,Vp] before the chunk: u from v (residual [C,Vp], when wanted, is u before beta); then, as wanted,
 * o from u (not on the matrix unit, for which chunk_split.h has the whole), and S becomes the state after the chunk (which
 * spoils kg). */
enum { KDA_READ = 1, KDA_WRITE = 2 };
void kda_chunk_apply(const kda_panel *w, int64_t count, unsigned wanted, float *S, kda_chunk *x, float *residual);

#endif
