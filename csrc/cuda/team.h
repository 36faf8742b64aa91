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
constexpr int kMostTold = 320;    // bytes that the first warp then tells the others
constexpr int kStageBytes = (kMostWarps + kMostBlocks) * kMostPartial + kMostTold;
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
  TGT_DEVICE bool in_first_warp() const { return true; }
  TGT_DEVICE void begin() const {}
  TGT_DEVICE void barrier() const { warp_barrier(); }

  // Merges what warps hold already.
  template <class T, class Merge>
  TGT_DEVICE T merge_warps(T value, int, Merge) const {
    return value;
  }

  template <class Told, class T, class Widen, class Merge, class Make>
  TGT_DEVICE Told tell(const T& of_warp, int, Widen widen, Merge, Make make) const {
    return make(widen(of_warp));
  }
};

struct BlockTeam {
  static constexpr bool kIsWarp = false;
  int thread, size;
  int rank, ranks;

  TGT_DEVICE BlockTeam()
      : thread(thread_in_block()), size(threads_in_block()), rank(cluster_rank()), ranks(cluster_size()) {}
  TGT_DEVICE bool leads() const { return thread == 0 && rank == 0; }
  TGT_DEVICE bool in_first_warp() const { return thread < kWarp; }
  TGT_DEVICE void barrier() const { block_barrier(); }
  // What the first warp of the block makes.
  template <class Told, class Make>
  TGT_DEVICE const Told& tell_block(Make make) const {
    static_assert(sizeof(Told) <= kMostTold, "fits its place");
    Told& told = *reinterpret_cast<Told*>(shared_memory() + kStages * kStageBytes - kMostTold);
    if (thread < kWarp) {
      const Told made = make();
      if (thread == 0) told = made;
    }
    block_barrier();
    return told;
  }
  // Blocks of a cluster may only write to each other once all have started: they say so here, and wait in the first
  // reduction.
  TGT_DEVICE void begin() const {
    if (ranks > 1) cluster_arrive_relaxed();
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
    // The other warps publish nothing by themselves: what they did before the block's barrier is ordered by the first
    // warp's arrival.
    warp == 0 ? cluster_arrive() : cluster_arrive_relaxed();
    cluster_wait();
    value = T{};
    if (lane < ranks) memcpy(&value, slots + lane * kMostPartial, sizeof(T));
    return merge_lanes<kWarp / 2>(value, merge);
  }

  // What the first warp makes of all that the warps hold, in shared memory, where it stays. One warp merges, and
  // computes what is the same for all: the others spend few instructions. `make` is run by a whole warp, whose lanes
  // all have the sum; what its first lane returns is told.
  template <class Told, class T, class Widen, class Merge, class Make>
  TGT_DEVICE const Told& tell(const T& of_warp, int stage, Widen widen, Merge merge, Make make) const {
    using Wide = decltype(widen(of_warp));
    static_assert(sizeof(T) <= kMostPartial && sizeof(Wide) <= kMostPartial && sizeof(Wide) % 8 == 0, "fits its place");
    static_assert(sizeof(Told) <= kMostTold, "fits its place");
    unsigned char* memory = shared_memory() + stage * kStageBytes;
    unsigned char* slots = memory + kMostWarps * kMostPartial;
    Told& told = *reinterpret_cast<Told*>(slots + kMostBlocks * kMostPartial);
    const int lane = thread % kWarp, warp = thread / kWarp, warps = size / kWarp;
    if (lane == 0) *reinterpret_cast<T*>(memory + warp * kMostPartial) = of_warp;
    block_barrier();
    if (warp == 0) {
      int places = 1;  // a power of 2: lanes beyond hold what the first have
      while (places < warps) places *= 2;
      const int place = lane % places;
      Wide value = place < warps ? widen(*reinterpret_cast<const T*>(memory + place * kMostPartial)) : Wide{};
      TGT_UNROLL
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        if (mask < places) value = merge(value, shuffle_xor(value, mask));
      }
      if (ranks > 1) value = exchange(value, stage, slots, merge);
      const Told made = make(value);
      if (lane == 0) told = made;
    } else if (ranks > 1) {
      if (stage == 0) cluster_wait();
      cluster_arrive_relaxed();
      cluster_wait();
    }
    block_barrier();
    return told;
  }

 private:
  // Merges what blocks hold, by their first warps. All arrivals that publish nothing are relaxed; this one is a release
  // for two reasons. The stores into the other blocks are to be seen after the wait. And it is the only order between a
  // block's reads of its row in global memory, by whichever warp (a label's logit is in any block's share), and the
  // gradients that another block then writes over it. st.async would complete on a barrier in the memory of the block
  // that is written to, and order the first alone; besides, those barriers would have to be made and published by a
  // release in begin(), and a block could not leave before all that it is sent has come. A round of the cluster's
  // barrier is what that costs; the copies of three blocks a multiprocessor go on meanwhile.
  template <class T, class Merge>
  TGT_DEVICE T exchange(T value, int stage, unsigned char* slots, Merge merge) const {
    if (stage == 0) cluster_wait();
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
    const int place = thread % kMostBlocks;
    if (place < ranks) memcpy(&value, slots + place * kMostPartial, sizeof(T));
    return merge_lanes<kMostBlocks / 2>(value, merge);
  }
};

struct Same {  // for what is merged as it is
  template <class T>
  TGT_DEVICE T operator()(const T& value) const {
    return value;
  }
};

template <class Team, class T, class Merge>
TGT_DEVICE T merge_all(const Team& team, T value, int stage, Merge merge) {
  return team.merge_warps(merge_lanes<kWarp / 2>(value, merge), stage, merge);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
