/* A head of 128 channels and 128 columns in the registers of a block of eight warps, each with 16 whole rows of memory: rows of 512
 * bytes, 64 KB of a multiprocessor's registers at a time, and offsets that the compiler knows. Twice as fast to start and a
 * twentieth faster in the long run than strips of 128 bytes a row.
 *
 *     [V,K]   rows are columns of V: a strip, which needs nothing from other warps
 *     [K,V]   rows are channels: a lane has four columns, whose sums over the channels meet in shared memory */
#ifndef KL_KDA_CUDA_HEAD_CUH
#define KL_KDA_CUDA_HEAD_CUH

#include "kda/cuda/strip.cuh"

enum { KDA_HEAD = 128, KDA_HEAD_WARPS = 8, KDA_HEAD_ROWS = KDA_HEAD / KDA_HEAD_WARPS };

/* The interface of kda_strip, of all columns of a head. */
struct kda_rows {
    static constexpr int columns = 1; /* whose o a lane knows */

    /* Sums over each warp's channels. The next step's are written after all have met once more, for its token. */
    struct shared {
        float w[KDA_HEAD_WARPS][KDA_HEAD], y[KDA_HEAD_WARPS][KDA_HEAD];
        float kq[KDA_HEAD_WARPS], kk[KDA_HEAD_WARPS], qq[KDA_HEAD_WARPS];
    };

    int warp, lane;
    float s[KDA_HEAD_ROWS][4];

    __device__ kda_rows(int, int, int) : warp((int)threadIdx.x / 32), lane(kl_lane()) {}

    __device__ __forceinline__ int first() const { return warp * KDA_HEAD_ROWS * KDA_HEAD + 4 * lane; }
    __device__ __forceinline__ int own_column() const { return lane < KDA_HEAD_ROWS ? warp * KDA_HEAD_ROWS + lane : -1; }
    __device__ __forceinline__ float own(const float o[columns]) const { return o[0]; }

    template <class S> __device__ __forceinline__ void load(const S *state, bool)
    {
#pragma unroll
        for (int i = 0; i < KDA_HEAD_ROWS; i++)
            if (state)
                kda_load_quad(s[i], state + first() + i * KDA_HEAD);
            else
                s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
    }
    template <class S> __device__ __forceinline__ void store(S *state, bool) const
    {
#pragma unroll
        for (int i = 0; i < KDA_HEAD_ROWS; i++)
            kda_store_quad(state + first() + i * KDA_HEAD, s[i]);
    }

    static __device__ __forceinline__ float total(const float part[KDA_HEAD_WARPS])
    {
        float x = 0.0f;
#pragma unroll
        for (int i = 0; i < KDA_HEAD_WARPS; i++)
            x += part[i];
        return x;
    }

    /* As kda_strip's; the block meets once in it. */
    __device__ __forceinline__ void step(const kda_token<KDA_HEAD> &x, const float *v, const kda_step &p, float o[columns], shared &m)
    {
        float4 w = {}, y = {};
        float kq = 0.0f, kk = 0.0f, qq = 0.0f;
#pragma unroll
        for (int i = 0; i < KDA_HEAD_ROWS; i++) {
            int at = warp * KDA_HEAD_ROWS + i;
            float decay = x.decay[at], k = x.k[at], q = x.q[at];
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[i][e] *= decay;
            w.x += s[i][0] * k, w.y += s[i][1] * k, w.z += s[i][2] * k, w.w += s[i][3] * k;
            y.x += s[i][0] * q, y.y += s[i][1] * q, y.z += s[i][2] * q, y.w += s[i][3] * q;
            kq += k * q;
            kk += k * k;
            qq += q * q;
        }
        ((float4 *)m.w[warp])[lane] = w;
        ((float4 *)m.y[warp])[lane] = y;
        if (lane == 0)
            m.kq[warp] = kq, m.kk[warp] = kk, m.qq[warp] = qq;
        __syncthreads();
        kq = total(m.kq);
        float norm_k = p.l2norm ? rsqrtf(total(m.kk) + 1e-6f) : 1.0f, norm_q = (p.l2norm ? rsqrtf(total(m.qq) + 1e-6f) : 1.0f) * p.scale;
        float from_w = p.no_delta ? 0.0f : norm_k;

        /* u of this lane's four columns; y and w, and so u and o, of the one that it hands out */
        float4 sum = {};
        float own_w = 0.0f, own_y = 0.0f;
        int own = warp * KDA_HEAD_ROWS + lane % KDA_HEAD_ROWS;
#pragma unroll 2
        for (int i = 0; i < KDA_HEAD_WARPS; i++) {
            float4 part = ((const float4 *)m.w[i])[lane];
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            own_w += m.w[i][own];
            own_y += m.y[i][own];
        }
        o[0] = norm_q * (own_y + norm_k * kq * (p.beta * (v[own] - from_w * own_w)));
        float4 value = ((const float4 *)v)[lane];
        float u[4] = {p.beta * (value.x - from_w * sum.x), p.beta * (value.y - from_w * sum.y), p.beta * (value.z - from_w * sum.z),
                      p.beta * (value.w - from_w * sum.w)};
#pragma unroll
        for (int i = 0; i < KDA_HEAD_ROWS; i++) {
            float k = norm_k * x.k[warp * KDA_HEAD_ROWS + i];
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[i][e] += k * u[e];
        }
    }
};

template <bool VK> struct kda_head_of {
    using type = kda_rows;
};
template <> struct kda_head_of<true> {
    using type = kda_strip<KDA_HEAD, true, KDA_HEAD_ROWS>;
};

#endif
