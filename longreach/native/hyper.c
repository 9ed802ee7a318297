/* Residual streams (ops/hyper.py). Coefficients of sixteen rows at a time, one lane each: Sinkhorn's small steps are then
   as many vector operations for sixteen rows as for one. */

#include "rows.h"

/* m[j * n + k] of sixteen rows. */
static void sinkhorn16(v16 *m, int64_t n, int64_t iters, float eps) {
    for (int64_t j = 0; j < n; j++) {
        v16 largest = m[j * n], sum = {0};
        for (int64_t k = 1; k < n; k++) largest = pick(m[j * n + k] > largest, m[j * n + k], largest);
        for (int64_t k = 0; k < n; k++) sum += m[j * n + k] = exp16(m[j * n + k] - largest);
        for (int64_t k = 0; k < n; k++) m[j * n + k] = m[j * n + k] / sum + eps;
    }
    for (int64_t step = 0; step < 2 * iters - 1; step++) { /* columns first and last */
        int64_t along = step % 2 ? 1 : n, across = step % 2 ? n : 1;
        for (int64_t k = 0; k < n; k++) {
            v16 sum = all(eps);
            for (int64_t j = 0; j < n; j++) sum += m[k * across + j * along];
            v16 inverse = 1.0f / sum;
            for (int64_t j = 0; j < n; j++) m[k * across + j * along] *= inverse;
        }
    }
}

/* u = norm(sum_j pre[j] X_j) */
static void mix_in(const float *X, const float *pre, int64_t n, int64_t D, const float *norm, float eps, float *u) {
    EACH16(d, D) {
        v16 sum = {0};
        for (int64_t j = 0; j < n; j++) sum += pre[j] * GET(X + j * D, d);
        PUT(u, d, sum);
    }
    rms_norm(u, norm, D, eps, u);
}

typedef struct {
    const Hyper *h;
    int64_t M, rows;
    const float *from, *y, *z;
    float *streams, *x, *post, *comb;
} Mixing;

static void enter_sixteen(void *context, int64_t item, int thread) {
    const Mixing *c = context;
    const Hyper *h = c->h;
    int64_t n = h->n, D = h->D, width = (2 + n) * n, first = 16 * item, rows = c->M - first < 16 ? c->M - first : 16;
    v16 k16[width];
    memset(k16, 0, sizeof k16);
    for (int64_t i = 0; i < rows; i++) {
        float r = inverse_rms(c->from + (first + i) * n * D, n * D, h->norm_eps);
        for (int64_t k = 0; k < width; k++) k16[k][i] = c->z[(first + i) * width + k] * r;
    }
    for (int64_t k = 0; k < width; k++) k16[k] = h->scale[k < n ? 0 : k < 2 * n ? 1 : 2] * k16[k] + h->base[k];
    for (int64_t j = 0; j < n; j++) {
        k16[j] = sigmoid16(k16[j]) + h->eps;
        k16[n + j] = 2.0f * sigmoid16(k16[n + j]);
    }
    if (h->constrained) sinkhorn16(k16 + 2 * n, n, h->iters, h->eps);
    for (int64_t i = 0; i < rows; i++) {
        int64_t m = first + i;
        float pre[n];
        for (int64_t j = 0; j < n; j++) pre[j] = k16[j][i];
        for (int64_t j = 0; j < n; j++) c->post[m * n + j] = k16[n + j][i];
        for (int64_t k = 0; k < n * n; k++) c->comb[m * n * n + k] = k16[2 * n + k][i];
        mix_in(c->from + m * n * D, pre, n, D, h->norm, h->input_eps, c->x + m * D);
    }
}

/* streams [M, n, D] -> the sublayer's normed input x [M, D], post [M, n], comb [M, n, n]. z: M * (2 + n) n floats. */
void hyper_enter(const Hyper *h, int64_t M, const float *streams, float *z, float *x, float *post, float *comb) {
    int64_t n = h->n, D = h->D, width = (2 + n) * n;
    Product p = {.W = h->fn, .M = M, .out = width, .in = n * D, .x = streams, .x_step = n * D, .y = z, .y_step = width};
    products(&p, 1);
    Mixing c = {.h = h, .M = M, .from = streams, .z = z, .x = x, .post = post, .comb = comb};
    share(enter_sixteen, &c, (M + 15) / 16, M * n * D * 8);
}

static void leave_rows(void *context, int64_t item, int thread) {
    const Mixing *c = context;
    int64_t n = c->h->n, D = c->h->D;
    for (int64_t m = item * c->rows; m < c->M && m < (item + 1) * c->rows; m++) {
        float *X = c->streams + m * n * D;
        const float *comb = c->comb + m * n * n;
        EACH16(d, D) {
            v16 mixed[n], part = GET(c->y + m * D, d);
            for (int64_t k = 0; k < n; k++) mixed[k] = c->post[m * n + k] * part;
            for (int64_t j = 0; j < n; j++) {
                v16 stream = GET(X + j * D, d);
                for (int64_t k = 0; k < n; k++) mixed[k] += comb[j * n + k] * stream;
            }
            for (int64_t k = 0; k < n; k++) PUT(X + k * D, d, mixed[k]);
        }
    }
}

/* streams <- post y + comb^T streams, in place. */
void hyper_leave(const Hyper *h, int64_t M, float *streams, const float *y, const float *post, const float *comb) {
    int64_t each = h->n * h->D, rows = rows_per_item(M, each);
    Mixing c = {.h = h, .M = M, .rows = rows, .streams = streams, .y = y, .post = (float *)post, .comb = (float *)comb};
    share(leave_rows, &c, (M + rows - 1) / rows, M * each * 8);
}

void lr_hyper_enter(const Hyper *h, int64_t M, const float *streams, float *z, float *x, float *post, float *comb) {
    hyper_enter(h, M, streams, z, x, post, comb);
}

void lr_hyper_leave(const Hyper *h, int64_t M, float *streams, const float *y, const float *post, const float *comb) {
    hyper_leave(h, M, streams, y, post, comb);
}

static void collapse_rows(void *context, int64_t item, int thread) {
    const Mixing *c = context;
    const Hyper *h = c->h;
    int64_t n = h->n, D = h->D;
    for (int64_t m = item * c->rows; m < c->M && m < (item + 1) * c->rows; m++) {
        const float *X = c->from + m * n * D;
        float r = inverse_rms(X, n * D, h->norm_eps), pre[n];
        for (int64_t j = 0; j < n; j++) pre[j] = sigmoid1(h->scale[0] * (c->z[m * n + j] * r) + h->base[j]) + h->eps;
        mix_in(X, pre, n, D, h->norm, h->input_eps, c->x + m * D);
    }
}

/* streams [M, n, D] -> normed hidden [M, D]: the collapse and the final norm. h->fn is [n, nD], h->scale one number.
   z: M * n floats. */
void lr_collapse(const Hyper *h, int64_t M, const float *streams, float *z, float *hidden) {
    int64_t n = h->n, each = n * h->D, rows = rows_per_item(M, each);
    Product p = {.W = h->fn, .M = M, .out = n, .in = each, .x = streams, .x_step = each, .y = z, .y_step = n};
    products(&p, 1);
    Mixing c = {.h = h, .M = M, .rows = rows, .from = streams, .z = z, .x = hidden};
    share(collapse_rows, &c, (M + rows - 1) / rows, M * each * 8);
}
