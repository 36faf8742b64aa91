#pragma once

#include "adjust.h"

namespace tgt::cpu {

// Row losses, their reduction, and the gradients, statistics and row states whose pointers are set. On an error nothing
// is written, but where a soft target is bad, which is found on the way.
StatusAt distill_forward(DistillCall call, int threads);

// The gradients from the logits, the row states and the upstream gradient.
void distill_backward(DistillCall call, int threads);

// The same of adjusted logits.
StatusAt distill_adjusted_forward(AdjustedCall call, int threads);
void distill_adjusted_backward(AdjustedCall call, int threads);

// grad *= factor; returns at once when every factor is 1.
void distill_scale(ScaleCall call, int threads);

}  // namespace tgt::cpu
