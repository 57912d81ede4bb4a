// Products as a team of threads multiplies them; the caller waits before it uses the results. Needs segue_has_tiles.

#pragma once

#include "kernels.h"
#include "numbers.h"
#include "team.h"

namespace segue {

struct Product {  // the arguments of segue_product
    After after;
    const BFloat16 *inputs, *packed, *bias, *other;
    BFloat16* outputs;
    int64_t num_tokens, num_outputs, num_inputs;
};

void multiply(Member& member, const Product& product);

}  // namespace segue
