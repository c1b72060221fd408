// Linear layers whose weights are packed for a register tile, and their products with T rows.
//
// Weights are f32, f16 (half.h), bf16 (bfloat.h), or int8 with a scale for every output (whole.h);
// the rows that bf16 and int8 meet are rounded likewise. An output is summed over its inputs in one
// order, fused or not fused in every tile alike. So its bits do not depend on how many rows there
// are, which thread has it, or where in a tile it lies: what a request draws does not depend on its
// company.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <utility>

#include "bfloat.h"
#include "decoder_abi.h"
#include "half.h"
#include "memory.h"
#include "vector.h"
#include "whole.h"

namespace nuwa {

struct Linear;

// Rows that are multiplied: [rows][width], for int8 the same as whole numbers of a scale, and for
// bf16 the same [rows][width rounded up to whole chunks], zero beyond the width.
struct Rows {
  Array<float> value;
  Array<WholeRow> whole;
  Array<float> scale;
  Array<BFloat> narrow;
  int width = 0, narrow_width = 0;

  // For what multiplies them.
  inline void reserve(std::size_t rows, int row_width, std::initializer_list<const Linear*> next);
  float* row(int index) { return value.get() + static_cast<std::size_t>(index) * width; }
  const float* row(int index) const {
    return value.get() + static_cast<std::size_t>(index) * width;
  }
  const BFloat* narrow_row(int index) const {
    return narrow.get() + static_cast<std::size_t>(index) * narrow_width;
  }
  // Makes a row ready for what multiplies it, when its values are complete.
  inline void finish(int index, const Linear& next);
};

// [out][in] weights as panels of kPanel outputs, zero beyond the last output. A panel is
// [in][kPanel] of f32 or f16, [in, in whole chunks / 2][kPanel][2] of bf16, or
// [in / kGroup][kPanel][kGroup] whole numbers.
struct Linear {
  int in = 0, panels = 0;
  Array<float> weight, bias;
  Array<Half> half;
  Array<BFloat> narrow;
  Array<WholeWeight> whole;
  Array<float> scale;
  Array<std::int32_t> start;  // where sums start, by output

  bool is_whole() const { return whole.get() != nullptr; }
  bool is_half() const { return half.get() != nullptr; }
  bool is_narrow() const { return narrow.get() != nullptr; }
  // Whether rows must be made ready for it (Rows::finish).
  bool needs_finished() const { return is_whole() || is_narrow(); }

  // order: which row of `from` each output is, in turn; all rows as they come if null.
  static Linear pack(const NuwaMatrix& from, const float* from_bias, int out, int in,
                     const int* order = nullptr) {
    Linear made;
    made.in = in;
    made.panels = (out + kPanel - 1) / kPanel;
    const std::size_t outputs = static_cast<std::size_t>(made.panels) * kPanel;
    made.bias = Array<float>(outputs);
    if (from.type == kInt8) {
      made.whole = Array<WholeWeight>(outputs * in);
      made.scale = Array<float>(outputs);
      made.start = Array<std::int32_t>(outputs);
    } else if (from.type == kBFloat16) {
      made.narrow = Array<BFloat>(outputs * whole_chunks(in));
    } else if (from.type == kFloat16 && kReadsHalves) {
      made.half = Array<Half>(outputs * in);
    } else {
      made.weight = Array<float>(outputs * in);
    }
    for (int j = 0; j < out; ++j) {
      const int row = order ? order[j] : j;
      const std::size_t first = static_cast<std::size_t>(row) * in;
      if (made.is_whole())
        made.pack_whole(from, out, row, j);
      else if (made.is_narrow())
        made.pack_narrow(static_cast<const BFloat*>(from.weight) + first, j);
      else if (made.is_half())
        made.pack_row(static_cast<const Half*>(from.weight) + first, j, made.half.get());
      else if (from.type == kFloat16)
        made.pack_row(static_cast<const Half*>(from.weight) + first, j, made.weight.get());
      else
        made.pack_row(static_cast<const float*>(from.weight) + first, j, made.weight.get());
      if (from_bias) made.bias[j] = from_bias[row];
    }
    return made;
  }

  const float* panel(int p) const {
    return weight.get() + static_cast<std::size_t>(p) * in * kPanel;
  }
  const Half* half_panel(int p) const {
    return half.get() + static_cast<std::size_t>(p) * in * kPanel;
  }
  const BFloat* narrow_panel(int p) const {
    return narrow.get() + static_cast<std::size_t>(p) * whole_chunks(in) * kPanel;
  }
  const WholeWeight* whole_panel(int p) const {
    return whole.get() + static_cast<std::size_t>(p) * in * kPanel;
  }

 private:
  template <class From, class To>
  void pack_row(const From* from, int j, To* to) {
    to += static_cast<std::size_t>(j / kPanel) * in * kPanel + j % kPanel;
    for (int k = 0; k < in; ++k) copy(from[k], to[static_cast<std::size_t>(k) * kPanel]);
  }
  static void copy(float from, float& to) { to = from; }
  static void copy(Half from, Half& to) { to = from; }
  static void copy(Half from, float& to) { to = to_float(from); }

  void pack_narrow(const BFloat* from, int j) {
    BFloat* to = narrow.get() +
                 static_cast<std::size_t>(j / kPanel) * whole_chunks(in) * kPanel + j % kPanel * 2;
    for (int k = 0; k < in; ++k) to[static_cast<std::size_t>(k / 2) * 2 * kPanel + k % 2] = from[k];
  }

  void pack_whole(const NuwaMatrix& from, int out, int row, int j) {
    const std::int8_t* weights = static_cast<const std::int8_t*>(from.weight) + row;
    WholeWeight* to = whole.get() + static_cast<std::size_t>(j / kPanel) * in * kPanel;
    std::int32_t total = 0;
    for (int k = 0; k < in; ++k) {
      to[(static_cast<std::size_t>(k / kGroup) * kPanel + j % kPanel) * kGroup + k % kGroup] =
          weights[static_cast<std::size_t>(k) * out];
      total += weights[static_cast<std::size_t>(k) * out];
    }
    scale[j] = from.scale[row];
    start[j] = -kRaised * total;
  }
};

inline void Rows::reserve(std::size_t rows, int row_width,
                          std::initializer_list<const Linear*> next) {
  width = row_width;
  narrow_width = whole_chunks(width);
  value.reserve(rows * width);
  for (const Linear* each : next) {
    if (each->is_whole()) whole.reserve(rows * width);
    if (each->is_whole()) scale.reserve(rows);
    if (each->is_narrow()) narrow.reserve(rows * narrow_width);
  }
}

inline void Rows::finish(int index, const Linear& next) {
  if (next.is_whole()) {
    WholeRow* out = whole.get() + static_cast<std::size_t>(index) * width;
    scale[index] = quantize(row(index), width, out);
  } else if (next.is_narrow()) {
    BFloat* out = narrow.get() + static_cast<std::size_t>(index) * narrow_width;
    const float* from = row(index);
    if (has_tiles())
      for (int i = 0; i < width; i += kLanes) store_fast(out + i, load(from + i));
    else
      for (int i = 0; i < width; i += kLanes) store(out + i, load(from + i));
  }
}

typedef Floats Sums[2];  // one row's outputs of a panel
typedef Ints WholeSums[2];

// Where the rows of a tile lie: `apart` floats from one to the next, each of `runs` runs of
// `length` floats, with next_run from one run to the next.
struct TileRows {
  const float* first;
  int apart, runs, length;
  std::size_t next_run;
};

// M rows, at most kTileRows, times one panel. A function of its own for every number of rows, so
// that all sums stay in registers. Afar: the panel is in no near cache, so it is fetched ahead.
// Keep: it is put into `kept` as floats, for the tiles that come after this one.
template <int M, bool Afar, bool Keep, class Weight>
__attribute__((noinline)) void tile(const TileRows& rows, const Weight* panel, float* kept,
                                    Sums* sums) {
  constexpr int kAhead = 8 * kPanel * sizeof(float) / sizeof(Weight);
  constexpr int kLine = 64 / sizeof(Weight);  // of a cache, in weights
  const float* first = rows.first;
  Floats sum[M][2] = {};
  for (int run = 0; run < rows.runs; ++run, first += rows.next_run) {
    for (int k = 0; k < rows.length; ++k, panel += kPanel) {
      const Floats low = load(panel), high = load(panel + kLanes);
      if (Afar)
        for (int i = 0; i < kPanel; i += kLine) __builtin_prefetch(panel + kAhead + i);
      if (Keep) {
        store(kept, low);
        store(kept + kLanes, high);
        kept += kPanel;
      }
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const Floats x = all(first[static_cast<std::size_t>(i) * rows.apart + k]);
        sum[i][0] += x * low;
        sum[i][1] += x * high;
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    sums[i][0] = sum[i][0];
    sums[i][1] = sum[i][1];
  }
}

template <int M>
NUWA_WHOLE __attribute__((noinline)) void whole_tile(const WholeRow* rows, int in,
                                                     const WholeWeight* panel, Ints low_start,
                                                     Ints high_start, WholeSums* sums) {
  Ints sum[M][2];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    sum[i][0] = low_start;
    sum[i][1] = high_start;
  }
  for (int k = 0; k < in; k += kGroup, panel += kPanel * kGroup) {
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const WholeRow* inputs = rows + static_cast<std::size_t>(i) * in + k;
      sum[i][0] = add_group(sum[i][0], inputs, panel);
      sum[i][1] = add_group(sum[i][1], inputs, panel + kLanes * kGroup);
    }
  }
  for (int i = 0; i < M; ++i) {
    sums[i][0] = sum[i][0];
    sums[i][1] = sum[i][1];
  }
}

template <class Weight>
using Tile = void (*)(const TileRows&, const Weight*, float*, Sums*);
typedef void (*WholeTile)(const WholeRow*, int, const WholeWeight*, Ints, Ints, WholeSums*);

template <bool Afar, bool Keep, class Weight, int... M>
constexpr std::array<Tile<Weight>, sizeof...(M)> tiles(std::integer_sequence<int, M...>) {
  return {{tile<M + 1, Afar, Keep, Weight>...}};
}
template <int... M>
constexpr std::array<WholeTile, sizeof...(M)> whole_tiles(std::integer_sequence<int, M...>) {
  return {{whole_tile<M + 1>...}};
}

constexpr auto kRowCounts = std::make_integer_sequence<int, kTileRows>();
constexpr std::array<Tile<float>, kTileRows> kTiles = tiles<false, false, float>(kRowCounts);
constexpr std::array<Tile<float>, kTileRows> kTilesAfar = tiles<true, false, float>(kRowCounts);
constexpr std::array<Tile<Half>, kTileRows> kHalfTiles = tiles<true, false, Half>(kRowCounts);
constexpr std::array<Tile<Half>, kTileRows> kKeptTiles = tiles<true, true, Half>(kRowCounts);
constexpr std::array<WholeTile, kTileRows> kWholeTiles = whole_tiles(kRowCounts);
constexpr int kBlocksAtATime = 16;  // row blocks that a panel meets while it is in a near cache

// As multiply(), of a layer in bf16.
template <class Done>
void multiply_narrow(const Rows& rows, int count, const Linear& linear, int first, int last,
                     Done done) {
  constexpr int kRows = 2 * kTileCells;
  const int width = rows.narrow_width;
  const bool tiles = has_tiles();
  TileSizes sizes;
  alignas(64) CellSums sums;
  for (int row0 = 0; row0 < count; row0 += kBlocksAtATime * kRows) {
    const int row1 = std::min(count, row0 + kBlocksAtATime * kRows);
    for (int p = first; p < last; ++p) {
      const float* bias = linear.bias.get() + static_cast<std::size_t>(p) * kPanel;
      const Floats low = load(bias), high = load(bias + kLanes);
      for (int row = row0; row < row1; row += kRows) {
        const int here = std::min(row1 - row, kRows), first_count = std::min(here, kTileCells);
        const BFloat* begin = rows.narrow_row(row);
        const BFloat* second = begin + static_cast<std::size_t>(kTileCells) * width;
        const Cells cells{begin, second, first_count, here - first_count, width, 1, width, 0};
        const auto product = row == row0 ? multiply<true> : multiply<false>;
        product(cells, linear.narrow_panel(p), tiles, sizes, sums);
        for (int i = 0; i < here; ++i)
          done(row + i, p, load(sums[i]) + low, load(sums[i] + kLanes) + high);
      }
    }
  }
}

// Panels [first, last) of linear(the first `count` rows), which are finished for it.
// done(row, panel, low, high) takes each row's kPanel outputs, as two vectors. unpacked: room for a
// panel of floats, [in][kPanel].
template <class Done>
void multiply(const Rows& rows, int count, const Linear& linear, int first, int last,
              float* unpacked, Done done) {
  if (linear.is_narrow()) return multiply_narrow(rows, count, linear, first, last, done);
  const int in = linear.in;
  const bool whole = linear.is_whole(), half = linear.is_half();
  Sums sums[kTileRows];
  WholeSums whole_sums[kTileRows];
  const int blocks = (count + kTileRows - 1) / kTileRows;
  for (int block0 = 0; block0 < blocks; block0 += kBlocksAtATime) {
    const int block1 = std::min(blocks, block0 + kBlocksAtATime);
    for (int p = first; p < last; ++p) {
      const std::size_t output = static_cast<std::size_t>(p) * kPanel;
      const Floats low = load(linear.bias.get() + output);
      const Floats high = load(linear.bias.get() + output + kLanes);
      for (int block = block0; block < block1; ++block) {
        // Blocks of nearly equal size: a last one of a single row would leave most registers idle.
        const int begin = static_cast<int>(static_cast<long>(count) * block / blocks);
        const int end = static_cast<int>(static_cast<long>(count) * (block + 1) / blocks);
        if (whole) {
          const Floats low_scale = load(linear.scale.get() + output);
          const Floats high_scale = load(linear.scale.get() + output + kLanes);
          kWholeTiles[end - begin - 1](rows.whole.get() + static_cast<std::size_t>(begin) * in, in,
                                       linear.whole_panel(p), load(linear.start.get() + output),
                                       load(linear.start.get() + output + kLanes), whole_sums);
          for (int row = begin; row < end; ++row) {
            const WholeSums& sum = whole_sums[row - begin];
            const float scale = rows.scale[row];
            done(row, p, __builtin_convertvector(sum[0], Floats) * scale * low_scale + low,
                 __builtin_convertvector(sum[1], Floats) * scale * high_scale + high);
          }
        } else {
          const TileRows given{rows.row(begin), in, 1, in, 0};
          if (half && block == block0) {
            const auto& tiles = block1 - block0 > 1 ? kKeptTiles : kHalfTiles;
            tiles[end - begin - 1](given, linear.half_panel(p), unpacked, sums);
          } else {
            const auto& tiles = block == block0 ? kTilesAfar : kTiles;
            tiles[end - begin - 1](given, half ? unpacked : linear.panel(p), nullptr, sums);
          }
          for (int row = begin; row < end; ++row)
            done(row, p, sums[row - begin][0] + low, sums[row - begin][1] + high);
        }
      }
    }
  }
}

}  // namespace nuwa
