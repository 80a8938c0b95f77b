/* The whole reference model: golden checkpoints (logits, every hidden state, loss, every gradient, greedy choices), finite differences
 * over every parameter of every variant, and independence of rows and of later tokens. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "reference/model.h"
#include "tests/fd.h"
#include "tests/golden.h"

/* ---- golden checkpoints ---- */

/* Largest distances ||x - golden|| / ||golden||. The golden values were computed in float32, and d128's gradients then rounded to bf16,
 * which moves an element by up to 2^-8 of itself: what remains against a reference in double is their rounding. */
typedef struct {
    const char *name;
    double forward, loss, gradient;
} golden_limits;

static const golden_limits TINY = { "tiny", 1e-5, 1e-6, 5e-5 };
static const golden_limits D128 = { "d128", 1e-5, 1e-6, 4e-3 };

typedef struct {
    unsigned char mixer[16], sparse[16]; /* what config points to */
    ref_config config;
    ref_weights weights, grads;
    golden model, expected;
} checkpoint;

static double number(const cJSON *json, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, key);
    if (!cJSON_IsNumber(item))
        fail_msg("config.json: %s is not a number", key);
    return item->valuedouble;
}

static void read_config(const char *path, checkpoint *m)
{
    cJSON *json = golden_json(path), *linear = cJSON_GetObjectItemCaseSensitive(json, "linear_attn_config"), *layer;
    m->config = (ref_config){
        .vocab = (int64_t)number(json, "vocab_size"), .D = (int64_t)number(json, "hidden_size"), .L = (int64_t)number(json, "num_hidden_layers"),
        .mixer = m->mixer, .sparse = m->sparse, .norm_eps = number(json, "rms_norm_eps"),
        .kda_heads = (int64_t)number(linear, "num_heads"), .kda_head_dim = (int64_t)number(linear, "head_dim"),
        .G = (int64_t)number(linear, "head_dim"), .conv_width = (int64_t)number(linear, "short_conv_kernel_size"),
        .gate = REF_GATE_SOFTPLUS, .beta_kind = REF_BETA_SIGMOID, .output_gate = REF_OUTPUT_GATE_SIGMOID,
        .heads = (int64_t)number(json, "num_attention_heads"), .R = (int64_t)number(json, "kv_lora_rank"),
        .Dn = (int64_t)number(json, "qk_nope_head_dim"), .Dr = (int64_t)number(json, "qk_rope_head_dim"),
        .Dv = (int64_t)number(json, "v_head_dim"), .kv_a_eps = 1e-6,
        .I_dense = (int64_t)number(json, "intermediate_size"), .E = (int64_t)number(json, "num_experts"),
        .top_k = (int64_t)number(json, "num_experts_per_token"), .I = (int64_t)number(json, "moe_intermediate_size"),
        .Is = (int64_t)(number(json, "num_shared_experts") * number(json, "moe_intermediate_size")),
        .n_group = (int64_t)number(json, "num_expert_group"), .topk_group = (int64_t)number(json, "topk_group"),
        .router = REF_ROUTER_SIGMOID, .renormalize = 1, .scaling = number(json, "routed_scaling_factor"),
    };
    assert_true(m->config.L <= 16);
    for (int64_t l = 0; l < m->config.L; l++)
        m->sparse[l] = l > 0;
    cJSON_ArrayForEach(layer, cJSON_GetObjectItemCaseSensitive(linear, "full_attn_layers"))
        m->mixer[(int)layer->valuedouble - 1] = REF_MIX_MLA; /* the lists count from 1 */
    cJSON_Delete(json);
}

/* name with the first `from` in it replaced by `to`; unchanged when there is none */
static void replace(char *name, size_t size, const char *from, const char *to)
{
    char *at = strstr(name, from), rest[160];
    if (!at)
        return;
    snprintf(rest, sizeof rest, "%s", at + strlen(from));
    snprintf(at, size - (size_t)(at - name), "%s%s", to, rest);
}

static int load_parameter(void *user, const char *name, int64_t rows, int64_t columns, real **param)
{
    golden *file = user;
    char stored[160];
    snprintf(stored, sizeof stored, "%s", name);
    if (!golden_has(file, stored))
        replace(stored, sizeof stored, ".mlp.", ".block_sparse_moe."); /* the dense layer of this checkpoint */
    golden_tensor t = golden_find(file, stored);
    assert_int_equal(t.count, rows * columns);
    for (int64_t i = 0; i < t.count; i++)
        (*param)[i] = golden_at(&t, i);
    return 0;
}

static void open_checkpoint(const char *name, checkpoint *m)
{
    char path[128];
    snprintf(path, sizeof path, "tests/golden/models/%s/config.json", name);
    memset(m, 0, sizeof *m);
    read_config(path, m);
    snprintf(path, sizeof path, "tests/golden/models/%s/model.safetensors", name);
    m->model = golden_open(path);
    snprintf(path, sizeof path, "tests/golden/models/%s/expected.safetensors", name);
    m->expected = golden_open(path);
    m->model.path = m->expected.path = name;
    assert_int_equal(ref_weights_new(&m->config, &m->weights), 0);
    assert_int_equal(ref_weights_new(&m->config, &m->grads), 0);
    assert_int_equal(ref_weights_each(&m->config, &m->weights, load_parameter, &m->model), 0);
}

static void close_checkpoint(checkpoint *m)
{
    ref_weights_free(&m->config, &m->weights);
    ref_weights_free(&m->config, &m->grads);
    golden_close(&m->model);
    golden_close(&m->expected);
}

static double golden_distance(const golden *g, const char *name, const real *x)
{
    golden_tensor t = golden_find(g, name);
    real *expected = golden_doubles(g, name);
    double distance = fd_distance(t.count, x, expected);
    free(expected);
    return distance;
}

static void assert_within(const char *name, double distance, double limit)
{
    if (!(distance <= limit))
        fail_msg("%s: distance %.3g, limit %.3g", name, distance, limit);
}

static void check_golden_forward(checkpoint *m, golden_limits limits)
{
    const ref_config *c = &m->config;
    golden_tensor shape = golden_find(&m->expected, "input_ids");
    int64_t *ids = golden_ints(&m->expected, "input_ids"), N = shape.count;
    ref_batch batch = { .B = shape.shape[0], .T = shape.shape[1], .ids = ids };
    ref_outputs out = { .logits = fd_zeros(N * c->vocab), .hidden = fd_zeros((c->L + 1) * N * c->D) };
    assert_int_equal(ref_model_forward(c, &m->weights, &batch, &out), 0);

    double distance = golden_distance(&m->expected, "logits", out.logits);
    printf("  %s: logits %.1e, hidden", limits.name, distance);
    assert_within("logits", distance, limits.forward);
    for (int64_t l = 0; l <= c->L; l++) {
        char name[32];
        snprintf(name, sizeof name, "hidden.%d", (int)l);
        distance = golden_distance(&m->expected, name, out.hidden + l * N * c->D);
        printf(" %.1e", distance);
        assert_within(name, distance, l == 0 ? 0 : limits.forward);
    }
    distance = golden_distance(&m->expected, "loss", &out.loss);
    printf(", loss %.1e\n", distance);
    assert_within("loss", distance, limits.loss);
    free(out.logits);
    free(out.hidden);
    free(ids);
}

/* The tokens that the golden model chose greedily, all at once: each is the largest logit after those before it, by the same margin. */
static void check_golden_greedy(checkpoint *m)
{
    const ref_config *c = &m->config;
    golden_tensor shape = golden_find(&m->expected, "greedy_ids"), gaps = golden_find(&m->expected, "greedy_gap");
    int64_t *ids = golden_ints(&m->expected, "greedy_ids"), T = shape.count, chosen = gaps.count;
    ref_batch batch = { .B = 1, .T = T, .ids = ids };
    ref_outputs out = { .logits = fd_zeros(T * c->vocab) };
    assert_int_equal(ref_model_forward(c, &m->weights, &batch, &out), 0);
    for (int64_t n = 0; n < chosen; n++) {
        const real *l = out.logits + (T - chosen + n - 1) * c->vocab;
        int64_t best = ids[T - chosen + n];
        real second = -INFINITY;
        for (int64_t i = 0; i < c->vocab; i++)
            if (i != best)
                second = fmax(second, l[i]);
        assert_within("greedy gap", fabs(l[best] - second - golden_at(&gaps, n)), 1e-4);
        assert_true(l[best] > second);
    }
    free(out.logits);
    free(ids);
}

/* ---- gradients under the run-time names of the golden model ---- */

typedef struct {
    const golden *expected;
    golden_limits limits;
    double worst;
    char worst_name[160];
    int64_t compared; /* elements */
} gradient_check;

/* The golden tensor that holds the gradient of `name`, and the element at which it begins there. */
static void golden_place(const char *name, int64_t count, char *place, size_t size, int64_t *first)
{
    static const char *const renamed[][2] = {
        { "self_attn.f_a_proj", "self_attn.forget_gate.f_a_proj" }, { "self_attn.f_b_proj", "self_attn.forget_gate.f_b_proj" },
        { "self_attn.A_log", "self_attn.forget_gate.A_log" }, { "self_attn.dt_bias", "self_attn.forget_gate.dt_bias" },
        { "block_sparse_moe", "mlp" },
    };
    static const char *const fused[] = { ".q_conv1d.", ".k_conv1d.", ".v_conv1d." };
    snprintf(place, size, "grad.%s", name);
    for (size_t n = 0; n < sizeof renamed / sizeof *renamed; n++)
        replace(place, size, renamed[n][0], renamed[n][1]);
    *first = 0;
    for (int n = 0; n < 3; n++)
        if (strstr(place, fused[n])) {
            replace(place, size, fused[n], ".conv1d.");
            *first = n * count;
        }
    char *expert = strstr(place, "mlp.experts.");
    if (expert) {
        int e = 0, matrix = 0;
        assert_int_equal(sscanf(expert, "mlp.experts.%d.w%d.weight", &e, &matrix), 2);
        snprintf(expert, size - (size_t)(expert - place), "mlp.experts.%s", matrix == 2 ? "down_proj" : "gate_up_proj");
        *first = matrix == 2 ? e * count : (2 * e + (matrix == 3)) * count; /* gate (w1), then up (w3) */
    }
}

static int compare_gradient(void *user, const char *name, int64_t rows, int64_t columns, real **param)
{
    gradient_check *check = user;
    int64_t count = rows * columns, first;
    if (strstr(name, "e_score_correction_bias")) {
        for (int64_t i = 0; i < count; i++)
            assert_true((*param)[i] == 0);
        return 0;
    }
    char place[160];
    golden_place(name, count, place, sizeof place, &first);
    golden_tensor t = golden_find(check->expected, place);
    assert_true(first + count <= t.count);
    real *expected = fd_zeros(count);
    for (int64_t i = 0; i < count; i++)
        expected[i] = golden_at(&t, first + i);
    double distance = fd_distance(count, *param, expected);
    assert_within(name, distance, check->limits.gradient);
    if (distance >= check->worst) {
        check->worst = distance;
        snprintf(check->worst_name, sizeof check->worst_name, "%s", name);
    }
    check->compared += count;
    free(expected);
    return 0;
}

static void check_golden_gradients(checkpoint *m, golden_limits limits)
{
    golden_tensor shape = golden_find(&m->expected, "input_ids");
    int64_t *ids = golden_ints(&m->expected, "input_ids"), elements = 0;
    ref_batch batch = { .B = shape.shape[0], .T = shape.shape[1], .ids = ids };
    real loss;
    assert_int_equal(ref_model_backward(&m->config, &m->weights, &batch, &loss, &m->grads), 0);
    assert_within("loss", golden_distance(&m->expected, "loss", &loss), limits.loss);

    gradient_check check = { .expected = &m->expected, .limits = limits };
    ref_weights_each(&m->config, &m->grads, compare_gradient, &check);
    printf("  %s: gradients, worst %.1e (%s)\n", limits.name, check.worst, check.worst_name);
    for (const cJSON *entry = m->expected.header->child; entry; entry = entry->next)
        if (strncmp(entry->string, "grad.", 5) == 0)
            elements += golden_find(&m->expected, entry->string).count;
    assert_true(check.compared == elements); /* every gradient that there is */
    free(ids);
}

static void check_golden_model(golden_limits limits)
{
    checkpoint m;
    open_checkpoint(limits.name, &m);
    check_golden_forward(&m, limits);
    check_golden_greedy(&m);
    check_golden_gradients(&m, limits);
    close_checkpoint(&m);
}

static void test_tiny_matches_golden_data(void **state)
{
    (void)state;
    check_golden_model(TINY);
}

static void test_d128_matches_golden_data(void **state)
{
    (void)state;
    check_golden_model(D128);
}

/* ---- random models of every variant ---- */

/* Short vectors before the L2 norms make the loss curve sharply: a smaller step than elsewhere, hence a larger limit.
 * A wrong or missing term shows at 1e-3 and above. */
static const double MODEL_STEP = 1e-5, MODEL_LIMIT = 1e-6;

static const unsigned char VARIANT_MIXER[3] = { REF_MIX_KDA, REF_MIX_MLA, REF_MIX_KDA }, VARIANT_SPARSE[3] = { 0, 1, 1 };

static ref_config small_config(void)
{
    return (ref_config){ .vocab = 11, .D = 6, .L = 3, .mixer = VARIANT_MIXER, .sparse = VARIANT_SPARSE, .norm_eps = 1e-5,
                         .kda_heads = 2, .kda_head_dim = 4, .G = 4, .conv_width = 3, .gate = REF_GATE_SOFTPLUS,
                         .beta_kind = REF_BETA_SIGMOID, .output_gate = REF_OUTPUT_GATE_SIGMOID,
                         .heads = 2, .R = 5, .Dn = 3, .Dr = 2, .Dv = 4, .rope_theta = 100, .kv_a_eps = 1e-6,
                         .I_dense = 7, .E = 4, .top_k = 2, .I = 3, .Is = 5, .renormalize = 1, .scaling = 2.446 };
}

static int fill_parameter(void *user, const char *name, int64_t rows, int64_t columns, real **param)
{
    fd_rng *r = user;
    double scale = strstr(name, "_proj") || strstr(name, "gate.weight") ? 1 / sqrt((double)columns) : 0.7;
    for (int64_t i = 0; i < rows * columns; i++)
        (*param)[i] = scale * fd_normal(r);
    if (strstr(name, "e_score_correction_bias"))
        for (int64_t i = 0; i < columns; i++)
            (*param)[i] = 2 * (double)i; /* scores are below 1: the choice cannot change within a finite difference */
    return 0;
}

typedef struct {
    const char *label;
    const ref_config *config;
    ref_weights weights, grads;
    ref_batch batch;
    double worst;
    int64_t position; /* of the walk over weights, to find the gradient of the same parameter */
    real *found;
} model_case;

static double model_loss(void *context)
{
    model_case *m = context;
    ref_outputs out = { 0 };
    assert_int_equal(ref_model_forward(m->config, &m->weights, &m->batch, &out), 0);
    return out.loss;
}

/* Stops at parameter number m->position and keeps it. */
static int find_gradient(void *user, const char *name, int64_t rows, int64_t columns, real **param)
{
    (void)name, (void)rows, (void)columns;
    model_case *m = user;
    m->found = *param;
    return m->position-- == 0;
}

static int check_parameter(void *user, const char *name, int64_t rows, int64_t columns, real **param)
{
    model_case *m = user;
    int64_t position = m->position;
    assert_int_equal(ref_weights_each(m->config, &m->grads, find_gradient, m), 1);
    m->position = position + 1;
    if (strstr(name, "e_score_correction_bias"))
        return 0;
    double error = fd_error(*param, m->found, rows * columns, 5, MODEL_STEP, FD_FLOOR, model_loss, m);
    if (!(error <= MODEL_LIMIT))
        fail_msg("%s: d %s: finite differences disagree by %.3g, limit %.3g", m->label, name, error, MODEL_LIMIT);
    m->worst = fmax(m->worst, error);
    return 0;
}

static void check_model_gradients(fd_rng *r, const char *label, ref_config c)
{
    static const int64_t ids[10] = { 1, 7, 7, 0, 10, 3, 1, 2, 9, 4 }, targets[10] = { 7, -1, 0, 10, 2, -1, -1, 9, 4, 4 };
    model_case m = { .label = label, .config = &c, .batch = { .B = 2, .T = 5, .ids = ids, .targets = targets } };
    assert_int_equal(ref_weights_new(&c, &m.weights), 0);
    assert_int_equal(ref_weights_new(&c, &m.grads), 0);
    ref_weights_each(&c, &m.weights, fill_parameter, r);
    assert_int_equal(ref_model_backward(&c, &m.weights, &m.batch, NULL, &m.grads), 0);
    ref_weights_each(&c, &m.weights, check_parameter, &m);
    printf("  %-36s %.1e\n", label, m.worst);
    ref_weights_free(&c, &m.weights);
    ref_weights_free(&c, &m.grads);
}

static void test_gradients_of_every_variant(void **state)
{
    (void)state;
    fd_rng r = fd_start("model backward against finite differences");
    ref_config base = small_config(), c = base;
    check_model_gradients(&r, "as released", c);
    c.G = 2, c.gate = REF_GATE_BOUNDED, c.lower_bound = -5, c.beta_kind = REF_BETA_TWICE_SIGMOID;
    check_model_gradients(&r, "block gates, bounded, 2 sigmoid", c);
    c = base, c.G = 1, c.output_gate = REF_OUTPUT_GATE_SWISH;
    check_model_gradients(&r, "head gates, swish", c);
    c = base, c.G = 0, c.output_gate = REF_OUTPUT_GATE_NONE, c.conv_width = 0;
    check_model_gradients(&r, "no gates, no convolution", c);
    c = base, c.rope = 1, c.tied = 1, c.kv_a_eps = 1e-5;
    check_model_gradients(&r, "rotated, tied", c);
    c = base, c.router = REF_ROUTER_SOFTMAX, c.n_group = 2, c.topk_group = 1, c.Is = 0, c.conv_width = 1;
    check_model_gradients(&r, "softmax router, groups, none shared", c);
}

/* A row alone gives the same bits as in a batch; a later token never changes an earlier output; targets default to the next token. */
static void test_rows_and_tokens_are_independent(void **state)
{
    (void)state;
    fd_rng r = fd_start("rows and later tokens");
    ref_config c = small_config();
    c.rope = 1;
    ref_weights w;
    enum { B = 3, T = 6, N = B * T, VOCAB = 11 };
    int64_t ids[N], targets[N];
    for (int64_t n = 0; n < N; n++)
        ids[n] = (int64_t)(fd_u64(&r) % VOCAB);
    for (int64_t n = 0; n < N; n++)
        targets[n] = n % T == T - 1 ? -1 : ids[n + 1];
    assert_int_equal(ref_weights_new(&c, &w), 0);
    ref_weights_each(&c, &w, fill_parameter, &r);
    real all[N * VOCAB], part[N * VOCAB];
    ref_outputs out = { .logits = all }, given = { .logits = part };
    ref_batch batch = { .B = B, .T = T, .ids = ids }, with_targets = { .B = B, .T = T, .ids = ids, .targets = targets };
    assert_int_equal(ref_model_forward(&c, &w, &batch, &out), 0);
    assert_int_equal(ref_model_forward(&c, &w, &with_targets, &given), 0);
    assert_true(out.loss == given.loss && out.loss > 0);
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t <= T; t++) {
            ref_batch row = { .B = 1, .T = t, .ids = ids + b * T };
            assert_int_equal(ref_model_forward(&c, &w, &row, &given), 0);
            fd_assert_close("logits", t * VOCAB, part, all + b * T * VOCAB, 0);
        }
    ref_weights_free(&c, &w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiny_matches_golden_data),
        cmocka_unit_test(test_d128_matches_golden_data),
        cmocka_unit_test(test_gradients_of_every_variant),
        cmocka_unit_test(test_rows_and_tokens_are_independent),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
