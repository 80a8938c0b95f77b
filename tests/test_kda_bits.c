/* What may not change a bit of a result: other heads, other sequences, later tokens, cuts, threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/kda_check.h"

/* One value head alone gives the bits that it gives among others. */
static void each_head_uses_its_own_gate_and_beta(void **state)
{
    (void)state;
    const case_options opt = {.B = 1, .T = 90, .H = 2, .HV = 4, .K = 32, .V = 32, .G = 32, .decay = DECAY_MIXED, .seed = 1};
    for (int v = 0; v < 2; v++) {
        kda_case *all = ran(opt, cpu_variants[v], KL_FORWARD, 1);
        for (int64_t hv = 0; hv < 4; hv++) {
            kda_case *one = case_new(opt);
            float *o = case_floats(one, 90 * 4 * 32), *ht = case_floats(one, 4 * 32 * 32);
            one->p.H = one->p.HV = 1;
            one->p.q = (const float *)one->p.q + hv / 2 * 32;
            one->p.k = (const float *)one->p.k + hv / 2 * 32;
            one->p.v = (const float *)one->p.v + hv * 32;
            one->p.g = (const float *)one->p.g + hv * 32;
            one->p.beta = (const float *)one->p.beta + hv;
            one->p.h0 = (const float *)one->p.h0 + hv * 32 * 32;
            one->p.q_stride = one->p.k_stride = 64;
            one->p.v_stride = one->p.g_stride = one->p.o_stride = 128;
            one->p.beta_stride = 4;
            one->p.o = o;
            one->p.ht = ht;
            assert_ok(case_run(one, cpu_variants[v], KL_FORWARD, 2));
            assert_true(same_bits(ht, (float *)all->p.ht + hv * 32 * 32, 32 * 32));
            for (int64_t t = 0; t < 90; t++)
                assert_true(same_bits(o + t * 128, (float *)all->p.o + t * 128 + hv * 32, 32));
            case_free(one);
        }
        case_free(all);
    }
}

static void a_batch_row_never_depends_on_its_neighbours(void **state)
{
    (void)state;
    const int64_t lengths[] = {40, 70, 33};
    const case_options opt = {.B = 3, .lengths = lengths, .H = 1, .K = 40, .V = 36, .G = 40, .decay = DECAY_MIXED, .seed = 1};
    for (int v = 0; v < 2; v++) {
        kda_case *c = ran(opt, cpu_variants[v], KL_FORWARD, 2), *d = case_new(opt);
        /* the first and last sequences become something else altogether */
        for (int64_t t = 0; t < 143; t++)
            if (t < 40 || t >= 110)
                for (int64_t i = 0; i < 40; i++)
                    ((float *)d->p.k)[t * 40 + i] = NAN;
        assert_ok(case_run(d, cpu_variants[v], KL_FORWARD, 2));
        assert_true(same_bits((float *)c->p.o + 40 * 36, (float *)d->p.o + 40 * 36, 70 * 36));
        assert_true(same_bits((float *)c->p.ht + 40 * 36, (float *)d->p.ht + 40 * 36, 40 * 36));
        case_free(c);
        case_free(d);
    }
}

static void a_later_token_never_changes_an_earlier_output(void **state)
{
    (void)state;
    enum { T = 150, K = 40, V = 36 };
    const int64_t cuts[] = {1, 5, 16, 17, 31, 47, 64, 65, 100, 149};
    for (int v = 0; v < 2; v++)
        for (int64_t chunk = 16; chunk <= 128; chunk *= 2) {
            case_options opt = {.B = 1, .T = T, .H = 1, .K = K, .V = V, .G = K, .decay = DECAY_MIXED, .chunk = chunk, .seed = 1};
            kda_case *c = ran(opt, cpu_variants[v], KL_FORWARD, 1);
            for (size_t i = 0; i < 10; i++) {
                int64_t cut = cuts[i];
                /* other gates and keys, then no number at all */
                for (int kind = 0; kind < 2; kind++) {
                    kda_case *d = case_new(opt);
                    for (int64_t t = cut; t < T; t++)
                        for (int64_t j = 0; j < K; j++) {
                            ((float *)d->p.g)[t * K + j] = kind ? NAN : -40.0f;
                            ((float *)d->p.k)[t * K + j] *= kind ? NAN : -3.0f;
                        }
                    assert_ok(case_run(d, cpu_variants[v], KL_FORWARD, 1));
                    assert_true(same_bits(c->p.o, d->p.o, cut * V));
                    case_free(d);
                }
                /* and when there are no later tokens */
                kda_case *d = case_new(opt);
                d->p.T = cut;
                assert_ok(case_run(d, cpu_variants[v], KL_FORWARD, 1));
                assert_true(same_bits(c->p.o, d->p.o, cut * V));
                case_free(d);
            }
            case_free(c);
        }
}

/* ---- cut in two ---- */

/* Tokens [from, to) of c's problem into d's outputs, from the state in `carried`, which moves on. */
static void run_slice(kda_case *c, const char *variant, int64_t from, int64_t to, float *carried, float *o)
{
    kda_problem whole = c->p;
    int64_t H = whole.H, HV = whole.HV, K = whole.K, V = whole.V, G = whole.G;
    c->p.T = to - from;
    c->p.q = (const float *)whole.q + from * H * K;
    c->p.k = (const float *)whole.k + from * H * K;
    c->p.v = (const float *)whole.v + from * HV * V;
    c->p.g = (const float *)whole.g + from * HV * G;
    c->p.beta = (const float *)whole.beta + from * HV;
    c->p.o = o + from * HV * V;
    c->p.h0 = c->p.ht = carried;
    assert_ok(case_run(c, variant, KL_FORWARD, 2));
    c->p = whole;
}

static void split_anywhere(void **state)
{
    (void)state;
    enum { T = 75, HV = 2, K = 24, V = 16 };
    const case_options opt = {.B = 1, .T = T, .H = 1, .HV = HV, .K = K, .V = V, .G = K, .decay = DECAY_MIXED, .chunk = 32, .seed = 1};
    kda_case *c = case_new(opt);
    case_reference(c, false);
    float *o = case_floats(c, T * HV * V), *carried = case_floats(c, HV * K * V);
    for (int v = 0; v < 2; v++) {
        for (int64_t s = 0; s <= T; s += 5) {
            memcpy(carried, c->p.h0, HV * K * V * sizeof(float));
            run_slice(c, cpu_variants[v], 0, s, carried, o);
            run_slice(c, cpu_variants[1 - v], s, T, carried, o);
            assert_true(kl_within(kl_rel_err(o, c->o, T * HV * V), kl_tol_kda_f32.forward));
            assert_true(kl_within(kl_rel_err(carried, c->ht, HV * K * V), kl_tol_kda_f32.forward));
        }
        memcpy(carried, c->p.h0, HV * K * V * sizeof(float));
        for (int64_t t = 0; t < T; t++)
            run_slice(c, cpu_variants[v], t, t + 1, carried, o);
        assert_true(kl_within(kl_rel_err(o, c->o, T * HV * V), kl_tol_kda_f32.forward));
        assert_true(kl_within(kl_rel_err(carried, c->ht, HV * K * V), kl_tol_kda_f32.forward));
    }
    case_free(c);
}

static void same_bits_twice_and_for_any_thread_count(void **state)
{
    (void)state;
    const int64_t lengths[] = {100, 0, 33, 7};
    for (int one_head = 0; one_head < 2; one_head++) {
        case_options opt = {.B = 4, .lengths = lengths, .H = one_head ? 1 : 2, .HV = one_head ? 1 : 4, .K = 64, .V = 100, .G = 64,
                            .gate = KDA_GATE_SOFTPLUS, .seed = 1};
        if (one_head) {
            opt.B = 1;
            opt.lengths = NULL;
            opt.T = 100;
        }
        for (int v = 0; v < 3; v++) {
            kl_pass pass = v == 2 ? KL_BACKWARD : KL_FORWARD;
            kda_case *first = ran(opt, cpu_variants[v ? 1 : 0], pass, 1);
            const int threads[] = {1, 2, 3, 5};
            for (int i = 0; i < 4; i++) {
                kda_case *c = ran(opt, cpu_variants[v ? 1 : 0], pass, threads[i]);
                int64_t T = c->tokens, H = opt.H, HV = opt.HV;
                if (pass == KL_FORWARD) {
                    assert_true(same_bits(c->p.o, first->p.o, T * HV * 100));
                    assert_true(same_bits(c->p.ht, first->p.ht, c->N * HV * 6400));
                } else {
                    assert_true(same_bits(c->g.dq, first->g.dq, T * H * 64) && same_bits(c->g.dk, first->g.dk, T * H * 64));
                    assert_true(same_bits(c->g.dv, first->g.dv, T * HV * 100) && same_bits(c->g.dg, first->g.dg, T * HV * 64));
                    assert_true(same_bits(c->g.dbeta, first->g.dbeta, T * HV) && same_bits(c->g.dh0, first->g.dh0, c->N * HV * 6400));
                    assert_true(same_bits(c->g.dA_log, first->g.dA_log, HV) && same_bits(c->g.ddt_bias, first->g.ddt_bias, HV * 64));
                }
                case_free(c);
            }
            case_free(first);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_head_uses_its_own_gate_and_beta),
        cmocka_unit_test(a_batch_row_never_depends_on_its_neighbours),
        cmocka_unit_test(a_later_token_never_changes_an_earlier_output),
        cmocka_unit_test(split_anywhere),
        cmocka_unit_test(same_bits_twice_and_for_any_thread_count),
    };
    return cmocka_run_group_tests_name("kda_bits", tests, NULL, NULL);
}
