// The layers of a decoder one after the other, as workers/models/fused_cpu.py computes them call by call.

#include <memory>

#include "attention.h"
#include "kernels.h"
#include "products.h"
#include "small.h"

using namespace segue;

extern "C" void segue_decode(const void* decoder, const void* layers, const void* tables, void* hidden,
                             const void* cosines, const void* sines, int64_t num_tokens, float scale, float epsilon,
                             int num_threads) {
    const auto& d = *static_cast<const Decoder*>(decoder);
    const int64_t num_heads = d.num_key_heads * d.num_groups, all_heads = num_heads + 2 * d.num_key_heads;
    const int64_t heads_width = num_heads * d.head_dim, qkv_width = all_heads * d.head_dim;
    const auto room = [&](int64_t width) { return std::unique_ptr<BFloat16[]>(new BFloat16[num_tokens * width]); };
    const auto normed = room(d.width), qkv = room(qkv_width), attended = room(heads_width), gated = room(d.mlp_width);
    auto* const sums = static_cast<BFloat16*>(hidden);
    auto* const keys = qkv.get() + heads_width;
    const auto numbers = [](int64_t address) { return reinterpret_cast<const BFloat16*>(address); };
    const Rotation<BFloat16> rotation{qkv.get(),
                                      static_cast<const BFloat16*>(cosines),
                                      static_cast<const BFloat16*>(sines),
                                      num_tokens,
                                      qkv_width,
                                      num_heads + d.num_key_heads,
                                      d.head_dim};
    Step step{};
    step.query = reinterpret_cast<int64_t>(qkv.get());
    step.key = reinterpret_cast<int64_t>(keys);
    step.value = reinterpret_cast<int64_t>(keys + d.num_key_heads * d.head_dim);
    step.out = reinterpret_cast<int64_t>(attended.get());
    step.query_head = step.key_head = step.value_head = d.head_dim;
    step.query_token = step.key_token = step.value_token = qkv_width;
    step.num_key_heads = d.num_key_heads, step.num_groups = d.num_groups, step.head_dim = d.head_dim;
    const auto& of_step = *static_cast<const Tables*>(tables);
    const Form form{scale, 0.0f, nullptr};
    const auto attention = of_step.by_tiles ? attention_by_tiles(step, form, of_step, num_threads)
                                            : attention_by_vectors(true, step, form, of_step, num_threads);
    Team::run(num_threads, [&](Member& member) {
        const auto norm = [&](const BFloat16* from, int64_t weight, BFloat16* to, int64_t stride, int64_t num_rows,
                              int64_t width) {
            rms_norm<BFloat16>(member, {from, numbers(weight), to, num_tokens, stride, num_rows, width, epsilon});
            member.wait();
        };
        const auto multiply = [&](After after, const BFloat16* from, int64_t packed, int64_t bias, BFloat16* to,
                                  int64_t num_outputs, int64_t num_inputs) {
            segue::multiply(member, {after, from, numbers(packed), numbers(bias), after == kAdd ? to : nullptr, to,
                                     num_tokens, num_outputs, num_inputs});
            member.wait();
        };
        for (int64_t number = 0; number < d.num_layers; ++number) {
            const Layer& layer = static_cast<const Layer*>(layers)[number];
            norm(sums, layer.input_norm, normed.get(), d.width, 1, d.width);
            multiply(kNothing, normed.get(), layer.qkv, layer.qkv_bias, qkv.get(), qkv_width, d.width);
            if (layer.query_norm) {
                norm(qkv.get(), layer.query_norm, qkv.get(), qkv_width, num_heads, d.head_dim);
                norm(keys, layer.key_norm, keys, qkv_width, d.num_key_heads, d.head_dim);
            }
            rotate(member, rotation);
            member.wait();
            attention->attend(member, number);
            member.wait();
            multiply(kAdd, attended.get(), layer.output, layer.output_bias, sums, d.width, heads_width);
            norm(sums, layer.mlp_norm, normed.get(), d.width, 1, d.width);
            multiply(kGate, normed.get(), layer.gate_up, layer.gate_up_bias, gated.get(), 2 * d.mlp_width, d.width);
            multiply(kAdd, gated.get(), layer.down, layer.down_bias, sums, d.width, d.mlp_width);
        }
    });
}
