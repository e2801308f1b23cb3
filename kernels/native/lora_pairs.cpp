// As lora.cpp for bfloat16 whose products are taken in pairs (pairs.h): A and x are multiplied as they lie, h is fp32,
// and B and y become fp32 in registers.

#include "lora_expand_pairs.h"
#include "lora_shrink_pairs.h"

namespace lorikeet {
namespace {

constexpr Pace PACE{0.07, 0.008};

}  // namespace

void LORIKEET_INSTRUCTIONS::add_in_pairs(
    const void* site, const void* rows, const BF16* x, long x_stride, BF16* y, long y_stride, int threads) {
    const Site& linear = *static_cast<const Site*>(site);
    const Rows& adapted = *static_cast<const Rows*>(rows);
    thread_local Plan plan_of_thread;
    make_plan(linear, adapted, PACE, [](long) { return 8L; }, plan_of_thread);
    if (plan_of_thread.groups.empty()) return;
    // What thread_local names in a lambda is of the thread that runs it.
    Plan& plan = plan_of_thread;
    const long num_items = static_cast<long>(plan.items.size());
    parallel_for(threads, num_items, plan.items_piece, [&](long first, long end) {
        for (long i = first; i < end; i++) {
            const ShrinkItem* next = i + 1 < num_items ? &plan.items[i + 1] : nullptr;
            shrink_in_pairs(linear, adapted, plan.groups, plan.items[i], next, x, x_stride, plan.h.data());
        }
    });
    parallel_for(threads, plan.units, plan.units_piece, [&](long first, long end) {
        first *= UNIT_COLUMNS;
        end = std::min(end * UNIT_COLUMNS, plan.width);
        expand_in_pairs(linear, adapted, plan.groups, plan.h.data(), y, y_stride, first, end);
    });
}

}  // namespace lorikeet
