// Repacks an NF4 weight into tiles of sixteen rows; the layout is described in kernels/nf4_tiles.py.

#include <cstdint>

#include "nf4.h"
#include "parallel.h"

namespace lorikeet {
namespace {

// One row of a tile: its codes are two bytes of each group of 32.
void pack_row(const uint8_t* row, long groups, long r, bool in_pairs, uint8_t* tile) {
    uint8_t* first = tile + (in_pairs ? 2 * r : 16 * (r / 4 % 2) + 4 * (r / 8) + r % 4);
    uint8_t* second = first + (in_pairs ? 1 : 8);
    for (long g = 0; g < groups; g++) {
        const uint8_t a = row[2 * g], b = row[2 * g + 1];
        first[GROUP_BYTES * g] = static_cast<uint8_t>(a >> 4 | (b & 0xF0));
        second[GROUP_BYTES * g] = static_cast<uint8_t>((a & 0xF) | b << 4);
    }
}

}  // namespace
}  // namespace lorikeet

// `codes` and `constants` are zeros at the start: rows that the last tile lacks stay so.
LORIKEET_EXPORT void lorikeet_nf4_tile(
    const uint8_t* canonical, const float* absmax, uint8_t* codes, float* constants, long out_features,
    long in_features, int in_pairs, int threads) {
    using namespace lorikeet;
    const long groups = in_features / GROUP, blocks = in_features / BLOCK;
    parallel_for(threads, (out_features + TILE - 1) / TILE, 1, [&](long first, long end) {
        for (long row = first * TILE; row < end * TILE && row < out_features; row++) {
            const long tile = row / TILE, r = row % TILE;
            pack_row(canonical + row * in_features / 2, groups, r, in_pairs != 0, codes + tile * groups * GROUP_BYTES);
            for (long b = 0; b < blocks; b++) constants[(tile * blocks + b) * TILE + r] = absmax[row * blocks + b];
        }
    });
}
