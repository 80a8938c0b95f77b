/* One token's choice of experts, by one warp. */
#ifndef KL_MOE_CUDA_CHOOSE_CUH
#define KL_MOE_CUDA_CHOOSE_CUH

#include "moe/cuda/moe_cuda.cuh"

/* From a logit to s: sigmoid, or softmax with the token's maximum and the inverse of its sum. */
struct moe_score {
    bool softmax;
    float max, inverse;
    __device__ __forceinline__ float operator()(float logit) const
    {
        return softmax ? expf(logit - max) * inverse : 1.0f / (1.0f + expf(-logit));
    }
};

__device__ __forceinline__ moe_score moe_score_of(const moe_router_view &v, const float *logit)
{
    moe_score s = {v.softmax, 0.0f, 0.0f};
    if (!v.softmax)
        return s;
    s.max = -INFINITY;
    float sum = 0.0f;
    for (int e = kl_lane(); e < v.E; e += 32)
        s.max = fmaxf(s.max, logit[e]);
    for (int m = 16; m; m >>= 1)
        s.max = fmaxf(s.max, __shfl_xor_sync(0xffffffffu, s.max, m));
    for (int e = kl_lane(); e < v.E; e += 32)
        sum += expf(logit[e] - s.max);
    s.inverse = 1.0f / kl_warp_sum(sum);
    return s;
}

/* Unsigned numbers in the order of floats; what does not compare comes last but above 0, which stands for taken. */
__device__ __forceinline__ uint32_t moe_key(float x)
{
    uint32_t bits = __float_as_uint(x + 0.0f);
    return x > -INFINITY ? (bits >> 31 ? ~bits : bits | 0x80000000u) : 1u;
}

/* The best of key[0..n-1], the lowest index among equals, marked as taken. */
__device__ __forceinline__ int moe_take_best(uint32_t *key, int n)
{
    uint32_t best = 0;
    int at = INT32_MAX;
    for (int e = kl_lane(); e < n; e += 32)
        if (key[e] > best) {
            best = key[e];
            at = e;
        }
    uint32_t most = __reduce_max_sync(0xffffffffu, best);
    int winner = (int)__reduce_min_sync(0xffffffffu, best == most ? (uint32_t)at : (uint32_t)INT32_MAX);
    if (at == winner)
        key[winner] = 0;
    __syncwarp();
    return winner;
}

/* choice <- -inf outside the topk_group best groups, a group's score being the sum of its two best. group: [n_group] */
__device__ __forceinline__ void moe_choose_groups(const moe_router_view &v, float *choice, uint32_t *group)
{
    int size = v.E / v.n_group;
    for (int i = kl_lane(); i < v.n_group; i += 32) {
        float best = -INFINITY, second = -INFINITY;
        for (int e = i * size; e < (i + 1) * size; e++) {
            second = fmaxf(second, fminf(best, choice[e]));
            best = fmaxf(best, choice[e]);
        }
        group[i] = moe_key(size > 1 ? best + second : best);
    }
    __syncwarp();
    for (int n = 0; n < v.topk_group; n++)
        moe_take_best(group, v.n_group);
    for (int e = kl_lane(); e < v.E; e += 32)
        if (group[e / size])
            choice[e] = -INFINITY;
    __syncwarp();
}

/* Words of shared memory that a choice needs. */
__host__ __device__ inline int moe_choice_words(int E, int n_group) { return E + (n_group > 1 ? n_group : 0); }

/* The same of keys that lanes hold, a lane's nth that of number 32 n + lane; *logit: the winner's. */
template <int HELD> __device__ __forceinline__ int moe_take_best(uint32_t (&key)[HELD], const float (&own)[HELD], float *logit)
{
    uint32_t best[HELD];
    int at[HELD];
    float x[HELD];
#pragma unroll
    for (int n = 0; n < HELD; n++)
        best[n] = key[n], at[n] = 32 * n + kl_lane(), x[n] = own[n];
#pragma unroll
    for (int apart = 1; apart < HELD; apart *= 2)
#pragma unroll
        for (int n = 0; n < HELD; n += 2 * apart)
            if (best[n + apart] > best[n])
                best[n] = best[n + apart], at[n] = at[n + apart], x[n] = x[n + apart];
    uint32_t most = __reduce_max_sync(0xffffffffu, best[0]);
    int winner = (int)__reduce_min_sync(0xffffffffu, best[0] == most ? (uint32_t)at[0] : (uint32_t)INT32_MAX);
#pragma unroll
    for (int n = 0; n < HELD; n++)
        if (32 * n + kl_lane() == winner)
            key[n] = 0;
    *logit = __shfl_sync(0xffffffffu, x[0], winner % 32);
    return winner;
}

/* Through shared memory: groups, or more experts than lanes can hold. */
__device__ __forceinline__ void moe_choose_any(const moe_router_view &v, const moe_score &score, const float *logit, uint32_t *scratch, int &id, float &chosen)
{
    float *choice = (float *)scratch;
    int lane = kl_lane();
    for (int e = lane; e < v.E; e += 32)
        choice[e] = score(logit[e]) + (v.bias ? v.bias[e] : 0.0f);
    __syncwarp();
    if (v.n_group > 1 && v.topk_group < v.n_group)
        moe_choose_groups(v, choice, scratch + v.E);
    for (int e = lane; e < v.E; e += 32)
        scratch[e] = moe_key(choice[e]);
    __syncwarp();
    for (int n = 0; n < v.top_k; n++) {
        int e = moe_take_best(scratch, v.E);
        id = lane == n ? e : id;
    }
    chosen = lane < v.top_k ? logit[id] : 0.0f;
}

/* Everything is asked for at once and stays in registers. */
template <int HELD> __device__ __forceinline__ void moe_choose_held(const moe_router_view &v, const moe_score &score, const float *logit, int &id, float &chosen)
{
    float own[HELD], bias[HELD];
    uint32_t key[HELD];
    int lane = kl_lane();
#pragma unroll
    for (int n = 0; n < HELD; n++) {
        bool there = 32 * n + lane < v.E;
        own[n] = there ? logit[32 * n + lane] : 0.0f;
        bias[n] = there && v.bias ? v.bias[32 * n + lane] : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < HELD; n++)
        key[n] = 32 * n + lane < v.E ? moe_key(score(own[n]) + bias[n]) : 0u;
    for (int k = 0; k < v.top_k; k++) {
        float x;
        int e = moe_take_best(key, own, &x);
        id = lane == k ? e : id;
        chosen = lane == k ? x : chosen;
    }
}

/* Lane n < top_k gets the token's nth expert and its weight; every lane gets what the scores were divided by:
 *
 *     w_n = scale s_n / (sum_m s_m + 1e-20) */
struct moe_choice {
    int id;
    float weight, sum;
};
__device__ __forceinline__ moe_choice moe_choose(const moe_router_view &v, const float *logit, uint32_t *scratch)
{
    enum { HELD = 8 };
    int lane = kl_lane();
    moe_score score = moe_score_of(v, logit);
    moe_choice c = {0, 0.0f, 1.0f};
    float chosen = 0.0f; /* the logit */
    if (v.E <= 32 * HELD && v.n_group <= 1)
        moe_choose_held<HELD>(v, score, logit, c.id, chosen);
    else
        moe_choose_any(v, score, logit, scratch, c.id, chosen);
    if (lane < v.top_k)
        c.weight = score(chosen) + (v.biased_weights && v.bias ? v.bias[c.id] : 0.0f);
    if (v.renormalize) {
        float sum = 0.0f;
        for (int n = 0; n < v.top_k; n++)
            sum += __shfl_sync(0xffffffffu, c.weight, n);
        c.sum = sum + 1e-20f;
    }
    c.weight = v.scale * c.weight / c.sum;
    return c;
}

#endif
