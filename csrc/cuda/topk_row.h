// One row of the loss against a top-k teacher on a device: its top-k classes, its tail, its gradient.
//
// The threads of a row share its vectors of eight classes, and besides each has some entries of the top k. A source
// gives the vectors with -inf in the places of top-k classes: that is the tail. The gradient of all classes is written
// as if they were tail; then each thread writes that of its top-k classes over it. What happens once a row is done by
// one thread of a block, in double, and handed round through shared memory.
#pragma once

#include "topk_entries.h"

namespace tgt::cuda {

inline namespace TGT_ISA {

struct TopKExtremes {
  double tail = -HUGE_VAL, topk = -HUGE_VAL;  // logits
  double teacher = -HUGE_VAL;                 // log-probabilities of top-k classes
  int unusual = 0, padding = 0;
};
struct MergeTopKExtremes {
  TGT_DEVICE TopKExtremes operator()(const TopKExtremes& a, const TopKExtremes& b) const {
    return {larger(a.tail, b.tail), larger(a.topk, b.topk), larger(a.teacher, b.teacher), a.unusual | b.unusual, 0};
  }
};

// The maximum of a thread's share of the tail.
template <class Real>
struct TailMaximum {
  Real most = minus_infinity<Real>();
  bool number = true;

  TGT_DEVICE void add(const Eight<Real>& s) {
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      most = larger(s.v[i], most);
      number &= s.v[i] < Real(HUGE_VAL);  // fails for NaN, too
    }
  }
};

// Sums over the row. linear (times kTiny), entropy and the numbers of finite classes are those that smoothed labels and
// a spread tail ask for; hard is over all classes, relative to the peak.
template <class Real>
struct alignas(8) TopKRowSums {
  Real tail = 0, linear = 0, entropy = 0, hard = 0;
  double topk = 0, topk_linear = 0, teacher = 0;
  int tail_finite = 0, topk_finite = 0;

  template <class Other>
  TGT_DEVICE TopKRowSums<Other> as() const {
    return {Other(tail), Other(linear), Other(entropy), Other(hard), topk,
            topk_linear, teacher,       tail_finite,    topk_finite};
  }
};
template <class Real>
struct AddTopKRowSums {
  TGT_DEVICE TopKRowSums<Real> operator()(const TopKRowSums<Real>& a, const TopKRowSums<Real>& b) const {
    return {a.tail + b.tail,
            a.linear + b.linear,
            a.entropy + b.entropy,
            a.hard + b.hard,
            a.topk + b.topk,
            a.topk_linear + b.topk_linear,
            a.teacher + b.teacher,
            a.tail_finite + b.tail_finite,
            a.topk_finite + b.topk_finite};
  }
};

struct Pair {
  double x = 0, y = 0;
};
struct AddPairs {
  TGT_DEVICE Pair operator()(const Pair& a, const Pair& b) const { return {a.x + b.x, a.y + b.y}; }
};

// The constants of exp((s - tail_max) / T) and of exp(s - peak).
template <class Real>
struct TailScale {
  Real tail_max, peak;  // shrunk
  Real inverse_t, binary_t;

  TGT_DEVICE Real from_max(Real s) const { return shrunk(s, tail_max); }
  TGT_DEVICE Real share(Real s) const { return exp_scaled(from_max(s), binary_t); }
  TGT_DEVICE Real argument(Real s) const { return bounded_below(from_max(s) * inverse_t); }
  TGT_DEVICE Real hard(Real s, Real from) const { return exp_scaled(shrunk(s, from), exponent_of<Real>(1)); }
};
template <class Real>
TGT_DEVICE TailScale<Real> tail_scale(const DistillOptions& options, double tail_max, double peak) {
  return {Real(tail_max * kShrink), Real(peak * kShrink), Real(1 / (kShrink * options.temperature)),
          exponent_of<Real>(options.temperature)};
}

// The gradient of the row: all of a source's vectors as tail, then the thread's top-k classes.
template <class D, class Real, class Team, class Source>
TGT_DEVICE void write_topk_gradient(const TopKDeviceCall& d, const Team& team, const Source& source, int64_t i,
                                    const Own<Real>& own) {
  const DistillCall& call = d.base.call;
  const DistillOptions& options = call.options;
  const TopKShared<Real>& shared = row_in_shared<Real>();
  const TopKFactors<Real> f = shared.factors;
  const TailScale<Real> scale = tail_scale<Real>(options, shared.state.tail_max, shared.state.peak);
  const Mixture<Real> mixture{Real(options.beta), Real(1 - options.beta)};
  const bool hard = f.hard_factor != 0, same = options.temperature == 1;
  const int64_t label = hard ? call.target[i] : -1;
  const int64_t labelled = label < source.first * kVector ? -1 : label / kVector - source.first;
  const Real both = hard && same ? f.soft + f.hard : f.soft;
  char* row = call.d_student.row(i);
  const DType type = source.gradient_type(call);
  for (int64_t k = team.thread; k < source.count; k += team.size) {
    const Eight<Real> s = source.load(k);
    Eight<Real> grad;
    if (f.spread) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const Real e = scale.share(s.v[j]);
        grad.v[j] = spread_gradient<D>(s.v[j], scale.argument(s.v[j]), e, f, mixture);
        if (hard && same) grad.v[j] = fused(e, f.hard, grad.v[j]);
      }
    } else {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) grad.v[j] = scale.share(s.v[j]) * both;
    }
    if (hard && !same) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) grad.v[j] = fused(scale.hard(s.v[j], scale.tail_max), f.hard, grad.v[j]);
    }
    if (f.smoothed != 0) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) grad.v[j] -= s.v[j] == minus_infinity<Real>() ? Real(0) : f.smoothed;
    }
    const int of_label = k == labelled ? static_cast<int>(label % kVector) : -1;
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) grad.v[j] -= j == of_label ? f.label : Real(0);  // without a run-time index
    store_padded(row, type, (source.first + k) * kVector, call.classes, d.base.d_student_aligned, grad);
  }
  team.barrier();
  own.each([&](int64_t id, double s, double a) {
    double grad = topk_gradient<D>(s, a, shared.state, options, f);
    if (id == label) grad -= f.hard_factor * (1 - options.label_smoothing);
    store_one(row, type, id, Real(grad));
  });
}

template <class Real, class Team>
TGT_DEVICE void end_without_gradient(const TopKDeviceCall& d, const Team& team, int64_t i, TopKState state, double loss,
                                     int64_t first, int64_t count, Real fill_with) {
  if (team.leads()) {
    static_cast<Real*>(d.base.call.row_loss)[i] = Real(loss);
    if (d.row_state) d.row_state[i] = state;
  }
  fill_gradients(d.base, team, i, first, count, fill_with);
}

// The thread's share of x, y, of top-k classes and, for jsd, of a spread tail.
template <class D, class Real, class Team, class Source>
TGT_DEVICE Pair divergence_sums(const TopKDeviceCall& d, const Team& team, const Source& source, const Own<Real>& own) {
  const DistillOptions& options = d.base.call.options;
  const TopKShared<Real>& shared = row_in_shared<Real>();
  Pair sum;
  const Mixture<double> mixture{options.beta, 1 - options.beta};
  own.each([&](int64_t, double s, double a) {
    D::add(topk_class(s, a, shared.state, 1 / options.temperature), mixture, sum.x, sum.y);
  });
  if constexpr (D::kMixture) {
    if (!spread(shared.state, d.topk.form)) return sum;
    const TailScale<Real> scale = tail_scale<Real>(options, shared.state.tail_max, shared.state.peak);
    const TopKFactors<Real> f = shared.factors;
    const Mixture<Real> real_mixture{Real(options.beta), Real(1 - options.beta)};
    const Real centre = centre_of<false>(f.log_ratio, real_mixture);
    Real x = 0, y = 0;
    for (int64_t k = team.thread; k < source.count; k += team.size) {
      const Eight<Real> s = source.load(k);
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        Class<Real> c;
        c.a = 0;
        c.b = scale.argument(s.v[j]) + f.log_ratio;
        c.p = s.v[j] == minus_infinity<Real>() ? Real(0) : f.u;
        c.q = scale.share(s.v[j]) * f.share;
        add_spread_class(c, centre, real_mixture, x, y);
      }
    }
    sum.x += x;
    sum.y += y;
  }
  return sum;
}

// Everything that follows the maxima of the tail.
template <class Real, class Team, class Source>
TGT_DEVICE void finish_topk_row(const TopKDeviceCall& d, const Team& team, const Source& source, int64_t i,
                                const RowHead& head, const Own<Real>& own, const TailMaximum<Real>& most) {
  const DistillCall& call = d.base.call;
  const DistillOptions& options = call.options;
  const TailForm form = d.topk.form;
  const bool soft = options.soft_weight != 0, restricted = soft && form == TailForm::kRenormalize;
  const double of_tail = tail_log_prob(d, i);
  TopKShared<Real>& shared = row_in_shared<Real>();
  // Before the first reduction: after it another block may write a gradient over it.
  if (team.thread == 0 && (head.flags & kHard)) {
    shared.of_label = load_one<double>(call.student.row(i), call.student.type, head.label);
  }

  TopKExtremes mine;
  mine.tail = most.most;
  mine.unusual = most.number ? 0 : kNotANumber;
  own.each([&](int64_t, double s, double a) {
    mine.topk = larger(s, mine.topk);
    mine.teacher = larger(a, mine.teacher);
    mine.unusual |= s == -HUGE_VAL ? kStudentOnly : 0;
    mine.unusual |= !(s < HUGE_VAL) || !(a < HUGE_VAL) ? kNotANumber : 0;
  });
  const TopKExtremes extremes = merge_all(team, mine, 0, MergeTopKExtremes());
  bool valid = !(extremes.unusual & kNotANumber);
  valid &= extremes.topk > -HUGE_VAL || (!restricted && extremes.tail > -HUGE_VAL);
  valid &= !soft || (of_tail < HUGE_VAL && (extremes.teacher > -HUGE_VAL || of_tail > -HUGE_VAL));
  if (!valid) {
    const bool counts = head.coefficient != 0;  // a divisor of 0 leaves no gradient, not even NaN
    TopKState state{};
    state.coefficient = head.coefficient;
    state.flags = counts ? head.flags | kInvalid : kDropped;
    end_without_gradient(d, team, i, state, NAN, source.first, source.count, counts ? Real(NAN) : Real(0));
    return;
  }

  const double peak = larger(extremes.tail, extremes.topk);
  const double tail_max = extremes.tail == -HUGE_VAL ? 0 : extremes.tail;
  const double topk_max = extremes.topk == -HUGE_VAL ? 0 : extremes.topk;
  const TailScale<Real> scale = tail_scale<Real>(options, tail_max, peak);
  const bool hard = head.flags & kHard, same = options.temperature == 1;
  const bool full = (hard && options.label_smoothing > 0) || (soft && form == TailForm::kUniform);
  TopKRowSums<Real> sums;
  for (int64_t k = team.thread; k < source.count; k += team.size) {
    const Eight<Real> s = source.load(k);
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const Real e = scale.share(s.v[j]);
      sums.tail += e;
      if (full) {
        const bool finite = s.v[j] != minus_infinity<Real>();
        sums.entropy = fused(e, scale.argument(s.v[j]), sums.entropy);
        sums.linear = fused(finite ? scale.from_max(s.v[j]) : Real(0), Real(kTiny / kShrink), sums.linear);
        sums.tail_finite += finite;
      }
    }
    if (hard && !same) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) sums.hard += scale.hard(s.v[j], scale.peak);
    }
  }
  own.each([&](int64_t, double s, double a) {
    sums.teacher += exp_nonpositive(bounded_below(a - extremes.teacher));
    sums.topk += exp_nonpositive(bounded_below((s - topk_max) / options.temperature));
    sums.hard += Real(exp_nonpositive(bounded_below(s - peak)));
    if (s == -HUGE_VAL) return;
    sums.topk_linear += s - topk_max;
    sums.topk_finite += 1;
  });
  const TopKRowSums<Real> of_warp = merge_lanes<kWarp / 2>(sums, AddTopKRowSums<Real>());
  const TopKRowSums<double> all = team.merge_warps(of_warp.template as<double>(), 1, AddTopKRowSums<double>());

  if (team.thread == 0) {
    TailSums& tail = shared.tail;
    tail.max = extremes.tail;
    tail.sum = all.tail;
    tail.hard = 0;  // all of it is in all.hard
    tail.linear = all.linear / kTiny;
    tail.entropy = all.entropy;
    tail.finite = all.tail_finite;
    TopKSums& topk = shared.topk;
    topk.student_max = extremes.topk;
    topk.teacher_max = extremes.teacher;
    topk.student = all.topk;
    topk.hard = 0;
    topk.teacher = all.teacher;
    topk.linear = all.topk_linear;
    topk.finite = all.topk_finite;
    topk.missing = extremes.unusual & kStudentOnly;
    TopKState& state = shared.state;
    state.flags = head.flags;
    state.coefficient = head.coefficient;
    state.x = state.y = 0;
    settle_topk(state, tail, topk, of_tail, options, form);
    state.hard_lse = log_or_nothing(all.hard + (same && all.tail > 0 ? all.tail * exp(tail_max - peak) : 0));
    if (form == TailForm::kUniform) {  // jsd reads them before its sums are known
      with_topk_divergence(options, [&](auto divergence) {
        shared.factors = topk_factors<decltype(divergence), Real>(state, options, form, of_tail, 1);
      });
    }
  }
  team.barrier();

  Pair sum = with_topk_divergence(
      options, [&](auto divergence) { return divergence_sums<decltype(divergence), Real>(d, team, source, own); });
  sum = merge_all(team, sum, 2, AddPairs());
  if (team.thread == 0) {
    with_topk_divergence(options, [&](auto divergence) {
      using D = decltype(divergence);
      TopKState& state = shared.state;
      const double rest_log_prob = tail_log_prob(d, i);
      const TailClass rest = tail_class(state, options, rest_log_prob);
      double x = sum.x, y = sum.y;
      add_tail<D>(rest, shared.tail, state, form, options, x, y);
      state.x = x;
      state.y = y;
      const double loss = topk_row_loss<D>(state, rest, shared.tail, shared.topk, form, options, shared.of_label);
      if (state.coefficient == 0) state.flags = kDropped;  // a divisor of 0
      shared.factors = topk_factors<D, Real>(state, options, form, rest_log_prob, 1);
      if (team.leads()) {
        static_cast<Real*>(call.row_loss)[i] = Real(head.coefficient * loss);
        if (d.row_state) d.row_state[i] = state;
      }
    });
  }
  if (!call.d_student.data) return;
  if (head.coefficient == 0) {
    fill_gradients(d.base, team, i, source.first, source.count, Real(0));
    return;
  }
  team.barrier();
  with_topk_divergence(
      options, [&](auto divergence) { write_topk_gradient<decltype(divergence), Real>(d, team, source, i, own); });
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
