/* The gated MLP: gate and up in one product, the unit, and the product down. Backward makes the unit anew from gate and up,
 * which the forward pass left in `hidden`. */
#include "harness/cuda/cells.cuh"

namespace {

struct pieces {
    void *unit, *dunit, *dhidden; /* [T,I], [T,I], [T,2I] */
    char *linear;
    size_t linear_bytes;
};

size_t size_of(const layers_mlp *p) { return kl_dtype_size(p->dtype); }

/* hidden = x gate_up^T */
layers_linear first_of(const layers_mlp *p)
{
    layers_linear l = {};
    l.T = p->T, l.N = 2 * p->I, l.K = p->D;
    l.x_dtype = l.y_dtype = p->dtype, l.weight_dtype = p->weight_dtype;
    l.x = p->x, l.weight = p->gate_up, l.y = p->hidden;
    return l;
}
/* y = unit down^T */
layers_linear second_of(const layers_mlp *p, const void *unit)
{
    layers_linear l = {};
    l.T = p->T, l.N = p->D, l.K = p->I;
    l.x_dtype = l.y_dtype = p->dtype, l.weight_dtype = p->weight_dtype;
    l.x = unit, l.weight = p->down, l.y = p->y;
    return l;
}
layers_swiglu unit_of(const layers_mlp *p, void *unit)
{
    layers_swiglu s = {};
    s.T = p->T, s.I = p->I, s.dtype = p->dtype, s.in_stride = 2 * p->I;
    s.gate = p->hidden, s.up = (const char *)p->hidden + (size_t)p->I * size_of(p);
    s.y = unit;
    return s;
}

pieces carve(kl_arena *arena, const layers_mlp *p, kl_pass pass)
{
    pieces m = {};
    layers_linear first = first_of(p), second = second_of(p, NULL);
    size_t a = cuda_linear_workspace(&first, pass), b = cuda_linear_workspace(&second, pass);
    m.unit = kl_arena_take(arena, (size_t)(p->T * p->I), size_of(p));
    if (pass == KL_BACKWARD) {
        m.dunit = kl_arena_take(arena, (size_t)(p->T * p->I), size_of(p));
        m.dhidden = kl_arena_take(arena, (size_t)(p->T * 2 * p->I), size_of(p));
    }
    m.linear_bytes = a > b ? a : b;
    m.linear = KL_TAKE(arena, char, m.linear_bytes);
    return m;
}

} // namespace

size_t cuda_mlp_workspace(const layers_mlp *p, kl_pass pass)
{
    kl_arena arena = kl_arena_count();
    carve(&arena, p, pass);
    return arena.used;
}

kl_status cuda_mlp(kl_ctx *ctx, const layers_mlp *p, void *workspace, size_t bytes)
{
    kl_arena arena = kl_arena_over(workspace, bytes);
    pieces m = carve(&arena, p, KL_FORWARD);
    layers_linear first = first_of(p), second = second_of(p, m.unit);
    layers_swiglu unit = unit_of(p, m.unit);
    KL_TRY(cuda_linear(ctx, &first, m.linear, m.linear_bytes));
    KL_TRY(cuda_swiglu(ctx, &unit));
    return cuda_linear(ctx, &second, m.linear, m.linear_bytes);
}

kl_status cuda_mlp_backward(kl_ctx *ctx, const layers_mlp *p, const layers_mlp_grads *g, void *workspace, size_t bytes)
{
    kl_arena arena = kl_arena_over(workspace, bytes);
    pieces m = carve(&arena, p, KL_BACKWARD);
    layers_linear first = first_of(p), second = second_of(p, m.unit);
    layers_swiglu unit = unit_of(p, m.unit);
    layers_linear_grads dfirst = {m.dhidden, g->dx, g->dgate_up, g->accumulate}, dunit = {g->dy, m.dunit, NULL, false}, ddown = {g->dy, NULL, g->ddown, false};
    layers_swiglu_grads dhidden = {m.dunit, m.dhidden, (char *)m.dhidden + (size_t)p->I * size_of(p)};
    KL_TRY(cuda_linear_backward(ctx, &second, &dunit, m.linear, m.linear_bytes));
    KL_TRY(cuda_swiglu_backward(ctx, &unit, &dhidden));
    if (g->ddown)
        KL_TRY(cuda_linear_backward(ctx, &second, &ddown, m.linear, m.linear_bytes));
    return cuda_linear_backward(ctx, &first, &dfirst, m.linear, m.linear_bytes);
}
