// The listwise op on a CPU: shares the rows among threads.
#include "listwise.h"

#include "isa.h"
#include "thread_pool.h"

namespace tgt::cpu {
namespace {

constexpr int64_t kClassesPerThread = 1 << 12;  // below it a thread costs more than it brings

}  // namespace

void listwise(ListwiseCall call, int threads) {
  parallel_for(
      call.rows, kClassesPerThread / (call.classes + 1) + 1, threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().listwise(*static_cast<const ListwiseCall*>(context), begin, end);
      },
      &call);
}

}  // namespace tgt::cpu
