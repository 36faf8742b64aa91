// The key of a sample's noise on a device.
#pragma once

#include "api.h"
#include "device.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

struct Key {
  uint32_t seed_low, seed_high, id_low, id_high, op_step;
};

TGT_DEVICE Key key_of(const NoiseKey& noise, const DeviceKey& device, int64_t sample) {
  const uint64_t seed = device.seed ? static_cast<uint64_t>(*device.seed) : noise.seed;
  const uint32_t step = device.step ? static_cast<uint32_t>(*device.step) & 0x0fffffffu : noise.step;
  const uint64_t id = static_cast<uint64_t>(noise.ids[sample]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(id),
          static_cast<uint32_t>(id >> 32) | noise.replica << 16, noise.op << 28 | step};
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
