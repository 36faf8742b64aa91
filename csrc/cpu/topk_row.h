// The top-k classes of a row, as the CPU's kernels take them: block by block, in double.
#pragma once

#include "../common/topk.h"
#include "distill_row.h"
#include "scratch.h"

namespace tgt {
inline namespace TGT_ISA {

using VD = Lanes<double>::Vector;
constexpr int kDoubles = Lanes<double>::kCount;

// The top-k classes of a row, by blocks; padded with classes that are on neither side.
class TopKRow {
 public:
  TopKRow(const TopKCall& call)
      : starts_(call.base.classes / kBlock + 2),
        ids_(call.topk.entries),
        s_((call.topk.entries / kDoubles + 1) * kDoubles),
        a_(s_.size()),
        gradient_(s_.size()) {
    clear();
    ids_.fill(0);
    gradient_.fill(0);
  }

  // Row i; false when it is no distribution.
  TGT_APART bool read(const TopKCall& call, int64_t i) {
    const TopK& topk = call.topk;
    const int64_t* ids = topk.ids + i * topk.id_stride;
    const char* log_probs = topk.log_probs.row(i);
    const auto counts = [&](int64_t j) {
      return read_element(log_probs, topk.log_probs.type, j) != -HUGE_VAL && ids[j] >= 0 && ids[j] < call.base.classes;
    };
    starts_.fill(0);
    for (int64_t j = 0; j < topk.entries; ++j) {
      if (counts(j)) ++starts_[ids[j] / kBlock + 1];
    }
    for (int64_t b = 1; b < starts_.size(); ++b) starts_[b] += starts_[b - 1];
    count_ = starts_[starts_.size() - 1];
    s_.fill(-HUGE_VAL);
    a_.fill(-HUGE_VAL);
    bool valid = true;
    for (int64_t j = 0; j < topk.entries; ++j) {
      if (!counts(j)) continue;
      const int64_t at = starts_[ids[j] / kBlock]++;
      ids_[at] = ids[j];
      a_[at] = read_element(log_probs, topk.log_probs.type, j);
      valid &= a_[at] < HUGE_VAL;
    }
    for (int64_t b = starts_.size() - 1; b > 0; --b) starts_[b] = starts_[b - 1];
    starts_[0] = 0;
    tail_log_prob = topk.tail_log_prob && topk.form != TailForm::kRenormalize
                        ? read_element(topk.tail_log_prob.row(i), topk.tail_log_prob.type, 0)
                        : -HUGE_VAL;
    return valid && tail_log_prob < HUGE_VAL && (count_ > 0 || tail_log_prob > -HUGE_VAL);
  }
  void clear() {
    starts_.fill(0);
    s_.fill(-HUGE_VAL);
    a_.fill(-HUGE_VAL);
    count_ = 0;
    tail_log_prob = -HUGE_VAL;
  }

  // Logits of the row, for a gradient that comes without a pass over it.
  TGT_APART void gather(const char* row, DType type) {
    for (int64_t e = 0; e < count_; ++e) s_[e] = read_element(row, type, ids_[e]);
  }

  // Takes the classes of a block out of it: -inf in their places.
  template <class Real>
  void take(Real* block, int64_t at) {
    const int64_t b = at / kBlock;
    for (int64_t e = starts_[b]; e < starts_[b + 1]; ++e) {
      s_[e] = block[ids_[e] - at];
      block[ids_[e] - at] = Real(-HUGE_VAL);
    }
  }
  bool any_in(int64_t at) const { return starts_[at / kBlock] < starts_[at / kBlock + 1]; }

  template <class Real>
  void put_gradient(Real* block, int64_t at) const {
    const int64_t b = at / kBlock;
    for (int64_t e = starts_[b]; e < starts_[b + 1]; ++e) block[ids_[e] - at] = Real(gradient_[e]);
  }

  bool numbers() const {  // neither NaN nor +inf
    for (int64_t e = 0; e < count_; ++e) {
      if (!(s_[e] < HUGE_VAL)) return false;
    }
    return true;
  }

  TGT_APART TopKSums sums(const DistillOptions& options) const {
    TopKSums sums;
    for (int64_t e = 0; e < count_; ++e) {
      sums.student_max = larger(s_[e], sums.student_max);
      sums.teacher_max = larger(a_[e], sums.teacher_max);
      sums.missing |= s_[e] == -HUGE_VAL;
    }
    const double student_max = sums.student_max == -HUGE_VAL ? 0 : sums.student_max;
    const double inverse_t = 1 / options.temperature;
    VD student{}, teacher{}, hard{};
    each([&](VD s, VD a, int64_t) {
      const VD shifted = s - student_max;
      student += exp_nonpositive(bounded_below(shifted * inverse_t));
      hard += exp_nonpositive(bounded_below(shifted));
      teacher += exp_nonpositive(bounded_below(a - sums.teacher_max));
    });
    sums.student = sum_lanes(student);
    sums.hard = sum_lanes(hard);
    sums.teacher = count_ ? sum_lanes(teacher) : 0;
    for (int64_t e = 0; e < count_; ++e) {
      if (s_[e] == -HUGE_VAL) continue;
      sums.finite += 1;
      sums.linear += s_[e] - student_max;
    }
    return sums;
  }

  template <class D>
  TGT_APART void add(const TopKState& row, const DistillOptions& options, double& x, double& y) const {
    const Mixture<double> mixture = mixture_of<double>(options);
    VD of_x{}, of_y{};
    each([&](VD s, VD a, int64_t) { D::add(topk_class(s, a, row, 1 / options.temperature), mixture, of_x, of_y); });
    x += sum_lanes(of_x);
    y += sum_lanes(of_y);
  }

  template <class D, class Real>
  TGT_APART void make_gradient(const TopKState& row, const DistillOptions& options, const TopKFactors<Real>& factors) {
    each([&](VD s, VD a, int64_t e) { store(gradient_.data() + e, topk_gradient<D>(s, a, row, options, factors)); });
  }

  double tail_log_prob = -HUGE_VAL;

 private:
  template <class Body>
  void each(Body body) const {
    for (int64_t e = 0; e < count_; e += kDoubles) body(load(s_.data() + e), load(a_.data() + e), e);
  }

  Scratch<int64_t> starts_;  // of each block's classes
  Scratch<int64_t> ids_;
  Scratch<double> s_, a_, gradient_;
  int64_t count_ = 0;
};

}  // namespace TGT_ISA
}  // namespace tgt
