#include "harness/verify_model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static kl_status find(const kl_golden_model *g, const char *name, kl_dtype dtype, int ndim, const int64_t *shape, const kl_tensor **t)
{
    *t = kl_tensors_find(g->file, name);
    if (!*t)
        return kl_error(KL_EFORMAT, "tensor '%s' is missing", name);
    bool fits = (*t)->dtype == dtype && (*t)->ndim == ndim;
    for (int i = 0; fits && i < ndim; i++)
        fits = shape[i] < 0 || (*t)->shape[i] == shape[i];
    if (!fits)
        return kl_error(KL_EFORMAT, "tensor '%s': its shape or dtype (%s) does not fit the model", name, kl_dtype_name((*t)->dtype));
    return kl_ok();
}

static kl_status take_ids(const kl_tensor *t, int64_t vocab, int32_t **ids)
{
    int64_t n = kl_tensor_count(t);
    *ids = malloc((size_t)(n + 1) * sizeof **ids);
    if (!*ids)
        return kl_error(KL_ENOMEM, "out of memory");
    for (int64_t i = 0; i < n; i++) {
        int64_t id;
        memcpy(&id, (const char *)t->data + 8 * i, 8);
        if (id < 0 || id >= vocab)
            return kl_error(KL_EFORMAT, "tensor '%s': id %lld is outside the vocabulary of %lld", t->name, (long long)id, (long long)vocab);
        (*ids)[i] = (int32_t)id;
    }
    return kl_ok();
}

static kl_status read_golden(kl_golden_model *g)
{
    const kl_config *c = &g->model->config;
    const kl_tensor *t;
    KL_TRY(find(g, "input_ids", KL_I64, 2, (int64_t[]){-1, -1}, &t));
    g->rows = t->shape[0];
    g->T = t->shape[1];
    KL_REQUIRE(g->rows >= 1 && g->T >= 2, "input_ids: expected at least one row of two tokens");
    KL_TRY(take_ids(t, c->vocab_size, &g->ids));
    g->cu = malloc((size_t)(g->rows + 1) * sizeof *g->cu);
    if (!g->cu)
        return kl_error(KL_ENOMEM, "out of memory");
    for (int64_t n = 0; n <= g->rows; n++)
        g->cu[n] = n * g->T;
    KL_TRY(find(g, "logits", KL_F32, 3, (int64_t[]){g->rows, g->T, c->vocab_size}, &t));
    g->logits = t->data;
    KL_TRY(find(g, "loss", KL_F32, 1, (int64_t[]){1}, &t));
    for (int64_t i = 0; i <= c->num_layers; i++) {
        char name[32];
        snprintf(name, sizeof name, "hidden.%lld", (long long)i);
        KL_TRY(find(g, name, KL_F32, 3, (int64_t[]){g->rows, g->T, c->hidden_size}, &t));
    }
    KL_TRY(find(g, "greedy_ids", KL_I64, 2, (int64_t[]){1, -1}, &t));
    g->greedy_count = t->shape[1];
    KL_TRY(take_ids(t, c->vocab_size, &g->greedy));
    const kl_tensor *gap = kl_tensors_find(g->file, "greedy_gap");
    int64_t chosen = gap ? kl_tensor_count(gap) : 24;
    KL_REQUIRE(chosen >= 1 && chosen < g->greedy_count, "greedy_gap: expected fewer entries than greedy_ids has");
    g->prompt_count = g->greedy_count - chosen;
    return kl_ok();
}

/* out [rows,T,D] against the wanted tensor, whole and by stretches of a row. */
static void tensor_row(kl_verifier *v, const char *variant, const char *name, const float *out, const float *want, int64_t rows, int64_t width)
{
    size_t n = (size_t)(rows * width);
    double *wide = malloc((n + 1) * sizeof *wide);
    kl_check check = {"model", variant, name, NAN, NAN, kl_tol_model_f32.forward, wide ? NULL : "out of memory"};
    for (size_t i = 0; wide && i < n; i++)
        wide[i] = want[i];
    if (wide) {
        check.err = kl_rel_err(out, wide, n);
        check.blocks = kl_rel_err_blocks(out, wide, (size_t)rows, 1, (size_t)width, 15);
    }
    kl_verify_row(v, &check);
    free(wide);
}

static kl_status verify_forward(kl_verifier *v, const kl_golden_model *g, const char *variant, float *memory, float **hidden)
{
    const kl_config *c = &g->model->config;
    int64_t tokens = g->rows * g->T;
    float *logits = memory;
    for (int64_t i = 0; i <= c->num_layers; i++)
        hidden[i] = memory + tokens * c->vocab_size + i * tokens * c->hidden_size;
    memset(memory, 0xff, (size_t)(tokens * (c->vocab_size + (c->num_layers + 1) * c->hidden_size)) * sizeof *memory);
    KL_TRY(kl_model_forward(g->model, &(kl_batch){g->rows, g->cu, g->ids, NULL}, NULL, &(kl_outputs){logits, false, hidden}));
    for (int64_t i = 0; i <= c->num_layers; i++) {
        char name[32];
        snprintf(name, sizeof name, "hidden.%lld", (long long)i);
        tensor_row(v, variant, name, hidden[i], kl_tensors_find(g->file, name)->data, tokens, c->hidden_size);
    }
    tensor_row(v, variant, "logits", logits, g->logits, tokens, c->vocab_size);
    return kl_ok();
}

static kl_status verify_loss(kl_verifier *v, const kl_golden_model *g, const char *variant, bool gradients)
{
    int64_t tokens = g->rows * g->T, counted;
    int32_t *targets = malloc((size_t)tokens * sizeof *targets);
    if (!targets)
        return kl_error(KL_ENOMEM, "out of memory");
    for (int64_t i = 0; i < tokens; i++)
        targets[i] = (i + 1) % g->T == 0 ? -1 : g->ids[i + 1];
    kl_weights grads = {0};
    kl_status s = gradients ? kl_weights_zeros(&grads, &g->model->config) : kl_ok();
    double loss = NAN, want = *(const float *)kl_tensors_find(g->file, "loss")->data;
    if (!kl_failed(s))
        s = kl_model_loss(g->model, &(kl_batch){g->rows, g->cu, g->ids, NULL}, targets, &loss, &counted, gradients ? &grads : NULL, 1.0f);
    if (!kl_failed(s)) {
        kl_verify_row(v, &(kl_check){"model", variant, "loss", fabs(loss - want) / fabs(want), NAN, kl_tol_model_f32.forward, NULL});
        kl_verify_fact(v, "model", variant, "targets counted", counted == g->rows * (g->T - 1), NULL);
    }
    if (!kl_failed(s) && gradients)
        s = kl_verify_model_grads(v, g, &grads, variant);
    if (gradients)
        kl_weights_free(&grads);
    free(targets);
    return s;
}

kl_status kl_verify_model_tensors(kl_verifier *v, const kl_golden_model *g, const char *variant, bool gradients)
{
    const kl_config *c = &g->model->config;
    int64_t tokens = g->rows * g->T;
    float *memory = malloc((size_t)(tokens * (c->vocab_size + (c->num_layers + 1) * c->hidden_size)) * sizeof *memory);
    float **hidden = calloc((size_t)c->num_layers + 1, sizeof *hidden);
    kl_status s = memory && hidden ? verify_forward(v, g, variant, memory, hidden) : kl_error(KL_ENOMEM, "out of memory");
    free(memory);
    free(hidden);
    KL_TRY(s);
    return verify_loss(v, g, variant, gradients);
}

static bool wanted(const kl_verifier *v, const char *name) { return !v->only || strcmp(v->only, name) == 0; }

/* The model as dispatch runs it ("default"), then with each registered variant pinned in turn ("kda:chunk", ...). */
static kl_status verify_variants(kl_verifier *v, const kl_golden_model *g)
{
    int ran = wanted(v, "default");
    if (ran)
        KL_TRY(kl_verify_model_tensors(v, g, "default", true));
    static const kl_family families[] = {KL_FAMILY_KDA, KL_FAMILY_MLA, KL_FAMILY_MOE};
    const char **pin[] = {&g->model->kda_variant, &g->model->mla_variant, &g->model->moe_variant};
    for (int f = 0; f < 3; f++) {
        int count;
        const kl_variant *variant = kl_family_variants(families[f], &count);
        for (int i = 0; i < count; i++) {
            if (variant[i].device != v->ctx->device)
                continue;
            char name[64];
            snprintf(name, sizeof name, "%s:%s", variant[i].family, variant[i].name);
            if (!wanted(v, name))
                continue;
            ran++;
            *pin[f] = variant[i].name;
            kl_status s = kl_verify_model_tensors(v, g, name, variant[i].backward != NULL);
            *pin[f] = NULL;
            if (s.code == KL_EUNSUPPORTED)
                kl_verify_unsupported(v, "model", name, s.message);
            else if (kl_failed(s))
                kl_verify_fact(v, "model", name, "runs", false, s.message);
        }
    }
    KL_REQUIRE(ran, "--variant: expected default or FAMILY:NAME such as kda:chunk, got '%s'", v->only);
    return kl_ok();
}

kl_status kl_verify_model(kl_verifier *v, const char *dir)
{
    kl_golden_model g = {0};
    char path[4096];
    KL_REQUIRE(snprintf(path, sizeof path, "%s/expected.safetensors", dir) < (int)sizeof path, "%s: path too long", dir);
    KL_TRY(kl_model_open(&g.model, v->ctx, dir));
    kl_status s = kl_tensors_open(&g.file, path);
    if (!kl_failed(s))
        s = kl_error_in(read_golden(&g), "%s", path);
    if (!kl_failed(s))
        s = verify_variants(v, &g);
    if (!kl_failed(s))
        s = kl_verify_model_cache(v, &g);
    kl_tensors_close(g.file);
    kl_model_close(g.model);
    free(g.ids);
    free(g.cu);
    free(g.greedy);
    return s;
}
