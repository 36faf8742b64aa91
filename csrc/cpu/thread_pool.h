// Work shared among threads: those of the OpenMP runtime that the process has, found at run time and never linked, else
// a pool of the core's own, which also serves forked children, where OpenMP hangs.
#pragma once

#include <cstdint>

namespace tgt::cpu {

// Calls body(context, begin, end) for disjoint ranges that cover [0, count), on up to `threads` threads, the caller's
// among them. A range is at least `grain` long. Ranges are handed out as threads become free: the body must give the
// same result for any division. What it throws, on whichever thread, is thrown here once all threads have stopped. Runs
// on the calling thread alone when the pool is busy with another caller.
void parallel_for(int64_t count, int64_t grain, int threads, void (*body)(void* context, int64_t begin, int64_t end),
                  void* context);

// To be called once, when the core is loaded: a child that is forked from then on keeps clear of OpenMP.
void watch_forks();

// To be called where the process is known to be a forked child already.
void avoid_openmp();

}  // namespace tgt::cpu
