/* Products of rows with matrices, one vector of sixteen partial sums per output: up to four rows in a stream, more in tiles of
   4 rows x 4 outputs.

   An output's sixteen sums run over the channels from first to last and are then halved; streams and tiles only decide which
   outputs are under way together, so one row or a thousand give the same bits. A matrix row is read once from memory while
   the rows of x pass by; a few rows find the matrix read from end to end, which is all that a memory-bound product can be. */

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
    if (O >= 4) lines == 0 ? ROWS(4, 0) : lines == 1 ? ROWS(4, 1) : ROWS(4, 2);
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

/* R rows, up to four: matrix rows in order, O side by side, so that memory is read from end to end. With one row the
   processor foresees that by itself. With more, or where a matrix row is long, it has to be told AHEAD bytes before:
   measured at two rows, 18 GB/s became 26. Nothing is fetched from beyond the matrix. */
#define AHEAD 24576

INLINE void stream(const float *W, const char *end, const float *const *x, int64_t K, int64_t outs, float *const *y, int R,
                   int O, int fetches) {
    for (int64_t first = 0; first < outs; first += 16) {
        int64_t count = outs - first < 16 ? outs - first : 16;
        v16 sum[4][4][4]; /* of row r and output first + o: sum[r][o / 4][o % 4] */
        if (count < 16) memset(sum, 0, sizeof sum);
        for (int64_t o = 0; o < count; o += O) {
            const float *w = W + (first + o) * K;
            const char *ahead = (const char *)w + AHEAD;
            int fetch = fetches && ahead < end;
            int64_t step[4] = {0}, k = 0; /* outputs that the last block lacks are made of its first row and dropped */
            for (int j = 1; j < O; j++) step[j] = o + j < count ? j * K : 0;
            v16 s[4][4] = {{{0}}};
            for (; k + 16 <= K; k += 16) {
                v16 a[4];
                if (fetch)
                    for (int j = 0; j < O; j++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
                for (int r = 0; r < R; r++) a[r] = load(x[r] + k);
                for (int j = 0; j < O; j++) {
                    v16 b = load(w + step[j] + k);
                    for (int r = 0; r < R; r++) s[r][j] += a[r] * b;
                }
            }
            if (k < K)
                for (int j = 0; j < O; j++) {
                    v16 b = load_first(w + step[j] + k, K - k);
                    for (int r = 0; r < R; r++) s[r][j] += load_first(x[r] + k, K - k) * b;
                }
            for (int r = 0; r < R; r++)
                for (int j = 0; j < O && o + j < 16; j++) sum[r][(o + j) / 4][(o + j) % 4] = s[r][j];
        }
        for (int r = 0; r < R; r++) {
#ifdef __AVX512F__
            v16 all_of_them = sums16(sum[r]);
            count == 16 ? store(y[r] + first, all_of_them) : store_first(y[r] + first, all_of_them, count);
#else
            for (int64_t o = 0; o < count; o++) y[r][first + o] = sum16(sum[r][o / 4][o % 4]);
#endif
        }
    }
}

#define LONG_ROW 1024 /* channels from which on four matrix rows side by side are faster than one or two: 27 GB/s for 18 */

static void few(const Product *p, int64_t row, int64_t count, int64_t from, int64_t to) {
    int64_t K = p->in, outs = to - from;
    const float *W = p->W + from * K, *x[4];
    const char *end = (const char *)(p->W + p->out * K);
    float *y[4];
    for (int64_t i = 0; i < count; i++) {
        x[i] = p->x + (p->x_index ? p->x_index[row + i] : row + i) * p->x_step;
        y[i] = p->y + (p->y_index ? p->y_index[row + i] : row + i) * p->y_step + from;
    }
    if (count == 1) K < LONG_ROW ? stream(W, end, x, K, outs, y, 1, 1, 0) : stream(W, end, x, K, outs, y, 1, 4, 1);
    else if (count == 2) K < LONG_ROW ? stream(W, end, x, K, outs, y, 2, 2, 1) : stream(W, end, x, K, outs, y, 2, 4, 1);
    else if (count == 3) stream(W, end, x, K, outs, y, 3, 4, 1);
    else stream(W, end, x, K, outs, y, 4, 4, 1);
}

void product_part(const Product *p, int64_t row, int64_t row_stop, int64_t from, int64_t to) {
    int64_t K = p->in;
    if (row_stop - row <= 4) {
        if (row < row_stop) few(p, row, row_stop - row, from, to);
        return;
    }
    int64_t tiles = (row_stop - row + 3) / 4;
    int lines = tiles >= 4 ? 1 : 2; /* four matrix rows, within the first tiles of those at hand */
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
    int64_t items = (product_work(p) + ITEM_WORK - 1) / ITEM_WORK, width = (p->out + items - 1) / items;
    width = width < 16 ? (width + 3) / 4 * 4 : whole16(width);
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
