// Parallel loops on the OpenMP runtime that PyTorch has already loaded.
//
// A second OpenMP runtime in the process would bring a second pool of spinning threads that fights the first, so
// this library links none and names none. GOMP_parallel, the one entry point that a parallel region needs, is
// looked up at run time among the libraries already loaded: torch's bundled libgomp has it, and so have LLVM's and
// Intel's runtimes. Where there is none (macOS, Windows, no torch), and in a child after fork(), plain threads do
// the same work.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

namespace lgnet {

// Calls body(task, worker) for every task in [0, tasks), worker in [0, threads). Each worker
// has an equal part of the tasks, the same in every call, and then helps the others, one task at a time, so that
// uneven tasks and busy cores balance; a worker runs its tasks one after another and may use worker-indexed scratch.
// The body must not throw. With one thread or one task nothing is started.
void parallel_for(int64_t threads, int64_t tasks, const std::function<void(int64_t task, int64_t worker)>& body);

// Where the threads come from: "openmp (<path of the runtime>)" or "threads".
std::string parallel_backend();

// Tells this library that the process is a fork of one that may have used OpenMP (libgomp's pool did not survive).
void mark_forked();
// Has mark_forked called in every later child of this process, and fork() wait for shared_mutex().
void watch_forks();
// For short sections only. No child starts while another thread holds it, so it is never locked for good there.
std::mutex& shared_mutex();

}  // namespace lgnet
