// The latent kernels: seeded noise, steps up a gradient, and projections, one launch an op.
#include "chip.h"
#include "latent_sample.h"

namespace tgt::cuda {
inline namespace TGT_ISA {
namespace {

constexpr int kThreads = 256;

// z + sigma * scale * noise of eight coordinates.
template <class Real>
TGT_DEVICE Eight<Real> perturbed(const PerturbCall& call, const Eight<float>& noise, const Eight<Real>& z, Real sigma,
                                 int64_t k) {
  Eight<Real> out;
  if (call.scale) {
    const Eight<Real> scale = units<Real>(call.scale, k, call.size);
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) out.v[j] = z.v[j] + sigma * scale.v[j] * noise.v[j];
  } else {
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) out.v[j] = z.v[j] + sigma * noise.v[j];
  }
  return out;
}

// Without a sphere no coordinate needs another: a thread two vectors of a sample, k and k + half, whatever its size.
// They share what it takes to find them and the keys of the generator's rounds.
template <class Real, int kDraw>
__global__ void TGT_BOUNDS(kThreads, 4)
    latent_perturb_kernel(const TGT_GRID_CONSTANT PerturbCall call, const TGT_GRID_CONSTANT DeviceKey device,
                          int64_t half, bool aligned) {
  const int64_t index = block_in_grid() * threads_in_block() + thread_in_block();
  const int64_t total = call.samples * half;
  if (index >= total) return;
  int64_t i, k;
  if (total <= INT32_MAX) {  // the division of 64-bit integers takes as long as the noise
    i = static_cast<uint32_t>(index) / static_cast<uint32_t>(half);
    k = static_cast<uint32_t>(index) % static_cast<uint32_t>(half);
  } else {
    i = index / half;
    k = index % half;
  }
  const char* z_row = sample_row<Real>(call.z, call.type, i, call.size);
  char* out_row = const_cast<char*>(sample_row<Real>(call.out, call.type, i, call.size));
  const bool both = (k + half) * kVector < call.size;
  Eight<Real> z[2];
  z[0] = load_padded(z_row, call.type, k * kVector, call.size, aligned, Real(0));
  if (both) z[1] = load_padded(z_row, call.type, (k + half) * kVector, call.size, aligned, Real(0));
  const Key key = key_of(call.noise, device, i);
  const Real sigma = Real(call.sigma.at<Real>(i));
  const double mass = kDraw == kTruncatedDraw ? truncated_mass(call.noise.truncation) : 0;
  TGT_UNROLL
  for (int m = 0; m < (kDraw == kTruncatedDraw ? 1 : 2); ++m) {
    if (m == 1 && !both) return;
    const int64_t at = k + m * half;
    const Eight<float> noise = draw_eight<kDraw>(key, at, call.noise.truncation, mass);
    store_padded(out_row, call.type, at * kVector, call.size, aligned, perturbed(call, noise, z[m], sigma, at));
  }
}

template <class Real, class Team>
__global__ void TGT_BOUNDS(2 * kThreads, 1)
    latent_sphere_kernel(const TGT_GRID_CONSTANT PerturbCall call, const TGT_GRID_CONSTANT DeviceKey device,
                         bool aligned, int room) {
  const Team team;
  const int64_t i = sample_of(team);
  if (i >= call.samples) return;
  team.begin();
  const Share share = share_of(team, call.size, room);
  const Places<Real> places(team, share, room);
  const char* z_row = sample_row<Real>(call.z, call.type, i, call.size);
  char* out_row = const_cast<char*>(sample_row<Real>(call.out, call.type, i, call.size));
  const Key key = key_of(call.noise, device, i);
  const Real sigma = Real(call.sigma.at<Real>(i));
  const double mass = truncated_mass(call.noise.truncation);
  const auto moved = [&](int64_t k, Eight<Real>& z) {
    z = load_padded(z_row, call.type, k * kVector, call.size, aligned, Real(0));
    const Eight<float> noise = mass > 0 ? draw_eight<kTruncatedDraw>(key, k, call.noise.truncation, mass)
                                        : draw_eight<kFineDraw>(key, k, 0, 0);
    Eight<Real> out = perturbed(call, noise, z, sigma, k);
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) out.v[j] = k * kVector + j < call.size ? out.v[j] : Real(0);
    return out;
  };
  Reach reach;
  Eight<Real> z;
  for (int64_t k = share.first; k < share.end; k += share.step) {
    const Eight<Real> out = moved(k, z);
    add_squares(out, reach.squares);
    add_squares(z, reach.other);
    if (k < share.kept) places.put(k, out);
  }
  reach = merge_all(team, reach, 0, AddReach());
  const double radius = call.sphere_radius < 0 ? sqrt(reach.other) : call.sphere_radius;
  const Stretch<Real> stretch = stretch_to<Real>(radius, sqrt(reach.squares));
  for (int64_t k = share.last; k >= share.first; k -= share.step) {  // backwards, as the caches have it
    Eight<Real> out = k < share.kept ? places.get(k) : moved(k, z);
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) out.v[j] = stretch(out.v[j]);
    store_padded(out_row, call.type, k * kVector, call.size, aligned, out);
  }
}

struct Layout {
  bool z, grad, anchor;  // rows start at multiples of 16 bytes
  int room;              // for vectors, of a block or a warp
};

// One sample's step.
template <class Real, int kDraw, bool kScaled>
struct Ascent {
  const AscendCall& call;
  Key key;
  const char* z_row;
  const char* grad_row;
  Layout layout;
  bool moves;
  Real lift;    // a power of 2 that keeps the gradient times `length` in range
  Real length;  // the step over the norm (l2), or the step (linf, raw)
  Real sigma;

  TGT_DEVICE Eight<Real> scale(int64_t k) const { return units<Real>(kScaled ? call.scale : nullptr, k, call.size); }
  TGT_DEVICE Eight<Real> grad(int64_t k) const {
    return load_padded(grad_row, call.grad_type, k * kVector, call.size, layout.grad, Real(0));
  }

  // The moved latents of eight coordinates, before any projection; 0 behind the end of the sample.
  TGT_DEVICE Eight<Real> moved(int64_t k, const Eight<Real>& grad, const Eight<Real>& scale) const {
    const int64_t at = k * kVector;
    const Eight<Real> z = load_padded(z_row, call.z_type, at, call.size, layout.z, Real(0));
    Eight<Real> out;
    if (!moves) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) out.v[j] = 0;
    } else if (call.norm == StepNorm::kLinf) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const Real g = grad.v[j];
        const bool any = scale.v[j] != 0;
        out.v[j] = g > 0 && any ? length : g < 0 && any ? -length : Real(0);
      }
    } else {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) out.v[j] = grad.v[j] * lift * scale.v[j] * length;
    }
    if (sigma != 0) {
      const Eight<float> noise = draw_eight<kDraw>(key, k, 0, 0);
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) out.v[j] += sigma * noise.v[j];
    }
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) out.v[j] = z.v[j] + scale.v[j] * out.v[j];
    if (at + kVector > call.size) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) out.v[j] = at + j < call.size ? out.v[j] : Real(0);
    }
    return out;
  }
};

// Three passes over a sample: for the norm of its gradient, for its step, for its projection. The gradient, then the
// moved latents wait in shared memory, as far as there is room; beyond it they are read and made again. Each pass
// walks against the last, so that it meets what the caches hold.
template <class Real, class Team, int kDraw, bool kScaled>
__global__ void TGT_BOUNDS(2 * kThreads, 1)
    latent_ascend_kernel(const TGT_GRID_CONSTANT AscendCall call, const TGT_GRID_CONSTANT DeviceKey device,
                         const TGT_GRID_CONSTANT Layout layout) {
  const Team team;
  const int64_t i = sample_of(team);
  if (i >= call.samples) return;
  team.begin();
  const Share share = share_of(team, call.size, layout.room);
  const Places<Real> places(team, share, layout.room);
  Ascent<Real, kDraw, kScaled> ascent{call,
                                      key_of(call.noise, device, i),
                                      sample_row<Real>(call.z, call.z_type, i, call.size),
                                      sample_row<Real>(call.grad, call.grad_type, i, call.size),
                                      layout,
                                      false,
                                      Real(1),
                                      Real(0),
                                      Real(call.sigma.at<Real>(i))};
  Reach reach;
  for (int64_t k = share.first; k < share.end; k += share.step) {
    const Eight<Real> grad = ascent.grad(k);
    if (k < share.kept) places.put(k, grad);
    add_squared_products(grad, ascent.scale(k), reach.squares);
  }
  const double norm = sqrt(merge_all(team, reach, 0, AddReach()).squares);
  ascent.moves = norm > 0 && norm < HUGE_VAL;
  const bool by_norm = call.norm == StepNorm::kL2 && ascent.moves;
  const double step = call.step_size.at<Real>(i);
  ascent.lift = Real(!by_norm       ? 1
                     : norm < 1e-30 ? 18446744073709551616.0
                     : norm > 1e30  ? 1 / 18446744073709551616.0
                                    : 1);
  ascent.length = Real(by_norm ? step / (norm * ascent.lift) : step);
  char* out_row = const_cast<char*>(sample_row<Real>(call.out, call.z_type, i, call.size));
  if (call.anchor == nullptr) {
    for (int64_t k = share.last; k >= share.first; k -= share.step) {
      const Eight<Real> grad = k < share.kept ? places.get(k) : ascent.grad(k);
      const Eight<Real> out = ascent.moved(k, grad, ascent.scale(k));
      store_padded(out_row, call.z_type, k * kVector, call.size, layout.z, out);
    }
    return;
  }

  const char* anchor_row = sample_row<Real>(call.anchor, call.anchor_type, i, call.size);
  const auto anchor_at = [&](int64_t k) {
    return load_padded(anchor_row, call.anchor_type, k * kVector, call.size, layout.anchor, Real(0));
  };
  const bool by_length = call.radius_norm == RadiusNorm::kL2;
  Reach away;
  Real furthest = 0;
  for (int64_t k = share.last; k >= share.first; k -= share.step) {
    const Eight<Real> scale = ascent.scale(k), anchor = anchor_at(k);
    const Eight<Real> grad = k < share.kept ? places.get(k) : ascent.grad(k);
    const Eight<Real> out = ascent.moved(k, grad, scale);
    if (k < share.kept) places.put(k, out);
    Eight<Real> offset;  // in units of the scale; coordinates without a unit do not count
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      offset.v[j] = out.v[j] - anchor.v[j];
      if constexpr (kScaled) offset.v[j] = scale.v[j] > 0 ? offset.v[j] / scale.v[j] : Real(0);
    }
    if (by_length) {
      add_squares(offset, away.squares);
    } else {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) furthest = larger(furthest, absolute(offset.v[j]));
    }
  }
  away.other = furthest;
  away = merge_all(team, away, 1, FurthestReach());
  const double radius = call.radius.at<Real>(i);
  const double distance = by_length ? sqrt(away.squares) : away.other;
  const bool outside = distance > radius;
  const Real shrink = Real(outside ? radius / distance : 1);
  const auto project = [&](int64_t k, Eight<Real> out, const Eight<Real>& scale) {
    if (outside || kScaled) {
      const Eight<Real> anchor = anchor_at(k);
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const Real distance_j = out.v[j] - anchor.v[j];
        if (outside && by_length) {
          out.v[j] = anchor.v[j] + distance_j * shrink;
        } else if (outside) {  // inside, bit for bit: no trip to the anchor and back
          const Real bound = Real(radius) * scale.v[j];
          out.v[j] = distance_j > bound ? anchor.v[j] + bound : distance_j < -bound ? anchor.v[j] - bound : out.v[j];
        }
        out.v[j] = scale.v[j] > 0 ? out.v[j] : anchor.v[j];  // a coordinate without a unit has no room to move in
      }
    }
    store_padded(out_row, call.z_type, k * kVector, call.size, layout.z, out);
  };
  int64_t k = share.first;
  for (; k < share.kept; k += share.step) project(k, places.get(k), ascent.scale(k));
  for (; k < share.end; k += share.step) {
    const Eight<Real> scale = ascent.scale(k);
    project(k, ascent.moved(k, ascent.grad(k), scale), scale);
  }
}

bool rows_aligned(const void* base, DType type, int64_t size) {
  return is_aligned(base) && size * element_size(type) % 16 == 0;
}

constexpr int64_t kWarpNumbers = 1024;      // a warp a sample up to here
constexpr int64_t kBlockNumbers = 1 << 14;  // a block of a cluster takes as many, or more where a cluster is full

// The largest cluster that the chip has and the size deserves.
cudaError_t cluster_for(const void* kernel, int64_t size, int& cluster, int& shared_bytes) {
  Chip chip;
  const cudaError_t error = find_chip(kernel, chip);
  shared_bytes = chip.shared_bytes;
  cluster = 1;
  while (chip.major >= 9 && cluster < kMostBlocks && size > cluster * kBlockNumbers) cluster *= 2;
  return error;
}

// One team a sample: kernels by the type of the arithmetic and the size of a sample. The last argument is the room for
// vectors, of `vector_bytes` each.
template <class Warps, class Blocks, class Launch>
cudaError_t launch_samples(Warps a_warp, Blocks a_block, int64_t samples, int64_t size, int64_t vector_bytes,
                           Launch launch_with) {
  const int64_t vectors = (size + kVector - 1) / kVector;
  if (size <= kWarpNumbers) {
    constexpr int kSamples = kThreads / kWarp;
    const int bytes = static_cast<int>(kSamples * vectors * vector_bytes);
    return launch_with(a_warp, (samples + kSamples - 1) / kSamples, kThreads, bytes, 1, static_cast<int>(vectors));
  }
  int cluster = 1, limit = 0;
  const cudaError_t error = cluster_for(reinterpret_cast<const void*>(a_block), size, cluster, limit);
  if (error != cudaSuccess) return error;
  const int64_t share = (vectors + cluster - 1) / cluster;
  // Two blocks to a multiprocessor, or one of as many threads where more room is of use.
  int64_t room = ((limit - 1024) / 2 - kTeamBytes) / vector_bytes;
  const bool alone = room < share;
  if (alone) room = (limit - kTeamBytes) / vector_bytes;
  room = room < share ? room : share;
  return launch_with(a_block, samples * cluster, alone ? 2 * kThreads : kThreads,
                     static_cast<int>(kTeamBytes + room * vector_bytes), cluster, static_cast<int>(room));
}

template <class Real>
cudaError_t launch_perturb(const PerturbCall& call, const DeviceKey& key, cudaStream_t stream) {
  const bool aligned = rows_aligned(call.z, call.type, call.size) && rows_aligned(call.out, call.type, call.size);
  if (call.sphere_radius != 0) {
    return launch_samples(latent_sphere_kernel<Real, WarpTeam>, latent_sphere_kernel<Real, BlockTeam>, call.samples,
                          call.size, sizeof(Eight<Real>),
                          [&](auto kernel, int64_t blocks, int threads, int bytes, int cluster, int room) {
                            return launch(kernel, blocks, threads, bytes, cluster, stream, call, key, aligned, room);
                          });
  }
  const int64_t vectors = (call.size + kVector - 1) / kVector;
  const Draw draw = draw_for(call.noise, call.type);
  const int64_t half = draw == kTruncatedDraw ? vectors : (vectors + 1) / 2;
  const int64_t blocks = (call.samples * half + kThreads - 1) / kThreads;
  const auto with = [&](auto kernel) {
    return launch(kernel, blocks, kThreads, 0, 1, stream, call, key, half, aligned);
  };
  if (draw == kTruncatedDraw) return with(latent_perturb_kernel<Real, kTruncatedDraw>);
  if constexpr (sizeof(Real) == 4) {
    if (draw == kCoarseDraw) return with(latent_perturb_kernel<Real, kCoarseDraw>);
  }
  return with(latent_perturb_kernel<Real, kFineDraw>);
}

template <class Real, int kDraw, bool kScaled>
cudaError_t launch_ascend(const AscendCall& call, const DeviceKey& key, cudaStream_t stream) {
  const auto with = [&](auto kernel, int64_t blocks, int threads, int bytes, int cluster, int room) {
    const Layout layout = {
        rows_aligned(call.z, call.z_type, call.size) && rows_aligned(call.out, call.z_type, call.size),
        rows_aligned(call.grad, call.grad_type, call.size), rows_aligned(call.anchor, call.anchor_type, call.size),
        room};
    return launch(kernel, blocks, threads, bytes, cluster, stream, call, key, layout);
  };
  return launch_samples(latent_ascend_kernel<Real, WarpTeam, kDraw, kScaled>,
                        latent_ascend_kernel<Real, BlockTeam, kDraw, kScaled>, call.samples, call.size,
                        sizeof(Eight<Real>), with);
}

template <int kDraw>
cudaError_t launch_ascend(const AscendCall& call, const DeviceKey& key, cudaStream_t stream) {
  return call.scale ? launch_ascend<float, kDraw, true>(call, key, stream)
                    : launch_ascend<float, kDraw, false>(call, key, stream);
}

}  // namespace
}  // namespace TGT_ISA

Failure perturb(const PerturbCall& call, const DeviceKey& key, cudaStream_t stream) {
  if (call.samples == 0 || call.size == 0) return {};
  const cudaError_t error =
      call.is_fp64() ? launch_perturb<double>(call, key, stream) : launch_perturb<float>(call, key, stream);
  return {error, "latent_perturb_kernel"};
}

Failure ascend(const AscendCall& call, const DeviceKey& key, cudaStream_t stream) {
  if (call.samples == 0 || call.size == 0) return {};
  const cudaError_t error = call.is_fp64()                   ? launch_ascend<double, kFineDraw, true>(call, key, stream)
                            : element_size(call.z_type) == 2 ? launch_ascend<kCoarseDraw>(call, key, stream)
                                                             : launch_ascend<kFineDraw>(call, key, stream);
  return {error, "latent_ascend_kernel"};
}

}  // namespace tgt::cuda
