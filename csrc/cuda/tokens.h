// A row of logits that a block draws a token from: its values, their order, and the border of the kept ones.
//
// Nothing is sorted: the border is found by building its key from the highest bits down, two bits a pass over the row,
// which lies in shared memory where it fits and in the second-level cache otherwise. Weights and their sums are double
// for every type, and no sum depends on which thread comes first, so that every backend draws the same token.
#pragma once

#include "noise.h"
#include "team.h"
#include "vectors.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// Integers in the order of the numbers: -0 is 0, and -inf is not the least.
TGT_DEVICE uint32_t order_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
TGT_DEVICE uint64_t order_of(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x + 0.0);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

struct Three {
  double v[3] = {0, 0, 0};
};
struct AddThree {
  TGT_DEVICE Three operator()(const Three& a, const Three& b) const {
    return {{a.v[0] + b.v[0], a.v[1] + b.v[1], a.v[2] + b.v[2]}};
  }
};
struct Extent {
  double largest = -HUGE_VAL;
  double odd = 0;  // how many +inf and NaN
};
struct MergeExtents {
  TGT_DEVICE Extent operator()(const Extent& a, const Extent& b) const {
    return {larger(a.largest, b.largest), a.odd + b.odd};
  }
};

// Merged in all threads. The barrier: memory of the last reduction is read no more.
template <class T, class Merge>
TGT_DEVICE T merged(const BlockTeam& team, const T& value, Merge merge) {
  block_barrier();
  return merge_all(team, value, 0, merge);
}

// Kept are tokens above a key, and of those equal to it the ids up to `last`.
template <class Order>
struct Border {
  Order key;
  int64_t last;

  TGT_DEVICE bool keeps(Order order, int64_t id) const { return order > key || (order == key && id <= last); }
};

template <class Real>
struct TokenRow {
  using Order = decltype(order_of(Real(0)));
  static constexpr int kBits = sizeof(Order) * 8;

  const char* data;
  DType type;
  int64_t size;
  bool aligned;
  double largest;
  double temperature;
  double log_min_p;

  TGT_DEVICE Eight<Real> load(int64_t k) const {
    return load_padded(data, type, k * kVector, size, aligned, minus_infinity<Real>());
  }
  TGT_DEVICE double scaled(Real x) const { return (static_cast<double>(x) - largest) / temperature; }

  // body(value, id) of the thread's tokens.
  template <class Body>
  TGT_DEVICE void each(const BlockTeam& team, Body body) const {
    for (int64_t k = team.thread; k * kVector < size; k += team.size) {
      const Eight<Real> values = load(k);
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        if (k * kVector + j < size) body(values.v[j], k * kVector + j);
      }
    }
  }

  // The largest key that tokens of at least `wanted` in all are not below, by share(value, id): 1 to count them, a
  // weight to add their mass.
  template <class Share>
  TGT_DEVICE Order highest_key(const BlockTeam& team, double wanted, Share share) const {
    Order key = 0;
    TGT_NO_UNROLL
    for (int shift = kBits - 2; shift >= 0; shift -= 2) {
      Three above;
      each(team, [&](Real x, int64_t id) {
        const Order order = order_of(x);
        if (order < (key | Order{1} << shift)) return;
        const double amount = share(x, id);
        TGT_UNROLL
        for (int i = 0; i < 3; ++i) above.v[i] += order >= (key | Order(i + 1) << shift) ? amount : 0.0;
      });
      above = merged(team, above, AddThree());
      const int digit = above.v[2] >= wanted ? 3 : above.v[1] >= wanted ? 2 : above.v[0] >= wanted ? 1 : 0;
      key |= Order(digit) << shift;
    }
    return key;
  }

  // What lies above a key, and how many are equal to it.
  template <class Share>
  TGT_DEVICE Three round_key(const BlockTeam& team, Order key, Share share) const {
    Three found;
    each(team, [&](Real x, int64_t id) {
      const Order order = order_of(x);
      if (order < key) return;
      const double amount = share(x, id);
      found.v[0] += order > key ? amount : 0.0;
      found.v[1] += order == key && amount > 0 ? 1.0 : 0.0;
      found.v[2] += order == key ? amount : 0.0;
    });
    return merged(team, found, AddThree());
  }

  // The border that lets `count` of the tokens equal to a key pass, in the order of their ids.
  template <class Share>
  TGT_DEVICE Border<Order> border(const BlockTeam& team, Order key, double count, double equal, Share share) const {
    if (count >= equal) return {key, INT64_MAX};
    int64_t last = 0;  // the largest id with fewer than `count` of them before it
    TGT_NO_UNROLL
    for (int shift = 62; shift >= 0; shift -= 2) {
      if (int64_t{1} << shift >= size) continue;
      Three below;
      each(team, [&](Real x, int64_t id) {
        if (order_of(x) != key || !(share(x, id) > 0)) return;
        TGT_UNROLL
        for (int i = 0; i < 3; ++i) below.v[i] += id < (last | int64_t(i + 1) << shift) ? 1.0 : 0.0;
      });
      below = merged(team, below, AddThree());
      const int digit = below.v[2] < count ? 3 : below.v[1] < count ? 2 : below.v[0] < count ? 1 : 0;
      last |= int64_t(digit) << shift;
    }
    return {key, last};
  }

  TGT_DEVICE double weight(Real x, int64_t id, const Border<Order>& kept) const {
    if (!kept.keeps(order_of(x), id)) return 0;
    const double below = scaled(x);
    return below >= log_min_p ? exp_nonpositive(below) : 0.0;
  }
};

}  // namespace TGT_ISA
}  // namespace tgt::cuda
