// Parallel loops on the OpenMP runtime that PyTorch has already loaded.
//
// A second OpenMP runtime in the process would have a second pool of spinning threads that competes with the first,
// so this library links to none. GOMP_parallel, the only entry point that a parallel region needs, is looked up at
// run time in the loaded libraries: torch's bundled libgomp has it, and so have LLVM's and Intel's runtimes. Where
// there is none (macOS, Windows, no torch), and in a child after fork(), threads of a pool do (thread_pool.h).
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

namespace lgnet {

// Calls body(task, worker) for every task in [0, tasks), worker in [0, threads). Each worker has an equal part of the
// tasks, the same in every call. After it, the worker takes tasks of the others, one at a time, which balances uneven
// tasks and busy cores. A worker runs its tasks one after another and may use scratch indexed by worker. The first
// exception of the body is thrown here, when no task runs any more. With one thread or one task no thread is started.
void parallel_for(int64_t threads, int64_t tasks, const std::function<void(int64_t task, int64_t worker)>& body);

// Where the threads come from: "openmp (<path of the runtime>)" or "threads".
std::string parallel_backend();

// To be called in a fork of a process that may have used OpenMP: libgomp's threads do not exist in the fork.
void mark_forked();
// Makes every later child of this process call mark_forked, and fork() wait for shared_mutex().
void watch_forks();
// For short sections only. fork() waits until it is free, so it is never locked in a child.
std::mutex& shared_mutex();

}  // namespace lgnet
