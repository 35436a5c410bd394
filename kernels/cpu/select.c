/* What selectors do with estimates, on CPUs; `kernels/reference/select.py` is the specification: softmax over all estimates
 * of a stream and its mean over query heads, and the places of the largest. Each loop is over neighbours in memory, for the
 * compiler to vectorize. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bounds.h"

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
