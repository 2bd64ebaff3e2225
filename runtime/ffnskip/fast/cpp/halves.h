// Numbers of float16, as int4 matrices have for the factor and the offset of a group: in pairs, one behind the other.
#pragma once

#include "vectors.h"

struct Pairs {
    Floats first, second;
};

#if defined(__AVX2__)
INLINE float half_float(uint16_t bits) { return _cvtsh_ss(bits); }
// Four or eight numbers, with zeros behind them.
template <int N>
INLINE Floats load_halves(const uint16_t* from) {
    if constexpr (N == WIDTH) return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
    else return (Floats)_mm256_cvtph_ps(_mm_loadl_epi64((const __m128i*)from));
}
INLINE Pairs eight_pairs(const uint16_t* from) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i*)from), firsts = _mm256_set1_epi32(0xffff);
    const __m256i mixed = _mm256_packus_epi32(_mm256_and_si256(pairs, firsts), _mm256_srli_epi32(pairs, 16));
    const __m256i apart = _mm256_permute4x64_epi64(mixed, _MM_SHUFFLE(3, 1, 2, 0));
    return {(Floats)_mm256_cvtph_ps(_mm256_castsi256_si128(apart)),
            (Floats)_mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1))};
}
#else
INLINE float half_float(uint16_t bits) {  // of finite numbers
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent ? std::ldexp(float(fraction + 1024), exponent - 25) : std::ldexp(float(fraction), -24);
    return bits >> 15 ? -size : size;
}
template <int N>
INLINE Floats load_halves(const uint16_t* from) {
    Floats x = {};
    for (int64_t i = 0; i < N; i++) x[i] = half_float(from[i]);
    return x;
}
INLINE Pairs eight_pairs(const uint16_t* from) {
    Pairs x;
    for (int64_t i = 0; i < WIDTH; i++) {
        x.first[i] = half_float(from[2 * i]);
        x.second[i] = half_float(from[2 * i + 1]);
    }
    return x;
}
#endif
