/* Vectors of one instruction set: loads, codes to numbers, exponentials, and words of tokens turned around. A part of `tiles.h`, as are LEVEL, VL, TARGET and NAME. */

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

#if LEVEL == 0 && defined(__aarch64__)
/* Entries of a book of 16 `many` numbers, 1 or 2: bytes of the table are looked up, four of them for each code. */
INLINE vf NAME(looked_up)(vu code, const vf *table, const int many) {
    const uint8x16_t *x = (const uint8x16_t *)table;
    uint8x16_t at = (uint8x16_t)(code * 0x04040404u + 0x03020100u);
    uint8x16_t found = vqtbl4q_u8((uint8x16x4_t){{x[0], x[1], x[2], x[3]}}, at); /* 0 beyond it */
    if (many > 1) found = vqtbx4q_u8(found, (uint8x16x4_t){{x[4], x[5], x[6], x[7]}}, at - 64);
    return (vf)found;
}
#endif

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
#if defined(__aarch64__)
    if (kind == TABLE) return NAME(looked_up)(code, (const vf *)book, 1);
#endif
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
#elif defined(__aarch64__)
    for (; i + 4 <= n; i += 4) {
        float16x4_t four;
        memcpy(&four, from + 2 * i, 8);
        store(to + i, (vf)vcvt_f32_f16(four));
    }
#endif
    for (; i < n; i++) {
        uint16_t h;
        memcpy(&h, from + 2 * i, 2);
        to[i] = half_to_float(h);
    }
}

/* n numbers of bfloat16. */
INLINE void NAME(brains)(float *to, const uint8_t *from, int64_t n) {
    int64_t i = 0;
#if LEVEL == 2
    for (; i + 16 <= n; i += 16) {
        __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + 2 * i)));
        _mm512_storeu_si512(to + i, _mm512_slli_epi32(x, 16));
    }
#endif
#if LEVEL >= 1
    for (; i + 8 <= n; i += 8) {
        __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(from + 2 * i)));
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_slli_epi32(x, 16));
    }
#endif
    for (; i < n; i++) {
        uint16_t high;
        memcpy(&high, from + 2 * i, 2);
        uint32_t bits = (uint32_t)high << 16;
        memcpy(to + i, &bits, 4);
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
