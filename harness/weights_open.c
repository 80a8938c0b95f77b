/* Mapping a checkpoint: each parameter is found under its released name, under the transformers-native one, or inside a
 * fused tensor, and must have the shape that the configuration says. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness/weights.h"
#include "harness/weights_list.h"

typedef struct {
    const kl_config *c;
    kl_weights *w;
    const kl_tensors *t;
    bool *used;             /* beside the tensors of t */
    size_t owned_used;      /* floats converted into w->owned so far */
    int expert_layer;       /* layer of expert_dtype */
    kl_dtype expert_dtype;  /* all experts of one layer share it */
} opening;

/* Where a parameter may lie: all of a tensor, or its elements from offset on. */
typedef struct {
    char name[128];
    int ndim;
    int64_t shape[4];
    int64_t offset;
} candidate;

static int find_index(const kl_tensors *t, const char *name)
{
    int low = 0, high = kl_tensors_size(t) - 1;
    while (low <= high) {
        int middle = low + (high - low) / 2, order = strcmp(name, kl_tensors_at(t, middle)->name);
        if (order == 0)
            return middle;
        if (order < 0)
            high = middle - 1;
        else
            low = middle + 1;
    }
    return -1;
}

static const char *print_shape(int ndim, const int64_t *shape, char text[128])
{
    size_t at = (size_t)snprintf(text, 128, "[");
    for (int i = 0; i < ndim && at < 100; i++)
        at += (size_t)snprintf(text + at, 128 - at, "%s%lld", i ? "," : "", (long long)shape[i]);
    snprintf(text + at, 128 - at, "]");
    return text;
}

/* ---- the names beside the released one ---- */

static bool starts(const char *text, const char *prefix) { return strncmp(text, prefix, strlen(prefix)) == 0; }

static void whole(candidate *k, const kl_param_info *info, const char *prefix, const char *part)
{
    snprintf(k->name, sizeof k->name, "model.layers.%d.%s%s", info->layer, prefix, part);
    k->ndim = info->ndim;
    memcpy(k->shape, info->shape, sizeof k->shape);
    k->offset = 0;
}

/* Part `piece` of the convolutions stacked as q | k | v. */
static void fused_convolution(candidate *k, const kl_param_info *info, int piece)
{
    whole(k, info, "self_attn.", "conv1d.weight");
    k->shape[0] *= 3;
    k->offset = piece * info->rows * info->columns;
}

/* Expert e of gate_up_proj [E,2 I,D] (gate rows first) or of down_proj [E,D,I]. */
static void fused_expert(candidate *k, const kl_config *c, const kl_param_info *info, const char *block, const char *part)
{
    bool down = starts(part, "w2.");
    int64_t size = info->rows * info->columns;
    snprintf(k->name, sizeof k->name, "model.layers.%d.%s.experts.%s", info->layer, block, down ? "down_proj" : "gate_up_proj");
    k->ndim = 3;
    k->shape[0] = c->num_experts;
    k->shape[1] = down ? info->rows : 2 * info->rows;
    k->shape[2] = info->columns;
    k->offset = down ? info->expert * size : (2 * info->expert + starts(part, "w3.")) * size;
}

/* Fills up to 3 candidates besides the released name; returns how many. */
static int other_names(const kl_config *c, const kl_param_info *info, candidate k[3])
{
    static const char *const gate[] = {"A_log", "dt_bias", "f_a_proj.weight", "f_b_proj.weight"};
    static const char *const conv[] = {"q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"};
    int n = 0;
    if (info->layer < 0)
        return n;
    const char *part = strchr(info->name + strlen("model.layers."), '.') + 1;
    if (info->expert >= 0) {
        part = strstr(part, ".w") + 1;
        fused_expert(&k[0], c, info, "mlp", part);
        fused_expert(&k[1], c, info, "block_sparse_moe", part);
        snprintf(k[2].name, sizeof k[2].name, "model.layers.%d.mlp.experts.%d.%s", info->layer, info->expert, part);
        k[2].ndim = info->ndim;
        memcpy(k[2].shape, info->shape, sizeof k[2].shape);
        k[2].offset = 0;
        return 3;
    }
    if (starts(part, "self_attn.")) {
        part += strlen("self_attn.");
        for (int i = 0; i < 4; i++)
            if (strcmp(part, gate[i]) == 0)
                whole(&k[n++], info, "self_attn.forget_gate.", part);
        for (int i = 0; i < 3; i++)
            if (strcmp(part, conv[i]) == 0)
                fused_convolution(&k[n++], info, i);
    }
    if (starts(part, "mlp."))
        whole(&k[n++], info, "block_sparse_moe.", part + strlen("mlp."));
    if (starts(part, "block_sparse_moe."))
        whole(&k[n++], info, "mlp.", part + strlen("block_sparse_moe."));
    return n;
}

/* ---- checking and taking ---- */

/* The shape as stored, or for A_log also [H] instead of [1,1,H,1]. */
static bool shape_fits(const kl_tensor *t, const candidate *k, const kl_param_info *info)
{
    if (info->init_kind == KL_INIT_A_LOG && t->ndim == 1)
        return t->shape[0] == info->columns;
    return t->ndim == k->ndim && memcmp(t->shape, k->shape, (size_t)k->ndim * sizeof *k->shape) == 0;
}

static kl_status check(opening *o, const kl_tensor *t, const candidate *k, const kl_param_info *info)
{
    char expected[128], came[128];
    if (!shape_fits(t, k, info))
        return kl_error(KL_EFORMAT, "tensor '%s': expected shape %s, got %s", t->name, print_shape(k->ndim, k->shape, expected),
                        print_shape(t->ndim, t->shape, came));
    if (t->dtype != KL_F32 && t->dtype != KL_BF16 && t->dtype != KL_F16)
        return kl_error(KL_EFORMAT, "tensor '%s': expected dtype float32, bfloat16 or float16, got %s", t->name, kl_dtype_name(t->dtype));
    bool shared = strstr(info->name, ".shared_experts.") != NULL;
    if (info->expert < 0 && !shared)
        return kl_ok();
    if (o->expert_layer != info->layer) {
        o->expert_layer = info->layer;
        o->expert_dtype = t->dtype;
    }
    if (t->dtype != o->expert_dtype)
        return kl_error(KL_EFORMAT, "tensor '%s': expected dtype %s like the other experts of its layer, got %s", t->name, kl_dtype_name(o->expert_dtype),
                        kl_dtype_name(t->dtype));
    return kl_ok();
}

/* The few small parameters that kernels want in float, where the file has them in 16 bits. */
static kl_status convert(opening *o, kl_param *param)
{
    float *data = (float *)o->w->owned + o->owned_used;
    size_t n = (size_t)(param->rows * param->columns);
    kl_to_f32(data, param->data, param->dtype, n);
    o->owned_used += n;
    param->data = data;
    param->dtype = KL_F32;
    return kl_ok();
}

static kl_status open_param(void *user, const kl_param_info *info, kl_param *param)
{
    opening *o = user;
    candidate k[4] = {{.ndim = info->ndim}};
    snprintf(k[0].name, sizeof k[0].name, "%s", info->name);
    memcpy(k[0].shape, info->shape, sizeof k[0].shape);
    int n = 1 + other_names(o->c, info, k + 1), index = -1, i;
    for (i = 0; i < n && index < 0; i++)
        index = find_index(o->t, k[i].name);
    if (index < 0)
        return kl_error(KL_EFORMAT, "tensor '%s' is missing", info->name);
    const kl_tensor *t = kl_tensors_at(o->t, index);
    KL_TRY(check(o, t, &k[i - 1], info));
    o->used[index] = true;
    *param = (kl_param){(char *)t->data + (size_t)k[i - 1].offset * kl_dtype_size(t->dtype), t->dtype, info->rows, info->columns};
    return kl_param_always_f32(info) && t->dtype != KL_F32 ? convert(o, param) : kl_ok();
}

/* Floats that convert() may need at most. */
static kl_status count_converted(void *user, const kl_param_info *info, kl_param *param)
{
    (void)param;
    if (kl_param_always_f32(info))
        *(size_t *)user += (size_t)(info->rows * info->columns);
    return kl_ok();
}

static kl_status open_all(opening *o)
{
    size_t floats = 0;
    KL_TRY(kl_weights_each(o->c, NULL, count_converted, &floats));
    o->w->owned_bytes = (floats * sizeof(float) + 63) & ~(size_t)63;
    if (o->w->owned_bytes && !(o->w->owned = aligned_alloc(64, o->w->owned_bytes)))
        return kl_error(KL_ENOMEM, "no memory for %zu bytes of parameters", o->w->owned_bytes);
    o->used = calloc((size_t)kl_tensors_size(o->t) + 1, sizeof *o->used);
    if (!o->used)
        return kl_error(KL_ENOMEM, "no memory for %d tensors", kl_tensors_size(o->t));
    KL_TRY(kl_weights_each(o->c, o->w, open_param, o));
    for (int i = 0; i < kl_tensors_size(o->t); i++)
        if (!o->used[i])
            return kl_error(KL_EFORMAT, "tensor '%s' is not part of this model", kl_tensors_at(o->t, i)->name);
    kl_weights_finish(o->w, o->c);
    return kl_ok();
}

kl_status kl_weights_open(kl_weights *w, const kl_config *c, const char *dir)
{
    kl_status s = kl_weights_frame(w, c);
    if (!kl_failed(s))
        s = kl_tensors_open(&w->mapping, dir);
    if (!kl_failed(s)) {
        opening o = {.c = c, .w = w, .t = w->mapping, .expert_layer = -1};
        s = kl_error_in(open_all(&o), "%s", dir);
        free(o.used);
    }
    if (kl_failed(s))
        kl_weights_free(w);
    return s;
}
