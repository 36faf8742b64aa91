// The kernels of one instruction set, and which set this process runs.
#pragma once

#include "../common/latent.h"
#include "../common/listwise.h"
#include "../common/tokens.h"
#include "../common/topk.h"
#include "adjust.h"

namespace tgt::cpu {

// Each handles rows or samples [begin, end) and touches nothing of the others.
struct Kernels {
  const char* name;
  void (*distill_forward)(const DistillRows&, int64_t begin, int64_t end);
  void (*distill_backward)(const DistillRows&, int64_t begin, int64_t end);
  void (*perturb)(const PerturbCall&, int64_t begin, int64_t end);
  void (*ascend)(const AscendCall&, int64_t begin, int64_t end);
  void (*topk_forward)(const TopKCall&, int64_t begin, int64_t end);
  void (*topk_backward)(const TopKCall&, int64_t begin, int64_t end);
  void (*sample)(const SampleCall&, int64_t begin, int64_t end);
  void (*soft_forward)(const SoftCall&, int64_t begin, int64_t end);
  void (*soft_backward)(const SoftCall&, int64_t begin, int64_t end);
  void (*listwise)(const ListwiseCall&, int64_t begin, int64_t end);
};

// The widest set that was built and that this CPU has.
const Kernels& kernels();

// Names of the sets that were built, widest first, separated by commas.
const char* built_sets();

}  // namespace tgt::cpu
