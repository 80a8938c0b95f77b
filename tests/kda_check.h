/* Cases of tests/kda_case.h through the CPU's variants, against the reference. Include after cmocka.h. */
#ifndef TESTS_KDA_CHECK_H
#define TESTS_KDA_CHECK_H

#include "tests/kda_case.h"

static const char *const cpu_variants[] = {"recurrent", "chunk"};

static inline kda_case *ran(case_options opt, const char *variant, kl_pass pass, int threads)
{
    kda_case *c = case_new(opt);
    assert_ok(case_run(c, variant, pass, threads));
    return c;
}

static inline void check_forward(case_options opt)
{
    for (int i = 0; i < 2 - opt.token_states; i++) {
        kda_case *c = ran(opt, cpu_variants[i], KL_FORWARD, 2);
        if (opt.in_place) { /* the reference needs the state that was there before */
            case_free(c);
            c = case_new(opt);
            case_reference(c, false);
            assert_ok(case_run(c, cpu_variants[i], KL_FORWARD, 2));
        } else {
            case_reference(c, false);
        }
        double error = case_forward_error(c);
        if (!kl_within(error, kl_tol_kda_f32.forward))
            fail_msg("%s: error %.3g", cpu_variants[i], error);
        case_free(c);
    }
}

static inline void check_both(case_options opt)
{
    check_forward(opt);
    kda_case *c = ran(opt, "chunk", KL_BACKWARD, 2);
    case_reference(c, true);
    double error = case_backward_error(c);
    if (!kl_within(error, kl_tol_kda_f32.gradient))
        fail_msg("chunk backward: error %.3g", error);
    case_free(c);
}

static inline bool same_bits(const void *a, const void *b, int64_t floats) { return memcmp(a, b, (size_t)floats * sizeof(float)) == 0; }

#endif
