// A row pair as the distill kernels read it: its logits block by block, as they are stored or adjusted on the way.
#pragma once

#include "../common/row_options.h"
#include "adjust.h"
#include "blocks.h"

namespace tgt {
inline namespace TGT_ISA {

// A number with the digits that Real has no room for.
template <class Real>
struct Halves {
  Real high, low;

  explicit Halves(double value) : high(Real(value)), low(Real(value - high)) {}
  template <class V>
  TGT_HD V below(V x) const {  // x - value
    return (x - splat<V>(high)) - splat<V>(low);
  }
};

// What is added to a side's logits and then taken away.
struct Change {
  const Matrix* bias = nullptr;
  double shift = 0;
};

// A block with its changes, in `buffer`, where it may be already. `hidden`: a class that is not there, below 0: none.
template <class Real>
TGT_APART const Real* changed_block(const Real* from, const Change& change, int64_t hidden, int64_t at, int count,
                                    Real* buffer) {
  constexpr int kLanes = Lanes<Real>::kCount;
  if (change.bias) {
    alignas(64) Real of_classes[kBlock];
    const Real* bias = read_block(change.bias->row(0), change.bias->type, at, count, of_classes);
    int j = 0;
    for (; j + kLanes <= count; j += kLanes) store(buffer + j, load(from + j) + load(bias + j));
    for (; j < count; ++j) buffer[j] = from[j] + bias[j];
    from = buffer;
  }
  if (change.shift != 0) {
    const Halves<Real> shift(change.shift);
    int j = 0;
    for (; j + kLanes <= count; j += kLanes) store(buffer + j, shift.below(load(from + j)));
    for (; j < count; ++j) buffer[j] = shift.below(from[j]);
    from = buffer;
  }
  if (hidden >= at && hidden < at + count) {
    if (from != buffer) memcpy(buffer, from, count * sizeof(Real));
    buffer[hidden - at] = Real(-HUGE_VAL);
    from = buffer;
  }
  return from;
}

template <class Real>
struct Row {
  const char* student;
  const char* teacher;
  DType student_type, teacher_type;
  int64_t classes;
  bool changed = false;  // by what follows
  Change of_student = {}, of_teacher = {};
  int64_t hidden = -1;  // the label, where a divergence is taken among the others

  template <class Body>  // body(s, t, at, count)
  TGT_HD void each_block(Body body) const {
    alignas(64) Real s_buffer[kBlock];
    alignas(64) Real t_buffer[kBlock];
    for (int64_t at = 0; at < classes; at += kBlock) {
      const int count = int(classes - at < kBlock ? classes - at : kBlock);
      const Real* s = read_block(student, student_type, at, count, s_buffer);
      const Real* t = read_block(teacher, teacher_type, at, count, t_buffer);
      if (changed) {
        s = changed_block(s, of_student, hidden, at, count, s_buffer);
        t = changed_block(t, of_teacher, hidden, at, count, t_buffer);
      }
      body(s, t, at, count);
    }
  }

  // A logit, also the hidden one.
  double logit(bool teachers, int64_t at) const {
    const Change& change = teachers ? of_teacher : of_student;
    Real buffer, of_class;
    Real value = *read_block(teachers ? teacher : student, teachers ? teacher_type : student_type, at, 1, &buffer);
    if (change.bias) value += *read_block(change.bias->row(0), change.bias->type, at, 1, &of_class);
    return change.shift != 0 ? Halves<Real>(change.shift).below(value) : value;
  }

  // One side beside itself, with all of its classes.
  Row alone(bool teachers) const {
    Row side = *this;
    side.hidden = -1;
    side.student = side.teacher = teachers ? teacher : student;
    side.student_type = side.teacher_type = teachers ? teacher_type : student_type;
    side.of_student = side.of_teacher = teachers ? of_teacher : of_student;
    return side;
  }
};

template <class Real>
TGT_APART int64_t first_largest(const Row<Real>& side) {
  Real best = Real(-HUGE_VAL);
  int64_t found = 0;
  side.each_block([&](const Real* values, const Real*, int64_t at, int count) {
    for (int j = 0; j < count; ++j) {
      if (values[j] > best) {
        best = values[j];
        found = at + j;
      }
    }
  });
  return found;
}

template <class Real>
Row<double> in_double(const Row<Real>& row) {
  return {row.student, row.teacher,    row.student_type, row.teacher_type, row.classes,
          row.changed, row.of_student, row.of_teacher,   row.hidden};
}

}  // namespace TGT_ISA
}  // namespace tgt
