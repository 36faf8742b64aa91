// The loss against a top-k teacher: its call, what is kept of a row, and the mathematics of a row.
//
// The classes of a row are the top k of its teacher and the others, its tail. The tail is summed relative to its own
// maximum, so that it is exact however little of the row it is. With kBucket the divergence is that of k + 1 classes,
// of which the tail is one; its gradient reaches a class of the tail by the class's share of it.
#pragma once

#include <cstddef>

#include "distill.h"

namespace tgt {

enum class TailForm : int { kBucket, kRenormalize, kUniform };

// Entries of -inf are padding.
struct TopK {
  const int64_t* ids = nullptr;  // [rows, entries]
  int64_t id_stride = 0;
  int64_t entries = 0;
  Matrix log_probs;      // [rows, entries]
  Matrix tail_log_prob;  // [rows, 1], or none
  TailForm form = TailForm::kBucket;
};

// A row as backward needs it, in double; logits are raw ones. The coefficient lies where a RowState has it.
struct TopKState {
  double tail_max;     // of the logits of the tail
  double tail_sum;     // sum exp((s - tail_max) / T) over the tail, 0 if it is empty
  double tail_finite;  // number of its classes whose logit is not -inf
  double peak;         // of all logits
  double student_lse;  // log-sum-exp of (s - peak) / T over what the soft term sees
  double teacher_lse;  // log-sum-exp of the top k
  double hard_lse;     // log-sum-exp of s - peak over all classes
  double coefficient;
  double x, y;    // the divergence's normalised sums
  double finite;  // number of all classes whose logit is not -inf
  double flags;
};
constexpr int kTopKState = sizeof(TopKState) / sizeof(double);
static_assert(kTopKState == kRowState, "one size");
static_assert(offsetof(TopKState, coefficient) == offsetof(RowState, coefficient), "found at one place");

struct TopKCall {
  DistillCall base;  // its teacher, teacher's gradient, state and statistics are not set
  TopK topk;
  TopKState* row_state = nullptr;  // [rows]

  TGT_HD bool is_fp64() const { return base.student.type == DType::kFloat64 || topk.log_probs.type == DType::kFloat64; }
};

inline namespace TGT_ISA {

// Sums over the classes of the tail seen so far, relative to their maximum: b = (s - max) / T.
struct TailSums {
  double max = -HUGE_VAL;
  double sum = 0;      // sum exp(b)
  double hard = 0;     // sum exp(s - max)
  double linear = 0;   // sum of s - max over the finite ones
  double entropy = 0;  // sum exp(b) b
  double finite = 0;   // how many those are

  TGT_HD void raise(double new_max, double inverse_t) {
    const double rise = max == -HUGE_VAL ? 0 : new_max - max;
    if (rise != 0) {
      const double shrink = exp(-rise * inverse_t);
      entropy = (entropy - rise * inverse_t * sum) * shrink;
      sum *= shrink;
      hard *= exp(-rise);
      linear -= rise * finite;
    }
    max = new_max;
  }
};

// Sums over the top-k classes, relative to maxima that are known.
struct TopKSums {
  double student_max = -HUGE_VAL;  // of their logits
  double teacher_max = -HUGE_VAL;  // of their log-probabilities
  double student = 0;              // sum exp((s - student_max) / T)
  double hard = 0;                 // sum exp(s - student_max), or exp(s - peak)
  double linear = 0;               // sum of s - student_max over the finite ones
  double teacher = 0;              // sum exp(a - teacher_max)
  double finite = 0;
  bool hard_is_from_peak = false;
  bool missing = false;  // somewhere the student's logit is -inf
};

TGT_HD double log_or_nothing(double x) { return x > 0 ? log(x) : -HUGE_VAL; }

// Evaluates a function at several places one after the other. A warp of a device gives each to a lane.
struct InTurn {
  template <int kCount, class Function>
  TGT_HD void operator()(double (&x)[kCount], Function function) const {
    TGT_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = function(x[i]);
  }
};

// log(exp(a) + exp(b)) of several pairs, in place of their a.
template <int kCount, class Each>
TGT_HD void log_add_exp(double (&a)[kCount], const double (&b)[kCount], const Each& each) {
  double rise[kCount];
  for (int i = 0; i < kCount; ++i) rise[i] = a[i] > b[i] ? b[i] - a[i] : a[i] - b[i];
  each(rise, [](double below) { return log1p(exp(below)); });
  for (int i = 0; i < kCount; ++i) {
    const double most = a[i] > b[i] ? a[i] : b[i], least = a[i] > b[i] ? b[i] : a[i];
    a[i] = least == -HUGE_VAL ? most : most + rise[i];
  }
}

// Everything of the state that follows from the sums but x, y, coefficient and flags.
template <class Each>
TGT_HD void settle_topk(TopKState& row, const TailSums& tail, const TopKSums& topk, double tail_log_prob,
                        const DistillOptions& options, TailForm form, const Each& each) {
  const double inverse_t = 1 / options.temperature;
  row.tail_max = tail.max == -HUGE_VAL ? 0 : tail.max;
  row.tail_sum = tail.sum;
  row.tail_finite = tail.finite;
  row.finite = tail.finite + topk.finite;
  row.peak = tail.max > topk.student_max ? tail.max : topk.student_max;
  double logs[] = {tail.sum, topk.student, topk.teacher, tail.hard, topk.hard};
  each(logs, [](double x) { return log_or_nothing(x); });
  const bool restricted = form == TailForm::kRenormalize;
  const double of_teacher = topk.teacher > 0 ? topk.teacher_max + logs[2] : -HUGE_VAL;
  // The student's, the teacher's and the hard term's: of the tail, and of the top k.
  double both[] = {tail.sum > 0 ? (tail.max - row.peak) * inverse_t + logs[0] : -HUGE_VAL, tail_log_prob,
                   tail.hard > 0 ? tail.max - row.peak + logs[3] : -HUGE_VAL};
  const double of_topk[] = {
      topk.student > 0 ? (topk.student_max - row.peak) * inverse_t + logs[1] : -HUGE_VAL, of_teacher,
      topk.hard > 0 ? (topk.hard_is_from_peak ? 0 : topk.student_max - row.peak) + logs[4] : -HUGE_VAL};
  log_add_exp(both, of_topk, each);
  row.student_lse = restricted ? of_topk[0] : both[0];
  row.teacher_lse = restricted ? of_teacher : both[1];
  row.hard_lse = both[2];
}

// Whether the classes of the tail are told apart: the teacher's share of it is spread over them.
TGT_HD bool spread(const TopKState& row, TailForm form) { return form == TailForm::kUniform && row.tail_sum > 0; }

// The tail as one class, after normalisation, and what else takes a logarithm or an exponential of a settled row.
struct TailClass {
  double a, b;                 // log-probabilities of teacher and student, -inf where one has none of it
  Class<double> bounded;       // the same, bounded, with the probabilities
  double log_sum, log_finite;  // of the state's tail_sum and tail_finite
  double share;                // exp(b - log_sum): q of a class of the tail over exp((s - tail_max) / T)
  double u;                    // p of a class of a spread tail
  double hard;                 // exp(tail_max - peak - hard_lse)

  TGT_HD bool student_is_empty() const { return b == -HUGE_VAL; }
  TGT_HD bool teacher_is_empty() const { return a == -HUGE_VAL; }
};

template <class Each>
TGT_HD TailClass tail_class(const TopKState& row, const DistillOptions& options, double tail_log_prob,
                            const Each& each) {
  double logs[] = {row.tail_sum, row.tail_finite};
  each(logs, [](double x) { return log_or_nothing(x); });
  TailClass tail;
  tail.log_sum = logs[0];
  tail.log_finite = logs[1];
  tail.a = tail_log_prob - row.teacher_lse;
  tail.b = row.tail_sum > 0 ? (row.tail_max - row.peak) / options.temperature + logs[0] - row.student_lse : -HUGE_VAL;
  tail.bounded.a = bounded_below(tail.a);
  tail.bounded.b = bounded_below(tail.b);
  double shares[] = {tail.bounded.a, tail.bounded.b, tail.b - logs[0], bounded_below(tail.a - logs[1]),
                     row.tail_max - row.peak - row.hard_lse};
  each(shares, [](double x) { return exp(x); });
  tail.bounded.p = shares[0];
  tail.bounded.q = shares[1];
  tail.share = shares[2];
  tail.u = shares[3];
  tail.hard = row.tail_sum > 0 ? shares[4] : 0;
  return tail;
}

// A top-k class after normalisation. V: double, or lanes of it.
template <class V>
TGT_HD Class<V> topk_class(V s, V a, const TopKState& row, double inverse_t) {
  Class<V> c;
  c.a = bounded_below(a - row.teacher_lse);
  c.b = bounded_below((s - row.peak) * inverse_t - row.student_lse);
  c.p = exp_nonpositive(c.a);
  c.q = exp_nonpositive(c.b);
  return c;
}

template <class D>
TGT_HD bool soft_is_infinite(const TailClass& tail, TailForm form, bool topk_missing) {
  const bool both = form != TailForm::kRenormalize;
  const bool student_alone = both && tail.student_is_empty() && !tail.teacher_is_empty();
  const bool teacher_alone = both && tail.teacher_is_empty() && !tail.student_is_empty();
  return (D::kNeedsStudent && (topk_missing || student_alone)) || (D::kNeedsTeacher && teacher_alone);
}

// log(q / p) of the largest class of a spread tail, and bounds within which what is added to it stays finite.
TGT_HD double log_ratio_of(const TailClass& tail) {
  return tail.b - tail.log_sum - bounded_below(tail.a - tail.log_finite);
}
template <class Real>
TGT_HD Real bounded_ratio(double log_ratio) {
  constexpr double kLargest = sizeof(Real) == 8 ? 1e308 : 2e38;
  return Real(log_ratio > kLargest ? kLargest : log_ratio < -kLargest ? -kLargest : log_ratio);
}

// log(q / m) of the largest class of a spread tail. jsd takes the others' less it: where that class has most of the
// student's probability, its own gradient is made of what the others leave.
template <bool kCoarse, class Real>
TGT_HD Real centre_of(Real log_ratio, const Mixture<Real>& mixture) {
  Real of_teacher, of_student;
  Jsd::log_ratios<kCoarse>(Class<Real>{Real(0), log_ratio, Real(0), Real(0)}, mixture, of_teacher, of_student);
  return of_student;
}

// What the tail adds to x, y. Where it is spread, a divergence of the buckets and one within them add up; jsd alone
// does not fall apart like that: to its sums over the tail a pass over its classes adds what they are besides a centre.
template <class D>
TGT_HD void add_tail(const TailClass& tail, const TailSums& sums, const TopKState& row, TailForm form,
                     const DistillOptions& options, double& x, double& y) {
  if (form == TailForm::kRenormalize || !D::kSoft) return;
  const Class<double>& c = tail.bounded;
  const Mixture<double> mixture{options.beta, 1 - options.beta};
  if (D::kMixture && spread(row, form)) {
    y += c.q * centre_of<false>(bounded_ratio<double>(log_ratio_of(tail)), mixture);
    return;
  }
  D::add(c, mixture, x, y);
  if (!spread(row, form)) return;
  const double log_sum = tail.log_sum, count = tail.log_finite;
  const double mean_log = sums.linear / (row.tail_finite * options.temperature) - log_sum;  // of the shares in the tail
  if (D::kNeedsStudent) x -= c.p * (D::kRelative ? mean_log + count : mean_log);
  if (D::kNeedsTeacher) y += c.q * (sums.entropy / row.tail_sum - log_sum + count);
}

// The unweighted loss of a row whose sums are complete. of_label: the label's logit.
template <class D>
TGT_HD double topk_row_loss(TopKState& row, const TailClass& tail, const TailSums& sums, const TopKSums& topk,
                            TailForm form, const DistillOptions& options, double of_label) {
  double loss = 0;
  if (soft_is_infinite<D>(tail, form, topk.missing)) {
    row.flags += kInfiniteSoft;
    row.x = row.y = 0;
    loss = HUGE_VAL;
  } else if (D::kSoft) {
    const double value = D::value(row.x, row.y, options.beta);
    loss = options.soft_weight * options.temperature * options.temperature * (value < 0 ? 0 : value);
  }
  if (!(static_cast<int>(row.flags) & kHard)) return loss;
  const double smoothing = options.label_smoothing;
  double hard = row.hard_lse;
  if (smoothing < 1) hard -= (1 - smoothing) * (of_label - row.peak);
  if (smoothing > 0) {
    double linear = 0;
    if (sums.finite > 0) linear += sums.linear + sums.finite * (sums.max - row.peak);
    if (topk.finite > 0) linear += topk.linear + topk.finite * (topk.student_max - row.peak);
    hard -= smoothing / row.finite * linear;
  }
  if (of_label == -HUGE_VAL && smoothing < 1) {
    row.flags += kInfiniteHard;
    hard = HUGE_VAL;
  }
  return loss + options.hard_weight * (hard < 0 ? 0 : hard);
}

// What turns a row's classes into gradients.
template <class Real>
struct TopKFactors {
  Real tail_max, inverse_t;
  Real soft;                        // of exp((s - tail_max) / T), unless the tail is spread
  Real hard;                        // of exp(s - tail_max)
  Real smoothed;                    // what every finite class loses
  Real label;                       // what the label loses
  bool spread;                      // with it, of a class of the tail:
  Real u;                           // the teacher's probability, p
  Real share;                       // q = exp((s - tail_max) / T) * share
  Real log_ratio;                   // log(q / p) = (s - tail_max) / T + log_ratio; for reverse_kl less y
  Real centre;                      // for jsd: what log(q / m) and y are less
  Real x, y, factor;                // of d_student
  double soft_factor, hard_factor;  // of a top-k class
};

template <class D, class Real>
TGT_HD TopKFactors<Real> topk_factors(const TopKState& row, const TailClass& tail, const DistillOptions& options,
                                      TailForm form, double upstream) {
  const int flags = static_cast<int>(row.flags);
  const bool hard = (flags & kHard) && !(flags & kInfiniteHard);
  const bool soft = !(flags & kInfiniteSoft) && D::kSoft;
  const double smoothing = options.label_smoothing;
  TopKFactors<Real> f{};
  f.soft_factor = soft ? upstream * row.coefficient * options.soft_weight * options.temperature : 0;
  f.hard_factor = hard ? upstream * row.coefficient * options.hard_weight : 0;
  f.tail_max = Real(row.tail_max);
  f.inverse_t = Real(1 / options.temperature);
  f.hard = hard ? Real(f.hard_factor * tail.hard) : Real(0);
  f.smoothed = hard && smoothing > 0 ? Real(f.hard_factor * smoothing / row.finite) : Real(0);
  f.label = Real(f.hard_factor * (1 - smoothing));
  f.spread = soft && spread(row, form);
  f.x = Real(row.x);
  f.y = Real(row.y);
  f.factor = Real(f.soft_factor);
  if (!soft || form == TailForm::kRenormalize || !(row.tail_sum > 0)) return f;
  f.share = Real(tail.share);
  if (f.spread) {
    f.u = Real(tail.u);
    // One constant in double: its parts may be large where what they leave is small.
    double log_ratio = log_ratio_of(tail);
    if (D::kNeedsTeacher) {
      log_ratio -= row.y;
      f.y = 0;
    }
    f.log_ratio = bounded_ratio<Real>(log_ratio);
    if (D::kMixture) {
      const Mixture<double> mixture{options.beta, 1 - options.beta};
      f.centre = centre_of<true>(f.log_ratio, Mixture<Real>{Real(mixture.teacher), Real(mixture.student)});
      f.y = Real(row.y - centre_of<false>(bounded_ratio<double>(log_ratio), mixture));
    }
  } else {
    const Mixture<double> mixture{options.beta, 1 - options.beta};
    f.soft = Real(f.soft_factor * D::d_student(tail.bounded, mixture, row.x, row.y) / row.tail_sum);
  }
  return f;
}

// The gradient of a top-k class, without what the label loses.
template <class D, class V, class Real>
TGT_HD V topk_gradient(V s, V a, const TopKState& row, const DistillOptions& options, const TopKFactors<Real>& f) {
  const Class<V> c = topk_class(s, a, row, 1 / options.temperature);
  const Mixture<double> mixture{options.beta, 1 - options.beta};
  const V soft = D::d_student(c, mixture, row.x, row.y) * f.soft_factor;
  if (f.hard_factor == 0) return soft;
  const V of_hard = exp_nonpositive(bounded_below(s - row.peak - row.hard_lse)) * f.hard_factor;
  const V smoothed = s < -DBL_MAX ? V{} : splat<V>(double(f.smoothed));
  return soft + of_hard - smoothed;
}

// What a class of a spread tail adds to the sums of jsd.
template <class V, class Real>
TGT_HD void add_spread_class(const Class<V>& c, Real centre, const Mixture<Real>& mixture, V& x, V& y) {
  V of_teacher, of_student;
  Jsd::log_ratios<false>(c, mixture, of_teacher, of_student);
  x = fused(c.p, of_teacher, x);
  y = fused(c.q, of_student - centre, y);
}

// The gradient of a class of a spread tail. V: Real, or lanes of it; e = exp((s - tail_max) / T), b its argument. No
// divergence asks for more than log q - log p.
template <class D, class V, class Real>
TGT_HD V spread_gradient(V s, V b, V e, const TopKFactors<Real>& f, const Mixture<Real>& mixture) {
  Class<V> c;
  c.a = V{};
  c.b = b + f.log_ratio;
  c.p = splat<V>(f.u);
  c.q = e * f.share;
  V soft;
  if constexpr (D::kMixture) {
    V of_teacher, of_student;
    Jsd::log_ratios<true>(c, mixture, of_teacher, of_student);
    soft = (c.q * mixture.student) * ((of_student - f.centre) - f.y) * f.factor;
  } else {
    soft = D::d_student(c, mixture, f.x, f.y) * f.factor;
  }
  return s < splat<V>(sizeof(Real) == 8 ? Real(-DBL_MAX) : Real(-FLT_MAX)) ? V{} : soft;
}

}  // namespace TGT_ISA
}  // namespace tgt
