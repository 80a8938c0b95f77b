/* The layers' operations at the released model's sizes. Errors are of the same operation with few tokens, few words or few
 * parameters, where the reference can follow. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "common/rng.h"
#include "harness/bench.h"
#include "harness/device_inputs.h"
#include "harness/layers_case.h"

enum { MOST_SETS = 16, COLD_BYTES = 192 << 20 };

typedef struct workload {
    kl_bench *b;
    const kl_variant *variant;
    kl_pass pass;
    layers_spec spec;
    int sets;
    layers_case set[MOST_SETS];
    void *workspace;
    size_t workspace_bytes;
} workload;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t or_else(int64_t given, int64_t otherwise) { return given ? given : otherwise; }

/* ---- what is timed ---- */

/* The operation at that shape, activations and weights in the device's types. */
static layers_spec spec_of(layers_op op, const kl_shape *s, kl_device device)
{
    bool cuda = device == KL_CUDA;
    kl_dtype type = cuda ? KL_BF16 : KL_F32;
    layers_spec spec = {.p = {.op = op}, .backward = layers_has_backward(op), .seed = 1};
    layers_problem *p = &spec.p;
    switch (op) {
    case LAYERS_RMSNORM:
        p->rmsnorm = (layers_rmsnorm){.T = s->T, .D = s->D, .eps = 1e-5f, .x_dtype = type, .y_dtype = type, .weight_dtype = type, .add = LAYERS_WANTED, .sum = LAYERS_WANTED};
        spec.g.rmsnorm = (layers_rmsnorm_grads){.dsum = LAYERS_WANTED, .dx = LAYERS_WANTED, .dweight = LAYERS_WANTED};
        break;
    case LAYERS_EMBED: p->embed = (layers_embed){.T = s->T, .D = s->D, .vocab = s->V, .dtype = type, .weight_dtype = type}; break;
    case LAYERS_SWIGLU: p->swiglu = (layers_swiglu){.T = s->T, .I = s->I, .dtype = type, .in_stride = 2 * s->I, .y = LAYERS_WANTED}; break;
    case LAYERS_LINEAR:
        p->linear = (layers_linear){.T = s->T, .N = s->N, .K = s->K, .x_dtype = type, .y_dtype = type, .weight_dtype = type};
        spec.g.linear = (layers_linear_grads){.dx = LAYERS_WANTED, .dweight = LAYERS_WANTED};
        break;
    case LAYERS_MLP:
        p->mlp = (layers_mlp){.T = s->T, .D = s->D, .I = s->I, .dtype = type, .weight_dtype = type};
        spec.g.mlp = (layers_mlp_grads){.dx = LAYERS_WANTED, .dgate_up = LAYERS_WANTED, .ddown = LAYERS_WANTED};
        break;
    case LAYERS_HEAD_LOSS:
        p->head_loss = (layers_head_loss){.T = s->T, .D = s->D, .vocab = s->V, .x_dtype = type, .weight_dtype = type, .grad_scale = 1.0f / (float)(s->T ? s->T : 1), .sum = LAYERS_WANTED};
        spec.g.head_loss = (layers_head_loss_grads){.dx = LAYERS_WANTED, .dweight = LAYERS_WANTED};
        break;
    case LAYERS_ADAMW:
        p->adamw = (layers_adamw){.n = s->N, .step = 10, .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .clip = 1.0, .g_dtype = KL_F32,
                                  .sumsq = LAYERS_WANTED, .copy = cuda ? LAYERS_WANTED : NULL};
        break;
    case LAYERS_MUON:
        p->muon = (layers_muon){.rows = s->N, .columns = s->K, .count = s->B, .lr = 1e-3, .momentum = 0.95, .decay = 0.1, .clip = 1.0, .g_dtype = KL_F32, .sumsq = LAYERS_WANTED,
                                .copy = LAYERS_WANTED};
        break;
    default: p->sumsq = (layers_sumsq){.n = s->N, .dtype = KL_F32}; break;
    }
    return spec;
}

/* The same, small enough for the reference. */
static kl_shape small(layers_op op, const kl_shape *s)
{
    kl_shape t = *s;
    t.T = least(s->T, 48);
    t.B = least(s->B, 2);
    t.V = least(s->V, 1000);
    t.I = least(s->I, op == LAYERS_MLP ? 256 : 1024);
    t.N = least(s->N, op == LAYERS_MUON ? 96 : op == LAYERS_LINEAR ? 256 : 100000);
    t.K = least(s->K, op == LAYERS_MUON ? 160 : s->K);
    return t;
}

static kl_status score(workload *w, const kl_shape *s, kl_bench_row *row)
{
    kl_shape shape = small(w->spec.p.op, s);
    layers_spec spec = spec_of(w->spec.p.op, &shape, w->b->ctx->device);
    layers_case c;
    KL_TRY(layers_case_create(&c, w->b->ctx, &spec));
    kl_status status = layers_case_solve(&c, KL_FORWARD);
    if (!kl_failed(status) && w->pass == KL_BACKWARD)
        status = layers_case_solve(&c, KL_BACKWARD);
    if (!kl_failed(status))
        status = layers_case_run(&c, w->variant, w->pass);
    row->err = layers_case_worst(&c, w->pass, NULL);
    row->err_limit = w->pass == KL_BACKWARD ? layers_case_tolerance(&c)->gradient : layers_case_tolerance(&c)->forward;
    row->err_T = shape.T;
    layers_case_free(&c);
    return status;
}

/* ---- memory ---- */

static kl_status fill_indices(const layers_case *c, const layers_case_tensor *t, uint64_t seed)
{
    int64_t vocab = c->p.op == LAYERS_EMBED ? c->p.embed.vocab : c->p.head_loss.vocab;
    int32_t *ids = malloc(t->bytes + 1);
    if (!ids)
        return kl_error(KL_ENOMEM, "bench: out of memory");
    kl_rng r = kl_rng_make(seed, 9);
    for (int64_t i = 0; i < t->is.columns; i++)
        ids[i] = (int32_t)kl_rng_below(&r, (uint64_t)vocab);
    kl_status s = kl_ok();
    if (c->ctx->device == KL_CUDA)
        s = kl_gpu_copy(c->ctx, t->memory, ids, t->bytes);
    else
        memcpy(t->memory, ids, t->bytes);
    free(ids);
    return s;
}

static kl_status fill_tensor(const layers_case *c, const layers_case_tensor *t, uint64_t seed)
{
    bool cuda = c->ctx->device == KL_CUDA, nothing = t->is.dtype == KL_F64 || strcmp(t->is.name, "v") == 0;
    if (t->is.dtype == KL_I32)
        return fill_indices(c, t, seed);
    float stddev = strcmp(t->is.name, "weight") == 0 || c->p.op == LAYERS_MLP ? 2.0f / sqrtf((float)t->is.columns) : 1.0f;
    if (nothing && cuda)
        return kl_gpu_fill(c->ctx, t->memory, 0, t->bytes);
    if (cuda)
        return kl_device_normal(c->ctx, t->memory, t->is.dtype, (int64_t)(t->bytes / kl_dtype_size(t->is.dtype)), stddev, seed);
    kl_rng r = kl_rng_make(seed, 1);
    memset(t->memory, 0, t->bytes);
    if (!nothing)
        kl_fill_normal(&r, t->memory, t->bytes / sizeof(float), 0.0f, stddev);
    return kl_ok();
}

static kl_status make_set(workload *w, int i, size_t *bytes)
{
    layers_spec spec = w->spec;
    layers_case *c = &w->set[i];
    spec.blank = true;
    KL_TRY(layers_case_create(c, w->b->ctx, &spec));
    w->sets = i + 1;
    for (int j = 0; j < c->count; j++) {
        *bytes += c->tensor[j].bytes;
        if (c->tensor[j].there)
            KL_TRY(fill_tensor(c, &c->tensor[j], (uint64_t)(100 * i + j + 1)));
    }
    return kl_ok();
}

/* As many as together are larger than any cache. */
static kl_status make_sets(workload *w)
{
    size_t bytes = 0;
    int most = w->b->ctx->device == KL_CPU ? 1 : kl_gpu_emulated() ? 2 : MOST_SETS;
    for (int i = 0; i < most && bytes < COLD_BYTES; i++)
        KL_TRY(make_set(w, i, &bytes));
    w->workspace_bytes = w->variant->workspace(w->b->ctx, &w->set[0].p, w->pass);
    if (w->b->ctx->device == KL_CUDA)
        return kl_gpu_alloc(w->b->ctx, &w->workspace, w->workspace_bytes);
    w->workspace = aligned_alloc(64, (w->workspace_bytes + 64) / 64 * 64);
    return w->workspace ? kl_ok() : kl_error(KL_ENOMEM, "bench: out of memory");
}

static void finish(workload *w)
{
    for (int i = 0; i < w->sets; i++)
        layers_case_free(&w->set[i]);
    if (w->workspace && w->b->ctx->device == KL_CUDA)
        kl_gpu_free(w->b->ctx, w->workspace);
    else
        free(w->workspace);
}

/* ---- timing ---- */

static kl_status launch(void *user, int set)
{
    workload *w = user;
    layers_case *c = &w->set[set];
    if (w->pass == KL_FORWARD)
        return w->variant->forward(c->ctx, &c->p, w->workspace, w->workspace_bytes);
    return w->variant->backward(c->ctx, &c->p, &c->g, w->workspace, w->workspace_bytes);
}
static kl_status call(void *user) { return launch(user, 0); }

static kl_status measure(workload *w, const kl_shape *s)
{
    bool cuda = w->b->ctx->device == KL_CUDA;
    kl_device_times times;
    kl_bench_row row = {.family = "layers", .variant = w->variant->name, .gate = cuda ? "" : NULL, .shape = s, .memory_gbps = w->b->ceilings.copy_gbps, .memory_name = "copy",
                        .pass = w->pass == KL_BACKWARD ? KL_BENCH_BWD : KL_BENCH_FWD, .cost = w->variant->cost(&w->spec.p, w->pass)};
    KL_TRY(make_sets(w));
    row.workspace_bytes = w->workspace_bytes;
    if (cuda) {
        KL_TRY(kl_bench_time_device(w->b, launch, w, w->sets, &times));
        row.device = &times;
        row.seconds = times.graph.runs ? times.graph : times.pipelined;
    } else {
        KL_TRY(kl_bench_time(w->b, call, w, &row.seconds));
    }
    KL_TRY(score(w, s, &row));
    return kl_bench_emit(w->b, &row);
}

/* The sizes that an operation has, and no others. */
static kl_shape sizes_of(layers_op op, const kl_shape *s)
{
    bool stacked = s->N == 0;
    int64_t D = s->D;
    switch (op) {
    case LAYERS_RMSNORM: return (kl_shape){.T = s->T, .D = D};
    case LAYERS_EMBED: case LAYERS_HEAD_LOSS: return (kl_shape){.T = s->T, .D = D, .V = s->V};
    case LAYERS_SWIGLU: return (kl_shape){.T = s->T, .I = s->I};
    case LAYERS_MLP: return (kl_shape){.T = s->T, .D = D, .I = s->I};
    case LAYERS_LINEAR: return (kl_shape){.T = s->T, .N = stacked ? 3 * 4096 + 2 * 128 + 32 : s->N, .K = or_else(s->K, D)};
    case LAYERS_MUON: return (kl_shape){.B = s->B, .N = or_else(s->K, D), .K = stacked ? 4096 : s->N};
    default: return (kl_shape){.N = or_else(s->C, D * D * 12)};
    }
}

static kl_status bench_op(kl_bench *b, layers_op op, const kl_shape *shape)
{
    const kl_variant *variant = layers_pick(b->ctx->device, op);
    if (!variant || (b->variant && strcmp(b->variant, variant->name) != 0))
        return kl_ok();
    for (kl_pass pass = KL_FORWARD; pass <= (layers_has_backward(op) ? KL_BACKWARD : KL_FORWARD); pass++) {
        if (!b->pass[pass == KL_BACKWARD ? KL_BENCH_BWD : KL_BENCH_FWD])
            continue;
        kl_shape s = sizes_of(op, shape);
        workload *w = calloc(1, sizeof *w);
        if (!w)
            return kl_error(KL_ENOMEM, "bench: out of memory");
        w->b = b, w->variant = variant, w->pass = pass, w->spec = spec_of(op, &s, b->ctx->device);
        kl_status status = measure(w, &s);
        finish(w);
        free(w);
        KL_TRY(status);
    }
    return kl_ok();
}

/* The released model's sizes, and on a processor some that it gets through. */
kl_shape kl_bench_layers_shape(kl_device device)
{
    return device == KL_CUDA ? (kl_shape){.T = 8192, .D = 2304, .V = 163840, .I = 1024} : (kl_shape){.T = 512, .D = 768, .V = 8192, .I = 1024};
}

kl_status kl_bench_layers(kl_bench *b, const kl_shape *shapes, int count)
{
    for (int i = 0; i < count; i++)
        for (layers_op op = 0; op < LAYERS_OPS; op++)
            KL_TRY(bench_op(b, op, &shapes[i]));
    return kl_ok();
}
