/* Byte-pair merging: again and again the adjacent pair with the lowest rank, the leftmost among equals, in
 * O(n log n): pairs wait in a heap, and one that has changed since is recognised by its rank and dropped. */
#include <stdlib.h>
#include <string.h>

#include "harness/tokenizer_parts.h"

static const uint32_t NO_RANK = UINT32_MAX;

void kl_merger_free(kl_merger *m)
{
    free(m->next);
    free(m->previous);
    free(m->rank);
    free(m->heap);
    *m = (kl_merger){0};
}

static kl_status reserve(kl_merger *m, size_t n)
{
    if (n <= m->capacity)
        return kl_ok();
    size_t capacity = n < 256 ? 256 : n + n / 2;
    if (n > INT32_MAX / 4)
        return kl_error(KL_EINVAL, "a piece of %zu bytes: expected at most %d", n, INT32_MAX / 4);
    kl_merger_free(m);
    m->next = malloc(capacity * sizeof *m->next);
    m->previous = malloc(capacity * sizeof *m->previous);
    m->rank = malloc(capacity * sizeof *m->rank);
    m->heap = malloc(3 * capacity * sizeof *m->heap);
    if (!m->next || !m->previous || !m->rank || !m->heap) {
        kl_merger_free(m);
        return kl_error(KL_ENOMEM, "no memory for a piece of %zu bytes", n);
    }
    m->capacity = capacity;
    return kl_ok();
}

static void push(kl_merger *m, uint64_t pair)
{
    size_t i = m->heap_count++;
    for (; i > 0 && m->heap[(i - 1) / 2] > pair; i = (i - 1) / 2)
        m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = pair;
}

static uint64_t pop(kl_merger *m)
{
    uint64_t top = m->heap[0], last = m->heap[--m->heap_count];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < m->heap_count) {
        child += child + 1 < m->heap_count && m->heap[child + 1] < m->heap[child];
        if (m->heap[child] >= last)
            break;
        m->heap[i] = m->heap[child];
        i = child;
    }
    m->heap[i] = last;
    return top;
}

/* Ranks the pair that begins at byte i anew, now that one of its parts has changed. */
static void rank_pair(const kl_ranks *r, kl_merger *m, const char *piece, size_t length, int32_t i)
{
    m->rank[i] = NO_RANK;
    if ((size_t)m->next[i] >= length)
        return;
    int64_t rank = kl_ranks_find(r, piece + i, (size_t)(m->next[m->next[i]] - i));
    if (rank < 0)
        return;
    m->rank[i] = (uint32_t)rank;
    push(m, (uint64_t)rank << 32 | (uint32_t)i);
}

static void merge_all(const kl_ranks *r, kl_merger *m, const char *piece, size_t length)
{
    while (m->heap_count) {
        uint64_t pair = pop(m);
        int32_t i = (int32_t)(uint32_t)pair;
        if (m->rank[i] != (uint32_t)(pair >> 32))
            continue;
        int32_t gone = m->next[i];
        m->next[i] = m->next[gone];
        m->rank[gone] = NO_RANK;
        if ((size_t)m->next[i] < length)
            m->previous[m->next[i]] = i;
        rank_pair(r, m, piece, length, i);
        if (i > 0)
            rank_pair(r, m, piece, length, m->previous[i]);
    }
}

kl_status kl_merge(const kl_ranks *r, kl_merger *m, const char *piece, size_t length, int32_t *ids, int64_t *count)
{
    int64_t whole = kl_ranks_find(r, piece, length);
    if (whole >= 0) {
        ids[(*count)++] = (int32_t)whole;
        return kl_ok();
    }
    KL_TRY(reserve(m, length + 1));
    m->heap_count = 0;
    for (size_t i = 0; i <= length; i++) {
        m->next[i] = (int32_t)i + 1;
        m->previous[i] = (int32_t)i - 1;
    }
    for (size_t i = 0; i < length; i++)
        rank_pair(r, m, piece, length, (int32_t)i);
    merge_all(r, m, piece, length);
    for (size_t i = 0; i < length; i = (size_t)m->next[i])
        ids[(*count)++] = (int32_t)kl_ranks_find(r, piece + i, (size_t)m->next[i] - i);
    return kl_ok();
}
