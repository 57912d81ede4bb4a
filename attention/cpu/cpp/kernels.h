// The functions that attention/cpu/kernels.py calls, and the rows of the tables that attention/cpu/backend.py and
// workers/models/fused_cpu.py fill for them. Addresses are in bytes, strides in numbers.

#pragma once

#include <cstdint>

namespace segue {

struct Run {
    int64_t start, stop;  // queries
    int64_t first_span, end_span;  // keys that all of them see; of their own node each sees the keys up to itself
    int64_t first_part, end_part;  // a range of `indices`: the parts with what they have seen already
};

struct Place {  // where keys and values are in memory, in layer 0
    int64_t address, layer_stride, value_offset, head_stride, token_stride;
};

struct Span {
    Place place;  // its address is 0 if the keys are the step's own
    int64_t start;  // then the number of the first one among the step's tokens
    int64_t num_keys;
    int64_t is_causal;  // whether a query sees no key after itself; only the last span of a run, or a block's, may be
    // With a sliding window: the number of the first key that the run's first query sees. Each further query sees one
    // key less at this end. Without one, and for a block, it is far below 0.
    int64_t first_seen;
};

struct Block {
    int64_t start, stop;  // the queries of all runs that see the span, which are many
    Span span;
};

struct Kept {
    Place place;  // where the first of these tokens goes
    int64_t start, stop;  // some of the step's tokens
};

struct Part {
    int64_t start;  // the first query
    int64_t out, lse;  // addresses
    int64_t out_head, out_token, out_group, lse_head, lse_token, lse_group;  // strides
};

struct Tables {
    const Kept* kept;
    int64_t num_kept;
    const Run* runs;
    int64_t num_runs;
    const Span* spans;
    const int64_t* indices;
    const Part* parts;  // of blocks that torch has computed
    int64_t by_tiles;  // if not 0, the kernel computes `blocks` instead, one part each
    const Block* blocks;
    int64_t num_blocks;
};

struct Step {
    int64_t query, key, value, out;  // addresses; out is `[T, H, D]`
    int64_t query_head, query_token, key_head, key_token, value_head, value_token;  // strides
    int64_t num_key_heads, num_groups, head_dim, layer;
};

struct Form {  // how a layer attends
    float scale;  // of scores
    float softcap;  // a scaled score s becomes softcap * tanh(s / softcap); 0: it stays as it is
    const float* sinks;  // for each query head a score that takes weight and has no value; null: there are none
};

struct Layer {  // addresses of bf16 numbers, 0 for what a layer lacks; products' weights are as segue_pack writes them
    int64_t input_norm, query_norm, key_norm, qkv, qkv_bias, output, output_bias;
    int64_t mlp_norm, gate_up, gate_up_bias, down, down_bias;
};

template <typename Number>
const Number* in_memory(const Place& place, int64_t layer, int64_t head) {
    return reinterpret_cast<const Number*>(place.address) + layer * place.layer_stride + head * place.head_stride;
}

enum After { kNothing, kAdd, kGate };  // what is done with a product's sums: see segue_product

struct Decoder {
    int64_t num_layers, width, mlp_width, num_key_heads, num_groups, head_dim;
};

}  // namespace segue

extern "C" {

// Whether this processor multiplies tiles of bf16, and this process may. Functions marked (tiles) need that.
int segue_has_tiles();

void segue_rms_norm(int is_bf16, const void* inputs, const void* weight, void* outputs, int64_t num_tokens,
                    int64_t token_stride, int64_t num_rows, int64_t width, float epsilon, int num_threads);

void segue_rotate(int is_bf16, void* heads, const void* cosines, const void* sines, int64_t num_tokens,
                  int64_t token_stride, int64_t num_heads, int64_t head_dim, int num_threads);

void segue_summarise(int is_bf16, const void* logits, int64_t num_rows, int64_t width, float* highest,
                     int64_t* most_likely, float* log_totals, int num_threads);

// Scores are capped by vectors only.
void segue_attend(int is_bf16, const void* step, float scale, float softcap, const void* sinks, const void* tables,
                  int num_threads);

// (tiles) Copies weights `[N, K]` to `[N up to a multiple of 32, K]`, in the order in which they are multiplied.
void segue_pack(const void* weights, void* packed, int64_t num_outputs, int64_t num_inputs);

// (tiles) inputs `[T, K]` -> outputs `[T, N]`, or `[T, N / 2]` if gated. `after` is 0: nothing; 1: add `other`; 2: put
// the first 16 of each 32 outputs through SiLU and multiply them with the other 16.
void segue_product(int after, const void* inputs, const void* packed, const void* bias, const void* other,
                   void* outputs, int64_t num_tokens, int64_t num_outputs, int64_t num_inputs, int num_threads);

// (tiles) All layers of a decoder, in place: from embeddings `[T, E]` to the input of the last norm.
void segue_decode(const void* decoder, const void* layers, const void* tables, void* hidden, const void* cosines,
                  const void* sines, int64_t num_tokens, float scale, float epsilon, int num_threads);
}
