// See thread_pool.h.
#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <csignal>
#endif

namespace lgnet {
namespace {

// A thread that waits looks so often before it sleeps, which takes some hundred microseconds. Within a run its next
// work comes sooner, and waking a thread takes 60 us. It yields after each look, because PyTorch's own threads may
// spin on the processors too.
constexpr int kLooks = 1000;

#if defined(__unix__) || defined(__APPLE__)
// Signals to the process are meanwhile blocked in this thread and in those that it starts.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&blocked, own);  // a thread's own faults
    pthread_sigmask(SIG_SETMASK, &blocked, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};
#endif

// One thread of the pool.
class Helper {
 public:
  Helper() {
#if defined(__unix__) || defined(__APPLE__)
    const BlockedSignals blocked;
#endif
    std::thread([this] { serve(); }).detach();
  }

  void begin(void (*work)(void*), void* data) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      data_ = data;
      busy_.store(true, std::memory_order_release);
    }
    changed_.notify_one();
  }

  // Returns when the work has ended.
  void end() { wait_until(false); }

 private:
  void serve() {
    for (;;) {
      wait_until(true);
      work_(data_);
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        busy_.store(false, std::memory_order_release);
      }
      changed_.notify_one();
    }
  }

  void wait_until(bool busy) {
    for (int look = 0; look < kLooks; ++look) {
      if (busy_.load(std::memory_order_acquire) == busy) return;
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return busy_.load(std::memory_order_relaxed) == busy; });
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<bool> busy_{false};
  void (*work_)(void*) = nullptr;
  void* data_ = nullptr;
};

class Pool {
 public:
  // Up to `count` helpers, for the caller alone until they are given back.
  std::vector<Helper*> take(int64_t count) {
    std::vector<Helper*> taken;
    taken.reserve(static_cast<size_t>(count));
    const std::lock_guard<std::mutex> lock(mutex_);
    while (static_cast<int64_t>(taken.size()) < count) {
      if (idle_.empty()) {
        try {
          idle_.reserve(++all_);  // so that giving back allocates nothing
          idle_.push_back(std::make_unique<Helper>().release());
        } catch (const std::exception&) {  // no more threads, or no memory for one
          --all_;
          break;
        }
      }
      taken.push_back(idle_.back());
      idle_.pop_back();
    }
    return taken;
  }

  void give_back(const std::vector<Helper*>& taken) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.insert(idle_.end(), taken.rbegin(), taken.rend());  // the same ones come first again
  }

 private:
  std::mutex mutex_;
  std::vector<Helper*> idle_;
  size_t all_ = 0;
};

// Never freed: helpers run until the process ends, after the destructors of static objects too.
std::atomic<Pool*> g_pool{nullptr};

Pool& pool() {
  Pool* found = g_pool.load(std::memory_order_acquire);
  if (!found) {
    auto fresh = std::make_unique<Pool>();
    if (g_pool.compare_exchange_strong(found, fresh.get(), std::memory_order_acq_rel)) found = fresh.release();
  }
  return *found;
}

}  // namespace

void run_on_pool(void (*work)(void*), void* data, int64_t threads) {
  Pool& own = pool();
  const std::vector<Helper*> helpers = own.take(threads - 1);
  for (Helper* helper : helpers) helper->begin(work, data);
  work(data);
  for (Helper* helper : helpers) helper->end();
  own.give_back(helpers);
}

void forget_pool() { g_pool.store(nullptr, std::memory_order_release); }

}  // namespace lgnet
