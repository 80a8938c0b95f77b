#include "reference/loss.h"

void ref_embedding_forward(int64_t N, int64_t D, const int64_t *ids, const real *table, real *x)
{
    for (int64_t n = 0; n < N; n++)
        ref_copy(D, table + ids[n] * D, x + n * D);
}

void ref_embedding_backward(int64_t N, int64_t D, const int64_t *ids, const real *dx, real *dtable)
{
    /* x[n] = table[ids[n]] */
    for (int64_t n = 0; n < N; n++)
        ref_add(D, dx + n * D, dtable + ids[n] * D);
}

/* log of the sum of e^l */
static real log_sum_exp(int64_t n, const real *l)
{
    real max = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++)
        max = fmax(max, l[i]);
    for (int64_t i = 0; i < n; i++)
        sum += exp(l[i] - max);
    return max + log(sum);
}

static int64_t count_targets(int64_t N, const int64_t *targets)
{
    int64_t count = 0;
    for (int64_t n = 0; n < N; n++)
        count += targets[n] >= 0;
    return count;
}

real ref_cross_entropy_forward(int64_t N, int64_t vocab, const real *logits, const int64_t *targets)
{
    int64_t count = count_targets(N, targets);
    real loss = 0;
    for (int64_t n = 0; n < N; n++)
        if (targets[n] >= 0)
            loss += (log_sum_exp(vocab, logits + n * vocab) - logits[n * vocab + targets[n]]) / count;
    return loss;
}

void ref_cross_entropy_backward(int64_t N, int64_t vocab, const real *logits, const int64_t *targets, real dloss, real *dlogits)
{
    int64_t count = count_targets(N, targets);
    for (int64_t n = 0; n < N; n++) {
        if (targets[n] < 0)
            continue;
        /* loss = (log sum_i e^l_i - l_target) / count:  dl_i = (softmax(l)_i - [i = target]) / count */
        const real *l = logits + n * vocab;
        real lse = log_sum_exp(vocab, l);
        for (int64_t i = 0; i < vocab; i++)
            dlogits[n * vocab + i] += dloss * (exp(l[i] - lse) - (i == targets[n])) / count;
    }
}
