/* Blocks of tiles, a few channels at a time: codes of any widths and scales to numbers, once for all rows. A part of `tiles.h`, as are LEVEL, VL, TARGET and NAME.
 *
 *   K: logits[r, t] = sum over groups g of scale[g, t] * sum over c in g of q[r, c] x[c, t]
 *   V: out[r, c] = sum over t of (p[r, t] scale[g, t]) x[c, t], a sum for each lane until the end
 *
 * Rows of bytes are turned to words [words, TOKENS] once for all segments. CHUNK channels become numbers x [CHUNK, TOKENS]
 * in the nearest cache, and are multiplied with all rows at once. What many segments share, a token's norm, is applied
 * once. Unlike the other path, it reads whatever there is: mixed widths, floating-point codes, numbers.
 */

#define STEP (TOKENS / VL) /* vectors of a channel */

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

/* The scales of a tile's n tokens, to `to` [groups, TOKENS]; 0 of what is no token: 0 times anything is not always 0. */
INLINE void NAME(tile_scales)(const Segment *g, Place here, int64_t at, int groups, int tile, float *to, float *spare) {
    const uint8_t *from = here.page + at + here.token * g->scale_stride;
    int size = g->scale_format == HALF || g->scale_format == BF16 ? 2 : 1;
    if (groups == 1 && g->scale_stride == size) {
        NAME(floats_of)(to, from, tile, g->scale_format);
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

/* Words and scales of a side for all tiles of a block. */
APART void NAME(read_block)(const Side *side, const Item *item, int64_t first, int64_t last, int tile, Block *b, Scratch *s) {
    b->tiles = (int)(last - first), b->size = tile, b->n = b->tiles * tile / VL;
    for (int i = 0; i < b->tiles; i++) {
        Place here = b->tile[i] = NAME(place)(side, item, first + i, tile);
        if (first + i + 1 < item->last) NAME(fetch)(side, item, first + i + 1, tile);
        vu *to = s->block_words + i * tile / VL;
        for (int j = 0; j < side->row_count; j++) {
            const Row *row = &side->rows[j];
            NAME(k_plane)(to + row->at * STEP, here.page + row->offset + here.token * row->stride, row->stride,
                          (int)row->bytes, tile, STEP);
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
                for (int k = 0; k < groups; k++)
                    for (int t = 0; t < here.n; t++) scale[k * TOKENS + t] *= page;
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
        __mmask16 upper = _mm512_movepi32_mask((__m512i)(code << (31 - bit)));
#pragma GCC unroll 4
        for (int i = 0; i < many; i += 2 * half)
            found[i] = (vf)_mm512_mask_blend_ps(upper, (__m512)found[i], (__m512)found[i + half]);
    }
    return found[0];
#else
    return NAME(number)(code, book, kind == FEW ? TABLE : BOOK);
#endif
}

/* x [many, TOKENS]: numbers of `many` channels from `first` on, of codes in `planes` planes. */
INLINE void NAME(codes_block)(float *x, const vu *words, int n, const Segment *g, int first, int many, const int planes,
                              const int kind) {
    vf table[16];
    const int tables = LEVEL < 2 || kind > EIGHT ? 0 : kind == FEW ? 1 : 2 << (kind - FIVE);
#pragma GCC unroll 16
    for (int i = 0; i < tables; i++) table[i] = load(g->book + i * VL);
    const int exact = kind == WHOLE || LEVEL < 2; /* whether bits above the code's count */
    int bits = g->bits;
    for (int c = first; c < first + many; c++, x += TOKENS) {
        const vu *from[3];
        int shift[3], width[3];
#pragma GCC unroll 3
        for (int i = 0; i < planes; i++) {
            int bit = g->plane[i].bit + c * g->plane[i].width;
            from[i] = words + bit / 32 * STEP, shift[i] = bit % 32, width[i] = g->plane[i].width;
        }
        for (int v = 0; v < n; v++) {
            if (kind >= SMALL_FLOAT) {
                vi word = (vi)(from[0][v] << (24 - shift[0]));
                vf y = kind == SMALL_FLOAT ? (vf)(word >> 4 & (int32_t)0x87f00000) : (vf)(word >> 3 & (int32_t)0x8fe00000);
                store(x + v * VL, y * (kind == SMALL_FLOAT ? 0x1p120f : 0x1p112f));
                continue;
            }
            vu code = from[0][v] >> shift[0];
#pragma GCC unroll 3
            for (int i = 1; i < planes; i++)
                code = code << width[i] | (from[i][v] >> shift[i] & ((1u << width[i]) - 1));
            if (exact) code &= (1u << bits) - 1;
            store(x + v * VL, kind == WHOLE ? __builtin_convertvector((vi)code, vf) : NAME(entry)(code, table, g->book, kind));
        }
    }
}

#define OF(planes, kind)                                                                                              \
    APART void NAME(block_##kind##planes)(float *x, const vu *words, int n, const Segment *g, int first, int many) { \
        NAME(codes_block)(x, words, n, g, first, many, planes, kind);                                                 \
    }
OF(1, FEW) OF(2, FEW) OF(2, FIVE) OF(2, SIX) OF(3, SEVEN) OF(1, EIGHT)
OF(1, WHOLE) OF(2, WHOLE) OF(3, WHOLE) OF(1, SMALL_FLOAT) OF(1, SMALLER_FLOAT)
#undef OF

/* x [many, TOKENS] of float16 or bfloat16 numbers, 0 of what is no token. */
APART void NAME(short_block)(float *x, const vu *words, int n, const Segment *g, int first, int many) {
    for (int c = first; c < first + many; c++, x += TOKENS) {
        int bit = g->plane[0].bit + 16 * c, shift = 16 - bit % 32;
        const vu *from = words + bit / 32 * STEP;
        for (int v = 0; v < n; v++) {
            vi word = (vi)(shift ? from[v] << shift : from[v]) & (int32_t)0xffff0000;
            if (g->kind == FLOAT16) { /* exponents of 5 bits to those of 8; the last of them stays the last */
                vf y = (vf)(word >> 3 & (int32_t)0x8fffe000) * 0x1p112f;
                vi last = (word & 0x7c000000) == 0x7c000000;
                word = (vi)y | (last & 0x7f800000);
            }
            store(x + v * VL, (vf)word);
        }
    }
}

/* code * scale + zero, of what each token, or some tokens, have of their own. */
APART void NAME(uniform_block)(float *x, const Block *b, const Segment *g, int first, int many, const float *grids) {
    int groups = g->channels / g->channel_group;
    for (int c = first; c < first + many; c++, x += TOKENS) {
        int group = c / g->channel_group;
        if (g->token_group == 1) {
            const float *scale = grids + (g->grid + group) * TOKENS, *zero = scale + groups * TOKENS;
            for (int v = 0; v < b->n; v++)
                store(x + v * VL, load(x + v * VL) * load(scale + v * VL) + load(zero + v * VL));
            continue;
        }
        for (int i = 0; i < b->tiles; i++) {
            Place here = b->tile[i];
            float scale, zero, *to = x + i * b->size;
            int64_t at = 2 * (here.token / g->token_group * groups + group);
            NAME(halves)(&scale, here.page + g->scale + at, 1);
            if (g->zero != NOTHING)
                NAME(halves)(&zero, here.page + g->zero + at, 1);
            else
                zero = -g->middle * scale;
            for (int t = 0; t < b->size; t += VL) store(to + t, load(to + t) * scale + zero);
        }
    }
}

/* Numbers [many, TOKENS] of channels from `first` on; those of codes before their scale, but for uniform ones. */
static TARGET const float *NAME(numbers_block)(const Segment *g, const Block *b, int first, int many, Scratch *s) {
    float *x = s->numbers;
    const vu *words = s->block_words;
    int n = b->n, planes = g->planes;
    if (g->kind == FLOAT32) {
        const Place *end = &b->tile[b->tiles - 1];
        x = (float *)(words + (g->plane[0].bit / 32 + first) * STEP);
        for (int c = 0; c < many; c++) /* the words are ours */
            for (int t = end->n; t < b->size; t++) x[c * TOKENS + (b->tiles - 1) * b->size + t] = 0;
        return x;
    }
    switch (g->kind) {
        case FLOAT16:
        case BFLOAT16: {
            NAME(short_block)(x, words, n, g, first, many);
            const Place *end = &b->tile[b->tiles - 1];
            for (int c = 0; c < many; c++)
                for (int t = end->n; t < b->size; t++) x[c * TOKENS + (b->tiles - 1) * b->size + t] = 0;
            return x;
        }
        case E4M3: NAME(block_SMALL_FLOAT1)(x, words, n, g, first, many); return x;
        case E5M2: NAME(block_SMALLER_FLOAT1)(x, words, n, g, first, many); return x;
        case UNIFORM:
            if (planes == 1)
                NAME(block_WHOLE1)(x, words, n, g, first, many);
            else if (planes == 2)
                NAME(block_WHOLE2)(x, words, n, g, first, many);
            else
                NAME(block_WHOLE3)(x, words, n, g, first, many);
            NAME(uniform_block)(x, b, g, first, many, s->grids);
            return x;
    }
    switch (g->bits) {
        case 5: NAME(block_FIVE2)(x, words, n, g, first, many); break;
        case 6: NAME(block_SIX2)(x, words, n, g, first, many); break;
        case 7: NAME(block_SEVEN3)(x, words, n, g, first, many); break;
        case 8: NAME(block_EIGHT1)(x, words, n, g, first, many); break;
        default:
            if (planes == 1)
                NAME(block_FEW1)(x, words, n, g, first, many);
            else
                NAME(block_FEW2)(x, words, n, g, first, many);
    }
    return x;
}

/* Whether numbers are still to be multiplied with scales of tokens. */
INLINE int NAME(scaled_late)(const Segment *g) { return g->kind == CODEBOOK || g->kind >= E4M3; }

/* acc[r, t] += sum_c q[r, c] x[c, t] for RN rows and VN vectors of tokens. */
INLINE void NAME(k_product)(float *acc, const float *q, int64_t q_room, const float *x, int channels, const int RN,
                            const int VN) {
    vf a[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++) a[r][v] = load(acc + r * TOKENS + v * VL);
    for (int c = 0; c < channels; c++, x += TOKENS) {
        vf y[4];
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++) y[v] = load(x + v * VL);
#pragma GCC unroll 4
        for (int r = 0; r < RN; r++) {
            vf z = all(q[r * q_room + c]);
#pragma GCC unroll 4
            for (int v = 0; v < VN; v++) a[r][v] += z * y[v];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VN; v++) store(acc + r * TOKENS + v * VL, a[r][v]);
}

APART void NAME(k_products)(float *acc, const float *q, int64_t q_room, const float *x, int channels, int n, int rows) {
    const int many = LEVEL == 2 ? 4 : 2;
    int v = 0;
#define CALL(RN, VN) NAME(k_product)(acc + r * TOKENS + v * VL, q + r * q_room, q_room, x + v * VL, channels, RN, VN)
#define MANY(RN) CALL(RN, many)
#define ONE(RN) CALL(RN, 1)
    for (; v + many <= n; v += many) BY_ROWS(rows, MANY)
    for (; v < n; v++) BY_ROWS(rows, ONE)
#undef MANY
#undef ONE
#undef CALL
}

/* out[r, c, lanes] += p[r, t] x[c, t] for RN rows and CN channels. */
INLINE void NAME(v_product)(float *out, int64_t room, const float *p, const float *x, int n, const int RN, const int CN) {
    vf a[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 4
        for (int c = 0; c < CN; c++) a[r][c] = load(out + r * room + c * VL);
    for (int v = 0; v < n; v++, x += VL, p += VL) {
        vf y[4];
#pragma GCC unroll 4
        for (int c = 0; c < CN; c++) y[c] = load(x + c * TOKENS);
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

APART void NAME(v_products)(float *out, int64_t room, const float *p, const float *x, int channels, int n, int rows) {
    const int many = LEVEL == 2 ? 4 : 2;
    int c = 0;
#define CALL(RN, CN) NAME(v_product)(out + r * room + c * VL, room, p + r * TOKENS, x + c * TOKENS, n, RN, CN)
#define MANY(RN) CALL(RN, many)
#define ONE(RN) CALL(RN, 1)
    for (; c + many <= channels; c += many) BY_ROWS(rows, MANY)
    for (; c < channels; c++) BY_ROWS(rows, ONE)
#undef MANY
#undef ONE
#undef CALL
}

/* logits [rows, TOKENS] = q . k of a block, without what is added to all tokens of a page. */
static TARGET void NAME(k_of_block)(const Side *side, const Item *item, const Shape *shape, int64_t first, int64_t last,
                                    const float *q, int rows, float *logits, Scratch *s) {
    Block b;
    NAME(read_block)(side, item, first, last, (int)shape->tile, &b, s);
    memset(logits, 0, rows * TOKENS * sizeof(float));
    memset(s->block_acc, 0, rows * TOKENS * sizeof(float));
    for (int j = 0; j < side->count; q += round_up(side->segments[j++].channels, 16)) {
        const Segment *g = &side->segments[j], *next = j + 1 < side->count ? g + 1 : 0;
        int late = NAME(scaled_late)(g), group = late ? g->channel_group : g->channels;
        for (int at = 0; at < g->channels; at += group) {
            for (int c = at; c < at + group; c += CHUNK) {
                int many = at + group - c < CHUNK ? at + group - c : CHUNK;
                const float *x = NAME(numbers_block)(g, &b, c, many, s);
                NAME(k_products)(late ? s->block_acc : logits, q + c, shape->k_width, x, many, b.n, rows);
            }
            if (!late || (next && next->grid == g->grid && NAME(scaled_late)(next))) continue;
            const float *scale = s->grids + (g->grid + at / group) * TOKENS;
            for (int r = 0; r < rows; r++) {
                float *acc = s->block_acc + r * TOKENS, *to = logits + r * TOKENS;
                for (int t = 0; t < b.n * VL; t += VL) {
                    store(to + t, load(to + t) + load(scale + t) * load(acc + t));
                    store(acc + t, all(0));
                }
            }
        }
    }
}

/* out [rows, channels, VL] gains p v of a block; p [rows, TOKENS]. */
static TARGET void NAME(v_of_block)(const Side *side, const Item *item, const Shape *shape, int64_t first, int64_t last,
                                    const float *p, int rows, float *out, Scratch *s) {
    Block b;
    NAME(read_block)(side, item, first, last, (int)shape->tile, &b, s);
    int weighted = -1; /* the scales that block_acc has p times */
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
            for (int c = at; c < at + group; c += CHUNK) {
                int many = at + group - c < CHUNK ? at + group - c : CHUNK;
                const float *x = NAME(numbers_block)(g, &b, c, many, s);
                NAME(v_products)(out + c * VL, shape->out_width, late ? s->block_acc : p, x, many, b.n, rows);
            }
        }
    }
}
