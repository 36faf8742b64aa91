// One row of the loss against a top-k teacher on a device: its top-k classes, its tail, its gradient.
//
// The threads of a row share its vectors of eight classes, and besides each has some entries of the top k. A source
// gives the vectors with -inf in the places of top-k classes: that is the tail. The gradient of all classes is written
// as if they were tail; then each thread writes that of its top-k classes over it. What happens once a row is done by
// one thread of a block, in double, and handed round through shared memory.
#pragma once

#include "topk_tail.h"

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

struct Pair {
  double x = 0, y = 0;
};
struct AddPairs {
  TGT_DEVICE Pair operator()(const Pair& a, const Pair& b) const { return {a.x + b.x, a.y + b.y}; }
};

// The gradient of the row: all of a source's vectors as tail, then the thread's top-k classes.
template <class Real, class Team, class Source>
TGT_DEVICE void write_topk_gradient(const TopKDeviceCall& d, const Team& team, const Source& source, int64_t i,
                                    const Own<Real>& own) {
  const DistillCall& call = d.base.call;
  const DistillOptions& options = call.options;
  const TopKShared<Real>& shared = row_in_shared<Real>();
  const TopKFactors<Real> f = shared.factors;
  const TailScale<Real> scale = tail_scale<Real>(options, shared.state.tail_max);
  const bool hard = f.hard_factor != 0;
  const int64_t target = hard ? call.target[i] : -1;
  LabelPlace label;
  if (target >= source.first * kVector) label.vector = target / kVector - source.first;
  label.lane = static_cast<int>(target & (kVector - 1));
  if (f.spread) {
    with_topk_divergence(options, [&](auto divergence) {
      write_spread_tail<decltype(divergence)>(d, team, source, i, f, scale, label);
    });
  } else {
    with_tail_power<Real>(hard, options.temperature, [&](auto power) {
      constexpr TailPower kPower = decltype(power)::kValue;
      if (f.smoothed != 0) {
        write_tail<kPower, true>(d, team, source, i, f, scale, label);
      } else {
        write_tail<kPower, false>(d, team, source, i, f, scale, label);
      }
    });
  }
  team.barrier();
  if (own.begin >= own.end) return;
  char* row = call.d_student.row(i);
  const DType type = source.gradient_type(call);
  with_topk_divergence(options, [&](auto divergence) {
    own.each([&](int64_t id, double s, double a) {
      double grad = topk_gradient<decltype(divergence)>(s, a, shared.state, options, f);
      if (id == target) grad -= f.hard_factor * (1 - options.label_smoothing);
      store_one(row, type, id, Real(grad));
    });
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
    const TailScale<Real> scale = tail_scale<Real>(options, shared.state.tail_max);
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
  const TailScale<Real> scale = tail_scale<Real>(options, tail_max);
  const bool hard = head.flags & kHard, same = options.temperature == 1;
  const bool full = (hard && options.label_smoothing > 0) || (soft && form == TailForm::kUniform);
  TopKRowSums<Real> sums;
  with_tail_power<Real>(hard, options.temperature, [&](auto power) {
    constexpr TailPower kPower = decltype(power)::kValue;
    constexpr TailPower kSummed = kPower == TailPower::kSame ? TailPower::kNone : kPower;
    full ? sum_tail<kSummed, true>(team, source, scale, sums) : sum_tail<kSummed, false>(team, source, scale, sums);
  });
  if (extremes.tail > -HUGE_VAL) sums.hard *= exp_scaled(Real((tail_max - peak) * kShrink), exponent_of<Real>(1));
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

  if (team.thread < kWarp) {
    if (team.thread == 0) {
      TailSums& tail = shared.tail;
      tail.max = extremes.tail;
      tail.sum = all.tail;
      tail.hard = hard && same ? all.tail : 0;  // otherwise it is in all.hard
      tail.linear = all.linear / kTiny;
      tail.entropy = all.entropy;
      tail.finite = all.tail_finite;
      TopKSums& topk = shared.topk;
      topk.student_max = extremes.topk;
      topk.teacher_max = extremes.teacher;
      topk.student = all.topk;
      topk.hard = all.hard;
      topk.hard_is_from_peak = true;
      topk.teacher = all.teacher;
      topk.linear = all.topk_linear;
      topk.finite = all.topk_finite;
      topk.missing = extremes.unusual & kStudentOnly;
    }
    warp_barrier();
    const ByLanes by_lanes{shared.of_lanes, team.thread};
    TopKState state;
    settle_topk(state, shared.tail, shared.topk, of_tail, options, form, by_lanes);
    if (team.thread == 0) {
      state.flags = head.flags;
      state.coefficient = head.coefficient;
      state.x = state.y = 0;
      shared.state = state;
    }
    warp_barrier();
    const TailClass rest = tail_class(shared.state, options, of_tail, by_lanes);
    if (team.thread == 0) {
      shared.rest = rest;
      if (form == TailForm::kUniform) {  // jsd reads them before its sums are known
        with_topk_divergence(options, [&](auto divergence) {
          shared.factors = topk_factors<decltype(divergence), Real>(shared.state, rest, options, form, 1);
        });
      }
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
      const TailClass& rest = shared.rest;
      double x = sum.x, y = sum.y;
      add_tail<D>(rest, shared.tail, state, form, options, x, y);
      state.x = x;
      state.y = y;
      const double loss = topk_row_loss<D>(state, rest, shared.tail, shared.topk, form, options, shared.of_label);
      if (state.coefficient == 0) state.flags = kDropped;  // a divisor of 0
      shared.factors = topk_factors<D, Real>(state, rest, options, form, 1);
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
  write_topk_gradient(d, team, source, i, own);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
