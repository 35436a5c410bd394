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

#if LEVEL == 2
/* W words of each of 16 tokens, `stride` bytes from one to the next, of which `left` bytes are there, in W vectors. */
INLINE void NAME(rows_apart)(vi *x, const uint8_t *from, int64_t stride, int left, const int W) {
    uint64_t there = left >= 64 ? ~0ull : (1ull << left) - 1;
    if (W == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) x[i] = (vi)_mm512_maskz_loadu_epi8(there, from + i * stride);
    } else if (W == 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __m256i one = _mm256_maskz_loadu_epi8((__mmask32)there, from + 2 * i * stride);
            __m256i two = _mm256_maskz_loadu_epi8((__mmask32)there, from + (2 * i + 1) * stride);
            x[i] = (vi)_mm512_inserti64x4(_mm512_castsi256_si512(one), two, 1);
        }
    } else if (W == 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m128i row[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) row[k] = _mm_maskz_loadu_epi8((__mmask16)there, from + (4 * i + k) * stride);
            __m256i one = _mm256_inserti128_si256(_mm256_castsi128_si256(row[0]), row[1], 1);
            __m256i two = _mm256_inserti128_si256(_mm256_castsi128_si256(row[2]), row[3], 1);
            x[i] = (vi)_mm512_inserti64x4(_mm512_castsi256_si512(one), two, 1);
        }
    } else {
        uint64_t row[16] = {0};
        int bytes = left < 4 * W ? left : 4 * W;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) memcpy(&row[i], from + i * stride, bytes);
        if (W == 2) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++)
                x[i] = (vi)_mm512_set_epi64(row[8 * i + 7], row[8 * i + 6], row[8 * i + 5], row[8 * i + 4], row[8 * i + 3],
                                            row[8 * i + 2], row[8 * i + 1], row[8 * i]);
        } else {
            x[0] = (vi)_mm512_set_epi32((int)row[15], (int)row[14], (int)row[13], (int)row[12], (int)row[11], (int)row[10],
                                        (int)row[9], (int)row[8], (int)row[7], (int)row[6], (int)row[5], (int)row[4],
                                        (int)row[3], (int)row[2], (int)row[1], (int)row[0]);
        }
    }
}

/* As `k_chunk`, of rows that are not full or do not follow each other. */
INLINE void NAME(k_apart)(vu *to, const uint8_t *from, int64_t stride, int tile, int room, int left, const int W) {
    int words = left < 4 * W ? (left + 3) / 4 : W;
    for (int t = 0; t < tile; t += VL, from += VL * stride) {
        vi x[16];
        NAME(rows_apart)(x, from, stride, left, W);
        NAME(turn_words)(x, W);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (i < words) to[i * room + t / VL] = (vu)x[i];
    }
}
#endif

/* K: one plane of T tokens to words of 32 bits, `per` vectors from one to the next; returns where the next plane's go. */
APART vu *NAME(k_plane)(vu *to, const uint8_t *from, int64_t stride, int bytes, int tile, int per) {
    int at = 0;
#if LEVEL == 2
#define CHUNK_OF(W)                                                                                   \
    if (left == 4 * W && stride == 4 * W)                                                             \
        NAME(k_chunk)(to, from + at, stride, tile, per, W);                                           \
    else                                                                                              \
        NAME(k_apart)(to, from + at, stride, tile, per, left, W)
    while (at < bytes) {
        int left = bytes - at, words = left > 64 ? 16 : (left + 3) / 4;
        if (left > 32) {
            CHUNK_OF(16);
        } else if (left > 16) {
            CHUNK_OF(8);
        } else if (left > 8) {
            CHUNK_OF(4);
        } else if (left > 4) {
            CHUNK_OF(2);
        } else {
            CHUNK_OF(1);
        }
        at += 4 * words, to += words * per;
    }
#undef CHUNK_OF
#else
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
#endif
    return to;
}

/* As `k_plane`, of a tile whose last tokens, from n on, are not there: their bytes are not read, and their words are 0. */
APART void NAME(k_part)(vu *to, const uint8_t *from, int64_t stride, int bytes, int tile, int per, int n) {
    for (int at = 0; at < bytes; at += 4, to += per)
        for (int t = 0; t < tile; t++) {
            int32_t word = 0;
            if (t < n) memcpy(&word, from + t * stride + at, bytes - at < 4 ? bytes - at : 4);
            memcpy((int32_t *)to + t, &word, 4);
        }
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
