// What a loss does to its logits beside dividing them by a temperature: what the binding fills in, and how it travels.
#pragma once

#include "../common/distill.h"

namespace tgt {

// A null pointer is "not given".
struct Adjustments {
  Matrix student_bias;  // one row, as is the teacher's
  Matrix teacher_bias;
  const double* label_margin = nullptr;         // [classes]
  const double* student_temperature = nullptr;  // [rows], in the place of the options'; both sides' or none
  const double* teacher_temperature = nullptr;
  double of_label = 0;   // weights of a decoupled divergence: of the label's part (both 0: it is not decoupled)
  double of_others = 0;  // and of the others'
  double skew = 0;       // the share of the other side that is mixed in; 0: it is not skewed
  double lead = 0;       // by how much the label is to lead a corrected teacher; 0: it is not corrected
  bool standardize = false;
};

struct AdjustedCall {
  DistillCall base;
  Adjustments adjust;
};

// The rows of a call as the kernels take them.
struct DistillRows : DistillCall {
  const Adjustments* adjust = nullptr;

  DistillRows(const DistillCall& call, const Adjustments* adjust) : DistillCall(call), adjust(adjust) {}
};

}  // namespace tgt
