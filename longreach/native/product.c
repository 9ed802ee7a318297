/* Products of rows with matrices: tiles of 4 rows x 4 outputs, one vector of sixteen partial sums per output.

   An output's sixteen sums run over the channels from first to last and are then halved; tiles only decide which outputs
   are under way together, so one row or a thousand give the same bits. A matrix row is read once from memory while the
   rows of x pass by: at M = 1 that is one stream from end to end, which is all that a memory-bound product can be. */

#include "rows.h"

#ifdef __AVX512F__
#define SHUFFLE_QUARTERS(a, b, which) ((v16)_mm512_shuffle_f32x4((__m512)(a), (__m512)(b), which))
#define SHUFFLE_PAIRS(a, b, which) ((v16)_mm512_shuffle_ps((__m512)(a), (__m512)(b), which))
/* As sum16 of each of sixteen vectors, side by side: s[4 r + o] = sum16(a[r][o]). */
INLINE v16 sums16(v16 a[4][4]) {
    v16 half[4][2], quarter[4], pair[2];
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < 2; r++) {
            v16 p = a[2 * r][o], q = a[2 * r + 1][o];
            half[o][r] = SHUFFLE_QUARTERS(p, q, 0x44) + SHUFFLE_QUARTERS(p, q, 0xEE);
        }
    for (int o = 0; o < 4; o++)
        quarter[o] = SHUFFLE_QUARTERS(half[o][0], half[o][1], 0x88) + SHUFFLE_QUARTERS(half[o][0], half[o][1], 0xDD);
    for (int i = 0; i < 2; i++) {
        v16 p = quarter[2 * i], q = quarter[2 * i + 1];
        pair[i] = SHUFFLE_PAIRS(p, q, 0x44) + SHUFFLE_PAIRS(p, q, 0xEE);
    }
    return SHUFFLE_PAIRS(pair[0], pair[1], 0x88) + SHUFFLE_PAIRS(pair[0], pair[1], 0xDD);
}
#endif

/* y[r][o] = x[r] . w[o] for R x O of them; R and O are constants where this is called. Meanwhile `lines` cache lines per
   sixteen channels are fetched from `ahead` on: four rows side by side are no stream that the processor would foresee. */
INLINE void tile(const float *const *x, const float *const *w, int64_t K, int R, int O, float *const *y, const char *ahead,
                 int lines) {
    v16 sum[4][4] = {{{0}}};
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
        v16 a[4];
        for (int i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        for (int r = 0; r < R; r++) a[r] = load(x[r] + k);
        for (int o = 0; o < O; o++) {
            v16 b = load(w[o] + k);
            for (int r = 0; r < R; r++) sum[r][o] += a[r] * b;
        }
    }
    if (k < K) {
        v16 a[4];
        for (int r = 0; r < R; r++) a[r] = load_first(x[r] + k, K - k);
        for (int o = 0; o < O; o++) {
            v16 b = load_first(w[o] + k, K - k);
            for (int r = 0; r < R; r++) sum[r][o] += a[r] * b;
        }
    }
#ifdef __AVX512F__
    if (O == 4) {
        v16 s = sums16(sum);
        for (int r = 0; r < R; r++) memcpy(y[r], (const char *)&s + 16 * r, 16);
        return;
    }
#endif
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) y[r][o] = sum16(sum[r][o]);
}

static void any_tile(const float *const *x, const float *const *w, int64_t K, int64_t R, int64_t O, float *const *y,
                     const char *ahead, int lines) {
#define ROWS(O, lines) \
    (R >= 4   ? tile(x, w, K, 4, O, y, ahead, lines) \
     : R == 3 ? tile(x, w, K, 3, O, y, ahead, lines) \
     : R == 2 ? tile(x, w, K, 2, O, y, ahead, lines) \
              : tile(x, w, K, 1, O, y, ahead, lines))
    if (O >= 4) lines == 0 ? ROWS(4, 0) : lines == 1 ? ROWS(4, 1) : lines == 2 ? ROWS(4, 2) : ROWS(4, 4);
    else O == 3 ? ROWS(3, 0) : O == 2 ? ROWS(2, 0) : ROWS(1, 0);
#undef ROWS
}

/* y[r, o] = x[r] . w[o] of vectors at any address. */
void dots(const float *const *x, int64_t rows, const float *const *w, int64_t outs, int64_t K, float *y, int64_t y_step) {
    for (int64_t o = 0; o < outs; o += 4)
        for (int64_t r = 0; r < rows; r += 4) {
            float *to[4];
            for (int i = 0; i < 4; i++) to[i] = y + (r + i) * y_step + o;
            any_tile(x + r, w + o, K, rows - r, outs - o, to, NULL, 0);
        }
}

/* One row: matrix rows one after another, so that memory is read as a single stream. */
static void stream(const float *W, const float *x, int64_t K, int64_t outs, float *y) {
    for (int64_t o = 0; o < outs; o += 16) {
        int64_t count = outs - o < 16 ? outs - o : 16;
        v16 sum[4][4];
        for (int64_t i = 0; i < count; i++) {
            const float *w = W + (o + i) * K;
            v16 s = {0};
            int64_t k = 0;
            for (; k + 16 <= K; k += 16) s += load(x + k) * load(w + k);
            if (k < K) s += load_first(x + k, K - k) * load_first(w + k, K - k);
            sum[i / 4][i % 4] = s;
        }
#ifdef __AVX512F__
        if (count == 16) {
            store(y + o, sums16(sum));
            continue;
        }
#endif
        for (int64_t i = 0; i < count; i++) y[o + i] = sum16(sum[i / 4][i % 4]);
    }
}

void product_part(const Product *p, int64_t row, int64_t row_stop, int64_t from, int64_t to) {
    int64_t K = p->in;
    if (row_stop - row == 1) {
        const float *x = p->x + (p->x_index ? p->x_index[row] : row) * p->x_step;
        stream(p->W + from * K, x, K, to - from, p->y + (p->y_index ? p->y_index[row] : row) * p->y_step + from);
        return;
    }
    int64_t tiles = (row_stop - row + 3) / 4;
    int lines = tiles >= 4 ? 1 : tiles >= 2 ? 2 : 4; /* four matrix rows, within the first tiles of those at hand */
    int64_t distance = K < 512 ? 8 : 4;
    for (int64_t o = from; o < to; o += 4) {
        const float *w[4];
        const char *ahead = (const char *)(p->W + (o + distance) * K);
        for (int i = 0; i < 4; i++) w[i] = p->W + (o + i) * K;
        for (int64_t m = row; m < row_stop; m += 4) {
            const float *x[4];
            float *y[4];
            int64_t tile = (m - row) / 4;
            int fetch = o + distance + 4 <= p->out && tile * lines < 4 ? lines : 0;
            for (int i = 0; i < 4 && m + i < row_stop; i++) {
                x[i] = p->x + (p->x_index ? p->x_index[m + i] : m + i) * p->x_step;
                y[i] = p->y + (p->y_index ? p->y_index[m + i] : m + i) * p->y_step + o;
            }
            any_tile(x, w, K, row_stop - m, to - o, y, ahead + tile * lines * (K / 16) * 64, fetch);
        }
    }
}

/* Reading a weight from memory takes about as long as six multiplications. */
int64_t product_work(const Product *p) { return p->out * p->in * (6 + p->M); }

#define ITEM_WORK 200000

int64_t product_width(const Product *p) {
    int64_t width = whole16(ITEM_WORK / (p->in * (6 + p->M)) + 1);
    return width < p->out ? width : p->out;
}

int64_t rows_per_item(int64_t M, int64_t each) {
    int64_t rows = ITEM_WORK / 8 / (each + 1) / 4 * 4;
    rows = rows < 4 ? 4 : rows;
    return rows < M ? rows : M;
}

typedef struct {
    const Product *list;
    const int64_t *end; /* items of products 0 .. i */
    int64_t count;
} Products;

/* A narrow matrix is shared row by row, a wide one output by output. */
static int is_narrow(const Product *p) { return p->out <= 48 && p->M > 4; }

static int64_t items_of(const Product *p) {
    if (is_narrow(p)) {
        int64_t rows = rows_per_item(p->M, p->in * p->out / 8);
        return (p->M + rows - 1) / rows;
    }
    int64_t width = product_width(p);
    return (p->out + width - 1) / width;
}

static void product_item(void *context, int64_t item, int thread) {
    const Products *all = context;
    int64_t i = 0;
    while (item >= all->end[i]) i++;
    const Product *p = all->list + i;
    item -= i ? all->end[i - 1] : 0;
    int64_t step = is_narrow(p) ? rows_per_item(p->M, p->in * p->out / 8) : product_width(p);
    int64_t whole = is_narrow(p) ? p->M : p->out, from = item * step, to = from + step < whole ? from + step : whole;
    if (is_narrow(p)) product_part(p, from, to, 0, p->out);
    else product_part(p, 0, p->M, from, to);
}

void products(const Product *list, int64_t count) {
    int64_t end[count], work = 0, items = 0;
    for (int64_t i = 0; i < count; i++) {
        work += product_work(list + i);
        end[i] = items += items_of(list + i);
    }
    Products all = {list, end, count};
    share(product_item, &all, items, work);
}

/* x [M, in] -> y [M, out] */
void lr_linear(const float *W, const float *x, float *y, int64_t M, int64_t out, int64_t in) {
    Product p = {.W = W, .M = M, .out = out, .in = in, .x = x, .x_step = in, .y = y, .y_step = out};
    products(&p, 1);
}

typedef struct {
    const float *x, *weight;
    float *y;
    int64_t M, n, rows;
    float eps;
} Norm;

static void norm_item(void *context, int64_t item, int thread) {
    const Norm *c = context;
    for (int64_t m = item * c->rows; m < c->M && m < (item + 1) * c->rows; m++)
        rms_norm(c->x + m * c->n, c->weight, c->n, c->eps, c->y + m * c->n);
}

void norms(const float *x, const float *weight, float *y, int64_t M, int64_t n, float eps) {
    int64_t rows = rows_per_item(M, n);
    Norm c = {x, weight, y, M, n, rows, eps};
    share(norm_item, &c, (M + rows - 1) / rows, M * n * 8);
}

/* ops/norm.py: x [M, n] -> y [M, n]; weight NULL: none. */
void lr_norm(const float *x, const float *weight, float *y, int64_t M, int64_t n, float eps) { norms(x, weight, y, M, n, eps); }
