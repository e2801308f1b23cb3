// One token of each row of logits, by temperature, top-k, top-p, min-p and a number in [0, 1); the contract is in
// kernels/draw.py.
//
// A row becomes weights, 1 for the likeliest token. What a filter keeps are the weights from some least one on. Where
// that is, is found among the few that may be it: those above what cannot matter are dealt out by the leading bits of
// their values, and only the bucket in which the filter ends is looked at value by value.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace lorikeet {
namespace {

// What a request asks for, `_TABLE` in kernels/draw.py.
struct Draw {
    double uniform;
    float inverse_temperature, top_p, min_p;
    int32_t top_k;  // 0: all
};

// Tokens whose weights are added up before the sums are added up in double.
constexpr long RUN = 256;
// Buckets by exponent and four bits of the mantissa; the largest weight is 1.
constexpr int BUCKET_SHIFT = 19;
constexpr long BUCKETS = (0x3F800000 >> BUCKET_SHIFT) + 1;
// Largest values of so many groups of columns say where the k-th largest of all is at least; k is at most a quarter.
constexpr long GROUPS = 1024;
// Of what lies outside of a nucleus so much may be left out unseen: float32 sums must not make it matter.
constexpr double SHARE_LEFT_OUT = 0.75, SMALLEST_SHARE = 1e-5;

// Memory of a thread.
struct Space {
    std::vector<float> weights, kept, bucket, maxima;
    std::vector<double> run_sums, masses;
    std::vector<int32_t> columns, counts;
};

long bucket_of(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return static_cast<long>(bits >> BUCKET_SHIFT);
}

// The smallest weight of a bucket.
float floor_of(long bucket) {
    const auto bits = static_cast<uint32_t>(bucket) << BUCKET_SHIFT;
    float weight;
    std::memcpy(&weight, &bits, sizeof weight);
    return weight;
}

// The lanes of a comparison that hold, as bits.
unsigned lanes_of(Ints holds) {
#if defined(__AVX2__)
    return static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(holds)));
#else
    unsigned bits = 0;
    for (long i = 0; i < LANES; i++) bits |= (holds[i] != 0 ? 1u : 0u) << i;
    return bits;
#endif
}

// The largest value of a row; NaN if there is one.
float largest_of(const float* row, long count) {
    Vec highest = fill(-std::numeric_limits<float>::infinity());
    Ints has_nan{};
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Vec value = load(row + i);
        highest = value > highest ? value : highest;
        has_nan |= value != value;
    }
    float found = largest(highest);
    bool is_nan = lanes_of(has_nan) != 0;
    for (; i < count; i++) {
        found = std::max(found, row[i]);
        is_nan |= row[i] != row[i];
    }
    return is_nan ? std::numeric_limits<float>::quiet_NaN() : found;
}

// First index whose cumulative weight exceeds `target`; the last positive one where rounding puts it behind all.
template <class T>
long invert(const T* weights, long count, double target, double* before) {
    double mass = 0;
    long found = 0;
    for (long i = 0; i < count; i++) {
        if (!(weights[i] > 0)) continue;
        found = i;
        *before = mass;
        mass += static_cast<double>(weights[i]);
        if (mass > target) break;
    }
    return found;
}

class Row {
public:
    Row(const float* logits, long vocab, const Draw& draw, Space& space)
        : logits_(logits), vocab_(vocab), draw_(draw), space_(space) {}

    int64_t token() {
        const float largest = largest_of(logits_, vocab_);
        if (!std::isfinite(largest)) return 0;
        weigh(largest);
        const bool by_top_k = draw_.top_k > 0 && draw_.top_k < vocab_, by_top_p = draw_.top_p < 1.0f;
        if (!by_top_k && !by_top_p && draw_.min_p <= 0.0f) return of_runs();
        keep(cut(by_top_k, by_top_p));
        float least = 0;
        if (by_top_k) {
            least = kth_largest(draw_.top_k);
            if (by_top_p) least = std::max(least, end_of_nucleus(sum_of_largest(draw_.top_k, least), least));
        } else if (by_top_p) {
            least = end_of_nucleus(total_, 0);
        }
        return of_kept(std::max(least, draw_.min_p));
    }

private:
    // Logits to weights, zeros up to the end of the last run, and the sums of runs.
    void weigh(float largest) {
        const long runs = (vocab_ + RUN - 1) / RUN;
        space_.weights.resize(static_cast<size_t>(runs * RUN));
        space_.run_sums.resize(static_cast<size_t>(runs));
        float* to = space_.weights.data();
        total_ = 0;
        for (long run = 0; run < runs; run++) {
            const long end = std::min((run + 1) * RUN, vocab_);
            Vec sums{};
            long i = run * RUN;
            for (; i + LANES <= end; i += LANES) {
                const Vec weight = exp((load(logits_ + i) - largest) * draw_.inverse_temperature);
                store(to + i, weight);
                sums += weight;
            }
            for (; i < (run + 1) * RUN; i += LANES) {
                float rest[LANES];  // the last columns, and behind them nothing
                std::fill(rest, rest + LANES, -std::numeric_limits<float>::infinity());
                if (i < end) std::copy(logits_ + i, logits_ + end, rest);
                const Vec weight = exp((load(rest) - largest) * draw_.inverse_temperature);
                store(to + i, weight);
                sums += weight;
            }
            space_.run_sums[run] = static_cast<double>(sum(sums));
            total_ += space_.run_sums[run];
        }
    }

    // A weight below which nothing is kept, nor needed to find out what is.
    float cut(bool by_top_k, bool by_top_p) {
        // What min-p takes away is part of what top-k leaves, and top-p is a share of that.
        float least = by_top_k && by_top_p ? 0 : draw_.min_p;
        if (by_top_k && 4L * draw_.top_k <= GROUPS && vocab_ >= 4 * GROUPS) {
            least = std::max(least, least_of_groups());
        } else if (!by_top_k && by_top_p && 1.0 - draw_.top_p > SMALLEST_SHARE) {
            const double may_go = SHARE_LEFT_OUT * (1.0 - static_cast<double>(draw_.top_p)) * total_;
            least = std::max(least, static_cast<float>(may_go / static_cast<double>(vocab_)));
        }
        return least;
    }

    // The k-th of so many groups' largest weights: each is a weight of its own.
    float least_of_groups() {
        auto& maxima = space_.maxima;
        maxima.assign(static_cast<size_t>(GROUPS), 0.0f);
        const float* weights = space_.weights.data();
        for (long first = 0; first + GROUPS <= vocab_; first += GROUPS) {
            for (long i = 0; i < GROUPS; i += LANES) {
                const Vec value = load(weights + first + i), highest = load(maxima.data() + i);
                store(maxima.data() + i, value > highest ? value : highest);
            }
        }
        const auto kth = maxima.begin() + draw_.top_k - 1;
        std::nth_element(maxima.begin(), kth, maxima.end(), std::greater<float>());
        return *kth;
    }

    // Collects the weights from `least` on, in the order of columns, and deals them out.
    void keep(float least) {
        space_.kept.resize(static_cast<size_t>(vocab_));
        space_.columns.resize(static_cast<size_t>(vocab_));
        space_.counts.assign(static_cast<size_t>(BUCKETS), 0);
        space_.masses.assign(static_cast<size_t>(BUCKETS), 0.0);
        const float* const weights = space_.weights.data();
        float* const kept = space_.kept.data();
        int32_t *const columns = space_.columns.data(), *const counts = space_.counts.data();
        double* const masses = space_.masses.data();
        num_kept_ = 0;
        // Beyond the vocabulary lie zeros, which are worth nothing.
        for (long i = 0; i < vocab_; i += LANES) {
            const Vec value = load(weights + i);
            const Ints holds = (value >= least) & (value > 0.0f);
            for (unsigned bits = lanes_of(holds); bits != 0; bits &= bits - 1) {
                const long column = i + __builtin_ctz(bits);
                const float weight = weights[column];
                const long bucket = bucket_of(weight);
                kept[num_kept_] = weight;
                columns[num_kept_++] = static_cast<int32_t>(column);
                counts[bucket]++;
                masses[bucket] += static_cast<double>(weight);
            }
        }
    }

    // The kept weights of a bucket, in descending order.
    const std::vector<float>& sorted_bucket(long wanted) {
        auto& bucket = space_.bucket;
        bucket.clear();
        for (long i = 0; i < num_kept_; i++) {
            if (bucket_of(space_.kept[i]) == wanted) bucket.push_back(space_.kept[i]);
        }
        std::sort(bucket.begin(), bucket.end(), std::greater<float>());
        return bucket;
    }

    float kth_largest(long k) {
        for (long b = BUCKETS - 1; b >= 0; b--) {
            const long count = space_.counts[b];
            if (count >= k) return sorted_bucket(b)[k - 1];
            k -= count;
        }
        return 0;  // fewer than k are above 0
    }

    // Of the k largest, of which `least` is the last.
    double sum_of_largest(long k, float least) const {
        double mass = 0;
        for (long i = 0; i < num_kept_; i++) {
            if (space_.kept[i] > least) {
                mass += static_cast<double>(space_.kept[i]);
                k--;
            }
        }
        return mass + static_cast<double>(k) * static_cast<double>(least);
    }

    // The smallest weight that top-p of a total keeps, of those from `least` on. A weight is kept while the mass before
    // it is short of the target; the first one always is.
    float end_of_nucleus(double total, float least) {
        const float target = static_cast<float>(total) * draw_.top_p;
        double mass = 0;
        float last = 1;
        for (long b = BUCKETS - 1; b >= 0; b--) {
            if (space_.counts[b] == 0) continue;
            const double after = mass + space_.masses[b];
            // With room for the rounding of the comparison below.
            if (after < static_cast<double>(target) * (1 - 1e-6) && bucket_of(least) != b) {
                mass = after;
                last = floor_of(b);
                continue;
            }
            for (const float weight : sorted_bucket(b)) {
                mass += static_cast<double>(weight);
                const bool is_first = mass == static_cast<double>(weight);
                if (weight < least || (!is_first && static_cast<float>(mass) - weight >= target)) return last;
                last = weight;
            }
        }
        return 0;
    }

    int64_t of_runs() const {
        const long runs = static_cast<long>(space_.run_sums.size());
        double before = 0;
        const long run = invert(space_.run_sums.data(), runs, target_of(total_), &before);
        const float* weights = space_.weights.data() + run * RUN;
        double inside = 0, ignored = 0;
        for (long i = 0; i < RUN; i++) inside += static_cast<double>(weights[i]);
        // Float32 sums of a run are exact to 1e-7 of it: where the number falls in it, is a share of its sum.
        const double share = (target_of(total_) - before) / space_.run_sums[run];
        return run * RUN + invert(weights, RUN, std::min(std::max(share, 0.0), 1.0) * inside, &ignored);
    }

    int64_t of_kept(float least) const {
        double total = 0, mass = 0;
        for (long i = 0; i < num_kept_; i++) {
            total += space_.kept[i] >= least ? static_cast<double>(space_.kept[i]) : 0.0;
        }
        const double target = target_of(total);
        int64_t found = 0;
        for (long i = 0; i < num_kept_; i++) {
            if (space_.kept[i] < least) continue;
            found = space_.columns[i];
            mass += static_cast<double>(space_.kept[i]);
            if (mass > target) break;
        }
        return found;
    }

    // Rounding must not lift it to the total: it would fall behind the last token.
    double target_of(double total) const { return std::min(draw_.uniform * total, std::nextafter(total, 0.0)); }

    const float* logits_;
    const long vocab_;
    const Draw& draw_;
    Space& space_;
    double total_ = 0;
    long num_kept_ = 0;
};

}  // namespace
}  // namespace lorikeet

// logits [num_rows, vocab] with rows `stride` apart; `draws` is a Draw for each.
LORIKEET_EXPORT void lorikeet_draw(
    const float* logits, long stride, long num_rows, long vocab, const void* draws, int64_t* tokens, int threads) {
    using namespace lorikeet;
    const auto* each = static_cast<const Draw*>(draws);
    parallel_for(threads, num_rows, 1, [&](long first, long end) {
        thread_local Space space;
        for (long i = first; i < end; i++) tokens[i] = Row(logits + i * stride, vocab, each[i], space).token();
    });
}
