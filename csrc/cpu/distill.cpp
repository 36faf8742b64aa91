// The distill ops on a CPU: checks what needs the data, shares the rows among threads, reduces in a fixed order.
#include "distill.h"

#include "isa.h"
#include "rows.h"
#include "thread_pool.h"

namespace tgt::cpu {
namespace {

template <class Real>
bool all_ones(const void* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (static_cast<const Real*>(values)[i] != Real(1)) return false;
  }
  return true;
}

template <class Stored, class Real>
void scale_rows(const ScaleCall& call, int64_t begin, int64_t end) {
  const Real* factors = static_cast<const Real*>(call.factor);
  for (int64_t i = begin; i < end; ++i) {
    const Real factor = factors[call.factor_per_row ? i : 0];
    Stored* row = reinterpret_cast<Stored*>(call.grad.row(i));
    for (int64_t j = 0; j < call.classes; ++j) row[j] = cast<Stored>(Real(cast<Real>(row[j]) * factor));
  }
}

StatusAt forward(DistillRows call, int threads) {
  const StatusAt status = check_rows(call);
  if (status.status != Status::kOk) return status;
  choose_divisor(call);
  int64_t bad_row = -1;
  call.bad_row = &bad_row;
  parallel_for(
      call.rows, row_grain(call.classes), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().distill_forward(*static_cast<const DistillRows*>(context), begin, end);
      },
      &call);
  if (bad_row >= 0) return {Status::kBadSoftTarget, bad_row};
  call.is_fp64() ? reduce<double>(call) : reduce<float>(call);
  return {};
}

void backward(DistillRows call, int threads) {
  parallel_for(
      call.rows, row_grain(call.classes), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().distill_backward(*static_cast<const DistillRows*>(context), begin, end);
      },
      &call);
}

}  // namespace

StatusAt distill_forward(DistillCall call, int threads) { return forward({call, nullptr}, threads); }

void distill_backward(DistillCall call, int threads) { backward({call, nullptr}, threads); }

StatusAt distill_adjusted_forward(AdjustedCall call, int threads) {
  return forward({call.base, &call.adjust}, threads);
}

void distill_adjusted_backward(AdjustedCall call, int threads) { backward({call.base, &call.adjust}, threads); }

void distill_scale(ScaleCall call, int threads) {
  const bool is_fp64 = call.grad.type == DType::kFloat64;
  const int64_t factors = call.factor_per_row ? call.rows : 1;
  if (is_fp64 ? all_ones<double>(call.factor, factors) : all_ones<float>(call.factor, factors)) return;
  parallel_for(
      call.rows, row_grain(call.classes), threads,
      [](void* context, int64_t begin, int64_t end) {
        const ScaleCall& scale = *static_cast<const ScaleCall*>(context);
        switch (scale.grad.type) {
          case DType::kFloat32:
            return scale_rows<float, float>(scale, begin, end);
          case DType::kFloat64:
            return scale_rows<double, double>(scale, begin, end);
          case DType::kBFloat16:
            return scale_rows<BFloat16, float>(scale, begin, end);
          case DType::kFloat16:
            return scale_rows<Float16, float>(scale, begin, end);
        }
      },
      &call);
}

}  // namespace tgt::cpu
