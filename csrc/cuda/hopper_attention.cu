// The loop over the keys of attention for Hopper (kernels/attention_inference.py), with the splits merged in the same
// launch:
//
//     out_i = activation(sum_j softmax_j(q_i . k_j) v_j + rest_i)
//
// A block computes 64 or 128 queries and 128 columns of v. One warp loads: Q once, then K and V tile by tile.
// Two warpgroups multiply. With 128 queries each has 64 of them and reads every tile; with 64 they take the tiles in
// turn. While one computes exponentials, the tensor cores work for the other.
//
// S = Q K^T has its operands in shared memory, depth adjacent (K-major). The registers that a thread gets of S, as
// 16-bit numbers, are those that it must give as the left operand of P V; P is never stored. V is read as it lies,
// its columns adjacent.
//
// The blocks of a cluster split the keys. Each leaves its sums in shared memory with the maximum and the sum of every
// row, and merges the parts of all blocks for its own share of the rows, in the order of the blocks.
//
// The maximum of a row is kept in units of the exponent, rounded once, so that exp2(score * scale - maximum) is one
// multiply-add and one instruction, and what is subtracted is the same for all keys of a row.
#include "activation.cuh"
#include "divisor.cuh"
#include "ring.cuh"
#include "source.cuh"
#include "wait.cuh"
#include "wgmma.cuh"

namespace lgnet {

constexpr int kLine = 128;     // bytes of 64 channels
constexpr int kGroups = 2;     // warpgroups that multiply
constexpr int kRows = 64;      // queries of a product
constexpr int kColumns = 128;  // of v, of a block: with 256 the sums of a thread would not fit into its registers
constexpr int kThreads = 256;  // of these warpgroups
constexpr int kGroupWarps = 4;
constexpr int kMaxStages = 4;
constexpr int kMostParts = 160;        // of the rows that a block merges: 128 where the cluster divides the queries
constexpr int kStride = kColumns + 8;  // floats from one row's sums to the next; 8 against bank conflicts

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000); }

// kernels/hopper_attention.py has the same fields in the same order.
struct Args {
  const float* rest;  // [B, N, C]
  void* out;
  int64_t sample_stride, position_stride;  // of `out`, in elements
  Divisor tiles, column_blocks;            // of a sample
  int32_t positions, first_query, queries, key_tiles, cluster, stages, activation;
  float scale;  // of the scores, to base 2
};

// The shape of a block. C: channels of q and k. KEYS: of a tile.
template <int CHANNELS, int QUERIES>
struct Shape {
  static constexpr int kKeys = CHANNELS == 128 ? QUERIES : 16384 / CHANNELS;
  static constexpr int kParts = kGroups * kRows / QUERIES;  // of the sums of a row, in a block
  static constexpr uint32_t kQueryBox = QUERIES * kLine, kKeyBox = kKeys * kLine;
  static constexpr uint32_t kQueryBytes = CHANNELS / 64 * kQueryBox;
  static constexpr uint32_t kKeyBytes = CHANNELS / 64 * kKeyBox, kValueBytes = kColumns / 64 * kKeyBox;
  static constexpr uint32_t kStageBytes = kKeyBytes + kValueBytes;
};

// Shared memory: Q, stages of K and V, barriers. The results replace Q and the stages: sums [128, columns], maximum
// and sum of each of these rows, the same of all parts of the rows that this block merges, their shares.
template <typename S>
struct Memory {
  uint32_t queries, stages, barriers;

  __device__ __forceinline__ explicit Memory(const Args& args) {
    const uint32_t start = shared_address(dynamic_shared());
    queries = (start + 1023) / 1024 * 1024;  // the swizzle repeats after 1024 bytes
    stages = queries + S::kQueryBytes;
    barriers = stages + args.stages * S::kStageBytes;
  }
  __device__ __forceinline__ uint32_t keys(int stage) const { return stages + stage * S::kStageBytes; }
  __device__ __forceinline__ uint32_t values(int stage) const { return keys(stage) + S::kKeyBytes; }
  __device__ __forceinline__ uint32_t queries_full() const { return barriers; }
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return barriers + 8 * (1 + stage); }
  __device__ __forceinline__ uint32_t values_full(int stage) const { return keys_full(kMaxStages + stage); }
  __device__ __forceinline__ uint32_t empty(int stage) const { return keys_full(2 * kMaxStages + stage); }

  __device__ __forceinline__ uint32_t sums() const { return queries; }
  __device__ __forceinline__ uint32_t rows() const { return sums() + kGroups * kRows * kStride * 4; }
  __device__ __forceinline__ uint32_t parts() const { return rows() + kGroups * kRows * 8; }
  __device__ __forceinline__ uint32_t shares() const { return parts() + kMostParts * 8; }
};

// The part of the result that a block computes.
struct Place {
  int sample, column;
  int query;  // of the launch's queries
  int rank;   // in the cluster
  int first_tile, last_tile;

  __device__ __forceinline__ Place(const Args& args, int queries, int columns) {
    rank = args.cluster > 1 ? cluster_rank() : 0;
    Digits block = {blockIdx.x / args.cluster};
    column = block.next(args.column_blocks) * columns;
    query = block.next(args.tiles) * queries;
    sample = static_cast<int>(block.rest);
    first_tile = rank * args.key_tiles / args.cluster;
    last_tile = (rank + 1) * args.key_tiles / args.cluster;
  }
};

// Boxes of 64 channels, each `box_bytes` after the one before.
__device__ __forceinline__ void load_rows(uint32_t to, const CUtensorMap& map, uint32_t barrier, int channels,
                                          uint32_t box_bytes, int column, int position, int sample) {
  barrier_expect(barrier, channels / 64 * box_bytes);
#pragma unroll 1
  for (int i = 0; i < channels / 64; ++i) {
    copy_box(to + i * box_bytes, map, barrier, column + 64 * i, position, 0, sample);
  }
}

// One thread loads the tiles.
template <int CHANNELS, typename S>
__device__ __forceinline__ void load(const CUtensorMap& queries, const CUtensorMap& keys, const CUtensorMap& values,
                                     const Args& args, const Memory<S>& memory, const Place& place) {
  wait_for_previous_kernel();
  load_rows(memory.queries, queries, memory.queries_full(), CHANNELS, S::kQueryBox, 0, args.first_query + place.query,
            place.sample);
  Ring ring = {0, args.stages, 1};
#pragma unroll 1
  for (int tile = place.first_tile; tile < place.last_tile; ++tile) {
    barrier_wait(memory.empty(ring.stage), ring.parity);
    load_rows(memory.keys(ring.stage), keys, memory.keys_full(ring.stage), CHANNELS, S::kKeyBox, 0, tile * S::kKeys,
              place.sample);
    load_rows(memory.values(ring.stage), values, memory.values_full(ring.stage), kColumns, S::kKeyBox, place.column,
              tile * S::kKeys, place.sample);
    ring.advance();
  }
}

// Two rows of a thread: 16 warp + lane / 4, and 8 after it. The other lanes of a quad have the same.
struct Softmax {
  float maximum[2] = {-infinity(), -infinity()};  // scaled
  float total[2] = {};                            // of the thread's columns
  float factor[2];                                // of earlier sums
};

// Scores to shares of the row's total, with a new maximum. Returns whether a lane of the warp has another maximum.
template <int KEYS>
__device__ __forceinline__ bool shares_of(float (&score)[KEYS / 2], Softmax& rows, float scale) {
  bool changed = false;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float maximum = score[2 * row];
#pragma unroll
    for (int i = 0; i < KEYS / 2; i += 4) {
      maximum = fmaxf(maximum, fmaxf(score[i + 2 * row], score[i + 2 * row + 1]));
    }
#pragma unroll
    for (int lane = 1; lane <= 2; lane *= 2) {
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffff, maximum, lane));
    }
    const float now = fmaxf(rows.maximum[row], maximum * scale);
    changed |= now != rows.maximum[row];
    rows.factor[row] = exp2_fast(rows.maximum[row] - now);
    rows.maximum[row] = now;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i += 4) {
#pragma unroll
      for (int k = i + 2 * row; k < i + 2 * row + 2; ++k) {
        score[k] = exp2_fast(fmaf(score[k], scale, -now));
        total += score[k];
      }
    }
    rows.total[row] = rows.total[row] * rows.factor[row] + total;
  }
  return __any_sync(0xffffffff, changed);
}

// A warpgroup's products over its tiles, for 64 queries. sum[4 j + i]: row lane / 4 + 8 (i / 2) of the warp's,
// column 8 j + 2 (lane % 4) + i % 2.
template <typename T, int CHANNELS, typename S>
__device__ __forceinline__ void multiply(const Args& args, const Memory<S>& memory, const Place& place, int group,
                                         int lane, float (&sum)[kColumns / 2], Softmax& rows) {
  constexpr bool kBf16 = Pair<T>::kBf16;
  constexpr int kKeys = S::kKeys, kTaken = S::kParts;  // every kTaken-th tile
  const uint64_t a = at(descriptor(1024, 1024), memory.queries + (S::kParts == 1 ? group * kRows * kLine : 0));
  Ring ring = {0, args.stages, 0};
  int tile = place.first_tile;
  if (kTaken > 1 && group > 0) ring.advance(), ++tile;
  float score[kKeys / 2] = {};
  barrier_wait(memory.queries_full(), 0);
  // Always entered, so that ptxas sees the products of the first tile and of later ones alike
  // (kernels/hopper_attention.py gives each warpgroup a tile).
#pragma unroll 1
  do {
    const uint64_t keys = at(descriptor(1024, 1024), memory.keys(ring.stage));
    const uint64_t values = at(descriptor(S::kKeyBox, 1024), memory.values(ring.stage));
    barrier_wait(memory.keys_full(ring.stage), ring.parity);
    products_begin();
#pragma unroll
    for (int k = 0; k < CHANNELS / 16; ++k) {
      const uint64_t from = a + (k / 4 * S::kQueryBox + k % 4 * 32) / 16;
      const uint64_t to = keys + (k / 4 * S::kKeyBox + k % 4 * 32) / 16;
      if (k == 0) {
        Product<kKeys>::template multiply<kBf16, false>(score, from, to);
      } else {
        Product<kKeys>::template multiply<kBf16, true>(score, from, to);
      }
    }
    products_commit();
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) opaque(score[i]);
    if ((tile + 1) * kKeys > args.positions) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        const int key = tile * kKeys + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (key >= args.positions) score[i] = -infinity();
      }
    }
    if (shares_of<kKeys>(score, rows, args.scale)) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sum[i] *= rows.factor[i / 2 % 2];
    }
    uint32_t share[kKeys / 4];
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) share[i] = Pair<T>::bits(Pair<T>::narrow(score[2 * i], score[2 * i + 1]));
    barrier_wait(memory.values_full(ring.stage), ring.parity);
    products_begin();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      Product<kColumns>::template multiply_rows<kBf16>(sum, share[4 * k], share[4 * k + 1], share[4 * k + 2],
                                                       share[4 * k + 3], values + k * 16 * kLine / 16);
    }
    products_commit();
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) opaque(sum[i]);
    if (lane == 0) barrier_arrive(memory.empty(ring.stage));
#pragma unroll
    for (int i = 0; i < kTaken; ++i) ring.advance();
    tile += kTaken;
  } while (tile < place.last_tile);
}

// Leaves a warpgroup's sums in shared memory, with the maximum and the sum of each row.
template <typename S>
__device__ __forceinline__ void leave(const Memory<S>& memory, int group, int warp, int lane,
                                      const float (&sum)[kColumns / 2], Softmax& rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group * kRows + warp * 16 + lane / 4 + 8 * half;
    float total = rows.total[half];
#pragma unroll
    for (int other = 1; other <= 2; other *= 2) total += __shfl_xor_sync(0xffffffff, total, other);
    if (lane % 4 == 0) store_shared(memory.rows() + row * 8, make_float2(rows.maximum[half], total));
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      store_shared(memory.sums() + (row * kStride + 8 * j + lane % 4 * 2) * 4,
                   make_float2(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]));
    }
  }
}

// The share of each part in `rows` rows that this block merges: [rows, parts].
template <typename S>
__device__ __forceinline__ void find_shares(const Args& args, const Memory<S>& memory, int first_row, int rows) {
  const int i = threadIdx.x, parts = args.cluster * S::kParts;
  const bool mine = i < rows * parts;
  float2 own = make_float2(0.0f, 0.0f);
  if (mine) {
    const int row = first_row + i / parts, block = i % parts / S::kParts, part = i % parts % S::kParts;
    own = load_remote_pair(remote(memory.rows() + (part * kRows + row) * 8, block));
    store_shared(memory.parts() + i * 8, own);
  }
  meet<1, kThreads>();
  if (mine) {
    const uint32_t row = memory.parts() + i / parts * parts * 8;
    float maximum = -infinity(), total = 0.0f;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) maximum = fmaxf(maximum, load_shared_floats(row + part * 8).x);
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const float2 other = load_shared_floats(row + part * 8);
      total += other.y * exp2_fast(other.x - maximum);
    }
    store_shared(memory.shares() + i * 4, exp2_fast(own.x - maximum) / total);
  }
  meet<1, kThreads>();
}

// Merges the parts of this block's rows, eight columns a thread, and stores them.
template <typename T, int CHANNELS, int QUERIES, typename S>
__device__ __forceinline__ void merge(const Args& args, const Memory<S>& memory, const Place& place) {
  constexpr int kPieces = kColumns / 8;
  const int first_row = place.rank * QUERIES / args.cluster, parts = args.cluster * S::kParts;
  const int rows = (place.rank + 1) * QUERIES / args.cluster - first_row;
  const Activation activation(args.activation);
  find_shares(args, memory, first_row, rows);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * 8, query = place.query + first_row + row;
    const int position = args.first_query + query;
    if (query >= args.queries) break;
    const float4* rest = reinterpret_cast<const float4*>(
        args.rest + (int64_t(place.sample) * args.positions + position) * CHANNELS + place.column + column);
    const float4 low = rest[0], high = rest[1];
    float value[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    uint32_t share = memory.shares() + row * parts * 4;
#pragma unroll 1
    for (int block = 0; block < args.cluster; ++block) {
      const uint32_t sums = remote(memory.sums() + ((first_row + row) * kStride + column) * 4, block);
#pragma unroll
      for (int part = 0; part < S::kParts; ++part, share += 4) {
        const float factor = __uint_as_float(load_shared_word(share));
        const uint32_t from = sums + part * kRows * kStride * 4;
        const float4 first = load_remote(from), second = load_remote(from + 16);
        value[0] = fmaf(first.x, factor, value[0]), value[1] = fmaf(first.y, factor, value[1]);
        value[2] = fmaf(first.z, factor, value[2]), value[3] = fmaf(first.w, factor, value[3]);
        value[4] = fmaf(second.x, factor, value[4]), value[5] = fmaf(second.y, factor, value[5]);
        value[6] = fmaf(second.z, factor, value[6]), value[7] = fmaf(second.w, factor, value[7]);
      }
    }
    T* const out = static_cast<T*>(args.out) + place.sample * args.sample_stride + position * args.position_stride +
                   place.column + column;
    *reinterpret_cast<uint4*>(out) = packed<T>(value, activation);
  }
}

template <typename T, int CHANNELS, int QUERIES>
__device__ __forceinline__ void run(const CUtensorMap& queries, const CUtensorMap& keys, const CUtensorMap& values,
                                    const Args& args) {
  using S = Shape<CHANNELS, QUERIES>;
  const Memory<S> memory(args);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Place place(args, QUERIES, kColumns);
  if (threadIdx.x == kThreads) {
    prefetch_map(queries), prefetch_map(keys), prefetch_map(values);
    barrier_init(memory.queries_full(), 1);
#pragma unroll 1
    for (int stage = 0; stage < args.stages; ++stage) {
      barrier_init(memory.keys_full(stage), 1);
      barrier_init(memory.values_full(stage), 1);
      barrier_init(memory.empty(stage), kGroupWarps * kGroups / S::kParts);
    }
    barriers_initialised();
  }
  __syncthreads();
  start_next_kernel();
  if (warp == kGroups * kGroupWarps) {
    if (lane == 0) load<CHANNELS>(queries, keys, values, args, memory, place);
    if (args.cluster > 1) {  // as the other warps
      cluster_meet();
      cluster_meet();
    }
    return;
  }
  const int group = warp / kGroupWarps;
  float sum[kColumns / 2] = {};
  Softmax rows;
  multiply<T, CHANNELS, S>(args, memory, place, group, lane, sum, rows);
  meet<1, kThreads>();  // the sums replace what both have read
  leave<S>(memory, group, warp % kGroupWarps, lane, sum, rows);
  if (args.cluster > 1) {
    cluster_meet();
  } else {
    meet<1, kThreads>();
  }
  wait_for_previous_kernel();  // which wrote `rest`
  merge<T, CHANNELS, QUERIES>(args, memory, place);
  if (args.cluster > 1) cluster_meet();  // a block must not end while others read its sums
}

}  // namespace lgnet

#define LGNET_ATTENTION(name, type, channels, queries)                                                    \
  extern "C" __global__ void __launch_bounds__(lgnet::kThreads + 32, 1)                                   \
      name(const __grid_constant__ CUtensorMap queries_map, const __grid_constant__ CUtensorMap keys_map, \
           const __grid_constant__ CUtensorMap values_map, const __grid_constant__ lgnet::Args args) {    \
    lgnet::run<type, channels, queries>(queries_map, keys_map, values_map, args);                         \
  }

#define LGNET_ATTENTIONS(dtype, type)                                \
  LGNET_ATTENTION(lgnet_attention_##dtype##_128_64, type, 128, 64)   \
  LGNET_ATTENTION(lgnet_attention_##dtype##_128_128, type, 128, 128) \
  LGNET_ATTENTION(lgnet_attention_##dtype##_256_64, type, 256, 64)   \
  LGNET_ATTENTION(lgnet_attention_##dtype##_256_128, type, 256, 128) \
  LGNET_ATTENTION(lgnet_attention_##dtype##_512_64, type, 512, 64)   \
  LGNET_ATTENTION(lgnet_attention_##dtype##_512_128, type, 512, 128)

LGNET_ATTENTIONS(float16, __half)
LGNET_ATTENTIONS(bfloat16, __nv_bfloat16)
