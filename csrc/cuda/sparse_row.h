// One row of the loss against a top-k record on a device: its listed classes, its tail, its gradient.
//
// The threads of a row share its vectors of eight classes, and besides each has some entries of the record. A source
// gives the vectors with -inf in the places of listed classes: that is the tail. The gradient of all classes is written
// as if they were tail; then each thread writes that of its listed classes over it. What happens once a row is done by
// one thread of a block, in double, and handed round through shared memory.
#pragma once

#include "../common/sparse.h"
#include "distill_on_chip.h"

namespace tgt::cuda {

// A call as the kernels read it.
struct SparseDeviceCall {
  DeviceCall base;
  Record record;
  SparseState* state = nullptr;
  bool map = false;  // shared memory has room for a bit a class
};

inline namespace TGT_ISA {

constexpr int kMostOwn = 32;  // entries of a thread
constexpr int kSparseThreads = 384, kSparseStreamThreads = 512;
constexpr int64_t kMostEntries = int64_t{kMostOwn} * kSparseThreads;

// What a block's threads tell each other of a row.
template <class Real>
struct SparseShared {
  SparseState state;
  SparseFactors<Real> factors;
};
constexpr int kSparseSharedBytes = 256;
constexpr int kSparseBytes = kTeamBytes + kBarrierBytes + kSparseSharedBytes;  // what precedes a row, or its map

template <class Real>
TGT_DEVICE SparseShared<Real>& row_in_shared() {
  static_assert(sizeof(SparseShared<Real>) <= kSparseSharedBytes, "fits its place");
  return *reinterpret_cast<SparseShared<Real>*>(shared_memory() + kTeamBytes + kBarrierBytes);
}

template <class Body>
TGT_DEVICE void with_sparse_divergence(const DistillOptions& options, Body body) {
  if (options.soft_weight == 0) return body(NoDivergence{});
  switch (DivergenceKind(options.divergence)) {
    case DivergenceKind::kReverseKl:
      return body(ReverseKl{});
    case DivergenceKind::kJsd:
      return body(Jsd{});
    case DivergenceKind::kCrossEntropy:
      return body(CrossEntropy{});
    default:  // no others reach the core
      return body(ForwardKl{});
  }
}

// The entries of a thread: those of classes [begin, end) that are neither padding, nor out of range, nor listed before.
template <class Real>
struct Own {
  int count = 0;
  int64_t entry[kMostOwn];
  Real s[kMostOwn];  // the student's logits, which a gradient in place will overwrite

  TGT_DEVICE static bool listed(const Record& record, int64_t i, int64_t j, int64_t classes) {
    const int64_t id = record.ids[i * record.id_stride + j];
    return id >= 0 && id < classes && load_one<double>(record.log_probs.row(i), record.log_probs.type, j) != -HUGE_VAL;
  }
  template <class Team>
  TGT_DEVICE void read(const SparseDeviceCall& d, const Team& team, int64_t i, int64_t begin, int64_t end) {
    const DistillCall& call = d.base.call;
    if (call.options.soft_weight == 0) return;  // the record may hold anything
    const int64_t* ids = d.record.ids + i * d.record.id_stride;
    for (int64_t j = team.thread; j < d.record.entries; j += team.size) {
      const int64_t id = ids[j];
      if (id < begin || id >= end || !listed(d.record, i, j, call.classes)) continue;
      bool repeated = false;
      TGT_UNROLL4
      for (int64_t m = 0; m < j; ++m) {
        if (ids[m] == id) repeated |= listed(d.record, i, m, call.classes);
      }
      if (repeated) continue;
      entry[count] = j;
      s[count] = load_one<Real>(call.student.row(i), call.student.type, id);
      ++count;
    }
  }
  TGT_DEVICE int64_t id(const Record& record, int64_t i, int n) const {
    return record.ids[i * record.id_stride + entry[n]];
  }
  TGT_DEVICE double log_prob(const Record& record, int64_t i, int n) const {
    return load_one<double>(record.log_probs.row(i), record.log_probs.type, entry[n]);
  }
};

TGT_DEVICE double tail_log_prob(const SparseDeviceCall& d, int64_t i) {
  const Matrix& tail = d.record.tail_log_prob;
  if (!tail.data || d.record.form == TailForm::kRenormalize || d.base.call.options.soft_weight == 0) return -HUGE_VAL;
  return load_one<double>(tail.row(i), tail.type, 0);
}

struct SparseExtremes {
  double tail = -HUGE_VAL, listed = -HUGE_VAL;  // logits
  double teacher = -HUGE_VAL;                   // log-probabilities of listed classes
  int unusual = 0, padding = 0;
};
struct MergeSparseExtremes {
  TGT_DEVICE SparseExtremes operator()(const SparseExtremes& a, const SparseExtremes& b) const {
    return {larger(a.tail, b.tail), larger(a.listed, b.listed), larger(a.teacher, b.teacher), a.unusual | b.unusual, 0};
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

// Sums over the row. linear, entropy and the numbers of finite classes are those that smoothed labels and a spread tail
// ask for; hard is over all classes, relative to the peak.
template <class Real>
struct alignas(8) SparseSums {
  Real tail = 0, linear = 0, entropy = 0, hard = 0;
  double listed = 0, listed_linear = 0, teacher = 0;
  int tail_finite = 0, listed_finite = 0;

  template <class Other>
  TGT_DEVICE SparseSums<Other> as() const {
    return {Other(tail),   Other(linear), Other(entropy), Other(hard),  listed,
            listed_linear, teacher,       tail_finite,    listed_finite};
  }
};
template <class Real>
struct AddSparseSums {
  TGT_DEVICE SparseSums<Real> operator()(const SparseSums<Real>& a, const SparseSums<Real>& b) const {
    return {a.tail + b.tail,       a.linear + b.linear,           a.entropy + b.entropy,
            a.hard + b.hard,       a.listed + b.listed,           a.listed_linear + b.listed_linear,
            a.teacher + b.teacher, a.tail_finite + b.tail_finite, a.listed_finite + b.listed_finite};
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
  Real tail_max, peak, inverse_t, binary_t;

  TGT_DEVICE Real share(Real s) const { return exp_scaled(s - tail_max, inverse_t, binary_t); }
  TGT_DEVICE Real argument(Real s) const { return bounded_below((s - tail_max) * inverse_t); }
  TGT_DEVICE Real hard(Real s, Real from) const { return exp_scaled(s - from, Real(1), Real(1.4426950408889634)); }
};
template <class Real>
TGT_DEVICE TailScale<Real> tail_scale(const DistillOptions& options, double tail_max, double peak) {
  return {Real(tail_max), Real(peak), Real(1 / options.temperature), Real(1.4426950408889634 / options.temperature)};
}

// The gradient of the row: all of a source's vectors as tail, then the thread's listed classes.
template <class D, class Real, class Team, class Source>
TGT_DEVICE void write_sparse_gradient(const SparseDeviceCall& d, const Team& team, const Source& source, int64_t i,
                                      const Own<Real>& own) {
  const DistillCall& call = d.base.call;
  const DistillOptions& options = call.options;
  const SparseShared<Real>& shared = row_in_shared<Real>();
  const SparseFactors<Real> f = shared.factors;
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
    if (k == labelled) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        if (j == int(label % kVector)) grad.v[j] -= f.label;
      }
    }
    store_padded(row, type, (source.first + k) * kVector, call.classes, d.base.d_student_aligned, grad);
  }
  team.barrier();
  for (int n = 0; n < own.count; ++n) {
    const int64_t id = own.id(d.record, i, n);
    double grad = listed_gradient<D>(double(own.s[n]), own.log_prob(d.record, i, n), shared.state, options, f);
    if (id == label) grad -= f.hard_factor * (1 - options.label_smoothing);
    store_one(row, type, id, Real(grad));
  }
}

template <class Real, class Team>
TGT_DEVICE void end_without_gradient(const SparseDeviceCall& d, const Team& team, int64_t i, SparseState state,
                                     double loss, int64_t first, int64_t count, Real fill_with) {
  if (team.leads()) {
    static_cast<Real*>(d.base.call.row_loss)[i] = Real(loss);
    if (d.state) d.state[i] = state;
  }
  fill_gradients(d.base, team, i, first, count, fill_with);
}

// Everything that follows the maxima of the tail.
template <class Real, class Team, class Source>
TGT_DEVICE void finish_sparse_row(const SparseDeviceCall& d, const Team& team, const Source& source, int64_t i,
                                  const RowHead& head, const Own<Real>& own, const TailMaximum<Real>& most,
                                  double of_label) {
  const DistillCall& call = d.base.call;
  const DistillOptions& options = call.options;
  const TailForm form = d.record.form;
  const bool soft = options.soft_weight != 0, restricted = soft && form == TailForm::kRenormalize;
  const double of_tail = tail_log_prob(d, i);

  SparseExtremes mine;
  mine.tail = most.most;
  mine.unusual = most.number ? 0 : kNotANumber;
  for (int n = 0; n < own.count; ++n) {
    const double s = own.s[n], a = own.log_prob(d.record, i, n);
    mine.listed = larger(s, mine.listed);
    mine.teacher = larger(a, mine.teacher);
    mine.unusual |= s == -HUGE_VAL ? kStudentOnly : 0;
    mine.unusual |= !(s < HUGE_VAL) || !(a < HUGE_VAL) ? kNotANumber : 0;
  }
  const SparseExtremes extremes = merge_all(team, mine, 0, MergeSparseExtremes());
  SparseState state{};
  state.flags = head.flags;
  state.coefficient = head.coefficient;
  bool valid = !(extremes.unusual & kNotANumber);
  valid &= extremes.listed > -HUGE_VAL || (!restricted && extremes.tail > -HUGE_VAL);
  valid &= !soft || (of_tail < HUGE_VAL && (extremes.teacher > -HUGE_VAL || of_tail > -HUGE_VAL));
  if (!valid) {
    const bool counts = head.coefficient != 0;  // a divisor of 0 leaves no gradient, not even NaN
    state.flags = counts ? head.flags | kInvalid : kDropped;
    end_without_gradient(d, team, i, state, NAN, source.first, source.count, counts ? Real(NAN) : Real(0));
    return;
  }

  const double peak = larger(extremes.tail, extremes.listed);
  const double tail_max = extremes.tail == -HUGE_VAL ? 0 : extremes.tail;
  const double listed_max = extremes.listed == -HUGE_VAL ? 0 : extremes.listed;
  const TailScale<Real> scale = tail_scale<Real>(options, tail_max, peak);
  const bool hard = head.flags & kHard, same = options.temperature == 1;
  const bool full = (hard && options.label_smoothing > 0) || (soft && form == TailForm::kUniform);
  SparseSums<Real> sums;
  for (int64_t k = team.thread; k < source.count; k += team.size) {
    const Eight<Real> s = source.load(k);
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const Real e = scale.share(s.v[j]);
      sums.tail += e;
      if (full) {
        const bool finite = s.v[j] != minus_infinity<Real>();
        sums.entropy = fused(e, scale.argument(s.v[j]), sums.entropy);
        sums.linear += finite ? s.v[j] - scale.tail_max : Real(0);
        sums.tail_finite += finite;
      }
    }
    if (hard && !same) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) sums.hard += scale.hard(s.v[j], scale.peak);
    }
  }
  for (int n = 0; n < own.count; ++n) {
    const double s = own.s[n];
    sums.teacher += exp_nonpositive(bounded_below(own.log_prob(d.record, i, n) - extremes.teacher));
    sums.listed += exp_nonpositive(bounded_below((s - listed_max) / options.temperature));
    sums.hard += Real(exp_nonpositive(bounded_below(s - peak)));
    if (s == -HUGE_VAL) continue;
    sums.listed_linear += s - listed_max;
    sums.listed_finite += 1;
  }
  const SparseSums<Real> of_warp = merge_lanes<kWarp / 2>(sums, AddSparseSums<Real>());
  const SparseSums<double> all = team.merge_warps(of_warp.template as<double>(), 1, AddSparseSums<double>());

  SparseShared<Real>& shared = row_in_shared<Real>();
  TailSums tail;
  tail.max = extremes.tail;
  tail.sum = all.tail;
  tail.linear = all.linear;
  tail.entropy = all.entropy;
  tail.finite = all.tail_finite;
  ListedSums listed;
  listed.student_max = extremes.listed;
  listed.teacher_max = extremes.teacher;
  listed.student = all.listed;
  listed.teacher = all.teacher;
  listed.linear = all.listed_linear;
  listed.finite = all.listed_finite;
  listed.missing = extremes.unusual & kStudentOnly;
  if (team.thread == 0) {
    settle_sparse(state, tail, listed, of_tail, options, form);
    const double of_hard = all.hard + (same && all.tail > 0 ? all.tail * exp(tail_max - peak) : 0);
    state.hard_lse = log_or_nothing(of_hard);
    shared.state = state;
    if (form == TailForm::kUniform) {  // jsd reads them before its sums are known
      with_sparse_divergence(options, [&](auto divergence) {
        shared.factors = sparse_factors<decltype(divergence), Real>(state, options, form, of_tail, 1);
      });
    }
  }
  team.barrier();

  Pair sum;
  with_sparse_divergence(options, [&](auto divergence) {
    using D = decltype(divergence);
    const Mixture<double> mixture{options.beta, 1 - options.beta};
    for (int n = 0; n < own.count; ++n) {
      const Class<double> c =
          listed_class(double(own.s[n]), own.log_prob(d.record, i, n), shared.state, 1 / options.temperature);
      D::add(c, mixture, sum.x, sum.y);
    }
    if constexpr (std::is_same<D, Jsd>::value) {
      if (!spread(shared.state, form)) return;
      const SparseFactors<Real> f = shared.factors;
      const Mixture<Real> narrow_mixture{Real(options.beta), Real(1 - options.beta)};
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
          D::add(c, narrow_mixture, x, y);
        }
      }
      sum.x += x;
      sum.y += y;
    }
  });
  sum = merge_all(team, sum, 2, AddPairs());
  if (team.thread == 0) {
    state = shared.state;
    with_sparse_divergence(options, [&](auto divergence) {
      using D = decltype(divergence);
      const TailClass rest = tail_class(state, options, of_tail);
      state.x = sum.x;
      state.y = sum.y;
      add_tail<D>(rest, tail, state, form, options, state.x, state.y);
      const double loss = sparse_row_loss<D>(state, rest, tail, listed, form, options, of_label);
      if (head.coefficient == 0) state.flags = kDropped;  // a divisor of 0
      shared.factors = sparse_factors<D, Real>(state, options, form, of_tail, 1);
      if (team.leads()) {
        static_cast<Real*>(call.row_loss)[i] = Real(head.weight * loss);
        if (d.state) d.state[i] = state;
      }
    });
    shared.state = state;
  }
  if (!call.d_student.data) return;
  if (head.coefficient == 0) {
    fill_gradients(d.base, team, i, source.first, source.count, Real(0));
    return;
  }
  team.barrier();
  with_sparse_divergence(
      options, [&](auto divergence) { write_sparse_gradient<decltype(divergence), Real>(d, team, source, i, own); });
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
