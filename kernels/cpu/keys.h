/* Keys: q . x over the codes of a tile. A part of `tiles.h`, as are LEVEL, VL, TARGET and NAME. */

/* A call for each number of rows, at most 4 at a time. */
#define BY_ROWS(rows, call)                    \
    for (int r = 0; r < (rows); r += 4) {      \
        switch ((rows) - r) {                  \
            case 1: call(1); break;            \
            case 2: call(2); break;            \
            case 3: call(3); break;            \
            default: call(4);                  \
        }                                      \
    }

INLINE void NAME(v_rows)(float *out, int64_t room, const float *p, int64_t p_room, const float *x, const uint8_t *codes,
                         int64_t stride, int n, const float *book, int bits, int channels, int rows) {
    for (int c = 0; c < channels;) {
        const float *y = x ? x + c : 0;
#define CALL(RN, VN, lanes)                                                                                        \
    NAME(v_block)(out + r * room + c, room, p + r * p_room, p_room, y, codes + c, stride, n, book, bits, lanes, RN, VN)
#if LEVEL == 2
        if (channels - c >= 4 * VL) {
#define CALL4(RN) CALL(RN, 4, VL)
            BY_ROWS(rows, CALL4)
            c += 4 * VL;
            continue;
        }
#endif
        if (channels - c >= 2 * VL) {
#define CALL2(RN) CALL(RN, 2, VL)
            BY_ROWS(rows, CALL2)
            c += 2 * VL;
        } else {
            int lanes = channels - c < VL ? channels - c : VL;
#define CALL1(RN) CALL(RN, 1, lanes)
            BY_ROWS(rows, CALL1)
            c += lanes;
        }
#undef CALL
#undef CALL1
#undef CALL2
#undef CALL4
    }
}

/* acc[r, t] = q[r] . x[t] over the codes. */
INLINE void NAME(k_full)(float *acc, const float *q, int64_t q_room, Codes from, int tile, const float *book, int rows,
                         const int width, const int rest, const int kind) {
    for (int t = 0; t < tile;) {
        if (tile - t >= 2 * VL) {
#define CALL(RN) \
    NAME(k_block)(acc + r * tile + t, tile, q + r * q_room, q_room, from, tile, book, width, rest, kind, RN, 2)
            BY_ROWS(rows, CALL)
#undef CALL
            t += 2 * VL, from.words += 2, from.low += 2;
        } else {
#define CALL(RN) \
    NAME(k_block)(acc + r * tile + t, tile, q + r * q_room, q_room, from, tile, book, width, rest, kind, RN, 1)
            BY_ROWS(rows, CALL)
#undef CALL
            t += VL, from.words += 1, from.low += 1;
        }
    }
}

/* The same of `channels` channels from `first` on, whatever their planes. */
INLINE void NAME(k_any)(float *acc, const float *q, int64_t q_room, const vu *words, const Segment *g, int first,
                        int channels, int tile, int rows, const int kind) {
    for (int t = 0; t < tile; t += VL) {
#define CALL(RN)                                                                                                    \
    NAME(k_mixed)(acc + r * tile + t, tile, q + r * q_room, q_room, words + t / VL, g, first, channels, tile, kind, RN, 1)
        BY_ROWS(rows, CALL)
#undef CALL
    }
}

#define FULL(width, rest, kind)                                                                                  \
    APART void NAME(k_##kind##width##rest)(float *acc, const float *q, int64_t q_room, Codes from, int tile,      \
                                           const float *book, int rows) {                                         \
        NAME(k_full)(acc, q, q_room, from, tile, book, rows, width, rest, kind);                                  \
    }
#define ANY(kind)                                                                                               \
    APART void NAME(k_any_##kind)(float *acc, const float *q, int64_t q_room, const vu *words, const Segment *g, \
                                  int first, int channels, int tile, int rows) {                                \
        NAME(k_any)(acc, q, q_room, words, g, first, channels, tile, rows, kind);                               \
    }
FULL(1, 0, TABLE) FULL(2, 0, TABLE) FULL(4, 0, TABLE) FULL(8, 0, CAST) FULL(8, 0, BOOK)
FULL(2, 1, TABLE) FULL(2, 1, CAST) FULL(4, 1, CAST) FULL(4, 1, BOOK) FULL(4, 2, CAST) FULL(4, 2, BOOK)
ANY(TABLE) ANY(CAST) ANY(BOOK)
#if LEVEL < 2
FULL(1, 0, CAST) FULL(2, 0, CAST) FULL(4, 0, CAST)
#define SMALL(width) uniform ? NAME(k_CAST##width##0) : NAME(k_TABLE##width##0)
#else
#define SMALL(width) NAME(k_TABLE##width##0)
#endif
#undef FULL
#undef ANY

/* acc[r, t] = q[r] . x[t] over the channels of one group, from `first` on; x = the codes, or entries of the book. */
static TARGET void NAME(k_numbers)(float *acc, const float *q, int64_t q_room, const vu *words, const Segment *g,
                                   int first, int channels, int tile, int rows) {
    int uniform = g->kind == UNIFORM, width = g->plane[0].width, rest = g->planes > 1 ? g->plane[1].width : 0;
    if (g->planes > 2 || first * width % 32 || channels * width % 32) {
        if (uniform)
            NAME(k_any_CAST)(acc, q, q_room, words, g, first, channels, tile, rows);
        else if (g->bits <= 4)
            NAME(k_any_TABLE)(acc, q, q_room, words, g, first, channels, tile, rows);
        else
            NAME(k_any_BOOK)(acc, q, q_room, words, g, first, channels, tile, rows);
        return;
    }
    const float *book = uniform ? CODES[width <= 4 ? width : 0] : g->book;
    int each = tile / VL;
    const vu *low = words + (g->channels * width + 31) / 32 * each;
    Codes from = {words + first * width / 32 * each, low, channels * width / 32, first * rest};
    switch (10 * width + rest) {
        case 10: (SMALL(1))(acc, q, q_room, from, tile, book, rows); break;
        case 20: (SMALL(2))(acc, q, q_room, from, tile, book, rows); break;
        case 21: (uniform ? NAME(k_CAST21) : NAME(k_TABLE21))(acc, q, q_room, from, tile, book, rows); break;
        case 40: (SMALL(4))(acc, q, q_room, from, tile, book, rows); break;
        case 41: (uniform ? NAME(k_CAST41) : NAME(k_BOOK41))(acc, q, q_room, from, tile, book, rows); break;
        case 42: (uniform ? NAME(k_CAST42) : NAME(k_BOOK42))(acc, q, q_room, from, tile, book, rows); break;
        default: (uniform ? NAME(k_CAST80) : NAME(k_BOOK80))(acc, q, q_room, from, tile, book, rows);
    }
}
#undef SMALL

static TARGET void NAME(v_numbers)(float *out, int64_t room, const float *p, int64_t p_room, const uint8_t *codes,
                                   int64_t stride, int n, const Segment *g, int channels, int rows) {
    if (g->kind == UNIFORM)
        NAME(v_rows)(out, room, p, p_room, 0, codes, stride, n, 0, 0, channels, rows);
    else if (g->bits <= 4)
        NAME(v_rows)(out, room, p, p_room, 0, codes, stride, n, g->book, 4, channels, rows);
    else
        NAME(v_rows)(out, room, p, p_room, 0, codes, stride, n, g->book, 8, channels, rows);
}

static TARGET void NAME(v_raw)(float *out, int64_t room, const float *p, int64_t p_room, const float *x, int64_t stride,
                               int n, int channels, int rows) {
    NAME(v_rows)(out, room, p, p_room, x, 0, stride, n, 0, 0, channels, rows);
}

static TARGET void NAME(k_raw)(float *acc, int64_t room, const float *q, int64_t q_room, const float *x, int64_t x_room,
                               int channels, int n, int rows) {
#define CALL(RN, many) NAME(dot_block)(acc + r * room, room, q + r * q_room, q_room, x, x_room, channels, n, many, RN)
#define ONE(RN) CALL(RN, 1)
#define MANY(RN) CALL(RN, LEVEL == 2 ? 4 : 2)
    /* Up to 4 rows read x once, from memory, which is fastest in its own order; more rows find it in the cache. */
    if (rows <= 4) {
        BY_ROWS(rows, ONE)
    } else {
        BY_ROWS(rows, MANY)
    }
#undef MANY
#undef ONE
#undef CALL
}
