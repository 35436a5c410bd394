/* What attention is asked for, as kernels/cpu/__init__.py packs it, and how it is cut into items. */

enum { UNIFORM, CODEBOOK, FLOAT32, FLOAT16, BFLOAT16, E4M3, E5M2 };
enum { HALF, BF16, FP8, POWER }; /* formats of scales: float16, bfloat16, E4M3, E8M0 */
enum { CAST, TABLE, BOOK };
enum { FEW, FIVE, SIX, SEVEN, EIGHT, WHOLE, SMALL_FLOAT, SMALLER_FLOAT, STORED }; /* what `blocks.h` makes numbers by */
enum { ROWS = 16, MANY_ROWS = 64, TILE = 32, TOKENS = 256, ROOM = 320, PIECES = 4, LEAST = 8, PAGES = 64, TOGETHER = 8 };
enum { CHUNK = 8, K_CHUNK = 64, V_CHUNK = 16 }; /* channels that `blocks.h` unpacks at a time; the others for many rows */
enum { SUMS = 1 << 17 }; /* numbers that a cache holds for sums over values */
#define NOTHING (-1)

/* One plane of codes: `width` bits each, the first in the low bits; token t's begin at byte offset + t * stride. */
typedef struct {
    int64_t offset, stride;
    int32_t width, bit; /* bit: of the first code, in the words of the side's rows */
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
    int64_t scale_stride, page_scale;   /* bytes from a token's scales to the next; offset of a float32, or NOTHING */
    int32_t scale_format, grid;         /* grid: the row of the first scale among the side's; segments may share it */
} Segment;

/* Bytes that a token has in one field of codes or numbers; at: the first of its words among the side's. */
typedef struct {
    int64_t offset, stride, bytes, at;
} Row;

typedef struct {
    const Segment *segments;
    const uint8_t *base; /* of page 0 */
    int64_t page_bytes;  /* from a page to the next */
    int64_t count;
    const Row *rows;
    int64_t row_count, words, grids; /* rows of 32-bit words, and of scales and zeros */
    int64_t blocked;                 /* whether it is read as `blocks.h` does */
} Side;

/* Tokens of all streams: in pages, or page s of `room` tokens holding those of stream s. */
typedef struct {
    Side k, v;
    const int32_t *ids;    /* [streams, ids_stride] pages; NULL: page s */
    const int64_t *counts; /* [streams] pages, or tokens where there are no ids or `in_tokens` says so */
    int64_t ids_stride, page_tokens, in_tokens;
    int64_t listed, records; /* ids of a stream; pages that they may name */
} Source;

/* What maps queries to the coordinates of pages, q' = q D and their bias q . mean, and sums over values back, y D' +
 * mean; of stream s the matrix D [original, coordinates] of number s mod n. No matrix: they are the same. */
typedef struct {
    const void *matrix; /* float16 where `half`, or float32; `stride` numbers from row to row, `each` to the next D */
    const float *mean;  /* [n, original], or NULL */
    const int16_t *order; /* [n, original]: the channel that row d of D is of; NULL: d */
    int64_t n, each, stride, half;
} Map;

typedef struct {
    Source source[2];
    Map k_map, v_map; /* of pages */
    int64_t sources, streams, rows, k_dim, v_dim;
    const float *q, *bias;              /* [streams, rows, k_dim], [streams, rows] or NULL */
    const float *token_bias;            /* [streams, rows, listed * page_tokens] of pages, or NULL */
    const int64_t *skipped;             /* [streams] first tokens of pages that are not seen, fewer than a page; or NULL */
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
    int64_t rows, words, grids; /* rows of an item; what blocks need, 0: nothing is read so */
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
static int64_t out_room(const Side *side, const Segment *g) {
    Words w = words_of(g, 16);
    int64_t plain = round_up(g->channels, 16);
    if (side->blocked) return plain * 16;
    return w.words ? round_up(w.words, 16) * (32 / g->plane[0].width + 1) : plain;
}

static int64_t channels_of(const Side *side) {
    int64_t sum = 0;
    for (int64_t i = 0; i < side->count; i++) sum += side->segments[i].channels;
    return sum;
}

static Shape shape_of(const Problem *p) {
    Shape shape = {.tile = TILE, .rows = MANY_ROWS};
    for (int i = 0; i < 2 * p->sources; i++) {
        const Source *from = &p->source[i / 2];
        const Side *side = i % 2 ? &from->v : &from->k;
        int64_t *width = i % 2 ? &shape.v_width : &shape.k_width, sum = 0, room = 0;
        for (int j = 0; j < side->count; j++) {
            const Segment *g = &side->segments[j];
            int64_t channels = round_up(g->channels, 16);
            sum += channels, room += i % 2 ? out_room(side, g) : 0;
            shape.channels = channels > shape.channels ? channels : shape.channels;
            if (g->kind == UNIFORM && g->token_group > 1 && g->token_group % 32) shape.tile = 16;
        }
        if (!side->blocked) shape.rows = ROWS;
        if (side->blocked && side->words > shape.words) shape.words = side->words;
        if (side->blocked && side->grids > shape.grids) shape.grids = side->grids;
        *width = sum > *width ? sum : *width;
        shape.out_width = room > shape.out_width ? room : shape.out_width;
        if (from->ids && from->page_tokens % 32) shape.tile = 16;
    }
    shape.codes = round_up(shape.channels, 128) + 128;
    if (p->rows <= ROWS) shape.rows = ROWS;
    if (shape.rows > ROWS && shape.rows * shape.out_width > SUMS) shape.rows = MANY_ROWS / 2;
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
