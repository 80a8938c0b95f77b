/* Opening and closing a model, and the one workspace behind its calls. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness/model_internal.h"

static kl_status model_new(kl_model **out, kl_ctx *ctx)
{
    KL_REQUIRE(out, "model: expected a place for it, got NULL");
    *out = NULL;
    KL_REQUIRE(ctx, "ctx: expected a context, got NULL");
    const kl_ops *ops = kl_ops_for(ctx->device);
    if (!ops)
        return kl_error(KL_EUNSUPPORTED, "device: no model operations for %s", kl_device_name(ctx->device));
    kl_model *m = calloc(1, sizeof *m);
    if (!m)
        return kl_error(KL_ENOMEM, "model: out of memory");
    m->ctx = ctx;
    m->ops = ops;
    *out = m;
    return kl_ok();
}

/* Without short convolution SiLU remains: a convolution of one tap whose weights are 1. */
static kl_status make_unit_taps(kl_model *m)
{
    const kl_config *c = &m->config;
    if (c->conv_width > 0)
        return kl_ok();
    size_t n = (size_t)(c->kda_heads * c->kda_head_dim);
    float *host = malloc((n + 1) * sizeof *host);
    if (!host)
        return kl_error(KL_ENOMEM, "model: out of memory");
    for (size_t i = 0; i < n; i++)
        host[i] = 1.0f;
    kl_status s = m->ops->alloc(m->ctx, (void **)&m->unit_taps, (n + 1) * sizeof *host);
    if (!kl_failed(s))
        s = m->ops->copy(m->ctx, m->unit_taps, host, n * sizeof *host);
    free(host);
    return s;
}

static kl_status finish(kl_model **out, kl_model *m, kl_status s)
{
    if (!kl_failed(s))
        s = make_unit_taps(m);
    if (kl_failed(s)) {
        kl_model_close(m);
        m = NULL;
    }
    *out = m;
    return s;
}

static kl_status load(kl_model *m, const char *dir)
{
    char path[4096];
    int n = snprintf(path, sizeof path, "%s/config.json", dir);
    KL_REQUIRE(n > 0 && n < (int)sizeof path, "dir: expected a path below %zu bytes", sizeof path);
    KL_TRY(kl_config_load(&m->config, path));
    return kl_weights_open(&m->weights, &m->config, dir);
}

kl_status kl_model_open(kl_model **out, kl_ctx *ctx, const char *dir)
{
    kl_model *m;
    KL_TRY(model_new(&m, ctx));
    return finish(out, m, dir ? load(m, dir) : kl_error(KL_EINVAL, "dir: expected a checkpoint's directory, got NULL"));
}

static kl_status initialise(kl_model *m, const kl_config *c, uint64_t seed)
{
    KL_REQUIRE(c, "config: expected one, got NULL");
    KL_TRY(kl_config_validate(c));
    m->config = *c;
    return kl_weights_init(&m->weights, c, seed);
}

kl_status kl_model_random(kl_model **out, kl_ctx *ctx, const kl_config *c, uint64_t seed)
{
    kl_model *m;
    KL_TRY(model_new(&m, ctx));
    return finish(out, m, initialise(m, c, seed));
}

void kl_model_trim(kl_model *m, size_t keep)
{
    if (m->workspace_bytes <= keep)
        return;
    m->ops->release(m->ctx, m->workspace);
    m->workspace = NULL;
    m->workspace_bytes = 0;
}

void kl_model_close(kl_model *m)
{
    if (!m)
        return;
    kl_model_trim(m, 0);
    if (m->unit_taps)
        m->ops->release(m->ctx, m->unit_taps);
    kl_weights_free(&m->weights);
    free(m->index);
    free(m);
}

kl_status kl_model_reserve(kl_model *m, size_t bytes)
{
    if (bytes <= m->workspace_bytes)
        return kl_ok();
    /* An eighth more than asked for: a sequence that grows by a token a call does not grow the workspace every time. */
    size_t wanted = bytes <= SIZE_MAX - bytes / 8 ? bytes + bytes / 8 : bytes;
    if (m->workspace)
        m->ops->release(m->ctx, m->workspace);
    m->workspace = NULL;
    m->workspace_bytes = 0;
    KL_TRY(m->ops->alloc(m->ctx, &m->workspace, wanted));
    m->workspace_bytes = wanted;
    return kl_ok();
}
