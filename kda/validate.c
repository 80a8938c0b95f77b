/* What a problem may be, checked in one order: device, dtype, layout, shape, options. Shared by every device. */
#include <limits.h>

#include "kda/internal.h"

int64_t kda_longest(int64_t T, int64_t N, const int64_t *cu_seqlens)
{
    int64_t longest = 0;
    for (int64_t n = 0; n < N; n++) {
        int64_t length = kda_sequence(T, cu_seqlens, n).length;
        longest = length > longest ? length : longest;
    }
    return longest;
}

int64_t kda_chunk_count(const kda_problem *p)
{
    int64_t C = kda_chunk_tokens(p), count = 0;
    for (int64_t n = 0; n < p->N; n++)
        count += (kda_sequence(p->T, p->cu_seqlens, n).length + C - 1) / C;
    return count;
}

kl_status kda_validate_workspace(const char *who, const void *workspace, size_t bytes, size_t wanted)
{
    KL_REQUIRE(wanted == 0 || (workspace && bytes >= wanted), "%s: workspace: expected %zu bytes, got %zu", who, wanted, workspace ? bytes : 0);
    return kl_ok();
}

kl_status kda_validate_sequences(const char *who, int64_t B, int64_t T, int64_t N, const int64_t *cu_seqlens)
{
    KL_REQUIRE(B >= 0, "%s: B: expected at least 0, got %lld", who, (long long)B);
    KL_REQUIRE(T >= 0, "%s: T: expected at least 0, got %lld", who, (long long)T);
    KL_REQUIRE(N >= 0, "%s: N: expected at least 0, got %lld", who, (long long)N);
    if (!cu_seqlens) {
        KL_REQUIRE(N == B, "%s: N: expected B = %lld without cu_seqlens, got %lld", who, (long long)B, (long long)N);
        return kl_ok();
    }
    KL_REQUIRE(B == 1, "%s: B: expected 1 with cu_seqlens, got %lld", who, (long long)B);
    KL_REQUIRE(cu_seqlens[0] == 0, "%s: cu_seqlens[0]: expected 0, got %lld", who, (long long)cu_seqlens[0]);
    for (int64_t n = 0; n < N; n++)
        KL_REQUIRE(cu_seqlens[n + 1] >= cu_seqlens[n], "%s: cu_seqlens[%lld]: expected at least %lld, got %lld", who,
                   (long long)(n + 1), (long long)cu_seqlens[n], (long long)cu_seqlens[n + 1]);
    KL_REQUIRE(cu_seqlens[N] == T, "%s: cu_seqlens[N]: expected T = %lld, got %lld", who, (long long)T, (long long)cu_seqlens[N]);
    return kl_ok();
}

static kl_status validate_dtype(const kda_problem *p)
{
    KL_REQUIRE(p->dtype == KL_F32 || p->dtype == KL_BF16, "kda: dtype: expected float32 or bfloat16, got %s",
               kl_dtype_name(p->dtype));
    KL_REQUIRE(p->state_dtype == KL_F32 || p->state_dtype == KL_BF16, "kda: state_dtype: expected float32 or bfloat16, got %s",
               kl_dtype_name(p->state_dtype));
    return kl_ok();
}

static kl_status validate_stride(const char *name, int64_t stride, int64_t width)
{
    KL_REQUIRE(stride == 0 || stride >= width, "kda: %s: expected 0 or at least the token's width %lld, got %lld", name,
               (long long)width, (long long)stride);
    return kl_ok();
}

static kl_status validate_layout(const kda_problem *p)
{
    KL_REQUIRE(p->state_layout == KDA_STATE_KV || p->state_layout == KDA_STATE_VK,
               "kda: state_layout: expected KDA_STATE_KV (0) or KDA_STATE_VK (1), got %d", (int)p->state_layout);
    KL_TRY(validate_stride("q_stride", p->q_stride, p->H * p->K));
    KL_TRY(validate_stride("k_stride", p->k_stride, p->H * p->K));
    KL_TRY(validate_stride("v_stride", p->v_stride, p->HV * p->V));
    KL_TRY(validate_stride("g_stride", p->g_stride, p->HV * p->G));
    KL_TRY(validate_stride("beta_stride", p->beta_stride, p->HV));
    return validate_stride("o_stride", p->o_stride, p->HV * p->V);
}

/* The heads come before the strides, which are compared with their products. */
static kl_status validate_heads(const kda_problem *p)
{
    KL_REQUIRE(p->H >= 1 && p->H <= INT_MAX, "kda: H: expected 1 or more heads, got %lld", (long long)p->H);
    KL_REQUIRE(p->HV >= 1 && p->HV <= INT_MAX && p->HV % p->H == 0, "kda: HV: expected a multiple of H = %lld, got %lld",
               (long long)p->H, (long long)p->HV);
    KL_REQUIRE(p->K >= 1 && p->K <= KDA_MAX_DIM, "kda: K: expected 1..%d, got %lld", KDA_MAX_DIM, (long long)p->K);
    KL_REQUIRE(p->V >= 1 && p->V <= KDA_MAX_DIM, "kda: V: expected 1..%d, got %lld", KDA_MAX_DIM, (long long)p->V);
    KL_REQUIRE(p->G >= 0 && (p->G == 0 || p->K % p->G == 0), "kda: G: expected 0 or a divisor of K = %lld, got %lld",
               (long long)p->K, (long long)p->G);
    return kl_ok();
}

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

/* Every offset that a kernel forms must fit int64_t (and size_t in bytes). */
static kl_status validate_extent(const kda_problem *p)
{
    int64_t width = largest(p->HV * largest(p->K, p->V), largest(largest(p->q_stride, p->k_stride), largest(p->v_stride, p->o_stride)));
    width = largest(width, largest(p->g_stride, p->beta_stride));
    int64_t tokens, elements, bytes;
    bool too_big = __builtin_mul_overflow(p->B, p->T, &tokens) || __builtin_mul_overflow(tokens, width, &elements) ||
                   __builtin_mul_overflow(elements, 8, &bytes);
    KL_REQUIRE(!too_big, "kda: B T: expected tensors of less than 2^63 bytes, got B = %lld, T = %lld with %lld elements a token",
               (long long)p->B, (long long)p->T, (long long)width);
    int64_t slots = largest(p->state_pool, p->N);
    too_big = __builtin_mul_overflow(slots, p->HV * p->K * p->V, &elements) || __builtin_mul_overflow(elements, 8, &bytes);
    KL_REQUIRE(!too_big, "kda: N: expected states of less than 2^63 bytes, got %lld of them", (long long)slots);
    return kl_ok();
}

/* Slots in a window of the pool at a time, so that the bitmap stays on the stack. */
enum { WINDOW = 1 << 15 };

static kl_status validate_pool(const kda_problem *p)
{
    int64_t pool = p->state_pool ? p->state_pool : p->N;
    KL_REQUIRE(p->state_pool >= 0, "kda: state_pool: expected at least 0, got %lld", (long long)p->state_pool);
    KL_REQUIRE(p->state_index || pool >= p->N, "kda: state_pool: expected at least N = %lld slots, got %lld", (long long)p->N,
               (long long)pool);
    return kl_ok();
}

/* The slots themselves, where the host can read them. */
static kl_status validate_index(const kda_problem *p)
{
    int64_t pool = p->state_pool ? p->state_pool : p->N;
    if (!p->state_index)
        return kl_ok();
    for (int64_t n = 0; n < p->N; n++)
        KL_REQUIRE(p->state_index[n] >= 0 && p->state_index[n] < pool, "kda: state_index[%lld]: expected 0..%lld, got %lld",
                   (long long)n, (long long)(pool - 1), (long long)p->state_index[n]);
    for (int64_t first = 0; first < pool && p->N > 1; first += WINDOW) {
        uint64_t seen[WINDOW / 64] = {0};
        for (int64_t n = 0; n < p->N; n++) {
            int64_t at = p->state_index[n] - first;
            if (at < 0 || at >= WINDOW)
                continue;
            uint64_t bit = UINT64_C(1) << (at % 64);
            KL_REQUIRE(!(seen[at / 64] & bit), "kda: state_index[%lld]: expected distinct slots, got %lld a second time",
                       (long long)n, (long long)p->state_index[n]);
            seen[at / 64] |= bit;
        }
    }
    return kl_ok();
}

static kl_status validate_options(const kda_problem *p)
{
    KL_REQUIRE(isfinite(p->scale), "kda: scale: expected a finite number, got %g", (double)p->scale);
    KL_REQUIRE(p->gate == KDA_GATE_LOG || p->gate == KDA_GATE_SOFTPLUS || p->gate == KDA_GATE_BOUNDED,
               "kda: gate: expected KDA_GATE_LOG (0), SOFTPLUS (1) or BOUNDED (2), got %d", (int)p->gate);
    KL_REQUIRE(p->G > 0 || p->gate == KDA_GATE_LOG, "kda: gate: expected KDA_GATE_LOG (0) with G = 0, got %d", (int)p->gate);
    if (p->gate == KDA_GATE_BOUNDED)
        KL_REQUIRE(p->lower_bound >= -5.0f && p->lower_bound < 0.0f, "kda: lower_bound: expected [-5, 0), got %g",
                   (double)p->lower_bound);
    else
        KL_REQUIRE(p->lower_bound == 0.0f, "kda: lower_bound: expected 0 without KDA_GATE_BOUNDED, got %g", (double)p->lower_bound);
    KL_REQUIRE(p->beta_kind == KDA_BETA_PLAIN || p->beta_kind == KDA_BETA_SIGMOID || p->beta_kind == KDA_BETA_SIGMOID2,
               "kda: beta_kind: expected KDA_BETA_PLAIN (0), SIGMOID (1) or SIGMOID2 (2), got %d", (int)p->beta_kind);
    KL_REQUIRE(p->chunk == 0 || p->chunk == 16 || p->chunk == 32 || p->chunk == 64 || p->chunk == 128,
               "kda: chunk: expected 0, 16, 32, 64 or 128, got %lld", (long long)p->chunk);
    return kl_ok();
}

static kl_status validate_pointers(const kda_problem *p)
{
    bool tokens = p->B * p->T > 0;
    KL_REQUIRE(!tokens || p->q, "kda: q: expected [B,T,H,K], got NULL");
    KL_REQUIRE(!tokens || p->k, "kda: k: expected [B,T,H,K], got NULL");
    KL_REQUIRE(!tokens || p->v, "kda: v: expected [B,T,HV,V], got NULL");
    KL_REQUIRE(!tokens || p->beta, "kda: beta: expected [B,T,HV], got NULL");
    KL_REQUIRE(!tokens || p->o, "kda: o: expected [B,T,HV,V], got NULL");
    KL_REQUIRE(!tokens || p->G == 0 || p->g, "kda: g: expected [B,T,HV,G], got NULL");
    KL_REQUIRE(p->G > 0 || !p->g, "kda: g: expected NULL with G = 0");
    bool activated = p->gate != KDA_GATE_LOG;
    KL_REQUIRE(!activated || p->A_log, "kda: A_log: expected [HV] with this gate, got NULL");
    KL_REQUIRE(activated || !p->A_log, "kda: A_log: expected NULL with KDA_GATE_LOG");
    KL_REQUIRE(activated || !p->dt_bias, "kda: dt_bias: expected NULL with KDA_GATE_LOG");
    KL_REQUIRE(!tokens || (p->o != p->q && p->o != p->k && p->o != p->v && p->o != p->g && p->o != p->beta),
               "kda: o: expected memory of its own, got an input's");
    return kl_ok();
}

kl_status kda_validate(const kl_ctx *ctx, const kda_problem *p)
{
    KL_REQUIRE(p, "kda: problem: expected a pointer, got NULL");
    if (ctx && ctx->device != KL_CPU && ctx->device != KL_CUDA)
        return kl_error(KL_EDEVICE, "kda: device: expected cpu or cuda, got %d", (int)ctx->device);
    KL_TRY(validate_dtype(p));
    KL_TRY(validate_heads(p));
    KL_TRY(validate_layout(p));
    KL_TRY(kda_validate_sequences("kda", p->B, p->T, p->N, p->cu_seqlens));
    KL_TRY(validate_extent(p));
    KL_TRY(validate_pool(p));
    if (ctx && ctx->device == KL_CPU)
        KL_TRY(validate_index(p));
    KL_TRY(validate_options(p));
    return ctx ? validate_pointers(p) : kl_ok();
}

kl_status kda_validate_grads(const kda_problem *p, const kda_grads *g)
{
    KL_REQUIRE(g, "kda: grads: expected a pointer, got NULL");
    KL_REQUIRE(p->G > 0 || !g->dg, "kda: dg: expected NULL with G = 0");
    KL_REQUIRE(p->gate != KDA_GATE_LOG || !g->dA_log, "kda: dA_log: expected NULL with KDA_GATE_LOG");
    KL_REQUIRE(p->gate != KDA_GATE_LOG || !g->ddt_bias, "kda: ddt_bias: expected NULL with KDA_GATE_LOG");
    KL_REQUIRE(!g->ddt_bias || p->dt_bias, "kda: ddt_bias: expected NULL without dt_bias");
    KL_REQUIRE(!p->ht || p->ht != p->h0, "kda: ht: expected another place than h0: a state updated in place cannot be differentiated");
    return kl_ok();
}
