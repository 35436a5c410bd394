/* One run of tiles for one instruction set: included with LEVEL, VL (floats in a vector), TARGET and NAME(x). */

#define INLINE static inline __attribute__((always_inline)) TARGET
#define APART static __attribute__((noinline)) TARGET
#define vf NAME(vf)
#define vi NAME(vi)
#define vu NAME(vu)
typedef float vf __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * VL), aligned(4), may_alias));

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

/* Numbers of codes in vectors: CAST: the codes; TABLE: entries of a book of 16; BOOK: of one of 256. */
INLINE vf NAME(number)(vu code, const float *book, const int kind) {
    if (kind == CAST) return __builtin_convertvector((vi)code, vf);
#if LEVEL == 2
    if (kind == TABLE) return (vf)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(book));
    return (vf)_mm512_i32gather_ps((__m512i)code, book, 4);
#elif LEVEL == 1
    if (kind == BOOK) return (vf)_mm256_i32gather_ps(book, (__m256i)code, 4);
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(book), (__m256i)code);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(book + 8), (__m256i)code);
    return (vf)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)code, 28)));
#else
    return (vf){book[code[0]], book[code[1]], book[code[2]], book[code[3]]};
#endif
}

/* Numbers of the codes of `width` bits from bit `shift` of words on; TABLE of AVX-512 looks at 4 bits and no more. */
INLINE vf NAME(pick)(vu words, int shift, const int width, const float *book, const int kind) {
    if (LEVEL == 2 && kind == TABLE) return NAME(number)(words >> shift, book, kind);
    return NAME(number)(words >> shift & ((1u << width) - 1), book, kind);
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

/* Lanes of a and b in turn: those of their first halves, of their second halves. */
#if VL == 16
#define FIRST(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define SECOND(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif VL == 8
#define FIRST(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define SECOND(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define FIRST(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define SECOND(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif

/* Words [VL, W] of VL tokens, in W vectors, to [W, VL]: each round turns the address (token, word) by one bit. */
INLINE void NAME(turn_words)(vi *x, const int W) {
    vi y[16];
#pragma GCC unroll 4
    for (int round = 1; round < VL; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) y[i] = x[i];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; i++) {
            x[2 * i] = FIRST(y[i], y[i + W / 2]);
            x[2 * i + 1] = SECOND(y[i], y[i + W / 2]);
        }
    }
}
#undef FIRST
#undef SECOND

/* K: W words of each of T tokens, `stride` bytes from one to the next, to [W, T]. */
INLINE void NAME(k_chunk)(vu *to, const uint8_t *from, int64_t stride, int tile, const int W) {
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
        for (int i = 0; i < W; i++) to[(i * tile + t) / VL] = (vu)x[i];
    }
}

/* K: one plane of T tokens to words [words, T] of 32 bits; returns where the next plane's go. */
APART vu *NAME(k_plane)(vu *to, const uint8_t *from, int64_t stride, int bytes, int tile) {
    int at = 0, per = tile / VL;
    for (; bytes - at >= 64; at += 64, to += 16 * per) NAME(k_chunk)(to, from + at, stride, tile, 16);
    if (bytes - at >= 32) NAME(k_chunk)(to, from + at, stride, tile, 8), at += 32, to += 8 * per;
    if (bytes - at >= 16) NAME(k_chunk)(to, from + at, stride, tile, 4), at += 16, to += 4 * per;
    if (bytes - at >= 8) NAME(k_chunk)(to, from + at, stride, tile, 2), at += 8, to += 2 * per;
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
        words = NAME(k_plane)(words, from, plane->stride, g->channels * plane->width / 8, tile);
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

/* Words of a tile: n of each token, codes of one plane that fill them; where codes go on in a plane of lower bits, its
 * words and the first code's bit in them. */
typedef struct {
    const vu *words, *low;
    int n, bit;
} NAME(Codes);
#define Codes NAME(Codes)

/* acc[r, t] = sum_d q[r, d] x[d, t] for RN rows and VN vectors of tokens; x: numbers of codes of width + rest bits. */
INLINE void NAME(k_block)(float *acc, int64_t room, const float *q, int64_t q_room, Codes from, int tile,
                          const float *book, const int width, const int rest, const int kind, const int RN,
                          const int VN) {
    const vu *words = from.words;
    vf a[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VN; v++) a[r][v] = all(0);
    for (int j = 0; j < from.n; j++, words += tile / VL, q += 32 / width, from.bit += 32 / width * rest) {
        vu low[2];
#pragma GCC unroll 2
        for (int v = 0; v < VN && rest; v++) low[v] = from.low[from.bit / 32 * (tile / VL) + v] >> from.bit % 32;
#pragma GCC unroll 8
        for (int i = 0; i < 32 / width; i++) {
            vf x[2];
#pragma GCC unroll 2
            for (int v = 0; v < VN; v++) {
                if (rest) {
                    vu high = words[v] >> i * width & ((1u << width) - 1);
                    x[v] = NAME(number)(high << rest | (low[v] >> i * rest & ((1u << rest) - 1)), book, kind);
                } else {
                    x[v] = NAME(pick)(words[v], i * width, width, book, kind);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < RN; r++)
#pragma GCC unroll 2
                for (int v = 0; v < VN; v++) a[r][v] += q[r * q_room + i] * x[v];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VN; v++) store(acc + r * room + v * VL, a[r][v]);
}

/* The same of `channels` channels from `first` on, where codes have several planes, or end within a word. */
INLINE void NAME(k_mixed)(float *acc, int64_t room, const float *q, int64_t q_room, const vu *words, const Segment *g,
                          int first, int channels, int tile, const int kind, const int RN, const int VN) {
    vf a[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VN; v++) a[r][v] = all(0);
    for (int d = 0; d < channels; d++) {
        vu code[2] = {{0}, {0}};
        const vu *from = words;
        for (int i = 0; i < g->planes; i++) {
            int width = g->plane[i].width, bit = (first + d) * width;
#pragma GCC unroll 2
            for (int v = 0; v < VN; v++) {
                vu part = from[bit / 32 * (tile / VL) + v] >> bit % 32 & ((1u << width) - 1);
                code[v] = code[v] << width | part;
            }
            from += (g->channels * width + 31) / 32 * (tile / VL);
        }
#pragma GCC unroll 2
        for (int v = 0; v < VN; v++) {
            vf x = NAME(number)(code[v], g->book, kind);
#pragma GCC unroll 4
            for (int r = 0; r < RN; r++) a[r][v] += q[r * q_room + d] * x;
        }
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
#define CALL(RN) NAME(dot_block)(acc + r * room, room, q + r * q_room, q_room, x, x_room, channels, n, RN)
    BY_ROWS(rows, CALL)
#undef CALL
}

/* Which token (from the first of a vector on), which scale (likewise) and whether any word lies in each lane; what is
 * summed where none lies is never looked at. */
typedef struct {
    vi token, scale, mask;
    int whole, first; /* all lanes; the first group of channels */
} NAME(Lanes);
#define Lanes NAME(Lanes)

#if LEVEL > 0
/* Lane l of a vector of words: a[index[l]]. */
INLINE vf NAME(lanes)(vf a, vi index) {
#if LEVEL == 2
    return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)a);
#else
    return (vf)_mm256_permutevar8x32_ps((__m256)a, (__m256i)index);
#endif
}

INLINE vu NAME(some_words)(const uint8_t *from, vi mask, int whole) {
    if (whole) return *(const vu *)from;
#if LEVEL == 2
    return (vu)_mm512_maskz_loadu_epi32(_mm512_movepi32_mask((__m512i)mask), from);
#else
    return (vu)_mm256_maskload_epi32((const int *)from, (__m256i)mask);
#endif
}

INLINE Lanes NAME(lanes_of)(const Segment *g, Words w, int chunk) {
    Lanes x;
    int per = 32 / g->plane[0].width, groups = g->channels / g->channel_group;
    x.first = chunk * VL * per / g->channel_group;
    x.whole = 1;
    for (int l = 0; l < VL; l++) {
        int token = w.together > 1 ? l / w.words : 0, word = w.together > 1 ? l % w.words : chunk * VL + l;
        int used = token < w.together && word < w.words;
        x.token[l] = used ? token : 0;
        x.scale[l] = used ? token * groups + word * per / g->channel_group - x.first : 0;
        x.mask[l] = used ? -1 : 0;
        x.whole &= used;
    }
    return x;
}

INLINE void NAME(all_lanes)(const Segment *g, Lanes *to) {
    Words w = words_of(g, VL);
    for (int chunk = 0; chunk * VL < w.words; chunk++) to[chunk] = NAME(lanes_of)(g, w, chunk);
}

/* weights [rows, TILE, VL]: p of each lane's token, times its scale; sums [rows, VL] gain p times zero. */
INLINE void NAME(v_weights)(float *weights, float *sums, int64_t room, const float *p, const Segment *g, const Lanes *x,
                            int together, int tile, const float *scale, const float *zero, const int RN) {
    const int groups = g->channels / g->channel_group, uniform = g->kind == UNIFORM;
    vf sum[4];
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++) sum[r] = uniform ? load(sums + r * room) : all(0);
    scale += x->first, zero += x->first;
    for (int t = 0; t < tile; t += VL, p += VL) {
        vf many[4];
        vi token = x->token;
#pragma GCC unroll 4
        for (int r = 0; r < RN; r++) many[r] = load(p + r * TOKENS);
        for (int i = 0; i < VL; i += together, token += together, weights += VL) {
            vf s = NAME(lanes)(load(scale), x->scale), z = all(0);
            scale += together * groups;
            if (uniform) z = NAME(lanes)(load(zero), x->scale), zero += together * groups;
#pragma GCC unroll 4
            for (int r = 0; r < RN; r++) {
                vf y = NAME(lanes)(many[r], token);
                store(weights + r * (TILE * VL), y * s);
                sum[r] += y * z;
            }
        }
    }
    if (uniform) {
#pragma GCC unroll 4
        for (int r = 0; r < RN; r++) store(sums + r * room, sum[r]);
    }
}

APART void NAME(all_weights)(float *weights, float *sums, int64_t room, const float *p, const Segment *g, const Lanes *x,
                             int together, int tile, const float *scale, const float *zero, int rows) {
#define CALL(RN)                                                                                                 \
    NAME(v_weights)(weights + r * (TILE * VL), sums + r * room, room, p + r * TOKENS, g, x, together, tile, scale, \
                    zero, RN)
    BY_ROWS(rows, CALL)
#undef CALL
}

/* out [rows, codes of a word, VL] gains weights . x for RN rows and NI codes of each word, from bit `low` on. */
INLINE void NAME(v_words)(float *out, int64_t room, const float *weights, const uint8_t *from, int64_t stride,
                          const Lanes *x, int steps, int low, const float *book, const int width,
                          const int kind, const int RN, const int NI) {
    vf a[4][8];
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NI; i++) a[r][i] = load(out + r * room + i * VL);
    for (int t = 0; t < steps; t++, from += stride, weights += VL) {
        vu w = NAME(some_words)(from, x->mask, x->whole) >> low;
#pragma GCC unroll 8
        for (int i = 0; i < NI; i++) {
            vf y = NAME(pick)(w, i * width, width, book, kind);
#pragma GCC unroll 4
            for (int r = 0; r < RN; r++) a[r][i] += load(weights + r * (TILE * VL)) * y;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 8
        for (int i = 0; i < NI; i++) store(out + r * room + i * VL, a[r][i]);
}

/* As many codes at a time as there are registers for. */
INLINE void NAME(v_codes_of)(float *out, int64_t room, const float *weights, const uint8_t *from, int64_t stride,
                             const Lanes *x, int steps, const float *book, int rows, const int width,
                             const int kind) {
    const int many = LEVEL == 2 && width < 8 ? 8 : 4, few = LEVEL == 2 ? 4 : 2;
    for (int i = 0; i < 32 / width; i += many) {
#define CALL(RN)                                                                                                       \
    for (int j = 0; j < many; j += RN > 3 ? few : many)                                                                \
        NAME(v_words)(out + r * room + (i + j) * VL, room, weights + r * (TILE * VL), from, stride, x, steps,   \
                      (i + j) * width, book, width, kind, RN, RN > 3 ? few : many);
        BY_ROWS(rows, CALL)
#undef CALL
    }
}

#define WORDS(width, kind)                                                                                             \
    APART void NAME(v_##kind##width)(float *out, int64_t room, const float *weights, const uint8_t *from,      \
                                             int64_t stride, const Lanes *x, int steps, const float *book,             \
                                             int rows) {                                                               \
        NAME(v_codes_of)(out, room, weights, from, stride, x, steps, book, rows, width, kind);                   \
    }
WORDS(1, TABLE) WORDS(2, TABLE) WORDS(4, TABLE) WORDS(8, CAST) WORDS(8, BOOK)
#if LEVEL == 1
WORDS(1, CAST) WORDS(2, CAST) WORDS(4, CAST)
#define SMALL(width) uniform ? NAME(v_CAST##width) : NAME(v_TABLE##width)
#else
#define SMALL(width) NAME(v_TABLE##width)
#endif
#undef WORDS

/* Add p v of one segment to out, which is [rows, chunks, codes of a word and one for the zeros, VL]. */
APART void NAME(v_whole)(const Segment *g, Words w, const uint8_t *page, int64_t token, int tile, const float *p,
                                 int rows, float *out, int64_t room, const float *scale, const float *zero,
                                 float *weights, const Lanes *x) {
    const Plane *plane = &g->plane[0];
    int uniform = g->kind == UNIFORM, width = plane->width, per = 32 / width;
    const float *book = uniform ? CODES[width <= 4 ? width : 0] : g->book;
    const uint8_t *from = page + plane->offset + token * plane->stride;
    for (int at = 0; at < w.words; at += VL, x++, out += (per + 1) * VL, from += 4 * VL) {
        NAME(all_weights)(weights, out + per * VL, room, p, g, x, w.together, tile, scale, zero, rows);
        int steps = tile / w.together;
        int64_t stride = w.together * plane->stride;
        switch (width) {
            case 1: (SMALL(1))(out, room, weights, from, stride, x, steps, book, rows); break;
            case 2: (SMALL(2))(out, room, weights, from, stride, x, steps, book, rows); break;
            case 4: (SMALL(4))(out, room, weights, from, stride, x, steps, book, rows); break;
            default: (uniform ? NAME(v_CAST8) : NAME(v_BOOK8))(out, room, weights, from, stride, x, steps, book, rows);
        }
    }
}
#undef SMALL
#endif

/* A row of out as the segments' words have it, to one in the order of channels; both padded segment by segment. */
static TARGET void NAME(in_order)(const Side *v, const float *out, float *to) {
    for (int j = 0; j < v->count; j++) {
        const Segment *g = &v->segments[j];
        Words w = words_of(g, VL);
        if (!w.words) {
            memcpy(to, out, round_up(g->channels, 16) * sizeof(float));
        } else {
            int per = 32 / g->plane[0].width;
            const float *from = out;
            memset(to, 0, round_up(g->channels, 16) * sizeof(float));
            for (int chunk = 0; chunk * VL < w.words; chunk++, from += (per + 1) * VL) {
                for (int l = 0; l < VL; l++) {
                    int word = w.together > 1 ? l % w.words : chunk * VL + l;
                    if (word >= w.words || l >= w.together * w.words) continue;
                    for (int i = 0; i < per; i++) to[word * per + i] += from[i * VL + l] + from[per * VL + l];
                }
            }
        }
        out += out_room(g), to += round_up(g->channels, 16);
    }
}

/* What a thread works with. */
typedef struct {
    float *q, *scaled, *sums, *logits, *out, *p, *acc, *x, *scale, *zero, *spare, *weights;
    uint8_t *codes;
    vu *words;
    uint8_t *lanes;
} NAME(Scratch);
#define Scratch NAME(Scratch)

/* Lay the scratch out in memory; returns its bytes. */
static int64_t NAME(laid_out)(const Shape *shape, uint8_t *memory, Scratch *s) {
    int64_t at = 0, tile = shape->tile, wide = shape->channels;
#define TAKE(field, count, type)                \
    s->field = memory ? (type *)(memory + at) : 0; \
    at += round_up((count) * (int64_t)sizeof(type), 64);
    TAKE(q, ROWS * shape->k_width, float)
    TAKE(scaled, ROWS * shape->channels, float)
    TAKE(sums, ROWS * shape->k_width, float)
    TAKE(logits, ROWS * TOKENS + 16, float)
    TAKE(out, ROWS * shape->out_width, float)
    TAKE(p, ROWS * tile, float)
    TAKE(acc, ROWS * (shape->channels > tile ? shape->channels : tile), float)
    TAKE(x, tile * shape->channels, float)
    TAKE(scale, tile * shape->channels + 16, float)
    TAKE(zero, tile * shape->channels + 16, float)
    TAKE(spare, tile * wide, float)
    TAKE(codes, tile * shape->codes, uint8_t)
    TAKE(weights, ROWS * TILE * 16, float)
    TAKE(lanes, shape->out_width / 16 * 256, uint8_t)
    TAKE(words, tile * (shape->channels / 4 + 4) / VL, vu)
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

/* Scales and zeros 0 of what is no token: 0 times anything is not always 0. n tokens of a tile, `step` numbers from one
 * to the next, in `groups` rows of `room`. */
INLINE void NAME(clear)(Scratch *s, int n, int tile, int step, int groups, int room) {
    for (int i = 0; i < groups; i++)
        for (int t = n * step; t < tile * step; t++) s->scale[i * room + t] = s->zero[i * room + t] = 0;
}

/* Scales and zeros of a tile's n tokens as [groups, tile], into s->scale and s->zero. */
static TARGET void NAME(token_grid)(const Segment *g, const uint8_t *page, int64_t token, int n, int tile, int groups,
                                    Scratch *s) {
    if (groups == 1) {
        NAME(grid)(g, page, token, tile, s->scale, s->zero);
        NAME(clear)(s, n, tile, 1, 1, tile);
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
    NAME(clear)(s, n, tile, 1, groups, tile);
}

/* Scales and zeros of the channels of a tile whose tokens share them, into s->scale and s->zero. */
APART void NAME(channel_grid)(const Segment *g, const uint8_t *page, int64_t token, int groups, Scratch *s) {
    NAME(grid)(g, page, token / g->token_group * groups, groups, s->scale, s->zero);
    if (g->channel_group > 1) {
        for (int d = g->channels - 1; d >= 0; d--) {
            s->scale[d] = s->scale[d / g->channel_group];
            s->zero[d] = s->zero[d / g->channel_group];
        }
    }
}

/* Add q . k of one segment to the logits [rows, tile] of n tokens. q [rows, k_width] and sums are the segment's. */
APART void NAME(k_segment)(const Segment *g, const Shape *shape, const uint8_t *page, int64_t token, int n,
                                   const float *q, const float *sums, int rows, float *logits, Scratch *s) {
    int tile = (int)shape->tile, groups = g->channels / g->channel_group;
    int64_t q_room = shape->k_width;
    if (g->kind >= FLOAT32) {
        int64_t x_room;
        const float *x = NAME(rows_of)(g, page, token, n, s->x, &x_room);
        NAME(k_raw)(logits, TOKENS, q, q_room, x, x_room, g->channels, n, rows);
        return;
    }
    NAME(k_words)(g, page, token, tile, s->words);
    if (g->kind == CODEBOOK || g->token_group == 1) {
        NAME(token_grid)(g, page, token, n, tile, groups, s);
        for (int i = 0; i < groups; i++) {
            int c = i * g->channel_group;
            NAME(k_numbers)(s->acc, q + c, q_room, s->words, g, c, g->channel_group, tile, rows);
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
    NAME(k_numbers)(s->acc, s->scaled, room, s->words, g, 0, g->channels, tile, rows);
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t += VL) {
            float *to = logits + r * TOKENS + t;
            store(to, load(to) + load(s->acc + r * tile + t) + offset[r]);
        }
}

/* Add p v of one segment for n tokens to out [rows, v_width]; p [rows, TOKENS]. */
APART void NAME(v_segment)(const Segment *g, const Shape *shape, const uint8_t *page, int64_t token, int n,
                                   const float *p, int rows, float *out, Scratch *s, const void *lanes) {
    int tile = (int)shape->tile, groups = g->channels / g->channel_group;
#if LEVEL > 0
    Words w = words_of(g, VL);
    if (w.words) {
        NAME(grid)(g, page, token * groups, tile * groups, s->scale, s->zero);
        NAME(clear)(s, n, tile, groups, 1, 0);
        NAME(v_whole)(g, w, page, token, tile, p, rows, out, shape->out_width, s->scale, s->zero, s->weights,
                      lanes);
        return;
    }
#endif
    if (g->kind >= FLOAT32) {
        int64_t x_room;
        const float *x = NAME(rows_of)(g, page, token, n, s->x, &x_room);
        NAME(v_raw)(out, shape->out_width, p, TOKENS, x, x_room, n, g->channels, rows);
        return;
    }
    NAME(v_codes)(g, page, token, tile, s->codes, shape->codes);
    if (g->kind == CODEBOOK || g->token_group == 1) {
        NAME(token_grid)(g, page, token, n, tile, groups, s);
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
                    float zero = NAME(sum)(sum), *to = out + r * shape->out_width + c;
                    int d = 0;
                    for (; d + VL <= g->channel_group; d += VL) store(to + d, load(to + d) + zero);
                    for (; d < g->channel_group; d++) to[d] += zero;
                }
            }
            NAME(v_numbers)(out + c, shape->out_width, s->p, tile, s->codes + c, shape->codes, tile, g, g->channel_group,
                            rows);
        }
        return;
    }
    NAME(channel_grid)(g, page, token, groups, s);
    int64_t room = shape->channels;
    memset(s->acc, 0, rows * room * sizeof(float));
    NAME(v_numbers)(s->acc, room, p, TOKENS, s->codes, shape->codes, tile, g, g->channels, rows);
    for (int r = 0; r < rows; r++) {
        float mass = 0, *to = out + r * shape->out_width;
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
APART void NAME(soften)(float *logits, int tokens, float *out, int64_t width, float *m, float *sum) {
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
    int64_t block = TOKENS / tile;
    for (int64_t first = item->first; first < item->last; first += block) {
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

#undef INLINE
#undef APART
#undef vf
#undef vi
#undef load
#undef store
#undef all
#undef exponential
#undef PLANES
#undef BY_ROWS
#undef Scratch
#undef Lanes
#undef Codes
#undef vu
#undef LEVEL
#undef NAME
#undef TARGET
#undef VL
