/* The attention sublayer of rows (model/attention.py, model/compressor.py): projections, what a sequence keeps, one softmax
   over window and entries, output. Sums over keys run in the keys' order (window, then entries, both ascending), wherever
   the keys lie. */

#include "rows.h"

/* ---- projections -------------------------------------------------------------------------------------------------------- */

static int64_t compressor_jobs(const Compressor *c, Product x, float *raw, Product *jobs) {
    if (!c->wkv) return 0;
    x.out = c->channels;
    x.y_step = 2 * c->channels;
    jobs[0] = jobs[1] = x;
    jobs[0].W = c->wkv, jobs[0].y = raw;
    jobs[1].W = c->wgate, jobs[1].y = raw + c->channels;
    return 2;
}

static void add_ape(const Compressor *c, float *raw, int64_t position) {
    if (c->wkv) add_scaled(raw + c->channels, 1.0f, c->ape + position % c->ratio * c->channels, c->channels);
}

typedef struct {
    const Attention *a;
    int64_t M, rows;
    const int64_t *position;
    const float *table;
    Projected to;
    float *o;
} Turning;

static void finish_kv(const Attention *a, float *kv, const float *turn) {
    rms_norm(kv, a->kv_norm, a->H, a->eps, kv);
    rotate(kv, turn, a->H, a->rope, 1);
}

static void turn_rows(void *context, int64_t item, int thread) {
    const Turning *c = context;
    const Attention *a = c->a;
    const Projected *to = &c->to;
    int64_t NH = a->N * a->H, heads = a->index_wq_b ? a->index_heads : 0, width = a->index_dim;
    for (int64_t m = item * c->rows; m < c->M && m < (item + 1) * c->rows; m++) {
        const float *turn = c->table + m * a->rope;
        for (int64_t h = 0; h < a->N; h++) {
            float *q = to->q + m * NH + h * a->H;
            rms_norm(q, NULL, a->H, a->eps, q);
            rotate(q, turn, a->H, a->rope, 1);
        }
        finish_kv(a, to->kv + m * a->H, turn);
        add_ape(&a->compressor, to->raw + m * 2 * a->compressor.channels, c->position[m]);
        if (heads) add_ape(&a->index_compressor, to->index_raw + m * 2 * a->index_compressor.channels, c->position[m]);
        for (int64_t h = 0; h < heads; h++) {
            rotate(to->index_q + (m * heads + h) * width, turn, width, a->rope, 1);
            to->index_weight[m * heads + h] *= a->index_scale;
        }
    }
}

/* x [M, D] at position[M] -> q [M, N, H] rotated, kv [M, H] rotated, and what the layer's compressors and indexer take.
   table [M, rope]: (cos, sin) pairs. */
void attention_in(const Attention *a, int64_t M, const float *x, const int64_t *position, const float *table, Projected to) {
    int64_t D = a->D, NH = a->N * a->H, heads = a->index_wq_b ? a->index_heads : 0, width = a->index_dim, count = 2;
    Product from_x = {.M = M, .in = D, .x = x, .x_step = D}, jobs[8];
    jobs[0] = jobs[1] = from_x;
    jobs[0].W = a->wq_a, jobs[0].y = to.low, jobs[0].out = jobs[0].y_step = a->rank;
    jobs[1].W = a->wkv, jobs[1].y = to.kv, jobs[1].out = jobs[1].y_step = a->H;
    count += compressor_jobs(&a->compressor, from_x, to.raw, jobs + count);
    if (heads) {
        count += compressor_jobs(&a->index_compressor, from_x, to.index_raw, jobs + count);
        jobs[count] = from_x;
        jobs[count].W = a->index_weights, jobs[count].y = to.index_weight, jobs[count].out = jobs[count].y_step = heads;
        count++;
    }
    products(jobs, count);
    norms(to.low, a->q_norm, to.low, M, a->rank, a->eps);
    Product from_low = {.M = M, .in = a->rank, .x = to.low, .x_step = a->rank};
    jobs[0] = jobs[1] = from_low;
    jobs[0].W = a->wq_b, jobs[0].y = to.q, jobs[0].out = jobs[0].y_step = NH;
    jobs[1].W = a->index_wq_b, jobs[1].y = to.index_q, jobs[1].out = jobs[1].y_step = heads * width;
    products(jobs, heads ? 2 : 1);
    int64_t rows = rows_per_item(M, NH);
    Turning c = {a, M, rows, position, table, to, NULL};
    share(turn_rows, &c, (M + rows - 1) / rows, M * NH * 8);
}

void lr_attention_in(const Attention *a, int64_t M, const float *x, const int64_t *position, const float *table, float *low,
                     float *q, float *kv, float *raw, float *index_q, float *index_weight, float *index_raw) {
    attention_in(a, M, x, position, table, (Projected){low, q, kv, raw, index_q, index_weight, index_raw});
}

static void turn_back_rows(void *context, int64_t item, int thread) {
    const Turning *c = context;
    const Attention *a = c->a;
    for (int64_t m = item * c->rows; m < c->M && m < (item + 1) * c->rows; m++)
        for (int64_t h = 0; h < a->N; h++)
            rotate(c->o + (m * a->N + h) * a->H, c->table + m * a->rope, a->H, a->rope, -1);
}

/* o [M, N, H] -> y [M, D]: rotate back, then the grouped low-rank projection. low: M * groups * o_rank floats. */
void attention_out(const Attention *a, int64_t M, float *o, const float *table, float *low, float *y) {
    int64_t NH = a->N * a->H, in = NH / a->groups, G = a->groups, R = a->o_rank, rows = rows_per_item(M, a->N * a->rope);
    Turning c = {.a = a, .M = M, .rows = rows, .table = table, .o = o};
    share(turn_back_rows, &c, (M + rows - 1) / rows, M * a->N * a->rope * 4);
    Product jobs[G];
    for (int64_t g = 0; g < G; g++)
        jobs[g] = (Product){.W = a->wo_a + g * R * in, .M = M, .out = R, .in = in, .x = o + g * in, .x_step = NH,
                            .y = low + g * R, .y_step = G * R};
    products(jobs, G);
    Product last = {.W = a->wo_b, .M = M, .out = a->D, .in = G * R, .x = low, .x_step = G * R, .y = y, .y_step = a->D};
    products(&last, 1);
}

void lr_attention_out(const Attention *a, int64_t M, float *o, const float *table, float *low, float *y) {
    attention_out(a, M, o, table, low, y);
}

/* table[m] = (cos, sin) of position[m] * frequency, in float32 as ops/rope.py. */
void lr_rope_table(const float *frequencies, int64_t pairs, const int64_t *position, int64_t M, float *table) {
    for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < pairs; i++) {
            float angle = (float)position[m] * frequencies[i];
            table[(m * pairs + i) * 2] = cosf(angle);
            table[(m * pairs + i) * 2 + 1] = sinf(angle);
        }
}

/* ---- the mean of keys ------------------------------------------------------------------------------------------------------ */

/* o[r] += sum_s p[r * step + s] key[s], R heads x C vectors of channels from `channel`, the last of `last` lanes. */
INLINE void mix(const float *const *key, const float *p, int64_t step, int64_t from, int64_t to, int64_t channel, int R,
                int C, int64_t last, float *o, int64_t H) {
    v16 sum[4][4];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            float *at = o + r * H + channel + 16 * c;
            sum[r][c] = last == 16 ? load(at) : load_first(at, last);
        }
    for (int64_t s = from; s < to; s++) {
        v16 k[4];
        for (int c = 0; c < C; c++) {
            const float *at = key[s] + channel + 16 * c;
            k[c] = last == 16 ? load(at) : load_first(at, last);
        }
        for (int r = 0; r < R; r++) {
            v16 weight = all(p[r * step + s]);
            for (int c = 0; c < C; c++) sum[r][c] += weight * k[c];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            float *at = o + r * H + channel + 16 * c;
            last == 16 ? store(at, sum[r][c]) : store_first(at, sum[r][c], last);
        }
}

static void mix_heads(const float *const *key, const float *p, int64_t step, int64_t from, int64_t to, int64_t heads,
                      float *o, int64_t H) {
    for (int64_t h = 0; h < heads; h += 4) {
        int64_t channel = 0, R = heads - h;
        const float *w = p + h * step;
        float *y = o + h * H;
#define SOME(C, last) \
    (R >= 4 ? mix(key, w, step, from, to, channel, 4, C, last, y, H) \
     : R == 3 ? mix(key, w, step, from, to, channel, 3, C, last, y, H) \
     : R == 2 ? mix(key, w, step, from, to, channel, 2, C, last, y, H) \
              : mix(key, w, step, from, to, channel, 1, C, last, y, H))
        for (; channel + 64 <= H; channel += 64) SOME(4, 16);
        for (; channel + 16 <= H; channel += 16) SOME(1, 16);
        if (channel < H) SOME(1, H - channel);
#undef SOME
    }
}

/* One query's heads [head, head_stop) over S keys (= values), one softmax with the sink: out [N, H].
   p: HEADS_AT_ONCE * whole16(S) floats. Keys are taken a first cache full at a time, for up to HEADS_AT_ONCE heads. */
void attend(const Attention *a, const float *q, const float *const *key, int64_t S, int64_t head, int64_t head_stop,
            float *p, float *out) {
    enum { KEYS = 32 };
    int64_t H = a->H, step = whole16(S);
    for (; head < head_stop; head += HEADS_AT_ONCE) {
        int64_t heads = head_stop - head < HEADS_AT_ONCE ? head_stop - head : HEADS_AT_ONCE;
        const float *rows[HEADS_AT_ONCE + 3];
        for (int64_t h = 0; h < heads; h++) rows[h] = q + (head + h) * H;
        for (int64_t s = 0; s < S; s += KEYS) dots(rows, heads, key + s, S - s < KEYS ? S - s : KEYS, H, p + s, step);
        float *o = out + head * H, inverse[HEADS_AT_ONCE];
        for (int64_t h = 0; h < heads; h++) {
            float *w = p + h * step, sink = a->sink[head + h], largest = sink;
            v16 most = all(sink), sum = {0};
            for (int64_t s = S; s < step; s++) w[s] = -INFINITY;
            for (int64_t s = 0; s < step; s += 16) {
                v16 logit = load(w + s) * a->scale;
                store(w + s, logit);
                most = pick(logit > most, logit, most);
            }
            for (int i = 0; i < 16; i++) largest = most[i] > largest ? most[i] : largest;
            for (int64_t s = 0; s < step; s += 16) {
                v16 weight = exp16(load(w + s) - largest);
                store(w + s, weight);
                sum += weight;
            }
            inverse[h] = 1.0f / (sum16(sum) + exp1(sink - largest));
        }
        memset(o, 0, heads * H * sizeof(float));
        for (int64_t s = 0; s < S; s += KEYS) mix_heads(key, p, step, s, S - s < KEYS ? S : s + KEYS, heads, o, H);
        for (int64_t h = 0; h < heads; h++) EACH16(i, H) PUT(o + h * H, i, GET(o + h * H, i) * inverse[h]);
    }
}

typedef struct {
    const Attention *a;
    const float *q, *const *key;
    int64_t S, each;
    float *p, *out;
} One;

static void attend_four(void *context, int64_t item, int thread) {
    const One *c = context;
    int64_t head = 4 * item, stop = head + 4 < c->a->N ? head + 4 : c->a->N;
    attend(c->a, c->q, c->key, c->S, head, stop, c->p + item * c->each, c->out);
}

/* One query over keys in up to two runs of memory. */
int lr_attend(const Attention *a, const float *q, const float *local, int64_t local_count, const float *extra,
              int64_t extra_count, float *out) {
    int64_t S = local_count + extra_count, units = (a->N + 3) / 4, each = HEADS_AT_ONCE * whole16(S) + 32;
    const float **key = malloc((S + 3) * sizeof(float *));
    float *p = aligned_alloc(64, (size_t)(units * each + 16) / 16 * 64);
    if (!key || !p) return free(key), free(p), 1;
    for (int64_t s = 0; s < S; s++) key[s] = s < local_count ? local + s * a->H : extra + (s - local_count) * a->H;
    One c = {a, q, key, S, each, p, out};
    share(attend_four, &c, units, a->N * S * a->H * 2);
    free(key);
    free(p);
    return 0;
}

/* ---- what a sequence keeps --------------------------------------------------------------------------------------------------- */

/* Put t more rows into a sliding buffer that must keep the last `keep`: model/stores.py, Recent.push. Returns its new lo. */
static int64_t push(float *buffer, int64_t keep, int64_t width, int64_t lo, int64_t hi, const float *values, int64_t t) {
    int64_t held = hi - lo;
    if (held + t > keep + REWIND) {
        int64_t stay = keep - t;
        memmove(buffer, buffer + (held - stay) * width, stay * width * sizeof(float));
        lo = hi - stay;
        held = stay;
    }
    memcpy(buffer + held * width, values, t * width * sizeof(float));
    return lo;
}

/* Addresses of entries in ascending order. */
typedef struct {
    const Entries *entries;
    int64_t width, piece, first, stop; /* the piece at hand holds entries [first, stop) */
    float *at;
} Cursor;

static Cursor cursor(const Entries *entries, int64_t width) { return (Cursor){entries, width, -1, 0, 0, NULL}; }

static float *entry_at(Cursor *c, int64_t s) {
    const Entries *e = c->entries;
    if (s >= c->stop) {
        if (e->start) {
            do c->piece++;
            while (s >= e->start[c->piece + 1]);
            c->first = e->start[c->piece];
            c->stop = e->start[c->piece + 1];
        } else {
            c->piece = s / e->size;
            c->first = c->piece * e->size;
            c->stop = c->first + e->size;
        }
        c->at = (float *)(e->base + e->at[c->piece] * e->step);
    }
    return c->at + (s - c->first) * c->width;
}

/* Entries of the blocks that tokens [first, first + count) complete: pooled, normed, rotated, put in their places. */
static void complete(const Compressor *c, const float *raw, int64_t lo, int64_t first, int64_t count, int64_t held,
                     const Entries *entries, const float *frequencies, int64_t rope) {
    int64_t m = c->ratio, C = c->channels, w = c->overlap ? C / 2 : C, own = c->overlap ? w : 0;
    float turn[rope];
    Cursor place = cursor(entries, w);
    for (int64_t i = first / m; i < (first + count) / m; i++) {
        if ((i + 1) * m <= held) continue;
        float *entry = entry_at(&place, i);
        const float *block = raw + (i * m - lo) * 2 * C;
        int64_t back = c->overlap && i ? m : 0; /* slots of the block before, through the first half of the channels */
        EACH16(d, w) {
            v16 most = all(-INFINITY), sum = {0}, total = {0};
            for (int64_t j = -back; j < m; j++) {
                v16 gate = GET(block + j * 2 * C + C + (j < 0 ? 0 : own), d);
                most = pick(gate > most, gate, most);
            }
            for (int64_t j = -back; j < m; j++) {
                const float *slot = block + j * 2 * C + (j < 0 ? 0 : own);
                v16 weight = exp16(GET(slot + C, d) - most);
                sum += weight;
                total += weight * GET(slot, d);
            }
            PUT(entry, d, total / sum);
        }
        rms_norm(entry, c->norm, w, c->eps, entry);
        for (int64_t k = 0; k < rope / 2; k++) {
            float angle = (float)(i * m) * frequencies[k];
            turn[2 * k] = cosf(angle);
            turn[2 * k + 1] = sinf(angle);
        }
        rotate(entry, turn, w, rope, 1);
    }
}

/* ---- many rows ------------------------------------------------------------------------------------------------------------------ */

typedef struct { /* a segment's rows of one round, after they have been put into its stores */
    const Segment *segment;
    int64_t row, first, count, window_lo;
} Round;

static void remember(const Attention *a, const Segment *s, Projected from, int64_t offset, int64_t count, int64_t *window_lo,
                     int64_t *raw_lo) {
    int64_t row = s->row + offset, first = s->first + offset, H = a->H;
    if (a->window) *window_lo = push(s->window, a->window - 1 + REWIND, H, *window_lo, first, from.kv + row * H, count);
    if (a->ratio == 1) { /* dense attention: every token is an entry */
        Cursor place = cursor(&s->entries, H);
        for (int64_t i = 0; i < count; i++)
            if (first + i >= s->held) memcpy(entry_at(&place, first + i), from.kv + (row + i) * H, H * sizeof(float));
    }
    int64_t lo = *raw_lo;
    const Compressor *both[2] = {&a->compressor, &a->index_compressor};
    for (int i = 0; i < 2; i++) {
        const Compressor *c = both[i];
        if (!c->wkv) continue;
        int64_t width = 2 * c->channels, keep = (c->overlap ? 2 : 1) * c->ratio - 1 + REWIND;
        float *buffer = i ? s->index_raw : s->raw;
        *raw_lo = push(buffer, keep, width, lo, first, (i ? from.index_raw : from.raw) + row * width, count);
        complete(c, buffer, *raw_lo, first, count, s->held, i ? &s->index_entries : &s->entries, a->frequencies, a->rope);
    }
}

/* Put into the windows of a sliding layer what it keeps of rows x [M, D], but for the last row of each segment, which is all
   that stays in it. kv: M * H floats. */
void remember_all_but_last(const Attention *a, int64_t M, const float *x, const float *table, float *kv, Segment *segments,
                           int64_t num_segments) {
    int64_t H = a->H;
    Product p = {.W = a->wkv, .M = M, .out = H, .in = a->D, .x = x, .x_step = a->D, .y = kv, .y_step = H};
    products(&p, 1);
    for (int64_t m = 0; m < M; m++) finish_kv(a, kv + m * H, table + m * a->rope);
    for (Segment *s = segments; s < segments + num_segments; s++)
        while (s->count > 1) {
            int64_t count = s->count - 1 < REWIND ? s->count - 1 : REWIND;
            s->window_lo = push(s->window, a->window - 1 + REWIND, H, s->window_lo, s->first, kv + s->row * H, count);
            s->row += count, s->first += count, s->count -= count;
        }
}

static int64_t visible(const Attention *a, int64_t position) { return a->ratio ? (position + 1) / a->ratio : 0; }

typedef struct { /* one round of attend_rows */
    const Attention *a;
    const Rows *r;
    Projected from;
    float *out;
    const Round *rounds;
    const int64_t *row_of, *round_of, *group; /* rows of the round; group g of SCORED_ROWS rows begins at group[g] */
    int64_t num_groups, split, scored, key_step, p_step, *chosen;
    const float **key;  /* per thread, key_step apart */
    float *p, *scores, *products; /* the same, p_step, (SCORED_ROWS + 1) scored and 16 heads + 32 apart */
} Attending;

/* Entries of one group's rows: scores, then the best of each. */
static void select_group(void *context, int64_t g, int thread) {
    const Attending *c = context;
    const Attention *a = c->a;
    const Round *now = c->rounds + c->round_of[c->group[g]];
    int64_t row = c->row_of[c->group[g]], some = c->group[g + 1] - c->group[g], width = a->index_dim, heads = a->index_heads;
    int64_t last = now->first + row - now->row + some - 1, count = visible(a, last), k = a->topk;
    if (count <= k) return;
    const float **key = c->key + thread * c->key_step, *q[SCORED_ROWS], *weight[SCORED_ROWS];
    float *scores = c->scores + thread * (SCORED_ROWS + 1) * c->scored;
    Cursor place = cursor(&now->segment->index_entries, width);
    for (int64_t s = 0; s < count; s++) key[s] = entry_at(&place, s);
    for (int64_t i = 0; i < some; i++) {
        q[i] = c->from.index_q + (row + i) * heads * width;
        weight[i] = c->from.index_weight + (row + i) * heads;
    }
    if (c->num_groups == 1) /* a single sequence decodes: its keys are shared among the threads */
        index_scores_shared(&(Scoring){q, weight, some, key, count, heads, width, scores, c->scored});
    else
        index_scores(q, weight, some, key, count, heads, width, scores, c->scored, c->products + thread * (16 * heads + 32));
    for (int64_t i = 0; i < some; i++) {
        int64_t seen = visible(a, last - some + 1 + i);
        if (seen > k) select_top(scores + i * c->scored, seen, k, scores + SCORED_ROWS * c->scored, c->chosen + (row + i) * k);
    }
}

/* One row, or some of its heads. */
static void attend_row(void *context, int64_t unit, int thread) {
    const Attending *c = context;
    const Attention *a = c->a;
    const Rows *r = c->r;
    int64_t row = c->row_of[unit / c->split], part = unit % c->split, H = a->H, k = a->topk, S = 0;
    const Round *now = c->rounds + c->round_of[unit / c->split];
    int64_t position = now->first + row - now->row, seen = visible(a, position), count = seen;
    const float **key = c->key + thread * c->key_step;
    if (a->window) {
        int64_t at = position - a->window + 1 > 0 ? position - a->window + 1 : 0;
        if (at < now->window_lo) at = now->window_lo;
        for (; at <= position; at++) key[S++] = now->segment->window + (at - now->window_lo) * H;
    }
    const int64_t *list = NULL;
    if (a->index_wq_b && !r->dense) {
        if (r->selection_in) list = r->selection_in + row * r->selection_width, count = r->selection_width;
        else if (seen > k) list = c->chosen + row * k, count = k;
    }
    int64_t *report = r->selection && part == 0 ? r->selection + row * k : NULL, reported = 0;
    Cursor place = cursor(&now->segment->entries, H);
    for (int64_t s = 0; s < count; s++) {
        int64_t entry = list ? list[s] : s;
        if (entry < 0 || entry >= seen) continue;
        if (entry < place.first) place = cursor(&now->segment->entries, H); /* a given list may go back */
        key[S++] = entry_at(&place, entry);
        if (report && reported < k) report[reported++] = entry;
    }
    if (report)
        while (reported < k) report[reported++] = -1;
    int64_t head = c->split > 1 ? 4 * part : 0, stop = c->split > 1 && head + 4 < a->N ? head + 4 : a->N;
    attend(a, c->from.q + row * a->N * H, key, S, head, stop, c->p + thread * c->p_step, c->out + row * a->N * H);
}

/* Attention of all rows over what their sequences keep, after putting them there: from -> out [M, N, H].
   REWIND tokens of each sequence at a time, so that the sliding buffers hold what the first of them sees. */
void attend_rows(const Attention *a, const Rows *r, Projected from, float *out, Space *space) {
    int64_t threads = num_threads, most = 0, k = a->topk, longest = 0;
    for (int64_t i = 0; i < r->num_segments; i++) {
        int64_t seen = visible(a, r->segments[i].first + r->segments[i].count - 1);
        most = seen > most ? seen : most;
        longest = r->segments[i].count > longest ? r->segments[i].count : longest;
    }
    int selects = a->index_wq_b && !r->dense;
    int64_t at_once = most; /* entries of one row */
    if (selects && r->selection_in) at_once = r->selection_width;
    else if (selects && most > k) at_once = k;
    int64_t scored = selects && !r->selection_in && most > k ? most + 16 : 0, keys = a->window + at_once + 3;
    Attending c = {.a = a, .r = r, .from = from, .out = out, .scored = scored};
    c.key_step = keys > scored ? keys : scored;
    c.p_step = HEADS_AT_ONCE * whole16(keys) + 32;
    Round *rounds = TAKE(space, Round, r->num_segments);
    int64_t *window_lo = TAKE(space, int64_t, r->num_segments), *raw_lo = TAKE(space, int64_t, r->num_segments);
    int64_t *row_of = TAKE(space, int64_t, r->M), *round_of = TAKE(space, int64_t, r->M);
    int64_t *group = TAKE(space, int64_t, r->M + 1);
    c.chosen = TAKE(space, int64_t, scored ? r->M * k : 0);
    c.key = TAKE(space, const float *, threads * c.key_step);
    c.p = TAKE(space, float, threads * c.p_step);
    c.scores = TAKE(space, float, threads * (SCORED_ROWS + 1) * scored);
    c.products = TAKE(space, float, threads * (16 * a->index_heads + 32));
    c.rounds = rounds, c.row_of = row_of, c.round_of = round_of, c.group = group;
    if (!space->base) return;
    for (int64_t i = 0; i < r->num_segments; i++) window_lo[i] = r->segments[i].window_lo, raw_lo[i] = r->segments[i].raw_lo;

    for (int64_t offset = 0; offset < longest; offset += REWIND) {
        int64_t num_rounds = 0, rows = 0, pairs = 0;
        c.num_groups = 0;
        for (int64_t i = 0; i < r->num_segments; i++) {
            const Segment *s = r->segments + i;
            int64_t count = s->count - offset < REWIND ? s->count - offset : REWIND;
            if (count <= 0) continue;
            remember(a, s, from, offset, count, window_lo + i, raw_lo + i);
            rounds[num_rounds] = (Round){s, s->row + offset, s->first + offset, count, window_lo[i]};
            for (int64_t j = 0; j < count; j++) {
                if (j % SCORED_ROWS == 0) group[c.num_groups++] = rows;
                row_of[rows] = s->row + offset + j;
                round_of[rows++] = num_rounds;
                pairs += visible(a, s->first + offset + j);
            }
            num_rounds++;
        }
        group[c.num_groups] = rows;
        if (scored && c.num_groups == 1) select_group(&c, 0, 0);
        else if (scored) share(select_group, &c, c.num_groups, pairs * a->index_heads * a->index_dim);
        c.split = rows < threads ? (a->N + 3) / 4 : 1; /* a few rows are shared among the threads head by head */
        share(attend_row, &c, rows * c.split, rows * a->N * a->H * (a->window + at_once) * 2);
    }
}
