// The latent kernels: seeded noise, steps up a gradient, and projections, one launch an op.
#include "chip.h"
#include "latent_sample.h"

namespace tgt::cuda {
inline namespace TGT_ISA {
namespace {

constexpr int kThreads = 256;

// z + sigma * scale * noise of eight coordinates.
template <class Real>
TGT_DEVICE Eight<Real> perturbed(const PerturbCall& call, const Key& key, const Eight<Real>& z, Real sigma, double mass,
                                 int64_t k) {
  const Eight<float> noise = draw_eight(key, k, call.noise.truncation, mass);
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

// Without a sphere no coordinate needs another: a thread a vector, whatever the size of a sample.
template <class Real>
__global__ void TGT_BOUNDS(kThreads, 4)
    latent_perturb_kernel(const TGT_GRID_CONSTANT PerturbCall call, const TGT_GRID_CONSTANT DeviceKey device,
                          int64_t vectors, bool aligned) {
  const int64_t index = block_in_grid() * threads_in_block() + thread_in_block();
  const int64_t total = call.samples * vectors;
  if (index >= total) return;
  int64_t i, k;
  if (total <= INT32_MAX) {  // the division of 64-bit integers takes as long as the noise
    i = static_cast<uint32_t>(index) / static_cast<uint32_t>(vectors);
    k = static_cast<uint32_t>(index) % static_cast<uint32_t>(vectors);
  } else {
    i = index / vectors;
    k = index % vectors;
  }
  const char* z_row = sample_row<Real>(call.z, call.type, i, call.size);
  const Eight<Real> z = load_padded(z_row, call.type, k * kVector, call.size, aligned, Real(0));
  const Key key = key_of(call.noise, device, i);
  const Real sigma = Real(call.sigma.at<Real>(i));
  char* out_row = const_cast<char*>(sample_row<Real>(call.out, call.type, i, call.size));
  store_padded(out_row, call.type, k * kVector, call.size, aligned,
               perturbed(call, key, z, sigma, truncated_mass(call.noise.truncation), k));
}

template <class Real, class Team>
__global__ void TGT_BOUNDS(kThreads, 2) latent_sphere_kernel(const TGT_GRID_CONSTANT PerturbCall call,
                                                             const TGT_GRID_CONSTANT DeviceKey device, bool aligned) {
  const Team team;
  const int64_t i = sample_of(team);
  if (i >= call.samples) return;
  team.begin();
  const Share share = share_of(team, call.size);
  const char* z_row = sample_row<Real>(call.z, call.type, i, call.size);
  char* out_row = const_cast<char*>(sample_row<Real>(call.out, call.type, i, call.size));
  const Key key = key_of(call.noise, device, i);
  const Real sigma = Real(call.sigma.at<Real>(i));
  const double mass = truncated_mass(call.noise.truncation);
  const auto moved = [&](int64_t k, Eight<Real>& z) {
    z = load_padded(z_row, call.type, k * kVector, call.size, aligned, Real(0));
    Eight<Real> out = perturbed(call, key, z, sigma, mass, k);
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
  }
  reach = merge_all(team, reach, 0, AddReach());
  const double radius = call.sphere_radius < 0 ? sqrt(reach.other) : call.sphere_radius;
  const Stretch<Real> stretch = stretch_to<Real>(radius, sqrt(reach.squares));
  for (int64_t k = share.first; k < share.end; k += share.step) {
    Eight<Real> out = moved(k, z);
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) out.v[j] = stretch(out.v[j]);
    store_padded(out_row, call.type, k * kVector, call.size, aligned, out);
  }
}

struct Aligned {
  bool z, grad, anchor;  // rows start at multiples of 16 bytes
};

// One sample's step.
template <class Real>
struct Ascent {
  const AscendCall& call;
  Key key;
  const char* z_row;
  const char* grad_row;
  Aligned aligned;
  bool moves;
  Real lift;    // a power of 2 that keeps the gradient times `length` in range
  Real length;  // the step over the norm (l2), or the step (linf, raw)
  Real sigma;

  // The moved latents of eight coordinates, before any projection.
  TGT_DEVICE Eight<Real> moved(int64_t k, const Eight<Real>& scale) const {
    const int64_t at = k * kVector;
    const Eight<Real> z = load_padded(z_row, call.z_type, at, call.size, aligned.z, Real(0));
    Eight<Real> out;
    if (!moves) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) out.v[j] = 0;
    } else {
      const Eight<Real> grad = load_padded(grad_row, call.grad_type, at, call.size, aligned.grad, Real(0));
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const Real g = grad.v[j];
        if (call.norm == StepNorm::kLinf) {
          const bool any = scale.v[j] != 0;
          out.v[j] = g > 0 && any ? length : g < 0 && any ? -length : Real(0);
        } else {
          out.v[j] = g * lift * scale.v[j] * length;
        }
      }
    }
    if (sigma != 0) {
      const Eight<float> noise = draw_eight(key, k, 0, 0);
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) out.v[j] += sigma * noise.v[j];
    }
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) out.v[j] = z.v[j] + scale.v[j] * out.v[j];
    return out;
  }
};

template <class Real, class Team>
__global__ void TGT_BOUNDS(kThreads, 2)
    latent_ascend_kernel(const TGT_GRID_CONSTANT AscendCall call, const TGT_GRID_CONSTANT DeviceKey device,
                         const TGT_GRID_CONSTANT Aligned aligned) {
  const Team team;
  const int64_t i = sample_of(team);
  if (i >= call.samples) return;
  team.begin();
  const Share share = share_of(team, call.size);
  const char* grad_row = sample_row<Real>(call.grad, call.grad_type, i, call.size);
  Reach reach;
  for (int64_t k = share.first; k < share.end; k += share.step) {
    const Eight<Real> grad = load_padded(grad_row, call.grad_type, k * kVector, call.size, aligned.grad, Real(0));
    add_squared_products(grad, units<Real>(call.scale, k, call.size), reach.squares);
  }
  const double norm = sqrt(merge_all(team, reach, 0, AddReach()).squares);
  const bool moves = norm > 0 && norm < HUGE_VAL;
  const bool by_norm = call.norm == StepNorm::kL2 && moves;
  const double step = call.step_size.at<Real>(i);
  const Real lift = Real(!by_norm       ? 1
                         : norm < 1e-30 ? 18446744073709551616.0
                         : norm > 1e30  ? 1 / 18446744073709551616.0
                                        : 1);
  const Ascent<Real> ascent = {call,
                               key_of(call.noise, device, i),
                               sample_row<Real>(call.z, call.z_type, i, call.size),
                               grad_row,
                               aligned,
                               moves,
                               lift,
                               Real(by_norm ? step / (norm * lift) : step),
                               Real(call.sigma.at<Real>(i))};
  char* out_row = const_cast<char*>(sample_row<Real>(call.out, call.z_type, i, call.size));
  const bool ball = call.anchor != nullptr;
  if (!ball) {
    for (int64_t k = share.first; k < share.end; k += share.step) {
      const Eight<Real> out = ascent.moved(k, units<Real>(call.scale, k, call.size));
      store_padded(out_row, call.z_type, k * kVector, call.size, aligned.z, out);
    }
    return;
  }

  const char* anchor_row = sample_row<Real>(call.anchor, call.anchor_type, i, call.size);
  Reach away;
  for (int64_t k = share.first; k < share.end; k += share.step) {
    const Eight<Real> scale = units<Real>(call.scale, k, call.size);
    const Eight<Real> out = ascent.moved(k, scale);
    const Eight<Real> anchor =
        load_padded(anchor_row, call.anchor_type, k * kVector, call.size, aligned.anchor, Real(0));
    Eight<Real> offset;  // in units of the scale; coordinates without a unit do not count
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const bool counts = scale.v[j] > 0 && k * kVector + j < call.size;
      const Real distance = out.v[j] - anchor.v[j];
      offset.v[j] = !counts ? Real(0) : call.scale ? distance / scale.v[j] : distance;
      away.other = larger(away.other, static_cast<double>(absolute(offset.v[j])));
    }
    if (call.radius_norm == RadiusNorm::kL2) add_squares(offset, away.squares);
  }
  away = merge_all(team, away, 1, FurthestReach());
  const double radius = call.radius.at<Real>(i);
  const double distance = call.radius_norm == RadiusNorm::kL2 ? sqrt(away.squares) : away.other;
  const bool outside = distance > radius;
  const Real shrink = Real(outside ? radius / distance : 1);
  for (int64_t k = share.first; k < share.end; k += share.step) {
    const Eight<Real> scale = units<Real>(call.scale, k, call.size);
    Eight<Real> out = ascent.moved(k, scale);
    const Eight<Real> anchor =
        load_padded(anchor_row, call.anchor_type, k * kVector, call.size, aligned.anchor, Real(0));
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const Real distance_j = out.v[j] - anchor.v[j];
      if (outside && call.radius_norm == RadiusNorm::kL2) {
        out.v[j] = anchor.v[j] + distance_j * shrink;
      } else if (outside) {  // inside, bit for bit: no trip to the anchor and back
        const Real bound = Real(radius) * scale.v[j];
        out.v[j] = distance_j > bound ? anchor.v[j] + bound : distance_j < -bound ? anchor.v[j] - bound : out.v[j];
      }
      out.v[j] = scale.v[j] > 0 ? out.v[j] : anchor.v[j];  // a coordinate without a unit has no room to move in
    }
    store_padded(out_row, call.z_type, k * kVector, call.size, aligned.z, out);
  }
}

bool rows_aligned(const void* base, DType type, int64_t size) {
  return is_aligned(base) && size * element_size(type) % 16 == 0;
}

constexpr int64_t kWarpNumbers = 1024;      // a warp a sample up to here
constexpr int64_t kBlockNumbers = 1 << 14;  // a block of a cluster takes as many, or more where a cluster is full

// The largest cluster that the chip has and the size deserves.
cudaError_t cluster_for(const void* kernel, int64_t size, int& cluster) {
  Chip chip;
  const cudaError_t error = find_chip(kernel, chip);
  cluster = 1;
  while (chip.major >= 9 && cluster < kMostBlocks && size > cluster * kBlockNumbers) cluster *= 2;
  return error;
}

// One team a sample: kernels by the type of the arithmetic and the size of a sample.
template <class Warps, class Blocks, class... Arguments>
cudaError_t launch_samples(Warps a_warp, Blocks a_block, int64_t samples, int64_t size, cudaStream_t stream,
                           const Arguments&... arguments) {
  if (size <= kWarpNumbers) {
    constexpr int kSamples = kThreads / kWarp;
    return launch(a_warp, (samples + kSamples - 1) / kSamples, kThreads, 0, 1, stream, arguments...);
  }
  int cluster = 1;
  const cudaError_t error = cluster_for(reinterpret_cast<const void*>(a_block), size, cluster);
  if (error != cudaSuccess) return error;
  return launch(a_block, samples * cluster, kThreads, kTeamBytes, cluster, stream, arguments...);
}

template <class Real>
cudaError_t launch_perturb(const PerturbCall& call, const DeviceKey& key, cudaStream_t stream) {
  const bool aligned = rows_aligned(call.z, call.type, call.size) && rows_aligned(call.out, call.type, call.size);
  if (call.sphere_radius != 0) {
    return launch_samples(latent_sphere_kernel<Real, WarpTeam>, latent_sphere_kernel<Real, BlockTeam>, call.samples,
                          call.size, stream, call, key, aligned);
  }
  const int64_t vectors = (call.size + kVector - 1) / kVector;
  const int64_t blocks = (call.samples * vectors + kThreads - 1) / kThreads;
  return launch(latent_perturb_kernel<Real>, blocks, kThreads, 0, 1, stream, call, key, vectors, aligned);
}

template <class Real>
cudaError_t launch_ascend(const AscendCall& call, const DeviceKey& key, cudaStream_t stream) {
  const Aligned aligned = {
      rows_aligned(call.z, call.z_type, call.size) && rows_aligned(call.out, call.z_type, call.size),
      rows_aligned(call.grad, call.grad_type, call.size), rows_aligned(call.anchor, call.anchor_type, call.size)};
  return launch_samples(latent_ascend_kernel<Real, WarpTeam>, latent_ascend_kernel<Real, BlockTeam>, call.samples,
                        call.size, stream, call, key, aligned);
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
  const cudaError_t error =
      call.is_fp64() ? launch_ascend<double>(call, key, stream) : launch_ascend<float>(call, key, stream);
  return {error, "latent_ascend_kernel"};
}

}  // namespace tgt::cuda
