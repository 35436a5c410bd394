/* One item: all tiles of a stream's pages and exact tokens for some query rows; and estimates from summaries. A part of `tiles.h`, as are LEVEL, VL, TARGET and NAME. */

/* Where tile i of the item's stream lies. */
INLINE Place NAME(place)(const Side *side, const Item *item, int64_t i, int tile) {
    const Source *from = item->source;
    int64_t left = stream_tokens(from, item->stream) - i * tile, which = 0, token = i * tile, id = item->stream;
    if (from->ids) {
        which = token / from->page_tokens, token %= from->page_tokens;
        id = from->ids[item->stream * from->ids_stride + which];
    }
    return (Place){side->base + id * side->page_bytes, which, token, (int)(left < tile ? left : tile)};
}

/* Ask for a tile of one side, so that it is at hand when its turn comes. */
INLINE void NAME(fetch)(const Side *side, const Item *item, int64_t i, int tile) {
    Place next = NAME(place)(side, item, i, tile);
    for (int j = 0; j < side->count; j++) {
        const Segment *g = &side->segments[j];
        for (int n = 0; n < g->planes; n++) {
            const uint8_t *from = next.page + g->plane[n].offset + next.token * g->plane[n].stride;
            for (int64_t at = 0; at < next.n * g->plane[n].stride; at += 64) __builtin_prefetch(from + at);
        }
        if (g->kind >= FLOAT32) continue;
        if (g->centre != NOTHING && !next.token)
            for (int64_t at = 0; at < 2 * g->channels; at += 64) __builtin_prefetch(next.page + g->centre + at);
        int64_t first = next.token / g->token_group, last = (next.token + tile - 1) / g->token_group;
        int64_t row = 2 * g->channels / g->channel_group;
        for (int64_t at = first * row; at < (last + 1) * row; at += 64) {
            __builtin_prefetch(next.page + g->scale + at);
            if (g->zero != NOTHING) __builtin_prefetch(next.page + g->zero + at);
        }
    }
}

/* What the keys of a page share of their logits [rows]: bias, and q . c where they have a centre. */
INLINE void NAME(shifts)(const Side *k, const uint8_t *page, const float *q, int64_t q_room, const float *bias,
                         float *shift, int rows, Scratch *s) {
    for (int r = 0; r < rows; r++) shift[r] = bias[r];
    for (int j = 0; j < k->count; q += round_up(k->segments[j++].channels, 16)) {
        const Segment *g = &k->segments[j];
        if (g->centre == NOTHING) continue;
        NAME(halves)(s->x, page + g->centre, g->channels);
        for (int r = 0; r < rows; r++) {
            vf sums = all(0);
            const float *row = q + r * q_room;
            int d = 0;
            for (; d + VL <= g->channels; d += VL) sums += load(row + d) * load(s->x + d);
            for (; d < g->channels; d++) shift[r] += row[d] * s->x[d];
            shift[r] += NAME(sum)(sums);
        }
    }
}

static TARGET void NAME(run)(const Problem *p, const Shape *shape, const Item *item, void *memory) {
    Scratch s;
    NAME(laid_out)(shape, memory, &s);
    int rows = (int)(p->rows - item->row < ROWS ? p->rows - item->row : ROWS), tile = (int)shape->tile;
    int64_t k_width = shape->k_width, out_width = shape->out_width, v_width = shape->v_width, at = item->stream * p->rows + item->row;
    const Side *k = &item->source->k, *v = &item->source->v;
    memset(s.q, 0, rows * k_width * sizeof(float));
    memset(s.out, 0, rows * out_width * sizeof(float));
    float bias[ROWS], shift[ROWS], m[ROWS], sum[ROWS];
    const uint8_t *centred = 0; /* the page that shift is of */
    for (int r = 0; r < rows; r++) {
        const float *q = p->q + (at + r) * p->k_dim;
        int64_t to = r * k_width;
        bias[r] = p->bias && item->source->ids ? p->bias[at + r] * p->scale : 0, m[r] = -INFINITY, sum[r] = 0;
        for (int i = 0; i < k->count; i++) {
            const Segment *g = &k->segments[i];
            for (int d = 0; d < g->channels; d++) s.q[to + d] = q[d] * p->scale;
            for (int c = 0; c < g->channels; c += g->channel_group) { /* sums of q, for the zeros of tokens */
                float total = 0;
                for (int d = 0; d < g->channel_group; d++) total += s.q[to + c + d];
                s.sums[to + c / g->channel_group] = total;
            }
            q += g->channels, to += round_up(g->channels, 16);
        }
    }
#if LEVEL > 0
    for (int64_t j = 0, offset = 0; j < v->count; offset += out_room(&v->segments[j++]))
        NAME(all_lanes)(&v->segments[j], (Lanes *)s.lanes + offset / 16);
#endif
    int64_t block = TOKENS / tile, skipped = p->skipped && item->source->ids ? p->skipped[item->stream] : 0;
    int64_t start = item->first > skipped / tile ? item->first : skipped / tile; /* no tile that is not seen at all */
    for (int64_t first = start; first < item->last; first += block) {
        int64_t last = item->last - first < block ? item->last : first + block;
        for (int64_t i = first; i < last; i++) {
            Place here = NAME(place)(k, item, i, tile);
            NAME(fetch)(i + 1 < last ? k : v, item, i + 1 < last ? i + 1 : first, tile);
            float *logits = s.logits + (i - first) * tile;
            if (here.page != centred) {
                NAME(shifts)(k, here.page, s.q, k_width, bias, shift, rows, &s);
                centred = here.page;
            }
            for (int r = 0; r < rows; r++)
                for (int t = 0; t < tile; t += VL) store(logits + r * TOKENS + t, all(shift[r]));
            if (p->token_bias && item->source->ids) {
                int64_t every = item->source->listed * item->source->page_tokens;
                for (int r = 0; r < rows; r++) {
                    const float *from = p->token_bias + (at + r) * every + i * tile;
                    for (int t = 0; t < here.n; t++) logits[r * TOKENS + t] += from[t] * p->scale;
                }
            }
            int64_t offset = 0;
            for (int j = 0; j < k->count; j++) {
                const Segment *g = &k->segments[j];
                NAME(k_segment)(g, shape, here.page, here.token, here.n, s.q + offset, s.sums + offset, rows, logits, &s);
                offset += round_up(g->channels, 16);
            }
            NAME(finish)(p, logits, rows, here.n, tile);
            for (int r = 0; r < rows && i * tile < skipped; r++)
                for (int64_t t = 0; t < skipped - i * tile; t++) logits[r * TOKENS + t] = -INFINITY;
            if (p->lse_of_pages && item->source->ids)
                for (int r = 0; r < rows; r++)
                    NAME(add_page)(p->lse_of_pages + (at + r) * p->pages + here.which, logits + r * TOKENS, tile);
        }
        for (int r = 0; r < rows; r++)
            NAME(soften)(s.logits + r * TOKENS, (int)(last - first) * tile, s.out + r * out_width, out_width, &m[r], &sum[r]);
        for (int64_t i = first; i < last; i++) {
            Place here = NAME(place)(v, item, i, tile);
            if (i + 1 < item->last) NAME(fetch)(i + 1 < last ? v : k, item, i + 1, tile);
            int64_t offset = 0;
            for (int j = 0; j < v->count; j++) {
                const Segment *g = &v->segments[j];
                NAME(v_segment)(g, shape, here.page, here.token, here.n, s.logits + (i - first) * tile, rows,
                                s.out + offset, &s, (Lanes *)s.lanes + offset / 16);
                offset += out_room(g);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        float *to = item->partial + r * (v_width + 2);
        NAME(in_order)(v, s.out + r * out_width, to);
        to[v_width] = m[r], to[v_width + 1] = sum[r];
    }
}

/* The vectors of one page's summary, as float32 rows [vectors, room], fields side by side. */
INLINE void NAME(summary_rows)(const Vectors *v, const uint8_t *page, float *x, int64_t room) {
    for (int64_t u = 0; u < v->vectors; u++, x += room) {
        float *to = x;
        for (int64_t f = 0; f < v->fields; f++, to += v->dim) {
            if (v->scale == NOTHING) {
                NAME(halves)(to, page + v->offsets[f] + u * v->dim * 2, v->dim);
                continue;
            }
            float scale[16]; /* at most SCALES of sparse/summaries.py */
            const int8_t *code = (const int8_t *)page + v->offsets[f] + u * v->dim;
            NAME(halves)(scale, page + v->scale + u * v->scales * 2, v->scales);
            int64_t run = v->dim / v->scales;
            for (int64_t g = 0; g < v->scales; g++)
                for (int64_t d = g * run; d < (g + 1) * run; d++) to[d] = (float)code[d] * scale[g];
        }
        for (; to < x + room; to++) *to = 0;
    }
}

/* Estimates of the pages [first, last) of a stream; q [rows, room], x [TOGETHER, vectors, room]. */
static TARGET void NAME(estimates)(const Vectors *v, const float *q, int64_t stream, int64_t first, int64_t last,
                                   float *x) {
    int64_t room = round_up(v->fields * v->dim, 16), n = v->pages * v->vectors;
    const int32_t *ids = v->ids + stream * v->ids_stride;
    for (int64_t i = first; i < last; i += TOGETHER) {
        int64_t pages = last - i < TOGETHER ? last - i : TOGETHER, many = pages * v->vectors;
        float *to = v->out + stream * v->rows * n + i * v->vectors;
        for (int64_t j = 0; j < pages; j++) {
            NAME(summary_rows)(v, v->pool + ids[i + j] * v->page_bytes, x + j * v->vectors * room, room);
            if (i + j + TOGETHER >= last) continue;
            const uint8_t *next = v->pool + ids[i + j + TOGETHER] * v->page_bytes + v->offsets[0];
            for (int64_t at = 0; at < v->bytes; at += 64) __builtin_prefetch(next + at);
        }
        for (int64_t r = 0; r < v->rows; r++) memset(to + r * n, 0, many * sizeof(float));
        NAME(k_raw)(to, n, q, room, x, room, (int)room, (int)many, (int)v->rows);
    }
}
