/* What a decode step does besides attention, on CPUs; `kernels/select.py` is the specification of what selectors do.
 *
 * Codes of tokens times queries, softmax over all estimates of a stream and its mean over query heads, the places of the
 * largest, and pages made of single tokens. Each loop is over neighbours in memory, for the compiler to vectorize.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__GNUC__) || defined(__clang__))
#define FAST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FAST
#endif
enum { PAGES = 64, MOST = 64, AHEAD = 12 }; /* pages at a time; tokens at a time; tokens fetched ahead */

/* out[j][t] = sum_c q[j][c] * code[c][t] + offset[j], for the n = pages * size tokens of a few pages; 4 bits: channel c in
 * the low half of row c of a page, and channel rows + c in its high half. Inlined: size may be a constant. */
static inline __attribute__((always_inline)) void dots(const float *q, const float *offset, const uint8_t *codes,
                                                       int64_t page_bytes, const int32_t *ids, int64_t pages,
                                                       const int64_t size, int64_t row_bytes, int64_t heads, int64_t rows, int bits, float *out,
                                                       int64_t out_stride) {
    float low[MOST], high[MOST];
    int64_t channels = bits == 4 ? 2 * rows : rows, n = pages * size;
    for (int64_t j = 0; j < heads; j++)
        for (int64_t t = 0; t < n; t++) out[j * out_stride + t] = offset[j];
    for (int64_t c = 0; c < rows; c++) {
        for (int64_t p = 0; p < pages; p++) {
            const uint8_t *from = codes + ids[p] * page_bytes + c * row_bytes;
            float *first = low + p * size, *second = high + p * size;
            if (bits == 8) {
#pragma omp simd
                for (int64_t t = 0; t < size; t++) first[t] = (float)(int32_t)from[t];
            } else {
#pragma omp simd
                for (int64_t t = 0; t < size; t++) {
                    first[t] = (float)(int32_t)(from[t] & 15);
                    second[t] = (float)(int32_t)(from[t] >> 4);
                }
            }
        }
        for (int64_t j = 0; j < heads; j++) {
            float *to = out + j * out_stride, first = q[j * channels + c];
            if (bits == 8) {
#pragma omp simd
                for (int64_t t = 0; t < n; t++) to[t] += first * low[t];
            } else {
                float second = q[j * channels + rows + c];
#pragma omp simd
                for (int64_t t = 0; t < n; t++) to[t] += first * low[t] + second * high[t];
            }
        }
    }
}

/* `dots` of the pages [from, to) of a stream, of `size` tokens. */
FAST static void dots_of_pages(const float *q, const float *offset, const uint8_t *codes, int64_t page_bytes,
                               const int32_t *ids, int64_t from, int64_t to, int64_t heads, int64_t rows, int bits, int64_t size, float *out,
                               int64_t out_stride) {
    int64_t each = size < MOST ? MOST / size : 1;
    for (int64_t p = from; p < to; p += each) {
        int64_t n = to - p < each ? to - p : each;
        float *here = out + p * size;
        for (int64_t next = p + each; next < to && next < p + 2 * each; next++)
            for (int64_t at = 0; at < rows * size; at += 64) __builtin_prefetch(codes + ids[next] * page_bytes + at);
        if (size == 16)
            dots(q, offset, codes, page_bytes, ids + p, n, 16, 16, heads, rows, bits, here, out_stride);
        else
            for (int64_t t = 0; t < size; t += MOST)
                dots(q, offset, codes + t, page_bytes, ids + p, n, size - t < MOST ? size - t : MOST, size, heads, rows,
                     bits, here + t, out_stride);
    }
}

/* Whether counts are of nothing, or of no more than there are. */
static int in_bounds(const int64_t *counts, int64_t streams, int64_t most) {
    for (int64_t s = 0; s < streams; s++)
        if (counts[s] < 0 || counts[s] > most) return 0;
    return 1;
}

/* Whether ids [streams, ids_stride], the first counts[s] of `pages`, are of records that there are. */
static int named(const int32_t *ids, int64_t ids_stride, const int64_t *counts, int64_t streams, int64_t pages,
                 int64_t records) {
    int64_t wrong = !in_bounds(counts, streams, pages);
    for (int64_t s = 0; s < streams && !wrong; s++)
        for (int64_t i = 0; i < counts[s]; i++) wrong |= (uint32_t)ids[s * ids_stride + i] >= (uint64_t)records;
    return !wrong;
}

/* Functions that return a number: 0, or 1 where memory ran out, 2 where counts, ids or places are out of bounds. */

/* codes of page i of stream s at codes + ids[s][i] * page_bytes: [rows, size] bytes; out [streams, heads, pages * size],
 * of which only the first counts[s] pages are written. */
int kvcomp_code_dots(const float *q, const float *offset, const uint8_t *codes, int64_t page_bytes, int64_t records,
                     const int32_t *ids, int64_t ids_stride, const int64_t *counts, int64_t streams, int64_t heads,
                     int64_t rows, int64_t bits, int64_t pages, int64_t size, float *out) {
    int64_t channels = bits == 4 ? 2 * rows : rows, blocks = (pages + PAGES - 1) / PAGES;
    if (!named(ids, ids_stride, counts, streams, pages, records)) return 2;
#pragma omp parallel for schedule(static) if (streams * blocks > 8)
    for (int64_t i = 0; i < streams * blocks; i++) {
        int64_t s = i / blocks, from = i % blocks * PAGES, to = from + PAGES;
        dots_of_pages(q + s * heads * channels, offset + s * heads, codes, page_bytes, ids + s * ids_stride, from,
                      to < counts[s] ? to : counts[s], heads, rows, (int)bits, size, out + s * heads * pages * size,
                      pages * size);
    }
    return 0;
}

/* x[i] = exp(x[i] - most), to 2e-7 relative; returns their sum. */
FAST static float soften(float *x, int64_t n, float most) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        float y = x[i] - most;
        y = y > -87.0f ? y : -87.0f;
        float shifted = y * 1.44269504f + 12582912.0f, power = shifted - 12582912.0f;
        float r = y - power * 0.693359375f + power * 2.12194440e-4f;
        union {
            int32_t i;
            float f;
        } two = {((int32_t)power + 127) << 23};
        float e = 1.9875691500e-4f;
        e = e * r + 1.3981999507e-3f;
        e = e * r + 8.3334519073e-3f;
        e = e * r + 4.1665795894e-2f;
        e = e * r + 1.6666665459e-1f;
        e = e * r + 5.0000001201e-1f;
        y = (e * r * r + r + 1.0f) * two.f;
        x[i] = y;
        sum += y;
    }
    return sum;
}

/* The largest of x; no number where one of them is none, or is infinite. */
FAST static float largest(const float *x, int64_t n) {
    float most = -INFINITY, wrong = 0;
#pragma omp simd reduction(max : most) reduction(+ : wrong)
    for (int64_t i = 0; i < n; i++) {
        most = x[i] > most ? x[i] : most;
        wrong += x[i] * 0.0f;
    }
    return most + wrong;
}

FAST static void add_scaled(float *to, const float *x, int64_t n, float by) {
    for (int64_t i = 0; i < n; i++) to[i] += by * x[i];
}

/* out [n]: softmax of the first n of each head's logits [heads, stride], which are overwritten, averaged over heads; 0
 * of heads with logits that are not finite. */
static void shares_of(float *logits, int64_t heads, int64_t stride, int64_t n, float *out) {
    memset(out, 0, n * sizeof(float));
    for (int64_t g = 0; g < heads; g++) {
        float *x = logits + g * stride, most = largest(x, n);
        if (isfinite(most)) add_scaled(out, x, n, 1 / (soften(x, n, most) * heads));
    }
}

/* out [streams, n]: `shares_of` the first counts[s]; 0 for the others. */
int kvcomp_shares(float *logits, const int64_t *counts, int64_t streams, int64_t heads, int64_t n, float *out) {
    if (!in_bounds(counts, streams, n)) return 2;
#pragma omp parallel for schedule(static) if (streams > 1 && n > 512)
    for (int64_t s = 0; s < streams; s++) {
        shares_of(logits + s * heads * n, heads, n, counts[s], out + s * n);
        memset(out + s * n + counts[s], 0, (n - counts[s]) * sizeof(float));
    }
    return 0;
}

/* Numbers in the order of floats that are no nan. */
static inline uint32_t ordered(float x) {
    union {
        float f;
        uint32_t u;
    } y = {x + 0.0f}; /* -0 is 0 */
    return y.u & 0x80000000u ? ~y.u : y.u | 0x80000000u;
}

/* The k-th largest of `ordered` numbers x [n], 0 < k <= n, and in *above how many are larger: by their digits, the
 * highest first, without a branch on what they are. Those that a digit leaves in question are gathered in room [n]. */
static uint32_t kth(const uint32_t *x, int64_t n, int64_t k, uint32_t *room, int64_t *above) {
    static const int shifts[] = {21, 10, 0};
    uint32_t found = 0;
    *above = 0;
    for (int i = 0; i < 3; i++) {
        int32_t count[2048] = {0}, mask = i < 2 ? 2047 : 1023;
        int64_t left = 0;
        uint32_t digit = mask;
        for (int64_t t = 0; t < n; t++) count[x[t] >> shifts[i] & mask]++;
        for (; *above + count[digit] < k; digit--) *above += count[digit];
        for (int64_t t = 0; t < n; t++) {
            uint32_t mine = x[t]; /* x may be room */
            room[left] = mine;
            left += (mine >> shifts[i] & mask) == digit;
        }
        found |= digit << shifts[i];
        x = room, n = left;
    }
    return found;
}

/* to [width]: where the k largest of x [n] are, ascending, the first ones of equals; then `last`. room [2 n]. */
static void places_of(const float *x, int64_t n, int64_t k, uint32_t *room, int64_t *to, int64_t width, int64_t last) {
    int64_t at = 0, above;
    if (k > 0) {
        for (int64_t i = 0; i < n; i++) room[i] = ordered(x[i]);
        uint32_t least = kth(room, n, k, room + n, &above);
        int64_t equals = k - above;
        for (int64_t i = 0; i < n && at < k; i++) {
            int64_t equal = room[i] == least;
            to[at] = i;
            at += (room[i] > least) | (equal & (equals > 0));
            equals -= equal;
        }
    }
    for (; at < width; at++) to[at] = last;
}

/* out [streams, width]: `places_of` the wanted[s] largest of x [streams, n]. */
int kvcomp_largest(const float *x, const int64_t *wanted, int64_t streams, int64_t n, int64_t width, int64_t *out) {
    if (!in_bounds(wanted, streams, n < width ? n : width)) return 2;
    uint32_t *room = malloc(2 * streams * n * sizeof(uint32_t) + 1);
    if (!room) return 1;
#pragma omp parallel for schedule(static) if (streams > 1 && n > 512)
    for (int64_t s = 0; s < streams; s++)
        places_of(x + s * n, n, wanted[s], room + 2 * s * n, out + s * width, width, n - 1);
    free(room);
    return 0;
}

/* out [streams, width]: of the counts[s] pages, or unit * counts[s] tokens, of a stream, those wanted[s] of the largest
 * shares; the first and last `first` and `last` pages are among them. logits [streams, heads, pages * each], to be
 * multiplied with scale, are overwritten; a page's share is the sum of its `each` where unit is 1. */
int kvcomp_choose(float *logits, float scale, const int64_t *counts, int64_t streams, int64_t heads, int64_t pages,
                  int64_t each, int64_t unit, const int64_t *wanted, int64_t width, int64_t first, int64_t last,
                  int64_t *out) {
    int64_t n = pages * each;
    if (!in_bounds(counts, streams, pages) || !in_bounds(wanted, streams, width)) return 2;
    uint32_t *memory = malloc(3 * streams * n * sizeof(uint32_t) + 1);
    if (!memory) return 1;
#pragma omp parallel for schedule(static) if (streams > 1 && n > 512)
    for (int64_t s = 0; s < streams; s++) {
        uint32_t *room = memory + 3 * s * n;
        float *share = (float *)(room + 2 * n), *mine = logits + s * heads * n;
        int64_t many = counts[s] * unit, taken = wanted[s] < many ? wanted[s] : many;
        for (int64_t g = 0; g < heads; g++)
            for (int64_t i = 0; i < counts[s] * each; i++) mine[g * n + i] *= scale;
        shares_of(mine, heads, n, counts[s] * each, share);
        if (each != unit)
            for (int64_t p = 0; p < counts[s]; p++) {
                float sum = 0;
                for (int64_t i = 0; i < each; i++) sum += share[p * each + i];
                share[p] = sum;
            }
        for (int64_t i = 0; i < many && i < first * unit; i++) share[i] += 2;
        for (int64_t i = many - 1; i >= 0 && i >= many - last * unit; i--) share[i] += 2;
        places_of(share, many, taken, room, out + s * width, width, pages * unit - 1);
    }
    free(memory);
    return 0;
}

/* memcpy of the sizes that rows mostly have, without a call. */
static inline void copy_row(uint8_t *to, const uint8_t *from, int64_t n) {
    switch (n) {
    case 2: memcpy(to, from, 2); break;
    case 16: memcpy(to, from, 16); break;
    case 32: memcpy(to, from, 32); break;
    case 64: memcpy(to, from, 64); break;
    case 128: memcpy(to, from, 128); break;
    case 256: memcpy(to, from, 256); break;
    default: memcpy(to, from, n);
    }
}

/* Pages of single tokens: token i of stream s is tokens[s][i], place tokens % size of page ids[s][tokens / size]. Field f
 * of a page begins at offsets[f], and has row[f] bytes a token. out [streams * count / size, out_bytes]. Rows lie apart:
 * those to come are fetched ahead. */
int kvcomp_regroup(const uint8_t *pool, int64_t page_bytes, int64_t records, const int32_t *ids, int64_t ids_stride,
                   int64_t listed, const int64_t *tokens, int64_t streams, int64_t count, int64_t size,
                   const int64_t *offsets, const int64_t *row, int64_t fields, uint8_t *out, int64_t out_bytes) {
    int64_t total = streams * count, wrong = 0;
    for (int64_t i = 0; i < total; i++) wrong |= tokens[i] < 0 || tokens[i] >= listed * size;
    if (wrong) return 2;
#pragma omp parallel for schedule(static) reduction(| : wrong) if (total > 256)
    for (int64_t i = 0; i < total; i++) {
        if (i + AHEAD < total) {
            int64_t s = (i + AHEAD) / count, token = tokens[i + AHEAD], place = token % size;
            const uint8_t *page = pool + ids[s * ids_stride + token / size] * page_bytes;
            for (int64_t f = 0; f < fields; f++)
                for (int64_t at = 0; at < row[f]; at += 64) __builtin_prefetch(page + offsets[f] + place * row[f] + at);
        }
        int64_t s = i / count, token = tokens[i], place = token % size, id = ids[s * ids_stride + token / size];
        if (id < 0 || id >= records) {
            wrong = 1;
            continue;
        }
        const uint8_t *page = pool + id * page_bytes;
        uint8_t *to = out + i / size * out_bytes; /* a stream's tokens fill whole pages */
        for (int64_t f = 0; f < fields; f++)
            copy_row(to + offsets[f] + i % size * row[f], page + offsets[f] + place * row[f], row[f]);
    }
    return wrong ? 2 : 0;
}

/* out [count, width]: runs of so many elements that begin at element starts[i] of the n of `unit` bytes. */
int kvcomp_runs(const uint8_t *from, int64_t n, const int64_t *starts, int64_t unit, int64_t count, int64_t width,
                uint8_t *out) {
    int64_t bytes = width * unit, wrong = 0;
    for (int64_t i = 0; i < count; i++) wrong |= starts[i] < 0 || starts[i] > n - width;
    if (wrong) return 2;
#pragma omp parallel for schedule(static) if (count > 256)
    for (int64_t i = 0; i < count; i++) {
        if (i + AHEAD < count)
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + starts[i + AHEAD] * unit + at);
        copy_row(out + i * bytes, from + starts[i] * unit, bytes);
    }
    return 0;
}

/* A token of each stream behind the counts[s] that k and v [streams, room] of so many bytes hold; it counts from then
 * on. */
int kvcomp_append(uint8_t *k, uint8_t *v, const uint8_t *keys, const uint8_t *values, int64_t *counts, int64_t streams,
                  int64_t k_room, int64_t v_room, int64_t k_bytes, int64_t v_bytes) {
    if (!in_bounds(counts, streams, (k_room < v_room ? k_room : v_room) - 1)) return 2;
    for (int64_t s = 0; s < streams; s++) {
        memcpy(k + (s * k_room + counts[s]) * k_bytes, keys + s * k_bytes, k_bytes);
        memcpy(v + (s * v_room + counts[s]) * v_bytes, values + s * v_bytes, v_bytes);
        counts[s]++;
    }
    return 0;
}
