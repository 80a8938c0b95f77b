/* The whole model: golden data, gradients, variants; the same numbers however the tokens are packed, cut or threaded. */
#include "tests/model_support.h"

#include <math.h>

#include "harness/generate.h"
#include "harness/safetensors.h"

/* Two orders of summation of the same float products through a few layers. */
static const double SAME_LIMIT = 2e-5;

/* ---- golden models ---- */

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
    OK(kl_model_open(&g.m, g.ctx, dir));
    OK(kl_tensors_open(&g.expected, path));
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
    OK(kl_model_forward(g.m, &batch, NULL, &(kl_outputs){.logits = logits, .hidden = hidden}));
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
    OK(kl_weights_zeros(&grads, &g.m->config));
    double loss, forward_only;
    int64_t counted;
    kl_batch batch = {.N = 2, .cu = GOLDEN_CU, .ids = g.ids};
    OK(kl_model_loss(g.m, &batch, g.targets, &loss, &counted, &grads, 1.0f));
    OK(kl_model_loss(g.m, &batch, g.targets, &forward_only, NULL, NULL, 1.0f));
    assert_int_equal(counted, 148);
    assert_true(loss == forward_only);
    float *want = expect_floats(&g, "loss");
    WITHIN(fabs(loss - (double)want[0]) / (double)want[0], kl_tol_model_f32.forward, "loss");
    free(want);
    gradient_check check = {.g = &g, .limit = tolerance->gradient};
    OK(kl_weights_each(&g.m->config, &grads, check_gradient, &check));
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
        OK(kl_model_forward(g.m, &(kl_batch){.N = 1, .cu = cu, .ids = grown}, NULL, &(kl_outputs){.logits = logits, .last_only = true}));
        grown[n] = argmax(logits, vocab);
    }
    assert_memory_equal(grown, ids, sizeof ids);

    /* with a cache */
    kl_cache *cache;
    OK(kl_cache_create(&cache, &g.m->config, 1, 64));
    int32_t found[24], *out = found;
    const int32_t *prompt = ids;
    int64_t count, length = 20;
    kl_generation o = {.max_new = 24, .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
    OK(kl_generate(g.m, cache, 1, &prompt, &length, &o, &out, &count, NULL));
    assert_int_equal(count, 24);
    assert_memory_equal(found, ids + 20, sizeof found);
    kl_cache_destroy(cache);
    free(logits);
    close_golden(&g);
}

static void golden_tiny_greedy(void **state) { (void)state, check_greedy("tiny"); }
static void golden_d128_greedy(void **state) { (void)state, check_greedy("d128"); }

/* ---- variants ---- */

static const char *const VARIANTS[][4] = {
    {"hybrid=3:1"},
    {"hybrid=0:1"},
    {"hybrid=1:1", "rope=1"},
    {"hybrid=n:0"},
    {"gate=block:8"},
    {"gate=head"},
    {"gate=none"},
    {"gate_kind=bounded:-5"},
    {"output_gate=swish"},
    {"output_gate=none"},
    {"conv=0"},
    {"conv=2", "biased_weights=1"},
};
enum { VARIANT_COUNT = sizeof VARIANTS / sizeof *VARIANTS, LAYERS = 4 };

static kl_config variant_config(int i)
{
    kl_config c = small_config((const char *[]){"layers=4", NULL});
    for (int j = 0; j < 3 && VARIANTS[i][j]; j++)
        OK(kl_config_set(&c, VARIANTS[i][j]));
    OK(kl_config_validate(&c));
    return c;
}

/* ---- the same numbers in other ways ---- */

/* Feeds ids [0,n) to a slot in pieces of `chunk`; logits of every token. */
static void feed(kl_model *m, kl_cache *cache, int64_t slot, const int32_t *ids, int64_t n, int64_t chunk, float *logits)
{
    for (int64_t t = 0; t < n; t += chunk) {
        int64_t cu[] = {0, n - t < chunk ? n - t : chunk};
        kl_batch batch = {.N = 1, .cu = cu, .ids = ids + t, .slot = &slot};
        OK(kl_model_forward(m, &batch, cache, &(kl_outputs){.logits = logits + t * m->config.vocab_size}));
    }
}

static void chunked_prefill_equals_one_pass(void **state)
{
    (void)state;
    static const int64_t chunks[] = {1, 7, 64, 150};
    enum { T = 150 };
    kl_ctx *ctx = make_ctx(1);
    for (int v = 0; v < VARIANT_COUNT; v++) {
        kl_config c = variant_config(v);
        kl_model *m = random_model(ctx, &c, 11);
        int32_t *ids = random_ids(5, T, c.vocab_size);
        int64_t cu[] = {0, T};
        float *want = all_logits(m, 1, cu, ids), *got = floats((size_t)(T * c.vocab_size));
        kl_cache *cache;
        OK(kl_cache_create(&cache, &c, 2, T));
        for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
            kl_cache_reset(cache, 1);
            feed(m, cache, 1, ids, T, chunks[i], got);
            assert_int_equal(cache->length[1], T);
            WITHIN(kl_rel_err_f32(got, want, (size_t)(T * c.vocab_size)), SAME_LIMIT, VARIANTS[v][0]);
        }
        kl_cache_destroy(cache);
        free(want);
        free(got);
        free(ids);
        kl_model_close(m);
    }
    kl_ctx_destroy(ctx);
}

/* Latents of a bf16 model are cached in bf16: the same up to that rounding, and the same for every chunk size. */
static void bf16_latents_do_not_depend_on_chunks(void **state)
{
    (void)state;
    enum { T = 100 };
    kl_ctx *ctx = make_ctx(1);
    kl_config c = small_config((const char *[]){"layers=4", "dtype=bfloat16", NULL});
    kl_model *m = random_model(ctx, &c, 12);
    int32_t *ids = random_ids(6, T, c.vocab_size);
    int64_t cu[] = {0, T};
    float *want = all_logits(m, 1, cu, ids), *whole = floats((size_t)(T * c.vocab_size)), *pieces = floats((size_t)(T * c.vocab_size));
    kl_cache *cache;
    OK(kl_cache_create(&cache, &c, 2, T));
    assert_int_equal(cache->latent_dtype, KL_BF16);
    feed(m, cache, 0, ids, T, T, whole);
    feed(m, cache, 1, ids, T, 7, pieces);
    WITHIN(kl_rel_err_f32(whole, want, (size_t)(T * c.vocab_size)), kl_tol_model_bf16.forward, "bf16 latents");
    /* a latent near a rounding boundary may fall either way: a few bf16 ulps of a few numbers */
    WITHIN(kl_rel_err_f32(pieces, whole, (size_t)(T * c.vocab_size)), kl_tol_model_bf16.forward / 4, "pieces");
    kl_cache_destroy(cache);
    free(want);
    free(whole);
    free(pieces);
    free(ids);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

static void packed_sequences_do_not_see_each_other(void **state)
{
    (void)state;
    static const int64_t cu[] = {0, 0, 1, 34, 34, 99, 131};
    enum { N = 6, T = 131 };
    kl_ctx *ctx = make_ctx(1);
    for (int v = 0; v < VARIANT_COUNT; v++) {
        kl_config c = variant_config(v);
        kl_model *m = random_model(ctx, &c, 13);
        int32_t *ids = random_ids(8, T, c.vocab_size);
        float *packed = all_logits(m, N, cu, ids);
        float *last = floats((size_t)(N * c.vocab_size));
        OK(kl_model_forward(m, &(kl_batch){.N = N, .cu = cu, .ids = ids}, NULL, &(kl_outputs){.logits = last, .last_only = true}));
        for (int n = 0; n < N; n++) {
            int64_t alone_cu[] = {0, cu[n + 1] - cu[n]};
            size_t count = (size_t)(alone_cu[1] * c.vocab_size);
            float *alone = all_logits(m, 1, alone_cu, ids + cu[n]);
            WITHIN(kl_rel_err_f32(packed + cu[n] * c.vocab_size, alone, count), SAME_LIMIT, VARIANTS[v][0]);
            if (alone_cu[1])
                WITHIN(kl_rel_err_f32(last + n * c.vocab_size, alone + count - c.vocab_size, (size_t)c.vocab_size), SAME_LIMIT, "last token");
            else
                assert_true(isnan(last[n * c.vocab_size])); /* left alone */
            free(alone);
        }
        /* another neighbour, the same bits */
        for (int64_t t = cu[4]; t < cu[5]; t++)
            ids[t] = (ids[t] + 1) % (int32_t)c.vocab_size;
        float *changed = all_logits(m, N, cu, ids);
        WITHIN(kl_rel_err_f32(changed, packed, (size_t)(cu[4] * c.vocab_size)), SAME_LIMIT, "before the changed sequence");
        WITHIN(kl_rel_err_f32(changed + cu[5] * c.vocab_size, packed + cu[5] * c.vocab_size, (size_t)((T - cu[5]) * c.vocab_size)), SAME_LIMIT,
               "after the changed sequence");
        assert_true(kl_rel_err_f32(changed + cu[4] * c.vocab_size, packed + cu[4] * c.vocab_size, (size_t)((cu[5] - cu[4]) * c.vocab_size)) > 1e-2);
        free(changed);
        free(packed);
        free(last);
        free(ids);
        kl_model_close(m);
    }
    kl_ctx_destroy(ctx);
}

static void later_tokens_leave_earlier_logits_alone(void **state)
{
    (void)state;
    enum { T = 90 };
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 14);
    int32_t *ids = random_ids(9, T, c.vocab_size);
    int64_t cu[] = {0, T};
    float *a = all_logits(m, 1, cu, ids);
    ids[70] = (ids[70] + 1) % (int32_t)c.vocab_size;
    float *b = all_logits(m, 1, cu, ids);
    WITHIN(kl_rel_err_f32(b, a, (size_t)(70 * c.vocab_size)), SAME_LIMIT, "before the changed token");
    for (int64_t t = 70; t < T; t++)
        assert_true(kl_rel_err_f32(b + t * c.vocab_size, a + t * c.vocab_size, (size_t)c.vocab_size) > 1e-5);
    free(a);
    free(b);
    free(ids);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

/* Nothing is read that was not written in the same call: workspace and unused cache rows hold NaN. */
static void poisoned_memory_changes_nothing(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    for (int v = 0; v < VARIANT_COUNT; v++) {
        kl_config c = variant_config(v);
        kl_model *m = random_model(ctx, &c, 15);
        int32_t *ids = random_ids(9, 75, c.vocab_size);
        int64_t cu[] = {0, 33, 33, 34, 75};
        float *want = all_logits(m, 4, cu, ids), *cached = floats((size_t)(75 * c.vocab_size));
        memset(m->workspace, 0xff, m->workspace_bytes);
        float *got = all_logits(m, 4, cu, ids);
        assert_memory_equal(got, want, (size_t)(75 * c.vocab_size) * sizeof *got);
        kl_cache *cache;
        OK(kl_cache_create(&cache, &c, 4, 60));
        for (int64_t l = 0; l < c.num_layers; l++)
            if (cache->latent[l])
                memset(cache->latent[l], 0xff, (size_t)(4 * 60 * (c.kv_lora_rank + c.qk_rope_head_dim)) * sizeof(float));
        memset(m->workspace, 0xff, m->workspace_bytes);
        OK(kl_model_forward(m, &(kl_batch){.N = 4, .cu = cu, .ids = ids}, cache, &(kl_outputs){.logits = cached}));
        WITHIN(kl_rel_err_f32(cached, want, (size_t)(75 * c.vocab_size)), SAME_LIMIT, VARIANTS[v][0]);
        kl_cache_destroy(cache);

        kl_weights grads[2];
        double loss[2];
        int32_t *targets = random_ids(10, 75, c.vocab_size);
        for (int i = 0; i < 2; i++) {
            OK(kl_weights_zeros(&grads[i], &c));
            OK(kl_model_loss(m, &(kl_batch){.N = 4, .cu = cu, .ids = ids}, targets, &loss[i], NULL, &grads[i], 1.0f));
            memset(m->workspace, 0xff, m->workspace_bytes);
        }
        assert_true(loss[0] == loss[1]);
        assert_memory_equal(grads[0].owned, grads[1].owned, grads[0].owned_bytes);
        kl_weights_free(&grads[0]);
        kl_weights_free(&grads[1]);
        free(want);
        free(got);
        free(cached);
        free(ids);
        free(targets);
        kl_model_close(m);
    }
    kl_ctx_destroy(ctx);
}

/* A token more each step, but no allocation each step. */
static void decoding_seldom_allocates(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 16);
    kl_cache *cache;
    OK(kl_cache_create(&cache, &c, 1, 500));
    float *logits = floats((size_t)c.vocab_size);
    int64_t cu[] = {0, 1};
    int32_t id = 3;
    int grown = 0;
    for (size_t bytes = 0, i = 0; i < 500; i++) {
        OK(kl_model_forward(m, &(kl_batch){.N = 1, .cu = cu, .ids = &id}, cache, &(kl_outputs){.logits = logits, .last_only = true}));
        grown += m->workspace_bytes != bytes;
        bytes = m->workspace_bytes;
    }
    assert_true(grown >= 1 && grown <= 20); /* each time by an eighth at least */
    size_t kept = m->workspace_bytes;
    kl_model_trim(m, kept);
    assert_int_equal(m->workspace_bytes, kept);
    kl_model_trim(m, kept - 1);
    assert_int_equal(m->workspace_bytes, 0);
    free(logits);
    kl_cache_destroy(cache);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

/* ---- gradients ---- */

typedef struct problem {
    int64_t N, T;
    const int64_t *cu;
    int32_t *ids, *targets;
} problem;

static const int64_t PROBLEM_CU[] = {0, 33, 33, 34, 75};

static problem make_problem(int64_t vocab)
{
    problem p = {.N = 4, .T = 75, .cu = PROBLEM_CU, .ids = random_ids(3, 75, vocab), .targets = random_ids(4, 75, vocab)};
    p.targets[0] = p.targets[40] = p.targets[74] = -1;
    return p;
}

static double loss_of(kl_model *m, const problem *p, kl_weights *grads)
{
    double loss;
    int64_t counted;
    OK(kl_model_loss(m, &(kl_batch){.N = p->N, .cu = p->cu, .ids = p->ids}, p->targets, &loss, &counted, grads, 1.0f));
    assert_int_equal(counted, 72);
    return loss;
}

/* A direction in the space of all trained parameters, along each about as long as the parameter itself. */
typedef struct direction {
    kl_rng rng;
    double step, slope; /* slope: sum of gradient times direction */
    const kl_config *c;
    kl_weights *grads;
    int64_t index;
} direction;

typedef struct nth {
    int64_t wanted, at;
    kl_param *param;
} nth;

static kl_status find_nth(void *user, const kl_param_info *info, kl_param *p)
{
    nth *n = user;
    (void)info;
    if (n->at++ == n->wanted)
        n->param = p;
    return kl_ok();
}

static kl_status move_one(void *user, const kl_param_info *info, kl_param *p)
{
    direction *d = user;
    int64_t index = d->index++;
    if (!info->trained)
        return kl_ok();
    nth found = {.wanted = index};
    if (d->grads)
        OK(kl_weights_each(d->c, d->grads, find_nth, &found));
    float *x = p->data;
    size_t n = (size_t)(p->rows * p->columns);
    double sum = 0.0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    double scale = sqrt(sum / (double)n) + 1e-3;
    for (size_t i = 0; i < n; i++) {
        double along = scale * kl_rng_normal(&d->rng);
        if (d->grads)
            d->slope += along * (double)((float *)found.param->data)[i];
        x[i] = (float)((double)x[i] + d->step * along);
    }
    return kl_ok();
}

/* Moves all weights by step along the direction of the seed; returns the slope when grads are given. */
static double move(kl_model *m, uint64_t seed, double step, kl_weights *grads)
{
    direction d = {.rng = kl_rng_make(seed, 99), .step = step, .c = &m->config, .grads = grads};
    OK(kl_weights_each(&m->config, &m->weights, move_one, &d));
    return d.slope;
}

/* d loss along a random direction of every parameter at once, against central differences. The loss carries float noise of
 * about 1e-6 (relative 1e-7 a token, 72 tokens) over a step of 2e-3 times a slope of order 1; the truncation error goes with the
 * step squared and is taken out by Richardson's extrapolation from two steps. A choice of experts that flips would be a jump:
 * here every expert is chosen. */
static void gradients_match_finite_differences(void **state)
{
    (void)state;
    const double limit = 1e-2;
    kl_ctx *ctx = make_ctx(1);
    for (int v = 0; v < VARIANT_COUNT; v++) {
        kl_config c = variant_config(v);
        OK(kl_config_set(&c, "experts=3"));
        OK(kl_config_set(&c, "top_k=3"));
        kl_model *m = random_model(ctx, &c, 21);
        problem p = make_problem(c.vocab_size);
        kl_weights grads;
        OK(kl_weights_zeros(&grads, &c));
        loss_of(m, &p, &grads);
        const double h = 4e-3, steps[4] = {-h, -h / 2, h / 2, h};
        double slope = move(m, 7, 0.0, &grads), at[4];
        kl_weights saved;
        OK(kl_weights_to_f32(&saved, &m->weights, &c));
        for (int i = 0; i < 4; i++) {
            move(m, 7, steps[i], NULL);
            at[i] = loss_of(m, &p, NULL);
            memcpy(m->weights.owned, saved.owned, saved.owned_bytes);
        }
        kl_weights_free(&saved);
        double wide = (at[3] - at[0]) / (2 * h), near = (at[2] - at[1]) / h, numeric = (4 * near - wide) / 3;
        if (!(fabs(numeric - slope) <= limit * (fabs(slope) + 0.05)))
            fail_msg("%s: gradient says %.6g, differences say %.6g", VARIANTS[v][0], slope, numeric);
        kl_weights_free(&grads);
        free(p.ids);
        free(p.targets);
        kl_model_close(m);
    }
    kl_ctx_destroy(ctx);
}

static void gradients_accumulate_and_scale(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 22);
    problem p = make_problem(c.vocab_size);
    kl_weights once, thrice;
    OK(kl_weights_zeros(&once, &c));
    OK(kl_weights_zeros(&thrice, &c));
    loss_of(m, &p, &once);
    loss_of(m, &p, &thrice);
    double loss;
    OK(kl_model_loss(m, &(kl_batch){.N = p.N, .cu = p.cu, .ids = p.ids}, p.targets, &loss, NULL, &thrice, 2.0f));
    size_t n = once.owned_bytes / sizeof(float);
    float *want = floats(n);
    for (size_t i = 0; i < n; i++)
        want[i] = 3.0f * ((float *)once.owned)[i];
    WITHIN(kl_rel_err_f32(thrice.owned, want, n), 1e-6, "one and two more");
    free(want);
    kl_weights_free(&once);
    kl_weights_free(&thrice);
    free(p.ids);
    free(p.targets);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

static void recomputing_gives_the_same_bits(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 23);
    problem p = make_problem(c.vocab_size);
    kl_weights kept, again;
    OK(kl_weights_zeros(&kept, &c));
    OK(kl_weights_zeros(&again, &c));
    double a = loss_of(m, &p, &kept);
    m->keep_bytes = 1;
    double b = loss_of(m, &p, &again);
    assert_true(a == b);
    assert_memory_equal(kept.owned, again.owned, kept.owned_bytes);
    kl_weights_free(&kept);
    kl_weights_free(&again);
    free(p.ids);
    free(p.targets);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

static void no_target_no_gradient(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 24);
    kl_weights grads;
    OK(kl_weights_zeros(&grads, &c));
    int64_t cu[] = {0, 3}, counted = 9;
    int32_t ids[] = {1, 2, 3}, none[] = {-1, -1, -1};
    double loss = 5.0;
    OK(kl_model_loss(m, &(kl_batch){.N = 1, .cu = cu, .ids = ids}, none, &loss, &counted, &grads, 1.0f));
    assert_true(loss == 0.0);
    assert_int_equal(counted, 0);
    for (size_t i = 0; i < grads.owned_bytes / sizeof(float); i++)
        assert_true(((float *)grads.owned)[i] == 0.0f);
    int32_t bad[] = {1, 512, 1};
    REFUSED(kl_model_loss(m, &(kl_batch){.N = 1, .cu = cu, .ids = ids}, bad, &loss, NULL, NULL, 1.0f), KL_EINVAL, "targets[1]");
    kl_weights_free(&grads);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

static void expert_load_counts_every_choice(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 25);
    problem p = make_problem(c.vocab_size);
    int64_t load[LAYERS * 8] = {0};
    kl_weights grads;
    OK(kl_weights_zeros(&grads, &c));
    m->expert_load = load;
    m->keep_bytes = 1; /* what is recomputed is not counted twice */
    loss_of(m, &p, &grads);
    for (int64_t l = 0; l < LAYERS; l++) {
        int64_t sum = 0;
        for (int64_t e = 0; e < 8; e++)
            sum += load[l * 8 + e];
        assert_int_equal(sum, c.sparse[l] ? p.T * c.top_k : 0);
    }
    kl_weights_free(&grads);
    free(p.ids);
    free(p.targets);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

static void threads_do_not_change_bits(void **state)
{
    (void)state;
    static const int threads[] = {1, 2, 3};
    float *logits[3];
    kl_weights grads[3];
    kl_config c = variant_config(0);
    problem p = make_problem(c.vocab_size);
    size_t count = (size_t)(p.T * c.vocab_size);
    for (int i = 0; i < 3; i++) {
        kl_ctx *ctx = make_ctx(threads[i]);
        kl_model *m = random_model(ctx, &c, 26);
        logits[i] = all_logits(m, p.N, p.cu, p.ids);
        OK(kl_weights_zeros(&grads[i], &c));
        loss_of(m, &p, &grads[i]);
        kl_model_close(m);
        kl_ctx_destroy(ctx);
        assert_memory_equal(logits[i], logits[0], count * sizeof(float));
        assert_memory_equal(grads[i].owned, grads[0].owned, grads[0].owned_bytes);
    }
    for (int i = 0; i < 3; i++) {
        free(logits[i]);
        kl_weights_free(&grads[i]);
    }
    free(p.ids);
    free(p.targets);
}

/* ---- what is refused ---- */

static void bad_arguments_are_named(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = small_config((const char *[]){"layers=4", "max_length=30", NULL});
    kl_model *m = random_model(ctx, &c, 31);
    kl_cache *cache;
    OK(kl_cache_create(&cache, &c, 2, 20));
    int32_t *ids = random_ids(1, 40, c.vocab_size);
    float *logits = floats((size_t)(40 * c.vocab_size));
    feed(m, cache, 0, ids, 15, 15, logits);
    void *before = malloc(cache->bytes);
    memcpy(before, cache->memory, cache->bytes);
    kl_outputs out = {.logits = logits, .last_only = true};

    int64_t six[] = {0, 6}, falling[] = {0, 4, 2}, offset[] = {1, 3}, pair[] = {0, 1, 2}, triple[] = {0, 1, 2, 3}, long_one[] = {0, 31};
    int64_t slot2 = 2, same[] = {1, 1};
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 1, .cu = six, .ids = ids}, cache, &out), KL_EINVAL, "capacity of 20");
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 1, .cu = long_one, .ids = ids}, NULL, &out), KL_EINVAL, "model_max_length = 30");
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 2, .cu = falling, .ids = ids}, cache, &out), KL_EINVAL, "cu[2]");
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 1, .cu = offset, .ids = ids}, cache, &out), KL_EINVAL, "cu[0]");
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 3, .cu = triple, .ids = ids}, cache, &out), KL_EINVAL, "2 slots");
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids, .slot = &slot2}, cache, &out), KL_EINVAL, "slot[0]");
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 2, .cu = pair, .ids = ids, .slot = same}, cache, &out), KL_EINVAL, "distinct");
    REFUSED(kl_model_forward(m, &(kl_batch){.N = -1, .cu = pair, .ids = ids}, cache, &out), KL_EINVAL, "batch.N");
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair}, cache, &out), KL_EINVAL, "batch.ids");
    ids[0] = 512;
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids}, cache, &out), KL_EINVAL, "ids[0]");
    ids[0] = -1;
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids}, cache, &out), KL_EINVAL, "got -1");
    ids[0] = 0;
    kl_config other = small_config((const char *[]){"layers=4", "hybrid=1:1", NULL});
    kl_cache *alien;
    OK(kl_cache_create(&alien, &other, 1, 20));
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids}, alien, &out), KL_EINVAL, "layer 1");
    kl_cache_destroy(alien);

    assert_int_equal(cache->length[0], 15);
    assert_memory_equal(cache->memory, before, cache->bytes);
    m->kda_variant = "no such variant";
    REFUSED(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids}, NULL, &out), KL_EUNSUPPORTED, "no such variant");
    m->kda_variant = NULL;
    OK(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids}, cache, &out));
    kl_model *none = m;
    REFUSED(kl_model_open(&none, ctx, "tests/golden/models/absent"), KL_EIO, "absent");
    assert_null(none);
    free(before);
    free(ids);
    free(logits);
    kl_cache_destroy(cache);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

/* Same configuration, other weights: their caches must not meet, neither directly nor through a file. */
static void caches_of_other_weights_are_refused(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *a = random_model(ctx, &c, 1), *b = random_model(ctx, &c, 2), *again = random_model(ctx, &c, 1);
    kl_cache *cache[3];
    int32_t ids[] = {1, 2, 3, 4};
    int64_t cu[] = {0, 4};
    kl_batch batch = {.N = 1, .cu = cu, .ids = ids};
    for (int i = 0; i < 3; i++)
        OK(kl_cache_create(&cache[i], &c, 1, 20));
    OK(kl_model_forward(a, &batch, cache[0], NULL));
    OK(kl_model_forward(again, &batch, cache[0], NULL));
    REFUSED(kl_model_forward(b, &batch, cache[0], NULL), KL_EINVAL, "cache");
    assert_int_equal(cache[0]->length[0], 8);
    char dir[256], path[300];
    make_folder(dir, sizeof dir);
    snprintf(path, sizeof path, "%s/cache", dir);
    OK(kl_cache_save(cache[0], 0, path));
    OK(kl_model_forward(b, &batch, cache[1], NULL));
    REFUSED(kl_cache_load(cache[1], 0, path), KL_EFORMAT, "another model");
    assert_int_equal(cache[1]->length[0], 4);
    OK(kl_cache_load(cache[2], 0, path));
    REFUSED(kl_model_forward(b, &batch, cache[2], NULL), KL_EINVAL, "cache");
    OK(kl_model_forward(a, &batch, cache[2], NULL));
    remove_folder(dir);
    for (int i = 0; i < 3; i++)
        kl_cache_destroy(cache[i]);
    kl_model_close(a);
    kl_model_close(b);
    kl_model_close(again);
    kl_ctx_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_tiny_forward),
        cmocka_unit_test(golden_d128_forward),
        cmocka_unit_test(golden_tiny_gradients),
        cmocka_unit_test(golden_d128_gradients),
        cmocka_unit_test(golden_tiny_greedy),
        cmocka_unit_test(golden_d128_greedy),
        cmocka_unit_test(chunked_prefill_equals_one_pass),
        cmocka_unit_test(bf16_latents_do_not_depend_on_chunks),
        cmocka_unit_test(packed_sequences_do_not_see_each_other),
        cmocka_unit_test(later_tokens_leave_earlier_logits_alone),
        cmocka_unit_test(poisoned_memory_changes_nothing),
        cmocka_unit_test(decoding_seldom_allocates),
        cmocka_unit_test(gradients_match_finite_differences),
        cmocka_unit_test(gradients_accumulate_and_scale),
        cmocka_unit_test(recomputing_gives_the_same_bits),
        cmocka_unit_test(no_target_no_gradient),
        cmocka_unit_test(expert_load_counts_every_choice),
        cmocka_unit_test(threads_do_not_change_bits),
        cmocka_unit_test(bad_arguments_are_named),
        cmocka_unit_test(caches_of_other_weights_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
