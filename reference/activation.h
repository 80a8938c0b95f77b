/* Scalar activations and their derivatives. */
#ifndef REFERENCE_ACTIVATION_H
#define REFERENCE_ACTIVATION_H

#include "reference/real.h"

/* sigmoid(x) = 1 / (1 + e^-x), with exponents <= 0 */
static inline real ref_sigmoid(real x)
{
    real e = exp(-fabs(x));
    return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

/* sigmoid'(x) = sigmoid(x) (1 - sigmoid(x)) */
static inline real ref_sigmoid_derivative(real x)
{
    return ref_sigmoid(x) * ref_sigmoid(-x);
}

/* silu(x) = x sigmoid(x), also called swish */
static inline real ref_silu(real x)
{
    return x * ref_sigmoid(x);
}

/* silu'(x) = sigmoid(x) + x sigmoid'(x) */
static inline real ref_silu_derivative(real x)
{
    return ref_sigmoid(x) + x * ref_sigmoid_derivative(x);
}

/* softplus(x) = log(1 + e^x), linear above 20 */
static inline real ref_softplus(real x)
{
    return x > 20 ? x : log1p(exp(x));
}

static inline real ref_softplus_derivative(real x)
{
    return x > 20 ? 1 : ref_sigmoid(x);
}

#endif
