/* Values: p . x over the codes of a tile. A part of `tiles.h`, as are LEVEL, VL, TARGET and NAME. */

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
        if (v->blocked) {
            memset(to, 0, round_up(g->channels, 16) * sizeof(float));
            for (int c = 0; c < g->channels; c++) to[c] = NAME(sum)(load(out + c * VL));
        } else if (!w.words) {
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
        out += out_room(v, g), to += round_up(g->channels, 16);
    }
}
