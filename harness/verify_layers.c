/* kl verify layers: every operation at sizes that end within cells, warps, runs and tiles, in the types that the device
 * offers. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/gpu.h"
#include "harness/layers_case.h"
#include "harness/verify.h"

enum { CASES = 64 };

typedef struct list {
    layers_spec spec[CASES];
    char name[CASES][96];
    int count;
    bool device;
} list;

static layers_spec *next(list *l, const char *sizes, kl_dtype a, kl_dtype b)
{
    layers_spec *s = &l->spec[l->count];
    *s = (layers_spec){.seed = (uint64_t)l->count + 1};
    snprintf(l->name[l->count++], sizeof l->name[0], "%s %s%s%s", sizes, a == KL_BF16 ? "bf16" : "f32", a == b ? "" : "/", a == b ? "" : b == KL_BF16 ? "bf16" : "f32");
    return s;
}

static const kl_dtype pairs[3][2] = {{KL_F32, KL_F32}, {KL_BF16, KL_BF16}, {KL_F32, KL_BF16}};

static void add_rmsnorm(list *l, int64_t T, int64_t D, int64_t gap, bool residual)
{
    for (int i = 0; i < (l->device ? 3 : 1); i++) {
        char sizes[64];
        snprintf(sizes, sizeof sizes, "rmsnorm T %lld D %lld%s%s", (long long)T, (long long)D, residual ? " sum" : "", gap ? " strided" : "");
        layers_spec *s = next(l, sizes, pairs[i][0], pairs[i][1]);
        s->p.op = LAYERS_RMSNORM;
        s->p.rmsnorm = (layers_rmsnorm){.T = T, .D = D, .eps = 1e-5f, .x_dtype = pairs[i][0], .y_dtype = pairs[i][1], .weight_dtype = pairs[i][1],
                                        .x_stride = gap ? D + gap : 0, .y_stride = gap ? D + gap : 0,
                                        .add = residual ? LAYERS_WANTED : NULL, .sum = residual ? LAYERS_WANTED : NULL};
        s->g.rmsnorm = (layers_rmsnorm_grads){.dsum = residual ? LAYERS_WANTED : NULL, .dx = LAYERS_WANTED, .dweight = LAYERS_WANTED};
        s->backward = true;
    }
}

static void add_embed(list *l, int64_t T, int64_t D, int64_t vocab)
{
    for (int i = 0; i < (l->device ? 3 : 1); i++) {
        char sizes[64];
        snprintf(sizes, sizeof sizes, "embed T %lld D %lld vocab %lld", (long long)T, (long long)D, (long long)vocab);
        layers_spec *s = next(l, sizes, pairs[i][0], pairs[i][1]);
        s->p.op = LAYERS_EMBED;
        s->p.embed = (layers_embed){.T = T, .D = D, .vocab = vocab, .dtype = pairs[i][1], .weight_dtype = pairs[i][0]};
        s->backward = true;
    }
}

static void add_swiglu(list *l, int64_t T, int64_t I, bool halves)
{
    for (int i = 0; l->device && i < 2; i++) {
        char sizes[64];
        snprintf(sizes, sizeof sizes, "swiglu T %lld I %lld%s", (long long)T, (long long)I, halves ? " strided" : "");
        layers_spec *s = next(l, sizes, pairs[i][0], pairs[i][1]);
        s->p.op = LAYERS_SWIGLU;
        s->p.swiglu = (layers_swiglu){.T = T, .I = I, .dtype = pairs[i][0], .in_stride = halves ? 2 * I : 0, .y = LAYERS_WANTED};
        s->backward = true;
    }
}

static void add_linear(list *l, int64_t T, int64_t N, int64_t K, bool accumulate)
{
    for (int i = 0; i < (l->device ? 3 : 1); i++) {
        char sizes[64];
        snprintf(sizes, sizeof sizes, "linear T %lld N %lld K %lld%s", (long long)T, (long long)N, (long long)K, accumulate ? " +=" : "");
        layers_spec *s = next(l, sizes, pairs[i][0], pairs[i][1]);
        s->p.op = LAYERS_LINEAR;
        s->p.linear = (layers_linear){.T = T, .N = N, .K = K, .x_dtype = pairs[i][0], .y_dtype = pairs[i][1], .weight_dtype = pairs[i][1], .accumulate = accumulate};
        s->g.linear = (layers_linear_grads){.dx = LAYERS_WANTED, .dweight = LAYERS_WANTED, .accumulate = accumulate};
        s->backward = true;
    }
}

static void add_mlp(list *l, int64_t T, int64_t D, int64_t I)
{
    for (int i = 0; l->device && i < 2; i++) {
        char sizes[64];
        snprintf(sizes, sizeof sizes, "mlp T %lld D %lld I %lld", (long long)T, (long long)D, (long long)I);
        layers_spec *s = next(l, sizes, pairs[i][0], pairs[i][0]);
        s->p.op = LAYERS_MLP;
        s->p.mlp = (layers_mlp){.T = T, .D = D, .I = I, .dtype = pairs[i][0], .weight_dtype = pairs[i][0]};
        s->g.mlp = (layers_mlp_grads){.dx = LAYERS_WANTED, .dgate_up = LAYERS_WANTED, .ddown = LAYERS_WANTED, .accumulate = i};
        s->backward = true;
    }
}

static void add_head_loss(list *l, int64_t T, int64_t D, int64_t vocab)
{
    for (int i = 0; i < (l->device ? 3 : 1); i++) {
        char sizes[64];
        snprintf(sizes, sizeof sizes, "head_loss T %lld D %lld vocab %lld", (long long)T, (long long)D, (long long)vocab);
        layers_spec *s = next(l, sizes, pairs[i][0], pairs[i][1]);
        s->p.op = LAYERS_HEAD_LOSS;
        s->p.head_loss = (layers_head_loss){.T = T, .D = D, .vocab = vocab, .x_dtype = pairs[i][0], .weight_dtype = pairs[i][1], .grad_scale = 0.125f,
                                            .loss = l->device ? LAYERS_WANTED : NULL, .sum = LAYERS_WANTED};
        s->g.head_loss = (layers_head_loss_grads){.dx = LAYERS_WANTED, .dweight = LAYERS_WANTED};
        s->backward = true;
    }
}

static void add_optimizers(list *l, int64_t rows, int64_t columns, bool clipped)
{
    for (int i = 0; i < (l->device ? 2 : 1); i++) {
        char sizes[64];
        snprintf(sizes, sizeof sizes, "adamw %lld%s", (long long)(rows * columns), clipped ? " clipped" : "");
        layers_spec *s = next(l, sizes, pairs[i][0], pairs[i][0]);
        s->p.op = LAYERS_ADAMW;
        s->p.adamw = (layers_adamw){.n = rows * columns, .step = 3, .lr = 0.1, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .clip = 1.0,
                                    .g_dtype = pairs[i][0], .sumsq = clipped ? LAYERS_WANTED : NULL, .copy = i ? LAYERS_WANTED : NULL};
        snprintf(sizes, sizeof sizes, "sumsq %lld", (long long)(rows * columns));
        s = next(l, sizes, pairs[i][0], pairs[i][0]);
        s->p.op = LAYERS_SUMSQ;
        s->p.sumsq = (layers_sumsq){.n = rows * columns, .dtype = pairs[i][0], .accumulate = clipped};
        if (!l->device)
            continue;
        snprintf(sizes, sizeof sizes, "muon [%lld,%lld]%s", (long long)rows, (long long)columns, clipped ? " clipped" : "");
        s = next(l, sizes, pairs[i][0], pairs[i][0]);
        s->p.op = LAYERS_MUON;
        s->p.muon = (layers_muon){.rows = rows, .columns = columns, .count = clipped ? 3 : 0, .lr = 1.0, .momentum = 0.95, .decay = 0.1, .clip = 1.0, .g_dtype = pairs[i][0],
                                  .sumsq = clipped ? LAYERS_WANTED : NULL, .copy = i ? LAYERS_WANTED : NULL};
    }
}

static void fill(list *l)
{
    add_rmsnorm(l, 37, 2304, 0, true);
    add_rmsnorm(l, 9, 512, 64, false);
    add_rmsnorm(l, 5, 2305, 0, true);
    add_embed(l, 100, 264, 50);
    add_embed(l, 33, 60, 7);
    add_swiglu(l, 5, 1024, true);
    add_swiglu(l, 3, 35, false);
    add_linear(l, 37, 48, 72, false);
    add_linear(l, 5, 33, 24, true);
    add_mlp(l, 21, 40, 56);
    add_head_loss(l, kl_gpu_emulated() ? 6 : 2100, 40, 333); /* more than one tile */
    add_optimizers(l, 48, 80, true);
    add_optimizers(l, 51, 23, false);
}

static void verify_pass(kl_verifier *v, layers_case *c, const kl_variant *variant, const char *name, kl_pass pass)
{
    kl_status s = layers_case_solve(c, pass);
    if (!kl_failed(s))
        s = layers_case_run(c, variant, pass);
    if (kl_failed(s)) {
        kl_verify_fact(v, name, variant->name, pass == KL_BACKWARD ? "gradients" : "outputs", false, s.message);
        return;
    }
    const kl_tolerance *limit = layers_case_tolerance(c);
    for (int i = 0; i < c->count; i++)
        if (layers_case_writes(&c->tensor[i], pass))
            kl_verify_row(v, &(kl_check){name, variant->name, c->tensor[i].is.name, layers_case_error(&c->tensor[i]), NAN,
                                         pass == KL_BACKWARD ? limit->gradient : limit->forward, NULL});
}

kl_status kl_verify_layers(kl_verifier *v)
{
    list l = {.device = v->ctx->device == KL_CUDA};
    fill(&l);
    for (int i = 0; i < l.count; i++) {
        const kl_variant *variant = layers_pick(v->ctx->device, l.spec[i].p.op);
        if (!variant || (v->only && strcmp(v->only, variant->name) != 0))
            continue;
        layers_case c;
        KL_TRY(layers_case_create(&c, v->ctx, &l.spec[i]));
        for (kl_pass pass = KL_FORWARD; pass <= (c.backward ? KL_BACKWARD : KL_FORWARD); pass++)
            verify_pass(v, &c, variant, l.name[i], pass);
        layers_case_free(&c);
    }
    return kl_ok();
}
