/* The two forms of a tile as preparation writes them: kda_block_form is tile.cuh, kda_core_form core_tile.cuh. Fragments are
 * A fragments [token i x channel or token j] or, with their pairs packed, C fragments of the same shape. */
#ifndef KL_KDA_CUDA_TILE_FORM_CUH
#define KL_KDA_CUDA_TILE_FORM_CUH

#include "kda/cuda/core_tile.cuh"
#include "kda/cuda/intra.cuh"

template <int KP_> struct kda_block_form {
    static constexpr int KP = KP_;
    using tile = kda_tile<KP>;

    /* A thread's words of qg and kg: it owns channels c, c + 1 of a block of 16 tokens. */
    struct owner {
        int qg, kg;
        __device__ __forceinline__ owner(int block, int c)
        {
            int p = c >> 1 & 3, half = c >> 3 & 1, b = (c >> 4) * 2 + block;
            qg = tile::qg + (kda_slot_of(b, p) + 4 * kda_word_of(b, half));
            b = block * (KP / 16) + (c >> 4);
            kg = tile::kg + (kda_slot_of(b, 8 * p) + 4 * kda_word_of(b, 2 * half));
        }
        /* Token i, two channels. */
        __device__ __forceinline__ int qg_at(int i) const { return qg ^ (16 * (4 * (i & 7) ^ (i & 7) >> 1) | 8 * (i >> 3)); }
        /* words[e][t]: tokens 2t, 2t + 1 of channel c + e. */
        __device__ __forceinline__ void write_kg(unsigned char *to, const uint32_t words[2][8]) const
        {
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int t = 0; t < 4; t++)
                    *(uint2 *)(to + (kg ^ 16 * (4 * e + t))) = make_uint2(words[e][t], words[e][t + 4]);
        }
    };
    /* The first block of qg, channels 16 s.. */
    static __device__ __forceinline__ void read_qg(uint32_t a[4], const unsigned char *from, int s) { read(a, from + tile::qg, 2 * s); }
    static __device__ __forceinline__ void write_w(unsigned char *to, int block, int s, const uint32_t a[4]) { write(to + tile::w, 2 * s + block, a); }
    /* Rows of block i, columns of block j, of Tb and Aqk. */
    static __device__ __forceinline__ void write_Tb(unsigned char *to, int i, int j, const uint32_t a[4]) { write(to + tile::Tb, i + j, a); }
    static __device__ __forceinline__ void write_Aqk(unsigned char *to, int i, int j, const uint32_t a[4]) { write(to + tile::Aqk, i + j, a); }
    static __device__ __forceinline__ void read_Tb(uint32_t a[4], const unsigned char *from, int i, int j) { read(a, from + tile::Tb, i + j); }
    static __device__ __forceinline__ void clear_above_diagonal(unsigned char *) {}
    /* The sign that w has in the tile. */
    static __device__ __forceinline__ uint32_t signed_pair(uint32_t pair) { return pair; }

private:
    static __device__ __forceinline__ void write(unsigned char *matrix, int b, const uint32_t a[4])
    {
        uint32_t f[4] = {a[0], a[2], a[1], a[3]};
        kda_write_block(matrix, b, f);
    }
    static __device__ __forceinline__ void read(uint32_t a[4], const unsigned char *matrix, int b)
    {
        uint32_t f[4];
        kda_read_block(f, matrix, b);
        a[0] = f[0];
        a[1] = f[2];
        a[2] = f[1];
        a[3] = f[3];
    }
};

template <int KP_> struct kda_core_form {
    static constexpr int KP = KP_;
    using tile = kda_core_tile<KP>;

    struct owner {
        int qg, kg;
        __device__ __forceinline__ owner(int block, int c) : qg(kda_core_qg<KP>(c, 16 * block)), kg(kda_core_kg<KP>(c, 16 * block)) {}
        __device__ __forceinline__ int qg_at(int i) const { return qg + i * 16; }
        __device__ __forceinline__ void write_kg(unsigned char *to, const uint32_t words[2][8]) const
        {
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    *(uint4 *)(to + kg + e * 16 + h * tile::G_row) = make_uint4(words[e][4 * h], words[e][4 * h + 1], words[e][4 * h + 2], words[e][4 * h + 3]);
        }
    };
    /* A lane's row of the four cores of a 16 x 16 block: tokens i.. down, cores to the right `right` bytes apart. */
    static __device__ __forceinline__ int row(int right) { return (kl_lane() & 15) * 16 + (kl_lane() >> 4) * right; }
    static __device__ __forceinline__ void read_qg(uint32_t a[4], const unsigned char *from, int s)
    {
        kl_ldmatrix4(a, from + row(tile::RO_row) + kda_core_qg<KP>(16 * s, 0));
    }
    static __device__ __forceinline__ void write_w(unsigned char *to, int block, int s, const uint32_t a[4])
    {
        kl_stmatrix4(to + row(tile::RO_row) + kda_core_w<KP>(16 * s, 16 * block), a);
    }
    static __device__ __forceinline__ void write_Tb(unsigned char *to, int i, int j, const uint32_t a[4])
    {
        kl_stmatrix4(to + row(tile::T_row) + tile::Tb + kda_core_pair(16 * i, 16 * j), a);
    }
    static __device__ __forceinline__ void write_Aqk(unsigned char *to, int i, int j, const uint32_t a[4])
    {
        kl_stmatrix4(to + row(tile::T_row) + tile::Aqk + kda_core_pair(16 * i, 16 * j), a);
    }
    static __device__ __forceinline__ void read_Tb(uint32_t a[4], const unsigned char *from, int i, int j)
    {
        kl_ldmatrix4(a, from + row(tile::T_row) + tile::Tb + kda_core_pair(16 * i, 16 * j));
    }
    static __device__ __forceinline__ void clear_above_diagonal(unsigned char *to)
    {
        uint32_t zero[4] = {};
        write_Tb(to, 0, 1, zero);
        write_Aqk(to, 0, 1, zero);
    }
    static __device__ __forceinline__ uint32_t signed_pair(uint32_t pair) { return pair ^ 0x80008000u; }
};

#endif
