// The latent kernels, compiled once per instruction set: seeded noise, steps up a gradient, and projections.
//
// A sample is handled block by block in the first-level cache. Where a projection needs the norm of the whole moved
// sample, the moved sample waits in a scratch row of the thread, so that noise is drawn once.
#include <initializer_list>

#include "blocks.h"
#include "isa.h"
#include "noise.h"
#include "scratch.h"

namespace tgt {
inline namespace TGT_ISA {
namespace {

// Standard normals [at, at + count) of a sample; `at` is a multiple of 4 lanes. Writes whole vectors: `to` needs room
// for count rounded up to 4 * kWordLanes.
void draw_normals(const Key& key, int64_t at, int count, float* to) {
  const InOrder in_order;
  const VUInt32 lanes = lane_numbers();
  for (int done = 0; done < count; done += 4 * kWordLanes) {
    const Block<VUInt32> w = philox_words(key, lanes + static_cast<uint32_t>((at + done) / 4));
    const Pair<VFloat> first = normal_pair<VFloat>(w.x0, w.x1), second = normal_pair<VFloat>(w.x2, w.x3);
    in_order.write(to + done, first.first, first.second, second.first, second.second);
  }
}

void draw_truncated(const Key& key, int64_t at, int count, double bound, float* to) {
  const double mass = erf(bound * 0.7071067811865476);
  for (int done = 0; done < count; done += 4) {
    const Block<uint32_t> w = philox_words(key, static_cast<uint32_t>((at + done) / 4));
    to[done] = truncated_normal(w.x0, bound, mass);
    to[done + 1] = truncated_normal(w.x1, bound, mass);
    to[done + 2] = truncated_normal(w.x2, bound, mass);
    to[done + 3] = truncated_normal(w.x3, bound, mass);
  }
}

void draw(const NoiseKey& noise, const Key& key, int64_t at, int count, float* to) {
  if (noise.truncation > 0) {
    draw_truncated(key, at, count, noise.truncation, to);
  } else {
    draw_normals(key, at, count, to);
  }
}

template <class Body>  // body(at, count)
void each_block(int64_t size, Body body) {
  for (int64_t at = 0; at < size; at += kBlock) body(at, int(size - at < kBlock ? size - at : kBlock));
}

template <class Real>
double sum_of_squares(const Real* values, int count) {
  using V = typename Lanes<Real>::Vector;
  constexpr int kLanes = Lanes<Real>::kCount;
  V sum{};
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const V v = load(values + j);
    sum = fused(v, v, sum);
  }
  if (j < count) {
    const V v = load_part(values + j, count - j, Real(0));
    sum = fused(v, v, sum);
  }
  return sum_lanes(sum);
}

// The same where float squares overflow or vanish.
template <class Real>
double sum_of_squares_fp64(const Real* values, int count) {
  double sum = 0;
  for (int j = 0; j < count; ++j) sum += static_cast<double>(values[j]) * values[j];
  return sum;
}

template <class Real>
double careful_sum_of_squares(const Real* values, int count) {
  const double sum = sum_of_squares(values, count);
  return sizeof(Real) == 8 || (sum > 1e-20 && sum < 1e30) ? sum : sum_of_squares_fp64(values, count);
}

template <class Real>
void perturb(const PerturbCall& call, int64_t begin, int64_t end) {
  const int64_t bytes = call.size * element_size(call.type);
  const Real* scale = static_cast<const Real*>(call.scale);
  const bool sphere = call.sphere_radius != 0;
  Scratch<Real> scratch(sphere ? call.size : 0);
  alignas(64) Real z_buffer[kBlock], out_buffer[kBlock];
  alignas(64) float noise[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const char* z_row = static_cast<const char*>(call.z) + i * bytes;
    char* out_row = static_cast<char*>(call.out) + i * bytes;
    const Key key = key_of(call.noise, i);
    const Real sigma = Real(call.sigma.at<Real>(i));
    double norm_before = 0, norm_after = 0;
    each_block(call.size, [&](int64_t at, int count) {
      draw(call.noise, key, at, count, noise);
      const Real* z = read_block(z_row, call.type, at, count, z_buffer);
      Real* out = sphere ? scratch.data() + at : write_block(out_row, call.type, at, out_buffer);
      if (scale) {
        for (int j = 0; j < count; ++j) out[j] = z[j] + sigma * scale[at + j] * noise[j];
      } else {
        for (int j = 0; j < count; ++j) out[j] = z[j] + sigma * noise[j];
      }
      if (sphere) {
        norm_before += careful_sum_of_squares(z, count);
        norm_after += careful_sum_of_squares(out, count);
      } else if (out == out_buffer) {
        finish_block(out, out_row, call.type, at, count);
      }
    });
    if (!sphere) continue;
    const double radius = call.sphere_radius < 0 ? sqrt(norm_before) : call.sphere_radius;
    const Stretch<Real> stretch = stretch_to<Real>(radius, sqrt(norm_after));
    each_block(call.size, [&](int64_t at, int count) {
      Real* out = write_block(out_row, call.type, at, out_buffer);
      for (int j = 0; j < count; ++j) out[j] = stretch(scratch.data()[at + j]);
      if (out == out_buffer) finish_block(out, out_row, call.type, at, count);
    });
  }
}

// What one sample's step needs, with the pieces that are absent compiled out of the inner loops.
template <class Real>
struct Ascent {
  const AscendCall& call;
  const Real* scale;
  alignas(64) Real z_buffer[kBlock], grad_buffer[kBlock], anchor_buffer[kBlock], out_buffer[kBlock];
  alignas(64) float noise[kBlock];

  explicit Ascent(const AscendCall& c) : call(c), scale(static_cast<const Real*>(c.scale)) {}

  const char* row_of(const void* base, DType type, int64_t i) const {
    return static_cast<const char*>(base) + i * call.size * element_size(type);
  }

  // A gradient times a power of 2, which rounds nothing: where its norm is near the ends of float's range, the
  // reciprocal of the norm would leave it.
  const Real* lifted(const Real* grad, int count, Real lift) {
    if (lift == 1) return grad;
    for (int j = 0; j < count; ++j) grad_buffer[j] = grad[j] * lift;
    return grad_buffer;
  }

  // |scale * grad|_2 of sample i, in two steps: fast, and again with care where that left the range of float.
  double gradient_norm(int64_t i) {
    const char* row = row_of(call.grad, call.grad_type, i);
    for (bool careful : {false, true}) {
      double sum = 0;
      each_block(call.size, [&](int64_t at, int count) {
        const Real* grad = read_block(row, call.grad_type, at, count, grad_buffer);
        if (careful) {
          for (int j = 0; j < count; ++j) {
            const double u = scale ? static_cast<double>(grad[j]) * scale[at + j] : grad[j];
            sum += u * u;
          }
          return;
        }
        if (scale) {
          for (int j = 0; j < count; ++j) out_buffer[j] = grad[j] * scale[at + j];
          grad = out_buffer;
        }
        sum += sum_of_squares(grad, count);
      });
      if (careful || (sum > 1e-20 && sum < 1e30)) return sqrt(sum);
    }
    return 0;
  }

  // The moved latents of a block, before any projection.
  void move_block(int64_t at, int count, const Real* z, const Real* grad, Real length, Real sigma, bool moves,
                  const Key& key, Real* out) {
    // direction * step in whitened units; `length` is the step over the norm (l2), or the step (linf, raw)
    const bool sign = call.norm == StepNorm::kLinf;
    if (!moves) {
      for (int j = 0; j < count; ++j) out[j] = 0;
    } else if (sign) {
      for (int j = 0; j < count; ++j) {
        const bool any = !scale || scale[at + j] != 0;
        out[j] = grad[j] > 0 && any ? length : grad[j] < 0 && any ? -length : Real(0);
      }
    } else if (scale) {
      for (int j = 0; j < count; ++j) out[j] = grad[j] * scale[at + j] * length;
    } else {
      for (int j = 0; j < count; ++j) out[j] = grad[j] * length;
    }
    if (sigma != 0) {
      draw(call.noise, key, at, count, noise);
      for (int j = 0; j < count; ++j) out[j] += sigma * noise[j];
    }
    if (scale) {
      for (int j = 0; j < count; ++j) out[j] = z[j] + scale[at + j] * out[j];
    } else {
      for (int j = 0; j < count; ++j) out[j] = z[j] + out[j];
    }
  }

  // (moved - anchor) / scale of a block; coordinates without a unit do not count.
  void offsets(int64_t at, int count, const Real* moved, const Real* anchor, Real* to) const {
    if (scale) {
      for (int j = 0; j < count; ++j) to[j] = scale[at + j] > 0 ? (moved[j] - anchor[j]) / scale[at + j] : Real(0);
    } else {
      for (int j = 0; j < count; ++j) to[j] = moved[j] - anchor[j];
    }
  }
};

template <class Real>
void ascend(const AscendCall& call, int64_t begin, int64_t end) {
  Ascent<Real> ascent(call);
  const Real* scale = ascent.scale;
  const bool ball = call.anchor != nullptr;
  Scratch<Real> scratch(ball ? call.size : 0);
  for (int64_t i = begin; i < end; ++i) {
    const char* z_row = ascent.row_of(call.z, call.z_type, i);
    const char* grad_row = ascent.row_of(call.grad, call.grad_type, i);
    const char* anchor_row = ball ? ascent.row_of(call.anchor, call.anchor_type, i) : nullptr;
    char* out_row = const_cast<char*>(ascent.row_of(call.out, call.z_type, i));
    const Key key = key_of(call.noise, i);
    const double norm = ascent.gradient_norm(i);
    const bool moves = norm > 0 && norm < HUGE_VAL;
    const double step = call.step_size.at<Real>(i);
    const bool by_norm = call.norm == StepNorm::kL2 && moves;
    const Real lift = Real(!by_norm ? 1 : norm < 1e-30 ? 0x1p64 : norm > 1e30 ? 0x1p-64 : 1);
    const Real length = Real(by_norm ? step / (norm * lift) : step);
    const Real sigma = Real(call.sigma.at<Real>(i));
    double squares = 0, furthest = 0;
    each_block(call.size, [&](int64_t at, int count) {
      const Real* z = read_block(z_row, call.z_type, at, count, ascent.z_buffer);
      const Real* grad = read_block(grad_row, call.grad_type, at, count, ascent.grad_buffer);
      Real* out = ball ? scratch.data() + at : write_block(out_row, call.z_type, at, ascent.out_buffer);
      ascent.move_block(at, count, z, ascent.lifted(grad, count, lift), length, sigma, moves, key, out);
      if (!ball) {
        if (out == ascent.out_buffer) finish_block(out, out_row, call.z_type, at, count);
        return;
      }
      const Real* anchor = read_block(anchor_row, call.anchor_type, at, count, ascent.anchor_buffer);
      Real* away = ascent.out_buffer;
      ascent.offsets(at, count, out, anchor, away);
      if (call.radius_norm == RadiusNorm::kL2) {
        squares += careful_sum_of_squares(away, count);
      } else {
        for (int j = 0; j < count; ++j) furthest = larger(furthest, static_cast<double>(absolute(away[j])));
      }
    });
    if (!ball) continue;
    const double radius = call.radius.at<Real>(i);
    const double distance = call.radius_norm == RadiusNorm::kL2 ? sqrt(squares) : furthest;
    const bool outside = distance > radius;
    const Real shrink = Real(outside ? radius / distance : 1);
    each_block(call.size, [&](int64_t at, int count) {
      const Real* moved = scratch.data() + at;
      const Real* anchor = read_block(anchor_row, call.anchor_type, at, count, ascent.anchor_buffer);
      Real* out = write_block(out_row, call.z_type, at, ascent.out_buffer);
      if (!outside) {  // bit for bit, no trip to the anchor and back
        memcpy(out, moved, count * sizeof(Real));
      } else if (call.radius_norm == RadiusNorm::kL2) {
        for (int j = 0; j < count; ++j) out[j] = anchor[j] + (moved[j] - anchor[j]) * shrink;
      } else {
        for (int j = 0; j < count; ++j) {
          const Real bound = Real(radius) * (scale ? scale[at + j] : Real(1));
          const Real away = moved[j] - anchor[j];
          out[j] = away > bound ? anchor[j] + bound : away < -bound ? anchor[j] - bound : moved[j];
        }
      }
      if (scale) {  // a coordinate without a unit has no room to move in
        for (int j = 0; j < count; ++j) out[j] = scale[at + j] > 0 ? out[j] : anchor[j];
      }
      if (out == ascent.out_buffer) finish_block(out, out_row, call.z_type, at, count);
    });
  }
}

}  // namespace

void perturb_rows(const PerturbCall& call, int64_t begin, int64_t end) {
  call.is_fp64() ? perturb<double>(call, begin, end) : perturb<float>(call, begin, end);
}

void ascend_rows(const AscendCall& call, int64_t begin, int64_t end) {
  call.is_fp64() ? ascend<double>(call, begin, end) : ascend<float>(call, begin, end);
}

}  // namespace TGT_ISA
}  // namespace tgt
