#include "common/split.h"

#include "common/simd.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { TILE = KL_SPLIT_TILE, BLOCK = KL_SPLIT_BLOCK };
enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) */

bool kl_split_available(void)
{
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

void kl_split_begin(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_a_row[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes_a_row[i] = 64;
        config.rows[i] = 16;
    }
    __asm__ volatile("" : : "r"(&config) : "memory"); /* some compilers think that only its first bytes are read */
    _tile_loadconfig(&config);
}

void kl_split_end(void) { _tile_release(); }

/* ---- packing ---- */

KL_INLINE void pack_left(int parts, bool negative, int64_t M, int64_t depth, const float *A, int64_t ld, char *packed,
                                                            int64_t strip_depth)
{
    for (int64_t m = 0; m < M; m += 16, packed += kl_split_bytes(16, strip_depth)) {
        char *to = packed;
        for (int64_t k = 0; k < depth; k += 32, to += BLOCK)
            for (int64_t r = 0; r < 16; r++) {
                const float *row = A + (m + r) * ld + k;
                kl_v x0 = kl_vload(row), x1 = k + 16 < depth ? kl_vload(row + 16) : (kl_v){0};
                if (negative) {
                    x0 = -x0;
                    x1 = -x1;
                }
                kl_split_pairs(parts, x0, x1, to + r * 64);
            }
    }
}

void kl_split_left(kl_split_terms terms, int64_t M, int64_t depth, bool negative, const float *A, int64_t ld, void *packed, int64_t strip_depth)
{
    if (terms == KL_SPLIT_SIX && negative)
        pack_left(3, true, M, depth, A, ld, packed, strip_depth);
    else if (terms == KL_SPLIT_SIX)
        pack_left(3, false, M, depth, A, ld, packed, strip_depth);
    else
        pack_left(2, negative, M, depth, A, ld, packed, strip_depth);
}

void kl_split_right(int64_t depth, int64_t N, float *B, int64_t ld, const float *row_scale, void *packed, int64_t strip_depth)
{
    int64_t padded = (depth + 31) / 32 * 32;
    for (int64_t n = 0; n < N; n += 16) {
        char *to = (char *)packed + n / 16 * (int64_t)kl_split_bytes(16, strip_depth);
        for (int64_t k = 0; k < padded; k += 32, to += BLOCK)
            for (int64_t r = 0; r < 16; r++) {
                int64_t k0 = k + r, k1 = k0 + 16;
                float *row0 = B + k0 * ld + n, *row1 = B + k1 * ld + n;
                kl_v x0 = k0 < depth ? kl_vload(row0) : (kl_v){0}, x1 = k1 < depth ? kl_vload(row1) : (kl_v){0};
                if (row_scale && k0 < depth)
                    kl_vstore(row0, x0 * row_scale[k0]);
                if (row_scale && k1 < depth)
                    kl_vstore(row1, x1 * row_scale[k1]);
                kl_split_pairs(3, x0, x1, to + r * 64);
            }
    }
}

/* ---- products ---- */

/* Between two products of tiles. While something keeps the core's other thread busy, products that follow each other closely
 * take 18 ns in a loop; this much apart they take 10 to 11, and nothing is lost where they take 8 anyway. */
#define APART __asm__ volatile(".rept 8\n\tnop\n\t.endr")
#define MULTIPLY                         \
    do {                                 \
        _tile_dpbf16ps(0, 4, 6);         \
        APART;                           \
        kl_ahead_step(ahead);            \
        if (columns == 2) {              \
            _tile_dpbf16ps(1, 4, 7);     \
            APART;                       \
        }                                \
        if (rows == 2) {                 \
            _tile_dpbf16ps(2, 5, 6);     \
            APART;                       \
        }                                \
        if (rows == 2 && columns == 2) { \
            kl_ahead_step(ahead);        \
            _tile_dpbf16ps(3, 5, 7);     \
            APART;                       \
        }                                \
    } while (0)
#define LEFT(part)                                        \
    do {                                                 \
        _tile_loadd(4, a + (part) * TILE, 64);           \
        if (rows == 2)                                   \
            _tile_loadd(5, a + a_strip + (part) * TILE, 64); \
    } while (0)
#define RIGHT(part)                                      \
    do {                                                 \
        _tile_loadd(6, b + (part) * TILE, 64);           \
        if (columns == 2)                                \
            _tile_loadd(7, b + b_strip + (part) * TILE, 64); \
    } while (0)

/* One or two tiles of rows by one or two of columns. The products of a block are walked so that each step loads one
 * operand only. */
KL_INLINE void tiles(kl_split_terms terms, int rows, int columns, const float *from, int64_t ld_from, int64_t blocks, const char *a,
                                                        size_t a_strip, const char *b, size_t b_strip, float *C, int64_t ld, kl_ahead *ahead)
{
    size_t ld_bytes = (size_t)ld * sizeof(float);
    if (from) {
        size_t from_bytes = (size_t)ld_from * sizeof(float);
        _tile_loadd(0, from, from_bytes);
        if (columns == 2)
            _tile_loadd(1, from + 16, from_bytes);
        if (rows == 2)
            _tile_loadd(2, from + 16 * ld_from, from_bytes);
        if (rows == 2 && columns == 2)
            _tile_loadd(3, from + 16 * ld_from + 16, from_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < blocks; k++, a += BLOCK, b += BLOCK) {
        if (terms == KL_SPLIT_SIX) {
            LEFT(0); RIGHT(2); MULTIPLY; /* h l */
            RIGHT(1); MULTIPLY;          /* h m */
            LEFT(1); MULTIPLY;           /* m m */
            RIGHT(0); MULTIPLY;          /* m h */
            LEFT(0); MULTIPLY;           /* h h */
            LEFT(2); MULTIPLY;           /* l h */
        } else {
            LEFT(0); RIGHT(1); MULTIPLY; /* h m */
            RIGHT(0); MULTIPLY;          /* h h */
            LEFT(1); MULTIPLY;           /* m h */
        }
    }
    _tile_stored(0, C, ld_bytes);
    if (columns == 2)
        _tile_stored(1, C + 16, ld_bytes);
    if (rows == 2)
        _tile_stored(2, C + 16 * ld, ld_bytes);
    if (rows == 2 && columns == 2)
        _tile_stored(3, C + 16 * ld + 16, ld_bytes);
}

KL_INLINE void product(kl_split_terms terms, const float *from, int64_t ld_from, int64_t M, int64_t N, int64_t depth, const char *left, size_t a_strip,
                                                          const char *right, size_t b_strip, float *C, int64_t ld, kl_ahead *ahead)
{
    int64_t blocks = (depth + 31) / 32, mt = (M + 15) / 16, nt = N / 16;
    for (int64_t n = 0; n < nt; n += 2)
        for (int64_t m = 0; m < mt; m += 2) {
            const char *a = left + (size_t)m * a_strip, *b = right + (size_t)n * b_strip;
            float *c = C + m * 16 * ld + n * 16;
            const float *f = from ? from + m * 16 * ld_from + n * 16 : NULL;
            if (m + 1 < mt && n + 1 < nt)
                tiles(terms, 2, 2, f, ld_from, blocks, a, a_strip, b, b_strip, c, ld, ahead);
            else if (m + 1 < mt)
                tiles(terms, 2, 1, f, ld_from, blocks, a, a_strip, b, b_strip, c, ld, ahead);
            else if (n + 1 < nt)
                tiles(terms, 1, 2, f, ld_from, blocks, a, a_strip, b, b_strip, c, ld, ahead);
            else
                tiles(terms, 1, 1, f, ld_from, blocks, a, a_strip, b, b_strip, c, ld, ahead);
        }
}

void kl_split_product(kl_split_terms terms, const float *from, int64_t ld_from, int64_t M, int64_t N, int64_t depth, const void *left, int64_t left_depth,
                      const void *right, int64_t right_depth, float *C, int64_t ld, kl_ahead *ahead)
{
    size_t a_strip = kl_split_bytes(16, left_depth), b_strip = kl_split_bytes(16, right_depth);
    if (terms == KL_SPLIT_SIX)
        product(KL_SPLIT_SIX, from, ld_from, M, N, depth, left, a_strip, right, b_strip, C, ld, ahead);
    else
        product(KL_SPLIT_THREE, from, ld_from, M, N, depth, left, a_strip, right, b_strip, C, ld, ahead);
}

#else

bool kl_split_available(void) { return false; }
void kl_split_begin(void) {}
void kl_split_end(void) {}
void kl_split_left(kl_split_terms terms, int64_t M, int64_t depth, bool negative, const float *A, int64_t ld, void *packed, int64_t strip_depth)
{
    (void)terms, (void)M, (void)depth, (void)negative, (void)A, (void)ld, (void)packed, (void)strip_depth;
}
void kl_split_right(int64_t depth, int64_t N, float *B, int64_t ld, const float *row_scale, void *packed, int64_t strip_depth)
{
    (void)depth, (void)N, (void)B, (void)ld, (void)row_scale, (void)packed, (void)strip_depth;
}
void kl_split_product(kl_split_terms terms, const float *from, int64_t ld_from, int64_t M, int64_t N, int64_t depth, const void *left, int64_t left_depth,
                      const void *right, int64_t right_depth, float *C, int64_t ld, kl_ahead *ahead)
{
    (void)terms, (void)from, (void)ld_from, (void)M, (void)N, (void)depth, (void)left, (void)left_depth, (void)right, (void)right_depth, (void)C, (void)ld,
        (void)ahead;
}

#endif
