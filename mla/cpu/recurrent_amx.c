/* The block products of the recurrent form on AMX (Sapphire Rapids and later): products of bf16 tiles, summed in float.
 *
 * A float is carried as a sum of bf16 parts, hi + lo (error about 2^-17 of it): queries and probabilities always, latent
 * rows when they are float; the product lo lo is left out. One tile product takes 16 rows of 32 pairs:
 *
 *     s^T [16 keys, 16 rows] += c [16 keys, 32 dims] q^T [32 dims, 16 rows]     latent rows straight from the cache
 *     o   [16 rows, 16 dims] += P^T [16 rows, 32 keys] c [32 keys, 16 dims]     pairs of latent rows interleaved
 *
 * Interleaving works inside 128-bit lanes, so that the 32 columns of two neighbouring sum tiles are shuffled among
 * themselves; order() puts them right once, after the pieces are combined. */
#include "mla/cpu/recurrent.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")))
/* Tile loads read memory behind the compiler's back. */
#define STORES_DONE() __asm__ volatile("" ::: "memory")

enum { TILE = 16, DEPTH = 32, CHUNKS = MLA_BLOCK / DEPTH, PARTS = 2 };

typedef struct tile {
    uint32_t word[TILE][16];
} tile;

/* P of one group: [16 rows][16 pairs of keys]. */
typedef struct weights {
    tile part[PARTS][CHUNKS];
} weights;

/* 32 columns of the latent block: [16 pairs of keys][16 columns] of either half. */
typedef struct strip {
    tile half[2][CHUNKS];
} strip;

/* What one thread keeps between score() and accumulate(). */
typedef struct scratch {
    uint16_t *block[2]; /* [parts of the latent, MLA_BLOCK, R+Dr] where it cannot be read in place; in turns */
    weights *weight;    /* [groups] */
    strip *strip;       /* [parts of the latent] */
} scratch;

static int latent_parts(const mla_problem *p) { return p->latent_dtype == KL_F32 ? 2 : 1; }

static size_t packed_bytes(const mla_problem *p)
{
    return (size_t)((p->R + p->Dr) / DEPTH) * PARTS * sizeof(tile);
}

static size_t block_bytes(const mla_problem *p)
{
    return (size_t)latent_parts(p) * MLA_BLOCK * (size_t)(p->R + p->Dr) * sizeof(uint16_t);
}
static size_t scratch_bytes(const mla_problem *p, int64_t groups)
{
    return 64 + 2 * block_bytes(p) + (size_t)groups * sizeof(weights) + (size_t)latent_parts(p) * sizeof(strip);
}
static scratch carve(const mla_problem *p, void *memory)
{
    char *at = (char *)memory + 64;
    strip *strips = (strip *)(at + 2 * block_bytes(p));
    return (scratch){{(uint16_t *)at, (uint16_t *)(at + block_bytes(p))}, (weights *)(strips + latent_parts(p)), strips};
}

/* ---- what the machine offers ---- */

static bool ask_for_tiles(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return false;
    bool tiles = (d >> 22 & 1) && (d >> 24 & 1);                                            /* AMX-BF16, AMX-TILE */
    bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);         /* F, DQ, BW, VL */
    return tiles && avx512 && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

/* Asked once a process: the permission lasts. */
static bool have_tiles(void)
{
    static atomic_int known; /* 0: not asked yet */
    int answer = atomic_load(&known);
    if (!answer) {
        answer = ask_for_tiles() ? 1 : 2;
        atomic_store(&known, answer);
    }
    return answer == 1;
}

AMX static void begin(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.bytes[t] = 64;
        config.rows[t] = TILE;
    }
    STORES_DONE();
    _tile_loadconfig(&config);
}

AMX static void end(void)
{
    _tile_release();
}

/* ---- splitting and packing ---- */

/* packed[d / 32][part]: word (k, r) holds the dimensions d + 2k and d + 2k + 1 of row r */
static void pack(const mla_problem *p, const float *rows, void *packed)
{
    int64_t width = p->R + p->Dr;
    tile *out = packed;
    for (int64_t d = 0; d < width; d++) {
        for (int r = 0; r < TILE; r++) {
            float x = rows[r * width + d];
            for (int part = 0; part < PARTS; part++) {
                uint16_t bits = kl_f32_to_bf16(x);
                uint32_t *word = &out[d / DEPTH * PARTS + part].word[d % DEPTH / 2][r];
                *word = d % 2 ? *word | (uint32_t)bits << 16 : bits;
                x -= kl_bf16_to_f32(bits);
            }
        }
    }
}

/* m[i][k] <- m[k][i], 32-bit words */
AMX static inline void transpose(__m512i m[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        m[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        m[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        m[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        m[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        m[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        m[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        m[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        m[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Two floats a word, the second in the high half: hi parts cut off, lo parts rounded (2^-16 of P is left at most). */
AMX static inline void split_pair(__m512 even, __m512 odd, __m512i *hi, __m512i *lo)
{
    const __m512i high = _mm512_set1_epi32((int)0xffff0000), half = _mm512_set1_epi32(0x8000);
    __m512i e = _mm512_castps_si512(even), o = _mm512_castps_si512(odd), e_cut = _mm512_and_si512(e, high), o_cut = _mm512_and_si512(o, high);
    __m512i e_rest = _mm512_add_epi32(_mm512_castps_si512(_mm512_sub_ps(even, _mm512_castsi512_ps(e_cut))), half);
    __m512i o_rest = _mm512_add_epi32(_mm512_castps_si512(_mm512_sub_ps(odd, _mm512_castsi512_ps(o_cut))), half);
    *hi = _mm512_or_si512(_mm512_srli_epi32(e, 16), o_cut);
    *lo = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(e_rest, 16), o_rest);
}

/* The exponentials of a block on their way to tiles of P, in steps small enough to run under tile products: a few keys of a
 * group at a time, and once a chunk has its 16 pairs they are transposed, one part a step. */
enum { PAIRS = 2, SIDE_STEPS = TILE / PAIRS + PARTS }; /* keys of a step; steps of a chunk */
typedef struct side {
    _Alignas(64) float e[2 * PAIRS * TILE];
    const mla_scored *now;
    weights *weight;        /* [groups] */
    int64_t left, each;     /* steps: that remain, between two groups of tile products */
    int64_t g;
    int c, k, chunks;       /* the next step */
} side;

static side side_of(const mla_scored *now, int64_t groups, int64_t slots, weights *weight)
{
    int chunks = (int)kl_ceil_div(now->keys, DEPTH);
    int64_t left = groups * chunks * SIDE_STEPS;
    return (side){.now = now, .weight = weight, .left = left, .each = slots ? kl_ceil_div(left, slots) : left, .chunks = chunks};
}

AMX static void transpose_tile(tile *t)
{
    __m512i m[TILE];
    for (int r = 0; r < TILE; r++)
        m[r] = _mm512_load_si512(t->word[r]);
    transpose(m);
    for (int r = 0; r < TILE; r++)
        _mm512_store_si512(t->word[r], m[r]);
}

AMX static void side_step(side *a)
{
    weights *w = &a->weight[a->g];
    if (a->k < TILE / PAIRS) {
        const float *s = a->now->s + ((a->g * MLA_BLOCK) + a->c * DEPTH + 2 * PAIRS * a->k) * TILE;
        mla_exponentials(s, 2 * PAIRS, a->now->m + a->g * TILE, a->now->l + a->g * TILE, a->e);
        for (int i = 0; i < PAIRS; i++) {
            __m512i hi, lo;
            split_pair(_mm512_load_ps(a->e + 2 * i * TILE), _mm512_load_ps(a->e + (2 * i + 1) * TILE), &hi, &lo);
            _mm512_store_si512(w->part[0][a->c].word[PAIRS * a->k + i], hi);
            _mm512_store_si512(w->part[1][a->c].word[PAIRS * a->k + i], lo);
        }
    } else {
        transpose_tile(&w->part[a->k - TILE / PAIRS][a->c]);
    }
    a->left--;
    if (++a->k == SIDE_STEPS) {
        a->k = 0;
        if (++a->c == a->chunks) {
            a->c = 0;
            a->g++;
        }
    }
}

AMX static inline void side_work(side *a)
{
    for (int64_t i = mla_min(a->each, a->left); i > 0; i--)
        side_step(a);
}

/* ---- the latent block ---- */

/* Where the tiles of a block are loaded from: the cache itself, or a copy; lo is NULL where bf16 rows have no such part. */
typedef struct block {
    const char *hi, *lo;
    int64_t stride; /* bytes */
} block;

static block block_of(const mla_problem *p, int64_t row, int64_t keys, const scratch *w)
{
    int64_t width = p->R + p->Dr;
    const char *copy = (const char *)w->block[row / MLA_BLOCK % 2];
    if (p->latent_dtype == KL_F32)
        return (block){copy, copy + MLA_BLOCK * width * 2, width * 2};
    return (block){keys % DEPTH ? copy : mla_latent_at(p, row, 0), NULL, width * 2};
}

/* 32 floats into bf16 parts, both rounded. */
AMX static inline void split_row(const float *c, uint16_t *hi, uint16_t *lo)
{
    const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32((int)0xffff0000);
    /* words 1, 3 .. 63: the high halves of 32 floats */
    const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i odd = _mm512_add_epi32(_mm512_set1_epi32(0x00030001), _mm512_mullo_epi32(step, _mm512_set1_epi32(0x00040004)));
    __m512 x0 = _mm512_loadu_ps(c), x1 = _mm512_loadu_ps(c + TILE);
    __m512i h0 = _mm512_add_epi32(_mm512_castps_si512(x0), half), h1 = _mm512_add_epi32(_mm512_castps_si512(x1), half);
    __m512 r0 = _mm512_sub_ps(x0, _mm512_castsi512_ps(_mm512_and_si512(h0, high)));
    __m512 r1 = _mm512_sub_ps(x1, _mm512_castsi512_ps(_mm512_and_si512(h1, high)));
    __m512i l0 = _mm512_add_epi32(_mm512_castps_si512(r0), half), l1 = _mm512_add_epi32(_mm512_castps_si512(r1), half);
    _mm512_storeu_si512(hi, _mm512_permutex2var_epi16(h0, odd, h1));
    _mm512_storeu_si512(lo, _mm512_permutex2var_epi16(l0, odd, l1));
}

/* Float rows are split, and a block that is not whole chunks of keys is filled up with zeros. */
AMX static void copy_block(const mla_problem *p, int64_t row, int64_t keys, scratch *w)
{
    int64_t width = p->R + p->Dr, padded = kl_ceil_div(keys, DEPTH) * DEPTH;
    size_t used = (size_t)(keys * width), all = (size_t)(padded * width);
    uint16_t *hi = w->block[row / MLA_BLOCK % 2], *lo = hi + MLA_BLOCK * width;
    if (p->latent_dtype == KL_F32) {
        const float *c = mla_latent_at(p, row, 0);
        for (size_t i = 0; i < used; i += DEPTH) /* used is a multiple of DEPTH */
            split_row(c + i, hi + i, lo + i);
        memset(lo + used, 0, (all - used) * sizeof *lo);
    } else if (padded > keys) {
        memcpy(hi, mla_latent_at(p, row, 0), used * sizeof *hi);
    } else {
        return;
    }
    memset(hi + used, 0, (all - used) * sizeof *hi);
}

/* The next block, asked for a few lines at a time while this one is worked on, from several places at once: one ascending
 * walk leaves a third of a core's bandwidth unused. */
enum { PREFETCHES = 4, WALKS = 2 };
typedef struct coming {
    const char *at, *end;   /* of the first walk */
    int64_t apart, each;    /* bytes from walk to walk; lines of a walk a step */
} coming;

/* Groups of products in the scores of `keys` keys. */
static int64_t score_steps(const mla_problem *p, int64_t keys, int64_t groups)
{
    return kl_ceil_div(keys, DEPTH) * ((p->R + p->Dr) / DEPTH) * (groups / 2 * PARTS + groups % 2);
}

static coming next_block(const mla_problem *p, int64_t row, int64_t rows, int64_t steps)
{
    int64_t bytes = (p->R + p->Dr) * (int64_t)kl_dtype_size(p->latent_dtype) * rows;
    int64_t lines = kl_ceil_div(bytes, 64 * WALKS);
    const char *at = rows ? mla_latent_at(p, row, 0) : NULL;
    return (coming){at, at + lines * 64, lines * 64, kl_ceil_div(lines, mla_max(steps, 1))};
}

static inline void prefetch(coming *next)
{
    for (int64_t i = 0; i < next->each; i++) {
        for (int walk = 0; walk < WALKS; walk++)
            __builtin_prefetch(next->at + walk * next->apart, 0, 2);
        next->at += next->at < next->end ? 64 : 0;
    }
}

/* ---- s^T = c q^T ---- */

/* Four sums: keys j .. j+31 of the block against two groups. */
AMX static void score_pair(const block *b, int64_t j, int64_t steps, coming *next, side *beside, const tile *q0, const tile *q1, float *s0, float *s1)
{
    int64_t at = j * b->stride, below = at + TILE * b->stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < steps; d++) {
        _tile_loadd(4, b->hi + at + d * 64, b->stride);
        _tile_loadd(5, b->hi + below + d * 64, b->stride);
        for (int part = PARTS - 1; part >= 0; part--) {
            prefetch(next);
            side_work(beside);
            _tile_loadd(6, q0 + d * PARTS + part, 64);
            _tile_loadd(7, q1 + d * PARTS + part, 64);
            _tile_dpbf16ps(0, 4, 6);
            prefetch(next);
            _tile_dpbf16ps(1, 5, 6);
            prefetch(next);
            _tile_dpbf16ps(2, 4, 7);
            prefetch(next);
            _tile_dpbf16ps(3, 5, 7);
            prefetch(next);
        }
        if (b->lo) {
            _tile_loadd(4, b->lo + at + d * 64, b->stride);
            _tile_loadd(5, b->lo + below + d * 64, b->stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, s0, 64);
    _tile_stored(1, s0 + TILE * TILE, 64);
    _tile_stored(2, s1, 64);
    _tile_stored(3, s1 + TILE * TILE, 64);
}

/* Two sums: the same keys against one group. */
AMX static void score_single(const block *b, int64_t j, int64_t steps, coming *next, side *beside, const tile *q, float *s)
{
    int64_t at = j * b->stride, below = at + TILE * b->stride;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t d = 0; d < steps; d++) {
        _tile_loadd(4, b->hi + at + d * 64, b->stride);
        _tile_loadd(5, b->hi + below + d * 64, b->stride);
        prefetch(next);
        side_work(beside);
        _tile_loadd(6, q + d * PARTS, 64);
        _tile_loadd(7, q + d * PARTS + 1, 64);
        _tile_dpbf16ps(0, 4, 7);
        _tile_dpbf16ps(1, 5, 7);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (b->lo) {
            _tile_loadd(4, b->lo + at + d * 64, b->stride);
            _tile_loadd(5, b->lo + below + d * 64, b->stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        }
    }
    _tile_stored(0, s, 64);
    _tile_stored(1, s + TILE * TILE, 64);
}

/* The scores of a block, with `beside` (may be NULL) in between. */
AMX static void score_block(const mla_problem *p, int64_t row, int64_t keys, int64_t groups, const tile *q, scratch *w, coming *next, side *beside, float *s)
{
    int64_t steps = (p->R + p->Dr) / DEPTH, tiles = steps * PARTS, S = MLA_BLOCK * MLA_GROUP;
    copy_block(p, row, keys, w);
    block b = block_of(p, row, keys, w);
    STORES_DONE();
    for (int64_t j = 0; j < keys; j += DEPTH) {
        int64_t g = 0;
        for (; g + 2 <= groups; g += 2)
            score_pair(&b, j, steps, next, beside, q + g * tiles, q + (g + 1) * tiles, s + g * S + j * TILE, s + (g + 1) * S + j * TILE);
        if (g < groups)
            score_single(&b, j, steps, next, beside, q + g * tiles, s + g * S + j * TILE);
    }
}

AMX static void score(const mla_problem *p, int64_t row, int64_t keys, int64_t ahead, int64_t groups, const void *packed, void *memory, float *s)
{
    scratch w = carve(p, memory);
    coming now = next_block(p, row, keys, 1), next = next_block(p, row + keys, ahead, PREFETCHES * score_steps(p, keys, groups));
    prefetch(&now);
    side none = {0};
    score_block(p, row, keys, groups, packed, &w, &next, &none, s);
}

AMX static void overlap(const mla_problem *p, int64_t row, int64_t keys, int64_t ahead, int64_t groups, const void *packed, void *memory, float *s,
                        const mla_scored *now)
{
    scratch w = carve(p, memory);
    int64_t steps = score_steps(p, keys, groups), sums = kl_ceil_div(now->keys, DEPTH) * (p->R / DEPTH) * (groups / 2 * PARTS + groups % 2);
    coming *next = memory;
    *next = next_block(p, row + keys, ahead, groups > 1 ? (PREFETCHES + 1) * steps + PREFETCHES * sums : steps + sums);
    side beside = side_of(now, groups, steps, w.weight);
    if (keys)
        score_block(p, row, keys, groups, packed, &w, next, &beside, s);
    while (beside.left)
        side_step(&beside);
}

/* ---- o += P^T c ---- */

/* Columns 32 v .. 32 v + 31 of the block, to be interleaved into `out`. */
typedef struct columns {
    const block *b;
    int64_t v;
    strip *out;
} columns;

/* Chunk c of it, pairs of rows interleaved. */
AMX static inline void interleave(const char *from, int64_t stride, int64_t v, int c, strip *out)
{
    const char *at = from + c * DEPTH * stride + v * 64;
    for (int k = 0; k < TILE; k++, at += 2 * stride) {
        __m512i even = _mm512_loadu_si512(at), odd = _mm512_loadu_si512(at + stride);
        _mm512_store_si512(out->half[0][c].word[k], _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(out->half[1][c].word[k], _mm512_unpackhi_epi16(even, odd));
    }
}

AMX static inline void interleave_chunk(const columns *to, int c)
{
    interleave(to->b->hi, to->b->stride, to->v, c, &to->out[0]);
    if (to->b->lo)
        interleave(to->b->lo, to->b->stride, to->v, c, &to->out[1]);
}

/* Two neighbouring tiles [16 rows][16 dims] of two groups. Once a chunk of the strip has met its last rows, the next
 * strip's chunk (unless `ahead` is NULL) takes its place: the shuffles run under the tiles, its stores are done when its turn
 * comes, and what the loop touches stays in the first-level cache. */
AMX static void sum_pair(const weights *w0, const weights *w1, const strip *c, int parts, int chunks, const columns *ahead, coming *next, bool first, float *o0, float *o1)
{
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, o0, 64);
        _tile_loadd(1, o0 + TILE * TILE, 64);
        _tile_loadd(2, o1, 64);
        _tile_loadd(3, o1 + TILE * TILE, 64);
    }
    for (int k = 0; k < chunks; k++) {
        _tile_loadd(6, &c[0].half[0][k], 64);
        _tile_loadd(7, &c[0].half[1][k], 64);
        for (int part = PARTS - 1; part >= 0; part--) {
            _tile_loadd(4, &w0->part[part][k], 64);
            _tile_loadd(5, &w1->part[part][k], 64);
            _tile_dpbf16ps(0, 4, 6);
            prefetch(next);
            _tile_dpbf16ps(1, 4, 7);
            prefetch(next);
            _tile_dpbf16ps(2, 5, 6);
            prefetch(next);
            _tile_dpbf16ps(3, 5, 7);
            prefetch(next);
        }
        if (parts == 2) {
            _tile_loadd(6, &c[1].half[0][k], 64);
            _tile_loadd(7, &c[1].half[1][k], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (ahead)
            interleave_chunk(ahead, k);
    }
    _tile_stored(0, o0, 64);
    _tile_stored(1, o0 + TILE * TILE, 64);
    _tile_stored(2, o1, 64);
    _tile_stored(3, o1 + TILE * TILE, 64);
}

/* The same of one group. */
AMX static void sum_single(const weights *w, const strip *c, int parts, int chunks, const columns *ahead, coming *next, bool first, float *o)
{
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, o, 64);
        _tile_loadd(1, o + TILE * TILE, 64);
    }
    for (int k = 0; k < chunks; k++) {
        _tile_loadd(6, &c[0].half[0][k], 64);
        _tile_loadd(7, &c[0].half[1][k], 64);
        prefetch(next);
        _tile_loadd(4, &w->part[0][k], 64);
        _tile_loadd(5, &w->part[1][k], 64);
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (parts == 2) {
            _tile_loadd(6, &c[1].half[0][k], 64);
            _tile_loadd(7, &c[1].half[1][k], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (ahead)
            interleave_chunk(ahead, k);
    }
    _tile_stored(0, o, 64);
    _tile_stored(1, o + TILE * TILE, 64);
}

AMX static void accumulate(const mla_problem *p, int64_t row, int64_t keys, int64_t groups, float *s, void *memory, bool first, float *o)
{
    (void)s;
    scratch w = carve(p, memory);
    coming *next = memory;
    int chunks = (int)kl_ceil_div(keys, DEPTH), parts = latent_parts(p);
    block b = block_of(p, row, keys, &w);
    int64_t strips = p->R / DEPTH;
    columns ahead = {&b, 0, w.strip};
    for (int k = 0; k < chunks; k++)
        interleave_chunk(&ahead, k);
    for (int64_t v = 0; v < strips; v++) {
        ahead.v = v + 1;
        STORES_DONE();
        for (int64_t g = 0; g < groups; g += 2) {
            const columns *to = g + 2 >= groups && v + 1 < strips ? &ahead : NULL;
            float *o0 = o + (g * p->R + 2 * v * TILE) * TILE, *o1 = o0 + TILE * p->R;
            if (g + 2 <= groups)
                sum_pair(&w.weight[g], &w.weight[g + 1], w.strip, parts, chunks, to, next, first, o0, o1);
            else
                sum_single(&w.weight[g], w.strip, parts, chunks, to, next, first, o0);
        }
    }
}

/* Columns 0-3, 8-11, 16-19, 24-27 of 32 lie in the first of two tiles, the others in the second. */
static void order(const mla_problem *p, float *row)
{
    for (int64_t d = 0; d < p->R; d += DEPTH) {
        float mixed[DEPTH];
        memcpy(mixed, row + d, sizeof mixed);
        for (int x = 0; x < DEPTH; x++)
            row[d + x] = mixed[x / 4 % 2 * TILE + x / 8 * 4 + x % 4];
    }
}

static const mla_block_ops table = {"amx", packed_bytes, scratch_bytes, TILE, TILE * TILE, begin, end, pack, score, overlap, accumulate, order};

const mla_block_ops *mla_block_amx(const mla_problem *p)
{
    bool sizes = p->R % DEPTH == 0 && (p->R + p->Dr) % DEPTH == 0;
    return sizes && have_tiles() ? &table : NULL;
}

#else

const mla_block_ops *mla_block_amx(const mla_problem *p)
{
    (void)p;
    return NULL;
}

#endif
