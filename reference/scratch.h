/* Scratch memory of one function: what it takes is released together, and one flag says whether all of it could be had. */
#ifndef REFERENCE_SCRATCH_H
#define REFERENCE_SCRATCH_H

#include "reference/real.h"

enum { REF_SCRATCH_MAX = 24 };

typedef struct {
    real *taken[REF_SCRATCH_MAX];
    int count;
    int status;   /* 0, or -1 once memory has run out */
} ref_scratch;

/* n zeros, released by ref_release; NULL when there is no memory, and then s->status is -1. */
static inline real *ref_take(ref_scratch *s, int64_t n)
{
    real *x = s->count < REF_SCRATCH_MAX ? ref_zeros(n) : NULL;
    if (x)
        s->taken[s->count++] = x;
    else
        s->status = -1;
    return x;
}

/* Frees everything taken. Returns s->status. */
static inline int ref_release(ref_scratch *s)
{
    for (int n = 0; n < s->count; n++)
        free(s->taken[n]);
    s->count = 0;
    return s->status;
}

#endif
