// y = x . W^T for a dense weight W in any storage type, computed in fp32; the contract is in kernels/linear.py.
//
// W is transposed as it is read, sixteen rows at once: for a few rows of x in registers, for more into a panel. A weight
// of 16 bits needs no other layout and is read from memory once. Sums are panel.h's: a row's results do not depend on
// the others of its batch, nor on the number of threads.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "panel.h"
#include "parallel.h"
#include "vec.h"

namespace lorikeet {
namespace {

constexpr long PANEL = 256;     // columns transposed at once at most: 16 KiB
constexpr long MAX_DIRECT = 3;  // rows of x that are multiplied by columns in registers

// Columns of a cache line. Eight rows' lines are used up before others are read: those of rows that are a power of two
// long have the same eight places in the first-level cache.
template <class T>
constexpr long LINE = 64 / sizeof(T);

// Eight columns of eight rows.
inline void transpose(const Vec* rows, Vec* columns) {
    Vec pairs[8], fours[8];
    for (long i = 0; i < 8; i += 2) {
        pairs[i] = LORIKEET_SHUFFLE(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = LORIKEET_SHUFFLE(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (long i = 0; i < 8; i += 4) {
        for (long j = 0; j < 2; j++) {
            const Vec a = pairs[i + j], b = pairs[i + j + 2];
            fours[i + 2 * j] = LORIKEET_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * j + 1] = LORIKEET_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (long i = 0; i < 4; i++) {
        columns[i] = LORIKEET_SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        columns[i + 4] = LORIKEET_SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// The same of a weight.
template <class T>
inline void load_columns(const T* weight, long stride, Vec* columns) {
    Vec rows[8];
    for (long r = 0; r < 8; r++) rows[r] = load(weight + r * stride);
    transpose(rows, columns);
}

#if defined(__AVX2__)

// Neighbours move as one and are told apart in the end: half of the instructions.
inline void load_columns(const BF16* weight, long stride, Vec* columns) {
    __m256i rows[4], pairs[4];
    for (long r = 0; r < 4; r++) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + r * stride));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + (r + 4) * stride));
        rows[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    for (long i = 0; i < 2; i++) {
        pairs[i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[i + 2] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
    for (long i = 0; i < 4; i++) {
        const __m256i a = pairs[i / 2 * 2], b = pairs[i / 2 * 2 + 1];
        const __m256i both = i % 2 == 0 ? _mm256_unpacklo_epi64(a, b) : _mm256_unpackhi_epi64(a, b);
        columns[2 * i] = reinterpret_cast<Vec>(_mm256_slli_epi32(both, 16));
        columns[2 * i + 1] = reinterpret_cast<Vec>(_mm256_and_si256(both, odd));
    }
}

#endif

// Columns [0, width) of a tile into panel [width, 16]; rows that it lacks are zeros.
template <class T>
[[gnu::noinline]] void fill_panel(const T* weight, long stride, long rows, long width, float* panel) {
    if (rows < TILE) {
        for (long k = 0; k < width; k++) {
            for (long r = 0; r < TILE; r++) panel[k * TILE + r] = r < rows ? to_float(weight[r * stride + k]) : 0.0f;
        }
        return;
    }
    for (long first = 0; first < width; first += LINE<T>) {
        for (long half = 0; half < 2; half++) {
            for (long k = first; k < std::min(first + LINE<T>, width); k += LANES) {
                Vec columns[LANES];
                load_columns(weight + half * LANES * stride + k, stride, columns);
                for (long j = 0; j < LANES; j++) store(panel + (k + j) * TILE + half * LANES, columns[j]);
            }
        }
    }
}

// sums [N, R, 16] of R rows of x and N tiles: more tiles where rows are too few to keep the multipliers busy. `next` is
// what is read after them.
template <long R, long N, class T>
[[gnu::noinline]] void multiply_direct(
    const Input& rows, const T* weight, long stride, long width, float* sums, const char* next) {
    Vec total[2 * N][R]{};
    for (long first = 0; first < width; first += LINE<T>) {
        const long end = std::min(first + LINE<T>, width);
        for (long eight = 0; eight < 2 * N; eight++) {
            for (long k = first; k < end; k += LANES) {
                constexpr long BYTES = LANES * LANES * sizeof(T);
                for (long i = 0; i < BYTES; i += 64) __builtin_prefetch(next + i);
                next += BYTES;
                Vec columns[LANES];
                load_columns(weight + eight * LANES * stride + k, stride, columns);
                for (long j = 0; j < LANES; j++) {
                    for (long r = 0; r < R; r++) {
                        accumulate(total[eight][r], fill(rows.x[r * rows.stride + k + j]), columns[j]);
                    }
                }
            }
        }
    }
    for (long eight = 0; eight < 2 * N; eight++) {
        for (long r = 0; r < R; r++) store(sums + (eight / 2 * R + r) * TILE + eight % 2 * LANES, total[eight][r]);
    }
}

template <class T>
struct Linear {
    Input x;
    const T* weight;
    long weight_stride;
    const float* bias;
    float* out;
    long num_rows, out_features, in_features;

    const T* weight_of(long tile) const { return weight + tile * TILE * weight_stride; }

    void write(const float* sums, long tile, long row, long count) const {
        const long column = tile * TILE;
        write_tile(
            sums, count, bias == nullptr ? nullptr : bias + column, out + row * out_features + column, out_features,
            std::min(TILE, out_features - column));
    }

    // Of tiles [begin, end), as many as there are N together with all of their rows; returns the first that is left.
    template <long R, long N>
    long run_direct(long begin, long end) const {
        float sums[N * R * TILE];
        for (end = std::min(end, out_features / TILE); begin + N <= end; begin += N) {
            const auto* next = reinterpret_cast<const char*>(weight_of(begin + N));
            multiply_direct<R, N>(x, weight_of(begin), weight_stride, in_features, sums, next);
            for (long t = 0; t < N; t++) write(sums + t * R * TILE, begin + t, 0, R);
        }
        return begin;
    }

    void run_panels(long tile, float* panel, float* sums) const {
        const long vectors = in_features / LANES, chunks = (in_features + PANEL - 1) / PANEL;
        for (long first_row = 0; first_row < num_rows; first_row += ROW_BLOCK) {
            const long count = std::min(ROW_BLOCK, num_rows - first_row);
            std::fill(sums, sums + count * TILE, 0.0f);
            for (long chunk = 0; chunk < chunks; chunk++) {
                const long first = vectors * chunk / chunks * LANES;
                const long width = vectors * (chunk + 1) / chunks * LANES - first;
                fill_panel(weight_of(tile) + first, weight_stride, out_features - tile * TILE, width, panel);
                multiply_rows(
                    x.from(first_row, first), count, panel, width, sums,
                    reinterpret_cast<const char*>(weight_of(tile + 1) + first * TILE), TILE * sizeof(T));
            }
            write(sums, tile, first_row, count);
        }
    }

    void run(long tile, long end) const {
        if (num_rows == 1) tile = run_direct<1, 2>(tile, end);
        with_rows<MAX_DIRECT>(num_rows, [&](auto r) { tile = run_direct<r, 1>(tile, end); });
        alignas(64) float panel[PANEL * TILE], sums[ROW_BLOCK * TILE];
        for (; tile < end; tile++) run_panels(tile, panel, sums);
    }
};

}  // namespace
}  // namespace lorikeet

LORIKEET_EXPORT void lorikeet_linear(
    int type, const float* x, long x_stride, const void* weight, long weight_stride, const float* bias, float* out,
    long num_rows, long out_features, long in_features, int threads) {
    using namespace lorikeet;
    with_type(type, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        const Linear<T> linear{
            {x, x_stride}, static_cast<const T*>(weight), weight_stride, bias, out,
            num_rows, out_features, in_features};
        const long tiles = num_rows == 0 ? 0 : (out_features + TILE - 1) / TILE;
        const long piece = std::max(1L, PIECE / (TILE * in_features * (num_rows + 3)));
        parallel_for(threads, tiles, piece, [&](long first, long end) { linear.run(first, end); });
    });
}
