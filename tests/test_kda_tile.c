/* The tiles that the chunk kernels on CUDA prepare, matrix by matrix against double arithmetic on the same bf16 inputs. Runs
 * where there is a device or its emulation. The format is read here by its description in kda/cuda/tile.cuh, not by its code. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "common/gpu.h"
#include "kda/internal.h"
#include "tests/expect.h"
#include "tests/kda_case.h"

enum { TILE = 32, BLOCK = 512 };

/* ---- a tile in double ---- */
typedef struct tile {
    double w[TILE][256], qg[TILE][256], kg[TILE][256], Tb[TILE][TILE], Aqk[TILE][TILE], decay[256];
    double qk; /* reference: the size of Aqk to expect of its lengths */
} tile;

static double bf16(float x) { return kl_bf16_to_f32(kl_f32_to_bf16(x)); }

/* log-decay of channel c, token t, value head hv */
static double log_decay(const kda_problem *p, int64_t t, int64_t hv, int64_t c)
{
    if (!p->G)
        return 0.0;
    int64_t at = hv * p->G + c / (p->K / p->G);
    double g = bf16(((const float *)p->g)[t * kda_stride(p->g_stride, p->HV * p->G) + at]), A;
    if (p->gate == KDA_GATE_LOG)
        return g;
    A = exp(p->A_log[hv]);
    g += p->dt_bias ? p->dt_bias[at] : 0.0;
    if (p->gate == KDA_GATE_SOFTPLUS)
        return -A * (g > 20.0 ? g : log1p(exp(g)));
    return p->lower_bound / (1.0 + exp(-A * g));
}

static void row(const kda_problem *p, double *y, const void *x, int64_t stride, int64_t t, int64_t h, double scale)
{
    double norm = 0.0;
    for (int64_t c = 0; c < p->K; c++) {
        y[c] = bf16(((const float *)x)[t * kda_stride(stride, p->H * p->K) + h * p->K + c]);
        norm += y[c] * y[c];
    }
    for (int64_t c = 0; c < p->K; c++)
        y[c] *= p->qk_l2norm ? scale / sqrt(norm + 1e-6) : scale;
}

static void reference(const kda_problem *p, int64_t first, int64_t n, int64_t hv, tile *y)
{
    static double q[TILE][256], k[TILE][256], G[TILE + 1][256], T[TILE][TILE], A[TILE][TILE], beta[TILE];
    int64_t K = p->K, h = hv / (p->HV / p->H);
    memset(y, 0, sizeof *y);
    memset(G, 0, sizeof G);
    for (int64_t i = 0; i < n; i++) {
        row(p, q[i], p->q, p->q_stride, first + i, h, kda_scale(p->scale, K));
        row(p, k[i], p->k, p->k_stride, first + i, h, 1.0);
        for (int64_t c = 0; c < K; c++)
            G[i + 1][c] = G[i][c] + log_decay(p, first + i, hv, c);
        double b = bf16(((const float *)p->beta)[(first + i) * kda_stride(p->beta_stride, p->HV) + hv]);
        beta[i] = p->beta_kind == KDA_BETA_PLAIN ? b : (p->beta_kind == KDA_BETA_SIGMOID2 ? 2.0 : 1.0) / (1.0 + exp(-b));
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            double a = 0.0, aqk = 0.0, qq = 0.0, kk = 0.0;
            for (int64_t c = 0; c < K; c++) {
                double x = k[j][c] * exp(G[i + 1][c] - G[j + 1][c]);
                a += k[i][c] * x;
                aqk += q[i][c] * x;
                qq += q[i][c] * q[i][c];
                kk += k[j][c] * k[j][c];
            }
            y->qk = fmax(y->qk, sqrt(qq * kk / (double)K));
            A[i][j] = j < i && !p->no_delta ? beta[i] * a : 0.0;
            y->Aqk[i][j] = aqk;
        }
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < n; i++) {
            T[i][j] = i == j;
            for (int64_t m = j; m < i; m++)
                T[i][j] -= A[i][m] * T[m][j];
            y->Tb[i][j] = T[i][j] * beta[j];
        }
    for (int64_t c = 0; c < K; c++) {
        for (int64_t i = 0; i < n; i++) {
            y->qg[i][c] = q[i][c] * exp(G[i + 1][c]);
            y->kg[i][c] = k[i][c] * exp(G[n][c] - G[i + 1][c]);
            for (int64_t j = 0; j <= i && !p->no_delta; j++)
                y->w[i][c] += y->Tb[i][j] * k[j][c] * exp(G[j + 1][c]);
        }
        y->decay[c] = exp(G[n][c]);
    }
    for (int64_t c = K; c < 256; c++)
        y->decay[c] = 1.0;
}

/* ---- a tile from memory ---- */

/* Element (k, n) of block b of a matrix of B fragments. */
static double element(const unsigned char *matrix, int64_t b, int64_t k, int64_t n)
{
    int64_t lane = 4 * (n % 8) + k % 8 / 2, word = 2 * (n / 8) + k / 8;
    int64_t slot = lane ^ (lane >> 3 & 3) ^ ((b ^ b >> 2) & 1) << 2;
    uint16_t x;
    memcpy(&x, matrix + b * BLOCK + 16 * slot + 4 * (word ^ (b & 2)) + 2 * (k & 1), 2);
    return kl_bf16_to_f32(x);
}

static void unpack(const unsigned char *at, int64_t KP, tile *y)
{
    const unsigned char *w = at, *qg = w + 64 * KP, *kg = qg + 64 * KP, *Tb = kg + 64 * KP, *Aqk = Tb + 3 * BLOCK, *decay = Aqk + 3 * BLOCK;
    memset(y, 0, sizeof *y);
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t c = 0; c < KP; c++) {
            y->w[i][c] = element(w, c / 16 * 2 + i / 16, c % 16, i % 16);
            y->qg[i][c] = element(qg, c / 16 * 2 + i / 16, c % 16, i % 16);
            y->kg[i][c] = element(kg, i / 16 * (KP / 16) + c / 16, i % 16, c % 16);
        }
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t j = 0; j < TILE; j++)
            if (i / 16 >= j / 16) {
                y->Tb[i][j] = element(Tb, i / 16 + j / 16, j % 16, i % 16);
                y->Aqk[i][j] = element(Aqk, i / 16 + j / 16, j % 16, i % 16);
            }
    for (int64_t c = 0; c < 256; c++) {
        float x = 1.0f;
        if (c < KP)
            memcpy(&x, decay + 4 * c, 4);
        y->decay[c] = x;
    }
}

/* The same from the form of 8 x 8 cores, each 8 rows n of 8 values of k. */
static double core_element(const unsigned char *matrix, int64_t k_apart, int64_t k, int64_t n)
{
    uint16_t x;
    memcpy(&x, matrix + k / 8 * k_apart + n / 8 * 128 + n % 8 * 16 + k % 8 * 2, 2);
    return kl_bf16_to_f32(x);
}

static void unpack_core(const unsigned char *RO, int64_t KP, tile *y)
{
    const unsigned char *G = RO + KP / 8 * 1040, *Tb = G + 4 * (16 * KP + 16), *Aqk = Tb + 2048, *decay = Aqk + 2048;
    memset(y, 0, sizeof *y);
    for (int64_t i = 0; i < TILE; i++) {
        for (int64_t c = 0; c < KP; c++) {
            y->w[i][c] = -core_element(RO, 1040, c, i);
            y->qg[i][c] = core_element(RO, 1040, c, TILE + i);
            y->kg[i][c] = core_element(G, 16 * KP + 16, i, c);
        }
        for (int64_t j = 0; j < TILE; j++) {
            y->Tb[i][j] = core_element(Tb, 512, j, i);
            y->Aqk[i][j] = core_element(Aqk, 512, j, i);
        }
    }
    for (int64_t c = 0; c < 256; c++) {
        float x = 1.0f;
        if (c < KP)
            memcpy(&x, decay + 4 * c, 4);
        y->decay[c] = x;
    }
}

/* ---- comparing ---- */
typedef struct worst {
    double w, qg, kg, Tb, Aqk, decay;
} worst;

/* Largest difference over the largest element, or over size if that is more, of one tile. */
static double apart(const double *x, const double *y, size_t n, double size)
{
    double diff = 0.0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs(x[i] - y[i]);
        diff = !(d <= diff) ? d : diff;
        size = fabs(y[i]) > size ? fabs(y[i]) : size;
    }
    return diff / (size > 1e-30 ? size : 1e-30);
}
static void take(double *most, double x) { *most = !(x <= *most) ? x : *most; }

static void compare(const tile *x, const tile *y, worst *most)
{
#define TAKE(f, size) take(&most->f, apart((const double *)x->f, (const double *)y->f, sizeof x->f / sizeof(double), size))
    TAKE(w, 0.0);
    TAKE(qg, 0.0);
    TAKE(kg, 0.0);
    TAKE(Tb, 0.0);
    TAKE(Aqk, y->qk);
    TAKE(decay, 0.0);
#undef TAKE
}

#ifdef KL_HAVE_CUDA
/* ---- a problem on the device ---- */
static void *device_memory(const kl_ctx *ctx, size_t bytes)
{
    void *x;
    assert_ok(kl_gpu_alloc(ctx, &x, bytes));
    assert_ok(kl_gpu_fill(ctx, x, 0xff, bytes));
    return x;
}
static void *on_device(const kl_ctx *ctx, const void *x, size_t bytes)
{
    if (!x)
        return NULL;
    void *y = device_memory(ctx, bytes);
    assert_ok(kl_gpu_copy(ctx, y, x, bytes));
    return y;
}
static void *bf16_on_device(const kl_ctx *ctx, const void *x, int64_t count)
{
    uint16_t *y = malloc((size_t)(count + 1) * sizeof *y);
    for (int64_t i = 0; x && i < count; i++)
        y[i] = kl_f32_to_bf16(((const float *)x)[i]);
    void *z = x ? on_device(ctx, y, (size_t)count * sizeof *y) : NULL;
    free(y);
    return z;
}

static worst run_form(const kl_ctx *ctx, case_options opt, bool core)
{
    opt.no_d_o = opt.no_dht = opt.no_h0 = opt.no_ht = true;
    opt.V = opt.V ? opt.V : 1;
    kda_case *c = case_new(opt);
    kda_problem p = c->p;
    static float states;
    if (opt.chunk)
        c->p.chunk_states = p.chunk_states = &states; /* shortens tiles; never written here */
    p.dtype = KL_BF16;
    p.q = bf16_on_device(ctx, p.q, c->tokens * kda_stride(p.q_stride, p.H * p.K));
    p.k = bf16_on_device(ctx, p.k, c->tokens * kda_stride(p.k_stride, p.H * p.K));
    p.g = bf16_on_device(ctx, p.g, c->tokens * kda_stride(p.g_stride, p.HV * p.G));
    p.beta = bf16_on_device(ctx, p.beta, c->tokens * kda_stride(p.beta_stride, p.HV));
    p.A_log = on_device(ctx, p.A_log, (size_t)p.HV * sizeof(float));
    p.dt_bias = on_device(ctx, p.dt_bias, (size_t)(p.HV * p.G) * sizeof(float));
    size_t bytes = kda_cuda_tiles_workspace(&p, core);
    unsigned char *workspace = device_memory(ctx, bytes), *host = malloc(bytes + 1);
    const void *tiles;
    assert_ok(kda_cuda_tiles(ctx, &p, core, workspace, bytes, &tiles));
    assert_ok(kl_gpu_copy(ctx, host, workspace, bytes));

    worst most = {0};
    static tile x, y;
    int64_t KP = p.K <= 64 ? 64 : p.K <= 128 ? 128 : 256, size = core ? 198 * KP + 4160 : 196 * KP + 6 * BLOCK, step = opt.chunk == 16 ? 16 : TILE;
    const unsigned char *at = host + ((const unsigned char *)tiles - workspace);
    for (int64_t n = 0; n < p.N; n++) {
        kda_span span = kda_sequence(p.T, p.cu_seqlens, n);
        for (int64_t t = 0; t < span.length; t += step)
            for (int64_t hv = 0; hv < p.HV; hv++, at += size) {
                reference(&c->p, span.begin + t, span.length - t < step ? span.length - t : step, hv, &y);
                (core ? unpack_core : unpack)(at, KP, &x);
                compare(&x, &y, &most);
            }
    }
    const void *owned[] = {p.q, p.k, p.g, p.beta, p.A_log, p.dt_bias, workspace};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        kl_gpu_free(ctx, (void *)owned[i]);
    free(host);
    case_free(c);
    return most;
}


/* The worse of the two forms. */
static worst run(const kl_ctx *ctx, case_options opt)
{
    worst most = run_form(ctx, opt, false);
    if (opt.K <= 128) {
        worst core = run_form(ctx, opt, true);
        for (size_t i = 0; i < sizeof most / sizeof(double); i++)
            take((double *)&most + i, ((const double *)&core)[i]);
    }
    return most;
}
#else
static worst run(const kl_ctx *ctx, case_options opt)
{
    (void)ctx, (void)opt, (void)reference, (void)unpack, (void)unpack_core, (void)compare;
    return (worst){0};
}
#endif

/* ---- the tests ---- */

/* An element is one rounding to bf16 (2^-9) of factors that are right to a few float roundings; A and Aqk add K products of
 * operands so rounded, and T, w carry A's errors on. */
static void check(const char *name, worst w)
{
    print_message("%-34s w %.1e  qg %.1e  kg %.1e  Tb %.1e  Aqk %.1e  decay %.1e\n", name, w.w, w.qg, w.kg, w.Tb, w.Aqk, w.decay);
    if (!(w.qg <= 4.1e-3 && w.kg <= 4.1e-3 && w.decay <= 1e-5 && w.w <= 1.5e-2 && w.Tb <= 1e-2 && w.Aqk <= 1e-2))
        fail_msg("%s: a matrix is off", name);
}

static kl_ctx *device(void)
{
    if (!kl_gpu_count())
        skip();
    kl_ctx *ctx;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.device = KL_CUDA}));
    return ctx;
}

static void test_sizes(void **state)
{
    (void)state;
    kl_ctx *ctx = device();
    const int64_t K[] = {128, 128, 64, 256, 100, 60, 24, 8, 1, 3, 255, 129}, T[] = {64, 45, 33, 32, 17, 31, 15, 16, 2, 1, 20, 33};
    for (int i = 0; i < 12; i++) {
        char name[64];
        snprintf(name, sizeof name, "K %d T %d", (int)K[i], (int)T[i]);
        check(name, run(ctx, (case_options){.B = 2, .T = T[i], .H = 1, .HV = i % 3 + 1, .K = K[i], .G = K[i], .decay = DECAY_MIXED, .seed = (uint64_t)i,
                                            .gap = i % 4 == 1 ? 8 : i % 4 == 3 ? 3 : 0}));
    }
    kl_ctx_destroy(ctx);
}

static void test_gates(void **state)
{
    (void)state;
    kl_ctx *ctx = device();
    static const char *const names[] = {"slow", "mixed", "strong", "zero", "-5", "-60 or 0", "-1000"};
    for (int d = DECAY_SLOW; d <= DECAY_THOUSAND; d++)
        check(names[d], run(ctx, (case_options){.B = 1, .T = 80, .H = 2, .K = 128, .G = 128, .decay = (case_decay)d, .seed = 77}));
    for (int G = 0; G < 4; G++)
        for (int gate = KDA_GATE_LOG; gate <= KDA_GATE_BOUNDED; gate++) {
            char name[64];
            int64_t values[] = {0, 1, 4, 32};
            if (!G && gate)
                continue;
            snprintf(name, sizeof name, "gate %d, G %d of 32", gate, (int)values[G]);
            check(name, run(ctx, (case_options){.B = 1, .T = 40, .H = 1, .HV = 2, .K = 32, .G = values[G], .gate = (kda_gate)gate, .decay = DECAY_STRONG, .seed = 5}));
        }
    kl_ctx_destroy(ctx);
}

static void test_options(void **state)
{
    (void)state;
    kl_ctx *ctx = device();
    for (int i = 0; i < 12; i++) {
        char name[64];
        snprintf(name, sizeof name, "gate %d beta %d norm %d no_delta %d", i % 3, i / 3 % 3, i & 1, i == 7);
        check(name, run(ctx, (case_options){.B = 1, .T = 50, .H = 1, .HV = 2, .K = 128, .G = 128, .gate = (kda_gate)(i % 3), .beta_kind = (kda_beta)(i / 3 % 3),
                                            .l2norm = i & 1, .no_delta = i == 7, .no_bias = i == 4, .decay = DECAY_STRONG, .seed = (uint64_t)i}));
    }
    for (int i = 0; i < 6; i++) {
        const int64_t G[] = {0, 1, 4, 8, 16, 64}; /* of 128 channels: none, heads, blocks of 32, 16, 8, 2 */
        char name[64];
        snprintf(name, sizeof name, "G %d of 128, gate %d", (int)G[i], i ? i % 3 : 0);
        check(name, run(ctx, (case_options){.B = 1, .T = 41, .H = 1, .HV = 2, .K = 128, .G = G[i], .gate = i ? (kda_gate)(i % 3) : KDA_GATE_LOG, .decay = DECAY_MIXED, .seed = 6}));
    }
    check("correlated keys", run(ctx, (case_options){.B = 1, .T = 64, .H = 1, .K = 128, .G = 128, .decay = DECAY_SLOW, .correlated = true, .seed = 3}));
    check("deep, K 256", run(ctx, (case_options){.B = 1, .T = 40, .H = 1, .K = 256, .G = 256, .decay = DECAY_SIXTY_OR_ZERO, .correlated = true, .l2norm = true, .seed = 3}));
    kl_ctx_destroy(ctx);
}

static void test_sequences(void **state)
{
    (void)state;
    kl_ctx *ctx = device();
    const int64_t lengths[] = {0, 1, 15, 70, 0, 33};
    check("packed", run(ctx, (case_options){.B = 6, .lengths = lengths, .H = 1, .HV = 2, .K = 64, .G = 64, .decay = DECAY_MIXED, .seed = 9}));
    check("packed, tiles of 16", run(ctx, (case_options){.B = 6, .lengths = lengths, .H = 1, .K = 64, .G = 64, .chunk = 16, .decay = DECAY_MIXED, .seed = 9}));
    kl_ctx_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_sizes), cmocka_unit_test(test_gates), cmocka_unit_test(test_options),
                                       cmocka_unit_test(test_sequences)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
