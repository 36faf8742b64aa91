// What a loss does to its logits beside dividing them by a temperature: what the binding fills in.
#pragma once

#include "distill.h"

namespace tgt {

// A null pointer is "not given".
struct Adjustments {
  Matrix student_bias;  // one row, as is the teacher's, in the type of the arithmetic
  Matrix teacher_bias;
  const double* label_margin = nullptr;         // [classes]
  const double* student_temperature = nullptr;  // [rows], in the place of the options'; both sides' or none
  const double* teacher_temperature = nullptr;
  double of_label = 0;   // weights of a decoupled divergence: of the label's part (both 0: it is not decoupled)
  double of_others = 0;  // and of the others'
  double skew = 0;       // the share of the other side that is mixed in; 0: it is not skewed
  double lead = 0;       // by how much the label is to lead a corrected teacher; 0: it is not corrected
  bool standardize = false;

  TGT_HD bool decoupled() const { return of_label != 0 || of_others != 0; }
};

struct AdjustedCall {
  DistillCall base;
  Adjustments adjust;
};

}  // namespace tgt
