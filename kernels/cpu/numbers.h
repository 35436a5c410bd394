/* Codes of one channel, in words of 32 bits, to numbers. A part of `blocks.h`. */

/* Entries of a book of so many bits. */
INLINE vf NAME(entry)(vu code, const vf *table, const float *book, const int kind) {
#if LEVEL == 2
    if (kind == FEW) return (vf)_mm512_permutexvar_ps((__m512i)code, (__m512)table[0]);
    vf found[8];
    const int many = kind == FIVE ? 1 : kind == SIX ? 2 : kind == SEVEN ? 4 : 8;
#pragma GCC unroll 8
    for (int i = 0; i < many; i++)
        found[i] = (vf)_mm512_permutex2var_ps((__m512)table[2 * i], (__m512i)code, (__m512)table[2 * i + 1]);
#pragma GCC unroll 3
    for (int half = 1, bit = 5; half < many; half *= 2, bit++) {
        __mmask16 upper = _mm512_test_epi32_mask((__m512i)code, _mm512_set1_epi32(1 << bit));
#pragma GCC unroll 4
        for (int i = 0; i < many; i += 2 * half)
            found[i] = (vf)_mm512_mask_blend_ps(upper, (__m512)found[i], (__m512)found[i + half]);
    }
    return found[0];
#elif LEVEL == 0 && defined(__aarch64__)
    if (kind == FEW || kind == FIVE) return NAME(looked_up)(code, table, kind == FEW ? 1 : 2);
    return NAME(number)(code, book, BOOK);
#else
    return NAME(number)(code, book, kind == FEW ? TABLE : BOOK);
#endif
}

/* Where the codes of a channel lie; STORED: its numbers. */
typedef struct {
    const vu *from[3];
    int shift[3], width[3];
} NAME(Channel);

INLINE NAME(Channel) NAME(channel)(const vu *words, const Segment *g, int c, const int planes, const int kind) {
    NAME(Channel) found;
    if (kind == STORED) {
        found.from[0] = words + c * STEP;
        return found;
    }
#pragma GCC unroll 3
    for (int i = 0; i < planes; i++) {
        uint32_t bit = g->plane[i].bit + c * g->plane[i].width;
        found.from[i] = words + bit / 32 * STEP, found.shift[i] = bit % 32, found.width[i] = g->plane[i].width;
    }
#if LEVEL == 2
#pragma GCC unroll 3
    for (int i = 1; i < planes; i++) /* rotated so far, higher bits leave room for lower ones */
#pragma GCC unroll 2
        for (int j = 0; j < i; j++) found.shift[j] = (found.shift[j] - found.width[i]) & 31;
#endif
    return found;
}

INLINE void NAME(tables)(vf *table, const Segment *g, const int kind) {
#if LEVEL == 0 && defined(__aarch64__)
    const int tables = kind == FEW ? 4 : kind == FIVE ? 8 : 0;
#else
    const int tables = LEVEL < 2 || kind > EIGHT ? 0 : kind == FEW ? 1 : 2 << (kind - FIVE);
#endif
#pragma GCC unroll 16
    for (int i = 0; i < tables; i++) table[i] = load(g->book + i * VL);
}

/* Numbers of vector v of a channel, of codes of `bits` bits in `planes` planes. */
INLINE vf NAME(numbers_at)(const NAME(Channel) *c, int v, const vf *table, const float *book, int bits, const int planes,
                           const int kind) {
    if (kind == STORED) return (vf)c->from[0][v];
    if (kind >= SMALL_FLOAT) {
        vi word = (vi)SHIFT_LEFT(c->from[0][v], 24 - c->shift[0]);
        vf y = kind == SMALL_FLOAT ? (vf)(word >> 4 & (int32_t)0x87f00000) : (vf)(word >> 3 & (int32_t)0x8fe00000);
        return y * (kind == SMALL_FLOAT ? 0x1p120f : 0x1p112f);
    }
#if LEVEL == 2
    vu code = c->from[0][v];
    int lower = 0;
    if (planes == 1) code = SHIFT_RIGHT(code, c->shift[0]);
    if (planes > 1) code = (vu)_mm512_rorv_epi32((__m512i)code, _mm512_set1_epi32(c->shift[0]));
#pragma GCC unroll 3
    for (int i = planes - 1; i > 0; i--) lower += c->width[i];
#pragma GCC unroll 3
    for (int i = 1; i < planes; i++) {
        __m512i low = _mm512_rorv_epi32((__m512i)c->from[i][v], _mm512_set1_epi32(c->shift[i]));
        code = (vu)_mm512_ternarylogic_epi32(_mm512_set1_epi32((1 << lower) - 1), low, (__m512i)code, 0xca);
        lower -= c->width[i];
    }
#else
    vu code = c->from[0][v] >> c->shift[0];
#pragma GCC unroll 3
    for (int i = 1; i < planes; i++)
        code = code << c->width[i] | (c->from[i][v] >> c->shift[i] & ((1u << c->width[i]) - 1));
#endif
    if (kind == WHOLE || LEVEL < 2) code &= (1u << bits) - 1; /* otherwise what lies above is not looked at */
    return kind == WHOLE ? __builtin_convertvector((vi)code, vf) : NAME(entry)(code, table, book, kind);
}

/* x [many, ROOM]: numbers of `many` channels from `first` on. */
INLINE void NAME(codes_block)(float *x, const vu *words, int n, const Segment *g, int first, int many, const int planes,
                              const int kind) {
    vf table[16];
    NAME(tables)(table, g, kind);
    const float *book = g->book;
    int bits = g->bits;
    for (int c = first; c < first + many; c++, x += ROOM) {
        NAME(Channel) at = NAME(channel)(words, g, c, planes, kind);
        for (int v = 0; v < n; v++) store(x + v * VL, NAME(numbers_at)(&at, v, table, book, bits, planes, kind));
    }
}
