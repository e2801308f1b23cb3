// Attention of several rows of one sequence in bfloat16, by products of pairs: a tile of query rows, a lane each, times
// a tile of keys. So keys are read as they lie, and the softmax of sixteen queries needs no step from lane to lane.
#pragma once

#include <algorithm>

#include "attention_pair_products.h"
#include "panel.h"

namespace lorikeet {
namespace {

// `rows` query rows from `row` on and the heads of one KV head. They see positions of [first, end), the last of them
// all up to `end`.
class PairChunk {
public:
    PairChunk(const PairStep& step, long sequence, long kv_head, long row, long rows, long first, long end)
        : step_(step), sequence_(sequence), kv_head_(kv_head), row_(row), rows_(rows), first_(first), end_(end),
          position_(end - rows), queries_(rows * step.group()),
          stride_((queries_ + WIDE_LANES - 1) / WIDE_LANES * WIDE_LANES) {
        const long head_dim = step.head_dim;
        sums_ = workspace(stride_ * (head_dim + head_dim / 2 + 3) + CHUNK_KEYS * (head_dim / 2 + BLOCK_LANES));
        float* at = sums_ + stride_ * head_dim;
        const auto take = [&at](long count) {
            at += count;
            return at - count;
        };
        scores_ = take(CHUNK_KEYS * BLOCK_LANES);
        peaks_ = take(stride_);
        totals_ = take(stride_);
        q_ = reinterpret_cast<uint32_t*>(take(stride_ * head_dim / 2));
        values_ = reinterpret_cast<uint32_t*>(take(CHUNK_KEYS * head_dim / 2));
        positions_ = reinterpret_cast<int32_t*>(take(stride_));
        std::fill(sums_, sums_ + stride_ * head_dim, 0.0f);
        std::fill(peaks_, peaks_ + stride_, NEGATIVE_INFINITY);
        std::fill(totals_, totals_ + stride_, 0.0f);
        for (long i = 0; i < stride_; i++) positions_[i] = static_cast<int32_t>(position_ + row_of(i));
    }

    void run() {
        load_queries();
        ChunkTile tiles[2];
        if (first_ < end_) locate(tiles[0], first_);
        for (long from = first_, number = 0; from < end_; from += CHUNK_KEYS, number++) {
            const ChunkTile& tile = tiles[number % 2];
            ChunkTile& next = tiles[(number + 1) % 2];
            const bool more = from + CHUNK_KEYS < end_;
            if (more) locate(next, from + CHUNK_KEYS);
            const bool finite = pair_values(step_.values, tile, step_.head_dim, values_);
            for (long at = 0; at < stride_; at += BLOCK_LANES) {
                // Of a block none of whose rows is as far as these keys nothing changes.
                if (positions_[std::min(at + BLOCK_LANES, stride_) - 1] < from) continue;
                const bool is_last = at + BLOCK_LANES >= stride_;
                const ChunkAhead ahead{
                    more && at == 0 ? step_.keys : nullptr, more && is_last ? step_.values : nullptr, next.offsets};
                with_rows<QUERY_VECTORS>(std::min(BLOCK_LANES, stride_ - at) / WIDE_LANES, [&](auto vectors) {
                    attend_block<vectors>(at, tile, finite, ahead);
                });
            }
        }
        store_results();
    }

private:
    static constexpr long BLOCK_LANES = QUERY_VECTORS * WIDE_LANES;

    // Of a query, and of the last one for lanes past it.
    long row_of(long query) const { return std::min(query, queries_ - 1) / step_.group(); }

    void locate(ChunkTile& tile, long from) const {
        tile.from = from;
        tile.count = std::min(CHUNK_KEYS, end_ - from);
        step_.locate(sequence_, kv_head_, from, from + tile.count, tile.offsets);
        std::fill(tile.offsets + tile.count, tile.offsets + CHUNK_KEYS, tile.offsets[tile.count - 1]);
    }

    // As pairs [head_dim / 2, stride].
    void load_queries() {
        const long group = step_.group();
        for (long i = 0; i < stride_; i += WIDE_LANES) {
            for (long d = 0; d < step_.head_dim; d += PAIRED) {
                Pairs square[WIDE_LANES];
                for (long lane = 0; lane < WIDE_LANES; lane++) {
                    const long query = std::min(i + lane, queries_ - 1), head = kv_head_ * group + query % group;
                    load_pairs(step_.q + (row_ + query / group) * step_.q_row + head * step_.q_head + d, square[lane]);
                }
                transpose_wide(square);
                for (long k = 0; k < WIDE_LANES; k++) {
                    std::memcpy(q_ + (d / 2 + k) * stride_ + i, &square[k], sizeof square[k]);
                }
            }
        }
    }

    // The N vectors of queries at `at` and the keys of a tile.
    template <long N>
    void attend_block(long at, const ChunkTile& tile, bool finite, const ChunkAhead& ahead) {
        const long head_dim = step_.head_dim, from = tile.from, count = tile.count;
        score_chunk<N>(q_ + at, stride_, step_.keys, tile, head_dim, step_.scale, scores_, ahead);
        if (step_.softcap != 0) {
            for (long i = 0; i < count * N; i++) {
                Wide score;
                load_wide(scores_ + i * WIDE_LANES, score);
                cap_wide(score, step_.softcap);
                store_wide(scores_ + i * WIDE_LANES, score);
            }
        }
        Wide factors[N];
        for (long n = 0; n < N; n++) {
            weigh<N>(at + n * WIDE_LANES, from, count, scores_ + n * WIDE_LANES, factors[n]);
        }
        const long depth = finite ? (count + 1) / 2 : 0;
        add_chunk<N>(values_, scores_, depth, factors, sums_ + at, stride_, head_dim);
        if (!finite) add_seen<N>(at, from, count);
    }

    // Turns the scores of sixteen queries, every N-th vector from `scores` on, into weights in pairs of positions, in
    // the same place; gives the factors for what has been summed up before.
    template <long N>
    void weigh(long at, long from, long count, float* scores, Wide& factor) {
        constexpr long NEXT = N * WIDE_LANES;
        const long last = positions_[at + WIDE_LANES - 1];
        if (positions_[at] < from + count - 1 || step_.first_seen(last) > from) {
            for (long j = 0; j < count; j++) hide(at, from + j, scores + j * NEXT);
        }
        Wide before, highest[2];
        load_wide(peaks_ + at, before);
        highest[0] = highest[1] = before;
        if (count % 2 != 0) {
            Wide nothing;
            fill_wide(NEGATIVE_INFINITY, nothing);
            store_wide(scores + count * NEXT, nothing);
        }
        for (long j = 0; j < count; j += 2) {
            for (long i = 0; i < 2; i++) {
                Wide score;
                load_wide(scores + (j + i) * NEXT, score);
                keep_larger(highest[i], score);
            }
        }
        keep_larger(highest[0], highest[1]);
        store_wide(peaks_ + at, highest[0]);
        // Where nothing is seen yet all scores are -inf: their weights are 0 and not the NaN of -inf - -inf.
        const Wide shift = highest[0] == NEGATIVE_INFINITY ? Wide{} : highest[0];
        Pairs ones;
        fill_pairs(ONES, ones);
        Wide total, sum = Wide{};
        factor = before - shift;
        exp_wide(factor);
        for (long j = 0; j < count; j += 2) {
            Wide first, second;
            load_wide(scores + j * NEXT, first);
            load_wide(scores + (j + 1) * NEXT, second);
            first -= shift;
            second -= shift;
            exp_wide(first);
            exp_wide(second);
            Pairs weights;
            round_pairs(first, second, weights);
            std::memcpy(scores + j / 2 * NEXT, &weights, sizeof weights);
            // What they are divided by in the end is the total of the rounded ones, which is exact.
            accumulate_pairs(sum, weights, ones);
        }
        load_wide(totals_ + at, total);
        store_wide(totals_ + at, total * factor + sum);
    }

    // Of the sixteen queries at `at`, which see the key at `position`: all bits of their lanes.
    void find_seeing(long at, long position, Positions& seeing) const {
        Positions mine;
        std::memcpy(&mine, positions_ + at, sizeof mine);
        const int32_t key = static_cast<int32_t>(position);
        seeing = mine >= key;
        if (step_.window > 0) seeing &= mine - static_cast<int32_t>(std::min(step_.window, 1L << 30)) < key;
    }

    void hide(long at, long position, float* scores) const {
        Wide score, nothing;
        Positions seeing;
        load_wide(scores, score);
        fill_wide(NEGATIVE_INFINITY, nothing);
        find_seeing(at, position, seeing);
        store_wide(scores, seeing ? score : nothing);
    }

    // A weight of 0 times a value that is not finite is NaN, so here a row reads what it sees and no more.
    template <long N>
    void add_seen(long at, long from, long count) {
        const long head_dim = step_.head_dim;
        for (long j = 0; j < count; j++) {
            for (long n = 0; n < N; n++) {
                Positions seeing;
                find_seeing(at + n * WIDE_LANES, from + j, seeing);
                Pairs pairs;
                std::memcpy(&pairs, scores_ + (j / 2 * N + n) * WIDE_LANES, sizeof pairs);
                Wide weights[2], sum;
                widen_pairs(pairs, weights[0], weights[1]);
                for (long d = 0; d < head_dim; d++) {
                    const uint16_t bits = static_cast<uint16_t>(values_[j / 2 * head_dim + d] >> (j % 2 * 16));
                    float* to = sums_ + d * stride_ + at + n * WIDE_LANES;
                    load_wide(to, sum);
                    store_wide(to, seeing ? sum + weights[j % 2] * to_float(BF16{bits}) : sum);
                }
            }
        }
    }

    void store_results() const {
        const long group = step_.group(), head_dim = step_.head_dim;
        alignas(64) float turned[WIDE_LANES * PAIRED];
        for (long i = 0; i < stride_; i += WIDE_LANES) {
            for (long d = 0; d < head_dim; d += PAIRED) {
                for (long half = 0; half < 2; half++) {
                    Pairs square[WIDE_LANES];
                    for (long k = 0; k < WIDE_LANES; k++) {
                        const float* from = sums_ + (d + half * WIDE_LANES + k) * stride_ + i;
                        std::memcpy(&square[k], from, sizeof square[k]);
                    }
                    transpose_wide(square);
                    for (long lane = 0; lane < WIDE_LANES; lane++) {
                        std::memcpy(turned + lane * PAIRED + half * WIDE_LANES, &square[lane], sizeof square[lane]);
                    }
                }
                for (long lane = 0; lane < std::min(WIDE_LANES, queries_ - i); lane++) {
                    const long row = row_ + (i + lane) / group, head = kv_head_ * group + (i + lane) % group;
                    BF16* to = step_.out + (row * step_.num_heads + head) * head_dim + d;
                    store_pair_result(to, turned + lane * PAIRED, PAIRED, totals_[i + lane]);
                }
            }
        }
        for (long i = 0; i < rows_ && position_ + i < 0; i++) step_.store_zeros(row_ + i, kv_head_);
    }

    static constexpr BF16 ONES[2] = {{0x3F80}, {0x3F80}};

    const PairStep& step_;
    const long sequence_, kv_head_, row_, rows_, first_, end_, position_, queries_, stride_;
    // [head_dim, stride], [CHUNK_KEYS, BLOCK_LANES], and one for each query: its peak, the total of its weights.
    float *sums_, *scores_, *peaks_, *totals_;
    uint32_t *q_, *values_;
    int32_t* positions_;  // of the queries
};

}  // namespace
}  // namespace lorikeet
