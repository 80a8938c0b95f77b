/* Time, rate, fraction of the machine's ceiling and error of every variant, one row a case. */
#ifndef KL_HARNESS_BENCH_H
#define KL_HARNESS_BENCH_H

#include "common/timer.h"
#include "harness/problem.h"
#include "harness/report.h"

/* What this machine reaches at best with these threads, or its device, measured in the same run. */
typedef struct kl_ceilings {
    double copy_gbps;   /* bytes read and written of a large copy */
    double read_gbps;   /* of reading a large array; 0: not measured */
    double gemm_tflops; /* of a matrix product, float32 on the CPU, bfloat16 on a device; 0: not measured */
} kl_ceilings;
kl_status kl_ceilings_measure(kl_ctx *ctx, kl_ceilings *c);
kl_status kl_ceilings_measure_device(kl_ctx *ctx, kl_ceilings *c);

/* One case of --shapes; which keys apply is the family's affair. 0: the default that the family's builder has. */
enum { KL_SHAPE_LENGTHS = 64, KL_SHAPES = 64 };
typedef struct kl_shape {
    int64_t B, T, H, HV, K, V, G, C;          /* kda; N too: packed sequences of T / N tokens */
    int64_t dplr;                             /* kda on a device: the general recurrence beside it */
    int64_t raw;                              /* kda: bounded gate, norms and sigmoid of beta inside the kernel */
    int64_t value_first;                      /* kda: the state is [V,K] */
    int64_t N, Tq, R, Dn, Dr, Dv;             /* mla */
    int64_t again;                            /* mla: the backward pass computes o and lse again instead of being given them */
    int64_t D, E, I, Is, top_k;               /* moe */
    int64_t new_tokens;                       /* model: tokens to decode */
    /* layers: T, D, V words, I, and of projections N outputs, K inputs; C parameters, B matrices */
    kl_dtype latent, weight;
    int64_t lengths[KL_SHAPE_LENGTHS];
    int64_t length_count;                     /* 0: not packed */
} kl_shape;

/* "T=4096,H=4;T=8192": cases between semicolons, each starting from the one before it, the first from *first. Keys that
 * the family ("kda", "mla", "moe", "model") does not know are refused by name. */
kl_status kl_shapes_parse(const char *family, const char *text, const kl_shape *first, kl_shape *shapes, int *count);

typedef enum kl_bench_pass { KL_BENCH_FWD = 0, KL_BENCH_BWD, KL_BENCH_DECODE, KL_BENCH_PREFILL, KL_BENCH_FWDBWD, KL_BENCH_PASSES } kl_bench_pass;
const char *kl_bench_pass_name(kl_bench_pass p);

/* A list of shapes with a name: the family, what it holds, and the passes that it is meant for. */
typedef struct kl_shape_list {
    const char *family, *name, *shapes, *summary;
    bool pass[KL_BENCH_PASSES];
} kl_shape_list;
const kl_shape_list *kl_shape_lists(int *count);

/* Geometric means of the rows' times, by family, pass, variant and gate. */
typedef struct kl_means {
    struct { char name[64]; double log_sum; int rows; } of[16];
    int count;
} kl_means;

/* What calls on a device take, seconds each; runs 0: not measured. */
typedef struct kl_device_times {
    kl_spread call;      /* marks around one call */
    kl_spread pipelined; /* many calls one after the other */
    kl_spread graph;     /* the same recorded and replayed */
    kl_spread warm;      /* a graph that uses one set of inputs over and over; runs 0: so does `graph` */
    kl_spread host;      /* of the processor, to launch one call */
    int sets;            /* of inputs and outputs, taken in turns */
} kl_device_times;

typedef struct kl_bench {
    kl_ctx *ctx;
    kl_provenance provenance;
    kl_ceilings ceilings;
    kl_regime regime;
    const char *variant;      /* the one variant to time; NULL: all */
    bool pass[KL_BENCH_PASSES]; /* which to run */
    int runs;                 /* 0: as many as fit a short while, at least 3 */
    kl_lines lines;           /* the rows, for --json */
    bool quiet;               /* no table on standard output */
    int rows;
    bool wrong;               /* an error was beyond its limit */
    kl_scratch scratch;
    kl_means means;           /* over the rows so far */
} kl_bench;

/* A finished measurement. bytes, flops: the least that the problem needs; err NaN: not measured. */
typedef struct kl_bench_row {
    const char *family, *variant, *gate; /* gate NULL: does not apply */
    kl_bench_pass pass;
    const kl_shape *shape;
    kl_spread seconds;
    const kl_device_times *device; /* NULL: on the CPU. `seconds` is then the graph's, or the pipelined one */
    kl_cost cost;
    double memory_gbps;       /* the ceiling that its bytes are held against */
    const char *memory_name;
    double err, err_limit;
    double err_part;          /* the worst head and window of time; 0: not taken */
    int64_t err_T;            /* tokens of the problem that the error was taken on; 0: the timed one */
    int64_t err_heads[8];     /* query heads that it was taken on, and how many; 0: all */
    int err_head_count;
    int64_t err_rows;         /* rows (a query of a head, a token) that it was taken on; 0: all */
    size_t workspace_bytes, peak_bytes;
} kl_bench_row;
kl_status kl_bench_emit(kl_bench *b, const kl_bench_row *row);

/* How many calls to time when the first one took that long: --runs, or as many as fit a second, at least 3 of a short one. */
int kl_bench_runs(const kl_bench *b, double warm);
/* Times calls of fn after one call to warm up. */
typedef kl_status (*kl_bench_fn)(void *user);
kl_status kl_bench_time(const kl_bench *b, kl_bench_fn fn, void *user, kl_spread *seconds);

/* Calls launch(user, set) for one call on that set of tensors, in the four ways. */
typedef kl_status (*kl_launch_fn)(void *user, int set);
kl_status kl_bench_time_device(const kl_bench *b, kl_launch_fn launch, void *user, int sets, kl_device_times *times);
/* The device's variants at one shape: inputs are made on the device, and some heads scored against the reference.
 * *seconds: what the variant chunk took; 0: not measured. */
kl_status kl_bench_device(kl_bench *b, kl_family family, const kl_shape *s, kl_bench_pass pass, double *seconds);
/* The geometric means so far, printed and forgotten. */
void kl_bench_means(kl_bench *b);

/* Every variant of the family (kda: DPLR beside it) at every shape, then the ratios that are asked of it. */
kl_status kl_bench_family(kl_bench *b, kl_family family, const kl_shape *shapes, int count);

/* The operations around the families at every shape; b->variant is one of them, or NULL. */
kl_shape kl_bench_layers_shape(kl_device device); /* where nothing is asked for */
kl_status kl_bench_layers(kl_bench *b, const kl_shape *shapes, int count);

struct kl_model;
/* Prefill, decode and, where asked, a training step of a model. */
kl_status kl_bench_model(kl_bench *b, struct kl_model *m, const kl_shape *shapes, int count);

#endif
