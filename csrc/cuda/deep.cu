// The deep layers of a U-Net (4x4 convolutions of stride 2 and transposed ones on small maps) in one launch.
//
// The time of these layers is the time to read their weights, 2 to 17 MB a layer, if reading never stops. All layers
// therefore run in one launch. One warp of each block copies the block's part of every layer's weights through a ring
// buffer in shared memory. It runs ahead of the other warps by up to the length of the ring, also into the next
// layer.
//
// A layer is a product weights [channels, depth] x positions [depth, rows] for each phase (kernels/conv.py), where
// depth = input channels x taps. A unit is 16 output channels of a phase. Each cluster gets `base` units; `extra`
// clusters get one more, and `shift` makes these other clusters in each layer. The blocks of a cluster split the
// depth in steps of 32 input channels of one tap. A block copies its positions into shared memory once, with a border
// of zeros. An item is (unit, every warps_k-th step). The eight multiplying warps compute eight items at a time; the
// weights of these items for one step each are a chunk, which fills a slot of the ring. Each block sends its sums
// through distributed shared memory to the block of the cluster that finishes them. That block adds them in float32
// and in a fixed order, so that results are bitwise repeatable.
//
// Exchange. A layer reads what other blocks have just stored. No counter tells when: the numbers themselves do. Each
// launch has a copy of the maps between its layers in which every number is kAbsent at first, a NaN that no block
// stores. A block reads its positions again and again until none is absent: one trip to the L2 cache. With a counter
// there would be three: a fence, the counter, the reading. There are two such copies: a launch uses one and makes the
// other absent for the next launch. Every layer but the first reads all that the layer before it has stored; so when
// a block stores results of a layer, all blocks have read the source of the layer before, whose memory they may
// replace.
//
// Weights are packed in the order of mma's fragments (kernels/deep_shapes.py, `pack`): for every unit and 16 depths,
// 32 lanes x 16 bytes. A lane's 16 bytes of a position are 8 consecutive channels t * 8 .. + 7 of a step, the operand
// of two products; the packing permutes the depth of the weights to match.
//
// Every wait ends after at most `timeout` clocks. After a timeout `state[0]` holds the kind of wait, the layer and
// the block; every block runs to its end without waiting and fills the last layer's stores with NaN. Later launches
// do the same until `state` is zeroed.
#include "activation.cuh"
#include "elements.cuh"
#include "ptx.cuh"
#include "ring.cuh"
#include "source.cuh"

namespace lgnet {

constexpr int kLayers = 12;
constexpr int kMaxSlots = 24;
constexpr int kSlotBytes = 8192;
constexpr int kWarps = 8;  // warps that multiply; one more warp loads weights
constexpr int kThreads = 32 * kWarps;
constexpr int kUnit = 16;          // output channels of a unit
constexpr int kStep = 32;          // depth of a step
constexpr int kPixelBytes = 64;    // bytes of a step's channels at one pixel
constexpr int kPieceBytes = 1024;  // bytes of the weights of one unit and step
constexpr int kPad = 4;            // unused floats after a row of partial sums, which avoid bank conflicts
constexpr int kBarrierBytes = 512;
constexpr int kStateStride = 32;  // integers from one counter to the next: each has its own line of the L2 cache
constexpr uint32_t kAbsent = 0xffffffff;  // two numbers of the exchange that have not been stored

// kernels/deep.py has the same fields in the same order.
struct Layer {
  const void* weights;  // clusters in the order that `shift` gives; of each: [block, chunk, piece, 2, lane, 8]
  const float* bias;
  const void* source;
  void* store0;                        // null: a later layer of the launch stores in its place
  void* store1;                        // null: likewise, or there is none
  int32_t base, extra, shift, groups;  // units of every cluster, clusters with one more, rotation, units of a phase
  int32_t log_warps_k, step_rounds, steps, block_steps, log_taps, log_count_x;
  int32_t rows, log_rows, log_rows_h, log_rows_w;
  int32_t log_pixels, log_in_h, log_in_w, log_in_step, out_h, out_w, out_step;
  int32_t stage_w, stage_h, stage_half, stage_pixels, stage_bytes, border_y, border_x;  // of the positions' copy
  int32_t sums, received;  // offsets in bytes from the end of the ring
  int32_t stride_x, stride_0, stride_1, activation_0, activation_1;
  // In the exchange: where the source begins (-1: of the first layer, whose source is in memory), where the results
  // of each store begin (-1: no layer of the launch reads them), and numbers from a pixel of those to the next.
  int32_t exchange_x, exchange_0, exchange_1, pitch_0, pitch_1;
  int32_t origin_y[2], origin_x[2];  // where phase 0 or 1 starts to read in the copy
};

struct Program {
  int32_t* state;      // [3, kStateStride], zeros at first: error, finished blocks, which exchange is next
  uint16_t* exchange;  // [2, exchange_size] numbers, absent at first
  int64_t* times;      // [layers, blocks, 6] clocks, or null
  int64_t timeout;
  int32_t layers, log_cluster, clusters, slots, evict_first, exchange_size;
  Layer layer[kLayers];
};

// Whether a wait has to end: a block has reported an error, or this thread has waited too long and now reports it.
__device__ __forceinline__ bool expired(int32_t* error, int64_t until, int32_t code) {
  if (*reinterpret_cast<volatile int32_t*>(error) != 0) return true;
  if (clock64() <= until) return false;
  atomicCAS(error, 0, code);
  return true;
}

// Waits of a thread that end after a bounded time. `dead`: a wait has timed out, so that later ones return at once.
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

  // Whether to give up after so many tries.
  __device__ __forceinline__ bool gives_up(int tries, int32_t code) {
    return dead || (tries % 64 == 0 && (dead = expired(error, until, code)));
  }
};

enum Wait { kEmpty = 1, kFull = 2, kSums = 3, kLayer = 4, kCluster = 5 };

// The error code for `state[0]`: kind of wait, layer, block.
__device__ __forceinline__ int32_t code_of(Wait kind, int layer) {
  return (kind << 24) | (layer << 16) | static_cast<int32_t>(blockIdx.x + 1);
}

// A block's position in the grid, and its cluster's share of the current layer.
struct Place {
  int cluster, rank, log_cluster, warp, lane;
  int begin, units;                   // the cluster's units
  int first, steps;                   // the block's steps
  uint32_t full, empty, ring, stage;  // shared memory: barriers, weights, positions
  uint16_t* exchange;                 // of this launch

  __device__ __forceinline__ void enter(const Layer& layer, int clusters) {
    int turn = cluster + layer.shift;
    if (turn >= clusters) turn -= clusters;
    units = layer.base + (turn < layer.extra ? 1 : 0);
    begin = turn * layer.base + min(turn, layer.extra);
    first = rank * layer.block_steps;
    steps = max(min(layer.block_steps, layer.steps - first), 0);
  }
};

__device__ __forceinline__ int phase_of(const Layer& layer, int unit) {
  return (unit >= layer.groups) + (unit >= 2 * layer.groups) + (unit >= 3 * layer.groups);
}

__device__ __forceinline__ void add_shared(float4& sum, uint32_t address) {
  const uint4 part = load_shared(address);
  sum.x += __uint_as_float(part.x), sum.y += __uint_as_float(part.y);
  sum.z += __uint_as_float(part.z), sum.w += __uint_as_float(part.w);
}

// Marks the halves of a word that are absent, and perhaps, beside such a one, another NaN.
__device__ __forceinline__ uint32_t absent(uint32_t word) { return (~word - 0x00010001u) & word & 0x80008000u; }

__device__ __forceinline__ bool is_whole(const uint4& v) {
  return (absent(v.x) | absent(v.y) | absent(v.z) | absent(v.w)) == 0;
}

// Copies the positions that the block's steps need into shared memory: [input channels / 32, sample, y, x, 32]. With
// stride 2 the pixels of even x come before those of odd x, so that neighbouring rows of the product are in different
// banks. The border already holds zeros. Waits for those that other blocks have yet to store.
__device__ __forceinline__ void load_positions(const Layer& layer, const Place& place, Guard& guard, int number) {
  constexpr int kAhead = 4;
  if (place.steps == 0) return;
  const bool exchanged = layer.exchange_x >= 0;
  const int chunk0 = place.first >> layer.log_taps;
  const int chunks = ((place.first + place.steps - 1) >> layer.log_taps) - chunk0 + 1;
  const int total = chunks << (layer.log_pixels + 2);
  const uint16_t* const map =
      exchanged ? place.exchange + layer.exchange_x : static_cast<const uint16_t*>(layer.source);
  const uint16_t* const source = map + chunk0 * kStep;
  for (int index0 = threadIdx.x; index0 < total; index0 += kAhead * kThreads) {
    uint4 value[kAhead];
    uint32_t to[kAhead];
    const uint16_t* from[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int index = index0 + i * kThreads;
      const int part = index & 3, chunk = index >> (layer.log_pixels + 2);
      const int pixel = (index >> 2) & ((1 << layer.log_pixels) - 1);
      const int line = pixel >> layer.log_in_w, sample = line >> layer.log_in_h;
      const int x = (pixel & ((1 << layer.log_in_w) - 1)) + layer.border_x;
      const int y = sample * layer.stage_h + (line & ((1 << layer.log_in_h) - 1)) + layer.border_y;
      const int column = (x & ((1 << layer.log_in_step) - 1)) * layer.stage_half + (x >> layer.log_in_step);
      to[i] = place.stage + (chunk * layer.stage_pixels + y * layer.stage_w + column) * kPixelBytes + part * 16;
      from[i] = source + static_cast<int64_t>(pixel) * layer.stride_x + chunk * kStep + part * 8;
      if (index < total) value[i] = load_relaxed(from[i]);
    }
    bool whole = !exchanged;
    for (int tries = 1; !whole && !guard.gives_up(tries, code_of(kLayer, number)); ++tries) {
      whole = true;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (index0 + i * kThreads < total && !is_whole(value[i])) value[i] = load_relaxed(from[i]), whole = false;
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (index0 + i * kThreads < total) store_shared(to[i], value[i]);
    }
  }
}

// One warp's operands of a step: positions of `kRows` x 8 rows, and the weights of a unit. Registers do not suffice
// for two steps of 64 positions, so these are read where they are used.
template <int kRows>
struct Operands {
  static constexpr bool kHeld = kRows < 8;
  uint4 positions[kHeld ? kRows : 1], weights[2];
  int at;  // of the step's first position, from Item::base on
};

// What does not change within the products of an item.
template <int kRows>
struct Item {
  uint32_t base[kRows];  // where each row's positions begin
  int unit, part;        // part: the first step
  int origin_y, origin_x;
};

// Waits for the weights of the next step of the ring.
__device__ __forceinline__ void wait_for_weights(const Place& place, Guard& guard, const Ring& ring, int number) {
  guard.wait(place.full + 8 * ring.stage, ring.parity, code_of(kFull, number));
  __syncwarp();
}

// The slot can be filled again once every warp has read its weights.
__device__ __forceinline__ void release(const Place& place, Ring& ring) {
  __syncwarp();
  if (place.lane == 0) barrier_arrive(place.empty + 8 * ring.stage);
  ring.advance();
}

// Reads the operands of the item's step `round`. The positions come before the wait for the weights. Weights beyond
// the block's last step are zeros (kernels/deep_shapes.py, `pack`); their positions are those of the last step.
template <int kRows>
__device__ __forceinline__ void read(Operands<kRows>& to, const Layer& layer, const Place& place,
                                     const Item<kRows>& item, int round, Guard& guard, const Ring& ring, int number) {
  const int step = min((round << layer.log_warps_k) + item.part, max(place.steps - 1, 0));
  const int depth = place.first + step, tap = depth & ((1 << layer.log_taps) - 1);
  const int y = item.origin_y + (tap >> layer.log_count_x);
  const int x = item.origin_x + (tap & ((1 << layer.log_count_x) - 1));
  const int column = (x & ((1 << layer.log_in_step) - 1)) * layer.stage_half + (x >> layer.log_in_step);
  const int chunk = (depth >> layer.log_taps) - (place.first >> layer.log_taps);
  to.at = (chunk * layer.stage_pixels + y * layer.stage_w + column) * kPixelBytes;
  if constexpr (Operands<kRows>::kHeld) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) to.positions[r] = load_shared(item.base[r] + to.at);
  }
  wait_for_weights(place, guard, ring, number);
  const uint32_t from = place.ring + ring.stage * kSlotBytes + place.warp * kPieceBytes + place.lane * 16;
  to.weights[0] = load_shared(from), to.weights[1] = load_shared(from + kPieceBytes / 2);
}

template <typename T, int kRows>
__device__ __forceinline__ void add_products(float (&sums)[kRows][4], const Operands<kRows>& step,
                                             const Item<kRows>& item) {
  constexpr int kTogether = kRows < 4 ? kRows : 4;
#pragma unroll
  for (int r0 = 0; r0 < kRows; r0 += kTogether) {
    uint4 x[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      if constexpr (Operands<kRows>::kHeld) {
        x[r] = step.positions[r0 + r];
      } else {
        x[r] = load_shared(item.base[r0 + r] + step.at);
      }
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      warp_product<Pair<T>::kBf16>(sums[r0 + r], step.weights[0], x[r].x, x[r].y);
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      warp_product<Pair<T>::kBf16>(sums[r0 + r], step.weights[1], x[r].z, x[r].w);
    }
  }
}

// Multiplies this warp's items, `kRows` x 8 rows, and writes partial sums to [warps_k, row, unit, 16] in shared
// memory. A step's operands are read before the products of the step before, which take as long as the reading.
template <typename T, int kRows>
__device__ __forceinline__ void multiply(const Layer& layer, const Place& place, Guard& guard, Ring& ring,
                                         int number) {
  const int g = place.lane >> 2, t = place.lane & 3;
  const int items = place.units << layer.log_warps_k, pitch = place.units * kUnit + kPad;
  Item<kRows> item;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = (r * 8 + g) & (layer.rows - 1), line = row >> layer.log_rows_w, sample = line >> layer.log_rows_h;
    const int y = sample * layer.stage_h + ((line & ((1 << layer.log_rows_h) - 1)) << layer.log_in_step);
    item.base[r] = place.stage + (y * layer.stage_w + (row & ((1 << layer.log_rows_w) - 1))) * kPixelBytes + t * 16;
  }

  for (int item0 = 0; item0 < items; item0 += kWarps) {
    const int which = item0 + place.warp;
    if (which >= items) {  // no item, but the other warps' weights
      for (int round = 0; round < layer.step_rounds; ++round) {
        // Without a wait this warp would be a turn of the ring ahead and read a barrier's parity wrongly.
        wait_for_weights(place, guard, ring, number);
        release(place, ring);
      }
      continue;
    }
    item.unit = which >> layer.log_warps_k, item.part = which & ((1 << layer.log_warps_k) - 1);
    const int phase = phase_of(layer, place.begin + item.unit);
    item.origin_y = layer.origin_y[phase >> 1], item.origin_x = layer.origin_x[phase & 1];
    float sums[kRows][4] = {};
    Operands<kRows> even, odd;
    read(even, layer, place, item, 0, guard, ring, number);
    release(place, ring);
    int round = 1;
#pragma unroll 1
    for (; round + 1 < layer.step_rounds; round += 2) {
      read(odd, layer, place, item, round, guard, ring, number);
      add_products<T>(sums, even, item);
      release(place, ring);
      read(even, layer, place, item, round + 1, guard, ring, number);
      add_products<T>(sums, odd, item);
      release(place, ring);
    }
    if (round < layer.step_rounds) {
      read(odd, layer, place, item, round, guard, ring, number);
      add_products<T>(sums, even, item);
      release(place, ring);
      add_products<T>(sums, odd, item);
    } else {
      add_products<T>(sums, even, item);
    }
    int own = (((item.part << layer.log_rows) + 2 * t) * pitch + item.unit * kUnit + g) * 4;
    int step = pitch * 4;
    opaque(own), opaque(step);  // else the compiler keeps 4 * kRows addresses in registers
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = r * 8 + 2 * t + (e & 1);
        if (row >= layer.rows) continue;
        const uint32_t at = place.stage + layer.sums + own + (r * 8 + (e & 1)) * step + (e >> 1) * 32;
        store_shared(at, sums[r][e]);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void multiply_any(const Layer& layer, const Place& place, Guard& guard, Ring& ring,
                                             int number) {
  if (layer.rows <= 8) {
    multiply<T, 1>(layer, place, guard, ring, number);
  } else if (layer.rows == 16) {
    multiply<T, 2>(layer, place, guard, ring, number);
  } else if (layer.rows == 32) {
    multiply<T, 4>(layer, place, guard, ring, number);
  } else {
    multiply<T, 8>(layer, place, guard, ring, number);
  }
}

// The largest number of rows that a block finishes. The rows of 16 channels are numbered by (unit, row); block `rank`
// of a cluster of n blocks finishes rows rank, rank + n, rank + 2 n and so on.
__device__ __forceinline__ int most_finished(const Layer& layer, const Place& place) {
  return ((place.units << layer.log_rows) + (1 << place.log_cluster) - 1) >> place.log_cluster;
}

// The number of rows that this block finishes.
__device__ __forceinline__ int finished(const Layer& layer, const Place& place) {
  const int last = (place.units << layer.log_rows) - 1 - place.rank;
  return last < 0 ? 0 : (last >> place.log_cluster) + 1;
}

// Sends each of the block's sums to the block of the cluster that finishes it.
__device__ __forceinline__ void send(const Layer& layer, const Place& place, uint32_t received_barrier) {
  const int pitch = place.units * kUnit + kPad, total = place.units << (layer.log_rows + 2);
  const int most = most_finished(layer, place) * 4;
  for (int index = threadIdx.x; index < total; index += kThreads) {
    const int quad = index & 3, which = index >> 2, row = which & (layer.rows - 1), unit = which >> layer.log_rows;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int part = 0; part < 1 << layer.log_warps_k; ++part) {
      const int at = ((part << layer.log_rows) + row) * pitch + unit * kUnit + quad * 4;
      add_shared(sum, place.stage + layer.sums + at * 4);
    }
    const int owner = which & ((1 << place.log_cluster) - 1), mine = (which >> place.log_cluster) * 4 + quad;
    const uint32_t at = place.stage + layer.received + (place.rank * most + mine) * 16;
    send(remote(at, owner), sum, remote(received_barrier, owner));
  }
}

// Where a store of a layer writes four channels of a pixel: to a map in memory (or null), and to the exchange (or
// -1).
struct Target {
  void* map;
  int32_t stride, exchange, pitch;

  template <typename T>
  __device__ __forceinline__ void store(const Place& place, int64_t pixel, int channel, const float4& value,
                                        Activation activation) const {
    using Two = typename Pair<T>::type;
    uint2 packed;
    Two* const pairs = reinterpret_cast<Two*>(&packed);
    pairs[0] = Pair<T>::narrow(activation(value.x), activation(value.y));
    pairs[1] = Pair<T>::narrow(activation(value.z), activation(value.w));
    if (exchange >= 0) {  // no NaN is stored as absent: its sign is cleared
      const uint2 known = make_uint2(packed.x & ~absent(packed.x), packed.y & ~absent(packed.y));
      store_relaxed(place.exchange + exchange + pixel * pitch + channel, known);
    }
    if (map != nullptr) *reinterpret_cast<uint2*>(static_cast<T*>(map) + pixel * stride + channel) = packed;
  }
};

// Four channels of a row that the block finishes.
struct Quad {
  int row, phase, channel;

  __device__ __forceinline__ Quad(const Layer& layer, const Place& place, int index) {
    const int which = ((index >> 2) << place.log_cluster) + place.rank,
              unit = place.begin + (which >> layer.log_rows);
    row = which & (layer.rows - 1);
    phase = phase_of(layer, unit);
    channel = (unit - phase * layer.groups) * kUnit + (index & 3) * 4;
  }

  __device__ __forceinline__ float4 bias(const Layer& layer) const {
    return __ldg(reinterpret_cast<const float4*>(layer.bias + channel));
  }
};

// The bias of the first quad that the thread finishes. It comes from memory in about 1000 clocks, because every run
// reads it once. Read at the begin of the layer, it is there when it is added.
__device__ __forceinline__ float4 first_bias(const Layer& layer, const Place& place) {
  if (threadIdx.x >= finished(layer, place) * 4) return make_float4(0.f, 0.f, 0.f, 0.f);
  return Quad(layer, place, threadIdx.x).bias(layer);
}

// Adds the sums that the cluster's blocks sent, in the order of the blocks, and stores the result.
template <typename T>
__device__ __forceinline__ void finish(const Layer& layer, const Place& place, const float4& first) {
  const int total = finished(layer, place) * 4, most = most_finished(layer, place) * 4;
  const Target target0 = {layer.store0, layer.stride_0, layer.exchange_0, layer.pitch_0};
  const Target target1 = {layer.store1, layer.stride_1, layer.exchange_1, layer.pitch_1};
  for (int index = threadIdx.x; index < total; index += kThreads) {
    const Quad quad(layer, place, index);
    const float4 bias = index < kThreads ? first : quad.bias(layer);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int from = 0; from < 1 << place.log_cluster; ++from) {
      add_shared(sum, place.stage + layer.received + (from * most + index) * 16);
    }
    sum.x += bias.x, sum.y += bias.y, sum.z += bias.z, sum.w += bias.w;
    const int y = quad.row >> layer.log_rows_w, sample = y >> layer.log_rows_h;
    const int out_x = (quad.row & ((1 << layer.log_rows_w) - 1)) * layer.out_step + (quad.phase & 1);
    const int out_y = (y & ((1 << layer.log_rows_h) - 1)) * layer.out_step + (quad.phase >> 1);
    const int64_t pixel = (sample * layer.out_h + out_y) * layer.out_w + out_x;
    target0.template store<T>(place, pixel, quad.channel, sum, Activation(layer.activation_0));
    target1.template store<T>(place, pixel, quad.channel, sum, Activation(layer.activation_1));
  }
}

// This block's part of the other exchange becomes absent, for the next launch.
__device__ __forceinline__ void clear(const Program& program, int which) {
  uint4* const words = reinterpret_cast<uint4*>(program.exchange + which * int64_t(program.exchange_size));
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < program.exchange_size / 8; i += gridDim.x * kThreads) {
    words[i] = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
  }
}

// Loads this block's weights of every layer, as far ahead as the ring has space. One thread runs it.
__device__ __forceinline__ void stream(const Program& program, Place& place, Guard& guard) {
  Ring ring = {0, program.slots, 0};
  for (int number = 0; number < program.layers; ++number) {
    const Layer& layer = program.layer[number];
    place.enter(layer, program.clusters);
    const int64_t pieces = layer.step_rounds << layer.log_warps_k;  // pieces of one unit in one block
    const int64_t before = (static_cast<int64_t>(place.begin) << place.log_cluster) + place.rank * place.units;
    const char* from = static_cast<const char*>(layer.weights) + before * pieces * kPieceBytes;
    const int items = place.units << layer.log_warps_k;
    for (int item0 = 0; item0 < items; item0 += kWarps) {
      const uint32_t bytes = min(items - item0, kWarps) * kPieceBytes;
      for (int round = 0; round < layer.step_rounds; ++round) {
        // In the first turn of the ring no slot is in use, and this wait ends at once.
        guard.wait(place.empty + 8 * ring.stage, ring.parity ^ 1, code_of(kEmpty, number));
        if (guard.dead) return;
        const uint32_t to = place.ring + ring.stage * kSlotBytes, barrier = place.full + 8 * ring.stage;
        barrier_expect(barrier, bytes);
        if (program.evict_first) {
          copy_bytes_once(to, from, bytes, barrier);
        } else {
          copy_bytes(to, from, bytes, barrier);
        }
        from += bytes;
        ring.advance();
      }
    }
  }
}

template <typename T>
__device__ void fill_with_nan(const Layer& layer, void* to, int stride) {
  const int channels = layer.groups * kUnit;
  const int pixels = (layer.rows >> layer.log_rows_h >> layer.log_rows_w) * layer.out_h * layer.out_w;
  for (int index = threadIdx.x; index < pixels * channels; index += kThreads) {
    static_cast<T*>(to)[static_cast<int64_t>(index / channels) * stride + index % channels] = T(nanf(""));
  }
}

template <typename T>
__device__ __forceinline__ void run(const Program& program) {
  const uint32_t shared = shared_address(dynamic_shared());
  const uint32_t received_barrier = shared + 16 * kMaxSlots;
  // Two barriers, of even and odd layers: all blocks of the cluster have added their sums.
  const uint32_t added = received_barrier + 8;
  Place place;
  place.rank = cluster_rank();
  place.log_cluster = program.log_cluster;
  place.cluster = blockIdx.x >> program.log_cluster;
  // The shuffle tells the compiler that the value is the same in all lanes.
  place.warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  place.lane = threadIdx.x % 32;
  place.full = shared;
  place.empty = shared + 8 * kMaxSlots;
  place.ring = shared + kBarrierBytes;
  place.stage = place.ring + program.slots * kSlotBytes;
  Guard guard = {program.state, clock64() + program.timeout, false};

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < program.slots; ++slot) {
      barrier_init(place.full + 8 * slot, 1);
      barrier_init(place.empty + 8 * slot, kWarps);
    }
    barrier_init(received_barrier, 1);
    for (int i = 0; i < 2; ++i) barrier_init(added + 8 * i, 1 << program.log_cluster);
    barriers_initialised();
  }
  cluster_meet_initialised();  // no block may send to a barrier before it is initialised

  if (place.warp == kWarps) {
    if (place.lane == 0) stream(program, place, guard);
  } else {
    wait_for_previous_kernel();
    const int turn = *reinterpret_cast<volatile int32_t*>(program.state + 2 * kStateStride);  // 0 or 1
    place.exchange = program.exchange + turn * int64_t(program.exchange_size);
    Ring ring = {0, program.slots, 0};
    uint32_t received = 0;  // parity
    for (int number = 0; number < program.layers; ++number) {
      const Layer& layer = program.layer[number];
      int64_t* times = program.times == nullptr || threadIdx.x != 0
                           ? nullptr
                           : program.times + (static_cast<int64_t>(number) * gridDim.x + blockIdx.x) * 6;
      place.enter(layer, program.clusters);
      const bool works = place.units > 0;
      if (times != nullptr) times[0] = clock64();
      float4 bias;
      if (works) {
        bias = first_bias(layer, place);
        for (int at = threadIdx.x * 16; at < layer.stage_bytes; at += kThreads * 16) {
          store_shared(place.stage + at, make_uint4(0, 0, 0, 0));
        }
      }
      // Sums may arrive before this call: the barrier's count of bytes is then negative until it is made. After a
      // failure the phase before may be incomplete, which then must not be arrived at again.
      if (threadIdx.x == 0 && works && !guard.dead) {
        barrier_expect(received_barrier, (finished(layer, place) * kUnit * 4) << place.log_cluster);
      }
      meet<1, kThreads>();
      if (works) {
        load_positions(layer, place, guard, number);
        meet<1, kThreads>();
        if (times != nullptr) times[1] = clock64();
        multiply_any<T>(layer, place, guard, ring, number);
        meet<1, kThreads>();
        if (times != nullptr) times[2] = clock64();
      }
      // Without a wait a block could be so far ahead that it replaces sums that another has yet to add.
      const int before = number - 1;
      if (number > 0) guard.wait<true>(added + 8 * (before & 1), before >> 1 & 1, code_of(kCluster, number));
      if (works) {
        send(layer, place, received_barrier);
        if (times != nullptr) times[3] = clock64();
        guard.wait<true>(received_barrier, received, code_of(kSums, number));
        received ^= 1;
        if (times != nullptr) times[4] = clock64();
        finish<T>(layer, place, bias);
      }
      meet<1, kThreads>();  // the next layer uses the same shared memory
      if (number + 1 < program.layers && threadIdx.x < 1 << place.log_cluster) {
        barrier_arrive_remote(added + 8 * (number & 1), threadIdx.x);
      }
      if (number == 0) clear(program, turn ^ 1);
      if (times != nullptr) times[5] = clock64();
    }
    if (guard.dead || *reinterpret_cast<volatile int32_t*>(program.state) != 0) {
      const Layer& layer = program.layer[program.layers - 1];
      if (layer.store0 != nullptr) fill_with_nan<T>(layer, layer.store0, layer.stride_0);
      if (layer.store1 != nullptr) fill_with_nan<T>(layer, layer.store1, layer.stride_1);
      // No thread has waited for the copies and sums in flight. They must end before another block gets this memory.
      for (const int64_t until = clock64() + 100000; clock64() < until;) {
      }
    } else if (threadIdx.x == 0) {
      // The last block prepares the next launch.
      if (atomicAdd(program.state + kStateStride, 1) == static_cast<int32_t>(gridDim.x) - 1) {
        program.state[kStateStride] = 0, program.state[2 * kStateStride] = turn ^ 1;
      }
    }
  }
  cluster_meet();  // a block must not end, and free its shared memory, while others send to it
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
