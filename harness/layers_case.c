#include "harness/layers_case.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "common/rng.h"

double layers_rounded(double x, kl_dtype type)
{
    return type == KL_BF16 ? (double)kl_bf16_to_f32(kl_f32_to_bf16((float)x)) : type == KL_F32 ? (double)(float)x : x;
}

static double element(const void *x, kl_dtype type, int64_t i)
{
    switch (type) {
    case KL_BF16: return kl_bf16_to_f32(((const uint16_t *)x)[i]);
    case KL_F64: return ((const double *)x)[i];
    case KL_I32: return ((const int32_t *)x)[i];
    default: return ((const float *)x)[i];
    }
}

static void set_element(void *x, kl_dtype type, int64_t i, double value)
{
    switch (type) {
    case KL_BF16: ((uint16_t *)x)[i] = kl_f32_to_bf16((float)value); break;
    case KL_F64: ((double *)x)[i] = value; break;
    case KL_I32: ((int32_t *)x)[i] = (int32_t)value; break;
    default: ((float *)x)[i] = (float)value; break;
    }
}

static int64_t count_of(const layers_case_tensor *t) { return t->is.rows * t->is.columns; }
static bool named(const layers_case_tensor *t, const char *name) { return strcmp(t->is.name, name) == 0; }

bool layers_case_writes(const layers_case_tensor *t, kl_pass pass)
{
    bool written = t->is.role != LAYERS_INPUT && pass >= t->is.first && pass <= t->is.last;
    return t->there && written && !(pass == KL_BACKWARD && (named(t, "hidden") || (named(t, "sum") && t->is.dtype != KL_F64)));
}

/* ---- numbers ---- */

/* Ids come in crowds and once; some targets are left out. */
static double draw_index(kl_rng *r, const layers_problem *p, const layers_case_tensor *t)
{
    int64_t vocab = p->op == LAYERS_EMBED ? p->embed.vocab : p->head_loss.vocab;
    uint64_t kind = kl_rng_below(r, 8);
    if (named(t, "targets") && kind == 0)
        return -1.0;
    return (double)kl_rng_below(r, kind < 4 ? (uint64_t)(vocab < 3 ? vocab : 3) : (uint64_t)vocab);
}

static double draw(kl_rng *r, const layers_problem *p, const layers_case_tensor *t)
{
    if (t->is.dtype == KL_I32)
        return draw_index(r, p, t);
    if (named(t, "sumsq"))
        return 4.0;
    double x = kl_rng_normal(r);
    if (named(t, "v"))
        return x * x;
    if (p->op == LAYERS_RMSNORM && named(t, "weight"))
        return 1.0 + 0.2 * x;
    if (p->op == LAYERS_MUON && named(t, "w"))
        return 0.02 * x;
    return (named(t, "weight") && p->op != LAYERS_EMBED) || named(t, "gate_up") || named(t, "down") ? x * 2.0 / sqrt((double)t->is.columns) : x;
}

static void fill(layers_case *c, uint64_t seed)
{
    for (int i = 0; i < c->count; i++) {
        layers_case_tensor *t = &c->tensor[i];
        kl_rng r = kl_rng_make(seed, (uint64_t)i);
        bool read = t->is.role == LAYERS_INPUT || t->is.role == LAYERS_UPDATED || t->is.accumulates;
        for (int64_t j = 0; t->there && j < count_of(t); j++)
            t->given[j] = read ? layers_rounded(draw(&r, &c->p, t), t->is.dtype) : 0.0;
    }
}

/* ---- memory ---- */

static bool on_device(const layers_case *c) { return c->ctx->device == KL_CUDA; }

static kl_status take(const layers_case *c, void **memory, size_t bytes)
{
    if (on_device(c))
        return kl_gpu_alloc(c->ctx, memory, bytes);
    *memory = aligned_alloc(64, (bytes + 64) / 64 * 64);
    return *memory ? kl_ok() : kl_error(KL_ENOMEM, "%s: out of memory for %zu bytes", c->name, bytes);
}

static void give(const layers_case *c, void *memory)
{
    if (!on_device(c))
        free(memory);
    else if (memory)
        kl_gpu_free(c->ctx, memory);
}

static kl_status place(layers_case *c, layers_case_tensor *t, bool blank)
{
    const layers_tensor *is = &t->is;
    size_t n = (size_t)count_of(t);
    t->there = !is->optional || *(void **)is->field;
    if (!t->there)
        return kl_ok();
    int64_t reach = is->rows ? (is->rows - 1) * is->stride + is->columns : 0;
    t->bytes = (size_t)reach * kl_dtype_size(is->dtype);
    KL_TRY(take(c, &t->memory, t->bytes));
    memcpy(is->field, &t->memory, sizeof t->memory);
    if (blank)
        return kl_ok();
    t->given = calloc(n + 1, sizeof *t->given);
    t->want = calloc(n + 1, sizeof *t->want);
    t->out = calloc(n + 1, sizeof *t->out);
    return t->given && t->want && t->out ? kl_ok() : kl_error(KL_ENOMEM, "%s: out of memory", c->name);
}

kl_status layers_case_create(layers_case *c, kl_ctx *ctx, const layers_spec *spec)
{
    *c = (layers_case){.ctx = ctx, .p = spec->p, .g = spec->g, .backward = spec->backward};
    layers_tensor list[LAYERS_TENSORS];
    c->count = layers_tensors(&c->p, spec->backward ? &c->g : NULL, list);
    snprintf(c->name, sizeof c->name, "%s", layers_name(c->p.op));
    kl_status s = kl_ok();
    for (int i = 0; i < c->count && !kl_failed(s); i++) {
        c->tensor[i].is = list[i];
        s = place(c, &c->tensor[i], spec->blank);
    }
    if (kl_failed(s))
        layers_case_free(c);
    else if (!spec->blank)
        fill(c, spec->seed);
    return s;
}

void layers_case_free(layers_case *c)
{
    for (int i = 0; i < c->count; i++) {
        layers_case_tensor *t = &c->tensor[i];
        free(t->given);
        free(t->want);
        free(t->out);
        give(c, t->memory);
    }
    give(c, c->workspace);
    *c = (layers_case){0};
}

/* ---- running ---- */

static kl_status copy(const layers_case *c, void *dst, const void *src, size_t bytes)
{
    if (on_device(c))
        return kl_gpu_copy(c->ctx, dst, src, bytes);
    memcpy(dst, src, bytes);
    return kl_ok();
}

/* The bytes of a tensor before the pass: what lies between its rows, and what it will write, is NaN. */
static unsigned char *image_of(const layers_case_tensor *t, kl_pass pass)
{
    unsigned char *image = malloc(t->bytes + 1);
    bool blank = layers_case_writes(t, pass) && t->is.role != LAYERS_UPDATED && !t->is.accumulates;
    if (!image)
        return NULL;
    memset(image, 0xff, t->bytes);
    for (int64_t r = 0; !blank && r < t->is.rows; r++)
        for (int64_t i = 0; i < t->is.columns; i++)
            set_element(image, t->is.dtype, r * t->is.stride + i, t->given[r * t->is.columns + i]);
    return image;
}

static kl_status send(const layers_case *c, const layers_case_tensor *t, kl_pass pass)
{
    unsigned char *image = image_of(t, pass);
    kl_status s = image ? copy(c, t->memory, image, t->bytes) : kl_error(KL_ENOMEM, "%s: out of memory", c->name);
    free(image);
    return s;
}

static kl_status fetch(const layers_case *c, layers_case_tensor *t, kl_pass pass)
{
    unsigned char *before = image_of(t, pass), *after = malloc(t->bytes + 1);
    kl_status s = before && after ? copy(c, after, t->memory, t->bytes) : kl_error(KL_ENOMEM, "%s: out of memory", c->name);
    bool written = layers_case_writes(t, pass);
    size_t size = kl_dtype_size(t->is.dtype);
    for (int64_t r = 0; !kl_failed(s) && written && r < t->is.rows; r++) {
        for (int64_t i = 0; i < t->is.columns; i++)
            t->out[r * t->is.columns + i] = (float)element(after, t->is.dtype, r * t->is.stride + i);
        memcpy(after + (size_t)(r * t->is.stride) * size, before + (size_t)(r * t->is.stride) * size, (size_t)t->is.columns * size);
    }
    if (!kl_failed(s) && memcmp(before, after, t->bytes) != 0)
        s = kl_error(KL_EINVAL, written ? "%s: %s: was written between its rows" : "%s: %s: was written", c->name, t->is.name);
    free(before);
    free(after);
    return s;
}

static kl_status reserve(layers_case *c, const kl_variant *v, kl_pass pass)
{
    size_t need = v->workspace(c->ctx, &c->p, pass);
    give(c, c->workspace);
    c->workspace = NULL;
    KL_TRY(take(c, &c->workspace, need));
    c->workspace_bytes = need;
    if (on_device(c))
        return kl_gpu_fill(c->ctx, c->workspace, 0xff, need);
    memset(c->workspace, 0xff, need);
    return kl_ok();
}

kl_status layers_case_run(layers_case *c, const kl_variant *v, kl_pass pass)
{
    for (int i = 0; i < c->count; i++)
        if (c->tensor[i].there)
            KL_TRY(send(c, &c->tensor[i], pass));
    KL_TRY(reserve(c, v, pass));
    KL_TRY(pass == KL_FORWARD ? v->forward(c->ctx, &c->p, c->workspace, c->workspace_bytes)
                              : v->backward(c->ctx, &c->p, &c->g, c->workspace, c->workspace_bytes));
    if (on_device(c))
        KL_TRY(kl_gpu_sync(c->ctx));
    for (int i = 0; i < c->count; i++)
        if (c->tensor[i].there)
            KL_TRY(fetch(c, &c->tensor[i], pass));
    return kl_ok();
}

/* ---- scoring ---- */

double layers_case_error(const layers_case_tensor *t) { return kl_rel_err(t->out, t->want, (size_t)count_of(t)); }

double layers_case_worst(const layers_case *c, kl_pass pass, const char **tensor)
{
    double worst = 0.0;
    if (tensor)
        *tensor = "";
    for (int i = 0; i < c->count; i++) {
        if (!layers_case_writes(&c->tensor[i], pass))
            continue;
        double err = layers_case_error(&c->tensor[i]);
        if (!(err <= worst)) {
            worst = err;
            if (tensor)
                *tensor = c->tensor[i].is.name;
        }
        if (isnan(worst))
            break;
    }
    return worst;
}

const kl_tolerance *layers_case_tolerance(const layers_case *c)
{
    bool products = c->p.op == LAYERS_LINEAR || c->p.op == LAYERS_HEAD_LOSS;
    if (c->p.op == LAYERS_MLP)
        return &kl_tol_moe_bf16;
    if (c->p.op == LAYERS_MUON)
        return &kl_tol_muon;
    if (products && on_device(c))
        return &kl_tol_layers_bf16;
    for (int i = 0; i < c->count; i++)
        if (c->tensor[i].there && c->tensor[i].is.dtype == KL_BF16 && c->tensor[i].is.role != LAYERS_INPUT)
            return &kl_tol_layers_bf16;
    return &kl_tol_layers_f32;
}
