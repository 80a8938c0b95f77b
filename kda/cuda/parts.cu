/* How the sequences of a problem are cut into parts. */
#include "kda/cuda/parts.cuh"

#include <algorithm>

#include "common/gpu.h"
#include "kda/cuda/core_tile.cuh"

kda_parts kda_parts_cut(const kda_problem *p, int64_t tiles, int64_t span)
{
    kda_parts c = {};
    if (p->K > 128 || p->N < 1 || p->N > KDA_ORDERED_SEQUENCES)
        return c;
    int64_t order[KDA_ORDERED_SEQUENCES], tile = kda_tile_tokens(p), whole = p->chunk_states ? kda_chunk_tokens(p) / tile : 1;
    if (p->cu_seqlens)
        kda_sequences_order(p, order);
    c.tiles = (int)(kda_ceil(tiles, whole) * whole);
    c.span = span ? (int)span : INT32_MAX;
    c.sequences = (int)p->N;
    for (int s = 0; s < c.sequences; s++) {
        int64_t length = kda_sequence(p->T, p->cu_seqlens, p->cu_seqlens ? order[s] : s).length;
        int parts = (int)std::max<int64_t>(kda_ceil(kda_ceil(length, tile), c.tiles), 1);
        c.most = std::max(c.most, parts);
        c.first[s + 1] = c.first[s] + parts;
        c.carried[s + 1] = c.carried[s] + (int)kda_ceil(parts, c.span);
    }
    return c;
}

/* What parts cost, in nanoseconds: a tile walked over by a block alone on its multiprocessor, one summarised, a state carried
 * on, the launches of these two with the first and last tiles of each; and bytes of tiles that stay in the second cache, others coming at RATE bytes a ns. */
enum { WALK = 520, SUMMARISE = 620, CARRY = 2100, LAUNCHES = 22000, STAY = 25 << 20, RATE = 2500, LEAST_TILES = 3, MOST_CARRIED = 64 };
enum { PREPARE = 2150 /* a tile, a multiprocessor */, START = 18500 /* before the first tile walked over, beside preparing, and after the last */ };

/* The parts that take least time when nothing is truncated: with P of them a head, of L tiles,
 *
 *     time(1) = L WALK        time(P) = L (SUMMARISE rounds of summaries + WALK rounds of walks) + (P - 2) CARRY + LAUNCHES
 *
 * where a round fills the multiprocessors. Many tiles would come back from memory, but not in the persistent form, which is then the
 * better one unless much is saved. Between carried states there are as many parts more as fill the multiprocessors once, for
 * where the gates allow it; the time is half-way between that where they allow all and where they allow none. */
kda_parts kda_parts_of(const kl_ctx *ctx, const kda_problem *p, int64_t *time)
{
    *time = INT64_MAX;
    int64_t blocks = kl_gpu_multiprocessors(ctx), heads = p->N * p->HV, longest = kda_ceil(kda_longest(p->T, p->N, p->cu_seqlens), kda_tile_tokens(p));
    int64_t splits = kda_ceil(p->V, 64), walkers = heads * splits, all = kda_tile_count(p) * p->HV;
    if (!ctx->hopper || p->K > 128 || p->N < 1 || p->N > KDA_ORDERED_SEQUENCES || 2 * walkers > blocks)
        return {};
    int64_t bytes = all * (int64_t)kda_core_tile_bytes(p->K), memory = bytes > STAY ? bytes / RATE : 0, plain = longest * WALK, best = plain, most = 1;
    for (int64_t P = 2; P <= MOST_CARRIED && kda_ceil(longest, P) >= LEAST_TILES; P++) {
        int64_t L = kda_ceil(longest, P), summaries = heads * ((P - 1) * kda_ceil(p->V, 128) + P - 2);
        int64_t need = std::max(kda_ceil(summaries, blocks) * L * SUMMARISE, memory) + std::max(kda_ceil(walkers * P, blocks) * L * WALK, memory) +
                       (P - 2) * kda_ceil(heads * kda_ceil(p->V, 8), blocks) * CARRY + LAUNCHES;
        if (need < best) {
            best = need;
            most = P;
        }
    }
    int64_t carried = kda_ceil(longest, most), filling = std::max<int64_t>(kda_ceil(longest * walkers, blocks), LEAST_TILES), span = std::max<int64_t>(carried / filling, 1);
    if ((bytes > 2 * (int64_t)STAY && best > plain * 3 / 4) || (most == 1 && span == 1))
        return {};
    int64_t proven = std::max(kda_ceil(carried, span) * WALK, memory);
    *time = START + all * PREPARE / blocks + (best + proven) / 2;
    return kda_parts_cut(p, kda_ceil(carried, span), most > 1 ? span : 0);
}
