#include "common/timer.h"

#include <math.h>
#include <stdlib.h>
#include <time.h>

double kl_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

kl_spread kl_spread_of(double *samples, int runs)
{
    if (runs <= 0)
        return (kl_spread){NAN, NAN, NAN, 0};
    qsort(samples, (size_t)runs, sizeof *samples, ascending);
    double middle = runs % 2 ? samples[runs / 2] : 0.5 * (samples[runs / 2 - 1] + samples[runs / 2]);
    return (kl_spread){middle, samples[0], samples[runs - 1], runs};
}
