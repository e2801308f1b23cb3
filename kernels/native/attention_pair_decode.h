// Attention of one query row in bfloat16, by products of pairs: keys and values are read in place, as they lie.
//
// What takes longest is to bring them from memory. While scores are computed their tile's values are fetched, and while
// these are added up the keys of the tile after it, be that of the same row or of the one that the thread attends to
// next. They are asked for as evenly as can be: a processor that waits for some twenty lines asks for no other.
#pragma once

#include <algorithm>
#include <utility>

#include "attention_decode.h"
#include "attention_pairs.h"
#include "panel.h"

namespace lorikeet {
namespace {

// Sums of weighted values in registers: of so many heads by so many vectors of pairs.
constexpr long HEADS_AT_ONCE = 4, VECTORS_AT_ONCE = 2;
// Vectors of a key that are multiplied at once.
constexpr long KEY_VECTORS = 4;

// Positions of a sequence that one KV head's query heads attend to.
struct Stretch {
    long sequence, kv_head, first, end;
};

// Where the entries of a tile of positions begin. Past its end it is the last one again.
struct Tile {
    long count;
    long offsets[DECODE_TILE];

    void locate(const PairStep& step, const Stretch& stretch, long from) {
        count = std::min(DECODE_TILE, stretch.end - from);
        step.locate(stretch.sequence, stretch.kv_head, from, from + count, offsets);
        std::fill(offsets + count, offsets + DECODE_TILE, offsets[count - 1]);
    }
};

template <long L>
static inline void fetch_lines(const BF16* from) {
    for (long i = 0; i < L; i++) __builtin_prefetch(from + i * PAIRED);
}

// scores[i] = or += q . keys[i] for the same 32 * B elements of sixteen keys, which begin at `offsets`. Fetches L lines
// at `ahead` of as many other entries, at the same offsets.
template <long B, long L>
[[gnu::noinline]] void score_keys(
    const BF16* q, const BF16* keys, const long* offsets, float* scores, bool add, const BF16* ahead) {
    Pairs query[B];
    for (long b = 0; b < B; b++) load_pairs(q + b * PAIRED, query[b]);
    Wide total[WIDE_LANES];
#pragma GCC unroll 16
    for (long i = 0; i < WIDE_LANES; i++) {
        total[i] = Wide{};
        for (long b = 0; b < B; b++) {
            Pairs key;
            load_pairs(keys + offsets[i] + b * PAIRED, key);
            accumulate_pairs(total[i], key, query[b]);
        }
        fetch_lines<L>(ahead + offsets[i]);
    }
    Wide sums, before{};
    add_lanes(total, sums);
    if (add) std::memcpy(&before, scores, sizeof before);
    sums += before;
    std::memcpy(scores, &sums, sizeof sums);
}

// Turns products of q and `count` keys into weights, and what is past them, up to a multiple of 16, into zeros; returns
// the factor for what has been summed up before.
static inline float weigh_pairs(Softmax& softmax, float* scores, long count, float scale, float softcap) {
    const long width = (count + WIDE_LANES - 1) / WIDE_LANES * WIDE_LANES;
    Wide highest;
    fill_wide(softmax.peak, highest);
    for (long i = 0; i < width; i += WIDE_LANES) {
        Wide score;
        load_wide(scores + i, score);
        score *= scale;
        if (softcap != 0) cap_wide(score, softcap);
        store_wide(scores + i, score);
        if (i + WIDE_LANES > count) {
            std::fill(scores + count, scores + width, NEGATIVE_INFINITY);
            load_wide(scores + i, score);
        }
        keep_larger(highest, score);
    }
    combine_lanes(highest, keep_larger);
    const float before = softmax.peak;
    softmax.peak = highest[0];
    // Where nothing counts yet all scores are -inf: their weights are 0 and not the NaN of -inf - -inf.
    const float shift = softmax.peak == NEGATIVE_INFINITY ? 0 : softmax.peak;
    Wide sums = Wide{};
    for (long i = 0; i < width; i += WIDE_LANES) {
        Wide weight;
        load_wide(scores + i, weight);
        weight -= shift;
        exp_wide(weight);
        store_wide(scores + i, weight);
        sums += weight;
    }
    combine_lanes(sums, [](Wide& sum, const Wide& value) { sum += value; });
    // Where there is nothing yet any factor will do.
    const bool same = before == softmax.peak || before == NEGATIVE_INFINITY;
    const float factor = same ? 1 : exp(fill(before - shift))[0];
    softmax.total = softmax.total * factor + sums[0];
    return factor;
}

// sums[m][32 * B elements] += the sum over `count` positions j of weights[m][j] * values[j]. Fetches L lines at `ahead`
// of as many other entries, at offsets of their own.
template <long M, long B, long L>
[[gnu::noinline]] void add_values(
    const float* weights, const BF16* values, const long* offsets, long count, float* sums, long head_dim,
    const BF16* ahead, const long* ahead_offsets) {
    Wide total[M][2 * B];
    for (long m = 0; m < M; m++) {
        for (long n = 0; n < 2 * B; n++) load_wide(sums + m * head_dim + n * WIDE_LANES, total[m][n]);
    }
    for (long j = 0; j < count; j++) {
        fetch_lines<L>(ahead + ahead_offsets[j]);
        const BF16* value = values + offsets[j];
        Wide elements[2 * B];
        for (long b = 0; b < B; b++) {
            Pairs pairs;
            load_pairs(value + b * PAIRED, pairs);
            widen_pairs(pairs, elements[2 * b], elements[2 * b + 1]);
        }
        for (long m = 0; m < M; m++) {
            const float weight = weights[m * DECODE_TILE + j];
            for (long n = 0; n < 2 * B; n++) total[m][n] += elements[n] * weight;
        }
    }
    for (long m = 0; m < M; m++) {
        for (long n = 0; n < 2 * B; n++) store_wide(sums + m * head_dim + n * WIDE_LANES, total[m][n]);
    }
}

// Rows one after the other.
class PairDecoding {
public:
    explicit PairDecoding(const PairStep& step) : step_(step) {}

    // What the queries of row `row` make of their stretch: `sums` of weighted values, [group, head_dim], the even
    // elements of each 32 before the odd ones, and the softmax they are relative to. `next`, unless null, is what the
    // next call is for.
    void run(long row, const Stretch& stretch, const Stretch* next, float* sums, Softmax* softmax, float* scores) {
        const long head_dim = step_.head_dim, group = step_.group();
        const BF16* q = step_.q + row * step_.q_row + stretch.kv_head * group * step_.q_head;
        std::fill(sums, sums + group * head_dim, 0.0f);
        std::fill(softmax, softmax + group, Softmax{});
        if (!fetched_) {
            now_->locate(step_, stretch, stretch.first);
            fetch_keys(*now_, 0);
        }
        for (long from = stretch.first; from < stretch.end; from += DECODE_TILE) {
            score_tile(q, scores);
            for (long m = 0; m < group; m++) {
                float* mine = scores + m * DECODE_TILE;
                const float factor = weigh_pairs(softmax[m], mine, now_->count, step_.scale, step_.softcap);
                scale_by(sums + m * head_dim, head_dim, factor);
            }
            const long after = from + DECODE_TILE;
            fetched_ = true;
            if (after < stretch.end) {
                ahead_->locate(step_, stretch, after);
            } else if (next != nullptr) {
                ahead_->locate(step_, *next, next->first);
            } else {
                fetched_ = false;
            }
            add_tile(scores, sums);
            if (fetched_) {
                fetch_keys(*ahead_, now_->count);
                std::swap(now_, ahead_);
            }
        }
    }

private:
    // Calls run(number of lines, first element) with what of each entry the `call`-th of `calls` loops is to fetch.
    template <long Most, class Run>
    void share_lines(long call, long calls, const Run& run) const {
        const long lines = step_.head_dim / PAIRED, first = lines * call / calls, last = lines * (call + 1) / calls;
        if (first == last) return run(std::integral_constant<long, 0>{}, 0);
        with_rows<Most>(last - first, [&](auto count) { run(count, first * PAIRED); });
    }

    void score_tile(const BF16* q, float* scores) const {
        const long head_dim = step_.head_dim, group = step_.group(), width = KEY_VECTORS * PAIRED;
        const long calls = group * ((head_dim + width - 1) / width);
        for (long j = 0; j < now_->count; j += WIDE_LANES) {
            for (long call = 0; call < calls; call++) {
                const long m = call % group, d = call / group * width;
                share_lines<KEY_VECTORS>(call, calls, [&](auto lines, long line) {
                    with_rows<KEY_VECTORS>(std::min(KEY_VECTORS, (head_dim - d) / PAIRED), [&](auto vectors) {
                        score_keys<vectors, lines>(
                            q + m * step_.q_head + d, step_.keys + d, now_->offsets + j, scores + m * DECODE_TILE + j,
                            d > 0, step_.values + line);
                    });
                });
            }
        }
    }

    void add_tile(const float* weights, float* sums) const {
        const long head_dim = step_.head_dim, group = step_.group(), width = VECTORS_AT_ONCE * PAIRED;
        const long parts = (group + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;
        const long calls = parts * ((head_dim + width - 1) / width);
        for (long call = 0; call < calls; call++) {
            const long part = call % parts, first = group * part / parts, d = call / parts * width;
            const auto add = [&](auto lines, long line) {
                with_rows<HEADS_AT_ONCE>(group * (part + 1) / parts - first, [&](auto heads) {
                    with_rows<VECTORS_AT_ONCE>(std::min(VECTORS_AT_ONCE, (head_dim - d) / PAIRED), [&](auto vectors) {
                        add_values<heads, vectors, lines>(
                            weights + first * DECODE_TILE, step_.values + d, now_->offsets, now_->count,
                            sums + first * head_dim + d, head_dim, step_.keys + line, ahead_->offsets);
                    });
                });
            };
            if (fetched_) {
                share_lines<VECTORS_AT_ONCE>(call, calls, add);
            } else {
                add(std::integral_constant<long, 0>{}, 0);
            }
        }
    }

    void fetch_keys(const Tile& tile, long first) const {
        for (long j = first; j < tile.count; j++) prefetch(step_.keys + tile.offsets[j], step_.head_dim);
    }

    const PairStep& step_;
    Tile tiles_[2];
    Tile *now_ = tiles_, *ahead_ = tiles_ + 1;
    bool fetched_ = false;  // `now_` has been located and its keys are being fetched
};

}  // namespace
}  // namespace lorikeet
