// KL(p, l p + (1 - l) q), and its mirror KL(q, l q + (1 - l) p).
#pragma once

#include "divergence.h"

namespace tgt {
inline namespace TGT_ISA {

// "Own" is the side that is mixed in. Its Mixture is {l, 1 where that is the teacher and -1 where it is the student}.
//
// x = sum own log r, y = sum own (1 - l r), of r = own / (l own + (1 - l) other) from the logarithms of the two alone.
struct Skewed : NormalisedSums {
  // r, from d = log(own / other), without taking much from 1: of d near 0 it is near 1, of others a share of the
  // larger.
  template <class V, class R>
  static TGT_HD V over_larger(V d, R skew, V& smaller) {  // (l own + (1 - l) other) / the larger of own and other
    smaller = exp_nonpositive(-absolute(d));              // the smaller / the larger
    const V of_smaller = d < 0 ? splat<V>(skew) : splat<V>(1 - skew);
    const V of_larger = d < 0 ? splat<V>(1 - skew) : splat<V>(skew);
    const V near = fused(of_smaller, smaller - 1, splat<V>(1));
    return smaller > R(0.5) ? near : fused(of_smaller, smaller, of_larger);
  }
  template <class V, class R>
  static TGT_HD void add(const Class<V>& c, const Mixture<R>& m, V& x, V& y) {
    const bool of_teacher = m.student > 0;
    const V d = of_teacher ? c.a - c.b : c.b - c.a, own = of_teacher ? c.p : c.q;
    V smaller;
    const V mixture = over_larger(d, m.teacher, smaller);
    const V ratio = (d < 0 ? smaller : splat<V>(1)) / mixture;
    x = fused(own, (d < 0 ? d : V{}) - log_positive(mixture), x);
    y = fused(own, 1 - ratio * m.teacher, y);
  }
  static TGT_HD double value(double x, double, double) { return x; }

  template <class V, class R>
  static TGT_HD V d_own(V own, V d, R skew, R x, R y) {
    V smaller;
    const V mixture = over_larger(d, skew, smaller);
    const V ratio = (d < 0 ? smaller : splat<V>(1)) / mixture;
    return own * (((d < 0 ? d : V{}) - log_positive(mixture) - x) + ((1 - ratio * skew) - y));
  }
  template <class V, class R>
  static TGT_HD V d_other(V other, V d, R skew, R y) {
    V smaller;
    const V mixture = over_larger(d, skew, smaller);
    return other * (y - (d < 0 ? smaller : splat<V>(1)) / mixture * (1 - skew));
  }
  template <class V, class R>
  static TGT_HD V d_student(const Class<V>& c, const Mixture<R>& m, R x, R y) {
    if (m.student > 0) return d_other(c.q, c.a - c.b, m.teacher, y);
    return d_own(c.q, c.b - c.a, m.teacher, x, y);
  }
  template <class V, class R>
  static TGT_HD V d_teacher(const Class<V>& c, const Mixture<R>& m, R x, R y) {
    if (m.student > 0) return d_own(c.p, c.a - c.b, m.teacher, x, y);
    return d_other(c.p, c.b - c.a, m.teacher, y);
  }
};

}  // namespace TGT_ISA
}  // namespace tgt
