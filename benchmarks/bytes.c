/* What one-pass Adam costs in memory alone: as many bytes of each tensor are read and written, and one bit is turned.
 * `stream` sends what is rounded around the caches, `ahead` is how far beforehand elements are fetched. */
#include <immintrin.h>
#include <stdatomic.h>
#include <stdint.h>

#define PIECE (INT64_C(1) << 17)

/* Turn the last bit of each: neither compiler nor processor can leave that out. */
static inline __attribute__((always_inline)) __m256i turn(float *at) {
    __m256i turned = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)at), _mm256_set1_epi32(1));
    _mm256_storeu_si256((__m256i *)at, turned);
    return turned;
}

static inline __attribute__((always_inline)) __m256i pass(const float *g, float *p, float *m, float *v, uint16_t *r,
                                                          int64_t end, int ahead, int stream) {
    __m256i all = _mm256_setzero_si256(); /* of the gradient, which nothing is made of */
    for (int64_t i = 0; i < end; i += 32) {
        if (ahead) {
            for (int64_t j = i + ahead; j < i + ahead + 32; j += 16) {
                __builtin_prefetch(g + j, 0);
                __builtin_prefetch(p + j, 1);
                __builtin_prefetch(m + j, 1);
                __builtin_prefetch(v + j, 1);
            }
        }
        for (int64_t j = i; j < i + 32; j += 16) {
            __m256i value = _mm256_setzero_si256();
            for (int64_t k = j; k < j + 16; k += 8) {
                all = _mm256_or_si256(all, _mm256_loadu_si256((const __m256i *)(g + k)));
                value = turn(p + k);
                turn(m + k);
                turn(v + k);
            }
            if (stream) _mm256_stream_si256((__m256i *)(r + j), value);
            else _mm256_storeu_si256((__m256i *)(r + j), value);
        }
    }
    return all;
}

/* `numel` is a multiple of 32; threads share `next` as those of dl_adam do. */
int pass_over(const float *g, float *p, float *m, float *v, uint16_t *r, int64_t numel, int ahead, int stream,
              _Atomic int64_t *next) {
    __m256i all = _mm256_setzero_si256();
    for (int64_t i; (i = atomic_fetch_add(next, PIECE)) < numel;) {
        int64_t end = numel - i < PIECE ? numel - i : PIECE;
        __m256i found;
        if (ahead && stream) found = pass(g + i, p + i, m + i, v + i, r + i, end, 256, 1);
        else if (stream) found = pass(g + i, p + i, m + i, v + i, r + i, end, 0, 1);
        else if (ahead) found = pass(g + i, p + i, m + i, v + i, r + i, end, 256, 0);
        else found = pass(g + i, p + i, m + i, v + i, r + i, end, 0, 0);
        all = _mm256_or_si256(all, found);
    }
    _mm_sfence();
    return _mm256_movemask_epi8(all);
}
