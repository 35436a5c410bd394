/* One item: all tiles of a stream's pages and exact tokens for some query rows; and estimates from summaries. A part of `tiles.h`, as are LEVEL, VL, TARGET and NAME. */

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

/* Row d of the matrix of a map, as float32. */
INLINE const float *NAME(map_row)(const Map *map, int64_t stream, int64_t d, int64_t width, float *room) {
    int64_t at = stream % map->n * map->each + d * map->stride;
    if (!map->half) return (const float *)map->matrix + at;
    NAME(halves)(room, (const uint8_t *)map->matrix + 2 * at, width);
    return room;
}

/* Queries of an item [rows, width] in the coordinates of its pages, to s->mapped. */
APART void NAME(to_coordinates)(const Problem *p, const Item *item, int64_t width, int rows, Scratch *s) {
    const float *q = p->q + (item->stream * p->rows + item->row) * p->k_dim;
    memset(s->mapped, 0, rows * width * sizeof(float));
    const int16_t *order = p->k_map.order ? p->k_map.order + item->stream % p->k_map.n * p->k_dim : 0;
    for (int64_t d = 0; d < p->k_dim; d++) {
        const float *row = NAME(map_row)(&p->k_map, item->stream, d, width, s->x);
        for (int r = 0; r < rows; r++) {
            float y = q[r * p->k_dim + (order ? order[d] : d)], *to = s->mapped + r * width;
            int64_t c = 0;
            for (; c + VL <= width; c += VL) store(to + c, load(to + c) + y * load(row + c));
            for (; c < width; c++) to[c] += y * row[c];
        }
    }
}

/* out [rows, v_dim] = y [rows, width] D', of sums over the values of a stream's pages; room: a row of D. */
static TARGET void NAME(from_coordinates)(const Problem *p, int64_t stream, const float *y, int64_t width, int64_t rows,
                                          float *out, float *room) {
    const int16_t *order = p->v_map.order ? p->v_map.order + stream % p->v_map.n * p->v_dim : 0;
    for (int64_t d = 0; d < p->v_dim; d++) {
        const float *row = NAME(map_row)(&p->v_map, stream, d, width, room);
        for (int64_t r = 0; r < rows; r++) {
            const float *from = y + r * width;
            vf sums = all(0);
            float sum = 0;
            int64_t c = 0;
            for (; c + VL <= width; c += VL) sums += load(from + c) * load(row + c);
            for (; c < width; c++) sum += from[c] * row[c];
            out[r * p->v_dim + (order ? order[d] : d)] = sum + NAME(sum)(sums);
        }
    }
}

static TARGET void NAME(run)(const Problem *p, const Shape *shape, const Item *item, void *memory) {
    Scratch s;
    NAME(laid_out)(shape, memory, &s);
    int rows = (int)(p->rows - item->row < shape->rows ? p->rows - item->row : shape->rows), tile = (int)shape->tile;
    int64_t k_width = shape->k_width, out_width = shape->out_width, v_width = shape->v_width, at = item->stream * p->rows + item->row;
    const Side *k = &item->source->k, *v = &item->source->v;
    memset(s.q, 0, rows * k_width * sizeof(float));
    memset(s.out, 0, rows * out_width * sizeof(float));
    float bias[MANY_ROWS], shift[MANY_ROWS], m[MANY_ROWS], sum[MANY_ROWS];
    const uint8_t *centred = 0; /* the page that shift is of */
    int paged = item->source->ids != 0;
    const float *mean = paged && p->k_map.mean ? p->k_map.mean + item->stream % p->k_map.n * p->k_dim : 0;
    if (p->k_map.matrix && paged) NAME(to_coordinates)(p, item, channels_of(k), rows, &s);
    for (int r = 0; r < rows; r++) {
        const float *q = p->q + (at + r) * p->k_dim;
        int64_t to = r * k_width;
        bias[r] = p->bias && paged ? p->bias[at + r] * p->scale : 0, m[r] = -INFINITY, sum[r] = 0;
        if (mean)
            for (int64_t d = 0; d < p->k_dim; d++) bias[r] += q[d] * mean[d] * p->scale;
        if (p->k_map.matrix && paged) q = s.mapped + r * channels_of(k);
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
    for (int64_t j = 0, offset = 0; j < v->count; offset += out_room(v, &v->segments[j++]))
        if (!v->blocked) NAME(all_lanes)(&v->segments[j], (Lanes *)s.lanes + offset / 16);
#endif
    int64_t block = TOKENS / tile, skipped = p->skipped && item->source->ids ? p->skipped[item->stream] : 0;
    int64_t start = item->first > skipped / tile ? item->first : skipped / tile; /* no tile that is not seen at all */
    for (int64_t first = start; first < item->last; first += block) {
        int64_t last = item->last - first < block ? item->last : first + block;
        if (k->blocked) NAME(k_of_block)(k, item, shape, first, last, s.q, rows, s.logits, &s);
        for (int64_t i = first; i < last; i++) {
            Place here = NAME(place)(k, item, i, tile);
            if (!k->blocked) NAME(fetch)(i + 1 < last ? k : v, item, i + 1 < last ? i + 1 : first, tile);
            float *logits = s.logits + (i - first) * tile;
            if (here.page != centred) {
                NAME(shifts)(k, here.page, s.q, k_width, bias, shift, rows, &s);
                centred = here.page;
            }
            for (int r = 0; r < rows; r++)
                for (int t = 0; t < tile; t += VL) {
                    float *to = logits + r * TOKENS + t;
                    store(to, all(shift[r]) + (k->blocked ? load(to) : all(0)));
                }
            if (p->token_bias && item->source->ids) {
                int64_t every = item->source->listed * item->source->page_tokens;
                for (int r = 0; r < rows; r++) {
                    const float *from = p->token_bias + (at + r) * every + i * tile;
                    for (int t = 0; t < here.n; t++) logits[r * TOKENS + t] += from[t] * p->scale;
                }
            }
            int64_t offset = 0;
            for (int j = 0; j < k->count && !k->blocked; j++) {
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
        if (v->blocked) NAME(v_of_block)(v, item, shape, first, last, s.logits, rows, s.out, &s);
        for (int64_t i = first; i < last && !v->blocked; i++) {
            Place here = NAME(place)(v, item, i, tile);
            if (i + 1 < item->last) NAME(fetch)(i + 1 < last ? v : k, item, i + 1, tile);
            int64_t offset = 0;
            for (int j = 0; j < v->count; j++) {
                const Segment *g = &v->segments[j];
                NAME(v_segment)(g, shape, here.page, here.token, here.n, s.logits + (i - first) * tile, rows,
                                s.out + offset, &s, (Lanes *)s.lanes + offset / 16);
                offset += out_room(v, g);
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
