// RMS norm of rows; the contract is in kernels/norm.py.

#include "norm.h"

#include <type_traits>

#include "exports.h"

namespace lorikeet {
namespace {

// Values that take a thread a few microseconds.
constexpr long MIN_VALUES = 1 << 14;

template <class T>
void add_row(const T* x, const T* residual, T* sums, long width) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) store(sums + i, load(x + i) + load(residual + i));
    for (; i < width; i++) put(sums + i, to_float(x[i]) + to_float(residual[i]));
}

}  // namespace
}  // namespace lorikeet

// out[i] = norm(x[row]) or norm(x[row] + residual[row]), row = rows[i] or i; with `in_place`, residual[row] becomes the
// sum.
LORIKEET_EXPORT void lorikeet_rms_norm(
    int type, const void* x, long x_stride, void* residual, long residual_stride, int in_place, const int64_t* rows,
    const void* weight, void* out, long num_rows, long width, float eps, int threads) {
    using namespace lorikeet;
    with_type(type, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        const long piece = even_piece(threads, num_rows, MIN_VALUES / width + 1);
        parallel_for(threads, num_rows, piece, [&](long first, long end) {
            for (long i = first; i < end; i++) {
                const long row = rows == nullptr ? i : rows[i];
                T* to = static_cast<T*>(out) + i * width;
                const T* from = static_cast<const T*>(x) + row * x_stride;
                if (residual != nullptr) {
                    T* other = static_cast<T*>(residual) + row * residual_stride;
                    T* sums = in_place ? other : to;
                    add_row(from, other, sums, width);
                    from = sums;
                }
                scale_row(from, norm_factor(from, width, eps), static_cast<const T*>(weight), to, width);
            }
        });
    });
}
