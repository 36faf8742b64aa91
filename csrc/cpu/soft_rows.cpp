// The rows of a soft embedding, compiled once per instruction set: what stands before and between its matrix products.
//
// A row is handled in two passes over a buffer that stays in the second-level cache: logits plus noise and their
// maximum, then exponentials and what they are summed with. Noise is drawn a block at a time, beside the logits.
#include "blocks.h"
#include "isa.h"
#include "noise.h"
#include "scratch.h"

namespace tgt {
inline namespace TGT_ISA {
namespace {

template <class Real>
class SoftRows {
 public:
  explicit SoftRows(const SoftCall& call)
      : call_(call), scratch_(call.weights ? 0 : call.classes), inverse_(Real(1 / call.tau)) {}

  void forward(int64_t i) {
    Real* y = buffer(i);
    V most = splat<V>(Real(-HUGE_VAL));
    const V none = V{};
    auto odd = none != none;  // +inf or NaN
    each_noisy_block(i, [&](const Real* block, int64_t at, int count) {
      each_vector(count, [&](int j, int lanes) {
        const V v = get(block + j, lanes, Real(-HUGE_VAL));
        most = larger(v, most);
        odd |= ~(v < Real(HUGE_VAL));
        put(y + at + j, v, lanes);
      });
    });
    const Real largest = largest_lane(most);
    Real* state = static_cast<Real*>(call_.largest);
    if (lane_bits(odd) || !(largest > Real(-HUGE_VAL))) {
      fill(y, Real(NAN));
      state[i] = static_cast<Real*>(call_.sum)[i] = Real(NAN);
      if (call_.chosen) call_.chosen[i] = -1;
      return;
    }
    state[i] = largest;
    if (call_.chosen) call_.chosen[i] = first_place(y, largest);
    double sum = 0;
    each_block([&](int64_t at, int count) {
      V part{};
      each_vector(count, [&](int j, int lanes) {
        const V e = weight(get(y + at + j, lanes, Real(-HUGE_VAL)), largest);
        put(y + at + j, e, lanes);
        part += e;
      });
      sum += sum_lanes(part);
    });
    static_cast<Real*>(call_.sum)[i] = Real(sum);
  }

  void backward(int64_t i) {
    Real* p = buffer(i);
    char* d_row = call_.d_logits ? call_.d_logits.row(i) : nullptr;
    const Real largest = static_cast<const Real*>(call_.largest)[i];
    if (!(largest == largest)) {
      fill(p, Real(NAN));
      if (d_row) write_gradient(d_row, [&](int64_t, int, int lanes) { return (void)lanes, splat<V>(Real(NAN)); });
      return;
    }
    const Real inverse_sum = 1 / static_cast<const Real*>(call_.sum)[i];
    const Real* slope = static_cast<const Real*>(call_.slope) + (call_.slope ? i * call_.classes : 0);
    V most{};
    each_noisy_block(i, [&](const Real* block, int64_t at, int count) {
      each_vector(count, [&](int j, int lanes) {
        const V probability = weight(get(block + j, lanes, Real(-HUGE_VAL)), largest) * inverse_sum;
        put(p + at + j, probability, lanes);
        most = larger(probability, most);
      });
    });
    if (!d_row) return;
    // The gradient is p (slope - sum p slope). Where one class has nearly all of the probability, that is a small
    // difference of large numbers, and their rounding is as large; slopes less that class's own are small from the
    // start.
    const Real centre = slope[first_place(p, largest_lane(most))];
    double sum = 0;
    each_block([&](int64_t at, int count) {
      V part{};
      each_vector(count, [&](int j, int lanes) {
        part = fused(get(p + at + j, lanes, Real(0)), get(slope + at + j, lanes, Real(0)) - centre, part);
      });
      sum += sum_lanes(part);
    });
    const Real mean = Real(sum);
    write_gradient(d_row, [&](int64_t at, int j, int lanes) {
      const V probability = get(p + at + j, lanes, Real(0));
      return probability * ((get(slope + at + j, lanes, Real(0)) - centre) - mean) * inverse_;
    });
  }

 private:
  using V = typename Lanes<Real>::Vector;
  static constexpr int kLanes = Lanes<Real>::kCount;

  static V get(const Real* from, int lanes, Real fill) {
    return lanes == kLanes ? load(from) : load_part(from, lanes, fill);
  }
  static void put(Real* to, V value, int lanes) { lanes == kLanes ? store(to, value) : store_part(to, value, lanes); }

  template <class Body>  // body(offset, lanes that there are)
  static void each_vector(int count, Body body) {
    int j = 0;
    for (; j + kLanes <= count; j += kLanes) body(j, kLanes);
    if (j < count) body(j, count - j);
  }
  template <class Body>  // body(at, count)
  void each_block(Body body) const {
    for (int64_t at = 0; at < call_.classes; at += kBlock) {
      body(at, int(call_.classes - at < kBlock ? call_.classes - at : kBlock));
    }
  }

  Real* buffer(int64_t i) {
    return call_.weights ? static_cast<Real*>(call_.weights) + i * call_.classes : scratch_.data();
  }
  V weight(V y, Real largest) const { return exp_nonpositive((y - largest) * inverse_); }

  // Blocks of logits plus noise: body(block, at, count).
  template <class Body>
  void each_noisy_block(int64_t i, Body body) {
    const int64_t row = call_.first + i, position = row % call_.positions;
    const Key key = call_.gumbel ? key_of(call_.noise, row / call_.positions) : Key{};
    const uint32_t first = static_cast<uint32_t>(position * ((call_.classes + 3) / 4));
    each_block([&](int64_t at, int count) {
      const Real* x = read_block(call_.logits.row(i), call_.logits.type, at, count, values_);
      if (!call_.gumbel) return body(x, at, count);
      draw_gumbels(key, first + static_cast<uint32_t>(at / 4), count, noise_);
      for (int j = 0; j < count; ++j) noisy_[j] = x[j] + noise_[j];
      body(noisy_, at, count);
    });
  }

  int64_t first_place(const Real* y, Real largest) const {
    int64_t at = 0;
    for (; at + kLanes <= call_.classes; at += kLanes) {
      if (const unsigned bits = lane_bits(load(y + at) == largest)) return at + __builtin_ctz(bits);
    }
    while (y[at] != largest) ++at;  // it is there
    return at;
  }

  void fill(Real* to, Real value) const {
    for (int64_t j = 0; j < call_.classes; ++j) to[j] = value;
  }

  template <class Body>  // body(at, offset, lanes): a vector of the gradient
  void write_gradient(char* row, Body body) {
    const DType type = call_.d_logits.type;
    each_block([&](int64_t at, int count) {
      Real* to = write_block(row, type, at, noisy_);
      each_vector(count, [&](int j, int lanes) { put(to + j, body(at, j, lanes), lanes); });
      if (to == noisy_) finish_block(noisy_, row, type, at, count);
    });
  }

  const SoftCall& call_;
  Scratch<Real> scratch_;
  const Real inverse_;
  alignas(64) Real values_[kBlock], noisy_[kBlock];
  alignas(64) float noise_[kBlock];
};

template <class Real>
void soft(const SoftCall& call, int64_t begin, int64_t end, bool forward) {
  SoftRows<Real> rows(call);
  for (int64_t i = begin; i < end; ++i) forward ? rows.forward(i) : rows.backward(i);
}

}  // namespace

void soft_forward_rows(const SoftCall& call, int64_t begin, int64_t end) {
  call.is_fp64 ? soft<double>(call, begin, end, true) : soft<float>(call, begin, end, true);
}
void soft_backward_rows(const SoftCall& call, int64_t begin, int64_t end) {
  call.is_fp64 ? soft<double>(call, begin, end, false) : soft<float>(call, begin, end, false);
}

}  // namespace TGT_ISA
}  // namespace tgt
