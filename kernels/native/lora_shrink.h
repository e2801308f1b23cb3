// h = weight * A x of a group of rows, each row of A read once.
#pragma once

#include "lora.h"

namespace lorikeet {
namespace {

// h[i, j] = weights[i] * dot(x[i], a[j]) of R rows of x and A rows of a; `width` is a multiple of LANES.
template <int R, int A>
void dots(
    const float* const* x, const float* a, long a_stride, long width, const float* weights, float* h, long h_stride) {
    Vec sums[R][A];
    clear<R * A>(sums[0]);
    for (long k = 0; k < width; k += LANES) {
        Vec values[A];
        for (int j = 0; j < A; j++) {
            values[j] = load(a + j * a_stride + k);
            if (k % (2 * LANES) == 0) __builtin_prefetch(a + (A + j) * a_stride + k);  // of the rows that come next
        }
        for (int i = 0; i < R; i++) {
            const Vec row = load(x[i] + k);
            for (int j = 0; j < A; j++) sums[i][j] += row * values[j];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < A; j++) h[i * h_stride + j] = weights[i] * sum(sums[i][j]);
    }
}

// As `dots` for any number of rows of a, which are converted where they are not fp32 rows of whole vectors.
template <int R, class T>
void shrink_rows(
    const float* const* x, const T* a, long num_a, long width, const float* weights, float* h, long h_stride) {
    constexpr int A = R == 1 ? 8 : R == 2 ? 4 : 2;
    const long whole = padded(width);
    for (long j = 0; j < num_a;) {
        const long count = j + A <= num_a ? A : 1;
        const float* block = nullptr;
        if constexpr (std::is_same<T, float>::value) {
            if (whole == width) block = a + j * width;
        }
        if (block == nullptr) {
            thread_local std::vector<float> wide;
            wide.resize(A * whole);
            for (long i = 0; i < count; i++) widen(a + (j + i) * width, width, wide.data() + i * whole);
            block = wide.data();
        }
        if (count == A) {
            dots<R, A>(x, block, whole, whole, weights, h + j, h_stride);
        } else {
            dots<R, 1>(x, block, whole, whole, weights, h + j, h_stride);
        }
        j += count;
    }
}

template <class T>
void shrink(
    const Site& site, const Rows& rows, const Group& group, const ShrinkItem& item, const T* x, long x_stride,
    float* all_h) {
    const long width = site.in_features, whole = padded(width);
    const T* a = static_cast<const T*>(site.arena) + group.offset + item.a * width;
    thread_local std::vector<float> wide;
    wide.resize(MAX_BLOCK * whole);
    for (long done = 0; done < group.count;) {
        const long block = block_of(group.count - done), entry = group.first + done;
        const float* block_x[MAX_BLOCK];
        for (long i = 0; i < block; i++) {
            const T* row = x + rows.rows[entry + i] * x_stride;
            if constexpr (std::is_same<T, float>::value) {
                block_x[i] = row;
                if (whole == width) continue;
            }
            widen(row, width, wide.data() + i * whole);
            block_x[i] = wide.data() + i * whole;
        }
        with_rows(block, [&](auto number) {
            shrink_rows<decltype(number)::value>(
                block_x, a, item.num_a, width, rows.weights + entry, all_h + group.h + done * group.rank + item.a,
                group.rank);
        });
        done += block;
    }
}

}  // namespace
}  // namespace lorikeet
