/* The general recurrence on a device against its reference, with a, b and k that have nothing to do with each other.
 * Runs on a GPU, or on the host when the kernels are emulated; skipped otherwise. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "common/compare.h"
#include "common/rng.h"
#include "kda/dplr.h"
#include "reference/dplr.h"
#include "tests/device.h"
#include "tests/expect.h"

typedef enum gates { ZERO, SLOW, STRONG, MIXED, FIVE, SIXTY, THOUSAND } gates;

static double draw_gate(kl_rng *r, gates kind, int64_t token, int64_t head, int64_t channel)
{
    double strong = -5.0 / (1.0 + exp(-kl_rng_normal(r))), slow = -0.01 * kl_rng_uniform(r);
    switch (kind) {
    case ZERO: return 0.0;
    case SLOW: return slow;
    case STRONG: return strong;
    case MIXED: return channel % 3 == 0 ? slow : strong;
    case FIVE: return -5.0;
    case SIXTY: return (head + channel) % 3 == 0 ? -60.0 : 0.0;
    case THOUSAND: return (token + head) % 7 == 0 ? -1000.0 : strong;
    }
    return 0.0;
}

/* A problem on the device and its bf16 inputs widened for the reference. */
enum { Q, KEY, A, B, G, V, INPUTS };
typedef struct problem {
    dplr_problem p;
    int64_t cu[32];
    int64_t count[INPUTS], states;
    uint16_t *host[INPUTS];
    double *wide[INPUTS], *h0_wide;
    float *h0, *ht;
    uint16_t *o;
    void *device[INPUTS], *h0_device, *ht_device, *o_device, *workspace;
    size_t workspace_bytes;
} problem;

static void *upload(const void *from, size_t bytes)
{
    void *to;
    assert_ok(kl_gpu_alloc(ctx, &to, bytes));
    if (from)
        assert_ok(kl_gpu_copy(ctx, to, from, bytes));
    else
        assert_ok(kl_gpu_fill(ctx, to, 0xff, bytes));
    return to;
}

/* Random tensors; correlated: KDA with keys at cosine 0.8 and beta near 0.95. */
static void fill(problem *c, gates kind, bool correlated, uint64_t seed)
{
    dplr_problem *p = &c->p;
    kl_rng r = kl_rng_make(seed, 1);
    float small = 0.7f / sqrtf((float)p->K);
    int64_t rows = p->T * p->H, K = p->K;
    double *common = calloc((size_t)K, sizeof *common);
    for (int64_t i = 0; i < K; i++)
        common[i] = kl_rng_normal(&r) / sqrt((double)K);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < K; i++) {
            double g = draw_gate(&r, kind, row / p->H, row % p->H, i), key = 0.894 * common[i] + 0.447 * kl_rng_normal(&r) / sqrt((double)K);
            c->wide[Q][row * K + i] = kl_rng_normal(&r) / sqrt((double)K);
            c->wide[G][row * K + i] = g;
            c->wide[KEY][row * K + i] = correlated ? 0.95 * key : kl_rng_normal(&r) * small;
            c->wide[A][row * K + i] = correlated ? key * exp(g) : kl_rng_normal(&r) * small;
            c->wide[B][row * K + i] = correlated ? -0.95 * key : kl_rng_normal(&r) * small;
        }
    for (int64_t i = 0; i < c->count[V]; i++)
        c->wide[V][i] = kl_rng_normal(&r);
    for (int x = 0; x < INPUTS; x++)
        for (int64_t i = 0; i < c->count[x]; i++) {
            c->host[x][i] = kl_f32_to_bf16((float)c->wide[x][i]);
            c->wide[x][i] = kl_bf16_to_f32(c->host[x][i]);
        }
    for (int64_t i = 0; i < c->states; i++)
        c->h0_wide[i] = c->h0[i] = kl_rng_normal(&r);
    free(common);
}

static problem *make(int64_t N, const int64_t *cu, int64_t H, int64_t K, int64_t Vd, gates kind, bool correlated, uint64_t seed)
{
    problem *c = calloc(1, sizeof *c);
    memcpy(c->cu, cu, (size_t)(N + 1) * sizeof *cu);
    c->p = (dplr_problem){.B = 1, .T = cu[N], .N = N, .H = H, .K = K, .V = Vd, .cu_seqlens = c->cu, .dtype = KL_BF16};
    c->states = N * H * K * Vd;
    for (int x = 0; x < INPUTS; x++) {
        c->count[x] = cu[N] * H * (x == V ? Vd : K);
        c->host[x] = malloc((size_t)(c->count[x] + 1) * sizeof(uint16_t));
        c->wide[x] = calloc((size_t)(c->count[x] + 1), sizeof(double));
    }
    c->h0 = calloc((size_t)(c->states + 1), sizeof(float));
    c->ht = calloc((size_t)(c->states + 1), sizeof(float));
    c->h0_wide = calloc((size_t)(c->states + 1), sizeof(double));
    c->o = calloc((size_t)(c->count[V] + 1), sizeof(uint16_t));
    fill(c, kind, correlated, seed);
    const void **field[] = {&c->p.q, &c->p.k, &c->p.a, &c->p.b, &c->p.g, &c->p.v};
    for (int x = 0; x < INPUTS; x++)
        *field[x] = c->device[x] = upload(c->host[x], (size_t)c->count[x] * sizeof(uint16_t));
    c->p.h0 = c->h0_device = upload(c->h0, (size_t)c->states * sizeof(float));
    c->p.ht = c->ht_device = upload(NULL, (size_t)c->states * sizeof(float));
    c->p.o = c->o_device = upload(NULL, (size_t)c->count[V] * sizeof(uint16_t));
    c->workspace_bytes = dplr_workspace(ctx, &c->p);
    c->workspace = upload(NULL, c->workspace_bytes);
    return c;
}

static void run(problem *c)
{
    assert_ok(dplr_forward(ctx, &c->p, c->workspace, c->workspace_bytes));
    assert_ok(kl_gpu_sync(ctx));
    assert_ok(kl_gpu_copy(ctx, c->o, c->o_device, (size_t)c->count[V] * sizeof(uint16_t)));
    assert_ok(kl_gpu_copy(ctx, c->ht, c->p.ht, (size_t)c->states * sizeof(float)));
}

static void drop(problem *c)
{
    for (int x = 0; x < INPUTS; x++) {
        free(c->host[x]);
        free(c->wide[x]);
        kl_gpu_free(ctx, c->device[x]);
    }
    void *host[] = {c->h0, c->ht, c->h0_wide, c->o}, *device[] = {c->h0_device, c->ht_device, c->o_device, c->workspace};
    for (int i = 0; i < 4; i++) {
        free(host[i]);
        kl_gpu_free(ctx, device[i]);
    }
    free(c);
}

/* The worst head of o, and of ht, against the reference in double precision. */
static void score(const problem *c, double worst[2])
{
    const dplr_problem *p = &c->p;
    int64_t ns = p->H * p->K * p->V;
    double *o = ref_zeros(c->count[V]), *ht = ref_zeros(c->states);
    for (int64_t n = 0; n < p->N; n++) {
        int64_t keys = c->cu[n] * p->H * p->K, values = c->cu[n] * p->H * p->V;
        ref_dplr ref = {.T = c->cu[n + 1] - c->cu[n], .H = p->H, .K = p->K, .V = p->V, .q = c->wide[Q] + keys, .k = c->wide[KEY] + keys,
                        .a = c->wide[A] + keys, .b = c->wide[B] + keys, .g = c->wide[G] + keys, .v = c->wide[V] + values,
                        .h0 = c->h0_wide + n * ns};
        assert_int_equal(ref_dplr_forward(&ref, o + values, ht + n * ns), 0);
    }
    worst[0] = worst[1] = 0.0;
    for (int64_t h = 0; h < p->H; h++) {
        double sum[4] = {0};
        for (int64_t t = 0; t < p->T; t++)
            for (int64_t i = 0; i < p->V; i++) {
                int64_t at = (t * p->H + h) * p->V + i;
                double d = kl_bf16_to_f32(c->o[at]) - o[at];
                sum[0] += d * d;
                sum[1] += o[at] * o[at];
            }
        for (int64_t n = 0; n < p->N; n++)
            for (int64_t i = 0; i < p->K * p->V; i++) {
                int64_t at = (n * p->H + h) * p->K * p->V + i;
                double d = c->ht[at] - ht[at];
                sum[2] += d * d;
                sum[3] += ht[at] * ht[at];
            }
        for (int x = 0; x < 2; x++) {
            double error = sum[2 * x + 1] > 0.0 ? sqrt(sum[2 * x] / sum[2 * x + 1]) : sum[2 * x];
            worst[x] = !(error <= worst[x]) ? error : worst[x];
        }
    }
    free(o);
    free(ht);
}

static void check(int64_t N, const int64_t *cu, int64_t H, int64_t K, int64_t Vd, gates kind, bool correlated, uint64_t seed)
{
    problem *c = make(N, cu, H, K, Vd, kind, correlated, seed);
    double worst[2], most = (correlated ? kl_tol_kda_bf16_corr : kl_tol_kda_bf16).forward;
    run(c);
    score(c, worst);
    printf("           T %lld N %lld H %lld K %lld V %lld gates %d%s: o %.2e, ht %.2e\n", (long long)c->p.T, (long long)N, (long long)H,
           (long long)K, (long long)Vd, (int)kind, correlated ? " correlated" : "", worst[0], worst[1]);
    assert_true(worst[0] <= most);
    assert_true(worst[1] <= most);
    drop(c);
}

static const int64_t packed[] = {0, 1, 16, 272, 272, 400};

static void every_gate_is_exact(void **state)
{
    (void)state;
    NEEDS_DEVICE();
    const int64_t cu[] = {0, 150, 233};
    for (int kind = ZERO; kind <= THOUSAND; kind++)
        check(2, cu, 2, 128, 64, (gates)kind, false, (uint64_t)(10 + kind));
    check(2, cu, 2, 128, 64, SLOW, true, 20);
}

static void every_dimension_and_length_works(void **state)
{
    (void)state;
    NEEDS_DEVICE();
    const int64_t dims[] = {1, 8, 24, 60, 64, 100, 256};
    for (int i = 0; i < 7; i++)
        check(5, packed, 1 + i % 2, dims[i], dims[(i + 3) % 7], i % 2 ? MIXED : THOUSAND, false, (uint64_t)(30 + i));
    const int64_t lengths[] = {0, 1, 2, 15, 17, 31, 32, 33, 63, 64, 65, 129};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        const int64_t cu[] = {0, lengths[i]};
        check(1, cu, 2, 64, 64, MIXED, false, (uint64_t)(50 + i));
    }
}

/* Later tokens, other rows and the state's place move no bit. */
static void a_token_depends_on_the_past_alone(void **state)
{
    (void)state;
    NEEDS_DEVICE();
    const int64_t cu[] = {0, 100, 190}, other[] = {0, 100, 190};
    problem *c = make(2, cu, 2, 64, 64, STRONG, false, 70), *d = make(2, other, 2, 64, 64, STRONG, false, 70);
    int64_t kept = 37 * c->p.H;
    for (int64_t i = kept * 64; i < d->count[G]; i++)
        d->host[G][i] = kl_f32_to_bf16(i % 5 ? -1000.0f : 0.0f);
    for (int64_t i = kept * 64; i < d->count[KEY]; i++)
        d->host[KEY][i] ^= 0x8000, d->host[A][i] ^= 0x8040;
    for (int x = 0; x < INPUTS; x++)
        assert_ok(kl_gpu_copy(ctx, d->device[x], d->host[x], (size_t)d->count[x] * sizeof(uint16_t)));
    run(c);
    d->p.ht = (float *)d->h0_device;
    run(d);
    assert_memory_equal(c->o, d->o, (size_t)(kept * 64) * sizeof *c->o);
    assert_ok(kl_gpu_copy(ctx, d->h0_device, d->h0, (size_t)d->states * sizeof(float)));
    for (int x = 0; x < INPUTS; x++)
        assert_ok(kl_gpu_copy(ctx, d->device[x], c->host[x], (size_t)d->count[x] * sizeof(uint16_t)));
    run(d);
    assert_memory_equal(c->o, d->o, (size_t)c->count[V] * sizeof *c->o);
    assert_memory_equal(c->ht, d->ht, (size_t)c->states * sizeof *c->ht);
    drop(c);
    drop(d);
}

/* Rows of a batch are packed sequences of one length; no state in is a zero state; the state carried over a cut goes on. */
static void rows_packing_and_carried_states_agree(void **state)
{
    (void)state;
    NEEDS_DEVICE();
    enum { CUT = 53, END = 120, H = 2, D = 64 };
    const int64_t cu[] = {0, END, 2 * END};
    problem *c = make(2, cu, H, D, D, MIXED, false, 80), *d = make(2, cu, H, D, D, MIXED, false, 80);
    c->p.h0 = NULL;
    run(c);
    memset(d->h0, 0, (size_t)d->states * sizeof(float));
    assert_ok(kl_gpu_copy(ctx, d->h0_device, d->h0, (size_t)d->states * sizeof(float)));
    d->p.B = 2;
    d->p.T = END;
    d->p.cu_seqlens = NULL;
    run(d);
    assert_memory_equal(c->o, d->o, (size_t)c->count[V] * sizeof *c->o);
    assert_memory_equal(c->ht, d->ht, (size_t)c->states * sizeof *c->ht);

    const int64_t parts[][2] = {{0, CUT}, {CUT, END}};
    d->p.B = d->p.N = 1;
    d->p.ht = (float *)d->h0_device;
    for (int i = 0; i < 2; i++) {
        int64_t at = parts[i][0] * H * D;
        const void **field[] = {&d->p.q, &d->p.k, &d->p.a, &d->p.b, &d->p.g, &d->p.v};
        for (int x = 0; x < INPUTS; x++)
            *field[x] = (uint16_t *)d->device[x] + at;
        d->p.o = (uint16_t *)d->o_device + at;
        d->p.T = parts[i][1] - parts[i][0];
        assert_ok(dplr_forward(ctx, &d->p, d->workspace, d->workspace_bytes));
    }
    assert_ok(kl_gpu_sync(ctx));
    assert_ok(kl_gpu_copy(ctx, d->o, d->o_device, END * H * D * sizeof *d->o));
    assert_ok(kl_gpu_copy(ctx, d->ht, d->h0_device, H * D * D * sizeof *d->ht));
    double far = 0.0, size = 0.0;
    for (int64_t i = 0; i < END * H * D; i++) {
        double x = kl_bf16_to_f32(c->o[i]), y = kl_bf16_to_f32(d->o[i]);
        far += (x - y) * (x - y);
        size += x * x;
    }
    assert_true(sqrt(far / size) <= kl_tol_kda_bf16.forward);
    assert_true(kl_within(kl_rel_err_f32(d->ht, c->ht, H * D * D), kl_tol_kda_bf16.forward));
    drop(c);
    drop(d);
}

static void what_is_not_offered_is_refused(void **state)
{
    (void)state;
    NEEDS_DEVICE();
    const int64_t cu[] = {0, 20};
    problem *c = make(1, cu, 1, 16, 16, SLOW, false, 90);
    kl_status s = dplr_forward(ctx, &c->p, c->workspace, c->workspace_bytes - 1);
    assert_int_equal(s.code, KL_EINVAL);
    assert_non_null(strstr(s.message, "workspace"));
    c->p.dtype = KL_F32;
    s = dplr_forward(ctx, &c->p, c->workspace, c->workspace_bytes);
    assert_int_equal(s.code, KL_EUNSUPPORTED);
    assert_non_null(strstr(s.message, "dtype"));
    c->p.dtype = KL_BF16;
    c->p.chunk = 64;
    s = dplr_forward(ctx, &c->p, c->workspace, c->workspace_bytes);
    assert_int_equal(s.code, KL_EUNSUPPORTED);
    assert_non_null(strstr(s.message, "chunk"));
    c->p.dtype = KL_F16;
    assert_int_equal(dplr_forward(ctx, &c->p, c->workspace, c->workspace_bytes).code, KL_EINVAL);
    drop(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_gate_is_exact),
        cmocka_unit_test(every_dimension_and_length_works),
        cmocka_unit_test(a_token_depends_on_the_past_alone),
        cmocka_unit_test(rows_packing_and_carried_states_agree),
        cmocka_unit_test(what_is_not_offered_is_refused),
    };
    return cmocka_run_group_tests_name("kda_dplr_cuda", tests, set_up_device, tear_down_device);
}
