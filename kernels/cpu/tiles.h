/* One run of tiles for one instruction set: included with LEVEL, VL (floats in a vector), TARGET and NAME(x). */

#define INLINE static inline __attribute__((always_inline)) TARGET
#define vf NAME(vf)
#define vi NAME(vi)
typedef float vf __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL), aligned(4), may_alias));

INLINE vf NAME(load)(const float *from) { return *(const vf *)from; }
INLINE void NAME(store)(float *to, vf x) { *(vf *)to = x; }
INLINE vf NAME(all)(float x) { return x - (vf){0}; }
#define load NAME(load)
#define store NAME(store)
#define all NAME(all)

INLINE float NAME(sum)(vf x) {
#if LEVEL == 2
    return _mm512_reduce_add_ps((__m512)x);
#elif LEVEL == 1
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
#else
    return x[0] + x[1] + (x[2] + x[3]);
#endif
}

/* Codes to numbers. */
INLINE vf NAME(numbers)(const uint8_t *from) {
#if LEVEL == 2
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif LEVEL == 1
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    int32_t four;
    memcpy(&four, from, 4);
    u8x16 zero = {0}, x = LOW((u8x16)(vi){four}, zero);
    return __builtin_convertvector((vi)LOW_PAIRS((u16x8)x, (u16x8)zero), vf);
#endif
}

/* Codes to entries of a book, which has room for 16 where `bits` <= 4, for 256 otherwise. */
INLINE vf NAME(entries)(const uint8_t *from, const float *book, int bits) {
#if LEVEL == 2
    __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
    if (bits <= 4) return (vf)_mm512_permutexvar_ps(codes, _mm512_loadu_ps(book));
    return (vf)_mm512_i32gather_ps(codes, book, 4);
#elif LEVEL == 1
    __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
    if (bits > 4) return (vf)_mm256_i32gather_ps(book, codes, 4);
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(book), codes);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(book + 8), codes);
    return (vf)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
#else
    int last = bits <= 4 ? 15 : 255; /* what lies behind the last channel is no code */
    return (vf){book[from[0] & last], book[from[1] & last], book[from[2] & last], book[from[3] & last]};
#endif
}

/* n float16 numbers at any address. */
INLINE void NAME(halves)(float *to, const uint8_t *from, int64_t n) {
    int64_t i = 0;
#if LEVEL == 2
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + 2 * i))));
#endif
#if LEVEL >= 1
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * i))));
#endif
    for (; i < n; i++) {
        uint16_t h;
        memcpy(&h, from + 2 * i, 2);
        to[i] = half_to_float(h);
    }
}

/* exp(x) of x <= 0 to 2 units in the last place; 0 below -87. */
INLINE vf NAME(exponential)(vf x) {
    vf shift = all(12582912.0f), n = x * 1.44269504f + shift;
    vi power = ((vi)n - (vi)shift + 127) << 23;
    n -= shift;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = (y * r * r + r + 1.0f) * (vf)power;
    return (vf)(~(vi)(x < -87.0f) & (vi)y);
}
#define exponential NAME(exponential)

INLINE void NAME(riffle)(u8x16 y[16], const u8x16 x[16]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        y[2 * i] = LOW(x[i], x[i + 8]);
        y[2 * i + 1] = HIGH(x[i], x[i + 8]);
    }
}

/* 16 x 16 bytes to their transpose: each round turns the address (row, column) of 8 bits by one bit. */
INLINE void NAME(transpose)(u8x16 x[16]) {
    u8x16 y[16];
    NAME(riffle)(y, x);
    NAME(riffle)(x, y);
    NAME(riffle)(y, x);
    NAME(riffle)(x, y);
}

/* K: one plane of T tokens to codes [channels, T], behind the bits that are there already. */
INLINE void NAME(k_plane)(uint8_t *codes, const uint8_t *from, int64_t stride, int channels, int tile, const int width,
                          int more) {
    const int per = 8 / width, bytes = channels / per;
    const uint8_t mask = (uint8_t)((1 << width) - 1);
    for (int t = 0; t < tile; t += 16, from += 16 * stride) {
        for (int b = 0; b < bytes; b += 16) {
            u8x16 x[16];
            int n = bytes - b < 16 ? bytes - b : 16;
            if (n == 16) {
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) x[i] = BYTES(from + i * stride + b);
            } else {
                uint8_t part[16][16] = {{0}};
                for (int i = 0; i < 16; i++) memcpy(part[i], from + i * stride + b, n);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) x[i] = BYTES(part[i]);
            }
            NAME(transpose)(x);
            for (int j = 0; j < n; j++) {
                for (int i = 0; i < per; i++) {
                    uint8_t *to = codes + ((b + j) * per + i) * tile + t;
                    u8x16 y = (x[j] >> (uint8_t)(width * i)) & mask;
                    BYTES(to) = more ? y | BYTES(to) << (uint8_t)width : y;
                }
            }
        }
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

static TARGET void NAME(k_codes)(const Segment *g, const uint8_t *page, int64_t token, int tile, uint8_t *codes) {
    PLANES(k_plane, g->channels, tile)
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
            for (int d = 0; d < channels; d++) {
                uint16_t high;
                memcpy(&high, from + 2 * d, 2);
                uint32_t bits = (uint32_t)high << 16;
                memcpy(row + d, &bits, 4);
            }
        }
    }
    return to;
}

/* acc[r, t] = sum_d q[r, d] codes[d, t] for RN rows and VN vectors of tokens. */
INLINE void NAME(k_block)(float *acc, int64_t room, const float *q, int64_t q_room, const uint8_t *codes, int channels,
                          int tile, const float *book, int bits, const int RN, const int VN) {
    vf a[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VN; v++) a[r][v] = all(0);
    for (int d = 0; d < channels; d++) {
        vf x[2];
#pragma GCC unroll 2
        for (int v = 0; v < VN; v++) {
            const uint8_t *from = codes + d * tile + v * VL;
            x[v] = book ? NAME(entries)(from, book, bits) : NAME(numbers)(from);
        }
#pragma GCC unroll 4
        for (int r = 0; r < RN; r++)
#pragma GCC unroll 2
            for (int v = 0; v < VN; v++) a[r][v] += q[r * q_room + d] * x[v];
    }
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VN; v++) store(acc + r * room + v * VL, a[r][v]);
}

/* out[r, c] += sum_t p[r, t] x[t, c] for RN rows and VN vectors of channels; `lanes` of the last count. x: numbers, or
 * codes. */
INLINE void NAME(v_block)(float *out, int64_t room, const float *p, int64_t p_room, const float *rows,
                          const uint8_t *codes, int64_t stride, int n, const float *book, int bits, int lanes,
                          const int RN, const int VN) {
    vf a[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++) a[r][v] = all(0);
    for (int t = 0; t < n; t++) {
        vf x[4];
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++) {
            int64_t at = t * stride + v * VL;
            x[v] = rows ? load(rows + at) : book ? NAME(entries)(codes + at, book, bits) : NAME(numbers)(codes + at);
        }
#pragma GCC unroll 4
        for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VN; v++) a[r][v] += p[r * p_room + t] * x[v];
    }
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++) {
        float *to = out + r * room;
        if (lanes == VL) {
#pragma GCC unroll 4
            for (int v = 0; v < VN; v++) store(to + v * VL, load(to + v * VL) + a[r][v]);
        } else {
            float part[VL];
            store(part, a[r][0]);
            for (int i = 0; i < lanes; i++) to[i] += part[i];
        }
    }
}

/* q . k over the rows: acc[r, t] = sum_d q[r, d] x[t, d] for n tokens, x [n, x_room] float32. */
INLINE void NAME(dot_block)(float *acc, int64_t room, const float *q, int64_t q_room, const float *x, int64_t x_room,
                            int channels, int n, const int RN) {
    for (int t = 0; t < n; t++) {
        vf a[4];
#pragma GCC unroll 4
        for (int r = 0; r < RN; r++) a[r] = all(0);
        for (int d = 0; d < channels; d += VL) {
            vf y = load(x + t * x_room + d);
#pragma GCC unroll 4
            for (int r = 0; r < RN; r++) a[r] += load(q + r * q_room + d) * y;
        }
#pragma GCC unroll 4
        for (int r = 0; r < RN; r++) acc[r * room + t] += NAME(sum)(a[r]);
    }
}

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

INLINE void NAME(k_rows)(float *acc, int64_t room, const float *q, int64_t q_room, const uint8_t *codes, int channels,
                         int tile, const float *book, int bits, int rows) {
    for (int t = 0; t < tile;) {
        if (tile - t >= 2 * VL) {
#define CALL(RN) \
    NAME(k_block)(acc + r * room + t, room, q + r * q_room, q_room, codes + t, channels, tile, book, bits, RN, 2)
            BY_ROWS(rows, CALL)
#undef CALL
            t += 2 * VL;
        } else {
#define CALL(RN) \
    NAME(k_block)(acc + r * room + t, room, q + r * q_room, q_room, codes + t, channels, tile, book, bits, RN, 1)
            BY_ROWS(rows, CALL)
#undef CALL
            t += VL;
        }
    }
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

/* One for numbers, one for codes, one for books, so that each compiles to a loop without branches. */
static TARGET void NAME(k_numbers)(float *acc, int64_t room, const float *q, int64_t q_room, const uint8_t *codes,
                                   const Segment *g, int channels, int tile, int rows) {
    if (g->kind == UNIFORM)
        NAME(k_rows)(acc, room, q, q_room, codes, channels, tile, 0, 0, rows);
    else if (g->bits <= 4)
        NAME(k_rows)(acc, room, q, q_room, codes, channels, tile, g->book, 4, rows);
    else
        NAME(k_rows)(acc, room, q, q_room, codes, channels, tile, g->book, 8, rows);
}

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
#define CALL(RN) NAME(dot_block)(acc + r * room, room, q + r * q_room, q_room, x, x_room, channels, n, RN)
    BY_ROWS(rows, CALL)
#undef CALL
}

/* What a thread works with. */
typedef struct {
    float *q, *scaled, *sums, *logits, *out, *p, *acc, *x, *scale, *zero, *spare;
    uint8_t *codes;
} NAME(Scratch);
#define Scratch NAME(Scratch)

/* Lay the scratch out in memory; returns its bytes. */
static int64_t NAME(laid_out)(const Shape *shape, uint8_t *memory, Scratch *s) {
    int64_t at = 0, tile = shape->tile, wide = shape->k_width > shape->v_width ? shape->k_width : shape->v_width;
#define TAKE(field, count, type)                \
    s->field = memory ? (type *)(memory + at) : 0; \
    at += round_up((count) * (int64_t)sizeof(type), 64);
    TAKE(q, ROWS * shape->k_width, float)
    TAKE(scaled, ROWS * shape->channels, float)
    TAKE(sums, ROWS * shape->k_width, float)
    TAKE(logits, ROWS * TOKENS, float)
    TAKE(out, ROWS * shape->v_width, float)
    TAKE(p, ROWS * tile, float)
    TAKE(acc, ROWS * (shape->channels > tile ? shape->channels : tile), float)
    TAKE(x, tile * shape->channels, float)
    TAKE(scale, tile * shape->channels, float)
    TAKE(zero, tile * shape->channels, float)
    TAKE(spare, tile * wide, float)
    TAKE(codes, tile * shape->codes, uint8_t)
#undef TAKE
    return at;
}

#if LEVEL == 0
static int64_t scratch_portable(const Shape *shape) {
    Scratch s;
    return laid_out_portable(shape, 0, &s);
}
#endif

/* Scales and zeros of `from` on, n blocks of them. */
INLINE void NAME(grid)(const Segment *g, const uint8_t *page, int64_t from, int64_t n, float *scale, float *zero) {
    NAME(halves)(scale, page + g->scale + 2 * from, n);
    if (g->zero != NOTHING)
        NAME(halves)(zero, page + g->zero + 2 * from, n);
    else
        for (int64_t i = 0; i < n; i++) zero[i] = -g->middle * scale[i];
}

/* [tile, groups] to [groups, tile]; the compiler knows how for few groups. */
INLINE void NAME(turn_by)(float *restrict to, const float *restrict from, int tile, const int groups) {
    for (int i = 0; i < groups; i++)
        for (int t = 0; t < tile; t++) to[i * tile + t] = from[t * groups + i];
}

INLINE void NAME(turn)(float *to, const float *from, int tile, int groups) {
    switch (groups) {
        case 2: NAME(turn_by)(to, from, tile, 2); break;
        case 4: NAME(turn_by)(to, from, tile, 4); break;
        default: NAME(turn_by)(to, from, tile, groups);
    }
}

/* Scales and zeros of a tile's tokens as [groups, tile], into s->scale and s->zero. */
static TARGET void NAME(token_grid)(const Segment *g, const uint8_t *page, int64_t token, int tile, int groups,
                                    Scratch *s) {
    if (groups == 1) {
        NAME(grid)(g, page, token, tile, s->scale, s->zero);
        return;
    }
    NAME(halves)(s->spare, page + g->scale + 2 * token * groups, (int64_t)tile * groups);
    NAME(turn)(s->scale, s->spare, tile, groups);
    if (g->zero != NOTHING) {
        NAME(halves)(s->spare, page + g->zero + 2 * token * groups, (int64_t)tile * groups);
        NAME(turn)(s->zero, s->spare, tile, groups);
    } else {
        for (int i = 0; i < tile * groups; i++) s->zero[i] = -g->middle * s->scale[i];
    }
}

/* Scales and zeros of the channels of a tile whose tokens share them, into s->scale and s->zero. */
static TARGET void NAME(channel_grid)(const Segment *g, const uint8_t *page, int64_t token, int groups, Scratch *s) {
    NAME(grid)(g, page, token / g->token_group * groups, groups, s->scale, s->zero);
    if (g->channel_group > 1) {
        for (int d = g->channels - 1; d >= 0; d--) {
            s->scale[d] = s->scale[d / g->channel_group];
            s->zero[d] = s->zero[d / g->channel_group];
        }
    }
}

/* Add q . k of one segment to the logits [rows, tile] of n tokens. q [rows, k_width] and sums are the segment's. */
static TARGET void NAME(k_segment)(const Segment *g, const Shape *shape, const uint8_t *page, int64_t token, int n,
                                   const float *q, const float *sums, int rows, float *logits, Scratch *s) {
    int tile = (int)shape->tile, groups = g->channels / g->channel_group;
    int64_t q_room = shape->k_width;
    if (g->kind >= FLOAT32) {
        int64_t x_room;
        const float *x = NAME(rows_of)(g, page, token, n, s->x, &x_room);
        NAME(k_raw)(logits, TOKENS, q, q_room, x, x_room, g->channels, n, rows);
        return;
    }
    NAME(k_codes)(g, page, token, tile, s->codes);
    if (g->kind == CODEBOOK || g->token_group == 1) {
        NAME(token_grid)(g, page, token, tile, groups, s);
        for (int i = 0; i < groups; i++) {
            int c = i * g->channel_group;
            NAME(k_numbers)(s->acc, tile, q + c, q_room, s->codes + c * tile, g, g->channel_group, tile, rows);
            for (int r = 0; r < rows; r++) {
                vf sum = all(sums[r * q_room + i]);
                for (int t = 0; t < tile; t += VL) {
                    float *to = logits + r * TOKENS + t;
                    vf x = load(to) + load(s->scale + i * tile + t) * load(s->acc + r * tile + t);
                    if (g->kind == UNIFORM) x += load(s->zero + i * tile + t) * sum;
                    store(to, x);
                }
            }
        }
        return;
    }
    NAME(channel_grid)(g, page, token, groups, s);
    int64_t room = shape->channels;
    float offset[ROWS];
    for (int r = 0; r < rows; r++) {
        vf sum = all(0);
        int d = 0;
        for (; d + VL <= g->channels; d += VL) {
            vf x = load(q + r * q_room + d);
            store(s->scaled + r * room + d, x * load(s->scale + d));
            sum += x * load(s->zero + d);
        }
        offset[r] = NAME(sum)(sum);
        for (; d < g->channels; d++) {
            s->scaled[r * room + d] = q[r * q_room + d] * s->scale[d];
            offset[r] += q[r * q_room + d] * s->zero[d];
        }
    }
    NAME(k_numbers)(s->acc, tile, s->scaled, room, s->codes, g, g->channels, tile, rows);
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t += VL) {
            float *to = logits + r * TOKENS + t;
            store(to, load(to) + load(s->acc + r * tile + t) + offset[r]);
        }
}

/* Add p v of one segment for n tokens to out [rows, v_width]; p [rows, TOKENS]. */
static TARGET void NAME(v_segment)(const Segment *g, const Shape *shape, const uint8_t *page, int64_t token, int n,
                                   const float *p, int rows, float *out, Scratch *s) {
    int tile = (int)shape->tile, groups = g->channels / g->channel_group;
    if (g->kind >= FLOAT32) {
        int64_t x_room;
        const float *x = NAME(rows_of)(g, page, token, n, s->x, &x_room);
        NAME(v_raw)(out, shape->v_width, p, TOKENS, x, x_room, n, g->channels, rows);
        return;
    }
    NAME(v_codes)(g, page, token, tile, s->codes, shape->codes);
    if (g->kind == CODEBOOK || g->token_group == 1) {
        NAME(token_grid)(g, page, token, tile, groups, s);
        for (int i = 0; i < groups; i++) {
            int c = i * g->channel_group;
            for (int r = 0; r < rows; r++) {
                vf sum = all(0);
                for (int t = 0; t < tile; t += VL) {
                    vf x = load(p + r * TOKENS + t);
                    store(s->p + r * tile + t, x * load(s->scale + i * tile + t));
                    sum += x * load(s->zero + i * tile + t);
                }
                if (g->kind == UNIFORM) {
                    float zero = NAME(sum)(sum), *to = out + r * shape->v_width + c;
                    int d = 0;
                    for (; d + VL <= g->channel_group; d += VL) store(to + d, load(to + d) + zero);
                    for (; d < g->channel_group; d++) to[d] += zero;
                }
            }
            NAME(v_numbers)(out + c, shape->v_width, s->p, tile, s->codes + c, shape->codes, tile, g, g->channel_group,
                            rows);
        }
        return;
    }
    NAME(channel_grid)(g, page, token, groups, s);
    int64_t room = shape->channels;
    memset(s->acc, 0, rows * room * sizeof(float));
    NAME(v_numbers)(s->acc, room, p, TOKENS, s->codes, shape->codes, tile, g, g->channels, rows);
    for (int r = 0; r < rows; r++) {
        float mass = 0, *to = out + r * shape->v_width;
        for (int t = 0; t < tile; t++) mass += p[r * TOKENS + t];
        for (int d = 0; d < g->channels; d++) to[d] += s->scale[d] * s->acc[r * room + d] + s->zero[d] * mass;
    }
}

/* scale, cap and hide what is no token: logits [rows, TOKENS] of n tokens in a tile. */
INLINE void NAME(finish)(const Problem *p, float *logits, int rows, int n, int tile) {
    for (int r = 0; r < rows; r++) {
        float *to = logits + r * TOKENS;
        if (p->softcap > 0) {
            for (int t = 0; t < tile; t += VL) { /* tanh(x) = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|) */
                vf x = load(to + t) * (1 / p->softcap);
                vi sign = (vi)x & (vi)all(-0.0f);
                vf e = exponential(-2.0f * (vf)((vi)x & ~(vi)all(-0.0f)));
                vf y = (1.0f - e) / (1.0f + e) * p->softcap;
                store(to + t, (vf)((vi)y | sign));
            }
        }
        for (int t = n; t < tile; t++) to[t] = -INFINITY;
    }
}

/* The lse of one page gains the logits of a tile of it. */
static TARGET void NAME(add_page)(float *lse, const float *logits, int tile) {
    float most = *lse, sum = 0;
    for (int t = 0; t < tile; t++) most = logits[t] > most ? logits[t] : most;
    if (most == -INFINITY) return;
    vf sums = all(0);
    for (int t = 0; t < tile; t += VL) sums += exponential(load(logits + t) - most);
    sum = NAME(sum)(sums) + expf(*lse - most);
    *lse = most + logf(sum);
}

/* Logits of a block to exp(logit - m), m their running maximum; out and the running sum follow. */
static TARGET void NAME(soften)(float *logits, int tokens, float *out, int64_t width, float *m, float *sum) {
    vf most = all(-INFINITY);
    for (int t = 0; t < tokens; t += VL) {
        vf x = load(logits + t);
        vi more = x > most;
        most = (vf)((more & (vi)x) | (~more & (vi)most));
    }
    float lanes[VL], next = *m;
    store(lanes, most);
    for (int i = 0; i < VL; i++) next = lanes[i] > next ? lanes[i] : next;
    if (next != *m && *sum > 0) {
        float factor = expf(*m - next);
        for (int64_t d = 0; d < width; d += VL) store(out + d, load(out + d) * factor);
        *sum *= factor;
    }
    *m = next;
    next = next == -INFINITY ? 0 : next;
    vf total = all(0);
    for (int t = 0; t < tokens; t += VL) {
        vf x = exponential(load(logits + t) - next);
        store(logits + t, x);
        total += x;
    }
    *sum += NAME(sum)(total);
}

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
        int64_t first = next.token / g->token_group, last = (next.token + tile - 1) / g->token_group;
        int64_t row = 2 * g->channels / g->channel_group;
        for (int64_t at = first * row; at < (last + 1) * row; at += 64) {
            __builtin_prefetch(next.page + g->scale + at);
            if (g->zero != NOTHING) __builtin_prefetch(next.page + g->zero + at);
        }
    }
}

static TARGET void NAME(run)(const Problem *p, const Shape *shape, const Item *item, void *memory) {
    Scratch s;
    NAME(laid_out)(shape, memory, &s);
    int rows = (int)(p->rows - item->row < ROWS ? p->rows - item->row : ROWS), tile = (int)shape->tile;
    int64_t k_width = shape->k_width, v_width = shape->v_width, at = item->stream * p->rows + item->row;
    const Side *k = &item->source->k, *v = &item->source->v;
    memset(s.q, 0, rows * k_width * sizeof(float));
    memset(s.out, 0, rows * v_width * sizeof(float));
    float bias[ROWS], m[ROWS], sum[ROWS];
    for (int r = 0; r < rows; r++) {
        const float *q = p->q + (at + r) * p->k_dim;
        int64_t to = r * k_width;
        bias[r] = p->bias ? p->bias[at + r] * p->scale : 0, m[r] = -INFINITY, sum[r] = 0;
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
    int64_t block = TOKENS / tile;
    for (int64_t first = item->first; first < item->last; first += block) {
        int64_t last = item->last - first < block ? item->last : first + block;
        for (int64_t i = first; i < last; i++) {
            Place here = NAME(place)(k, item, i, tile);
            NAME(fetch)(i + 1 < last ? k : v, item, i + 1 < last ? i + 1 : first, tile);
            float *logits = s.logits + (i - first) * tile;
            for (int r = 0; r < rows; r++)
                for (int t = 0; t < tile; t += VL) store(logits + r * TOKENS + t, all(bias[r]));
            int64_t offset = 0;
            for (int j = 0; j < k->count; j++) {
                const Segment *g = &k->segments[j];
                NAME(k_segment)(g, shape, here.page, here.token, here.n, s.q + offset, s.sums + offset, rows, logits, &s);
                offset += round_up(g->channels, 16);
            }
            NAME(finish)(p, logits, rows, here.n, tile);
            if (p->lse_of_pages && item->source->ids)
                for (int r = 0; r < rows; r++)
                    NAME(add_page)(p->lse_of_pages + (at + r) * p->pages + here.which, logits + r * TOKENS, tile);
        }
        for (int r = 0; r < rows; r++)
            NAME(soften)(s.logits + r * TOKENS, (int)(last - first) * tile, s.out + r * v_width, v_width, &m[r], &sum[r]);
        for (int64_t i = first; i < last; i++) {
            Place here = NAME(place)(v, item, i, tile);
            if (i + 1 < item->last) NAME(fetch)(i + 1 < last ? v : k, item, i + 1, tile);
            int64_t offset = 0;
            for (int j = 0; j < v->count; j++) {
                const Segment *g = &v->segments[j];
                NAME(v_segment)(g, shape, here.page, here.token, here.n, s.logits + (i - first) * tile, rows,
                                s.out + offset, &s);
                offset += round_up(g->channels, 16);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        float *to = item->partial + r * (v_width + 2);
        memcpy(to, s.out + r * v_width, v_width * sizeof(float));
        to[v_width] = m[r], to[v_width + 1] = sum[r];
    }
}

#undef INLINE
#undef vf
#undef vi
#undef load
#undef store
#undef all
#undef exponential
#undef PLANES
#undef BY_ROWS
#undef Scratch
#undef LEVEL
#undef NAME
#undef TARGET
#undef VL
