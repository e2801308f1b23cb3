// LoRA's low-rank deltas over a mixed batch: y[row] += weight * B_slot (A_slot x[row]). The arena is described in
// kernels/lora.py, the order of a step's rows in kernels/lora_rows.py.
//
// Decode steps read far more weights than they have arithmetic, so each adapter's A and B are read once for all its
// rows, straight from where they lie. First all of h = weight * A x, then all of y += B h: pieces of the second own
// columns of y, so that rows of several adapters need no locks and are added to in the same order every time. Each
// element is computed by the same operations whatever rows and threads share the call.

#include <algorithm>
#include <vector>

#include "exports.h"
#include "lora_expand.h"
#include "lora_shrink.h"

namespace lorikeet {
namespace {

template <class T>
void add(const Site& site, const Rows& rows, const T* x, long x_stride, T* y, long y_stride, int threads) {
    thread_local std::vector<Group> groups;
    thread_local std::vector<ShrinkItem> items;
    thread_local std::vector<float> h;
    groups.clear();
    items.clear();
    long num_h = 0;
    double shrink_time = 0, expand_time = 0;
    for (long g = 0; g < rows.num_groups; g++) {
        const int32_t* ranks = site.ranks + rows.slots[g] * site.ranks_stride;
        long rank = 0;
        for (long s = 0; s < site.num_slices; s++) rank += ranks[s];
        if (rank == 0) continue;
        for (long first = rows.starts[g]; first < rows.starts[g + 1]; first += MAX_GROUP) {
            const long count = std::min<long>(MAX_GROUP, rows.starts[g + 1] - first);
            const long number = static_cast<long>(groups.size()), most_a = count <= MAX_BLOCK ? 8 : 32;
            groups.push_back({ranks, first, count, rank, site.offsets[rows.slots[g]], num_h});
            num_h += count * rank;
            for (long a = 0; a < rank; a += most_a) items.push_back({number, a, std::min(most_a, rank - a)});
            shrink_time += nanoseconds(rank * site.in_features, count);
            for (long s = 0; s < site.num_slices; s++) {
                expand_time += nanoseconds(ranks[s] * site.widths[s], count);
            }
        }
    }
    if (groups.empty()) return;
    h.resize(num_h);
    // What thread_local names in a lambda is of the thread that runs it.
    const auto& my_groups = groups;
    const auto& my_items = items;
    float* my_h = h.data();
    const long num_items = static_cast<long>(items.size());
    const auto pieces_of = [](double time, long count) {
        return std::max(1L, static_cast<long>(PIECE_NS * static_cast<double>(count) / time));
    };
    parallel_for(threads, num_items, pieces_of(shrink_time, num_items), [&](long first, long end) {
        for (long i = first; i < end; i++) {
            shrink(site, rows, my_groups[my_items[i].group], my_items[i], x, x_stride, my_h);
        }
    });
    long width = 0;
    for (long s = 0; s < site.num_slices; s++) width += site.widths[s];
    const long units = (width + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
    parallel_for(threads, units, pieces_of(expand_time, units), [&](long first, long end) {
        first *= UNIT_COLUMNS;
        end = std::min(end * UNIT_COLUMNS, width);
        if constexpr (std::is_same<T, float>::value) {
            expand<T>(site, my_groups, my_h, {y + first, y_stride, rows.rows}, first, end);
        } else {
            for (; first < end; first += STRIP) {
                const long next = std::min(first + STRIP, end);
                expand_in_float(site, rows, my_groups, my_h, y, y_stride, first, next);
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
        const double unit_time = nanoseconds(2 * UNIT_COLUMNS, 4 * rows);
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
