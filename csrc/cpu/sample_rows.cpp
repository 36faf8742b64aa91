// Tokens drawn from rows of logits, compiled once per instruction set.
//
// Which tokens are kept is found without sorting: the largest k by one pass that keeps a short list, the largest that
// hold a mass by halving a list. Both end in one border, a value and the last id that is kept among equals of it; the
// draw then reads the row in the order of the ids, and looks at what lies on this side of the border only. Weights and
// their sums are double for every type, so that every backend draws the same token.
#include "blocks.h"
#include "isa.h"
#include "noise.h"
#include "scratch.h"

namespace tgt {
inline namespace TGT_ISA {
namespace {

// Tokens in the order of preference: by value, and by id among equals.
template <class Real>
struct Entry {
  double weight;
  Real value;
  int32_t id;
};
template <class Real>
bool before(const Entry<Real>& a, const Entry<Real>& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

template <class Real>
void swap_entries(Entry<Real>& a, Entry<Real>& b) {
  const Entry<Real> c = a;
  a = b;
  b = c;
}

// Brings the `count` first of [0, size) to the front, in any order: quickselect, by the median of three. No two entries
// are equal.
template <class Real>
void select_first(Entry<Real>* entries, int64_t size, int64_t count) {
  int64_t begin = 0, end = size;
  while (end - begin > 1 && count > begin && count < end) {
    Entry<Real>&low = entries[begin], &middle = entries[begin + (end - begin) / 2], &high = entries[end - 1];
    if (before(middle, low)) swap_entries(middle, low);
    if (before(high, low)) swap_entries(high, low);
    if (before(high, middle)) swap_entries(high, middle);
    const Entry<Real> pivot = middle;
    int64_t i = begin, j = end - 1;
    while (i <= j) {
      while (before(entries[i], pivot)) ++i;
      while (before(pivot, entries[j])) --j;
      if (i > j) break;
      swap_entries(entries[i++], entries[j--]);
    }
    // [begin, j] are not behind the pivot, [i, end) not before it, and what lies between is the pivot.
    if (count <= j + 1) {
      end = j + 1;
    } else if (count >= i) {
      begin = i;
    } else {
      return;
    }
  }
}

// A row's kept tokens: those above a value, and those equal to it up to an id.
template <class Real>
struct Border {
  Real value = -HUGE_VAL;
  int64_t last = INT64_MAX;
};

// That of the first `kept` entries, which stand in front.
template <class Real>
Border<Real> border_of(const Entry<Real>* entries, int64_t kept) {
  Border<Real> border{entries[0].value, entries[0].id};
  for (int64_t i = 1; i < kept; ++i) {
    const Entry<Real>& e = entries[i];
    if (before(Entry<Real>{0, border.value, int32_t(border.last)}, e)) border = {e.value, e.id};
  }
  return border;
}

template <class Real>
class Row {
 public:
  Row(const SampleCall& call) : call_(call), room_(room_of(call)), entries_(room_), sums_(call.classes / kBlock + 1) {}

  int64_t draw(const Real* values, double uniform) {
    values_ = values;
    border_ = {};
    size_ = 0;
    if (!(call_.top_k > 0 ? find_top_k() : find_largest())) return -1;
    if (call_.top_p < 1) cut_to_mass();
    return draw_kept(uniform);
  }

 private:
  using V = typename Lanes<Real>::Vector;
  static constexpr int kLanes = Lanes<Real>::kCount;

  // The list of the k largest takes twice their number, so that it is cut once in k additions.
  static int64_t room_of(const SampleCall& call) {
    if (call.top_k > 0) return call.top_k < call.classes / 2 ? 2 * call.top_k : call.classes;
    return call.top_p < 1 ? call.classes : 0;
  }

  // Each vector of the row: body(vector, at, lanes in it). Behind its end stands -inf.
  template <class Body>
  void each_vector(Body body) const {
    int64_t at = 0;
    for (; at + kLanes <= call_.classes; at += kLanes) body(load(values_ + at), at);
    if (at < call_.classes) body(load_part(values_ + at, int(call_.classes - at), Real(-HUGE_VAL)), at);
  }

  bool find_largest() {
    V most = splat<V>(Real(-HUGE_VAL));
    auto odd = most != most;  // +inf or NaN
    each_vector([&](V v, int64_t) {
      most = larger(v, most);
      odd |= ~(v < Real(HUGE_VAL));
    });
    largest_ = largest_lane(most);
    if (call_.top_p < 1) {
      for (int64_t i = 0; i < call_.classes; ++i) entries_.data()[i] = {0, values_[i], int32_t(i)};
      size_ = call_.classes;
    }
    return !lane_bits(odd) && largest_ > Real(-HUGE_VAL);
  }

  // Ends with the k largest in the list, or with all but -inf where those are fewer.
  bool find_top_k() {
    Entry<Real>* list = entries_.data();
    Real border = -HUGE_VAL;  // k of those seen are no smaller
    const V none = V{};
    auto odd = none != none;
    each_vector([&](V v, int64_t at) {
      odd |= ~(v < Real(HUGE_VAL));
      for (unsigned bits = lane_bits(v > border); bits; bits &= bits - 1) {
        const int64_t i = at + __builtin_ctz(bits);
        if (!(values_[i] > border)) continue;  // it has risen since
        list[size_++] = {0, values_[i], int32_t(i)};
        if (size_ == room_ && room_ > call_.top_k) border = keep_top_k();
      }
    });
    if (lane_bits(odd) || size_ == 0) return false;
    if (size_ > call_.top_k) keep_top_k();
    border_ = border_of(list, size_);
    largest_ = list[0].value;
    for (int64_t i = 1; i < size_; ++i) largest_ = list[i].value > largest_ ? list[i].value : largest_;
    return true;
  }

  Real keep_top_k() {
    select_first(entries_.data(), size_, call_.top_k);
    size_ = call_.top_k;
    return border_of(entries_.data(), size_).value;
  }

  double scaled(double value) const { return (value - largest_) / call_.temperature; }

  // The shortest beginning of the list, in the order of preference, that holds top_p of its mass.
  void cut_to_mass() {
    Entry<Real>* list = entries_.data();
    double total = 0;
    for (int64_t i = 0; i < size_; ++i) {
      list[i].weight = exp_nonpositive(scaled(list[i].value));
      total += list[i].weight;
    }
    const double wanted = call_.top_p * total;
    double mass = 0;  // of [0, begin): less than what is wanted
    int64_t begin = 0, end = size_;
    while (end - begin > 1) {
      const int64_t half = (end - begin) / 2;
      select_first(list + begin, end - begin, half);
      double front = 0;
      for (int64_t i = begin; i < begin + half; ++i) front += list[i].weight;
      if (mass + front >= wanted) {
        end = begin + half;
      } else {
        mass += front;
        begin += half;
      }
    }
    size_ = begin + 1;
    border_ = border_of(list, size_);
  }

  // The weights of tokens [at, at + count), 0 of those that are not kept; their sum.
  double weights(int64_t at, int count, double* to) const {
    constexpr int kLanes = Lanes<double>::kCount;
    const VDouble largest = splat<VDouble>(largest_), temperature = splat<VDouble>(call_.temperature);
    const VDouble border = splat<VDouble>(border_.value);
    VDouble sum{};
    for (int j = 0; j < count; j += kLanes) {
      const int here = count - j < kLanes ? count - j : kLanes;
      double values[kLanes];
      for (int i = 0; i < kLanes; ++i) values[i] = i < here ? double(values_[at + j + i]) : -HUGE_VAL;
      const VDouble x = load(values);
      const auto kept = x > border;
      const unsigned equal = lane_bits(x == border);
      if (!lane_bits(kept) && !equal) {
        store(to + j, VDouble{});
        continue;
      }
      const VDouble below = (x - largest) / temperature;
      const VDouble weight = below >= call_.log_min_p ? exp_nonpositive(below) : VDouble{};
      VDouble counted = kept ? weight : VDouble{};
      for (unsigned bits = equal; bits; bits &= bits - 1) {
        const int i = __builtin_ctz(bits);
        if (at + j + i <= border_.last) counted[i] = weight[i];
      }
      store(to + j, counted);
      sum += counted;
    }
    return sum_lanes(sum);
  }

  // The first token, in the order of the ids, whose cumulated weight exceeds `uniform` of the whole.
  int64_t draw_kept(double uniform) {
    alignas(64) double buffer[kBlock + Lanes<double>::kCount];
    double total = 0;
    const int64_t blocks = (call_.classes + kBlock - 1) / kBlock;
    const auto count_of = [&](int64_t b) {
      return int(call_.classes - b * kBlock < kBlock ? call_.classes - b * kBlock : kBlock);
    };
    for (int64_t b = 0; b < blocks; ++b) total += sums_.data()[b] = weights(b * kBlock, count_of(b), buffer);
    const double target = uniform * total;
    double mass = 0;
    int64_t token = -1;
    for (int64_t b = 0; b < blocks; ++b) {
      const double sum = sums_.data()[b];
      if (sum == 0 || (mass + sum <= target && b + 1 < blocks)) {
        mass += sum;
        continue;
      }
      weights(b * kBlock, count_of(b), buffer);
      for (int j = 0; j < count_of(b); ++j) {
        if (buffer[j] == 0) continue;
        token = b * kBlock + j;  // the last of all, should rounding leave the target unreached
        mass += buffer[j];
        if (mass > target) return token;
      }
    }
    return token;
  }

  const SampleCall& call_;
  const int64_t room_;
  Scratch<Entry<Real>> entries_;
  Scratch<double> sums_;
  const Real* values_ = nullptr;
  Border<Real> border_;
  Real largest_ = 0;
  int64_t size_ = 0;
};

template <class Real>
void sample(const SampleCall& call, int64_t begin, int64_t end) {
  Row<Real> row(call);
  const bool direct = call.logits.type == kTypeOf<Real>;
  Scratch<Real> scratch(direct ? 0 : call.classes);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t position = i % call.positions;
    const Block<uint32_t> w = philox_words(key_of(call.noise, i / call.positions), static_cast<uint32_t>(position / 4));
    const uint32_t four[4] = {w.x0, w.x1, w.x2, w.x3};
    const Real* values = reinterpret_cast<const Real*>(call.logits.row(i));
    if (!direct) {
      for (int64_t at = 0; at < call.classes; at += kBlock) {
        const int count = int(call.classes - at < kBlock ? call.classes - at : kBlock);
        read_block(call.logits.row(i), call.logits.type, at, count, scratch.data() + at);
      }
      values = scratch.data();
    }
    call.tokens[i] = row.draw(values, exact_uniform(four[position % 4]));
  }
}

}  // namespace

void sample_rows(const SampleCall& call, int64_t begin, int64_t end) {
  call.logits.type == DType::kFloat64 ? sample<double>(call, begin, end) : sample<float>(call, begin, end);
}

}  // namespace TGT_ISA
}  // namespace tgt
