// Convolutions on Hopper: of stride 1, the phases of transposed ones, and 4x4 ones of stride 2. hopper_conv.cu has
// the kernels of one convolution, hopper_chain.cu those of several in one launch.
//
// A block computes 64 output channels of a tile of 8 x TILE_H rows g (pixels of one phase):
//
//     out[channel, pixel] = sum over taps and input channels of weight[channel, depth] * patch[pixel + tap, depth]
//
// The channels are the rows of the product (wgmma's M) and the pixels its columns (N = 8 TILE_H). A 64 x 128 block
// then reads 96 bytes of shared memory a clock; the hardware's limit is 128.
//
// Patch. For 64 input channels at a time the tensor memory accelerator (TMA) copies the tile with its halo into
// shared memory once: one line of 128 bytes a pixel, `pitch` pixels a row, swizzled by 128 bytes. Every tap reads the
// same patch from another start address: 8 pixels of a row are one group of wgmma's matrix descriptor, rows are
// `pitch` lines apart. The swizzle exclusive-ors bits 4 to 6 of the shared memory address with its bits 7 to 9, in
// the TMA and in wgmma alike. A start address therefore need not be a multiple of 1024 bytes.
//
// Stride 2. The even and odd rows and columns of the map are four planes, each with a tensor map of its own. A tile
// takes a patch of every plane; within a plane the stride is 1, and every second tap belongs to it.
//
// Weights are packed by kernels/conv.py as [taps * channels in, channels out] and loaded in boxes of 64 x 64. The
// blocks of a cluster either have the same weights and different tiles: then each loads its part of a box and
// multicasts it to all of them. Or they split the input channels of the same tile (`Args::split`): block i takes
// every cluster-th 64 channels from the i-th on. Each then stores a part of the pixels, for which it reads the sums
// of all blocks through distributed shared memory, in the order of the blocks.
//
// A step is a row of taps of 64 input channels: their weights are one stage, their products one group. Waiting,
// addresses and signals of a step take about 100 instructions, 400 clocks, which pass while the tensor cores work on
// the step before (tile of 8 x 16: 256 clocks a tap). GROUPS warpgroups multiply: group i computes every GROUPS-th
// step from the i-th on, for the whole tile, so that one multiplies while another waits. Their sums are added when
// they are stored. Where a block has several tiles, two warpgroups compute them in turns, each a whole one: one
// multiplies while the other stores.
// Of four more warps one loads weights, one loads patches, and two apply reflection padding to the patches of tiles
// at the edge of the map: they copy pixels within the patch. For zero padding they do nothing, because the TMA fills
// with zeros.
#pragma once

#include "activation.cuh"
#include "divisor.cuh"
#include "elements.cuh"
#include "ptx.cuh"
#include "ring.cuh"
#include "wait.cuh"
#include "wgmma.cuh"

namespace lgnet {

constexpr int kChannels = 64;                 // output channels of a block, and input channels of a step
constexpr int kLine = 128;                    // bytes of a pixel's input channels, or of a depth's output channels
constexpr int kTapBytes = kChannels * kLine;  // of the weights of a tap
constexpr int kMaxWeightStages = 12;
constexpr int kMaxPatchStages = 4;
constexpr int kGroupThreads = 128;
constexpr int kGroupWarps = 4;
constexpr int kOtherThreads = 128;         // of the warps that load and mend
constexpr int kMendingWarps = 2;           // one for rows, one for columns
constexpr int kRowFloats = kChannels + 4;  // between the results of two pixels; 4 floats avoid bank conflicts
constexpr int kClocks = 8;                 // numbers of a block in `Args::clocks`

// What is added to a convolution's sums, and where they are stored. kernels/hopper.py has the same fields in the same
// order, of `Args` too.
struct Output {
  const float* bias;
  const void* residual;
  void* store0;
  void* store1;
  int32_t top, bottom, left, right;
  int32_t stride_r, stride_0, stride_1, activation_0, activation_1;
};

// The work of the blocks.
struct Args {
  int64_t* clocks;  // [convolutions, blocks, kClocks], of the kernels with TIMED
  int32_t out_h, out_w, rows_top, rows_left, in_h, in_w;
  Divisor tiles_x, tiles_y, m_tiles, n_blocks;
  // Logarithms of the blocks of a cluster: that share weights; that split the depth. planes: 1 or 4. tap_step: from a
  // tap to the next of its plane.
  int32_t log_sharing, log_parts, chunks, phases, out_step, planes, tap_step;
  int32_t origin_y[2], origin_x[2], first_y[2], first_x[2], count_y[2], count_x[2], taps[2];
  int32_t reflect;
  // the patch: pixels of a row (pitch), rows; stages and their bytes
  int32_t pitch, box_rows, weight_stages, weight_bytes, patch_stages, patch_bytes;
  // tiles: of all blocks; with more than blocks, a block computes several. sums: bytes from the weights to the sums
  // of a tile; 0: they replace weights and patches.
  int32_t tiles, sums;
};

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

// Eight channels of the residual at a pixel (-1: outside), or zeros.
template <typename T>
__device__ __forceinline__ uint4 residual_of(const Output& output, int pixel, int column) {
  if (output.residual == nullptr || pixel < 0) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(static_cast<const T*>(output.residual) + int64_t(pixel) * output.stride_r +
                                         column);
}

// What the blocks of a cluster share, and this block's part of it.
struct Cluster {
  int sharing;      // blocks that have the same weights
  int parts, part;  // of the input channels

  __device__ __forceinline__ explicit Cluster(const Args& args) {
    sharing = 1 << args.log_sharing;
    parts = 1 << args.log_parts;
    part = args.log_parts > 0 ? cluster_rank() : 0;
  }
};

// The part of the output that a block computes.
struct Place {
  int sample, y, x;  // row g of the tile's first pixel
  int phase_y, phase_x;
  int column;  // first output channel
};

// number: of the tile.
__device__ __forceinline__ Place place_of(const Args& args, int tile_h, uint32_t number) {
  Place p;
  Digits block = {number >> args.log_parts};
  Digits tile = {static_cast<uint32_t>(block.next(args.m_tiles))};
  p.column = block.next(args.n_blocks) * kChannels;
  const int phase = args.phases - 1 - static_cast<int>(block.rest);  // starts with the phases that have the most taps
  p.phase_y = phase >> 1;
  p.phase_x = phase & 1;
  p.x = args.rows_left + tile.next(args.tiles_x) * 8;
  p.y = args.rows_top + tile.next(args.tiles_y) * tile_h;
  p.sample = static_cast<int>(tile.rest);
  return p;
}

__device__ __forceinline__ int reflected(int i, int size) {
  return i < 0 ? -i : (i >= size ? 2 * (size - 1) - i : i);
}

// One warp copies `count` pixels of a patch's box onto others, eight lanes a pixel. `pixel` sets where the i-th comes
// from and goes to, and is false for those that stay. Several are read before the first is written.
template <typename Pixel>
__device__ __forceinline__ void copy_pixels(char* box, int count, int lane, const Pixel& pixel) {
  constexpr int kAhead = 5;
#pragma unroll 1
  for (int first = lane; first < count * 8; first += 32 * kAhead) {
    uint4 value[kAhead];
    int places[kAhead];
    const int part = lane & 7;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = first + 32 * k;
      int from = 0, to = 0;
      places[k] = i < count * 8 && pixel(i >> 3, from, to) ? to * kLine + ((part ^ (to & 7)) << 4) : -1;
      if (places[k] >= 0) value[k] = *reinterpret_cast<const uint4*>(box + from * kLine + ((part ^ (from & 7)) << 4));
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (places[k] >= 0) *reinterpret_cast<uint4*>(box + places[k]) = value[k];
    }
  }
}

// Reflection padding of a patch: the row above the map and the one below it, corners included, where the patch
// contains them. A tile that is wholly below the map has neither.
__device__ __forceinline__ void mend_rows(char* box, const Args& args, int y0, int x0, int lane) {
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const int row = side ? args.in_h - y0 : -1 - y0, from_row = reflected(y0 + row, args.in_h) - y0;
    if (row < 0 || row >= args.box_rows || from_row < 0 || from_row >= args.box_rows) continue;
    copy_pixels(box, args.pitch, lane, [&](int x, int& from, int& to) {
      const int column = reflected(x0 + x, args.in_w) - x0;
      from = from_row * args.pitch + column, to = row * args.pitch + x;
      return column >= 0 && column < args.pitch;
    });
  }
}

// The column to the left of the map and the one to its right, in the rows of the map. It neither reads nor writes
// what `mend_rows` writes.
__device__ __forceinline__ void mend_columns(char* box, const Args& args, int y0, int x0, int lane) {
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const int column = side ? args.in_w - x0 : -1 - x0, from_column = reflected(x0 + column, args.in_w) - x0;
    if (column < 0 || column >= args.pitch || from_column < 0 || from_column >= args.pitch) continue;
    copy_pixels(box, args.box_rows, lane, [&](int y, int& from, int& to) {
      from = y * args.pitch + from_column, to = y * args.pitch + column;
      return y0 + y >= 0 && y0 + y < args.in_h;
    });
  }
}

// The shared memory of a block: weights and patches in stages, then a barrier of each kind for every stage.
struct Memory {
  uint32_t weights, patches, barriers;
  char* bytes;  // the same as `weights`

  __device__ __forceinline__ explicit Memory(const Args& args) {
    char* const start = reinterpret_cast<char*>(dynamic_shared());
    bytes = start + ((1024 - (shared_address(start) & 1023)) & 1023);  // the swizzle repeats after 1024 bytes
    weights = shared_address(bytes);
    patches = weights + args.weight_stages * args.weight_bytes;
    barriers = patches + args.patch_stages * args.patch_bytes;
  }
  __device__ __forceinline__ uint32_t weights_full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t weights_empty(int stage) const {
    return weights_full(kMaxWeightStages + stage);
  }
  __device__ __forceinline__ uint32_t patch_full(int stage) const {
    return weights_full(2 * kMaxWeightStages + stage);
  }
  __device__ __forceinline__ uint32_t patch_mended(int stage) const { return patch_full(kMaxPatchStages + stage); }
  __device__ __forceinline__ uint32_t patch_empty(int stage) const { return patch_full(2 * kMaxPatchStages + stage); }

  // Every warp initialises a few of the barriers: one after another they would take longer than a product.
  // READERS: warpgroups that read each patch.
  template <int GROUPS, int READERS>
  __device__ __forceinline__ void initialise(const Args& args, int blocks, int warp, int lane) const {
    constexpr int kWarps = (GROUPS * kGroupThreads + kOtherThreads) / 32;
    if (lane != 0) return;
#pragma unroll 1
    for (int i = warp; i < args.weight_stages; i += kWarps) {
      barrier_init(weights_full(i), 1);
      barrier_init(weights_empty(i), kGroupWarps * blocks);
    }
#pragma unroll 1
    for (int i = kWarps - 1 - warp; i < args.patch_stages; i += kWarps) {
      barrier_init(patch_full(i), 1);
      barrier_init(patch_mended(i), kMendingWarps * 32);
      barrier_init(patch_empty(i), kGroupWarps * READERS);
    }
    barriers_initialised();
  }
};

// The barriers of the block are initialised, and those of its cluster.
template <int GROUPS, int READERS = GROUPS>
__device__ __forceinline__ void begin(const Args& args, const Memory& memory, const Cluster& cluster, int warp,
                                      int lane) {
  memory.initialise<GROUPS, READERS>(args, cluster.sharing, warp, lane);
  if (cluster.sharing > 1) {
    cluster_meet_initialised();
  } else {
    __syncthreads();
  }
}

// What a block reads for its tile, of the first plane.
struct Reading {
  int y0, x0;            // the patch's first pixel in the map
  int count_y, count_x;  // taps
  bool mending;          // whether the patch may have pixels of the padding that reflect

  __device__ __forceinline__ Reading(const Args& args, const Place& place) {
    y0 = place.y + args.origin_y[place.phase_y], x0 = place.x + args.origin_x[place.phase_x];
    count_y = args.count_y[place.phase_y], count_x = args.count_x[place.phase_x];
    // Of several tiles of a block all count as such, so that the barriers of all have the same parity.
    mending = args.reflect && (args.tiles > static_cast<int>(gridDim.x) || y0 < 0 || x0 < 0 ||
                               y0 + args.box_rows > args.in_h || x0 + args.pitch > args.in_w);
  }
};

// One thread loads a convolution's weights, as far ahead as the ring has space.
__device__ __forceinline__ void load_weights(const Args& args, const Memory& memory, const Place& place,
                                             const Reading& reading, const CUtensorMap& weights,
                                             const Cluster& cluster, Ring& ring) {
  const int taps_x = args.taps[place.phase_x];
  const int before = place.phase_y * args.taps[0] * (args.taps[0] + args.taps[1]) +
                     place.phase_x * args.taps[place.phase_y] * args.taps[0];
  const int tap_rows = args.chunks * kChannels;  // of the weights, from a tap to the next
  const int next_x = args.tap_step * tap_rows, next_y = next_x * taps_x;
  const int part = kChannels >> args.log_sharing, rank = cluster.sharing > 1 ? cluster_rank() : 0;
  const uint32_t to = memory.weights + rank * part * kLine;
#pragma unroll 1
  for (int chunk = cluster.part; chunk < args.chunks; chunk += cluster.parts) {
#pragma unroll 1
    for (int plane = 0; plane < args.planes; ++plane) {
      const int first_y = args.first_y[place.phase_y + (plane >> 1)];
      const int first_x = args.first_x[place.phase_x + (plane & 1)];
      int row = (before + first_y * taps_x + first_x) * tap_rows + chunk * kChannels + rank * part;
#pragma unroll 1
      for (int y = 0; y < reading.count_y; ++y, row += next_y) {
        const uint32_t full = memory.weights_full(ring.stage);
        barrier_wait(memory.weights_empty(ring.stage), ring.parity);
        barrier_expect(full, reading.count_x * kTapBytes);
#pragma unroll 1
        for (int x = 0; x < reading.count_x; ++x) {
          const uint32_t stage = to + ring.stage * args.weight_bytes + x * kTapBytes;
          if (cluster.sharing > 1) {
            multicast_box(stage, weights, full, place.column, row + x * next_x, (1 << cluster.sharing) - 1);
          } else {
            copy_box(stage, weights, full, place.column, row + x * next_x);
          }
        }
        ring.advance();
      }
    }
  }
}

// A block must not end before every block of the cluster has signalled its barriers for the last time.
__device__ __forceinline__ void wait_for_signals(const Args& args, const Memory& memory, Ring ring) {
#pragma unroll 1
  for (int i = 0; i < args.weight_stages; ++i) {
    barrier_wait(memory.weights_empty(ring.stage), ring.parity);
    ring.advance();
  }
}

// One thread loads the patches, from the feature map or from its planes. `wait` waits until they may be read.
template <typename Wait>
__device__ __forceinline__ void load_patches(const Args& args, const Memory& memory, const Place& place,
                                             const CUtensorMap* planes, const Cluster& cluster, Ring& ring,
                                             const Wait& wait) {
  bool waits = true;
#pragma unroll 1
  for (int chunk = cluster.part; chunk < args.chunks; chunk += cluster.parts) {
#pragma unroll 1
    for (int plane = 0; plane < args.planes; ++plane) {
      const int y0 = place.y + args.origin_y[place.phase_y + (plane >> 1)];
      const int x0 = place.x + args.origin_x[place.phase_x + (plane & 1)];
      const uint32_t full = memory.patch_full(ring.stage);
      barrier_wait(memory.patch_empty(ring.stage), ring.parity);
      barrier_expect(full, args.box_rows * args.pitch * kLine);
      if (waits) wait(), waits = false;
      copy_box(memory.patches + ring.stage * args.patch_bytes, planes[plane], full, chunk * kChannels, x0, y0,
               place.sample);
      ring.advance();
    }
  }
}

// Two warps apply reflection padding to every patch, of a single plane: `rows` whether this is the one for rows.
__device__ __forceinline__ void mend_patches(const Args& args, const Memory& memory, const Reading& reading,
                                             const Cluster& cluster, bool rows, int lane, Ring& ring) {
  char* const patches = memory.bytes + (memory.patches - memory.weights);
#pragma unroll 1
  for (int chunk = cluster.part; chunk < args.chunks; chunk += cluster.parts) {
    barrier_wait(memory.patch_full(ring.stage), ring.parity);
    char* const box = patches + ring.stage * args.patch_bytes;
    if (rows) {
      mend_rows(box, args, reading.y0, reading.x0, lane);
    } else {
      mend_columns(box, args, reading.y0, reading.x0, lane);
    }
    fence_async();
    barrier_arrive(memory.patch_mended(ring.stage));
    ring.advance();
  }
}

// Clocks of the kernels with TIMED, in `Args::clocks`: when the block started, its barriers were ready, the kernel
// before had ended, the first step's operands were there, the last product was done, the block ended; and the sums of
// what the first warp waited for weights and for patches.
enum Clock { kStart, kReady, kPrevious, kOperands, kProducts, kEnd, kForWeights, kForPatches };

template <bool TIMED>
struct Clocks {
  int64_t value[TIMED ? kClocks : 1] = {};

  __device__ __forceinline__ void set(Clock which) {
    if constexpr (TIMED) value[which] = clock64();
  }
  // Waits for a barrier and adds the clocks that it takes.
  __device__ __forceinline__ void wait(Clock which, uint32_t barrier, uint32_t parity) {
    if constexpr (TIMED) value[which] -= clock64();
    barrier_wait(barrier, parity);
    if constexpr (TIMED) value[which] += clock64();
  }
  __device__ __forceinline__ void store(const Args& args, int number = 0) const {
    if constexpr (TIMED) {
      int64_t* const to = args.clocks + (int64_t(number) * gridDim.x + blockIdx.x) * kClocks;
      for (int i = 0; i < kClocks; ++i) to[i] = value[i];
    }
  }
};

// The weights and patches that a warpgroup reads next.
struct Rings {
  Ring weights, patches;

  __device__ __forceinline__ explicit Rings(const Args& args)
      : weights{0, args.weight_stages, 0}, patches{0, args.patch_stages, 0} {}
};

// The number of this thread's warpgroup. The shuffle tells the compiler that the value is the same in all lanes.
template <int GROUPS>
__device__ __forceinline__ int group_of_thread() {
  return GROUPS == 1 ? 0 : __shfl_sync(0xffffffff, threadIdx.x / kGroupThreads, 0);
}

// The products of one warpgroup, where a row has kTaps taps. Returns how many patches it has released: those before
// the one of its last step.
template <bool BF16, int N, int GROUPS, int kTaps, bool TIMED>
__device__ __forceinline__ int multiply(const Args& args, const Memory& memory, const Reading& reading, int group,
                                        int lane, const Cluster& cluster, Rings& rings, float (&sum)[N / 2],
                                        Clocks<TIMED>& clocks) {
  const uint32_t row_bytes = args.pitch * kLine;
  const uint64_t a = descriptor(1024, 1024), b = descriptor(row_bytes, row_bytes);
  Ring &weights = rings.weights, &patches = rings.patches;
  uint32_t patch = 0;
  const int chunks = ((args.chunks - cluster.part + cluster.parts - 1) >> args.log_parts) * args.planes;
  int chunk = 0, y = 0;      // the step; the patches of a chunk's planes count as chunks
  int waited = 0, kept = 0;  // patches before these chunks have arrived, and have been released
  Ring held = patches;       // where the patch of chunk `kept` is
  int before = -1;           // the stage of this group's last step
  const auto next = [&] {
    weights.advance();
    if (++y == reading.count_y) y = 0, ++chunk;
  };
  for (int i = 0; i < group; ++i) next();
  // The loop is always entered and has no branch around the products: ptxas would otherwise wait for each product.
  // Every group has a step (kernels/hopper_shapes.py).
#pragma unroll 1
  do {
#pragma unroll 1
    for (; waited <= chunk; ++waited) {  // every patch, also one of which this group has no step
      clocks.wait(kForPatches,
                  reading.mending ? memory.patch_mended(patches.stage) : memory.patch_full(patches.stage),
                  patches.parity);
      patch = memory.patches + patches.stage * args.patch_bytes;
      patches.advance();
    }
    const uint64_t from_weights = at(a, memory.weights + weights.stage * args.weight_bytes);
    const uint64_t from_patch = at(b, patch + y * row_bytes);
    clocks.wait(kForWeights, memory.weights_full(weights.stage), weights.parity);
    if (before < 0) clocks.set(kOperands);
    products_begin();
#pragma unroll
    for (int x = 0; x < kTaps; ++x) {
#pragma unroll
      for (int k = 0; k < kChannels / 16; ++k) {
        Product<N>::template add<BF16>(sum, from_weights + (x * kTapBytes + k * 16 * kLine) / 16,
                                       from_patch + (x * kLine + k * 32) / 16);
      }
    }
    products_commit();
    // At most the last step's products are unfinished: the operands of the step before it have been read.
    products_wait<1>();
    if (before >= 0) release(memory.weights_empty(before), cluster.sharing, lane);
#pragma unroll 1
    for (; kept < chunk; ++kept) {
      if (lane == 0) barrier_arrive(memory.patch_empty(held.stage));
      held.advance();
    }
    before = weights.stage;
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) next();
  } while (chunk < chunks);
  products_wait<0>();
  release(memory.weights_empty(before), cluster.sharing, lane);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) opaque(sum[i]);
  clocks.set(kProducts);
  return kept;
}

template <bool BF16, int N, int GROUPS, bool TIMED>
__device__ __forceinline__ int multiply_any(const Args& args, const Memory& memory, const Reading& reading, int group,
                                            int lane, const Cluster& cluster, Rings& rings, float (&sum)[N / 2],
                                            Clocks<TIMED>& clocks) {
  if (reading.count_x == 1) {
    return multiply<BF16, N, GROUPS, 1>(args, memory, reading, group, lane, cluster, rings, sum, clocks);
  }
  if (reading.count_x == 2) {
    return multiply<BF16, N, GROUPS, 2>(args, memory, reading, group, lane, cluster, rings, sum, clocks);
  }
  return multiply<BF16, N, GROUPS, 3>(args, memory, reading, group, lane, cluster, rings, sum, clocks);
}

// Where a thread stores: eight threads store a pixel, eight channels each.
template <typename T, int N, int GROUPS>
struct Target {
  static constexpr int kPixels = GROUPS * kGroupThreads / 8, kPasses = N / kPixels;
  // The residual is read before the products if the registers suffice to hold it.
  static constexpr bool kEarly = N <= 128;
  int pixels[kPasses];  // -1: outside
  uint4 residual[kEarly ? kPasses : 1];
  int first_pixel, channel, column;  // channel: of the block's
  float bias[8];                     // from memory, where every run reads it once: before the products, not after

  // Of the cluster's blocks that split the depth, block i stores every parts-th pixel from the i-th on.
  __device__ __forceinline__ Target(const Args& args, const Output& output, const Place& place,
                                    const Cluster& cluster) {
    channel = threadIdx.x % 8 * 8, first_pixel = threadIdx.x % (GROUPS * kGroupThreads) / 8;
    column = place.column + channel;
    const float4 low = *reinterpret_cast<const float4*>(output.bias + column);
    const float4 high = *reinterpret_cast<const float4*>(output.bias + column + 4);
    bias[0] = low.x, bias[1] = low.y, bias[2] = low.z, bias[3] = low.w;
    bias[4] = high.x, bias[5] = high.y, bias[6] = high.z, bias[7] = high.w;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int pixel = pixel_of(pass, cluster);
      const int y = (place.y + pixel / 8) * args.out_step + place.phase_y;
      const int x = (place.x + pixel % 8) * args.out_step + place.phase_x;
      const bool inside = pixel < N && y >= output.top && y < output.bottom && x >= output.left && x < output.right;
      pixels[pass] = inside ? (place.sample * args.out_h + y) * args.out_w + x : -1;
    }
  }

  // What kernels before this one have written, or this thread.
  __device__ __forceinline__ void read_residual(const Output& output) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (kEarly) residual[pass] = residual_of<T>(output, pixels[pass], column);
    }
  }

  __device__ __forceinline__ int pixel_of(int pass, const Cluster& cluster) const {
    return (pass * kPixels + first_pixel) * cluster.parts + cluster.part;
  }

  // Adds eight sums of `pixel` by every group of a block; `read` reads four of them at a byte of its `rows`.
  template <typename Read>
  __device__ __forceinline__ void add(float (&value)[8], int pixel, const Read& read) const {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      const int at = ((group * N + pixel) * kRowFloats + channel) * 4;
      const float4 low = read(at), high = read(at + 16);
      value[0] += low.x, value[1] += low.y, value[2] += low.z, value[3] += low.w;
      value[4] += high.x, value[5] += high.y, value[6] += high.z, value[7] += high.w;
    }
  }

  // Stores the sums of all groups and, with kSplit, of all blocks of the cluster, with bias and residual. rows: the
  // block's sums in shared memory, float32 [group, pixel, channel]. Without a split, two passes have no branch
  // between them, so that the compiler reads the sums of both before it needs the first.
  template <bool kSplit>
  __device__ __forceinline__ void store(const Output& output, const char* rows, const Cluster& cluster) const {
    constexpr int kTogether = kPasses < 2 ? kPasses : 2;
    const Activation activation0(output.activation_0), activation1(output.activation_1);
#pragma unroll
    for (int pass = 0; pass < kPasses; pass += kTogether) {
      float value[kTogether][8] = {};
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if constexpr (!kSplit) {
          add(value[i], (pass + i) * kPixels + first_pixel,
              [&](int at) { return *reinterpret_cast<const float4*>(rows + at); });
        } else if (pixels[pass + i] >= 0) {
#pragma unroll 1
          for (int block = 0; block < cluster.parts; ++block) {
            const uint32_t sums = remote(shared_address(rows), block);
            add(value[i], pixel_of(pass + i, cluster), [&](int at) { return load_remote(sums + at); });
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) add_others(output, value[i], pass + i);
      put(value, pass, static_cast<T*>(output.store0), output.stride_0, activation0);
      if (output.store1 != nullptr) put(value, pass, static_cast<T*>(output.store1), output.stride_1, activation1);
    }
  }

  // Adds bias and residual to eight sums of a pass.
  __device__ __forceinline__ void add_others(const Output& output, float (&value)[8], int pass) const {
    using Two = typename Pair<T>::type;
    const uint4 added = kEarly ? residual[kEarly ? pass : 0] : residual_of<T>(output, pixels[pass], column);
    const Two* more = reinterpret_cast<const Two*>(&added);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 r = Pair<T>::wide(more[i]);
      value[2 * i] = value[2 * i] + bias[2 * i] + r.x;
      value[2 * i + 1] = value[2 * i + 1] + bias[2 * i + 1] + r.y;
    }
  }

  // Stores the values of the passes from `pass` on.
  template <int kTogether>
  __device__ __forceinline__ void put(const float (&value)[kTogether][8], int pass, T* to, int stride,
                                      Activation activation) const {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int pixel = pixels[pass + i];
      const uint4 stored = packed<T>(value[i], activation);
      store_if(pixel >= 0, to + int64_t(pixel) * stride + column, stored);
    }
  }
};

// Writes a warpgroup's sums to shared memory, float32 [group, pixel, channel].
template <int N>
__device__ __forceinline__ void write_sums(float* rows, int group, int warp, int lane, const float (&sum)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int pixel = i / 4 * 8 + lane % 4 * 2 + i % 2;
    rows[(group * N + pixel) * kRowFloats + warp * 16 + lane / 4 + i / 2 % 2 * 8] = sum[i];
  }
}

}  // namespace lgnet
