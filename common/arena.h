/* Carving a workspace. The same carving function runs twice: with base NULL it only counts (that is
 * the answer of *_workspace), with memory it hands out 64-byte aligned pieces. */
#ifndef KL_COMMON_ARENA_H
#define KL_COMMON_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct kl_arena {
    char *base;
    size_t size, used;
    bool overflow; /* a size did not fit size_t */
} kl_arena;

static inline kl_arena kl_arena_count(void) { return (kl_arena){NULL, SIZE_MAX, 0, false}; }
static inline kl_arena kl_arena_over(void *memory, size_t bytes) { return (kl_arena){(char *)memory, bytes, 0, false}; }

/* a * b, or set *overflow. */
static inline size_t kl_mul(size_t a, size_t b, bool *overflow)
{
    size_t product;
    if (__builtin_mul_overflow(a, b, &product)) {
        *overflow = true;
        return 0;
    }
    return product;
}

/* count elements of the given size; NULL when counting or when the arena is exhausted. */
static inline void *kl_arena_take(kl_arena *a, size_t count, size_t element)
{
    size_t bytes = kl_mul(count, element, &a->overflow);
    if (a->overflow || bytes > SIZE_MAX - 63 || ((bytes + 63) & ~(size_t)63) > a->size - a->used) {
        a->overflow = true;
        return NULL;
    }
    void *piece = a->base ? a->base + a->used : NULL;
    a->used += (bytes + 63) & ~(size_t)63;
    return piece;
}

#define KL_TAKE(arena, type, count) ((type *)kl_arena_take((arena), (size_t)(count), sizeof(type)))

#endif
