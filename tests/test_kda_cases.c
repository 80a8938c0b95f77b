/* The cases that every implementation of the operator must pass, and each class of bug that others shipped once. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/mman.h>
#include <cmocka.h>

#include "tests/kda_case.h"

static const char *const variants[] = {"recurrent", "chunk"};

static void must(kl_status s)
{
    if (kl_failed(s))
        fail_msg("%s", s.message);
}

static kda_case *ran(case_options opt, const char *variant, kl_pass pass, int threads)
{
    kda_case *c = case_new(opt);
    must(case_run(c, variant, pass, threads));
    return c;
}

static void check_forward(case_options opt)
{
    for (int i = 0; i < 2 - opt.token_states; i++) {
        kda_case *c = ran(opt, variants[i], KL_FORWARD, 2);
        if (opt.in_place) { /* the reference needs the state that was there before */
            case_free(c);
            c = case_new(opt);
            case_reference(c, false);
            must(case_run(c, variants[i], KL_FORWARD, 2));
        } else {
            case_reference(c, false);
        }
        double error = case_forward_error(c);
        if (!kl_within(error, kl_tol_kda_f32.forward))
            fail_msg("%s: error %.3g", variants[i], error);
        case_free(c);
    }
}

static void check_both(case_options opt)
{
    check_forward(opt);
    kda_case *c = ran(opt, "chunk", KL_BACKWARD, 2);
    case_reference(c, true);
    double error = case_backward_error(c);
    if (!kl_within(error, kl_tol_kda_f32.gradient))
        fail_msg("chunk backward: error %.3g", error);
    case_free(c);
}

static bool same_bits(const void *a, const void *b, int64_t floats) { return memcmp(a, b, (size_t)floats * sizeof(float)) == 0; }

/* ---- the cases ---- */

static void every_length(void **state)
{
    (void)state;
    const int64_t lengths[] = {0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000};
    for (size_t i = 0; i < 14; i++)
        check_both((case_options){.B = 2, .T = lengths[i], .H = 2, .K = 24, .V = 20, .G = 24, .decay = DECAY_MIXED, .seed = i + 1});
}

static void every_head_dimension(void **state)
{
    (void)state;
    const int64_t dims[] = {1, 8, 24, 60, 64, 100, 128, 256};
    for (size_t i = 0; i < 8; i++)
        check_both((case_options){.B = 1, .T = 70, .H = 1, .K = dims[i], .V = dims[(i + 3) % 8], .G = dims[i], .decay = DECAY_SLOW, .seed = i + 1});
}

static void every_gate_regime(void **state)
{
    (void)state;
    for (int decay = DECAY_SLOW; decay <= DECAY_THOUSAND; decay++)
        for (int64_t chunk = 16; chunk <= 128; chunk *= 2)
            check_both((case_options){.B = 1, .T = 150, .H = 1, .K = 48, .V = 32, .G = 48, .decay = (case_decay)decay, .chunk = chunk,
                                      .seed = (uint64_t)decay + 1});
}

static void neumann_inverse_slow_decay_correlated_keys(void **state)
{
    (void)state;
    for (int64_t chunk = 16; chunk <= 128; chunk *= 2) {
        check_both((case_options){.B = 1, .T = 256, .H = 2, .K = 64, .V = 32, .G = 64, .decay = DECAY_SLOW, .correlated = true, .chunk = chunk, .seed = 1});
        check_both((case_options){.B = 1, .T = 256, .H = 2, .K = 64, .V = 32, .G = 0, .correlated = true, .chunk = chunk, .seed = 2});
    }
}

static void packed_value_heads_value_first_bounded_together(void **state)
{
    (void)state;
    const int64_t lengths[] = {0, 1, 15, 256, 0, 300};
    check_both((case_options){.B = 6, .lengths = lengths, .H = 2, .HV = 6, .K = 40, .V = 24, .G = 40, .gate = KDA_GATE_BOUNDED,
                              .beta_kind = KDA_BETA_SIGMOID, .l2norm = true, .layout = KDA_STATE_VK, .seed = 1});
}

static void more_than_65535_sequences_of_one_token(void **state)
{
    (void)state;
    enum { N = 66000 };
    static int64_t ones[N];
    for (int i = 0; i < N; i++)
        ones[i] = 1;
    check_both((case_options){.B = N, .lengths = ones, .H = 1, .K = 3, .V = 2, .G = 3, .gate = KDA_GATE_SOFTPLUS, .seed = 1});
}

static void more_than_65535_chunks(void **state)
{
    (void)state;
    check_forward((case_options){.B = 1, .T = 16 * 65600 + 3, .H = 1, .K = 2, .V = 1, .G = 2, .decay = DECAY_MIXED, .chunk = 16, .no_dht = true, .seed = 1});
}

/* ---- 32-bit pointer arithmetic ---- */

/* The same tokens with 2^30 elements from one to the next: offsets pass 2^31 elements and 2^33 bytes. Only the pages
 * that hold tokens are ever touched. */
static void tensors_beyond_two_to_the_31_elements(void **state)
{
    (void)state;
    enum { T = 4 };
    const int64_t stride = INT64_C(1) << 30;
    const size_t bytes = (size_t)stride * T * sizeof(float);
    const case_options opt = {.B = 1, .T = T, .H = 1, .HV = 2, .K = 16, .V = 8, .G = 16, .decay = DECAY_MIXED, .seed = 1};
    kda_case *near = case_new(opt), *far = case_new(opt);
    const void **in[] = {&far->p.q, &far->p.k, &far->p.v, &far->p.g, &far->p.beta, &far->g.d_o};
    const int64_t in_width[] = {16, 16, 16, 32, 2, 16};
    void **out[] = {&far->p.o, &far->g.dq, &far->g.dk, &far->g.dv, &far->g.dg, &far->g.dbeta};
    void *const near_out[] = {near->p.o, near->g.dq, near->g.dk, near->g.dv, near->g.dg, near->g.dbeta};
    const int64_t out_width[] = {16, 16, 16, 16, 32, 2};
    void *mapped[12];
    for (int i = 0; i < 12; i++) {
        mapped[i] = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped[i] == MAP_FAILED)
            skip();
        if (i < 6) {
            for (int64_t t = 0; t < T; t++)
                memcpy((float *)mapped[i] + t * stride, (const float *)*in[i] + t * in_width[i], (size_t)in_width[i] * sizeof(float));
            *in[i] = mapped[i];
        } else {
            *out[i - 6] = mapped[i];
        }
    }
    far->p.q_stride = far->p.k_stride = far->p.v_stride = far->p.g_stride = far->p.beta_stride = far->p.o_stride = stride;
    for (int v = 0; v < 2; v++) {
        must(case_run(near, variants[v], KL_FORWARD, 1));
        must(case_run(far, variants[v], KL_FORWARD, 1));
        assert_true(same_bits(near->p.ht, far->p.ht, 2 * 16 * 8));
        for (int64_t t = 0; t < T; t++)
            assert_true(same_bits((float *)near->p.o + t * 16, (float *)far->p.o + t * stride, 16));
    }
    must(case_run(near, "chunk", KL_BACKWARD, 1));
    must(case_run(far, "chunk", KL_BACKWARD, 1));
    for (int i = 0; i < 6; i++)
        for (int64_t t = 0; t < T; t++)
            assert_true(same_bits((float *)near_out[i] + t * out_width[i], (float *)mapped[6 + i] + t * stride, out_width[i]));
    for (int i = 0; i < 12; i++)
        munmap(mapped[i], bytes);
    case_free(near);
    case_free(far);
}

/* ---- tail masks, tiny T, zero length ---- */

static void tail_masks_poisoned_padding_and_workspace(void **state)
{
    (void)state;
    for (int64_t T = 1; T <= 40; T += 13)
        for (int64_t gap = 1; gap < 20; gap += 7)
            check_both((case_options){.B = 2, .T = T, .H = 3, .K = 33, .V = 17, .G = 11, .gap = gap, .decay = DECAY_MIXED,
                                      .chunk_states = true, .seed = (uint64_t)T});
}

static void tiny_sequences_through_the_chunk_kernel(void **state)
{
    (void)state;
    const int64_t lengths[] = {1, 1, 2, 1, 3, 1};
    for (int64_t chunk = 16; chunk <= 128; chunk *= 2)
        check_both((case_options){.B = 6, .lengths = lengths, .H = 1, .K = 64, .V = 64, .G = 64, .decay = DECAY_STRONG, .chunk = chunk, .seed = 1});
}

static void zero_length_sequences_keep_their_state(void **state)
{
    (void)state;
    const int64_t lengths[] = {0, 5, 0};
    for (int v = 0; v < 2; v++)
        for (int layout = 0; layout < 2; layout++) {
            case_options opt = {.B = 3, .lengths = lengths, .H = 2, .K = 10, .V = 6, .G = 10, .layout = (kda_state_layout)layout, .seed = 1};
            kda_case *c = ran(opt, variants[v], KL_FORWARD, 2);
            int64_t size = 2 * 10 * 6;
            assert_true(same_bits(c->p.ht, c->p.h0, size));
            assert_true(same_bits((float *)c->p.ht + 2 * size, (const float *)c->p.h0 + 2 * size, size));
            case_free(c);
            opt.no_h0 = true;
            c = ran(opt, variants[v], KL_FORWARD, 2);
            for (int64_t i = 0; i < size; i++)
                assert_true(((float *)c->p.ht)[i] == 0.0f);
            case_free(c);
        }
}

/* ---- strides ---- */

static void strides_are_honoured_or_refused(void **state)
{
    (void)state;
    check_both((case_options){.B = 1, .T = 67, .H = 2, .HV = 4, .K = 20, .V = 12, .G = 4, .gap = 9, .gate = KDA_GATE_SOFTPLUS, .seed = 3});
    kda_case *c = case_new((case_options){.B = 1, .T = 4, .H = 2, .K = 8, .V = 4, .G = 8, .seed = 1});
    struct {
        int64_t *stride, width;
        const char *name;
    } all[] = {{&c->p.q_stride, 16, "q_stride"}, {&c->p.k_stride, 16, "k_stride"}, {&c->p.v_stride, 8, "v_stride"},
               {&c->p.g_stride, 16, "g_stride"}, {&c->p.beta_stride, 2, "beta_stride"}, {&c->p.o_stride, 8, "o_stride"}};
    for (int i = 0; i < 6; i++) {
        *all[i].stride = all[i].width - 1;
        kl_status s = case_run(c, "chunk", KL_FORWARD, 1);
        assert_int_equal(s.code, KL_EINVAL);
        assert_non_null(strstr(s.message, all[i].name));
        *all[i].stride = 0;
    }
    case_free(c);
}

/* ---- head and sequence offsets ---- */

/* One value head alone gives the bits that it gives among others. */
static void each_head_uses_its_own_gate_and_beta(void **state)
{
    (void)state;
    const case_options opt = {.B = 1, .T = 90, .H = 2, .HV = 4, .K = 32, .V = 32, .G = 32, .decay = DECAY_MIXED, .seed = 1};
    for (int v = 0; v < 2; v++) {
        kda_case *all = ran(opt, variants[v], KL_FORWARD, 1);
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
            must(case_run(one, variants[v], KL_FORWARD, 2));
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
        kda_case *c = ran(opt, variants[v], KL_FORWARD, 2), *d = case_new(opt);
        /* the first and last sequences become something else altogether */
        for (int64_t t = 0; t < 143; t++)
            if (t < 40 || t >= 110)
                for (int64_t i = 0; i < 40; i++)
                    ((float *)d->p.k)[t * 40 + i] = NAN;
        must(case_run(d, variants[v], KL_FORWARD, 2));
        assert_true(same_bits((float *)c->p.o + 40 * 36, (float *)d->p.o + 40 * 36, 70 * 36));
        assert_true(same_bits((float *)c->p.ht + 40 * 36, (float *)d->p.ht + 40 * 36, 40 * 36));
        case_free(c);
        case_free(d);
    }
}

/* ---- causality ---- */

static void a_later_token_never_changes_an_earlier_output(void **state)
{
    (void)state;
    enum { T = 150, K = 40, V = 36 };
    const int64_t cuts[] = {1, 5, 16, 17, 31, 47, 64, 65, 100, 149};
    for (int v = 0; v < 2; v++)
        for (int64_t chunk = 16; chunk <= 128; chunk *= 2) {
            case_options opt = {.B = 1, .T = T, .H = 1, .K = K, .V = V, .G = K, .decay = DECAY_MIXED, .chunk = chunk, .seed = 1};
            kda_case *c = ran(opt, variants[v], KL_FORWARD, 1);
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
                    must(case_run(d, variants[v], KL_FORWARD, 1));
                    assert_true(same_bits(c->p.o, d->p.o, cut * V));
                    case_free(d);
                }
                /* and when there are no later tokens */
                kda_case *d = case_new(opt);
                d->p.T = cut;
                must(case_run(d, variants[v], KL_FORWARD, 1));
                assert_true(same_bits(c->p.o, d->p.o, cut * V));
                case_free(d);
            }
            case_free(c);
        }
}

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
    must(case_run(c, variant, KL_FORWARD, 2));
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
            run_slice(c, variants[v], 0, s, carried, o);
            run_slice(c, variants[1 - v], s, T, carried, o);
            assert_true(kl_within(kl_rel_err(o, c->o, T * HV * V), kl_tol_kda_f32.forward));
            assert_true(kl_within(kl_rel_err(carried, c->ht, HV * K * V), kl_tol_kda_f32.forward));
        }
        memcpy(carried, c->p.h0, HV * K * V * sizeof(float));
        for (int64_t t = 0; t < T; t++)
            run_slice(c, variants[v], t, t + 1, carried, o);
        assert_true(kl_within(kl_rel_err(o, c->o, T * HV * V), kl_tol_kda_f32.forward));
        assert_true(kl_within(kl_rel_err(carried, c->ht, HV * K * V), kl_tol_kda_f32.forward));
    }
    case_free(c);
}

/* ---- determinism ---- */

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
            kda_case *first = ran(opt, variants[v ? 1 : 0], pass, 1);
            const int threads[] = {1, 2, 3, 5};
            for (int i = 0; i < 4; i++) {
                kda_case *c = ran(opt, variants[v ? 1 : 0], pass, threads[i]);
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

/* ---- states ---- */

static void state_layout_value_first_is_the_transpose(void **state)
{
    (void)state;
    for (int64_t V = 16; V <= 40; V += 12)
        for (int v = 0; v < 2; v++) {
            case_options opt = {.B = 2, .T = 37, .H = 2, .K = 32, .V = V, .G = 32, .decay = DECAY_SLOW, .seed = 1};
            kda_case *kv = case_new(opt);
            opt.layout = KDA_STATE_VK;
            kda_case *vk = case_new(opt);
            for (int64_t m = 0; m < 4; m++)
                for (int64_t a = 0; a < 32; a++)
                    for (int64_t b = 0; b < V; b++)
                        ((float *)vk->p.h0)[m * 32 * V + b * 32 + a] = ((const float *)kv->p.h0)[m * 32 * V + a * V + b];
            must(case_run(kv, variants[v], KL_FORWARD, 2));
            must(case_run(vk, variants[v], KL_FORWARD, 2));
            assert_true(same_bits(kv->p.o, vk->p.o, 2 * 37 * 2 * V));
            for (int64_t m = 0; m < 4; m++)
                for (int64_t a = 0; a < 32; a++)
                    for (int64_t b = 0; b < V; b++)
                        assert_true(((float *)vk->p.ht)[m * 32 * V + b * 32 + a] == ((float *)kv->p.ht)[m * 32 * V + a * V + b]);
            case_free(kv);
            case_free(vk);
        }
}

static void states_in_place_through_an_index_and_nowhere_else(void **state)
{
    (void)state;
    const int64_t lengths[] = {9, 0, 66, 1};
    for (int layout = 0; layout < 2; layout++)
        for (int v = 0; v < 2; v++) {
            case_options opt = {.B = 4, .lengths = lengths, .H = 1, .HV = 2, .K = 20, .V = 32, .G = 20, .pool = true, .in_place = true,
                                .layout = (kda_state_layout)layout, .seed = 1};
            check_forward(opt);
            kda_case *c = ran(opt, variants[v], KL_FORWARD, 2);
            int64_t size = 2 * 20 * 32;
            for (int64_t slot = 0; slot < 9; slot += 2)
                for (int64_t i = 0; i < size; i++)
                    assert_true(isnan(((float *)c->p.ht)[slot * size + i]));
            case_free(c);
        }
}

static void several_tokens_a_step_with_the_state_after_each(void **state)
{
    (void)state;
    const int64_t lengths[] = {4, 1, 0, 5};
    for (int64_t V = 30; V <= 32; V += 2)
        for (int layout = 0; layout < 2; layout++)
            for (int in_place = 0; in_place < 2; in_place++)
                check_forward((case_options){.B = 4, .lengths = lengths, .H = 2, .HV = 4, .K = 16, .V = V, .G = 16, .token_states = true,
                                             .layout = (kda_state_layout)layout, .in_place = in_place, .pool = in_place, .seed = 1});
}

static void states_before_each_chunk_of_any_size(void **state)
{
    (void)state;
    const int64_t lengths[] = {100, 0, 64, 129};
    for (int64_t chunk = 0; chunk <= 128; chunk = chunk ? chunk * 2 : 16)
        for (int layout = 0; layout < 2; layout++) {
            case_options opt = {.B = 4, .lengths = lengths, .H = 1, .K = 16, .V = 20, .G = 16, .chunk = chunk, .chunk_states = true,
                                .layout = (kda_state_layout)layout, .seed = 1};
            check_forward(opt);
            kda_case *c = ran(opt, "chunk", KL_FORWARD, 2);
            assert_true(same_bits(c->p.chunk_states, c->p.h0, 16 * 20)); /* the first chunk's is h0 itself */
            case_free(c);
        }
}

/* ---- gradients ---- */

static void missing_gradient_branches(void **state)
{
    (void)state;
    for (int bits = 0; bits < 8; bits++)
        check_both((case_options){.B = 1, .T = 50, .H = 1, .HV = 2, .K = 16, .V = 12, .G = 16, .gate = KDA_GATE_SOFTPLUS,
                                  .no_h0 = bits & 1, .no_dht = bits & 2, .no_d_o = bits & 4, .decay = DECAY_SLOW, .seed = 1});
}

static void an_unwanted_gradient_changes_no_other(void **state)
{
    (void)state;
    const case_options opt = {.B = 2, .T = 40, .H = 1, .HV = 2, .K = 16, .V = 12, .G = 4, .gate = KDA_GATE_BOUNDED, .l2norm = true, .seed = 1};
    kda_case *all = ran(opt, "chunk", KL_BACKWARD, 1);
    float *const results[] = {all->g.dq, all->g.dk, all->g.dv, all->g.dg, all->g.dbeta, all->g.dA_log, all->g.ddt_bias, all->g.dh0};
    const int64_t sizes[] = {80 * 16, 80 * 16, 80 * 24, 80 * 8, 160, 2, 8, 2 * 2 * 16 * 12};
    for (int missing = 0; missing < 8; missing++) {
        kda_case *c = case_new(opt);
        void *kept[] = {c->g.dq, c->g.dk, c->g.dv, c->g.dg, c->g.dbeta, c->g.dA_log, c->g.ddt_bias, c->g.dh0};
        switch (missing) {
        case 0: c->g.dq = NULL; break;
        case 1: c->g.dk = NULL; break;
        case 2: c->g.dv = NULL; break;
        case 3: c->g.dg = NULL; break;
        case 4: c->g.dbeta = NULL; break;
        case 5: c->g.dA_log = NULL; break;
        case 6: c->g.ddt_bias = NULL; break;
        case 7: c->g.dh0 = NULL; break;
        }
        must(case_run(c, "chunk", KL_BACKWARD, 1));
        for (int i = 0; i < 8; i++)
            if (i != missing)
                assert_true(same_bits(kept[i], results[i], sizes[i]));
        case_free(c);
    }
    case_free(all);
}

static void parameter_gradients_accumulate_and_activations_overwrite(void **state)
{
    (void)state;
    kda_case *c = ran((case_options){.B = 1, .T = 30, .H = 1, .K = 8, .V = 8, .G = 8, .gate = KDA_GATE_SOFTPLUS, .seed = 1}, "chunk", KL_BACKWARD, 1);
    float dA = c->g.dA_log[0], dbias = c->g.ddt_bias[3], dq = ((float *)c->g.dq)[5];
    must(case_run(c, "chunk", KL_BACKWARD, 1));
    assert_true(fabsf(c->g.dA_log[0] - 2.0f * dA) <= 1e-5f * fabsf(dA));
    assert_true(fabsf(c->g.ddt_bias[3] - 2.0f * dbias) <= 1e-5f * fabsf(dbias));
    assert_true(((float *)c->g.dq)[5] == dq);
    case_free(c);
}

/* At -5 a token nearly all of dg is what the pairs i = j would add and take away again: each head and each stretch of
 * time is scored by itself. */
static void decay_gradient_at_strong_decay_per_head_and_window(void **state)
{
    (void)state;
    kda_case *c = ran((case_options){.B = 1, .T = 192, .H = 2, .K = 64, .V = 64, .G = 64, .decay = DECAY_FIVE, .seed = 1}, "chunk", KL_BACKWARD, 2);
    case_reference(c, true);
    assert_true(kl_within(kl_rel_err_blocks(c->g.dg, c->dg, 192, 2, 64, 16), kl_tol_kda_f32.gradient));
    case_free(c);
}

/* Longer than the segment of states that backward keeps: it goes by checkpoints. */
static void backward_of_a_long_sequence(void **state)
{
    (void)state;
    check_both((case_options){.B = 1, .T = 16 * 64 * 3 + 21, .H = 1, .K = 8, .V = 4, .G = 8, .decay = DECAY_SLOW, .chunk = 16, .seed = 1});
}

/* ---- special cases of the operator ---- */

static void gate_granularity_is_a_repeated_gate(void **state)
{
    (void)state;
    const int64_t granularities[] = {0, 1, 4};
    for (int i = 0; i < 3; i++) {
        int64_t G = granularities[i];
        case_options opt = {.B = 1, .T = 60, .H = 2, .K = 16, .V = 12, .G = G, .decay = DECAY_SLOW, .seed = 1};
        kda_case *c = ran(opt, "chunk", KL_FORWARD, 1);
        float *wide = case_floats(c, 60 * 2 * 16), *o = case_floats(c, 60 * 2 * 12);
        for (int64_t n = 0; n < 60 * 2; n++)
            for (int64_t a = 0; a < 16; a++)
                wide[n * 16 + a] = G ? ((const float *)c->p.g)[n * G + a / (16 / G)] : 0.0f;
        memcpy(o, c->p.o, 60 * 2 * 12 * sizeof(float));
        c->p.g = wide;
        c->p.G = 16;
        must(case_run(c, "chunk", KL_FORWARD, 1));
        assert_true(same_bits(o, c->p.o, 60 * 2 * 12));
        case_free(c);
    }
    check_both((case_options){.B = 1, .T = 60, .H = 2, .K = 16, .V = 12, .G = 16, .no_delta = true, .decay = DECAY_MIXED, .seed = 1});
    check_both((case_options){.B = 1, .T = 60, .H = 2, .K = 16, .V = 12, .G = 1, .no_delta = true, .decay = DECAY_MIXED, .seed = 1});
}

static void every_gate_beta_and_norm_inside(void **state)
{
    (void)state;
    for (int gate = 0; gate < 3; gate++)
        for (int beta = 0; beta < 3; beta++)
            for (int bits = 0; bits < 4; bits++)
                check_both((case_options){.B = 2, .T = 40, .H = 1, .HV = 3, .K = 20, .V = 12, .G = 5, .gate = (kda_gate)gate,
                                          .beta_kind = (kda_beta)beta, .l2norm = bits & 1, .no_bias = bits & 2, .decay = DECAY_MIXED,
                                          .seed = (uint64_t)(gate * 3 + beta + 1)});
}

static void softplus_is_linear_above_twenty(void **state)
{
    (void)state;
    kda_case *c = case_new((case_options){.B = 1, .T = 40, .H = 1, .K = 16, .V = 8, .G = 16, .gate = KDA_GATE_SOFTPLUS, .seed = 1});
    for (int64_t i = 0; i < 40 * 16; i++)
        ((float *)c->p.g)[i] = (float)(i % 61) * 2.0f - 60.0f; /* -60 to 60 */
    ((float *)c->p.A_log)[0] = -5.0f;
    must(case_run(c, "chunk", KL_FORWARD, 1));
    must(case_run(c, "chunk", KL_BACKWARD, 1));
    case_reference(c, true);
    assert_true(kl_within(case_forward_error(c), kl_tol_kda_f32.forward));
    assert_true(kl_within(case_backward_error(c), kl_tol_kda_f32.gradient));
    case_free(c);
}

/* ---- silently ignored arguments ---- */

static void refused(kda_case *c, kda_problem p, const char *variant, kl_pass pass, kl_code code, const char *name)
{
    kda_problem good = c->p;
    c->p = p;
    kl_ctx *ctx;
    must(kl_ctx_create(&ctx, &(kl_ctx_options){.threads = 1}));
    const kl_variant *v = kda_pick(KL_CPU, variant, &good, pass);
    static _Alignas(64) char workspace[1 << 22];
    kl_status s = pass == KL_FORWARD ? v->forward(ctx, &p, workspace, sizeof workspace) : v->backward(ctx, &p, &c->g, workspace, sizeof workspace);
    kl_ctx_destroy(ctx);
    c->p = good;
    if (s.code != code || !strstr(s.message, name))
        fail_msg("expected a refusal of %s, got %s \"%s\"", name, kl_code_name(s.code), s.message);
}

static void wrong_and_unsupported_options_are_refused_by_name(void **state)
{
    (void)state;
    const int64_t lengths[] = {3, 4}, down[] = {0, 5, 3}, late[] = {1, 3, 7}, twice[] = {1, 1}, beyond[] = {0, 2};
    kda_case *c = case_new((case_options){.B = 2, .lengths = lengths, .H = 2, .HV = 4, .K = 8, .V = 8, .G = 8, .gate = KDA_GATE_SOFTPLUS, .seed = 1});
    float somewhere[7 * 4 * 64];
#define REFUSED(change, code, name)                         \
    do {                                                    \
        kda_problem p = c->p;                               \
        change;                                             \
        refused(c, p, "chunk", KL_FORWARD, code, name);     \
    } while (0)
    REFUSED(p.dtype = KL_BF16, KL_EUNSUPPORTED, "dtype");
    REFUSED(p.dtype = KL_I32, KL_EINVAL, "dtype");
    REFUSED(p.state_dtype = KL_BF16, KL_EUNSUPPORTED, "state_dtype");
    REFUSED(p.state_dtype = KL_F16, KL_EINVAL, "state_dtype");
    REFUSED(p.state_layout = (kda_state_layout)2, KL_EINVAL, "state_layout");
    REFUSED(p.H = 0, KL_EINVAL, "H:");
    REFUSED(p.HV = 3, KL_EINVAL, "HV:");
    REFUSED(p.K = 257, KL_EINVAL, "K:");
    REFUSED(p.V = 0, KL_EINVAL, "V:");
    REFUSED(p.G = 3, KL_EINVAL, "G:");
    REFUSED(p.B = 2, KL_EINVAL, "B:");
    REFUSED(p.T = 6, KL_EINVAL, "cu_seqlens");
    REFUSED(p.T = -1, KL_EINVAL, "T:");
    REFUSED(p.N = -1, KL_EINVAL, "N:");
    REFUSED(p.cu_seqlens = down, KL_EINVAL, "cu_seqlens");
    REFUSED(p.cu_seqlens = late, KL_EINVAL, "cu_seqlens");
    REFUSED(p.cu_seqlens = NULL, KL_EINVAL, "N:");
    REFUSED(p.state_index = twice, KL_EINVAL, "state_index");
    REFUSED(p.state_index = beyond, KL_EINVAL, "state_index");
    REFUSED(p.state_pool = 1, KL_EINVAL, "state_pool");
    REFUSED(p.scale = NAN, KL_EINVAL, "scale");
    REFUSED(p.gate = (kda_gate)3, KL_EINVAL, "gate");
    REFUSED(p.lower_bound = -5.0f, KL_EINVAL, "lower_bound");
    REFUSED((p.gate = KDA_GATE_BOUNDED, p.lower_bound = -6.0f), KL_EINVAL, "lower_bound");
    REFUSED(p.gate = KDA_GATE_BOUNDED, KL_EINVAL, "lower_bound");
    REFUSED(p.beta_kind = (kda_beta)9, KL_EINVAL, "beta_kind");
    REFUSED(p.chunk = 48, KL_EINVAL, "chunk");
    REFUSED(p.q = NULL, KL_EINVAL, "q:");
    REFUSED(p.g = NULL, KL_EINVAL, "g:");
    REFUSED(p.o = NULL, KL_EINVAL, "o:");
    REFUSED(p.o = (void *)p.v, KL_EINVAL, "o:");
    REFUSED(p.A_log = NULL, KL_EINVAL, "A_log");
    REFUSED(p.gate = KDA_GATE_LOG, KL_EINVAL, "A_log");
    REFUSED((p.G = 0, p.g = NULL), KL_EINVAL, "gate");
    REFUSED(p.token_states = somewhere, KL_EUNSUPPORTED, "token_states");
    kda_problem p = c->p;
    p.ht = (void *)p.h0;
    refused(c, p, "chunk", KL_BACKWARD, KL_EINVAL, "ht:");
    p = c->p;
    p.dt_bias = NULL;
    refused(c, p, "chunk", KL_BACKWARD, KL_EINVAL, "ddt_bias");
    case_free(c);
}

static void too_small_a_workspace_is_refused(void **state)
{
    (void)state;
    kda_case *c = case_new((case_options){.B = 1, .T = 20, .H = 1, .K = 16, .V = 16, .G = 16, .seed = 1});
    kl_ctx *ctx;
    must(kl_ctx_create(&ctx, &(kl_ctx_options){.threads = 1}));
    for (int v = 0; v < 3; v++) {
        kl_pass pass = v == 2 ? KL_BACKWARD : KL_FORWARD;
        const kl_variant *variant = kda_pick(KL_CPU, variants[v ? 1 : 0], &c->p, pass);
        size_t bytes = variant->workspace(ctx, &c->p, pass) - 1;
        void *workspace = aligned_alloc(64, (bytes + 64) / 64 * 64);
        kl_status s = pass == KL_FORWARD ? variant->forward(ctx, &c->p, workspace, bytes) : variant->backward(ctx, &c->p, &c->g, workspace, bytes);
        assert_int_equal(s.code, KL_EINVAL);
        assert_non_null(strstr(s.message, "workspace"));
        free(workspace);
    }
    kl_ctx_destroy(ctx);
    case_free(c);
}

static void dispatch_picks_by_shape_and_by_name(void **state)
{
    (void)state;
    kda_case *c = case_new((case_options){.B = 3, .T = 1, .H = 1, .K = 8, .V = 8, .G = 8, .seed = 1});
    assert_string_equal(kda_pick(KL_CPU, NULL, &c->p, KL_FORWARD)->name, "recurrent");
    c->p.T = 4096;
    assert_string_equal(kda_pick(KL_CPU, NULL, &c->p, KL_FORWARD)->name, "chunk");
    assert_string_equal(kda_pick(KL_CPU, NULL, &c->p, KL_BACKWARD)->name, "chunk");
    assert_string_equal(kda_pick(KL_CPU, "recurrent", &c->p, KL_FORWARD)->name, "recurrent");
    assert_null(kda_pick(KL_CPU, "recurent", &c->p, KL_FORWARD));
    case_free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_length),
        cmocka_unit_test(every_head_dimension),
        cmocka_unit_test(every_gate_regime),
        cmocka_unit_test(neumann_inverse_slow_decay_correlated_keys),
        cmocka_unit_test(packed_value_heads_value_first_bounded_together),
        cmocka_unit_test(more_than_65535_sequences_of_one_token),
        cmocka_unit_test(more_than_65535_chunks),
        cmocka_unit_test(tensors_beyond_two_to_the_31_elements),
        cmocka_unit_test(tail_masks_poisoned_padding_and_workspace),
        cmocka_unit_test(tiny_sequences_through_the_chunk_kernel),
        cmocka_unit_test(zero_length_sequences_keep_their_state),
        cmocka_unit_test(strides_are_honoured_or_refused),
        cmocka_unit_test(each_head_uses_its_own_gate_and_beta),
        cmocka_unit_test(a_batch_row_never_depends_on_its_neighbours),
        cmocka_unit_test(a_later_token_never_changes_an_earlier_output),
        cmocka_unit_test(split_anywhere),
        cmocka_unit_test(same_bits_twice_and_for_any_thread_count),
        cmocka_unit_test(state_layout_value_first_is_the_transpose),
        cmocka_unit_test(states_in_place_through_an_index_and_nowhere_else),
        cmocka_unit_test(several_tokens_a_step_with_the_state_after_each),
        cmocka_unit_test(states_before_each_chunk_of_any_size),
        cmocka_unit_test(missing_gradient_branches),
        cmocka_unit_test(an_unwanted_gradient_changes_no_other),
        cmocka_unit_test(parameter_gradients_accumulate_and_activations_overwrite),
        cmocka_unit_test(decay_gradient_at_strong_decay_per_head_and_window),
        cmocka_unit_test(backward_of_a_long_sequence),
        cmocka_unit_test(gate_granularity_is_a_repeated_gate),
        cmocka_unit_test(every_gate_beta_and_norm_inside),
        cmocka_unit_test(softplus_is_linear_above_twenty),
        cmocka_unit_test(wrong_and_unsupported_options_are_refused_by_name),
        cmocka_unit_test(too_small_a_workspace_is_refused),
        cmocka_unit_test(dispatch_picks_by_shape_and_by_name),
    };
    return cmocka_run_group_tests_name("kda_cases", tests, NULL, NULL);
}
