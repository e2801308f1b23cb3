// LoRA's low-rank deltas over a mixed batch: y[row] += weight * B_slot (A_slot x[row]). The arena is described in
// kernels/lora.py, the order of a step's rows in kernels/lora_rows.py.
//
// Decode steps read far more weights than they have arithmetic, so each adapter's A and B are read once for all its
// rows, straight from where they lie. First all of h = weight * A x, then all of y += B h: pieces of the second own
// columns of y, so that rows of several adapters need no locks and are added to in the same order every time. Each
// element is computed by the same operations whatever rows and threads share the call.
//
// Everything is computed in fp32; bfloat16 in pairs is in lora_pairs.cpp.

#include <algorithm>
#include <vector>

#include "exports.h"
#include "lora_expand.h"
#include "lora_shrink.h"

namespace lorikeet {
namespace {

constexpr Pace PACE{0.25, 0.04};

template <class T>
void add(const Site& site, const Rows& rows, const T* x, long x_stride, T* y, long y_stride, int threads) {
    thread_local Plan plan_of_thread;
    make_plan(site, rows, PACE, [](long count) { return count <= MAX_BLOCK ? 8L : 32L; }, plan_of_thread);
    if (plan_of_thread.groups.empty()) return;
    // What thread_local names in a lambda is of the thread that runs it.
    Plan& plan = plan_of_thread;
    parallel_for(threads, static_cast<long>(plan.items.size()), plan.items_piece, [&](long first, long end) {
        for (long i = first; i < end; i++) {
            shrink(site, rows, plan.groups[plan.items[i].group], plan.items[i], x, x_stride, plan.h.data());
        }
    });
    parallel_for(threads, plan.units, plan.units_piece, [&](long first, long end) {
        first *= UNIT_COLUMNS;
        end = std::min(end * UNIT_COLUMNS, plan.width);
        if constexpr (std::is_same<T, float>::value) {
            expand<T>(site, plan.groups, plan.h.data(), {y + first, y_stride, rows.rows}, first, end);
        } else {
            for (; first < end; first += STRIP) {
                const long next = std::min(first + STRIP, end);
                expand_in_float(site, rows, plan.groups, plan.h.data(), y, y_stride, first, next);
            }
        }
    });
}

template <class T>
void affine_row(T* y, const T* gain, const T* offset, long width) {
    long c = 0;
    for (; c + LANES <= width; c += LANES) store(y + c, load(y + c) * load(gain + c) + load(offset + c));
    for (; c < width; c++) put(y + c, to_float(y[c]) * to_float(gain[c]) + to_float(offset[c]));
}

}  // namespace
}  // namespace lorikeet

// y += weight * B A x for the entries of `rows`, a Rows, at `site`, a Site.
LORIKEET_EXPORT void lorikeet_lora_add(
    const void* site, const void* rows, const void* x, long x_stride, void* y, long y_stride, int threads) {
    using namespace lorikeet;
    const Site& linear = *static_cast<const Site*>(site);
    if (linear.in_pairs != 0) {
        const BF16* from = static_cast<const BF16*>(x);
        return add_in_pairs(site, rows, from, x_stride, static_cast<BF16*>(y), y_stride, threads);
    }
    with_type(static_cast<int>(linear.type), [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        const Rows& adapted = *static_cast<const Rows*>(rows);
        add<T>(linear, adapted, static_cast<const T*>(x), x_stride, static_cast<T*>(y), y_stride, threads);
    });
}

// y = y * gain + offset for the rows of segments whose slot has both: 2 * width values of the arena from offsets[slot].
LORIKEET_EXPORT void lorikeet_lora_affine(
    int type, void* y, long y_stride, long width, const void* arena, const int64_t* offsets, const int32_t* starts,
    const int32_t* slots, long num_segments, int threads) {
    using namespace lorikeet;
    with_type(type, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        const long rows = starts[num_segments] - starts[0], units = (width + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
        const double unit_time = PACE.of(2 * UNIT_COLUMNS, 4 * rows);
        const long piece = std::max(1L, static_cast<long>(PIECE_NS / unit_time));
        parallel_for(threads, units, piece, [&](long first, long end) {
            first *= UNIT_COLUMNS;
            const long columns = std::min(end * UNIT_COLUMNS, width) - first;
            for (long g = 0; g < num_segments; g++) {
                if (slots[g] < 0 || offsets[slots[g]] < 0) continue;
                const T* gain = static_cast<const T*>(arena) + offsets[slots[g]] + first;
                for (long row = starts[g]; row < starts[g + 1]; row++) {
                    affine_row(static_cast<T*>(y) + row * y_stride + first, gain, gain + width, columns);
                }
            }
        });
    });
}
