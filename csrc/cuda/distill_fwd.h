// The forward kernels of distill: row losses, row states and gradients, each logit read from memory once where a row
// pair fits on the chip.
//
//   distill_fwd_kernel          a warp, a block or a cluster a row; the row pair stays in shared memory
//   distill_fwd_stream_kernel   a block a row; the row pair is read again for the gradients
#pragma once

#include "distill_peak.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

constexpr int kChunks = 4;         // pieces in which a row arrives
constexpr int kBarrierBytes = 64;  // of their barriers
constexpr int kWarpTeamThreads = 256, kStreamThreads = 512;

struct RowHead {
  int64_t label;
  double weight, coefficient;
  int flags;
};

// Which terms the row has. A label or a weight that is out of range drops the row: on a device it cannot be an error.
TGT_DEVICE RowHead open_row(const DeviceCall& d, int64_t i) {
  const DistillCall& call = d.call;
  RowHead head;
  head.weight = call.weight ? call.weight[i] : 1;
  head.label = call.target ? call.target[i] : call.options.unlabeled_index;
  const bool labelled = call.target && head.label != call.options.unlabeled_index;
  bool dropped =
      !(head.weight > 0 && head.weight < HUGE_VAL) || (call.target && head.label == call.options.ignore_index);
  dropped |= labelled && (head.label < 0 || head.label >= call.classes);
  head.flags = dropped ? kDropped : labelled ? kHard : 0;
  const double divisor = call.divisor_at ? *call.divisor_at : call.divisor;
  head.coefficient = divisor == 0 || dropped ? 0 : head.weight / divisor;
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
TGT_DEVICE double close_row(const DistillOptions& options, const Sums<double>& sums, double of_label, int unusual,
                            RowState& state) {
  double loss = 0;
  if (is_infinite<D>(unusual)) {
    state.flags += kInfiniteSoft;
    state.x = state.y = 0;
    loss = HUGE_VAL;
  } else {
    const double squared = D::kProbabilities ? options.temperature * options.temperature : 1;
    loss = options.soft_weight * squared * not_negative(D::value(state.x, state.y, options.beta));
  }
  if (!(static_cast<int>(state.flags) & kHard)) return loss;
  const double smoothing = options.label_smoothing;
  double hard = log(state.hard_sum);
  if (smoothing < 1) hard -= (1 - smoothing) * (of_label - state.student_max);
  if (smoothing > 0) hard -= smoothing / state.finite * (sums.linear / kTiny);
  if (of_label == -HUGE_VAL && smoothing < 1) {
    state.flags += kInfiniteHard;
    hard = HUGE_VAL;
  }
  return loss + options.hard_weight * not_negative(hard);
}

// The gradients of a source's vectors. The student's may overwrite its logits: a vector is read before it is written.
// `label`: the label's class, or -1. `stage`: of the reduction that a row with a peak takes.
template <class D, class Real, class Team, class Source>
TGT_DEVICE void write_gradients(const DeviceCall& d, const Team& team, const Source& source, int64_t i, int64_t label,
                                const Constants<Real>& row, const Factors<Real>& factors, const Peaked& peaked,
                                int stage) {
  using Index = typename Source::Index;
  const Matrix &student = d.call.d_student, &teacher = d.call.d_teacher;
  const DType student_type = source.student_gradient_type(d.call), teacher_type = source.teacher_gradient_type(d.call);
  const int64_t first = source.first * kVector, classes = d.call.classes - first;
  char* d_student = student.row(i) + first * element_size(student.type);
  char* d_teacher = teacher.row(i) + first * element_size(teacher.type);
  const Index labelled = label < first ? Index(-1) : Index((label - first) / kVector);
  const Real student_max = row.student_max / Real(kShrink), teacher_max = row.teacher_max / Real(kShrink);
  Others<Real> mine;
  Peak<Real, Index> student_peak, teacher_peak;
  for (Index k = team.thread; k < Index(source.count); k += team.size) {
    Eight<Real> s, t;
    source.load(k, s, t);
    if (teacher.data) {
      const Eight<Real> grad = teacher_gradient<D>(s, t, row, factors);
      if (peaked.teacher) teacher_peak.add(t, grad, teacher_max, Index(k * kVector), mine.teacher);
      store_padded(d_teacher, teacher_type, Index(k * kVector), Index(classes), d.d_teacher_aligned, grad);
    }
    if (student.data) {
      const Eight<Real> grad = student_gradient<D>(s, t, row, factors, k == labelled ? int(label % kVector) : -1);
      if (peaked.student) student_peak.add(s, grad, student_max, Index(k * kVector), mine.student);
      store_padded(d_student, student_type, Index(k * kVector), Index(classes), d.d_student_aligned, grad);
    }
  }
  if (!peaked.any()) return;
  const Others<Real> of_warp = merge_lanes<kWarp / 2>(mine, AddOthers<Real>());
  const Others<double> others = team.merge_warps(of_warp.template as<double>(), stage, AddOthers<double>());
  if (peaked.teacher) teacher_peak.write(d_teacher, teacher_type, others.teacher);
  if (peaked.student) student_peak.write(d_student, student_type, others.student);
}

// Everything that follows a row's maxima and sums, for on-chip and streamed rows alike. Source gives vectors of the
// row pair: load(k, s, t), k in [0, source.count).
template <class Real, class D, class Team, class Source>
TGT_DEVICE void finish_row(const DeviceCall& d, const Team& team, const Source& source, int64_t i, const RowHead& head,
                           const Sums<double>& sums, const Extremes<double>& extremes, double of_label) {
  const DistillCall& call = d.call;
  const DistillOptions& options = call.options;
  const Terms terms = terms_of<D>(options, head.flags & kHard);
  Constants<Real> row = constants_of<D, Real>(d, extremes.student, extremes.teacher);
  const Normalisers normalisers = normalisers_of(sums.student, sums.teacher);
  settle(row, normalisers);

  RowState state{};
  state.flags = head.flags;
  state.coefficient = head.coefficient;
  state.student_max = extremes.student;
  state.teacher_max = extremes.teacher;
  state.student_sum = sums.student;
  state.teacher_sum = sums.teacher;
  state.hard_sum = terms.same ? sums.student : sums.hard;
  state.finite = static_cast<double>(call.classes - extremes.masked);
  if constexpr (D::kShiftedSums) {
    OnlineSums online;
    online.student = sums.student;
    online.teacher = sums.teacher;
    online.x = sums.x * units_of<D>(d);
    online.y = sums.y * units_of<D>(d);
    D::finish(online, normalisers.log_student, normalisers.log_teacher, state.x, state.y);
  } else if constexpr (D::kProbabilities) {  // jsd, tvd: their sums need the normalisers
    Sums<Real> mine;
    using Index = typename Source::Index;
    for (Index k = team.thread; k < Index(source.count); k += team.size) {
      Eight<Real> s, t;
      source.load(k, s, t);
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        D::add(normalised<D>(s.v[j], t.v[j], row), row.mixture, mine.x, mine.y);
      }
    }
    const Sums<double> all = add_all(team, mine, 2);
    state.x = all.x;
    state.y = all.y;
  } else if constexpr (D::kSquares) {
    constexpr double kFits = 1e37;
    state.x = sums.x < kFits ? sums.x : sums.y / (kSmall * kSmall);
  }
  const double loss = close_row<D>(options, sums, of_label, extremes.unusual, state);
  if (head.coefficient == 0) state.flags = kDropped;  // a divisor of 0
  if (team.leads()) write_row<Real>(call, i, head.coefficient * loss, state);
  if (!call.d_student.data && !call.d_teacher.data) return;
  if (head.coefficient == 0) {
    fill_gradients(d, team, i, source.first, source.count, Real(0));
    return;
  }

  const bool labelled = (static_cast<int>(state.flags) & kHard) && !(static_cast<int>(state.flags) & kInfiniteHard);
  // A stage that was not the last one: between its two uses all threads meet.
  constexpr int kStage = D::kProbabilities && !D::kShiftedSums ? 1 : 2;
  write_gradients<D>(d, team, source, i, labelled ? head.label : -1, row, factors_of<D, Real>(d, state, terms, 1),
                     peaked_of<D>(call, state), kStage);
}

// A row that is no distribution: NaN for itself alone.
template <class Real, class Team>
TGT_DEVICE void spoil_row(const DeviceCall& d, const Team& team, int64_t i, const RowHead& head, int64_t first,
                          int64_t count) {
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
