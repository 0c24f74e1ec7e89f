// Runs kernels of csrc/cuda/ on the CPU: what ptx.cuh and wgmma.cuh declare, and CUDA's built-ins that the kernels
// use.
//
// Every CUDA thread is a fiber. A fiber runs until it waits; the scheduler takes the fibers in an order that changes
// with every round, and ends with an error if all of them wait for nothing that can still happen. A copy ends some
// rounds after its call (with seeds 6 and 7 many), in any order. A wgmma product reads its operands as late as the
// hardware may, when its warp waits for it, or, with an odd seed, as early, where it is called. So a stage that is
// released too early, or read too early, gives a wrong result. Shared memory starts as NaN, and every access is
// checked against its size.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

using std::max;
using std::min;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// A tensor map as tests/emulator/__init__.py makes it; sizes and boxes in elements of two bytes, innermost first.
struct CUtensorMap {
  const uint8_t* data;
  int64_t rank, size[4], stride[4], box[4];  // strides in bytes; stride[0] is that of an element
};

// -- 16 bit numbers ------------------------------------------------------------------------------------------------

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float __uint_as_float(uint32_t bits) { return float_of(bits); }

inline float float_of_half(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                    : std::ldexp(static_cast<float>(mantissa), -24);
  return half >> 15 ? -size : size;
}
// Rounds to the nearest, to even between two.
inline uint16_t half_of(float value) {
  const uint16_t sign = std::signbit(value) << 15;
  if (std::isnan(value)) return sign | 0x7fff;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = -13;  // of zero and of subnormal numbers
  if (size >= 0x1p-14f) std::frexp(size, &exponent);
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return sign | (((exponent + 13) << 10) + mantissa);
}
inline float float_of_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
inline uint16_t bf16_of(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = bits_of(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) : bits(half_of(value)) {}
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) : bits(bf16_of(value)) {}
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float2 __half22float2(__half2 v) { return {float_of_half(v.x.bits), float_of_half(v.y.bits)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float_of_bf16(v.x.bits), float_of_bf16(v.y.bits)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }

namespace emulator {

// Both kinds of number as float, by their bits.
inline const float* table(bool bf16) {
  static const std::vector<float> tables[2] = {[] {
                                                 std::vector<float> t(65536);
                                                 for (int i = 0; i < 65536; ++i) t[i] = float_of_half(i);
                                                 return t;
                                               }(),
                                               [] {
                                                 std::vector<float> t(65536);
                                                 for (int i = 0; i < 65536; ++i) t[i] = float_of_bf16(i);
                                                 return t;
                                               }()};
  return tables[bf16].data();
}

// -- the machine ---------------------------------------------------------------------------------------------------

constexpr uint32_t kSharedBase = 1024;  // where dynamic shared memory begins, as on a GPU
constexpr int kRankShift = 24;          // an address in another block has 1 + its rank in these bits

// Threads that wait until `count` of them have come.
struct Meeting {
  int arrived = 0;
  uint64_t number = 0;
};

// What the lanes of a warp do together.
struct Warp {
  Meeting meeting;
  const char* operation = nullptr;
  uint32_t in[32][8], out[32][4];
  // wgmma: number of a product -> this warp's 16 rows of the left operand where it is in registers, and of the
  // result; how many lanes have taken theirs
  struct Part {
    std::vector<float> left, rows;
    int taken = 0;
  };
  std::map<uint64_t, Part> parts;
};

struct Block {
  std::vector<uint8_t> memory;
  uint8_t* shared;  // aligned to 1024 bytes
  int number, rank;
  Meeting meetings[16];
  std::vector<Warp> warps;
};

// As wgmma.cuh describes them: `add`, `multiply`, `multiply_rows`.
enum class Kind { kAdd, kMultiply, kRows };

struct Product {
  float* sums;
  uint64_t a, b, number;
  int columns;
  bool bf16, keep;
  Kind kind;
};

struct Thread {
  ucontext_t entry;
  jmp_buf place;
  bool started = false, ended = false;
  const char* waits = "";
  Block* block;
  int index;
  std::vector<Product> open;                // since the last commit
  std::deque<std::vector<Product>> groups;  // committed, not waited for
  uint64_t products = 0;
  std::vector<std::function<void()>> open_copies;  // its own, since the last commit
  std::deque<std::vector<std::function<void()>>> copy_groups;
};

struct Machine {
  int grid, cluster, threads, shared_bytes;
  std::function<void()> body;
  std::vector<std::unique_ptr<Block>> blocks;  // of the clusters that run now
  std::vector<Thread> fibers;
  std::vector<Meeting> clusters;
  std::vector<std::function<void()>> copies;  // that have not ended
  uint8_t* stacks = nullptr;
  size_t stack_bytes = 0;
  jmp_buf scheduler;
  Thread* current = nullptr;
  uint64_t events = 0, random = 1;
  bool early = false;  // when products read their operands
  int latency = 3;     // rounds that a copy takes in the mean
  int64_t clock = 0;
  std::string error;

  uint32_t next(uint32_t below) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return (random >> 33) % below;
  }
};

inline Machine* machine;
inline std::vector<int64_t> copied;  // bytes that `copy_bytes` copied in each block of the last launch

[[noreturn]] inline void leave() { _longjmp(machine->scheduler, 1); }

// Another fiber runs; `what` is named if this one waits for ever.
inline void pause(const char* what) {
  Thread* const thread = machine->current;
  thread->waits = what;
  if (_setjmp(thread->place) == 0) leave();
}

[[noreturn]] inline void fail(const std::string& text) {
  Thread* const thread = machine->current;
  if (machine->error.empty()) {
    machine->error = text;
    if (thread) {
      machine->error +=
          " (block " + std::to_string(thread->block->number) + ", thread " + std::to_string(thread->index) + ")";
    }
  }
  if (!thread) abort();
  thread->ended = true;
  leave();
}

inline void check(bool right, const char* text) {
  if (!right) fail(text);
}

inline void arrive(Meeting& meeting, int count) {
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.number;
    ++machine->events;
  }
}

inline void join(Meeting& meeting, int count, const char* what) {
  const uint64_t number = meeting.number;
  arrive(meeting, count);
  while (meeting.number == number) pause(what);
}

inline Warp& warp() { return machine->current->block->warps[machine->current->index / 32]; }

// The lanes of a warp leave `values`; the last one to come computes what all of them get.
template <typename Compute>
inline void together(const char* operation, const uint32_t* values, int count, const Compute& compute) {
  Warp& w = warp();
  if (w.meeting.arrived == 0) w.operation = operation;
  check(!strcmp(w.operation, operation), "the lanes of a warp differ in what they do together");
  for (int i = 0; i < count; ++i) w.in[machine->current->index % 32][i] = values[i];
  if (w.meeting.arrived == 31) compute(w);
  join(w.meeting, 32, operation);
}

// The memory behind an address of shared memory, of this block or of one that `remote` names.
inline uint8_t* shared(uint32_t address, uint32_t bytes, uint32_t alignment) {
  const uint32_t rank = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
  Block* block = machine->current->block;
  if (rank) {
    const int first = (block->number - block->rank) - machine->blocks[0]->number;
    check(int(rank) <= machine->cluster, "an address of a block beyond the cluster");
    block = machine->blocks[first + rank - 1].get();
  }
  check(offset % alignment == 0, "an address in shared memory that is not aligned");
  check(offset >= kSharedBase && offset + bytes <= kSharedBase + machine->shared_bytes,
        "an address beyond the block's shared memory");
  return block->shared + (offset - kSharedBase);
}

struct Barrier {
  int32_t bytes;  // that copies have yet to bring; below zero before they are announced
  uint16_t pending;
  uint16_t count_and_phase;

  void settle() {
    ++machine->events;
    if (pending == 0 && bytes == 0) {
      pending = count_and_phase >> 1;
      count_and_phase ^= 1;
    }
  }
  void arrive() {
    check(pending > 0 && pending < 0xffff, "more arrivals at a barrier than it counts, or none is there");
    --pending;
    settle();
  }
  void bring(int32_t count) {
    bytes -= count;
    settle();
  }
};

inline Barrier& barrier_at(uint32_t address) { return *reinterpret_cast<Barrier*>(shared(address, 8, 8)); }

inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Writes a box to shared memory line by line, swizzled by 128 bytes; zeros outside the tensor.
inline void write_box(const CUtensorMap& map, uint32_t to, const int* at) {
  check(to % 128 == 0, "a box that does not begin at a multiple of 128 bytes");
  const int lines = map.box[1] * (map.rank > 2 ? map.box[2] : 1) * (map.rank > 3 ? map.box[3] : 1);
  check(map.box[0] * 2 == 128, "a box whose lines are not of 128 bytes");
  for (int line = 0; line < lines; ++line) {
    int rest = line;
    const uint8_t* from = map.data;
    bool inside = true;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t i = at[d] + rest % map.box[d];
      rest /= map.box[d];
      inside &= i >= 0 && i < map.size[d];
      from += i * map.stride[d];
    }
    for (int part = 0; part < 8; ++part) {
      uint8_t* const target = shared(swizzled(to + line * 128 + part * 16), 16, 16);
      for (int e = 0; e < 8; ++e) {
        const int64_t c = at[0] + part * 8 + e;
        const bool valid = inside && c >= 0 && c < map.size[0];
        uint16_t value = 0;
        if (valid) memcpy(&value, from + c * 2, 2);
        memcpy(target + 2 * e, &value, 2);
      }
    }
  }
}

// -- running -------------------------------------------------------------------------------------------------------

inline void start_fiber() {
  machine->body();
  Thread* const thread = machine->current;
  if (thread->open.size() + thread->groups.size()) fail("a thread ends before its products");
  if (thread->open_copies.size() + thread->copy_groups.size()) fail("a thread ends before its copies");
  thread->ended = true;
  ++machine->events;
  leave();
}

inline void resume(Thread& thread) {
  machine->current = &thread;
  if (_setjmp(machine->scheduler) == 0) {
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.entry);
  }
}

inline std::string stuck() {
  std::map<std::string, int> waits;
  for (const Thread& t : machine->fibers) {
    if (!t.ended) ++waits["warp " + std::to_string(t.index / 32) + ": " + t.waits];
  }
  std::string text = "every thread waits for ever:";
  for (const auto& [what, count] : waits) text += " " + what + " (" + std::to_string(count) + " threads);";
  return text;
}

// Runs the fibers until all have ended.
inline void schedule() {
  Machine& m = *machine;
  const uint32_t count = m.fibers.size();
  uint32_t live = count;
  int idle = 0;  // rounds in which nothing has happened; a thread may wait for the clock in some of them
  while (live && m.error.empty()) {
    const uint64_t before = m.events;
    m.clock += 1000;  // a wait of 100,000 clocks takes 100 rounds
    uint32_t step = 1 + m.next(count), at = m.next(count);
    while (std::gcd(step, count) != 1) ++step;
    for (uint32_t i = 0; i < count && m.error.empty(); ++i, at = (at + step) % count) {
      if (m.fibers[at].ended) continue;
      resume(m.fibers[at]);
      live -= m.fibers[at].ended;
    }
    for (size_t i = 0; i < m.copies.size() && m.error.empty();) {
      if (m.next(m.latency)) {
        ++i;
        continue;
      }
      std::function<void()> copy = std::move(m.copies[i]);
      m.copies[i] = std::move(m.copies.back());
      m.copies.pop_back();
      copy();
    }
    idle = m.events == before && m.copies.empty() ? idle + 1 : 0;
    if (m.error.empty() && live && idle == 300) m.error = stuck();
  }
  if (m.error.empty() && !m.copies.empty()) m.error = "a block ended before its copies";
}

// Runs blocks first .. first + number - 1 together.
inline void run_blocks(int first, int number) {
  Machine& m = *machine;
  m.blocks.clear();
  m.copies.clear();
  m.clusters.assign(number / m.cluster, Meeting());
  for (int i = 0; i < number; ++i) {
    auto block = std::make_unique<Block>();
    block->memory.assign(m.shared_bytes + 1024, 0xff);  // NaN
    block->shared = block->memory.data() + (-reinterpret_cast<uintptr_t>(block->memory.data()) & 1023);
    block->number = first + i;
    block->rank = i % m.cluster;
    block->warps.resize((m.threads + 31) / 32);
    m.blocks.push_back(std::move(block));
  }
  m.fibers = std::vector<Thread>(size_t(number) * m.threads);
  for (size_t i = 0; i < m.fibers.size(); ++i) {
    Thread& t = m.fibers[i];
    t.block = m.blocks[i / m.threads].get();
    t.index = i % m.threads;
    getcontext(&t.entry);
    t.entry.uc_stack.ss_sp = m.stacks + i * m.stack_bytes;
    t.entry.uc_stack.ss_size = m.stack_bytes;
    t.entry.uc_link = nullptr;
    makecontext(&t.entry, start_fiber, 0);
  }
  schedule();
}

// Runs a grid; `together` whether all its blocks run at once. Empty, or what went wrong.
inline std::string launch(int grid, int cluster, int threads, int shared_bytes, bool together, uint64_t seed,
                          std::function<void()> body) {
  Machine m;
  machine = &m;
  m.grid = grid, m.cluster = cluster, m.threads = threads, m.shared_bytes = shared_bytes;
  m.body = std::move(body);
  m.random = seed * 2 + 1, m.early = seed % 2;
  if (seed / 2 % 4 == 3) m.latency = 100;  // so long that a later copy may end much earlier
  m.stack_bytes = 32768;
  const int number = together ? grid : cluster;
  const size_t bytes = m.stack_bytes * number * threads;
  copied.assign(grid, 0);
  if (grid % cluster) return "the grid is not a multiple of the cluster";
  m.stacks = static_cast<uint8_t*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (m.stacks == MAP_FAILED) return "no memory for the threads' stacks";
  for (int first = 0; first < grid && m.error.empty(); first += number) run_blocks(first, number);
  munmap(m.stacks, bytes);
  machine = nullptr;
  return m.error;
}

// Calls a kernel with the parameters that `addresses` point to.
template <typename... Parameters>
std::function<void()> bound(void (*kernel)(Parameters...), void** addresses) {
  return [=] {
    int i = 0;
    std::tuple<Parameters&...> values{*static_cast<std::remove_const_t<Parameters>*>(addresses[i++])...};
    std::apply(kernel, values);
  };
}

}  // namespace emulator

// -- CUDA's built-ins ----------------------------------------------------------------------------------------------

struct LgnetDimension {
  unsigned x;
};
#define threadIdx (LgnetDimension{static_cast<unsigned>(emulator::machine->current->index)})
#define blockIdx (LgnetDimension{static_cast<unsigned>(emulator::machine->current->block->number)})
#define blockDim (LgnetDimension{static_cast<unsigned>(emulator::machine->threads)})
#define gridDim (LgnetDimension{static_cast<unsigned>(emulator::machine->grid)})

[[noreturn]] inline void __trap() { emulator::fail("a wait took too long"); }
inline int64_t clock64() {
  emulator::pause("clock64");
  return ++emulator::machine->clock;
}
inline void __syncthreads() {
  emulator::join(emulator::machine->current->block->meetings[0], emulator::machine->threads, "__syncthreads");
}
inline void __syncwarp() {
  emulator::together("__syncwarp", nullptr, 0, [](emulator::Warp&) {});
}
inline int __shfl_sync(uint32_t, int value, int lane) {
  const uint32_t in = value;
  emulator::together("__shfl_sync", &in, 1, [](emulator::Warp&) {});
  return emulator::warp().in[lane][0];
}
inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  const uint32_t in = bits_of(value);
  emulator::together("__shfl_xor_sync", &in, 1, [&](emulator::Warp& w) {
    for (int lane = 0; lane < 32; ++lane) w.out[lane][0] = w.in[lane ^ mask][0];
  });
  return float_of(emulator::warp().out[emulator::machine->current->index % 32][0]);
}
inline bool __any_sync(uint32_t, bool value) {
  const uint32_t in = value;
  emulator::together("__any_sync", &in, 1, [](emulator::Warp& w) {
    uint32_t any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= w.in[lane][0];
    for (int lane = 0; lane < 32; ++lane) w.out[lane][0] = any;
  });
  return emulator::warp().out[emulator::machine->current->index % 32][0];
}
inline int32_t atomicAdd(int32_t* address, int32_t value) {
  ++emulator::machine->events;
  const int32_t before = *address;
  *address += value;
  return before;
}
inline int32_t atomicCAS(int32_t* address, int32_t expected, int32_t value) {
  ++emulator::machine->events;
  const int32_t before = *address;
  if (before == expected) *address = value;
  return before;
}
template <typename T>
inline T __ldg(const T* address) {
  return *address;
}

// -- ptx.cuh -------------------------------------------------------------------------------------------------------

namespace lgnet {

inline uint8_t* dynamic_shared() { return emulator::machine->current->block->shared; }
inline uint32_t shared_address(const void* p) {
  return emulator::kSharedBase + (static_cast<const uint8_t*>(p) - dynamic_shared());
}
inline uint32_t remote(uint32_t address, uint32_t rank) { return address | (rank + 1) << emulator::kRankShift; }

inline uint4 load_shared(uint32_t address) {
  return *reinterpret_cast<const uint4*>(emulator::shared(address, 16, 16));
}
inline uint2 load_shared_pair(uint32_t address) {
  return *reinterpret_cast<const uint2*>(emulator::shared(address, 8, 8));
}
inline uint32_t load_shared_word(uint32_t address) {
  return *reinterpret_cast<const uint32_t*>(emulator::shared(address, 4, 4));
}
inline float2 load_shared_floats(uint32_t address) {
  return *reinterpret_cast<const float2*>(emulator::shared(address, 8, 8));
}
inline uint4 load_matrix(uint32_t address) {
  const uint4 row = load_shared(address);
  const uint32_t in[] = {row.x, row.y, row.z, row.w};
  emulator::together("ldmatrix", in, 4, [](emulator::Warp& w) {
    // Matrix i has the rows of lanes 8 i to 8 i + 7; a lane gets two elements of row lane / 4 of each.
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) w.out[lane][i] = w.in[8 * i + lane / 4][lane % 4];
    }
  });
  const uint32_t* const out = emulator::warp().out[emulator::machine->current->index % 32];
  return {out[0], out[1], out[2], out[3]};
}
inline void store_shared(uint32_t address, const uint4& value) {
  *reinterpret_cast<uint4*>(emulator::shared(address, 16, 16)) = value;
}
inline void store_shared(uint32_t address, const float2& value) {
  *reinterpret_cast<float2*>(emulator::shared(address, 8, 8)) = value;
}
inline void store_shared(uint32_t address, float value) {
  *reinterpret_cast<float*>(emulator::shared(address, 4, 4)) = value;
}

// Copies belong to the thread that starts them: addresses are relative to its block.
inline void later(std::function<void()> copy) {
  emulator::Thread* const thread = emulator::machine->current;
  emulator::machine->copies.push_back([=] {
    emulator::machine->current = thread;
    copy();
  });
}

inline void send(uint32_t address, const float4& value, uint32_t barrier) {
  later([=] {
    memcpy(emulator::shared(address, 16, 16), &value, 16);
    emulator::barrier_at(barrier).bring(16);
  });
}
inline float4 load_remote(uint32_t address) {
  return *reinterpret_cast<const float4*>(emulator::shared(address, 16, 16));
}
inline float2 load_remote_pair(uint32_t address) { return load_shared_floats(address); }
inline void store_if(bool whether, void* to, const uint4& value) {
  if (whether) *static_cast<uint4*>(to) = value;
}
inline void fence_async() {}
inline void fence_async_global() {}

inline void barrier_init(uint32_t barrier, uint32_t count) {
  emulator::barrier_at(barrier) = {0, static_cast<uint16_t>(count), static_cast<uint16_t>(count << 1)};
}
inline void barriers_initialised() {}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  emulator::barrier_at(barrier).bytes += bytes;
  emulator::barrier_at(barrier).arrive();
}
inline void barrier_arrive(uint32_t barrier) { emulator::barrier_at(barrier).arrive(); }
inline void barrier_arrive_remote(uint32_t barrier, uint32_t rank) {
  emulator::barrier_at(remote(barrier, rank)).arrive();
}
template <bool kCluster = false>
inline bool barrier_passed(uint32_t barrier, uint32_t parity) {
  const auto passed = [&] { return (emulator::barrier_at(barrier).count_and_phase & 1u) != parity; };
  if (!passed()) emulator::pause("a barrier in shared memory");
  return passed();
}

template <int kNumber, int kThreads>
inline void meet() {
  emulator::join(emulator::machine->current->block->meetings[kNumber], kThreads, "bar.sync");
}
template <int kThreads>
inline void meet_at(int number) {
  emulator::join(emulator::machine->current->block->meetings[number], kThreads, "bar.sync");
}
template <int kThreads>
inline void arrive_at(int number) {
  emulator::arrive(emulator::machine->current->block->meetings[number], kThreads);
}
inline uint32_t cluster_rank() { return emulator::machine->current->block->rank; }
inline void cluster_meet() {
  const emulator::Machine& m = *emulator::machine;
  const int number = (m.current->block->number - m.blocks[0]->number) / m.cluster;
  emulator::join(emulator::machine->clusters[number], m.cluster * m.threads, "barrier.cluster");
}
inline void cluster_meet_initialised() { cluster_meet(); }
inline void wait_for_previous_kernel() {}
inline void start_next_kernel() {}

inline void prefetch_map(const CUtensorMap&) {}
inline void copy_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c, int x, int y, int sample) {
  later([=, m = map] {
    const int at[] = {c, x, y, sample};
    emulator::write_box(m, to, at);
    emulator::barrier_at(barrier).bring(2 * m.box[0] * m.box[1] * m.box[2] * m.box[3]);
  });
}
inline void multicast_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int column, int row,
                          uint16_t blocks) {
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    later([=, m = map] {
      const int at[] = {column, row};
      emulator::write_box(m, remote(to, rank), at);
      emulator::barrier_at(remote(barrier, rank)).bring(2 * m.box[0] * m.box[1]);
    });
  }
}
inline void copy_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int column, int row) {
  multicast_box(to, map, barrier, column, row, 1 << cluster_rank());
}
inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  emulator::check(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "a copy that is not aligned");
  emulator::copied[emulator::machine->current->block->number] += bytes;
  later([=] {
    memcpy(emulator::shared(to, bytes, 16), from, bytes);
    emulator::barrier_at(barrier).bring(bytes);
  });
}
inline void copy_bytes_once(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  copy_bytes(to, from, bytes, barrier);
}

// Happens as late as it may, when its thread waits for it, or, with an odd seed, as early.
template <int BYTES>
inline void copy_async(uint32_t to, const void* from, bool inside) {
  emulator::check(reinterpret_cast<uintptr_t>(from) % BYTES == 0, "a copy that is not aligned");
  const auto copy = [=] {
    uint8_t* const target = emulator::shared(to, BYTES, BYTES);
    if (inside) {
      memcpy(target, from, BYTES);
    } else {
      memset(target, 0, BYTES);
    }
  };
  if (emulator::machine->early) {
    copy();
  } else {
    emulator::machine->current->open_copies.push_back(copy);
  }
}
inline void copies_commit() {
  emulator::Thread& thread = *emulator::machine->current;
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}
template <int kGroups>
inline void copies_wait() {
  emulator::Thread& thread = *emulator::machine->current;
  while (thread.copy_groups.size() > kGroups) {
    for (const auto& copy : thread.copy_groups.front()) copy();
    thread.copy_groups.pop_front();
  }
}

inline uint4 load_relaxed(const void* address) {
  emulator::pause("numbers of other blocks");
  return *static_cast<const uint4*>(address);
}
// Each word arrives by itself.
inline void store_relaxed(void* address, const uint2& value) {
  uint32_t* const words = static_cast<uint32_t*>(address);
  later([=, word = value.x] { words[0] = word; });
  later([=, word = value.y] { words[1] = word; });
}
inline int32_t load_acquire(const int32_t* counter) {
  emulator::pause("a counter in global memory");
  return *counter;
}
inline void add_release(int32_t* counter, int32_t value) { atomicAdd(counter, value); }

template <bool BF16>
inline void warp_product(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  const uint32_t in[] = {a.x, a.y, a.z, a.w, b0, b1};
  emulator::together("mma", in, 6, [](emulator::Warp& w) {
    // PTX ISA, mma.m16n8k16: which row and column a lane's registers hold
    const float* const number = emulator::table(BF16);
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const auto value = [&](int i) { return number[w.in[lane][i] >> 16 * half & 0xffff]; };
        for (int i = 0; i < 4; ++i) {
          left[lane / 4 + 8 * (i & 1)][lane % 4 * 2 + half + 8 * (i >> 1)] = value(i);
        }
        for (int i = 0; i < 2; ++i) right[lane % 4 * 2 + half + 8 * i][lane / 4] = value(4 + i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += left[lane / 4 + 8 * (i >> 1)][k] * right[k][lane % 4 * 2 + (i & 1)];
        w.out[lane][i] = bits_of(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] += float_of(emulator::warp().out[emulator::machine->current->index % 32][i]);
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline void opaque(int&) {}
inline void opaque(void*&) {}

// -- wgmma.cuh -----------------------------------------------------------------------------------------------------

// The 16 rows of a warp, from operands that are swizzled by 128 bytes. left: A where it is in registers.
inline std::vector<float> rows_of(const emulator::Product& product, int warp, const std::vector<float>& left) {
  using emulator::Kind;
  const float* const number = emulator::table(product.bf16);
  const auto read = [&](uint32_t address) {
    uint16_t bits;
    memcpy(&bits, emulator::shared(emulator::swizzled(address), 2, 2), 2);
    return number[bits];
  };
  // Where an operand has its row or column i at a depth.
  const auto adjacent_depth = [&](uint64_t d, int i, int depth) {
    emulator::check(d >> 62 == 1, "a descriptor without swizzle of 128 bytes");
    return read((uint32_t(d & 0x3fff) << 4) + i / 8 * (uint32_t(d >> 32 & 0x3fff) << 4) + i % 8 * 128 + 2 * depth);
  };
  const auto adjacent_columns = [&](uint64_t d, int i, int depth) {
    emulator::check(d >> 62 == 1, "a descriptor without swizzle of 128 bytes");
    const uint32_t leading = uint32_t(d >> 16 & 0x3fff) << 4, stride = uint32_t(d >> 32 & 0x3fff) << 4;
    return read((uint32_t(d & 0x3fff) << 4) + i / 64 * leading + depth / 8 * stride + depth % 8 * 128 + i % 64 * 2);
  };
  const int columns = product.columns;
  std::vector<float> sum(16 * columns, 0.0f), right(16 * columns);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < columns; ++n) {
      right[k * columns + n] =
          product.kind == Kind::kRows ? adjacent_columns(product.b, n, k) : adjacent_depth(product.b, n, k);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      const float a = product.kind == Kind::kRows       ? left[m * 16 + k]
                      : product.kind == Kind::kMultiply ? adjacent_depth(product.a, 16 * warp + m, k)
                                                        : adjacent_columns(product.a, 16 * warp + m, k);
      for (int n = 0; n < columns; ++n) sum[m * columns + n] += a * right[k * columns + n];
    }
  }
  return sum;
}

// The first lane of a warp that comes here reads the operands for all.
inline emulator::Warp::Part& part_of(const emulator::Product& product) {
  emulator::Warp::Part& part = emulator::warp().parts[product.number];
  if (part.rows.empty()) part.rows = rows_of(product, emulator::machine->current->index / 32 % 4, part.left);
  return part;
}

inline void finish_product(const emulator::Product& product) {
  const int lane = emulator::machine->current->index % 32;
  emulator::Warp::Part& part = part_of(product);
  for (int i = 0; i < product.columns / 2; ++i) {
    const int row = lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    product.sums[i] = (product.keep ? product.sums[i] : 0.0f) + part.rows[row * product.columns + column];
  }
  if (++part.taken == 32) emulator::warp().parts.erase(product.number);
}

inline void products_begin() {}
inline void products_commit() {
  emulator::Thread& thread = *emulator::machine->current;
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int kGroups>
inline void products_wait() {
  emulator::Thread& thread = *emulator::machine->current;
  while (thread.groups.size() > kGroups) {
    for (const emulator::Product& product : thread.groups.front()) finish_product(product);
    thread.groups.pop_front();
  }
}
inline void opaque(float&) {}

inline void start_product(const emulator::Product& product) {
  emulator::Thread& thread = *emulator::machine->current;
  thread.open.push_back(product);
  ++thread.products;
  if (emulator::machine->early) part_of(product);
}

template <int N>
struct Product {
  template <bool BF16>
  static void add(float (&d)[N / 2], uint64_t a, uint64_t b) {
    start_product({d, a, b, emulator::machine->current->products, N, BF16, true, emulator::Kind::kAdd});
  }
  template <bool BF16, bool KEEP>
  static void multiply(float (&d)[N / 2], uint64_t a, uint64_t b) {
    start_product({d, a, b, emulator::machine->current->products, N, BF16, KEEP, emulator::Kind::kMultiply});
  }
  template <bool BF16>
  static void multiply_rows(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
    const uint64_t number = emulator::machine->current->products;
    const uint32_t in[] = {a0, a1, a2, a3};
    emulator::together("wgmma", in, 4, [=](emulator::Warp& w) {
      std::vector<float>& left = w.parts[number].left;
      left.resize(16 * 16);
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * (i & 1), depth = lane % 4 * 2 + half + 8 * (i >> 1);
            left[row * 16 + depth] = emulator::table(BF16)[w.in[lane][i] >> 16 * half & 0xffff];
          }
        }
      }
    });
    start_product({d, 0, b, number, N, BF16, true, emulator::Kind::kRows});
  }
};

}  // namespace lgnet
