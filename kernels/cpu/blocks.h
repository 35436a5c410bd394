/* Blocks of tiles, a few channels at a time: codes of any widths and scales to numbers, once for all rows. A part of `tiles.h`, as are LEVEL, VL, TARGET and NAME.
 *
 *   K: logits[r, t] = sum over groups g of scale[g, t] * sum over c in g of q[r, c] x[c, t]
 *   V: out[r, c] = sum over t of (p[r, t] scale[g, t]) x[c, t], a sum for each lane until the end
 *
 * Rows of bytes are turned to words [words, TOKENS] once for all segments. Some channels at a time become numbers x
 * [channels, TOKENS] in the nearest cache, and are multiplied with all rows at once; where there are few rows, without
 * being stored. Words and numbers lie ROOM apart, which is no power of two: those would share few lines of the cache. What many segments share, a token's norm, is applied
 * once. Unlike the other path, it reads whatever there is: mixed widths, floating-point codes, numbers.
 */

#define STEP (ROOM / VL) /* vectors from a word or channel to the next */
#if LEVEL == 2 /* a count for each lane is one instruction, one count for all is two */
#define SHIFT_LEFT(x, by) ((vu)_mm512_sllv_epi32((__m512i)(x), _mm512_set1_epi32(by)))
#define SHIFT_RIGHT(x, by) ((vu)_mm512_srlv_epi32((__m512i)(x), _mm512_set1_epi32(by)))
#else
#define SHIFT_LEFT(x, by) ((x) << (by))
#define SHIFT_RIGHT(x, by) ((x) >> (by))
#endif

/* Tokens of a block, tile by tile. */
typedef struct {
    Place tile[TOKENS / 16];
    int tiles, size, n; /* of tiles, tokens of each, vectors of all */
} NAME(Block);
#define Block NAME(Block)

/* n scales of a format as float32. */
INLINE void NAME(floats_of)(float *to, const uint8_t *from, int64_t n, int format) {
    if (format == BF16) {
        NAME(brains)(to, from, n);
    } else if (format == HALF) {
        NAME(halves)(to, from, n);
    } else if (format == FP8) {
        for (int64_t i = 0; i < n; i++) {
            int32_t byte = from[i], bits = ((int32_t)((uint32_t)byte << 24) >> 4) & (int32_t)0x87f00000;
            float x;
            memcpy(&x, &bits, 4);
            to[i] = (byte & 127) == 127 ? NAN : x * 0x1p120f;
        }
    } else { /* powers of two, of which the least is no normal number */
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = from[i] == 255 ? 0x7fc00000 : from[i] ? (uint32_t)from[i] << 23 : 1u << 22;
            memcpy(to + i, &bits, 4);
        }
    }
}

/* `floats_of` byte `shift / 8` of each word. */
INLINE vf NAME(scale_at)(vu word, int shift, int format) {
    if (format == FP8) {
        vi bits = (vi)SHIFT_LEFT(word, 24 - shift);
        vi none = (bits & 0x7f000000) == 0x7f000000;
        return (vf)((vi)((vf)(bits >> 4 & (int32_t)0x87f00000) * 0x1p120f) | (none & 0x7fc00000));
    }
    vu byte = word >> shift & 255;
    vi bits = (vi)(byte << 23), none = byte == 255, least = byte == 0;
    return (vf)(bits | (none & 0x7fc00000) | (least & 1 << 22));
}

/* The scales of a tile's n tokens, to `to` [groups, TOKENS]; 0 of what is no token: 0 times anything is not always 0. */
INLINE void NAME(tile_scales)(const Segment *g, Place here, int64_t at, int groups, int tile, float *to, float *spare) {
    const uint8_t *from = here.page + at + here.token * g->scale_stride;
    int size = g->scale_format == HALF || g->scale_format == BF16 ? 2 : 1;
    if (groups == 1 && g->scale_stride == size) {
        NAME(floats_of)(to, from, tile, g->scale_format);
    } else if (size == 1 && groups % 4 == 0) { /* words of four, turned around as codes are */
        vu *words = (vu *)spare;
        NAME(k_plane)(words, from, g->scale_stride, groups, tile, tile / VL);
        for (int i = 0; i < groups; i++)
            for (int v = 0; v < tile / VL; v++)
                store(to + i * TOKENS + v * VL, NAME(scale_at)(words[i / 4 * (tile / VL) + v], i % 4 * 8, g->scale_format));
    } else {
        if (g->scale_stride == groups * size)
            NAME(floats_of)(spare, from, (int64_t)tile * groups, g->scale_format);
        else
            for (int t = 0; t < tile; t++) NAME(floats_of)(spare + t * groups, from + t * g->scale_stride, groups, g->scale_format);
        for (int i = 0; i < groups; i++)
            for (int t = 0; t < tile; t++) to[i * TOKENS + t] = spare[t * groups + i];
    }
    for (int i = 0; i < groups; i++)
        for (int t = here.n; t < tile; t++) to[i * TOKENS + t] = 0;
}

/* Words and scales of a side for all tiles of a block; as many tiles of what is read next are asked for. */
APART void NAME(read_block)(const Side *side, const Item *item, int64_t first, int64_t last, int tile, Block *b, Scratch *s) {
    const Side *k = &item->source->k, *after = side == k ? &item->source->v : k;
    int64_t next = side == k ? first : last;
    b->tiles = (int)(last - first), b->size = tile, b->n = b->tiles * tile / VL;
    for (int i = 0; i < b->tiles; i++) {
        Place here = b->tile[i] = NAME(place)(side, item, first + i, tile);
        if (next + i < item->last) NAME(fetch)(after, item, next + i, tile);
        vu *to = s->block_words + i * tile / VL;
        for (int j = 0; j < side->row_count; j++) {
            const Row *row = &side->rows[j];
            const uint8_t *from = here.page + row->offset + here.token * row->stride;
            if (here.n < tile) /* exact tokens end there, and so may their memory */
                NAME(k_part)(to + row->at * STEP, from, row->stride, (int)row->bytes, tile, STEP, here.n);
            else
                NAME(k_plane)(to + row->at * STEP, from, row->stride, (int)row->bytes, tile, STEP);
        }
        int done = 0;
        for (int j = 0; j < side->count; j++) {
            const Segment *g = &side->segments[j];
            if (g->grid < done || g->token_group > 1) continue;
            int groups = g->channels / g->channel_group;
            float *scale = s->grids + g->grid * TOKENS + i * tile;
            NAME(tile_scales)(g, here, g->scale, groups, tile, scale, s->spare);
            done = g->grid + groups;
            if (g->page_scale != NOTHING) {
                float page;
                memcpy(&page, here.page + g->page_scale, 4);
                int whole = here.n / VL * VL; /* not what is past the last token: 0 times anything is not always 0 */
                for (int k = 0; k < groups; k++) {
                    float *to = scale + k * TOKENS;
                    for (int t = 0; t < whole; t += VL) store(to + t, load(to + t) * page);
                    for (int t = whole; t < here.n; t++) to[t] *= page;
                }
            }
            if (g->kind != UNIFORM) continue;
            float *zero = s->grids + (g->grid + groups) * TOKENS + i * tile;
            done += groups;
            if (g->zero != NOTHING) {
                NAME(tile_scales)(g, here, g->zero, groups, tile, zero, s->spare);
            } else {
                for (int k = 0; k < groups; k++)
                    for (int t = 0; t < tile; t++) zero[k * TOKENS + t] = -g->middle * scale[k * TOKENS + t];
            }
        }
    }
}

#include "numbers.h"
#include "products.h"

/* Whether up to 4 rows are multiplied with codes as they are unpacked; more rows want the numbers again. */
INLINE int NAME(at_once)(const Segment *g, int rows) {
    return rows <= 4 && (g->kind == E4M3 || (g->kind == CODEBOOK && g->bits <= 6));
}

static TARGET void NAME(k_at_once)(float *acc, const float *scale, const float *q, int64_t q_room, const vu *words, int n, const Segment *g,
                                   int first, int many, int rows) {
    if (g->kind == E4M3)
        NAME(k_SMALL_FLOAT_1)(acc, scale, q, q_room, words, n, g, first, many, rows);
    else if (g->bits == 5)
        NAME(k_FIVE_2)(acc, scale, q, q_room, words, n, g, first, many, rows);
    else if (g->bits == 6)
        NAME(k_SIX_2)(acc, scale, q, q_room, words, n, g, first, many, rows);
    else if (g->planes == 2)
        NAME(k_FEW_2)(acc, scale, q, q_room, words, n, g, first, many, rows);
    else
        NAME(k_FEW_1)(acc, scale, q, q_room, words, n, g, first, many, rows);
}

static TARGET void NAME(v_at_once)(float *out, int64_t room, const float *p, const vu *words, int n, const Segment *g,
                                   int first, int many, int rows) {
    if (g->kind == E4M3)
        NAME(v_SMALL_FLOAT_1)(out, room, p, words, n, g, first, many, rows);
    else if (g->bits == 5)
        NAME(v_FIVE_2)(out, room, p, words, n, g, first, many, rows);
    else if (g->bits == 6)
        NAME(v_SIX_2)(out, room, p, words, n, g, first, many, rows);
    else if (g->planes == 2)
        NAME(v_FEW_2)(out, room, p, words, n, g, first, many, rows);
    else
        NAME(v_FEW_1)(out, room, p, words, n, g, first, many, rows);
}

#include "scaled.h"

/* Whether numbers are still to be multiplied with scales of tokens. */
INLINE int NAME(scaled_late)(const Segment *g) { return g->kind == CODEBOOK || g->kind >= E4M3; }

/* `k_codes` and `v_codes_by` of numbers x [channels, ROOM], for any number of rows. */
APART void NAME(k_products)(float *acc, const float *q, int64_t q_room, const float *x, int channels, int n, int rows) {
    const int many = LEVEL == 2 ? 4 : 2;
    int v = 0;
#define CALL(RN, VN) NAME(k_codes)(acc + r * TOKENS + v * VL, 0, q + r * q_room, q_room, (const vu *)x, v, 0, 0, channels, 1, STORED, RN, VN)
#define MANY(RN) CALL(RN, many)
#define ONE(RN) CALL(RN, 1)
    for (; v + many <= n; v += many) BY_ROWS(rows, MANY)
    for (; v < n; v++) BY_ROWS(rows, ONE)
#undef MANY
#undef ONE
#undef CALL
}

APART void NAME(v_products)(float *out, int64_t room, const float *p, const float *x, int channels, int n, int rows) {
#define CALL(RN, CN) NAME(v_codes_by)(out + r * room + c * VL, room, p + r * TOKENS, (const vu *)x, n, 0, c, 1, STORED, RN, CN)
#define EACH(RN)                                                    \
    {                                                               \
        const int many = LEVEL == 2 ? 4 : 2;                        \
        int c = 0;                                                  \
        for (; c + many <= channels; c += many) CALL(RN, many);     \
        for (; c < channels; c++) CALL(RN, 1);                      \
    }
    BY_ROWS(rows, EACH)
#undef EACH
#undef CALL
}

/* logits [rows, TOKENS] = q . k of a block, without what is added to all tokens of a page. */
static TARGET void NAME(k_of_block)(const Side *side, const Item *item, const Shape *shape, int64_t first, int64_t last,
                                    const float *q, int rows, float *logits, Scratch *s) {
    Block b;
    NAME(read_block)(side, item, first, last, (int)shape->tile, &b, s);
    memset(logits, 0, rows * TOKENS * sizeof(float));
    int chunk = rows > ROWS ? K_CHUNK : CHUNK, pending = 0; /* whether block_acc has sums that are still to be scaled */
    for (int j = 0; j < side->count; q += round_up(side->segments[j++].channels, 16)) {
        const Segment *g = &side->segments[j], *next = j + 1 < side->count ? g + 1 : 0;
        int late = NAME(scaled_late)(g), group = late ? g->channel_group : g->channels, once = NAME(at_once)(g, rows);
        int shared = next && next->grid == g->grid && NAME(scaled_late)(next);
        for (int at = 0; at < g->channels; at += group) {
            const float *scale = s->grids + (g->grid + at / group) * TOKENS;
            if (once && !shared && !pending) {
                NAME(k_at_once)(logits, scale, q + at, shape->k_width, s->block_words, b.n, g, at, group, rows);
                continue;
            }
            if (late && !pending) memset(s->block_acc, 0, rows * TOKENS * sizeof(float));
            pending = late;
            if (once)
                NAME(k_at_once)(s->block_acc, 0, q + at, shape->k_width, s->block_words, b.n, g, at, group, rows);
            for (int c = at; c < at + group && !once; c += chunk) {
                int many = at + group - c < chunk ? at + group - c : chunk;
                const float *x = NAME(numbers_block)(g, &b, c, many, s);
                NAME(k_products)(late ? s->block_acc : logits, q + c, shape->k_width, x, many, b.n, rows);
            }
            if (!late || shared) continue;
            pending = 0;
            for (int r = 0; r < rows; r++) {
                const float *acc = s->block_acc + r * TOKENS;
                float *to = logits + r * TOKENS;
                for (int t = 0; t < b.n * VL; t += VL) store(to + t, load(to + t) + load(scale + t) * load(acc + t));
            }
        }
    }
}

/* out [rows, channels, VL] gains p v of a block; p [rows, TOKENS]. */
static TARGET void NAME(v_of_block)(const Side *side, const Item *item, const Shape *shape, int64_t first, int64_t last,
                                    const float *p, int rows, float *out, Scratch *s) {
    Block b;
    NAME(read_block)(side, item, first, last, (int)shape->tile, &b, s);
    int chunk = rows > ROWS ? V_CHUNK : CHUNK, weighted = -1; /* the scales that block_acc has p times */
    for (int j = 0; j < side->count; out += out_room(side, &side->segments[j++])) {
        const Segment *g = &side->segments[j];
        int late = NAME(scaled_late)(g), group = late ? g->channel_group : g->channels;
        for (int at = 0; at < g->channels; at += group) {
            int grid = g->grid + at / group;
            if (late && grid != weighted) {
                const float *scale = s->grids + grid * TOKENS;
                for (int r = 0; r < rows; r++)
                    for (int t = 0; t < b.n * VL; t += VL)
                        store(s->block_acc + r * TOKENS + t, load(p + r * TOKENS + t) * load(scale + t));
                weighted = grid;
            }
            if (NAME(at_once)(g, rows))
                NAME(v_at_once)(out + at * VL, shape->out_width, s->block_acc, s->block_words, b.n, g, at, group, rows);
            for (int c = at; c < at + group && !NAME(at_once)(g, rows); c += chunk) {
                int many = at + group - c < chunk ? at + group - c : chunk;
                const float *x = NAME(numbers_block)(g, &b, c, many, s);
                NAME(v_products)(out + c * VL, shape->out_width, late ? s->block_acc : p, x, many, b.n, rows);
            }
        }
    }
}
