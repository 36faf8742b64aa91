#pragma once

#include "../common/topk.h"

namespace tgt::cpu {

// Row losses, their reduction, and the gradient and row states whose pointers are set. On an error nothing is written.
StatusAt topk_forward(TopKCall call, int threads);

// The gradient from the logits, the top k, the row states and the upstream gradient.
void topk_backward(TopKCall call, int threads);

}  // namespace tgt::cpu
