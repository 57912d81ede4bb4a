// A decoder's layers one after the other, as workers/fused_decoder.py does them call by call.

#include <memory>

#include "kernels.h"
#include "numbers.h"

using namespace segue;

extern "C" void segue_decode(const void* decoder, const void* layers, const void* tables, void* hidden,
                             const void* cosines, const void* sines, int64_t num_tokens, float scale, float epsilon,
                             int num_threads) {
    constexpr int kIsBf16 = 1;
    const auto& d = *static_cast<const Decoder*>(decoder);
    const int64_t num_heads = d.num_key_heads * d.num_groups, all_heads = num_heads + 2 * d.num_key_heads;
    const int64_t heads_width = num_heads * d.head_dim, qkv_width = all_heads * d.head_dim;
    const auto room = [&](int64_t width) { return std::unique_ptr<BFloat16[]>(new BFloat16[num_tokens * width]); };
    const auto normed = room(d.width), qkv = room(qkv_width), attended = room(heads_width), gated = room(d.mlp_width);
    const auto address = [](int64_t number) { return reinterpret_cast<const void*>(number); };
    const auto norm = [&](const void* from, int64_t weight, void* to, int64_t stride, int64_t num_rows, int64_t width) {
        segue_rms_norm(kIsBf16, from, address(weight), to, num_tokens, stride, num_rows, width, epsilon, num_threads);
    };
    Step step{};
    step.query = reinterpret_cast<int64_t>(qkv.get());
    step.key = reinterpret_cast<int64_t>(qkv.get() + heads_width);
    step.value = reinterpret_cast<int64_t>(qkv.get() + heads_width + d.num_key_heads * d.head_dim);
    step.out = reinterpret_cast<int64_t>(attended.get());
    step.query_head = step.key_head = step.value_head = d.head_dim;
    step.query_token = step.key_token = step.value_token = qkv_width;
    step.num_key_heads = d.num_key_heads, step.num_groups = d.num_groups, step.head_dim = d.head_dim;
    for (step.layer = 0; step.layer < d.num_layers; ++step.layer) {
        const Layer& layer = static_cast<const Layer*>(layers)[step.layer];
        norm(hidden, layer.input_norm, normed.get(), d.width, 1, d.width);
        segue_product(kNothing, normed.get(), address(layer.qkv), address(layer.qkv_bias), nullptr, qkv.get(),
                      num_tokens, qkv_width, d.width, num_threads);
        if (layer.query_norm) {
            BFloat16* keys = qkv.get() + heads_width;
            norm(qkv.get(), layer.query_norm, qkv.get(), qkv_width, num_heads, d.head_dim);
            norm(keys, layer.key_norm, keys, qkv_width, d.num_key_heads, d.head_dim);
        }
        segue_rotate(kIsBf16, qkv.get(), cosines, sines, num_tokens, qkv_width, num_heads + d.num_key_heads, d.head_dim,
                     num_threads);
        segue_attend(kIsBf16, &step, scale, tables, num_threads);
        segue_product(kAdd, attended.get(), address(layer.output), address(layer.output_bias), hidden, hidden,
                      num_tokens, d.width, heads_width, num_threads);
        norm(hidden, layer.mlp_norm, normed.get(), d.width, 1, d.width);
        segue_product(kGate, normed.get(), address(layer.gate_up), address(layer.gate_up_bias), nullptr, gated.get(),
                      num_tokens, 2 * d.mlp_width, d.width, num_threads);
        segue_product(kAdd, gated.get(), address(layer.down), address(layer.down_bias), hidden, hidden, num_tokens,
                      d.width, d.mlp_width, num_threads);
    }
}
