/* Decode attention over compressed pages on CPUs; `reference.attend_pages` is its specification.
 *
 *   logit[r, t] = softcap(scale * (q[r] . k[t] + bias[r, t])),  out[r] = sum_t softmax_t(logit[r, t]) v[t]
 *
 * bias: of a row, and of a row and token. Where keys of a page have a centre c, q . c is added to their logits, too.
 * k and v are read as they are stored. With k = code * s + z, q . k = (q s) . code + q . z: scales and zeros that tokens
 * share fold into q, those of one token into its logit; on the V side into the outputs and the probabilities. So an
 * element costs its unpacking, shared by all rows of a stream, and one multiplication and addition a row.
 *
 * Codes are unpacked where they are multiplied, from words of 32 bits in vectors: shifted, and looked up in a table of 16.
 * For K a vector has a word of each of its tokens (a small transposition), for V the words of one token or of some in a
 * row, and probabilities times scales are spread over them; sums over V stay in the order of words until the end. V
 * that comes in several planes, or shares scales along tokens, is unpacked to bytes first.
 *
 * Tiles of T tokens lie within a page; of the last page there may be a part, and behind that anything. Blocks of tiles:
 * all logits, one maximum and one rescaling a row (online softmax), all values. Work is cut into equal runs of tiles,
 * whatever the streams' lengths; runs of a stream merge by log-sum-exp.
 * Moved: each listed page once per 16 rows, so bytes_per_page less the summaries.
 *
 * `tiles.h` is compiled once for each instruction set; `kvcomp_attend` chooses when it runs.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { UNIFORM, CODEBOOK, FLOAT32, FLOAT16, BFLOAT16 };
enum { CAST, TABLE, BOOK };
enum { ROWS = 16, TILE = 32, TOKENS = 256, PIECES = 4, LEAST = 8, PAGES = 64, TOGETHER = 8 };
#define NOTHING (-1)

/* One plane of codes: `width` bits each, the first in the low bits; token t's begin at byte offset + t * stride. */
typedef struct {
    int64_t offset, stride;
    int32_t width;
} Plane;

/* Some channels of K or V in a page; kernels/cpu/__init__.py mirrors it. */
typedef struct {
    int32_t kind, channels, planes;     /* planes: the highest bits first; those of numbers have one, with no width */
    int32_t token_group, channel_group; /* what shares a scale; tokens: 1, or a multiple of T */
    float middle;                       /* where no zero is stored: the code that stands for zero */
    int64_t scale, zero;                /* byte offset of float16 [page / token_group, channels / channel_group] */
    const float *book;                  /* float32 [16], or [256] from 5 bits on */
    int32_t bits;
    Plane plane[4];
    int64_t centre;                     /* byte offset of float16 [channels], which all tokens gain; or NOTHING */
} Segment;

typedef struct {
    const Segment *segments;
    const uint8_t *base; /* of page 0 */
    int64_t page_bytes;  /* from a page to the next */
    int64_t count;
} Side;

/* Tokens of all streams: in pages, or page s of `room` tokens holding those of stream s. */
typedef struct {
    Side k, v;
    const int32_t *ids;    /* [streams, ids_stride] pages; NULL: page s */
    const int64_t *counts; /* [streams] pages, or tokens where there are no ids or `in_tokens` says so */
    int64_t ids_stride, page_tokens, in_tokens;
    int64_t listed, records; /* ids of a stream; pages that they may name */
} Source;

typedef struct {
    Source source[2];
    int64_t sources, streams, rows, k_dim, v_dim;
    const float *q, *bias;              /* [streams, rows, k_dim], [streams, rows] or NULL */
    const float *token_bias;            /* [streams, rows, listed * page_tokens] of pages, or NULL */
    const float *prior_out, *prior_lse; /* NULL, or attention over other tokens, to be merged with */
    float *out, *lse, *lse_of_pages;    /* [streams, rows, v_dim], [streams, rows], [streams, rows, pages] or NULL */
    int64_t pages;
    float scale, softcap; /* softcap 0: none */
    int32_t level;        /* instruction set, at most; see kvcomp_level */
} Problem;

/* Tiles [first, last) of a stream, for up to ROWS rows from `row` on. */
typedef struct {
    const Source *source;
    int64_t stream, row, first, last;
    float *partial; /* per row: v_width sums of exp(logit - m) v, then m, then the sum of exp(logit - m) */
} Item;

/* Summaries of pages to be multiplied with queries: `fields` of `vectors` vectors a page each, float16 where scale is
 * NOTHING, or int8 of which each of `scales` runs shares a float16. */
typedef struct {
    const uint8_t *pool;
    const int32_t *ids;    /* [streams, ids_stride] */
    const int64_t *counts; /* [streams] pages */
    const int64_t *offsets;
    const float *q; /* [streams, rows, dim] */
    float *out;     /* [streams, rows, pages * vectors] */
    int64_t page_bytes, ids_stride, streams, rows, pages, fields, vectors, dim, scale, scales;
    int64_t bytes; /* of the summary, from the first field on */
    int64_t records; /* that ids may name */
    int32_t level;
} Vectors;

/* A tile: its page, the page's place in the stream, its first token in the page, and how many tokens it has. */
typedef struct {
    const uint8_t *page;
    int64_t which, token;
    int n;
} Place;

/* Sizes that depend on the layout alone; widths are padded to whole vectors. out_width: of sums before `in_order`. */
typedef struct {
    int64_t tile, k_width, v_width, out_width, channels, codes;
} Shape;

static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static int64_t stream_tokens(const Source *s, int64_t stream) {
    return s->ids && !s->in_tokens ? s->counts[stream] * s->page_tokens : s->counts[stream];
}

/* Whether a stream's ids, the first `count` of `listed`, are of pages that there are. */
static int named(const int32_t *ids, int64_t count, int64_t listed, int64_t records) {
    int64_t wrong = count < 0 || count > listed;
    if (!wrong)
        for (int64_t i = 0; i < count; i++) wrong |= (uint32_t)ids[i] >= (uint64_t)records;
    return !wrong;
}

/* Whether all that streams are said to hold lies within what was handed. */
static int in_bounds(const Source *s, int64_t streams) {
    int64_t each = s->in_tokens ? s->page_tokens : 1;
    for (int64_t i = 0; i < streams; i++) {
        int64_t count = s->counts[i];
        if (count < 0 || count > (s->ids ? s->listed * each : s->page_tokens)) return 0;
        if (s->ids && !named(s->ids + i * s->ids_stride, (count + each - 1) / each, s->listed, s->records)) return 0;
    }
    return 1;
}

static int64_t stream_tiles(const Source *s, int64_t stream, const Shape *shape) {
    return (stream_tokens(s, stream) + shape->tile - 1) / shape->tile;
}

/* How V of a segment is read by words of 32 bits: words of a token, and how many tokens lie in one vector. */
typedef struct {
    int words, together;
} Words;

/* words 0: it is read by bytes, as its planes, its scales or the machine want it. */
static Words words_of(const Segment *g, int lanes) {
    Words w = {0, 1};
    int width = g->kind > CODEBOOK ? 0 : g->plane[0].width, shared = g->kind == UNIFORM && g->token_group > 1;
    if (lanes < 8 || !width || g->planes > 1 || shared || g->channel_group * width % 32) return w;
    w.words = g->channels * width / 32;
    while (2 * w.together * w.words <= lanes && g->plane[0].stride == 4 * w.words) w.together *= 2;
    return w;
}

/* Floats that the sums over a segment's V take. */
static int64_t out_room(const Segment *g) {
    Words w = words_of(g, 16);
    int64_t plain = round_up(g->channels, 16);
    return w.words ? round_up(w.words, 16) * (32 / g->plane[0].width + 1) : plain;
}

static Shape shape_of(const Problem *p) {
    Shape shape = {TILE, 0, 0, 0, 0, 0};
    for (int i = 0; i < 2 * p->sources; i++) {
        const Source *from = &p->source[i / 2];
        const Side *side = i % 2 ? &from->v : &from->k;
        int64_t *width = i % 2 ? &shape.v_width : &shape.k_width, sum = 0, room = 0;
        for (int j = 0; j < side->count; j++) {
            const Segment *g = &side->segments[j];
            int64_t channels = round_up(g->channels, 16);
            sum += channels, room += i % 2 ? out_room(g) : 0;
            shape.channels = channels > shape.channels ? channels : shape.channels;
            if (g->kind == UNIFORM && g->token_group > 1 && g->token_group % 32) shape.tile = 16;
        }
        *width = sum > *width ? sum : *width;
        shape.out_width = room > shape.out_width ? room : shape.out_width;
        if (from->ids && from->page_tokens % 32) shape.tile = 16;
    }
    shape.codes = round_up(shape.channels, 128) + 128;
    return shape;
}

static float half_to_float(uint16_t h) {
    uint32_t exponent = h >> 10 & 31, bits = (uint32_t)(h & 0x7fff) << 13;
    float value;
    if (exponent == 0) {
        value = (float)(h & 0x3ff) * 0x1p-24f;
    } else {
        bits += exponent == 31 ? 224u << 23 : 112u << 23;
        memcpy(&value, &bits, 4);
    }
    return h & 0x8000 ? -value : value;
}

/* Books of the codes themselves: the low 1, 2 or 4 bits of a number below 16. */
static const float CODES[5][16] = {
    [1] = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1},
    [2] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3},
    [4] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
};

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (__typeof__(a)){__VA_ARGS__})
#endif
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16_anywhere __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
#define BYTES(at) (*(u8x16_anywhere *)(at))
#define LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define LOW_PAIRS(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

#define LEVEL 0
#define NAME(x) x##_portable
#define TARGET
#define VL 4
#include "tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define LEVEL 1
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
#define VL 8
#include "tiles.h"

#define LEVEL 2
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")))
#define VL 16
#include "tiles.h"
#endif

/* What kernels/cpu/sources.py says of the sources that this is compiled from; setup.py defines it. */
#ifndef KVCOMP_SOURCES
#define KVCOMP_SOURCES ""
#endif
const char *kvcomp_sources(void) { return KVCOMP_SOURCES; }

/* The best instruction set that this machine runs: 2 AVX-512, 1 AVX2, 0 what the compiler takes for granted. */
int kvcomp_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

static void run(const Problem *p, const Shape *shape, const Item *item, void *scratch) {
#if defined(__x86_64__)
    if (p->level == 2) {
        run_avx512(p, shape, item, scratch);
        return;
    }
    if (p->level == 1) {
        run_avx2(p, shape, item, scratch);
        return;
    }
#endif
    run_portable(p, shape, item, scratch);
}

/* Merge the items of a stream's rows, and the prior part where there is one; returns how many items they were. */
static int64_t merge(const Problem *p, const Shape *shape, const Item *items, int64_t left, int64_t stream, int64_t row) {
    int64_t n = 0, width = shape->v_width + 2, rows = p->rows - row < ROWS ? p->rows - row : ROWS;
    while (n < left && items[n].stream == stream && items[n].row == row) n++;
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = stream * p->rows + row + r, dim = p->v_dim;
        float *out = p->out + at * dim, most = p->prior_lse ? p->prior_lse[at] : -INFINITY, sum = 0;
        for (int64_t i = 0; i < n; i++) {
            float m = items[i].partial[r * width + shape->v_width];
            most = m > most ? m : most;
        }
        most = most == -INFINITY ? 0 : most;
        memset(out, 0, dim * sizeof(float));
        if (p->prior_lse) {
            float weight = expf(p->prior_lse[at] - most);
            sum = weight;
            if (weight > 0)
                for (int64_t d = 0; d < dim; d++) out[d] = weight * p->prior_out[at * dim + d];
        }
        for (int64_t i = 0; i < n; i++) {
            const float *partial = items[i].partial + r * width;
            float weight = expf(partial[shape->v_width] - most);
            sum += weight * partial[shape->v_width + 1];
            int64_t from = 0, to = 0; /* segments are padded in the partial, not in the output */
            for (int s = 0; s < items[i].source->v.count; s++) {
                int64_t channels = items[i].source->v.segments[s].channels;
                for (int64_t d = 0; d < channels; d++) out[to + d] += weight * partial[from + d];
                from += round_up(channels, 16), to += channels;
            }
        }
        p->lse[at] = sum == 0 ? -INFINITY : most + logf(sum);
        if (sum != 0)
            for (int64_t d = 0; d < dim; d++) out[d] /= sum;
    }
    return n;
}

/* Attention of the problem. Returns 0, or 1 where memory ran out, 2 where counts or ids are out of bounds. */
int kvcomp_attend(const Problem *p) {
    for (int64_t i = 0; i < p->sources; i++)
        if (!in_bounds(&p->source[i], p->streams)) return 2;
    Shape shape = shape_of(p);
    int64_t blocks = (p->rows + ROWS - 1) / ROWS, total = 0, threads = 1;
    for (int64_t i = 0; i < p->sources; i++)
        for (int64_t s = 0; s < p->streams; s++) total += stream_tiles(&p->source[i], s, &shape) * blocks;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    int64_t pieces = threads > 1 ? threads * PIECES : 1;
    int64_t piece = (total + pieces - 1) / pieces;
    int64_t step = p->source[0].ids ? p->source[0].page_tokens / shape.tile : 1; /* whole pages */
    piece = round_up(piece < LEAST ? LEAST : piece, step);
    int64_t most = p->sources * p->streams * blocks + total / piece + 1, n = 0, at = 0, room = piece;
    int64_t partial = ROWS * (shape.v_width + 2), each = round_up(scratch_portable(&shape), 64);
    Item *items = malloc(most * sizeof(Item));
    float *partials = malloc(most * partial * sizeof(float));
    uint8_t *scratch = malloc(threads * each + 64);
    if (!items || !partials || !scratch) {
        free(items), free(partials), free(scratch);
        return 1;
    }
    for (int64_t s = 0; s < p->streams; s++) {
        for (int64_t row = 0; row < p->rows; row += ROWS) {
            for (int64_t i = 0; i < p->sources; i++) {
                const Source *from = &p->source[i];
                int64_t tiles = stream_tiles(from, s, &shape);
                for (int64_t first = 0; first < tiles;) {
                    int64_t last = tiles - first < room ? tiles : first + room;
                    items[n] = (Item){from, s, row, first, last, partials + n * partial};
                    n++;
                    room = round_up(room - (last - first), step);
                    room = room ? room : piece;
                    first = last;
                }
            }
        }
    }
    uint8_t *aligned = (uint8_t *)round_up((int64_t)scratch, 64);
    if (threads > 1 && total > LEAST) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1)
        for (int64_t i = 0; i < n; i++) run(p, &shape, &items[i], aligned + omp_get_thread_num() * each);
#endif
    } else {
        for (int64_t i = 0; i < n; i++) run(p, &shape, &items[i], aligned);
    }
    for (int64_t s = 0; s < p->streams; s++)
        for (int64_t row = 0; row < p->rows; row += ROWS) at += merge(p, &shape, items + at, n - at, s, row);
    free(items), free(partials), free(scratch);
    return 0;
}

static void estimates(const Vectors *v, const float *q, int64_t stream, int64_t first, int64_t last, float *x) {
#if defined(__x86_64__)
    if (v->level == 2) {
        estimates_avx512(v, q, stream, first, last, x);
        return;
    }
    if (v->level == 1) {
        estimates_avx2(v, q, stream, first, last, x);
        return;
    }
#endif
    estimates_portable(v, q, stream, first, last, x);
}

/* Queries as the fields take them, side by side, padded with zeros: of two, what is negative and the rest. */
static void split(const Vectors *v, float *to, int64_t room) {
    const float *q = v->q;
    for (int64_t i = 0; i < v->streams * v->rows; i++, q += v->dim, to += room) {
        memset(to, 0, room * sizeof(float));
        for (int64_t d = 0; d < v->dim; d++) {
            if (v->fields == 1) {
                to[d] = q[d];
            } else {
                to[d] = q[d] > 0 ? 0 : q[d];
                to[v->dim + d] = q[d] < 0 ? 0 : q[d];
            }
        }
    }
}

/* out of the pages that exist; nothing of others. Returns 0, or 1 where memory ran out, 2 where counts or ids are
 * out of bounds. */
int kvcomp_vector_dots(const Vectors *v) {
    for (int64_t s = 0; s < v->streams; s++)
        if (!named(v->ids + s * v->ids_stride, v->counts[s], v->pages, v->records)) return 2;
    int64_t room = round_up(v->fields * v->dim, 16), each = room * v->vectors * TOGETHER, threads = 1;
    int64_t queries = v->streams * v->rows * room, blocks = (v->pages + PAGES - 1) / PAGES;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    float *q = malloc((queries + threads * each) * sizeof(float)), *x = q + queries;
    if (!q) return 1;
    split(v, q, room);
#pragma omp parallel for schedule(static) if (threads > 1 && v->streams * blocks > 4)
    for (int64_t i = 0; i < v->streams * blocks; i++) {
        int64_t s = i / blocks, first = i % blocks * PAGES, last = first + PAGES, thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        last = last < v->counts[s] ? last : v->counts[s];
        estimates(v, q + s * v->rows * room, s, first, last, x + thread * each);
    }
    free(q);
    return 0;
}
