// Steps of the engine (kernels/conv.py) that read the picture, with 4 input channels, or end a stage, with 3 output
// channels. For GPUs of compute capability 8.0 and newer.
//
// A tile's inputs are copied to shared memory once and used for all taps, so that no address depends on a tap but by
// a constant, and padding costs nothing in the loop. Products are those of a warp (mma.m16n8k16): 16 positions of a
// row by 8 columns, over a depth of 16. Weights lie in the order of its registers (kernels/picture_conv.py).
//
// From the picture. A pixel has 8 bytes, so 4 adjacent pixels are a depth of 16: 4 taps of a row of taps. A thread's
// registers for the product hold channels of a single pixel each and are read straight from the patch. A warp
// computes 32 positions of a row and 64 channels. The weights' columns are ordered so that a thread has 8 adjacent
// channels.
//
// To the picture. A product with 3 columns would leave most of a matrix unit idle. So the taps of a row are columns:
//
//     product[x, tap, value] = sum over rows of taps and channels of source[y + row, x, channel] * weight[row, tap,
//     ...] out[x, value] = sum over taps of product[x + tap, tap, value]
//
// where the values of a position are the channels of a patch x patch outputs. A tile of WIDTH input columns gives
// WIDTH - TAPS + 1 outputs. Every warp computes one row of positions and every PARTS-th 16 channels, in two stages:
// the second half of the channels arrives while the first is multiplied. The products of all warps meet in shared
// memory, which replaces the inputs, and are added in the order of parts and taps. Then tanh, and the merge into the
// picture.
#include "activation.cuh"
#include "elements.cuh"
#include "ptx.cuh"
#include "source.cuh"

namespace lgnet {

constexpr int kWarp = 32;
constexpr int kFragment = 256;  // bytes of the weights of a product: 16 x 8
constexpr int kPixel = 8;       // bytes of a pixel of the picture
constexpr int kSpan = 32;       // positions of a row that a warp computes from the picture
constexpr int kChannels = 64;   // output channels of a block from the picture
constexpr int kStages = 2;      // in which the channels of a tile arrive, to the picture
constexpr int kColors = 3;

// kernels/picture_conv.py has the same fields in the same order.
struct Args {
  const void* source;
  const void* weights;
  const float* bias;
  void* store0;
  void* store1;
  const float* image;
  const float* mask;
  float* raw;
  void* merged;
  int32_t in_h, in_w, out_h, out_w, top, bottom, left, right;  // outputs [top, bottom) x [left, right) are stored
  int32_t rows_top, rows_left, tiles_x, tiles_y, origin;       // the first position, and its first tap's source
  int32_t n_blocks;                                            // of output channels
  int32_t stride_x, stride_0, stride_1, activation_0, activation_1, reflect, planar;
};

// The tile of positions that a block computes.
struct Tile {
  int sample, y, x;

  __device__ __forceinline__ Tile(const Args& args, int rows, int columns) {
    const int tile = blockIdx.x / args.n_blocks;
    x = args.rows_left + tile % args.tiles_x * columns;
    y = args.rows_top + tile / args.tiles_x % args.tiles_y * rows;
    sample = tile / (args.tiles_x * args.tiles_y);
  }
};

// The source of a position along an axis, and whether it is inside the map; padding that is not reflected is zero.
// Positions of a tile beyond the map have some source inside, whose products are not stored.
struct Source {
  int index;
  bool inside;

  __device__ __forceinline__ Source(int position, int size, bool reflect) {
    inside = reflect || (position >= 0 && position < size);
    if (reflect) {
      position = position < 0 ? -position : position;
      position = position < size ? position : 2 * (size - 1) - position;
    }
    index = min(max(position, 0), size - 1);
  }
};

// The source of a pixel of the patch whose first pixel is (y0, x0).
template <typename T>
__device__ __forceinline__ const T* pixel_of(const Args& args, int sample, int y, int x, bool& inside) {
  const Source row(y, args.in_h, args.reflect), column(x, args.in_w, args.reflect);
  inside = row.inside && column.inside;
  const int64_t pixel = (int64_t(sample) * args.in_h + row.index) * args.in_w + column.index;
  return static_cast<const T*>(args.source) + pixel * args.stride_x;
}

__device__ __forceinline__ void copy_weights(const Args& args, uint32_t to, int first, int bytes) {
  const char* const from = static_cast<const char*>(args.weights) + first;
#pragma unroll 1
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) copy_async<16>(to + i, from + i, true);
}

// -- from the picture ----------------------------------------------------------------------------------------------

template <typename T, int TAPS, int STRIDE>
struct FromPicture {
  static constexpr int kSteps = (TAPS + 3) / 4;  // products along a row of taps; taps beyond the last have no weight
  static constexpr int kPitch = (kSpan - 1) * STRIDE + 4 * kSteps;  // pixels of the patch's rows
  static constexpr int kColumns = kChannels / 8;
  static constexpr int kWeights = TAPS * kSteps * kColumns * kFragment;

  static __device__ __forceinline__ void load(const Args& args, uint32_t patch, const Tile& tile, int rows) {
    const int y0 = tile.y * STRIDE + args.origin, x0 = tile.x * STRIDE + args.origin;
    const int pixels = ((rows - 1) * STRIDE + TAPS) * kPitch;
#pragma unroll 1
    for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
      bool inside;
      const T* const from = pixel_of<T>(args, tile.sample, y0 + i / kPitch, x0 + i % kPitch, inside);
      copy_async<kPixel>(patch + i * kPixel, from, inside);
    }
  }

  static __device__ __forceinline__ void multiply(float (&sum)[2][kColumns][4], uint32_t patch, uint32_t weights,
                                                  int warp, int lane) {
    // A lane holds two channels of positions lane / 4 and lane / 4 + 8, for taps lane % 4 / 2 and two further.
    const uint32_t own = patch + ((warp * kPitch + lane / 4) * STRIDE + lane % 4 / 2) * kPixel + lane % 2 * 4;
#pragma unroll
    for (int y = 0; y < TAPS; ++y) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint4 a[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t at = own + (y * kPitch + 16 * half * STRIDE + 4 * step) * kPixel;
          a[half].x = load_shared_word(at);
          a[half].y = load_shared_word(at + 8 * STRIDE * kPixel);
          a[half].z = load_shared_word(at + 2 * kPixel);
          a[half].w = load_shared_word(at + (8 * STRIDE + 2) * kPixel);
        }
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const uint2 b =
              load_shared_pair(weights + ((y * kSteps + step) * kColumns + column) * kFragment + lane * 8);
          warp_product<Pair<T>::kBf16>(sum[0][column], a[0], b.x, b.y);
          warp_product<Pair<T>::kBf16>(sum[1][column], a[1], b.x, b.y);
        }
      }
    }
  }

  static __device__ __forceinline__ void run(const Args& args) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, rows = blockDim.x / kWarp;
    const Tile tile(args, rows, kSpan);
    const int block = blockIdx.x % args.n_blocks;
    const uint32_t weights = shared_address(dynamic_shared()), patch = weights + kWeights;
    copy_weights(args, weights, block * kWeights, kWeights);
    wait_for_previous_kernel();
    load(args, patch, tile, rows);
    copies_commit();
    start_next_kernel();
    const int channel = block * kChannels + lane % 4 * 8;
    float4 bias[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bias[i / 2][i % 2] = *reinterpret_cast<const float4*>(args.bias + channel + i / 2 * 32 + i % 2 * 4);
    }
    copies_wait<0>();
    __syncthreads();
    float sum[2][kColumns][4] = {};
    multiply(sum, patch, weights, warp, lane);

    const Activation activation0(args.activation_0), activation1(args.activation_1);
    const int y = tile.y + warp;
    if (y < args.top || y >= args.bottom) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int x = tile.x + lane / 4 + 8 * i;
      if (x < args.left || x >= args.right) continue;
      const int64_t pixel = (int64_t(tile.sample) * args.out_h + y) * args.out_w + x;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const float4 low = bias[part][0], high = bias[part][1];
        float value[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int c = 0; c < 8; ++c) value[c] += sum[i / 2][part * 4 + c / 2][i % 2 * 2 + c % 2];
        T* const to0 = static_cast<T*>(args.store0) + pixel * args.stride_0 + channel + part * 32;
        *reinterpret_cast<uint4*>(to0) = packed<T>(value, activation0);
        if (args.store1 != nullptr) {
          T* const to1 = static_cast<T*>(args.store1) + pixel * args.stride_1 + channel + part * 32;
          *reinterpret_cast<uint4*>(to1) = packed<T>(value, activation1);
        }
      }
    }
  }
};

// -- to the picture ------------------------------------------------------------------------------------------------

template <typename T, int CHANNELS, int TAPS, int PATCH, int WIDTH>
struct ToPicture {
  static constexpr int kValues = PATCH * PATCH * kColors;  // of a position
  static constexpr int kProducts = TAPS * kValues;
  static constexpr int kColumns = (kProducts + 7) / 8;
  static constexpr int kParts = CHANNELS / 16 / kStages;  // warps that share a row
  static constexpr int kHeights = WIDTH / 16;             // products along a row
  static constexpr int kOutputs = WIDTH - TAPS + 1;       // positions of a row
  static constexpr int kLine = 2 * CHANNELS;              // bytes of a pixel
  static constexpr int kStageWeights = kParts * TAPS * kColumns * kFragment;
  static constexpr int kPitch = WIDTH + 4;  // floats between two columns of products; 4 avoid bank conflicts
  static constexpr int kItems = (kOutputs * PATCH * PATCH + kParts * kWarp - 1) / (kParts * kWarp);

  // The inputs' 16-byte parts are exclusive-ored with the pixel's number, so that the 8 rows of a matrix lie in
  // different banks.
  static __device__ __forceinline__ void load(const Args& args, uint32_t patch, const Tile& tile, int rows,
                                              int stage) {
    constexpr int kCopies = 2 * kParts, kWarps = WIDTH * kCopies / kWarp;  // of a pixel, of a row
    const int y0 = tile.y + args.origin, x0 = tile.x + args.origin, lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int unit = threadIdx.x / kWarp; unit < (rows + TAPS - 1) * kWarps; unit += blockDim.x / kWarp) {
      const int row = unit / kWarps, copy = unit % kWarps * kWarp + lane;
      const int x = copy / kCopies, part = stage * kCopies + copy % kCopies;
      bool inside;
      const T* const from = pixel_of<T>(args, tile.sample, y0 + row, x0 + x, inside) + part * 8;
      copy_async<16>(patch + (row * WIDTH + x) * kLine + (part ^ (x & 7)) * 16, from, inside);
    }
    copies_commit();
  }

  static __device__ __forceinline__ void multiply(float (&sum)[kHeights][kColumns][4], uint32_t patch,
                                                  uint32_t weights, int row, int depth, int lane) {
    const int part = 2 * depth + lane / 16, x = lane % 16;
    const uint32_t own = patch + (row * WIDTH + x) * kLine + (part ^ (x & 7)) * 16;
#pragma unroll
    for (int y = 0; y < TAPS; ++y) {
      uint4 a[kHeights];
#pragma unroll
      for (int i = 0; i < kHeights; ++i) a[i] = load_matrix(own + (y * WIDTH + 16 * i) * kLine);
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const uint2 b = load_shared_pair(weights + (y * kColumns + column) * kFragment + lane * 8);
#pragma unroll
        for (int i = 0; i < kHeights; ++i) warp_product<Pair<T>::kBf16>(sum[i][column], a[i], b.x, b.y);
      }
    }
  }

  // An output pixel of the tile.
  struct Item {
    int row, column, shift;  // position within the tile, and which output of it
    int y, x;
    bool stored;

    __device__ __forceinline__ Item(const Args& args, const Tile& tile, int rows, int index) {
      const int wide = index % (kOutputs * PATCH), line = index / (kOutputs * PATCH);
      row = line / PATCH, column = wide / PATCH, shift = line % PATCH * PATCH + wide % PATCH;
      y = tile.y * PATCH + line, x = tile.x * PATCH + wide;
      stored = row < rows && y >= args.top && y < args.bottom && x >= args.left && x < args.right;
    }
    __device__ __forceinline__ int64_t pixel(const Args& args, int sample) const {
      return (int64_t(sample) * args.out_h + y) * args.out_w + x;
    }
    __device__ __forceinline__ int64_t plane(const Args& args, int sample, int color) const {
      return ((int64_t(sample) * kColors + color) * args.out_h + y) * args.out_w + x;
    }
  };

  static __device__ __forceinline__ void finish(const Args& args, const Tile& tile, int rows, const float* sums,
                                                const Item& item, const float (&bias)[kColors],
                                                const float (&image)[kColors], float mask) {
    float value[kColors], merged[kColors];
#pragma unroll
    for (int color = 0; color < kColors; ++color) {
      float total = 0.0f;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float* const own =
            sums + ((part * rows + item.row) * kProducts + item.shift * kColors + color) * kPitch + item.column;
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) total += own[tap * kValues * kPitch + tap];
      }
      value[color] = tanhf(total + bias[color]);
      merged[color] = image[color] * (1.0f - mask) + value[color] * mask;
      args.raw[item.plane(args, tile.sample, color)] = value[color];
      if (args.planar) static_cast<float*>(args.merged)[item.plane(args, tile.sample, color)] = merged[color];
    }
    if (!args.planar) {  // the fourth channel is left alone
      using Two = typename Pair<T>::type;
      Two* const to = static_cast<Two*>(args.merged) + item.pixel(args, tile.sample) * 2;
      to[0] = Pair<T>::narrow(merged[0], merged[1]);
      *reinterpret_cast<T*>(to + 1) = T(merged[2]);
    }
  }

  static __device__ __forceinline__ void run(const Args& args) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, rows = blockDim.x / (kWarp * kParts);
    const int row = warp / kParts, part = warp % kParts;
    const Tile tile(args, rows, kOutputs);
    const uint32_t patch = shared_address(dynamic_shared());
    const uint32_t weights = patch + (rows + TAPS - 1) * WIDTH * kLine;
    copy_weights(args, weights, 0, kStageWeights);
    wait_for_previous_kernel();
    load(args, patch, tile, rows, 0);
    copy_weights(args, weights + kStageWeights, kStageWeights, kStageWeights);
    load(args, patch, tile, rows, 1);
    start_next_kernel();
    float bias[kColors], image[kItems][kColors], mask[kItems];  // read early: they are from device memory
#pragma unroll
    for (int color = 0; color < kColors; ++color) bias[color] = args.bias[color];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Item item(args, tile, rows, threadIdx.x + i * blockDim.x);
      mask[i] = item.stored ? args.mask[item.pixel(args, tile.sample)] : 0.0f;
#pragma unroll
      for (int color = 0; color < kColors; ++color) {
        image[i][color] = item.stored ? args.image[item.plane(args, tile.sample, color)] : 0.0f;
      }
    }

    float sum[kHeights][kColumns][4] = {};
    copies_wait<1>();
    __syncthreads();
    multiply(sum, patch, weights + part * TAPS * kColumns * kFragment, row, part, lane);
    copies_wait<0>();
    __syncthreads();
    multiply(sum, patch, weights + kStageWeights + part * TAPS * kColumns * kFragment, row, kParts + part, lane);
    __syncthreads();
    // The products replace inputs and weights: [part, row, column, position].
    float* const sums = reinterpret_cast<float*>(dynamic_shared());
    float* const own = sums + (part * rows + row) * kProducts * kPitch + lane / 4;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int product = column * 8 + lane % 4 * 2 + i % 2;
        if (product >= kProducts) continue;
#pragma unroll
        for (int height = 0; height < kHeights; ++height) {
          own[product * kPitch + height * 16 + i / 2 * 8] = sum[height][column][i];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Item item(args, tile, rows, threadIdx.x + i * blockDim.x);
      if (item.stored) finish(args, tile, rows, sums, item, bias, image[i], mask[i]);
    }
  }
};

}  // namespace lgnet

#define LGNET_KERNEL(name, threads, ...)                                                                 \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ lgnet::Args args) { \
    lgnet::__VA_ARGS__::run(args);                                                                       \
  }

#define LGNET_PICTURE(dtype, type)                                             \
  LGNET_KERNEL(lgnet_from_##dtype##_7, 512, FromPicture<type, 7, 1>)           \
  LGNET_KERNEL(lgnet_from_##dtype##_4, 512, FromPicture<type, 4, 2>)           \
  LGNET_KERNEL(lgnet_to_##dtype##_64_32, 640, ToPicture<type, 64, 7, 1, 32>)   \
  LGNET_KERNEL(lgnet_to_##dtype##_64_48, 640, ToPicture<type, 64, 7, 1, 48>)   \
  LGNET_KERNEL(lgnet_to_##dtype##_64_64, 640, ToPicture<type, 64, 7, 1, 64>)   \
  LGNET_KERNEL(lgnet_to_##dtype##_128_32, 384, ToPicture<type, 128, 3, 2, 32>) \
  LGNET_KERNEL(lgnet_to_##dtype##_128_48, 384, ToPicture<type, 128, 3, 2, 48>)

LGNET_PICTURE(float16, __half)
LGNET_PICTURE(bfloat16, __nv_bfloat16)
