#pragma once

#include "../common/latent.h"

namespace tgt::cpu {

void perturb(PerturbCall call, int threads);
void ascend(AscendCall call, int threads);

}  // namespace tgt::cpu
