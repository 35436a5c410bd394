/* What a selector does before attention, on CPUs; `kernels/select.py` is the specification.
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
enum { PAGES = 64, MOST = 64 }; /* pages at a time; tokens of a page handled at a time */

/* out[j][t] = sum_c q[j][c] * code[c][t] + offset[j], for n tokens; 4 bits: channel c in the low half of row c, and
 * channel rows + c in its high half. */
FAST static void dots_of_page(const float *q, const float *offset, const uint8_t *codes, int64_t heads, int64_t rows,
                              int bits, int64_t n, int64_t row_bytes, float *out, int64_t out_stride) {
    float low[MOST], high[MOST];
    int64_t channels = bits == 4 ? 2 * rows : rows;
    for (int64_t j = 0; j < heads; j++)
        for (int64_t t = 0; t < n; t++) out[j * out_stride + t] = offset[j];
    for (int64_t c = 0; c < rows; c++) {
        const uint8_t *from = codes + c * row_bytes;
        if (bits == 4) {
            for (int64_t t = 0; t < n; t++) low[t] = (float)(int32_t)(from[t] & 15);
            for (int64_t t = 0; t < n; t++) high[t] = (float)(int32_t)(from[t] >> 4);
        } else {
            for (int64_t t = 0; t < n; t++) low[t] = (float)(int32_t)from[t];
        }
        for (int64_t j = 0; j < heads; j++) {
            float *to = out + j * out_stride, first = q[j * channels + c];
            for (int64_t t = 0; t < n; t++) to[t] += first * low[t];
            if (bits == 4) {
                float second = q[j * channels + rows + c];
                for (int64_t t = 0; t < n; t++) to[t] += second * high[t];
            }
        }
    }
}

/* codes of page p of stream s at codes + s * stream_bytes + p * page_bytes: [rows, size] bytes; out [streams, heads,
 * pages * size]. */
void kvcomp_code_dots(const float *q, const float *offset, const uint8_t *codes, int64_t stream_bytes, int64_t page_bytes,
                      int64_t streams, int64_t heads, int64_t rows, int64_t bits, int64_t pages, int64_t size, float *out) {
    int64_t channels = bits == 4 ? 2 * rows : rows, blocks = (pages + PAGES - 1) / PAGES;
#pragma omp parallel for schedule(static) if (streams * blocks > 8)
    for (int64_t i = 0; i < streams * blocks; i++) {
        int64_t s = i / blocks, from = i % blocks * PAGES, to = from + PAGES < pages ? from + PAGES : pages;
        for (int64_t p = from; p < to; p++) {
            const uint8_t *page = codes + s * stream_bytes + p * page_bytes;
            for (int64_t t = 0; t < size; t += MOST) {
                int64_t n = size - t < MOST ? size - t : MOST;
                dots_of_page(q + s * heads * channels, offset + s * heads, page + t, heads, rows, (int)bits, n, size,
                             out + s * heads * pages * size + p * size + t, pages * size);
            }
        }
    }
}

/* x[i] = exp(x[i] - most), to 2e-7 relative; returns their sum. */
FAST static float soften(float *x, int64_t n, float most) {
    float sum = 0;
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
        x[i] = (e * r * r + r + 1.0f) * two.f;
    }
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

/* The largest of x; no number where one of them is none, or is infinite. */
FAST static float largest(const float *x, int64_t n) {
    float most = -INFINITY, wrong = 0;
    for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    for (int64_t i = 0; i < n; i++) wrong += x[i] * 0.0f;
    return most + wrong;
}

FAST static void add_scaled(float *to, const float *x, int64_t n, float by) {
    for (int64_t i = 0; i < n; i++) to[i] += by * x[i];
}

/* out [streams, n]: softmax of the first counts[s] of logits [streams, heads, n], which are overwritten, averaged over
 * heads; 0 for the others, and of heads with logits that are not finite. */
void kvcomp_shares(float *logits, const int64_t *counts, int64_t streams, int64_t heads, int64_t n, float *out) {
    memset(out, 0, streams * n * sizeof(float));
#pragma omp parallel for schedule(static) if (streams > 1 && n > 512)
    for (int64_t s = 0; s < streams; s++)
        for (int64_t g = 0; g < heads; g++) {
            float *x = logits + (s * heads + g) * n, most = largest(x, counts[s]);
            if (isfinite(most)) add_scaled(out + s * n, x, counts[s], 1 / (soften(x, counts[s], most) * heads));
        }
}

/* The k-th largest of x [n], which is reordered; 0 < k <= n. */
static float kth(float *x, int64_t n, int64_t k) {
    int64_t from = 0, to = n - 1;
    while (from < to) {
        float pivot = x[from + (to - from) / 2];
        int64_t i = from, j = to;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                float y = x[i];
                x[i++] = x[j], x[j--] = y;
            }
        }
        if (k - 1 <= j)
            to = j;
        else if (k - 1 >= i)
            from = i;
        else
            break;
    }
    return x[k - 1];
}

/* out [streams, width]: where the wanted[s] largest of x [streams, n] are, ascending, the first ones of equals; then
 * n - 1. Returns 0, or 1 where memory ran out. */
int kvcomp_largest(const float *x, const int64_t *wanted, int64_t streams, int64_t n, int64_t width, int64_t *out) {
    float *room = malloc(streams * n * sizeof(float) + 1);
    if (!room) return 1;
#pragma omp parallel for schedule(static) if (streams > 1 && n > 512)
    for (int64_t s = 0; s < streams; s++) {
        const float *mine = x + s * n;
        int64_t k = wanted[s], at = 0, above = 0;
        int64_t *to = out + s * width;
        if (k > 0) {
            float *copy = room + s * n;
            memcpy(copy, mine, n * sizeof(float));
            float least = kth(copy, n, k);
            for (int64_t i = 0; i < n; i++) above += mine[i] > least;
            int64_t equals = k - above;
            for (int64_t i = 0; i < n && at < k; i++)
                if (mine[i] > least || (mine[i] == least && equals-- > 0)) to[at++] = i;
        }
        for (; at < width; at++) to[at] = n - 1;
    }
    free(room);
    return 0;
}

/* Pages of single tokens: token i of stream s is tokens[s][i], place tokens % size of page ids[s][tokens / size]. Field f
 * of a page begins at offsets[f], and has row[f] bytes a token. out [streams * count / size, out_bytes]. */
void kvcomp_regroup(const uint8_t *pool, int64_t page_bytes, const int32_t *ids, int64_t ids_stride, const int64_t *tokens,
                    int64_t streams, int64_t count, int64_t size, const int64_t *offsets, const int64_t *row,
                    int64_t fields, uint8_t *out, int64_t out_bytes) {
#pragma omp parallel for schedule(static) if (streams * count > 256)
    for (int64_t i = 0; i < streams * count; i++) {
        int64_t s = i / count, token = tokens[i];
        const uint8_t *page = pool + ids[s * ids_stride + token / size] * page_bytes;
        uint8_t *to = out + i / size * out_bytes; /* a stream's tokens fill whole pages */
        for (int64_t f = 0; f < fields; f++)
            memcpy(to + offsets[f] + i % size * row[f], page + offsets[f] + token % size * row[f], row[f]);
    }
}
