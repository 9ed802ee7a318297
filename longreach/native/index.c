/* The indexer's scores and the selection (ops/index.py). */

#include "rows.h"

/* scores[row * step + s] = sum_h weight[row][h] relu(q[row][h] . key[s]), for up to SCORED_ROWS rows and all keys:
   sixteen keys at a time, so that all rows find them in the first cache. scratch: 16 heads floats. */
void index_scores(const float *const *q, const float *const *weight, int64_t rows, const float *const *key, int64_t count,
                  int64_t heads, int64_t width, float *scores, int64_t step, float *scratch) {
    const float *head[heads + 3];
    memset(scratch, 0, 16 * heads * sizeof(float));
    for (int64_t s = 0; s < count; s += 16) {
        int64_t some = count - s < 16 ? count - s : 16;
        for (int64_t row = 0; row < rows; row++) {
            for (int64_t h = 0; h < heads; h++) head[h] = q[row] + h * width;
            dots(head, heads, key + s, some, width, scratch, 16);
            v16 total = {0};
            for (int64_t h = 0; h < heads; h++) total += weight[row][h] * at_least(load(scratch + 16 * h), 0.0f);
            float *to = scores + row * step + s;
            some == 16 ? store(to, total) : store_first(to, total, some);
        }
    }
}

/* Indices of the k largest of `count` scores, ascending, equals to the lowest index; k < count. scratch: count floats. */
void select_top(const float *scores, int64_t count, int64_t k, float *scratch, int64_t *chosen) {
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

void lr_select_top(const float *scores, int64_t count, int64_t k, float *scratch, int64_t *chosen) {
    select_top(scores, count, k, scratch, chosen);
}

static void score_share(void *context, int64_t item, int thread) {
    const Scoring *c = context;
    int64_t from = item * SCORED_KEYS, some = c->count - from < SCORED_KEYS ? c->count - from : SCORED_KEYS;
    float scratch[16 * c->heads];
    index_scores(c->q, c->weight, c->rows, c->key + from, some, c->heads, c->width, c->scores + from, c->step, scratch);
}

/* The same, keys shared among the threads. */
void index_scores_shared(const Scoring *c) {
    int64_t work = c->rows * c->count * c->heads * c->width;
    share(score_share, (void *)c, (c->count + SCORED_KEYS - 1) / SCORED_KEYS, work);
}

/* scores[s] of one query over consecutive keys. */
int lr_index_scores(const float *q, const float *weight, const float *keys, int64_t heads, int64_t width, int64_t count,
                    float *scores) {
    const float **key = malloc((count + 1) * sizeof *key);
    if (!key) return 1;
    for (int64_t s = 0; s < count; s++) key[s] = keys + s * width;
    index_scores_shared(&(Scoring){&q, &weight, 1, key, count, heads, width, scores, 0});
    free(key);
    return 0;
}
