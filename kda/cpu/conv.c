#include "common/parallel.h"
#include "common/simd.h"
#include "kda/internal.h"

/* Work is cut into tiles of channels (and, forward, of tokens); every output element is one sum over the taps in order. */
enum { MAX_TAPS = KDA_CONV_TAPS, CHANNELS = 64, TOKENS = 256 };

/* One tile of channels [d0, d0 + D) with its taps turned to [W,CHANNELS] floats. */
typedef struct tile {
    const kda_conv_problem *p;
    int64_t d0, D, x_stride, y_stride;
    float weight[MAX_TAPS][CHANNELS];
    float tail[MAX_TAPS][CHANNELS]; /* of sequence n, oldest first; zero without one */
    int64_t n;
} tile;

static int64_t slot_of(const kda_conv_problem *p, int64_t n) { return p->state_index ? p->state_index[n] : n; }

static void open_tile(tile *s, const kda_conv_problem *p, int64_t d0)
{
    *s = (tile){.p = p, .d0 = d0, .D = p->D - d0 < CHANNELS ? p->D - d0 : CHANNELS, .x_stride = kda_stride(p->x_stride, p->D),
                .y_stride = kda_stride(p->y_stride, p->D), .n = -1};
    float taps[MAX_TAPS];
    for (int64_t d = 0; d < s->D; d++) {
        kl_to_f32(taps, (const char *)p->weight + (size_t)((d0 + d) * p->W) * kl_dtype_size(p->weight_dtype), p->weight_dtype, (size_t)p->W);
        for (int64_t j = 0; j < p->W; j++)
            s->weight[j][d] = taps[j];
    }
}

static void open_sequence(tile *s, int64_t n)
{
    const kda_conv_problem *p = s->p;
    s->n = n;
    memset(s->tail, 0, sizeof s->tail);
    if (!p->tail_in)
        return;
    size_t keep = (size_t)p->W - 1, at = (size_t)(slot_of(p, n) * p->D + s->d0) * keep;
    float kept[MAX_TAPS];
    for (int64_t d = 0; d < s->D; d++, at += keep) {
        kl_to_f32(kept, (const char *)p->tail_in + at * kl_dtype_size(p->tail_dtype), p->tail_dtype, keep);
        for (size_t m = 0; m < keep; m++)
            s->tail[m][d] = kept[m];
    }
}

/* The input at a position of the open sequence; negative positions lie in the tail. */
static inline const float *input_at(const tile *s, kda_span span, int64_t position)
{
    if (position < 0)
        return s->tail[position + s->p->W - 1];
    return (const float *)s->p->x + (span.begin + position) * s->x_stride + s->d0;
}

static inline kl_v load_channels(const tile *s, const float *x, int64_t d) { return kl_vload_up_to(x + d, s->D - d); }
static inline void store_channels(const tile *s, float *x, int64_t d, kl_v y) { kl_vstore_up_to(x + d, y, s->D - d); }

/* z[t,d] = sum_{j<W} weight[d,j] x[t-W+1+j,d] */
static inline kl_v convolve(const tile *s, kda_span span, int64_t i, int64_t d)
{
    kl_v z = {0};
    for (int64_t j = 0; j < s->p->W; j++)
        z += kl_vload(&s->weight[j][d]) * load_channels(s, input_at(s, span, i - s->p->W + 1 + j), d);
    return z;
}

/* The sequence that holds packed token t. */
static int64_t sequence_of(const kda_conv_problem *p, int64_t t)
{
    if (!p->cu_seqlens)
        return t / p->T;
    int64_t low = 0, high = p->N;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (p->cu_seqlens[middle] <= t)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void forward_tile(const kda_conv_problem *p, int64_t d0, int64_t first, int64_t last)
{
    tile s;
    open_tile(&s, p, d0);
    kda_span span = {0, 0};
    for (int64_t t = first; t < last; t++) {
        if (t == first || t >= span.begin + span.length) {
            open_sequence(&s, sequence_of(p, t));
            span = kda_sequence(p->T, p->cu_seqlens, s.n);
        }
        for (int64_t d = 0; d < s.D; d += KL_LANES) {
            kl_v z = convolve(&s, span, t - span.begin, d);
            store_channels(&s, (float *)p->y + t * s.y_stride + d0, d, p->silu ? z * kl_vsigmoid(z) : z);
        }
    }
}

/* The last W-1 inputs of tail and x together, oldest first. */
static void hand_out_tail(const kda_conv_problem *p, int64_t n, int64_t d)
{
    kda_span span = kda_sequence(p->T, p->cu_seqlens, n);
    int64_t keep = p->W - 1;
    size_t size = kl_dtype_size(p->tail_dtype), at = (size_t)((slot_of(p, n) * p->D + d) * keep) * size;
    float before[MAX_TAPS] = {0}, after[MAX_TAPS];
    if (p->tail_in)
        kl_to_f32(before, (const char *)p->tail_in + at, p->tail_dtype, (size_t)keep);
    for (int64_t m = 0; m < keep; m++) {
        int64_t position = span.length - keep + m;
        after[m] = position >= 0 ? ((const float *)p->x)[(span.begin + position) * kda_stride(p->x_stride, p->D) + d] : before[m + span.length];
    }
    kl_from_f32((char *)p->tail_out + at, p->tail_dtype, after, (size_t)keep);
}

kl_status kda_cpu_conv_forward(kl_ctx *ctx, const kda_conv_problem *p)
{
    int64_t tokens = p->B * p->T, rows = kl_ceil_div(tokens, TOKENS), tiles = kl_ceil_div(p->D, CHANNELS);
#pragma omp parallel num_threads(ctx->threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * tiles; i++) {
            int64_t first = i / tiles * TOKENS, last = first + TOKENS < tokens ? first + TOKENS : tokens;
            forward_tile(p, i % tiles * CHANNELS, first, last);
        }
        if (p->tail_out) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < p->N; n++)
                for (int64_t d = 0; d < p->D; d++)
                    hand_out_tail(p, n, d);
        }
    }
    return kl_ok();
}

/* ---- backward ---- */

typedef struct tile_grads {
    float weight[MAX_TAPS][CHANNELS], tail[MAX_TAPS][CHANNELS];
} tile_grads;

/* Where the gradient of the input at a position accumulates. */
static inline float *input_gradient_at(const tile *s, const kda_conv_grads *g, tile_grads *acc, kda_span span, int64_t position)
{
    if (position < 0)
        return acc->tail[position + s->p->W - 1];
    return (float *)g->dx + (span.begin + position) * s->x_stride + s->d0;
}

static void backward_token(const tile *s, const kda_conv_grads *g, tile_grads *acc, kda_span span, int64_t i)
{
    int64_t W = s->p->W;
    const float *dy = (const float *)g->dy + (span.begin + i) * s->y_stride + s->d0;
    for (int64_t d = 0; d < s->D; d += KL_LANES) {
        kl_v dz = load_channels(s, dy, d);
        if (s->p->silu) {
            /* y = z sigmoid(z):  dz = dy (sigmoid(z) + z sigmoid(z) sigmoid(-z)) */
            kl_v z = convolve(s, span, i, d), up = kl_vsigmoid(z);
            dz *= up + z * up * kl_vsigmoid(-z);
        }
        /* z[t] = sum_j weight[j] x[t-W+1+j]:  dweight[j] += dz x[t-W+1+j],  dx[t-W+1+j] += dz weight[j] */
        for (int64_t j = 0; j < W; j++) {
            int64_t position = i - W + 1 + j;
            float *dx = input_gradient_at(s, g, acc, span, position);
            kl_v d_input = dz * kl_vload(&s->weight[j][d]);
            bool first_touch = position == i;
            if (position < 0)
                kl_vstore(dx + d, kl_vload(dx + d) + d_input);
            else
                store_channels(s, dx, d, first_touch ? d_input : load_channels(s, dx, d) + d_input);
            kl_vstore(&acc->weight[j][d], kl_vload(&acc->weight[j][d]) + dz * load_channels(s, input_at(s, span, position), d));
        }
    }
}

static void backward_sequence(tile *s, const kda_conv_grads *g, tile_grads *acc, int64_t n)
{
    const kda_conv_problem *p = s->p;
    kda_span span = kda_sequence(p->T, p->cu_seqlens, n);
    int64_t keep = p->W - 1, at = (n * p->D + s->d0) * keep;
    open_sequence(s, n);
    memset(acc->tail, 0, sizeof acc->tail);
    for (int64_t i = 0; i < span.length; i++)
        backward_token(s, g, acc, span, i);
    /* tail_out[m] is the input at position length - (W-1) + m */
    for (int64_t m = 0; m < keep && g->dtail_out; m++) {
        float *dx = input_gradient_at(s, g, acc, span, span.length - keep + m);
        for (int64_t d = 0; d < s->D; d++)
            dx[d] += g->dtail_out[at + d * keep + m];
    }
    for (int64_t m = 0; m < keep && g->dtail_in; m++)
        for (int64_t d = 0; d < s->D; d++)
            g->dtail_in[at + d * keep + m] = acc->tail[m][d];
}

kl_status kda_cpu_conv_backward(kl_ctx *ctx, const kda_conv_problem *p, const kda_conv_grads *g)
{
    int64_t tiles = kl_ceil_div(p->D, CHANNELS);
#pragma omp parallel for schedule(static) num_threads(ctx->threads)
    for (int64_t i = 0; i < tiles; i++) {
        tile s;
        tile_grads acc;
        open_tile(&s, p, i * CHANNELS);
        memset(acc.weight, 0, sizeof acc.weight);
        for (int64_t n = 0; n < p->N; n++)
            backward_sequence(&s, g, &acc, n);
        for (int64_t d = 0; d < s.D && g->dweight; d++)
            for (int64_t j = 0; j < p->W; j++)
                g->dweight[(s.d0 + d) * p->W + j] += acc.weight[j][d];
    }
    return kl_ok();
}
