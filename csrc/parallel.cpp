// See parallel.h.
#include "parallel.h"

#include <atomic>
#include <exception>
#include <vector>

#include "thread_pool.h"

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
// If torch was loaded without RTLD_GLOBAL, its OpenMP runtime is not in the default scope and must be found by name.
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

// The remaining tasks [next, end) of a worker, on a separate cache line.
struct alignas(64) Share {
  std::atomic<bool> taken{false};
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Region {
  const std::function<void(int64_t, int64_t)>* body;
  std::vector<Share> shares;
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first task that threw
};

// A thread first takes the share that it had last, if that is free, and so becomes the same worker. A share is the
// same part of the tasks in every region, so rows and scratch of the previous step are still in the caches of the
// core, or in near ones. After its share it takes tasks of the others.
void run_worker(void* data) {
  thread_local size_t seat = 0;
  Region& region = *static_cast<Region*>(data);
  const size_t workers = region.shares.size();
  size_t worker = seat % workers;
  while (region.shares[worker].taken.exchange(true, std::memory_order_relaxed)) worker = (worker + 1) % workers;
  seat = worker;
  // An exception that left a thread's first function, or passed the runtime's own, would end the process.
  try {
    for (size_t i = 0; i < workers; ++i) {
      Share& share = region.shares[(worker + i) % workers];
      for (;;) {
        const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= share.end) break;
        (*region.body)(task, static_cast<int64_t>(worker));
      }
    }
  } catch (...) {
    if (!region.failed.exchange(true)) region.error = std::current_exception();
  }
}

}  // namespace

void mark_forked() {
  g_forked.store(true, std::memory_order_relaxed);
  forget_pool();
}

std::mutex& shared_mutex() {
  static std::mutex mutex;
  return mutex;
}

void watch_forks() {
#ifdef LGNET_HAVE_DL
  pthread_atfork([] { shared_mutex().lock(); }, [] { shared_mutex().unlock(); },
                 [] {
                   shared_mutex().unlock();
                   mark_forked();
                 });
#endif
}

void parallel_for(int64_t threads, int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  if (tasks <= 0) return;
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  Region region{&body, std::vector<Share>(static_cast<size_t>(threads)), {}, {}};
  for (int64_t i = 0; i < threads; ++i) {
    region.shares[static_cast<size_t>(i)].next.store(tasks * i / threads, std::memory_order_relaxed);
    region.shares[static_cast<size_t>(i)].end = tasks * (i + 1) / threads;
  }
  const GompParallel parallel = gomp_parallel();
  // After fork(), libgomp would wait forever for worker threads that exist in the parent only.
  if (parallel && !g_forked.load(std::memory_order_relaxed)) {
    parallel(run_worker, &region, static_cast<unsigned>(threads), 0);
  } else {
    run_on_pool(run_worker, &region, threads);
  }
  if (region.error) std::rethrow_exception(region.error);
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
