// Norm of heads, rotation and the write to the paged cache; the contract is in kernels/rope.py.

#include <cstring>
#include <type_traits>

#include "exports.h"
#include "norm.h"

namespace lorikeet {
namespace {

// Values that take a thread a few microseconds.
constexpr long MIN_VALUES = 1 << 14;

// (low, high) -> (low * cos - high * sin, high * cos + low * sin); `to` may be `head`. Rotations: cos, -sin, sin.
template <class T>
void rotate(const T* head, const T* rotations, T* to, long half) {
    const T *cos = rotations, *sin = rotations + 2 * half;
    long i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Vec low = load(head + i), high = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(to + i, low * c - high * s);
        store(to + half + i, high * c + low * s);
    }
    for (; i < half; i++) {
        const float low = to_float(head[i]), high = to_float(head[half + i]);
        const float c = to_float(cos[i]), s = to_float(sin[i]);
        put(to + i, low * c - high * s);
        put(to + half + i, high * c + low * s);
    }
}

}  // namespace
}  // namespace lorikeet

// `head_norm` may be null. Slots count entries of one KV head; `slots` is how many it has.
LORIKEET_EXPORT void lorikeet_rope_kv_write(
    int type, void* qkv, long stride, const void* rotations, void* k_cache, void* v_cache, const int64_t* kv_slots,
    const void* head_norm, float eps, long num_tokens, long num_heads, long num_kv_heads, long head_dim, long slots,
    int threads) {
    using namespace lorikeet;
    with_type(type, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        const long half = head_dim / 2;
        const long least = MIN_VALUES / ((num_heads + 2 * num_kv_heads) * head_dim) + 1;
        parallel_for(threads, num_tokens, even_piece(threads, num_tokens, least), [&](long first, long end) {
            for (long token = first; token < end; token++) {
                T* head = static_cast<T*>(qkv) + token * stride;
                const T* angles = static_cast<const T*>(rotations) + token * 3 * half;
                const T* weight = static_cast<const T*>(head_norm);
                const long slot = kv_slots[token] < slots ? kv_slots[token] : -1;
                for (long h = 0; h < num_heads + num_kv_heads; h++, head += head_dim) {
                    if (h >= num_heads && slot < 0) continue;
                    if (weight != nullptr) {
                        scale_row(head, norm_factor(head, head_dim, eps), weight + h * head_dim, head, head_dim);
                    }
                    T* to = head;
                    if (h >= num_heads) to = static_cast<T*>(k_cache) + ((h - num_heads) * slots + slot) * head_dim;
                    rotate(head, angles, to, half);
                }
                for (long h = 0; slot >= 0 && h < num_kv_heads; h++, head += head_dim) {
                    T* to = static_cast<T*>(v_cache) + (h * slots + slot) * head_dim;
                    std::memcpy(to, head, static_cast<size_t>(head_dim) * sizeof(T));
                }
            }
        });
    });
}
