// One row pair on a device: what a class is, what a row's threads sum up, and the gradients of eight classes.
//
// The semantics are those of csrc/cpu/distill_row.h. A row's maxima are known before its sums are taken, so sums are
// plain additions in a fixed tree: in Real within a warp, in double beyond.
#pragma once

#include "team.h"
#include "vectors.h"

namespace tgt {
inline namespace TGT_ISA {

// An error of 2^-22 in a logarithm is nothing to a gradient, but can be all of a small loss.
template <>
struct RatioMath<float> {
  static TGT_DEVICE float exponential(float x) { return cuda::exp2_fast(x * 1.44269504f); }
  static TGT_DEVICE float logarithm(float x) { return log_positive(x); }
  static TGT_DEVICE float coarse_logarithm(float x) { return cuda::log2_fast(larger(x, FLT_MIN)) * 0.693147181f; }
};

}  // namespace TGT_ISA
}  // namespace tgt

namespace tgt::cuda {

// A call as the kernels read it. Every pointer is to memory of the device.
struct DeviceCall {
  DistillCall call;
  double unit = 1, nat = 1;                               // of log-probabilities in nats, see units_of; its inverse
  double squared = 1;                                     // the square of the student's temperature
  double inverse_ts = 1, inverse_tt = 1;                  // 1 / T
  float binary_ts = 0, binary_tt = 0;                     // log2(e) / T
  float ordinary = 0;                                     // what the logits of ordinary rows stay within
  int power = 0;                                          // see Terms
  bool even = false;                                      // the weights of a mixture are equal
  int64_t vectors_per_block = 0;                          // of a row, with clusters
  int chunk = 0;                                          // of these, what arrives at once
  bool student_aligned = false, teacher_aligned = false;  // rows start at multiples of 16 bytes
  bool d_student_aligned = false, d_teacher_aligned = false;
};

inline namespace TGT_ISA {

constexpr double kLog2E = 1.4426950408889634;

// What a logit less another is multiplied by, so that it is finite whatever they are.
constexpr double kShrink = 1.0 / 8;

template <class Real>
struct Constants {
  Real student_max, teacher_max;  // shrunk
  Real inverse_ts, inverse_tt;    // 1 / T, in units and of what is shrunk
  Real binary_ts, binary_tt;      // exponent_of T
  Real log_student, log_teacher, inverse_student, inverse_teacher;
  Real binary_log_student, binary_log_teacher;  // log2 of the sums
  Real nat, in_nats;                            // a nat in units, a unit in nats
  Mixture<Real> mixture;
};

// Divergences whose terms are as large as log-probabilities take those in units of so many nats that sums over a row
// stay in range, whatever the logits. The others' terms are bounded. A power of 2: it rounds nothing.
template <class D>
TGT_DEVICE constexpr bool in_units() {
  return D::kShiftedSums || D::kSquares;
}
template <class D>
TGT_DEVICE double units_of(const DeviceCall& d) {
  return in_units<D>() ? d.unit : 1;
}
TGT_HD double unit_for(double least_temperature, int64_t classes) {
  constexpr double kLargest = 1.3292279957849159e36;  // 2^120
  double unit = 16;
  while (unit < 16 * static_cast<double>(classes)) unit *= 2;
  for (double t = least_temperature; t < 1 && unit < kLargest; t *= 2) unit *= 2;
  return unit;
}
inline double unit_for(const DistillOptions& options, int64_t classes) {
  const double ts = options.temperature, tt = options.teacher_temperature;
  return unit_for(ts < tt ? ts : tt, classes);
}

TGT_DEVICE float shrunk(float s, float shrunk_max) { return fused(s, float(kShrink), -shrunk_max); }
TGT_DEVICE double shrunk(double s, double shrunk_max) { return fused(s, kShrink, -shrunk_max); }

// What exp_scaled takes for exp(shrunk / T).
template <class Real>
TGT_DEVICE Real exponent_of(double temperature) {
  return Real((sizeof(Real) == 8 ? 1 : kLog2E) / kShrink / temperature);
}
inline void set_temperatures(DeviceCall& d) {
  const DistillOptions& options = d.call.options;
  const double ts = options.temperature, tt = options.teacher_temperature;
  d.nat = 1 / d.unit;
  d.squared = ts * ts;
  d.inverse_ts = 1 / ts;
  d.inverse_tt = 1 / tt;
  d.binary_ts = static_cast<float>(kLog2E / ts);
  d.binary_tt = static_cast<float>(kLog2E / tt);
  // At such a size the rounding of a largest logit over its temperature, which all exponents of a gradient then share,
  // is less than that of a 16-bit result.
  constexpr double kOrdinary = 4096;
  d.ordinary = static_cast<float>(kOrdinary * (ts < tt ? ts : tt));
  d.even = options.beta == 0.5;
  d.power = ts == 1 ? 1 : ts == 2 ? 2 : ts == 3 ? 3 : ts == 4 ? 4 : 0;
}
TGT_DEVICE float exp_scaled(float shifted, float binary) { return exp2_fast(shifted * binary); }
TGT_DEVICE double exp_scaled(double shifted, double inverse) {
  return exp_nonpositive(bounded_below(shifted * inverse));
}

// A class relative to the row's maxima. A NaN is not looked for here: its row is known by now.
template <class D, class Real>
TGT_DEVICE Class<Real> shifted(Real s, Real t, const Constants<Real>& row) {
  Class<Real> c;
  if constexpr (D::kProbabilities) {
    const Real a = shrunk(t, row.teacher_max), b = shrunk(s, row.student_max);
    c.p = exp_scaled(a, row.binary_tt);
    c.q = exp_scaled(b, row.binary_ts);
    c.a = bounded_below(a * row.inverse_tt);
    c.b = bounded_below(b * row.inverse_ts);
  } else {
    c.a = bounded_below(t * row.inverse_tt);
    c.b = bounded_below(s * row.inverse_ts);
    c.p = c.q = 0;
  }
  return c;
}

// exp(shrunk / T) / sum. In float the division is part of the exponent.
TGT_DEVICE float probability(float shifted, float binary, float binary_log, float) {
  return exp2_fast(fused(shifted, binary, -binary_log));
}
TGT_DEVICE double probability(double shifted, double inverse, double, double inverse_sum) {
  return exp_scaled(shifted, inverse) * inverse_sum;
}

// A class of the row's distributions, for sums and gradients that need the normalisers.
template <class D, class Real>
TGT_DEVICE Class<Real> normalised(Real s, Real t, const Constants<Real>& row) {
  Class<Real> c = shifted<D>(s, t, row);
  if constexpr (D::kProbabilities) {
    c.a = c.a - row.log_teacher;
    c.b = c.b - row.log_student;
    if constexpr (D::kShiftedSums) {
      c.p = probability(shrunk(t, row.teacher_max), row.binary_tt, row.binary_log_teacher, row.inverse_teacher);
      c.q = probability(shrunk(s, row.student_max), row.binary_ts, row.binary_log_student, row.inverse_student);
    } else {  // these take sums of small differences from p and q, which must not share an error
      c.p = c.p * row.inverse_teacher;
      c.q = c.q * row.inverse_student;
    }
  }
  return c;
}

// exp(s - max), which the hard term sums at temperature 1.
template <class Real>
TGT_DEVICE Real hard_exponential(Real s, const Constants<Real>& row) {
  return exp_scaled(shrunk(s, row.student_max), exponent_of<Real>(1));
}

// What the threads of a row find in its logits. alignas: exchanged by 16 bytes
template <class Real>
struct alignas(16) Extremes {
  Real student = minus_infinity<Real>();
  Real teacher = minus_infinity<Real>();
  int masked = 0;  // classes whose student logit is -inf
  int unusual = 0;
};
enum UnusualFlag : int { kStudentOnly = 1, kTeacherOnly = 2, kNotANumber = 4, kFar = 8 };

// Of numbers: one instruction in float, where larger() takes two for the sake of NaN.
TGT_DEVICE float largest_of(float a, float b) { return fmaxf(a, b); }
TGT_DEVICE double largest_of(double a, double b) { return larger(a, b); }

// Of a warp.
template <class Real, class Merge>
TGT_DEVICE Extremes<Real> extremes_of_warp(Extremes<Real> mine, Merge merge) {
  if (any_in_warp(mine.masked != 0 || mine.unusual != 0)) return merge_lanes<kWarp / 2>(mine, merge);
  TGT_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    mine.student = largest_of(mine.student, shuffle_xor(mine.student, mask));
    mine.teacher = largest_of(mine.teacher, shuffle_xor(mine.teacher, mask));
  }
  return mine;
}

template <class Real>
struct MergeExtremes {
  TGT_DEVICE Extremes<Real> operator()(const Extremes<Real>& a, const Extremes<Real>& b) const {
    return {larger(a.student, b.student), larger(a.teacher, b.teacher), a.masked + b.masked, a.unusual | b.unusual};
  }
};

// NaN and infinities are taken in without a branch: the maxima miss a NaN, but x * 0 does not.
template <class Real>
TGT_DEVICE bool add_extremes(const Eight<Real>& s, const Eight<Real>& t, Extremes<Real>& e) {
  Real finite = 0;
  TGT_UNROLL
  for (int i = 0; i < kVector; ++i) {
    e.student = larger(s.v[i], e.student);
    e.teacher = larger(t.v[i], e.teacher);
    finite = fused(s.v[i], Real(0), finite);
    finite = fused(t.v[i], Real(0), finite);
  }
  return finite == 0;
}

// The first `count` of eight classes, looked at one by one.
template <class Real>
TGT_DEVICE void inspect(const Eight<Real>& s, const Eight<Real>& t, int64_t count, Extremes<Real>& e) {
  TGT_UNROLL
  for (int i = 0; i < kVector; ++i) {
    if (i >= count) continue;
    const bool student = s.v[i] == minus_infinity<Real>(), teacher = t.v[i] == minus_infinity<Real>();
    e.masked += student;
    e.unusual |= (student && !teacher ? kStudentOnly : 0) | (teacher && !student ? kTeacherOnly : 0);
    e.unusual |= !(s.v[i] < Real(HUGE_VAL)) || !(t.v[i] < Real(HUGE_VAL)) ? kNotANumber : 0;
  }
}

template <class D>
TGT_DEVICE bool is_infinite(int unusual) {
  return (D::kNeedsStudent && (unusual & kStudentOnly)) || (D::kNeedsTeacher && (unusual & kTeacherOnly));
}

constexpr double kSmall = 8.470329472543003e-22;  // 2^-70: squares in units of its inverse stay in range
constexpr double kTiny = 1.0 / (1ull << 36);      // as many classes as there may be stay in range

// alignas: exchanged by 8 bytes
template <class Real>
struct alignas(8) Sums {
  Real student = 0, teacher = 0, hard = 0;
  Real linear = 0;    // sum of (s - max) * kTiny over the finite classes
  Real x = 0, y = 0;  // in units; of mse x in nats, y in units of 1 / kSmall, should x leave the range

  template <class Other>
  TGT_DEVICE Sums<Other> as() const {
    return {Other(student), Other(teacher), Other(hard), Other(linear), Other(x), Other(y)};
  }
};

template <class Real>
struct AddSums {
  TGT_DEVICE Sums<Real> operator()(const Sums<Real>& a, const Sums<Real>& b) const {
    return {a.student + b.student, a.teacher + b.teacher, a.hard + b.hard, a.linear + b.linear, a.x + b.x, a.y + b.y};
  }
};

// Of a warp: those that the divergence and the row's terms have.
template <class D, class Real>
TGT_DEVICE Sums<Real> sums_of_warp(Sums<Real> mine, bool hard, bool linear) {
  const auto add = [](Real& sum) {
    TGT_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  };
  if constexpr (D::kProbabilities) {
    add(mine.student);
    add(mine.teacher);
  }
  if constexpr (D::kSquares || (D::kShiftedSums && D::kNeedsStudent)) add(mine.x);
  if constexpr (D::kSquares || (D::kShiftedSums && D::kNeedsTeacher)) add(mine.y);
  if (hard) add(mine.hard);
  if (linear) add(mine.linear);
  return mine;
}
template <class Real>
struct WidenSums {
  TGT_DEVICE Sums<double> operator()(const Sums<Real>& sums) const { return sums.template as<double>(); }
};

template <class Team, class Real>
TGT_DEVICE Sums<double> add_all(const Team& team, const Sums<Real>& mine, int stage) {
  const Sums<Real> of_warp = merge_lanes<kWarp / 2>(mine, AddSums<Real>());
  return team.merge_warps(of_warp.template as<double>(), stage, AddSums<double>());
}

// Which terms a row has; the same for all its threads.
struct Terms {
  bool hard;      // a hard term
  int power;      // exp(s - max) is this power of exp((s - max) / Ts), which the divergence takes; 0: of its own
  bool smoothed;  // a smoothed label

  TGT_DEVICE bool same() const { return power == 1; }
};

// The powers of Terms, from 2 on.
template <class Real>
TGT_DEVICE Real power_of(Real x, int power) {
  const Real squared = x * x;
  return power == 2 ? squared : squared * (power == 3 ? x : squared);
}

template <class D>
TGT_DEVICE Terms terms_of(const DeviceCall& d, bool hard) {
  return {hard, D::kProbabilities ? d.power : 0, hard && d.call.options.label_smoothing > 0};
}

template <class D, class Real>
TGT_DEVICE void add_sums(const Eight<Real>& s, const Eight<Real>& t, const Constants<Real>& row, const Terms& terms,
                         Sums<Real>& sums) {
  const bool powers = terms.hard && terms.power > 1;
  TGT_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const Class<Real> c = shifted<D>(s.v[i], t.v[i], row);
    if constexpr (D::kProbabilities) {
      sums.student += c.q;
      sums.teacher += c.p;
      if (powers) sums.hard += power_of(c.q, terms.power);
    }
    if constexpr (D::kSquares) {
      const Real difference = c.b - c.a, in_nats = difference * row.in_nats,
                 small = difference * (row.in_nats * Real(kSmall));
      sums.x = fused(in_nats, in_nats, sums.x);
      sums.y = fused(small, small, sums.y);
    } else if constexpr (D::kShiftedSums) {
      D::add(c, row.mixture, sums.x, sums.y);
    }
  }
  if (terms.hard && terms.power == 0) {
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) sums.hard += hard_exponential(s.v[i], row);
  }
  if (terms.smoothed) {
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const Real shifted = s.v[i] == minus_infinity<Real>() ? Real(0) : shrunk(s.v[i], row.student_max);
      sums.linear = fused(shifted, Real(kTiny / kShrink), sums.linear);
    }
  }
}

// Log-probabilities in what unit: so many nats, and its inverse.
struct Unit {
  double in_nats, nat;
};
template <class D>
TGT_DEVICE Unit unit_of(const DeviceCall& d) {
  if constexpr (in_units<D>()) return {d.unit, d.nat};
  return {1, 1};
}

template <class D, class Real>
TGT_DEVICE Constants<Real> constants_of(const DeviceCall& d, double student_max, double teacher_max) {
  const DistillOptions& options = d.call.options;
  const Unit unit = unit_of<D>(d);
  constexpr double kGrow = 1 / kShrink;
  const double grown = unit.nat * (D::kProbabilities ? kGrow : 1);
  constexpr bool kDouble = sizeof(Real) == 8;
  Constants<Real> row{};
  row.student_max = Real(student_max * kShrink);
  row.teacher_max = Real(teacher_max * kShrink);
  row.inverse_ts = Real(d.inverse_ts * grown);
  row.inverse_tt = Real(d.inverse_tt * grown);
  row.binary_ts = kDouble ? Real(d.inverse_ts * kGrow) : Real(d.binary_ts) * Real(kGrow);
  row.binary_tt = kDouble ? Real(d.inverse_tt * kGrow) : Real(d.binary_tt) * Real(kGrow);
  row.in_nats = Real(unit.in_nats);
  row.nat = Real(unit.nat);
  row.mixture = {Real(options.beta), Real(1 - options.beta)};
  return row;
}

struct Normalisers {
  double log_student, log_teacher, inverse_student, inverse_teacher, log_hard, inverse_hard;
};

// Logarithms and reciprocals in double, where lone lanes would leave the others idle: of four lanes the first takes
// the student's, the second the teacher's, the others the hard term's.
TGT_DEVICE Normalisers normalisers_of(double student_sum, double teacher_sum, double hard_sum) {
  struct Mine {
    double log, inverse;
  };
  const int lane = thread_in_block() % 4;
  const double sum = lane == 0 ? student_sum : lane == 1 ? teacher_sum : hard_sum;
  Mine mine;
  mine.log = log(sum);
  mine.inverse = 1 / sum;
  const Mine next = shuffle_xor(mine, 1), second = shuffle_xor(mine, 2), third = shuffle_xor(mine, 3);
  const Mine& student = lane == 0 ? mine : lane == 1 ? next : lane == 2 ? second : third;
  const Mine& teacher = lane == 0 ? next : lane == 1 ? mine : lane == 2 ? third : second;
  const Mine& hard = lane < 2 ? second : mine;
  return {student.log, teacher.log, student.inverse, teacher.inverse, hard.log, hard.inverse};
}

template <class Real>
TGT_DEVICE void settle(Constants<Real>& row, const Normalisers& n) {
  row.log_student = Real(n.log_student * row.nat);
  row.log_teacher = Real(n.log_teacher * row.nat);
  row.inverse_student = Real(n.inverse_student);
  row.inverse_teacher = Real(n.inverse_teacher);
  row.binary_log_student = Real(n.log_student * kLog2E);
  row.binary_log_teacher = Real(n.log_teacher * kLog2E);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
