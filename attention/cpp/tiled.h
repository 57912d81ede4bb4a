// Attention by tiles, of bf16 and heads of a multiple of 32. Only where segue_has_tiles.

#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace segue {

// One part a block, in their order, and the memory they are in: out `[Hkv, n, G, D]`, log-sum-exp `[Hkv, n, G]`.
struct BlockParts {
    std::vector<Part> parts;
    std::unique_ptr<BFloat16[]> outs;
    std::unique_ptr<float[]> lses;
};

BlockParts attend_blocks_by_tiles(const Step& step, float scale, const Block* blocks, int64_t num_blocks,
                                  int num_threads);

void attend_runs_by_tiles(const Step& step, float scale, const Tables& tables, const Part* parts, int num_threads);

}  // namespace segue
