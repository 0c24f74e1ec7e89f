// Direct convolution that reads a padded copy of the map, and no patches.
//
// Pixels of a kernel row lie side by side, so a product takes its rows from the copy, one piece for each kernel row,
// in place of a patch that repeats every pixel for every tap. The copy is made once, row by row; then a task computes
// a band, some lines of outputs below each other, and stores it. For few channels, where copying patches costs as
// much as the products, and for matrix tiles, which read rows at any even distance as fast as adjacent ones.
#include <algorithm>

#include "conv_schedule.h"
#include "parallel.h"

namespace lgnet {
namespace {

constexpr int64_t kFewChannels = 16;  // of a map that direct convolution reads in place
// Rows of a product by matrix tiles, for all of which the weights are read once: from kEnoughRows on, reading in
// place is faster than patches; a band has kBandRows, because weights of two parts leave the second-level cache
// between bands.
constexpr int64_t kEnoughRows = 256, kBandRows = 512;

// A copy of the source with its padding, [sample][height][width][pixel] in units; (top, left): where its first pixel
// is.
struct Padded {
  int32_t* map;
  int64_t low;  // from the high parts to the low ones
  int64_t top, left, height, width, pixel;
};

// Lines of outputs below each other, `tiles` in each, that one product computes.
struct Band {
  Tile first;
  int64_t tiles, lines;

  // Of the product: positions of the padded map from the first output to the last.
  int64_t rows(const Padded& padded) const { return (lines - 1) * padded.width + tiles; }
  // Whether a line that begins with `tile` is the next one.
  bool goes_on(const Tile& tile) const {
    return tile.region == first.region && tile.batch == first.batch && tile.y == first.y + lines;
  }
};

bool has_few_channels(const Convolution& conv) {
  return conv.step.source.channels <= kFewChannels && conv.step.source.pixel == conv.step.source.channels;
}

// Direct, every kernel row one piece of adjacent taps, and channels few or products by matrix tiles, which take as
// long to read a row from the map as from a patch. A few tiles are not worth a copy of the map.
bool can_read_in_place(const Convolution& conv) {
  const MapSpec& source = conv.step.source;
  if (conv.step.tile > 1 || conv.step.chunk != 0 || !(has_few_channels(conv) || conv.kernels.tile_units > 0) ||
      source.channels % conv.kernels.pair != 0 ||
      2 * conv.space.total() * conv.step.in_step < source.height * source.width) {
    return false;
  }
  for (const Part& part : conv.parts) {
    if (part.piece == 0) return false;
  }
  return true;
}

// Whether bands are long enough, or the weights small enough to stay in the cache from band to band.
bool reads_weights_seldom(const Convolution& conv, const Padded& padded, const std::vector<Band>& bands) {
  for (const Band& band : bands) {
    if (band.rows(padded) >= kEnoughRows) return true;
  }
  return conv.kernels.parts * conv.parts[0].weights(conv.columns) * conv.kernels.unit_bytes <= kCacheBytes / 2;
}

// The padded copy's size, without memory.
Padded padding(const Convolution& conv) {
  const MapSpec& source = conv.step.source;
  Padded padded{nullptr, 0, 0, 0, 0, 0, source.channels / conv.kernels.pair};
  int64_t bottom = 0, right = 0;
  for (const Part& part : conv.parts) {
    const Start &first = part.group->starts.front(), &last = part.group->starts.back();
    padded.top = std::min(padded.top, first.y);
    padded.left = std::min(padded.left, first.x);
    bottom =
        std::max(bottom, (ceil_div(conv.step.out_height, conv.step.out_step) - 1) * conv.step.in_step + last.y + 1);
    right = std::max(right, (ceil_div(conv.step.out_width, conv.step.out_step) - 1) * conv.step.in_step + last.x + 1);
  }
  padded.height = bottom - padded.top;
  padded.width = right - padded.left;
  return padded;
}

// Each row of the copy is a patch of as many taps as it has columns.
void fill(const Convolution& conv, const Padded& padded) {
  Group row;
  for (int64_t x = 0; x < padded.width; ++x) row.starts.push_back({padded.top, padded.left + x});
  Input input = conv.input;
  input.in_step = 1;
  const Rect everywhere{0, conv.step.source.height, 0, conv.step.source.width};
  const Region whole{everywhere, everywhere};
  const int64_t units = padded.width * padded.pixel;
  parallel_for(conv.run.threads, conv.run.batch * padded.height, [&](int64_t task, int64_t) {
    const Tile tile{task / padded.height, task % padded.height, 0, &whole};
    conv.kernels.transform(input, row, 1, &tile, 1, padded.map + task * units, 0, units, padded.low);
  });
}

// Lines of outputs, some of them together where the rows of matrix tiles are an even distance apart: rows beyond the
// end of a line, as many as the padding is wide, are multiplied too and not stored.
std::vector<Band> bands_of(const Convolution& conv, const Padded& padded) {
  const int64_t total = conv.space.lines();
  int64_t together = 1;
  if (conv.kernels.tile_units > 0 && conv.step.in_step == 1) {
    const int64_t balanced = total * conv.jobs() / (kConvTasksPerThread * conv.run.threads);
    together = std::max<int64_t>(1, std::min(ceil_div(kBandRows, padded.width), balanced));
  }
  std::vector<Band> bands;
  for (int64_t number = 0; number < total; ++number) {
    int64_t tiles = 0;
    const Tile first = conv.space.line(number, tiles);
    if (!bands.empty() && bands.back().lines < together && bands.back().goes_on(first)) {
      ++bands.back().lines;
    } else {
      bands.push_back({first, tiles, 1});
    }
  }
  return bands;
}

void finish_line(const Convolution& conv, int64_t job, Tile tile, int64_t tiles, const float* products) {
  for (int64_t done = 0; done < tiles; done += kMaximumChunk, products += kMaximumChunk * conv.c_row) {
    const int64_t count = std::min(kMaximumChunk, tiles - done);
    Tile some[kMaximumChunk];
    for (int64_t t = 0; t < count; ++t, ++tile.x) some[t] = tile;
    const int64_t stride = 0;
    conv.kernels.finish(conv.output, conv.step.jobs[job], 1, some, count, &products, &stride, conv.c_row, nullptr);
  }
}

// Outputs of a band of a job. products: [band's rows][c_row].
void run_band(const Convolution& conv, const Padded& padded, int64_t job, const Band& band, float* products) {
  const Part& part = conv.parts[conv.first_part[job]];
  const Start& start = part.group->starts.front();
  const int64_t y = band.first.batch * padded.height + band.first.y * conv.step.in_step + start.y - padded.top;
  const int64_t x = band.first.x * conv.step.in_step + start.x - padded.left;
  Product product = conv.product_of(part);
  product.a = padded.map + (y * padded.width + x) * padded.pixel;
  product.a_row = conv.step.in_step * padded.pixel;
  product.a_low = padded.low;
  product.piece = part.piece;
  product.jump = padded.width * padded.pixel;
  product.c = products;
  product.rows = band.rows(padded);
  conv.kernels.product(product);
  Tile tile = band.first;
  for (int64_t line = 0; line < band.lines; ++line, ++tile.y, products += padded.width * conv.c_row) {
    finish_line(conv, job, tile, band.tiles, products);
  }
}

// Bands of outputs, each a task, after the copy.
void run_bands(const Convolution& conv, Padded padded, const std::vector<Band>& bands) {
  int64_t rows = 0;
  for (const Band& band : bands) rows = std::max(rows, band.rows(padded));
  const int64_t map = round_up(conv.run.batch * padded.height * padded.width * padded.pixel, 1024);
  const int64_t each = round_up(rows * conv.c_row, 1024) + 64;
  padded.map = reinterpret_cast<int32_t*>(conv.run.scratch(4 * (conv.kernels.parts * map + each * conv.run.threads)));
  padded.low = map;
  fill(conv, padded);
  float* products = reinterpret_cast<float*>(padded.map + conv.kernels.parts * map);
  parallel_for(conv.run.threads, conv.jobs() * static_cast<int64_t>(bands.size()), [&](int64_t task, int64_t worker) {
    run_band(conv, padded, task % conv.jobs(), bands[static_cast<size_t>(task / conv.jobs())],
             products + worker * each);
  });
}

}  // namespace

bool run_in_place(const Convolution& conv) {
  if (!can_read_in_place(conv)) return false;
  const Padded padded = padding(conv);
  const std::vector<Band> bands = bands_of(conv, padded);
  if (!has_few_channels(conv) && !reads_weights_seldom(conv, padded, bands)) return false;
  run_bands(conv, padded, bands);
  return true;
}

}  // namespace lgnet
