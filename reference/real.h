/* The one number type of the reference, and what all of its files agree on.
 *
 * The reference is written to be read beside the Kimi Linear report: loops and equations, no speed, nothing but libc and libm.
 *
 * Sizes      B batch, T tokens, H query/key heads, HV value heads, K and V head dimensions, D hidden, E experts, L layers.
 * Layout     every array is dense and row-major; its shape stands beside it in square brackets, slowest index first.
 * Gradients  dX is d loss / d X. A backward function *adds* (+=) to the gradients it is given, so the caller zeroes them first;
 *            one call a sequence or a batch row then sums as it should. A gradient passed as NULL is not wanted, an upstream
 *            gradient passed as NULL is zero. Scalars of the forward pass that a backward needs are computed anew.
 * Status     functions that need scratch memory return 0, or -1 when there is none; the others cannot fail.
 *            Arguments are not checked: sizes must be consistent and pointers valid unless "NULL" is mentioned. */
#ifndef REFERENCE_REAL_H
#define REFERENCE_REAL_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef REF_FLOAT
typedef float real;
#else
typedef double real;
#endif

/* n zeros (at least one, so that an empty tensor is not mistaken for exhausted memory); NULL when there is no memory. */
static inline real *ref_zeros(int64_t n)
{
    return calloc(n > 0 ? (size_t)n : 1, sizeof(real));
}

static inline void ref_copy(int64_t n, const real *x, real *y)
{
    if (n > 0)
        memcpy(y, x, (size_t)n * sizeof(real));
}

/* y += x; nothing happens when either is NULL. */
static inline void ref_add(int64_t n, const real *x, real *y)
{
    if (!x || !y)
        return;
    for (int64_t i = 0; i < n; i++)
        y[i] += x[i];
}

static inline real ref_dot(int64_t n, const real *x, const real *y)
{
    real sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

#endif
