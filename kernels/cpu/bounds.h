/* What functions besides attention and writing share. Those that return a number: 0, or 1 where memory ran out, 2 where
 * counts, ids or places are out of bounds. */
#include <stdint.h>

#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__GNUC__) || defined(__clang__))
#define FAST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FAST
#endif

/* Whether counts are of nothing, or of no more than there are. */
static inline int in_bounds(const int64_t *counts, int64_t streams, int64_t most) {
    for (int64_t s = 0; s < streams; s++)
        if (counts[s] < 0 || counts[s] > most) return 0;
    return 1;
}

/* Whether ids [streams, ids_stride], the first counts[s] of `pages`, are of records that there are. */
static inline int named(const int32_t *ids, int64_t ids_stride, const int64_t *counts, int64_t streams, int64_t pages,
                 int64_t records) {
    int64_t wrong = !in_bounds(counts, streams, pages);
    for (int64_t s = 0; s < streams && !wrong; s++)
        for (int64_t i = 0; i < counts[s]; i++) wrong |= (uint32_t)ids[s * ids_stride + i] >= (uint64_t)records;
    return !wrong;
}
