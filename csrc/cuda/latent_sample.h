// One sample on a device: its noise, its step, and its distance from an anchor, eight coordinates at a time.
//
// The semantics are those of csrc/cpu/latent_rows.cpp. What a projection needs a second time waits on the chip, as far
// as there is room, and is computed again beyond that, noise included, with the same bits.
#pragma once

#include "noise.h"
#include "team.h"
#include "vectors.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// How normals are made of words: by the polynomials that every backend has; by the special function unit, for what is
// rounded to 16 bits next; or truncated.
enum Draw : int { kFineDraw, kCoarseDraw, kTruncatedDraw };

inline Draw draw_for(const NoiseKey& noise, DType type) {
  if (noise.truncation > 0) return kTruncatedDraw;
  return element_size(type) == 2 ? kCoarseDraw : kFineDraw;
}

// normal_pair to 1e-5, where 16 bits round a normal number by up to 2e-3: a quarter of its instructions.
TGT_DEVICE Pair<float> coarse_normal_pair(uint32_t u, uint32_t v) {
  const float x = uniform<float>(u);
  // The logarithm is good to 2^-22, and near 1 there is no more of it than that: there, by its series.
  const float y = 1.0f - x;
  const float near = y * fused(y, fused(y, 0.6666667f, 1.0f), 2.0f);
  const float square = y < 0x1p-6f ? near : log2_fast(x) * -1.38629436f;
  const float radius = Traits<float>::square_root(square);
  const float angle = Traits<float>::from_int(static_cast<int32_t>(v)) * 1.46291807926715968e-9f;  // 2 pi / 2^32
  return {radius * cosine_fast(angle), radius * sine_fast(angle)};
}

// Standard normals 8 k to 8 k + 7 of a sample: two blocks of the generator. `mass`: of the truncated normal.
template <int kDraw>
TGT_DEVICE Eight<float> draw_eight(const Key& key, int64_t k, double bound, double mass) {
  Eight<float> out;
  TGT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Block<uint32_t> counter{static_cast<uint32_t>(2 * k + half), key.id_low, key.id_high, key.op_step};
    const Block<uint32_t> w = philox4x32(counter, key.seed_low, key.seed_high);
    float* to = out.v + 4 * half;
    if constexpr (kDraw == kTruncatedDraw) {
      to[0] = truncated_normal(w.x0, bound, mass);
      to[1] = truncated_normal(w.x1, bound, mass);
      to[2] = truncated_normal(w.x2, bound, mass);
      to[3] = truncated_normal(w.x3, bound, mass);
    } else {
      constexpr bool kFine = kDraw == kFineDraw;
      const Pair<float> first = kFine ? normal_pair<float>(w.x0, w.x1) : coarse_normal_pair(w.x0, w.x1);
      const Pair<float> second = kFine ? normal_pair<float>(w.x2, w.x3) : coarse_normal_pair(w.x2, w.x3);
      to[0] = first.first;
      to[1] = first.second;
      to[2] = second.first;
      to[3] = second.second;
    }
  }
  return out;
}

TGT_DEVICE double truncated_mass(double bound) { return bound > 0 ? erf(bound * 0.7071067811865476) : 0; }

template <class Real>
TGT_DEVICE const char* sample_row(const void* base, DType type, int64_t i, int64_t size) {
  return static_cast<const char*>(base) + i * size * element_size(type);
}

// Eight units of the coordinates, or ones.
template <class Real>
TGT_DEVICE Eight<Real> units(const void* scale, int64_t k, int64_t size) {
  Eight<Real> out;
  const Real* values = static_cast<const Real*>(scale);
  TGT_UNROLL
  for (int j = 0; j < kVector; ++j) {
    const int64_t at = k * kVector + j;
    out.v[j] = values && at < size ? values[at] : Real(1);
  }
  return out;
}

// Adds squares in Real, and again in double where Real's range was left.
template <class Real>
TGT_DEVICE void add_squares(const Eight<Real>& values, double& total) {
  Real sum = 0;
  TGT_UNROLL
  for (int j = 0; j < kVector; ++j) sum = fused(values.v[j], values.v[j], sum);
  if (sum > Real(1e-20) && sum < Real(1e30)) {
    total += sum;
    return;
  }
  TGT_UNROLL
  for (int j = 0; j < kVector; ++j) total += static_cast<double>(values.v[j]) * values.v[j];
}

// u = grad * scale, added up as above; the product itself may leave Real's range.
template <class Real>
TGT_DEVICE void add_squared_products(const Eight<Real>& grad, const Eight<Real>& scale, double& total) {
  Real sum = 0;
  TGT_UNROLL
  for (int j = 0; j < kVector; ++j) {
    const Real u = grad.v[j] * scale.v[j];
    sum = fused(u, u, sum);
  }
  if (sum > Real(1e-20) && sum < Real(1e30)) {
    total += sum;
    return;
  }
  TGT_UNROLL
  for (int j = 0; j < kVector; ++j) {
    const double u = static_cast<double>(grad.v[j]) * scale.v[j];
    total += u * u;
  }
}

// What the threads of a sample reduce.
struct Reach {
  double squares = 0;
  double other = 0;  // a second sum of squares, or the furthest coordinate
};
struct AddReach {
  TGT_DEVICE Reach operator()(const Reach& a, const Reach& b) const {
    return {a.squares + b.squares, a.other + b.other};
  }
};
struct FurthestReach {
  TGT_DEVICE Reach operator()(const Reach& a, const Reach& b) const {
    return {a.squares + b.squares, larger(a.other, b.other)};
  }
};

// The vectors of a sample that belong to a thread: first, first + step, ..., last, of which those before `kept` have a
// place in shared memory.
struct Share {
  int64_t begin;  // of the block's vectors
  int64_t first, kept, end, last;
  int step;
};
template <class Team>
TGT_DEVICE Share share_of(const Team& team, int64_t size, int64_t room) {
  const int64_t vectors = (size + kVector - 1) / kVector;
  const int64_t a_block = (vectors + team.ranks - 1) / team.ranks;
  Share share;
  share.begin = team.rank * a_block;
  share.end = share.begin + a_block < vectors ? share.begin + a_block : vectors;
  share.kept = share.begin + room < share.end ? share.begin + room : share.end;
  share.step = team.size;
  share.first = share.begin + team.thread;
  const uint32_t before_last = share.first < share.end ? static_cast<uint32_t>(share.end - 1 - share.first) : 0;
  const uint32_t step = static_cast<uint32_t>(share.step);
  share.last = share.first < share.end ? share.first + before_last / step * step : share.first - 1;
  return share;
}

// A place in shared memory for each of the first vectors of a block or a warp. No other thread looks at a thread's.
template <class Real>
struct Places {
  static constexpr int kParts = sizeof(Eight<Real>) / 16;
  unsigned char* memory;
  int64_t begin;
  int room;

  template <class Team>
  TGT_DEVICE Places(const Team&, const Share& share, int vectors) : begin(share.begin), room(vectors) {
    const int before = Team::kIsWarp ? thread_in_block() / kWarp * room * int(sizeof(Eight<Real>)) : kTeamBytes;
    memory = shared_memory() + before;
  }
  // Parts of 16 bytes, each next to its neighbours': no two lanes of an access meet in a bank.
  TGT_DEVICE void put(int64_t k, const Eight<Real>& values) const {
    Bytes16 parts[kParts];
    memcpy(parts, &values, sizeof(values));
    const int at = static_cast<int>(k - begin);
    TGT_UNROLL
    for (int i = 0; i < kParts; ++i) store16(memory + (i * room + at) * 16, parts[i]);
  }
  TGT_DEVICE Eight<Real> get(int64_t k) const {
    Bytes16 parts[kParts];
    const int at = static_cast<int>(k - begin);
    TGT_UNROLL
    for (int i = 0; i < kParts; ++i) parts[i] = load16(memory + (i * room + at) * 16);
    Eight<Real> values;
    memcpy(&values, parts, sizeof(values));
    return values;
  }
};

template <class Team>
TGT_DEVICE int64_t sample_of(const Team& team) {
  return Team::kIsWarp ? block_in_grid() * (threads_in_block() / kWarp) + thread_in_block() / kWarp
                       : block_in_grid() / team.ranks;
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
