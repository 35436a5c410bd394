/* Pages written from K and V in basis coordinates, on CPUs; what codecs `encode` is its specification, bit for bit.
 *
 *   uniform   zero = min x, scale = (max x - zero) / levels, code = round((x - zero) / scale); or symmetric, no zero
 *   codebook  norm = |x| / D^1/2, code = how many middles of the book x / |x| exceeds
 *   joint     codebooks of the same tokens, whose codes say together by how much their norm grows: `segments.Gain`
 *   centred   either of the first two of x less c, a mean over the page's tokens in float16
 *
 * Scales, zeros and norms are rounded to float16 first, and codes against what is stored. Two things are not determined
 * by the specification: the sign of a zero that is 0, and the last bit of a norm, whose squares are summed in another
 * order. x is finite: of nan and infinities any codes are made.
 *
 * A page at a time: the range of each block, all grids of the page, then codes. Loops are over neighbours in memory,
 * for the compiler to vectorize; everything is inlined into one function for each instruction set, of which
 * `kvcomp_encode` chooses one when it runs. Moved: K and V once, the record once.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* A product and a sum that are rounded at once would give other grids. */
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOTHING (-1)
#define TINY 0x1p-24f /* as in quantizers/grid.py */
#define HUGEST 65504.0f
#define ROUNDING 12582912.0f /* 1.5 * 2^23: added, it leaves no room for fractions */
enum { UNIFORM, CODEBOOK, FLOAT32, FLOAT16, BFLOAT16 };
enum { ELEMENTS = 1 << 16 }; /* from which on threads are worth their start */

/* One plane of codes: `width` bits each, the first in the low bits; token t's begin at byte offset + t * stride. */
typedef struct {
    int64_t offset, stride, width;
} Plane;

/* Some channels of K or V in a page; kernels/cpu/encode.py mirrors it. */
typedef struct {
    int64_t kind, channels, planes;     /* planes: the highest bits first; those of numbers have one, with no width */
    int64_t token_group, channel_group; /* what shares a scale */
    int64_t scale, zero;                /* byte offset of float16 [page / token_group, channels / channel_group] */
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
    const uint8_t *x; /* [pages, page_tokens, dim] of dtype FLOAT32, FLOAT16 or BFLOAT16 */
    int64_t dim, dtype;
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

/* The same as float32: *stride numbers from row to row; where they lie, or in `room`. c: their centre, or NULL. */
INLINE const float *floats(const uint8_t *x, int64_t dtype, int64_t dim, int64_t channels, int64_t tokens,
                           const float *c, float *room, int64_t *stride) {
    *stride = channels;
    if (dtype == FLOAT16) {
        rows_less(x, dim, channels, tokens, c, room, FLOAT16);
    } else if (dtype == BFLOAT16) {
        rows_less(x, dim, channels, tokens, c, room, BFLOAT16);
    } else if (c) {
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

/* Least and largest of `tokens` rows of x, for each channel. */
INLINE void range_of_channels(const float *x, int64_t stride, int64_t tokens, int64_t channels, float *low,
                              float *high) {
    memcpy(low, x, channels * sizeof(float));
    memcpy(high, x, channels * sizeof(float));
    for (int64_t t = 1; t < tokens; t++) {
        const float *row = x + t * stride;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            low[c] = smaller(row[c], low[c]);
            high[c] = larger(row[c], high[c]);
        }
    }
}

/* Least of `least` and largest of `most`, for each run of `group` channels. */
INLINE void range_of_groups(const float *least, const float *most, int64_t groups, int64_t group, float *low,
                            float *high) {
    for (int64_t i = 0; i < groups; i++, least += group, most += group) {
        float a = least[0], b = most[0];
#pragma omp simd reduction(min : a) reduction(max : b)
        for (int64_t c = 0; c < group; c++) {
            a = smaller(least[c], a);
            b = larger(most[c], b);
        }
        low[i] = a, high[i] = b;
    }
}

/* The range of n blocks, `low` and `high`, to their zeros and scales, as they are to be stored. */
INLINE void grids(float *low, float *high, int64_t n, const int symmetric, float levels, float cut) {
    float middle = levels / 2;
    for (int64_t i = 0; i < n; i++) {
        float a = low[i], b = high[i];
        if (symmetric) b = larger(-a, b), a = -b;
        float off = (b - a) * cut;
        if (cut > 0) a += off, b -= off;
        float zero = from_half(to_half(smaller(larger(a, -HUGEST), HUGEST)));
        float scale = symmetric ? b / middle : (b - zero) / levels;
        scale = from_half(to_half(smaller(larger(scale, TINY), HUGEST)));
        low[i] = symmetric ? -middle * scale : zero;
        high[i] = scale;
    }
}

/* round((x - zero) / scale), of which there are `levels` + 1. */
INLINE uint8_t code_of(float x, float zero, float scale, float levels) {
    Word y = {smaller(larger((x - zero) / scale, 0), levels) + ROUNDING};
    return (uint8_t)y.u;
}

/* Codes, scales and zeros of `tokens` rows of x. */
INLINE void put_blocks(const Piece *g, const float *x, int64_t stride, int64_t tokens, int64_t first, uint8_t *record,
                       uint8_t *codes, float *room, const int64_t group) {
    int64_t channels = g->channels, groups = channels / group, rows = tokens / g->token_group;
    float levels = (float)g->levels, *zeros = room, *scales = room + rows * groups, *least = scales + rows * groups;
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * g->token_group * stride;
        float *low = zeros + r * groups, *high = scales + r * groups, *most = least + channels;
        if (g->token_group == 1) {
            range_of_groups(from, from, groups, group, low, high);
        } else if (group == 1) {
            range_of_channels(from, stride, g->token_group, channels, low, high);
        } else {
            range_of_channels(from, stride, g->token_group, channels, least, most);
            range_of_groups(least, most, groups, group, low, high);
        }
    }
    if (g->zero == NOTHING)
        grids(zeros, scales, rows * groups, 1, levels, g->cut);
    else
        grids(zeros, scales, rows * groups, 0, levels, g->cut);
    uint8_t *to = codes;
    for (int64_t t = 0; t < tokens; t++, x += stride, to += channels) {
        const float *zero = zeros + t / g->token_group * groups, *scale = scales + t / g->token_group * groups;
        if (group == 1)
            for (int64_t c = 0; c < channels; c++) to[c] = code_of(x[c], zero[c], scale[c], levels);
        else
            for (int64_t i = 0; i < groups; i++)
                for (int64_t c = 0; c < group; c++)
                    to[i * group + c] = code_of(x[i * group + c], zero[i], scale[i], levels);
    }
    put_codes(g, codes, tokens, first, record);
    int64_t at = 2 * first / g->token_group * groups;
    put_halves(record + g->scale + at, scales, rows * groups);
    if (g->zero != NOTHING) put_halves(record + g->zero + at, zeros, rows * groups);
}

INLINE void put_uniform(const Piece *g, const float *x, int64_t stride, int64_t tokens, int64_t first, uint8_t *record,
                        uint8_t *codes, float *room) {
    switch (g->channel_group) { /* where the compiler knows that they are few, they are one vector */
        case 8: put_blocks(g, x, stride, tokens, first, record, codes, room, 8); break;
        case 16: put_blocks(g, x, stride, tokens, first, record, codes, room, 16); break;
        default: put_blocks(g, x, stride, tokens, first, record, codes, room, g->channel_group);
    }
}

/* How many of `levels` middles each of x [n] exceeds, where the compiler knows them to be few. */
INLINE void count_below(const float *x, int64_t n, const float *middles, const int levels, uint8_t *codes) {
    for (int64_t i = 0; i < n; i++) {
        int32_t above = 0;
#pragma GCC unroll 16
        for (int j = 0; j < levels; j++) above += x[i] > middles[j];
        codes[i] = (uint8_t)above;
    }
}

/* As `count_below`, of 2^bits - 1 ascending middles. */
INLINE void search(const float *x, int64_t n, const float *middles, int64_t levels, uint8_t *codes) {
    for (int64_t i = 0; i < n; i++) {
        int64_t at = 0;
        for (int64_t step = (levels + 1) / 2; step; step /= 2) at += x[i] > middles[at + step - 1] ? step : 0;
        codes[i] = (uint8_t)at;
    }
}

/* Codes of directions [tokens, channels]. */
INLINE void put_directions(const Piece *g, const float *x, int64_t tokens, int64_t first, uint8_t *record,
                           uint8_t *codes) {
    int64_t n = tokens * g->channels;
    switch (g->levels) {
        case 1: count_below(x, n, g->middles, 1, codes); break;
        case 3: count_below(x, n, g->middles, 3, codes); break;
        case 7: count_below(x, n, g->middles, 7, codes); break;
        case 15: count_below(x, n, g->middles, 15, codes); break;
        default: search(x, n, g->middles, g->levels, codes);
    }
    put_codes(g, codes, tokens, first, record);
}

/* Codes and norms of `tokens` rows of x. */
INLINE void put_codebook(const Piece *g, const float *x, int64_t stride, int64_t tokens, int64_t first, uint8_t *record,
                         uint8_t *codes, float *norms) {
    int64_t channels = g->channels;
    float *units = norms + tokens, *unit = units;
    for (int64_t t = 0; t < tokens; t++, x += stride, unit += channels) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < channels; c++) sum += x[c] * x[c];
        norms[t] = from_half(to_half(smaller(sqrtf(sum) / g->root, HUGEST)));
        float length = larger(norms[t] * g->root, TINY);
        for (int64_t c = 0; c < channels; c++) unit[c] = x[c] / length;
    }
    put_directions(g, units, tokens, first, record, codes);
    put_halves(record + g->scale + 2 * first, norms, tokens);
}

/* Codes of all pieces of a side, and the norm of `tokens` rows of x, which comes behind their coordinates. */
INLINE void put_joint(const Side *side, const float *x, int64_t stride, int64_t tokens, int64_t first, uint8_t *record,
                      uint8_t *codes, float *norms) {
    float *own = norms + tokens, *coded = own + tokens, *units = coded + tokens;
    const float *given = x + side->dim - 1;
    memset(own, 0, 2 * tokens * sizeof(float));
    for (const Piece *g = side->pieces; g < side->pieces + side->count; x += g->channels, g++) {
        int64_t channels = g->channels;
        for (int64_t t = 0; t < tokens; t++) {
            float norm = larger(given[t * stride], TINY);
            for (int64_t c = 0; c < channels; c++) units[t * channels + c] = x[t * stride + c] / norm;
        }
        put_directions(g, units, tokens, first, record, codes);
        for (int64_t t = 0; t < tokens; t++) {
            const float *unit = units + t * channels;
            float a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
            for (int64_t c = 0; c < channels; c++) {
                float entry = g->book[codes[t * channels + c]];
                a += unit[c] * unit[c];
                b += entry * (side->power < 1 ? entry : unit[c]);
            }
            own[t] += g->weight * a;
            coded[t] += g->weight * b;
        }
    }
    for (int64_t t = 0; t < tokens; t++) {
        float gain = smaller(own[t] / larger(coded[t], TINY), side->most);
        norms[t] = smaller(given[t * stride] * (side->power < 1 ? sqrtf(gain) : gain), HUGEST);
    }
    put_halves(record + side->pieces->scale + 2 * first, norms, tokens);
}

/* The sum of four rows of channel c; 0 where it is no number. */
INLINE float four(const uint8_t *x, int64_t dim, int64_t c, const int dtype) {
    float sum = (number(x, c, dtype) + number(x, dim + c, dtype)) +
                (number(x, 2 * dim + c, dtype) + number(x, 3 * dim + c, dtype));
    return sum == sum ? sum : 0;
}

/* The sum of four rows of x, or of twice as many, to `sum`: of each with the least and the greatest before it, the middle one. */
INLINE void add_middle(const uint8_t *x, int64_t dim, int64_t channels, float *restrict sum, float *restrict low,
                       float *restrict high, const int dtype, const int twice) {
    const uint8_t *next = x + 4 * dim * (dtype == FLOAT32 ? 4 : 2);
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
        float least = low[c], most = high[c], part = four(x, dim, c, dtype), total = sum[c];
        total += smaller(larger(part, least), most);
        least = smaller(part, least), most = larger(part, most);
        if (twice) {
            part = four(next, dim, c, dtype);
            total += smaller(larger(part, least), most);
            least = smaller(part, least), most = larger(part, most);
        }
        sum[c] = total, low[c] = least, high[c] = most;
    }
}

/* The centre c of `tokens` rows of x, as `quantizers.centred.centre`, to the record. room: 6 numbers of each channel. */
INLINE void put_centre(const Piece *g, const uint8_t *x, int64_t dim, int64_t tokens, uint8_t *record, float *c,
                       float *room, const int dtype) {
    int64_t n = g->channels, row = dim * (dtype == FLOAT32 ? 4 : 2), t = 0, rest = tokens % 4, used = tokens;
    float *low = room, *high = low + n, *rows = high + n;
    memset(c, 0, n * sizeof(float));
    if (!rest && tokens > 8) {
        for (int64_t i = 0; i < n; i++) {
            float a = four(x, dim, i, dtype), b = four(x + 4 * row, dim, i, dtype);
            low[i] = smaller(a, b), high[i] = larger(a, b);
        }
        for (t = 8; t + 8 <= tokens; t += 8) add_middle(x + t * row, dim, n, c, low, high, dtype, 1);
        if (t < tokens) add_middle(x + t * row, dim, n, c, low, high, dtype, 0);
        used = tokens - 8;
    } else {
        for (; t + 4 <= tokens; t += 4)
            for (int64_t i = 0; i < n; i++) c[i] += four(x + t * row, dim, i, dtype);
        if (rest) { /* as if rows of zeros followed */
            memset(rows, 0, 4 * n * sizeof(float));
            rows_less(x + t * row, dim, n, rest, 0, rows, dtype);
            for (int64_t i = 0; i < n; i++) c[i] += four((const uint8_t *)rows, n, i, FLOAT32);
        }
    }
    float share = 1.0f / (float)used;
    uint16_t *halves = (uint16_t *)(record + g->centre);
    for (int64_t i = 0; i < n; i++) {
        float mean = c[i] * share;
        halves[i] = to_half(smaller(larger(mean == mean ? mean : 0, -HUGEST), HUGEST));
        c[i] = from_half(halves[i]);
    }
}

INLINE void put_numbers(const Piece *g, const uint8_t *x, int64_t stride, int64_t tokens, int64_t first,
                        uint8_t *record) {
    for (int64_t t = 0; t < tokens; t++)
        memcpy(record + g->plane[0].offset + (first + t) * g->plane[0].stride, x + t * stride, g->plane[0].stride);
}

INLINE int64_t itemsize(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* A page of a side, or some of its tokens. codes [page_tokens, channels], and room for 3 * page_tokens + 9 numbers of
 * each channel. */
INLINE void encode_side(const Side *side, const uint8_t *x, int64_t tokens, int64_t first, uint8_t *record,
                        uint8_t *codes, float *room) {
    int64_t size = itemsize(side->dtype), stride;
    if (side->most > 0) {
        const float *from = floats(x, side->dtype, side->dim, side->dim, tokens, 0, room, &stride);
        put_joint(side, from, stride, tokens, first, record, codes, from == room ? room + tokens * side->dim : room);
        return;
    }
    for (const Piece *g = side->pieces; g < side->pieces + side->count; x += g->channels * size, g++) {
        if (g->kind != UNIFORM && g->kind != CODEBOOK) {
            put_numbers(g, x, side->dim * size, tokens, first, record);
            continue;
        }
        float *c = 0, *rest = room;
        if (g->centre != NOTHING) {
            c = room, rest = room + g->channels;
            if (side->dtype == FLOAT32)
                put_centre(g, x, side->dim, tokens, record, c, rest, FLOAT32);
            else if (side->dtype == FLOAT16)
                put_centre(g, x, side->dim, tokens, record, c, rest, FLOAT16);
            else
                put_centre(g, x, side->dim, tokens, record, c, rest, BFLOAT16);
        }
        const float *from = floats(x, side->dtype, side->dim, g->channels, tokens, c, rest, &stride);
        rest = from == rest ? rest + tokens * g->channels : rest;
        if (g->kind == UNIFORM)
            put_uniform(g, from, stride, tokens, first, record, codes, rest);
        else
            put_codebook(g, from, stride, tokens, first, record, codes, rest);
    }
}

INLINE void encode(const Pages *p, int64_t m, uint8_t *codes, float *room) {
    uint8_t *record = p->pool + p->ids[m] * p->record_stride;
    if (!p->rows) memset(record, 0, p->record_bytes); /* what lies between fields */
    for (int i = 0; i < 2; i++) {
        const Side *side = &p->side[i];
        int64_t bytes = p->page_tokens * side->dim * itemsize(side->dtype);
        encode_side(side, side->x + m * bytes, p->page_tokens, p->rows ? p->rows[m] : 0, record, codes, room);
    }
}

static void encode_portable(const Pages *p, int64_t m, uint8_t *codes, float *room) { encode(p, m, codes, room); }
#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))
AVX2 static void encode_avx2(const Pages *p, int64_t m, uint8_t *codes, float *room) { encode(p, m, codes, room); }
AVX512 static void encode_avx512(const Pages *p, int64_t m, uint8_t *codes, float *room) { encode(p, m, codes, room); }
#endif

static void run(const Pages *p, int64_t m, uint8_t *codes, float *room) {
#if defined(__x86_64__)
    if (p->level == 2) {
        encode_avx512(p, m, codes, room);
        return;
    }
    if (p->level == 1) {
        encode_avx2(p, m, codes, room);
        return;
    }
#endif
    encode_portable(p, m, codes, room);
}

/* Whole records, summaries excepted, which become 0; or tokens of them, and nothing else. Returns 0, or 1 where memory
 * ran out, 2 where ids or rows are out of bounds. */
int kvcomp_encode(const Pages *p) {
    for (int64_t m = 0; m < p->pages; m++)
        if (p->ids[m] < 0 || p->ids[m] >= p->records || (p->rows && (p->rows[m] < 0 || p->rows[m] >= p->tokens))) return 2;
    int64_t widest = 0, threads = 1;
    for (int i = 0; i < 2; i++) widest = p->side[i].dim > widest ? p->side[i].dim : widest;
    widest = (widest + 63) / 64 * 64;
    int64_t codes = p->page_tokens * widest, floats = (3 * p->page_tokens + 9) * widest;
    int64_t each = codes + floats * sizeof(float);
#ifdef _OPENMP
    int64_t work = p->pages * p->page_tokens * (p->side[0].dim + p->side[1].dim);
    threads = work < ELEMENTS ? 1 : omp_get_max_threads();
#endif
    uint8_t *room;
    if (posix_memalign((void **)&room, 64, threads * each)) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < p->pages; m++) {
        uint8_t *mine = room;
#ifdef _OPENMP
        mine += omp_get_thread_num() * each;
#endif
        run(p, m, mine, (float *)(mine + codes));
    }
    free(room);
    return 0;
}
