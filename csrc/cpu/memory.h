#pragma once

#include <cstdint>

namespace tgt::cpu {

// Asks for huge pages under a large buffer that is about to be written for the first time: a fresh buffer of 128 MiB
// costs 32,768 page faults otherwise, more time than the kernel that fills it. A hint: it changes no contents and
// cannot fail.
void expect_writes(void* data, int64_t bytes);

// Throws std::bad_alloc, which Python sees as a MemoryError.
[[noreturn]] void out_of_memory();

}  // namespace tgt::cpu
