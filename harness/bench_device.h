/* What the device bench must know of a family; private to harness/bench_device*.c. */
#ifndef KL_HARNESS_BENCH_DEVICE_H
#define KL_HARNESS_BENCH_DEVICE_H

#include "common/arena.h"
#include "harness/bench.h"
#include "harness/device_inputs.h"

enum { KL_MOST_SETS = 32, KL_MOST_CLEARED = 8 };

/* Tensors of one call, in one piece of device memory: inputs, then outputs. */
typedef struct kl_tensors {
    kl_any_problem problem;
    kl_any_grads grads;
    dplr_problem general;      /* of the kda problem, where the general recurrence is measured */
    void *memory;
    size_t bytes, outputs_at;  /* all of it; where inputs end */
    struct { void *at; size_t bytes; } cleared[KL_MOST_CLEARED]; /* outputs that are added to */
    int cleared_count;
} kl_tensors;

typedef struct kl_workload {
    kl_bench *b;
    kl_family family;
    const struct kl_bench_ops *ops;
    kl_shape shape;
    bool forward, backward, decode;
    const kl_variant *variant;
    int64_t *host_table, *device_table; /* of the family's own, freed with the workload */
    int sets;
    kl_tensors set[KL_MOST_SETS];
    int heads;                 /* scored, where only some are; 0: does not apply */
    int64_t head[KL_SLICE_HEADS];
    int64_t rows;              /* scored, where only some are; 0: does not apply */
    kl_cost spared[2];         /* by pass: what these very inputs do not need of what the table reckons */
    kl_case sample;            /* what is scored, on the host: the outputs, and what they should be */
    void *own;                 /* of the family's own, for expect() and fetch(), freed with the workload */
    kl_scratch scratch;        /* of the reference */
    void *workspace;
    size_t workspace_bytes;
    float *slice;              /* on the device */
} kl_workload;

typedef struct kl_bench_ops {
    kl_status (*complete)(kl_workload *w);   /* defaults of the shape, and what does not go together */
    kl_status (*tables)(kl_workload *w);     /* what the problems point to beside their tensors; may be NULL */
    /* Sets the problem, the gradients and what is cleared. Runs over NULL to count, then over device memory. */
    void (*lay_out)(const kl_workload *w, kl_tensors *t, kl_arena *a);
    kl_status (*fill)(const kl_workload *w, const kl_tensors *t, uint64_t seed);
    kl_status (*before)(const kl_workload *w, int set); /* what a backward pass by itself is given beside its inputs; may be NULL */
    kl_status (*expect)(kl_workload *w);     /* makes the sample, from the inputs of set 0 */
    kl_status (*fetch)(const kl_workload *w, kl_pass pass); /* what the pass has written in set 0, to the sample */
} kl_bench_ops;

extern const kl_bench_ops kl_bench_kda, kl_bench_mla, kl_bench_moe;

static inline kl_pass kl_first_pass(const kl_workload *w) { return w->forward ? KL_FORWARD : KL_BACKWARD; }
static inline kl_pass kl_last_pass(const kl_workload *w) { return w->backward ? KL_BACKWARD : KL_FORWARD; }

/* Work that the reference may be given: about a second. */
static const double kl_reference_flops = 6e9;

#endif
