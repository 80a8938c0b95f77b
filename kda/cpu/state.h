/* States between the caller's layout and a scratch matrix S [K,columns] whose rows are padded to a multiple of 16. */
#ifndef KL_KDA_CPU_STATE_H
#define KL_KDA_CPU_STATE_H

#include <string.h>

#include "common/tile.h"
#include "kda/kda.h"

/* Columns [v0, v0 + columns) of one head's state; state NULL: zero. Padding columns become 0, and so do rows K..rows. */
static inline void kda_state_load(kda_state_layout layout, int64_t K, int64_t V, const float *state, int64_t v0, int64_t columns,
                                  int64_t rows, float *S, int64_t ld)
{
    if (!state || rows > K || ld > columns)
        memset(S, 0, (size_t)(rows * ld) * sizeof(float));
    if (!state)
        return;
    if (layout == KDA_STATE_KV) {
        for (int64_t c = 0; c < K; c++)
            memcpy(S + c * ld, state + c * V + v0, (size_t)columns * sizeof(float));
    } else if (K % 16 == 0 && columns % 16 == 0) {
        kl_tile_transpose(columns, K, state + v0 * K, K, S, ld);
    } else {
        for (int64_t j = 0; j < columns; j++)
            for (int64_t c = 0; c < K; c++)
                S[c * ld + j] = state[(v0 + j) * K + c];
    }
}

static inline void kda_state_store(kda_state_layout layout, int64_t K, int64_t V, const float *S, int64_t ld, int64_t v0,
                                   int64_t columns, float *state)
{
    if (layout == KDA_STATE_KV) {
        for (int64_t c = 0; c < K; c++)
            memcpy(state + c * V + v0, S + c * ld, (size_t)columns * sizeof(float));
    } else if (K % 16 == 0 && columns % 16 == 0) {
        kl_tile_transpose(K, columns, S, ld, state + v0 * K, K);
    } else {
        for (int64_t j = 0; j < columns; j++)
            for (int64_t c = 0; c < K; c++)
                state[(v0 + j) * K + c] = S[c * ld + j];
    }
}

#endif
