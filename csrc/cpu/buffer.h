#pragma once

#include <cstdint>

namespace tgt::cpu {

// Memory for a large gradient. A training loop frees one and asks for another of the same size at every step; taken
// from the system each time, it would cost more page faults than the kernel costs arithmetic. So the last two that were
// freed are kept and handed out again to whoever asks for nearly as much.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);  // throws std::bad_alloc
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const;
  int64_t size() const { return size_; }

 private:
  struct Block* block_;
  int64_t size_;
};

// Gives what is kept back to the system; returns how many bytes that was.
int64_t release_buffers();

}  // namespace tgt::cpu
