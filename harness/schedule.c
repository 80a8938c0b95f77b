/* The learning rate of a step: linear warm-up, then half a cosine down to min_lr at the last step. */
#include <math.h>

#include "harness/train_internal.h"

double kl_learning_rate(const kl_train_options *o, int64_t step)
{
    if (step <= o->warmup)
        return o->lr * (double)step / (double)o->warmup;
    int64_t span = o->steps - o->warmup;
    double done = span > 0 ? (double)(step - o->warmup) / (double)span : 1.0;
    if (done > 1.0)
        done = 1.0;
    /* lr(s) = min + (max - min) (1 + cos(pi s)) / 2 */
    return o->min_lr + 0.5 * (o->lr - o->min_lr) * (1.0 + cos(3.14159265358979323846 * done));
}
