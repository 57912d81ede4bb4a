// Norms, rotary positions, and the summary of logits: each in one pass over its numbers.

#include "small.h"

#include <algorithm>

#include "kernels.h"

namespace segue {
namespace {

constexpr int64_t kSummedAtOnce = 16 * kLanes;  // numbers

// The largest number of a row, its first place, and, if asked for, the logarithm of the sum of all exponentials of
// numbers less the largest one.
template <typename Number>
void summarise(const Number* logits, int64_t width, float* highest, int64_t* most_likely, float* log_total) {
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Floats tops = all(kNever);
    Ints places = lanes, is_nan{};
    const int64_t whole = width - width % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Floats numbers = load16(logits + i);
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
        const float number = load_some(logits + i, 1)[0];
        has_nan |= number != number;
        if (number > top) top = number, place = i;
    }
    *highest = has_nan ? std::numeric_limits<float>::quiet_NaN() : top;
    *most_likely = place;
    if (!log_total) return;
    double total = 0.0;  // a float would lose what is small beside the sum so far: thousands of numbers, all of one sign
    for (int64_t i = 0; i < whole; i += kSummedAtOnce) {
        Floats some{};
        for (int64_t j = i; j < std::min(whole, i + kSummedAtOnce); j += kLanes) some += exp_of(load16(logits + j) - top);
        total += sum_of(some);
    }
    for (int64_t i = whole; i < width; ++i) total += exp_of(load_some(logits + i, 1)[0] - top);
    *log_total = static_cast<float>(std::log(total));
}

template <typename Number>
void summarise_all(const void* logits, int64_t num_rows, int64_t width, float* highest, int64_t* most_likely,
                   float* log_totals, int num_threads) {
    Team::run(threads_for(num_rows * width, num_threads), [&](Member& member) {
        member.share(num_rows, [&](int64_t start, int64_t stop) {
            for (int64_t row = start; row < stop; ++row)
                summarise(static_cast<const Number*>(logits) + row * width, width, highest + row, most_likely + row,
                          log_totals ? log_totals + row : nullptr);
        });
    });
}

template <typename Number>
void norm_all(const void* inputs, const void* weight, void* outputs, int64_t num_tokens, int64_t token_stride,
              int64_t num_rows, int64_t width, float epsilon, int num_threads) {
    const Norm<Number> norm{static_cast<const Number*>(inputs),
                            static_cast<const Number*>(weight),
                            static_cast<Number*>(outputs),
                            num_tokens,
                            token_stride,
                            num_rows,
                            width,
                            epsilon};
    Team::run(threads_for(num_tokens * num_rows * width, num_threads), [&](Member& member) { rms_norm(member, norm); });
}

template <typename Number>
void rotate_all(void* heads, const void* cosines, const void* sines, int64_t num_tokens, int64_t token_stride,
                int64_t num_heads, int64_t head_dim, int num_threads) {
    const Rotation<Number> rotation{static_cast<Number*>(heads),
                                    static_cast<const Number*>(cosines),
                                    static_cast<const Number*>(sines),
                                    num_tokens,
                                    token_stride,
                                    num_heads,
                                    head_dim};
    const int64_t size = num_tokens * num_heads * head_dim;
    Team::run(threads_for(size, num_threads), [&](Member& member) { rotate(member, rotation); });
}

}  // namespace
}  // namespace segue

using namespace segue;

extern "C" {

void segue_rms_norm(int is_bf16, const void* inputs, const void* weight, void* outputs, int64_t num_tokens,
                    int64_t token_stride, int64_t num_rows, int64_t width, float epsilon, int num_threads) {
    const auto norm = is_bf16 ? norm_all<BFloat16> : norm_all<float>;
    norm(inputs, weight, outputs, num_tokens, token_stride, num_rows, width, epsilon, num_threads);
}

void segue_rotate(int is_bf16, void* heads, const void* cosines, const void* sines, int64_t num_tokens,
                  int64_t token_stride, int64_t num_heads, int64_t head_dim, int num_threads) {
    const auto rotate = is_bf16 ? rotate_all<BFloat16> : rotate_all<float>;
    rotate(heads, cosines, sines, num_tokens, token_stride, num_heads, head_dim, num_threads);
}

void segue_summarise(int is_bf16, const void* logits, int64_t num_rows, int64_t width, float* highest,
                     int64_t* most_likely, float* log_totals, int num_threads) {
    const auto summarise = is_bf16 ? summarise_all<BFloat16> : summarise_all<float>;
    summarise(logits, num_rows, width, highest, most_likely, log_totals, num_threads);
}

}  // extern "C"
