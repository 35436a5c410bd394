/* Codes on uniform grids: scales and zeros of blocks of tokens and channels. */

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

/* Least and largest of x - c, for each run of `group` channels; as `range_of_groups` of what it would be stored as. */
INLINE void range_less(const float *x, const float *c, int64_t groups, int64_t group, float *low, float *high) {
    for (int64_t i = 0; i < groups; i++, x += group, c += group) {
        float a = x[0] - c[0], b = a;
#pragma omp simd reduction(min : a) reduction(max : b)
        for (int64_t j = 0; j < group; j++) {
            float y = x[j] - c[j];
            a = smaller(y, a);
            b = larger(y, b);
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

/* Codes, scales and zeros of `tokens` rows of x; of x - c where there is a centre, and each token has its own grids. */
INLINE void put_blocks(const Piece *g, const float *x, int64_t stride, int64_t tokens, int64_t first, uint8_t *record,
                       uint8_t *codes, float *room, const float *centre, const int64_t group) {
    int64_t channels = g->channels, groups = channels / group, rows = tokens / g->token_group;
    float levels = (float)g->levels, *zeros = room, *scales = room + rows * groups, *least = scales + rows * groups;
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * g->token_group * stride;
        float *low = zeros + r * groups, *high = scales + r * groups, *most = least + channels;
        if (centre) {
            range_less(from, centre, groups, group, low, high);
        } else if (g->token_group == 1) {
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
        if (centre)
            for (int64_t i = 0; i < groups; i++)
                for (int64_t c = 0; c < group; c++)
                    to[i * group + c] = code_of(x[i * group + c] - centre[i * group + c], zero[i], scale[i], levels);
        else if (group == 1)
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

/* `put_blocks` of x, or of x less a centre. */
INLINE void put_less(const Piece *g, const float *x, int64_t stride, int64_t tokens, int64_t first, uint8_t *record,
                     uint8_t *codes, float *room, const float *centre) {
    switch (g->channel_group) { /* where the compiler knows that they are few, they are one vector */
        case 8: put_blocks(g, x, stride, tokens, first, record, codes, room, centre, 8); break;
        case 16: put_blocks(g, x, stride, tokens, first, record, codes, room, centre, 16); break;
        default: put_blocks(g, x, stride, tokens, first, record, codes, room, centre, g->channel_group);
    }
}

INLINE void put_uniform(const Piece *g, const float *x, int64_t stride, int64_t tokens, int64_t first, uint8_t *record,
                        uint8_t *codes, float *room) {
    put_less(g, x, stride, tokens, first, record, codes, room, 0);
}
