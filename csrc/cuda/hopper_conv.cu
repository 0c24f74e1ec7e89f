// A step of the engine (kernels/conv.py) by the convolution for Hopper (hopper_conv.cuh).
#include "hopper_conv.cuh"
#include "source.cuh"

namespace lgnet {

// The feature map; of stride 2: its planes (even rows: even, odd columns; odd rows: ...).
struct Sources {
  CUtensorMap plane[4];
};

// The tiles of the block, of which the launch gives it several or one. The loads of a tile begin while the one before
// is stored.
template <bool kSeveral>
struct Tiles {
  Place place;
  Reading reading;
  uint32_t number;

  __device__ __forceinline__ Tiles(const Args& args, int height)
      : place(place_of(args, height, blockIdx.x)), reading(args, place), number(blockIdx.x) {}

  template <typename Use>
  __device__ __forceinline__ void each(const Args& args, int height, const Use& use) {
#pragma unroll 1
    do {
      use();
      number += gridDim.x;
      if (kSeveral && number < args.tiles) place = place_of(args, height, number), reading = Reading(args, place);
    } while (kSeveral && number < args.tiles);
  }
};

// A warpgroup that multiplies and stores.
template <typename T, int N, int GROUPS, bool TIMED>
__device__ __forceinline__ void compute(const Args& args, const Output& output, const Memory& memory,
                                        const Place& place, const Reading& reading, const Cluster& cluster,
                                        Clocks<TIMED>& clocks) {
  const int group = group_of_thread<GROUPS>(), warp = threadIdx.x / 32 % kGroupWarps, lane = threadIdx.x % 32;
  Target<T, N, GROUPS> target(args, output, place, cluster);
  wait_for_previous_kernel();
  clocks.set(kPrevious);
  target.read_residual(output);
  Rings rings(args);
  float sum[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
  multiply_any<Pair<T>::kBf16, N, GROUPS, TIMED>(args, memory, reading, group, lane, cluster, rings, sum, clocks);
  // The sums replace the weights and patches, which all groups have read.
  meet<1, GROUPS * kGroupThreads>();
  write_sums<N>(reinterpret_cast<float*>(memory.bytes), group, warp, lane, sum);
  if (cluster.parts == 1) {
    meet<1, GROUPS * kGroupThreads>();
    target.template store<false>(output, memory.bytes, cluster);
  } else {
    cluster_meet();
    target.template store<true>(output, memory.bytes, cluster);
    cluster_meet();  // a block must not end while others read its sums
  }
}

// One of two warpgroups, which compute the block's tiles in turns. A tile's products begin when the other's have
// ended: a barrier tells apart only whether a stage was filled an even or odd number of times.
template <typename T, int N>
__device__ __forceinline__ void compute_in_turns(const Args& args, const Output& output, const Memory& memory,
                                                 const Cluster& cluster, Tiles<true>& tiles) {
  constexpr int kOwn = 1, kTurn = 3;  // the first of two barriers each
  const int group = group_of_thread<2>(), warp = threadIdx.x / 32 % kGroupWarps, lane = threadIdx.x % 32;
  char* const sums = memory.bytes + args.sums + group * N * kRowFloats * 4;
  const int chunks = args.chunks * args.planes;
  Rings rings(args);
  Clocks<false> clocks;
  int turn = 0;
  wait_for_previous_kernel();
  tiles.each(args, N / 8, [&] {
    if (turn++ % 2 != group) {  // the other's
      rings.weights.advance(chunks * tiles.reading.count_y);
      rings.patches.advance(chunks);
      return;
    }
    Target<T, N, 1> target(args, output, tiles.place, cluster);
    target.read_residual(output);
    float sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.0f;
    if (turn > 1) meet_at<2 * kGroupThreads>(kTurn + group);
    multiply_any<Pair<T>::kBf16, N, 1, false>(args, memory, tiles.reading, 0, lane, cluster, rings, sum, clocks);
    if (lane == 0) barrier_arrive(memory.patch_empty(rings.patches.before()));  // the last one
    if (tiles.number + gridDim.x < args.tiles) arrive_at<2 * kGroupThreads>(kTurn + 1 - group);
    meet_at<kGroupThreads>(kOwn + group);  // all have read the sums of the tile before
    write_sums<N>(reinterpret_cast<float*>(sums), 0, warp, lane, sum);
    meet_at<kGroupThreads>(kOwn + group);
    target.template store<false>(output, sums, cluster);
  });
}

template <typename T, int TILE_H, int GROUPS, bool SEVERAL, bool TIMED>
__device__ __forceinline__ void run(const Sources& sources, const CUtensorMap& weights, const Args& args,
                                    const Output& output) {
  constexpr int kFirstOther = GROUPS * kGroupWarps;  // warp
  Clocks<TIMED> clocks;
  clocks.set(kStart);
  const Memory memory(args);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Cluster cluster(args);
  if (warp == kFirstOther && lane == 0) prefetch_map(weights);
  if (warp == kFirstOther + 1 && lane == 0) prefetch_map(sources.plane[0]);
  Tiles<SEVERAL> tiles(args, TILE_H);
  begin<GROUPS, SEVERAL ? 1 : GROUPS>(args, memory, cluster, warp, lane);
  start_next_kernel();
  clocks.set(kReady);

  if (warp < kFirstOther) {
    if constexpr (SEVERAL) {
      compute_in_turns<T, 8 * TILE_H>(args, output, memory, cluster, tiles);
    } else {
      compute<T, 8 * TILE_H, GROUPS>(args, output, memory, tiles.place, tiles.reading, cluster, clocks);
    }
    clocks.set(kEnd);
    if (threadIdx.x == 0) clocks.store(args);
    return;
  }
  if (warp == kFirstOther) {
    if (lane == 0) {
      Ring ring = {0, args.weight_stages, 1};
      tiles.each(args, TILE_H,
                 [&] { load_weights(args, memory, tiles.place, tiles.reading, weights, cluster, ring); });
      wait_for_signals(args, memory, ring);
    }
  } else if (warp == kFirstOther + 1) {
    if (lane == 0) {
      Ring ring = {0, args.patch_stages, 1};
      tiles.each(args, TILE_H, [&] {
        load_patches(args, memory, tiles.place, sources.plane, cluster, ring, [] { wait_for_previous_kernel(); });
      });
    }
  } else if (tiles.reading.mending) {
    Ring ring = {0, args.patch_stages, 0};
    wait_for_previous_kernel();
    tiles.each(args, TILE_H,
               [&] { mend_patches(args, memory, tiles.reading, cluster, warp == kFirstOther + 2, lane, ring); });
  }
  if (cluster.parts > 1) {  // as the warps that store
    cluster_meet();
    cluster_meet();
  }
}

}  // namespace lgnet

#define LGNET_CONV(name, type, tile_h, groups, several, timed)                                          \
  extern "C" __global__ void __launch_bounds__(groups* lgnet::kGroupThreads + lgnet::kOtherThreads, 1)  \
      name(const __grid_constant__ lgnet::Sources sources, const __grid_constant__ CUtensorMap weights, \
           const __grid_constant__ lgnet::Args args, const __grid_constant__ lgnet::Output output) {    \
    lgnet::run<type, tile_h, groups, several, timed>(sources, weights, args, output);                   \
  }

#define LGNET_CONVS(dtype, type)                                   \
  LGNET_CONV(lgnet_conv_##dtype##_4_1, type, 4, 1, false, false)   \
  LGNET_CONV(lgnet_conv_##dtype##_8_1, type, 8, 1, false, false)   \
  LGNET_CONV(lgnet_conv_##dtype##_16_1, type, 16, 1, false, false) \
  LGNET_CONV(lgnet_conv_##dtype##_32_1, type, 32, 1, false, false) \
  LGNET_CONV(lgnet_conv_##dtype##_4_2, type, 4, 2, false, false)   \
  LGNET_CONV(lgnet_conv_##dtype##_8_2, type, 8, 2, false, false)   \
  LGNET_CONV(lgnet_conv_##dtype##_16_2, type, 16, 2, false, false) \
  LGNET_CONV(lgnet_conv_##dtype##_32_2, type, 32, 2, false, false) \
  LGNET_CONV(lgnet_conv_##dtype##_16_2_several, type, 16, 2, true, false)

LGNET_CONVS(float16, __half)
LGNET_CONVS(bfloat16, __nv_bfloat16)
LGNET_CONV(lgnet_conv_float16_16_1_timed, __half, 16, 1, false, true)
LGNET_CONV(lgnet_conv_float16_16_2_timed, __half, 16, 2, false, true)
