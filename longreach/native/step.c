/* One token through the layers of a V4 model, in float32 on a CPU: the arithmetic of ops/*.py for a handful of rows.

   A decoded token costs one reading of the active weights. PyTorch spends longer than that on calling some three thousand
   small operators, and its one-row products read several matrix rows side by side, which leaves most of the memory's
   bandwidth unused. Here a sublayer is two or three calls, and every product walks its matrix once from end to end.

   Rows (M) are tokens of different sequences; each is computed by itself, in the same order whatever M is. Matrices are
   row-major [out, in] as in PyTorch. Every function states the reference it repeats. Compiled by native/build.py with
   re-association allowed (vector sums) and infinities and NaN intact: a NaN in, a NaN out. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));

#define PARALLEL_BYTES (1 << 20) /* a product below this is over before a second thread has woken */

static int num_threads = 1;
void lr_set_threads(int n) { num_threads = n < 1 ? 1 : n; }

/* ---- vectors ------------------------------------------------------------------------------------------------------ */

static inline float sum16(v16 v) {
    float s = 0;
    for (int i = 0; i < 16; i++) s += v[i];
    return s;
}

static inline float dot(const float *restrict a, const float *restrict b, int64_t n) {
    v16 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) { /* four sums: one alone would wait for its own last addition */
        s0 += *(const v16 *)(a + i) * *(const v16 *)(b + i);
        s1 += *(const v16 *)(a + i + 16) * *(const v16 *)(b + i + 16);
        s2 += *(const v16 *)(a + i + 32) * *(const v16 *)(b + i + 32);
        s3 += *(const v16 *)(a + i + 48) * *(const v16 *)(b + i + 48);
    }
    for (; i + 16 <= n; i += 16) s0 += *(const v16 *)(a + i) * *(const v16 *)(b + i);
    float s = sum16((s0 + s1) + (s2 + s3));
    for (; i < n; i++) s += a[i] * b[i];
    return s;
}

static inline void add_scaled(float *restrict y, float a, const float *restrict x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

static float inverse_rms(const float *x, int64_t n, float eps) { return 1.0f / sqrtf(dot(x, x, n) / n + eps); }

static void rms_norm(float *x, const float *weight, int64_t n, float eps) { /* ops/norm.py, in place */
    float r = inverse_rms(x, n, eps);
    if (weight)
        for (int64_t i = 0; i < n; i++) x[i] = x[i] * r * weight[i];
    else
        for (int64_t i = 0; i < n; i++) x[i] *= r;
}

/* y[m, o] = x[m, :] . W[o, :], rows of y `stride` apart. A matrix row is used for all M while it is in the first cache. */
static void product(const float *W, const float *x, float *y, int64_t M, int64_t out, int64_t in, int64_t stride) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && out * in * 4 >= PARALLEL_BYTES)
    for (int64_t o = 0; o < out; o++)
        for (int64_t m = 0; m < M; m++) y[m * stride + o] = dot(W + o * in, x + m * in, in);
}

void lr_linear(const float *W, const float *x, float *y, int64_t M, int64_t out, int64_t in) {
    product(W, x, y, M, out, in, out);
}

/* Rotate the last `rope` channels of x by (cos, sin) pairs; sign -1 rotates back. ops/rope.py. */
static void rotate(float *x, const float *table, int64_t width, int64_t rope, float sign) {
    float *r = x + width - rope;
    for (int64_t i = 0; i < rope; i += 2) {
        float c = table[i], s = sign * table[i + 1], even = r[i], odd = r[i + 1];
        r[i] = even * c - odd * s;
        r[i + 1] = even * s + odd * c;
    }
}

/* ---- residual streams (ops/hyper.py) ------------------------------------------------------------------------------- */

typedef struct {
    const float *fn, *base, *scale, *norm; /* norm: of the sublayer's input */
    int64_t n, D, iters, constrained;
    float eps, norm_eps, input_eps;
} Hyper;

static float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

static void sinkhorn(float *m, int64_t n, int64_t iters, float eps) {
    for (int64_t j = 0; j < n; j++) {
        float largest = m[j * n], sum = 0;
        for (int64_t k = 1; k < n; k++) largest = m[j * n + k] > largest ? m[j * n + k] : largest;
        for (int64_t k = 0; k < n; k++) sum += m[j * n + k] = expf(m[j * n + k] - largest);
        for (int64_t k = 0; k < n; k++) m[j * n + k] = m[j * n + k] / sum + eps;
    }
    for (int64_t step = 0; step < 2 * iters - 1; step++) { /* columns first and last */
        int64_t along = step % 2 ? 1 : n, across = step % 2 ? n : 1;
        for (int64_t k = 0; k < n; k++) {
            float sum = eps;
            for (int64_t j = 0; j < n; j++) sum += m[k * across + j * along];
            float inverse = 1.0f / sum;
            for (int64_t j = 0; j < n; j++) m[k * across + j * along] *= inverse;
        }
    }
}

/* streams [M, n, D] -> the sublayer's normed input x [M, D], post [M, n], comb [M, n, n]. */
void lr_hyper_enter(const Hyper *h, int64_t M, const float *streams, float *x, float *post, float *comb) {
    int64_t n = h->n, D = h->D;
    float z[(2 + n) * n];
    for (int64_t m = 0; m < M; m++) {
        const float *X = streams + m * n * D;
        float r = inverse_rms(X, n * D, h->norm_eps), *u = x + m * D, *M_jk = comb + m * n * n;
        product(h->fn, X, z, 1, (2 + n) * n, n * D, 0);
        memset(u, 0, D * sizeof(float));
        for (int64_t j = 0; j < n; j++) {
            add_scaled(u, sigmoid(h->scale[0] * z[j] * r + h->base[j]) + h->eps, X + j * D, D);
            post[m * n + j] = 2 * sigmoid(h->scale[1] * z[n + j] * r + h->base[n + j]);
        }
        for (int64_t i = 0; i < n * n; i++) M_jk[i] = h->scale[2] * z[2 * n + i] * r + h->base[2 * n + i];
        if (h->constrained) sinkhorn(M_jk, n, h->iters, h->eps);
        rms_norm(u, h->norm, D, h->input_eps);
    }
}

/* streams <- post y + comb^T streams, in place. */
void lr_hyper_leave(const Hyper *h, int64_t M, float *streams, const float *y, const float *post, const float *comb) {
    enum { BLOCK = 64 };
    int64_t n = h->n, D = h->D;
    float mixed[n * BLOCK];
    for (int64_t m = 0; m < M; m++) {
        float *X = streams + m * n * D;
        const float *C = comb + m * n * n;
        for (int64_t d = 0; d < D; d += BLOCK) {
            int64_t width = D - d < BLOCK ? D - d : BLOCK;
            for (int64_t k = 0; k < n; k++) {
                float *o = mixed + k * BLOCK;
                for (int64_t i = 0; i < width; i++) o[i] = post[m * n + k] * y[m * D + d + i];
                for (int64_t j = 0; j < n; j++) add_scaled(o, C[j * n + k], X + j * D + d, width);
            }
            for (int64_t k = 0; k < n; k++) memcpy(X + k * D + d, mixed + k * BLOCK, width * sizeof(float));
        }
    }
}

/* streams [M, n, D] -> normed hidden [M, D]: the collapse and the final norm. h->fn is [n, nD], h->scale one number. */
void lr_collapse(const Hyper *h, int64_t M, const float *streams, float *hidden) {
    int64_t n = h->n, D = h->D;
    float z[n];
    for (int64_t m = 0; m < M; m++) {
        const float *X = streams + m * n * D;
        float r = inverse_rms(X, n * D, h->norm_eps), *u = hidden + m * D;
        product(h->fn, X, z, 1, n, n * D, 0);
        memset(u, 0, D * sizeof(float));
        for (int64_t j = 0; j < n; j++)
            add_scaled(u, sigmoid(h->scale[0] * z[j] * r + h->base[j]) + h->eps, X + j * D, D);
        rms_norm(u, h->norm, D, h->input_eps);
    }
}

/* ---- attention (model/attention.py) ----------------------------------------------------------------------------------- */

typedef struct { /* a compressor's projections; wkv NULL: there is none */
    const float *wkv, *wgate, *ape;
    int64_t channels, ratio;
} Compressor;

typedef struct {
    const float *wq_a, *q_norm, *wq_b, *wkv, *kv_norm, *wo_a, *wo_b, *sink, *index_wq_b, *index_weights;
    Compressor compressor, index_compressor;
    int64_t D, rank, N, H, rope, groups, o_rank, index_heads, index_dim;
    float eps, scale, index_scale;
} Attention;

static void compress(const Compressor *c, const float *x, float *raw, int64_t M, int64_t D, const int64_t *position) {
    if (!c->wkv) return;
    int64_t w = c->channels;
    product(c->wkv, x, raw, M, w, D, 2 * w);
    product(c->wgate, x, raw + w, M, w, D, 2 * w);
    for (int64_t m = 0; m < M; m++)
        add_scaled(raw + m * 2 * w + w, 1.0f, c->ape + position[m] % c->ratio * w, w);
}

/* x [M, D] at position[M] -> q [M, N, H] rotated, kv [M, H] rotated, and what the layer's compressors and indexer take.
   table [M, rope]: (cos, sin) pairs. scratch: M * rank floats. */
void lr_attention_in(const Attention *a, int64_t M, const float *x, const int64_t *position, const float *table,
                     float *scratch, float *q, float *kv, float *raw, float *index_q, float *index_weight, float *index_raw) {
    int64_t D = a->D, NH = a->N * a->H;
    product(a->wq_a, x, scratch, M, a->rank, D, a->rank);
    for (int64_t m = 0; m < M; m++) rms_norm(scratch + m * a->rank, a->q_norm, a->rank, a->eps);
    product(a->wq_b, scratch, q, M, NH, a->rank, NH);
    product(a->wkv, x, kv, M, a->H, D, a->H);
    for (int64_t m = 0; m < M; m++) {
        const float *turn = table + m * a->rope;
        for (int64_t h = 0; h < a->N; h++) {
            rms_norm(q + m * NH + h * a->H, 0, a->H, a->eps);
            rotate(q + m * NH + h * a->H, turn, a->H, a->rope, 1);
        }
        rms_norm(kv + m * a->H, a->kv_norm, a->H, a->eps);
        rotate(kv + m * a->H, turn, a->H, a->rope, 1);
    }
    compress(&a->compressor, x, raw, M, D, position);
    if (!a->index_wq_b) return;
    int64_t heads = a->index_heads, width = a->index_dim;
    compress(&a->index_compressor, x, index_raw, M, D, position);
    product(a->index_wq_b, scratch, index_q, M, heads * width, a->rank, heads * width);
    product(a->index_weights, x, index_weight, M, heads, D, heads);
    for (int64_t m = 0; m < M; m++)
        for (int64_t h = 0; h < heads; h++) {
            rotate(index_q + (m * heads + h) * width, table + m * a->rope, width, a->rope, 1);
            index_weight[m * heads + h] *= a->index_scale;
        }
}

/* One query q [N, H] over `count` keys (= values) in up to two runs, one softmax with the sink: out [N, H].
   scratch: N * (local_count + extra_count) floats. ops/attention.py. */
void lr_attend(const Attention *a, const float *q, const float *local, int64_t local_count, const float *extra,
               int64_t extra_count, float *scratch, float *out) {
    int64_t N = a->N, H = a->H, S = local_count + extra_count;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && N * S * H >= PARALLEL_BYTES)
    for (int64_t h = 0; h < N; h++) {
        float *p = scratch + h * S, *o = out + h * H, largest = a->sink[h];
        for (int64_t s = 0; s < S; s++) {
            const float *key = s < local_count ? local + s * H : extra + (s - local_count) * H;
            p[s] = dot(q + h * H, key, H) * a->scale;
            largest = p[s] > largest ? p[s] : largest;
        }
        float sum = expf(a->sink[h] - largest);
        for (int64_t s = 0; s < S; s++) sum += p[s] = expf(p[s] - largest);
        memset(o, 0, H * sizeof(float));
        for (int64_t s = 0; s < S; s++)
            add_scaled(o, p[s] / sum, s < local_count ? local + s * H : extra + (s - local_count) * H, H);
    }
}

/* o [M, N, H] -> y [M, D]: rotate back, then the grouped low-rank projection. scratch: M * groups * o_rank floats. */
void lr_attention_out(const Attention *a, int64_t M, float *o, const float *table, float *scratch, float *y) {
    int64_t NH = a->N * a->H, in = NH / a->groups, G = a->groups, R = a->o_rank;
    for (int64_t m = 0; m < M; m++)
        for (int64_t h = 0; h < a->N; h++) rotate(o + m * NH + h * a->H, table + m * a->rope, a->H, a->rope, -1);
    for (int64_t m = 0; m < M; m++)
        for (int64_t g = 0; g < G; g++)
            product(a->wo_a + g * R * in, o + m * NH + g * in, scratch + (m * G + g) * R, 1, R, in, R);
    product(a->wo_b, scratch, y, M, a->D, G * R, a->D);
}

/* ---- index scores and selection (ops/index.py) -------------------------------------------------------------------------- */

/* scores[s] = sum_h weight[h] relu(q[h] . keys[s]) */
void lr_index_scores(const float *q, const float *weight, const float *keys, int64_t heads, int64_t width, int64_t count,
                     float *scores) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && count * width * 4 >= PARALLEL_BYTES)
    for (int64_t s = 0; s < count; s++) {
        float total = 0;
        for (int64_t h = 0; h < heads; h++) {
            float product = dot(q + h * width, keys + s * width, width);
            total += weight[h] * (product < 0 ? 0 : product);
        }
        scores[s] = total;
    }
}

/* Indices of the k largest of `count` scores, ascending, equals to the lowest index; k < count. scratch: count floats. */
void lr_select_top(const float *scores, int64_t count, int64_t k, float *scratch, int64_t *chosen) {
    /* Quickselect for the k-th value, then everything above it and the first of its equals. */
    memcpy(scratch, scores, count * sizeof(float));
    int64_t lo = 0, hi = count - 1, target = k - 1;
    while (lo < hi) {
        float a = scratch[lo], b = scratch[lo + (hi - lo) / 2], c = scratch[hi];
        float pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b)); /* their median */
        int64_t i = lo, j = hi;
        while (i <= j) {
            while (scratch[i] > pivot) i++;
            while (scratch[j] < pivot) j--;
            if (i <= j) {
                float t = scratch[i];
                scratch[i++] = scratch[j];
                scratch[j--] = t;
            }
        }
        if (target <= j) hi = j;
        else if (target >= i) lo = i;
        else break;
    }
    float cut = scratch[target];
    int64_t above = 0, found = 0;
    for (int64_t s = 0; s < count; s++) above += scores[s] > cut;
    int64_t room = k - above;
    for (int64_t s = 0; s < count && found < k; s++)
        if (scores[s] > cut || (scores[s] == cut && room-- > 0)) chosen[found++] = s;
    for (; found < k; found++) chosen[found] = found; /* only scores that are not numbers lead here */
}

/* ---- mixture of experts (ops/moe.py) -------------------------------------------------------------------------------------- */

typedef struct {
    const float *gate, *bias, *w1, *w3, *w2, *shared_w1, *shared_w3, *shared_w2;
    const int64_t *table; /* token -> experts of a hash layer, else NULL */
    int64_t D, E, K, f, scoring, shared_f; /* scoring: 0 sqrt(softplus), 1 sigmoid, 2 softmax */
    float limit, scale;
} Mixture;

static void expert(const Mixture *e, const float *w1, const float *w3, const float *w2, int64_t f, const float *x,
                   float weight, float *hidden, float *out) {
    product(w1, x, hidden, 1, f, e->D, f);
    product(w3, x, hidden + f, 1, f, e->D, f);
    for (int64_t i = 0; i < f; i++) {
        float g = hidden[i], u = hidden[f + i];
        if (e->limit > 0) {
            g = g > e->limit ? e->limit : g;
            u = u > e->limit ? e->limit : (u < -e->limit ? -e->limit : u);
        }
        hidden[i] = g * sigmoid(g) * u * weight;
    }
    product(w2, hidden, out, 1, e->D, f, e->D);
}

/* x [M, D] of tokens token[M] -> y [M, D] and the experts chosen [M, K], ascending or in the table's order.
   scratch: 2 max(f, shared_f) + D + 2 E floats. */
void lr_mixture(const Mixture *e, int64_t M, const float *x, const int64_t *token, float *scratch, int64_t *chosen, float *y) {
    int64_t D = e->D, E = e->E, K = e->K, f = e->f > e->shared_f ? e->f : e->shared_f;
    float *hidden = scratch, *part = scratch + 2 * f, *scores = part + D, *ranked = scores + E;
    for (int64_t m = 0; m < M; m++) {
        const float *row = x + m * D;
        int64_t *mine = chosen + m * K;
        product(e->gate, row, scores, 1, E, D, E);
        if (e->scoring == 2) {
            float largest = scores[0], sum = 0;
            for (int64_t i = 1; i < E; i++) largest = scores[i] > largest ? scores[i] : largest;
            for (int64_t i = 0; i < E; i++) sum += scores[i] = expf(scores[i] - largest);
            for (int64_t i = 0; i < E; i++) scores[i] /= sum;
        } else
            for (int64_t i = 0; i < E; i++)
                scores[i] = e->scoring == 1 ? sigmoid(scores[i])
                                            : sqrtf(scores[i] > 20 ? scores[i] : log1pf(expf(scores[i])));
        if (e->table)
            memcpy(mine, e->table + token[m] * K, K * sizeof(int64_t));
        else {
            for (int64_t i = 0; i < E; i++) ranked[i] = scores[i] + (e->bias ? e->bias[i] : 0);
            for (int64_t k = 0; k < K; k++) { /* strictly larger wins, so equals go to the lowest expert */
                int64_t best = -1;
                for (int64_t i = 0; i < E; i++)
                    if (ranked[i] > -INFINITY && (best < 0 || ranked[i] > ranked[best])) best = i;
                if (best < 0) best = k; /* scores that are not numbers: any expert, the result is NaN anyway */
                mine[k] = best;
                ranked[best] = -INFINITY;
            }
            for (int64_t i = 1; i < K; i++) /* ascending */
                for (int64_t j = i; j > 0 && mine[j] < mine[j - 1]; j--) {
                    int64_t t = mine[j];
                    mine[j] = mine[j - 1];
                    mine[j - 1] = t;
                }
        }
        float sum = 0;
        for (int64_t k = 0; k < K; k++) sum += scores[mine[k]];
        if (e->scoring == 2) sum = 1;
        float *total = y + m * D;
        expert(e, e->shared_w1, e->shared_w3, e->shared_w2, e->shared_f, row, 1.0f, hidden, total);
        for (int64_t k = 0; k < K; k++) {
            int64_t i = mine[k], size = e->f * D;
            expert(e, e->w1 + i * size, e->w3 + i * size, e->w2 + i * size, e->f, row, scores[i] / sum * e->scale, hidden,
                   part);
            add_scaled(total, 1.0f, part, D);
        }
    }
}
