// The norm of one row; rounding points as in kernels/norm.py.
#pragma once

#include <cmath>

#include "vec.h"

namespace lorikeet {
namespace {

// What x is multiplied by: 1 / sqrt(mean(x^2) + eps).
template <class T>
float norm_factor(const T* x, long width, float eps) {
    Vec squares = Vec{};
    float tail = 0;
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        const Vec value = load(x + i);
        squares += value * value;
    }
    for (; i < width; i++) tail += to_float(x[i]) * to_float(x[i]);
    return 1.0f / std::sqrt((sum(squares) + tail) / static_cast<float>(width) + eps);
}

// out = round(x * factor) * weight; out may be x.
template <class T>
void scale_row(const T* x, float factor, const T* weight, T* out, long width) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) store(out + i, rounded<T>(load(x + i) * factor) * load(weight + i));
    for (; i < width; i++) {
        T value;
        put(&value, to_float(x[i]) * factor);
        put(out + i, to_float(value) * to_float(weight[i]));
    }
}

}  // namespace
}  // namespace lorikeet
