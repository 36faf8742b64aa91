// The call of the distill ops: what the binding fills in and every kernel reads.
#pragma once

#include "divergence.h"

namespace tgt {

enum class Reduction : int { kMean, kSum, kNone };

struct DistillOptions {
  int divergence = 0;
  int reduction = 0;
  double beta = 0.5;
  double temperature = 1;
  double teacher_temperature = 1;
  double soft_weight = 1;
  double hard_weight = 0;
  double label_smoothing = 0;
  int64_t ignore_index = -100;
  int64_t unlabeled_index = -1;
};

// Rows are dense; the stride between them is in elements. A null pointer is "not wanted" or "not given".
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  DType type = DType::kFloat32;

  TGT_HD explicit operator bool() const { return data != nullptr; }
  TGT_HD char* row(int64_t i) const { return static_cast<char*>(data) + i * stride * element_size(type); }
};

// Arithmetic is in double as soon as an input is double, else in float; losses and statistics come out in that type.
struct DistillCall {
  DistillOptions options;
  int64_t rows = 0;
  int64_t classes = 0;
  Matrix student;
  Matrix teacher;
  const int64_t* target = nullptr;     // [rows]
  Matrix soft_target;                  // [rows, classes], in its place: how much of the hard term each class is
  const double* weight = nullptr;      // [rows]
  double divisor = -1;                 // of the mean; below 0: what counts is counted
  const double* divisor_at = nullptr;  // on a device: what replaces it
  double* workspace = nullptr;         // on a device: a number, for what is counted
  void* loss = nullptr;                // what is reduced
  void* row_loss = nullptr;            // [rows], weighted; with no reduction this is the loss
  Matrix d_student;
  Matrix d_teacher;
  RowState* row_state = nullptr;   // [rows], written by forward and read by backward
  void* stats = nullptr;           // [6, rows] in the order of the names in Python
  const void* upstream = nullptr;  // backward: [1] or [rows]
  bool upstream_per_row = false;
  int64_t* bad_row = nullptr;  // the first row of the soft target that was found to hold what is no share; -1: none

  TGT_HD bool is_fp64() const { return student.type == DType::kFloat64 || teacher.type == DType::kFloat64; }
};

struct ScaleCall {
  int64_t rows = 0;
  int64_t classes = 0;
  Matrix grad;
  const void* factor = nullptr;  // [1] or [rows]: double for a double gradient, else float
  bool factor_per_row = false;
};

enum class Status : int { kOk = 0, kBadTarget = 1, kBadWeight = 2, kBadId = 3, kBadSoftTarget = 4 };

struct StatusAt {
  Status status = Status::kOk;
  int64_t row = 0;
};

}  // namespace tgt
