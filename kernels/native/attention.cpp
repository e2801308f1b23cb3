// Paged attention and the write to its cache; the contract is in kernels/attention.py.
//
// One parallel loop over pieces of all sequences: a tile of query rows of a prefill chunk, or a stretch of the context
// of a decoding sequence, each for one KV head. Where they are cut depends on their own sequence only, so a row's
// result depends neither on the rest of the batch nor on the number of threads. Pieces are computed in fp32
// (attention_decode.h, attention_chunk.h), or for bfloat16 by products of pairs (attention_pair_decode.h,
// attention_pair_chunk.h).

#include "attention.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "attention_chunk.h"
#include "attention_decode.h"
#include "attention_pair_chunk.h"
#include "attention_pair_decode.h"
#include "exports.h"

namespace lorikeet {
namespace {

// Positions of a longer context that are attended as pieces of their own.
constexpr long SPLIT = 512;
// Multiplications (of q and k) below which waking up other threads takes longer than they save, and of a piece that is
// long enough to be dealt out alone.
constexpr long MIN_WORK = 1 << 17;

struct Piece {
    long sequence, kv_head, row, rows;
    long position;    // of row `row`
    long first, end;  // positions of the context
    long partial;     // number of the partial result that it computes; -1: it is all that its rows see
};

// A decoding row and KV head whose context was cut into the partial results [first, first + count).
struct Join {
    long row, kv_head, first, count;
};

struct Plan {
    std::vector<Piece> pieces;
    std::vector<Join> joins;
    long partials = 0;
    double work = 0;
};

template <class T>
Plan plan_step(const Step<T>& step, long num_sequences) {
    Plan plan;
    const long tile = std::max(1L, CHUNK_QUERIES / step.group());
    // Tiles first, those of one head together, which read the same keys and values, and from the end of their chunk:
    // the longest are begun before the short ones.
    for (long n = 0; n < num_sequences; n++) {
        const long row = step.query_starts[n], rows = step.query_starts[n + 1] - row, context = step.context_lens[n];
        if (rows < 2) continue;
        for (long head = 0; head < step.num_kv_heads; head++) {
            for (long from = (rows - 1) / tile * tile; from >= 0; from -= tile) {
                const long count = std::min(tile, rows - from), position = context - rows + from;
                const long first = step.first_seen(std::max(0L, position));
                plan.pieces.push_back({n, head, row + from, count, position, first, position + count, -1});
                plan.work += static_cast<double>(count * (position + count - step.first_seen(position)));
            }
        }
    }
    for (long n = 0; n < num_sequences; n++) {
        const long row = step.query_starts[n], context = step.context_lens[n];
        if (step.query_starts[n + 1] - row != 1) continue;
        const long first = step.first_seen(context - 1), splits = std::max(1L, (context - first + SPLIT - 1) / SPLIT);
        for (long head = 0; head < step.num_kv_heads; head++) {
            if (splits > 1) plan.joins.push_back({row, head, plan.partials, splits});
            for (long i = 0; i < splits; i++) {
                const long from = first + i * SPLIT, end = std::min(context, from + SPLIT);
                plan.pieces.push_back({n, head, row, 1, context - 1, from, end, splits > 1 ? plan.partials++ : -1});
            }
        }
        plan.work += static_cast<double>((context - first) * step.num_kv_heads);
    }
    plan.work *= static_cast<double>(step.group() * step.head_dim);
    return plan;
}

// Partial results: `sums` [partials, group, head_dim] and `softmax` [partials, group].
struct Partials {
    float* sums;
    Softmax* softmax;
};

template <class T>
void attend_piece(const Step<T>& step, const Piece& piece, const Partials& partials) {
    if (piece.rows > 1) {
        attend_tile(step, piece.sequence, piece.kv_head, piece.row, piece.rows, piece.first, piece.end);
        return;
    }
    if (piece.first >= piece.end) {
        step.store_zeros(piece.row, piece.kv_head);
        return;
    }
    const long group = step.group(), size = group * step.head_dim;
    float* q = workspace(2 * size + group * DECODE_TILE);
    float* scores = q + size;
    const bool whole = piece.partial < 0;
    float* to = whole ? scores + group * DECODE_TILE : partials.sums + piece.partial * size;
    Softmax* relative_to = whole ? softmax_space(group) : partials.softmax + piece.partial * group;
    step.load_queries(piece.row, piece.kv_head, q);
    attend_row(step, q, piece.sequence, piece.kv_head, piece.first, piece.end, to, relative_to, scores);
    if (whole) step.store_results(piece.row, piece.kv_head, to, relative_to);
}

// The pieces [first, end), by one thread.
template <class T>
void attend_pieces(const Step<T>& step, const Piece* pieces, long first, long end, const Partials& partials) {
    for (long i = first; i < end; i++) attend_piece(step, pieces[i], partials);
}

Stretch stretch(const Piece& piece) { return {piece.sequence, piece.kv_head, piece.first, piece.end}; }

void attend_pieces(const PairStep& step, const Piece* pieces, long first, long end, const Partials& partials) {
    const long group = step.group(), size = group * step.head_dim;
    PairDecoding decoding(step);
    for (long i = first; i < end; i++) {
        const Piece& piece = pieces[i];
        if (piece.rows > 1) {
            PairChunk(step, piece.sequence, piece.kv_head, piece.row, piece.rows, piece.first, piece.end).run();
            continue;
        }
        if (piece.first >= piece.end) {
            step.store_zeros(piece.row, piece.kv_head);
            continue;
        }
        const bool more = i + 1 < end && pieces[i + 1].rows == 1 && pieces[i + 1].first < pieces[i + 1].end;
        const Stretch next = more ? stretch(pieces[i + 1]) : Stretch{};
        float* scores = workspace(size + group * DECODE_TILE);
        const bool whole = piece.partial < 0;
        float* to = whole ? scores + group * DECODE_TILE : partials.sums + piece.partial * size;
        Softmax* relative_to = whole ? softmax_space(group) : partials.softmax + piece.partial * group;
        decoding.run(piece.row, stretch(piece), more ? &next : nullptr, to, relative_to, scores);
        if (whole) step.store_results(piece.row, piece.kv_head, to, relative_to);
    }
}

// Adds up partial results, in the first one's place.
template <class AnyStep>
void join(const AnyStep& step, const Join& row, const Partials& partials) {
    const long group = step.group(), head_dim = step.head_dim;
    float* joined = partials.sums + row.first * group * head_dim;
    Softmax* all = partials.softmax + row.first * group;
    for (long m = 0; m < group; m++) {
        for (long i = 1; i < row.count; i++) {
            const Softmax& next = all[i * group + m];
            all[m].merge(joined + m * head_dim, next, joined + (i * group + m) * head_dim, head_dim);
        }
    }
    step.store_results(row.row, row.kv_head, joined, all);
}

template <class AnyStep>
void attend(const AnyStep& step, long num_sequences, int threads) {
    const Plan plan = plan_step(step, num_sequences);
    const long count = static_cast<long>(plan.pieces.size()), values = plan.partials * step.group();
    const std::unique_ptr<float[]> sums(new float[static_cast<size_t>(values * step.head_dim)]);
    const std::unique_ptr<Softmax[]> softmax(new Softmax[static_cast<size_t>(values)]);
    const Partials partials{sums.get(), softmax.get()};
    if (plan.work < MIN_WORK) threads = 1;
    const long least = static_cast<long>(MIN_WORK / (plan.work / static_cast<double>(std::max(1L, count)) + 1));
    parallel_for(threads, count, even_piece(threads, count, least), [&](long first, long end) {
        attend_pieces(step, plan.pieces.data(), first, end, partials);
    });
    const long joins = static_cast<long>(plan.joins.size());
    // A join is a few microseconds.
    parallel_for(threads, joins, even_piece(threads, joins, 8), [&](long first, long end) {
        for (long i = first; i < end; i++) join(step, plan.joins[i], partials);
    });
}

}  // namespace
}  // namespace lorikeet

// In pairs: products of bfloat16 are of pairs (pairs.h) where a head is wide enough; for no other type.
LORIKEET_EXPORT void lorikeet_paged_attention(
    int type, int in_pairs, const void* q, long q_row, long q_head, const void* keys, const void* values,
    const int32_t* query_starts, const int32_t* context_lens, const int32_t* block_tables, long max_blocks, void* out,
    long num_sequences, long num_heads, long num_kv_heads, long head_dim, long num_blocks, long block_size, float scale,
    long window, float softcap, int threads) {
    using namespace lorikeet;
    with_type(type, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        const Step<T> step{
            static_cast<const T*>(q), q_row, q_head, static_cast<const T*>(keys), static_cast<const T*>(values),
            query_starts, context_lens, block_tables, max_blocks, static_cast<T*>(out), num_heads, num_kv_heads,
            head_dim, num_blocks, block_size, scale, window, softcap};
        if constexpr (std::is_same<T, BF16>::value) {
            if (in_pairs != 0 && head_dim % PAIRED == 0) {
                attend(PairStep{step}, num_sequences, threads);
                return;
            }
        }
        attend(step, num_sequences, threads);
    });
}

// k and v: [num_tokens, num_kv_heads, head_dim] with strides in elements; a negative slot is skipped.
LORIKEET_EXPORT void lorikeet_kv_write(
    int element_size, const char* k, long k_row, long k_head, const char* v, long v_row, long v_head, char* k_cache,
    char* v_cache, const int64_t* kv_slots, long num_tokens, long num_kv_heads, long head_dim, long slots) {
    const long size = head_dim * element_size;
    for (long i = 0; i < num_tokens; i++) {
        if (kv_slots[i] < 0 || kv_slots[i] >= slots) continue;
        for (long head = 0; head < num_kv_heads; head++) {
            const long to = (head * slots + kv_slots[i]) * size;
            std::memcpy(k_cache + to, k + (i * k_row + head * k_head) * element_size, static_cast<size_t>(size));
            std::memcpy(v_cache + to, v + (i * v_row + head * v_head) * element_size, static_cast<size_t>(size));
        }
    }
}
