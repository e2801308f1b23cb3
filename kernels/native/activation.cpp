// The gated activation of an MLP; the contract is in kernels/activation.py.

#include <type_traits>

#include "exports.h"
#include "vec.h"

namespace lorikeet {
namespace {

// Values that take a thread a few microseconds.
constexpr long MIN_VALUES = 1 << 13;

static inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

template <class T>
void activate_row(const T* gate, const T* up, T* out, long width) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) store(out + i, rounded<T>(silu(load(gate + i))) * load(up + i));
    for (; i < width; i++) {
        T value;
        put(&value, silu(fill(to_float(gate[i])))[0]);
        put(out + i, to_float(value) * to_float(up[i]));
    }
}

}  // namespace
}  // namespace lorikeet

LORIKEET_EXPORT void lorikeet_silu_and_mul(
    int type, const void* gate_up, long stride, void* out, long num_rows, long width, int threads) {
    using namespace lorikeet;
    with_type(type, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        const long least = MIN_VALUES / width + 1;
        parallel_for(threads, num_rows, even_piece(threads, num_rows, least), [&](long first, long end) {
            for (long row = first; row < end; row++) {
                const T* gate = static_cast<const T*>(gate_up) + row * stride;
                activate_row(gate, gate + width, static_cast<T*>(out) + row * width, width);
            }
        });
    });
}
