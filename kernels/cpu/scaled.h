/* Numbers of a block with their scales and zeros, or as they are stored. A part of `blocks.h`. */

/* x [many, ROOM] of float16 or bfloat16 numbers, 0 of what is no token. */
APART void NAME(short_block)(float *x, const vu *words, int n, const Segment *g, int first, int many) {
    for (int c = first; c < first + many; c++, x += ROOM) {
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
    for (int c = first; c < first + many; c++, x += ROOM) {
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

/* Numbers [many, ROOM] of channels from `first` on; those of codes before their scale, but for uniform ones. */
static TARGET const float *NAME(numbers_block)(const Segment *g, const Block *b, int first, int many, Scratch *s) {
    float *x = s->numbers;
    const vu *words = s->block_words;
    int n = b->n, planes = g->planes;
    if (g->kind == FLOAT32) return (const float *)(words + (g->plane[0].bit / 32 + first) * STEP);
    switch (g->kind) {
        case FLOAT16:
        case BFLOAT16: NAME(short_block)(x, words, n, g, first, many); return x;
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
