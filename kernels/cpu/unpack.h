/* Planes of codes to words and codes of a tile of tokens, and numbers as float32. A part of `tiles.h`, as are LEVEL, VL, TARGET and NAME. */

/* K: W words of each of T tokens, `stride` bytes from one to the next, to [W, T]. */
INLINE void NAME(k_chunk)(vu *to, const uint8_t *from, int64_t stride, int tile, int room, const int W) {
    for (int t = 0; t < tile; t += VL, from += VL * stride) {
        vi x[16];
        int32_t rows[VL * 16];
        const int32_t *words = (const int32_t *)from;
        if (stride != 4 * W) {
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) memcpy(rows + i * W, from + i * stride, 4 * W);
            words = rows;
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = *(const vi *)(words + i * VL);
        NAME(turn_words)(x, W);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) to[i * room + t / VL] = (vu)x[i];
    }
}

/* K: one plane of T tokens to words of 32 bits, `per` vectors from one to the next; returns where the next plane's go. */
APART vu *NAME(k_plane)(vu *to, const uint8_t *from, int64_t stride, int bytes, int tile, int per) {
    int at = 0;
    for (; bytes - at >= 64; at += 64, to += 16 * per) NAME(k_chunk)(to, from + at, stride, tile, per, 16);
    if (bytes - at >= 32) NAME(k_chunk)(to, from + at, stride, tile, per, 8), at += 32, to += 8 * per;
    if (bytes - at >= 16) NAME(k_chunk)(to, from + at, stride, tile, per, 4), at += 16, to += 4 * per;
    if (bytes - at >= 8) NAME(k_chunk)(to, from + at, stride, tile, per, 2), at += 8, to += 2 * per;
    for (; bytes > at; at += 4, to += per) { /* the last word of a row may end with it */
        for (int t = 0; t < tile; t++) {
            int32_t word = 0;
            memcpy(&word, from + t * stride + at, bytes - at < 4 ? bytes - at : 4);
            memcpy((int32_t *)to + t, &word, 4);
        }
    }
    return to;
}

/* V: 16 packed bytes to 16 * 8 / width codes in their order. */
INLINE void NAME(expand)(u8x16 *y, u8x16 x, const int width) {
    y[0] = x;
#pragma GCC unroll 3
    for (int w = 4, n = 1; w >= width; w /= 2, n *= 2) {
#pragma GCC unroll 4
        for (int i = n - 1; i >= 0; i--) {
            u8x16 low = y[i] & (uint8_t)((1 << w) - 1), high = y[i] >> (uint8_t)w;
            y[2 * i] = LOW(low, high);
            y[2 * i + 1] = HIGH(low, high);
        }
    }
}

/* V: one plane of T tokens to codes [T, room], behind the bits that are there already. */
INLINE void NAME(v_plane)(uint8_t *codes, const uint8_t *from, int64_t stride, int channels, int64_t room, int tile,
                          const int width, int more) {
    const int per = 8 / width, bytes = channels / per;
    for (int t = 0; t < tile; t++, from += stride, codes += room) {
        for (int b = 0; b < bytes; b += 16) {
            u8x16 x, y[8];
            if (bytes - b >= 16) {
                x = BYTES(from + b);
            } else {
                uint8_t part[16] = {0};
                memcpy(part, from + b, bytes - b);
                x = BYTES(part);
            }
            NAME(expand)(y, x, width);
#pragma GCC unroll 8
            for (int i = 0; i < per; i++) {
                uint8_t *to = codes + b * per + 16 * i;
                BYTES(to) = more ? y[i] | BYTES(to) << (uint8_t)width : y[i];
            }
        }
    }
}

#define PLANES(call, ...)                                                           \
    for (int i = 0; i < g->planes; i++) {                                           \
        const uint8_t *from = page + g->plane[i].offset + token * g->plane[i].stride; \
        int64_t stride = g->plane[i].stride;                                        \
        switch (g->plane[i].width) {                                                \
            case 1: NAME(call)(codes, from, stride, __VA_ARGS__, 1, i > 0); break;  \
            case 2: NAME(call)(codes, from, stride, __VA_ARGS__, 2, i > 0); break;  \
            case 4: NAME(call)(codes, from, stride, __VA_ARGS__, 4, i > 0); break;  \
            default: NAME(call)(codes, from, stride, __VA_ARGS__, 8, i > 0);        \
        }                                                                           \
    }

static TARGET void NAME(k_words)(const Segment *g, const uint8_t *page, int64_t token, int tile, vu *words) {
    for (int i = 0; i < g->planes; i++) {
        const Plane *plane = &g->plane[i];
        const uint8_t *from = page + plane->offset + token * plane->stride;
        words = NAME(k_plane)(words, from, plane->stride, g->channels * plane->width / 8, tile, tile / VL);
    }
}

static TARGET void NAME(v_codes)(const Segment *g, const uint8_t *page, int64_t token, int tile, uint8_t *codes,
                                 int64_t room) {
    PLANES(v_plane, g->channels, room, tile)
}

/* n tokens of numbers as float32 [n, room], each filled up with zeros to whole vectors; where they lie if they can. */
INLINE const float *NAME(rows_of)(const Segment *g, const uint8_t *page, int64_t token, int n, float *to, int64_t *room) {
    const uint8_t *from = page + g->plane[0].offset + token * g->plane[0].stride;
    int channels = g->channels;
    if (g->kind == FLOAT32 && channels % VL == 0) {
        *room = g->plane[0].stride / 4;
        return (const float *)from;
    }
    *room = round_up(channels, 16);
    for (int t = 0; t < n; t++, from += g->plane[0].stride) {
        float *row = to + t * *room;
        memset(row + channels, 0, (*room - channels) * sizeof(float));
        if (g->kind == FLOAT32) {
            memcpy(row, from, channels * sizeof(float));
        } else if (g->kind == FLOAT16) {
            NAME(halves)(row, from, channels);
        } else {
            NAME(brains)(row, from, channels);
        }
    }
    return to;
}
