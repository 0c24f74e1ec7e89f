// See parallel.h.
#include "parallel.h"

#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define LGNET_HAVE_DL 1
#endif
#if defined(__linux__)
#include <link.h>

#include <cstring>
#endif

namespace lgnet {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> g_forked{false};

#ifdef LGNET_HAVE_DL
#if defined(__linux__)
// Where torch was loaded without RTLD_GLOBAL its OpenMP runtime is not in the default scope: find it by name.
int find_loaded_openmp(dl_phdr_info* info, size_t, void* result) {
  const char* name = info->dlpi_name;
  if (!name || !(std::strstr(name, "libgomp") || std::strstr(name, "libomp") || std::strstr(name, "libiomp")))
    return 0;
  *static_cast<std::string*>(result) = name;
  return 1;
}
#endif

GompParallel find_gomp_parallel() {
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#if defined(__linux__)
  if (!symbol) {
    std::string path;
    if (dl_iterate_phdr(find_loaded_openmp, &path)) {
      if (void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(handle, "GOMP_parallel");
    }
  }
#endif
  return reinterpret_cast<GompParallel>(symbol);
}
#else
GompParallel find_gomp_parallel() { return nullptr; }
#endif

GompParallel gomp_parallel() {
  static const GompParallel function = find_gomp_parallel();
  return function;
}

struct Region {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t tasks;
  std::atomic<int64_t> next_task{0};
  std::atomic<int64_t> next_worker{0};
};

void run_worker(void* data) {
  Region& region = *static_cast<Region*>(data);
  const int64_t worker = region.next_worker.fetch_add(1, std::memory_order_relaxed);
  for (;;) {
    const int64_t task = region.next_task.fetch_add(1, std::memory_order_relaxed);
    if (task >= region.tasks) return;
    (*region.body)(task, worker);
  }
}

}  // namespace

void mark_forked() { g_forked.store(true, std::memory_order_relaxed); }

void watch_forks() {
#ifdef LGNET_HAVE_DL
  pthread_atfork(nullptr, nullptr, mark_forked);
#endif
}

void parallel_for(int64_t threads, int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  if (tasks <= 0) return;
  if (threads > tasks) threads = tasks;
  Region region;
  region.body = &body;
  region.tasks = tasks;
  if (threads <= 1) return run_worker(&region);
  const GompParallel parallel = gomp_parallel();
  // After fork() libgomp believes in worker threads that exist in the parent only and would wait for them forever.
  if (parallel && !g_forked.load(std::memory_order_relaxed)) {
    return parallel(run_worker, &region, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> pool;
  try {
    for (int64_t i = 1; i < threads; ++i) pool.emplace_back(run_worker, &region);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, do all the tasks.
  }
  run_worker(&region);
  for (std::thread& thread : pool) thread.join();
}

std::string parallel_backend() {
#ifdef LGNET_HAVE_DL
  if (GompParallel parallel = gomp_parallel()) {
    Dl_info info;
    if (!g_forked.load() && dladdr(reinterpret_cast<void*>(parallel), &info) && info.dli_fname) {
      return std::string("openmp (") + info.dli_fname + ")";
    }
  }
#endif
  return "threads";
}

}  // namespace lgnet
