/* Centres of pages: what is subtracted from a page's tokens first. */

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

/* Whether the centre is `anchored`: where tokens are coded one by one, in two bits or more, of a book in three. */
INLINE int anchored(const Piece *g) {
    if (g->kind >= E4M3) return 1;
    return g->kind == CODEBOOK ? g->levels > 3 : g->levels > 1 && g->token_group == 1;
}

/* Channel i of a page's first token, as its codes and its record have it. */
INLINE float first_coded(const Piece *g, const uint8_t *codes, const uint8_t *record, int64_t i) {
    const uint16_t *scale = (const uint16_t *)(record + g->scale), *zero = (const uint16_t *)(record + g->zero);
    if (g->kind >= E4M3) return float_coded(g, codes[i], record, i);
    if (g->kind == CODEBOOK) return g->book[codes[i]] * from_half(scale[0]);
    float step = from_half(scale[i / g->channel_group]);
    if (g->zero == NOTHING) return (float)(codes[i] - g->levels / 2) * step;
    return from_half(zero[i / g->channel_group]) + (float)codes[i] * step; /* the product is exact */
}

/* Moves the centre c by the error that the first of `tokens` > 1 rows of x has under it, as `quantizers.centred.anchored`.
 * room: 8 numbers of each channel, and 3 more. */
INLINE void anchor(const Piece *g, const uint8_t *x, int64_t dim, int64_t tokens, uint8_t *record, uint8_t *codes,
                   float *c, float *room, const int dtype) {
    int64_t n = g->channels, few = tokens < 4 ? tokens : 4;
    float *rows = room, *rest = room + few * n;
    rows_less(x, dim, n, few, c, rows, dtype);
    if (g->kind == UNIFORM)
        put_uniform(g, rows, n, 1, 0, record, codes, rest);
    else if (g->kind >= E4M3)
        put_floats(g, rows, n, 1, 0, record, codes, rest);
    else
        put_codebook(g, rows, n, 1, 0, record, codes, rest);
    uint16_t *halves = (uint16_t *)(record + g->centre);
    for (int64_t i = 0; i < n; i++) {
        float most = 0, error = rows[i] - first_coded(g, codes, record, i);
        for (int64_t t = 1; t < few; t++) most = larger(fabsf(rows[t * n + i]), most);
        error = smaller(larger(error == error ? error : 0, -most), most);
        halves[i] = to_half(smaller(larger(c[i] + error, -HUGEST), HUGEST));
        c[i] = from_half(halves[i]);
    }
}

/* What is subtracted from a page's tokens, to c and to the record. */
INLINE void put_shift(const Piece *g, const uint8_t *x, int64_t dim, int64_t tokens, uint8_t *record, uint8_t *codes,
                      float *c, float *room, const int dtype) {
    put_centre(g, x, dim, tokens, record, c, room, dtype);
    if (tokens > 1 && anchored(g)) anchor(g, x, dim, tokens, record, codes, c, room, dtype);
}
