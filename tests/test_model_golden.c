/* The whole model against golden data: logits and hidden states, every gradient, greedy generation with and without a cache. */
#include "tests/model_support.h"

#include <math.h>

#include "harness/generate.h"
#include "harness/safetensors.h"

typedef struct golden {
    kl_ctx *ctx;
    kl_model *m;
    kl_tensors *expected;
    int32_t ids[150], targets[150];
} golden;

static const int64_t GOLDEN_CU[] = {0, 75, 150};

static const kl_tensor *expect(const golden *g, const char *name)
{
    const kl_tensor *t = kl_tensors_find(g->expected, name);
    if (!t)
        fail_msg("golden data: no tensor %s", name);
    return t;
}

static float *expect_floats(const golden *g, const char *name)
{
    const kl_tensor *t = expect(g, name);
    float *x = floats((size_t)kl_tensor_count(t));
    kl_to_f32(x, t->data, t->dtype, (size_t)kl_tensor_count(t));
    return x;
}

static golden open_golden(const char *name)
{
    golden g = {.ctx = make_ctx(1)};
    char dir[256], path[512];
    snprintf(dir, sizeof dir, "tests/golden/models/%s", name);
    snprintf(path, sizeof path, "%s/expected.safetensors", dir);
    assert_ok(kl_model_open(&g.m, g.ctx, dir));
    assert_ok(kl_tensors_open(&g.expected, path));
    int64_t ids[150];
    memcpy(ids, expect(&g, "input_ids")->data, sizeof ids);
    for (int t = 0; t < 150; t++) {
        g.ids[t] = (int32_t)ids[t];
        g.targets[t] = t % 75 == 74 ? -1 : (int32_t)ids[t + 1];
    }
    return g;
}

static void close_golden(golden *g)
{
    kl_tensors_close(g->expected);
    kl_model_close(g->m);
    kl_ctx_destroy(g->ctx);
}

static void check_forward(const char *name)
{
    golden g = open_golden(name);
    int64_t L = g.m->config.num_layers, D = g.m->config.hidden_size, vocab = g.m->config.vocab_size;
    float *hidden[KL_MAX_LAYERS], *logits = floats((size_t)(150 * vocab));
    for (int64_t l = 0; l <= L; l++)
        hidden[l] = floats((size_t)(150 * D));
    kl_batch batch = {.N = 2, .cu = GOLDEN_CU, .ids = g.ids};
    assert_ok(kl_model_forward(g.m, &batch, NULL, &(kl_outputs){.logits = logits, .hidden = hidden}));
    float *want = expect_floats(&g, "logits");
    WITHIN(kl_rel_err_f32(logits, want, (size_t)(150 * vocab)), kl_tol_model_f32.forward, "logits");
    free(want);
    for (int64_t l = 0; l <= L; l++) {
        char key[32];
        snprintf(key, sizeof key, "hidden.%d", (int)l);
        want = expect_floats(&g, key);
        WITHIN(kl_rel_err_f32(hidden[l], want, (size_t)(150 * D)), kl_tol_model_f32.forward, key);
        free(want);
        free(hidden[l]);
    }
    free(logits);
    close_golden(&g);
}

static void golden_tiny_forward(void **state) { (void)state, check_forward("tiny"); }
static void golden_d128_forward(void **state) { (void)state, check_forward("d128"); }

/* Where the golden data keep the gradient of a parameter: the tensor's name, and which of its rows. */
static int64_t golden_place(const kl_config *c, const kl_param_info *info, char *name, size_t size)
{
    static const char *const gates[] = {"A_log", "dt_bias", "f_a_proj.weight", "f_b_proj.weight"};
    int64_t P = c->kda_heads * c->kda_head_dim, I = c->moe_intermediate_size, E = info->expert;
    char head[64];
    snprintf(head, sizeof head, "grad.model.layers.%d.", info->layer);
    snprintf(name, size, "grad.%s", info->name);
    if (info->layer < 0)
        return 0;
    const char *last = strrchr(info->name, '.') - 1;
    while (*last != '.')
        last--;
    const char *part = last + 1; /* "q_conv1d.weight" */
    if (strstr(part, "_conv1d")) {
        snprintf(name, size, "%sself_attn.conv1d.weight", head);
        return *part == 'q' ? 0 : *part == 'k' ? P : 2 * P;
    }
    for (size_t i = 0; i < sizeof gates / sizeof *gates; i++) {
        size_t n = strlen(info->name), k = strlen(gates[i]);
        if (n > k && strcmp(info->name + n - k, gates[i]) == 0)
            snprintf(name, size, "%sself_attn.forget_gate.%s", head, gates[i]);
    }
    if (E >= 0) {
        bool down = part[1] == '2';
        snprintf(name, size, "%smlp.experts.%s", head, down ? "down_proj" : "gate_up_proj");
        return down ? E * c->hidden_size : E * 2 * I + (part[1] == '3' ? I : 0);
    }
    const char *moe = strstr(info->name, "block_sparse_moe.");
    if (moe)
        snprintf(name, size, "%smlp.%s", head, moe + strlen("block_sparse_moe."));
    return 0;
}

typedef struct gradient_check {
    const golden *g;
    double limit;
    int count;
} gradient_check;

static kl_status check_gradient(void *user, const kl_param_info *info, kl_param *p)
{
    gradient_check *check = user;
    if (!info->trained)
        return kl_ok();
    char name[256];
    int64_t row = golden_place(&check->g->m->config, info, name, sizeof name);
    const kl_tensor *t = expect(check->g, name);
    size_t n = (size_t)(p->rows * p->columns), from = (size_t)(row * p->columns);
    assert_true(from + n <= (size_t)kl_tensor_count(t));
    float *want = expect_floats(check->g, name);
    WITHIN(kl_rel_err_f32(p->data, want + from, n), check->limit, info->name);
    free(want);
    check->count++;
    return kl_ok();
}

static void check_gradients(const char *name, const kl_tolerance *tolerance)
{
    golden g = open_golden(name);
    kl_weights grads;
    assert_ok(kl_weights_zeros(&grads, &g.m->config));
    double loss, forward_only;
    int64_t counted;
    kl_batch batch = {.N = 2, .cu = GOLDEN_CU, .ids = g.ids};
    assert_ok(kl_model_loss(g.m, &batch, g.targets, &loss, &counted, &grads, 1.0f));
    assert_ok(kl_model_loss(g.m, &batch, g.targets, &forward_only, NULL, NULL, 1.0f));
    assert_int_equal(counted, 148);
    assert_true(loss == forward_only);
    float *want = expect_floats(&g, "loss");
    WITHIN(fabs(loss - (double)want[0]) / (double)want[0], kl_tol_model_f32.forward, "loss");
    free(want);
    gradient_check check = {.g = &g, .limit = tolerance->gradient};
    assert_ok(kl_weights_each(&g.m->config, &grads, check_gradient, &check));
    assert_true(check.count > 50);
    kl_weights_free(&grads);
    close_golden(&g);
}

static void golden_tiny_gradients(void **state) { (void)state, check_gradients("tiny", &kl_tol_model_f32); }
static void golden_d128_gradients(void **state) { (void)state, check_gradients("d128", &kl_tol_golden_bf16_grad); }

static int32_t argmax(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return (int32_t)best;
}

static void check_greedy(const char *name)
{
    golden g = open_golden(name);
    int64_t want[44], vocab = g.m->config.vocab_size;
    memcpy(want, expect(&g, "greedy_ids")->data, sizeof want);
    int32_t ids[44];
    for (int i = 0; i < 44; i++)
        ids[i] = (int32_t)want[i];

    /* without a cache, the whole sequence again for each token */
    int32_t grown[44];
    memcpy(grown, ids, 20 * sizeof *ids);
    float *logits = floats((size_t)vocab);
    for (int64_t n = 20; n < 44; n++) {
        int64_t cu[] = {0, n};
        assert_ok(kl_model_forward(g.m, &(kl_batch){.N = 1, .cu = cu, .ids = grown}, NULL, &(kl_outputs){.logits = logits, .last_only = true}));
        grown[n] = argmax(logits, vocab);
    }
    assert_memory_equal(grown, ids, sizeof ids);

    /* with a cache */
    kl_cache *cache;
    assert_ok(kl_cache_create(&cache, &g.m->config, 1, 64));
    int32_t found[24], *out = found;
    const int32_t *prompt = ids;
    int64_t count, length = 20;
    kl_generation o = {.max_new = 24, .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
    assert_ok(kl_generate(g.m, cache, 1, &prompt, &length, &o, &out, &count, NULL));
    assert_int_equal(count, 24);
    assert_memory_equal(found, ids + 20, sizeof found);
    kl_cache_destroy(cache);
    free(logits);
    close_golden(&g);
}

static void golden_tiny_greedy(void **state) { (void)state, check_greedy("tiny"); }
static void golden_d128_greedy(void **state) { (void)state, check_greedy("d128"); }

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_tiny_forward),
        cmocka_unit_test(golden_d128_forward),
        cmocka_unit_test(golden_tiny_gradients),
        cmocka_unit_test(golden_d128_gradients),
        cmocka_unit_test(golden_tiny_greedy),
        cmocka_unit_test(golden_d128_greedy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
