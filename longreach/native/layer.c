/* One layer over the rows of a pass: what model/block.py computes, in one call. */

#include "rows.h"

void layer(const Layer *l, const Rows *r, Space *space) {
    const Attention *a = &l->attn;
    int64_t M = r->M, D = a->D, n = l->attn_hc.n, NH = a->N * a->H;
    float *x = TAKE(space, float, M * D), *y = TAKE(space, float, M * D), *z = TAKE(space, float, M * (2 + n) * n);
    float *post = TAKE(space, float, M * n), *comb = TAKE(space, float, M * n * n);
    int64_t *own = TAKE(space, int64_t, M * l->ffn.K), *routing = r->routing ? r->routing : own;
    Space rest = *space; /* attention and experts use the same memory, one after the other */

    int64_t low = a->groups * a->o_rank > a->rank ? a->groups * a->o_rank : a->rank;
    Projected made;
    made.low = TAKE(space, float, M * low);
    made.q = TAKE(space, float, M * NH);
    made.kv = TAKE(space, float, M * a->H);
    made.raw = TAKE(space, float, M * 2 * a->compressor.channels);
    made.index_q = TAKE(space, float, M * a->index_heads * a->index_dim);
    made.index_weight = TAKE(space, float, M * a->index_heads);
    made.index_raw = TAKE(space, float, M * 2 * a->index_compressor.channels);
    float *out = TAKE(space, float, M * NH);
    if (space->base) {
        hyper_enter(&l->attn_hc, M, r->streams, z, x, post, comb);
        attention_in(a, M, x, r->position, r->table, made);
    }
    attend_rows(a, r, made, out, space);
    if (space->base) {
        attention_out(a, M, out, r->table, made.low, y);
        hyper_leave(&l->attn_hc, M, r->streams, y, post, comb);
        hyper_enter(&l->ffn_hc, M, r->streams, z, x, post, comb);
    }
    mixture(&l->ffn, M, x, r->token, r->routing_in, routing, r->scores, y, &rest);
    if (space->base) hyper_leave(&l->ffn_hc, M, r->streams, y, post, comb);
    if (rest.used > space->used) space->used = rest.used;
}

/* Advance r->streams, the segments' stores and what r asks for by one layer. 0, or 1 if there is no memory for it. */
int lr_layer(const Layer *l, const Rows *r) {
    Space space = {0};
    layer(l, r, &space);
    char *memory = aligned_alloc(64, space.used);
    if (!memory) return 1;
    space = (Space){memory, 0};
    layer(l, r, &space);
    free(memory);
    return 0;
}
