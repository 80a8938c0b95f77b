/* A monotonic clock and the statistics that a table prints: median and spread, never the mean. */
#ifndef KL_COMMON_TIMER_H
#define KL_COMMON_TIMER_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

double kl_now(void); /* seconds, CLOCK_MONOTONIC */

typedef struct kl_spread {
    double median, min, max;
    int runs;
} kl_spread;

/* Sorts samples in place; runs = 0 gives NaN. */
kl_spread kl_spread_of(double *samples, int runs);

#ifdef __cplusplus
}
#endif
#endif
