/* The sizes, regimes, layouts and options that every implementation of the operator must do right. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/mman.h>
#include <cmocka.h>

#include "tests/kda_check.h"

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
        assert_ok(case_run(near, cpu_variants[v], KL_FORWARD, 1));
        assert_ok(case_run(far, cpu_variants[v], KL_FORWARD, 1));
        assert_true(same_bits(near->p.ht, far->p.ht, 2 * 16 * 8));
        for (int64_t t = 0; t < T; t++)
            assert_true(same_bits((float *)near->p.o + t * 16, (float *)far->p.o + t * stride, 16));
    }
    assert_ok(case_run(near, "chunk", KL_BACKWARD, 1));
    assert_ok(case_run(far, "chunk", KL_BACKWARD, 1));
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
            kda_case *c = ran(opt, cpu_variants[v], KL_FORWARD, 2);
            int64_t size = 2 * 10 * 6;
            assert_true(same_bits(c->p.ht, c->p.h0, size));
            assert_true(same_bits((float *)c->p.ht + 2 * size, (const float *)c->p.h0 + 2 * size, size));
            case_free(c);
            opt.no_h0 = true;
            c = ran(opt, cpu_variants[v], KL_FORWARD, 2);
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
            assert_ok(case_run(kv, cpu_variants[v], KL_FORWARD, 2));
            assert_ok(case_run(vk, cpu_variants[v], KL_FORWARD, 2));
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
            kda_case *c = ran(opt, cpu_variants[v], KL_FORWARD, 2);
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
        assert_ok(case_run(c, "chunk", KL_FORWARD, 1));
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
    assert_ok(case_run(c, "chunk", KL_FORWARD, 1));
    assert_ok(case_run(c, "chunk", KL_BACKWARD, 1));
    case_reference(c, true);
    assert_true(kl_within(case_forward_error(c), kl_tol_kda_f32.forward));
    assert_true(kl_within(case_backward_error(c), kl_tol_kda_f32.gradient));
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
        cmocka_unit_test(state_layout_value_first_is_the_transpose),
        cmocka_unit_test(states_in_place_through_an_index_and_nowhere_else),
        cmocka_unit_test(several_tokens_a_step_with_the_state_after_each),
        cmocka_unit_test(states_before_each_chunk_of_any_size),
        cmocka_unit_test(gate_granularity_is_a_repeated_gate),
        cmocka_unit_test(every_gate_beta_and_norm_inside),
        cmocka_unit_test(softplus_is_linear_above_twenty),
    };
    return cmocka_run_group_tests_name("kda_cases", tests, NULL, NULL);
}
