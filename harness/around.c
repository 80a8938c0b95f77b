#include "harness/around.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "common/rng.h"
#include "harness/device_inputs.h"
#include "kda/conv.h"
#include "kda/decode_layer.h"
#include "kda/gated_norm.h"

/* ---- tensors ---- */

enum { MOST_TENSORS = 20, DIM = 128, TAPS = 4, HOST = 0, DEVICE = 1 };
enum { FWD_IN = 1, FWD_OUT = 2, BWD_IN = 4, BWD_OUT = 8 };

/* The same numbers twice: float for the CPU, `dtype` for the device. */
typedef struct tensor {
    const char *name;
    int64_t count;
    kl_dtype dtype;
    int use;     /* FWD_IN, ... */
    float scale; /* of what it holds at first; 0: zero */
    void *at[2];
} tensor;

typedef enum operation { CONV, NORM, DECODE } operation;

typedef struct around_case {
    operation operation;
    kl_dtype dtype;
    int64_t N, T, H; /* sequences, tokens of each, heads of DIM channels */
    kda_state_layout layout;
} around_case;

typedef struct around {
    const around_case *c;
    kl_ctx *ctx[2];
    tensor t[MOST_TENSORS];
    int count, sets; /* sets of states that timed decode steps take in turns */
    void *workspace[2];
    size_t workspace_bytes[2];
    kl_pass pass;
} around;

static int64_t width(const around_case *c) { return c->H * DIM; }
static int64_t elements(const around_case *c) { return c->N * c->T * width(c); }

static void add(around *a, const char *name, int64_t count, kl_dtype dtype, int use, float scale)
{
    a->t[a->count++] = (tensor){.name = name, .count = count, .dtype = dtype, .use = use, .scale = scale};
}

/* Workspace for one side, larger than before or kept. */
static kl_status make_room(around *a, int side, size_t bytes)
{
    if (bytes <= a->workspace_bytes[side])
        return kl_ok();
    a->workspace_bytes[side] = bytes;
    if (side == DEVICE) {
        if (a->workspace[side])
            kl_gpu_free(a->ctx[side], a->workspace[side]);
        return kl_gpu_alloc(a->ctx[side], &a->workspace[side], bytes);
    }
    free(a->workspace[side]);
    a->workspace[side] = aligned_alloc(64, (bytes + 63) / 64 * 64);
    return a->workspace[side] ? kl_ok() : kl_error(KL_ENOMEM, "verify: out of memory");
}

/* ---- short convolution ---- */

enum { X, WEIGHT, TAIL_IN, Y, TAIL_OUT, DY, DTAIL_OUT, DX, DWEIGHT, DTAIL_IN };

static void declare_conv(around *a)
{
    const around_case *c = a->c;
    int64_t tail = c->N * width(c) * (TAPS - 1);
    add(a, "x", elements(c), c->dtype, FWD_IN | BWD_IN, 1.0f);
    add(a, "weight", width(c) * TAPS, c->dtype, FWD_IN | BWD_IN, 0.5f);
    add(a, "tail_in", tail, KL_F32, FWD_IN | BWD_IN, 1.0f);
    add(a, "y", elements(c), c->dtype, FWD_OUT, 0.0f);
    add(a, "tail_out", tail, KL_F32, FWD_OUT, 0.0f);
    add(a, "dy", elements(c), c->dtype, BWD_IN, 1.0f);
    add(a, "dtail_out", tail, KL_F32, BWD_IN, 1.0f);
    add(a, "dx", elements(c), c->dtype, BWD_OUT, 0.0f);
    add(a, "dweight", width(c) * TAPS, KL_F32, BWD_OUT, 0.0f);
    add(a, "dtail_in", tail, KL_F32, BWD_OUT, 0.0f);
}

static kl_status run_conv(around *a, int side, int set)
{
    (void)set;
    const around_case *c = a->c;
    kl_dtype type = side == HOST ? KL_F32 : c->dtype;
    kda_conv_problem p = {.B = c->N, .T = c->T, .N = c->N, .D = width(c), .W = TAPS, .silu = true, .dtype = type, .weight_dtype = type, .tail_dtype = KL_F32,
                          .x = a->t[X].at[side], .weight = a->t[WEIGHT].at[side], .y = a->t[Y].at[side], .tail_in = a->t[TAIL_IN].at[side],
                          .tail_out = a->t[TAIL_OUT].at[side]};
    p.workspace_bytes = kda_conv_workspace(a->ctx[side], &p, a->pass);
    KL_TRY(make_room(a, side, p.workspace_bytes));
    p.workspace = a->workspace[side];
    if (a->pass == KL_FORWARD)
        return kda_conv_forward(a->ctx[side], &p);
    return kda_conv_backward(a->ctx[side], &p, &(kda_conv_grads){.dy = a->t[DY].at[side], .dtail_out = a->t[DTAIL_OUT].at[side], .dx = a->t[DX].at[side],
                                                                .dweight = a->t[DWEIGHT].at[side], .dtail_in = a->t[DTAIL_IN].at[side]});
}

/* ---- gated norm ---- */

enum { NORM_X, NORM_GATE, NORM_WEIGHT, NORM_Y, NORM_DY, NORM_DX, NORM_DGATE, NORM_DWEIGHT };

static void declare_norm(around *a)
{
    const around_case *c = a->c;
    add(a, "x", elements(c), c->dtype, FWD_IN | BWD_IN, 1.0f);
    add(a, "gate", elements(c), c->dtype, FWD_IN | BWD_IN, 1.0f);
    add(a, "weight", DIM, c->dtype, FWD_IN | BWD_IN, 1.0f);
    add(a, "y", elements(c), c->dtype, FWD_OUT, 0.0f);
    add(a, "dy", elements(c), c->dtype, BWD_IN, 1.0f);
    add(a, "dx", elements(c), c->dtype, BWD_OUT, 0.0f);
    add(a, "dgate", elements(c), c->dtype, BWD_OUT, 0.0f);
    add(a, "dweight", DIM, KL_F32, BWD_OUT, 0.0f);
}

static kl_status run_norm(around *a, int side, int set)
{
    (void)set;
    kl_dtype type = side == HOST ? KL_F32 : a->c->dtype;
    kda_gated_norm_problem p = {.rows = elements(a->c) / DIM, .V = DIM, .gate_kind = KDA_OUT_SIGMOID, .eps = 1e-5f, .dtype = type, .weight_dtype = type,
                                .x = a->t[NORM_X].at[side], .gate = a->t[NORM_GATE].at[side], .weight = a->t[NORM_WEIGHT].at[side], .y = a->t[NORM_Y].at[side]};
    p.workspace_bytes = kda_gated_norm_workspace(a->ctx[side], &p, a->pass);
    KL_TRY(make_room(a, side, p.workspace_bytes));
    p.workspace = a->workspace[side];
    if (a->pass == KL_FORWARD)
        return kda_gated_norm_forward(a->ctx[side], &p);
    return kda_gated_norm_backward(a->ctx[side], &p, &(kda_gated_norm_grads){.dy = a->t[NORM_DY].at[side], .dx = a->t[NORM_DX].at[side],
                                                                            .dgate = a->t[NORM_DGATE].at[side], .dweight = a->t[NORM_DWEIGHT].at[side]});
}

/* ---- the decode step ---- */

enum { Q, KEY, VALUE, Q_WEIGHT, K_WEIGHT, V_WEIGHT, Q_TAIL, K_TAIL, V_TAIL, GATE, BETA, A_LOG, DT_BIAS, STATE, OUT_WEIGHT, Z, OUT };

static void declare_decode(around *a)
{
    const around_case *c = a->c;
    static const char *const names[] = {"q", "k", "v", "q weight", "k weight", "v weight", "q tail", "k tail", "v tail"};
    for (int i = 0; i < 3; i++)
        add(a, names[Q + i], elements(c), c->dtype, FWD_IN, 1.0f);
    for (int i = 0; i < 3; i++)
        add(a, names[Q_WEIGHT + i], width(c) * TAPS, c->dtype, FWD_IN, 0.5f);
    for (int i = 0; i < 3; i++)
        add(a, names[Q_TAIL + i], c->N * width(c) * (TAPS - 1), c->dtype, FWD_IN | FWD_OUT, 1.0f);
    add(a, "g", elements(c), c->dtype, FWD_IN, 1.0f);
    add(a, "beta", c->N * c->T * c->H, c->dtype, FWD_IN, 1.0f);
    add(a, "A_log", c->H, KL_F32, FWD_IN, 0.5f);
    add(a, "dt_bias", width(c), KL_F32, FWD_IN, 0.5f);
    add(a, "state", a->sets * c->N * width(c) * DIM, KL_F32, FWD_IN | FWD_OUT, 0.3f);
    add(a, "norm weight", DIM, c->dtype, FWD_IN, 1.0f);
    add(a, "z", elements(c), c->dtype, FWD_IN, 1.0f);
    add(a, "y", elements(c), c->dtype, FWD_OUT, 0.0f);
}

static kl_status run_decode(around *a, int side, int set)
{
    const around_case *c = a->c;
    kl_dtype type = side == HOST ? KL_F32 : c->dtype;
    float *state = (float *)a->t[STATE].at[side] + set * c->N * width(c) * DIM;
    kda_decode_problem p = {
        .kda = {.B = c->N, .T = c->T, .N = c->N, .H = c->H, .HV = c->H, .K = DIM, .V = DIM, .G = DIM, .dtype = type, .state_layout = c->layout,
                .gate = KDA_GATE_SOFTPLUS, .beta_kind = KDA_BETA_SIGMOID, .qk_l2norm = true, .q = a->t[Q].at[side], .k = a->t[KEY].at[side],
                .v = a->t[VALUE].at[side], .g = a->t[GATE].at[side], .beta = a->t[BETA].at[side], .A_log = a->t[A_LOG].at[side],
                .dt_bias = a->t[DT_BIAS].at[side], .h0 = state, .ht = state, .state_pool = c->N},
        .W = TAPS, .weight_dtype = type, .tail_dtype = type, .eps = 1e-5f, .norm_weight_dtype = type, .norm_weight = a->t[OUT_WEIGHT].at[side],
        .z = a->t[Z].at[side], .y = a->t[OUT].at[side]};
    for (int i = 0; i < 3; i++) {
        p.weight[i] = a->t[Q_WEIGHT + i].at[side];
        p.tail[i] = a->t[Q_TAIL + i].at[side];
    }
    size_t bytes = kda_decode_workspace(a->ctx[side], &p);
    KL_TRY(make_room(a, side, bytes));
    return kda_decode(a->ctx[side], &p, a->workspace[side], bytes);
}

/* ---- running ---- */

static const struct { const char *name; void (*declare)(around *a); kl_status (*run)(around *a, int side, int set); kl_pass last; } operations[] = {
    {"conv", declare_conv, run_conv, KL_BACKWARD},
    {"gated_norm", declare_norm, run_norm, KL_BACKWARD},
    {"decode_layer", declare_decode, run_decode, KL_FORWARD},
};

static int reads(kl_pass pass) { return pass == KL_BACKWARD ? BWD_IN : FWD_IN; }
static int writes(kl_pass pass) { return pass == KL_BACKWARD ? BWD_OUT : FWD_OUT; }

static void finish(around *a)
{
    for (int i = 0; i < a->count; i++) {
        free(a->t[i].at[HOST]);
        if (a->t[i].at[DEVICE])
            kl_gpu_free(a->ctx[DEVICE], a->t[i].at[DEVICE]);
    }
    free(a->workspace[HOST]);
    if (a->workspace[DEVICE])
        kl_gpu_free(a->ctx[DEVICE], a->workspace[DEVICE]);
    kl_ctx_destroy(a->ctx[HOST]);
}

/* Random numbers, rounded to what the device holds; outputs are NaN, or zero where they accumulate. */
static kl_status fill_both(around *a, tensor *t, kl_rng *r)
{
    size_t bytes = (size_t)t->count * kl_dtype_size(t->dtype);
    float *host = t->at[HOST] = malloc((size_t)t->count * sizeof *host);
    void *rounded = malloc(bytes);
    kl_status s = host && rounded ? kl_gpu_alloc(a->ctx[DEVICE], &t->at[DEVICE], bytes) : kl_error(KL_ENOMEM, "verify: out of memory");
    if (!kl_failed(s)) {
        bool summed = strcmp(t->name, "dweight") == 0;
        memset(host, summed ? 0 : 0xff, (size_t)t->count * sizeof *host);
        if (t->scale > 0.0f)
            kl_fill_normal(r, host, (size_t)t->count, 0.0f, t->scale);
        kl_from_f32(rounded, t->dtype, host, (size_t)t->count);
        kl_to_f32(host, rounded, t->dtype, (size_t)t->count);
        s = kl_gpu_copy(a->ctx[DEVICE], t->at[DEVICE], rounded, bytes);
    }
    free(rounded);
    return s;
}

static kl_status open_both(around *a)
{
    kl_rng r = kl_rng_make(1, (uint64_t)a->c->operation);
    operations[a->c->operation].declare(a);
    KL_TRY(kl_ctx_create(&a->ctx[HOST], NULL));
    for (int i = 0; i < a->count; i++)
        KL_TRY(fill_both(a, &a->t[i], &r));
    return kl_ok();
}

static kl_status score(const around *a, const tensor *t, double *err)
{
    size_t count = (size_t)t->count, bytes = count * kl_dtype_size(t->dtype);
    void *raw = malloc(bytes);
    float *got = malloc(count * sizeof *got);
    kl_status s = raw && got ? kl_gpu_copy(a->ctx[DEVICE], raw, t->at[DEVICE], bytes) : kl_error(KL_ENOMEM, "verify: out of memory");
    if (!kl_failed(s)) {
        kl_to_f32(got, raw, t->dtype, count);
        *err = kl_rel_err_f32(got, t->at[HOST], count);
    }
    free(raw);
    free(got);
    return s;
}

/* Runs a pass on both sides; each(user, a, tensor, error, limit) for what it wrote. */
typedef void (*each_fn)(void *user, const around *a, const tensor *t, double err, double limit);
static kl_status compare(around *a, kl_pass pass, each_fn each, void *user)
{
    const kl_tolerance *limit = a->c->dtype == KL_BF16 ? &kl_tol_kda_bf16 : &kl_tol_kda_f32;
    a->pass = pass;
    for (int side = HOST; side <= DEVICE; side++)
        KL_TRY(operations[a->c->operation].run(a, side, 0));
    for (int i = 0; i < a->count; i++) {
        double err;
        if (!(a->t[i].use & writes(pass)))
            continue;
        KL_TRY(score(a, &a->t[i], &err));
        each(user, a, &a->t[i], err, pass == KL_BACKWARD ? limit->gradient : limit->forward);
    }
    return kl_ok();
}

static kl_status compare_all(kl_ctx *ctx, const around_case *c, kl_pass first, kl_pass last, each_fn each, void *user)
{
    around a = {.c = c, .ctx = {NULL, ctx}, .sets = 1};
    kl_status s = open_both(&a);
    for (kl_pass pass = first; !kl_failed(s) && pass <= last; pass++)
        s = compare(&a, pass, each, user);
    finish(&a);
    return s;
}

/* ---- verify ---- */

static void show(void *user, const around *a, const tensor *t, double err, double limit)
{
    char subject[96];
    const around_case *c = a->c;
    snprintf(subject, sizeof subject, "%s N%lld T%lld H%lld %s%s", operations[c->operation].name, (long long)c->N, (long long)c->T, (long long)c->H,
             c->dtype == KL_BF16 ? "bf16" : "f32", c->layout == KDA_STATE_VK ? " value-first" : "");
    kl_verify_row(user, &(kl_check){subject, "cuda", t->name, err, NAN, limit, NULL});
}

kl_status kl_verify_around(kl_verifier *v)
{
    for (operation o = CONV; o <= DECODE; o++)
        for (int i = 0; i < 4; i++) {
            around_case c = {.operation = o, .dtype = i & 1 ? KL_F32 : KL_BF16, .N = 3, .T = o == DECODE ? 1 + i / 2 : 1 + 70 * (i / 2), .H = 2,
                             .layout = o == DECODE && i >= 2 ? KDA_STATE_VK : KDA_STATE_KV};
            KL_TRY(compare_all(v->ctx, &c, KL_FORWARD, operations[o].last, show, v));
        }
    return kl_ok();
}

/* ---- bench ---- */

static void worst(void *user, const around *a, const tensor *t, double err, double limit)
{
    (void)a, (void)t;
    kl_bench_row *row = user;
    if (row->err_limit == 0.0 || !(err <= row->err)) {
        row->err = err;
        row->err_limit = limit;
    }
}

static kl_status launch(void *user, int set)
{
    around *a = user;
    return operations[a->c->operation].run(a, DEVICE, set);
}

static kl_status open_device(around *a)
{
    operations[a->c->operation].declare(a);
    for (int i = 0; i < a->count; i++) {
        tensor *t = &a->t[i];
        size_t bytes = (size_t)t->count * kl_dtype_size(t->dtype);
        KL_TRY(kl_gpu_alloc(a->ctx[DEVICE], &t->at[DEVICE], bytes));
        KL_TRY(t->scale > 0.0f ? kl_device_normal(a->ctx[DEVICE], t->at[DEVICE], t->dtype, t->count, t->scale, (uint64_t)i + 1)
                               : kl_gpu_fill(a->ctx[DEVICE], t->at[DEVICE], 0, bytes));
    }
    return kl_ok();
}

static kl_status bench_pass(kl_bench *b, around *a, kl_pass pass)
{
    const around_case *c = a->c;
    kl_shape shape = {.N = c->operation == DECODE ? c->N : 0, .T = c->T, .H = c->H, .HV = c->H, .K = DIM, .V = DIM, .G = DIM, .value_first = c->layout == KDA_STATE_VK};
    kl_device_times times;
    kl_bench_row row = {.family = "kda", .variant = operations[c->operation].name, .shape = &shape, .device = &times, .memory_gbps = b->ceilings.copy_gbps,
                        .memory_name = "copy", .pass = c->operation == DECODE ? KL_BENCH_DECODE : pass == KL_BACKWARD ? KL_BENCH_BWD : KL_BENCH_FWD};
    around_case small = *c;
    small.N = c->N < 3 ? c->N : 3;
    small.T = c->T < 128 ? c->T : 128;
    small.H = 2;
    row.err_T = small.T;
    KL_TRY(compare_all(b->ctx, &small, pass, pass, worst, &row));
    a->pass = pass;
    KL_TRY(launch(a, 0)); /* makes its workspace before anything is recorded */
    KL_TRY(kl_bench_time_device(b, launch, a, a->sets, &times));
    row.seconds = times.graph.runs ? times.graph : times.pipelined;
    for (int i = 0; i < a->count; i++) {
        double bytes = (double)a->t[i].count * (double)kl_dtype_size(a->t[i].dtype) / (i == STATE && c->operation == DECODE ? a->sets : 1);
        row.cost.bytes += bytes * (((a->t[i].use & reads(pass)) != 0) + ((a->t[i].use & writes(pass)) != 0));
        row.peak_bytes += (size_t)a->t[i].count * kl_dtype_size(a->t[i].dtype);
    }
    row.workspace_bytes = a->workspace_bytes[DEVICE];
    return kl_bench_emit(b, &row);
}

kl_status kl_bench_around(kl_bench *b)
{
    const around_case cases[] = {{CONV, KL_BF16, 1, 8192, 96, KDA_STATE_KV}, {NORM, KL_BF16, 1, 8192, 32, KDA_STATE_KV}, {DECODE, KL_BF16, 8, 1, 32, KDA_STATE_KV},
                                 {DECODE, KL_BF16, 32, 1, 32, KDA_STATE_KV}, {DECODE, KL_BF16, 128, 1, 32, KDA_STATE_KV}, {DECODE, KL_BF16, 8, 1, 32, KDA_STATE_VK},
                                 {DECODE, KL_BF16, 32, 1, 32, KDA_STATE_VK}, {DECODE, KL_BF16, 128, 1, 32, KDA_STATE_VK}};
    enum { COLD_BYTES = 192 << 20 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        around_case c = cases[i];
        if (kl_gpu_emulated()) {
            c.N = c.N < 2 ? c.N : 2;
            c.T = c.T < 64 ? c.T : 64;
            c.H = 2;
        }
        int64_t state = c.N * width(&c) * DIM * (int64_t)sizeof(float);
        around a = {.c = &c, .ctx = {NULL, b->ctx}, .sets = c.operation == DECODE && !kl_gpu_emulated() ? (int)((COLD_BYTES + state - 1) / state) : 1};
        kl_status s = open_device(&a);
        for (kl_pass pass = KL_FORWARD; !kl_failed(s) && pass <= operations[c.operation].last; pass++)
            s = bench_pass(b, &a, pass);
        finish(&a);
        KL_TRY(s);
    }
    return kl_ok();
}
