// Eight floats at a time, as in an AVX2 register or two of NEON. Sixteen, in AVX-512, were measured to be slower on a
// processor that splits them in two, and a product waits for memory either way; only panels.h has more. Arithmetic is written with the vector
// extension of GCC and Clang; only for widening 8 and 16 bits do they need to be told the instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

constexpr int64_t WIDTH = 8;

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef int16_t Shorts __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Words __attribute__((vector_size(WIDTH * 4)));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH * 4)));

// So many bytes ahead is memory asked for where rows are read: left to itself, the processor asks too late for its speed.
constexpr int64_t ROW_AHEAD = 4096, LINE = 64;

INLINE Floats spread(float x) { return x - (Floats){}; }

INLINE Floats load(const float* from) {
    Floats x;
    memcpy(&x, from, sizeof(x));  // rows need not be aligned
    return x;
}

#if defined(__AVX2__)
INLINE Ints widen(const uint16_t* from) { return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)); }
INLINE Ints widen(const uint8_t* from) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
INLINE Ints widen(const int8_t* from) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
INLINE Shorts widen16(const int8_t* from) {
    return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
}
// sums + sixteen products, added up in pairs.
INLINE Ints add_products(Ints sums, Shorts a, const int16_t* b) {
    const __m256i with = _mm256_loadu_si256((const __m256i*)b);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (Ints)_mm256_dpwssd_epi32((__m256i)sums, (__m256i)a, with);
#else
    return sums + (Ints)_mm256_madd_epi16((__m256i)a, with);
#endif
}
// The low or the high four bits of sixteen bytes.
INLINE Shorts nibbles(const uint8_t* from, bool high) {
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
    return (Shorts)(high ? _mm256_srli_epi16(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi16(15)));
}
// a[0] b[0] a[1] b[1] ... of the first (part 0) or last (part 1) eight bytes of each sixteen.
INLINE Bytes interleaved(Bytes a, Bytes b, int part) {
    return (Bytes)(part ? _mm256_unpackhi_epi8((__m256i)a, (__m256i)b) : _mm256_unpacklo_epi8((__m256i)a, (__m256i)b));
}
// Sixteen sums of two products with the same two numbers.
INLINE Shorts pair_products(Bytes a, const int8_t* two) {
    int16_t both;
    memcpy(&both, two, sizeof(both));
    return (Shorts)_mm256_maddubs_epi16((__m256i)a, _mm256_set1_epi16(both));
}
#else
template <typename Number>
INLINE Ints widen(const Number* from) {
    Ints x;
    for (int64_t i = 0; i < WIDTH; i++) x[i] = from[i];
    return x;
}
INLINE Shorts widen16(const int8_t* from) {
    Shorts x;
    for (int64_t i = 0; i < 2 * WIDTH; i++) x[i] = from[i];
    return x;
}
INLINE Ints add_products(Ints sums, Shorts a, const int16_t* b) {
    for (int64_t i = 0; i < WIDTH; i++) sums[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sums;
}
INLINE Shorts nibbles(const uint8_t* from, bool high) {
    Shorts x;
    for (int64_t i = 0; i < 2 * WIDTH; i++) x[i] = high ? from[i] >> 4 : from[i] & 15;
    return x;
}
INLINE Bytes interleaved(Bytes a, Bytes b, int part) {
    Bytes x;
    for (int64_t i = 0; i < 4 * WIDTH; i++) x[i] = (i % 2 ? b : a)[i / 16 * 16 + part * 8 + i % 16 / 2];
    return x;
}
INLINE Shorts pair_products(Bytes a, const int8_t* two) {
    Shorts x;
    for (int64_t i = 0; i < 2 * WIDTH; i++) x[i] = int16_t(a[2 * i] * two[0] + a[2 * i + 1] * two[1]);
    return x;
}
#endif

// The first or the last eight of sixteen numbers.
INLINE Ints half_of(Shorts x, int half) {
    typedef int16_t Eight __attribute__((vector_size(WIDTH * 2)));
    Eight eight;
    memcpy(&eight, (const char*)&x + half * sizeof(eight), sizeof(eight));
    return __builtin_convertvector(eight, Ints);
}

// Two numbers, again and again.
INLINE Shorts spread_pair(const int16_t* two) {
    int32_t both;
    memcpy(&both, two, sizeof(both));
    return (Shorts)(both - (Ints){});
}

INLINE Words load_words(const uint8_t* from) {
    Words x;
    memcpy(&x, from, sizeof(x));
    return x;
}

INLINE Bytes load_bytes(const uint8_t* from) { return (Bytes)load_words(from); }

INLINE Bytes high_halves(Bytes x) { return (Bytes)((Words)x >> 4) & 15; }

// bfloat16 is the upper half of a float32.
INLINE Floats load(const uint16_t* from) { return (Floats)(widen(from) << 16); }

INLINE Floats load(const int8_t* from) { return __builtin_convertvector(widen(from), Floats); }

INLINE float widened(const float* from) { return *from; }
INLINE float widened(const int8_t* from) { return *from; }
INLINE float widened(const uint16_t* from) {
    const uint32_t bits = uint32_t(*from) << 16;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

INLINE void store(float* to, Floats x) { memcpy(to, &x, sizeof(x)); }

INLINE void put(float* to, float x) { *to = x; }
INLINE void put(uint16_t* to, float x) {  // rounds to the nearest bfloat16, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    *to = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float sum(Floats x) {
#if defined(__AVX2__)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float total = 0;
    for (int64_t i = 0; i < WIDTH; i++) total += x[i];
    return total;
#endif
}

// The sums of four vectors, one behind the other.
INLINE void store_sums(float* to, Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX2__)
    const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
    to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#endif
}

// The nearest whole numbers, of numbers below 2^22.
INLINE Floats rounded_to_whole(Floats x) {
    const Floats magic = spread(12582912.0f);  // 1.5 * 2^23: adding it leaves no bits behind the point
    return (x + magic) - magic;
}

// Whole numbers that fit.
template <typename Integer>
INLINE void to_integers(Floats x, Integer* to) {
    typedef Integer Eight __attribute__((vector_size(WIDTH * sizeof(Integer))));
    const Eight whole = __builtin_convertvector(__builtin_convertvector(x, Ints), Eight);
    memcpy(to, &whole, sizeof(whole));
}

// exp by 2^n * 2^f with |f| <= 1/2; relative error below 1e-7. Written out, as vector functions of libm are not
// everywhere.
INLINE Floats exponential(Floats x) {
    const Floats low = spread(-87.0f), high = spread(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Floats scaled = x * 1.44269504f;
    const Floats whole = rounded_to_whole(scaled);
    const Floats f = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
    Floats p = spread(1.0f / 5040);
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return p * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
}

INLINE Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// The largest magnitude, at least 1e-30; infinite where one is infinite or not a number.
INLINE float largest_of(const float* x, int64_t n) {
    Floats most = spread(1e-30f);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        const Floats size = magnitude(load(x + i));
        most = size < most ? most : size;  // what is not a number replaces what is, and stays
        most = most != most ? spread(INFINITY) : most;
    }
    float largest = most[0];
    for (int64_t k = 1; k < WIDTH; k++) largest = largest < most[k] ? most[k] : largest;
    for (; i < n; i++) {
        const float size = std::fabs(x[i]);
        largest = size <= largest ? largest : size == size ? size : INFINITY;
    }
    return largest;
}

// Lane by lane its highest bit, as bits of one number.
INLINE uint32_t signs(Ints x) {
#if defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps((__m256)x));
#else
    uint32_t bits = 0;
    for (int64_t i = 0; i < WIDTH; i++) bits |= uint32_t(x[i] < 0) << i;
    return bits;
#endif
}

// The lanes whose bits are set, one behind the other; what follows them is of no account.
struct Front {
    uint8_t lanes[256][WIDTH] = {};
    constexpr Front() {
        for (int bits = 0; bits < 256; bits++)
            for (int lane = 0, n = 0; lane < WIDTH; lane++)
                if (bits >> lane & 1) lanes[bits][n++] = uint8_t(lane);
    }
};
inline constexpr Front FRONT;

INLINE Ints front(uint32_t bits) { return widen(FRONT.lanes[bits]); }

INLINE Floats pick(Floats x, Ints lanes) {
#if defined(__AVX2__)
    return (Floats)_mm256_permutevar8x32_ps((__m256)x, (__m256i)lanes);
#else
    Floats y;
    for (int64_t i = 0; i < WIDTH; i++) y[i] = x[lanes[i]];
    return y;
#endif
}

// Four times the one of eight lanes, and four times the other.
INLINE Floats spread_two(Floats x, int first, int second) {
    return pick(x, Ints{first, first, first, first, second, second, second, second});
}

template <typename Number>
INLINE float dot(const Number* a, const float* b, int64_t n) {
    Floats total = {};
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) total += load(a + i) * load(b + i);
    float rest = sum(total);
    for (; i < n; i++) rest += widened(a + i) * b[i];
    return rest;
}
