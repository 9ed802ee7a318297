/* What the functions of this folder share: sixteen numbers at a time, sums in a fixed order, and the weights of a layer.

   Rows (M) are tokens. Every number of a row is computed from that row alone, by the same operations in the same order
   whatever M is, wherever the row stands, and however many threads work: results have the same bits in every company.
   Hence no sum is left to the compiler: sums over channels run in sixteen lanes (channel mod 16) that are then halved
   again and again, and no re-association is allowed. NaN in, NaN out. Matrices are row-major [out, in] as in PyTorch. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* ---- threads (pool.c) ----------------------------------------------------------------------------------------------- */

extern _Thread_local int num_threads;

#define PARALLEL_WORK 200000 /* multiplications (some 5 us) below which a second thread would come too late */

INLINE int64_t whole16(int64_t n) { return (n + 15) / 16 * 16; }

typedef void (*Task)(void *context, int64_t item, int thread);

/* task(context, i, thread) for i in [0, count), shared among up to num_threads threads where so many multiplications are
   worth it. `thread` is below num_threads, and no two tasks at once have the same; items must not depend on each other. */
void share(Task task, void *context, int64_t count, int64_t multiplications);

/* ---- sixteen lanes ------------------------------------------------------------------------------------------------- */

INLINE v16 load(const float *p) { return *(const v16 *)p; }
INLINE void store(float *p, v16 v) { *(v16 *)p = v; }
INLINE v16 all(float a) { return a - (v16){0}; }

/* The first n < 16 numbers at p, zeros after them. */
INLINE v16 load_first(const float *p, int64_t n) {
#ifdef __AVX512F__
    return (v16)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    v16 v = {0};
    memcpy(&v, p, n * sizeof(float));
    return v;
#endif
}

INLINE void store_first(float *p, v16 v, int64_t n) {
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    memcpy(p, &v, n * sizeof(float));
#endif
}

/* One function of lanes over arrays of any length, with the same code for the last few: EACH16(i, n) { ... LANES(p + i) } */
#define EACH16(i, n) for (int64_t i = 0, i##_left = (n); i##_left > 0; i += 16, i##_left -= 16)
#define GET(p, i) (i##_left >= 16 ? load((p) + i) : load_first((p) + i, i##_left))
#define PUT(p, i, v) (i##_left >= 16 ? store((p) + i, v) : store_first((p) + i, v, i##_left))

INLINE v16 pick(i16 mask, v16 yes, v16 no) { return (v16)((mask & (i16)yes) | (~mask & (i16)no)); }
INLINE v16 at_most(v16 x, float limit) { return pick(x > all(limit), all(limit), x); } /* a NaN stays */
INLINE v16 at_least(v16 x, float limit) { return pick(x < all(limit), all(limit), x); }

/* Lanes halved four times: the one order in which sixteen numbers are added. */
INLINE float sum16(v16 v) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
    for (int i = 0; i < 4; i++) s[i] = s[i] + s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

/* e^x: |error| below 2 units in the last place; 0 below -87.3, infinite above 88.37. */
INLINE v16 exp16(v16 x) {
    const v16 magic = all(12582912.0f); /* adding 1.5 * 2^23 rounds to a whole number */
    v16 t = x * 1.44269504088896341f + magic, n = t - magic;
    v16 r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    v16 p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    v16 power = (v16)(((i16)t - (i16)magic + 127) << 23);
    v16 y = p * power;
    y = pick(x < all(-87.3f), all(0.0f), y);
    return pick(x > all(88.37f), all(INFINITY), y);
}

INLINE v16 sigmoid16(v16 x) { return 1.0f / (1.0f + exp16(-x)); }
INLINE float exp1(float x) { return exp16(all(x))[0]; }
INLINE float sigmoid1(float x) { return sigmoid16(all(x))[0]; }

INLINE float dot(const float *a, const float *b, int64_t n) {
    v16 s = {0};
    EACH16(i, n) s += GET(a, i) * GET(b, i);
    return sum16(s);
}

INLINE void add_scaled(float *y, float a, const float *x, int64_t n) { EACH16(i, n) PUT(y, i, GET(y, i) + a * GET(x, i)); }

INLINE float inverse_rms(const float *x, int64_t n, float eps) { return 1.0f / sqrtf(dot(x, x, n) / (float)n + eps); }

/* ops/norm.py; weight NULL: none. `to` may be x. */
INLINE void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *to) {
    float r = inverse_rms(x, n, eps);
    if (weight)
        EACH16(i, n) PUT(to, i, GET(x, i) * r * GET(weight, i));
    else
        EACH16(i, n) PUT(to, i, GET(x, i) * r);
}

/* Rotate the last `rope` channels of x by (cos, sin) pairs; sign -1 rotates back. ops/rope.py. */
INLINE void rotate(float *x, const float *table, int64_t width, int64_t rope, float sign) {
    float *r = x + width - rope;
    for (int64_t i = 0; i < rope; i += 2) {
        float c = table[i], s = sign * table[i + 1], even = r[i], odd = r[i + 1];
        r[i] = even * c - odd * s;
        r[i + 1] = even * s + odd * c;
    }
}

/* ---- products (product.c) -------------------------------------------------------------------------------------------- */

/* y[m, o] = x[m, :] . W[o, :] for o in [from, to); rows stand `step` apart, or at index[m] * step. */
typedef struct {
    const float *W;
    int64_t M, out, in;
    const float *x;
    int64_t x_step;
    const int64_t *x_index;
    float *y;
    int64_t y_step;
    const int64_t *y_index;
} Product;

void product_part(const Product *p, int64_t row, int64_t row_stop, int64_t from, int64_t to);
void products(const Product *list, int64_t count); /* all of them, shared among the threads */
void norms(const float *x, const float *weight, float *y, int64_t M, int64_t n, float eps);
void dots(const float *const *x, int64_t rows, const float *const *w, int64_t outs, int64_t K, float *y, int64_t y_step);
int64_t product_work(const Product *p);      /* in multiplications */
int64_t product_width(const Product *p);     /* outputs that make a fair item of shared work */
int64_t rows_per_item(int64_t M, int64_t each); /* the same for rows of `each` numbers */

/* ---- weights (native/library.py mirrors these) ------------------------------------------------------------------------ */

typedef struct {
    const float *fn, *base, *scale, *norm; /* norm: of the sublayer's input */
    int64_t n, D, iters, constrained;
    float eps, norm_eps, input_eps;
} Hyper;

typedef struct { /* wkv NULL: there is none */
    const float *wkv, *wgate, *ape, *norm;
    int64_t channels, ratio, overlap;
    float eps;
} Compressor;

typedef struct {
    const float *wq_a, *q_norm, *wq_b, *wkv, *kv_norm, *wo_a, *wo_b, *sink, *index_wq_b, *index_weights, *frequencies;
    Compressor compressor, index_compressor;
    int64_t D, rank, N, H, rope, groups, o_rank, index_heads, index_dim, window, ratio, topk;
    float eps, scale, index_scale;
} Attention;

typedef struct {
    const float *gate, *bias, *w1, *w3, *w2, *shared_w1, *shared_w3, *shared_w2;
    const int64_t *table; /* token -> experts of a hash layer, else NULL */
    int64_t D, E, K, f, scoring, shared_f; /* scoring: 0 sqrt(softplus), 1 sigmoid, 2 softmax */
    float limit, scale;
} Mixture;

typedef struct {
    Hyper attn_hc, ffn_hc;
    Attention attn;
    Mixture ffn;
} Layer;

/* ---- what a sequence keeps --------------------------------------------------------------------------------------------- */

#define REWIND 64 /* rows of a sliding buffer beyond those it must keep (model/stores.py) */

typedef struct { /* compressed entries in order, in pieces of memory: piece i begins at base + at[i] * step bytes */
    char *base;
    int64_t step;
    const int64_t *at, *start; /* start[i]: the first entry of piece i; NULL: all pieces hold `size` */
    int64_t size;
} Entries;

typedef struct { /* consecutive new tokens of one sequence, rows row .. row + count at positions first .. */
    int64_t row, count, first, held; /* entries of tokens before `held` exist already and stay as they are */
    float *window, *raw, *index_raw; /* sliding buffers, whose first rows are positions window_lo and raw_lo */
    int64_t window_lo, raw_lo;
    Entries entries, index_entries;
} Segment;

typedef struct { /* one pass of M rows */
    int64_t M, num_segments, dense;
    const int64_t *token, *position;
    const float *table; /* [M, rope] (cos, sin) pairs of this layer's frequencies */
    float *streams;     /* [M, n, D], in and out */
    const Segment *segments;
    const int64_t *routing_in, *selection_in; /* [M, K], [M, selection_width]: given instead of chosen, or NULL */
    int64_t selection_width;
    int64_t *routing, *selection; /* out: [M, K], and [M, topk] with -1 for none; or NULL */
    float *scores;                /* out: [M, E], or NULL */
} Rows;

/* ---- a pass of an engine's sequences (pass.c) --------------------------------------------------------------------------- */

typedef struct { /* a model's weights; without an MTP block the last of each are missing */
    const Layer *const *layers; /* the main layers, then the MTP block's */
    const float *embed, *frequencies[2], *enorm, *hnorm, *e_proj, *h_proj; /* frequencies without and with compression */
    int64_t num_layers, vocab, pairs;
    float enorm_eps, hnorm_eps;
    Hyper collapse, mtp_collapse;
} Network;

typedef struct { /* where an arena keeps one layer */
    Segment first;                                /* of the state block in slot 0, and of page 0 */
    int64_t window_step, raw_step, index_raw_step; /* bytes from slot to slot */
    int64_t keep;                                 /* which of a sequence's raw_lo is this layer's */
} Home;

typedef struct { /* one sequence: `count` new tokens from position `first` on */
    int64_t count, first, held, slot, window_lo;
    const int64_t *pages;
} Standing;

typedef struct {
    int64_t M, num_sequences, num_keeps, last_only;
    const int64_t *token; /* [M] */
    const Standing *standing;
    const int64_t *raw_lo; /* [num_sequences, num_keeps] */
    const Home *homes;     /* of the main layers, then of the MTP block */
    const float *before;
    float *streams, *hidden;
} Pass;

/* ---- the parts of a layer ---------------------------------------------------------------------------------------------- */

/* Memory of one call, handed out piece by piece; every piece begins on a cache line. `base` NULL: only counts. */
typedef struct {
    char *base;
    size_t used;
} Space;

INLINE void *take(Space *space, size_t bytes) {
    void *piece = space->base ? space->base + space->used : NULL;
    space->used += (bytes + 127) / 64 * 64;
    return piece;
}
#define TAKE(space, type, count) ((type *)take(space, sizeof(type) * (size_t)(count)))

void hyper_enter(const Hyper *h, int64_t M, const float *streams, float *z, float *x, float *post, float *comb);
void hyper_leave(const Hyper *h, int64_t M, float *streams, const float *y, const float *post, const float *comb);
void lr_collapse(const Hyper *h, int64_t M, const float *streams, float *z, float *hidden);
void layer(const Layer *l, const Rows *r, Space *space);

typedef struct { /* what attention_in makes of M rows */
    float *low, *q, *kv, *raw, *index_q, *index_weight, *index_raw;
} Projected;

void attention_in(const Attention *a, int64_t M, const float *x, const int64_t *position, const float *table, Projected to);
void attention_out(const Attention *a, int64_t M, float *o, const float *table, float *low, float *y);
void attend_rows(const Attention *a, const Rows *r, Projected from, float *out, Space *space);
void remember_all_but_last(const Attention *a, int64_t M, const float *x, const float *table, float *kv, Segment *segments,
                           int64_t num_segments);
void lr_rope_table(const float *frequencies, int64_t pairs, const int64_t *position, int64_t M, float *table);
void attend(const Attention *a, const float *q, const float *const *key, int64_t S, int64_t head, int64_t head_stop,
            float *p, float *out);
void index_scores(const float *const *q, const float *const *weight, int64_t rows, const float *const *key, int64_t count,
                  int64_t heads, int64_t width, float *scores, int64_t step, float *scratch);
typedef struct {
    const float *const *q, *const *weight;
    int64_t rows;
    const float *const *key;
    int64_t count, heads, width;
    float *scores;
    int64_t step;
} Scoring;
void index_scores_shared(const Scoring *c);
void select_top(const float *scores, int64_t count, int64_t k, float *scratch, int64_t *chosen);
void mixture(const Mixture *e, int64_t M, const float *x, const int64_t *token, const int64_t *given, int64_t *chosen,
             float *scores, float *y, Space *space);

#define HEADS_AT_ONCE 8 /* heads that share a block of keys while it is in the first cache */
#define SCORED_ROWS 8   /* rows that do in the indexer */
#define SCORED_KEYS 512 /* keys that make a fair item of shared work there */
