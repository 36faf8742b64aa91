#pragma once

#include <cstdlib>

#include "../common/platform.h"
#include "memory.h"

namespace tgt {
inline namespace TGT_ISA {

// Memory of a thread for one sample or row, kept while it handles its share of them. Throws std::bad_alloc. No vector:
// its code would be compiled once per instruction set under one name, and a machine might get that of another.
template <class Real>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(size ? static_cast<Real*>(std::malloc(size * sizeof(Real))) : nullptr), size_(size) {
    if (size && !data_) cpu::out_of_memory();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Real* data() { return data_; }
  const Real* data() const { return data_; }
  int64_t size() const { return size_; }
  Real* begin() { return data_; }
  Real* end() { return data_ + size_; }
  Real& operator[](int64_t i) { return data_[i]; }
  const Real& operator[](int64_t i) const { return data_[i]; }
  void fill(Real value) {
    for (Real& element : *this) element = value;
  }

 private:
  Real* data_;
  int64_t size_;
};

}  // namespace TGT_ISA
}  // namespace tgt
