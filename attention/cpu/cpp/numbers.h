// Numbers as the kernels read, compute and write them: bf16 or fp32 in memory, fp32 in registers, 16 at a time.
//
// GCC and Clang turn vectors of 16 numbers into one register of AVX-512 or several narrower ones. NaN and infinities
// are kept.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace segue {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kPerBit = 1.44269504088896341f;  // log2(e)

struct BFloat16 {
    uint16_t bits;
};

inline Floats all(float number) { return number - Floats{}; }

inline Floats load16(const float* from) {
    Floats result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline Floats load16(const BFloat16* from) {
#ifdef __AVX512F__  // compilers turn the other form into five shuffles
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return reinterpret_cast<Floats>(_mm512_slli_epi32(wide, 16));
#else
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Bits) << 16);
#endif
}

inline void store16(float* to, Floats numbers) { std::memcpy(to, &numbers, sizeof numbers); }

// To nearest, ties to even.
inline void store16(BFloat16* to, Floats numbers) {
#ifdef __AVX512BF16__  // it takes numbers below 1.2e-38 as zeros
    const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(numbers));
    std::memcpy(to, &halves, sizeof halves);
#else
    const Bits bits = reinterpret_cast<Bits>(numbers);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Halves halves = __builtin_convertvector(numbers == numbers ? rounded : Bits{} + 0x7fc0u, Halves);
    std::memcpy(to, &halves, sizeof halves);
#endif
}

#ifdef __AVX512BF16__
inline void store32(BFloat16* to, Floats low, Floats high) {
    const __m512bh numbers = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
    std::memcpy(to, &numbers, sizeof numbers);
}
#endif

// The first `count` numbers, then zeros.
template <typename Number>
inline Floats load_some(const Number* from, int64_t count) {
    if (count >= kLanes) return load16(from);
    Number padded[kLanes] = {};
    std::memcpy(padded, from, count * sizeof(Number));
    return load16(padded);
}

// 16 numbers, of which only the first `count` have a meaning.
inline Floats load_first(const float* from, int64_t count, float others) {
    if (count >= kLanes) return load16(from);
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < static_cast<int32_t>(count) ? load16(from) : all(others);
}

template <typename Number>
inline void store_some(Number* to, Floats numbers, int64_t count) {
    if (count >= kLanes) return store16(to, numbers);
    Number padded[kLanes];
    store16(padded, numbers);
    std::memcpy(to, padded, count * sizeof(Number));
}

#ifdef __clang__
#define SEGUE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SEGUE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Lane i of the result combines all lanes of vector i.
template <typename Combine>
inline Floats combine_each(Floats (&v)[kLanes], Combine combine) {
    for (int i = 0; i < 8; ++i)
        v[i] = combine(SEGUE_SHUFFLE(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                       SEGUE_SHUFFLE(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    for (int i = 0; i < 4; ++i)
        v[i] = combine(SEGUE_SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                       SEGUE_SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
    for (int i = 0; i < 2; ++i)
        v[i] = combine(SEGUE_SHUFFLE(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                       SEGUE_SHUFFLE(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
    return combine(SEGUE_SHUFFLE(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                   SEGUE_SHUFFLE(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
}

inline Floats sums_of(Floats (&v)[kLanes]) {
    return combine_each(v, [](Floats a, Floats b) { return a + b; });
}

template <typename Combine>
inline float reduce(Floats numbers, Combine combine) {
    numbers = combine(numbers, SEGUE_SHUFFLE(numbers, numbers, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    numbers = combine(numbers, SEGUE_SHUFFLE(numbers, numbers, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    numbers = combine(numbers, SEGUE_SHUFFLE(numbers, numbers, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return combine(numbers, SEGUE_SHUFFLE(numbers, numbers, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))[0];
}

inline float sum_of(Floats numbers) {
    return reduce(numbers, [](Floats a, Floats b) { return a + b; });
}

// The larger of two, lane by lane; of a number and NaN, either.
inline Floats higher_of(Floats a, Floats b) {
#ifdef __AVX512F__  // compilers turn the other form into two instructions
    return reinterpret_cast<Floats>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
    return a > b ? a : b;
#endif
}

inline float highest_of(Floats numbers) { return reduce(numbers, higher_of); }

// exp(x) for x up to 0, within 2 units in the last place; 0 below -87. NaN stays.
inline Floats exp_of(Floats numbers) {
    constexpr float kBit = 0.693147180559945309f;
#ifdef __AVX512F__
    const auto whole = reinterpret_cast<Floats>(_mm512_roundscale_ps(reinterpret_cast<__m512>(numbers * kPerBit), 0));
#else
    const Floats clamped = numbers < all(-87.0f) ? all(-87.0f) : numbers;
    const Ints bits = __builtin_convertvector(clamped * kPerBit - 0.5f, Ints);  // to nearest
    const Floats whole = __builtin_convertvector(bits, Floats);
#endif
    const Floats rest = numbers - whole * kBit;
    Floats power = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
#ifdef __AVX512F__
    const __m512 lowest = _mm512_set1_ps(-87.0f);
    const __mmask16 counts = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(numbers), lowest, _CMP_NLT_UQ);
    return reinterpret_cast<Floats>(
        _mm512_maskz_scalef_ps(counts, reinterpret_cast<__m512>(power), reinterpret_cast<__m512>(whole)));
#else
    const Floats scaled = power * reinterpret_cast<Floats>((bits + 127) << 23);
    return numbers < all(-87.0f) ? Floats{} : scaled;
#endif
}

inline float exp_of(float number) { return exp_of(all(number))[0]; }

// tanh(x), within 2e-7. NaN stays.
inline Floats tanh_of(Floats numbers) {
    const Floats size = numbers < Floats{} ? -numbers : numbers, square = numbers * numbers;
    const Floats power = exp_of(size * -2.0f), large = (1.0f - power) / (1.0f + power);
    Floats small = square * -5.3968253968e-2f + 1.3333333333e-1f;  // where 1 - power would lose digits
    small = (small * square - 3.3333333333e-1f) * square * size + size;
    const Floats result = size < all(0.1f) ? small : large;
    return numbers < Floats{} ? -result : result;
}

}  // namespace segue
