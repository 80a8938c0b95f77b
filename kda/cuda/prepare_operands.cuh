/* From raw rows to operands: a thread owns two channels of a block of 16 tokens, walks down its tokens with the product of
 * their decays for what looks back to the block's start (kr, qr, qg), and up again for what looks ahead to its end (ke, kd, kg).
 *
 *     kr_i = k_i P(start->i)   qr_i = q_i P(start->i)   kd_j = k_j / P(start->j)   ke_j = k_j P(j->end)
 *
 * so that within a block A[i,j] = kr_i . kd_j, and from block 0 to block 1 A[i,j] = kr_i . ke_j. Rows i that a channel has
 * decayed to by more than 2^-KDA_DEEP since the start do not use kd: there (prepare_levels.cuh) all factors are at most 1.
 * Nothing that enters row i depends on a token after i, so none moves a bit of its output. */
#ifndef KL_KDA_CUDA_PREPARE_OPERANDS_CUH
#define KL_KDA_CUDA_PREPARE_OPERANDS_CUH

#include "kda/cuda/gates.cuh"
#include "kda/cuda/tile_form.cuh"

enum { KDA_DEEP = 100 };

/* A thread's share of unit u of a tile of KP channels: block and channels c, c + 1. */
template <int KP> struct kda_owner {
    static constexpr int units = KP > 128 ? 2 : 1;
    int block, c, offset;
    __device__ __forceinline__ kda_owner(int thread, int u)
    {
        block = thread >> 5 & 1;
        c = 64 * ((thread >> 6) + 2 * u) + 2 * (thread & 31);
        offset = kda_cell(16 * block, c >> 3) + 2 * (c & 7);
    }
    __device__ __forceinline__ bool idle() const { return KP < 128 && c >= KP; }
    /* Byte offset of token i of the block. */
    __device__ __forceinline__ int at(int i) const { return (offset ^ (i & 7) << 4) + 128 * i; }
};

struct kda_pair {
    float x, y;
};
__device__ __forceinline__ kda_pair kda_unpack(uint32_t w) { return {kl_bf16_low(w), kl_bf16_high(w)}; }
__device__ __forceinline__ kda_pair operator*(kda_pair a, kda_pair b) { return {a.x * b.x, a.y * b.y}; }
__device__ __forceinline__ kda_pair operator*(float s, kda_pair a) { return {s * a.x, s * a.y}; }
__device__ __forceinline__ uint32_t kda_packed(kda_pair a) { return kl_pack_bf16(a.x, a.y); }

__device__ __forceinline__ kda_pair kda_gate_biases(int gate, const kda_gate_scale &s, kda_pair dt_bias)
{
    return {kda_gate_bias(gate, s, dt_bias.x), kda_gate_bias(gate, s, dt_bias.y)};
}

/* a[i]: the decays of the 16 tokens; returns log2 of their product, good to tell which blocks are worth a look at deep rows. */
template <int gate, int KP>
__device__ __forceinline__ kda_pair kda_decays(kda_pair a[16], const unsigned char *g, const kda_owner<KP> &own, const kda_gate_scale &s, kda_pair bias)
{
    kda_pair sum = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 16; i++) {
        kda_pair x = kda_unpack(*(const uint32_t *)(g + own.at(i)));
        x.x = kda_log2_decay<gate>(x.x, s, bias.x);
        x.y = kda_log2_decay<gate>(x.y, s, bias.y);
        sum.x += x.x;
        sum.y += x.y;
        a[i] = {kl_exp2(x.x), kl_exp2(x.y)};
    }
    return sum;
}
template <int KP>
__device__ __forceinline__ kda_pair kda_decays(int gate, kda_pair a[16], const unsigned char *g, const kda_owner<KP> &own, const kda_gate_scale &s, kda_pair bias)
{
    if (gate == KDA_GATE_LOG)
        return kda_decays<KDA_GATE_LOG>(a, g, own, s, bias);
    if (gate == KDA_GATE_SOFTPLUS)
        return kda_decays<KDA_GATE_SOFTPLUS>(a, g, own, s, bias);
    return kda_decays<KDA_GATE_BOUNDED>(a, g, own, s, bias);
}

/* The first row that two channels have decayed to by more than 2^-KDA_DEEP; 16: none. */
__device__ __forceinline__ int kda_first_deep(const kda_pair a[16])
{
    kda_pair P = {1.0f, 1.0f};
    int shallow = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        P = P * a[i];
        shallow += fminf(P.x, P.y) >= 7.8886091e-31f; /* 2^-100 */
    }
    return shallow;
}

/* Eight tokens at a time are read before any is written, so that the reads overlap. */
template <int KP> __device__ __forceinline__ void kda_read_rows(kda_pair x[8], const unsigned char *rows, const float *norm, int first, const kda_owner<KP> &own)
{
    uint32_t raw[8];
    float4 n[2] = {*(const float4 *)(norm + first), *(const float4 *)(norm + first + 4)};
#pragma unroll
    for (int i = 0; i < 8; i++)
        raw[i] = *(const uint32_t *)(rows + own.at(first + i));
    float scale[8] = {n[0].x, n[0].y, n[0].z, n[0].w, n[1].x, n[1].y, n[1].z, n[1].w};
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] = scale[i] * kda_unpack(raw[i]);
}

/* a: decays; other: those of the other block together; norm: of k and of q, the block's 16 tokens. kr takes the place of k, kd
 * of g; of q, ke in block 0, whose qr is its qg, and qr in block 1. */
template <class Form>
__device__ __forceinline__ void kda_make_operands(const kda_pair a[16], kda_pair other, const float *k_norm, const float *q_norm, unsigned char *k,
                                                  unsigned char *q, unsigned char *g, unsigned char *tile, const kda_owner<Form::KP> &own)
{
    typename Form::owner words(own.block, own.c);
    kda_pair kn[16], qn[8], P = {1.0f, 1.0f};
#pragma unroll
    for (int first = 0; first < 16; first += 8) {
        kda_read_rows(kn + first, k, k_norm, first, own);
        kda_read_rows(qn, q, q_norm, first, own);
#pragma unroll
        for (int i = first; i < first + 8; i++) {
            int at = own.at(i);
            P = P * a[i];
            kda_pair x = qn[i - first] * P;
            uint32_t qr = kda_packed(x);
            *(uint32_t *)(k + at) = kda_packed(kn[i] * P);
            *(uint32_t *)(g + at) = kl_pack_bf16(kn[i].x * kl_rcp(P.x), kn[i].y * kl_rcp(P.y));
            if (own.block)
                *(uint32_t *)(q + at) = qr;
            *(uint32_t *)(tile + words.qg_at(i)) = own.block ? kda_packed(x * other) : qr;
        }
    }
    kda_pair ahead = own.block ? kda_pair{1.0f, 1.0f} : other, next = {0.0f, 0.0f};
    uint32_t kg[2][8];
    P = {1.0f, 1.0f};
#pragma unroll
    for (int i = 15; i >= 0; i--) {
        kda_pair ke = kn[i] * P, x = ke * ahead;
        P = P * a[i];
        if (!own.block)
            *(uint32_t *)(q + own.at(i)) = kda_packed(ke);
        if (i & 1)
            next = x;
        else {
            kg[0][i / 2] = kl_pack_bf16(x.x, next.x);
            kg[1][i / 2] = kl_pack_bf16(x.y, next.y);
        }
    }
    words.write_kg(tile, kg);
}

#endif
