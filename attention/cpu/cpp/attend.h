// Attention of queries over spans of keys as one softmax, by tiles or by vectors.
//
// A chunk is some queries of a run, for one key head. Its rows are these queries, each once for every query head of the
// key head (`num_groups`). Keys are staged, as many at a time as fit; a row adds up what it sees, scaled by its highest
// score.

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "attention.h"
#include "numbers.h"

namespace segue {

struct alignas(64) Aligned {  // a load across two cache lines takes twice as long
    float numbers[kLanes];
};

// What rows have seen so far: sums of values (`width` numbers, filled up to whole vectors), the total of their weights,
// the highest score.
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

constexpr int64_t kAllSeen = -(int64_t{1} << 40);  // far below 0: no window hides a key

struct Chunk {
    int64_t start, stop;  // queries
    int64_t head;
    int64_t whose;  // number of the run, or of the block
};

// The result of a query over other keys.
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

// `Keys` says how: it stages up to `kAtOnce` keys, made of `Number`s. `begin` takes the queries of the rows, `stage`
// takes further keys, and `attend` lets each row see a range of the staged keys: those from `hidden(row)` on that stand
// before `visible(row)`. `end` releases what a thread holds. `first_query`: of the run that the chunk belongs to.
template <typename Keys>
void see_spans(const Step& step, const Span* first_span, const Span* end_span, const Chunk& chunk, int64_t first_query,
               const Form& form, Keys& keys, Seen& seen) {
    using Number = typename Keys::Number;
    const int64_t head = chunk.head;
    int64_t num_staged = 0, own = -1, own_token = 0;  // own: the first staged key that some queries do not see
    int64_t lowest = kAllSeen;  // the first staged key that the chunk's first query sees; below 0 if later ones see more of them
    const auto attend_staged = [&] {
        keys.attend(
            form, num_staged, seen,
            [&](int64_t row) { return std::max<int64_t>(0, lowest + row / step.num_groups); },
            [&](int64_t row) {
                const int64_t before = std::max<int64_t>(0, chunk.start + row / step.num_groups - own_token + 1);
                return own < 0 ? num_staged : std::min(num_staged, own + before);
            });
        num_staged = 0, own = -1;
    };
    const int64_t last = chunk.stop - 1 - chunk.start;  // the chunk's last query, counted from its first
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
        const int64_t first_seen = span->first_seen + chunk.start - first_query;  // by the chunk's first query
        const bool is_clipped = first_seen + last > 0;
        if (is_clipped && num_staged) attend_staged();  // its keys are staged alone
        for (int64_t first = std::max<int64_t>(0, first_seen), count; first < visible; first += count) {
            count = std::min(Keys::kAtOnce - num_staged, visible - first);
            keys.stage(key + first * key_stride, key_stride, value + first * value_stride, value_stride, count,
                       num_staged);
            if (span->is_causal) own = num_staged, own_token = span->start + first;
            num_staged += count;
            lowest = is_clipped ? first_seen - first : kAllSeen;
            if (is_clipped || num_staged == Keys::kAtOnce) attend_staged();
        }
    }
    if (num_staged) attend_staged();
}

// Attention by `Keys`.
template <typename Keys>
class AttentionBy final : public Attention {
   public:
    AttentionBy(const Step& step, const Form& form, const Tables& tables, int num_threads)
        : step_(step), form_(form), tables_(tables), scratch_(std::max(1, num_threads)) {
        int64_t num_pairs = 0;
        for (int64_t i = 0; i < tables.num_runs; ++i) {
            const Run& run = tables.runs[i];
            add_chunks(of_runs_, run.start, run.stop, i);
            for (int64_t span = run.first_span; span < run.end_span; ++span)
                num_pairs += (run.stop - run.start) * tables.spans[span].num_keys;
        }
        for (int64_t i = 0; i < tables.num_blocks; ++i) {
            const Block& block = tables.blocks[i];
            add_chunks(of_blocks_, block.start, block.stop, i);
            num_pairs += (block.stop - block.start) * block.span.num_keys;
        }
        num_numbers_ = num_pairs * step.num_key_heads * step.num_groups * 4;
        make_room_for_parts();
    }

    int64_t num_numbers() const override { return num_numbers_; }

    void attend(Member& member, int64_t layer) override {
        Step step = step_;
        step.layer = layer;
        auto& scratch = scratch_[member.index()];
        if (!scratch) scratch.reset(new Scratch{Keys(step.head_dim), {}});
        keep(member, step);
        member.wait();
        if (tables_.num_blocks) {
            for_each(member, of_blocks_, [&](const Chunk& chunk) { attend_block(step, chunk, *scratch); });
            scratch->keys.end();
            member.wait();
        }
        for_each(member, of_runs_, [&](const Chunk& chunk) { attend_run(step, chunk, *scratch); });
        scratch->keys.end();
    }

   private:
    using Number = typename Keys::Number;

    struct Scratch {  // of one thread
        Keys keys;
        Seen seen;
    };

    // Cuts queries into as few parts as hold at most so many each, of about the same size.
    void add_chunks(std::vector<Chunk>& chunks, int64_t start, int64_t stop, int64_t whose) {
        const int64_t most = Keys::tokens_at_once(step_), num_parts = (stop - start + most - 1) / most;
        for (int64_t part = 0; part < num_parts; ++part)
            for (int64_t head = 0; head < step_.num_key_heads; ++head)
                chunks.push_back({start + (stop - start) * part / num_parts,
                                  start + (stop - start) * (part + 1) / num_parts, head, whose});
    }

    template <typename Function>
    static void for_each(Member& member, const std::vector<Chunk>& chunks, Function&& function) {
        member.share(chunks.size(), [&](int64_t start, int64_t stop) {
            std::for_each(chunks.begin() + start, chunks.begin() + stop, function);
        });
    }

    // One part for each block, in the same order: out `[Hkv, n, G, D]`, log-sum-exp `[Hkv, n, G]`. There are no others.
    void make_room_for_parts() {
        if (!tables_.num_blocks) return;
        const int64_t groups = step_.num_groups, width = step_.head_dim;
        int64_t num_rows = 0;
        for (int64_t i = 0; i < tables_.num_blocks; ++i)
            num_rows += (tables_.blocks[i].stop - tables_.blocks[i].start) * step_.num_key_heads * groups;
        outs_.reset(new Number[num_rows * width]);
        lses_.reset(new float[num_rows]);
        num_rows = 0;
        for (int64_t i = 0; i < tables_.num_blocks; ++i) {
            const int64_t start = tables_.blocks[i].start, of_head = (tables_.blocks[i].stop - start) * groups;
            parts_.push_back({start, reinterpret_cast<int64_t>(outs_.get() + num_rows * width),
                              reinterpret_cast<int64_t>(lses_.get() + num_rows), of_head * width, groups * width, width,
                              of_head, groups, 1});
            num_rows += of_head * step_.num_key_heads;
        }
        tables_.parts = parts_.data();
    }

    // Copies keys and values of the step's tokens to their memory.
    void keep(Member& member, const Step& step) {
        const int64_t size = step.head_dim * static_cast<int64_t>(sizeof(Number)), heads = step.num_key_heads;
        member.share(tables_.num_kept * heads, [&](int64_t item, int64_t end) {
            for (; item < end; ++item) {
                const Kept& each = tables_.kept[item / heads];
                const int64_t head = item % heads;
                Number* to = const_cast<Number*>(in_memory<Number>(each.place, step.layer, head));
                const Number* key = reinterpret_cast<const Number*>(step.key) + head * step.key_head;
                const Number* value = reinterpret_cast<const Number*>(step.value) + head * step.value_head;
                for (int64_t token = each.start; token < each.stop; ++token, to += each.place.token_stride) {
                    std::memcpy(to, key + token * step.key_token, size);
                    std::memcpy(to + each.place.value_offset, value + token * step.value_token, size);
                }
            }
        });
    }

    void attend_block(const Step& step, const Chunk& chunk, Scratch& scratch) {
        const int64_t groups = step.num_groups, width = step.head_dim;
        const int64_t num_rows = (chunk.stop - chunk.start) * groups;
        const Part& part = parts_[chunk.whose];
        const Span& span = tables_.blocks[chunk.whose].span;
        Seen& seen = scratch.seen;
        seen.reset(num_rows, width);
        see_spans(step, &span, &span + 1, chunk, part.start, form_, scratch.keys, seen);
        const int64_t first = (chunk.start - part.start) * groups;
        auto* out = reinterpret_cast<Number*>(part.out) + chunk.head * part.out_head + first * width;
        auto* lse = reinterpret_cast<float*>(part.lse) + chunk.head * part.lse_head + first;
        for (int64_t row = 0; row < num_rows; ++row) {
            write_sums(seen, row, width, out + row * width);
            lse[row] = seen.highest[row] + std::log(seen.totals[row]);
        }
    }

    // Merges what rows have seen with the parts of the run, and writes it to the step's `out`.
    void attend_run(const Step& step, const Chunk& chunk, Scratch& scratch) {
        const Run& run = tables_.runs[chunk.whose];
        const int64_t groups = step.num_groups, num_rows = (chunk.stop - chunk.start) * groups;
        const int64_t width = step.head_dim;
        Seen& seen = scratch.seen;
        seen.reset(num_rows, width);
        for (int64_t part = run.first_part; part < run.end_part; ++part)
            see_part<Number>(step, tables_.parts[tables_.indices[part]], chunk, seen);
        const Span* spans = tables_.spans;
        see_spans(step, spans + run.first_span, spans + run.end_span, chunk, run.start, form_, scratch.keys, seen);
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t token = chunk.start + row / groups, group = row % groups, head = chunk.head * groups + group;
            if (form_.sinks) see_sink(form_.sinks[head], seen, row);
            const int64_t at = token * step.num_key_heads * groups + head;
            write_sums(seen, row, width, reinterpret_cast<Number*>(step.out) + at * width);
        }
    }

    // One more score, without a value: it adds to the total of the weights, which is in units of the highest one's.
    static void see_sink(float sink, Seen& seen, int64_t row) {
        seen.totals[row] += std::exp(sink - seen.highest[row]);
    }

    static void write_sums(Seen& seen, int64_t row, int64_t width, Number* to) {
        const float share = 1.0f / seen.totals[row];
        for (int64_t i = 0; i < width; i += kLanes) store_some(to + i, load16(seen.sums(row) + i) * share, width - i);
    }

    Step step_;
    Form form_;
    Tables tables_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
    std::vector<Chunk> of_runs_, of_blocks_;
    int64_t num_numbers_ = 0;
    std::vector<Part> parts_;
    std::unique_ptr<Number[]> outs_;
    std::unique_ptr<float[]> lses_;
};

}  // namespace segue
