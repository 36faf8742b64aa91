// The loss against a top-k teacher on a CPU: checks what needs the data, shares the rows among threads, reduces.
#include "topk.h"

#include <vector>

#include "blocks.h"
#include "isa.h"
#include "rows.h"
#include "thread_pool.h"

namespace tgt::cpu {
namespace {

// The first row that lists a class out of range, or one class twice.
StatusAt check_ids(const TopKCall& call) {
  const TopK& topk = call.topk;
  std::vector<uint64_t> seen((call.base.classes + 63) / 64);  // a bit a class, cleared again after each row
  for (int64_t i = 0; i < call.base.rows; ++i) {
    if (!counts(call.base, i)) continue;
    const int64_t* ids = topk.ids + i * topk.id_stride;
    const auto padding = [&](int64_t j) {
      return read_element(topk.log_probs.row(i), topk.log_probs.type, j) == -HUGE_VAL;
    };
    for (int64_t j = 0; j < topk.entries; ++j) {
      if (padding(j)) continue;
      if (ids[j] < 0 || ids[j] >= call.base.classes) return {Status::kBadId, i};
      uint64_t& word = seen[ids[j] / 64];
      const uint64_t bit = uint64_t{1} << ids[j] % 64;
      if (word & bit) return {Status::kBadId, i};
      word |= bit;
    }
    for (int64_t j = 0; j < topk.entries; ++j) {
      if (ids[j] >= 0 && ids[j] < call.base.classes) seen[ids[j] / 64] = 0;
    }
  }
  return {};
}

}  // namespace

StatusAt topk_forward(TopKCall call, int threads) {
  DistillCall& base = call.base;
  StatusAt status = check_rows(base);
  if (status.status == Status::kOk && base.options.soft_weight != 0) status = check_ids(call);
  if (status.status != Status::kOk) return status;
  choose_divisor(base);
  parallel_for(
      base.rows, row_grain(base.classes), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().topk_forward(*static_cast<const TopKCall*>(context), begin, end);
      },
      &call);
  call.is_fp64() ? reduce<double>(base) : reduce<float>(base);
  return {};
}

void topk_backward(TopKCall call, int threads) {
  parallel_for(
      call.base.rows, row_grain(call.base.classes), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().topk_backward(*static_cast<const TopKCall*>(context), begin, end);
      },
      &call);
}

}  // namespace tgt::cpu
