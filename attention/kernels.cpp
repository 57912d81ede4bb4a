// What a step does besides its products and its large blocks of attention, each in one pass over its numbers.
//
// Compiled on the machine it runs on by attention/kernels.py, which says what every argument is; torch's own operations
// are the oracle. Numbers are read and written as bf16 or fp32, and computed in fp32. NaN and infinities are kept.
//
// Threads are those of torch: linked against no OpenMP of its own, the library finds the one torch has loaded.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int64_t kBlockKeys = 64;    // staged in fp32 at a time: 16 KiB each of keys and values at a width of 64
constexpr int64_t kChunkTokens = 16;  // of a run, that share what is staged

struct BFloat16 {
    uint16_t bits;
};

inline float load(float number) { return number; }

inline float load(BFloat16 number) {
    const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float& to, float number) { to = number; }

// To nearest, ties to even.
inline void store(BFloat16& to, float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<uint16_t>(number == number ? rounded : 0x7fc0u);
}

// Of numbers up to 0, within 2 units in the last place; 0 and less than the smallest normal number are both harmless.
inline float exp_of(float number) {
    constexpr float kLog2E = 1.44269504088896341f;
    const float clamped = number < -87.0f ? -87.0f : number;  // NaN stays
    const float whole = std::floor(clamped * kLog2E + 0.5f);
    float rest = clamped - whole * 0.693359375f;
    rest -= whole * -2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    const int32_t exponent = (static_cast<int32_t>(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return number < -87.0f ? 0.0f : power * scale;
}

template <typename Number>
void rms_norm(const Number* inputs, const Number* weight, Number* outputs, int64_t num_tokens, int64_t width,
              float epsilon, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t token = 0; token < num_tokens; ++token) {
        const Number* from = inputs + token * width;
        Number* to = outputs + token * width;
        float sum = 0.0f;
        for (int64_t i = 0; i < width; ++i) sum += load(from[i]) * load(from[i]);
        const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + epsilon);
        for (int64_t i = 0; i < width; ++i) store(to[i], load(from[i]) * scale * load(weight[i]));
    }
}

template <typename Number>
void rotate(Number* heads, const Number* cosines, const Number* sines, int64_t num_tokens, int64_t token_stride,
            int64_t num_heads, int64_t head_dim, int num_threads) {
    const int64_t middle = head_dim / 2;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t token = 0; token < num_tokens; ++token) {
        const Number* cosine = cosines + token * head_dim;
        const Number* sine = sines + token * head_dim;
        for (int64_t head = 0; head < num_heads; ++head) {
            Number* low = heads + token * token_stride + head * head_dim;
            Number* high = low + middle;
#pragma GCC ivdep
            for (int64_t i = 0; i < middle; ++i) {
                const float a = load(low[i]), b = load(high[i]);
                store(low[i], a * load(cosine[i]) - b * load(sine[i]));
                store(high[i], b * load(cosine[middle + i]) + a * load(sine[middle + i]));
            }
        }
    }
}

// Rows of the tables that attention/kernels.py fills.
struct Run {
    int64_t start, stop;                // queries
    int64_t first_span, end_span;       // keys that all of them see, save for what comes after them in their own node
    int64_t first_part, end_part;       // of the indices: what they have attended to already
};

struct Span {
    int64_t address;        // of layer 0's keys; 0 if they are the step's own
    int64_t layer_stride, value_offset, head_stride, token_stride;  // of memory; of the step's own see Step
    int64_t start;          // the first one's place among the step's tokens, if they are its own
    int64_t num_keys;
    int64_t is_causal;      // a query then sees no key after itself
};

struct Part {
    int64_t start;          // the first query
    int64_t out, lse;       // addresses: of a number each for every query, head and place; of an fp32
    int64_t out_head, out_token, out_group;
    int64_t lse_head, lse_token, lse_group;
};

struct Step {
    int64_t query, key, value, out;  // addresses; out is `[T, H, D]`
    int64_t query_head, query_token, key_head, key_token, value_head, value_token;  // strides
    int64_t num_key_heads, num_groups, head_dim, layer;
    float scale;
};

// What some queries of one key head have seen so far: weighted sums of values, their weights' sums, largest scores.
struct Sums {
    std::vector<float> values, weights, highest;
};

inline float dot(const float* a, const float* b, int64_t width) {
    float sum = 0.0f;
    for (int64_t i = 0; i < width; ++i) sum += a[i] * b[i];
    return sum;
}

template <int64_t kWidth>
inline void attend_keys(const float* query, const float* keys, const float* values, int64_t num_keys, int64_t width_,
                        float* sum, float& weight_sum, float& highest) {
    const int64_t width = kWidth ? kWidth : width_;
    float scores[kBlockKeys];
    float top = highest;
    for (int64_t k = 0; k < num_keys; ++k) scores[k] = dot(query, keys + k * width, width);
    for (int64_t k = 0; k < num_keys; ++k) top = scores[k] > top ? scores[k] : top;
    const float kept = exp_of(highest - top);
    float total = 0.0f;
    for (int64_t k = 0; k < num_keys; ++k) {
        scores[k] = exp_of(scores[k] - top);
        total += scores[k];
    }
    weight_sum = weight_sum * kept + total;
    highest = top;
    for (int64_t i = 0; i < width; ++i) sum[i] *= kept;
    for (int64_t k = 0; k < num_keys; ++k) {
        const float weight = scores[k];
        const float* value = values + k * width;
        for (int64_t i = 0; i < width; ++i) sum[i] += weight * value[i];
    }
}

template <typename Number>
inline void stage(const Number* from, int64_t stride, int64_t num_keys, int64_t width, float* to) {
    for (int64_t k = 0; k < num_keys; ++k)
        for (int64_t i = 0; i < width; ++i) to[k * width + i] = load(from[k * stride + i]);
}

template <typename Number, int64_t kWidth>
void attend_chunk(const Step& step, const Run& run, const Span* spans, const Part* parts, const int64_t* indices,
                  int64_t start, int64_t stop, int64_t head) {
    const int64_t width = kWidth ? kWidth : step.head_dim;
    const int64_t groups = step.num_groups, num_rows = (stop - start) * groups;
    static thread_local std::vector<float> queries, keys, values, sums, weight_sums, highest;
    queries.resize(num_rows * width);
    keys.resize(kBlockKeys * width);
    values.resize(kBlockKeys * width);
    sums.assign(num_rows * width, 0.0f);
    weight_sums.assign(num_rows, 0.0f);
    highest.assign(num_rows, kNever);
    const Number* all_queries = reinterpret_cast<const Number*>(step.query);
    for (int64_t token = start; token < stop; ++token)
        for (int64_t group = 0; group < groups; ++group) {
            const Number* from = all_queries + (head * groups + group) * step.query_head + token * step.query_token;
            float* to = queries.data() + ((token - start) * groups + group) * width;
            for (int64_t i = 0; i < width; ++i) to[i] = load(from[i]) * step.scale;
        }
    for (const int64_t* index = indices + run.first_part; index != indices + run.end_part; ++index) {
        const Part* part = parts + *index;
        for (int64_t token = start; token < stop; ++token)
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t row = (token - start) * groups + group, place = token - part->start;
                const float lse = reinterpret_cast<const float*>(
                    part->lse)[head * part->lse_head + place * part->lse_token + group * part->lse_group];
                if (lse == kNever) continue;
                const Number* out = reinterpret_cast<const Number*>(part->out) + head * part->out_head +
                                    place * part->out_token + group * part->out_group;
                const float top = highest[row] > lse ? highest[row] : lse;
                const float kept = exp_of(highest[row] - top), weight = exp_of(lse - top);
                float* sum = sums.data() + row * width;
                for (int64_t i = 0; i < width; ++i) sum[i] = sum[i] * kept + weight * load(out[i]);
                weight_sums[row] = weight_sums[row] * kept + weight;
                highest[row] = top;
            }
    }
    for (const Span* span = spans + run.first_span; span != spans + run.end_span; ++span) {
        const Number *key, *value;
        int64_t key_stride, value_stride;
        if (span->address) {
            key = reinterpret_cast<const Number*>(span->address) + step.layer * span->layer_stride +
                  head * span->head_stride;
            value = key + span->value_offset;
            key_stride = value_stride = span->token_stride;
        } else {
            key_stride = step.key_token;
            value_stride = step.value_token;
            key = reinterpret_cast<const Number*>(step.key) + head * step.key_head + span->start * key_stride;
            value = reinterpret_cast<const Number*>(step.value) + head * step.value_head + span->start * value_stride;
        }
        const int64_t seen = span->is_causal ? std::min(span->num_keys, stop - span->start) : span->num_keys;
        for (int64_t first = 0; first < seen; first += kBlockKeys) {
            const int64_t num_keys = std::min(kBlockKeys, seen - first);
            stage(key + first * key_stride, key_stride, num_keys, width, keys.data());
            stage(value + first * value_stride, value_stride, num_keys, width, values.data());
            for (int64_t token = start; token < stop; ++token) {
                const int64_t visible =
                    span->is_causal ? std::min(num_keys, token - span->start + 1 - first) : num_keys;
                if (visible <= 0) continue;
                for (int64_t group = 0; group < groups; ++group) {
                    const int64_t row = (token - start) * groups + group;
                    attend_keys<kWidth>(queries.data() + row * width, keys.data(), values.data(), visible, width,
                                        sums.data() + row * width, weight_sums[row], highest[row]);
                }
            }
        }
    }
    Number* out = reinterpret_cast<Number*>(step.out);
    for (int64_t token = start; token < stop; ++token)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t row = (token - start) * groups + group;
            Number* to = out + ((token * step.num_key_heads + head) * groups + group) * width;
            const float scale = 1.0f / weight_sums[row];
            for (int64_t i = 0; i < width; ++i) store(to[i], sums[row * width + i] * scale);
        }
}

template <typename Number>
void attend(const Step& step, const Run* runs, int64_t num_runs, const Span* spans, const Part* parts,
            const int64_t* indices, int num_threads) {
    struct Chunk {
        int64_t run, start, stop;
    };
    std::vector<Chunk> chunks;
    for (int64_t run = 0; run < num_runs; ++run)
        for (int64_t start = runs[run].start; start < runs[run].stop; start += kChunkTokens)
            chunks.push_back({run, start, std::min(start + kChunkTokens, runs[run].stop)});
    const int64_t heads = step.num_key_heads, num_items = static_cast<int64_t>(chunks.size()) * heads;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 4)
    for (int64_t item = 0; item < num_items; ++item) {
        const Chunk& chunk = chunks[item / heads];
        const auto one = step.head_dim == 64    ? attend_chunk<Number, 64>
                         : step.head_dim == 128 ? attend_chunk<Number, 128>
                                                : attend_chunk<Number, 0>;
        one(step, runs[chunk.run], spans, parts, indices, chunk.start, chunk.stop, item % heads);
    }
}

}  // namespace

extern "C" {

void segue_rms_norm(int is_bf16, const void* inputs, const void* weight, void* outputs, int64_t num_tokens,
                    int64_t width, float epsilon, int num_threads) {
    if (is_bf16)
        rms_norm(static_cast<const BFloat16*>(inputs), static_cast<const BFloat16*>(weight),
                 static_cast<BFloat16*>(outputs), num_tokens, width, epsilon, num_threads);
    else
        rms_norm(static_cast<const float*>(inputs), static_cast<const float*>(weight), static_cast<float*>(outputs),
                 num_tokens, width, epsilon, num_threads);
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

void segue_attend(int is_bf16, const int64_t* step, float scale, const void* runs, int64_t num_runs, const void* spans,
                  const void* parts, const int64_t* indices, int num_threads) {
    const Step whole{step[0], step[1], step[2],  step[3],  step[4],  step[5],  step[6], step[7],
                     step[8], step[9], step[10], step[11], step[12], step[13], scale};
    const auto* all_runs = static_cast<const Run*>(runs);
    const auto* all_spans = static_cast<const Span*>(spans);
    const auto* all_parts = static_cast<const Part*>(parts);
    if (is_bf16)
        attend<BFloat16>(whole, all_runs, num_runs, all_spans, all_parts, indices, num_threads);
    else
        attend<float>(whole, all_runs, num_runs, all_spans, all_parts, indices, num_threads);
}

}  // extern "C"
