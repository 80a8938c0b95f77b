/* Every variant of the model against the naive reference in double: logits, hidden states, loss and every gradient. */
#include "tests/model_support.h"

#include <math.h>

#include "reference/model.h"

enum { B = 2, T = 37 };

static const char *const VARIANTS[][4] = {
    {"hybrid=3:1"},
    {"hybrid=0:1"},
    {"hybrid=1:1", "rope=1"},
    {"hybrid=n:0"},
    {"gate=block:8"},
    {"gate=head"},
    {"gate=none"},
    {"gate_kind=bounded:-5"},
    {"gate_kind=bounded:-2", "gate=head"},
    {"beta=sigmoid2"},
    {"output_gate=swish"},
    {"output_gate=none"},
    {"conv=0"},
    {"conv=2"},
    {"biased_weights=1", "top_k=3"},
};

static ref_config reference_config(const kl_config *c)
{
    static const ref_gate_kind gates[] = {[KDA_GATE_LOG] = REF_GATE_LOG, [KDA_GATE_SOFTPLUS] = REF_GATE_SOFTPLUS, [KDA_GATE_BOUNDED] = REF_GATE_BOUNDED};
    static const ref_beta_kind betas[] = {[KDA_BETA_PLAIN] = REF_BETA_PLAIN, [KDA_BETA_SIGMOID] = REF_BETA_SIGMOID, [KDA_BETA_SIGMOID2] = REF_BETA_TWICE_SIGMOID};
    static const ref_output_gate outs[] = {[KDA_OUT_SIGMOID] = REF_OUTPUT_GATE_SIGMOID, [KDA_OUT_SWISH] = REF_OUTPUT_GATE_SWISH, [KDA_OUT_NONE] = REF_OUTPUT_GATE_NONE};
    return (ref_config){
        .vocab = c->vocab_size, .D = c->hidden_size, .L = c->num_layers, .mixer = c->mixer, .sparse = c->sparse,
        .norm_eps = (double)c->rms_norm_eps, .tied = c->tie_word_embeddings,
        .kda_heads = c->kda_heads, .kda_head_dim = c->kda_head_dim, .G = c->gate_values, .conv_width = c->conv_width,
        .gate = c->gate_values ? gates[c->gate] : REF_GATE_LOG, .lower_bound = (double)c->gate_lower_bound, .beta_kind = betas[c->beta_kind],
        .output_gate = outs[c->output_gate],
        .heads = c->num_heads, .R = c->kv_lora_rank, .Dn = c->qk_nope_head_dim, .Dr = c->qk_rope_head_dim, .Dv = c->v_head_dim,
        .rope = !c->mla_use_nope, .rope_theta = (double)c->rope_theta, .kv_a_eps = (double)c->kv_a_norm_eps,
        .I_dense = c->intermediate_size, .E = c->num_experts, .top_k = c->top_k, .I = c->moe_intermediate_size,
        .Is = c->num_shared_experts * c->moe_intermediate_size, .n_group = c->n_group, .topk_group = c->topk_group,
        .router = c->router_kind == MOE_SOFTMAX ? REF_ROUTER_SOFTMAX : REF_ROUTER_SIGMOID, .renormalize = c->moe_renormalize,
        .biased_weights = c->moe_biased_weights, .scaling = (double)c->routed_scaling_factor,
    };
}

/* ---- parameters of both by name ---- */

typedef struct named {
    const char *name;
    kl_param *param;
} named;

static kl_status take_named(void *user, const kl_param_info *info, kl_param *param)
{
    named *n = user;
    if (strcmp(n->name, info->name) == 0)
        n->param = param;
    return kl_ok();
}

typedef struct pairing {
    const kl_config *c;
    kl_weights *w;
    bool compare;   /* false: copy into the reference */
    int count;
} pairing;

static int pair(void *user, const char *name, int64_t rows, int64_t columns, real **param)
{
    pairing *p = user;
    named found = {.name = name};
    assert_ok(kl_weights_each(p->c, p->w, take_named, &found));
    if (!found.param)
        fail_msg("%s: the model has none", name);
    assert_int_equal(rows * columns, found.param->rows * found.param->columns);
    const float *x = found.param->data;
    if (p->compare && !strstr(name, "e_score_correction_bias"))
        WITHIN(kl_rel_err(x, *param, (size_t)(rows * columns)), kl_tol_model_f32.gradient, name);
    for (int64_t i = 0; i < rows * columns && !p->compare; i++)
        (*param)[i] = (double)x[i];
    p->count++;
    return 0;
}

static kl_status count_one(void *user, const kl_param_info *info, kl_param *param)
{
    (void)info;
    (void)param;
    ++*(int *)user;
    return kl_ok();
}

static void check_variant(kl_ctx *ctx, const char *const *changes)
{
    kl_config c = small_config((const char *[]){"layers=4", NULL});
    for (; *changes; changes++)
        assert_ok(kl_config_set(&c, *changes));
    kl_model *m = random_model(ctx, &c, 51);
    int64_t cu[] = {0, T, 2 * T}, wide[B * T], wide_targets[B * T], vocab = c.vocab_size, D = c.hidden_size, L = c.num_layers;
    int32_t *ids = random_ids(52, B * T, vocab), *targets = random_ids(53, B * T, vocab);
    targets[5] = targets[T] = -1;
    for (int t = 0; t < B * T; t++)
        wide[t] = ids[t], wide_targets[t] = targets[t];

    ref_config rc = reference_config(&c);
    ref_weights rw, rg;
    assert_int_equal(ref_weights_new(&rc, &rw), 0);
    assert_int_equal(ref_weights_new(&rc, &rg), 0);
    pairing copy = {.c = &c, .w = &m->weights};
    int parameters = 0;
    assert_int_equal(ref_weights_each(&rc, &rw, pair, &copy), 0);
    assert_ok(kl_weights_each(&c, &m->weights, count_one, &parameters));
    assert_int_equal(copy.count, parameters);

    ref_batch rb = {.B = B, .T = T, .ids = wide, .targets = wide_targets};
    real *want_logits = ref_zeros(B * T * vocab), *want_hidden = ref_zeros((L + 1) * B * T * D), want_loss;
    ref_outputs want = {.logits = want_logits, .hidden = want_hidden};
    assert_int_equal(ref_model_forward(&rc, &rw, &rb, &want), 0);
    assert_int_equal(ref_model_backward(&rc, &rw, &rb, &want_loss, &rg), 0);

    float *logits = floats((size_t)(B * T * vocab)), *hidden[KL_MAX_LAYERS + 1];
    for (int64_t l = 0; l <= L; l++)
        hidden[l] = floats((size_t)(B * T * D));
    kl_batch batch = {.N = B, .cu = cu, .ids = ids};
    assert_ok(kl_model_forward(m, &batch, NULL, &(kl_outputs){.logits = logits, .hidden = hidden}));
    WITHIN(kl_rel_err(logits, want_logits, (size_t)(B * T * vocab)), kl_tol_model_f32.forward, "logits");
    for (int64_t l = 0; l <= L; l++) {
        WITHIN(kl_rel_err(hidden[l], want_hidden + l * B * T * D, (size_t)(B * T * D)), kl_tol_model_f32.forward, "hidden state");
        free(hidden[l]);
    }
    kl_weights grads;
    assert_ok(kl_weights_zeros(&grads, &c));
    double loss;
    assert_ok(kl_model_loss(m, &batch, targets, &loss, NULL, &grads, 1.0f));
    WITHIN(fabs(loss - want_loss) / want_loss, kl_tol_model_f32.forward, "loss");
    pairing compare = {.c = &c, .w = &grads, .compare = true};
    assert_int_equal(ref_weights_each(&rc, &rg, pair, &compare), 0);

    kl_weights_free(&grads);
    free(want_logits);
    free(want_hidden);
    free(logits);
    free(ids);
    free(targets);
    ref_weights_free(&rc, &rw);
    ref_weights_free(&rc, &rg);
    kl_model_close(m);
}

static void variants_equal_the_reference(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    for (size_t i = 0; i < sizeof VARIANTS / sizeof *VARIANTS; i++) {
        print_message("  %s %s\n", VARIANTS[i][0], VARIANTS[i][1] ? VARIANTS[i][1] : "");
        check_variant(ctx, VARIANTS[i]);
    }
    kl_ctx_destroy(ctx);
}

/* The same with the head tied to the embedding: its gradient is the sum of both uses. */
static void tied_embeddings_equal_the_reference(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    check_variant(ctx, (const char *[]){"tied=1", NULL});
    kl_ctx_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(variants_equal_the_reference),
        cmocka_unit_test(tied_embeddings_equal_the_reference),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
