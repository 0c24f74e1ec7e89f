// The deep layers of a U-Net (4x4 convolutions of stride 2 and transposed ones on small maps) in one launch.
//
// Their time is that of reading their weights, 2 to 17 MB each, if reading never stops. So blocks stay for all
// layers: one warp of each streams the block's part of every layer's weights through a ring in shared memory, as far
// ahead as the ring is long, whatever layer the others are at.
//
// A layer is a product weights [channels, depth] x positions [depth, rows], depth = taps x input channels, for each
// phase (kernels/conv.py). A cluster owns a unit of it: one phase, `channels` output channels. Its blocks split the
// depth in steps of 32 input channels of one tap; the eight multiplying warps split the block's steps (`warps_k`) and
// its channels (`warps_c`). Sums travel within the cluster (distributed shared memory) to the block that finishes
// them: float32, in a fixed order, so that results are bitwise repeatable. Between layers all blocks meet at a
// counter in global memory.
//
// Weights are packed in the order of mma's fragments (kernels/deep.py, `pack`): for every 16 channels and 16 depths,
// 32 lanes x 16 bytes. A lane's 16 bytes of a position are 8 consecutive channels t * 8 .. + 7 of a step, the operand
// of two products; the packing permutes the depth of the weights to match.
//
// Every wait is bounded by `timeout` clocks: then `state[0]` says who waited for what, every block runs to its end
// without waiting and fills the last layer's stores with NaN, and so does every later launch until `state` is zeroed.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace lgnet {

constexpr int kLayers = 12;
constexpr int kSlots = 20;
constexpr int kSlotBytes = 8192;
constexpr int kWarps = 8;  // that multiply; one more loads weights
constexpr int kThreads = 32 * kWarps;
constexpr int kPass = 16;        // rows at a time
constexpr int kStep = 32;        // depth of a step
constexpr int kTileBytes = 512;  // weights of 16 channels x 16 depths
constexpr int kAhead = 4;        // rounds whose positions are loaded at once
constexpr int kPad = 4;          // floats after a row of partial sums, against bank conflicts
constexpr int kBarrierBytes = 512;
constexpr int kStateStride = 32;  // integers between counters: a line of the L2 cache each

// kernels/deep.py has the same fields in the same order.
struct Layer {
  const void* weights;  // [unit, block, round, warps_k, warps_c, tiles, 2, lane, 8]
  const float* bias;
  const void* source;
  void* store0;
  void* store1;
  int32_t units, groups, channels, warps_k, log_warps_c, tiles;
  int32_t rounds, steps, block_steps, chunks, chunks_inverse, log_count_x;
  int32_t rows, log_rows_h, log_rows_w, passes;
  int32_t log_quads, log_share;  // of four channels: in a row; that a block finishes in a pass
  int32_t in_h, in_w, in_step, out_h, out_w, out_step;
  int32_t stride_x, stride_0, stride_1, activation_0, activation_1;
  int32_t origin_y[2], origin_x[2];
};

struct Program {
  int32_t* state;  // [2 + layers, kStateStride] zeros: error, blocks that are done, then a counter a layer
  int64_t* times;  // [layers, blocks, 6] clocks, or null
  int64_t timeout;
  int32_t layers, cluster, recv_offset, evict_first;
  Layer layer[kLayers];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t remote(uint32_t address, uint32_t rank) {
  uint32_t result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// kCluster: what other blocks of the cluster wrote is seen afterwards.
template <bool kCluster>
__device__ __forceinline__ bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  if (kCluster) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } else {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
  return done != 0;
}

__device__ __forceinline__ void multipliers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Whether a wait has to end: somebody failed, or this thread has waited too long, which it then reports.
__device__ __noinline__ bool expired(int32_t* error, int64_t until, int32_t code) {
  if (*reinterpret_cast<volatile int32_t*>(error) != 0) return true;
  if (clock64() <= until) return false;
  atomicCAS(error, 0, code);
  return true;
}

// Bounds every wait of a thread.
struct Guard {
  int32_t* error;
  int64_t until;
  bool dead;

  template <bool kCluster = false>
  __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity, int32_t code) {
    if (dead) return;
    for (int tries = 1; !barrier_passed<kCluster>(barrier, parity); ++tries) {
      if (tries % 16 == 0 && (dead = expired(error, until, code))) return;
    }
  }

  __device__ __forceinline__ void wait_count(const int32_t* counter, int32_t count, int32_t code) {
    if (dead) return;
    for (int tries = 1;; ++tries) {
      int32_t seen;
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      if (seen >= count || (tries % 64 == 0 && (dead = expired(error, until, code)))) return;
    }
  }
};

enum Wait { kEmpty = 1, kFull = 2, kSums = 3, kGrid = 4 };

// What `state[0]` holds: kind of wait, layer, block.
__device__ __forceinline__ int32_t code_of(Wait kind, int layer) {
  return (kind << 24) | (layer << 16) | static_cast<int32_t>(blockIdx.x + 1);
}

template <typename T>
struct Math;

template <>
struct Math<__half> {
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    const __half2 value = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&value);
  }
};

template <>
struct Math<__nv_bfloat16> {
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    const __nv_bfloat162 value = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&value);
  }
};

// Codes of kernels/launch.py, ACTIVATIONS. NaN stays NaN.
__device__ __forceinline__ float activate(float x, int code) {
  if (code == 1) return x < 0.f ? 0.f : x;
  if (code == 2) return x < 0.f ? 0.2f * x : x;
  return x;
}

// A block's place, and its unit's phase and first channel in the layer at hand.
struct Place {
  int unit, rank, warp, lane, phase, channel;
  uint32_t full, empty, ring, sums;  // shared memory: barriers, weights, partial sums
};

// One pass of a layer: this warp's steps, `kTiles` x 16 channels, 16 rows; partial sums go to `sums`.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply(const Layer& layer, const Place& place, Guard& guard, uint32_t chunk,
                                         int pass, int number) {
  constexpr int kRows = kPass / 8;
  const int g = place.lane >> 2, t = place.lane & 3;
  const int warp_k = place.warp >> layer.log_warps_c, warp_c = place.warp - (warp_k << layer.log_warps_c);
  const int first = place.rank * layer.block_steps;
  const int count = min(layer.block_steps, layer.steps - first);
  const bool last = pass == layer.passes - 1;
  const uint32_t round_bytes = layer.warps_k * layer.channels * kStep * 2;
  const uint32_t slots = (round_bytes + kSlotBytes - 1) / kSlotBytes;
  const uint32_t offset = place.warp * kTiles * 2 * kTileBytes;
  const T* source = static_cast<const T*>(layer.source);

  int y0[kRows], x0[kRows], sample[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = pass * kPass + r * 8 + g, y = row >> layer.log_rows_w;
    x0[r] = (row - (y << layer.log_rows_w)) * layer.in_step + layer.origin_x[place.phase & 1];
    sample[r] = (y >> layer.log_rows_h) * layer.in_h;
    y0[r] = (y & ((1 << layer.log_rows_h) - 1)) * layer.in_step + layer.origin_y[place.phase >> 1];
    if (row >= layer.rows) y0[r] = INT32_MIN / 2;  // reads nothing
  }

  float sums[kTiles][kRows][4] = {};
  for (int round0 = 0; round0 < layer.rounds; round0 += kAhead) {
    uint4 x[kAhead][kRows];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int step = (round0 + i) * layer.warps_k + warp_k;
      const int tap = (first + step) * layer.chunks_inverse >> 16;
      const int channel = (first + step - tap * layer.chunks) * kStep + t * 8;
      const int tap_y = tap >> layer.log_count_x, tap_x = tap - (tap_y << layer.log_count_x);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int y = y0[r] + tap_y, xx = x0[r] + tap_x;
        x[i][r] = make_uint4(0, 0, 0, 0);
        if (step < count && y >= 0 && y < layer.in_h && xx >= 0 && xx < layer.in_w) {
          const T* at = source + static_cast<int64_t>((sample[r] + y) * layer.in_w + xx) * layer.stride_x + channel;
          x[i][r] = __ldcg(reinterpret_cast<const uint4*>(at));  // the L1 cache does not see other blocks' stores
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (round0 + i >= layer.rounds) break;
      const uint32_t base = chunk + (round0 + i) * slots;
      const uint32_t own = base + offset / kSlotBytes;
      guard.wait(place.full + 8 * (own % kSlots), own / kSlots & 1, code_of(kFull, number));
      __syncwarp();
      if ((round0 + i) * layer.warps_k + warp_k < count) {
        const uint32_t weights = place.ring + own % kSlots * kSlotBytes + offset % kSlotBytes + place.lane * 16;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint4 a;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w)
                         : "r"(weights + (tile * 2 + half) * kTileBytes));
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              Math<T>::multiply(sums[tile][r], a, half ? x[i][r].z : x[i][r].x, half ? x[i][r].w : x[i][r].y);
            }
          }
        }
      }
      if (last) {
        // Of slots that hold nothing for this warp too: a layer uses a slot once, and warps meet between layers.
        __syncwarp();
        if (place.lane == 0) {
          for (uint32_t slot = 0; slot < slots; ++slot) barrier_arrive(place.empty + 8 * ((base + slot) % kSlots));
        }
      }
    }
  }
  const int pitch = layer.channels + kPad;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r * 8 >= layer.rows) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = r * 8 + 2 * t + (e & 1);
        const int channel = (warp_c * kTiles + tile) * 16 + g + (e >> 1) * 8;
        const uint32_t at = place.sums + ((warp_k * kPass + row) * pitch + channel) * 4;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(sums[tile][r][e]) : "memory");
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void multiply_any(const Layer& layer, const Place& place, Guard& guard, uint32_t chunk,
                                             int pass, int number) {
  if (layer.tiles == 4) {
    multiply<T, 4>(layer, place, guard, chunk, pass, number);
  } else if (layer.tiles == 2) {
    multiply<T, 2>(layer, place, guard, chunk, pass, number);
  } else {
    multiply<T, 1>(layer, place, guard, chunk, pass, number);
  }
}

// The block's sums of a pass, each to the block of the cluster that finishes it.
__device__ __forceinline__ void send(const Layer& layer, const Place& place, int pass, uint32_t recv,
                                     uint32_t recv_barrier) {
  const int pitch = layer.channels + kPad;
  const int total = min(layer.rows, kPass) << layer.log_quads;
  for (int f = threadIdx.x; f < total; f += kThreads) {
    const int row = f >> layer.log_quads, quad = f - (row << layer.log_quads);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int w = 0; w < layer.warps_k; ++w) {
      float4 part;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(part.x), "=f"(part.y), "=f"(part.z), "=f"(part.w)
                   : "r"(place.sums + ((w * kPass + row) * pitch + quad * 4) * 4));
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    const int owner = f >> layer.log_share, mine = f - (owner << layer.log_share);
    const uint32_t at = recv + (((place.rank * layer.passes + pass) << layer.log_share) + mine) * 16;
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            remote(at, owner)),
        "f"(sum.x), "f"(sum.y), "f"(sum.z), "f"(sum.w), "r"(remote(recv_barrier, owner))
        : "memory");
  }
}

template <typename T>
__device__ __forceinline__ void store(void* to, int64_t index, const float4& value, int activation) {
  uint2 packed;
  packed.x = Math<T>::pair(activate(value.x, activation), activate(value.y, activation));
  packed.y = Math<T>::pair(activate(value.z, activation), activate(value.w, activation));
  *reinterpret_cast<uint2*>(static_cast<T*>(to) + index) = packed;
}

// Adds what the blocks of the cluster sent, in their order, and stores it.
template <typename T>
__device__ __forceinline__ void finish(const Layer& layer, const Place& place, int cluster, uint32_t recv) {
  const int all = layer.passes << layer.log_share, total = min(layer.rows, kPass) << layer.log_quads;
  for (int index = threadIdx.x; index < all; index += kThreads) {
    const int pass = index >> layer.log_share;
    const int f = (place.rank << layer.log_share) + index - (pass << layer.log_share);
    if (f >= total) continue;
    const int row = pass * kPass + (f >> layer.log_quads);
    const int channel = place.channel + (f & ((1 << layer.log_quads) - 1)) * 4;
    const float4 bias = __ldg(reinterpret_cast<const float4*>(layer.bias + channel));
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int from = 0; from < cluster; ++from) {
      float4 part;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(part.x), "=f"(part.y), "=f"(part.z), "=f"(part.w)
                   : "r"(recv + (from * all + index) * 16));
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    sum.x += bias.x, sum.y += bias.y, sum.z += bias.z, sum.w += bias.w;
    const int y = row >> layer.log_rows_w, sample = y >> layer.log_rows_h;
    const int out_x = (row - (y << layer.log_rows_w)) * layer.out_step + (place.phase & 1);
    const int out_y = (y - (sample << layer.log_rows_h)) * layer.out_step + (place.phase >> 1);
    const int64_t pixel = (sample * layer.out_h + out_y) * layer.out_w + out_x;
    store<T>(layer.store0, pixel * layer.stride_0 + channel, sum, layer.activation_0);
    if (layer.store1 != nullptr) store<T>(layer.store1, pixel * layer.stride_1 + channel, sum, layer.activation_1);
  }
}

// This block's weights of every layer, as far ahead as the ring allows. One thread.
__device__ __forceinline__ void stream(const Program& program, const Place& place, Guard& guard) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  uint32_t chunk = 0;
  for (int number = 0; number < program.layers; ++number) {
    const Layer& layer = program.layer[number];
    if (place.unit >= layer.units) continue;
    const uint32_t round_bytes = layer.warps_k * layer.channels * kStep * 2;
    const char* from = static_cast<const char*>(layer.weights) +
                       static_cast<int64_t>(place.unit * program.cluster + place.rank) * layer.rounds * round_bytes;
    for (int round = 0; round < layer.rounds; ++round) {
      for (uint32_t at = 0; at < round_bytes; at += kSlotBytes, ++chunk) {
        const uint32_t slot = chunk % kSlots, bytes = min(round_bytes - at, static_cast<uint32_t>(kSlotBytes));
        if (chunk >= kSlots) {
          guard.wait(place.empty + 8 * slot, (chunk / kSlots - 1) & 1, code_of(kEmpty, number));
          if (guard.dead) return;
        }
        const uint32_t to = place.ring + slot * kSlotBytes, barrier = place.full + 8 * slot;
        barrier_expect(barrier, bytes);
        if (program.evict_first) {
          asm volatile(
              "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
              "[%3], %4;" ::"r"(to),
              "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
              : "memory");
        } else {
          asm volatile(
              "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
              "l"(from), "r"(bytes), "r"(barrier)
              : "memory");
        }
        from += bytes;
      }
    }
  }
}

template <typename T>
__device__ void fill_with_nan(const Layer& layer, void* to, int stride) {
  const int channels = layer.units / (layer.out_step * layer.out_step) * layer.channels;
  const int pixels = (layer.rows >> layer.log_rows_h >> layer.log_rows_w) * layer.out_h * layer.out_w;
  for (int index = threadIdx.x; index < pixels * channels; index += kThreads) {
    static_cast<T*>(to)[static_cast<int64_t>(index / channels) * stride + index % channels] = T(nanf(""));
  }
}

template <typename T>
__device__ __forceinline__ void run(const Program& program) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const uint32_t recv_barrier = shared + 16 * kSlots, recv = shared + program.recv_offset;
  Place place;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(place.rank));
  place.unit = blockIdx.x / program.cluster;
  // the compiler is told that all lanes agree
  place.warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  place.lane = threadIdx.x % 32;
  place.full = shared;
  place.empty = shared + 8 * kSlots;
  place.ring = shared + kBarrierBytes;
  place.sums = place.ring + kSlots * kSlotBytes;
  Guard guard = {program.state, clock64() + program.timeout, false};

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      barrier_init(place.full + 8 * slot, 1);
      barrier_init(place.empty + 8 * slot, kWarps);
    }
    barrier_init(recv_barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_meet();  // nobody sends to a barrier that is not there yet

  if (place.warp == kWarps) {
    if (place.lane == 0) stream(program, place, guard);
  } else {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    uint32_t chunk = 0, received = 0;
    for (int number = 0; number < program.layers; ++number) {
      const Layer& layer = program.layer[number];
      int64_t* times = program.times == nullptr || threadIdx.x != 0
                           ? nullptr
                           : program.times + (static_cast<int64_t>(number) * gridDim.x + blockIdx.x) * 6;
      const bool works = place.unit < layer.units;
      place.phase = place.unit / layer.groups;
      place.channel = (place.unit - place.phase * layer.groups) * layer.channels;
      if (times != nullptr) times[0] = clock64();
      if (threadIdx.x == 0) {
        if (works) {
          const int share = 1 << layer.log_share;
          const int valid = min(share, (min(layer.rows, kPass) << layer.log_quads) - place.rank * share);
          barrier_expect(recv_barrier, max(valid, 0) * layer.passes * program.cluster * 16);
        }
        if (number > 0) {
          guard.wait_count(program.state + (1 + number) * kStateStride, gridDim.x, code_of(kGrid, number));
        }
      }
      multipliers_meet();
      if (times != nullptr) times[1] = clock64();
      if (works) {
        for (int pass = 0; pass < layer.passes; ++pass) {
          multiply_any<T>(layer, place, guard, chunk, pass, number);
          multipliers_meet();
          if (times != nullptr) times[2] = clock64();
          send(layer, place, pass, recv, recv_barrier);
          if (pass + 1 < layer.passes) multipliers_meet();
        }
        if (times != nullptr) times[3] = clock64();
        const uint32_t round_bytes = layer.warps_k * layer.channels * kStep * 2;
        chunk += layer.rounds * ((round_bytes + kSlotBytes - 1) / kSlotBytes);
        guard.wait<true>(recv_barrier, received & 1, code_of(kSums, number));
        ++received;
        if (times != nullptr) times[4] = clock64();
        finish<T>(layer, place, program.cluster, recv);
      }
      if (number + 1 < program.layers) {
        multipliers_meet();
        if (threadIdx.x == 0) {
          asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(program.state + (2 + number) * kStateStride)
                       : "memory");
        }
      }
      if (times != nullptr) times[5] = clock64();
    }
    if (guard.dead || *reinterpret_cast<volatile int32_t*>(program.state) != 0) {
      const Layer& layer = program.layer[program.layers - 1];
      fill_with_nan<T>(layer, layer.store0, layer.stride_0);
      if (layer.store1 != nullptr) fill_with_nan<T>(layer, layer.store1, layer.stride_1);
    } else if (threadIdx.x == 0) {
      // the last block to come here leaves zeros for the next launch
      if (atomicAdd(program.state + kStateStride, 1) == static_cast<int32_t>(gridDim.x) - 1) {
        for (int number = 0; number <= program.layers; ++number) program.state[(1 + number) * kStateStride] = 0;
      }
    }
  }
  __syncwarp();
  cluster_meet();  // a block's shared memory lives until nobody sends to it
}

}  // namespace lgnet

extern "C" __global__ void __launch_bounds__(lgnet::kThreads + 32, 1)
    lgnet_deep_float16(const __grid_constant__ lgnet::Program program) {
  lgnet::run<__half>(program);
}

extern "C" __global__ void __launch_bounds__(lgnet::kThreads + 32, 1)
    lgnet_deep_bfloat16(const __grid_constant__ lgnet::Program program) {
  lgnet::run<__nv_bfloat16>(program);
}
