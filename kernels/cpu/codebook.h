/* Codes that are entries of a book, with a norm for each token. */

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
