// The calls of the ops from what Python hands over, the same for a CPU and for a device.
#pragma once

#include "arguments.h"

namespace tgt::bind {

// What forward and backward share.
inline DistillCall distill_call(const DistillOptions& options, int64_t rows, int64_t classes,
                                const MatrixTuple& student, const MatrixTuple& teacher, uintptr_t target,
                                uintptr_t row_state, const MatrixTuple& d_student, const MatrixTuple& d_teacher,
                                const MatrixTuple& soft_target = {}) {
  DistillCall call;
  call.options = options;
  call.rows = rows;
  call.classes = classes;
  call.student = matrix(student);
  call.teacher = matrix(teacher);
  call.target = pointer<int64_t>(target);
  call.soft_target = matrix(soft_target);
  call.row_state = pointer<RowState>(row_state);
  call.d_student = matrix(d_student);
  call.d_teacher = matrix(d_teacher);
  return call;
}

inline TopKCall topk_call(const DistillOptions& options, int64_t rows, int64_t classes, const MatrixTuple& student,
                          const TopKTuple& from, uintptr_t target, uintptr_t row_state, const MatrixTuple& d_student) {
  TopKCall call;
  call.base = distill_call(options, rows, classes, student, {}, target, 0, d_student, {});
  call.topk = topk_of(from);
  call.row_state = pointer<TopKState>(row_state);
  return call;
}

inline void add_rows(DistillCall& call, uintptr_t weight, uintptr_t row_loss) {
  call.weight = pointer<double>(weight);
  call.row_loss = pointer<void>(row_loss);
}

inline void add_upstream(DistillCall& call, uintptr_t upstream, bool per_row) {
  call.upstream = pointer<void>(upstream);
  call.upstream_per_row = per_row;
}

inline PerturbCall perturb_call(int64_t samples, int64_t size, int type, uintptr_t z, uintptr_t out,
                                const FactorTuple& sigma, uintptr_t scale, const NoiseTuple& key, double truncation,
                                double sphere_radius) {
  PerturbCall call;
  call.samples = samples;
  call.size = size;
  call.type = static_cast<DType>(type);
  call.z = pointer<void>(z);
  call.out = pointer<void>(out);
  call.sigma = factor(sigma);
  call.scale = pointer<void>(scale);
  call.noise = noise(key);
  call.noise.truncation = truncation;
  call.sphere_radius = sphere_radius;
  return call;
}

inline AscendCall ascend_call(int64_t samples, int64_t size, const std::tuple<int, int, int>& types, uintptr_t z,
                              uintptr_t grad, uintptr_t anchor, uintptr_t out, const FactorTuple& step_size,
                              const FactorTuple& sigma, const FactorTuple& radius, uintptr_t scale, int norm,
                              int radius_norm, const NoiseTuple& key) {
  AscendCall call;
  call.samples = samples;
  call.size = size;
  call.z_type = static_cast<DType>(std::get<0>(types));
  call.grad_type = static_cast<DType>(std::get<1>(types));
  call.anchor_type = static_cast<DType>(std::get<2>(types));
  call.z = pointer<void>(z);
  call.grad = pointer<void>(grad);
  call.anchor = pointer<void>(anchor);
  call.out = pointer<void>(out);
  call.step_size = factor(step_size);
  call.sigma = factor(sigma);
  call.radius = factor(radius);
  call.scale = pointer<void>(scale);
  call.norm = static_cast<StepNorm>(norm);
  call.radius_norm = static_cast<RadiusNorm>(radius_norm);
  call.noise = noise(key);
  return call;
}

}  // namespace tgt::bind
