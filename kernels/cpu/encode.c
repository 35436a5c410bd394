/* Pages written from K and V in basis coordinates, on CPUs; what codecs `encode` is its specification, bit for bit.
 *
 *   uniform   zero = min x, scale = (max x - zero) / levels, code = round((x - zero) / scale); or symmetric, no zero
 *   codebook  norm = |x| / D^1/2, code = how many middles of the book x / |x| exceeds
 *   floats    scale = max |x| / the largest number, code = the nearest number to x / scale: `floats.h`
 *   joint     codebooks of the same tokens, whose codes say together by how much their norm grows: `segments.Gain`
 *   centred   any of the first three of x less c, a mean over the page's tokens in float16; moved by the error of the
 *             first token, where tokens are coded one by one
 *
 * Scales, zeros and norms are rounded to float16 first, and codes against what is stored. Two things are not determined
 * by the specification: the sign of a zero that is 0, and the last bit of a norm, whose squares are summed in another
 * order. x is finite: of nan and infinities any codes are made.
 *
 * A page at a time: the range of each block, all grids of the page, then codes. Loops are over neighbours in memory,
 * for the compiler to vectorize; everything is inlined into one function for each instruction set, of which
 * `kvcomp_encode` chooses one when it runs. Moved: K and V once, the record once.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* A product and a sum that are rounded at once would give other grids. */
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "pack.h"
#include "uniform.h"
#include "codebook.h"
#include "floats.h"
#include "centre.h"

INLINE void put_numbers(const Piece *g, const uint8_t *x, int64_t stride, int64_t tokens, int64_t first,
                        uint8_t *record) {
    for (int64_t t = 0; t < tokens; t++)
        memcpy(record + g->plane[0].offset + (first + t) * g->plane[0].stride, x + t * stride, g->plane[0].stride);
}

INLINE int64_t itemsize(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* A page of a side, or some of its tokens. codes [page_tokens, channels], and room for 3 * page_tokens + 9 numbers of
 * each channel. */
INLINE void encode_side(const Side *side, const uint8_t *x, int64_t tokens, int64_t first, uint8_t *record,
                        uint8_t *codes, float *room) {
    int64_t size = itemsize(side->dtype), stride;
    if (side->most > 0) {
        const float *from = floats(x, side->dtype, side->row, side->dim, tokens, 0, 0, room, &stride);
        put_joint(side, from, stride, tokens, first, record, codes, from == room ? room + tokens * side->dim : room);
        return;
    }
    for (const Piece *g = side->pieces; g < side->pieces + side->count; x += g->channels * size, g++) {
        if (g->kind >= FLOAT32 && g->kind <= BFLOAT16) {
            put_numbers(g, x, side->row * size, tokens, first, record);
            continue;
        }
        float *c = 0, *rest = room;
        if (g->centre != NOTHING) {
            c = room, rest = room + g->channels;
            if (side->dtype == FLOAT32)
                put_shift(g, x, side->row, tokens, record, codes, c, rest, FLOAT32);
            else if (side->dtype == FLOAT16)
                put_shift(g, x, side->row, tokens, record, codes, c, rest, FLOAT16);
            else
                put_shift(g, x, side->row, tokens, record, codes, c, rest, BFLOAT16);
        }
        /* numbers that are read where they lie become less their centre as they are read */
        int apart = side->row != side->dim && !c, fused = c && side->dtype == FLOAT32 && g->kind == UNIFORM && g->token_group == 1;
        const float *from = floats(x, side->dtype, side->row, g->channels, tokens, apart, fused ? 0 : c, rest, &stride);
        rest = from == rest ? rest + tokens * g->channels : rest;
        if (fused)
            put_less(g, from, stride, tokens, first, record, codes, rest, c);
        else if (g->kind == UNIFORM)
            put_uniform(g, from, stride, tokens, first, record, codes, rest);
        else if (g->kind >= E4M3)
            put_floats(g, from, stride, tokens, first, record, codes, rest);
        else
            put_codebook(g, from, stride, tokens, first, record, codes, rest);
    }
}

INLINE void encode(const Pages *p, int64_t m, uint8_t *codes, float *room) {
    uint8_t *record = p->pool + p->ids[m] * p->record_stride;
    if (!p->rows) memset(record, 0, p->record_bytes); /* what lies between fields */
    for (int i = 0; i < 2; i++) {
        const Side *side = &p->side[i];
        int64_t at = m / side->each * side->stream + m % side->each * p->page_tokens * side->row;
        const uint8_t *x = side->x + at * itemsize(side->dtype);
        encode_side(side, x, p->page_tokens, p->rows ? p->rows[m] : 0, record, codes, room);
    }
}

static void encode_portable(const Pages *p, int64_t m, uint8_t *codes, float *room) { encode(p, m, codes, room); }
#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))
AVX2 static void encode_avx2(const Pages *p, int64_t m, uint8_t *codes, float *room) { encode(p, m, codes, room); }
AVX512 static void encode_avx512(const Pages *p, int64_t m, uint8_t *codes, float *room) { encode(p, m, codes, room); }
#endif

static void run(const Pages *p, int64_t m, uint8_t *codes, float *room) {
#if defined(__x86_64__)
    if (p->level == 2) {
        encode_avx512(p, m, codes, room);
        return;
    }
    if (p->level == 1) {
        encode_avx2(p, m, codes, room);
        return;
    }
#endif
    encode_portable(p, m, codes, room);
}

/* Whole records, summaries excepted, which become 0; or tokens of them, and nothing else. Returns 0, or 1 where memory
 * ran out, 2 where ids or rows are out of bounds. */
int kvcomp_encode(const Pages *p) {
    for (int64_t m = 0; m < p->pages; m++)
        if (p->ids[m] < 0 || p->ids[m] >= p->records || (p->rows && (p->rows[m] < 0 || p->rows[m] >= p->tokens))) return 2;
    int64_t widest = 0, threads = 1;
    for (int i = 0; i < 2; i++) widest = p->side[i].dim > widest ? p->side[i].dim : widest;
    widest = (widest + 63) / 64 * 64;
    int64_t codes = p->page_tokens * widest, floats = (3 * p->page_tokens + 9) * widest;
    int64_t each = codes + floats * sizeof(float);
#ifdef _OPENMP
    int64_t work = p->pages * p->page_tokens * (p->side[0].dim + p->side[1].dim);
    threads = work < ELEMENTS ? 1 : omp_get_max_threads();
#endif
    uint8_t *room;
    if (posix_memalign((void **)&room, 64, threads * each)) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < p->pages; m++) {
        uint8_t *mine = room;
#ifdef _OPENMP
        mine += omp_get_thread_num() * each;
#endif
        run(p, m, mine, (float *)(mine + codes));
    }
    free(room);
    return 0;
}
