// The loops over an ordinary row: all its logits are finite and of a size at which their differences stay in range,
// its label is not smoothed, and its hard term, if it has one, is a power of what the soft term takes. Nothing is left
// to ask in them; which loop a row takes is chosen once, by its terms.
//
// Log-probabilities are in units of a bit here: the arguments of the exponentials are what the divergence takes.
#pragma once

#include "distill_peak.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

constexpr double kBit = 0.6931471805599453;  // in nats

TGT_DEVICE float absolute_of(float x) { return fabsf(x); }
TGT_DEVICE float smaller_of(float a, float b) { return fminf(a, b); }

// Calls body(Power<k>{}) with the power of the hard term; 0: the row has none.
template <int kOf>
struct Power {
  static constexpr int kPower = kOf;
};
template <class Body>
TGT_DEVICE void with_power(int power, Body body) {
  switch (power) {
    case 0:
      return body(Power<0>{});
    case 1:
      return body(Power<1>{});
    case 2:
      return body(Power<2>{});
    case 3:
      return body(Power<3>{});
    default:
      return body(Power<4>{});
  }
}

// x += factor * y^kPower
template <int kPower>
TGT_DEVICE float add_power(float x, float y, float factor) {
  static_assert(kPower > 1, "the others are no power");
  const float squared = y * y;
  if constexpr (kPower == 2) return fused(squared, factor, x);
  if constexpr (kPower == 3) return fused(squared, y * factor, x);
  return fused(squared, squared * factor, x);
}
template <int kPower>
TGT_DEVICE float add_power(float x, float y) {
  static_assert(kPower > 1, "the others are no power");
  if constexpr (kPower == 2) return fused(y, y, x);
  const float squared = y * y;
  if constexpr (kPower == 3) return fused(squared, y, x);
  return fused(squared, squared, x);
}

// Differences from the maxima, which are exact where it matters: at the maxima themselves.
template <class D, int kPower, class Row>
TGT_DEVICE void lean_sums(const DeviceCall& d, const Row& row, int begin, int end, int step,
                          const Extremes<float>& extremes, Sums<float>& sums) {
  const float student_max = extremes.student, teacher_max = extremes.teacher;
  const Mixture<float> mixture{};
  Sums<float> mine;
  for (int k = begin; k < end; k += step) {
    Eight<float> s, t;
    row.load(k, s, t);
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      Class<float> c;
      c.a = (t.v[i] - teacher_max) * d.binary_tt;
      c.b = (s.v[i] - student_max) * d.binary_ts;
      c.p = exp2_fast(c.a);
      c.q = exp2_fast(c.b);
      mine.student += c.q;
      mine.teacher += c.p;
      if constexpr (D::kShiftedSums) D::add(c, mixture, mine.x, mine.y);
      if constexpr (kPower > 1) mine.hard = add_power<kPower>(mine.hard, c.q);
    }
  }
  sums = mine;
}

// What a row's gradients take, beside its factors, which are in bits.
struct LeanRow {
  float binary_ts, binary_tt;            // log2(e) / T
  float student_offset, teacher_offset;  // log2 of the sums, and the maxima times the above
  float power_factor;                    // of a power of q
  float student_max, teacher_max;
  float ratio;  // log2 of the teacher's sum over the student's
};

// jsd at even weights, by d = log2(p / q) alone: log2(p / m) = c + d / 2 and log2(q / m) = c - d / 2, where
// c = -log2(cosh(d / 2 * ln 2)) = -|d| / 2 - log2((1 + r) / 2), r = 2^-|d|. An error that all p share, or all q, that
// of the offsets, is in d too: such p and q are those of a distribution times nearly 1, which moves the loss by no more
// than that, times itself.

// -log2((1 + r) / 2) to float's precision: of v = 1 - r, from 0 to 1.
TGT_DEVICE float log2_of_half(float r) {
  const float v = 1 - r;
  return v * polynomial(v, 0.721347511f, 0.180334330f, 0.0601781718f, 0.0218956023f, 0.0121477786f, -0.00457399711f,
                        0.0141599597f, -0.00954804197f, 0.00405864092f);
}

// Adds up jsd's sums in nats.
template <class Row>
TGT_DEVICE Others<float> lean_halves(const Row& source, int begin, int end, int step, const LeanRow& row) {
  Others<float> sums;
  for (int k = begin; k < end; k += step) {
    Eight<float> s, t;
    source.load(k, s, t);
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const float a = fused(t.v[i], row.binary_tt, -row.teacher_offset);
      const float b = fused(s.v[i], row.binary_ts, -row.student_offset);
      const float ratio = a - b, apart = absolute_of(ratio);
      const float centre = fused(apart, -0.5f, log2_of_half(exp2_fast(-apart)));
      sums.student = fused(exp2_fast(a), fused(ratio, 0.5f, centre), sums.student);
      sums.teacher = fused(exp2_fast(b), fused(ratio, -0.5f, centre), sums.teacher);
    }
  }
  return {sums.student * float(kBit), sums.teacher * float(kBit)};
}

// A class of an ordinary row. Of jsd: a and b are log2(p / m) and log2(q / m).
template <class D>
TGT_DEVICE Class<float> lean_class(float s, float t, const LeanRow& row) {
  Class<float> c;
  c.a = fused(t, row.binary_tt, -row.teacher_offset);
  c.b = fused(s, row.binary_ts, -row.student_offset);
  c.p = exp2_fast(c.a);
  c.q = exp2_fast(c.b);
  if constexpr (D::kMixture) {
    const float ratio = smaller_of(c.a - c.b, 126.0f);  // beyond it q is flushed to 0
    c.b = -log2_fast(fused(exp2_fast(ratio), 0.5f, 0.5f));
    c.a = ratio + c.b;
  }
  return c;
}

template <class D, int kPower>
TGT_DEVICE float lean_student(const Class<float>& c, const LeanRow& row, const Constants<float>& constants,
                              const Factors<float>& f) {
  if constexpr (D::kMixture) {  // both terms are q times something
    const float half = f.student * 0.5f, same = kPower == 1 ? f.same : 0.0f;
    const float of_q = fused(c.b, half, fused(-f.y, half, same));
    if constexpr (kPower == 2) return c.q * fused(c.q, row.power_factor, of_q);
    if constexpr (kPower == 3) return c.q * fused(c.q * c.q, row.power_factor, of_q);
    if constexpr (kPower == 4) return c.q * fused(c.q * c.q, c.q * row.power_factor, of_q);
    return c.q * of_q;
  }
  const float soft = d_student<D>(c, constants, f) * f.student;
  if constexpr (kPower == 0) return soft;
  if constexpr (kPower == 1) return fused(c.q, f.same, soft);
  if constexpr (kPower > 1) return add_power<kPower>(soft, c.q, row.power_factor);
}

template <class D>
TGT_DEVICE float lean_teacher(const Class<float>& c, const Constants<float>& constants, const Factors<float>& f) {
  if constexpr (D::kMixture) return c.p * fused(c.a, f.teacher * 0.5f, -f.x * (f.teacher * 0.5f));
  return d_teacher<D>(c, constants, f) * f.teacher;
}

// Whose rows with a peak the loop below takes, where only the student's gradient is wanted. Others would take more
// registers than there are.
template <class D>
constexpr bool kLeanPeaks = !kTwoSided<D> && !D::kMixture;

// The gradients of a source's vectors, whole and aligned, without the label's part. kPeaked: of the student.
template <class D, int kPower, bool kTeacher, bool kPeaked, class Source>
TGT_DEVICE void lean_gradients(const Source& source, char* d_student, char* d_teacher, int begin, int end, int step,
                               const LeanRow& row, const Constants<float>& constants, const Factors<float>& f,
                               Peak<float, int>& peak, float& others) {
  for (int k = begin; k < end; k += step) {
    Eight<float> s, t, of_student, of_teacher;
    source.load(k, s, t);
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const Class<float> c = lean_class<D>(s.v[i], t.v[i], row);
      of_student.v[i] = lean_student<D, kPower>(c, row, constants, f);
      if constexpr (kTeacher) of_teacher.v[i] = lean_teacher<D>(c, constants, f);
    }
    if constexpr (kPeaked) peak.add(s, of_student, row.student_max, k * kVector, others);
    store_eight(d_student + k * 2 * kVector, DType::kBFloat16, of_student);
    if constexpr (kTeacher) store_eight(d_teacher + k * 2 * kVector, DType::kBFloat16, of_teacher);
  }
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
