/* Pieces of a page, as kernels/cpu/encode.py packs them; their numbers and codes to bytes. */

#define INLINE static inline __attribute__((always_inline))
#define NOTHING (-1)
#define TINY 0x1p-24f /* as in quantizers/grid.py */
#define HUGEST 65504.0f
#define ROUNDING 12582912.0f /* 1.5 * 2^23: added, it leaves no room for fractions */
enum { UNIFORM, CODEBOOK, FLOAT32, FLOAT16, BFLOAT16, E4M3, E5M2, E2M1_FLOAT, E2M1_POWER }; /* the last two by their scales */
enum { ELEMENTS = 1 << 16 }; /* from which on threads are worth their start */

/* One plane of codes: `width` bits each, the first in the low bits; token t's begin at byte offset + t * stride. */
typedef struct {
    int64_t offset, stride, width;
} Plane;

/* Some channels of K or V in a page; kernels/cpu/encode.py mirrors it. */
typedef struct {
    int64_t kind, channels, planes;     /* planes: the highest bits first; those of numbers have one, with no width */
    int64_t token_group, channel_group; /* what shares a scale */
    int64_t scale, zero;                /* byte offset of float16 [page / token_group, channels / channel_group]; scales
                                           of floating-point codes are bfloat16, or E4M3 or E8M0 of E2M1 */
    int64_t page_scale;                 /* byte offset of the float32 that multiplies those of E2M1_FLOAT */
    int64_t levels;                     /* the highest code; where no zero is stored, half of it stands for 0 */
    const float *middles, *book;        /* [levels], [levels + 1] */
    float cut;                          /* the share of a block's range that is cut off at each end */
    float root;                         /* channels^1/2 */
    float weight;                       /* of these channels, where there is a gain */
    int64_t centre;                     /* byte offset of float16 [channels]; or NOTHING */
    Plane plane[4];
} Piece;

typedef struct {
    const Piece *pieces;
    int64_t count;
    const uint8_t *x; /* [streams, each * page_tokens, dim] of dtype FLOAT32, FLOAT16 or BFLOAT16 */
    int64_t dim, dtype;
    int64_t each, stream, row; /* pages of a stream; numbers of x from a stream to the next, from a token to the next */
    float power, most; /* of the gain, where there is one: a token's norm is the last of its numbers then; or most 0 */
} Side;

typedef struct {
    Side side[2]; /* K, V */
    uint8_t *pool;
    const int64_t *ids;  /* [pages] records of the pool */
    const int64_t *rows; /* [pages]: single tokens, written where these tokens of a page lie; or NULL: whole pages */
    int64_t record_stride, record_bytes, pages, page_tokens, level;
    int64_t records, tokens; /* that ids and rows may name */
} Pages;

typedef union {
    float f;
    uint32_t u;
} Word;
typedef uint16_t __attribute__((may_alias)) two_codes;
typedef uint32_t __attribute__((may_alias)) four_codes;
typedef uint64_t __attribute__((may_alias)) eight_codes;

INLINE float larger(float x, float y) { return x > y ? x : y; }
INLINE float smaller(float x, float y) { return x < y ? x : y; }

/* The nearest float16, ties to even, of |x| <= HUGEST. */
INLINE uint16_t to_half(float x) {
    Word word = {x}, size = {fabsf(x)}, small = {size.f + 0.5f}; /* whose last bit is worth that of the least float16 */
    uint32_t normal = ((size.u + 0xfff + (size.u >> 13 & 1)) >> 13) - (112 << 10);
    uint32_t bits = size.f < 0x1p-14f ? small.u - 0x3f000000u : normal;
    return (uint16_t)(bits | (word.u >> 16 & 0x8000));
}

/* A finite float16. */
INLINE float from_half(uint16_t x) {
    Word size = {.u = (uint32_t)(x & 0x7fff) << 13}, sign = {.u = (uint32_t)(x & 0x8000) << 16};
    size.f *= 0x1p112f;
    size.u |= sign.u;
    return size.f;
}

/* Number i of x, of a dtype that the compiler knows. */
INLINE float number(const uint8_t *x, int64_t i, const int dtype) {
    if (dtype == FLOAT32) return ((const float *)x)[i];
    if (dtype == FLOAT16) return from_half(((const uint16_t *)x)[i]);
    return ((Word){.u = (uint32_t)((const uint16_t *)x)[i] << 16}).f;
}

/* `channels` neighbours in each of `tokens` rows of x, of a dtype that the compiler knows, less c, to `to`. */
INLINE void rows_less(const uint8_t *x, int64_t dim, int64_t channels, int64_t tokens, const float *restrict c,
                      float *restrict to, const int dtype) {
    for (int64_t t = 0; t < tokens; t++, to += channels)
        if (c)
            for (int64_t i = 0; i < channels; i++) to[i] = number(x, t * dim + i, dtype) - c[i];
        else
            for (int64_t i = 0; i < channels; i++) to[i] = number(x, t * dim + i, dtype);
}

/* The same as float32: *stride numbers from row to row; where they lie, or in `room`, also where rows lie `apart`, as
 * they are read twice. c: their centre, or NULL. */
INLINE const float *floats(const uint8_t *x, int64_t dtype, int64_t dim, int64_t channels, int64_t tokens, int apart,
                           const float *c, float *room, int64_t *stride) {
    *stride = channels;
    if (dtype == FLOAT16) {
        rows_less(x, dim, channels, tokens, c, room, FLOAT16);
    } else if (dtype == BFLOAT16) {
        rows_less(x, dim, channels, tokens, c, room, BFLOAT16);
    } else if (c || apart) {
        rows_less(x, dim, channels, tokens, c, room, FLOAT32);
    } else {
        *stride = dim;
        return (const float *)x;
    }
    return room;
}

/* n codes, below 256, to the bytes of a plane: `width` bits of each from bit `below` on. */
INLINE void pack(const uint8_t *codes, int64_t n, int64_t below, int64_t width, uint8_t *to) {
    if (width == 8) {
        memcpy(to, codes, n);
    } else if (width == 4) {
        const two_codes *from = (const two_codes *)codes;
        for (int64_t i = 0; i < n / 2; i++) {
            uint16_t x = from[i] >> below & 0x0f0f;
            to[i] = (uint8_t)(x | x >> 4);
        }
    } else if (width == 2) {
        const four_codes *from = (const four_codes *)codes;
        for (int64_t i = 0; i < n / 4; i++) {
            uint32_t x = from[i] >> below & 0x03030303;
            to[i] = (uint8_t)(x | x >> 6 | x >> 12 | x >> 18);
        }
    } else {
        const eight_codes *from = (const eight_codes *)codes;
        for (int64_t i = 0; i < n / 8; i++) {
            uint64_t x = from[i] >> below & 0x0101010101010101u;
            x |= x >> 7; /* neighbours, then pairs, then fours */
            x |= x >> 14;
            to[i] = (uint8_t)(x | x >> 28);
        }
    }
}

/* Codes [tokens, channels] to all planes, from the page's token `first` on. */
INLINE void put_codes(const Piece *g, const uint8_t *codes, int64_t tokens, int64_t first, uint8_t *record) {
    int64_t below = 0;
    for (int64_t i = g->planes - 1; i >= 0; i--) {
        const Plane *plane = &g->plane[i];
        int64_t rows = tokens, n = g->channels;
        if (plane->stride == n * plane->width / 8) rows = 1, n *= tokens; /* rows without anything between them */
        for (int64_t t = 0; t < rows; t++)
            pack(codes + t * n, n, below, plane->width, record + plane->offset + (first + t) * plane->stride);
        below += plane->width;
    }
}

INLINE void put_halves(uint8_t *to, const float *x, int64_t n) {
    uint16_t *halves = (uint16_t *)to; /* fields begin at multiples of 16 bytes */
    for (int64_t i = 0; i < n; i++) halves[i] = to_half(x[i]);
}
