// The layers of a Llama-like decoder, all of them in one call; the contract is in kernels/decoder.py.
//
// What Python would call one after the other is called here in the same order with the same arguments, so that results
// are the same to the bit, without what lies between two calls there: for one row, a quarter of a step.

#include <type_traits>

#include "exports.h"
#include "vec.h"

namespace lorikeet {
namespace {

// Values that take a thread a few microseconds.
constexpr long MIN_VALUES = 1 << 14;

// A linear, `_Linear` in kernels/decoder.py. Without LoRA `lora`, `arena` and `affines` are null.
struct Linear {
    const uint8_t* codes;
    const float *constants, *bias;
    const void *lora, *arena;
    const int64_t* affines;
    int64_t out_features, in_features, site;
};

// `_Layer` in kernels/decoder.py.
struct Layer {
    const void *attention_norm, *mlp_norm, *head_norm;
    Linear qkv, o, gate_up, down;
    double scale;
    int64_t window;
};

// Rows that a pass scales and shifts, `_Affines` in kernels/decoder.py.
struct Affines {
    const int32_t *starts, *slots;
    const uint8_t* has;  // of each site
    int64_t num_segments;
};

// `_Step` in kernels/decoder.py.
struct Step {
    const Layer* layers;
    int64_t num_layers, type, in_pairs, hidden_width, num_heads, num_kv_heads, head_dim;
    double eps;
    void *hidden, *out, *space;
    float* wide;
    const void* rotations;
    void *const *keys, *const *values;
    const int64_t* kv_slots;
    const int32_t *query_starts, *context_lens, *block_tables;
    int64_t num_rows, num_sequences, max_blocks, num_blocks, block_size;
    const void* rows;           // that adapters change; null: none
    const uint8_t* is_adapted;  // each site by them
    const Affines* affines;
    int64_t num_affines, threads;
};

// Converts `count` values.
template <class From, class To>
void convert(const From* from, To* to, long count, int threads) {
    parallel_for(threads, count, even_piece(threads, count, MIN_VALUES), [&](long first, long end) {
        long i = first;
        for (; i + LANES <= end; i += LANES) store(to + i, load(from + i));
        for (; i < end; i++) put(to + i, to_float(from[i]));
    });
}

class Decoder {
public:
    explicit Decoder(const Step& step) : s_(step), type_(static_cast<int>(step.type)), threads_(step.threads) {}

    void run() const {
        const long rows = s_.num_rows, width = s_.hidden_width;
        const long query_width = s_.num_heads * s_.head_dim;
        const long qkv_width = query_width + 2 * s_.num_kv_heads * s_.head_dim;
        void* const x = s_.space;
        void* const y = s_.out;
        // Attention's tensors and the MLP's are never needed at the same time.
        void* const shared = at(x, rows * width);
        for (long i = 0; i < s_.num_layers; i++) {
            const Layer& layer = s_.layers[i];
            void *const qkv = shared, *const attended = at(qkv, rows * qkv_width);
            norm(i == 0 ? nullptr : y, layer.attention_norm, x);
            apply(layer.qkv, x, qkv);
            lorikeet_rope_kv_write(
                type_, qkv, qkv_width, s_.rotations, s_.keys[i], s_.values[i], s_.kv_slots, layer.head_norm, eps(), rows,
                s_.num_heads, s_.num_kv_heads, s_.head_dim, s_.num_blocks * s_.block_size, threads_);
            lorikeet_paged_attention(
                type_, static_cast<int>(s_.in_pairs), qkv, qkv_width, s_.head_dim, s_.keys[i], s_.values[i],
                s_.query_starts, s_.context_lens, s_.block_tables, s_.max_blocks, attended, s_.num_sequences,
                s_.num_heads, s_.num_kv_heads, s_.head_dim, s_.num_blocks, s_.block_size,
                static_cast<float>(layer.scale), layer.window, 0.0f, threads_);
            apply(layer.o, attended, y);
            norm(y, layer.mlp_norm, x);
            const long mlp_width = layer.down.in_features;
            void *const gate_up = shared, *const activated = at(gate_up, rows * 2 * mlp_width);
            apply(layer.gate_up, x, gate_up);
            lorikeet_silu_and_mul(type_, gate_up, 2 * mlp_width, activated, rows, mlp_width, threads_);
            apply(layer.down, activated, y);
        }
    }

private:
    float eps() const { return static_cast<float>(s_.eps); }

    void* at(void* from, long elements) const {
        return static_cast<char*>(from) + elements * (type_ == FLOAT32 ? sizeof(float) : sizeof(BF16));
    }

    // out = norm of the hidden state, to which `addend` is added before unless it is null.
    void norm(const void* addend, const void* weight, void* out) const {
        const long width = s_.hidden_width;
        if (addend == nullptr) {
            lorikeet_rms_norm(
                type_, s_.hidden, width, nullptr, 0, 0, nullptr, weight, out, s_.num_rows, width, eps(), threads_);
        } else {
            lorikeet_rms_norm(
                type_, addend, width, s_.hidden, width, 1, nullptr, weight, out, s_.num_rows, width, eps(), threads_);
        }
    }

    // y = what the linear and the adapters of its rows make of x.
    void apply(const Linear& linear, const void* x, void* y) const {
        const long in = linear.in_features, out = linear.out_features;
        if (s_.in_pairs != 0) {
            lorikeet_nf4_pair_linear(
                x, in, linear.codes, linear.constants, linear.bias, y, s_.num_rows, out, in, threads_);
        } else {
            multiply(linear, x, y);
        }
        for (long i = 0; i < s_.num_affines; i++) {
            const Affines& each = s_.affines[i];
            if (each.has[linear.site] == 0) continue;
            lorikeet_lora_affine(
                type_, y, out, out, linear.arena, linear.affines, each.starts, each.slots, each.num_segments, threads_);
        }
        if (s_.rows != nullptr && s_.is_adapted[linear.site] != 0) {
            lorikeet_lora_add(linear.lora, s_.rows, x, in, y, out, threads_);
        }
    }

    // In fp32, whatever x and y are stored in.
    void multiply(const Linear& linear, const void* x, void* y) const {
        const long rows = s_.num_rows, in = linear.in_features, out = linear.out_features;
        const auto run = [&](const float* from, float* to) {
            lorikeet_nf4_linear(from, in, linear.codes, linear.constants, linear.bias, to, rows, out, in, threads_);
        };
        with_type(type_, [&](auto* null) {
            using T = std::remove_pointer_t<decltype(null)>;
            if constexpr (std::is_same<T, float>::value) {
                run(static_cast<const float*>(x), static_cast<float*>(y));
            } else {
                float *const wide_x = s_.wide, *const wide_y = wide_x + rows * in;
                convert(static_cast<const T*>(x), wide_x, rows * in, threads_);
                run(wide_x, wide_y);
                convert(wide_y, static_cast<T*>(y), rows * out, threads_);
            }
        });
    }

    const Step& s_;
    const int type_, threads_;
};

}  // namespace
}  // namespace lorikeet

// `hidden` [num_rows, hidden_width] becomes the sum that the last layer's MLP is to be added to, `out` what that came
// to. `space` has room for num_rows times hidden_width and the wider of attention's and the MLP's tensors, `wide`,
// where the type has 16 bits and weights are not in pairs, for the widest input and output of a linear in fp32.
LORIKEET_EXPORT void lorikeet_decoder_layers(const lorikeet::Step* step) { lorikeet::Decoder(*step).run(); }
