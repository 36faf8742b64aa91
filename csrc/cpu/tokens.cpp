// The tokens ops on a CPU: shares the rows among threads.
#include "tokens.h"

#include "isa.h"
#include "thread_pool.h"

namespace tgt::cpu {
namespace {

constexpr int64_t kLogitsPerThread = 1 << 13;  // below it a thread costs more than it brings

int64_t grain(int64_t classes) { return kLogitsPerThread / (classes + 1) + 1; }

}  // namespace

void sample(SampleCall call, int threads) {
  parallel_for(
      call.rows, grain(call.classes), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().sample(*static_cast<const SampleCall*>(context), begin, end);
      },
      &call);
}

void soft_forward(SoftCall call, int threads) {
  parallel_for(
      call.rows, grain(call.classes), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().soft_forward(*static_cast<const SoftCall*>(context), begin, end);
      },
      &call);
}

void soft_backward(SoftCall call, int threads) {
  parallel_for(
      call.rows, grain(call.classes), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().soft_backward(*static_cast<const SoftCall*>(context), begin, end);
      },
      &call);
}

}  // namespace tgt::cpu
