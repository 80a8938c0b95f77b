#include "harness/cpu/layers_cpu.h"

#include <math.h>

#include "harness/cpu/ops_cpu.h"

static kl_param weight_of(const void *data, kl_dtype dtype, int64_t rows, int64_t columns)
{
    return (kl_param){.data = (void *)data, .dtype = dtype, .rows = rows, .columns = columns};
}

/* The kl_param of a gradient, NULL where it is not wanted. */
static kl_param *gradient_of(kl_param *p, float *data, int64_t rows, int64_t columns)
{
    *p = weight_of(data, KL_F32, rows, columns);
    return data ? p : NULL;
}

static kl_status only_float(const layers_problem *p, const layers_grads *g)
{
    layers_tensor list[LAYERS_TENSORS];
    int count = layers_tensors((layers_problem *)p, (layers_grads *)g, list);
    for (int i = 0; i < count; i++)
        if (list[i].dtype == KL_BF16 && *(void **)list[i].field && strcmp(list[i].name, "weight") != 0)
            return kl_error(KL_EUNSUPPORTED, "%s: %s: on cpu float32 is offered, got bfloat16", layers_name(p->op), list[i].name);
    return kl_ok();
}

static kl_param loss_weight(const layers_head_loss *p) { return weight_of(p->weight, p->weight_dtype, p->vocab, p->D); }

size_t layers_cpu_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const layers_problem *p = problem;
    (void)pass;
    if (p->op != LAYERS_HEAD_LOSS)
        return 0;
    kl_param w = loss_weight(&p->head_loss);
    return cpu_head_loss_workspace(ctx, &w, p->head_loss.T);
}

/* x <- x + add, then the norm. */
static kl_status rmsnorm(kl_ctx *ctx, const layers_rmsnorm *p)
{
    kl_param w = weight_of(p->weight, p->weight_dtype, 1, p->D);
    int64_t x_stride = p->x_stride ? p->x_stride : p->D, y_stride = p->y_stride ? p->y_stride : p->D;
    if (!p->add)
        return cpu_rmsnorm(ctx, &w, p->eps, p->T, p->D, p->x, x_stride, p->y, y_stride);
    KL_REQUIRE(x_stride == p->D, "rmsnorm: x_stride: expected dense rows beside add on cpu, got %lld", (long long)x_stride);
    if (p->sum != p->x)
        memcpy(p->sum, p->x, (size_t)(p->T * p->D) * sizeof(float));
    KL_TRY(cpu_add(ctx, p->sum, p->add, (size_t)(p->T * p->D)));
    return cpu_rmsnorm(ctx, &w, p->eps, p->T, p->D, p->sum, x_stride, p->y, y_stride);
}

static kl_status head_loss(kl_ctx *ctx, const layers_head_loss *p, const layers_head_loss_grads *g, void *workspace, size_t bytes)
{
    kl_param w = loss_weight(p), dw;
    double sum;
    int64_t counted;
    KL_REQUIRE(!p->loss, "head_loss: loss: on cpu the sum is offered, not every token's loss");
    KL_TRY(cpu_head_loss(ctx, &w, p->T, p->x, p->targets, &sum, &counted, p->grad_scale, g ? g->dx : NULL,
                         g ? gradient_of(&dw, g->dweight, p->vocab, p->D) : NULL, workspace, bytes));
    if (p->sum)
        p->sum[0] = sum, p->sum[1] = (double)counted;
    return kl_ok();
}

static kl_status adamw(kl_ctx *ctx, const layers_adamw *p)
{
    double norm = p->sumsq ? sqrt(*p->sumsq) : 0.0, scale = p->sumsq && norm > p->clip ? p->clip / norm : 1.0;
    return cpu_adamw(ctx, (size_t)p->n, p->w, p->g, p->m, p->v, p->lr, p->beta1, p->beta2, p->eps, p->decay, scale, p->step);
}

static kl_status sumsq(kl_ctx *ctx, const layers_sumsq *p)
{
    double sum;
    KL_TRY(cpu_sumsq(ctx, (size_t)p->n, p->x, &sum));
    *p->sum = (p->accumulate ? *p->sum : 0.0) + sum;
    return kl_ok();
}

kl_status layers_cpu_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const layers_problem *p = problem;
    KL_TRY(layers_validate(ctx, p, NULL));
    KL_TRY(only_float(p, NULL));
    switch (p->op) {
    case LAYERS_RMSNORM: return rmsnorm(ctx, &p->rmsnorm);
    case LAYERS_EMBED: {
        kl_param w = weight_of(p->embed.weight, p->embed.weight_dtype, p->embed.vocab, p->embed.D);
        return cpu_embed(ctx, &w, p->embed.ids, p->embed.T, p->embed.y);
    }
    case LAYERS_LINEAR: {
        kl_param w = weight_of(p->linear.weight, p->linear.weight_dtype, p->linear.N, p->linear.K);
        return cpu_linear(ctx, &w, p->linear.T, p->linear.x, p->linear.y, p->linear.accumulate);
    }
    case LAYERS_HEAD_LOSS: return head_loss(ctx, &p->head_loss, NULL, workspace, bytes);
    case LAYERS_ADAMW: return adamw(ctx, &p->adamw);
    case LAYERS_SUMSQ: return sumsq(ctx, &p->sumsq);
    default: return kl_error(KL_EUNSUPPORTED, "layers: %s: not offered on cpu", layers_name(p->op));
    }
}

static kl_status rmsnorm_backward(kl_ctx *ctx, const layers_rmsnorm *p, const layers_rmsnorm_grads *g)
{
    kl_param w = weight_of(p->weight, p->weight_dtype, 1, p->D), dw;
    int64_t x_stride = p->x_stride ? p->x_stride : p->D, y_stride = p->y_stride ? p->y_stride : p->D;
    if (g->dx && g->dsum && g->dx != g->dsum) {
        KL_REQUIRE(x_stride == p->D, "rmsnorm: x_stride: expected dense rows beside dsum on cpu, got %lld", (long long)x_stride);
        memcpy(g->dx, g->dsum, (size_t)(p->T * p->D) * sizeof(float));
    }
    return cpu_rmsnorm_backward(ctx, &w, p->eps, p->T, p->D, p->add ? p->sum : p->x, x_stride, g->dy, y_stride, g->dx, x_stride, g->dsum != NULL,
                                gradient_of(&dw, g->dweight, 1, p->D));
}

kl_status layers_cpu_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes)
{
    const layers_problem *p = problem;
    const layers_grads *g = grads;
    KL_TRY(layers_validate(ctx, p, g));
    KL_TRY(only_float(p, g));
    kl_param dw;
    switch (p->op) {
    case LAYERS_RMSNORM: return rmsnorm_backward(ctx, &p->rmsnorm, &g->rmsnorm);
    case LAYERS_EMBED: return cpu_embed_backward(ctx, gradient_of(&dw, g->embed.dweight, p->embed.vocab, p->embed.D), p->embed.ids, p->embed.T, g->embed.dy);
    case LAYERS_LINEAR: {
        kl_param w = weight_of(p->linear.weight, p->linear.weight_dtype, p->linear.N, p->linear.K);
        return cpu_linear_backward(ctx, &w, p->linear.T, p->linear.x, g->linear.dy, g->linear.dx, g->linear.accumulate,
                                   gradient_of(&dw, g->linear.dweight, p->linear.N, p->linear.K));
    }
    case LAYERS_HEAD_LOSS: return head_loss(ctx, &p->head_loss, &g->head_loss, workspace, bytes);
    default: return kl_error(KL_EUNSUPPORTED, "layers: %s: no backward pass on cpu", layers_name(p->op));
    }
}
