/* Adam and AdamW on values in single precision, in one pass over memory: the gradient's pending division, both
 * averages, the new value and its rounding to the model's dtype. Every byte is read once and written once.
 *
 * The arithmetic is that of torch's fused kernel for CPU, operation by operation, fused where that one is. Here the
 * result of an element does not depend on where it lies, so a shard gives the same bits however it is cut. */
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 32 /* elements: a cache line of the narrowest dtype */
#define AHEAD 256 /* elements that are fetched beforehand; the processor's own prefetcher ends with each 4 KiB */
#define PIECE (INT64_C(1) << 17) /* elements that a thread takes at a time */
#define INLINE static inline __attribute__((always_inline))

enum { NONE, FP32, BF16, FP16 };

typedef struct {
    float *values, *exp_avg, *exp_avg_sq;
    void *rounded; /* where the new values go in another dtype, or null */
    int64_t numel;
} segment;

typedef struct {
    float divisor; /* of the gradients */
    float scale; /* of the values: 1 less the decoupled decay */
    float decay; /* of the values into the gradient */
    float weight1, beta2, weight2; /* 1 - beta1, beta2, 1 - beta2 */
    float root; /* of 1 - beta2^step */
    float eps;
    float step; /* minus lr / (1 - beta1^step) */
    int32_t stream; /* whether the rounded values shall go around the caches, for being too many for them */
} constants;

/* -- vectors: AVX2's, or a single float -------------------------------------------------------------------------- */

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(PLAIN)
#include <immintrin.h>
#define WIDTH 8
typedef __m256 vec;
#define EACH _mm256_set1_ps
#define ADD _mm256_add_ps
#define SUB _mm256_sub_ps
#define MUL _mm256_mul_ps
#define DIV _mm256_div_ps
#define FMA _mm256_fmadd_ps
#define ROOT _mm256_sqrt_ps
#define FENCE _mm_sfence

INLINE vec load(const void *from, int64_t i, int dtype) {
    if (dtype == FP32) return _mm256_loadu_ps((const float *)from + i);
    __m128i narrow = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + i));
    if (dtype == FP16) return _mm256_cvtph_ps(narrow);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

INLINE void store(float *to, int64_t i, vec x) { _mm256_storeu_ps(to + i, x); }

/* The nearest number of bf16 in the upper half of each element, the even one of two; NaN stays NaN. */
INLINE __m256i nearest(vec x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

INLINE __m256i with_nan(vec x) {
    __m256i quiet = _mm256_or_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(nearest(x), quiet, nan);
}

/* Two vectors at a time: that halves the shuffling. */
INLINE void store_rounded(void *to, int64_t i, vec x, vec y, int dtype, int stream) {
    if (dtype == FP32) {
        float *place = (float *)to + i;
        if (stream) _mm256_stream_ps(place, x), _mm256_stream_ps(place + WIDTH, y);
        else _mm256_storeu_ps(place, x), _mm256_storeu_ps(place + WIDTH, y);
        return;
    }
    __m256i narrow, *place = (__m256i *)((uint16_t *)to + i);
    if (dtype == FP16) {
        __m128i low = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
        narrow = _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT), 1);
    } else {
        __m256i a = nearest(x), b = nearest(y);
        int nan = _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_UNORD_Q));
        if (__builtin_expect(nan, 0)) a = with_nan(x), b = with_nan(y);
        narrow = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
        narrow = _mm256_permute4x64_epi64(narrow, 0xd8); /* the halves were interleaved */
    }
    if (stream) _mm256_stream_si256(place, narrow);
    else _mm256_storeu_si256(place, narrow);
}
#else
#define WIDTH 1
typedef float vec;
#define EACH(x) (x)
#define ADD(x, y) ((x) + (y))
#define SUB(x, y) ((x) - (y))
#define MUL(x, y) ((x) * (y))
#define DIV(x, y) ((x) / (y))
#define FMA fmaf
#define ROOT sqrtf
#define FENCE() ((void)0)

INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE vec load(const void *from, int64_t i, int dtype) {
    if (dtype == FP32) return ((const float *)from)[i];
    uint32_t bits = ((const uint16_t *)from)[i];
    if (dtype == BF16) return from_bits(bits << 16);
    uint32_t sign = (bits & 0x8000) << 16, size = bits & 0x7fff;
    if (size >= 0x7c00) return from_bits(sign | 0x7f800000 | (size & 0x3ff) << 13);
    return from_bits(sign | to_bits(from_bits(size << 13) * 0x1p112f)); /* so far do the exponents lie apart */
}

INLINE void store(float *to, int64_t i, vec x) { to[i] = x; }

/* The nearest number, the even one of two; NaN stays NaN. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits = to_bits(x);
    return (x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE uint16_t to_fp16(float x) {
    uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00 | (bits >> 13 & 0x1ff);
    if (bits >= 0x477ff000) return sign | 0x7c00; /* 65520 and more is rounded to infinity */
    if (bits < 0x38800000) return sign | (to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f)); /* subnormal */
    return sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
}

INLINE void store_rounded(void *to, int64_t i, vec x, vec y, int dtype, int stream) {
    (void)stream;
    if (dtype == FP32) ((float *)to)[i] = x, ((float *)to)[i + 1] = y;
    else if (dtype == BF16) ((uint16_t *)to)[i] = to_bf16(x), ((uint16_t *)to)[i + 1] = to_bf16(y);
    else ((uint16_t *)to)[i] = to_fp16(x), ((uint16_t *)to)[i + 1] = to_fp16(y);
}
#endif

/* -- the update -------------------------------------------------------------------------------------------------- */

#define VECTORS (BLOCK / WIDTH)
#define EVERY _Pragma("GCC unroll 4") for (int k = 0; k < VECTORS; k++)

typedef struct {
    const void *gradient;
    float *values, *exp_avg, *exp_avg_sq;
    void *rounded;
} place;

/* A stage at a time, so that the long operations of a block's vectors overlap. `usual` promises that the gradient
 * takes no decay and that beta1 is above 1/2. */
INLINE void block(const place *at, int64_t i, const constants *c, int gradients, int rounded, int usual, int stream) {
    vec g[VECTORS], size[VECTORS], step[VECTORS];
    EVERY g[k] = load(at->gradient, i + k * WIDTH, gradients);
    if (c->divisor != 1.0f) {
        EVERY g[k] = DIV(g[k], EACH(c->divisor));
    }
    if (!usual && c->decay != 0.0f) {
        EVERY g[k] = FMA(load(at->values, i + k * WIDTH, FP32), EACH(c->decay), g[k]);
    }
    EVERY {
        vec m = load(at->exp_avg, i + k * WIDTH, FP32), v = load(at->exp_avg_sq, i + k * WIDTH, FP32);
        if (usual || c->weight1 < 0.5f) m = FMA(EACH(c->weight1), SUB(g[k], m), m);
        else m = FMA(EACH(c->weight1 - 1.0f), SUB(g[k], m), g[k]);
        v = FMA(MUL(EACH(c->weight2), g[k]), g[k], MUL(v, EACH(c->beta2)));
        size[k] = ROOT(v);
        step[k] = MUL(EACH(c->step), m);
        store(at->exp_avg, i + k * WIDTH, m);
        store(at->exp_avg_sq, i + k * WIDTH, v);
    }
    EVERY step[k] = DIV(step[k], ADD(DIV(size[k], EACH(c->root)), EACH(c->eps)));
    EVERY {
        step[k] = ADD(MUL(load(at->values, i + k * WIDTH, FP32), EACH(c->scale)), step[k]);
        store(at->values, i + k * WIDTH, step[k]);
        if (rounded != NONE && k % 2) {
            store_rounded(at->rounded, i + (k - 1) * WIDTH, step[k - 1], step[k], rounded, stream);
        }
    }
}

/* Less than a block: in a block's copy, so that its arithmetic is the same. */
INLINE void edge(const place *at, int64_t i, int64_t count, const constants *c, int gradients, int rounded, int usual) {
    float values[BLOCK] = {0}, exp_avg[BLOCK] = {0}, exp_avg_sq[BLOCK] = {0}, gradient[BLOCK] = {0}, out[BLOCK];
    const size_t read = gradients == FP32 ? 4 : 2, written = rounded == FP32 ? 4 : 2, size = sizeof(float) * count;
    memcpy(gradient, (const char *)at->gradient + i * read, count * read);
    memcpy(values, at->values + i, size);
    memcpy(exp_avg, at->exp_avg + i, size);
    memcpy(exp_avg_sq, at->exp_avg_sq + i, size);
    const place copy = {gradient, values, exp_avg, exp_avg_sq, out};
    block(&copy, 0, c, gradients, rounded, usual, 0);
    memcpy(at->values + i, values, size);
    memcpy(at->exp_avg + i, exp_avg, size);
    memcpy(at->exp_avg_sq + i, exp_avg_sq, size);
    if (rounded != NONE) memcpy((char *)at->rounded + i * written, out, count * written);
}

INLINE void fetch(const place *at, int64_t i, int gradients) {
    const int64_t size = gradients == FP32 ? 4 : 2;
    for (int64_t j = i + AHEAD; j < i + AHEAD + BLOCK; j += 16) {
        if (size == 4 || j == i + AHEAD) __builtin_prefetch((const char *)at->gradient + j * size, 0);
        __builtin_prefetch(at->values + j, 1);
        __builtin_prefetch(at->exp_avg + j, 1);
        __builtin_prefetch(at->exp_avg_sq + j, 1);
    }
}

INLINE void stretch(const place *where, int64_t i, int64_t end, const constants *given, int gradients, int rounded,
                    int usual) {
    const place own_place = *where, *at = &own_place; /* copies, which no store can change */
    const constants own_constants = *given, *c = &own_constants;
    int stream = c->stream && rounded != NONE;
    if (stream) { /* it must begin at a cache line */
        int64_t written = rounded == FP32 ? 4 : 2, past = ((uintptr_t)at->rounded + i * written) % 64;
        int64_t count = past % written ? 0 : (64 - past) % 64 / written;
        stream = past % written == 0;
        if (count > end - i) count = end - i;
        if (count) edge(at, i, count, c, gradients, rounded, usual);
        i += count;
    }
    for (; i + BLOCK <= end; i += BLOCK) {
        fetch(at, i, gradients);
        block(at, i, c, gradients, rounded, usual, stream);
    }
    if (i < end) edge(at, i, end - i, c, gradients, rounded, usual);
}

typedef void update(const place *, int64_t, int64_t, const constants *);

#define UPDATE(name, gradients, rounded) \
    static void name##_usual(const place *at, int64_t begin, int64_t end, const constants *c) { \
        stretch(at, begin, end, c, gradients, rounded, 1); \
    } \
    static void name(const place *at, int64_t begin, int64_t end, const constants *c) { \
        stretch(at, begin, end, c, gradients, rounded, 0); \
    }
#define UPDATES(name, gradients) \
    UPDATE(name##_none, gradients, NONE) \
    UPDATE(name##_fp32, gradients, FP32) \
    UPDATE(name##_bf16, gradients, BF16) \
    UPDATE(name##_fp16, gradients, FP16)
#define NAMES(name) \
    {{name##_none, name##_none_usual}, {name##_fp32, name##_fp32_usual}, \
     {name##_bf16, name##_bf16_usual}, {name##_fp16, name##_fp16_usual}}

UPDATES(fp32, FP32)
UPDATES(bf16, BF16)
UPDATES(fp16, FP16)

static update *const kernels[3][4][2] = {NAMES(fp32), NAMES(bf16), NAMES(fp16)};

/* Update `count` segments by a gradient each, of a dtype for all. Several threads may call it with the same `next`, the
 * number of the first element that nobody has taken: each takes pieces until there are none. */
void dl_adam(const segment *segments, const void *const *gradients, int64_t count, int gradient_dtype,
             int rounded_dtype, const constants *c, _Atomic int64_t *next) {
    update *kernel = kernels[gradient_dtype - FP32][rounded_dtype][c->decay == 0.0f && c->weight1 < 0.5f];
    int64_t before = 0, s = 0; /* elements in the segments before this one */
    while (s < count) {
        int64_t begin = atomic_fetch_add(next, PIECE), end = begin + PIECE;
        for (; s < count && before + segments[s].numel <= begin; s++) before += segments[s].numel;
        for (int64_t at = before, t = s; t < count && at < end; at += segments[t++].numel) {
            const segment *own = &segments[t];
            const place p = {gradients[t], own->values, own->exp_avg, own->exp_avg_sq, own->rounded};
            int64_t from = begin > at ? begin - at : 0, to = end - at < own->numel ? end - at : own->numel;
            kernel(&p, from, to, c);
        }
    }
    if (c->stream) FENCE();
}
