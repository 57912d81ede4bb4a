// Norms and rotary positions as a team of threads computes them; the caller waits before it uses the results.

#pragma once

#include "numbers.h"
#include "team.h"

namespace segue {

// Each token has `num_rows` rows of `width` numbers, one after the other.
template <typename Number>
struct Norm {
    const Number *inputs, *weight;
    Number* outputs;
    int64_t num_tokens, token_stride, num_rows, width;
    float epsilon;
};

template <typename Number>
struct Rotation {
    Number* heads;
    const Number *cosines, *sines;
    int64_t num_tokens, token_stride, num_heads, head_dim;
};

template <typename Number>
void rms_norm(Member& member, const Norm<Number>& norm) {
    const int64_t width = norm.width;
    member.share(norm.num_tokens * norm.num_rows, [&](int64_t start, int64_t stop) {
        for (int64_t item = start; item < stop; ++item) {
            const int64_t at = item / norm.num_rows * norm.token_stride + item % norm.num_rows * width;
            const Number* from = norm.inputs + at;
            Floats squares{};
            for (int64_t i = 0; i < width; i += kLanes) {
                const Floats numbers = load_some(from + i, width - i);
                squares += numbers * numbers;
            }
            const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + norm.epsilon);
            for (int64_t i = 0; i < width; i += kLanes) {
                const Floats numbers = load_some(from + i, width - i) * scale * load_some(norm.weight + i, width - i);
                store_some(norm.outputs + at + i, numbers, width - i);
            }
        }
    });
}

template <typename Number>
void rotate(Member& member, const Rotation<Number>& rotation) {
    const int64_t middle = rotation.head_dim / 2;
    member.share(rotation.num_tokens, [&](int64_t start, int64_t stop) {
        for (int64_t token = start; token < stop; ++token) {
            const Number* cosine = rotation.cosines + token * rotation.head_dim;
            const Number* sine = rotation.sines + token * rotation.head_dim;
            Number* low = rotation.heads + token * rotation.token_stride;
            for (int64_t head = 0; head < rotation.num_heads; ++head, low += rotation.head_dim) {
                Number* high = low + middle;
                for (int64_t i = 0; i < middle; i += kLanes) {
                    const int64_t count = middle - i;
                    const Floats a = load_some(low + i, count), b = load_some(high + i, count);
                    const Floats c = load_some(cosine + i, count), d = load_some(cosine + middle + i, count);
                    const Floats e = load_some(sine + i, count), f = load_some(sine + middle + i, count);
                    store_some(low + i, a * c - b * e, count);
                    store_some(high + i, b * d + a * f, count);
                }
            }
        }
    });
}

}  // namespace segue
