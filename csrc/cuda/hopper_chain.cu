// Consecutive convolutions in one launch: NetL's eight of the residual blocks, and those of the U-Nets beside the
// deep layers.
//
// Of a launch of one such convolution (hopper_conv.cu) hardly more than half the time are products. The rest is the
// start of the launch, the first reads from memory, and the end of its last block. Here all blocks stay: each
// computes a tile of every layer that has so many. Its weights do not depend on the layer before; the ring of weights
// therefore runs ahead into the next layer, while this one is stored. Patches do, also on the tiles beside them:
// after each layer all blocks wait for each other at a counter in global memory. Every block must therefore run at
// the same time, which the launch demands (cooperative) and kernels/hopper_chain.py checks.
//
// Layers may differ in everything but the blocks that share weights and the stages of shared memory. Both warpgroups
// multiply for the same tile, a step each in turns. The sums of a layer replace its patches, all of which have been
// read by then; the weights stay where they are.
//
// A residual must be older than this launch, or what the same thread stored in an earlier layer; so it need not wait
// for other blocks.
#include "hopper_conv.cuh"
#include "source.cuh"

namespace lgnet {

constexpr int kMaxLayers = 8;
constexpr int kCounterStride = 32;  // integers from one counter to the next: each has its own line of the L2 cache
constexpr int kGroups = 2;

// kernels/hopper_chain.py has the same fields in the same order.
struct ChainLayer {
  CUtensorMap planes[4];  // of the feature map: `Sources` of hopper_conv.cu
  CUtensorMap weights;
  Args args;
  Output output;
  int32_t tile_h;
  int32_t unused[11];  // tensor maps are at multiples of 64 bytes
};

#ifndef LGNET_EMULATED
static_assert(sizeof(ChainLayer) == 960, "kernels/hopper_chain.py makes the same structure");
#endif

struct Chain {
  ChainLayer layer[kMaxLayers];
  int32_t* counters;  // [layers, kCounterStride] blocks that have stored a layer; zeros, also afterwards
  int32_t layers;
  int32_t unused[13];
};
#ifndef LGNET_EMULATED
static_assert(sizeof(Chain) == 7744, "as above");
#endif

// Calls use(number, layer, place, reading) for every layer of which this block has a tile.
template <typename Use>
__device__ __forceinline__ void each_layer(const Chain& chain, const Use& use) {
#pragma unroll 1
  for (int number = 0; number < chain.layers; ++number) {
    const ChainLayer& layer = chain.layer[number];
    if (static_cast<int>(blockIdx.x) >= layer.args.tiles) continue;
    const Place place = place_of(layer.args, layer.tile_h, blockIdx.x);
    use(number, layer, place, Reading(layer.args, place));
  }
}

// One thread waits until all blocks have stored a layer, which asynchronous copies may read then.
__device__ __forceinline__ void wait_for_layer(const Chain& chain, int number) {
  const int32_t* const counter = chain.counters + number * kCounterStride;
  const int tiles = chain.layer[number].args.tiles;
  for (uint32_t tries = 0; load_acquire(counter) < tiles;) {
    if (++tries > kTries) __trap();
  }
  fence_async_global();
}

// One thread tells that the block has stored a layer. The last block of the last layer zeroes the counters: its
// blocks have waited for the layer before, whose blocks have waited for the one before that, and so on.
__device__ __forceinline__ void count(const Chain& chain, int number) {
  if (number + 1 < chain.layers) {
    add_release(chain.counters + number * kCounterStride, 1);
  } else if (atomicAdd(chain.counters + number * kCounterStride, 1) == chain.layer[number].args.tiles - 1) {
#pragma unroll 1
    for (int i = 0; i < chain.layers; ++i) chain.counters[i * kCounterStride] = 0;
  }
}

// Releases a layer's patches from the `first` on, after they have arrived: those of a warpgroup's last steps, and the
// last one where the other warpgroup has its only step. ring: of the layer's first patch.
__device__ __forceinline__ void release_patches(const Memory& memory, const Reading& reading, Ring ring, int first,
                                                int patches, int lane) {
  ring.advance(first);
#pragma unroll 1
  for (int i = first; i < patches; ++i) {
    barrier_wait(reading.mending ? memory.patch_mended(ring.stage) : memory.patch_full(ring.stage), ring.parity);
    if (lane == 0) barrier_arrive(memory.patch_empty(ring.stage));
    ring.advance();
  }
}

// The warpgroups that multiply and store: a layer in tiles of N pixels.
template <typename T, int N, bool TIMED>
__device__ __forceinline__ void compute_layer(const Chain& chain, int number, const ChainLayer& layer,
                                              const Memory& memory, const Place& place, const Reading& reading,
                                              const Cluster& cluster, Rings& rings) {
  const int group = group_of_thread<kGroups>(), warp = threadIdx.x / 32 % kGroupWarps, lane = threadIdx.x % 32;
  char* const sums = memory.bytes + (memory.patches - memory.weights);
  Output output = layer.output;
  // Kept in registers: else they are read again while results are stored.
  opaque(output.store0), opaque(output.store1);
  opaque(output.stride_0), opaque(output.stride_1), opaque(output.activation_0), opaque(output.activation_1);
  Clocks<TIMED> clocks;
  clocks.set(kStart);
  Target<T, N, kGroups> target(layer.args, output, place, cluster);
  clocks.set(kReady);
  target.read_residual(output);
  clocks.set(kPrevious);
  float sum[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
  const int patches = layer.args.chunks * layer.args.planes;
  Rings own = rings;
  const int released = multiply_any<Pair<T>::kBf16, N, kGroups, TIMED>(layer.args, memory, reading, group, lane,
                                                                       cluster, own, sum, clocks);
  release_patches(memory, reading, rings.patches, released, patches, lane);
  rings.weights.advance(patches * reading.count_y);
  rings.patches.advance(patches);
  meet<1, kGroups * kGroupThreads>();
  write_sums<N>(reinterpret_cast<float*>(sums), group, warp, lane, sum);
  meet<1, kGroups * kGroupThreads>();
  target.template store<false>(output, sums, cluster);
  fence_async_global();  // copies for the next layer read what was stored,
  fence_async();         // and replace the sums
  // Then all fillings of the weights' stages have been waited for, and either warpgroup may read any of the next.
  meet<1, kGroups * kGroupThreads>();
  clocks.set(kEnd);
  if (threadIdx.x == 0) {
    count(chain, number);
    clocks.store(layer.args, number);
  }
}

template <typename T, bool TIMED>
__device__ __forceinline__ void compute(const Chain& chain, const Memory& memory, const Cluster& cluster) {
  Rings rings(chain.layer[0].args);
  wait_for_previous_kernel();
  each_layer(chain, [&](int number, const ChainLayer& layer, const Place& place, const Reading& reading) {
    if (layer.tile_h == 4) {
      compute_layer<T, 32, TIMED>(chain, number, layer, memory, place, reading, cluster, rings);
    } else if (layer.tile_h == 8) {
      compute_layer<T, 64, TIMED>(chain, number, layer, memory, place, reading, cluster, rings);
    } else {
      compute_layer<T, 128, TIMED>(chain, number, layer, memory, place, reading, cluster, rings);
    }
  });
}

template <typename T, bool TIMED>
__device__ __forceinline__ void run(const Chain& chain) {
  constexpr int kFirstOther = kGroups * kGroupWarps;  // warp
  const Args& first = chain.layer[0].args;
  const Memory memory(first);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Cluster cluster(first);
  if (warp == kFirstOther && lane < chain.layers) prefetch_map(chain.layer[lane].weights);
  if (warp == kFirstOther + 1 && lane < chain.layers) prefetch_map(chain.layer[lane].planes[0]);
  begin<kGroups>(first, memory, cluster, warp, lane);

  if (warp < kFirstOther) {
    compute<T, TIMED>(chain, memory, cluster);
  } else if (warp == kFirstOther && lane == 0) {
    Ring ring = {0, first.weight_stages, 1};
    each_layer(chain, [&](int, const ChainLayer& layer, const Place& place, const Reading& reading) {
      load_weights(layer.args, memory, place, reading, layer.weights, cluster, ring);
    });
    wait_for_signals(first, memory, ring);
  } else if (warp == kFirstOther + 1 && lane == 0) {
    Ring ring = {0, first.patch_stages, 1};
    wait_for_previous_kernel();
    each_layer(chain, [&](int number, const ChainLayer& layer, const Place& place, const Reading&) {
      load_patches(layer.args, memory, place, layer.planes, cluster, ring, [&] {
        if (number > 0) wait_for_layer(chain, number - 1);
      });
    });
  } else if (warp >= kFirstOther + 2) {
    Ring ring = {0, first.patch_stages, 0};
    each_layer(chain, [&](int, const ChainLayer& layer, const Place&, const Reading& reading) {
      if (reading.mending) mend_patches(layer.args, memory, reading, cluster, warp == kFirstOther + 2, lane, ring);
    });
  }
}

}  // namespace lgnet

#define LGNET_CHAIN(name, type, timed)                                                                         \
  extern "C" __global__ void __launch_bounds__(lgnet::kGroups* lgnet::kGroupThreads + lgnet::kOtherThreads, 1) \
      name(const __grid_constant__ lgnet::Chain chain) {                                                       \
    lgnet::run<type, timed>(chain);                                                                            \
  }

LGNET_CHAIN(lgnet_chain_float16, __half, false)
LGNET_CHAIN(lgnet_chain_bfloat16, __nv_bfloat16, false)
LGNET_CHAIN(lgnet_chain_float16_timed, __half, true)
