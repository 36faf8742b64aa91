// How the adjustments of a call change a row: its logits, its options, and the way back of its gradients.
#pragma once

#include "by_label.h"

namespace tgt {
inline namespace TGT_ISA {

constexpr int kAtOnce = 4;  // sums that do not wait for each other

template <class V>
double sum_all(const V (&sums)[kAtOnce]) {
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Of a block, relative to a number near its mean. NaN or infinite where a logit is, or where it leaves the range.
template <class Real>
void add_block(const Real* values, int count, Moments& all) {
  using V = typename Lanes<Real>::Vector;
  constexpr int kLanes = Lanes<Real>::kCount;
  const int whole = count - count % (kAtOnce * kLanes);
  V sums[kAtOnce] = {};
  for (int j = 0; j < whole; j += kAtOnce * kLanes) {
    for (int k = 0; k < kAtOnce; ++k) sums[k] += load(values + j + k * kLanes);
  }
  double sum = sum_all(sums);
  for (int j = whole; j < count; ++j) sum += values[j];
  const Real middle = Real(sum / count);
  V differences[kAtOnce] = {}, squares[kAtOnce] = {};
  for (int j = 0; j < whole; j += kAtOnce * kLanes) {
    for (int k = 0; k < kAtOnce; ++k) {
      const V x = load(values + j + k * kLanes) - splat<V>(middle);
      differences[k] += x;
      squares[k] = fused(x, x, squares[k]);
    }
  }
  double first = sum_all(differences), second = sum_all(squares);
  for (int j = whole; j < count; ++j) {
    const double x = double(values[j]) - middle;
    first += x;
    second += x * x;
  }
  if (second < HUGE_VAL) return all.add(count, middle + first / count, second - first * (first / count));
  for (int j = 0; j < count; ++j) {  // some are not there, or very large
    if (values[j] != Real(-HUGE_VAL)) all.add(1, values[j], 0);
  }
}

template <class Real>
TGT_APART Moments moments_of(const Row<Real>& side) {
  Moments all;
  side.each_block([&](const Real* values, const Real*, int64_t, int count) { add_block(values, count, all); });
  return all;
}

// `label`: below 0 where the row has none, or where its terms are not asked for. `soft`: both sides are read.
template <class Real>
TGT_APART void adjust_row(const DistillRows& call, int64_t i, int64_t label, bool soft, Row<Real>& logits,
                          RowOptions& options) {
  const Adjustments& adjust = *call.adjust;
  options = RowOptions(call.options);
  if (adjust.student_bias) logits.of_student.bias = &adjust.student_bias;
  if (const Matrix& bias = soft ? adjust.teacher_bias : adjust.student_bias) logits.of_teacher.bias = &bias;
  logits.changed = adjust.student_bias || adjust.teacher_bias;
  options.adjust_row(adjust, i);
  if (adjust.standardize && soft) {
    options.standardise_row(moments_of(logits.alone(false)), moments_of(logits.alone(true)));
    if (DivergenceKind(options.divergence) == DivergenceKind::kMse) {  // the others see no mean
      logits.of_student.shift = options.student.mean;
      logits.of_teacher.shift = options.teacher.mean;
      logits.changed = true;
      options.student.mean = options.teacher.mean = 0;
    }
  }
  if (label < 0 || !options.adjust_label(adjust, label, soft)) return;
  logits.hidden = label;
  logits.changed = true;
}

// A side's gradient from that of what the kernel saw, which goes by a standardised side's spread alone, and from that
// of the hard term: gradient - bend (x - mean) sum gradient (x - mean) + hard.
template <class Real>
TGT_APART void bend_row(const Row<Real>& side, const Standard& standard, const Real* gradient, const Real* hard,
                        const Matrix& to, int64_t i) {
  using V = typename Lanes<Real>::Vector;
  constexpr int kLanes = Lanes<Real>::kCount;
  const Halves<Real> mean(standard.mean);
  const V lowest = splat<V>(sizeof(Real) == 8 ? Real(-DBL_MAX) : Real(-FLT_MAX));
  const auto difference = [&](V x) { return x < lowest ? V{} : mean.below(x); };
  const auto at_lanes = [](const Real* from, int lanes, Real fill) {
    return lanes < kLanes ? load_part(from, lanes, fill) : load(from);
  };
  double along = 0;
  if (standard.bend != 0) {
    side.each_block([&](const Real* x, const Real*, int64_t at, int count) {
      const Real* from = gradient + at;
      V sums[kAtOnce] = {};
      int j = 0;
      for (; j + kAtOnce * kLanes <= count; j += kAtOnce * kLanes) {
        for (int k = 0; k < kAtOnce; ++k) {
          const int here = j + k * kLanes;
          sums[k] = fused(load(from + here), difference(load(x + here)), sums[k]);
        }
      }
      for (; j < count; j += kLanes) {
        const int lanes = count - j < kLanes ? count - j : kLanes;
        const V z = difference(at_lanes(x + j, lanes, Real(-HUGE_VAL)));
        sums[0] = fused(at_lanes(from + j, lanes, Real(0)), z, sums[0]);
      }
      along += sum_all(sums);
    });
  }
  const V factor = splat<V>(Real(-standard.bend * along));
  alignas(64) Real buffer[kBlock];
  side.each_block([&](const Real* x, const Real*, int64_t at, int count) {
    Real* values = write_block(to.row(i), to.type, at, buffer);
    for (int j = 0; j < count; j += kLanes) {
      const int lanes = count - j < kLanes ? count - j : kLanes;
      const V z = difference(at_lanes(x + j, lanes, Real(-HUGE_VAL)));
      V value = fused(z, factor, at_lanes(gradient + at + j, lanes, Real(0)));
      if (hard) value += at_lanes(hard + at + j, lanes, Real(0));
      if (lanes < kLanes) {
        store_part(values + j, value, lanes);
      } else {
        store(values + j, value);
      }
    }
    if (values == buffer) finish_block(values, to.row(i), to.type, at, count);
  });
}

}  // namespace TGT_ISA
}  // namespace tgt
