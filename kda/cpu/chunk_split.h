/* A chunk on the matrix unit. Left operands are packed a few rows at a time, in the walks that make them, and used before
 * they leave the first cache. */
#ifndef KL_KDA_CPU_CHUNK_SPLIT_H
#define KL_KDA_CPU_CHUNK_SPLIT_H

#include "kda/cpu/chunk.h"
#include "kda/cpu/intra_split.h"

/* Scratch of one thread. */
typedef struct kda_split {
    kda_chunk chunk;        /* q, k, decay, whole, beta, u, o, Aqk, Akk */
    kda_halves_scratch halves;
    char *kg, *qg, *Akk, *Aqk; /* left operands of a group: [KDA_GROUP,Kp], [KDA_GROUP,C] */
    char *ke;               /* likewise of 32 channels: [32,C] */
    char *S, *u;            /* right operands: [Kp,Vp], [C,Vp] */
    float *across;          /* [32,C]: ke of 32 channels, transposed */
    float *product;         /* [Kp padded to 32] */
    kl_ahead ahead;
} kda_split;

kda_split kda_split_take(kl_arena *a, const kda_problem *p);
/* Tokens [t, t + count) of a panel will be loaded next: they are asked for during the next chunk's products. */
void kda_split_look_ahead(const kda_panel *w, int64_t t, int64_t count, kda_split *x);
/* chunk.o of tokens [t, t + count); S [Kp,Vp] becomes the state after them. */
void kda_split_chunk(const kda_panel *w, int64_t t, int64_t count, float *S, kda_split *x);

#endif
