// The calls of the latent ops: what the binding fills in and every kernel reads.
#pragma once

#include "philox.h"

namespace tgt {

// A factor that is one number for all samples, or one a sample. Factors a sample or a coordinate come in the type of
// the arithmetic: double as soon as a latent, gradient or anchor is double, else float.
struct Factor {
  double value = 0;
  const void* values = nullptr;  // [samples]

  template <class Real>
  TGT_HD double at(int64_t i) const {
    return values ? static_cast<double>(static_cast<const Real*>(values)[i]) : value;
  }
};

struct PerturbCall {
  int64_t samples = 0;
  int64_t size = 0;  // numbers a sample
  DType type = DType::kFloat32;
  const void* z = nullptr;  // [samples, size], contiguous like every matrix here
  void* out = nullptr;
  Factor sigma;
  const void* scale = nullptr;  // [size]: sigma a coordinate
  NoiseKey noise;
  double sphere_radius = 0;  // 0: no sphere; below 0: the norm of z

  bool is_fp64() const { return type == DType::kFloat64; }
};

// radius / norm as a power of 2, which rounds nothing, times a factor near the radius: the quotient itself may leave
// the range of Real.
template <class Real>
struct Stretch {
  Real lift = 1, factor = 1;

  TGT_HD Real operator()(Real x) const { return x * lift * factor; }
};
template <class Real>
TGT_HD Stretch<Real> stretch_to(double radius, double norm) {
  Stretch<Real> out;
  if (!(norm > 0)) return out;
  const double quotient = radius / norm;
  if (norm < HUGE_VAL && !(quotient > 1e-30 && quotient < 1e30)) {
    constexpr int kMost = sizeof(Real) == 8 ? 1000 : 126;
    int exponent = ilogb(norm);
    exponent = exponent < -kMost ? -kMost : exponent > kMost ? kMost : exponent;
    out.lift = Real(ldexp(1.0, -exponent));
    out.factor = Real(radius / ldexp(norm, -exponent));
    return out;
  }
  out.factor = Real(quotient);
  return out;
}

enum class StepNorm : int { kL2, kLinf, kRaw };
enum class RadiusNorm : int { kL2, kLinf };

struct AscendCall {
  int64_t samples = 0;
  int64_t size = 0;
  DType z_type = DType::kFloat32;
  DType grad_type = DType::kFloat32;
  DType anchor_type = DType::kFloat32;
  const void* z = nullptr;
  const void* grad = nullptr;
  const void* anchor = nullptr;  // null: no trust region
  void* out = nullptr;
  Factor step_size;
  Factor sigma;
  Factor radius;
  const void* scale = nullptr;  // [size]: the unit of each coordinate
  StepNorm norm = StepNorm::kL2;
  RadiusNorm radius_norm = RadiusNorm::kL2;
  NoiseKey noise;

  bool is_fp64() const {
    return z_type == DType::kFloat64 || grad_type == DType::kFloat64 || (anchor && anchor_type == DType::kFloat64);
  }
};

}  // namespace tgt
