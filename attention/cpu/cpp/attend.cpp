// Attention by vectors, in bf16 or fp32 and for heads of any width, and the function that one layer calls.

#include "attend.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace segue {
namespace {

constexpr int64_t kBlockKeys = 64;  // staged in fp32 at a time: 16 KiB each of keys and values at a width of 64

// Further keys of one query: `sum`, `weight` and `highest` are what it has seen so far. Up to 15 keys behind the last one
// are read, and do not count.
template <int64_t kVectors>
inline void attend_keys(const float* query, const float* keys, const float* values, int64_t num_keys,
                        int64_t num_vectors, float softcap, float* sum, float& weight, float& highest) {
    const int64_t vectors = kVectors ? kVectors : num_vectors, width = vectors * kLanes;
    Floats scores[kBlockKeys / kLanes];
    Floats tops = all(highest);
    const int64_t num_groups = (num_keys + kLanes - 1) / kLanes;
    for (int64_t group = 0; group < num_groups; ++group) {
        Floats products[kLanes];
        for (int64_t k = 0; k < kLanes; ++k) {
            const float* key = keys + (group * kLanes + k) * width;
            products[k] = load16(query) * load16(key);
            for (int64_t i = 1; i < vectors; ++i) products[k] += load16(query + i * kLanes) * load16(key + i * kLanes);
        }
        scores[group] = sums_of(products);
        if (softcap > 0.0f) scores[group] = tanh_of(scores[group] * (1.0f / softcap)) * softcap;
        if (const int64_t left = num_keys - group * kLanes; left < kLanes) {
            const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            scores[group] = lane < static_cast<int32_t>(left) ? scores[group] : all(kNever);
        }
        tops = higher_of(tops, scores[group]);
    }
    const float top = highest_of(tops), kept = exp_of(highest - top);
    highest = top;
    Floats total{};
    for (int64_t group = 0; group < num_groups; ++group) {
        scores[group] = exp_of(scores[group] - top);
        total += scores[group];
    }
    weight = weight * kept + sum_of(total);
    const float* weights = reinterpret_cast<const float*>(scores);
    if constexpr (kVectors > 0) {
        Floats even[kVectors], odd[kVectors];
        for (int64_t i = 0; i < kVectors; ++i) even[i] = load16(sum + i * kLanes) * kept, odd[i] = Floats{};
        int64_t k = 0;
        for (; k + 1 < num_keys; k += 2)
            for (int64_t i = 0; i < kVectors; ++i) {
                even[i] += load16(values + k * width + i * kLanes) * weights[k];
                odd[i] += load16(values + (k + 1) * width + i * kLanes) * weights[k + 1];
            }
        if (k < num_keys)
            for (int64_t i = 0; i < kVectors; ++i) even[i] += load16(values + k * width + i * kLanes) * weights[k];
        for (int64_t i = 0; i < kVectors; ++i) store16(sum + i * kLanes, even[i] + odd[i]);
    } else {
        for (int64_t i = 0; i < width; i += kLanes) {
            Floats sums = load16(sum + i) * kept;
            for (int64_t k = 0; k < num_keys; ++k) sums += load16(values + k * width + i) * weights[k];
            store16(sum + i, sums);
        }
    }
}

// Rows in fp32, each filled up to whole vectors. Where the number of vectors is known, it is `kVectors`, and rows are
// full.
template <int64_t kVectors, typename Number>
inline void lay(const Number* from, int64_t stride, int64_t num_rows, int64_t width, int64_t num_vectors, float* to) {
    for (int64_t row = 0; row < num_rows; ++row, from += stride)
        if constexpr (kVectors > 0) {
            for (int64_t i = 0; i < kVectors; ++i, to += kLanes) store16(to, load16(from + i * kLanes));
        } else {
            for (int64_t i = 0; i < num_vectors; ++i, to += kLanes)
                store16(to, load_some(from + i * kLanes, width - i * kLanes));
        }
}

// `kVectors`: the vectors of a head, where their number is known.
template <typename Number_, int64_t kVectors>
class VectorKeys {
   public:
    using Number = Number_;
    static constexpr int64_t kAtOnce = kBlockKeys;

    explicit VectorKeys(int64_t width)
        : width_(width),
          vectors_(kVectors ? kVectors : (width + kLanes - 1) / kLanes),
          keys_((kBlockKeys + kLanes) * vectors_),
          values_(keys_.size()) {}

    static int64_t tokens_at_once(const Step&) { return 16; }

    void begin(const Step& step, const Chunk& chunk) {
        const int64_t groups = step.num_groups, padded = vectors_ * kLanes;
        num_rows_ = (chunk.stop - chunk.start) * groups;
        queries_.resize(std::max<size_t>(queries_.size(), num_rows_ * vectors_));
        is_scaled_ = false;
        for (int64_t token = chunk.start; token < chunk.stop; ++token) {
            const Number* from = reinterpret_cast<const Number*>(step.query) + token * step.query_token;
            lay<kVectors>(from + chunk.head * groups * step.query_head, step.query_head, groups, width_, vectors_,
                          queries_[0].numbers + (token - chunk.start) * groups * padded);
        }
    }

    void stage(const Number* key, int64_t key_stride, const Number* value, int64_t value_stride, int64_t num_keys,
               int64_t at) {
        lay<kVectors>(key, key_stride, num_keys, width_, vectors_, keys_[at * vectors_].numbers);
        lay<kVectors>(value, value_stride, num_keys, width_, vectors_, values_[at * vectors_].numbers);
    }

    template <typename Hidden, typename Visible>
    void attend(const Form& form, int64_t, Seen& seen, Hidden&& hidden, Visible&& visible) {
        if (!is_scaled_)
            for (int64_t i = 0; i < num_rows_ * vectors_ * kLanes; ++i) queries_[0].numbers[i] *= form.scale;
        is_scaled_ = true;
        for (int64_t row = 0; row < num_rows_; ++row) {
            const int64_t first = hidden(row), num_keys = visible(row) - first;
            if (num_keys > 0)
                attend_keys<kVectors>(queries_[row * vectors_].numbers, keys_[first * vectors_].numbers,
                                      values_[first * vectors_].numbers, num_keys, vectors_, form.softcap,
                                      seen.sums(row), seen.totals[row], seen.highest[row]);
        }
    }

    void end() {}

   private:
    int64_t width_, vectors_, num_rows_ = 0;
    bool is_scaled_ = false;
    std::vector<Aligned> queries_, keys_, values_;
};

template <typename Number>
std::unique_ptr<Attention> by_vectors(const Step& step, const Form& form, const Tables& tables, int num_threads) {
    if (step.head_dim == 64)
        return std::make_unique<AttentionBy<VectorKeys<Number, 4>>>(step, form, tables, num_threads);
    if (step.head_dim == 128)
        return std::make_unique<AttentionBy<VectorKeys<Number, 8>>>(step, form, tables, num_threads);
    return std::make_unique<AttentionBy<VectorKeys<Number, 0>>>(step, form, tables, num_threads);
}

}  // namespace

std::unique_ptr<Attention> attention_by_vectors(bool is_bf16, const Step& step, const Form& form, const Tables& tables,
                                                int num_threads) {
    return (is_bf16 ? by_vectors<BFloat16> : by_vectors<float>)(step, form, tables, num_threads);
}

}  // namespace segue

using namespace segue;

extern "C" void segue_attend(int is_bf16, const void* step, float scale, float softcap, const void* sinks,
                             const void* tables, int num_threads) {
    const auto& of_layer = *static_cast<const Step*>(step);
    const auto& of_step = *static_cast<const Tables*>(tables);
    const Form form{scale, softcap, static_cast<const float*>(sinks)};
    const auto attention = of_step.by_tiles ? attention_by_tiles(of_layer, form, of_step, num_threads)
                                            : attention_by_vectors(is_bf16, of_layer, form, of_step, num_threads);
    Team::run(threads_for(attention->num_numbers(), num_threads),
              [&](Member& member) { attention->attend(member, of_layer.layer); });
}
