#pragma once

#include <cstdlib>

#include "../common/platform.h"

namespace tgt {
inline namespace TGT_ISA {

// Memory of a thread for one sample or row, kept while it handles its share of them.
template <class Real>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(size ? static_cast<Real*>(std::malloc(size * sizeof(Real))) : nullptr) {
    if (size && !data_) abort();  // as the C++ runtime would
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Real* data() { return data_; }

 private:
  Real* data_;
};

}  // namespace TGT_ISA
}  // namespace tgt
