/* The table of the layers' variants, and what each needs. */
#include "harness/layers.h"

#include <string.h>

#include "common/gpu.h"
#include "harness/cpu/layers_cpu.h"
#include "harness/cuda/ops_cuda.h"

static const char *const names[LAYERS_OPS] = {"rmsnorm", "embed", "swiglu", "linear", "mlp", "head_loss", "adamw", "muon", "sumsq"};

const char *layers_name(layers_op op) { return (unsigned)op < LAYERS_OPS ? names[op] : "unknown"; }
bool layers_has_backward(layers_op op) { return op <= LAYERS_HEAD_LOSS; }

/* ---- what they cost ---- */

static double size(kl_dtype type) { return (double)kl_dtype_size(type); }

/* Rows that are met at most once each. */
static double rows_met(double tokens, double rows) { return tokens < rows ? tokens : rows; }

static double least_bytes(const layers_problem *p, kl_pass pass)
{
    bool back = pass == KL_BACKWARD;
    switch (p->op) {
    case LAYERS_RMSNORM: {
        const layers_rmsnorm *n = &p->rmsnorm;
        double x = (double)(n->T * n->D) * size(n->x_dtype), y = (double)(n->T * n->D) * size(n->y_dtype);
        return back ? (n->add ? 3.0 : 2.0) * x + y : (n->add ? 3.0 : 1.0) * x + y;
    }
    case LAYERS_EMBED: {
        const layers_embed *e = &p->embed;
        double T = (double)e->T, D = (double)e->D, met = rows_met(T, (double)e->vocab);
        return back ? T * D * size(e->dtype) + 8.0 * met * D : T * D * size(e->dtype) + met * D * size(e->weight_dtype);
    }
    case LAYERS_SWIGLU: return (back ? 5.0 + (p->swiglu.y != NULL) : 3.0) * (double)(p->swiglu.T * p->swiglu.I) * size(p->swiglu.dtype);
    case LAYERS_LINEAR: {
        const layers_linear *l = &p->linear;
        double x = (double)(l->T * l->K) * size(l->x_dtype), y = (double)(l->T * l->N) * size(l->y_dtype), w = (double)(l->N * l->K);
        return back ? 2.0 * x + y + w * (size(l->weight_dtype) + 8.0) : x + y + w * size(l->weight_dtype);
    }
    case LAYERS_MLP: {
        const layers_mlp *m = &p->mlp;
        double x = (double)(m->T * m->D) * size(m->dtype), h = 2.0 * (double)(m->T * m->I) * size(m->dtype), w = 3.0 * (double)(m->I * m->D);
        return back ? 3.0 * x + h + w * (size(m->weight_dtype) + 8.0) : 2.0 * x + h + w * size(m->weight_dtype);
    }
    case LAYERS_HEAD_LOSS: {
        const layers_head_loss *h = &p->head_loss;
        double x = (double)(h->T * h->D) * size(h->x_dtype), w = (double)(h->vocab * h->D);
        return back ? 2.0 * x + w * (size(h->weight_dtype) + 8.0) : x + w * size(h->weight_dtype);
    }
    case LAYERS_ADAMW: return (double)p->adamw.n * (24.0 + size(p->adamw.g_dtype) + (p->adamw.copy ? 2.0 : 0.0));
    case LAYERS_MUON: return (double)(p->muon.count ? p->muon.count : 1) * (double)(p->muon.rows * p->muon.columns) * (16.0 + size(p->muon.g_dtype) + (p->muon.copy ? 2.0 : 0.0));
    case LAYERS_SUMSQ: return (double)p->sumsq.n * size(p->sumsq.dtype);
    default: return 0.0;
    }
}

/* Of products alone. A backward pass that computes the forward one anew is not credited with it, but for the loss, whose
 * backward pass is both. */
static double flops(const layers_problem *p, kl_pass pass)
{
    switch (p->op) {
    case LAYERS_LINEAR: return (pass == KL_BACKWARD ? 4.0 : 2.0) * (double)p->linear.T * (double)p->linear.N * (double)p->linear.K;
    case LAYERS_MLP: return (pass == KL_BACKWARD ? 12.0 : 6.0) * (double)p->mlp.T * (double)p->mlp.D * (double)p->mlp.I;
    case LAYERS_HEAD_LOSS:
        return (pass == KL_BACKWARD ? 6.0 : 2.0) * (double)p->head_loss.T * (double)p->head_loss.D * (double)p->head_loss.vocab;
    case LAYERS_MUON: {
        double m = (double)p->muon.rows, n = (double)p->muon.columns, side = m < n ? m : n, count = p->muon.count ? (double)p->muon.count : 1.0;
        return count * (p->muon.steps ? p->muon.steps : LAYERS_MUON_STEPS) * (4.0 * side * m * n + 2.0 * side * side * side);
    }
    default: return 0.0;
    }
}

static kl_cost cost(const void *problem, kl_pass pass) { return (kl_cost){flops(problem, pass), least_bytes(problem, pass)}; }

/* ---- the rows ---- */

static kl_status check(const void *problem, kl_pass pass)
{
    const layers_problem *p = problem;
    if (pass == KL_BACKWARD && !layers_has_backward(p->op))
        return kl_error(KL_EUNSUPPORTED, "layers: pass: %s has no backward pass", layers_name(p->op));
    return kl_ok();
}

#ifdef KL_HAVE_CUDA
static size_t workspace_cuda(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    const layers_problem *p = problem;
    switch (p->op) {
    case LAYERS_RMSNORM: return cuda_rmsnorm_workspace(&p->rmsnorm, pass);
    case LAYERS_EMBED: return cuda_embed_workspace(ctx, &p->embed, pass);
    case LAYERS_LINEAR: return cuda_linear_workspace(&p->linear, pass);
    case LAYERS_MLP: return cuda_mlp_workspace(&p->mlp, pass);
    case LAYERS_HEAD_LOSS: return cuda_head_loss_workspace(&p->head_loss, pass);
    case LAYERS_MUON: return cuda_muon_workspace(&p->muon);
    case LAYERS_SUMSQ: return cuda_sumsq_workspace(&p->sumsq);
    default: return 0;
    }
}

static kl_status enough(const kl_ctx *ctx, const layers_problem *p, kl_pass pass, const void *workspace, size_t bytes)
{
    size_t need = workspace_cuda(ctx, p, pass);
    KL_REQUIRE(need == 0 || (workspace && bytes >= need), "%s: workspace: expected %zu bytes, got %zu", layers_name(p->op), need,
               workspace ? bytes : (size_t)0);
    return kl_ok();
}

static kl_status run_forward(kl_ctx *ctx, const layers_problem *p, void *workspace, size_t bytes)
{
    switch (p->op) {
    case LAYERS_RMSNORM: return cuda_rmsnorm(ctx, &p->rmsnorm);
    case LAYERS_EMBED: return cuda_embed(ctx, &p->embed);
    case LAYERS_SWIGLU: return cuda_swiglu(ctx, &p->swiglu);
    case LAYERS_LINEAR: return cuda_linear(ctx, &p->linear, workspace, bytes);
    case LAYERS_MLP: return cuda_mlp(ctx, &p->mlp, workspace, bytes);
    case LAYERS_HEAD_LOSS: return cuda_head_loss(ctx, &p->head_loss, NULL, workspace, bytes);
    case LAYERS_ADAMW: return cuda_adamw(ctx, &p->adamw);
    case LAYERS_MUON: return cuda_muon(ctx, &p->muon, workspace, bytes);
    default: return cuda_sumsq(ctx, &p->sumsq, workspace, bytes);
    }
}

static kl_status run_backward(kl_ctx *ctx, const layers_problem *p, const layers_grads *g, void *workspace, size_t bytes)
{
    switch (p->op) {
    case LAYERS_RMSNORM: return cuda_rmsnorm_backward(ctx, &p->rmsnorm, &g->rmsnorm, workspace, bytes);
    case LAYERS_EMBED: return cuda_embed_backward(ctx, &p->embed, &g->embed, workspace, bytes);
    case LAYERS_SWIGLU: return cuda_swiglu_backward(ctx, &p->swiglu, &g->swiglu);
    case LAYERS_LINEAR: return cuda_linear_backward(ctx, &p->linear, &g->linear, workspace, bytes);
    case LAYERS_MLP: return cuda_mlp_backward(ctx, &p->mlp, &g->mlp, workspace, bytes);
    default: return cuda_head_loss(ctx, &p->head_loss, &g->head_loss, workspace, bytes);
    }
}

static kl_status forward_cuda(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const layers_problem *p = problem;
    KL_TRY(layers_validate(ctx, p, NULL));
    KL_TRY(enough(ctx, p, KL_FORWARD, workspace, bytes));
    kl_gpu_range_push(layers_name(p->op));
    kl_status s = run_forward(ctx, p, workspace, bytes);
    kl_gpu_range_pop();
    return s;
}

static kl_status backward_cuda(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes)
{
    static const char *const ranges[] = {"rmsnorm backward", "embed backward", "swiglu backward", "linear backward", "mlp backward", "head_loss backward"};
    const layers_problem *p = problem;
    KL_TRY(layers_validate(ctx, p, grads));
    KL_TRY(check(p, KL_BACKWARD));
    KL_TRY(enough(ctx, p, KL_BACKWARD, workspace, bytes));
    kl_gpu_range_push(ranges[p->op]);
    kl_status s = run_backward(ctx, p, grads, workspace, bytes);
    kl_gpu_range_pop();
    return s;
}
#define CUDA_ROW(name, backward, summary) {"layers", name, KL_CUDA, summary, check, workspace_cuda, forward_cuda, backward, cost}
#endif
#define CPU_ROW(name, backward, summary) {"layers", name, KL_CPU, summary, check, layers_cpu_workspace, layers_cpu_forward, backward, cost}

static const kl_variant table[] = {
    CPU_ROW("rmsnorm", layers_cpu_backward, "norm of rows"),
    CPU_ROW("embed", layers_cpu_backward, "rows gathered"),
    CPU_ROW("linear", layers_cpu_backward, "projection by BLAS"),
    CPU_ROW("head_loss", layers_cpu_backward, "projection and cross-entropy in tiles of tokens"),
    CPU_ROW("adamw", NULL, "a step of AdamW"),
    CPU_ROW("sumsq", NULL, "sum of squares"),
#ifdef KL_HAVE_CUDA
    CUDA_ROW("rmsnorm", backward_cuda, "residual sum and norm of rows, a warp a row"),
    CUDA_ROW("embed", backward_cuda, "rows gathered; gradients in the order of sorted tokens"),
    CUDA_ROW("swiglu", backward_cuda, "gated unit"),
    CUDA_ROW("linear", backward_cuda, "projection by cuBLASLt"),
    CUDA_ROW("mlp", backward_cuda, "gated MLP, gate and up in one product"),
    CUDA_ROW("head_loss", backward_cuda, "projection and cross-entropy in tiles of tokens"),
    CUDA_ROW("adamw", NULL, "a step of AdamW on float masters"),
    CUDA_ROW("muon", NULL, "a step of Muon, products by cuBLASLt"),
    CUDA_ROW("sumsq", NULL, "sum of squares in fixed shares"),
#endif
};

const kl_variant *layers_variants(int *count)
{
    *count = (int)(sizeof table / sizeof *table);
    return table;
}

const kl_variant *layers_pick(kl_device device, layers_op op)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].device == device && strcmp(table[i].name, layers_name(op)) == 0)
            return &table[i];
    return NULL;
}
