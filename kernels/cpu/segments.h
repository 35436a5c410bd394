/* A segment of a tile: its scales and zeros, logits of its keys, and what its values add to the output. A part of `tiles.h`, as are LEVEL, VL, TARGET and NAME. */

/* What a thread works with. */
typedef struct {
    float *q, *scaled, *sums, *logits, *out, *p, *acc, *x, *scale, *zero, *spare, *weights;
    float *mapped, *block_acc, *numbers, *grids;
    vu *block_words;
    uint8_t *codes;
    vu *words;
    uint8_t *lanes;
} NAME(Scratch);
#define Scratch NAME(Scratch)

/* Lay the scratch out in memory; returns its bytes. */
static int64_t NAME(laid_out)(const Shape *shape, uint8_t *memory, Scratch *s) {
    int64_t at = 0, tile = shape->tile, wide = shape->channels;
#define TAKE(field, count, type)                \
    s->field = memory ? (type *)(memory + at) : 0; \
    at += round_up((count) * (int64_t)sizeof(type), 64);
    TAKE(q, shape->rows * shape->k_width, float)
    TAKE(mapped, shape->rows * shape->k_width, float)
    TAKE(scaled, shape->rows * shape->channels, float)
    TAKE(sums, shape->rows * shape->k_width, float)
    TAKE(logits, shape->rows * TOKENS + 16, float)
    TAKE(out, shape->rows * shape->out_width, float)
    TAKE(p, shape->rows * tile, float)
    TAKE(acc, shape->rows * (shape->channels > tile ? shape->channels : tile), float)
    TAKE(x, tile * shape->channels, float)
    TAKE(scale, tile * shape->channels + 16, float)
    TAKE(zero, tile * shape->channels + 16, float)
    TAKE(spare, tile * wide, float)
    TAKE(codes, tile * shape->codes, uint8_t)
    TAKE(weights, shape->rows * TILE * 16, float)
    TAKE(lanes, shape->out_width / 16 * 256, uint8_t)
    if (shape->words) {
        TAKE(block_acc, shape->rows * TOKENS, float)
        TAKE(numbers, (shape->rows > ROWS ? K_CHUNK : CHUNK) * ROOM, float)
        TAKE(grids, shape->grids * TOKENS + 16, float)
        TAKE(block_words, shape->words * ROOM / VL, vu)
    }
    TAKE(words, tile * (shape->channels / 4 + 4) / VL, vu)
#undef TAKE
    return at;
}

#if LEVEL == 0
static int64_t scratch_portable(const Shape *shape) {
    Scratch s;
    return laid_out_portable(shape, 0, &s);
}
#endif

/* Scales and zeros of `from` on, n blocks of them. */
INLINE void NAME(grid)(const Segment *g, const uint8_t *page, int64_t from, int64_t n, float *scale, float *zero) {
    NAME(halves)(scale, page + g->scale + 2 * from, n);
    if (g->zero != NOTHING)
        NAME(halves)(zero, page + g->zero + 2 * from, n);
    else
        for (int64_t i = 0; i < n; i++) zero[i] = -g->middle * scale[i];
}

/* [tile, groups] to [groups, tile]; the compiler knows how for few groups. */
INLINE void NAME(turn_by)(float *restrict to, const float *restrict from, int tile, const int groups) {
    for (int i = 0; i < groups; i++)
        for (int t = 0; t < tile; t++) to[i * tile + t] = from[t * groups + i];
}

INLINE void NAME(turn)(float *to, const float *from, int tile, int groups) {
    switch (groups) {
        case 2: NAME(turn_by)(to, from, tile, 2); break;
        case 4: NAME(turn_by)(to, from, tile, 4); break;
        default: NAME(turn_by)(to, from, tile, groups);
    }
}

/* Scales and zeros 0 of what is no token: 0 times anything is not always 0. n tokens of a tile, `step` numbers from one
 * to the next, in `groups` rows of `room`. */
INLINE void NAME(clear)(Scratch *s, int n, int tile, int step, int groups, int room) {
    for (int i = 0; i < groups; i++)
        for (int t = n * step; t < tile * step; t++) s->scale[i * room + t] = s->zero[i * room + t] = 0;
}

/* Scales and zeros of a tile's n tokens as [groups, tile], into s->scale and s->zero. */
static TARGET void NAME(token_grid)(const Segment *g, const uint8_t *page, int64_t token, int n, int tile, int groups,
                                    Scratch *s) {
    if (groups == 1) {
        NAME(grid)(g, page, token, tile, s->scale, s->zero);
        NAME(clear)(s, n, tile, 1, 1, tile);
        return;
    }
    NAME(halves)(s->spare, page + g->scale + 2 * token * groups, (int64_t)tile * groups);
    NAME(turn)(s->scale, s->spare, tile, groups);
    if (g->zero != NOTHING) {
        NAME(halves)(s->spare, page + g->zero + 2 * token * groups, (int64_t)tile * groups);
        NAME(turn)(s->zero, s->spare, tile, groups);
    } else {
        for (int i = 0; i < tile * groups; i++) s->zero[i] = -g->middle * s->scale[i];
    }
    NAME(clear)(s, n, tile, 1, groups, tile);
}

/* Scales and zeros of the channels of a tile whose tokens share them, into s->scale and s->zero. */
APART void NAME(channel_grid)(const Segment *g, const uint8_t *page, int64_t token, int groups, Scratch *s) {
    NAME(grid)(g, page, token / g->token_group * groups, groups, s->scale, s->zero);
    if (g->channel_group > 1) {
        for (int d = g->channels - 1; d >= 0; d--) {
            s->scale[d] = s->scale[d / g->channel_group];
            s->zero[d] = s->zero[d / g->channel_group];
        }
    }
}

/* Add q . k of one segment to the logits [rows, tile] of n tokens. q [rows, k_width] and sums are the segment's. */
APART void NAME(k_segment)(const Segment *g, const Shape *shape, const uint8_t *page, int64_t token, int n,
                                   const float *q, const float *sums, int rows, float *logits, Scratch *s) {
    int tile = (int)shape->tile, groups = g->channels / g->channel_group;
    int64_t q_room = shape->k_width;
    if (g->kind >= FLOAT32) {
        int64_t x_room;
        const float *x = NAME(rows_of)(g, page, token, n, s->x, &x_room);
        NAME(k_raw)(logits, TOKENS, q, q_room, x, x_room, g->channels, n, rows);
        return;
    }
    NAME(k_words)(g, page, token, tile, s->words);
    if (g->kind == CODEBOOK || g->token_group == 1) {
        NAME(token_grid)(g, page, token, n, tile, groups, s);
        for (int i = 0; i < groups; i++) {
            int c = i * g->channel_group;
            NAME(k_numbers)(s->acc, q + c, q_room, s->words, g, c, g->channel_group, tile, rows);
            for (int r = 0; r < rows; r++) {
                vf sum = all(sums[r * q_room + i]);
                for (int t = 0; t < tile; t += VL) {
                    float *to = logits + r * TOKENS + t;
                    vf x = load(to) + load(s->scale + i * tile + t) * load(s->acc + r * tile + t);
                    if (g->kind == UNIFORM) x += load(s->zero + i * tile + t) * sum;
                    store(to, x);
                }
            }
        }
        return;
    }
    NAME(channel_grid)(g, page, token, groups, s);
    int64_t room = shape->channels;
    float offset[MANY_ROWS];
    for (int r = 0; r < rows; r++) {
        vf sum = all(0);
        int d = 0;
        for (; d + VL <= g->channels; d += VL) {
            vf x = load(q + r * q_room + d);
            store(s->scaled + r * room + d, x * load(s->scale + d));
            sum += x * load(s->zero + d);
        }
        offset[r] = NAME(sum)(sum);
        for (; d < g->channels; d++) {
            s->scaled[r * room + d] = q[r * q_room + d] * s->scale[d];
            offset[r] += q[r * q_room + d] * s->zero[d];
        }
    }
    NAME(k_numbers)(s->acc, s->scaled, room, s->words, g, 0, g->channels, tile, rows);
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t += VL) {
            float *to = logits + r * TOKENS + t;
            store(to, load(to) + load(s->acc + r * tile + t) + offset[r]);
        }
}

/* Add p v of one segment for n tokens to out [rows, v_width]; p [rows, TOKENS]. */
APART void NAME(v_segment)(const Segment *g, const Shape *shape, const uint8_t *page, int64_t token, int n,
                                   const float *p, int rows, float *out, Scratch *s, const void *lanes) {
    int tile = (int)shape->tile, groups = g->channels / g->channel_group;
#if LEVEL > 0
    Words w = words_of(g, VL);
    if (w.words) {
        NAME(grid)(g, page, token * groups, tile * groups, s->scale, s->zero);
        NAME(clear)(s, n, tile, groups, 1, 0);
        NAME(v_whole)(g, w, page, token, tile, p, rows, out, shape->out_width, s->scale, s->zero, s->weights,
                      lanes);
        return;
    }
#endif
    if (g->kind >= FLOAT32) {
        int64_t x_room;
        const float *x = NAME(rows_of)(g, page, token, n, s->x, &x_room);
        NAME(v_raw)(out, shape->out_width, p, TOKENS, x, x_room, n, g->channels, rows);
        return;
    }
    NAME(v_codes)(g, page, token, tile, s->codes, shape->codes);
    if (g->kind == CODEBOOK || g->token_group == 1) {
        NAME(token_grid)(g, page, token, n, tile, groups, s);
        for (int i = 0; i < groups; i++) {
            int c = i * g->channel_group;
            for (int r = 0; r < rows; r++) {
                vf sum = all(0);
                for (int t = 0; t < tile; t += VL) {
                    vf x = load(p + r * TOKENS + t);
                    store(s->p + r * tile + t, x * load(s->scale + i * tile + t));
                    sum += x * load(s->zero + i * tile + t);
                }
                if (g->kind == UNIFORM) {
                    float zero = NAME(sum)(sum), *to = out + r * shape->out_width + c;
                    int d = 0;
                    for (; d + VL <= g->channel_group; d += VL) store(to + d, load(to + d) + zero);
                    for (; d < g->channel_group; d++) to[d] += zero;
                }
            }
            NAME(v_numbers)(out + c, shape->out_width, s->p, tile, s->codes + c, shape->codes, tile, g, g->channel_group,
                            rows);
        }
        return;
    }
    NAME(channel_grid)(g, page, token, groups, s);
    int64_t room = shape->channels;
    memset(s->acc, 0, rows * room * sizeof(float));
    NAME(v_numbers)(s->acc, room, p, TOKENS, s->codes, shape->codes, tile, g, g->channels, rows);
    for (int r = 0; r < rows; r++) {
        float mass = 0, *to = out + r * shape->out_width;
        for (int t = 0; t < tile; t++) mass += p[r * TOKENS + t];
        for (int d = 0; d < g->channels; d++) to[d] += s->scale[d] * s->acc[r * room + d] + s->zero[d] * mass;
    }
}

/* scale, cap and hide what is no token: logits [rows, TOKENS] of n tokens in a tile. */
INLINE void NAME(finish)(const Problem *p, float *logits, int rows, int n, int tile) {
    for (int r = 0; r < rows; r++) {
        float *to = logits + r * TOKENS;
        if (p->softcap > 0) {
            for (int t = 0; t < tile; t += VL) { /* tanh(x) = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|) */
                vf x = load(to + t) * (1 / p->softcap);
                vi sign = (vi)x & (vi)all(-0.0f);
                vf e = exponential(-2.0f * (vf)((vi)x & ~(vi)all(-0.0f)));
                vf y = (1.0f - e) / (1.0f + e) * p->softcap;
                store(to + t, (vf)((vi)y | sign));
            }
        }
        for (int t = n; t < tile; t++) to[t] = -INFINITY;
    }
}

/* The lse of one page gains the logits of a tile of it. */
static TARGET void NAME(add_page)(float *lse, const float *logits, int tile) {
    float most = *lse, sum = 0;
    for (int t = 0; t < tile; t++) most = logits[t] > most ? logits[t] : most;
    if (most == -INFINITY) return;
    vf sums = all(0);
    for (int t = 0; t < tile; t += VL) sums += exponential(load(logits + t) - most);
    sum = NAME(sum)(sums) + expf(*lse - most);
    *lse = most + logf(sum);
}

/* Logits of a block to exp(logit - m), m their running maximum; out and the running sum follow. */
APART void NAME(soften)(float *logits, int tokens, float *out, int64_t width, float *m, float *sum) {
    vf most = all(-INFINITY);
    for (int t = 0; t < tokens; t += VL) {
        vf x = load(logits + t);
        vi more = x > most;
        most = (vf)((more & (vi)x) | (~more & (vi)most));
    }
    float lanes[VL], next = *m;
    store(lanes, most);
    for (int i = 0; i < VL; i++) next = lanes[i] > next ? lanes[i] : next;
    if (next != *m && *sum > 0) {
        float factor = expf(*m - next);
        for (int64_t d = 0; d < width; d += VL) store(out + d, load(out + d) * factor);
        *sum *= factor;
    }
    *m = next;
    next = next == -INFINITY ? 0 : next;
    vf total = all(0);
    for (int t = 0; t < tokens; t += VL) {
        vf x = exponential(load(logits + t) - next);
        store(logits + t, x);
        total += x;
    }
    *sum += NAME(sum)(total);
}
