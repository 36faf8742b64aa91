// The distill ops on a CPU: checks what needs the data, shares the rows among threads, reduces in a fixed order.
#include "distill.h"

#include "isa.h"
#include "thread_pool.h"

namespace tgt::cpu {
namespace {

constexpr int64_t kElementsPerThread = 1 << 15;  // below it a thread costs more than it brings

int64_t row_grain(int64_t classes) { return kElementsPerThread / (classes + 1) + 1; }

bool counts(const DistillCall& call, int64_t i) {
  return !(call.weight && call.weight[i] == 0) && !(call.target && call.target[i] == call.options.ignore_index);
}

StatusAt check(const DistillCall& call) {
  for (int64_t i = 0; i < call.rows; ++i) {
    if (call.weight && !(call.weight[i] >= 0 && call.weight[i] < HUGE_VAL)) return {Status::kBadWeight, i};
    if (!call.target || !counts(call, i) || call.target[i] == call.options.unlabeled_index) continue;
    if (call.target[i] < 0 || call.target[i] >= call.classes) return {Status::kBadTarget, i};
  }
  return {};
}

// The divisor of the mean: the counted rows, or their weights.
double counted(const DistillCall& call) {
  double sum = 0;
  for (int64_t i = 0; i < call.rows; ++i) {
    if (counts(call, i)) sum += call.weight ? call.weight[i] : 1;
  }
  return sum;
}

template <class Real>
void reduce(const DistillCall& call, void* loss) {
  double sum = 0;
  for (int64_t i = 0; i < call.rows; ++i) sum += static_cast<const Real*>(call.row_loss)[i];
  *static_cast<Real*>(loss) = Real(call.divisor == 0 ? 0 : sum / call.divisor);
}

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
    for (int64_t j = 0; j < call.classes; ++j) row[j] = narrow<Stored>(Real(widen<Real>(row[j]) * factor));
  }
}

}  // namespace

StatusAt distill_forward(DistillCall call, double normalizer, void* loss, int threads) {
  const StatusAt status = check(call);
  if (status.status != Status::kOk) return status;
  const auto reduction = static_cast<Reduction>(call.options.reduction);
  if (reduction == Reduction::kMean) call.divisor = normalizer >= 0 ? normalizer : counted(call);
  parallel_for(
      call.rows, row_grain(call.classes), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().distill_forward(*static_cast<const DistillCall*>(context), begin, end);
      },
      &call);
  if (reduction != Reduction::kNone) call.wide() ? reduce<double>(call, loss) : reduce<float>(call, loss);
  return {};
}

void distill_backward(DistillCall call, int threads) {
  parallel_for(
      call.rows, row_grain(call.classes), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().distill_backward(*static_cast<const DistillCall*>(context), begin, end);
      },
      &call);
}

void distill_scale(ScaleCall call, int threads) {
  const bool wide = call.grad.type == DType::kFloat64;
  const int64_t factors = call.factor_per_row ? call.rows : 1;
  if (wide ? all_ones<double>(call.factor, factors) : all_ones<float>(call.factor, factors)) return;
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
