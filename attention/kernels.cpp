// What a step does besides its products and its large blocks of attention, each in one pass over its numbers.
//
// Compiled on the machine it runs on by attention/kernels.py, which says what every argument is; torch's own operations
// are the oracle. Numbers are read and written as bf16 or fp32, and computed in fp32. NaN and infinities are kept.
// Vectors of 16 numbers are what GCC and Clang make of them: one register of AVX-512, several of narrower ones.
//
// Threads are those of torch: linked against no OpenMP of its own, the library finds the one torch has loaded.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int64_t kBlockKeys = 64;      // staged in fp32 at a time: 16 KiB each of keys and values at a width of 64
constexpr int64_t kChunkTokens = 16;    // of a run, that share what is staged
constexpr int64_t kAlone = 1 << 14;     // numbers to compute, up to which waking another thread takes longer

struct BFloat16 {
    uint16_t bits;
};

inline Floats all(float number) { return number - Floats{}; }

inline Floats load16(const float* from) {
    Floats result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline Floats load16(const BFloat16* from) {
#ifdef __AVX512F__  // what compilers make of the other form are five shuffles
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return reinterpret_cast<Floats>(_mm512_slli_epi32(wide, 16));
#else
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Bits) << 16);
#endif
}

inline void store16(float* to, Floats numbers) { std::memcpy(to, &numbers, sizeof numbers); }

// To nearest, ties to even.
inline void store16(BFloat16* to, Floats numbers) {
    const Bits bits = reinterpret_cast<Bits>(numbers);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Halves halves = __builtin_convertvector(numbers == numbers ? rounded : Bits{} + 0x7fc0u, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

// The first `count` numbers, then zeros.
template <typename Number>
inline Floats load_some(const Number* from, int64_t count) {
    if (count >= kLanes) return load16(from);
    Number padded[kLanes] = {};
    std::memcpy(padded, from, count * sizeof(Number));
    return load16(padded);
}

template <typename Number>
inline void store_some(Number* to, Floats numbers, int64_t count) {
    if (count >= kLanes) return store16(to, numbers);
    Number padded[kLanes];
    store16(padded, numbers);
    std::memcpy(to, padded, count * sizeof(Number));
}

#ifdef __clang__
#define SEGUE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SEGUE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Lane i of the result is the sum of vector i.
inline Floats sums_of(Floats (&v)[kLanes]) {
    for (int i = 0; i < 8; ++i)
        v[i] = SEGUE_SHUFFLE(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SEGUE_SHUFFLE(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; ++i)
        v[i] = SEGUE_SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SEGUE_SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; ++i)
        v[i] = SEGUE_SHUFFLE(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SEGUE_SHUFFLE(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SEGUE_SHUFFLE(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SEGUE_SHUFFLE(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

inline float sum_of(Floats numbers) {
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += numbers[i];
    return sum;
}

inline float highest_of(Floats numbers) {
    Floats other = SEGUE_SHUFFLE(numbers, numbers, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    numbers = numbers > other ? numbers : other;
    other = SEGUE_SHUFFLE(numbers, numbers, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    numbers = numbers > other ? numbers : other;
    other = SEGUE_SHUFFLE(numbers, numbers, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    numbers = numbers > other ? numbers : other;
    return numbers[0] > numbers[1] ? numbers[0] : numbers[1];
}

// Of numbers up to 0, within 2 units in the last place; below -87 it is 0. NaN stays.
inline Floats exp_of(Floats numbers) {
    const Floats clamped = numbers < all(-87.0f) ? all(-87.0f) : numbers;
    const Ints whole = __builtin_convertvector(clamped * 1.44269504088896341f - 0.5f, Ints);  // to nearest
    const Floats rounded = __builtin_convertvector(whole, Floats);
    const Floats rest = clamped - rounded * 0.693359375f + rounded * 2.12194440e-4f;
    Floats power = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    const Floats scaled = power * reinterpret_cast<Floats>((whole + 127) << 23);
    return numbers < all(-87.0f) ? Floats{} : scaled;
}

inline float exp_of(float number) { return exp_of(all(number))[0]; }

inline int threads_for(int64_t size, int num_threads) { return size <= kAlone ? 1 : num_threads; }

template <typename Number>
void rms_norm(const Number* inputs, const Number* weight, Number* outputs, int64_t num_tokens, int64_t width,
              float epsilon, int num_threads) {
#pragma omp parallel for num_threads(threads_for(num_tokens * width, num_threads)) schedule(static)
    for (int64_t token = 0; token < num_tokens; ++token) {
        const Number* from = inputs + token * width;
        Number* to = outputs + token * width;
        Floats squares{};
        for (int64_t i = 0; i < width; i += kLanes) {
            const Floats numbers = load_some(from + i, width - i);
            squares += numbers * numbers;
        }
        const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + epsilon);
        for (int64_t i = 0; i < width; i += kLanes)
            store_some(to + i, load_some(from + i, width - i) * scale * load_some(weight + i, width - i), width - i);
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
#pragma omp parallel for num_threads(threads_for(num_rows * width, num_threads)) schedule(static)
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

// Rows of the tables that attention/native.py fills; addresses in bytes, the rest in numbers.
struct Run {
    int64_t start, stop;           // queries
    int64_t first_span, end_span;  // keys that all of them see, save for what comes after them in their own node
    int64_t first_part, end_part;  // of the indices: what they have attended to already
};

struct Place {                     // of keys and values in memory, those of layer 0
    int64_t address, layer_stride, value_offset, head_stride, token_stride;
};

struct Span {
    Place place;        // without an address: keys of the step itself
    int64_t start;      // the first one among the step's tokens, if they are its own
    int64_t num_keys;
    int64_t is_causal;  // a query then sees no key after itself; only a run's last span is
};

struct Kept {
    Place place;        // of the first
    int64_t start, stop;  // of the step's tokens
};

struct Part {
    int64_t start;      // the first query
    int64_t out, lse;   // addresses
    int64_t out_head, out_token, out_group, lse_head, lse_token, lse_group;  // strides
};

struct Step {
    int64_t query, key, value, out;  // addresses; out is `[T, H, D]`
    int64_t query_head, query_token, key_head, key_token, value_head, value_token;  // strides
    int64_t num_key_heads, num_groups, head_dim, layer;
};

template <typename Number>
const Number* in_memory(const Place& place, int64_t layer, int64_t head) {
    return reinterpret_cast<const Number*>(place.address) + layer * place.layer_stride + head * place.head_stride;
}

template <typename Number>
void keep(const Step& step, const Kept* kept, int64_t num_kept) {
    const int64_t size = step.head_dim * static_cast<int64_t>(sizeof(Number));
    for (const Kept* each = kept; each != kept + num_kept; ++each)
        for (int64_t head = 0; head < step.num_key_heads; ++head) {
            Number* to = const_cast<Number*>(in_memory<Number>(each->place, step.layer, head));
            const Number* key = reinterpret_cast<const Number*>(step.key) + head * step.key_head;
            const Number* value = reinterpret_cast<const Number*>(step.value) + head * step.value_head;
            for (int64_t token = each->start; token < each->stop; ++token, to += each->place.token_stride) {
                std::memcpy(to, key + token * step.key_token, size);
                std::memcpy(to + each->place.value_offset, value + token * step.value_token, size);
            }
        }
}

struct alignas(64) Aligned {  // a load that straddles two cache lines takes twice as long
    float numbers[kLanes];
};

// What a thread works with. Rows are queries of one key head; widths are in vectors, the last one filled with zeros.
struct Workspace {
    std::vector<Aligned> queries, keys, values, sums;
    std::vector<float> weights, highest;
};

// Further keys of one query: `sum`, `weight` and `highest` are what it has seen so far.
template <int64_t kVectors>
inline void attend_keys(const float* query, const float* keys, const float* values, int64_t num_keys,
                        int64_t num_vectors, float* sum, float& weight, float& highest) {
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
        if (const int64_t left = num_keys - group * kLanes; left < kLanes) {
            const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            scores[group] = lane < static_cast<int32_t>(left) ? scores[group] : all(kNever);
        }
        tops = scores[group] > tops ? scores[group] : tops;
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

// Rows in fp32, each filled up to whole vectors; of kVectors, if that is known, then there is nothing to fill.
template <int64_t kVectors, typename Number>
inline void stage(const Number* from, int64_t stride, int64_t num_rows, int64_t width, int64_t num_vectors, float* to) {
    for (int64_t row = 0; row < num_rows; ++row, from += stride)
        if constexpr (kVectors > 0) {
            for (int64_t i = 0; i < kVectors; ++i, to += kLanes) store16(to, load16(from + i * kLanes));
        } else {
            for (int64_t i = 0; i < num_vectors; ++i, to += kLanes)
                store16(to, load_some(from + i * kLanes, width - i * kLanes));
        }
}

template <typename Number, int64_t kVectors>
void attend_chunk(const Step& step, const Run& run, const Span* spans, const Part* parts, const int64_t* indices,
                  float scale, int64_t start, int64_t stop, int64_t head, Workspace& space) {
    const int64_t width = step.head_dim, vectors = kVectors ? kVectors : (width + kLanes - 1) / kLanes;
    const int64_t padded = vectors * kLanes, groups = step.num_groups, num_rows = (stop - start) * groups;
    space.queries.resize(num_rows * vectors);
    space.keys.resize(kBlockKeys * vectors);
    space.values.resize(kBlockKeys * vectors);
    space.sums.assign(num_rows * vectors, Aligned{});
    float *queries = space.queries[0].numbers, *keys = space.keys[0].numbers, *values = space.values[0].numbers;
    float* sums = space.sums[0].numbers;
    space.weights.assign(num_rows, 0.0f);
    space.highest.assign(num_rows, kNever);
    for (int64_t token = start; token < stop; ++token) {
        const Number* from = reinterpret_cast<const Number*>(step.query) + token * step.query_token;
        float* to = queries + (token - start) * groups * padded;
        stage<kVectors>(from + head * groups * step.query_head, step.query_head, groups, width, vectors, to);
    }
    for (int64_t i = 0; i < num_rows * padded; ++i) queries[i] *= scale;

    for (const int64_t* index = indices + run.first_part; index != indices + run.end_part; ++index) {
        const Part& part = parts[*index];
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t place = start + row / groups - part.start, group = row % groups;
            const float lse = reinterpret_cast<const float*>(
                part.lse)[head * part.lse_head + place * part.lse_token + group * part.lse_group];
            if (lse == kNever) continue;
            const Number* out = reinterpret_cast<const Number*>(part.out) + head * part.out_head +
                                place * part.out_token + group * part.out_group;
            const float top = lse > space.highest[row] ? lse : space.highest[row];
            const float kept = exp_of(space.highest[row] - top), weight = exp_of(lse - top);
            float* sum = sums + row * padded;
            for (int64_t i = 0; i < padded; i += kLanes)
                store16(sum + i, load16(sum + i) * kept + load_some(out + i, width - i) * weight);
            space.weights[row] = space.weights[row] * kept + weight;
            space.highest[row] = top;
        }
    }
    int64_t num_staged = 0, own = -1, own_token = 0;  // own: the first staged key that causality may hide, and its token
    const auto attend_staged = [&] {
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t before = std::max<int64_t>(0, start + row / groups - own_token + 1);
            const int64_t visible = own < 0 ? num_staged : std::min(num_staged, own + before);
            if (visible > 0)
                attend_keys<kVectors>(queries + row * padded, keys, values, visible, vectors, sums + row * padded,
                                      space.weights[row], space.highest[row]);
        }
        num_staged = 0, own = -1;
    };
    for (const Span* span = spans + run.first_span; span != spans + run.end_span; ++span) {
        const bool is_own = !span->place.address;
        const int64_t key_stride = is_own ? step.key_token : span->place.token_stride;
        const int64_t value_stride = is_own ? step.value_token : span->place.token_stride;
        const Number *key, *value;
        if (is_own) {
            key = reinterpret_cast<const Number*>(step.key) + head * step.key_head + span->start * key_stride;
            value = reinterpret_cast<const Number*>(step.value) + head * step.value_head + span->start * value_stride;
        } else {
            key = in_memory<Number>(span->place, step.layer, head);
            value = key + span->place.value_offset;
        }
        const int64_t seen = span->is_causal ? std::min(span->num_keys, stop - span->start) : span->num_keys;
        for (int64_t first = 0, count; first < seen; first += count) {
            count = std::min(kBlockKeys - num_staged, seen - first);
            const int64_t at = num_staged * padded;
            stage<kVectors>(key + first * key_stride, key_stride, count, width, vectors, keys + at);
            stage<kVectors>(value + first * value_stride, value_stride, count, width, vectors, values + at);
            if (span->is_causal) own = num_staged, own_token = span->start + first;
            num_staged += count;
            if (num_staged == kBlockKeys) attend_staged();
        }
    }
    if (num_staged) attend_staged();
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t token = start + row / groups, group = row % groups;
        Number* to = reinterpret_cast<Number*>(step.out) + ((token * step.num_key_heads + head) * groups + group) * width;
        const float share = 1.0f / space.weights[row];
        for (int64_t i = 0; i < padded; i += kLanes)
            store_some(to + i, load16(sums + row * padded + i) * share, width - i);
    }
}

template <typename Number>
void attend(const Step& step, float scale, const Run* runs, int64_t num_runs, const Span* spans, const Part* parts,
            const int64_t* indices, int num_threads) {
    struct Chunk {
        int64_t run, start, stop;
    };
    std::vector<Chunk> chunks;
    int64_t size = 0;  // numbers to compute
    for (int64_t run = 0; run < num_runs; ++run) {
        for (int64_t start = runs[run].start; start < runs[run].stop; start += kChunkTokens)
            chunks.push_back({run, start, std::min(start + kChunkTokens, runs[run].stop)});
        for (int64_t span = runs[run].first_span; span < runs[run].end_span; ++span)
            size += (runs[run].stop - runs[run].start) * spans[span].num_keys;
    }
    const int64_t heads = step.num_key_heads, num_items = static_cast<int64_t>(chunks.size()) * heads;
    const auto one = step.head_dim == 64    ? attend_chunk<Number, 4>
                     : step.head_dim == 128 ? attend_chunk<Number, 8>
                                            : attend_chunk<Number, 0>;
    size *= heads * step.num_groups * 4;
#pragma omp parallel num_threads(threads_for(size, num_threads))
    {
        Workspace space;
#pragma omp for schedule(dynamic, 4)
        for (int64_t item = 0; item < num_items; ++item) {
            const Chunk& chunk = chunks[item / heads];
            one(step, runs[chunk.run], spans, parts, indices, scale, chunk.start, chunk.stop, item % heads, space);
        }
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

void segue_summarise(int is_bf16, const void* logits, int64_t num_rows, int64_t width, float* highest,
                     int64_t* most_likely, float* log_totals, int num_threads) {
    if (is_bf16)
        summarise(static_cast<const BFloat16*>(logits), num_rows, width, highest, most_likely, log_totals, num_threads);
    else
        summarise(static_cast<const float*>(logits), num_rows, width, highest, most_likely, log_totals, num_threads);
}

void segue_attend(int is_bf16, const void* step, float scale, const void* kept, int64_t num_kept, const void* runs,
                  int64_t num_runs, const void* spans, const void* parts, const int64_t* indices, int num_threads) {
    const auto& whole = *static_cast<const Step*>(step);
    const auto* all_runs = static_cast<const Run*>(runs);
    const auto* all_spans = static_cast<const Span*>(spans);
    const auto* all_parts = static_cast<const Part*>(parts);
    if (is_bf16) {
        keep<BFloat16>(whole, static_cast<const Kept*>(kept), num_kept);
        attend<BFloat16>(whole, scale, all_runs, num_runs, all_spans, all_parts, indices, num_threads);
    } else {
        keep<float>(whole, static_cast<const Kept*>(kept), num_kept);
        attend<float>(whole, scale, all_runs, num_runs, all_spans, all_parts, indices, num_threads);
    }
}

}  // extern "C"
