/* How the problem builders lay out their memory; private to harness/problem*.c. */
#ifndef KL_HARNESS_PROBLEM_BUILD_H
#define KL_HARNESS_PROBLEM_BUILD_H

#include "common/arena.h"
#include "common/rng.h"
#include "harness/problem.h"

/* Sets sizes and pointers of the case from the specification. Runs twice: counting, then over memory. */
typedef void (*kl_lay_out)(kl_case *c, const void *spec, kl_arena *a);
kl_status kl_case_build(kl_case *c, kl_lay_out lay_out, const void *spec);

/* A tensor that a variant writes, entered into c->tensor. */
float *kl_case_output(kl_case *c, kl_arena *a, const char *name, int64_t T, int64_t H, int64_t D, bool gradient, bool accumulates);

/* From the wanted dg: the terms that dA_log and ddt_bias are sums of (problem_kda_terms.c). */
kl_status kl_case_kda_terms(kl_case *c);
void kl_case_forget(kl_case *c); /* what is wanted */

/* The case in the memory of a device (problem_device.c). */
struct kl_image;
void kl_image_free(struct kl_image *image);
/* The inputs as they were, everything that is written poisoned, and after the call the outputs back in the case. */
kl_status kl_image_send(const struct kl_image *image);
kl_status kl_image_fetch(const struct kl_image *image, kl_pass pass);
const kl_case *kl_image_case(const struct kl_image *image);
const kl_ctx *kl_image_context(const struct kl_image *image);

/* N(0, stddev) in the tensor's own type, drawn in pieces so that no float copy of it is needed. */
void kl_fill_typed(uint64_t seed, uint64_t stream, void *x, kl_dtype type, int64_t count, float stddev);

/* Whether a*b*c*... of sizes >= 0 stays below 2^62: the builders refuse larger problems before they multiply. */
static inline bool kl_sizes_fit(const int64_t *size, int count)
{
    int64_t product = 1;
    for (int i = 0; i < count; i++) {
        if (size[i] < 0)
            return false;
        int64_t s = size[i] ? size[i] : 1;
        if (product > (INT64_C(1) << 62) / s)
            return false;
        product *= s;
    }
    return true;
}

#endif
