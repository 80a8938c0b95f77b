/* A problem of the layers with memory behind it: random, its numbers already of the types in which a variant will find them,
 * and the right answers beside. For verify, bench and the tests. */
#ifndef KL_HARNESS_LAYERS_CASE_H
#define KL_HARNESS_LAYERS_CASE_H

#include "common/compare.h"
#include "harness/layers.h"

typedef struct layers_case_tensor {
    layers_tensor is;
    double *given;  /* [rows,columns] before the pass */
    double *want;   /* [rows,columns] after it, in double precision; NULL: the pass does not write it */
    float *out;     /* [rows,columns] what a variant wrote */
    void *memory;   /* on the device of the context */
    size_t bytes;
    bool there;
} layers_case_tensor;

typedef struct layers_case {
    char name[96];
    kl_ctx *ctx;
    layers_problem p; /* pointers into the context's device */
    layers_grads g;
    bool backward;
    int count;
    layers_case_tensor tensor[LAYERS_TENSORS];
    void *workspace;
    size_t workspace_bytes;
} layers_case;

/* Any pointer of the specification that is not NULL asks for that tensor; those that must be there need not be asked for. */
#define LAYERS_WANTED ((void *)1)
typedef struct layers_spec {
    layers_problem p;
    layers_grads g;
    bool backward;
    bool blank; /* no numbers: the caller fills the memory, and nothing is scored */
    uint64_t seed;
} layers_spec;

kl_status layers_case_create(layers_case *c, kl_ctx *ctx, const layers_spec *spec);
void layers_case_free(layers_case *c);

/* The right answers of a pass (reference_variants_layers.c). */
kl_status layers_case_solve(layers_case *c, kl_pass pass);
/* Numbers as given, everything that is written poisoned, one call of the variant, and its results back. What the pass may
 * not write must be as it was. */
kl_status layers_case_run(layers_case *c, const kl_variant *v, kl_pass pass);
/* ||out - want|| / ||want|| of a tensor, NaN where the pass wrote none. */
double layers_case_error(const layers_case_tensor *t);
double layers_case_worst(const layers_case *c, kl_pass pass, const char **tensor);
const kl_tolerance *layers_case_tolerance(const layers_case *c);
bool layers_case_writes(const layers_case_tensor *t, kl_pass pass);

/* x as the type holds it. */
double layers_rounded(double x, kl_dtype type);

#endif
