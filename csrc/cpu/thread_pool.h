// Threads of the core's own, so that it neither links OpenMP nor hangs in a forked child.
#pragma once

#include <cstdint>

namespace tgt::cpu {

// Calls body(context, begin, end) for disjoint ranges that cover [0, count), on up to `threads` threads, the caller's
// among them. A range is at least `grain` long. Ranges are handed out as threads become free: the body must give the
// same result for any division. Runs on the calling thread alone when the pool is busy with another caller.
void parallel_for(int64_t count, int64_t grain, int threads, void (*body)(void* context, int64_t begin, int64_t end),
                  void* context);

}  // namespace tgt::cpu
