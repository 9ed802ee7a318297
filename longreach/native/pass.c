/* A whole pass of an engine's sequences in one call: embedding, every layer, collapse; and the same of the MTP block.

   A token is through a layer of a small model in a quarter of a millisecond. Putting the calls together layer by layer in
   Python took as long as two of them. */

#include "rows.h"

enum { DONE, NO_MEMORY, UNKNOWN_TOKEN };

typedef struct { /* what a pass knows of its rows before the first layer */
    int64_t *position;
    float *table[2]; /* [M, rope], for layers without and with compression */
    Segment *segments;
} Scene;

static Scene scene_in(const Network *n, const Pass *p, Space *space) {
    Scene scene;
    scene.position = TAKE(space, int64_t, p->M);
    for (int i = 0; i < 2; i++) scene.table[i] = TAKE(space, float, p->M * 2 * n->pairs);
    scene.segments = TAKE(space, Segment, p->num_sequences);
    return scene;
}

/* Fills the scene; the memory it lies in, or NULL if there is none. */
static char *set_up(const Network *n, const Pass *p, Scene *scene) {
    Space space = {0};
    scene_in(n, p, &space);
    if (!(space.base = aligned_alloc(64, space.used))) return NULL;
    space.used = 0;
    *scene = scene_in(n, p, &space);
    int64_t row = 0;
    for (int64_t i = 0; i < p->num_sequences; i++)
        for (int64_t j = 0; j < p->standing[i].count; j++) scene->position[row++] = p->standing[i].first + j;
    for (int i = 0; i < 2; i++) lr_rope_table(n->frequencies[i], n->pairs, scene->position, p->M, scene->table[i]);
    return space.base;
}

static int all_known(const Network *n, const Pass *p) {
    for (int64_t m = 0; m < p->M; m++)
        if (p->token[m] < 0 || p->token[m] >= n->vocab) return 0;
    return 1;
}

static float *of_slot(float *first, int64_t step, int64_t slot) { return first ? (float *)((char *)first + slot * step) : NULL; }

/* The sequences' segments at one layer. */
static void place(const Pass *p, const Home *home, Segment *to) {
    int64_t row = 0;
    for (int64_t i = 0; i < p->num_sequences; i++, to++) {
        const Standing *s = p->standing + i;
        *to = home->first;
        to->row = row, to->count = s->count, to->first = s->first, to->held = s->held;
        to->window = of_slot(to->window, home->window_step, s->slot);
        to->raw = of_slot(to->raw, home->raw_step, s->slot);
        to->index_raw = of_slot(to->index_raw, home->index_raw_step, s->slot);
        to->window_lo = s->window_lo;
        to->raw_lo = p->num_keeps ? p->raw_lo[i * p->num_keeps + home->keep] : 0;
        to->entries.at = to->index_entries.at = s->pages;
        row += s->count;
    }
}

/* ---- the main layers ------------------------------------------------------------------------------------------------- */

static void advance(const Network *n, const Pass *p, Scene *scene, Space *space) {
    int64_t M = p->M, D = n->collapse.D, width = n->collapse.n;
    float *z = TAKE(space, float, M * width);
    Rows rows = {.M = M, .num_segments = p->num_sequences, .token = p->token, .position = scene->position,
                 .streams = p->streams, .segments = scene->segments};
    if (space->base)
        for (int64_t i = 0; i < M * width; i++)
            memcpy(p->streams + i * D, n->embed + p->token[i / width] * D, D * sizeof(float));
    Space rest = *space; /* the layers use the same memory, one after the other */
    for (int64_t l = 0; l < n->num_layers; l++) {
        Space one = rest;
        place(p, p->homes + l, scene->segments);
        rows.table = scene->table[n->layers[l]->attn.ratio > 1];
        layer(n->layers[l], &rows, &one);
        if (one.used > space->used) space->used = one.used;
    }
    if (space->base) lr_collapse(&n->collapse, M, p->streams, z, p->hidden);
}

/* ---- the MTP block --------------------------------------------------------------------------------------------------- */

/* What goes into its layer (model/mtp.py): the streams `before`, told the tokens that follow. */
static void tell(const Network *n, int64_t M, const int64_t *token, const float *before, float *streams, Space *space) {
    int64_t D = n->collapse.D, width = n->collapse.n;
    float *word = TAKE(space, float, M * D), *told = TAKE(space, float, M * D), *normed = TAKE(space, float, M * width * D);
    if (!space->base) return;
    for (int64_t m = 0; m < M; m++) rms_norm(n->embed + token[m] * D, n->enorm, D, n->enorm_eps, word + m * D);
    norms(before, n->hnorm, normed, M * width, D, n->hnorm_eps);
    Product both[2] = {
        {.W = n->e_proj, .M = M, .out = D, .in = D, .x = word, .x_step = D, .y = told, .y_step = D},
        {.W = n->h_proj, .M = M * width, .out = D, .in = D, .x = normed, .x_step = D, .y = streams, .y_step = D},
    };
    products(both, 2);
    for (int64_t i = 0; i < M * width; i++) add_scaled(streams + i * D, 1.0f, told + i / width * D, D);
}

/* Of each sequence only the last row is wanted, which sees of the others what the layer's window keeps of them. Puts that
   there and moves the last rows together. */
static void keep_last(const Layer *l, const Pass *p, Scene *scene, int64_t *token, float *streams, Space *space) {
    int64_t M = p->M, n = l->attn_hc.n, D = l->attn.D, rope = l->attn.rope;
    float *x = TAKE(space, float, M * D), *z = TAKE(space, float, M * (2 + n) * n), *kv = TAKE(space, float, M * l->attn.H);
    float *post = TAKE(space, float, M * n), *comb = TAKE(space, float, M * n * n);
    if (!space->base) return;
    if (M > p->num_sequences) {
        hyper_enter(&l->attn_hc, M, streams, z, x, post, comb);
        remember_all_but_last(&l->attn, M, x, scene->table[l->attn.ratio > 1], kv, scene->segments, p->num_sequences);
    }
    for (int64_t i = 0; i < p->num_sequences; i++) {
        int64_t row = scene->segments[i].row;
        scene->segments[i].row = i;
        token[i] = p->token[row];
        scene->position[i] = scene->position[row];
        for (int t = 0; t < 2; t++) memmove(scene->table[t] + i * rope, scene->table[t] + row * rope, rope * sizeof(float));
        memmove(streams + i * n * D, streams + row * n * D, n * D * sizeof(float));
    }
}

static void draft(const Network *n, const Pass *p, Scene *scene, Space *space) {
    const Layer *l = n->layers[n->num_layers];
    int64_t M = p->M, width = n->collapse.n, each = width * n->collapse.D, rest = p->last_only ? p->num_sequences : M;
    float *z = TAKE(space, float, M * width), *streams = p->last_only ? TAKE(space, float, M * each) : p->streams;
    int64_t *token = TAKE(space, int64_t, M);
    Space telling = *space, keeping = *space, advancing = *space; /* in the same memory, one after the other */
    tell(n, M, p->token, p->before, streams, &telling);
    place(p, p->homes + n->num_layers, scene->segments);
    if (p->last_only) keep_last(l, p, scene, token, streams, &keeping);
    Rows rows = {.M = rest, .num_segments = p->num_sequences, .token = p->last_only ? token : p->token,
                 .position = scene->position, .table = scene->table[l->attn.ratio > 1], .streams = streams,
                 .segments = scene->segments};
    layer(l, &rows, &advancing);
    const Space *all[3] = {&telling, &keeping, &advancing};
    for (int i = 0; i < 3; i++)
        if (all[i]->used > space->used) space->used = all[i]->used;
    if (!space->base) return;
    lr_collapse(&n->mtp_collapse, rest, streams, z, p->hidden);
    if (p->last_only) memcpy(p->streams, streams, rest * each * sizeof(float));
}

/* ---- calls ----------------------------------------------------------------------------------------------------------- */

static int run(void (*body)(const Network *, const Pass *, Scene *, Space *), const Network *n, const Pass *p) {
    Scene scene;
    Space space = {0};
    if (!all_known(n, p)) return UNKNOWN_TOKEN;
    char *memory = set_up(n, p, &scene);
    if (!memory) return NO_MEMORY;
    body(n, p, &scene, &space);
    if (!(space.base = aligned_alloc(64, space.used))) return free(memory), NO_MEMORY;
    space.used = 0;
    body(n, p, &scene, &space);
    free(space.base);
    free(memory);
    return DONE;
}

/* Advance sequences by p->token: streams [M, n, D] after the last main layer, hidden [M, D] for the head. */
int lr_advance(const Network *n, const Pass *p) { return run(advance, n, p); }

/* The MTP block at positions with main streams p->before [M, n, D], followed by p->token: streams and hidden after it, of
   all rows or (last_only) of each sequence's last. */
int lr_draft(const Network *n, const Pass *p) { return run(draft, n, p); }

/* streams [M, n, D] <- `before`, told token[M]. */
int lr_tell(const Network *n, int64_t M, const int64_t *token, const float *before, float *streams) {
    Space space = {0};
    tell(n, M, token, before, streams, &space);
    if (!(space.base = aligned_alloc(64, space.used))) return NO_MEMORY;
    space.used = 0;
    tell(n, M, token, before, streams, &space);
    free(space.base);
    return DONE;
}
