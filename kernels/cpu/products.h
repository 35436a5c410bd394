/* Products of rows with numbers of a block, which may be unpacked on the way. A part of `blocks.h`. */

/* acc[r, t] += scale[t] sum_c q[r, c] x[c, t], or without scale, for RN rows and VN vectors of tokens; x is not stored
 * in between, but for STORED numbers, which `words` are then. */
INLINE void NAME(k_codes)(float *acc, const float *scale, const float *q, int64_t q_room, const vu *words, int v, const Segment *g, int first,
                          int many, const int planes, const int kind, const int RN, const int VN) {
    vf table[16], a[4][4];
    NAME(tables)(table, g, kind);
    const float *book = kind == STORED ? 0 : g->book;
    int bits = kind == STORED ? 0 : g->bits;
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
        for (int i = 0; i < VN; i++) a[r][i] = scale ? all(0) : load(acc + r * TOKENS + i * VL);
    for (int c = 0; c < many; c++) {
        NAME(Channel) at = NAME(channel)(words, g, first + c, planes, kind);
        vf y[4];
#pragma GCC unroll 4
        for (int i = 0; i < VN; i++) y[i] = NAME(numbers_at)(&at, v + i, table, book, bits, planes, kind);
#pragma GCC unroll 4
        for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
            for (int i = 0; i < VN; i++) a[r][i] += q[r * q_room + c] * y[i];
    }
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
        for (int i = 0; i < VN; i++) {
            float *to = acc + r * TOKENS + i * VL;
            if (scale) a[r][i] = load(to) + a[r][i] * load(scale + i * VL);
            store(to, a[r][i]);
        }
}

/* out[r, c, lanes] += p[r, t] x[c, t] for RN rows and CN channels; x as in `k_codes`. */
INLINE void NAME(v_codes_by)(float *out, int64_t room, const float *p, const vu *words, int n, const Segment *g, int first,
                             const int planes, const int kind, const int RN, const int CN) {
    vf table[16], a[4][4];
    NAME(tables)(table, g, kind);
    const float *book = kind == STORED ? 0 : g->book;
    int bits = kind == STORED ? 0 : g->bits;
    NAME(Channel) at[4];
#pragma GCC unroll 4
    for (int c = 0; c < CN; c++) at[c] = NAME(channel)(words, g, first + c, planes, kind);
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
        for (int c = 0; c < CN; c++) a[r][c] = load(out + r * room + c * VL);
    for (int v = 0; v < n; v++, p += VL) {
        vf y[4];
#pragma GCC unroll 4
        for (int c = 0; c < CN; c++) y[c] = NAME(numbers_at)(&at[c], v, table, book, bits, planes, kind);
#pragma GCC unroll 4
        for (int r = 0; r < RN; r++) {
            vf z = load(p + r * TOKENS);
#pragma GCC unroll 4
            for (int c = 0; c < CN; c++) a[r][c] += z * y[c];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
        for (int c = 0; c < CN; c++) store(out + r * room + c * VL, a[r][c]);
}

#define OF(planes, kind)                                                                                              \
    APART void NAME(block_##kind##planes)(float *x, const vu *words, int n, const Segment *g, int first, int many) { \
        NAME(codes_block)(x, words, n, g, first, many, planes, kind);                                                 \
    }
OF(1, FEW) OF(2, FEW) OF(2, FIVE) OF(2, SIX) OF(3, SEVEN) OF(1, EIGHT)
OF(1, WHOLE) OF(2, WHOLE) OF(3, WHOLE) OF(1, SMALL_FLOAT) OF(1, SMALLER_FLOAT)
#undef OF

/* The same of a few rows at once. */
#define MANY(RN)                                                                                                      \
    for (; v + VN <= n; v += VN)                                                                                      \
        NAME(k_codes)(acc + v * VL, scale ? scale + v * VL : 0, q, q_room, words, v, g, first, many, planes, kind, RN, VN); \
    for (; v < n; v++)                                                                                                \
        NAME(k_codes)(acc + v * VL, scale ? scale + v * VL : 0, q, q_room, words, v, g, first, many, planes, kind, RN, 1)
#define EACH(RN)                                                                                                     \
    for (; c + CN <= many; c += CN)                                                                                  \
        NAME(v_codes_by)(out + c * VL, room, p, words, n, g, first + c, planes, kind, RN, CN);                       \
    for (; c < many; c++) NAME(v_codes_by)(out + c * VL, room, p, words, n, g, first + c, planes, kind, RN, 1)
#define OF(planes_, kind_)                                                                                            \
    APART void NAME(k_##kind_##_##planes_)(float *acc, const float *scale, const float *q, int64_t q_room, const vu *words, int n,       \
                                           const Segment *g, int first, int many, int rows) {                         \
        const int planes = planes_, kind = kind_, VN = LEVEL == 2 ? 4 : 2;                                            \
        int v = 0;                                                                                                    \
        switch (rows) {                                                                                               \
            case 1: MANY(1); break;                                                                                   \
            case 2: MANY(2); break;                                                                                   \
            case 3: MANY(3); break;                                                                                   \
            default: MANY(4);                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    APART void NAME(v_##kind_##_##planes_)(float *out, int64_t room, const float *p, const vu *words, int n,         \
                                           const Segment *g, int first, int many, int rows) {                         \
        const int planes = planes_, kind = kind_, CN = LEVEL == 2 ? 4 : 2;                                            \
        int c = 0;                                                                                                    \
        switch (rows) {                                                                                               \
            case 1: EACH(1); break;                                                                                   \
            case 2: EACH(2); break;                                                                                   \
            case 3: EACH(3); break;                                                                                   \
            default: EACH(4);                                                                                         \
        }                                                                                                             \
    }
OF(1, FEW) OF(2, FEW) OF(2, FIVE) OF(2, SIX) OF(1, SMALL_FLOAT)
#undef OF
#undef MANY
#undef EACH
