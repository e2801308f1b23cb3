// RMS norm of rows; the contract is in kernels/norm.py.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "parallel.h"
#include "vec.h"

namespace lorikeet {
namespace {

// Rows that one piece of work takes: a row of a few hundred values is too little for a thread to wake up for.
constexpr long MIN_VALUES = 1 << 14;

// What a store to T and a load from it leave of a value.
template <class T>
Vec rounded(Vec value) {
    T through[LANES];
    store(through, value);
    return load(through);
}

template <class T>
void norm_row(const T* x, const T* residual, T* sum_out, const T* weight, T* out, long width, float eps) {
    const long body = width - width % LANES;
    Vec squares = Vec{};
    float tail = 0;
    for (long i = 0; i < body; i += LANES) {
        Vec value = load(x + i);
        if (residual != nullptr) value = rounded<T>(value + load(residual + i));
        store(sum_out + i, value);
        squares += value * value;
    }
    for (long i = body; i < width; i++) {
        put(sum_out + i, residual == nullptr ? to_float(x[i]) : to_float(x[i]) + to_float(residual[i]));
        const float value = to_float(sum_out[i]);
        tail += value * value;
    }
    const float factor = 1.0f / std::sqrt((sum(squares) + tail) / static_cast<float>(width) + eps);
    for (long i = 0; i < body; i += LANES) {
        store(out + i, rounded<T>(load(sum_out + i) * factor) * load(weight + i));
    }
    for (long i = body; i < width; i++) {
        T value;
        put(&value, to_float(sum_out[i]) * factor);
        put(out + i, to_float(value) * to_float(weight[i]));
    }
}

}  // namespace
}  // namespace lorikeet

// out[i] = norm(x[row]) or norm(x[row] + residual[row]), row = rows[i] or i. With `in_place`, residual[row] becomes the sum.
LORIKEET_EXPORT void lorikeet_rms_norm(
    int type, const void* x, long x_stride, void* residual, long residual_stride, int in_place, const int64_t* rows,
    const void* weight, void* out, long num_rows, long width, float eps, int threads) {
    using namespace lorikeet;
    with_type(type, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        const long piece = std::max(1L, MIN_VALUES / width);
        parallel_for(threads, num_rows, piece, [&](long first, long end) {
            for (long i = first; i < end; i++) {
                const long row = rows == nullptr ? i : rows[i];
                T* y = static_cast<T*>(out) + i * width;
                T* r = residual == nullptr ? nullptr : static_cast<T*>(residual) + row * residual_stride;
                norm_row<T>(
                    static_cast<const T*>(x) + row * x_stride, r, in_place ? r : y, static_cast<const T*>(weight), y, width,
                    eps);
            }
        });
    });
}
