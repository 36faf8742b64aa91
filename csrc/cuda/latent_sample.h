// One sample on a device: its noise, its step, and its distance from an anchor, eight coordinates at a time.
//
// The semantics are those of csrc/cpu/latent_rows.cpp. What a projection needs a second time is computed again, noise
// included: memory is read once (and from cache again), and the result has the same bits.
#pragma once

#include "noise.h"
#include "team.h"
#include "vectors.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// Standard normals 8 k to 8 k + 7 of a sample: two blocks of the generator. `mass`: of the truncated normal, or 0.
TGT_DEVICE Eight<float> draw_eight(const Key& key, int64_t k, double bound, double mass) {
  Eight<float> out;
  TGT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Block<uint32_t> counter{static_cast<uint32_t>(2 * k + half), key.id_low, key.id_high, key.op_step};
    const Block<uint32_t> w = philox4x32(counter, key.seed_low, key.seed_high);
    float* to = out.v + 4 * half;
    if (mass > 0) {
      to[0] = truncated_normal(w.x0, bound, mass);
      to[1] = truncated_normal(w.x1, bound, mass);
      to[2] = truncated_normal(w.x2, bound, mass);
      to[3] = truncated_normal(w.x3, bound, mass);
    } else {
      const Pair<float> first = normal_pair<float>(w.x0, w.x1), second = normal_pair<float>(w.x2, w.x3);
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

// The vectors of a sample that belong to a thread.
struct Share {
  int64_t first, end;
  int step;
};
template <class Team>
TGT_DEVICE Share share_of(const Team& team, int64_t size) {
  const int64_t vectors = (size + kVector - 1) / kVector;
  const int64_t a_block = (vectors + team.ranks - 1) / team.ranks;
  const int64_t begin = team.rank * a_block, end = begin + a_block;
  return {begin + team.thread, end < vectors ? end : vectors, team.size};
}

template <class Team>
TGT_DEVICE int64_t sample_of(const Team& team) {
  return Team::kIsWarp ? block_in_grid() * (threads_in_block() / kWarp) + thread_in_block() / kWarp
                       : block_in_grid() / team.ranks;
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
