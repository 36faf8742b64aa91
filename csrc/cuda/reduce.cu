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
cudaError_t launch_distill_reduce(const DeviceCall& d, void* loss, cudaStream_t stream) {
  return launch(distill_reduce_kernel<Real>, 1, kReduceThreads, kTeamBytes, 1, stream,
                static_cast<const Real*>(d.call.row_loss), d.call.rows, d.divisor_at, d.call.divisor,
                static_cast<Real*>(loss));
}

}  // namespace

Failure choose_divisor(DeviceCall& d, const double* divisor_at, double divisor, double* workspace,
                       cudaStream_t stream) {
  if (static_cast<Reduction>(d.call.options.reduction) != Reduction::kMean) return {};
  if (divisor_at) {
    d.divisor_at = divisor_at;
  } else if (divisor >= 0) {
    d.call.divisor = divisor;
  } else if (!d.call.weight && !d.call.target) {
    d.call.divisor = static_cast<double>(d.call.rows);
  } else {
    const cudaError_t error = launch(distill_count_kernel, 1, kReduceThreads, kTeamBytes, 1, stream, d, workspace);
    if (error != cudaSuccess) return {error, "distill_count_kernel"};
    d.divisor_at = workspace;
  }
  return {};
}

Failure reduce_rows(const DeviceCall& d, bool is_fp64, void* loss, cudaStream_t stream) {
  if (static_cast<Reduction>(d.call.options.reduction) == Reduction::kNone) return {};
  const cudaError_t error =
      is_fp64 ? launch_distill_reduce<double>(d, loss, stream) : launch_distill_reduce<float>(d, loss, stream);
  return {error, "distill_reduce_kernel"};
}

}  // namespace tgt::cuda
