#include "races.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "gpu.h"

namespace tgt::emulator {
namespace {

constexpr int kWarp = 32;
constexpr int kMostReports = 10;

// When a thread did something: how many barriers of each kind it had left behind by then. A barrier is passed by all
// threads that share it, so these numbers alone say whether one lies between two accesses. A shuffle is no barrier: it
// hands over registers and orders no memory.
struct Stamp {
  int64_t cluster = -1;
  int rank = 0, warp = 0, thread = 0, warp_barriers = 0, block_barriers = 0, arrivals = 0;
};

constexpr int kSeveral = -1;  // in place of a thread: more than one of the warp

struct Cell {
  Stamp written;
  std::vector<Stamp> read;  // since then, the last time of each warp
};

// Of each byte, in lines of 64.
constexpr uintptr_t kLine = 64;
struct Line {
  Cell cells[kLine];
};
std::unordered_map<uintptr_t, Line> lines;
uintptr_t stacks_begin = 0, stacks_end = 0;
const Place* accessing = nullptr;
int64_t cluster_now = 0;
int reported = 0;
std::string reports;

// An arrival of a block's threads at the barrier of its cluster: whose warps' publish what they did before, and how
// many barriers of the block lay behind one of these, which publishes what any thread did before them.
struct Published {
  int block_barriers = 0;
  std::vector<int> warps;
};
std::vector<std::vector<Published>> published;  // in this cluster, by block and by the arrival's number

bool is_published(const Stamp& before, int arrival) {
  if (before.rank >= static_cast<int>(published.size())) return false;
  const std::vector<Published>& of_block = published[before.rank];
  if (arrival >= static_cast<int>(of_block.size())) return false;
  const Published& one = of_block[arrival];
  return one.block_barriers > before.block_barriers ||
         std::find(one.warps.begin(), one.warps.end(), before.warp) != one.warps.end();
}

bool same_warp(const Stamp& a, const Stamp& b) {
  return a.cluster == b.cluster && a.rank == b.rank && a.warp == b.warp;
}
bool same_thread(const Stamp& a, const Stamp& b) { return same_warp(a, b) && a.thread == b.thread; }

// Whether something lies between what was done before and what the running thread does now.
bool ordered(const Stamp& before, const Stamp& now, int waits) {
  if (before.cluster < 0 || same_thread(before, now)) return true;
  if (before.cluster != now.cluster) return false;
  for (int arrival = before.arrivals + 1; arrival <= waits; ++arrival) {
    if (is_published(before, arrival)) return true;
  }
  if (before.rank != now.rank) return false;
  if (now.block_barriers > before.block_barriers) return true;
  return before.warp == now.warp && now.warp_barriers > before.warp_barriers;
}

// Threads of a warp that read with no barrier between them are one to what comes later, but for each of themselves.
void add_read(std::vector<Stamp>& read, const Stamp& now) {
  for (Stamp& stamp : read) {
    if (!same_warp(stamp, now)) continue;
    if (now.warp_barriers > stamp.warp_barriers || now.block_barriers > stamp.block_barriers) {
      stamp = now;
      return;
    }
    if (now.arrivals == stamp.arrivals) {
      if (now.thread != stamp.thread) stamp.thread = kSeveral;
      return;
    }
  }
  read.push_back(now);
}

std::string name(const Stamp& s) {
  const std::string thread =
      s.thread == kSeveral ? "several of warp " + std::to_string(s.warp) : "thread " + std::to_string(s.thread);
  return thread + " of block " + std::to_string(s.rank) + " of cluster " + std::to_string(s.cluster);
}

void report(const char* what, const Stamp& now, const char* over, const Stamp& before, uintptr_t at) {
  if (++reported > kMostReports) return;
  const int64_t shared =
      static_cast<int64_t>(at) - static_cast<int64_t>(reinterpret_cast<uintptr_t>(accessing->shared));
  const bool is_shared = shared >= 0 && shared < accessing->shared_bytes;
  reports += name(now) + what + (is_shared ? "shared memory at " + std::to_string(shared) : "global memory") + over +
             name(before) + "\n";
}

void note(const void* address, int64_t bytes, bool writes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (!accessing || (begin >= stacks_begin && begin < stacks_end)) return;
  const Place& p = *accessing;
  const Stamp now{cluster_now, p.rank, p.thread / kWarp, p.thread, p.warp_barriers, p.block_barriers, p.arrivals};
  Line* line = nullptr;
  bool told = false;  // of one byte, for all of them
  for (uintptr_t at = begin; at < begin + static_cast<uintptr_t>(bytes); ++at) {
    if (!line || at % kLine == 0) line = &lines[at / kLine];
    Cell& cell = line->cells[at % kLine];
    if (!told && !ordered(cell.written, now, p.waits)) {
      told = true;
      report(writes ? " writes to " : " reads ", now, ", not ordered with a write of ", cell.written, at);
    }
    if (!writes) {
      add_read(cell.read, now);
      continue;
    }
    for (const Stamp& stamp : cell.read) {
      if (told || ordered(stamp, now, p.waits)) continue;
      told = true;
      report(" writes to ", now, ", not ordered with a read of ", stamp, at);
    }
    cell.read.clear();
    cell.written = now;
  }
}

}  // namespace

void forget_accesses() {
  lines.clear();
  published.clear();
}
void forget_accesses(const void* from, int64_t bytes) {
  if (lines.empty()) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from), end = begin + static_cast<uintptr_t>(bytes);
  for (uintptr_t at = begin / kLine; at * kLine < end; ++at) lines.erase(at);
}
void ignore_accesses(const void* from, int64_t bytes) {
  stacks_begin = reinterpret_cast<uintptr_t>(from);
  stacks_end = stacks_begin + static_cast<uintptr_t>(bytes);
}
void set_accessing(const Place* thread, int64_t cluster) {
  accessing = thread;
  if (!thread) return;
  if (cluster != cluster_now) published.clear();
  cluster_now = cluster;
}
void arrives_and_publishes(const Place& thread) {
  if (published.size() < static_cast<size_t>(thread.ranks)) published.resize(thread.ranks);
  std::vector<Published>& of_block = published[thread.rank];
  if (of_block.size() <= static_cast<size_t>(thread.arrivals)) of_block.resize(thread.arrivals + 1);
  Published& one = of_block[thread.arrivals];
  one.block_barriers = std::max(one.block_barriers, thread.block_barriers);
  const int warp = thread.thread / kWarp;
  if (std::find(one.warps.begin(), one.warps.end(), warp) == one.warps.end()) one.warps.push_back(warp);
}
std::string take_races() {
  reported = 0;
  std::string taken;
  taken.swap(reports);
  return taken;
}

}  // namespace tgt::emulator

// What the compiler calls. Names that it might call and that are missing here fail when the library is loaded.
#define TGT_ACCESS(bytes)                                                                \
  void __tsan_read##bytes(void* at) { tgt::emulator::note(at, bytes, false); }           \
  void __tsan_write##bytes(void* at) { tgt::emulator::note(at, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* at) { tgt::emulator::note(at, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* at) { tgt::emulator::note(at, bytes, true); }
#define TGT_ATOMIC(bits)                                                                   \
  int##bits##_t __tsan_atomic##bits##_load(const volatile int##bits##_t* at, int) {        \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                          \
  }                                                                                        \
  void __tsan_atomic##bits##_store(volatile int##bits##_t* at, int##bits##_t value, int) { \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                         \
  }
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
TGT_ACCESS(1)
TGT_ACCESS(2)
TGT_ACCESS(4)
TGT_ACCESS(8)
TGT_ACCESS(16)
TGT_ATOMIC(8)
TGT_ATOMIC(32)
TGT_ATOMIC(64)
void __tsan_read_range(void* at, uintptr_t bytes) { tgt::emulator::note(at, static_cast<int64_t>(bytes), false); }
void __tsan_write_range(void* at, uintptr_t bytes) { tgt::emulator::note(at, static_cast<int64_t>(bytes), true); }
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void* __tsan_memcpy(void* to, const void* from, uintptr_t bytes) {  // of clang alone; gcc leaves large copies out
  __tsan_read_range(const_cast<void*>(from), bytes);
  __tsan_write_range(to, bytes);
  return __builtin_memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, uintptr_t bytes) {
  __tsan_write_range(to, bytes);
  return __builtin_memset(to, value, bytes);
}
}
