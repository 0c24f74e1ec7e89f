// The GIL of Python, for the bindings.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

namespace lgnet {

// A call guard: the call runs without the GIL. In place of pybind11's, under which a daemon thread that returns from
// a kernel while the interpreter ends aborts the process: before version 3.14 Python ends such a thread by unwinding
// its stack, and unwinding through a destructor calls std::terminate. Here the thread waits for the end of the
// process, as it does in Python 3.14. PyTorch's own operators still abort there.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;
  ~ReleasedGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }

 private:
  PyThreadState* state_;
};

}  // namespace lgnet
