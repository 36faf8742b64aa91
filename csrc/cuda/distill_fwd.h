// The forward kernels of distill: row losses, row states and gradients, each logit read from memory once where a row
// pair fits on the chip.
//
//   distill_fwd_kernel          a warp, a block or a cluster a row; the row pair stays in shared memory
//   distill_fwd_stream_kernel   a block a row; the row pair is read again for the gradients
#pragma once

#include "distill_write.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

constexpr int kChunks = 4;         // pieces in which a row of a top-k teacher arrives
constexpr int kBarrierBytes = 64;  // of their barriers
constexpr int kWarpTeamThreads = 256, kStreamThreads = 512;

struct RowHead {
  int64_t label;
  double weight, coefficient;
  int flags;
};

// Which terms the row has. A label or a weight that is out of range drops the row: on a device it cannot be an error.
TGT_DEVICE RowHead look_at_row(const DeviceCall& d, int64_t i) {
  const DistillCall& call = d.call;
  RowHead head;
  head.weight = call.weight ? call.weight[i] : 1;
  head.label = call.target ? call.target[i] : call.options.unlabeled_index;
  const bool labelled = call.target && head.label != call.options.unlabeled_index;
  bool dropped =
      !(head.weight > 0 && head.weight < HUGE_VAL) || (call.target && head.label == call.options.ignore_index);
  dropped |= labelled && (head.label < 0 || head.label >= call.classes);
  head.flags = dropped ? kDropped : labelled ? kHard : 0;
  head.coefficient = 0;
  return head;
}
TGT_DEVICE double coefficient_of(const DeviceCall& d, const RowHead& head) {
  const double divisor = d.call.divisor_at ? *d.call.divisor_at : d.call.divisor;
  return divisor == 0 || head.flags & kDropped ? 0 : head.weight / divisor;
}
TGT_DEVICE RowHead open_row(const DeviceCall& d, int64_t i) {
  RowHead head = look_at_row(d, i);
  head.coefficient = coefficient_of(d, head);
  return head;
}

// What the loss reads beside the student. Without a soft term that is the student again: the teacher may hold anything.
TGT_DEVICE const Matrix& partner(const DistillCall& call) {
  return call.options.soft_weight == 0 ? call.student : call.teacher;
}

// Writes 0 or NaN to the vectors of a row. Rows that do not count are few or cheap: short code, not fast code.
TGT_DEVICE void fill(const Matrix& matrix, bool aligned, int64_t i, int64_t classes, int64_t begin, int64_t end,
                     int64_t step, bool nan) {
  if (!matrix.data) return;
  char* row = matrix.row(i);
  const int bytes = static_cast<int>(element_size(matrix.type));
  const uint32_t pattern = !nan                              ? 0
                           : matrix.type == DType::kBFloat16 ? 0x7fc07fc0u
                           : matrix.type == DType::kFloat16  ? 0x7e007e00u
                           : matrix.type == DType::kFloat32  ? 0x7fc00000u
                                                             : 0xffffffffu;  // of a double: any NaN
  TGT_NO_UNROLL
  for (int64_t k = begin; k < end; k += step) {
    const int64_t first = k * kVector * bytes, left = (classes - k * kVector) * bytes;
    const int room = left < kVector * bytes ? static_cast<int>(left) : kVector * bytes;
    if (aligned && room == kVector * bytes) {
      TGT_NO_UNROLL
      for (int at = 0; at < room; at += 16) {
        store16_streaming(row + first + at, {{pattern, pattern, pattern, pattern}});
      }
    } else {
      TGT_NO_UNROLL
      for (int at = 0; at < room; at += 2) {  // a wider element is a repetition of halves, or starts with zeros
        const bool upper = bytes > 2 && at % 4 != 0;
        *reinterpret_cast<uint16_t*>(row + first + at) = static_cast<uint16_t>(upper ? pattern >> 16 : pattern);
      }
    }
  }
}

template <class Real, class Team>
TGT_DEVICE void fill_gradients(const DeviceCall& d, const Team& team, int64_t i, int64_t first, int64_t count,
                               Real value) {
  const bool nan = value != 0;
  const DistillCall& call = d.call;
  fill(call.d_student, d.d_student_aligned, i, call.classes, first + team.thread, first + count, team.size, nan);
  fill(call.d_teacher, d.d_teacher_aligned, i, call.classes, first + team.thread, first + count, team.size, nan);
}

template <class Real>
TGT_DEVICE void write_row(const DistillCall& call, int64_t i, double loss, const RowState& state) {
  static_cast<Real*>(call.row_loss)[i] = Real(loss);
  if (call.row_state) call.row_state[i] = state;
}

template <class Real, class Team>
TGT_DEVICE void drop_row(const DeviceCall& d, const Team& team, int64_t i, int64_t first, int64_t count) {
  if (team.leads()) {
    RowState state{};
    state.flags = kDropped;
    write_row<Real>(d.call, i, 0, state);
  }
  fill_gradients(d, team, i, first, count, Real(0));
}

TGT_DEVICE double not_negative(double loss) { return loss < 0 ? 0 : loss; }

// State and unweighted loss of a row that is a distribution on both sides. of_label: the label's logit.
template <class D>
TGT_DEVICE double close_row(const DeviceCall& d, const Sums<double>& sums, double of_label, int unusual,
                            const Normalisers& n, RowState& state) {
  const DistillOptions& options = d.call.options;
  double loss = 0;
  if (is_infinite<D>(unusual)) {
    state.flags += kInfiniteSoft;
    state.x = state.y = 0;
    loss = HUGE_VAL;
  } else {
    const double squared = D::kProbabilities ? d.squared : 1;
    loss = options.soft_weight * squared * not_negative(D::value(state.x, state.y, options.beta));
  }
  if (!(static_cast<int>(state.flags) & kHard)) return loss;
  const double smoothing = options.label_smoothing;
  double hard = n.log_hard;
  if (smoothing < 1) hard -= (1 - smoothing) * (of_label - state.student_max);
  if (smoothing > 0) hard -= smoothing / state.finite * (sums.linear / kTiny);
  if (of_label == -HUGE_VAL && smoothing < 1) {
    state.flags += kInfiniteHard;
    hard = HUGE_VAL;
  }
  return loss + options.hard_weight * not_negative(hard);
}

// What a row is after its maxima and its sums.
struct Measured {
  Sums<double> sums;
  Normalisers normalisers;
  Extremes<double> extremes;
  bool in_bits;  // x and y are: an ordinary row
  bool lean;     // so are its gradients to be
};

// The same with what a second sum over the row takes of it, by the warp that has found it.
template <class Real>
struct Halfway {
  Measured found;
  Constants<Real> row;
  LeanRow of_lean;
};

TGT_DEVICE Measured measured_of(const Terms& terms, const Sums<double>& sums, const Extremes<double>& extremes,
                                bool in_bits, bool lean) {
  const double hard = terms.same() ? sums.student : sums.hard;
  return {sums, normalisers_of(sums.student, sums.teacher, hard), extremes, in_bits, lean};
}

TGT_DEVICE LeanRow lean_row(const DeviceCall& d, const Measured& found, float power_factor) {
  const Normalisers& n = found.normalisers;
  const double student_max = found.extremes.student, teacher_max = found.extremes.teacher;
  return {d.binary_ts,
          d.binary_tt,
          float(student_max * d.binary_ts + n.log_student * kLog2E),
          float(teacher_max * d.binary_tt + n.log_teacher * kLog2E),
          power_factor,
          float(student_max),
          float(teacher_max),
          float((n.log_teacher - n.log_student) * kLog2E)};
}

// Writes the row's loss and state, from all that is known of it. x and y: of the divergences that are summed over
// normalised classes.
template <class Real, class D, class Team>
TGT_DEVICE Ready<Real> close(const DeviceCall& d, const Team& team, int64_t i, RowHead head, const Measured& found,
                             double x, double y, double of_label) {
  const DistillCall& call = d.call;
  const Terms terms = terms_of<D>(d, head.flags & kHard);
  const Sums<double>& sums = found.sums;
  const Normalisers& n = found.normalisers;
  const Unit unit = unit_of<D>(d), bits = {kBit, kLog2E};
  head.coefficient = coefficient_of(d, head);

  RowState state{};
  state.flags = head.flags;
  state.coefficient = head.coefficient;
  state.student_max = found.extremes.student;
  state.teacher_max = found.extremes.teacher;
  state.student_sum = sums.student;
  state.teacher_sum = sums.teacher;
  state.hard_sum = terms.same() ? sums.student : sums.hard;
  state.finite = static_cast<double>(call.classes - found.extremes.masked);
  if constexpr (D::kShiftedSums) {
    const double in_nats = found.in_bits ? bits.in_nats : unit.in_nats;
    OnlineSums online;
    online.student = sums.student;
    online.teacher = sums.teacher;
    online.x = sums.x * in_nats;
    online.y = sums.y * in_nats;
    D::finish(online, n.log_student, n.log_teacher, state.x, state.y);
  } else if constexpr (D::kProbabilities) {
    state.x = x;
    state.y = y;
  } else if constexpr (D::kSquares) {
    constexpr double kFits = 1e37;
    state.x = sums.x < kFits ? sums.x : sums.y / (kSmall * kSmall);
  }
  const double loss = close_row<D>(d, sums, of_label, found.extremes.unusual, n, state);
  if (head.coefficient == 0) state.flags = kDropped;  // a divisor of 0
  if (team.leads()) write_row<Real>(call, i, head.coefficient * loss, state);

  Ready<Real> ready;
  ready.counts = head.coefficient != 0;
  ready.labelled = (static_cast<int>(state.flags) & kHard) && !(static_cast<int>(state.flags) & kInfiniteHard);
  ready.peaked = peaked_of<D>(call, state);
  const bool lean = ready.lean = found.lean && !(ready.peaked.any() && (call.d_teacher.data || !kLeanPeaks<D>));
  ready.row = constants_of<D, Real>(d, state.student_max, state.teacher_max);
  settle(ready.row, n);
  if (lean) ready.row.nat = Real(bits.nat);
  ready.factors = factors_of<D, Real>(d, state, terms, lean ? bits : unit, n, 1);
  ready.of_lean = lean_row(d, found, float(ready.factors.inverse_hard * ready.factors.hard_factor));
  return ready;
}

template <class Real>
struct WidenPair {
  TGT_DEVICE Others<double> operator()(const Others<Real>& x) const { return x.template as<double>(); }
};

// Everything that follows a row's sums, for on-chip and streamed rows alike. Source gives vectors of the row pair:
// load(k, s, t), k in [0, source.count), and classes by themselves: one(at, s, t).
template <class Real, class D, class Team, class Source>
TGT_DEVICE void end_row(const DeviceCall& d, const Team& team, const Source& source, int64_t i, const RowHead& head,
                        const Ready<Real>& ready) {
  const DistillCall& call = d.call;
  if (!call.d_student.data && !call.d_teacher.data) return;
  if (!ready.counts) {
    fill_gradients(d, team, i, source.first, source.count, Real(0));
    return;
  }
  // A stage that was not the last one: between its two uses all threads meet.
  constexpr int kStage = D::kProbabilities && !D::kShiftedSums ? 1 : 2;
  write_gradients<D>(d, team, source, i, head.label, ready, kStage);
}

// The sums of a divergence over normalised classes: jsd, tvd.
template <class Real, class D, class Team, class Source>
TGT_DEVICE Others<Real> normalised_sums(const DeviceCall& d, const Team& team, const Source& source,
                                        const Halfway<Real>& halfway) {
  using Index = typename Source::Index;
  Others<Real> mine;
  if constexpr (D::kMixture && Source::template kLean<D>) {
    if (halfway.found.in_bits && d.even) {
      const LeanRow lean = halfway.of_lean;
      mine = lean_halves(source, team.thread, int(source.count), team.size, lean);
      return merge_lanes<kWarp / 2>(mine, AddOthers<Real>());
    }
  }
  const Constants<Real> row = halfway.row;
  for (Index k = team.thread; k < Index(source.count); k += team.size) {
    Eight<Real> s, t;
    source.load(k, s, t);
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      D::add(normalised<D>(s.v[j], t.v[j], row), row.mixture, mine.student, mine.teacher);
    }
  }
  return merge_lanes<kWarp / 2>(mine, AddOthers<Real>());
}

// What follows a row's sums, of which each warp has its own: `widen` and `merge` make `Found` of them, `total` gives
// Sums<double> of that.
template <class Real, class D, class Team, class Source, class Partial, class Widen, class Merge, class Total>
TGT_DEVICE void finish_row(const DeviceCall& d, const Team& team, const Source& source, int64_t i, const RowHead& head,
                           const Partial& of_warp, const Extremes<double>& extremes, double of_label, bool in_bits,
                           bool lean, Widen widen, Merge merge, Total total) {
  const Terms terms = terms_of<D>(d, head.flags & kHard);
  if constexpr (D::kProbabilities && !D::kShiftedSums) {
    const auto& halfway = team.template tell<Halfway<Real>>(of_warp, 1, widen, merge, [&](const auto& all) {
      Halfway<Real> made;
      made.found = measured_of(terms, total(all), extremes, in_bits, lean);
      made.row = constants_of<D, Real>(d, extremes.student, extremes.teacher);
      settle(made.row, made.found.normalisers);
      if constexpr (D::kMixture) made.of_lean = lean_row(d, made.found, 0);
      return made;
    });
    const Others<Real> mine = normalised_sums<Real, D>(d, team, source, halfway);
    const auto& ready = team.template tell<Ready<Real>>(
        mine, 2, WidenPair<Real>(), AddOthers<double>(), [&](const Others<double>& pair) {
          return close<Real, D>(d, team, i, head, halfway.found, pair.student, pair.teacher, of_label);
        });
    end_row<Real, D>(d, team, source, i, head, ready);
  } else {
    const auto& ready = team.template tell<Ready<Real>>(of_warp, 1, widen, merge, [&](const auto& all) {
      const Measured found = measured_of(terms, total(all), extremes, in_bits, lean);
      return close<Real, D>(d, team, i, head, found, 0, 0, of_label);
    });
    end_row<Real, D>(d, team, source, i, head, ready);
  }
}

// A row that is no distribution: NaN for itself alone.
template <class Real, class Team>
TGT_DEVICE void spoil_row(const DeviceCall& d, const Team& team, int64_t i, RowHead head, int64_t first,
                          int64_t count) {
  head.coefficient = coefficient_of(d, head);
  const bool counts = head.coefficient != 0;  // a divisor of 0 leaves no gradient, not even NaN
  if (team.leads()) {
    RowState state{};
    state.flags = counts ? head.flags | kInvalid : kDropped;
    state.coefficient = head.coefficient;
    write_row<Real>(d.call, i, NAN, state);
  }
  fill_gradients(d, team, i, first, count, counts ? Real(NAN) : Real(0));
}

template <class Real>
TGT_DEVICE bool is_invalid(const Extremes<Real>& e) {
  return (e.unusual & kNotANumber) || e.student == minus_infinity<Real>() || e.teacher == minus_infinity<Real>();
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
