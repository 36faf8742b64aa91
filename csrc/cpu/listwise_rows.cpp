// The rows of the listwise loss, compiled once per instruction set: rank, suffix sums, loss and gradient of a row.
//
// With classes in their order, weights a, logits x and M_k = logsumexp_{l >= k} x_l, a row's loss is sum_k a_k (M_k -
// x_k), and its gradient in x_j is sum_{k <= j} a_k exp(x_j - M_k) - a_j. All is in double: there the suffix sums of
// exp(x - max x) hold logits that are up to 600 apart, and a sum that grows from the small end on loses nothing. Rows
// that spread wider go through logarithms, one class at a time.
#include <cmath>
#include <type_traits>

#include "isa.h"
#include "scratch.h"
#include "simd.h"

namespace tgt {
inline namespace TGT_ISA {
namespace {

constexpr double kWidest = -600;
constexpr int kDigit = 11;  // bits that a pass of the sort looks at
constexpr int kBuckets = 1 << kDigit;
constexpr int64_t kFew = 48;  // classes that are sorted by insertion

// Bits that order as the numbers do, the largest first. Zeros of both signs are equal.
inline uint32_t rank_bits(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
inline uint64_t rank_bits(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x + 0.0);
  return bits >> 63 ? bits : ~(bits | (uint64_t(1) << 63));
}

template <class Real>
class ListwiseRows {
 public:
  explicit ListwiseRows(const ListwiseCall& call)
      : call_(call),
        teacher_(call.classes),
        student_(call.classes),
        x_(padded(call.classes)),
        a_(padded(call.classes)),
        u_(padded(call.classes)),
        sum_(padded(call.classes)),
        keys_{Scratch<Key>(call.classes), Scratch<Key>(call.classes)},
        order_{Scratch<int32_t>(call.classes), Scratch<int32_t>(call.classes)},
        counts_(kPasses * kBuckets) {}

  void row(int64_t i) {
    const double factor = call_.factor[i];
    double loss = 0;
    fill_gradient(i, 0);
    if (factor != 0) {
      read(call_.student, i, call_.classes, student_.data());
      if (!distribution(student_) || !rank(i)) {
        loss = NAN;
        fill_gradient(i, NAN);
      } else if (count_ > 0) {
        loss = factor * measure(factor);
        if (call_.d_student && loss < HUGE_VAL) write_gradient(i);
      }
    }
    if (call_.loss) call_.loss[i] = loss;
  }

 private:
  using V = VDouble;
  using Key = decltype(rank_bits(Real()));
  static constexpr int kLanes = Lanes<double>::kCount;
  static constexpr int kPasses = (sizeof(Key) * 8 + kDigit - 1) / kDigit;

  static int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

  template <class To>
  static void read(const Matrix& from, int64_t i, int64_t count, To* to) {
    const auto convert = [&](const auto* row) {
      for (int64_t j = 0; j < count; ++j) to[j] = static_cast<To>(cast<To>(row[j]));
    };
    const char* row = from.row(i);
    switch (from.type) {
      case DType::kFloat32:
        return convert(reinterpret_cast<const float*>(row));
      case DType::kFloat64:
        return convert(reinterpret_cast<const double*>(row));
      case DType::kBFloat16:
        return convert(reinterpret_cast<const BFloat16*>(row));
      case DType::kFloat16:
        return convert(reinterpret_cast<const Float16*>(row));
    }
  }

  // Neither NaN nor +inf, and something that is not -inf.
  template <class Values>
  static bool distribution(Values& values) {
    bool fine = true, some = false;
    for (const auto x : values) {
      fine &= x < HUGE_VAL;
      some |= x > -HUGE_VAL;
    }
    return fine && some;
  }

  // The classes in their order, and x and a along it; false where the teacher's row is no distribution.
  bool rank(int64_t i) {
    const int64_t classes = call_.classes;
    if (call_.ids) {
      Real log_probs[256];
      teacher_.fill(Real(-HUGE_VAL));
      const int64_t* ids = call_.ids + i * call_.id_stride;
      for (int64_t at = 0; at < call_.entries; at += 256) {
        const int64_t count = call_.entries - at < 256 ? call_.entries - at : 256;
        Matrix part = call_.teacher;
        part.data = part.row(i) + at * element_size(part.type);
        read(part, 0, count, log_probs);
        for (int64_t e = 0; e < count; ++e) {
          if (log_probs[e] == Real(-HUGE_VAL)) continue;
          if (ids[at + e] >= 0 && ids[at + e] < classes) teacher_[ids[at + e]] = log_probs[e];
        }
      }
    } else {
      read(call_.teacher, i, classes, teacher_.data());
    }
    if (!distribution(teacher_)) return false;
    int64_t ranked = 0;
    for (int64_t c = 0; c < classes; ++c) {
      keys_[0][ranked] = rank_bits(teacher_[c]);
      order_[0][ranked] = static_cast<int32_t>(c);
      ranked += teacher_[c] > Real(-HUGE_VAL);
    }
    int32_t* order = sort(ranked);
    count_ = ranked;
    if (call_.ids) {
      for (int64_t c = 0; c < classes; ++c) {
        if (!(teacher_[c] > Real(-HUGE_VAL))) order[count_++] = static_cast<int32_t>(c);
      }
    }
    const double largest = teacher_[order[0]], inverse = 1 / call_.temperature;
    double total = 0;
    for (int64_t j = 0; j < count_; ++j) a_[j] = teacher_[order[j]];
    for (int64_t j = count_; j < padded(count_); ++j) a_[j] = -HUGE_VAL;
    const V none = splat<V>(-HUGE_VAL);
    for (int64_t j = 0; j < count_; j += kLanes) {
      const V t = load(a_.data() + j);
      const V given = call_.ids ? larger(splat<V>(-1e300), t) : (t - largest) * inverse;
      const V e = t == none ? V{} : exp_nonpositive(given);
      store(a_.data() + j, e);
    }
    if (!call_.ids) {
      for (int64_t j = 0; j < count_; ++j) total += a_[j];
      for (int64_t j = 0; j < count_; ++j) a_[j] /= total;
    }
    bring_forward(i, order, ranked);
    for (int64_t j = 0; j < count_; ++j) x_[j] = student_[order[j]];
    ranks_ = order;
    return true;
  }

  // The label's class goes first.
  void bring_forward(int64_t i, int32_t* order, int64_t ranked) {
    const int64_t label = call_.label ? call_.label[i] : -1;
    if (label < 0) return;
    int64_t at = 0;
    while (at < count_ && order[at] != label) ++at;
    if (at == count_) return;  // which the teacher masks
    const double weight = at >= ranked ? call_.others[i] : a_[at];
    for (int64_t j = at; j > 0; --j) {
      order[j] = order[j - 1];
      a_[j] = a_[j - 1];
    }
    order[0] = static_cast<int32_t>(label);
    a_[0] = weight;
  }

  // Stable, by passes over digits from the lowest on, those skipped in which all are equal.
  int32_t* sort(int64_t count) {
    Key* keys[2] = {keys_[0].data(), keys_[1].data()};
    int32_t* order[2] = {order_[0].data(), order_[1].data()};
    if (count <= kFew) {
      for (int64_t j = 1; j < count; ++j) {
        const Key key = keys[0][j];
        const int32_t id = order[0][j];
        int64_t at = j;
        for (; at > 0 && keys[0][at - 1] > key; --at) {
          keys[0][at] = keys[0][at - 1];
          order[0][at] = order[0][at - 1];
        }
        keys[0][at] = key;
        order[0][at] = id;
      }
      return order[0];
    }
    counts_.fill(0);
    for (int64_t j = 0; j < count; ++j) {
      for (int pass = 0; pass < kPasses; ++pass) ++counts_[pass * kBuckets + digit(keys[0][j], pass)];
    }
    int from = 0;
    for (int pass = 0; pass < kPasses; ++pass) {
      int32_t* places = counts_.data() + pass * kBuckets;
      if (places[digit(keys[from][0], pass)] == count) continue;
      int32_t begin = 0;
      for (int bucket = 0; bucket < kBuckets; ++bucket) {
        const int32_t next = begin + places[bucket];
        places[bucket] = begin;
        begin = next;
      }
      for (int64_t j = 0; j < count; ++j) {
        const int32_t to = places[digit(keys[from][j], pass)]++;
        keys[1 - from][to] = keys[from][j];
        order[1 - from][to] = order[from][j];
      }
      from = 1 - from;
    }
    return order[from];
  }
  static int digit(Key key, int pass) { return static_cast<int>((key >> (pass * kDigit)) & (kBuckets - 1)); }

  // The loss; u becomes the gradient along the order, times factor.
  double measure(double factor) {
    double largest = -HUGE_VAL, least = HUGE_VAL;
    for (int64_t j = 0; j < count_; ++j) {
      largest = x_[j] > largest ? x_[j] : largest;
      least = x_[j] < least ? x_[j] : least;
      if (a_[j] > 0 && x_[j] == -HUGE_VAL) return HUGE_VAL;
    }
    if (!(largest > -HUGE_VAL)) return 0;  // no class that counts has any weight
    return least - largest < kWidest ? measure_wide(factor) : measure_sums(largest, factor);
  }

  double measure_sums(double largest, double factor) {
    const int64_t end = padded(count_);
    for (int64_t j = count_; j < end; ++j) x_[j] = largest, a_[j] = 0;
    for (int64_t j = 0; j < end; j += kLanes) {
      store(u_.data() + j, exp_nonpositive(load(x_.data() + j) - largest));
    }
    double sum = 0;
    for (int64_t j = end - 1; j >= count_; --j) sum_[j] = 1;
    for (int64_t j = count_ - 1; j >= 0; --j) sum_[j] = sum += u_[j];
    V loss{};
    for (int64_t j = 0; j < end; j += kLanes) {
      const V s = load(sum_.data() + j), a = load(a_.data() + j);
      loss += a * (log_positive(s) + (largest - load(x_.data() + j)));
      store(sum_.data() + j, a / s);
    }
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += loss[lane];
    double before = 0;
    for (int64_t j = 0; j < count_; ++j) u_[j] = factor * (u_[j] * (before += sum_[j]) - a_[j]);
    return total > 0 ? total : 0;
  }

  double measure_wide(double factor) {
    double m = -HUGE_VAL, total = 0;
    for (int64_t j = count_ - 1; j >= 0; --j) {
      const double high = m > x_[j] ? m : x_[j], low = m > x_[j] ? x_[j] : m;
      m = high > -HUGE_VAL ? high + std::log1p(std::exp(low - high)) : high;
      sum_[j] = m;
      if (a_[j] > 0) total += a_[j] * (m - x_[j]);
    }
    double before = 0;  // sum_{k <= j} a_k exp(M_j - M_k)
    for (int64_t j = 0; j < count_; ++j) {
      const bool nothing = !(sum_[j] > -HUGE_VAL);
      before = (j && !nothing ? before * std::exp(sum_[j] - sum_[j - 1]) : 0) + a_[j];
      u_[j] = factor * ((nothing ? 0 : std::exp(x_[j] - sum_[j])) * before - a_[j]);
    }
    return total > 0 ? total : 0;
  }

  template <class Body>
  void each_type(int64_t i, Body body) {
    char* row = call_.d_student.row(i);
    switch (call_.d_student.type) {
      case DType::kFloat32:
        return body(reinterpret_cast<float*>(row));
      case DType::kFloat64:
        return body(reinterpret_cast<double*>(row));
      case DType::kBFloat16:
        return body(reinterpret_cast<BFloat16*>(row));
      case DType::kFloat16:
        return body(reinterpret_cast<Float16*>(row));
    }
  }
  template <class Stored>
  static Stored rounded(double x) {
    return cast<Stored>(x);
  }
  void fill_gradient(int64_t i, double value) {
    if (!call_.d_student) return;
    each_type(i, [&](auto* row) {
      using Stored = std::decay_t<decltype(*row)>;
      for (int64_t c = 0; c < call_.classes; ++c) row[c] = rounded<Stored>(value);
    });
  }
  void write_gradient(int64_t i) {
    each_type(i, [&](auto* row) {
      using Stored = std::decay_t<decltype(*row)>;
      for (int64_t j = 0; j < count_; ++j) row[ranks_[j]] = rounded<Stored>(u_[j]);
    });
  }

  const ListwiseCall& call_;
  Scratch<Real> teacher_;
  Scratch<double> student_, x_, a_, u_, sum_;
  Scratch<Key> keys_[2];
  Scratch<int32_t> order_[2];
  Scratch<int32_t> counts_;
  const int32_t* ranks_ = nullptr;
  int64_t count_ = 0;
};

template <class Real>
void run(const ListwiseCall& call, int64_t begin, int64_t end) {
  ListwiseRows<Real> rows(call);
  for (int64_t i = begin; i < end; ++i) rows.row(i);
}

}  // namespace

void listwise_rows(const ListwiseCall& call, int64_t begin, int64_t end) {
  call.teacher.type == DType::kFloat64 ? run<double>(call, begin, end) : run<float>(call, begin, end);
}

}  // namespace TGT_ISA
}  // namespace tgt
