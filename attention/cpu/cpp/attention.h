// Attention as a team of threads computes it, by tiles or by vectors.

#pragma once

#include <memory>

#include "kernels.h"
#include "team.h"

namespace segue {

// The attention of a step. Its layers differ only in their number.
class Attention {
   public:
    virtual ~Attention() = default;
    virtual void attend(Member& member, int64_t layer) = 0;  // the caller waits before it uses the results
    virtual int64_t num_numbers() const = 0;  // roughly, how many numbers a layer computes
};

std::unique_ptr<Attention> attention_by_vectors(bool is_bf16, const Step& step, const Form& form, const Tables& tables,
                                                int num_threads);

// (tiles) Without a window and without capped scores.
std::unique_ptr<Attention> attention_by_tiles(const Step& step, const Form& form, const Tables& tables,
                                              int num_threads);

}  // namespace segue
