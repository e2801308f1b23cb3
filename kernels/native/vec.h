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
typedef uint16_t Halves __attribute__((vector_size(16)));

// Tensors' element types, as `native.py` numbers them. Values are computed in fp32 whatever they are stored in.
enum Type : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct BF16 {
    uint16_t bits;
};

struct FP16 {
    uint16_t bits;
};

static inline Vec fill(float value) { return Vec{} + value; }

static inline float to_float(float x) { return x; }

static inline float to_float(BF16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float to_float(FP16 x) {
    _Float16 value;
    std::memcpy(&value, &x, sizeof value);
    return static_cast<float>(value);
}

// Rounds to nearest even, as torch does; a NaN stays one.
static inline void put(float* to, float value) { *to = value; }

static inline void put(BF16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to->bits = value != value ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static inline void put(FP16* to, float value) {
    const _Float16 rounded = static_cast<_Float16>(value);
    std::memcpy(to, &rounded, sizeof rounded);
}

static inline Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

static inline Vec load(const BF16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Bits bits = __builtin_convertvector(halves, Bits) << 16;
    Vec value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
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

static inline float sum(Vec value) {
    return ((value[0] + value[4]) + (value[2] + value[6])) + ((value[1] + value[5]) + (value[3] + value[7]));
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
