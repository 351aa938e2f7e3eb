// Vectors of the machine's own width, in GCC's portable form, and what bfloat16 needs.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int MAX_ROWS = 6;  // rows and vectors of a register tile: 24 accumulators, 4 operands, 1 broadcast of 32
constexpr int MAX_VECTORS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int MAX_ROWS = 6;  // 12 accumulators of 16
constexpr int MAX_VECTORS = 2;
#else
constexpr int LANES = 4;
constexpr int MAX_ROWS = 4;
constexpr int MAX_VECTORS = 2;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecWord __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

template <class V, class P>
INLINE V load(const P* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class P>
INLINE void store(P* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

INLINE Vec splat(float x) { return Vec{} + x; }
INLINE Vec as_float(VecInt v) { return (Vec)v; }
INLINE VecInt as_int(Vec v) { return (VecInt)v; }

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    return load<float>(&bits);
}

// Rounds to nearest, ties to even; a NaN stays one.
INLINE void put(float* to, float x) { *to = x; }
INLINE void put(bf16* to, float x) {
    uint32_t bits = load<uint32_t>(&x);
    to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE Vec load_floats(const float* from) { return load<Vec>(from); }
INLINE Vec load_floats(const bf16* from) {
    return as_float((VecInt)(__builtin_convertvector(load<VecHalf>(from), VecWord) << 16));
}

INLINE void store_floats(float* to, Vec v) { store(to, v); }
INLINE void store_floats(bf16* to, Vec v) {
#if defined(__AVX512BF16__)
    store(to, _mm512_cvtneps_pbh(v));
#else
    VecWord bits = (VecWord)v;
    VecWord rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = v != v ? VecWord{} + 0x7fc0 : rounded;
    store(to, __builtin_convertvector(rounded, VecHalf));
#endif
}

// Past the caches, straight to memory; `to` on a vector's boundary. finish_streams before anybody else reads.
INLINE void stream(float* to, Vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, v);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, v);
#else
    store(to, v);
#endif
}

INLINE void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Of a number and a NaN, b.
INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

INLINE Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

INLINE float sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    for (int width = LANES / 2; width; width /= 2)  // a tree of fixed shape: the same bits on every call
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
#endif
}

INLINE float largest(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

// e^x to about 1e-7 relative for x in [-87, 88]; clamped beyond.
INLINE Vec exponential(Vec x) {
    x = minimum(splat(88.0f), maximum(splat(-87.0f), x));
    const float shift = 12582912.0f;  // 1.5 * 2^23: leaves the integer in the low bits
    Vec shifted = x * 1.44269504f + shift;
    Vec whole = shifted - shift;
    Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // minus ln 2 in two parts
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return as_float(as_int(p) + (as_int(shifted) << 23));
}

INLINE Vec silu(Vec x) { return x / (1.0f + exponential(-x)); }

// How many values of one column of a product's right-hand side lie side by side: the dot product's pairs.
template <class T>
constexpr int DEPTH = sizeof(T) == 2 ? 2 : 1;

// acc[r][v] += a[r][DEPTH values] . b[v][LANES columns, DEPTH values each], for one step of the inner dimension
template <int ROWS, int VECTORS>
INLINE void step(const float* a, ptrdiff_t row_stride, const Vec (&b)[VECTORS], Vec (&acc)[ROWS][VECTORS]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        Vec x = splat(a[r * row_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) acc[r][v] += x * b[v];
    }
}

template <int ROWS, int VECTORS>
INLINE void step(const bf16* a, ptrdiff_t row_stride, const Vec (&b)[VECTORS], Vec (&acc)[ROWS][VECTORS]) {
#if defined(__AVX512BF16__)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        __m512bh x = (__m512bh)_mm512_set1_epi32(load<int32_t>(a + r * row_stride));
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, (__m512bh)b[v]);
    }
#else
    Vec even[VECTORS], odd[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        even[v] = as_float(as_int(b[v]) << 16);
        odd[v] = as_float((VecInt)((VecWord)b[v] & 0xffff0000u));
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        Vec x = splat(to_float(a[r * row_stride])), y = splat(to_float(a[r * row_stride + 1]));
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) acc[r][v] = acc[r][v] + x * even[v] + y * odd[v];
    }
#endif
}
