// One row pair of an adjusted loss on a device: how it is read, and what its threads find and have to know.
//
// The numbers of a row are made in double by its first warp (csrc/common/row_options.h, by_label.h, corrected.h) and
// lie in shared memory.
#pragma once

#include "../common/corrected.h"
#include "../common/skewed.h"
#include "distill_stream.h"

namespace tgt::cuda {

// An adjusted call as the kernels read it.
struct AdjustedDeviceCall {
  DeviceCall d;
  Adjustments adjust;
  bool student_bias_aligned = false, teacher_bias_aligned = false;
};

inline namespace TGT_ISA {

// Logits with their biases.
template <class Real>
struct AdjustedRow : StreamRow<Real> {
  static constexpr DType kBiasType = sizeof(Real) == 8 ? DType::kFloat64 : DType::kFloat32;
  const char* student_bias;
  const char* teacher_bias;
  bool student_bias_aligned, teacher_bias_aligned;

  TGT_DEVICE void load(int64_t k, Eight<Real>& s, Eight<Real>& t) const {
    StreamRow<Real>::load(k, s, t);
    add(student_bias, student_bias_aligned, k, s);
    add(teacher_bias, teacher_bias_aligned, k, t);
  }
  TGT_DEVICE LabelLogits logits_of(int64_t label) const {
    Real s, t;
    this->one(label, s, t);
    if (student_bias) s += load_one<Real>(student_bias, kBiasType, label);
    if (teacher_bias) t += load_one<Real>(teacher_bias, kBiasType, label);
    return {s, t};
  }

 private:
  TGT_DEVICE void add(const char* bias, bool aligned, int64_t k, Eight<Real>& to) const {
    if (!bias) return;
    const Eight<Real> of_classes = load_padded(bias, kBiasType, k * kVector, this->classes, aligned, Real(0));
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) to.v[i] += of_classes.v[i];
  }
};

// `other`: what the student is compared with, the teacher or, without a soft term, the student again.
template <class Real>
TGT_DEVICE AdjustedRow<Real> adjusted_row(const AdjustedDeviceCall& a, int64_t i, bool soft) {
  const DistillCall& call = a.d.call;
  const Matrix &other = soft ? call.teacher : call.student,
               &bias = soft ? a.adjust.teacher_bias : a.adjust.student_bias;
  AdjustedRow<Real> row;
  row.student_type = call.student.type;
  row.teacher_type = other.type;
  row.student = call.student.row(i);
  row.teacher = other.row(i);
  row.student_aligned = a.d.student_aligned;
  row.teacher_aligned = soft ? a.d.teacher_aligned : a.d.student_aligned;
  row.classes = call.classes;
  row.first = 0;
  row.count = (call.classes + kVector - 1) / kVector;
  row.student_bias = static_cast<const char*>(a.adjust.student_bias.data);
  row.teacher_bias = static_cast<const char*>(bias.data);
  row.student_bias_aligned = a.student_bias_aligned;
  row.teacher_bias_aligned = soft ? a.teacher_bias_aligned : a.student_bias_aligned;
  return row;
}

// A class's place in the eight from `first` on; below 0: it is not among them.
TGT_DEVICE int place_of(int64_t at, int64_t first) {
  return at >= first && at < first + kVector ? static_cast<int>(at - first) : -1;
}

// What the threads of a row find in its logits. alignas: exchanged by 8 bytes
template <class Real>
struct alignas(8) Found {
  Real student = minus_infinity<Real>();  // the largest that the soft term sees: a hidden label's is not among them
  Real teacher = minus_infinity<Real>();
  Real hard = minus_infinity<Real>();  // the student's largest beside the label's
  int student_masked = 0, teacher_masked = 0, unusual = 0;
  int64_t student_at = INT64_MAX, teacher_at = INT64_MAX;  // the first of the largest

  TGT_DEVICE bool bad_student(int64_t classes) const { return (unusual & kBadStudent) || student_masked == classes; }
  TGT_DEVICE bool bad_teacher(int64_t classes) const { return (unusual & kBadTeacher) || teacher_masked == classes; }

  static constexpr int kBadStudent = 16, kBadTeacher = 32;  // beside an UnusualFlag: a NaN or +inf
};
template <class Real>
struct MergeFound {
  TGT_DEVICE Found<Real> operator()(Found<Real> a, const Found<Real>& b) const {
    raise(b.student, b.student_at, a.student, a.student_at);
    raise(b.teacher, b.teacher_at, a.teacher, a.teacher_at);
    a.hard = larger(a.hard, b.hard);
    a.student_masked += b.student_masked;
    a.teacher_masked += b.teacher_masked;
    a.unusual |= b.unusual;
    return a;
  }
  static TGT_DEVICE void raise(Real value, int64_t at, Real& best, int64_t& best_at) {
    if (value > best || (value == best && at < best_at)) best = value, best_at = at;
  }
};

// The first `count` of eight classes, looked at one by one.
template <class Real>
TGT_DEVICE void inspect(const Eight<Real>& s, const Eight<Real>& t, int64_t count, int hidden, Found<Real>& found) {
  TGT_UNROLL
  for (int i = 0; i < kVector; ++i) {
    if (i >= count) continue;
    const bool student = s.v[i] == minus_infinity<Real>(), teacher = t.v[i] == minus_infinity<Real>();
    found.student_masked += student;
    found.teacher_masked += teacher;
    if (!(s.v[i] < Real(HUGE_VAL))) found.unusual |= Found<Real>::kBadStudent;
    if (!(t.v[i] < Real(HUGE_VAL))) found.unusual |= Found<Real>::kBadTeacher;
    if (i == hidden) continue;
    found.unusual |= (student && !teacher ? kStudentOnly : 0) | (teacher && !student ? kTeacherOnly : 0);
  }
}

// `label`: below 0 where there is none; `apart`: the soft term does not see it.
template <class Real>
TGT_DEVICE Found<Real> find(const BlockTeam& team, const AdjustedRow<Real>& row, int64_t label, bool apart) {
  Found<Real> found;
  for (int64_t k = team.thread; k < row.count; k += team.size) {
    Eight<Real> s, t;
    row.load(k, s, t);
    const int64_t first = k * kVector;
    const int own = place_of(label, first), hidden = apart ? own : -1;
    Real finite = 0;  // what is not remains so, or becomes NaN
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      finite = fused(s.v[i], Real(0), finite);
      finite = fused(t.v[i], Real(0), finite);
    }
    if (!(finite == 0)) inspect(s, t, row.classes - first, hidden, found);
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (i != own) found.hard = larger(s.v[i], found.hard);
      if (i == hidden) continue;
      if (s.v[i] > found.student) found.student = s.v[i], found.student_at = first + i;
      if (t.v[i] > found.teacher) found.teacher = t.v[i], found.teacher_at = first + i;
    }
  }
  return merge_lanes<kWarp / 2>(found, MergeFound<Real>());
}

// Sums of both sides' differences from some of their logits, and of the squares of these.
struct Differences {
  double student = 0, student_squares = 0, teacher = 0, teacher_squares = 0;
};
struct AddDifferences {
  TGT_DEVICE Differences operator()(const Differences& a, const Differences& b) const {
    return {a.student + b.student, a.student_squares + b.student_squares, a.teacher + b.teacher,
            a.teacher_squares + b.teacher_squares};
  }
};

// About numbers that are among the logits, no further from the mean than a root of their count times the deviation:
// double has digits for that.
template <class Real>
TGT_DEVICE Differences differences(const BlockTeam& team, const AdjustedRow<Real>& row, const LabelLogits& from) {
  Differences mine;
  for (int64_t k = team.thread; k < row.count; k += team.size) {
    Eight<Real> s, t;
    row.load(k, s, t);
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const double a = s.v[i] == minus_infinity<Real>() ? 0 : s.v[i] - from.student;
      const double b = t.v[i] == minus_infinity<Real>() ? 0 : t.v[i] - from.teacher;
      mine.student += a;
      mine.student_squares = fused(a, a, mine.student_squares);
      mine.teacher += b;
      mine.teacher_squares = fused(b, b, mine.teacher_squares);
    }
  }
  return merge_lanes<kWarp / 2>(mine, AddDifferences());
}
TGT_DEVICE Moments moments_of(double count, double from, double sum, double squares) {
  Moments all;
  all.add(count, from + sum / count, squares - sum * (sum / count));
  return all;
}

// A standardised side's way back: gradient + z * factor, of z the logit as the soft term sees it.
template <class Real>
struct Bend {
  Real high, low;  // the mean, shrunk: a number and what it has no digits for
  Real scale;
  Real factor;

  TGT_DEVICE Real z(Real x) const { return x == minus_infinity<Real>() ? Real(0) : ((shrunk(x, high) - low) * scale); }
};

template <class Real>
TGT_DEVICE Real in_range(double value) {  // NaN stays
  constexpr double kMost = sizeof(Real) == 8 ? DBL_MAX : FLT_MAX;
  return Real(value > kMost ? kMost : value);
}

template <class Real>
TGT_DEVICE Bend<Real> bend_of(const Standard& side, double inverse) {
  const double mean = side.mean * kShrink;
  const Real high = Real(mean);
  return {high, Real(mean - high), in_range<Real>(inverse / kShrink), 0};
}

// What all threads of a row have to know.
template <class Real>
struct KnownRow {
  Constants<Real> row;
  Bend<Real> student, teacher;
  Real hard_max;  // of all but the label, shrunk
};

template <class D>
TGT_DEVICE Unit unit_of(const RowOptions& options, int64_t classes) {
  if (!in_units<D>()) return {1, 1};
  const double unit = unit_for(fmin(options.temperature, options.teacher_temperature), classes);
  return {unit, 1 / unit};
}

template <class D, class Real>
TGT_DEVICE KnownRow<Real> known_row(const RowOptions& options, const Unit& unit, const Found<Real>& found) {
  const auto some = [](Real largest) { return largest == minus_infinity<Real>() ? 0 : largest * kShrink; };
  KnownRow<Real> known{};
  Constants<Real>& row = known.row;
  known.student = bend_of<Real>(options.student, options.inverse_ts);
  known.teacher = bend_of<Real>(options.teacher, options.inverse_tt);
  known.hard_max = Real(some(found.hard));
  row.student_max = Real(some(found.student));
  row.teacher_max = Real(some(found.teacher));
  row.inverse_ts = in_range<Real>(options.inverse_ts * unit.nat / kShrink);
  row.inverse_tt = in_range<Real>(options.inverse_tt * unit.nat / kShrink);
  constexpr double kExponent = sizeof(Real) == 8 ? 1 : kLog2E;
  row.binary_ts = in_range<Real>(options.inverse_ts * (kExponent / kShrink));
  row.binary_tt = in_range<Real>(options.inverse_tt * (kExponent / kShrink));
  row.in_nats = Real(unit.in_nats);
  row.nat = Real(unit.nat);
  row.mixture = {Real(options.beta), Real(1 - options.beta)};
  if (options.skew != 0) {
    const bool of_student = DivergenceKind(options.divergence) == DivergenceKind::kReverseKl;
    row.mixture = {Real(options.skew), of_student ? Real(-1) : Real(1)};
  }
  return known;
}

// A class before its probabilities are normalised, and after it. Squares are of logits less the mean that
// standardised ones have.
template <class D, class Real>
TGT_DEVICE Class<Real> shifted(Real s, Real t, const KnownRow<Real>& known) {
  if constexpr (D::kProbabilities) return shifted<D>(s, t, known.row);
  const Bend<Real>&student = known.student, &teacher = known.teacher;
  Class<Real> c{};
  c.a = bounded_below((shrunk(t, teacher.high) - teacher.low) * known.row.inverse_tt);
  c.b = bounded_below((shrunk(s, student.high) - student.low) * known.row.inverse_ts);
  return c;
}
template <class D, class Real>
TGT_DEVICE Class<Real> normalised(Real s, Real t, const KnownRow<Real>& known) {
  if constexpr (D::kProbabilities) return normalised<D>(s, t, known.row);
  return shifted<D>(s, t, known);
}
template <class Real>
TGT_DEVICE Real hard_exponential(Real s, const KnownRow<Real>& known) {
  return exp_scaled(shrunk(s, known.hard_max), exponent_of<Real>(1));
}

// Those of a row; of sums of nothing, which are 0, zeros.
TGT_DEVICE Normalisers normalisers_of(const Sums<double>& sums) {
  Normalisers n = normalisers_of(sums.student, sums.teacher, sums.hard);
  if (sums.student == 0) n.log_student = n.inverse_student = 0;
  if (sums.teacher == 0) n.log_teacher = n.inverse_teacher = 0;
  return n;
}

// What is read of the first warp's work is in shared memory; this is told beside it.
struct Done {
  int64_t nothing = 0;
};
// `run` of the sum of all, by the first warp, before any thread goes on.
template <class T, class Merge, class Run>
TGT_DEVICE void by_first_warp(const BlockTeam& team, const T& of_warp, int stage, Merge merge, Run run) {
  team.template tell<Done>(of_warp, stage, Same(), merge, [&](const T& all) {
    run(all);
    return Done();
  });
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
