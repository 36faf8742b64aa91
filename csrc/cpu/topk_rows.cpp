// The kernels of the loss against a top-k teacher, compiled once per instruction set.
//
// A student's row is read block by block into the first-level cache, where the top-k classes are taken out and the
// tail is summed online: one read of memory. The gradient reads the row once more, from the second-level cache. What
// concerns those classes is done in double.
#include "open_row.h"
#include "topk_row.h"

namespace tgt {
inline namespace TGT_ISA {
namespace {

// Calls body(tail, count) for every block of a row without its top-k classes.
template <class Real, class Body>
void each_tail_block(const Matrix& student, int64_t i, int64_t classes, TopKRow& topk, Body body) {
  alignas(64) Real buffer[kBlock];
  for (int64_t at = 0; at < classes; at += kBlock) {
    const int count = int(classes - at < kBlock ? classes - at : kBlock);
    const Real* from = read_block(student.row(i), student.type, at, count, buffer);
    if (topk.any_in(at)) {
      if (from != buffer) memcpy(buffer, from, count * sizeof(Real));
      from = buffer;
      topk.take(buffer, at);
    }
    body(from, count);
  }
}

// Calls body(s, at, lanes) for the vectors of a block; the last one is padded with -inf.
template <class Real, class Body>
TGT_HD void each_of(const Real* s, int count, Body body) {
  constexpr int kLanes = Lanes<Real>::kCount;
  int at = 0;
  for (; at + kLanes <= count; at += kLanes) body(load(s + at), at, kLanes);
  if (at < count) body(load_part(s + at, count - at, Real(-HUGE_VAL)), at, count - at);
}

// The maximum of a block; false where it holds NaN or +inf.
template <class Real>
TGT_APART bool block_maximum(const Real* s, int count, double& most) {
  using V = typename Lanes<Real>::Vector;
  using Int = typename Traits<V>::Int;
  V best = splat<V>(Real(-HUGE_VAL));
  Int unordered{};
  each_of(s, count, [&](V sv, int, int) {
    best = larger(sv, best);
    unordered |= (Int)(sv != sv);
  });
  most = largest_lane(best);
  bool number = true;
  for (int lane = 0; lane < Lanes<Real>::kCount; ++lane) number &= unordered[lane] == 0;
  return number && most < HUGE_VAL;
}

template <HardPower power, class V, class Real>
TGT_HD V hard_of(V shifted, V e) {
  if constexpr (power == kSame) return e;
  if constexpr (power == kSquare) return e * e;
  if constexpr (power == kFourth) return (e * e) * (e * e);
  return exp_nonpositive(bounded_below(shifted));
}

// Adds a block whose maximum the sums know. kFull: also what smoothed labels and a spread tail ask for.
template <class Real, HardPower power, bool kFull>
TGT_APART void sum_tail(const Real* s, int count, Real inverse_t, TailSums& sums) {
  using V = typename Lanes<Real>::Vector;
  const Real max = sums.max == -HUGE_VAL ? Real(0) : Real(sums.max);
  constexpr Real kShrink = Real(1) / 1024;
  const V far = splat<V>(-max * kShrink);
  V sum{}, hard{}, linear{}, entropy{}, finite{};
  each_of(s, count, [&](V sv, int, int) {
    const V shifted = sv - max;
    const V b = bounded_below(shifted * inverse_t);
    const V e = exp_nonpositive(b);
    sum += e;
    if constexpr (power != kNoHard) hard += hard_of<power, V, Real>(shifted, e);
    if constexpr (kFull) {
      entropy = fused(e, b, entropy);
      const V less = fused(sv, splat<V>(kShrink), far);  // in range where the difference itself may not be
      linear = fused(sv == splat<V>(Real(-HUGE_VAL)) ? V{} : less, splat<V>(kShrink), linear);
      finite += sv == splat<V>(Real(-HUGE_VAL)) ? V{} : splat<V>(Real(1));
    }
  });
  sums.sum += sum_lanes(sum);
  if constexpr (power != kNoHard) sums.hard += sum_lanes(hard);
  if constexpr (kFull) {
    sums.linear += double(sum_lanes(linear)) / (double(kShrink) * kShrink);
    sums.entropy += sum_lanes(entropy);
    sums.finite += sum_lanes(finite);
  }
}

template <class Real>
TGT_APART void fill(const Matrix& matrix, int64_t i, int64_t classes, Real value) {
  alignas(64) Real buffer[kBlock];
  for (int64_t at = 0; at < classes; at += kBlock) {
    const int count = int(classes - at < kBlock ? classes - at : kBlock);
    Real* to = write_block(matrix.row(i), matrix.type, at, buffer);
    for (int j = 0; j < count; ++j) to[j] = value;
    if (to == buffer) finish_block(to, matrix.row(i), matrix.type, at, count);
  }
}

// Writes make(s, shifted, b, exp(b), at, lanes) of a block's vectors: shifted = s - tail_max, b = shifted / T.
template <class Real, class Make>
TGT_HD void write_each(const Real* s, int count, const TopKFactors<Real>& f, Real* to, Make make) {
  using V = typename Lanes<Real>::Vector;
  each_of(s, count, [&](V sv, int at, int lanes) {
    const V shifted = sv - f.tail_max;
    const V b = bounded_below(shifted * f.inverse_t);
    const V value = make(sv, shifted, b, exp_nonpositive(b), at, lanes);
    if (lanes == Lanes<Real>::kCount) {
      store(to + at, value);
    } else {
      store_part(to + at, value, lanes);
    }
  });
}

// The hard term's part of a class's gradient.
template <HardPower power, class V, class Real>
TGT_HD V hard_gradient(V sv, V shifted, V e, const TopKFactors<Real>& f) {
  const V floor = sv < splat<V>(sizeof(Real) == 8 ? Real(-DBL_MAX) : Real(-FLT_MAX)) ? V{} : splat<V>(f.smoothed);
  return hard_of<power, V, Real>(shifted, e) * f.hard - floor;
}

// The gradient of a block as if all of it were tail, which is one class to the soft term.
template <class Real, HardPower power>
TGT_APART void lumped_gradient(const Real* s, int count, const TopKFactors<Real>& f, Real* to) {
  using V = typename Lanes<Real>::Vector;
  if (power == kNoHard && f.soft == 0) {
    for (int j = 0; j < count; ++j) to[j] = 0;
    return;
  }
  write_each(s, count, f, to, [&](V sv, V shifted, V, V e, int, int) {
    const V grad = e * f.soft;
    if constexpr (power == kNoHard) return grad;
    return grad + hard_gradient<power>(sv, shifted, e, f);
  });
}

// The same of a spread tail: the soft term's gradient, and the hard term's, which is added to it. `s` is not `to`.
template <class Real, class D>
TGT_APART void spread_gradients(const Real* s, int count, const TopKFactors<Real>& f, const Mixture<Real>& mixture,
                                Real* to) {
  using V = typename Lanes<Real>::Vector;
  write_each(s, count, f, to, [&](V sv, V, V b, V e, int, int) { return spread_gradient<D>(sv, b, e, f, mixture); });
}
template <class Real, HardPower power>
TGT_APART void add_hard_gradient(const Real* s, int count, const TopKFactors<Real>& f, Real* to) {
  using V = typename Lanes<Real>::Vector;
  write_each(s, count, f, to, [&](V sv, V shifted, V, V e, int at, int lanes) {
    const V soft = lanes < Lanes<Real>::kCount ? load_part(to + at, lanes, Real(0)) : load(to + at);
    return soft + hard_gradient<power>(sv, shifted, e, f);
  });
}

// Adds the classes of a spread tail, one by one, to the sums x, y of jsd.
template <class Real>
TGT_APART void add_spread(const TopKCall& call, int64_t i, const TailClass& tail, TopKRow& topk, TopKState& state) {
  using V = typename Lanes<Real>::Vector;
  const DistillCall& base = call.base;
  const TopKFactors<Real> f = topk_factors<Jsd, Real>(state, tail, base.options, call.topk.form, 1);
  const Mixture<Real> mixture = mixture_of<Real>(base.options);
  const Real centre = centre_of<false>(f.log_ratio, mixture);
  each_tail_block<Real>(base.student, i, base.classes, topk, [&](const Real* s, int count) {
    V x{}, y{};
    each_of(s, count, [&](V sv, int, int) {
      const V b = bounded_below((sv - f.tail_max) * f.inverse_t);
      Class<V> c;
      c.a = V{};
      c.b = b + f.log_ratio;
      c.p = sv == splat<V>(Real(-HUGE_VAL)) ? V{} : splat<V>(f.u);
      c.q = exp_nonpositive(b) * f.share;
      add_spread_class(c, centre, mixture, x, y);
    });
    state.x += sum_lanes(x);
    state.y += sum_lanes(y);
  });
}

// From a row's sums to its unweighted loss and its state.
template <class Real, class D>
double close_row(const TopKCall& call, int64_t i, TopKRow& topk, TopKState& state, const TailSums& tail,
                 const TopKSums& sums, double of_label) {
  const DistillOptions& options = call.base.options;
  const TailForm form = call.topk.form;
  const TailClass rest = tail_class(state, options, topk.tail_log_prob, InTurn());
  if constexpr (D::kSoft) {
    if (!soft_is_infinite<D>(rest, form, sums.missing)) {
      topk.add<D>(state, options, state.x, state.y);
      add_tail<D>(rest, tail, state, form, options, state.x, state.y);
      if (D::kMixture && spread(state, form)) add_spread<Real>(call, i, rest, topk, state);
    }
  }
  return topk_row_loss<D>(state, rest, tail, sums, form, options, of_label);
}

// The gradients of a row's top-k classes, and what makes those of the others.
template <class Real, class D>
TopKFactors<Real> factors_of(const TopKCall& call, TopKRow& topk, const TopKState& state, double upstream) {
  const DistillOptions& options = call.base.options;
  const TailClass tail = tail_class(state, options, topk.tail_log_prob, InTurn());
  const TopKFactors<Real> factors = topk_factors<D, Real>(state, tail, options, call.topk.form, upstream);
  topk.make_gradient<D>(state, options, factors);
  return factors;
}

// What a row's kernels are for a divergence and a power. What drives them is compiled once a type.
template <class Real>
struct RowKernels {
  bool soft;
  void (*sum_tail)(const Real* s, int count, Real inverse_t, TailSums&);
  void (*sum_full_tail)(const Real* s, int count, Real inverse_t, TailSums&);
  double (*close)(const TopKCall&, int64_t i, TopKRow&, TopKState&, const TailSums&, const TopKSums&, double of_label);
  TopKFactors<Real> (*factors)(const TopKCall&, TopKRow&, const TopKState&, double upstream);
  void (*lumped)(const Real* s, int count, const TopKFactors<Real>&, Real* to);
  void (*spread)(const Real* s, int count, const TopKFactors<Real>&, const Mixture<Real>&, Real* to);
  void (*add_hard)(const Real* s, int count, const TopKFactors<Real>&, Real* to);  // null: there is no hard term

  template <class D, HardPower power>
  static RowKernels of() {
    RowKernels made{D::kSoft,
                    tgt::sum_tail<Real, power, false>,
                    tgt::sum_tail<Real, power, true>,
                    close_row<Real, D>,
                    factors_of<Real, D>,
                    lumped_gradient<Real, power>,
                    nullptr,
                    nullptr};
    if constexpr (D::kSoft) made.spread = spread_gradients<Real, D>;
    if constexpr (power != kNoHard) made.add_hard = add_hard_gradient<Real, power>;
    return made;
  }
};

// The gradient of a row from its logits, its top-k classes (with their logits) and its state.
template <class Real>
TGT_APART void gradient_row(const RowKernels<Real>& kernels, const TopKCall& call, int64_t i, TopKRow& topk,
                            const TopKState& state, double upstream) {
  const DistillCall& base = call.base;
  const Matrix& grad = base.d_student;
  const int flags = int(state.flags);
  if (flags & (kDropped | kInvalid)) return fill<Real>(grad, i, base.classes, flags & kDropped ? Real(0) : Real(NAN));
  const TopKFactors<Real> factors = kernels.factors(call, topk, state, upstream);
  const Mixture<Real> mixture = mixture_of<Real>(base.options);
  const int64_t label = factors.hard_factor != 0 ? base.target[i] : -1;
  alignas(64) Real logits[kBlock];
  alignas(64) Real buffer[kBlock];
  for (int64_t at = 0; at < base.classes; at += kBlock) {
    const int count = int(base.classes - at < kBlock ? base.classes - at : kBlock);
    const Real* s = read_block(base.student.row(i), base.student.type, at, count, logits);
    Real* to = write_block(grad.row(i), grad.type, at, buffer);
    if (!factors.spread) {
      kernels.lumped(s, count, factors, to);
    } else {
      if (s == to) s = static_cast<const Real*>(memcpy(logits, s, count * sizeof(Real)));
      kernels.spread(s, count, factors, mixture, to);
      if (kernels.add_hard) kernels.add_hard(s, count, factors, to);
    }
    topk.put_gradient(to, at);
    if (label >= at && label < at + count) to[label - at] -= factors.label;
    if (to == buffer) finish_block(to, grad.row(i), grad.type, at, count);
  }
}

// The unweighted loss of a row that counts; fills the state but for its coefficient.
template <class Real>
TGT_APART double forward_row(const RowKernels<Real>& kernels, const TopKCall& call, int64_t i, int64_t label,
                             TopKRow& topk, TopKState& state) {
  const DistillCall& base = call.base;
  const DistillOptions& options = base.options;
  const TailForm form = call.topk.form;
  bool valid = true;
  if (!kernels.soft) {
    topk.clear();
  } else {
    valid = topk.read(call, i);
  }
  const double of_label = int(state.flags) & kHard ? read_element(base.student.row(i), base.student.type, label) : 0;
  const bool full = options.label_smoothing > 0 || form == TailForm::kUniform;
  const auto sum_tail = full ? kernels.sum_full_tail : kernels.sum_tail;
  const double inverse_t = 1 / options.temperature;
  TailSums tail;
  each_tail_block<Real>(base.student, i, base.classes, topk, [&](const Real* s, int count) {
    double most;
    valid = valid && block_maximum(s, count, most);
    if (!valid) return;
    tail.raise(larger(most, tail.max), inverse_t);
    sum_tail(s, count, Real(inverse_t), tail);
  });
  const TopKSums sums = topk.sums(options);
  const bool none = form == TailForm::kRenormalize && kernels.soft;
  valid = valid && topk.numbers();
  valid = valid && (sums.student_max > -HUGE_VAL || (!none && tail.max > -HUGE_VAL));
  if (!valid) {
    state.flags += kInvalid;
    return NAN;
  }
  settle_topk(state, tail, sums, topk.tail_log_prob, options, form, InTurn());
  return kernels.close(call, i, topk, state, tail, sums, of_label);
}

template <class Real>
TGT_APART void forward_rows(const RowKernels<Real>& kernels, const TopKCall& call, int64_t begin, int64_t end) {
  const DistillCall& base = call.base;
  TopKRow topk(call);
  for (int64_t i = begin; i < end; ++i) {
    const RowHead head = open_row(base, i);
    TopKState state{};
    state.flags = head.flags;
    state.coefficient = head.coefficient;
    double loss = 0;
    if (!head.dropped()) loss = state.coefficient * forward_row(kernels, call, i, head.label, topk, state);
    static_cast<Real*>(base.row_loss)[i] = Real(loss);
    if (base.d_student) {
      if (state.coefficient == 0) state.flags = kDropped;  // a divisor of 0
      gradient_row(kernels, call, i, topk, state, 1);
    }
    if (call.row_state) call.row_state[i] = state;
  }
}

template <class Real>
TGT_APART void backward_rows(const RowKernels<Real>& kernels, const TopKCall& call, int64_t begin, int64_t end) {
  const DistillCall& base = call.base;
  const Real* upstream = static_cast<const Real*>(base.upstream);
  TopKRow topk(call);
  for (int64_t i = begin; i < end; ++i) {
    TopKState state = call.row_state[i];
    if (state.coefficient == 0) state.flags = kDropped;
    if (!kernels.soft || int(state.flags) & (kDropped | kInvalid)) {
      topk.clear();
    } else {
      topk.read(call, i);
      topk.gather(base.student.row(i), base.student.type);
    }
    gradient_row(kernels, call, i, topk, state, upstream[base.upstream_per_row ? i : 0]);
  }
}

// The tail's exponentials are those of the soft term, be it wanted or not.
struct Kernel {
  template <class D>
  static constexpr bool kServed = D::kTopK || !D::kSoft;
  template <class D>
  static constexpr bool kPowers = true;
};
struct Forward : Kernel {
  template <class Real, class D, HardPower power>
  static void run(const TopKCall& call, int64_t begin, int64_t end) {
    forward_rows(RowKernels<Real>::template of<D, power>(), call, begin, end);
  }
};
struct Backward : Kernel {
  template <class Real, class D, HardPower power>
  static void run(const TopKCall& call, int64_t begin, int64_t end) {
    backward_rows(RowKernels<Real>::template of<D, power>(), call, begin, end);
  }
};

}  // namespace

void topk_forward_rows(const TopKCall& call, int64_t begin, int64_t end) {
  run_rows<Forward>(call, call.base, begin, end);
}

void topk_backward_rows(const TopKCall& call, int64_t begin, int64_t end) {
  run_rows<Backward>(call, call.base, begin, end);
}

}  // namespace TGT_ISA
}  // namespace tgt
