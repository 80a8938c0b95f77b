/* Choosing the next token: penalty, temperature, top-k, top-p, min-p, one draw. */
#include "harness/sample.h"

#include <math.h>
#include <string.h>

kl_status kl_sampling_validate(const kl_sampling *s)
{
    KL_REQUIRE(s, "sampling: expected options, got NULL");
    KL_REQUIRE(s->temperature >= 0.0f && s->temperature <= 1e6f, "temperature: expected 0 (greedy) or more, got %g", (double)s->temperature);
    KL_REQUIRE(s->top_k >= 0, "top_k: expected 0 (all) or more, got %lld", (long long)s->top_k);
    KL_REQUIRE(s->top_p > 0.0f && s->top_p <= 1.0f, "top_p: expected above 0, at most 1, got %g", (double)s->top_p);
    KL_REQUIRE(s->min_p >= 0.0f && s->min_p <= 1.0f, "min_p: expected 0 to 1, got %g", (double)s->min_p);
    KL_REQUIRE(s->repetition_penalty > 0.0f && s->repetition_penalty <= 1e6f, "repetition_penalty: expected above 0 (1: none), got %g",
               (double)s->repetition_penalty);
    return kl_ok();
}

/* Each id seen counts once however often it was seen: mark[id] is scratch. */
static void penalise(float penalty, float *logits, int64_t vocab, const int32_t *seen, int64_t count, int32_t *mark)
{
    memset(mark, 0, (size_t)vocab * sizeof *mark);
    for (int64_t i = 0; i < count; i++) {
        int32_t id = seen[i];
        if (id < 0 || id >= vocab || mark[id])
            continue;
        mark[id] = 1;
        logits[id] = logits[id] > 0.0f ? logits[id] / penalty : logits[id] * penalty;
    }
}

/* The lowest id of the largest logit; -1 when none is a number. */
static int32_t argmax(const float *logits, int64_t vocab)
{
    int32_t best = -1;
    for (int64_t i = 0; i < vocab; i++)
        if (logits[i] > -INFINITY && (best < 0 || logits[i] > logits[best]))
            best = (int32_t)i;
    return best;
}

/* ---- a heap of ids, the most probable on top, lower ids first among equals ---- */

static int before(const float *logits, int32_t a, int32_t b)
{
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

static void sift_down(const float *logits, int32_t *heap, int64_t size, int64_t at)
{
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= size)
            return;
        if (child + 1 < size && before(logits, heap[child + 1], heap[child]))
            child++;
        if (!before(logits, heap[child], heap[at]))
            return;
        int32_t swap = heap[at];
        heap[at] = heap[child];
        heap[child] = swap;
        at = child;
    }
}

/* Takes the top off the heap and puts it behind what is left of it: popping again and again sorts the ids from the end. */
static void pop(const float *logits, int32_t *ids, int64_t *size)
{
    int64_t last = --*size;
    int32_t top = ids[0];
    ids[0] = ids[last];
    ids[last] = top;
    sift_down(logits, ids, last, 0);
}

/* ---- the draw ---- */

/* Ids in order of preference, or in order of id where the order does not matter. */
typedef struct candidates {
    const float *logits;
    float best, temperature;
    int32_t *ids;     /* [count]; sorted: the best at the end */
    int64_t count;
    bool sorted;
} candidates;

static int32_t candidate(const candidates *c, int64_t i) { return c->ids[c->sorted ? c->count - 1 - i : i]; }

/* p_i up to a common factor; 1 for the best. */
static double weight(const candidates *c, int64_t i)
{
    return exp(((double)c->logits[candidate(c, i)] - (double)c->best) / (double)c->temperature);
}

/* How many of the best survive top-k and top-p; sorts that many. */
static int64_t cut(candidates *c, int64_t top_k, double top_p)
{
    int64_t limit = top_k > 0 && top_k < c->count ? top_k : c->count, heap = c->count, run = 0;
    double all = 0.0, mass = 0.0;
    if (limit == c->count)
        for (int64_t i = 0; i < c->count; i++)
            all += weight(c, i);
    c->sorted = true;
    for (int64_t i = c->count / 2; i-- > 0;)
        sift_down(c->logits, c->ids, c->count, i);
    if (limit < c->count)
        for (int64_t i = 0; i < limit; i++) {
            pop(c->logits, c->ids, &heap);
            all += weight(c, i);
        }
    /* the shortest run of the best whose mass reaches top_p of the mass of all that top-k left */
    while (run < limit && (run == 0 || mass < top_p * all)) {
        if (run == c->count - heap)
            pop(c->logits, c->ids, &heap);
        mass += weight(c, run++);
    }
    return run;
}

/* One of the first `run` candidates, each with its weight, those below min_p of the best left out. */
static int32_t draw(const candidates *c, int64_t run, double min_p, kl_rng *rng)
{
    double total = 0.0;
    for (int64_t i = 0; i < run; i++) {
        double w = weight(c, i);
        total += w >= min_p ? w : 0.0;
    }
    double left = kl_rng_uniform(rng) * total;
    int32_t chosen = -1;
    for (int64_t i = 0; i < run; i++) {
        double w = weight(c, i);
        if (w == 0.0 || !(w >= min_p))
            continue;
        chosen = candidate(c, i);
        left -= w;
        if (left < 0.0)
            break;
    }
    return chosen;
}

int32_t kl_sample(const kl_sampling *s, kl_rng *rng, float *logits, int64_t vocab, const int32_t *seen, int64_t seen_count, int32_t *scratch)
{
    if (s->repetition_penalty != 1.0f && seen_count > 0)
        penalise(s->repetition_penalty, logits, vocab, seen, seen_count, scratch);
    int32_t top = argmax(logits, vocab);
    if (s->temperature == 0.0f || top < 0)
        return top;
    if (logits[top] == INFINITY)
        return top;
    candidates c = {.logits = logits, .best = logits[top], .temperature = s->temperature, .ids = scratch};
    for (int64_t i = 0; i < vocab; i++)
        if (logits[i] > -INFINITY)
            scratch[c.count++] = (int32_t)i;
    int64_t run = s->top_k > 0 || s->top_p < 1.0f ? cut(&c, s->top_k, (double)s->top_p) : c.count;
    return draw(&c, run, (double)s->min_p, rng);
}
