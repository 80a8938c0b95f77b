/* What a problem of the layers may be: sizes, types, strides, pointers, in this order; and the list of its tensors, which
 * says which pointers those are. */
#include "harness/layers.h"

#include "common/arena.h"

/* ---- the tensors ---- */

static void add(layers_tensor **at, const char *name, const void *field, layers_role role, kl_dtype dtype, int64_t rows, int64_t columns, int64_t stride,
                kl_pass first, kl_pass last)
{
    *(*at)++ = (layers_tensor){.name = name, .field = (void *)field, .role = role, .dtype = dtype, .rows = rows, .columns = columns,
                               .stride = stride ? stride : columns, .first = first, .last = last};
}

static const kl_pass FWD = KL_FORWARD, BWD = KL_BACKWARD;

static void list_rmsnorm(layers_tensor **at, layers_rmsnorm *p, layers_rmsnorm_grads *g)
{
    add(at, "x", &p->x, LAYERS_INPUT, p->x_dtype, p->T, p->D, p->x_stride, FWD, BWD);
    add(at, "add", &p->add, LAYERS_INPUT, p->x_dtype, p->T, p->D, p->x_stride, FWD, FWD);
    add(at, "sum", &p->sum, LAYERS_OUTPUT, p->x_dtype, p->T, p->D, p->x_stride, FWD, BWD);
    add(at, "weight", &p->weight, LAYERS_INPUT, p->weight_dtype, 1, p->D, 0, FWD, BWD);
    add(at, "y", &p->y, LAYERS_OUTPUT, p->y_dtype, p->T, p->D, p->y_stride, FWD, FWD);
    if (!g)
        return;
    add(at, "dy", &g->dy, LAYERS_INPUT, p->y_dtype, p->T, p->D, p->y_stride, BWD, BWD);
    add(at, "dsum", &g->dsum, LAYERS_INPUT, p->x_dtype, p->T, p->D, p->x_stride, BWD, BWD);
    add(at, "dx", &g->dx, LAYERS_GRADIENT, p->x_dtype, p->T, p->D, p->x_stride, BWD, BWD);
    add(at, "dweight", &g->dweight, LAYERS_GRADIENT, KL_F32, 1, p->D, 0, BWD, BWD);
}

static void list_embed(layers_tensor **at, layers_embed *p, layers_embed_grads *g)
{
    add(at, "ids", &p->ids, LAYERS_INPUT, KL_I32, 1, p->T, 0, FWD, BWD);
    add(at, "weight", &p->weight, LAYERS_INPUT, p->weight_dtype, p->vocab, p->D, 0, FWD, FWD);
    add(at, "y", &p->y, LAYERS_OUTPUT, p->dtype, p->T, p->D, 0, FWD, FWD);
    if (!g)
        return;
    add(at, "dy", &g->dy, LAYERS_INPUT, p->dtype, p->T, p->D, 0, BWD, BWD);
    add(at, "dweight", &g->dweight, LAYERS_GRADIENT, KL_F32, p->vocab, p->D, 0, BWD, BWD);
}

static void list_swiglu(layers_tensor **at, layers_swiglu *p, layers_swiglu_grads *g)
{
    add(at, "gate", &p->gate, LAYERS_INPUT, p->dtype, p->T, p->I, p->in_stride, FWD, BWD);
    add(at, "up", &p->up, LAYERS_INPUT, p->dtype, p->T, p->I, p->in_stride, FWD, BWD);
    add(at, "y", &p->y, LAYERS_OUTPUT, p->dtype, p->T, p->I, 0, FWD, BWD);
    if (!g)
        return;
    add(at, "dy", &g->dy, LAYERS_INPUT, p->dtype, p->T, p->I, 0, BWD, BWD);
    add(at, "dgate", &g->dgate, LAYERS_GRADIENT, p->dtype, p->T, p->I, p->in_stride, BWD, BWD);
    add(at, "dup", &g->dup, LAYERS_GRADIENT, p->dtype, p->T, p->I, p->in_stride, BWD, BWD);
}

static void list_linear(layers_tensor **at, layers_linear *p, layers_linear_grads *g)
{
    add(at, "x", &p->x, LAYERS_INPUT, p->x_dtype, p->T, p->K, p->x_stride, FWD, BWD);
    add(at, "weight", &p->weight, LAYERS_INPUT, p->weight_dtype, p->N, p->K, 0, FWD, BWD);
    add(at, "y", &p->y, p->accumulate ? LAYERS_UPDATED : LAYERS_OUTPUT, p->y_dtype, p->T, p->N, p->y_stride, FWD, FWD);
    if (!g)
        return;
    add(at, "dy", &g->dy, LAYERS_INPUT, p->y_dtype, p->T, p->N, p->y_stride, BWD, BWD);
    add(at, "dx", &g->dx, LAYERS_GRADIENT, p->x_dtype, p->T, p->K, p->x_stride, BWD, BWD);
    (*at)[-1].accumulates = g->accumulate;
    add(at, "dweight", &g->dweight, LAYERS_GRADIENT, KL_F32, p->N, p->K, 0, BWD, BWD);
}

static void list_mlp(layers_tensor **at, layers_mlp *p, layers_mlp_grads *g)
{
    add(at, "x", &p->x, LAYERS_INPUT, p->dtype, p->T, p->D, 0, FWD, BWD);
    add(at, "gate_up", &p->gate_up, LAYERS_INPUT, p->weight_dtype, 2 * p->I, p->D, 0, FWD, BWD);
    add(at, "down", &p->down, LAYERS_INPUT, p->weight_dtype, p->D, p->I, 0, FWD, BWD);
    add(at, "hidden", &p->hidden, LAYERS_OUTPUT, p->dtype, p->T, 2 * p->I, 0, FWD, BWD);
    add(at, "y", &p->y, LAYERS_OUTPUT, p->dtype, p->T, p->D, 0, FWD, FWD);
    if (!g)
        return;
    add(at, "dy", &g->dy, LAYERS_INPUT, p->dtype, p->T, p->D, 0, BWD, BWD);
    add(at, "dx", &g->dx, LAYERS_GRADIENT, p->dtype, p->T, p->D, 0, BWD, BWD);
    (*at)[-1].accumulates = g->accumulate;
    add(at, "dgate_up", &g->dgate_up, LAYERS_GRADIENT, KL_F32, 2 * p->I, p->D, 0, BWD, BWD);
    (*at)[-1].accumulates = true;
    add(at, "ddown", &g->ddown, LAYERS_GRADIENT, KL_F32, p->D, p->I, 0, BWD, BWD);
    (*at)[-1].accumulates = true;
}

static void list_head_loss(layers_tensor **at, layers_head_loss *p, layers_head_loss_grads *g)
{
    add(at, "x", &p->x, LAYERS_INPUT, p->x_dtype, p->T, p->D, 0, FWD, BWD);
    add(at, "weight", &p->weight, LAYERS_INPUT, p->weight_dtype, p->vocab, p->D, 0, FWD, BWD);
    add(at, "targets", &p->targets, LAYERS_INPUT, KL_I32, 1, p->T, 0, FWD, BWD);
    add(at, "loss", &p->loss, LAYERS_OUTPUT, KL_F32, 1, p->T, 0, FWD, BWD);
    add(at, "sum", &p->sum, LAYERS_OUTPUT, KL_F64, 1, 2, 0, FWD, BWD);
    if (!g)
        return;
    add(at, "dx", &g->dx, LAYERS_GRADIENT, p->x_dtype, p->T, p->D, 0, BWD, BWD);
    add(at, "dweight", &g->dweight, LAYERS_GRADIENT, KL_F32, p->vocab, p->D, 0, BWD, BWD);
}

static void list_adamw(layers_tensor **at, layers_adamw *p)
{
    add(at, "sumsq", &p->sumsq, LAYERS_INPUT, KL_F64, 1, 1, 0, FWD, FWD);
    add(at, "g", &p->g, LAYERS_INPUT, p->g_dtype, 1, p->n, 0, FWD, FWD);
    add(at, "w", &p->w, LAYERS_UPDATED, KL_F32, 1, p->n, 0, FWD, FWD);
    add(at, "m", &p->m, LAYERS_UPDATED, KL_F32, 1, p->n, 0, FWD, FWD);
    add(at, "v", &p->v, LAYERS_UPDATED, KL_F32, 1, p->n, 0, FWD, FWD);
    add(at, "copy", &p->copy, LAYERS_OUTPUT, KL_BF16, 1, p->n, 0, FWD, FWD);
}

static void list_muon(layers_tensor **at, layers_muon *p)
{
    add(at, "sumsq", &p->sumsq, LAYERS_INPUT, KL_F64, 1, 1, 0, FWD, FWD);
    int64_t rows = (p->count ? p->count : 1) * p->rows;
    add(at, "g", &p->g, LAYERS_INPUT, p->g_dtype, rows, p->columns, 0, FWD, FWD);
    add(at, "w", &p->w, LAYERS_UPDATED, KL_F32, rows, p->columns, 0, FWD, FWD);
    add(at, "m", &p->m, LAYERS_UPDATED, KL_F32, rows, p->columns, 0, FWD, FWD);
    add(at, "copy", &p->copy, LAYERS_OUTPUT, KL_BF16, rows, p->columns, 0, FWD, FWD);
}

static void list_sumsq(layers_tensor **at, layers_sumsq *p)
{
    add(at, "x", &p->x, LAYERS_INPUT, p->dtype, 1, p->n, 0, FWD, FWD);
    add(at, "sum", &p->sum, p->accumulate ? LAYERS_UPDATED : LAYERS_OUTPUT, KL_F64, 1, 1, 0, FWD, FWD);
}

/* Tensors that may be left out. */
static bool may_be_absent(const layers_problem *p, const layers_tensor *t, bool backward)
{
    switch (p->op) {
    case LAYERS_RMSNORM: return t->name[0] == 'd' ? t->name[1] != 'y' : t->field == &p->rmsnorm.add || (t->field == &p->rmsnorm.sum && !p->rmsnorm.add);
    case LAYERS_SWIGLU: return backward && t->field == &p->swiglu.y;
    case LAYERS_LINEAR: case LAYERS_MLP: return t->role == LAYERS_GRADIENT;
    case LAYERS_HEAD_LOSS: return t->role == LAYERS_GRADIENT || t->role == LAYERS_OUTPUT;
    case LAYERS_ADAMW: return t->field == &p->adamw.sumsq || t->field == &p->adamw.copy;
    case LAYERS_MUON: return t->field == &p->muon.sumsq || t->field == &p->muon.copy;
    default: return false;
    }
}

int layers_tensors(layers_problem *p, layers_grads *g, layers_tensor list[LAYERS_TENSORS])
{
    layers_tensor *at = list;
    switch (p->op) {
    case LAYERS_RMSNORM: list_rmsnorm(&at, &p->rmsnorm, g ? &g->rmsnorm : NULL); break;
    case LAYERS_EMBED: list_embed(&at, &p->embed, g ? &g->embed : NULL); break;
    case LAYERS_SWIGLU: list_swiglu(&at, &p->swiglu, g ? &g->swiglu : NULL); break;
    case LAYERS_LINEAR: list_linear(&at, &p->linear, g ? &g->linear : NULL); break;
    case LAYERS_MLP: list_mlp(&at, &p->mlp, g ? &g->mlp : NULL); break;
    case LAYERS_HEAD_LOSS: list_head_loss(&at, &p->head_loss, g ? &g->head_loss : NULL); break;
    case LAYERS_ADAMW: list_adamw(&at, &p->adamw); break;
    case LAYERS_MUON: list_muon(&at, &p->muon); break;
    case LAYERS_SUMSQ: list_sumsq(&at, &p->sumsq); break;
    default: break;
    }
    for (layers_tensor *t = list; t < at; t++) {
        t->optional = may_be_absent(p, t, g != NULL);
        t->accumulates |= t->role == LAYERS_GRADIENT && t->dtype == KL_F32 && t->name[1] == 'w';
    }
    return (int)(at - list);
}

/* ---- validation ---- */

static kl_status at_least(const char *op, const char *name, int64_t value, int64_t least)
{
    KL_REQUIRE(value >= least, "%s: %s: expected at least %lld, got %lld", op, name, (long long)least, (long long)value);
    return kl_ok();
}

static kl_status fraction(const char *op, const char *name, double x)
{
    KL_REQUIRE(x >= 0.0 && x < 1.0, "%s: %s: expected at least 0 and below 1, got %g", op, name, x);
    return kl_ok();
}

static kl_status check_options(const layers_problem *p)
{
    const char *op = layers_name(p->op);
    switch (p->op) {
    case LAYERS_RMSNORM:
        KL_TRY(at_least(op, "D", p->rmsnorm.D, 1));
        KL_REQUIRE(p->rmsnorm.eps >= 0.0f, "rmsnorm: eps: expected at least 0, got %g", (double)p->rmsnorm.eps);
        KL_REQUIRE(p->rmsnorm.x_dtype == KL_F32 || p->rmsnorm.y_dtype == p->rmsnorm.x_dtype, "rmsnorm: y_dtype: expected bfloat16 beside bfloat16 x, got %s",
                   kl_dtype_name(p->rmsnorm.y_dtype));
        return kl_ok();
    case LAYERS_EMBED:
        KL_REQUIRE(p->embed.T <= INT32_MAX && p->embed.vocab < INT32_MAX, "embed: T and vocab: expected below 2^31, got %lld and %lld",
                   (long long)p->embed.T, (long long)p->embed.vocab);
        return at_least(op, "vocab", p->embed.vocab, 1);
    case LAYERS_HEAD_LOSS:
        KL_REQUIRE(p->head_loss.vocab < INT32_MAX, "head_loss: vocab: expected below 2^31, got %lld", (long long)p->head_loss.vocab);
        return at_least(op, "vocab", p->head_loss.vocab, 1);
    case LAYERS_ADAMW:
        KL_TRY(at_least(op, "step", p->adamw.step, 1));
        KL_TRY(fraction(op, "beta1", p->adamw.beta1));
        KL_TRY(fraction(op, "beta2", p->adamw.beta2));
        KL_REQUIRE(p->adamw.eps > 0.0, "adamw: eps: expected above 0, got %g", p->adamw.eps);
        return kl_ok();
    case LAYERS_MUON:
        KL_TRY(at_least(op, "steps", p->muon.steps, 0));
        KL_TRY(at_least(op, "count", p->muon.count, 0));
        KL_REQUIRE(p->muon.count < 1 << 16 && p->muon.rows < INT32_MAX && p->muon.columns < INT32_MAX, "muon: expected fewer than 65536 matrices of sides below 2^31, got %lld of [%lld,%lld]",
                   (long long)p->muon.count, (long long)p->muon.rows, (long long)p->muon.columns);
        return fraction(op, "momentum", p->muon.momentum);
    default: return kl_ok();
    }
}

static kl_status check_tensor(const layers_problem *p, const layers_tensor *t, kl_pass pass)
{
    const char *op = layers_name(p->op);
    bool overflow = false, number = t->dtype == KL_I32 || t->dtype == KL_F64;
    KL_REQUIRE(t->rows >= 0 && t->columns >= 0, "%s: %s: expected sizes of at least 0, got [%lld,%lld]", op, t->name, (long long)t->rows, (long long)t->columns);
    KL_REQUIRE(number || t->dtype == KL_F32 || t->dtype == KL_BF16, "%s: %s: expected float32 or bfloat16, got %s", op, t->name, kl_dtype_name(t->dtype));
    KL_REQUIRE(t->stride >= t->columns, "%s: %s: expected a stride of 0 or at least %lld, got %lld", op, t->name, (long long)t->columns, (long long)t->stride);
    size_t bytes = kl_mul(kl_mul((size_t)t->rows, (size_t)t->stride, &overflow), 8, &overflow);
    KL_REQUIRE(!overflow && bytes < SIZE_MAX / 8, "%s: %s: [%lld,%lld] does not fit size_t", op, t->name, (long long)t->rows, (long long)t->columns);
    const void *data = *(void *const *)t->field;
    if (pass < t->first || pass > t->last || t->rows * t->columns == 0 || t->optional)
        return kl_ok();
    KL_REQUIRE(data, "%s: %s: expected [%lld,%lld], got NULL", op, t->name, (long long)t->rows, (long long)t->columns);
    return kl_ok();
}

kl_status layers_validate(const kl_ctx *ctx, const layers_problem *p, const layers_grads *g)
{
    KL_REQUIRE(ctx, "layers: ctx: expected a context, got NULL");
    KL_REQUIRE(p, "layers: problem: expected one, got NULL");
    KL_REQUIRE((unsigned)p->op < LAYERS_OPS, "layers: op: expected 0 to %d, got %d", LAYERS_OPS - 1, (int)p->op);
    layers_tensor list[LAYERS_TENSORS];
    int count = layers_tensors((layers_problem *)p, (layers_grads *)g, list);
    KL_TRY(check_options(p));
    for (int i = 0; i < count; i++)
        KL_TRY(check_tensor(p, &list[i], g ? KL_BACKWARD : KL_FORWARD));
    return kl_ok();
}
