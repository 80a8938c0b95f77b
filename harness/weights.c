/* Parameters in memory of their own: made, copied, written. */
#include "harness/weights.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/arena.h"
#include "harness/file.h"
#include "harness/weights_list.h"

/* ---- the frame that holds the parameters ---- */

static kl_status frame_layer(kl_layer *l, int64_t experts)
{
    char *block = calloc((size_t)experts, 3 * (sizeof(kl_param) + sizeof(void *)));
    if (!block)
        return kl_error(KL_ENOMEM, "no memory for %lld experts", (long long)experts);
    l->w1 = (kl_param *)block;
    l->w3 = l->w1 + experts;
    l->w2 = l->w3 + experts;
    l->w1_data = (const void **)(l->w2 + experts);
    l->w3_data = l->w1_data + experts;
    l->w2_data = l->w3_data + experts;
    return kl_ok();
}

kl_status kl_weights_frame(kl_weights *w, const kl_config *c)
{
    *w = (kl_weights){0};
    KL_TRY(kl_config_validate(c));
    w->layers = calloc((size_t)c->num_layers, sizeof *w->layers);
    if (!w->layers)
        return kl_error(KL_ENOMEM, "no memory for %lld layers", (long long)c->num_layers);
    w->num_layers = c->num_layers;
    for (int64_t i = 0; i < c->num_layers; i++)
        if (c->sparse[i])
            KL_TRY(frame_layer(&w->layers[i], c->num_experts));
    return kl_ok();
}

void kl_weights_finish(kl_weights *w, const kl_config *c)
{
    if (c->tie_word_embeddings)
        w->lm_head = w->embed;
    for (int64_t i = 0; i < c->num_layers; i++)
        for (int64_t e = 0; c->sparse[i] && e < c->num_experts; e++) {
            kl_layer *l = &w->layers[i];
            l->w1_data[e] = l->w1[e].data;
            l->w3_data[e] = l->w3[e].data;
            l->w2_data[e] = l->w2[e].data;
        }
}

void kl_weights_free(kl_weights *w)
{
    for (int64_t i = 0; i < w->num_layers; i++)
        free(w->layers[i].w1); /* the one block of a layer's experts */
    free(w->layers);
    free(w->owned);
    kl_tensors_close(w->mapping);
    *w = (kl_weights){0};
}

/* ---- all parameters as a list ---- */

static kl_status count_one(void *user, const kl_param_info *info, kl_param *param)
{
    (void)info;
    (void)param;
    ++*(size_t *)user;
    return kl_ok();
}

static kl_status list_one(void *user, const kl_param_info *info, kl_param *param)
{
    kl_weights_list *list = user;
    kl_weights_item *item = &list->items[list->count++];
    *item = (kl_weights_item){.info = *info, .param = param};
    strncpy(item->name, info->name, sizeof item->name - 1);
    item->info.name = item->name;
    return kl_ok();
}

kl_status kl_weights_list_make(kl_weights_list *list, const kl_config *c, kl_weights *w)
{
    size_t n = 0;
    *list = (kl_weights_list){0};
    KL_TRY(kl_weights_each(c, w, count_one, &n));
    list->items = calloc(n, sizeof *list->items);
    if (!list->items)
        return kl_error(KL_ENOMEM, "no memory for a list of %zu parameters", n);
    return kl_weights_each(c, w, list_one, list);
}

/* ---- owned float parameters ---- */

/* Gives every listed parameter its place; with memory NULL it only counts. */
static size_t place(const kl_weights_list *list, void *memory, size_t bytes, bool *overflow)
{
    kl_arena a = memory ? kl_arena_over(memory, bytes) : kl_arena_count();
    for (size_t i = 0; i < list->count; i++) {
        const kl_param_info *info = &list->items[i].info;
        float *data = KL_TAKE(&a, float, info->rows * info->columns);
        *list->items[i].param = (kl_param){data, KL_F32, info->rows, info->columns};
    }
    *overflow = a.overflow;
    return a.used;
}

static kl_status own(kl_weights *w, const kl_config *c, kl_weights_list *list)
{
    KL_TRY(kl_weights_frame(w, c));
    KL_TRY(kl_weights_list_make(list, c, w));
    bool overflow;
    w->owned_bytes = place(list, NULL, 0, &overflow);
    w->owned = overflow ? NULL : aligned_alloc(64, w->owned_bytes);
    if (!w->owned)
        return kl_error(KL_ENOMEM, "no memory for %zu bytes of parameters", w->owned_bytes);
    place(list, w->owned, w->owned_bytes, &overflow);
    kl_weights_finish(w, c);
    return kl_ok();
}

kl_status kl_weights_zeros(kl_weights *w, const kl_config *c)
{
    kl_weights_list list = {0};
    kl_status s = own(w, c, &list);
    if (!kl_failed(s))
        memset(w->owned, 0, w->owned_bytes);
    free(list.items);
    if (kl_failed(s))
        kl_weights_free(w);
    return s;
}

/* Log decay rates spread over 1 .. 16 for the softplus gate; exp(A_log) = 1, neutral, for the bounded one. */
static void init_a_log(const kl_config *c, kl_rng *r, float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = c->gate == KDA_GATE_BOUNDED ? 0 : (float)log(1 + 15 * kl_rng_uniform(r));
}

/* A bias whose gate alone gives dt, log-uniform in 0.001 .. 0.1: softplus(x) = dt, or -lower_bound sigmoid(x) = dt. */
static void init_dt_bias(const kl_config *c, kl_rng *r, float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double dt = 0.001 * pow(100, kl_rng_uniform(r));
        double share = dt / -(double)c->gate_lower_bound;
        x[i] = (float)(c->gate == KDA_GATE_BOUNDED ? log(share) - log1p(-share) : log(expm1(dt)));
    }
}

static void init_one(const kl_config *c, uint64_t seed, uint64_t stream, const kl_weights_item *item)
{
    kl_rng r = kl_rng_make(seed, stream);
    float *x = item->param->data;
    size_t n = (size_t)(item->info.rows * item->info.columns);
    switch (item->info.init_kind) {
    case KL_INIT_NORMAL: kl_fill_normal(&r, x, n, 0, item->info.init_std); break;
    case KL_INIT_ONES:
        for (size_t i = 0; i < n; i++)
            x[i] = 1;
        break;
    case KL_INIT_ZEROS: memset(x, 0, n * sizeof *x); break;
    case KL_INIT_A_LOG: init_a_log(c, &r, x, n); break;
    case KL_INIT_DT_BIAS: init_dt_bias(c, &r, x, n); break;
    }
}

kl_status kl_weights_init(kl_weights *w, const kl_config *c, uint64_t seed)
{
    kl_weights_list list = {0};
    kl_status s = own(w, c, &list);
    if (!kl_failed(s)) {
        /* A parameter is a stream of its own, so the order in which they are filled is free. */
#pragma omp parallel for schedule(dynamic)
        for (size_t i = 0; i < list.count; i++)
            init_one(c, seed, i, &list.items[i]);
    }
    free(list.items);
    if (kl_failed(s))
        kl_weights_free(w);
    return s;
}

kl_status kl_weights_to_f32(kl_weights *out, const kl_weights *in, const kl_config *c)
{
    kl_weights_list to = {0}, from = {0};
    kl_status s = own(out, c, &to);
    if (!kl_failed(s))
        s = kl_weights_list_make(&from, c, (kl_weights *)in);
    for (size_t i = 0; !kl_failed(s) && i < to.count; i++) {
        const kl_param *p = from.items[i].param;
        kl_to_f32(to.items[i].param->data, p->data, p->dtype, (size_t)(p->rows * p->columns));
    }
    free(to.items);
    free(from.items);
    if (kl_failed(s))
        kl_weights_free(out);
    return s;
}

/* ---- saving ---- */

static size_t padded_bytes(const kl_param_info *info)
{
    return ((size_t)(info->rows * info->columns) * kl_dtype_size(info->dtype) + 7) & ~(size_t)7;
}

/* Every parameter in the dtype that its info asks for; conversions go into *converted. */
static kl_status store(const kl_weights_list *list, kl_tensor *tensors, char *converted)
{
    for (size_t i = 0; i < list->count; i++) {
        const kl_weights_item *item = &list->items[i];
        const kl_param_info *info = &item->info;
        tensors[i] = (kl_tensor){.name = (char *)item->name, .data = item->param->data, .dtype = info->dtype, .ndim = info->ndim};
        memcpy(tensors[i].shape, info->shape, sizeof info->shape);
        if (item->param->dtype == info->dtype)
            continue;
        if (item->param->dtype != KL_F32)
            return kl_error(KL_EUNSUPPORTED, "%s: converting %s to %s: expected float32", item->name, kl_dtype_name(item->param->dtype),
                            kl_dtype_name(info->dtype));
        tensors[i].data = converted;
        kl_from_f32(converted, info->dtype, item->param->data, (size_t)kl_tensor_count(&tensors[i]));
        converted += padded_bytes(info);
    }
    return kl_ok();
}

static kl_status save_tensors(const kl_weights_list *list, const char *path)
{
    static const char *const metadata[] = {"format", "pt", NULL};
    size_t bytes = 8;
    for (size_t i = 0; i < list->count; i++)
        bytes += list->items[i].param->dtype != list->items[i].info.dtype ? padded_bytes(&list->items[i].info) : 0;
    kl_tensor *tensors = calloc(list->count, sizeof *tensors);
    char *converted = malloc(bytes);
    kl_status s = tensors && converted ? store(list, tensors, converted) : kl_error(KL_ENOMEM, "%s: no memory to convert the parameters", path);
    if (!kl_failed(s))
        s = kl_tensors_save(path, tensors, (int)list->count, metadata);
    free(tensors);
    free(converted);
    return s;
}

kl_status kl_weights_save(const kl_weights *w, const kl_config *c, kl_dtype dtype, const char *dir)
{
    KL_REQUIRE(dtype == KL_F32 || dtype == KL_BF16 || dtype == KL_F16, "dtype: expected float32, bfloat16 or float16, got %s", kl_dtype_name(dtype));
    char path[4096];
    KL_REQUIRE(strlen(dir) < sizeof path - 64, "%s: path too long", dir);
    kl_config stored = *c;
    stored.dtype = dtype;
    KL_TRY(kl_config_validate(&stored));
    KL_TRY(kl_make_dir(dir));
    kl_weights_list list = {0};
    kl_status s = kl_weights_list_make(&list, &stored, (kl_weights *)w);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (!kl_failed(s))
        s = save_tensors(&list, path);
    free(list.items);
    snprintf(path, sizeof path, "%s/config.json", dir);
    return kl_failed(s) ? s : kl_config_save(&stored, path);
}
