// The call of the listwise op: what the binding fills in and the kernel reads.
#pragma once

#include "distill.h"

namespace tgt {

// A row is ranked, its label first, then the teacher's classes from the likeliest on, equal ones by id; what the
// teacher masks is left out. With ids the teacher lists classes: the others come after those, with no weight of their
// own.
struct ListwiseCall {
  int64_t rows = 0;
  int64_t classes = 0;
  Matrix student;
  Matrix teacher;                // [rows, classes] logits; with ids [rows, entries] log-probabilities, -inf: padding
  double temperature = 1;        // of the weights, which are softmax(teacher / temperature); with ids they are given
  const int64_t* ids = nullptr;  // [rows, entries]
  int64_t id_stride = 0;
  int64_t entries = 0;
  const double* others = nullptr;  // with ids: [rows], the weight of a label that is not listed
  const int64_t* label = nullptr;  // [rows], below 0: none
  const double* factor = nullptr;  // [rows], of the row's loss and gradient; 0: the row does not count
  double* loss = nullptr;          // [rows]
  Matrix d_student;
};

}  // namespace tgt
