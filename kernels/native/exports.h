// Exported functions that decoder.cpp calls as Python does. Their own files include this too, so that both agree.
#pragma once

#include <cstdint>

#include "parallel.h"

LORIKEET_EXPORT void lorikeet_rms_norm(
    int type, const void* x, long x_stride, void* residual, long residual_stride, int in_place, const int64_t* rows,
    const void* weight, void* out, long num_rows, long width, float eps, int threads);

LORIKEET_EXPORT void lorikeet_rope_kv_write(
    int type, void* qkv, long stride, const void* rotations, void* k_cache, void* v_cache, const int64_t* kv_slots,
    const void* head_norm, float eps, long num_tokens, long num_heads, long num_kv_heads, long head_dim, long slots,
    int threads);

LORIKEET_EXPORT void lorikeet_paged_attention(
    int type, int in_pairs, const void* q, long q_row, long q_head, const void* keys, const void* values,
    const int32_t* query_starts, const int32_t* context_lens, const int32_t* block_tables, long max_blocks, void* out,
    long num_sequences, long num_heads, long num_kv_heads, long head_dim, long num_blocks, long block_size, float scale,
    long window, float softcap, int threads);

LORIKEET_EXPORT void lorikeet_silu_and_mul(
    int type, const void* gate_up, long stride, void* out, long num_rows, long width, int threads);

LORIKEET_EXPORT void lorikeet_nf4_linear(
    const float* x, long x_stride, const uint8_t* codes, const float* constants, const float* bias, float* out,
    long num_rows, long out_features, long in_features, int threads);

LORIKEET_EXPORT void lorikeet_nf4_pair_linear(
    const void* x, long x_stride, const uint8_t* codes, const float* constants, const float* bias, void* out,
    long num_rows, long out_features, long in_features, int threads);

LORIKEET_EXPORT void lorikeet_lora_add(
    const void* site, const void* rows, const void* x, long x_stride, void* y, long y_stride, int threads);

LORIKEET_EXPORT void lorikeet_lora_affine(
    int type, void* y, long y_stride, long width, const void* arena, const int64_t* offsets, const int32_t* starts,
    const int32_t* slots, long num_segments, int threads);
