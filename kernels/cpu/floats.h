/* Codes that are floating-point numbers of 4 or 8 bits, as quantizers/floats.py has them; scales of runs of channels. */

/* The nearest bfloat16, ties to even, of a positive number. */
INLINE uint16_t to_brain(float x) {
    Word word = {x};
    return (uint16_t)((word.u + 0x7fff + (word.u >> 16 & 1)) >> 16);
}

/* The nearest number of E4M3 (mantissa 3) or E5M2 (2), ties to even, of |x| <= the largest one. */
INLINE uint8_t to_float8(float x, const int mantissa) {
    const uint32_t drop = 23 - mantissa, bias = mantissa == 3 ? 7 : 15;
    Word word = {x}, size = {fabsf(x)}, least = {.u = (150 + 1 - bias - mantissa) << 23}, small = {size.f + least.f};
    uint32_t normal = ((size.u + (1u << (drop - 1)) - 1 + (size.u >> drop & 1)) >> drop) - ((127 - bias) << mantissa);
    Word from = {.u = (127 + 1 - bias) << 23};
    uint32_t bits = size.f < from.f ? small.u - least.u : normal; /* the last bit of `small` is worth the least number */
    return (uint8_t)(bits | (word.u >> 24 & 0x80));
}

/* A number of E4M3 without a sign. */
INLINE float from_e4m3(uint8_t x) {
    Word word = {.u = (uint32_t)x << 20};
    return word.f * 0x1p120f;
}

/* A power of two of E8M0. */
INLINE float from_power(uint8_t x) {
    Word word = {.u = x ? (uint32_t)x << 23 : 1u << 22};
    return word.f;
}

/* The nearest number of E2M1, ties to the even mantissa, 6 at most. */
INLINE uint8_t to_e2m1(float x) {
    Word word = {x}, fine, middle, coarse;
    float size = smaller(fabsf(x), 8);
    fine.f = 2 * size + ROUNDING, middle.f = size + ROUNDING, coarse.f = size / 2 + ROUNDING;
    int32_t a = fine.u & 31, b = (middle.u & 31) + 2, c = (coarse.u & 31) + 4;
    a = a < b ? a : b, a = a < c ? a : c, a = a < 7 ? a : 7;
    return (uint8_t)(a | (word.u >> 28 & 8));
}

/* The number of a code of E2M1. */
INLINE float from_e2m1(uint8_t code) {
    static const float sizes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    return code & 8 ? -sizes[code & 7] : sizes[code & 7];
}

/* The squared error of BLOCK numbers x / by as E2M1, summed by halves. */
enum { BLOCK = 32 };
INLINE float e2m1_error(const float *x, float by) {
    float error[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        float size = fabsf(x[i]) / by;
        Word near = {smaller(size, 6)}, step = {.u = near.u & 0xffu << 23};
        step.u = (step.u > 127u << 23 ? step.u : 127u << 23) + (22 << 23 | 1 << 22);
        float off = near.f + step.f;
        off = off - step.f - size;
        error[i] = off * off;
    }
#pragma GCC unroll 5
    for (int half = BLOCK / 2; half; half /= 2)
        for (int i = 0; i < half; i++) error[i] += error[i + half];
    return error[0];
}

INLINE float largest(const float *x, int64_t n) {
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t c = 0; c < n; c++) most = larger(fabsf(x[c]), most);
    return most;
}

/* Codes of 8 bits; a scale of bfloat16 for each token. */
INLINE void put_float8(const Piece *g, const float *x, int64_t stride, int64_t tokens, int64_t first, uint8_t *record,
                       uint8_t *codes, const int mantissa) {
    const float most = mantissa == 3 ? 448 : 57344;
    uint16_t *scales = (uint16_t *)(record + g->scale) + first;
    uint8_t *to = codes;
    for (int64_t t = 0; t < tokens; t++, x += stride, to += g->channels) {
        scales[t] = to_brain(smaller(larger(largest(x, g->channels) / most, 0x1p-126f), 0x1p112f));
        Word scale = {.u = (uint32_t)scales[t] << 16};
        for (int64_t c = 0; c < g->channels; c++)
            to[c] = to_float8(smaller(larger(x[c] / scale.f, -most), most), mantissa);
    }
    put_codes(g, codes, tokens, first, record);
}

/* Which of two neighbouring powers of two is the scale of up to BLOCK numbers: the one of less error. */
INLINE uint8_t power_of(const float *x, int64_t n) {
    float block[BLOCK] = {0};
    memcpy(block, x, n * sizeof(float));
    Word most = {largest(x, n)};
    int32_t exponent = (int32_t)(most.u >> 23) - 2;
    exponent = exponent < 0 ? 0 : exponent > 252 ? 252 : exponent;
    float by = from_power((uint8_t)exponent);
    for (int64_t i = 0; i < BLOCK; i++) block[i] /= by;
    exponent += e2m1_error(block, 2) < e2m1_error(block, 1) / 4;
    return (uint8_t)(exponent > 252 ? 252 : exponent);
}

/* Codes of 4 bits; a byte of scale for each run of channels, a power of two, or E4M3 times a float32 of the page. */
INLINE void put_float4(const Piece *g, const float *x, int64_t stride, int64_t tokens, int64_t first, uint8_t *record,
                       uint8_t *codes, float *room) {
    int64_t n = g->channels, group = g->channel_group, groups = (n + group - 1) / group;
    uint8_t *scales = record + g->scale + first * groups, *to = codes;
    float page = 0, *sizes = room;
    for (int64_t t = 0; t < tokens && g->kind == E2M1_FLOAT; t++)
        for (int64_t i = 0; i < groups; i++) {
            int64_t many = n - i * group < group ? n - i * group : group;
            sizes[t * groups + i] = largest(x + t * stride + i * group, many);
            page = larger(sizes[t * groups + i], page);
        }
    page = smaller(larger(page / 2688, 0x1p-126f), 0x1p115f);
    if (g->kind == E2M1_FLOAT) memcpy(record + g->page_scale, &page, sizeof page);
    for (int64_t t = 0; t < tokens; t++, x += stride)
        for (int64_t i = 0; i < groups; i++) {
            int64_t many = n - i * group < group ? n - i * group : group, at = t * groups + i;
            const float *from = x + i * group;
            float scale;
            if (g->kind == E2M1_FLOAT) {
                scales[at] = to_float8(smaller(larger(sizes[at] / 6 / page, 0x1p-9f), 448), 3);
                scale = from_e4m3(scales[at]) * page;
            } else {
                scales[at] = power_of(from, many);
                scale = from_power(scales[at]);
            }
            for (int64_t c = 0; c < many; c++) *to++ = to_e2m1(from[c] / scale);
        }
    put_codes(g, codes, tokens, first, record);
}

INLINE void put_floats(const Piece *g, const float *x, int64_t stride, int64_t tokens, int64_t first, uint8_t *record,
                       uint8_t *codes, float *room) {
    if (g->kind == E4M3)
        put_float8(g, x, stride, tokens, first, record, codes, 3);
    else if (g->kind == E5M2)
        put_float8(g, x, stride, tokens, first, record, codes, 2);
    else
        put_float4(g, x, stride, tokens, first, record, codes, room);
}

/* The number of channel i of a page's first token, whose code is given. */
INLINE float float_coded(const Piece *g, uint8_t code, const uint8_t *record, int64_t i) {
    const uint8_t *scale = record + g->scale;
    if (g->kind == E4M3 || g->kind == E5M2) {
        Word by = {.u = (uint32_t) * (const uint16_t *)scale << 16};
        Word size = {.u = (uint32_t)(code & 127) << (g->kind == E4M3 ? 20 : 21)};
        size.f *= g->kind == E4M3 ? 0x1p120f : 0x1p112f;
        size.u |= (uint32_t)(code & 128) << 24;
        return size.f * by.f;
    }
    scale += i / g->channel_group;
    if (g->kind == E2M1_POWER) return from_e2m1(code) * from_power(*scale);
    float page;
    memcpy(&page, record + g->page_scale, sizeof page);
    return from_e2m1(code) * (from_e4m3(*scale) * page);
}
