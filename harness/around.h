/* What a device runs around the recurrence: short convolution, gated norm, the decode step of a whole layer. They are no variants of
 * one problem, so they have rows of their own: verified against the CPU's on the same rounded inputs, and timed. */
#ifndef KL_HARNESS_AROUND_H
#define KL_HARNESS_AROUND_H

#include "harness/bench.h"
#include "harness/verify.h"

kl_status kl_verify_around(kl_verifier *v);
/* Each at the released model's sizes, with its error on a smaller problem. */
kl_status kl_bench_around(kl_bench *b);

#endif
