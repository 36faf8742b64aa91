// Writing a row's gradients: by the loops of ordinary rows or by those of any, then the label's class, then the peaks.
#pragma once

#include <type_traits>

#include "distill_lean.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// What all threads of a row have to know for its gradients.
template <class Real>
struct alignas(16) Ready {
  Constants<Real> row;
  Factors<Real> factors;
  LeanRow of_lean;
  Peaked peaked;
  bool counts, labelled, lean;
};

// Where the gradients of a source's vectors go, and whose the label's class is.
template <class Index>
struct Target {
  char* d_student;
  char* d_teacher;
  Index label;  // among the source's classes, of the thread that has it; -1 in the others
};
template <class Team, class Source>
TGT_DEVICE Target<typename Source::Index> target_of(const DeviceCall& d, const Team& team, const Source& source,
                                                    int64_t i, int64_t label, bool labelled) {
  using Index = typename Source::Index;
  const Matrix &student = d.call.d_student, &teacher = d.call.d_teacher;
  const Index first = Index(source.first) * kVector;
  const Index at = labelled && student.data ? Index(label) - first : Index(-1);
  const bool mine = at >= 0 && at < Index(source.count) * kVector && at / kVector % team.size == team.thread;
  return {student.row(i) + first * Index(element_size(source.student_gradient_type(d.call))),
          teacher.row(i) + first * Index(element_size(source.teacher_gradient_type(d.call))), mine ? at : Index(-1)};
}

// The peaks of a row, from what its threads found.
template <class Team, class Real, class Index>
TGT_DEVICE void write_peaks(const Team& team, const Peaked& peaked, const Others<Real>& mine,
                            const Peak<Real, Index>& student, const Peak<Real, Index>& teacher,
                            const Target<Index>& target, DType student_type, DType teacher_type, int stage) {
  const Others<Real> of_warp = merge_lanes<kWarp / 2>(mine, AddOthers<Real>());
  const Others<double> others = team.merge_warps(of_warp.template as<double>(), stage, AddOthers<double>());
  if (peaked.teacher) teacher.write(target.d_teacher, teacher_type, others.teacher);
  if (peaked.student) student.write(target.d_student, student_type, others.student);
}

template <class D, class Team, class Source>
TGT_DEVICE void write_lean_gradients(const DeviceCall& d, const Team& team, const Source& source,
                                     const Target<int>& target, const Ready<float>& ready, int stage) {
  const LeanRow row = ready.of_lean;
  const Factors<float>& f = ready.factors;
  const Constants<float>& constants = ready.row;
  const int count = static_cast<int>(source.count);
  float s = 0, t = 0;
  if (target.label >= 0) source.one(target.label, s, t);
  Others<float> others;
  Peak<float, int> peak;
  with_power(ready.labelled ? f.power : 0, [&](auto of) {
    constexpr int kPower = decltype(of)::kPower;
    const auto loop = [&](auto teacher, auto peaked) {
      lean_gradients<D, kPower, decltype(teacher)::value, decltype(peaked)::value>(
          source, target.d_student, target.d_teacher, team.thread, count, team.size, row, constants, f, peak,
          others.student);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    const bool teacher = d.call.d_teacher.data != nullptr;
    if (teacher) {
      loop(Yes(), No());
    } else if (kLeanPeaks<D> && ready.peaked.student) {
      if constexpr (kLeanPeaks<D>) loop(No(), Yes());
    } else {
      loop(No(), No());
    }
    if (target.label < 0) return;
    const float of_class = lean_student<D, kPower>(lean_class<D>(s, t, row), row, constants, f);
    store_one(target.d_student, DType::kBFloat16, target.label, of_class - f.label);
    others.student -= s == row.student_max ? 0 : f.label;
  });
  if (ready.peaked.student) {
    write_peaks(team, ready.peaked, others, peak, Peak<float, int>(), target, DType::kBFloat16, DType::kBFloat16,
                stage);
  }
}

// The gradients of a source's vectors, and of the label's class after them. The student's may overwrite its logits: a
// vector is read before it is written, and what is needed of the label's before all.
template <class D, class Real, class Team, class Source>
TGT_DEVICE void write_gradients(const DeviceCall& d, const Team& team, const Source& source, int64_t i, int64_t label,
                                const Ready<Real>& ready, int stage) {
  using Index = typename Source::Index;
  const Target<Index> target = target_of(d, team, source, i, label, ready.labelled);
  if constexpr (Source::template kLean<D>) {
    if (ready.lean) return write_lean_gradients<D>(d, team, source, target, ready, stage);
  }
  const Constants<Real> row = ready.row;
  const Factors<Real> factors = ready.factors;
  const Peaked peaked = ready.peaked;
  const Matrix &student = d.call.d_student, &teacher = d.call.d_teacher;
  const DType student_type = source.student_gradient_type(d.call), teacher_type = source.teacher_gradient_type(d.call);
  const Index classes = Index(d.call.classes) - Index(source.first) * kVector;
  char *d_student = target.d_student, *d_teacher = target.d_teacher;
  Real s_of_label = 0, t_of_label = 0;
  if (target.label >= 0) source.one(target.label, s_of_label, t_of_label);
  const Real student_max = row.student_max / Real(kShrink), teacher_max = row.teacher_max / Real(kShrink);
  Others<Real> mine;
  Peak<Real, Index> student_peak, teacher_peak;
  for (Index k = team.thread; k < Index(source.count); k += team.size) {
    Eight<Real> s, t;
    source.load(k, s, t);
    if (teacher.data) {
      const Eight<Real> grad = teacher_gradient<D>(s, t, row, factors);
      if (peaked.teacher) teacher_peak.add(t, grad, teacher_max, Index(k * kVector), mine.teacher);
      store_padded(d_teacher, teacher_type, Index(k * kVector), classes, d.d_teacher_aligned, grad);
    }
    if (student.data) {
      const Eight<Real> grad = student_gradient<D>(s, t, row, factors);
      if (peaked.student) student_peak.add(s, grad, student_max, Index(k * kVector), mine.student);
      store_padded(d_student, student_type, Index(k * kVector), classes, d.d_student_aligned, grad);
    }
  }
  if (target.label >= 0) {
    store_one(d_student, student_type, target.label, at_label<D>(s_of_label, t_of_label, row, factors));
    mine.student -= s_of_label == student_max ? Real(0) : factors.label;
  }
  if (peaked.any()) {
    write_peaks(team, peaked, mine, student_peak, teacher_peak, target, student_type, teacher_type, stage);
  }
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
