#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace tgt {

// Defined by kernels.cpp, once for each instruction set that CMake builds.
#if defined(TGT_HAVE_X86_V4)
namespace x86_v4 {
extern const cpu::Kernels kKernels;
}
#endif
#if defined(TGT_HAVE_X86_V3)
namespace x86_v3 {
extern const cpu::Kernels kKernels;
}
#endif
namespace baseline {
extern const cpu::Kernels kKernels;
}

namespace cpu {
namespace {

const Kernels& pick() {
  const char* limit = std::getenv("TGT_FAST_ISA");  // for tests and for comparing: the widest set to use
  const bool any = limit == nullptr || *limit == '\0';
  (void)any;
#if defined(TGT_HAVE_X86_V4)
  if ((any || std::strcmp(limit, "x86_v4") == 0) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd")) {
    return x86_v4::kKernels;
  }
#endif
#if defined(TGT_HAVE_X86_V3)
  if ((any || std::strcmp(limit, "baseline") != 0) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return x86_v3::kKernels;
  }
#endif
  return baseline::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = pick();
  return chosen;
}

const char* built_sets() {
#if defined(TGT_HAVE_X86_V4)
  return "x86_v4,x86_v3,baseline";
#else
  return "baseline";
#endif
}

}  // namespace cpu
}  // namespace tgt
