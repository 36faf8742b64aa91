#pragma once

#include "../common/distill.h"

namespace tgt::cpu {

// Row losses, their reduction, and the gradients, statistics and row states whose pointers are set. `divisor`
// replaces the divisor of the mean; below 0: none given. On an error nothing is written, but where a soft target is
// bad, which is found on the way.
StatusAt distill_forward(DistillCall call, double divisor, void* loss, int threads);

// The gradients from the logits, the row states and the upstream gradient.
void distill_backward(DistillCall call, int threads);

struct ScaleCall {
  int64_t rows = 0;
  int64_t classes = 0;
  Matrix grad;
  const void* factor = nullptr;  // [1] or [rows]: double for a double gradient, else float
  bool factor_per_row = false;
};

// grad *= factor; returns at once when every factor is 1.
void distill_scale(ScaleCall call, int threads);

}  // namespace tgt::cpu
