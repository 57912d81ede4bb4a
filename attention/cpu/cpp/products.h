// Products as a team multiplies them; wait before what needs them. Only where segue_has_tiles.

#pragma once

#include "kernels.h"
#include "numbers.h"
#include "team.h"

namespace segue {

struct Product {  // of what segue_product is told
    After after;
    const BFloat16 *inputs, *packed, *bias, *other;
    BFloat16* outputs;
    int64_t num_tokens, num_outputs, num_inputs;
};

void multiply(Member& member, const Product& product);

}  // namespace segue
