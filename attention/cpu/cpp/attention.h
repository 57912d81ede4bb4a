// Attention as a team computes it, whatever multiplies.

#pragma once

#include <memory>

#include "kernels.h"
#include "team.h"

namespace segue {

// Of a step, whose layers differ in nothing but their number.
class Attention {
   public:
    virtual ~Attention() = default;
    virtual void attend(Member& member, int64_t layer) = 0;  // wait before what needs it
    virtual int64_t num_numbers() const = 0;  // to compute in a layer, about
};

std::unique_ptr<Attention> attention_by_vectors(bool is_bf16, const Step& step, float scale, const Tables& tables,
                                                int num_threads);

// (tiles)
std::unique_ptr<Attention> attention_by_tiles(const Step& step, float scale, const Tables& tables, int num_threads);

}  // namespace segue
