/* The recurrence and the decode layer as CUDA kernels, on a device or its emulation, against their references. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "common/gpu.h"
#include "kda/decode_layer.h"
#include "tests/kda_case.h"

#define NEEDS_DEVICE()             \
    do {                           \
        (void)state;               \
        if (kl_gpu_count() == 0)   \
            skip();                \
    } while (0)

static bool same_bits(const void *a, const void *b, int64_t floats) { return !memcmp(a, b, (size_t)floats * sizeof(float)); }

/* ---- recurrent ---- */

static void check_recurrent(case_options opt)
{
    kda_case *c = case_new(opt);
    case_reference(c, false);
    assert_ok(case_run_on(KL_CUDA, c, "recurrent", KL_FORWARD, 1));
    double error = case_forward_error(c);
    if (!kl_within(error, kl_tol_kda_f32.forward))
        fail_msg("T %d K %d V %d G %d seed %d: error %.3g, limit %.3g", (int)opt.T, (int)opt.K, (int)opt.V, (int)opt.G, (int)opt.seed, error,
                 kl_tol_kda_f32.forward);
    case_free(c);
}

static void recurrent_every_length_and_dimension(void **state)
{
    NEEDS_DEVICE();
    const int64_t lengths[] = {0, 1, 2, 15, 16, 17, 33, 130}, dims[] = {1, 8, 24, 60, 64, 100, 128, 256};
    for (size_t i = 0; i < 8; i++)
        for (int layout = 0; layout < 2; layout++) {
            check_recurrent((case_options){.B = 2, .T = lengths[i], .H = 2, .HV = 4, .K = 24, .V = 20, .G = 24, .decay = DECAY_MIXED,
                                           .layout = (kda_state_layout)layout, .seed = i + 1});
            check_recurrent((case_options){.B = 1, .T = 5, .H = 1, .HV = 2, .K = dims[i], .V = dims[(i + 3) % 8], .G = dims[i], .decay = DECAY_SLOW,
                                           .layout = (kda_state_layout)layout, .gap = (int64_t)i % 3, .seed = i + 1});
        }
}

static void recurrent_every_option(void **state)
{
    NEEDS_DEVICE();
    const int64_t lengths[] = {0, 1, 15, 36, 0, 20}, gates[] = {24, 8, 1, 0};
    for (int i = 0; i < 24; i++) {
        case_options o = {.B = 6, .lengths = lengths, .H = 2, .HV = 4, .K = 24, .V = 36, .G = gates[i % 4], .gate = (kda_gate)(i % 3),
                          .beta_kind = (kda_beta)(i / 2 % 3), .layout = (kda_state_layout)(i / 4 % 2), .l2norm = i % 5 < 2, .no_delta = i % 7 == 6,
                          .chunk_states = true, .token_states = i % 2, .in_place = i % 3 == 0, .pool = i % 4 < 2, .no_h0 = i % 3 && i % 8 == 5,
                          .no_bias = i % 3 == 2, .chunk = 16, .gap = i % 2 ? 4 : 0, .decay = (case_decay)(i % 7), .seed = (uint64_t)i + 1};
        if (o.G == 0)
            o.gate = KDA_GATE_LOG;
        if (o.beta_kind == KDA_BETA_SIGMOID2)
            o.l2norm = true;
        check_recurrent(o);
    }
}

static void recurrent_of_heads_of_128(void **state)
{
    NEEDS_DEVICE();
    const int64_t lengths[] = {1, 0, 3, 1, 2};
    for (int i = 0; i < 6; i++) {
        case_options o = {.B = i % 2 ? 3 : 5, .T = i % 2 ? 1 : 0, .lengths = i % 2 ? NULL : lengths, .H = 1, .HV = 2, .K = 128, .V = 128,
                          .G = i % 3 ? 128 : 4, .gate = (kda_gate)(i % 3), .beta_kind = (kda_beta)(i % 2), .l2norm = i % 4 < 2, .no_delta = i == 5,
                          .pool = i > 2, .in_place = i > 2, .gap = i == 4 ? 3 : 0, .decay = DECAY_MIXED, .seed = (uint64_t)i + 1};
        check_recurrent(o);
    }
}

static void recurrent_split_anywhere_has_the_same_bits(void **state)
{
    NEEDS_DEVICE();
    enum { T = 9, HV = 2, K = 60, V = 33 };
    for (int layout = 0; layout < 2; layout++) {
        case_options opt = {.B = 1, .T = T, .H = 1, .HV = HV, .K = K, .V = V, .G = K, .decay = DECAY_MIXED, .layout = (kda_state_layout)layout, .seed = 3};
        kda_case *whole = case_new(opt), *part = case_new(opt);
        assert_ok(case_run_on(KL_CUDA, whole, "recurrent", KL_FORWARD, 1));
        const kda_problem p = part->p;
        for (int64_t s = 0; s <= T; s++) {
            part->p = p;
            part->p.T = s;
            assert_ok(case_run_on(KL_CUDA, part, "recurrent", KL_FORWARD, 1));
            part->p = p;
            part->p.T = T - s;
            part->p.h0 = p.ht;
            part->p.q = (const float *)p.q + s * K;
            part->p.k = (const float *)p.k + s * K;
            part->p.v = (const float *)p.v + s * HV * V;
            part->p.g = (const float *)p.g + s * HV * K;
            part->p.beta = (const float *)p.beta + s * HV;
            part->p.o = (float *)p.o + s * HV * V;
            assert_ok(case_run_on(KL_CUDA, part, "recurrent", KL_FORWARD, 1));
            assert_true(same_bits(whole->p.o, p.o, T * HV * V));
            assert_true(same_bits(whole->p.ht, p.ht, HV * K * V));
        }
        part->p = p;
        case_free(whole);
        case_free(part);
    }
}

/* A slot outside the pool leaves its sequence out, and no other. */
static void recurrent_leaves_out_slots_beyond_the_pool(void **state)
{
    NEEDS_DEVICE();
    enum { N = 3, HV = 2 };
    for (int64_t K = 16; K <= 128; K += 112) {
        int64_t V = K, SIZE = HV * K * V;
        case_options opt = {.B = N, .T = 1, .H = 1, .HV = HV, .K = K, .V = V, .G = K, .decay = DECAY_MIXED, .pool = true, .in_place = true, .seed = 4};
        kda_case *all = case_new(opt), *some = case_new(opt);
        assert_ok(case_run_on(KL_CUDA, all, "recurrent", KL_FORWARD, 1));
        some->state_index[1] = -1;
        some->state_index[2] = 2 * N + 1;
        assert_ok(case_run_on(KL_CUDA, some, "recurrent", KL_FORWARD, 1));
        int64_t slot = some->state_index[0];
        assert_true(same_bits(all->p.o, some->p.o, HV * V));
        assert_true(same_bits((float *)all->p.ht + slot * SIZE, (float *)some->p.ht + slot * SIZE, SIZE));
        for (int64_t i = HV * V; i < N * HV * V; i++)
            assert_true(isnan(((float *)some->p.o)[i]));
        case_free(all);
        case_free(some);
    }
}

/* ---- bf16 ---- */

/* Rounds count floats where they lie and returns them as bf16. */
static uint16_t *rounded(kda_case *c, const void *x, int64_t count)
{
    if (!x)
        return NULL;
    uint16_t *y = case_alloc(c, count, sizeof *y, 0);
    kl_from_f32(y, KL_BF16, x, (size_t)count);
    kl_to_f32((float *)x, y, KL_BF16, (size_t)count);
    return y;
}

static void recurrent_in_bf16(void **state)
{
    NEEDS_DEVICE();
    for (int i = 0; i < 8; i++) {
        case_options opt = {.B = 2, .T = 7, .H = 1, .HV = 2, .K = i % 3 ? 128 : 52, .V = i % 2 ? 64 : 37, .G = 1, .gate = KDA_GATE_SOFTPLUS,
                            .beta_kind = KDA_BETA_SIGMOID, .l2norm = true, .layout = (kda_state_layout)(i / 2 % 2), .seed = (uint64_t)i + 1};
        bool narrow_state = i >= 4;
        kda_case *c = case_new(opt);
        const kda_problem p = c->p;
        int64_t T = c->tokens, size = c->N * p.HV * p.K * p.V;
        kda_problem narrow = p;
        narrow.dtype = KL_BF16;
        narrow.q = rounded(c, p.q, T * p.H * p.K);
        narrow.k = rounded(c, p.k, T * p.H * p.K);
        narrow.v = rounded(c, p.v, T * p.HV * p.V);
        narrow.g = rounded(c, p.g, T * p.HV * p.G);
        narrow.beta = rounded(c, p.beta, T * p.HV);
        narrow.o = case_alloc(c, T * p.HV * p.V, 2, 0xff);
        if (narrow_state) {
            narrow.state_dtype = KL_BF16;
            narrow.h0 = narrow.ht = rounded(c, p.h0, size);
        }
        case_reference(c, false);
        c->p = narrow;
        assert_ok(case_run_on(KL_CUDA, c, "recurrent", KL_FORWARD, 1));
        c->p = p;
        kl_to_f32(p.o, narrow.o, KL_BF16, (size_t)(T * p.HV * p.V));
        if (narrow_state)
            kl_to_f32(p.ht, narrow.ht, KL_BF16, (size_t)size);
        assert_true(kl_within(case_forward_error(c), kl_tol_kda_bf16.forward));
        case_free(c);
    }
}

/* ---- the decode layer ---- */

enum { POOL = 5 };

typedef struct decode_case {
    kda_decode_problem p;
    kda_case *owner;
    float *state, *tail[3], *y;
    int64_t states, tails[3], outputs;
} decode_case;

static float *drawn(kda_case *c, kl_rng *r, int64_t n, float mean, float deviation)
{
    float *x = case_floats(c, n);
    kl_fill_normal(r, x, (size_t)n, mean, deviation);
    return x;
}

static decode_case new_decode(int64_t N, int64_t T, int64_t H, int64_t HV, int64_t K, int64_t V, int64_t W, kda_state_layout layout, uint64_t seed)
{
    kl_rng rng = kl_rng_make(seed, 31), *r = &rng;
    kda_case *c = calloc(1, sizeof *c);
    int64_t tokens = N * T, G = seed % 2 ? K : 1;
    decode_case x = {.owner = c, .states = POOL * HV * K * V, .outputs = tokens * HV * V};
    x.state = drawn(c, r, x.states, 0.0f, 0.3f);
    int64_t *index = case_alloc(c, N, sizeof *index, 0);
    for (int64_t n = 0; n < N; n++)
        index[n] = (3 * n + 1) % POOL;
    x.y = case_floats(c, x.outputs);
    x.p.kda = (kda_problem){.B = N, .N = N, .T = T, .H = H, .HV = HV, .K = K, .V = V, .G = G, .state_layout = layout, .gate = KDA_GATE_SOFTPLUS,
                            .beta_kind = KDA_BETA_SIGMOID, .qk_l2norm = true, .q = drawn(c, r, tokens * H * K, 0.0f, 1.0f),
                            .k = drawn(c, r, tokens * H * K, 0.0f, 1.0f), .v = drawn(c, r, tokens * HV * V, 0.0f, 1.0f),
                            .g = drawn(c, r, tokens * HV * G, 0.0f, 1.0f), .beta = drawn(c, r, tokens * HV, 0.0f, 1.0f),
                            .A_log = drawn(c, r, HV, 0.0f, 0.5f), .dt_bias = drawn(c, r, HV * G, -1.0f, 1.0f), .h0 = x.state, .ht = x.state,
                            .state_index = index, .state_pool = POOL};
    x.p.W = W;
    for (int i = 0; i < 3; i++) {
        int64_t D = i == 2 ? HV * V : H * K;
        x.tails[i] = POOL * D * (W - 1);
        x.p.weight[i] = drawn(c, r, D * W, 0.0f, 0.6f);
        x.p.tail[i] = x.tail[i] = drawn(c, r, x.tails[i], 0.0f, 1.0f);
    }
    x.p.output_gate = (kda_output_gate)(seed % 3);
    x.p.eps = 1e-5f;
    x.p.norm_weight = drawn(c, r, V, 1.0f, 0.2f);
    x.p.z = x.p.output_gate == KDA_OUT_NONE ? NULL : drawn(c, r, x.outputs, 0.0f, 1.0f);
    x.p.y = x.y;
    return x;
}

/* The owner's problem, or one made of it, on that device. */
static void decode_on(kl_device device, kda_case *owner, const kda_decode_problem *given)
{
    kl_ctx *ctx;
    kda_decode_problem p = *given;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.device = device, .threads = 1}));
    size_t bytes = kda_decode_workspace(ctx, &p);
    void *workspace = case_alloc(owner, (int64_t)bytes, 1, 0xff);
    mirror m = {.ctx = ctx};
    case_lend(&m, owner);
    p.kda = case_mirrored(&m, &p.kda);
    for (int i = 0; i < 3; i++) {
        p.weight[i] = mirrored(&m, p.weight[i]);
        p.tail[i] = mirrored(&m, p.tail[i]);
    }
    p.norm_weight = mirrored(&m, p.norm_weight);
    p.z = mirrored(&m, p.z);
    p.y = mirrored(&m, p.y);
    assert_ok(kda_decode(ctx, &p, mirrored(&m, workspace), bytes));
    take_back(&m);
    case_release(owner, owner->owned_count - 1);
    kl_ctx_destroy(ctx);
}

/* Outputs, states and tails of the second against the first. */
static void decode_agrees(const decode_case *a, const decode_case *b, double limit)
{
    assert_true(kl_within(kl_rel_err_f32(b->y, a->y, (size_t)a->outputs), limit));
    assert_true(kl_within(kl_rel_err_f32(b->state, a->state, (size_t)a->states), limit));
    for (int i = 0; i < 3; i++)
        assert_true(same_bits(a->tail[i], b->tail[i], a->tails[i]));
}

static void decode_layer_agrees_with_its_pieces(void **state)
{
    NEEDS_DEVICE();
    /* heads of 128 in one kernel; anything else in pieces */
    const int64_t shapes[][6] = {{3, 1, 2, 2, 128, 128}, {2, 3, 1, 1, 128, 128}, {2, 2, 1, 2, 128, 128}, {3, 1, 2, 2, 24, 20}};
    uint64_t seed = 1;
    for (int i = 0; i < 4; i++)
        for (int64_t W = 1; W <= 4; W += 3)
            for (int layout = 0; layout < 2; layout++, seed++) {
                const int64_t *s = shapes[i];
                decode_case a = new_decode(s[0], s[1], s[2], s[3], s[4], s[5], W, (kda_state_layout)layout, seed);
                decode_case b = new_decode(s[0], s[1], s[2], s[3], s[4], s[5], W, (kda_state_layout)layout, seed);
                decode_on(KL_CPU, a.owner, &a.p);
                decode_on(KL_CUDA, b.owner, &b.p);
                decode_agrees(&a, &b, kl_tol_kda_f32.forward);
                case_free(a.owner);
                case_free(b.owner);
            }
}

/* Two tokens at once and one after the other leave the same bits. */
static void decode_layer_split_has_the_same_bits(void **state)
{
    NEEDS_DEVICE();
    decode_case a = new_decode(1, 2, 2, 2, 128, 128, 4, KDA_STATE_KV, 3), b = new_decode(1, 2, 2, 2, 128, 128, 4, KDA_STATE_KV, 3);
    decode_on(KL_CUDA, a.owner, &a.p);
    kda_decode_problem p = b.p;
    p.kda.T = 1;
    decode_on(KL_CUDA, b.owner, &p);
    p.kda.q = (const float *)p.kda.q + 256;
    p.kda.k = (const float *)p.kda.k + 256;
    p.kda.v = (const float *)p.kda.v + 256;
    p.kda.g = (const float *)p.kda.g + 2 * p.kda.G;
    p.kda.beta = (const float *)p.kda.beta + 2;
    p.z = p.z ? (const float *)p.z + 256 : NULL;
    p.y = (float *)p.y + 256;
    decode_on(KL_CUDA, b.owner, &p);
    decode_agrees(&a, &b, 0.0);
    case_free(a.owner);
    case_free(b.owner);
}

static void decode_layer_in_bf16(void **state)
{
    NEEDS_DEVICE();
    for (int layout = 0; layout < 2; layout++) {
        decode_case a = new_decode(3, 1, 2, 2, 128, 128, 4, (kda_state_layout)layout, 5), b = new_decode(3, 1, 2, 2, 128, 128, 4, (kda_state_layout)layout, 5);
        const void **in[] = {&b.p.kda.q, &b.p.kda.k, &b.p.kda.v, &b.p.kda.g, &b.p.kda.beta, &b.p.z};
        const void *same[] = {a.p.kda.q, a.p.kda.k, a.p.kda.v, a.p.kda.g, a.p.kda.beta, a.p.z};
        const int64_t count[] = {3 * 256, 3 * 256, 3 * 256, 3 * 2 * a.p.kda.G, 3 * 2, a.p.z ? 3 * 256 : 0};
        for (int i = 0; i < 6; i++)
            *in[i] = count[i] ? rounded(b.owner, same[i], count[i]) : NULL;
        b.p.kda.dtype = KL_BF16;
        b.p.y = case_alloc(b.owner, b.outputs, 2, 0xff);
        decode_on(KL_CPU, a.owner, &a.p);
        decode_on(KL_CUDA, b.owner, &b.p);
        kl_to_f32(b.y, b.p.y, KL_BF16, (size_t)b.outputs);
        decode_agrees(&a, &b, kl_tol_kda_bf16.forward);
        case_free(a.owner);
        case_free(b.owner);
    }
}

static void decode_layer_refuses_by_name(void **state)
{
    (void)state;
    decode_case good = new_decode(1, 1, 1, 1, 8, 8, 4, KDA_STATE_KV, 1);
    kl_ctx *ctx;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.threads = 1}));
    kda_decode_problem p;
#define REFUSED(change, name)                                     \
    do {                                                          \
        p = good.p;                                               \
        change;                                                   \
        expect_error(kda_decode(ctx, &p, NULL, 0), KL_EINVAL, name); \
    } while (0)
    REFUSED(p.W = 17, "W:");
    REFUSED(p.tail[1] = NULL, "tail[1]:");
    REFUSED(p.weight[2] = NULL, "weight[2]:");
    REFUSED(p.kda.ht = NULL, "ht:");
    REFUSED(p.z = p.z ? NULL : p.y, "z:");
    REFUSED(p.norm_weight = NULL, "norm_weight:");
    REFUSED(p.norm_weight_dtype = KL_I32, "norm_weight_dtype:");
    REFUSED((void)p, "workspace:");
    kl_ctx_destroy(ctx);
    case_free(good.owner);
}

static void dispatch_on_cuda(void **state)
{
    (void)state;
#ifdef KL_HAVE_CUDA
    kda_problem p = {.B = 1, .T = 1, .N = 1, .H = 1, .HV = 1, .K = 128, .V = 128, .G = 128};
    assert_string_equal(kda_pick(KL_CUDA, NULL, &p, KL_FORWARD)->name, "recurrent");
    p.T = 4096; /* float32 */
    assert_string_equal(kda_pick(KL_CUDA, NULL, &p, KL_FORWARD)->name, "recurrent");
    assert_null(kda_pick(KL_CUDA, "no such name", &p, KL_FORWARD));
#else
    skip();
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(recurrent_every_length_and_dimension),
        cmocka_unit_test(recurrent_every_option),
        cmocka_unit_test(recurrent_of_heads_of_128),
        cmocka_unit_test(recurrent_split_anywhere_has_the_same_bits),
        cmocka_unit_test(recurrent_leaves_out_slots_beyond_the_pool),
        cmocka_unit_test(recurrent_in_bf16),
        cmocka_unit_test(decode_layer_agrees_with_its_pieces),
        cmocka_unit_test(decode_layer_split_has_the_same_bits),
        cmocka_unit_test(decode_layer_in_bf16),
        cmocka_unit_test(decode_layer_refuses_by_name),
        cmocka_unit_test(dispatch_on_cuda),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
