#pragma once

#include "../common/sparse.h"

namespace tgt::cpu {

// Row losses, their reduction, and the gradient and row states whose pointers are set. `normalizer` replaces the
// divisor of the mean; below 0: none given. On an error nothing is written.
StatusAt sparse_forward(SparseCall call, double normalizer, void* loss, int threads);

// The gradient from the logits, the record, the row states and the upstream gradient.
void sparse_backward(SparseCall call, int threads);

}  // namespace tgt::cpu
