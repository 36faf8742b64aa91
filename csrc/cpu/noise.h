// Seeded noise in the order of a sample's stream, a vector of blocks at a time.
#pragma once

#include "../common/tokens.h"
#include "simd.h"

namespace tgt {
inline namespace TGT_ISA {

constexpr int kWordLanes = kSimdBytes / 4;

struct Key {
  uint32_t seed_low, seed_high, id_low, id_high, op_step;
};

inline Key key_of(const NoiseKey& noise, int64_t sample) {
  const uint64_t id = static_cast<uint64_t>(noise.ids[sample]);
  return {static_cast<uint32_t>(noise.seed), static_cast<uint32_t>(noise.seed >> 32), static_cast<uint32_t>(id),
          static_cast<uint32_t>(id >> 32) | noise.replica << 16, noise.op << 28 | noise.step};
}

template <class W>
TGT_HD Block<W> philox_words(const Key& key, W block) {
  return philox4x32(Block<W>{block, W{} + key.id_low, W{} + key.id_high, W{} + key.op_step}, key.seed_low,
                    key.seed_high);
}

// Lane i of a vector: i.
TGT_HD VUInt32 lane_numbers() {
  VUInt32 numbers;
  for (int i = 0; i < kWordLanes; ++i) numbers[i] = i;
  return numbers;
}

// Lane i of the four vectors is block i's four numbers: interleaves twice to get them in order.
struct InOrder {
  VInt32 low_half, high_half;  // interleave two vectors: their lower halves, their upper halves

  InOrder() {
    for (int i = 0; i < kWordLanes; ++i) {
      low_half[i] = (i & 1) * kWordLanes + i / 2;
      high_half[i] = low_half[i] + kWordLanes / 2;
    }
  }
  void write(float* to, VFloat x0, VFloat x1, VFloat x2, VFloat x3) const {
    const VFloat even_low = __builtin_shuffle(x0, x2, low_half), even_high = __builtin_shuffle(x0, x2, high_half);
    const VFloat odd_low = __builtin_shuffle(x1, x3, low_half), odd_high = __builtin_shuffle(x1, x3, high_half);
    store(to, __builtin_shuffle(even_low, odd_low, low_half));
    store(to + kWordLanes, __builtin_shuffle(even_low, odd_low, high_half));
    store(to + 2 * kWordLanes, __builtin_shuffle(even_high, odd_high, low_half));
    store(to + 3 * kWordLanes, __builtin_shuffle(even_high, odd_high, high_half));
  }
};

// Gumbel numbers of `count` classes, from a block of the stream on. Writes whole vectors: `to` needs room for count
// rounded up to 4 * kWordLanes.
inline void draw_gumbels(const Key& key, uint32_t block, int count, float* to) {
  const InOrder in_order;
  const VUInt32 lanes = lane_numbers();
  for (int done = 0; done < count; done += 4 * kWordLanes) {
    const Block<VUInt32> w = philox_words(key, lanes + (block + static_cast<uint32_t>(done / 4)));
    in_order.write(to + done, gumbel<VFloat>(w.x0), gumbel<VFloat>(w.x1), gumbel<VFloat>(w.x2), gumbel<VFloat>(w.x3));
  }
}

}  // namespace TGT_ISA
}  // namespace tgt
