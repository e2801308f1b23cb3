// What an NF4 weight is; the layouts of its tiles are described in kernels/nf4_tiles.py.
#pragma once

#include <cstdint>

#include "panel.h"

namespace lorikeet {

constexpr long BLOCK = 64;  // columns that share a constant
constexpr long GROUP = 4;   // columns whose codes are 32 bytes
constexpr long GROUP_BYTES = TILE * GROUP / 2;

// QLoRA's (arXiv 2305.14314, appendix E), as bitsandbytes 0.50.2 has them.
constexpr float NF4_VALUES[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f};

struct NF4Weight {
    const uint8_t* codes;    // [tiles, columns / 4, 32]
    const float* constants;  // [tiles, columns / 64, 16]
    long columns;

    const uint8_t* codes_of(long tile, long column) const {
        return codes + (tile * columns + column) / GROUP * GROUP_BYTES;
    }
    const float* constants_of(long tile, long column) const {
        return constants + (tile * columns + column) / BLOCK * TILE;
    }
};

}  // namespace lorikeet
