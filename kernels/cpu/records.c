/* Copies on CPUs: pages made of single tokens, runs of elements, and tokens behind those that are held. */
#include <string.h>

#include "bounds.h"

enum { AHEAD = 12 }; /* tokens fetched ahead */

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
