// A row of logits that a block draws a token from: its values, their order, and the border of the kept ones.
//
// Nothing is sorted: the border is found by building its key from the highest bits down, eight bits a pass, from a
// histogram in shared memory. What is added up there are integers, numbers of tokens or weights in fixed point, so that
// no sum depends on which thread comes first and every backend draws the same token.
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

// Sums by eight bits of a key, in shared memory: integers of 64 bits, in halves. Neighbouring lanes add to copies of
// their own, for most logits share their highest bits.
constexpr int kDigits = 256, kCopies = 4;

// Where in a histogram, from its highest digit down, a sum is reached.
struct Reached {
  uint64_t missing, here;  // of the sum behind the digits above, and what lies at the digit
  int64_t digit;
};
static_assert(sizeof(Reached) <= 32, "has room in a histogram");

struct Histogram {
  uint32_t* low;  // kDigits * kCopies, and as many high halves behind them
  Reached* reached;

  static constexpr int kBytes = 2 * kDigits * kCopies * 4 + 32 + kWarp * 8;  // a multiple of 16
  TGT_DEVICE explicit Histogram(unsigned char* memory)
      : low(reinterpret_cast<uint32_t*>(memory)),
        reached(reinterpret_cast<Reached*>(memory + 2 * kDigits * kCopies * 4)) {}

  TGT_DEVICE void clear(const BlockTeam& team) const {
    block_barrier();
    for (int i = team.thread; i < 2 * kDigits * kCopies; i += team.size) low[i] = 0;
    block_barrier();
  }
  TGT_DEVICE void add(int digit, int copy, uint64_t amount) const {
    uint32_t* at = low + digit * kCopies + copy;
    const uint32_t lower = static_cast<uint32_t>(amount);
    const bool carry = fetch_and_add(at, lower) + lower < lower;
    const uint32_t upper = static_cast<uint32_t>(amount >> 32) + (carry ? 1 : 0);
    if (upper != 0) fetch_and_add(at + kDigits * kCopies, upper);
  }
  TGT_DEVICE uint64_t at(int digit) const {
    uint64_t sum = 0;
    TGT_UNROLL
    for (int copy = 0; copy < kCopies; ++copy) {
      const uint32_t* from = low + digit * kCopies + copy;
      sum += static_cast<uint64_t>(from[kDigits * kCopies]) << 32 | from[0];
    }
    return sum;
  }

  // The highest digit down to which all digits hold what is wanted(sum of all), between 1 and that sum.
  template <class Wanted>
  TGT_DEVICE Reached find(const BlockTeam& team, Wanted wanted) const {
    block_barrier();
    if (team.thread < kWarp) {
      constexpr int kOwn = kDigits / kWarp;
      uint64_t* of_lanes = reinterpret_cast<uint64_t*>(reinterpret_cast<unsigned char*>(reached) + 32);
      uint64_t mine = 0;
      // Unrolled, loops over sums of 64 bits would take more registers than a thread of so large a block has.
      TGT_NO_UNROLL
      for (int i = 0; i < kOwn; ++i) mine += at(team.thread * kOwn + i);
      of_lanes[team.thread] = mine;
      warp_barrier();
      uint64_t above = 0, total = 0;
      TGT_UNROLL4
      for (int lane = 0; lane < kWarp; ++lane) {
        above += lane > team.thread ? of_lanes[lane] : 0;
        total += of_lanes[lane];
      }
      const uint64_t goal = wanted(total);
      if (above < goal && above + mine >= goal) {
        int digit = team.thread * kOwn + kOwn - 1;
        uint64_t here = at(digit);
        while (above + here < goal) {
          above += here;
          here = at(--digit);
        }
        *reached = {goal - above, here, digit};
      }
    }
    block_barrier();
    return *reached;
  }
};

// A token that is left.
template <class Real>
struct Survivor {
  Real value;
  int32_t id;
};
constexpr int kSurvivors = 1024;

template <class Real>
struct TokenRow {
  using Order = decltype(order_of(Real(0)));

  const char* data;
  DType type;
  int64_t size;
  bool aligned;
  Real largest;
  double temperature, inverse;  // its inverse too
  double log_min_p;
  double unit;  // 1 in fixed point

  TGT_DEVICE Eight<Real> load(int64_t k) const {
    return load_padded(data, type, k * kVector, size, aligned, minus_infinity<Real>());
  }
  // The quotient by the temperature, rounded as a division rounds it, for every backend is to have the same weights: a
  // product with the inverse, of which one remainder leaves the last bit and the next one none. Of what is far below 0
  // the weight is 0 either way.
  TGT_DEVICE double scaled(Real x) const {
    const double below = static_cast<double>(x) - static_cast<double>(largest);
    if constexpr (sizeof(Real) == 8) return below / temperature;  // may be out of the inverse's range
    const double near = below * inverse;
    if (!(near > -1e4)) return near;
    const double nearer = fused(fused(-near, temperature, below), inverse, near);
    return fused(fused(-nearer, temperature, below), inverse, nearer);
  }

  // Keys of 16 bits where the values have no more.
  TGT_DEVICE int key_bits() const { return static_cast<int>(element_size(type)) * 8; }
  TGT_DEVICE Order key_of_value(Real x) const {
    if (type == DType::kBFloat16) return order_of(x) >> (sizeof(Order) * 8 - 16);
    if (type == DType::kFloat16) {
      const uint32_t bits = cast<Float16>(x + Real(0)).bits;
      return bits >> 15 ? ~bits & 0xffffu : bits | 0x8000u;
    }
    return order_of(x);
  }

  TGT_DEVICE Real value_of_key(Order key) const {
    constexpr int kBits = sizeof(Order) * 8;
    if (type == DType::kFloat16) {
      return cast<Real>(Float16{static_cast<uint16_t>(key >> 15 ? key & 0x7fffu : ~key)});
    }
    if (type == DType::kBFloat16) key = key << (kBits - 16) | (key >> 15 ? 0 : (Order{1} << (kBits - 16)) - 1);
    return bit_cast<Real>(key >> (kBits - 1) ? key & ~(Order{1} << (kBits - 1)) : ~key);
  }

  // A weight, at most 1, in fixed point: all of a row's add up to no more than 2^63.
  TGT_DEVICE uint64_t weight_in_units(Real x) const {
    return static_cast<uint64_t>(exp_nonpositive(scaled(x)) * unit + 0.5);
  }

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

  TGT_DEVICE double weight(Real x, int64_t id, const Border<Order>& kept) const {
    if (!kept.keeps(key_of_value(x), id)) return 0;
    const double below = scaled(x);
    return below >= log_min_p ? exp_nonpositive(below) : 0.0;
  }
};

// Tokens to select from: all of a row, or those that a filter left of it.
template <class Real>
struct Tokens {
  using Order = typename TokenRow<Real>::Order;
  const TokenRow<Real>& row;
  Border<Order> kept{0, INT64_MAX};
  const Survivor<Real>* list = nullptr;
  int listed = -1;  // tokens of the list, if there is one

  template <class Body>  // body(value, key, id)
  TGT_DEVICE void each(const BlockTeam& team, Body body) const {
    if (listed >= 0) {
      for (int j = team.thread; j < listed; j += team.size) {
        body(list[j].value, row.key_of_value(list[j].value), int64_t(list[j].id));
      }
      return;
    }
    row.each(team, [&](Real x, int64_t id) {
      const Order key = row.key_of_value(x);
      if (kept.keeps(key, id)) body(x, key, id);
    });
  }

  // What is kept of a row, made a list of by itself: in any order.
  TGT_DEVICE void compact(const BlockTeam& team, unsigned char* memory, uint32_t* counter) {
    Survivor<Real>* survivors = reinterpret_cast<Survivor<Real>*>(memory);
    if (team.thread == 0) *counter = 0;
    block_barrier();
    each(team,
         [&](Real x, Order, int64_t id) { survivors[fetch_and_add(counter, 1)] = {x, static_cast<int32_t>(id)}; });
    block_barrier();
    listed = static_cast<int>(*counter);
    list = survivors;
  }

  // The border of the shortest beginning, in the order of preference, whose amounts reach wanted(their sum). Equal
  // values have equal amounts.
  template <class Amount, class Wanted>
  TGT_DEVICE Border<Order> border(const BlockTeam& team, const Histogram& histogram, Amount amount,
                                  Wanted wanted) const {
    Order key = 0;
    Reached found{};
    const int highest = row.key_bits() - 8;
    TGT_NO_UNROLL
    for (int shift = highest; shift >= 0; shift -= 8) {
      histogram.clear(team);
      each(team, [&](Real x, Order here, int64_t) {
        if (shift != highest && (here ^ key) >> shift >> 8 != 0) return;
        const uint64_t units = amount(x);
        if (units != 0) histogram.add(static_cast<int>(here >> shift & 255), team.thread % kCopies, units);
      });
      found = histogram.find(team, [&](uint64_t all) { return shift == highest ? wanted(all) : found.missing; });
      key |= static_cast<Order>(found.digit) << shift;
    }
    const uint64_t each_has = amount(row.value_of_key(key));
    uint64_t missing = (found.missing + each_has - 1) / each_has;  // tokens, of those equal to the key
    int64_t last = 0;
    if (missing >= found.here / each_has) return {key, INT64_MAX};
    int bits = 8;
    while (int64_t{1} << bits < row.size) bits += 8;
    TGT_NO_UNROLL
    for (int shift = bits - 8; shift >= 0; shift -= 8) {
      histogram.clear(team);
      each(team, [&](Real, Order here, int64_t id) {
        if (here != key || (id ^ last) >> shift >> 8 != 0) return;
        histogram.add(255 - static_cast<int>(id >> shift & 255), team.thread % kCopies, 1);
      });
      const Reached lowest = histogram.find(team, [&](uint64_t) { return missing; });
      missing = lowest.missing;
      last |= (255 - lowest.digit) << shift;
    }
    return {key, last};
  }
};

}  // namespace TGT_ISA
}  // namespace tgt::cuda
