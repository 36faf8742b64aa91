#include "gpu.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#include "races.h"

namespace tgt::emulator {
namespace {

constexpr int64_t kStack = 128 << 10;
constexpr int kWarp = 32;
constexpr int kExchange = 128;  // bytes a lane may exchange at once

struct Fiber;

// Releases its fibers when as many have arrived as are alive.
struct Barrier {
  int alive = 0;
  int arrived = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  int turn = 0;
  alignas(16) unsigned char slots[2][kWarp][kExchange];
};

struct Fiber {
  Place place;
  Barrier* block = nullptr;
  Barrier* cluster = nullptr;
  Warp* warp = nullptr;
  int turn = 0;
  bool cluster_released = false;  // between arrive and wait
  bool waits_for_cluster = false;
  bool started = false, done = false;
  jmp_buf context;
  ucontext_t first;
};

std::deque<Fiber*> runnable;
Fiber* current = nullptr;
int64_t idle = 0;
jmp_buf scheduler;
const std::function<void()>* kernel_body = nullptr;

void pause() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

void release_if_complete(Barrier& barrier) {
  if (barrier.arrived < barrier.alive || barrier.arrived == 0) return;
  barrier.arrived = 0;
  for (Fiber* fiber : barrier.waiting) runnable.push_back(fiber);
  barrier.waiting.clear();
}

void wait_at(Barrier& barrier) {
  ++barrier.arrived;
  barrier.waiting.push_back(current);
  release_if_complete(barrier);
  pause();
}

// The cluster's barrier is split: arriving does not stop a thread, waiting does until all have arrived.
struct ClusterBarrier : Barrier {
  std::vector<Fiber*> members;  // that have arrived
};

void release_cluster_if_complete(ClusterBarrier& barrier) {
  if (barrier.arrived < barrier.alive || barrier.arrived == 0) return;
  barrier.arrived = 0;
  for (Fiber* fiber : barrier.members) {
    fiber->cluster_released = true;
    if (fiber->waits_for_cluster) runnable.push_back(fiber);
  }
  barrier.members.clear();
}

void leave(Fiber* fiber) {
  fiber->done = true;
  --fiber->warp->barrier.alive;
  --fiber->block->alive;
  --fiber->cluster->alive;
  release_if_complete(fiber->warp->barrier);
  release_if_complete(*fiber->block);
  release_cluster_if_complete(*static_cast<ClusterBarrier*>(fiber->cluster));
}

void fiber_main() {
  (*kernel_body)();
  leave(current);
  _longjmp(scheduler, 1);
}

// Not inlined, like prepare: its frame is where jumps return to.
__attribute__((noinline)) void resume(Fiber* fiber) {
  current = fiber;
  here = &fiber->place;
  set_accessing(here, here->block / here->ranks);
  if (_setjmp(scheduler) != 0) return set_accessing(nullptr, 0);
  if (fiber->started) _longjmp(fiber->context, 1);
  fiber->started = true;
  setcontext(&fiber->first);
}

// Memory that stays for the next launch.
unsigned char* stacks(int64_t count) {
  static std::unique_ptr<unsigned char[]> memory;
  static int64_t held = 0;
  if (held < count) {
    memory.reset(new unsigned char[count * kStack]);  // not initialised: pages are touched when used
    held = count;
    ignore_accesses(memory.get(), count * kStack);
  }
  return memory.get();
}

__attribute__((noinline)) void prepare(Fiber& fiber, unsigned char* stack) {
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = stack;
  fiber.first.uc_stack.ss_size = kStack;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, fiber_main, 0);
}

bool run_cluster(int64_t first_block, int64_t blocks, int threads, int shared_bytes, int ranks) {
  const int64_t shared_size = (shared_bytes + 127) / 128 * 128;
  std::vector<unsigned char> shared(shared_size * ranks + 128, 0xee);  // garbage, as on a device
  unsigned char* base = shared.data() + (128 - reinterpret_cast<uintptr_t>(shared.data()) % 128) % 128;
  const int warps = (threads + kWarp - 1) / kWarp;
  std::vector<Fiber> fibers(int64_t(threads) * ranks);
  std::vector<Barrier> block_barriers(ranks);
  std::unique_ptr<Warp[]> all_warps(new Warp[int64_t(warps) * ranks]);
  ClusterBarrier cluster;
  cluster.alive = threads * ranks;
  unsigned char* stack = stacks(fibers.size());
  for (int rank = 0; rank < ranks; ++rank) {
    block_barriers[rank].alive = threads;
    for (int thread = 0; thread < threads; ++thread) {
      const int64_t at = int64_t(rank) * threads + thread;
      Fiber& fiber = fibers[at];
      fiber.place = {thread, threads,    rank, ranks, first_block + rank, blocks, base + rank * shared_size,
                     base,   shared_size};
      fiber.block = &block_barriers[rank];
      fiber.cluster = &cluster;
      fiber.warp = &all_warps[int64_t(rank) * warps + thread / kWarp];
      ++fiber.warp->barrier.alive;
      prepare(fiber, stack + at * kStack);
      runnable.push_back(&fiber);
    }
  }
  while (!runnable.empty()) {
    Fiber* next = runnable.front();
    runnable.pop_front();
    resume(next);
  }
  forget_accesses(base, shared_size * ranks);
  return cluster.alive == 0;
}

}  // namespace

const Place* here = nullptr;

void block_barrier() {
  wait_at(*current->block);
  ++current->place.block_barriers;
}
void warp_barrier() {
  wait_at(current->warp->barrier);
  ++current->place.warp_barriers;
}

void let_others_run() {
  if (++idle > 1 << 24) abort();  // nobody is left who could do what is waited for
  runnable.push_back(current);
  pause();
}

void cluster_arrive(bool publishes) {
  ClusterBarrier& barrier = *static_cast<ClusterBarrier*>(current->cluster);
  current->cluster_released = false;
  current->waits_for_cluster = false;
  ++current->place.arrivals;
  if (publishes) arrives_and_publishes(current->place);
  ++barrier.arrived;
  barrier.members.push_back(current);
  release_cluster_if_complete(barrier);
}

void cluster_wait() {
  if (!current->cluster_released) {
    current->waits_for_cluster = true;
    pause();
  }
  ++current->place.waits;
}

void exchange(const void* mine, void* partner, int bytes, int mask) {
  if (bytes > kExchange) abort();
  Warp& warp = *current->warp;
  const int lane = current->place.thread % kWarp;
  // Two sets of slots in turn: a lane that runs ahead cannot overwrite what a slower one has yet to read.
  auto& slots = warp.slots[current->turn ^= 1];
  memcpy(slots[lane], mine, bytes);
  wait_at(warp.barrier);  // for all to be there; it orders no memory
  memcpy(partner, slots[lane ^ mask], bytes);
}

bool run(const std::function<void()>& kernel, int64_t blocks, int threads, int shared_bytes, int cluster) {
  kernel_body = &kernel;
  idle = 0;
  runnable.clear();
  forget_accesses();
  for (int64_t block = 0; block < blocks; block += cluster) {
    if (!run_cluster(block, blocks, threads, shared_bytes, cluster)) return false;
  }
  return true;
}

}  // namespace tgt::emulator

cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10
           : attribute == cudaDevAttrComputeCapabilityMajor     ? 9
                                                                : 2;
  return cudaSuccess;
}
