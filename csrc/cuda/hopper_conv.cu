// A step of the engine (kernels/conv.py) on Hopper: stride 1 convolutions and the phases of transposed ones.
//
// A block computes 64 output channels of a tile of 8 x TILE_H rows g (pixels of one phase):
//
//     out[channel, pixel] = sum over taps and input channels of weight[channel, depth] * patch[pixel + tap, depth]
//
// The channels are the rows of the product (wgmma's M) and the pixels its columns (N = 8 TILE_H). A 64 x 128 block
// then reads 48 bytes of shared memory a clock; the hardware's limit is 128.
//
// Patch. For 64 input channels at a time the tensor memory accelerator (TMA) copies the tile with its halo into
// shared memory once: one line of 128 bytes a pixel, `pitch` pixels a row, swizzled by 128 bytes. Every tap reads the
// same patch from another start address: 8 pixels of a row are one group of wgmma's matrix descriptor, rows are
// `pitch` lines apart. The swizzle exclusive-ors bits 4 to 6 of the shared memory address with its bits 7 to 9, in
// the TMA and in wgmma alike. A start address therefore need not be a multiple of 1024 bytes.
//
// Weights are packed by kernels/conv.py as [taps * channels in, channels out] and loaded in stages of 64 x 64. The
// blocks of a cluster use the same weights, so each loads its part of a stage and multicasts it to all of them.
//
// Warps 0 to 3 multiply and store. Warp 4 loads weights, warp 5 loads patches. Warp 6 applies reflection padding to
// the patches of tiles at the edge of the map: it copies pixels within the patch. For zero padding it does nothing,
// because the TMA fills with zeros.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "source.cuh"
#include "wgmma.cuh"

namespace lgnet {

constexpr int kChannels = 64;  // output channels of a block, and input channels of a step
constexpr int kLine = 128;     // bytes of a pixel's input channels, or of a depth's output channels
constexpr int kWeightBytes = kChannels * kLine;
constexpr int kMaxWeightStages = 12;
constexpr int kMaxPatchStages = 4;
constexpr int kConsumers = 128;
constexpr int kThreads = 256;
constexpr int kRowFloats = kChannels + 4;  // between the results of two pixels; 4 floats avoid bank conflicts

// Everything but the tensor maps. kernels/hopper.py has the same fields in the same order.
struct Args {
  const float* bias;
  const void* residual;
  void* store0;
  void* store1;
  int32_t out_h, out_w, top, bottom, left, right;
  int32_t rows_top, rows_left, in_h, in_w;
  int32_t tiles_x, tiles_y, m_tiles, n_blocks, chunks, phases, out_step;
  int32_t origin_y[2], origin_x[2], first_y[2], first_x[2], count_y[2], count_x[2], taps[2];
  int32_t stride_r, stride_0, stride_1, activation_0, activation_1, reflect;
  // the patch: pixels of a row (pitch), rows, bytes of a stage
  int32_t pitch, box_rows, weight_stages, patch_stages, patch_bytes;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the same barrier in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// A warp signals to every block of the cluster that it has read a stage.
__device__ __forceinline__ void release(uint32_t barrier, uint32_t blocks, int lane) {
  if (lane < blocks) {
    if (blocks > 1) {
      barrier_arrive_remote(barrier, lane);
    } else {
      barrier_arrive(barrier);
    }
  }
}

// The most tries of a wait, so that an endless wait ends in an error. A launch takes microseconds; this many tries
// take 0.1 s or more.
constexpr uint32_t kTries = 10000000;

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done, tries = 0;
  do {
    if (++tries > kTries) __trap();
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

__device__ __forceinline__ void load_patch(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c, int x, int y,
                                           int sample) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(x), "r"(y), "r"(sample)
      : "memory");
}

__device__ __forceinline__ void load_weights(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                             int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// Copies to the same address in every block of the cluster; the barrier of each block counts the bytes.
__device__ __forceinline__ void multicast_weights(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                                  int row, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, "
      "%4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
  return n;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(n));
  return n;
}

// It orders no memory accesses. The initialisation of barriers, which other blocks must see, is ordered by a separate
// fence before it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// wgmma's matrix descriptor without its start address: swizzle of 128 bytes, groups of eight lines `group_bytes`
// apart.
__device__ __forceinline__ uint64_t descriptor(uint32_t group_bytes) {
  return (uint64_t(1) << 62) | (uint64_t(group_bytes >> 4) << 32) | (uint64_t(group_bytes >> 4) << 16);
}

// The descriptor with its start address, which has 14 bits and counts units of 16 bytes. Addresses in shared memory
// are smaller than that limit, so the sum does not overflow into other fields.
__device__ __forceinline__ uint64_t at(uint64_t descriptor, uint32_t address) { return descriptor + (address >> 4); }

// An activation (a value of ACTIVATIONS in kernels/launch.py). It maps x below zero to slope * x, or to 0.
struct Activation {
  float slope;
  bool zero;
  __device__ __forceinline__ explicit Activation(int code) : slope(code == 2 ? 0.2f : 1.0f), zero(code == 1) {}
  // Not fmaxf, which does not return NaN for NaN.
  __device__ __forceinline__ float operator()(float x) const { return x < 0.0f ? (zero ? 0.0f : slope * x) : x; }
};

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using type = __half2;
  static __device__ __forceinline__ float2 wide(__half2 v) { return __half22float2(v); }
  static __device__ __forceinline__ __half2 narrow(float a, float b) { return __floats2half2_rn(a, b); }
};
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __forceinline__ float2 wide(__nv_bfloat162 v) { return __bfloat1622float2(v); }
  static __device__ __forceinline__ __nv_bfloat162 narrow(float a, float b) { return __floats2bfloat162_rn(a, b); }
};

template <typename T>
__device__ __forceinline__ uint4 packed(const float (&v)[8], Activation activation) {
  uint4 result;
  typename Pair<T>::type* pairs = reinterpret_cast<typename Pair<T>::type*>(&result);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = Pair<T>::narrow(activation(v[2 * i]), activation(v[2 * i + 1]));
  }
  return result;
}

// Eight channels of the residual at a pixel (-1: outside), or zeros.
template <typename T>
__device__ __forceinline__ uint4 residual_of(const Args& args, int pixel, int column) {
  if (args.residual == nullptr || pixel < 0) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(static_cast<const T*>(args.residual) + int64_t(pixel) * args.stride_r +
                                         column);
}

// The part of the output that a block computes.
struct Place {
  int sample, y, x;  // row g of the tile's first pixel
  int phase_y, phase_x;
  int column;  // first output channel
};

__device__ __forceinline__ Place place_of(const Args& args, int tile_h) {
  Place p;
  int block = blockIdx.x;
  const int tile = block % args.m_tiles;
  block /= args.m_tiles;
  p.column = block % args.n_blocks * kChannels;
  const int phase = args.phases - 1 - block / args.n_blocks;  // starts with the phases that have the most taps
  p.phase_y = phase >> 1;
  p.phase_x = phase & 1;
  p.x = args.rows_left + tile % args.tiles_x * 8;
  p.y = args.rows_top + tile / args.tiles_x % args.tiles_y * tile_h;
  p.sample = tile / (args.tiles_x * args.tiles_y);
  return p;
}

// Copy pixel `from` of a patch's box onto pixel `to`, eight lanes a pixel.
__device__ __forceinline__ void copy_pixel(char* box, int to, int from, int part) {
  const uint4 v = *reinterpret_cast<const uint4*>(box + from * kLine + ((part ^ (from & 7)) << 4));
  *reinterpret_cast<uint4*>(box + to * kLine + ((part ^ (to & 7)) << 4)) = v;
}

__device__ __forceinline__ int reflected(int i, int size) {
  return i < 0 ? -i : (i >= size ? 2 * (size - 1) - i : i);
}

// Reflection padding, by one warp: writes the row above the map, the one below it, the column to its left and the one
// to its right, where the patch contains them.
__device__ __forceinline__ void mend(char* box, const Args& args, int y0, int x0, int lane) {
  const int below = args.in_h - y0, beyond = args.in_w - x0;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const int row = side ? below : -1 - y0;
    if (row < 0 || row >= args.box_rows) continue;
#pragma unroll 1
    for (int i = lane; i < args.pitch * 8; i += 32) {
      const int x = i >> 3, to = reflected(x0 + x, args.in_w) - x0;
      if (to >= 0 && to < args.pitch) {
        const int from = reflected(y0 + row, args.in_h) - y0;
        copy_pixel(box, row * args.pitch + x, from * args.pitch + to, i & 7);
      }
    }
  }
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const int column = side ? beyond : -1 - x0;
    if (column < 0 || column >= args.pitch) continue;
    const int from = reflected(x0 + column, args.in_w) - x0;
    if (from < 0 || from >= args.pitch) continue;
#pragma unroll 1
    for (int i = lane; i < args.box_rows * 8; i += 32) {
      const int y = i >> 3;
      if (y0 + y < 0 || y0 + y >= args.in_h) continue;  // the corners are written with the rows
      copy_pixel(box, y * args.pitch + column, y * args.pitch + from, i & 7);
    }
  }
}

template <typename T, int TILE_H>
__device__ __forceinline__ void run(const CUtensorMap& source, const CUtensorMap& weights, const Args& args) {
  constexpr int N = 8 * TILE_H;
  constexpr bool BF16 = sizeof(typename Pair<T>::type) == 4 && !__is_same(T, __half);
  extern __shared__ char unaligned[];
  __shared__ uint64_t weights_full[kMaxWeightStages], weights_empty[kMaxWeightStages];
  __shared__ uint64_t patch_full[kMaxPatchStages], patch_mended[kMaxPatchStages], patch_empty[kMaxPatchStages];
  char* const memory = unaligned + ((1024 - (shared_address(unaligned) & 1023)) & 1023);
  char* const patches = memory + args.weight_stages * kWeightBytes;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t blocks = cluster_size();
  const Place place = place_of(args, TILE_H);
  const int count_y = args.count_y[place.phase_y], count_x = args.count_x[place.phase_x];
  const int y0 = place.y + args.origin_y[place.phase_y], x0 = place.x + args.origin_x[place.phase_x];
  const bool mending =
      args.reflect && (y0 < 0 || x0 < 0 || y0 + args.box_rows > args.in_h || x0 + args.pitch > args.in_w);

  if (threadIdx.x == 128) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&weights) : "memory");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&source) : "memory");
  }
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < args.weight_stages; ++i) {
      barrier_init(shared_address(&weights_full[i]), 1);
      barrier_init(shared_address(&weights_empty[i]), 4 * blocks);
    }
#pragma unroll 1
    for (int i = 0; i < args.patch_stages; ++i) {
      barrier_init(shared_address(&patch_full[i]), 1);
      barrier_init(shared_address(&patch_mended[i]), 32);
      barrier_init(shared_address(&patch_empty[i]), 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (blocks > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  if (warp == 4) {
    if (lane == 0) {
      const int part = kChannels / blocks, rank = cluster_rank();
      const int taps_x = args.taps[place.phase_x];
      const int before = place.phase_y * args.taps[0] * (args.taps[0] + args.taps[1]) +
                         place.phase_x * args.taps[place.phase_y] * args.taps[0];
      const uint32_t to = shared_address(memory) + rank * part * kLine;
      int stage = 0, parity = 1;
#pragma unroll 1
      for (int chunk = 0; chunk < args.chunks; ++chunk) {
#pragma unroll 1
        for (int y = 0; y < count_y; ++y) {
#pragma unroll 1
          for (int x = 0; x < count_x; ++x) {
            const int tap = before + (args.first_y[place.phase_y] + y) * taps_x + args.first_x[place.phase_x] + x;
            const int row = (tap * args.chunks + chunk) * kChannels + rank * part;
            const uint32_t full = shared_address(&weights_full[stage]);
            barrier_wait(shared_address(&weights_empty[stage]), parity);
            barrier_expect(full, kWeightBytes);
            if (blocks > 1) {
              multicast_weights(to + stage * kWeightBytes, &weights, full, place.column, row, (1 << blocks) - 1);
            } else {
              load_weights(to + stage * kWeightBytes, &weights, full, place.column, row);
            }
            if (++stage == args.weight_stages) {
              stage = 0;
              parity ^= 1;
            }
          }
        }
      }
      // A block must not end before every block of the cluster has signalled its barriers for the last time.
#pragma unroll 1
      for (int i = 0; i < args.weight_stages; ++i) {
        barrier_wait(shared_address(&weights_empty[stage]), parity);
        if (++stage == args.weight_stages) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
  } else if (warp == 5) {
    if (lane == 0) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      int stage = 0, parity = 1;
#pragma unroll 1
      for (int chunk = 0; chunk < args.chunks; ++chunk) {
        const uint32_t full = shared_address(&patch_full[stage]);
        const uint32_t to = shared_address(patches) + stage * args.patch_bytes;
        barrier_wait(shared_address(&patch_empty[stage]), parity);
        barrier_expect(full, args.box_rows * args.pitch * kLine);
        load_patch(to, &source, full, chunk * kChannels, x0, y0, place.sample);
        if (++stage == args.patch_stages) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
  } else if (warp == 6) {
    if (mending) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      int stage = 0, parity = 0;
#pragma unroll 1
      for (int chunk = 0; chunk < args.chunks; ++chunk) {
        barrier_wait(shared_address(&patch_full[stage]), parity);
        mend(patches + stage * args.patch_bytes, args, y0, x0, lane);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        barrier_arrive(shared_address(&patch_mended[stage]));
        if (++stage == args.patch_stages) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
  } else if (warp < 4) {
    // Eight threads store a pixel, eight channels each.
    constexpr int kPixels = kConsumers / 8, kPasses = N / kPixels;
    const int part = threadIdx.x % 8 * 8, first_pixel = threadIdx.x / 8;
    const int column = place.column + part;
    int pixels[kPasses];  // -1: outside
    // The residual is read before the products if the registers suffice to hold it.
    constexpr bool kEarly = kPasses <= 8;
    uint4 residual[kEarly ? kPasses : 1];
    asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int pixel = pass * kPixels + first_pixel;
      const int y = (place.y + pixel / 8) * args.out_step + place.phase_y;
      const int x = (place.x + pixel % 8) * args.out_step + place.phase_x;
      const bool inside = y >= args.top && y < args.bottom && x >= args.left && x < args.right;
      pixels[pass] = inside ? (place.sample * args.out_h + y) * args.out_w + x : -1;
      if (kEarly) residual[pass] = residual_of<T>(args, pixels[pass], column);
    }

    float sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
    const uint32_t row_bytes = args.pitch * kLine;
    const uint64_t a = descriptor(1024), b = descriptor(row_bytes);
    const uint32_t weight_base = shared_address(memory), patch_base = shared_address(patches);
    int stage = 0, parity = 0, patch_stage = 0, patch_parity = 0;
    int before = -1;
#pragma unroll 1
    for (int chunk = 0; chunk < args.chunks; ++chunk) {
      barrier_wait(shared_address(mending ? &patch_mended[patch_stage] : &patch_full[patch_stage]), patch_parity);
      const uint32_t patch = patch_base + patch_stage * args.patch_bytes;
      bool first = true;
#pragma unroll 1
      for (int y = 0; y < count_y; ++y) {
#pragma unroll 1
        for (int x = 0; x < count_x; ++x) {
          const uint32_t start = patch + y * row_bytes + x * kLine;
          const uint64_t from_weights = at(a, weight_base + stage * kWeightBytes);
          const uint64_t from_patch = at(b, start);
          barrier_wait(shared_address(&weights_full[stage]), parity);
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
          for (int k = 0; k < kChannels / 16; ++k) {
            Product<N>::template add<BF16>(sum, from_weights + k * 16 * kLine / 16, from_patch + k * 32 / 16);
          }
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
          // At most the last product is unfinished: the weights of the step before it have been read.
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          if (before >= 0) release(shared_address(&weights_empty[before]), blocks, lane);
          if (first && chunk > 0 && lane == 0) {
            const int last = patch_stage == 0 ? args.patch_stages - 1 : patch_stage - 1;
            barrier_arrive(shared_address(&patch_empty[last]));
          }
          first = false;
          before = stage;
          if (++stage == args.weight_stages) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
      if (++patch_stage == args.patch_stages) {
        patch_stage = 0;
        patch_parity ^= 1;
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release(shared_address(&weights_empty[before]), blocks, lane);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(sum[i])::"memory");

    // The sums go through shared memory, in place of the patches, as float32 [pixel, channel].
    float* const rows = reinterpret_cast<float*>(patches);
    asm volatile("bar.sync 1, 128;" ::: "memory");
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int pixel = i / 4 * 8 + lane % 4 * 2 + i % 2;
      rows[pixel * kRowFloats + warp * 16 + lane / 4 + i / 2 % 2 * 8] = sum[i];
    }
    asm volatile("bar.sync 1, 128;" ::: "memory");
    const float4 bias0 = *reinterpret_cast<const float4*>(args.bias + column);
    const float4 bias1 = *reinterpret_cast<const float4*>(args.bias + column + 4);
    const Activation activation0(args.activation_0), activation1(args.activation_1);
    const float bias[8] = {bias0.x, bias0.y, bias0.z, bias0.w, bias1.x, bias1.y, bias1.z, bias1.w};
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (pixels[pass] < 0) continue;
      const float* from = rows + (pass * kPixels + first_pixel) * kRowFloats + part;
      const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
      float value[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const uint4 added = kEarly ? residual[kEarly ? pass : 0] : residual_of<T>(args, pixels[pass], column);
      const typename Pair<T>::type* more = reinterpret_cast<const typename Pair<T>::type*>(&added);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 r = Pair<T>::wide(more[i]);
        value[2 * i] = value[2 * i] + bias[2 * i] + r.x;
        value[2 * i + 1] = value[2 * i + 1] + bias[2 * i + 1] + r.y;
      }
      *reinterpret_cast<uint4*>(static_cast<T*>(args.store0) + int64_t(pixels[pass]) * args.stride_0 + column) =
          packed<T>(value, activation0);
      if (args.store1 != nullptr) {
        *reinterpret_cast<uint4*>(static_cast<T*>(args.store1) + int64_t(pixels[pass]) * args.stride_1 + column) =
            packed<T>(value, activation1);
      }
    }
  }
}

}  // namespace lgnet

#define LGNET_CONV(name, type, tile_h)                                                              \
  extern "C" __global__ void __launch_bounds__(lgnet::kThreads, 1)                                  \
      name(const __grid_constant__ CUtensorMap source, const __grid_constant__ CUtensorMap weights, \
           const __grid_constant__ lgnet::Args args) {                                              \
    lgnet::run<type, tile_h>(source, weights, args);                                                \
  }

LGNET_CONV(lgnet_conv_float16_4, __half, 4)
LGNET_CONV(lgnet_conv_float16_8, __half, 8)
LGNET_CONV(lgnet_conv_float16_16, __half, 16)
LGNET_CONV(lgnet_conv_float16_32, __half, 32)
LGNET_CONV(lgnet_conv_bfloat16_4, __nv_bfloat16, 4)
LGNET_CONV(lgnet_conv_bfloat16_8, __nv_bfloat16, 8)
LGNET_CONV(lgnet_conv_bfloat16_16, __nv_bfloat16, 16)
LGNET_CONV(lgnet_conv_bfloat16_32, __nv_bfloat16, 32)
