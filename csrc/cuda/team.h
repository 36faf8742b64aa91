// The threads that share a row: a warp, a block, or a cluster of blocks; and their reductions, in a fixed tree.
#pragma once

#include "device.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

constexpr int kWarp = 32;
constexpr int kMostWarps = 32;
constexpr int kMostBlocks = 8;    // of a cluster, on every chip that has clusters
constexpr int kMostPartial = 64;  // bytes a thread brings to a reduction
constexpr int kStages = 3;        // reductions of a kernel: each has memory of its own, so none waits for the last
constexpr int kStageBytes = (kMostWarps + kMostBlocks) * kMostPartial;
constexpr int kTeamBytes = kStages * kStageBytes;  // at the start of shared memory

// T{} is the neutral element of `merge`, which is commutative: every thread then ends with the same bits.
template <int kFirst, class T, class Merge>
TGT_DEVICE T merge_lanes(T value, Merge merge) {
  TGT_UNROLL
  for (int mask = kFirst; mask > 0; mask /= 2) value = merge(value, shuffle_xor(value, mask));
  return value;
}

struct WarpTeam {
  static constexpr bool kIsWarp = true;
  int thread, size;
  int rank, ranks;  // of the block in its cluster

  TGT_DEVICE WarpTeam() : thread(thread_in_block() % kWarp), size(kWarp), rank(0), ranks(1) {}
  TGT_DEVICE bool leads() const { return thread == 0; }
  TGT_DEVICE void begin() const {}
  TGT_DEVICE void barrier() const { warp_barrier(); }

  // Merges what warps hold already.
  template <class T, class Merge>
  TGT_DEVICE T merge_warps(T value, int, Merge) const {
    return value;
  }
};

struct BlockTeam {
  static constexpr bool kIsWarp = false;
  int thread, size;
  int rank, ranks;

  TGT_DEVICE BlockTeam()
      : thread(thread_in_block()), size(threads_in_block()), rank(cluster_rank()), ranks(cluster_size()) {}
  TGT_DEVICE bool leads() const { return thread == 0 && rank == 0; }
  TGT_DEVICE void barrier() const { block_barrier(); }
  // Blocks of a cluster may only write to each other once all have started: they say so here, and wait in the first
  // reduction.
  TGT_DEVICE void begin() const {
    if (ranks > 1) cluster_arrive();
  }

  template <class T, class Merge>
  TGT_DEVICE T merge_warps(T value, int stage, Merge merge) const {
    static_assert(sizeof(T) <= kMostPartial && sizeof(T) % 8 == 0, "fits its place");
    unsigned char* memory = shared_memory() + stage * kStageBytes;
    const int lane = thread % kWarp, warp = thread / kWarp, warps = size / kWarp;
    if (lane == 0) memcpy(memory + warp * kMostPartial, &value, sizeof(T));
    block_barrier();
    value = T{};
    if (lane < warps) memcpy(&value, memory + lane * kMostPartial, sizeof(T));
    value = merge_lanes<kWarp / 2>(value, merge);
    if (ranks == 1) return value;
    if (stage == 0) cluster_wait();
    unsigned char* slots = memory + kMostWarps * kMostPartial;
    if (thread < ranks) {  // thread k hands the block's share to block k
      TGT_UNROLL
      for (int i = 0; i < int(sizeof(T) / 8); ++i) {
        uint64_t word;
        memcpy(&word, reinterpret_cast<const unsigned char*>(&value) + 8 * i, 8);
        store_remote(slots + rank * kMostPartial + 8 * i, thread, word);
      }
    }
    cluster_arrive();
    cluster_wait();
    value = T{};
    if (lane < ranks) memcpy(&value, slots + lane * kMostPartial, sizeof(T));
    return merge_lanes<kWarp / 2>(value, merge);
  }
};

template <class Team, class T, class Merge>
TGT_DEVICE T merge_all(const Team& team, T value, int stage, Merge merge) {
  return team.merge_warps(merge_lanes<kWarp / 2>(value, merge), stage, merge);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
