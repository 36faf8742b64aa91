#pragma once

#include "../common/listwise.h"

namespace tgt::cpu {

// Row losses and gradients, those whose pointers are set.
void listwise(ListwiseCall call, int threads);

}  // namespace tgt::cpu
