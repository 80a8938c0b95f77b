/* Random numbers, central finite differences and assertions for the tests of backward passes, in double. Include cmocka.h first. */
#ifndef TESTS_FD_H
#define TESTS_FD_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- random numbers: splitmix64; SEED=n in the environment chooses another sequence ---- */

typedef struct {
    uint64_t state;
} fd_rng;

static inline uint64_t fd_seed(void)
{
    const char *seed = getenv("SEED");
    return seed ? strtoull(seed, NULL, 10) : 1;
}

static inline uint64_t fd_u64(fd_rng *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* uniform in [low, high) */
static inline double fd_uniform(fd_rng *r, double low, double high)
{
    return low + (high - low) * (double)(fd_u64(r) >> 11) * 0x1p-53;
}

static inline double fd_normal(fd_rng *r)
{
    double u = fd_uniform(r, 0x1p-53, 1), v = fd_uniform(r, 0, 1);
    return sqrt(-2 * log(u)) * cos(2 * 3.14159265358979323846 * v);
}

/* n independent normal numbers times scale; free() it. */
static inline double *fd_randoms(fd_rng *r, int64_t n, double scale)
{
    double *x = malloc((size_t)(n + 1) * sizeof *x);
    for (int64_t i = 0; i < n; i++)
        x[i] = scale * fd_normal(r);
    return x;
}

static inline double *fd_zeros(int64_t n)
{
    return calloc((size_t)(n + 1), sizeof(double));
}

/* ---- comparisons; every one of them is false, or infinite, when a NaN takes part ---- */

/* ||x - y|| / ||y||, or ||x|| when y = 0 */
static inline double fd_distance(int64_t n, const double *x, const double *y)
{
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += (x[i] - y[i]) * (x[i] - y[i]);
        norm += y[i] * y[i];
    }
    double d = norm > 0 ? sqrt(difference / norm) : sqrt(difference);
    return d == d ? d : INFINITY;
}

/* ---- finite differences ---- */

typedef double (*fd_loss)(void *context);

/* d loss / d *x by the five-point rule, whose error is of order h^4. */
static inline double fd_derivative(double *x, double h, fd_loss loss, void *context)
{
    double at = *x, d = 0;
    *x = at + h;     d += 8 * loss(context);
    *x = at - h;     d -= 8 * loss(context);
    *x = at + 2 * h; d -= loss(context);
    *x = at - 2 * h; d += loss(context);
    *x = at;
    return d / (12 * h);
}

/* The largest |dx[i] - finite difference| over at most `probes` entries of x [n], divided by the largest finite difference met
 * (or by `floor`, the size below which a gradient counts as zero). With losses of order 1 the rounding error is about 1e-16 / h and
 * the truncation error h^4 times the fifth derivative. */
static inline double fd_error(double *x, const double *dx, int64_t n, int64_t probes, double h, double floor, fd_loss loss, void *context)
{
    double worst = 0, largest = floor;
    int64_t stride = n > probes ? n / probes : 1;
    for (int64_t i = 0; i < n; i += stride) {
        double d = fd_derivative(x + i, h, loss, context);
        if (!isfinite(d) || !isfinite(dx[i]))
            return INFINITY;
        worst = fmax(worst, fabs(dx[i] - d));
        largest = fmax(largest, fabs(d));
    }
    return worst / largest;
}

/* ---- for test functions ---- */

/* Prints what is tested and from which seed. */
static inline fd_rng fd_start(const char *test)
{
    printf("%s: SEED=%llu\n", test, (unsigned long long)fd_seed());
    return (fd_rng){ fd_seed() };
}

static inline void fd_assert_close(const char *what, int64_t n, const double *x, const double *y, double limit)
{
    double distance = fd_distance(n, x, y);
    if (!(distance <= limit))
        fail_msg("%s: distance %.3g, limit %.3g", what, distance, limit);
}

/* Errors seen are about 1e-11; a wrong term shows at 1e-3 and above. Gradients below the floor count as zero. */
#define FD_LIMIT 1e-8
#define FD_FLOOR 1e-2
#define FD_STEP 1e-3

/* Probes up to 40 entries of x [n] against dx; returns the error. */
static inline double fd_assert_gradient(const char *label, const char *name, double *x, const double *dx, int64_t n, fd_loss loss,
                                        void *context)
{
    double error = fd_error(x, dx, n, 40, FD_STEP, FD_FLOOR, loss, context);
    if (!(error <= FD_LIMIT))
        fail_msg("%s: d%s: finite differences disagree by %.3g, limit %.3g", label, name, error, FD_LIMIT);
    return error;
}

#endif
