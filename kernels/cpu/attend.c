/* Decode attention over compressed pages on CPUs; `reference.attend_pages` is its specification.
 *
 *   logit[r, t] = softcap(scale * (q[r] . k[t] + bias[r, t])),  out[r] = sum_t softmax_t(logit[r, t]) v[t]
 *
 * bias: of a row, and of a row and token. Where keys of a page have a centre c, q . c is added to their logits, too.
 * Tokens at the start of a stream's first page may be skipped.
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

#include "problem.h"

/* Books of the codes themselves: the low 1, 2 or 4 bits of a number below 16. */
static const float CODES[5][16] = {
    [1] = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1},
    [2] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3},
    [4] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
};

#include "shuffles.h"

#if defined(__aarch64__)
#include <arm_neon.h> /* books are looked up, and float16 numbers converted, by its instructions */
#endif
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

static void from_coordinates(const Problem *p, int64_t stream, const float *y, int64_t width, int64_t rows, float *out,
                             float *room) {
#if defined(__x86_64__)
    if (p->level == 2) {
        from_coordinates_avx512(p, stream, y, width, rows, out, room);
        return;
    }
    if (p->level == 1) {
        from_coordinates_avx2(p, stream, y, width, rows, out, room);
        return;
    }
#endif
    from_coordinates_portable(p, stream, y, width, rows, out, room);
}

/* to gains weight times the sums of an item's row; segments are padded in the sums. */
static void add(float *to, const float *sums, float weight, const Side *v) {
    for (int s = 0; s < v->count; s++) {
        int64_t channels = v->segments[s].channels;
        for (int64_t d = 0; d < channels; d++) to[d] += weight * sums[d];
        to += channels, sums += round_up(channels, 16);
    }
}

/* Merge the n items of a stream's rows, and the prior part where there is one. room: [rows + 1, v_width], where pages
 * have other coordinates. */
static void merge(const Problem *p, const Shape *shape, const Item *items, int64_t n, int64_t stream, int64_t row,
                  float *room) {
    int64_t width = shape->v_width + 2, dim = p->v_dim;
    int64_t rows = p->rows - row < shape->rows ? p->rows - row : shape->rows, first = stream * p->rows + row;
    int64_t channels = channels_of(&p->source[0].v);
    float most[MANY_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        float m = p->prior_lse ? p->prior_lse[first + r] : -INFINITY;
        for (int64_t i = 0; i < n; i++) {
            float own = items[i].partial[r * width + shape->v_width];
            m = own > m ? own : m;
        }
        most[r] = m == -INFINITY ? 0 : m;
    }
    if (p->v_map.matrix) {
        memset(room, 0, rows * channels * sizeof(float));
        for (int64_t i = 0; i < n; i++)
            for (int64_t r = 0; r < rows && items[i].source->ids; r++) {
                const float *partial = items[i].partial + r * width;
                add(room + r * channels, partial, expf(partial[shape->v_width] - most[r]), &items[i].source->v);
            }
        from_coordinates(p, stream, room, channels, rows, p->out + first * dim, room + rows * channels);
    } else {
        memset(p->out + first * dim, 0, rows * dim * sizeof(float));
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = first + r;
        float *out = p->out + at * dim, sum = 0;
        if (p->prior_lse) {
            float weight = expf(p->prior_lse[at] - most[r]);
            sum = weight;
            if (weight > 0)
                for (int64_t d = 0; d < dim; d++) out[d] += weight * p->prior_out[at * dim + d];
        }
        for (int64_t i = 0; i < n; i++) {
            const float *partial = items[i].partial + r * width;
            float weight = expf(partial[shape->v_width] - most[r]), mass = weight * partial[shape->v_width + 1];
            int paged = items[i].source->ids != 0;
            sum += mass;
            if (!paged || !p->v_map.matrix) add(out, partial, weight, &items[i].source->v);
            if (paged && p->v_map.mean)
                for (int64_t d = 0; d < dim; d++) out[d] += mass * p->v_map.mean[stream % p->v_map.n * dim + d];
        }
        p->lse[at] = sum == 0 ? -INFINITY : most[r] + logf(sum);
        if (sum != 0)
            for (int64_t d = 0; d < dim; d++) out[d] /= sum;
    }
}

/* Attention of the problem. Returns 0, or 1 where memory ran out, 2 where counts or ids are out of bounds. */
int kvcomp_attend(const Problem *p) {
    for (int64_t i = 0; i < p->sources; i++)
        if (!in_bounds(&p->source[i], p->streams)) return 2;
    for (int64_t s = 0; p->skipped && s < p->streams; s++)
        if (p->skipped[s] < 0 || p->skipped[s] >= p->source[0].page_tokens) return 2;
    Shape shape = shape_of(p);
    int64_t blocks = (p->rows + shape.rows - 1) / shape.rows, total = 0, threads = 1;
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
    int64_t partial = shape.rows * (shape.v_width + 2), each = round_up(scratch_portable(&shape), 64);
    Item *items = malloc(most * sizeof(Item) + (p->streams * blocks + 1) * sizeof(int64_t));
    float *partials = malloc(most * partial * sizeof(float));
    uint8_t *scratch = malloc(threads * each + 64);
    if (!items || !partials || !scratch) {
        free(items), free(partials), free(scratch);
        return 1;
    }
    for (int64_t s = 0; s < p->streams; s++) {
        for (int64_t row = 0; row < p->rows; row += shape.rows) {
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
    int64_t *ends = (int64_t *)(items + most); /* of each block of rows, the item after its last */
    for (int64_t i = 0; i < p->streams * blocks; i++) {
        while (at < n && items[at].stream == i / blocks && items[at].row == i % blocks * shape.rows) at++;
        ends[i] = at;
    }
    int64_t numbers = p->streams * p->rows * p->v_dim * (p->v_map.matrix ? shape.v_width : 1);
#pragma omp parallel for schedule(static) if (threads > 1 && numbers > 1 << 16)
    for (int64_t i = 0; i < p->streams * blocks; i++) {
        int64_t thread = 0, first = i ? ends[i - 1] : 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        float *own = (float *)(aligned + thread * each);
        merge(p, &shape, items + first, ends[i] - first, i / blocks, i % blocks * shape.rows, own);
    }
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
