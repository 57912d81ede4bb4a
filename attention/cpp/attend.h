// Attention of queries over spans of keys as one softmax, whatever multiplies them.
//
// A chunk is some of a run's queries, of one key head. Its rows are these queries, each `num_groups` times, once a
// query head. Keys are staged, as many at a time as fit; a row adds up what it sees, scaled by its highest score.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace segue {

struct alignas(64) Aligned {  // a load that straddles two cache lines takes twice as long
    float numbers[kLanes];
};

// What rows have seen: sums of values, `width` numbers up to whole vectors, their weights' total, the highest score.
struct Seen {
    int64_t padded = 0;
    std::vector<Aligned> memory;
    std::vector<float> totals, highest;

    void reset(int64_t num_rows, int64_t width) {
        padded = (width + kLanes - 1) / kLanes * kLanes;
        memory.assign(num_rows * padded / kLanes, Aligned{});
        totals.assign(num_rows, 0.0f);
        highest.assign(num_rows, kNever);
    }
    float* sums(int64_t row) { return memory[0].numbers + row * padded; }
};

struct Chunk {
    int64_t start, stop;  // queries
    int64_t head;
};

// What somebody has made of a query and other keys.
template <typename Number>
void see_part(const Step& step, const Part& part, const Chunk& chunk, Seen& seen) {
    const int64_t width = step.head_dim, groups = step.num_groups;
    for (int64_t row = 0; row < (chunk.stop - chunk.start) * groups; ++row) {
        const int64_t place = chunk.start + row / groups - part.start, group = row % groups;
        const float lse = reinterpret_cast<const float*>(
            part.lse)[chunk.head * part.lse_head + place * part.lse_token + group * part.lse_group];
        if (lse == kNever) continue;
        const Number* out = reinterpret_cast<const Number*>(part.out) + chunk.head * part.out_head +
                            place * part.out_token + group * part.out_group;
        const float top = lse > seen.highest[row] ? lse : seen.highest[row];
        const float kept = exp_of(seen.highest[row] - top), weight = exp_of(lse - top);
        float* sum = seen.sums(row);
        for (int64_t i = 0; i < width; i += kLanes)
            store16(sum + i, load16(sum + i) * kept + load_some(out + i, width - i) * weight);
        seen.totals[row] = seen.totals[row] * kept + weight;
        seen.highest[row] = top;
    }
}

// Keys: `kAtOnce` can be staged, of `Number`s; `begin` takes the rows' queries, `stage` further keys, and `attend` has
// all rows see those staged first, as many as it is told for each.
template <typename Keys>
void see_spans(const Step& step, const Span* first_span, const Span* end_span, const Chunk& chunk, float scale,
               Keys& keys, Seen& seen) {
    using Number = typename Keys::Number;
    const int64_t head = chunk.head;
    int64_t num_staged = 0, own = -1, own_token = 0;  // own: the first staged key that causality may hide; its token
    const auto attend_staged = [&] {
        keys.attend(scale, num_staged, seen, [&](int64_t row) {
            const int64_t before = std::max<int64_t>(0, chunk.start + row / step.num_groups - own_token + 1);
            return own < 0 ? num_staged : std::min(num_staged, own + before);
        });
        num_staged = 0, own = -1;
    };
    keys.begin(step, chunk);
    for (const Span* span = first_span; span != end_span; ++span) {
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
        const int64_t visible = span->is_causal ? std::min(span->num_keys, chunk.stop - span->start) : span->num_keys;
        for (int64_t first = 0, count; first < visible; first += count) {
            count = std::min(Keys::kAtOnce - num_staged, visible - first);
            keys.stage(key + first * key_stride, key_stride, value + first * value_stride, value_stride, count,
                       num_staged);
            if (span->is_causal) own = num_staged, own_token = span->start + first;
            num_staged += count;
            if (num_staged == Keys::kAtOnce) attend_staged();
        }
    }
    if (num_staged) attend_staged();
}

// A run's queries in as few parts of about the same size as hold so many at most.
inline void add_chunks(std::vector<Chunk>& chunks, int64_t start, int64_t stop, int64_t most, int64_t num_heads) {
    const int64_t num_parts = (stop - start + most - 1) / most;
    for (int64_t part = 0; part < num_parts; ++part)
        for (int64_t head = 0; head < num_heads; ++head)
            chunks.push_back(
                {start + (stop - start) * part / num_parts, start + (stop - start) * (part + 1) / num_parts, head});
}

// All runs, with the parts that they have attended to before, to the step's `out`.
template <typename Keys>
void attend_runs(const Step& step, float scale, const Tables& tables, const Part* parts, int num_threads) {
    using Number = typename Keys::Number;
    std::vector<Chunk> chunks;
    std::vector<const Run*> runs;
    int64_t size = 0;  // numbers to compute
    for (const Run* run = tables.runs; run != tables.runs + tables.num_runs; ++run) {
        add_chunks(chunks, run->start, run->stop, Keys::tokens_at_once(step), step.num_key_heads);
        runs.resize(chunks.size(), run);
        for (int64_t span = run->first_span; span < run->end_span; ++span)
            size += (run->stop - run->start) * tables.spans[span].num_keys;
    }
    size *= step.num_key_heads * step.num_groups * 4;
#pragma omp parallel num_threads(threads_for(size, num_threads))
    {
        Keys keys(step.head_dim);
        Seen seen;
#pragma omp for schedule(dynamic, 4)
        for (size_t i = 0; i < chunks.size(); ++i) {
            const Chunk& chunk = chunks[i];
            const Run& run = *runs[i];
            const int64_t groups = step.num_groups, num_rows = (chunk.stop - chunk.start) * groups;
            const int64_t width = step.head_dim;
            seen.reset(num_rows, width);
            for (int64_t part = run.first_part; part < run.end_part; ++part)
                see_part<Number>(step, parts[tables.indices[part]], chunk, seen);
            see_spans(step, tables.spans + run.first_span, tables.spans + run.end_span, chunk, scale, keys, seen);
            for (int64_t row = 0; row < num_rows; ++row) {
                const int64_t token = chunk.start + row / groups, group = row % groups;
                const int64_t at = (token * step.num_key_heads + chunk.head) * groups + group;
                Number* to = reinterpret_cast<Number*>(step.out) + at * width;
                const float share = 1.0f / seen.totals[row];
                for (int64_t i = 0; i < width; i += kLanes)
                    store_some(to + i, load16(seen.sums(row) + i) * share, width - i);
            }
        }
    }
}

}  // namespace segue
