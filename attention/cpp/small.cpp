// Norms, rotary positions, and what is wanted of logits: each in one pass over its numbers.

#include "kernels.h"
#include "numbers.h"

namespace segue {
namespace {

// Of each token `num_rows` rows, one after the other.
template <typename Number>
void rms_norm(const Number* inputs, const Number* weight, Number* outputs, int64_t num_tokens, int64_t token_stride,
              int64_t num_rows, int64_t width, float epsilon, int num_threads) {
#pragma omp parallel for num_threads(threads_for(num_tokens * num_rows * width, num_threads)) schedule(static)
    for (int64_t token = 0; token < num_tokens; ++token)
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t at = token * token_stride + row * width;
            const Number* from = inputs + at;
            Floats squares{};
            for (int64_t i = 0; i < width; i += kLanes) {
                const Floats numbers = load_some(from + i, width - i);
                squares += numbers * numbers;
            }
            const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + epsilon);
            for (int64_t i = 0; i < width; i += kLanes) {
                const Floats numbers = load_some(from + i, width - i) * scale * load_some(weight + i, width - i);
                store_some(outputs + at + i, numbers, width - i);
            }
        }
}

template <typename Number>
void rotate(Number* heads, const Number* cosines, const Number* sines, int64_t num_tokens, int64_t token_stride,
            int64_t num_heads, int64_t head_dim, int num_threads) {
    const int64_t middle = head_dim / 2;
#pragma omp parallel for num_threads(threads_for(num_tokens * num_heads * head_dim, num_threads)) schedule(static)
    for (int64_t token = 0; token < num_tokens; ++token) {
        const Number* cosine = cosines + token * head_dim;
        const Number* sine = sines + token * head_dim;
        for (int64_t head = 0; head < num_heads; ++head) {
            Number* low = heads + token * token_stride + head * head_dim;
            Number* high = low + middle;
            for (int64_t i = 0; i < middle; i += kLanes) {
                const int64_t count = middle - i;
                const Floats a = load_some(low + i, count), b = load_some(high + i, count);
                store_some(low + i, a * load_some(cosine + i, count) - b * load_some(sine + i, count), count);
                store_some(high + i,
                           b * load_some(cosine + middle + i, count) + a * load_some(sine + middle + i, count), count);
            }
        }
    }
}

// Of each row of logits the largest, the first place where it is, and, where wanted, the logarithm of the sum of all
// exponentials.
template <typename Number>
void summarise(const Number* logits, int64_t num_rows, int64_t width, float* highest, int64_t* most_likely,
               float* log_totals, int num_threads) {
#pragma omp parallel for num_threads(threads_for(num_rows* width, num_threads)) schedule(static)
    for (int64_t row = 0; row < num_rows; ++row) {
        const Number* from = logits + row * width;
        const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        Floats tops = all(kNever);
        Ints places = lanes, is_nan{};
        const int64_t whole = width - width % kLanes;
        for (int64_t i = 0; i < whole; i += kLanes) {
            const Floats numbers = load16(from + i);
            const auto is_higher = numbers > tops;
            tops = is_higher ? numbers : tops;
            places = is_higher ? lanes + static_cast<int32_t>(i) : places;
            is_nan |= numbers != numbers;
        }
        float top = kNever;
        int64_t place = 0;
        bool has_nan = false;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            has_nan |= is_nan[lane] != 0;
            if (tops[lane] > top || (tops[lane] == top && places[lane] < place)) top = tops[lane], place = places[lane];
        }
        for (int64_t i = whole; i < width; ++i) {
            const float number = load_some(from + i, 1)[0];
            has_nan |= number != number;
            if (number > top) top = number, place = i;
        }
        highest[row] = has_nan ? std::numeric_limits<float>::quiet_NaN() : top;
        most_likely[row] = place;
        if (!log_totals) continue;
        Floats totals{};
        for (int64_t i = 0; i < whole; i += kLanes) totals += exp_of(load16(from + i) - top);
        float total = sum_of(totals);
        for (int64_t i = whole; i < width; ++i) total += exp_of(load_some(from + i, 1)[0] - top);
        log_totals[row] = top + std::log(total);
    }
}

}  // namespace
}  // namespace segue

using namespace segue;

extern "C" {

void segue_rms_norm(int is_bf16, const void* inputs, const void* weight, void* outputs, int64_t num_tokens,
                    int64_t token_stride, int64_t num_rows, int64_t width, float epsilon, int num_threads) {
    if (is_bf16)
        rms_norm(static_cast<const BFloat16*>(inputs), static_cast<const BFloat16*>(weight),
                 static_cast<BFloat16*>(outputs), num_tokens, token_stride, num_rows, width, epsilon, num_threads);
    else
        rms_norm(static_cast<const float*>(inputs), static_cast<const float*>(weight), static_cast<float*>(outputs),
                 num_tokens, token_stride, num_rows, width, epsilon, num_threads);
}

void segue_rotate(int is_bf16, void* heads, const void* cosines, const void* sines, int64_t num_tokens,
                  int64_t token_stride, int64_t num_heads, int64_t head_dim, int num_threads) {
    if (is_bf16)
        rotate(static_cast<BFloat16*>(heads), static_cast<const BFloat16*>(cosines),
               static_cast<const BFloat16*>(sines), num_tokens, token_stride, num_heads, head_dim, num_threads);
    else
        rotate(static_cast<float*>(heads), static_cast<const float*>(cosines), static_cast<const float*>(sines),
               num_tokens, token_stride, num_heads, head_dim, num_threads);
}

void segue_summarise(int is_bf16, const void* logits, int64_t num_rows, int64_t width, float* highest,
                     int64_t* most_likely, float* log_totals, int num_threads) {
    if (is_bf16)
        summarise(static_cast<const BFloat16*>(logits), num_rows, width, highest, most_likely, log_totals, num_threads);
    else
        summarise(static_cast<const float*>(logits), num_rows, width, highest, most_likely, log_totals, num_threads);
}

}  // extern "C"
