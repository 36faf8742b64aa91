#pragma once

#include "../common/tokens.h"

namespace tgt::cpu {

void sample(SampleCall call, int threads);
void soft_forward(SoftCall call, int threads);
void soft_backward(SoftCall call, int threads);

}  // namespace tgt::cpu
