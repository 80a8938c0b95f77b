/* MLA decoding on a device: batches of unequal lengths, cut anywhere, against the reference; what lies between the sequences is
 * never read into a result. On an emulated device the kernels run on the host. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>

#include "common/rng.h"
#include "harness/reference_variants.h"
#include "tests/device.h"
#include "tests/expect.h"

enum { R = 512, DR = 64, DN = 128, WIDTH = R + DR, MOST = 8, GAP = 3 };

static kl_ctx *host;
static const kl_variant *variant;

static int open_device(void **state)
{
    (void)state;
    variant = mla_pick(KL_CUDA, "recurrent", NULL, KL_FORWARD);
    return open_ctx() || (ctx && (!variant || kl_failed(kl_ctx_create(&host, NULL))));
}

static int close_device(void **state)
{
    (void)state;
    kl_ctx_destroy(host);
    return close_ctx();
}

/* ---- a batch: the sequences in any order in the cache, NaN between them and before the first query ---- */

typedef struct batch {
    int64_t N, H, Dv, queries[MOST], keys[MOST], gap; /* gap: elements between tokens of q */
    float size;                                   /* of the queries: 1 gives logits near 1 */
} batch;

typedef struct tensors {
    mla_problem p;                  /* on the host, float q and o */
    int64_t cu_q[MOST + 1], kv_start[MOST], kv_len[MOST], tokens, q_size, o_size;
    float *q, *o, *lse, *got_o, *got_lse;
    uint16_t *latent, *kv_b;
} tensors;

static void *room(size_t bytes)
{
    void *x = malloc(bytes + 64);
    assert_non_null(x);
    memset(x, 0xff, bytes + 64);
    return x;
}

static void draw(uint16_t *bf16, float *x, int64_t n, uint64_t stream, float size)
{
    kl_rng r = kl_rng_make(11, stream);
    for (int64_t i = 0; i < n; i++) {
        float v;
        kl_fill_normal(&r, &v, 1, 0.0f, size);
        uint16_t b = kl_f32_to_bf16(v);
        if (bf16)
            bf16[i] = b;
        else
            x[i] = kl_bf16_to_f32(b);
    }
}

static void make(tensors *x, const batch *b)
{
    int64_t head = DN + DR, row = GAP;
    *x = (tensors){0};
    x->cu_q[0] = 1;
    for (int64_t n = b->N - 1; n >= 0; n--) {
        x->kv_len[n] = b->keys[n];
        x->kv_start[n] = row;
        row += b->keys[n] + GAP;
    }
    for (int64_t n = 0; n < b->N; n++)
        x->cu_q[n + 1] = x->cu_q[n] + b->queries[n];
    x->tokens = x->cu_q[b->N];
    int64_t stride = b->H * head + b->gap, weights = b->H * (DN + b->Dv) * R;
    x->q_size = x->tokens * stride;
    x->o_size = x->tokens * b->H * b->Dv;
    x->q = room((size_t)x->q_size * sizeof(float));
    x->o = room((size_t)x->o_size * sizeof(float));
    x->got_o = room((size_t)x->o_size * sizeof(float));
    x->lse = room((size_t)(x->tokens * b->H) * sizeof(float));
    x->got_lse = room((size_t)(x->tokens * b->H) * sizeof(float));
    x->latent = room((size_t)(row * WIDTH) * 2);
    x->kv_b = room((size_t)weights * 2);
    for (int64_t t = x->cu_q[0]; t < x->tokens; t++)
        draw(NULL, x->q + t * stride, b->H * head, 100 + (uint64_t)t, b->size);
    for (int64_t n = 0; n < b->N; n++)
        draw(x->latent + x->kv_start[n] * WIDTH, NULL, x->kv_len[n] * WIDTH, 1000 + (uint64_t)n, 1.0f);
    draw(x->kv_b, NULL, weights, 1, 1.0f / sqrtf(R));
    x->p = (mla_problem){.N = b->N, .H = b->H, .R = R, .Dn = DN, .Dr = DR, .Dv = b->Dv, .cu_q = x->cu_q, .kv_start = x->kv_start, .kv_len = x->kv_len,
                         .latent_dtype = KL_BF16, .weight_dtype = KL_BF16, .q = x->q, .q_stride = b->gap ? stride : 0, .latent = x->latent,
                         .latent_rows = row, .kv_b = x->kv_b, .o = x->o, .lse = x->lse};
}

static void drop(tensors *x)
{
    void *all[] = {x->q, x->o, x->lse, x->got_o, x->got_lse, x->latent, x->kv_b};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* ---- running ---- */

static void *sent(const void *x, size_t bytes)
{
    void *there;
    assert_ok(kl_gpu_alloc(ctx, &there, bytes));
    assert_ok(kl_gpu_copy(ctx, there, x, bytes));
    return there;
}

static void *sent_bf16(const float *x, int64_t n)
{
    uint16_t *narrow = room((size_t)n * 2);
    for (int64_t i = 0; i < n; i++)
        narrow[i] = kl_f32_to_bf16(x[i]);
    void *there = sent(narrow, (size_t)n * 2);
    free(narrow);
    return there;
}

/* The problem on the device; freed by run_placed(). */
static mla_problem placed(const tensors *x)
{
    mla_problem p = x->p;
    p.dtype = KL_BF16;
    p.q = sent_bf16(x->q, x->q_size);
    p.latent = sent(x->latent, (size_t)(p.latent_rows * WIDTH) * 2);
    p.kv_b = sent(x->kv_b, (size_t)(p.H * (DN + p.Dv) * R) * 2);
    p.o = sent_bf16(x->got_o, x->o_size);
    p.lse = sent(x->got_lse, (size_t)(x->tokens * p.H) * sizeof(float));
    return p;
}

static void leave(mla_problem *p)
{
    void *all[] = {(void *)p->q, (void *)p->latent, (void *)p->kv_b, p->o, p->lse};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        kl_gpu_free(ctx, all[i]);
}

static void run_placed(tensors *x, mla_problem p)
{
    size_t bytes = variant->workspace(ctx, &p, KL_FORWARD);
    void *workspace;
    uint16_t *o = room((size_t)x->o_size * 2);
    assert_ok(kl_gpu_alloc(ctx, &workspace, bytes));
    assert_ok(kl_gpu_fill(ctx, workspace, 0xff, bytes));
    assert_ok(variant->forward(ctx, &p, workspace, bytes));
    assert_ok(kl_gpu_copy(ctx, o, p.o, (size_t)x->o_size * 2));
    assert_ok(kl_gpu_copy(ctx, x->got_lse, p.lse, (size_t)(x->tokens * p.H) * sizeof(float)));
    kl_to_f32(x->got_o, o, KL_BF16, (size_t)x->o_size);
    kl_gpu_free(ctx, workspace);
    free(o);
    leave(&p);
}

static void run(tensors *x) { run_placed(x, placed(x)); }

static void reference(const tensors *x)
{
    size_t bytes = kl_reference_mla.workspace(host, &x->p, KL_FORWARD);
    void *workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
    assert_non_null(workspace);
    assert_ok(kl_reference_mla.forward(host, &x->p, workspace, bytes));
    free(workspace);
}

static void near(const char *what, const float *got, const float *want, int64_t n, double limit)
{
    double err = kl_rel_err_f32(got, want, (size_t)n);
    if (!kl_within(err, limit))
        fail_msg("%s: error %g beyond %g", what, err, limit);
}

static void check(const batch *b, double limit)
{
    tensors x;
    make(&x, b);
    reference(&x);
    run(&x);
    int64_t skip_o = x.cu_q[0] * b->H * b->Dv, skip_lse = x.cu_q[0] * b->H;
    near("o", x.got_o + skip_o, x.o + skip_o, x.o_size - skip_o, limit);
    near("lse", x.got_lse + skip_lse, x.lse + skip_lse, x.tokens * b->H - skip_lse, limit);
    for (int64_t i = 0; i < skip_o; i++)
        assert_true(isnan(x.got_o[i])); /* what belongs to no sequence is left alone */
    drop(&x);
}

/* ---- tests ---- */

static void unequal_lengths(void **state)
{
    NEEDS_DEVICE();
    check(&(batch){.N = 6, .H = 3, .Dv = 128, .queries = {1, 2, 0, 1, 3, 1}, .keys = {1, 65, 7, 130, 3, 333}, .size = 1.0f, .gap = 8}, kl_tol_mla_bf16.forward);
}

static void one_key(void **state)
{
    NEEDS_DEVICE();
    check(&(batch){.N = 1, .H = 32, .Dv = 128, .queries = {1}, .keys = {1}, .size = 1.0f}, kl_tol_mla_bf16.forward);
}

/* Several tiles of rows a sequence, causal among the tokens, also where a tile ends between the heads of a token. */
static void several_tokens(void **state)
{
    NEEDS_DEVICE();
    check(&(batch){.N = 1, .H = 32, .Dv = 128, .queries = {8}, .keys = {68}, .size = 1.0f}, kl_tol_mla_bf16.forward);
    check(&(batch){.N = 2, .H = 9, .Dv = 40, .queries = {8, 5}, .keys = {8, 70}, .size = 1.0f}, kl_tol_mla_bf16.forward);
}

static void every_count_of_heads(void **state)
{
    NEEDS_DEVICE();
    check(&(batch){.N = 1, .H = 64, .Dv = 128, .queries = {1}, .keys = {40}, .size = 1.0f}, kl_tol_mla_bf16.forward);
    check(&(batch){.N = 1, .H = 65, .Dv = 8, .queries = {1}, .keys = {20}, .size = 1.0f}, kl_tol_mla_bf16.forward);
}

/* More tokens than a tile of the two ends has: 16 and 64. */
static void many_sequences(void **state)
{
    NEEDS_DEVICE();
    check(&(batch){.N = 2, .H = 1, .Dv = 128, .queries = {70, 3}, .keys = {80, 5}, .size = 1.0f}, kl_tol_mla_bf16.forward);
}

/* Softmax all but chooses one key; the scores' own rounding then decides by how much. */
static void large_logits(void **state)
{
    NEEDS_DEVICE();
    check(&(batch){.N = 1, .H = 2, .Dv = 128, .queries = {2}, .keys = {200}, .size = 8.0f}, 8.0 * kl_tol_mla_bf16.forward);
}

/* Every length around the blocks' and the parts' ends. */
static void split_boundaries(void **state)
{
    NEEDS_DEVICE();
    for (int64_t keys = 575; keys <= 577; keys++)
        check(&(batch){.N = 1, .H = 1, .Dv = 128, .queries = {1}, .keys = {keys}, .size = 1.0f}, kl_tol_mla_bf16.forward);
}

static void the_same_bits_again(void **state)
{
    NEEDS_DEVICE();
    tensors x;
    make(&x, &(batch){.N = 2, .H = 2, .Dv = 128, .queries = {1, 1}, .keys = {200, 90}, .size = 1.0f});
    run(&x);
    float *first = room((size_t)x.o_size * sizeof(float));
    memcpy(first, x.got_o, (size_t)x.o_size * sizeof(float));
    run(&x);
    assert_memory_equal(first, x.got_o, (size_t)x.o_size * sizeof(float));
    free(first);
    drop(&x);
}

/* Latent rows beyond 2^31 elements have the same bits as at a cache's beginning. */
static void beyond_two_to_the_31(void **state)
{
    NEEDS_DEVICE();
    int64_t far = ((int64_t)1 << 31) / WIDTH + 1000, keys = 200;
    void *cache;
    if (kl_failed(kl_gpu_alloc(ctx, &cache, (size_t)((far + keys) * WIDTH) * 2)))
        skip();
    tensors x;
    make(&x, &(batch){.N = 1, .H = 2, .Dv = 128, .queries = {3}, .keys = {keys}, .size = 1.0f});
    run(&x);
    float *near_by = room((size_t)x.o_size * sizeof(float));
    memcpy(near_by, x.got_o, (size_t)x.o_size * sizeof(float));
    mla_problem p = placed(&x);
    assert_ok(kl_gpu_copy(ctx, (uint16_t *)cache + far * WIDTH, x.latent + x.kv_start[0] * WIDTH, (size_t)(keys * WIDTH) * 2));
    kl_gpu_free(ctx, (void *)p.latent);
    p.latent = cache;
    p.latent_rows = far + keys;
    x.kv_start[0] = far;
    run_placed(&x, p);
    assert_memory_equal(near_by, x.got_o, (size_t)x.o_size * sizeof(float));
    free(near_by);
    drop(&x);
}

/* Refused by name before anything is launched. */
static void bad_problems(void **state)
{
    NEEDS_DEVICE();
    tensors x;
    make(&x, &(batch){.N = 1, .H = 2, .Dv = 128, .queries = {1}, .keys = {5}, .size = 1.0f});
    mla_problem good = placed(&x), p;
    size_t bytes = variant->workspace(ctx, &good, KL_FORWARD);
    void *workspace;
    assert_ok(kl_gpu_alloc(ctx, &workspace, bytes));
#define BAD(part, ...)                                                      \
    do {                                                                    \
        p = good;                                                           \
        __VA_ARGS__;                                                        \
        kl_status s_ = variant->forward(ctx, &p, workspace, bytes);         \
        if (!kl_failed(s_) || strncmp(s_.message, part, strlen(part)) != 0) \
            fail_msg("expected '%s', got '%s'", part, s_.message);          \
    } while (0)
    BAD("dtype:", p.dtype = KL_F32);
    BAD("latent_dtype:", p.latent_dtype = KL_F32);
    BAD("weight_dtype:", p.weight_dtype = KL_F16);
    BAD("R, Dr:", p.R = 256);
    BAD("Dn:", p.Dn = 100);
    BAD("Dv:", p.Dv = 12);
    BAD("Dn:", p.Dn = 264);
    BAD("q_stride:", p.q_stride = 2 * (DN + DR) + 4);
    BAD("latent:", p.latent = (const char *)p.latent + 2);
    BAD("o:", p.o = NULL);
    BAD("kv_len[0]:", x.kv_len[0] = 1000);
    x.kv_len[0] = 5;
#undef BAD
    expect_error(variant->forward(ctx, &good, workspace, bytes - 64), KL_EINVAL, "workspace: expected at least");
    expect_error(variant->check(&good, KL_BACKWARD), KL_EUNSUPPORTED, "pass:");
    expect_error(variant->forward(host, &good, workspace, bytes), KL_EUNSUPPORTED, "dtype:");
    kl_gpu_free(ctx, workspace);
    leave(&good);
    drop(&x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(unequal_lengths),  cmocka_unit_test(one_key),        cmocka_unit_test(several_tokens),
        cmocka_unit_test(every_count_of_heads), cmocka_unit_test(many_sequences), cmocka_unit_test(large_logits),
        cmocka_unit_test(split_boundaries), cmocka_unit_test(the_same_bits_again), cmocka_unit_test(beyond_two_to_the_31),
        cmocka_unit_test(bad_problems),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
