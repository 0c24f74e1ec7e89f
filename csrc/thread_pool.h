// Threads for parallel loops where no OpenMP runtime is loaded.
//
// Starting and joining a thread takes longer than many steps of a network run, so threads stay, asleep between loops.
// They leave signals to the program's own threads, and end with the process.
#pragma once

#include <cstdint>

namespace lgnet {

// Calls work(data) in this thread and in up to threads - 1 others at once, and returns when all calls have ended.
// There are fewer calls where the system has no more threads. May be called by several threads, and by work itself.
// `work` must not throw.
void run_on_pool(void (*work)(void*), void* data, int64_t threads);

// To be called in a child after fork(), in which the pool's threads do not exist.
void forget_pool();

}  // namespace lgnet
