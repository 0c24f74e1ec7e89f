// Consecutive convolutions of the same shape in one launch: the eight of NetL's residual blocks.
//
// Of a launch of one such convolution (hopper_conv.cu) hardly more than half the time are products. The rest is the
// start of the launch, the first reads from memory, and the end of its last block. Here all blocks stay: each
// computes its tile of every layer. Its weights do not depend on the layer before; the ring of weights therefore runs
// ahead into the next layer, while this one is stored. Patches do, also on the tiles beside them: after each layer
// all blocks wait for each other at a counter in global memory. Every block must therefore run at the same time,
// which the launch demands (cooperative) and kernels/hopper_chain.py checks.
//
// The sums of a layer replace its patches, all of which have been read by then; the weights stay where they are.
//
// A residual must be older than this launch, or what the same thread stored in an earlier layer; so it need not wait
// for other blocks.
#include "hopper_conv.cuh"
#include "source.cuh"

namespace lgnet {

constexpr int kMaxLayers = 8;
constexpr int kCounterStride = 32;  // integers from one counter to the next: each has its own line of the L2 cache
constexpr int kTaps = 3;            // of a row

// kernels/hopper_chain.py has the same fields in the same order.
struct ChainLayer {
  CUtensorMap source, weights;
  Output output;
  int32_t unused[14];  // tensor maps are at multiples of 64 bytes
};

#ifndef LGNET_EMULATED
static_assert(sizeof(ChainLayer) == 384, "kernels/hopper_chain.py makes the same structure");
#endif

struct Chain {
  ChainLayer layer[kMaxLayers];
  int32_t* counters;  // [layers, kCounterStride] blocks that have stored a layer; zeros, also afterwards
  int32_t layers;
  int32_t unused[13];
};
#ifndef LGNET_EMULATED
static_assert(sizeof(Chain) == 3136, "as above");
#endif

// One thread waits until all blocks have stored a layer, which asynchronous copies may read then.
__device__ __forceinline__ void wait_for_layer(const Chain& chain, int number) {
  const int32_t* const counter = chain.counters + number * kCounterStride;
  for (uint32_t tries = 0; load_acquire(counter) < static_cast<int32_t>(gridDim.x);) {
    if (++tries > kTries) __trap();
  }
  fence_async_global();
}

// One thread tells that the block has stored a layer. The last block of the last layer zeroes the counters: all
// blocks have then waited for every other layer.
__device__ __forceinline__ void count(const Chain& chain, int number) {
  if (number + 1 < chain.layers) {
    add_release(chain.counters + number * kCounterStride, 1);
  } else if (atomicAdd(chain.counters + number * kCounterStride, 1) == static_cast<int32_t>(gridDim.x) - 1) {
#pragma unroll 1
    for (int i = 0; i < chain.layers; ++i) chain.counters[i * kCounterStride] = 0;
  }
}

// The warpgroup that multiplies and stores.
template <typename T, int N, bool TIMED>
__device__ __forceinline__ void compute(const Chain& chain, const Args& args, const Memory& memory,
                                        const Place& place, const Reading& reading, const Cluster& cluster) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* const sums = memory.bytes + (memory.patches - memory.weights);
  Rings rings(args);
  wait_for_previous_kernel();
#pragma unroll 1
  for (int number = 0; number < chain.layers; ++number) {
    Output output = chain.layer[number].output;
    // Kept in registers: else they are read again while results are stored.
    opaque(output.store0), opaque(output.store1);
    opaque(output.stride_0), opaque(output.stride_1), opaque(output.activation_0), opaque(output.activation_1);
    Clocks<TIMED> clocks;
    clocks.set(kStart);
    Target<T, N, 1> target(args, output, place, cluster);
    clocks.set(kReady);
    target.read_residual(output);
    clocks.set(kPrevious);
    float sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
    multiply<Pair<T>::kBf16, N, 1, kTaps, TIMED>(args, memory, reading, 0, lane, cluster, rings, sum, clocks);
    if (lane == 0) barrier_arrive(memory.patch_empty(rings.patches.before()));  // the last one
    meet<1, kGroupThreads>();
    write_sums<N>(reinterpret_cast<float*>(sums), 0, warp, lane, sum);
    meet<1, kGroupThreads>();
    target.template store<false>(output, sums, cluster);
    fence_async_global();  // copies for the next layer read what was stored,
    fence_async();         // and replace the sums
    meet<1, kGroupThreads>();
    clocks.set(kEnd);
    if (threadIdx.x == 0) {
      count(chain, number);
      clocks.store(args, number);
    }
  }
}

template <typename T, int TILE_H, bool TIMED>
__device__ __forceinline__ void run(const Chain& chain, const Args& args) {
  const Memory memory(args);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Cluster cluster(args);
  if (warp == kGroupWarps && lane < chain.layers) prefetch_map(chain.layer[lane].weights);
  if (warp == kGroupWarps + 1 && lane < chain.layers) prefetch_map(chain.layer[lane].source);
  const Place place = place_of(args, TILE_H, blockIdx.x);
  const Reading reading(args, place);
  begin<1>(args, memory, cluster, warp, lane);

  if (warp < kGroupWarps) {
    compute<T, 8 * TILE_H, TIMED>(chain, args, memory, place, reading, cluster);
  } else if (warp == kGroupWarps && lane == 0) {
    Ring ring = {0, args.weight_stages, 1};
#pragma unroll 1
    for (int number = 0; number < chain.layers; ++number) {
      load_weights(args, memory, place, reading, chain.layer[number].weights, cluster, ring);
    }
    wait_for_signals(args, memory, ring);
  } else if (warp == kGroupWarps + 1 && lane == 0) {
    Ring ring = {0, args.patch_stages, 1};
    wait_for_previous_kernel();
#pragma unroll 1
    for (int number = 0; number < chain.layers; ++number) {
      load_patches(args, memory, place, &chain.layer[number].source, cluster, ring, [&] {
        if (number > 0) wait_for_layer(chain, number - 1);
      });
    }
  } else if (warp >= kGroupWarps + 2 && reading.mending) {
    Ring ring = {0, args.patch_stages, 0};
#pragma unroll 1
    for (int number = 0; number < chain.layers; ++number) {
      mend_patches(args, memory, reading, cluster, warp == kGroupWarps + 2, lane, ring);
    }
  }
}

}  // namespace lgnet

#define LGNET_CHAIN(name, type, tile_h, timed)                                                     \
  extern "C" __global__ void __launch_bounds__(lgnet::kGroupThreads + lgnet::kOtherThreads, 1)     \
      name(const __grid_constant__ lgnet::Chain chain, const __grid_constant__ lgnet::Args args) { \
    lgnet::run<type, tile_h, timed>(chain, args);                                                  \
  }

#define LGNET_CHAINS(dtype, type)                      \
  LGNET_CHAIN(lgnet_chain_##dtype##_4, type, 4, false) \
  LGNET_CHAIN(lgnet_chain_##dtype##_8, type, 8, false) \
  LGNET_CHAIN(lgnet_chain_##dtype##_16, type, 16, false)

LGNET_CHAINS(float16, __half)
LGNET_CHAINS(bfloat16, __nv_bfloat16)
LGNET_CHAIN(lgnet_chain_float16_16_timed, __half, 16, true)
