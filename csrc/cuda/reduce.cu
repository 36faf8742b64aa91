#include "distill_fwd.h"
#include "reduce.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

constexpr int kReduceThreads = 1024;

struct Total {
  double value = 0;
};
struct AddTotals {
  TGT_DEVICE Total operator()(const Total& a, const Total& b) const { return {a.value + b.value}; }
};

// The counted rows, or their weights. One block, so that the order is fixed.
__global__ void TGT_BOUNDS(kReduceThreads, 1)
    distill_count_kernel(const TGT_GRID_CONSTANT DeviceCall d, double* divisor) {
  const BlockTeam team;
  Total mine;
  for (int64_t i = team.thread; i < d.call.rows; i += team.size) {
    const RowHead head = open_row(d, i);
    if (!(head.flags & kDropped)) mine.value += head.weight;
  }
  const Total all = merge_all(team, mine, 0, AddTotals());
  if (team.leads()) *divisor = all.value;
}

template <class Real>
__global__ void TGT_BOUNDS(kReduceThreads, 1)
    distill_reduce_kernel(const Real* row_loss, int64_t rows, const double* divisor_at, double divisor, Real* loss) {
  const BlockTeam team;
  Total mine;
  for (int64_t i = team.thread; i < rows; i += team.size) mine.value += row_loss[i];
  const Total all = merge_all(team, mine, 0, AddTotals());
  if (!team.leads()) return;
  if (divisor_at) divisor = *divisor_at;
  *loss = Real(divisor == 0 ? 0 : all.value);
}

}  // namespace TGT_ISA

namespace {

template <class Real>
cudaError_t launch_distill_reduce(const DeviceCall& d, cudaStream_t stream) {
  return launch(distill_reduce_kernel<Real>, 1, kReduceThreads, kTeamBytes, 1, stream,
                static_cast<const Real*>(d.call.row_loss), d.call.rows, d.call.divisor_at, d.call.divisor,
                static_cast<Real*>(d.call.loss));
}

}  // namespace

Failure choose_divisor(DeviceCall& d, cudaStream_t stream) {
  DistillCall& call = d.call;
  if (static_cast<Reduction>(call.options.reduction) != Reduction::kMean) {
    call.divisor = 1;
    call.divisor_at = nullptr;
  } else if (!call.divisor_at && call.divisor < 0 && !call.weight && !call.target) {
    call.divisor = static_cast<double>(call.rows);
  } else if (!call.divisor_at && call.divisor < 0) {
    const cudaError_t error = launch(distill_count_kernel, 1, kReduceThreads, kTeamBytes, 1, stream, d, call.workspace);
    if (error != cudaSuccess) return {error, "distill_count_kernel"};
    call.divisor_at = call.workspace;
  }
  return {};
}

Failure reduce_rows(const DeviceCall& d, bool is_fp64, cudaStream_t stream) {
  if (static_cast<Reduction>(d.call.options.reduction) == Reduction::kNone) return {};
  const cudaError_t error =
      is_fp64 ? launch_distill_reduce<double>(d, stream) : launch_distill_reduce<float>(d, stream);
  return {error, "distill_reduce_kernel"};
}

}  // namespace tgt::cuda
