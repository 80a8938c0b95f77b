/* The KDA and DPLR references: golden data, finite differences, and the identities that tie the special cases together. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "reference/dplr.h"
#include "reference/kda.h"
#include "tests/fd.h"
#include "tests/golden.h"

/* The golden data are float32 roundings of float64 results: every element may be off by 2^-24 of itself, and in double nothing else is lost. */
static const double GOLDEN_LIMIT = 6e-8;
/* Two orders of summation of the same numbers in double. */
static const double SAME_LIMIT = 1e-12;

/* ---- random problems ---- */

typedef struct {
    ref_kda p;
    real *q, *k, *v, *g, *beta, *A_log, *dt_bias, *h0; /* what p points to */
    real *o, *ht;                                      /* outputs of the last forward */
    real *d_o, *dht;                                   /* upstream gradients */
    ref_kda_grad d;                                    /* all gradients, zeroed by make_case */
} kda_case;

static int64_t elements_qk(const ref_kda *p) { return p->T * p->H * p->K; }
static int64_t elements_v(const ref_kda *p) { return p->T * p->HV * p->V; }
static int64_t elements_g(const ref_kda *p) { return p->T * p->HV * p->G; }
static int64_t elements_h(const ref_kda *p) { return p->HV * p->K * p->V; }

/* p brings sizes and options. Every head gets gates of its own strength. */
static kda_case make_case(fd_rng *r, ref_kda p)
{
    kda_case c = { .p = p };
    c.q = fd_randoms(r, elements_qk(&p), 0.5);
    c.k = fd_randoms(r, elements_qk(&p), 0.5);
    c.v = fd_randoms(r, elements_v(&p), 1);
    c.g = fd_randoms(r, elements_g(&p), 1);
    c.beta = fd_randoms(r, p.T * p.HV, 1);
    c.A_log = fd_randoms(r, p.HV, 0.5);
    c.dt_bias = fd_randoms(r, p.HV * p.G, 0.5);
    c.h0 = fd_randoms(r, elements_h(&p), 1);
    if (p.gate == REF_GATE_LOG)
        for (int64_t n = 0; n < elements_g(&p); n++) {
            int64_t head = n / p.G % p.HV;
            c.g[n] = -fabs(c.g[n]) * (0.05 + 0.4 * (double)head);
        }
    if (p.beta_kind == REF_BETA_PLAIN)
        for (int64_t n = 0; n < p.T * p.HV; n++)
            c.beta[n] = 1 / (1 + exp(-c.beta[n]));
    c.o = fd_zeros(elements_v(&p));
    c.ht = fd_zeros(elements_h(&p));
    c.d_o = fd_randoms(r, elements_v(&p), 1);
    c.dht = fd_randoms(r, elements_h(&p), 1);

    c.p.q = c.q, c.p.k = c.k, c.p.v = c.v, c.p.g = c.g, c.p.beta = c.beta;
    c.p.A_log = c.A_log, c.p.dt_bias = c.dt_bias, c.p.h0 = c.h0;
    c.d = (ref_kda_grad){ .d_o = c.d_o, .dht = c.dht, .dq = fd_zeros(elements_qk(&p)), .dk = fd_zeros(elements_qk(&p)),
                          .dv = fd_zeros(elements_v(&p)), .dg = fd_zeros(elements_g(&p)), .dbeta = fd_zeros(p.T * p.HV),
                          .dA_log = fd_zeros(p.HV), .ddt_bias = fd_zeros(p.HV * p.G), .dh0 = fd_zeros(elements_h(&p)) };
    return c;
}

static void free_case(kda_case *c)
{
    real *all[] = { c->q, c->k, c->v, c->g, c->beta, c->A_log, c->dt_bias, c->h0, c->o, c->ht, c->d_o, c->dht,
                    c->d.dq, c->d.dk, c->d.dv, c->d.dg, c->d.dbeta, c->d.dA_log, c->d.ddt_bias, c->d.dh0 };
    for (size_t n = 0; n < sizeof all / sizeof *all; n++)
        free(all[n]);
}

/* <o, d_o> + <ht, dht>, an absent upstream gradient counting as zero */
static double kda_loss(void *context)
{
    kda_case *c = context;
    assert_int_equal(ref_kda_forward(&c->p, c->o, c->ht, NULL), 0);
    double loss = 0;
    if (c->d.d_o)
        loss += ref_dot(elements_v(&c->p), c->o, c->d_o);
    if (c->d.dht)
        loss += ref_dot(elements_h(&c->p), c->ht, c->dht);
    return loss;
}

/* ---- golden data ---- */

static double golden_distance(const golden *g, const char *name, const real *x)
{
    golden_tensor t = golden_find(g, name);
    real *expected = golden_doubles(g, name);
    double distance = fd_distance(t.count, x, expected);
    free(expected);
    return distance;
}

static void check_golden_case(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "tests/golden/kda/%s.safetensors", name);
    golden g = golden_open(path);
    golden_tensor q = golden_find(&g, "q"), v = golden_find(&g, "v");
    int64_t T = v.shape[0], H = q.shape[1], HV = v.shape[1], K = q.shape[2], V = v.shape[2];
    real *in[] = { golden_doubles(&g, "q"), golden_doubles(&g, "k"), golden_doubles(&g, "v"), golden_doubles(&g, "g"),
                   golden_doubles(&g, "beta"), golden_doubles(&g, "h0"), golden_doubles(&g, "do"), golden_doubles(&g, "dht") };
    ref_kda p = { .T = T, .H = H, .HV = HV, .K = K, .V = V, .G = K, .q = in[0], .k = in[1], .v = in[2], .g = in[3],
                  .beta = in[4], .h0 = in[5] };
    const char *names[] = { "o", "ht", "dq", "dk", "dv", "dg", "dbeta", "dh0" };
    real *out[] = { fd_zeros(elements_v(&p)), fd_zeros(elements_h(&p)), fd_zeros(elements_qk(&p)), fd_zeros(elements_qk(&p)),
                    fd_zeros(elements_v(&p)), fd_zeros(elements_g(&p)), fd_zeros(T * HV), fd_zeros(elements_h(&p)) };
    ref_kda_grad d = { .d_o = in[6], .dht = in[7], .dq = out[2], .dk = out[3], .dv = out[4], .dg = out[5], .dbeta = out[6], .dh0 = out[7] };
    assert_int_equal(ref_kda_forward(&p, out[0], out[1], NULL), 0);
    assert_int_equal(ref_kda_backward(&p, &d), 0);

    printf("  %-36s", name);
    for (int n = 0; n < 8; n++) {
        double distance = golden_distance(&g, names[n], out[n]);
        printf(" %s %.1e", names[n], distance);
        if (!(distance <= GOLDEN_LIMIT))
            fail_msg("%s: %s: distance %.3g, limit %.3g", name, names[n], distance, GOLDEN_LIMIT);
    }
    printf("\n");
    for (int n = 0; n < 8; n++) {
        free(in[n]);
        free(out[n]);
    }
    golden_close(&g);
}

static void test_kda_matches_golden_data(void **state)
{
    (void)state;
    cJSON *manifest = golden_json("tests/golden/kda/manifest.json"), *name;
    assert_true(cJSON_GetArraySize(manifest) >= 10);
    cJSON_ArrayForEach(name, manifest) check_golden_case(name->valuestring);
    cJSON_Delete(manifest);
}

/* ---- finite differences ---- */

static void check_kda_gradients(fd_rng *r, const char *label, ref_kda p, int with_d_o, int with_dht, int with_h0)
{
    kda_case c = make_case(r, p);
    c.d.d_o = with_d_o ? c.d_o : NULL;
    c.d.dht = with_dht ? c.dht : NULL;
    c.p.h0 = with_h0 ? c.h0 : NULL;
    assert_int_equal(ref_kda_backward(&c.p, &c.d), 0);
    double worst = 0;
    struct { const char *name; real *x, *dx; int64_t n; } all[] = {
        { "q", c.q, c.d.dq, elements_qk(&p) }, { "k", c.k, c.d.dk, elements_qk(&p) }, { "v", c.v, c.d.dv, elements_v(&p) },
        { "g", c.g, c.d.dg, elements_g(&p) }, { "beta", c.beta, c.d.dbeta, p.T * p.HV }, { "A_log", c.A_log, c.d.dA_log, p.HV },
        { "dt_bias", c.dt_bias, c.d.ddt_bias, p.HV * p.G }, { "h0", c.h0, c.d.dh0, with_h0 ? elements_h(&p) : 0 },
    };
    for (size_t n = 0; n < sizeof all / sizeof *all; n++)
        worst = fmax(worst, fd_assert_gradient(label, all[n].name, all[n].x, all[n].dx, all[n].n, kda_loss, &c));
    printf("  %-40s %.1e\n", label, worst);
    free_case(&c);
}

static void test_kda_gradients(void **state)
{
    (void)state;
    fd_rng r = fd_start("KDA backward against finite differences");
    ref_kda base = { .T = 5, .H = 2, .HV = 2, .K = 6, .V = 3, .G = 6 }, p = base;
    check_kda_gradients(&r, "log gate, channel", p, 1, 1, 1);
    check_kda_gradients(&r, "without d_o", p, 0, 1, 1);
    check_kda_gradients(&r, "without dht", p, 1, 0, 1);
    check_kda_gradients(&r, "without h0", p, 1, 1, 0);
    p.scale = 0.7, p.HV = 4;
    check_kda_gradients(&r, "HV > H, own scale", p, 1, 1, 1);
    p = base, p.qk_l2norm = 1, p.gate = REF_GATE_SOFTPLUS, p.beta_kind = REF_BETA_SIGMOID;
    check_kda_gradients(&r, "softplus gate, l2norm, sigmoid", p, 1, 1, 1);
    p.gate = REF_GATE_BOUNDED, p.lower_bound = -5, p.beta_kind = REF_BETA_TWICE_SIGMOID;
    check_kda_gradients(&r, "bounded gate, l2norm, 2 sigmoid", p, 1, 1, 1);
    const int64_t granularity[] = { 6, 3, 2, 1, 0 };
    for (int n = 0; n < 5; n++)
        for (int gate = 0; gate < 3; gate++) {
            char label[64];
            snprintf(label, sizeof label, "G = %d of K = 6, gate %d", (int)granularity[n], gate);
            p = base, p.G = granularity[n], p.gate = (ref_gate_kind)gate, p.lower_bound = -3, p.HV = 4;
            check_kda_gradients(&r, label, p, 1, 1, 1);
        }
    p = base, p.no_delta = 1;
    check_kda_gradients(&r, "no delta rule", p, 1, 1, 1);
    p = base, p.T = 1, p.K = 1, p.G = 1, p.V = 1;
    check_kda_gradients(&r, "T = K = V = 1", p, 1, 1, 1);
    p = base, p.T = 131, p.H = 1, p.HV = 2, p.K = 3, p.G = 3, p.V = 2;
    check_kda_gradients(&r, "T = 131: three segments of states", p, 1, 1, 1);
}

/* ---- special cases of the operator ---- */

/* The options inside the operator do what their formulas say, outside. */
static void test_kda_options_equal_their_formulas(void **state)
{
    (void)state;
    fd_rng r = fd_start("gates, l2norm and beta inside = outside");
    for (int gate = 0; gate < 3; gate++) {
        ref_kda p = { .T = 9, .H = 1, .HV = 2, .K = 8, .V = 5, .G = 4, .gate = (ref_gate_kind)gate, .lower_bound = -5,
                      .qk_l2norm = 1, .beta_kind = REF_BETA_TWICE_SIGMOID };
        kda_case c = make_case(&r, p);
        kda_loss(&c);

        kda_case plain = make_case(&r, (ref_kda){ .T = 9, .H = 1, .HV = 2, .K = 8, .V = 5, .G = 4, .scale = 1 / sqrt(8.0) });
        plain.p.v = c.v, plain.p.h0 = c.h0;
        for (int64_t n = 0; n < elements_g(&p); n++) {
            int64_t i = n / 4 % 2;
            double z = c.g[n] + c.dt_bias[i * 4 + n % 4];
            plain.g[n] = gate == REF_GATE_LOG ? c.g[n] : gate == REF_GATE_SOFTPLUS ? -exp(c.A_log[i]) * log(1 + exp(z))
                                                       : -5 / (1 + exp(-exp(c.A_log[i]) * z));
        }
        for (int64_t n = 0; n < p.T * p.HV; n++)
            plain.beta[n] = 2 / (1 + exp(-c.beta[n]));
        for (int64_t t = 0; t < p.T; t++)
            for (int64_t e = 0; e < 8; e++) {
                plain.q[t * 8 + e] = c.q[t * 8 + e] / sqrt(ref_dot(8, c.q + t * 8, c.q + t * 8) + 1e-6);
                plain.k[t * 8 + e] = c.k[t * 8 + e] / sqrt(ref_dot(8, c.k + t * 8, c.k + t * 8) + 1e-6);
            }
        kda_loss(&plain);
        fd_assert_close("o", elements_v(&p), c.o, plain.o, SAME_LIMIT);
        fd_assert_close("ht", elements_h(&p), c.ht, plain.ht, SAME_LIMIT);
        free_case(&c);
        free_case(&plain);
    }
}

static void test_softplus_is_linear_above_20(void **state)
{
    (void)state;
    real z[2] = { 20.5, 700 }, a[2], A_log = 0.25, da[2] = { 1, 1 }, dz[2] = { 0, 0 };
    ref_gate gate = { .T = 2, .HV = 1, .K = 1, .G = 1, .kind = REF_GATE_SOFTPLUS, .g = z, .A_log = &A_log };
    ref_gate_forward(&gate, a);
    ref_gate_backward(&gate, da, dz, NULL, NULL);
    for (int n = 0; n < 2; n++) {
        assert_true(fabs(a[n] + exp(0.25) * z[n]) <= 1e-12 * z[n]);
        assert_true(fabs(dz[n] + exp(0.25)) <= 1e-12);
    }
}

/* A block of channels with one gate = a gate a channel with the value repeated; the block's gradient is the sum. */
static void test_granularities_agree(void **state)
{
    (void)state;
    fd_rng r = fd_start("block, head and no gate = channel gates with repeated values");
    const int64_t granularity[] = { 4, 2, 1, 0 }, K = 8;
    for (int n = 0; n < 4; n++) {
        int64_t G = granularity[n];
        kda_case c = make_case(&r, (ref_kda){ .T = 7, .H = 2, .HV = 4, .K = K, .V = 3, .G = G });
        kda_case channel = make_case(&r, (ref_kda){ .T = 7, .H = 2, .HV = 4, .K = K, .V = 3, .G = K });
        real *summed = fd_zeros(elements_g(&c.p));
        for (int64_t e = 0; e < elements_g(&channel.p); e++)
            channel.g[e] = G ? c.g[e / K * G + e % K * G / K] : 0;
        channel.p.q = c.q, channel.p.k = c.k, channel.p.v = c.v, channel.p.beta = c.beta, channel.p.h0 = c.h0;
        channel.d.d_o = c.d_o, channel.d.dht = c.dht;
        if (G == 0)
            c.p.g = NULL;
        kda_loss(&c);
        kda_loss(&channel);
        assert_int_equal(ref_kda_backward(&c.p, &c.d), 0);
        assert_int_equal(ref_kda_backward(&channel.p, &channel.d), 0);
        for (int64_t e = 0; e < elements_g(&channel.p) && G; e++)
            summed[e / K * G + e % K * G / K] += channel.d.dg[e];
        fd_assert_close("o", elements_v(&c.p), c.o, channel.o, SAME_LIMIT);
        fd_assert_close("dk", elements_qk(&c.p), c.d.dk, channel.d.dk, SAME_LIMIT);
        fd_assert_close("dg", elements_g(&c.p), c.d.dg, summed, SAME_LIMIT);
        free(summed);
        free_case(&c);
        free_case(&channel);
    }
}

static void test_value_heads_share_query_heads(void **state)
{
    (void)state;
    fd_rng r = fd_start("HV > H = the query/key heads repeated");
    ref_kda p = { .T = 6, .H = 2, .HV = 6, .K = 5, .V = 4, .G = 5 };
    kda_case c = make_case(&r, p);
    p.H = 6;
    kda_case repeated = make_case(&r, p);
    real *dq = fd_zeros(elements_qk(&c.p));
    for (int64_t e = 0; e < elements_qk(&repeated.p); e++) {
        int64_t channel = e % 5, i = e / 5 % 6, t = e / 30, from = (t * 2 + i / 3) * 5 + channel;
        repeated.q[e] = c.q[from];
        repeated.k[e] = c.k[from];
    }
    repeated.p.v = c.v, repeated.p.g = c.g, repeated.p.beta = c.beta, repeated.p.h0 = c.h0;
    repeated.d.d_o = c.d_o, repeated.d.dht = c.dht;
    kda_loss(&c);
    kda_loss(&repeated);
    assert_int_equal(ref_kda_backward(&c.p, &c.d), 0);
    assert_int_equal(ref_kda_backward(&repeated.p, &repeated.d), 0);
    for (int64_t e = 0; e < elements_qk(&repeated.p); e++)
        dq[(e / 30 * 2 + e / 5 % 6 / 3) * 5 + e % 5] += repeated.d.dq[e];
    fd_assert_close("o", elements_v(&p), c.o, repeated.o, 0);
    fd_assert_close("dq", elements_qk(&c.p), c.d.dq, dq, SAME_LIMIT);
    free(dq);
    free_case(&c);
    free_case(&repeated);
}

/* ---- running in pieces ---- */

/* The problem of the tokens [first, last) of c, starting from h0. */
static ref_kda piece(const kda_case *c, int64_t first, int64_t last, const real *h0)
{
    ref_kda p = c->p;
    p.T = last - first;
    p.q += first * p.H * p.K, p.k += first * p.H * p.K, p.v += first * p.HV * p.V;
    p.g += first * p.HV * p.G, p.beta += first * p.HV;
    p.h0 = h0;
    return p;
}

/* The gradients of the tokens from first on. */
static ref_kda_grad piece_grad(const kda_case *c, int64_t first, const real *dht, real *dh0)
{
    const ref_kda *p = &c->p;
    ref_kda_grad d = c->d;
    int64_t qk = first * p->H * p->K, v = first * p->HV * p->V;
    d.d_o += v, d.dq += qk, d.dk += qk, d.dv += v, d.dg += first * p->HV * p->G, d.dbeta += first * p->HV;
    d.dht = dht, d.dh0 = dh0;
    return d;
}

/* [0,T) at once = [0,s) then [s,T) with the carried state, forward bit for bit; the state's gradient carries backward. */
static void test_split_anywhere(void **state)
{
    (void)state;
    fd_rng r = fd_start("split anywhere");
    ref_kda p = { .T = 70, .H = 1, .HV = 2, .K = 6, .V = 4, .G = 6, .gate = REF_GATE_SOFTPLUS, .qk_l2norm = 1, .beta_kind = REF_BETA_SIGMOID };
    for (int64_t s = 0; s <= 70; s += 7) {
        kda_case c = make_case(&r, p);
        kda_loss(&c);
        assert_int_equal(ref_kda_backward(&c.p, &c.d), 0);

        kda_case two = c;
        two.d = (ref_kda_grad){ .d_o = c.d_o, .dq = fd_zeros(elements_qk(&p)), .dk = fd_zeros(elements_qk(&p)),
                                .dv = fd_zeros(elements_v(&p)), .dg = fd_zeros(elements_g(&p)), .dbeta = fd_zeros(p.T * p.HV),
                                .dA_log = fd_zeros(p.HV), .ddt_bias = fd_zeros(p.HV * p.G) };
        real *o = fd_zeros(elements_v(&p)), *middle = fd_zeros(elements_h(&p)), *ht = fd_zeros(elements_h(&p));
        real *dmiddle = fd_zeros(elements_h(&p)), *dh0 = fd_zeros(elements_h(&p));
        ref_kda head = piece(&c, 0, s, c.h0), tail = piece(&c, s, p.T, middle);
        ref_kda_grad dtail = piece_grad(&two, s, c.dht, dmiddle), dhead = piece_grad(&two, 0, dmiddle, dh0);
        assert_int_equal(ref_kda_forward(&head, o, middle, NULL), 0);
        assert_int_equal(ref_kda_forward(&tail, o + s * p.HV * p.V, ht, NULL), 0);
        assert_int_equal(ref_kda_backward(&tail, &dtail), 0);
        assert_int_equal(ref_kda_backward(&head, &dhead), 0);

        fd_assert_close("o", elements_v(&p), o, c.o, 0);
        fd_assert_close("ht", elements_h(&p), ht, c.ht, 0);
        fd_assert_close("dq", elements_qk(&p), two.d.dq, c.d.dq, SAME_LIMIT);
        fd_assert_close("dg", elements_g(&p), two.d.dg, c.d.dg, SAME_LIMIT);
        fd_assert_close("dA_log", p.HV, two.d.dA_log, c.d.dA_log, SAME_LIMIT);
        fd_assert_close("dh0", elements_h(&p), dh0, c.d.dh0, SAME_LIMIT);
        real *owned[] = { o, middle, ht, dmiddle, dh0, two.d.dq, two.d.dk, two.d.dv, two.d.dg, two.d.dbeta, two.d.dA_log, two.d.ddt_bias };
        for (size_t n = 0; n < sizeof owned / sizeof *owned; n++)
            free(owned[n]);
        free_case(&c);
    }
}

static void test_states_after_every_token(void **state)
{
    (void)state;
    fd_rng r = fd_start("states after every token");
    kda_case c = make_case(&r, (ref_kda){ .T = 5, .H = 1, .HV = 2, .K = 3, .V = 4, .G = 3 });
    int64_t size = elements_h(&c.p);
    real *states = fd_zeros(5 * size), *S = fd_zeros(size);
    assert_int_equal(ref_kda_forward(&c.p, NULL, NULL, states), 0);
    ref_copy(size, c.h0, S);
    for (int64_t t = 0; t < 5; t++) {
        ref_kda one = piece(&c, t, t + 1, S);
        assert_int_equal(ref_kda_forward(&one, NULL, S, NULL), 0); /* in place */
        fd_assert_close("state", size, states + t * size, S, 0);
    }
    free(states);
    free(S);
    free_case(&c);
}

static void test_no_tokens(void **state)
{
    (void)state;
    fd_rng r = fd_start("T = 0");
    kda_case c = make_case(&r, (ref_kda){ .T = 0, .H = 1, .HV = 2, .K = 3, .V = 4, .G = 3 });
    for (int64_t n = 0; n < elements_h(&c.p); n++)
        c.ht[n] = NAN;
    assert_int_equal(ref_kda_forward(&c.p, NULL, c.ht, NULL), 0);
    assert_int_equal(ref_kda_backward(&c.p, &c.d), 0);
    fd_assert_close("ht", elements_h(&c.p), c.ht, c.h0, 0);
    fd_assert_close("dh0", elements_h(&c.p), c.d.dh0, c.dht, 0);
    free_case(&c);
}

/* Backward adds to its gradients; those that are NULL are left out without changing the others. */
static void test_gradients_accumulate(void **state)
{
    (void)state;
    fd_rng r = fd_start("gradients accumulate, NULL is not wanted");
    kda_case c = make_case(&r, (ref_kda){ .T = 4, .H = 1, .HV = 1, .K = 3, .V = 2, .G = 3, .gate = REF_GATE_SOFTPLUS, .qk_l2norm = 1 });
    assert_int_equal(ref_kda_backward(&c.p, &c.d), 0);
    real *once = fd_zeros(elements_qk(&c.p));
    ref_kda_grad only_dk = { .d_o = c.d_o, .dht = c.dht, .dk = once };
    assert_int_equal(ref_kda_backward(&c.p, &only_dk), 0);
    fd_assert_close("dk alone", elements_qk(&c.p), once, c.d.dk, 0);
    assert_int_equal(ref_kda_backward(&c.p, &c.d), 0);
    for (int64_t n = 0; n < elements_qk(&c.p); n++)
        once[n] *= 2;
    fd_assert_close("dk twice", elements_qk(&c.p), c.d.dk, once, SAME_LIMIT);
    free(once);
    free_case(&c);
}

/* Gates of -1000 forget everything at once: no NaN, and the result is that of an empty state. */
static void test_forgetting_everything(void **state)
{
    (void)state;
    fd_rng r = fd_start("gates of -1000");
    kda_case c = make_case(&r, (ref_kda){ .T = 5, .H = 1, .HV = 1, .K = 4, .V = 3, .G = 4 });
    for (int64_t n = 4 * 4; n < 5 * 4; n++)
        c.g[n] = -1000;
    kda_loss(&c);
    ref_kda last = piece(&c, 4, 5, NULL);
    real o[3];
    assert_int_equal(ref_kda_forward(&last, o, NULL, NULL), 0);
    fd_assert_close("o", 3, c.o + 4 * 3, o, 0);
    assert_int_equal(ref_kda_backward(&c.p, &c.d), 0);
    for (int64_t n = 0; n < elements_g(&c.p); n++)
        assert_true(isfinite(c.d.dg[n]));
    free_case(&c);
}

/* ---- DPLR ---- */

static const char *const dplr_names[] = { "q", "k", "a", "b", "g", "v", "h0" };

typedef struct {
    ref_dplr p;
    real *in[7], *grad[7];  /* q k a b g v h0 */
    int64_t n[7];
    real *o, *ht, *d_o, *dht;
} dplr_case;

static dplr_case make_dplr(fd_rng *r, ref_dplr p)
{
    dplr_case c = { .p = p };
    for (int i = 0; i < 7; i++) {
        c.n[i] = i < 5 ? p.T * p.H * p.K : i == 5 ? p.T * p.H * p.V : p.H * p.K * p.V;
        c.in[i] = fd_randoms(r, c.n[i], 0.5);
        c.grad[i] = fd_zeros(c.n[i]);
    }
    for (int64_t i = 0; i < c.n[4]; i++)
        c.in[4][i] = -fabs(c.in[4][i]) * (0.1 + (double)(i / p.K % p.H));
    c.o = fd_zeros(c.n[5]), c.ht = fd_zeros(c.n[6]);
    c.d_o = fd_randoms(r, c.n[5], 1), c.dht = fd_randoms(r, c.n[6], 1);
    c.p.q = c.in[0], c.p.k = c.in[1], c.p.a = c.in[2], c.p.b = c.in[3], c.p.g = c.in[4], c.p.v = c.in[5], c.p.h0 = c.in[6];
    return c;
}

static void free_dplr(dplr_case *c)
{
    for (int i = 0; i < 7; i++) {
        free(c->in[i]);
        free(c->grad[i]);
    }
    free(c->o);
    free(c->ht);
    free(c->d_o);
    free(c->dht);
}

static ref_dplr_grad dplr_grad(const dplr_case *c)
{
    return (ref_dplr_grad){ .d_o = c->d_o, .dht = c->dht, .dq = c->grad[0], .dk = c->grad[1], .da = c->grad[2], .db = c->grad[3],
                            .dg = c->grad[4], .dv = c->grad[5], .dh0 = c->grad[6] };
}

static double dplr_loss(void *context)
{
    dplr_case *c = context;
    assert_int_equal(ref_dplr_forward(&c->p, c->o, c->ht), 0);
    return ref_dot(c->n[5], c->o, c->d_o) + ref_dot(c->n[6], c->ht, c->dht);
}

static void test_dplr_gradients(void **state)
{
    (void)state;
    fd_rng r = fd_start("DPLR backward against finite differences");
    dplr_case c = make_dplr(&r, (ref_dplr){ .T = 6, .H = 2, .K = 5, .V = 3 });
    ref_dplr_grad d = dplr_grad(&c);
    assert_int_equal(ref_dplr_backward(&c.p, &d), 0);
    for (int i = 0; i < 7; i++)
        fd_assert_gradient("DPLR", dplr_names[i], c.in[i], c.grad[i], c.n[i], dplr_loss, &c);
    free_dplr(&c);
}

/* KDA is DPLR with a = k e^g, b = -beta k and k' = beta k; gradients follow by the chain rule. */
static void test_kda_is_a_dplr(void **state)
{
    (void)state;
    fd_rng r = fd_start("KDA = DPLR with a = k e^g, b = -beta k, k' = beta k");
    ref_kda p = { .T = 20, .H = 2, .HV = 2, .K = 6, .V = 4, .G = 6 };
    kda_case c = make_case(&r, p);
    dplr_case d = make_dplr(&r, (ref_dplr){ .T = 20, .H = 2, .K = 6, .V = 4 });
    d.p.q = c.q, d.p.g = c.g, d.p.v = c.v, d.p.h0 = c.h0;
    for (int64_t e = 0; e < elements_qk(&p); e++) {
        real beta = c.beta[e / 6];
        d.in[1][e] = beta * c.k[e];
        d.in[2][e] = c.k[e] * exp(c.g[e]);
        d.in[3][e] = -beta * c.k[e];
    }
    kda_loss(&c);
    assert_int_equal(ref_dplr_forward(&d.p, d.o, d.ht), 0);
    fd_assert_close("o", elements_v(&p), d.o, c.o, SAME_LIMIT);
    fd_assert_close("ht", elements_h(&p), d.ht, c.ht, SAME_LIMIT);

    ref_dplr_grad grad = dplr_grad(&d);
    grad.d_o = c.d_o, grad.dht = c.dht;
    assert_int_equal(ref_kda_backward(&c.p, &c.d), 0);
    assert_int_equal(ref_dplr_backward(&d.p, &grad), 0);
    real *dk = fd_zeros(elements_qk(&p)), *dg = fd_zeros(elements_qk(&p)), *dbeta = fd_zeros(p.T * p.HV);
    for (int64_t e = 0; e < elements_qk(&p); e++) {
        real beta = c.beta[e / 6], decay = exp(c.g[e]);
        dk[e] = beta * grad.dk[e] + decay * grad.da[e] - beta * grad.db[e];
        dg[e] = grad.dg[e] + c.k[e] * decay * grad.da[e];
        dbeta[e / 6] += c.k[e] * (grad.dk[e] - grad.db[e]);
    }
    fd_assert_close("dq", elements_qk(&p), grad.dq, c.d.dq, SAME_LIMIT);
    fd_assert_close("dk", elements_qk(&p), dk, c.d.dk, SAME_LIMIT);
    fd_assert_close("dv", elements_v(&p), grad.dv, c.d.dv, SAME_LIMIT);
    fd_assert_close("dg", elements_qk(&p), dg, c.d.dg, SAME_LIMIT);
    fd_assert_close("dbeta", p.T * p.HV, dbeta, c.d.dbeta, SAME_LIMIT);
    fd_assert_close("dh0", elements_h(&p), grad.dh0, c.d.dh0, SAME_LIMIT);
    free(dk);
    free(dg);
    free(dbeta);
    free_case(&c);
    free_dplr(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kda_matches_golden_data),
        cmocka_unit_test(test_kda_gradients),
        cmocka_unit_test(test_kda_options_equal_their_formulas),
        cmocka_unit_test(test_softplus_is_linear_above_20),
        cmocka_unit_test(test_granularities_agree),
        cmocka_unit_test(test_value_heads_share_query_heads),
        cmocka_unit_test(test_split_anywhere),
        cmocka_unit_test(test_states_after_every_token),
        cmocka_unit_test(test_no_tokens),
        cmocka_unit_test(test_gradients_accumulate),
        cmocka_unit_test(test_forgetting_everything),
        cmocka_unit_test(test_dplr_gradients),
        cmocka_unit_test(test_kda_is_a_dplr),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
