/* Codes of tokens times queries, on CPUs; `kernels/reference/select.py` is the specification. Each loop is over neighbours
 * in memory, for the compiler to vectorize. */
#include <string.h>

#include "bounds.h"

enum { PAGES = 64, MOST = 64 }; /* pages at a time; tokens at a time */

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
