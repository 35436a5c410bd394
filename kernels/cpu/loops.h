/* The inner loops over keys and values of a tile: few rows by few vectors, in registers. A part of `tiles.h`, as are LEVEL,
 * VL, TARGET and NAME. */

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

/* q . k of RN rows and TN tokens: acc[r, t] += sum_d q[r, d] x[t, d], x [TN, x_room] float32. */
INLINE void NAME(dots_of)(float *acc, int64_t room, const float *q, int64_t q_room, const float *x, int64_t x_room,
                          int channels, const int RN, const int TN) {
    vf a[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
        for (int t = 0; t < TN; t++) a[r][t] = all(0);
    for (int d = 0; d < channels; d += VL) {
        vf y[4];
#pragma GCC unroll 4
        for (int t = 0; t < TN; t++) y[t] = load(x + t * x_room + d);
#pragma GCC unroll 4
        for (int r = 0; r < RN; r++) {
            vf z = load(q + r * q_room + d);
#pragma GCC unroll 4
            for (int t = 0; t < TN; t++) a[r][t] += z * y[t];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
        for (int t = 0; t < TN; t++) acc[r * room + t] += NAME(sum)(a[r][t]);
}

/* q . k over the rows: acc[r, t] += sum_d q[r, d] x[t, d] for n tokens, x [n, x_room] float32, `many` tokens at a time. */
INLINE void NAME(dot_block)(float *acc, int64_t room, const float *q, int64_t q_room, const float *x, int64_t x_room,
                            int channels, int n, const int many, const int RN) {
    int t = 0;
    for (; t + many <= n; t += many) NAME(dots_of)(acc + t, room, q, q_room, x + t * x_room, x_room, channels, RN, many);
    for (; t < n; t++) NAME(dots_of)(acc + t, room, q, q_room, x + t * x_room, x_room, channels, RN, 1);
}
