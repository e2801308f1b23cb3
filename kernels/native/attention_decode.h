// Attention of one query row: keys and values are read in place, once for the query heads that share them.
#pragma once

#include <algorithm>

#include "attention.h"

namespace lorikeet {
namespace {

// Positions whose scores are computed before their values are read: K and V of them fit in the first-level caches.
constexpr long DECODE_TILE = 128;
// How many positions ahead keys are fetched: about the time that memory takes to answer.
constexpr long AHEAD = 16;

// Sums of the lanes of four vectors.
static inline void store_sums(float* to, Vec a, Vec b, Vec c, Vec d) {
    const Vec ab = LORIKEET_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
                   LORIKEET_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    const Vec cd = LORIKEET_SHUFFLE(c, d, 0, 8, 2, 10, 4, 12, 6, 14) +
                   LORIKEET_SHUFFLE(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
    const Vec all = LORIKEET_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                    LORIKEET_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    for (long i = 0; i < 4; i++) to[i] = all[i] + all[i + 4];
}

// Has the memory bring one entry of the cache, which the processor can't foresee: blocks lie anywhere.
template <class T>
static inline void prefetch(const T* entry, long head_dim) {
    constexpr long LINE = 64 / sizeof(T);
    for (long d = 0; d < head_dim; d += LINE) __builtin_prefetch(entry + d);
}

// scores[m][j] = q[m] . keys[j] for M heads and `count` keys, a multiple of 4. `offsets` has AHEAD entries more. With
// `values`, the first time that a tile is read, fetches these and keys to come.
template <int M, class T>
void score(
    const float* q, long head_dim, const T* keys, const T* values, const long* offsets, long count, float* scores) {
    for (long j = 0; j < count; j += 4) {
        for (long i = j; values != nullptr && i < j + 4; i++) {
            prefetch(keys + offsets[i + AHEAD], head_dim);
            prefetch(values + offsets[i], head_dim);
        }
        const T *k0 = keys + offsets[j], *k1 = keys + offsets[j + 1];
        const T *k2 = keys + offsets[j + 2], *k3 = keys + offsets[j + 3];
        Vec s0[M] = {}, s1[M] = {}, s2[M] = {}, s3[M] = {};
        for (long d = 0; d < head_dim; d += LANES) {
            Vec query[M];
            for (int m = 0; m < M; m++) query[m] = load(q + m * head_dim + d);
            const Vec a = load(k0 + d);
            for (int m = 0; m < M; m++) s0[m] += a * query[m];
            const Vec b = load(k1 + d);
            for (int m = 0; m < M; m++) s1[m] += b * query[m];
            const Vec c = load(k2 + d);
            for (int m = 0; m < M; m++) s2[m] += c * query[m];
            const Vec e = load(k3 + d);
            for (int m = 0; m < M; m++) s3[m] += e * query[m];
        }
        for (int m = 0; m < M; m++) store_sums(scores + m * DECODE_TILE + j, s0[m], s1[m], s2[m], s3[m]);
    }
}

// sums[m][8 * N elements] += sum over j of weights[m][j] * values[j].
template <int M, int N, class T>
void accumulate(const float* weights, const T* values, const long* offsets, long count, float* sums, long head_dim) {
    Vec total[M][N];
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) total[m][n] = load(sums + m * head_dim + n * LANES);
    }
    for (long j = 0; j < count; j++) {
        const T* value = values + offsets[j];
        for (int n = 0; n < N; n++) {
            const Vec v = load(value + n * LANES);
            for (int m = 0; m < M; m++) total[m][n] += v * weights[m * DECODE_TILE + j];
        }
    }
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) store(sums + m * head_dim + n * LANES, total[m][n]);
    }
}

// What the queries of some heads, fp32 [group, head_dim], make of the positions [first, end) of their sequence: `sums`
// of weighted values, [group, head_dim], and the softmax they are relative to.
template <class T>
void attend_row(
    const Step<T>& step, const float* q, long sequence, long kv_head, long first, long end, float* sums,
    Softmax* softmax, float* scores) {
    const long head_dim = step.head_dim, group = step.group();
    std::fill(sums, sums + group * head_dim, 0.0f);
    std::fill(softmax, softmax + group, Softmax{});
    long offsets[DECODE_TILE + LANES + AHEAD];
    for (long from = first; from < end; from += DECODE_TILE) {
        const long count = std::min(DECODE_TILE, end - from);
        const long located = std::min(count + AHEAD, end - from);
        step.locate(sequence, kv_head, from, from + located, offsets);
        // Past the end any key will do: its score is replaced.
        std::fill(offsets + located, offsets + padded(count) + AHEAD, offsets[located - 1]);
        // Runs f for all heads, three, two or one at a time: what registers have room for.
        const auto by_heads = [&](auto&& f) {
            long m = 0;
            for (; group - m >= 3 && group - m != 4; m += 3) f(m, std::integral_constant<int, 3>{});
            for (; group - m >= 2; m += 2) f(m, std::integral_constant<int, 2>{});
            if (m < group) f(m, std::integral_constant<int, 1>{});
        };
        by_heads([&](long m, auto heads) {
            const T* values = m == 0 ? step.values : nullptr;
            float* to = scores + m * DECODE_TILE;
            score<heads.value>(q + m * head_dim, head_dim, step.keys, values, offsets, padded(count), to);
        });
        for (long m = 0; m < group; m++) {
            float* mine = scores + m * DECODE_TILE;
            cap(mine, padded(count), step.softcap);
            std::fill(mine + count, mine + padded(count), NEGATIVE_INFINITY);
            scale_by(sums + m * head_dim, head_dim, softmax[m].weigh(mine, padded(count)));
        }
        by_heads([&](long m, auto heads) {
            constexpr int M = heads.value;
            const float* weights = scores + m * DECODE_TILE;
            float* to = sums + m * head_dim;
            long d = 0;
            for (; d + 4 * LANES <= head_dim; d += 4 * LANES) {
                accumulate<M, 4>(weights, step.values + d, offsets, count, to + d, head_dim);
            }
            for (; d + 2 * LANES <= head_dim; d += 2 * LANES) {
                accumulate<M, 2>(weights, step.values + d, offsets, count, to + d, head_dim);
            }
            if (d < head_dim) accumulate<M, 1>(weights, step.values + d, offsets, count, to + d, head_dim);
        });
    }
}

}  // namespace
}  // namespace lorikeet
