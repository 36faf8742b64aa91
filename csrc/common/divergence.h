// The divergences, one struct each: how a class adds to the row's sums, the loss from the sums, and the gradients.
//
// p = softmax(t / Tt) is the teacher, q = softmax(s / Ts) the student. Gradients are with respect to the tempered
// logits t / Tt and s / Ts, of the divergence alone: weights, Ts^2 and 1 / T are one factor a row, applied by the
// caller.
//
// Members of a divergence, beside the flags of `Divergence`:
//   add             adds one class to the sums x, y
//   shift           restates x, y when the maxima rise by ds, dt (only with kShiftedSums)
//   finish          normalised x, y from the sums, for the loss and the gradients
//   value           the loss from the normalised sums
//   d_student, d_teacher
#pragma once

#include "row_stats.h"

namespace tgt {

enum class DivergenceKind : int {
  kForwardKl,
  kReverseKl,
  kSymmetric,
  kJsd,
  kTvd,
  kCrossEntropy,
  kMse,
  kNone  // no soft term
};
constexpr int kDivergences = 8;

inline namespace TGT_ISA {

// One class. Before normalisation a, b are shifted log-values and p, q their exponentials; after it, log p, log q, p,
// q.
template <class V>
struct Class {
  V a, b, p, q;
};

// The weights of the mixture of jsd.
template <class Real>
struct Mixture {
  Real teacher, student;
};

struct Divergence {
  static constexpr bool kSoft = true;           // there is a soft term
  static constexpr bool kProbabilities = true;  // it reads log-probabilities; otherwise the tempered logits themselves
  static constexpr bool kShiftedSums = true;    // sums can be taken relative to the running maxima, without normalisers
  static constexpr bool kNeedsStudent = false;  // it is infinite where the student alone is -inf
  static constexpr bool kNeedsTeacher = false;  // it is infinite where the teacher alone is -inf
  static constexpr bool kRelative = true;       // it is 0 where the two are equal
  static constexpr bool kMixture = false;       // it goes by the mixture of the two
  static constexpr bool kSquares = false;       // it adds up squares
  static constexpr bool kTopK = false;          // it has a form for a teacher's top k and the rest
};

struct ForwardKl : Divergence {  // sum p (a - b)
  static constexpr bool kNeedsStudent = true, kTopK = true;
  template <class V, class R>
  static TGT_HD void add(const Class<V>& c, const Mixture<R>&, V& x, V&) {
    x = fused(c.p, c.a - c.b, x);
  }
  static TGT_HD void shift(OnlineSums& m, double ds, double dt, double, double shrink_teacher) {
    m.x = (m.x + (ds - dt) * m.teacher) * shrink_teacher;
  }
  static TGT_HD void finish(const OnlineSums& m, double log_student, double log_teacher, double& x, double&) {
    x = m.x / m.teacher - (log_teacher - log_student);
  }
  static TGT_HD double value(double x, double, double) { return x; }
  template <class V, class R>
  static TGT_HD V d_student(const Class<V>& c, const Mixture<R>&, R, R) {
    return c.q - c.p;
  }
  template <class V, class R>
  static TGT_HD V d_teacher(const Class<V>& c, const Mixture<R>&, R x, R) {
    return c.p * ((c.a - c.b) - x);
  }
};

struct ReverseKl : Divergence {  // sum q (b - a)
  static constexpr bool kNeedsTeacher = true, kTopK = true;
  template <class V, class R>
  static TGT_HD void add(const Class<V>& c, const Mixture<R>&, V&, V& y) {
    y = fused(c.q, c.b - c.a, y);
  }
  static TGT_HD void shift(OnlineSums& m, double ds, double dt, double shrink_student, double) {
    m.y = (m.y + (dt - ds) * m.student) * shrink_student;
  }
  static TGT_HD void finish(const OnlineSums& m, double log_student, double log_teacher, double&, double& y) {
    y = m.y / m.student - (log_student - log_teacher);
  }
  static TGT_HD double value(double, double y, double) { return y; }
  template <class V, class R>
  static TGT_HD V d_student(const Class<V>& c, const Mixture<R>&, R, R y) {
    return c.q * ((c.b - c.a) - y);
  }
  template <class V, class R>
  static TGT_HD V d_teacher(const Class<V>& c, const Mixture<R>&, R, R) {
    return c.p - c.q;
  }
};

struct Symmetric : Divergence {  // the sum of both
  static constexpr bool kNeedsStudent = true, kNeedsTeacher = true;
  template <class V, class R>
  static TGT_HD void add(const Class<V>& c, const Mixture<R>& m, V& x, V& y) {
    ForwardKl::add(c, m, x, y);
    ReverseKl::add(c, m, x, y);
  }
  static TGT_HD void shift(OnlineSums& m, double ds, double dt, double shrink_student, double shrink_teacher) {
    ForwardKl::shift(m, ds, dt, shrink_student, shrink_teacher);
    ReverseKl::shift(m, ds, dt, shrink_student, shrink_teacher);
  }
  static TGT_HD void finish(const OnlineSums& m, double log_student, double log_teacher, double& x, double& y) {
    ForwardKl::finish(m, log_student, log_teacher, x, y);
    ReverseKl::finish(m, log_student, log_teacher, x, y);
  }
  static TGT_HD double value(double x, double y, double) { return x + y; }
  template <class V, class R>
  static TGT_HD V d_student(const Class<V>& c, const Mixture<R>& m, R x, R y) {
    return ForwardKl::d_student(c, m, x, y) + ReverseKl::d_student(c, m, x, y);
  }
  template <class V, class R>
  static TGT_HD V d_teacher(const Class<V>& c, const Mixture<R>& m, R x, R y) {
    return ForwardKl::d_teacher(c, m, x, y) + ReverseKl::d_teacher(c, m, x, y);
  }
};

// Members for sums over normalised classes: they are only added up.
struct NormalisedSums : Divergence {
  static constexpr bool kShiftedSums = false;
  static TGT_HD void shift(OnlineSums&, double, double, double, double) {}
  static TGT_HD void finish(const OnlineSums&, double, double, double&, double&) {}
};

// The elementary functions of jsd. A device has instructions for them and replaces these (cuda/distill_row.h).
template <class V>
struct RatioMath {
  static TGT_HD V exponential(V x) { return exp_nonpositive(x); }
  static TGT_HD V logarithm(V x) { return log_positive(x); }         // for sums
  static TGT_HD V coarse_logarithm(V x) { return log_positive(x); }  // for gradients
};

struct Jsd : NormalisedSums {  // x = KL(p, m), y = KL(q, m), m = beta p + (1 - beta) q, from logarithms alone
  static constexpr bool kMixture = true, kTopK = true;
  // log(p / m) and log(q / m) from d = log(p / q) alone: with w the weight of the larger of p and q, log(larger / m) =
  // -log(w + (1 - w) exp(-|d|)) and the other is |d| less. A rounding error that all d share, that of the normalisers,
  // then cancels between x and y to first order; through log m it would be the error of the loss.
  template <bool kCoarse, class V, class R>
  static TGT_HD void log_ratios(const Class<V>& c, const Mixture<R>& m, V& of_teacher, V& of_student) {
    using Math = RatioMath<V>;
    const V d = c.a - c.b;
    const V other = d < 0 ? splat<V>(m.teacher) : splat<V>(m.student);  // 1 - w
    const V of_mixture = fused(other, Math::exponential(-absolute(d)) - 1, splat<V>(1));
    const V of_larger = -(kCoarse ? Math::coarse_logarithm(of_mixture) : Math::logarithm(of_mixture));
    of_teacher = d < 0 ? of_larger + d : of_larger;
    of_student = d < 0 ? of_larger : of_larger - d;
  }
  template <class V, class R>
  static TGT_HD void add(const Class<V>& c, const Mixture<R>& m, V& x, V& y) {
    V of_teacher, of_student;
    log_ratios<false>(c, m, of_teacher, of_student);
    x = fused(c.p, of_teacher, x);
    y = fused(c.q, of_student, y);
  }
  static TGT_HD double value(double x, double y, double beta) { return beta * x + (1 - beta) * y; }
  template <class V, class R>
  static TGT_HD V d_student(const Class<V>& c, const Mixture<R>& m, R, R y) {
    V of_teacher, of_student;
    log_ratios<true>(c, m, of_teacher, of_student);
    return (c.q * m.student) * (of_student - y);
  }
  template <class V, class R>
  static TGT_HD V d_teacher(const Class<V>& c, const Mixture<R>& m, R x, R) {
    V of_teacher, of_student;
    log_ratios<true>(c, m, of_teacher, of_student);
    return (c.p * m.teacher) * (of_teacher - x);
  }
};

struct Tvd : NormalisedSums {  // x = sum p sign(p - q) / 2, y = sum q sign(q - p) / 2
  template <class V>
  static TGT_HD V half_sign(V p, V q) {
    using R = typename Traits<V>::Real;
    const V positive = p > q ? splat<V>(R(0.5)) : V{};
    return p < q ? splat<V>(R(-0.5)) : positive;
  }
  template <class V, class R>
  static TGT_HD void add(const Class<V>& c, const Mixture<R>&, V& x, V& y) {
    const V side = half_sign(c.p, c.q);
    x = fused(c.p, side, x);
    y = fused(c.q, -side, y);
  }
  static TGT_HD double value(double x, double y, double) { return x + y; }
  template <class V, class R>
  static TGT_HD V d_student(const Class<V>& c, const Mixture<R>&, R, R y) {
    return c.q * (-half_sign(c.p, c.q) - y);
  }
  template <class V, class R>
  static TGT_HD V d_teacher(const Class<V>& c, const Mixture<R>&, R x, R) {
    return c.p * (half_sign(c.p, c.q) - x);
  }
};

struct CrossEntropy : Divergence {  // -sum p b
  static constexpr bool kNeedsStudent = true, kRelative = false, kTopK = true;
  template <class V, class R>
  static TGT_HD void add(const Class<V>& c, const Mixture<R>&, V& x, V&) {
    x = fused(c.p, -c.b, x);
  }
  static TGT_HD void shift(OnlineSums& m, double ds, double, double, double shrink_teacher) {
    m.x = (m.x + ds * m.teacher) * shrink_teacher;
  }
  static TGT_HD void finish(const OnlineSums& m, double log_student, double, double& x, double&) {
    x = m.x / m.teacher + log_student;
  }
  static TGT_HD double value(double x, double, double) { return x; }
  template <class V, class R>
  static TGT_HD V d_student(const Class<V>& c, const Mixture<R>&, R, R) {
    return c.q - c.p;
  }
  template <class V, class R>
  static TGT_HD V d_teacher(const Class<V>& c, const Mixture<R>&, R x, R) {
    return c.p * (-c.b - x);
  }
};

struct Mse : NormalisedSums {  // sum (b - a)^2 of the tempered logits
  static constexpr bool kProbabilities = false, kNeedsStudent = true, kNeedsTeacher = true, kSquares = true;
  template <class V, class R>
  static TGT_HD void add(const Class<V>& c, const Mixture<R>&, V& x, V&) {
    const V difference = c.b - c.a;
    x = fused(difference, difference, x);
  }
  static TGT_HD double value(double x, double, double) { return x; }
  template <class V, class R>
  static TGT_HD V d_student(const Class<V>& c, const Mixture<R>&, R, R) {
    return (c.b - c.a) * 2;
  }
  template <class V, class R>
  static TGT_HD V d_teacher(const Class<V>& c, const Mixture<R>&, R, R) {
    return (c.a - c.b) * 2;
  }
};

struct NoDivergence : NormalisedSums {
  static constexpr bool kSoft = false, kProbabilities = false;
  template <class V, class R>
  static TGT_HD void add(const Class<V>&, const Mixture<R>&, V&, V&) {}
  static TGT_HD double value(double, double, double) { return 0; }
  template <class V, class R>
  static TGT_HD V d_student(const Class<V>&, const Mixture<R>&, R, R) {
    return V{};
  }
  template <class V, class R>
  static TGT_HD V d_teacher(const Class<V>&, const Mixture<R>&, R, R) {
    return V{};
  }
};

}  // namespace TGT_ISA
}  // namespace tgt
