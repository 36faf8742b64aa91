// Races between the threads of a kernel, for kernels that were compiled with -fsanitize=thread: the compiler then
// reports each of their accesses to memory, and an access that no barrier orders behind another thread's is noted.
#pragma once

#include <cstdint>
#include <string>

namespace tgt::emulator {

struct Place;

void forget_accesses();                                    // when a grid starts
void forget_accesses(const void* from, int64_t bytes);     // of whole lines of 64 bytes
void ignore_accesses(const void* from, int64_t bytes);     // to the stacks of the threads
void set_accessing(const Place* thread, int64_t cluster);  // who runs from here on; none: the host
void arrives_and_publishes(const Place& thread);           // at its cluster's barrier
std::string take_races();                                  // the first few since the last call, a line each

}  // namespace tgt::emulator
