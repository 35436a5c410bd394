/* Where a tile lies, and asking for it in time. A part of `tiles.h`, as are LEVEL, VL, TARGET and NAME. */

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
    for (int j = 0; j < side->row_count && side->blocked; j++) {
        const uint8_t *from = next.page + side->rows[j].offset + next.token * side->rows[j].stride;
        for (int64_t at = 0; at < next.n * side->rows[j].stride; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
    for (int j = 0; j < side->count; j++) {
        const Segment *g = &side->segments[j];
        if (side->blocked) {
            if (g->scale == NOTHING || (j && g->grid == g[-1].grid)) continue;
            const uint8_t *from = next.page + g->scale + next.token / g->token_group * g->scale_stride;
            for (int64_t at = 0; at < next.n * g->scale_stride / g->token_group; at += 64) __builtin_prefetch(from + at, 0, 2);
            continue;
        }
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
