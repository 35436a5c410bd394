/* Bytes in vectors of 16, side by side from two. */

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
