// Blocks of rows, for what multiplies bfloat16 in pairs; see lora_pairs.cpp.
#pragma once

#include "lora.h"
#include "pairs.h"

namespace lorikeet {
namespace {

constexpr long MAX_PAIR_BLOCK = 4;

// As `block_of` and `with_rows`, of MAX_PAIR_BLOCK rows at most.
inline long pair_block_of(long left) {
    return left <= MAX_PAIR_BLOCK ? left : left < 2 * MAX_PAIR_BLOCK ? (left + 1) / 2 : MAX_PAIR_BLOCK;
}

template <class Body>
void with_pair_rows(long rows, Body&& body) {
    switch (rows) {
        case 1: return body(std::integral_constant<int, 1>());
        case 2: return body(std::integral_constant<int, 2>());
        case 3: return body(std::integral_constant<int, 3>());
        default: return body(std::integral_constant<int, 4>());
    }
}

}  // namespace
}  // namespace lorikeet
