// How the adjustments of a call travel to the kernels.
#pragma once

#include "../common/adjust.h"

namespace tgt {

// The rows of a call as the kernels take them.
struct DistillRows : DistillCall {
  const Adjustments* adjust = nullptr;

  DistillRows(const DistillCall& call, const Adjustments* adjust) : DistillCall(call), adjust(adjust) {}
};

}  // namespace tgt
