// Attention by tiles, in bf16 and for heads with a multiple of 32 numbers.

#include <algorithm>
#include <cstdlib>

#include "attend.h"
#include "tiles.h"

namespace segue {

#ifdef SEGUE_TILES

namespace {

constexpr float kLowest = -200.0f;  // 2 to this power counts as 0

struct alignas(64) Line {
    BFloat16 numbers[kTileNumbers];
};

// Turns 16 rows of 16 pairs of numbers into columns.
inline void transpose(const BFloat16* from, int64_t stride, BFloat16* to) {
    __m512i rows[kTile], pairs[kTile];
    for (int64_t i = 0; i < kTile; ++i) rows[i] = _mm512_loadu_si512(from + i * stride);
    for (int64_t i = 0; i < kTile; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int64_t i = 0; i < kTile; i += 4)
        for (int64_t j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
        }
    for (int64_t j = 0; j < 4; ++j) {
        const __m512i a = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xdd);
        _mm512_store_si512(to + j * kTileNumbers, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_store_si512(to + (4 + j) * kTileNumbers, _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_store_si512(to + (8 + j) * kTileNumbers, _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_store_si512(to + (12 + j) * kTileNumbers, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
}

// Keys as columns: for each 32 keys and each 32 dimensions 16 keys, then the other 16. What lies behind the last key
// does not matter: nobody sees its scores.
inline void lay_keys(const BFloat16* from, int64_t stride, int64_t num_keys, int64_t width, BFloat16* to) {
    for (int64_t group = 0; group < num_keys; group += kSums)
        for (int64_t dim = 0; dim < width; dim += kTileNumbers)
            for (int64_t key = group; key < group + kSums; key += kTile, to += kTile * kTileNumbers)
                transpose(from + key * stride + dim, stride, to);
}

// Dimensions as columns: for each 32 dimensions and each 32 keys 16 dimensions, then the other 16. Zeros lie behind the
// last key, since what nobody sees is multiplied as well, by 0.
inline void lay_values(const BFloat16* from, int64_t stride, int64_t num_keys, int64_t width, BFloat16* to) {
    alignas(64) uint16_t places[2][kTileNumbers];
    for (uint16_t i = 0; i < kTile; ++i)
        for (uint16_t half = 0; half < 2; ++half)
            places[half][2 * i] = half * kTile + i, places[half][2 * i + 1] = half * kTile + i + kTileNumbers;
    const __m512i low = _mm512_load_si512(places[0]), high = _mm512_load_si512(places[1]);
    for (int64_t dim = 0; dim < width; dim += kTileNumbers)
        for (int64_t group = 0; group < num_keys; group += kSums, to += kStepNumbers)
            for (int64_t pair = 0; pair < kTile; ++pair) {
                const int64_t key = group + 2 * pair;
                const BFloat16* numbers = from + key * stride + dim;
                const __m512i first = key < num_keys ? _mm512_loadu_si512(numbers) : __m512i{};
                const __m512i second = key + 1 < num_keys ? _mm512_loadu_si512(numbers + stride) : __m512i{};
                BFloat16* row = to + pair * kTileNumbers;
                _mm512_store_si512(row, _mm512_permutex2var_epi16(first, low, second));
                _mm512_store_si512(row + kTile * kTileNumbers, _mm512_permutex2var_epi16(first, high, second));
            }
}

// Lane i of the result is the highest number of vector i.
inline Floats highest_of_each(Floats (&v)[kLanes]) {
    return combine_each(v, [](Floats a, Floats b) { return higher_of(a, b); });
}

template <typename Function>
inline void with_high(int64_t num_rows, Function&& function) {
    num_rows > kTile ? function(std::true_type{}) : function(std::false_type{});
}

class TiledKeys {
   public:
    using Number = BFloat16;
    static constexpr int64_t kAtOnce = 256;

    explicit TiledKeys(int64_t width)
        : width_(width),
          keys_(kAtOnce * width / kTileNumbers),
          values_(keys_.size()),
          laid_keys_(keys_.size()),
          laid_values_(keys_.size()),
          weights_(kSums * kWeightStride / kTileNumbers),
          scores_(kSums * kScoreStride / kLanes),
          products_(kSums * kSums / kLanes) {}

    // So many rows share one layout of the keys.
    static int64_t tokens_at_once(const Step& step) { return std::max<int64_t>(1, kRows / step.num_groups); }

    void begin(const Step& step, const Chunk& chunk) {
        const int64_t groups = step.num_groups;
        num_rows_ = (chunk.stop - chunk.start) * groups;
        const size_t num_lines = (num_rows_ + kSums - 1) / kSums * kSums * width_ / kTileNumbers;
        if (queries_.size() < num_lines) queries_.resize(num_lines);
        for (int64_t row = 0; row < num_rows_; ++row) {
            const int64_t head = chunk.head * groups + row % groups, token = chunk.start + row / groups;
            const auto* query = reinterpret_cast<const BFloat16*>(step.query);
            std::memcpy(queries_[0].numbers + row * width_, query + head * step.query_head + token * step.query_token,
                        width_ * sizeof *query);
        }
    }

    void stage(const BFloat16* key, int64_t key_stride, const BFloat16* value, int64_t value_stride, int64_t num_keys,
               int64_t at) {
        if (num_keys == kAtOnce) {  // they fill all places: no copy is needed before they are laid out
            from_keys_ = key, key_stride_ = key_stride, from_values_ = value, value_stride_ = value_stride;
            return;
        }
        from_keys_ = keys_[0].numbers, from_values_ = values_[0].numbers, key_stride_ = value_stride_ = width_;
        BFloat16 *to_key = keys_[0].numbers + at * width_, *to_value = values_[0].numbers + at * width_;
        for (; num_keys > 0;
             --num_keys, key += key_stride, value += value_stride, to_key += width_, to_value += width_) {
            std::memcpy(to_key, key, width_ * sizeof *key);
            std::memcpy(to_value, value, width_ * sizeof *value);
        }
    }

    template <typename Hidden, typename Visible>
    void attend(const Form& form, int64_t num_keys, Seen& seen, Hidden&&, Visible&& visible) {
        BFloat16 *keys = laid_keys_[0].numbers, *values = laid_values_[0].numbers, *weights = weights_[0].numbers;
        float *scores = scores_[0].numbers, *products = products_[0].numbers;
        const int64_t num_groups = (num_keys + kSums - 1) / kSums;
        lay_keys(from_keys_, key_stride_, num_keys, width_, keys);
        lay_values(from_values_, value_stride_, num_keys, width_, values);
        for (int64_t first = 0; first < num_rows_; first += kSums) {
            const int64_t rows = std::min(kSums, num_rows_ - first);
            const int64_t groups = (visible(first + rows - 1) + kSums - 1) / kSums;  // no row sees more than the last
            if (!groups) continue;
            tiles_.set(rows);
            with_high(rows, [&](auto has_high) {
                const BFloat16* queries = queries_[0].numbers + first * width_;
                for (int64_t group = 0; group < groups; ++group) {
                    zero_sums();
                    add_products<has_high>(queries, queries + kTile * width_, width_ * 2, keys + group * kSums * width_,
                                           width_ / kTileNumbers, {}, [] {});
                    store_sums<has_high>(scores + group * kSums, kScoreStride);
                }
            });
            float kept[kSums];
            for (int64_t low = 0; low < rows; low += kTile)
                weigh(form.scale * kPerBit, first + low, std::min(kTile, rows - low), groups * kSums, low, seen, visible,
                      kept + low);
            with_high(rows, [&](auto has_high) {
                for (int64_t dim = 0; dim < width_; dim += kSums) {
                    zero_sums();
                    add_products<has_high>(weights, weights + kTile * kWeightStride, kWeightStride * 2,
                                           values + dim * num_groups * kSums, groups, {}, [] {});
                    store_sums<has_high>(products, kSums);
                    for (int64_t row = 0; row < rows; ++row) {
                        float* sum = seen.sums(first + row) + dim;
                        for (int64_t i = 0; i < kSums; i += kLanes)
                            store16(sum + i, load16(sum + i) * kept[row] + load16(products + row * kSums + i));
                    }
                }
            });
        }
    }

    void end() { tiles_.release(); }

   private:
    static constexpr int64_t kRows = 384;
    static constexpr int64_t kScoreStride = kAtOnce + kTile;  // a power of two would use few sets of the cache
    static constexpr int64_t kWeightStride = kAtOnce + kTileNumbers;

    // Turns the scores of up to 16 rows, from `row` on, into weights, with zeros up to `end` for keys that a row does
    // not see. `kept`: the factor of each row's earlier sums.
    template <typename Visible>
    void weigh(float scale, int64_t row, int64_t num_rows, int64_t end, int64_t low, Seen& seen, Visible&& visible,
               float* kept) {
        Floats some[kLanes], top = all(kNever), total{};
        for (int64_t i = 0; i < kLanes; ++i) {
            some[i] = all(kNever);
            if (i >= num_rows) continue;
            const float* scores = scores_[0].numbers + (low + i) * kScoreStride;
            const int64_t num_keys = visible(row + i), whole = num_keys / kLanes * kLanes;
            for (int64_t key = 0; key < whole; key += kLanes) some[i] = higher_of(some[i], load16(scores + key));
            if (num_keys > whole) some[i] = higher_of(some[i], load_first(scores + whole, num_keys - whole, kNever));
        }
        float highest[kLanes] = {}, tops[kLanes];
        std::copy_n(&seen.highest[row], num_rows, highest);
        top = higher_of(highest_of_each(some) * (scale / kPerBit), load16(highest));
        const Floats change = (load16(highest) - top) * kPerBit;
        const Floats left = power_of_two(higher_of(all(kLowest), change));
        store16(tops, top * kPerBit);
        for (int64_t i = 0; i < kLanes; ++i) {
            some[i] = Floats{};
            if (i >= num_rows) continue;
            const float* scores = scores_[0].numbers + (low + i) * kScoreStride;
            BFloat16* weights = weights_[0].numbers + (low + i) * kWeightStride;
            const int64_t num_keys = visible(row + i), whole = num_keys / (2 * kLanes) * 2 * kLanes;
            const Floats least = all(tops[i]);
            Floats odd{};
            for (int64_t key = 0; key < whole; key += 2 * kLanes) {
                const Floats a = power_of_two(load16(scores + key) * scale - least);
                const Floats b = power_of_two(load16(scores + key + kLanes) * scale - least);
                some[i] += a, odd += b;
                store32(weights + key, a, b);
            }
            for (int64_t key = whole; key < end; key += 2 * kLanes) {
                const auto weight = [&](int64_t from) {
                    return power_of_two(load_first(scores + from, num_keys - from, kNever) * scale - least);
                };
                const Floats a = weight(key), b = weight(key + kLanes);
                some[i] += a, odd += b;
                store32(weights + key, a, b);
            }
            some[i] += odd;
        }
        float totals[kLanes] = {};
        std::copy_n(&seen.totals[row], num_rows, totals);
        total = load16(totals) * left + sums_of(some);
        store16(totals, total);
        std::copy_n(totals, num_rows, &seen.totals[row]);
        store16(highest, top);
        std::copy_n(highest, num_rows, &seen.highest[row]);
        store16(kept, left);
    }

    int64_t width_, num_rows_ = 0;
    const BFloat16 *from_keys_ = nullptr, *from_values_ = nullptr;
    int64_t key_stride_ = 0, value_stride_ = 0;
    Tiles tiles_;
    std::vector<Line> queries_, keys_, values_, laid_keys_, laid_values_, weights_;
    std::vector<Aligned> scores_, products_;
};

}  // namespace

std::unique_ptr<Attention> attention_by_tiles(const Step& step, const Form& form, const Tables& tables,
                                              int num_threads) {
    return std::make_unique<AttentionBy<TiledKeys>>(step, form, tables, num_threads);
}

#else

std::unique_ptr<Attention> attention_by_tiles(const Step&, const Form&, const Tables&, int) { std::abort(); }

#endif

}  // namespace segue
