// Eight fp32 lanes, and how the model's storage types become them. Portable vector extensions of GCC and Clang: the
// same source compiles for AVX2, SSE2 and NEON; the few places where an instruction set has something better say so.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lorikeet {

constexpr long LANES = 8;

typedef float Vec __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

// Tensors' element types, as `native.py` numbers them. Values are computed in fp32 whatever they are stored in.
enum Type : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct BF16 {
    uint16_t bits;
};

struct FP16 {
    uint16_t bits;
};

// The lanes of a (0 to 7) and b (8 to 15) that the numbers name.
#if defined(__clang__)
#define LORIKEET_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LORIKEET_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif

// Not `Vec{} + value`, which would cost an addition: it turns -0 into 0.
static inline Vec fill(float value) { return Vec{value, value, value, value, value, value, value, value}; }

static inline float to_float(float x) { return x; }

static inline float to_float(BF16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float to_float(FP16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    // As if the fields were a float's, scaled by the difference of the exponents; infinities and NaN keep theirs.
    uint32_t bits = static_cast<uint32_t>(x.bits & 0x7FFF) << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= ((x.bits & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u) | static_cast<uint32_t>(x.bits & 0x8000) << 16;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// Rounds to nearest even, as torch does; a NaN stays one.
static inline void put(float* to, float value) { *to = value; }

static inline void put(BF16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to->bits = value != value ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static inline void put(FP16* to, float value) {
#if defined(__F16C__)
    to->bits = _cvtss_sh(value, 0);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    uint32_t half;
    if (bits > 0x7F800000) {
        half = 0x7E00;  // NaN
    } else if (bits >= 0x477FF000) {
        half = 0x7C00;  // rounds to what is beyond the largest
    } else if (bits < 0x38800000) {
        // Below the least normal one: added to 0.5, whose last place is the least subnormal, it rounds itself.
        float sum;
        std::memcpy(&sum, &bits, sizeof sum);
        sum += 0.5f;
        std::memcpy(&half, &sum, sizeof half);
        half -= 0x3F000000;
    } else {
        half = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
    }
    to->bits = static_cast<uint16_t>(sign | half);
#endif
}

static inline Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

static inline Vec load(const BF16* from) {
#if defined(__AVX2__)
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return reinterpret_cast<Vec>(_mm256_slli_epi32(bits, 16));
#else
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Bits bits = __builtin_convertvector(halves, Bits) << 16;
    Vec value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

static inline Vec load(const FP16* from) {
#if defined(__F16C__)
    return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Vec value;
    for (long i = 0; i < LANES; i++) value[i] = to_float(from[i]);
    return value;
#endif
}

static inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

static inline void store(BF16* to, Vec value) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Bits is_nan = reinterpret_cast<Bits>(value != value);
    const Halves halves = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0), Halves);
    std::memcpy(to, &halves, sizeof halves);
}

static inline void store(FP16* to, Vec value) {
#if defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(reinterpret_cast<__m256>(value), 0));
#else
    for (long i = 0; i < LANES; i++) put(to + i, value[i]);
#endif
}

// What a store to T and a load from it leave of a value.
template <class T>
static inline Vec rounded(Vec value) {
    T through[LANES];
    store(through, value);
    return load(through);
}

// total += a * b, rounded once where the instruction set can. The instruction is named since GCC 12 would otherwise
// move the sums of a loop that has many from register to register, and then to memory.
static inline void accumulate(Vec& total, Vec a, Vec b) {
#if defined(__FMA__)
    Vec sum = total;
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    total = sum;
#else
    total += a * b;
#endif
}

static inline float sum(Vec value) {
    return ((value[0] + value[4]) + (value[2] + value[6])) + ((value[1] + value[5]) + (value[3] + value[7]));
}

static inline float largest(Vec value) {
    float found = value[0];
    for (long i = 1; i < LANES; i++) found = value[i] > found ? value[i] : found;
    return found;
}

// e^x, relative error below 2e-7, also where the result is denormal or overflows; NaN stays NaN. Range reduction to
// |r| <= ln 2 / 2 and the polynomial of Cephes (expf.c).
static inline Vec exp(Vec x) {
    const Vec rounder = fill(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer in the low bits
    x = x > 89.0f ? fill(89.0f) : x;
    x = x < -104.0f ? fill(-104.0f) : x;
    const Vec shifted = x * 1.44269504088896341f + rounder;
    const Vec whole = shifted - rounder;
    const Vec r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // Times 2^whole in two steps: whole may be -150 to 128, which no single exponent can be.
    Bits power;
    std::memcpy(&power, &shifted, sizeof power);
    power -= 0x4B400000;
    const Bits half = reinterpret_cast<Bits>(reinterpret_cast<Ints>(power) >> 1);
    const Bits first = (half + 127) << 23, second = (power - half + 127) << 23;
    Vec one, other;
    std::memcpy(&one, &first, sizeof one);
    std::memcpy(&other, &second, sizeof other);
    return p * one * other;
}

// Of e^2x, but where that would cancel, the polynomial of Cephes (tanhf.c).
static inline Vec tanh(Vec x) {
    const Vec size = x < 0.0f ? -x : x;
    const Vec outer = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    const Vec z = x * x;
    Vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return size < 0.625f ? p * z * x + x : (x < 0.0f ? -outer : outer);
}

// Calls body(T*) with a null pointer of the storage type that `type` stands for.
template <class Body>
static inline void with_type(int type, Body&& body) {
    switch (type) {
        case FLOAT32: return body(static_cast<float*>(nullptr));
        case BFLOAT16: return body(static_cast<BF16*>(nullptr));
        default: return body(static_cast<FP16*>(nullptr));
    }
}

}  // namespace lorikeet
