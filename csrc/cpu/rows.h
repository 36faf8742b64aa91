// What the losses over rows of logits share on a CPU: checks that need the data, the divisor, the reduction.
#pragma once

#include "../common/distill.h"

namespace tgt::cpu {

constexpr int64_t kElementsPerThread = 1 << 15;  // below it a thread costs more than it brings

inline int64_t row_grain(int64_t classes) { return kElementsPerThread / (classes + 1) + 1; }

inline bool counts(const DistillCall& call, int64_t i) {
  return !(call.weight && call.weight[i] == 0) && !(call.target && call.target[i] == call.options.ignore_index);
}

inline StatusAt check_rows(const DistillCall& call) {
  for (int64_t i = 0; i < call.rows; ++i) {
    if (call.weight && !(call.weight[i] >= 0 && call.weight[i] < HUGE_VAL)) return {Status::kBadWeight, i};
    if (!call.target || !counts(call, i) || call.target[i] == call.options.unlabeled_index) continue;
    if (call.target[i] < 0 || call.target[i] >= call.classes) return {Status::kBadTarget, i};
  }
  return {};
}

// The counted rows, or their weights.
inline double counted(const DistillCall& call) {
  double sum = 0;
  for (int64_t i = 0; i < call.rows; ++i) {
    if (counts(call, i)) sum += call.weight ? call.weight[i] : 1;
  }
  return sum;
}

// The divisor of the weights, 1 for anything but a mean.
inline void choose_divisor(DistillCall& call) {
  if (static_cast<Reduction>(call.options.reduction) != Reduction::kMean) {
    call.divisor = 1;
  } else if (call.divisor < 0) {
    call.divisor = counted(call);
  }
}

template <class Real>
void reduce(const DistillCall& call) {
  if (static_cast<Reduction>(call.options.reduction) == Reduction::kNone) return;
  double sum = 0;
  for (int64_t i = 0; i < call.rows; ++i) sum += static_cast<const Real*>(call.row_loss)[i];
  *static_cast<Real*>(call.loss) = Real(call.divisor == 0 ? 0 : sum);
}

}  // namespace tgt::cpu
