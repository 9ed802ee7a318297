/* Mixture of experts (ops/moe.py): rows grouped by expert, so that each expert's matrices are read once per pass. A row's
   sum runs over its shared expert, then over its chosen ones in their order, whoever else was in the pass. */

#include "rows.h"

/* Which experts row x goes to, `mine` [K], and scores [E]. ranked: E floats. */
static void choose(const Mixture *e, const int64_t *given, int64_t token, float *scores, float *ranked, int64_t *mine) {
    int64_t E = e->E, K = e->K;
    if (e->scoring == 2) {
        float largest = scores[0], sum = 0;
        for (int64_t i = 1; i < E; i++) largest = scores[i] > largest ? scores[i] : largest;
        for (int64_t i = 0; i < E; i++) sum += scores[i] = expf(scores[i] - largest);
        for (int64_t i = 0; i < E; i++) scores[i] /= sum;
    } else
        for (int64_t i = 0; i < E; i++)
            scores[i] = e->scoring == 1 ? 1.0f / (1.0f + expf(-scores[i]))
                                        : sqrtf(scores[i] > 20 ? scores[i] : log1pf(expf(scores[i])));
    if (given || e->table) {
        memcpy(mine, given ? given : e->table + token * K, K * sizeof(int64_t));
        return;
    }
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

typedef struct { /* one expert and its rows */
    Product gate, up, down;
    const float *weight; /* of each row, or NULL for 1 */
} Job;

/* gate <- weight silu(min(gate, limit)) clamp(up), columns [from, to) of all rows. */
static void activate(const Mixture *e, const Job *job, int64_t from, int64_t to) {
    for (int64_t m = 0; m < job->gate.M; m++) {
        float *gate = job->gate.y + m * job->gate.y_step + from, *up = job->up.y + m * job->up.y_step + from;
        float weight = job->weight ? job->weight[m] : 1.0f;
        EACH16(i, to - from) {
            v16 g = GET(gate, i), u = GET(up, i);
            if (e->limit > 0) g = at_most(g, e->limit), u = at_least(at_most(u, e->limit), -e->limit);
            PUT(gate, i, g * sigmoid16(g) * u * weight);
        }
    }
}

static void set_job(Job *job, const float *w1, const float *w3, const float *w2, int64_t D, int64_t f, int64_t M,
                    const float *x, const int64_t *x_index, const float *weight, float *hidden, float *y,
                    const int64_t *y_index) {
    job->weight = weight;
    job->gate = (Product){.W = w1, .M = M, .out = f, .in = D, .x = x, .x_step = D, .x_index = x_index, .y = hidden, .y_step = f};
    job->up = job->gate;
    job->up.W = w3;
    job->up.y = hidden + M * f;
    job->down = (Product){.W = w2, .M = M, .out = D, .in = f, .x = hidden, .x_step = f, .y = y, .y_step = D, .y_index = y_index};
}

typedef struct {
    const Mixture *e;
    Job *jobs;
    Product *downs;
    int64_t num_jobs, M, rows;
    const int64_t *token, *given;
    int64_t *chosen;
    float *scores, *ranked, *slots, *y;
} Experts;

static void choose_rows(void *context, int64_t item, int thread) {
    const Experts *c = context;
    int64_t E = c->e->E, K = c->e->K;
    for (int64_t m = item * c->rows; m < c->M && m < (item + 1) * c->rows; m++)
        choose(c->e, c->given ? c->given + m * K : NULL, c->token[m], c->scores + m * E, c->ranked + m * E, c->chosen + m * K);
}

/* One item is a part of one expert's inner width, for all its rows. */
static int64_t width_of(const Job *job) { return product_width(&job->gate); }
static int64_t parts_of(const Job *job) { return (job->gate.out + width_of(job) - 1) / width_of(job); }

static void enter_part(void *context, int64_t item, int thread) {
    const Experts *c = context;
    const Job *job = c->jobs;
    for (; item >= parts_of(job); job++) item -= parts_of(job);
    int64_t from = item * width_of(job), to = from + width_of(job) < job->gate.out ? from + width_of(job) : job->gate.out;
    product_part(&job->gate, 0, job->gate.M, from, to);
    product_part(&job->up, 0, job->up.M, from, to);
    activate(c->e, job, from, to);
}

static void add_rows(void *context, int64_t item, int thread) {
    const Experts *c = context;
    int64_t D = c->e->D, K = c->e->K;
    for (int64_t m = item * c->rows; m < c->M && m < (item + 1) * c->rows; m++)
        for (int64_t k = 0; k < K; k++) add_scaled(c->y + m * D, 1.0f, c->slots + (m * K + k) * D, D);
}

/* x [M, D] of tokens token[M] -> y [M, D] and the experts chosen [M, K] (given, or ascending, or in the table's order). */
void mixture(const Mixture *e, int64_t M, const float *x, const int64_t *token, const int64_t *given, int64_t *chosen,
             float *scores, float *y, Space *space) {
    int64_t D = e->D, E = e->E, K = e->K, f = e->f;
    float *shared = TAKE(space, float, 2 * M * e->shared_f), *hidden = TAKE(space, float, 2 * M * K * f);
    float *slots = TAKE(space, float, M * K * D), *weight = TAKE(space, float, M * K), *ranked = TAKE(space, float, M * E);
    int64_t *row_of = TAKE(space, int64_t, M * K), *slot_of = TAKE(space, int64_t, M * K), *end = TAKE(space, int64_t, E + 1);
    Job *jobs = TAKE(space, Job, E + 1);
    Product *downs = TAKE(space, Product, E + 1);
    if (!scores) scores = TAKE(space, float, M * E);
    if (!space->base) return;

    Experts c = {e, jobs, downs, 0, M, rows_per_item(M, E * 64 + 1), token, given, chosen, scores, ranked, slots, y};
    set_job(jobs + c.num_jobs++, e->shared_w1, e->shared_w3, e->shared_w2, D, e->shared_f, M, x, NULL, NULL, shared, y, NULL);
    if (E) {
        Product gate = {.W = e->gate, .M = M, .out = E, .in = D, .x = x, .x_step = D, .y = scores, .y_step = E};
        products(&gate, 1);
        share(choose_rows, &c, (M + c.rows - 1) / c.rows, M * E * 512);
        memset(end, 0, (E + 1) * sizeof(int64_t));
        for (int64_t i = 0; i < M * K; i++) end[chosen[i] + 1]++;
        for (int64_t i = 0; i < E; i++) end[i + 1] += end[i]; /* expert i's rows will stand in [end[i], end[i + 1]) */
        for (int64_t m = 0; m < M; m++) {
            float sum = 0;
            for (int64_t k = 0; k < K; k++) sum += scores[m * E + chosen[m * K + k]];
            if (e->scoring == 2) sum = 1;
            for (int64_t k = 0; k < K; k++) {
                int64_t i = chosen[m * K + k], place = end[i]++;
                row_of[place] = m;
                slot_of[place] = m * K + k;
                weight[place] = scores[m * E + i] / sum * e->scale;
            }
        }
        for (int64_t i = 0, start = 0; i < E; start = end[i++])
            if (end[i] > start)
                set_job(jobs + c.num_jobs++, e->w1 + i * f * D, e->w3 + i * f * D, e->w2 + i * f * D, D, f, end[i] - start, x,
                        row_of + start, weight + start, hidden + 2 * start * f, slots, slot_of + start);
    }
    int64_t work = 0, parts = 0;
    for (int64_t i = 0; i < c.num_jobs; i++) {
        work += 2 * product_work(&jobs[i].gate);
        parts += parts_of(jobs + i);
        downs[i] = jobs[i].down;
    }
    share(enter_part, &c, parts, work);
    products(downs, c.num_jobs);
    c.rows = rows_per_item(M, K * D + 1);
    if (E) share(add_rows, &c, (M + c.rows - 1) / c.rows, M * K * D * 4);
}

int lr_mixture(const Mixture *e, int64_t M, const float *x, const int64_t *token, int64_t *chosen, float *y) {
    Space space = {0};
    mixture(e, M, x, token, NULL, chosen, NULL, y, &space);
    char *memory = aligned_alloc(64, space.used);
    if (!memory) return 1;
    space = (Space){memory, 0};
    mixture(e, M, x, token, NULL, chosen, NULL, y, &space);
    free(memory);
    return 0;
}
