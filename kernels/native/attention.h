// What the two ways of paged attention share: a step's tensors, the softmax of a tile of scores, memory to work in.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace lorikeet {
namespace {

constexpr float NEGATIVE_INFINITY = -__builtin_inff();

// The state of a softmax that sees its scores tile by tile (Milakov and Gimelshein, arXiv 1805.02867).
struct Softmax {
    float peak = NEGATIVE_INFINITY, total = 0;

    // Turns scores, a multiple of 8 of them, into weights; returns the factor for what has been summed up before.
    float weigh(float* scores, long count) {
        Vec highest = fill(peak);
        for (long i = 0; i < count; i += LANES) {
            const Vec value = load(scores + i);
            highest = value > highest ? value : highest;
        }
        const float before = peak;
        peak = largest(highest);
        // Where nothing is seen yet all scores are -inf: their weights are 0 and not the NaN of -inf - -inf.
        const float shift = peak == NEGATIVE_INFINITY ? 0 : peak;
        Vec sums = Vec{};
        for (long i = 0; i < count; i += LANES) {
            const Vec weight = exp(load(scores + i) - shift);
            store(scores + i, weight);
            sums += weight;
        }
        const float factor = before == peak ? 1 : exp(fill(before - shift))[0];
        total = total * factor + sum(sums);
        return factor;
    }

    // Takes in what another part of the scores came to: `values` += `next_values`, both made relative to the same peak.
    void merge(float* values, const Softmax& next, const float* next_values, long count) {
        const float highest = next.peak > peak ? next.peak : peak, shift = highest == NEGATIVE_INFINITY ? 0 : highest;
        const Vec factors = exp(Vec{peak - shift, next.peak - shift});
        for (long i = 0; i < count; i += LANES) {
            store(values + i, load(values + i) * factors[0] + load(next_values + i) * factors[1]);
        }
        total = total * factors[0] + next.total * factors[1];
        peak = highest;
    }
};

static inline void scale_by(float* values, long count, float factor) {
    if (factor == 1) return;
    for (long i = 0; i < count; i += LANES) store(values + i, load(values + i) * factor);
}

// The tensors and numbers of one call, as kernels/attention.py has them; strides and positions count elements.
template <class T>
struct Step {
    const T* q;
    long q_row, q_head;
    const T *keys, *values;
    const int32_t *query_starts, *context_lens, *block_tables;
    long max_blocks;
    T* out;
    long num_heads, num_kv_heads, head_dim, num_blocks, block_size;
    float scale;
    long window;
    float softcap;

    long group() const { return num_heads / num_kv_heads; }

    // First position that the query at `position` sees.
    long first_seen(long position) const { return window > 0 && position >= window ? position - window + 1 : 0; }

    // Where the entries of positions [first, end) of a sequence begin, in keys as in values.
    void locate(long sequence, long kv_head, long first, long end, long* offsets) const {
        const int32_t* table = block_tables + sequence * max_blocks;
        long block = first / block_size, within = first % block_size;
        for (long position = first; position < end; block++, within = 0) {
            long offset = ((kv_head * num_blocks + table[block]) * block_size + within) * head_dim;
            for (; within < block_size && position < end; within++, position++, offset += head_dim) *offsets++ = offset;
        }
    }

    // The queries of one row and KV head, scaled, as fp32 [group, head_dim].
    void load_queries(long row, long kv_head, float* to) const {
        for (long head = kv_head * group(); head < (kv_head + 1) * group(); head++, to += head_dim) {
            const T* from = q + row * q_row + head * q_head;
            for (long d = 0; d < head_dim; d += LANES) store(to + d, load(from + d) * scale);
        }
    }

    // The results of one row and KV head: sums [group, head_dim] over the totals of their weights.
    void store_results(long row, long kv_head, const float* sums, const Softmax* softmax) const {
        T* to = out + (row * num_heads + kv_head * group()) * head_dim;
        for (long head = 0; head < group(); head++) {
            const float factor = 1.0f / softmax[head].total;
            for (long d = 0; d < head_dim; d += LANES, to += LANES) {
                store(to, load(sums + head * head_dim + d) * factor);
            }
        }
    }

    void store_zeros(long row, long kv_head) const {
        T* to = out + (row * num_heads + kv_head * group()) * head_dim;
        for (long i = 0; i < group() * head_dim; i += LANES) store(to + i, Vec{});
    }
};

static inline long padded(long count) { return (count + LANES - 1) / LANES * LANES; }

static inline void cap(float* scores, long count, float softcap) {
    if (softcap == 0) return;
    for (long i = 0; i < count; i += LANES) store(scores + i, tanh(load(scores + i) / softcap) * softcap);
}

// Memory of this thread, aligned for vectors; what it held before is lost.
static inline float* workspace(long floats) {
    thread_local std::vector<float> memory;
    constexpr long SPARE = 16;
    if (static_cast<long>(memory.size()) < floats + SPARE) memory.resize(static_cast<size_t>(floats + SPARE));
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64 / sizeof(float);
}

// Softmaxes of this thread that have seen nothing yet.
static inline Softmax* softmax_space(long count) {
    thread_local std::vector<Softmax> memory;
    memory.assign(static_cast<size_t>(count), Softmax{});
    return memory.data();
}

}  // namespace
}  // namespace lorikeet
