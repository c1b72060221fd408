// Linear layers whose weights are packed for a register tile, and their products with T rows.
//
// An output is summed over its inputs in order, one multiply-add after the other, in one lane of a
// vector, fused or not fused in every tile alike. So its bits do not depend on how many rows there are, which thread has it, or where in a
// tile it lies: what a request draws does not depend on its company.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "memory.h"
#include "vector.h"

namespace nuwa {

// [out][in] weights as panels of kPanel outputs: panel p is [in][kPanel], zero beyond the last
// output.
struct Linear {
  int in = 0, panels = 0;
  Array<float> weight, bias;

  // order: which row of `from` each output is, in turn; all rows as they come if null.
  static Linear pack(const float* from, const float* from_bias, int out, int in,
                     const int* order = nullptr) {
    Linear made;
    made.in = in;
    made.panels = (out + kPanel - 1) / kPanel;
    made.weight = Array<float>(static_cast<std::size_t>(made.panels) * in * kPanel);
    made.bias = Array<float>(static_cast<std::size_t>(made.panels) * kPanel);
    for (int j = 0; j < out; ++j) {
      const int row = order ? order[j] : j;
      float* to = made.panel(j / kPanel) + j % kPanel;
      const float* weights = from + static_cast<std::size_t>(row) * in;
      for (int k = 0; k < in; ++k) to[static_cast<std::size_t>(k) * kPanel] = weights[k];
      if (from_bias) made.bias[j] = from_bias[row];
    }
    return made;
  }

  float* panel(int p) { return weight.get() + static_cast<std::size_t>(p) * in * kPanel; }
  const float* panel(int p) const {
    return weight.get() + static_cast<std::size_t>(p) * in * kPanel;
  }
};

typedef Floats Sums[2];  // one row's outputs of a panel

// M rows, at most kTileRows, times one panel. A function of its own for every number of rows, so that
// all sums stay in registers.
template <int M>
__attribute__((noinline)) void tile(const float* rows, int in, const float* panel, Sums* sums) {
  Floats sum[M][2] = {};
  for (int k = 0; k < in; ++k, panel += kPanel) {
    const Floats low = load(panel), high = load(panel + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const Floats x = all(rows[static_cast<std::size_t>(i) * in + k]);
      sum[i][0] += x * low;
      sum[i][1] += x * high;
    }
  }
  for (int i = 0; i < M; ++i) {
    sums[i][0] = sum[i][0];
    sums[i][1] = sum[i][1];
  }
}

typedef void (*Tile)(const float*, int, const float*, Sums*);

template <int... M>
constexpr std::array<Tile, sizeof...(M)> tiles(std::integer_sequence<int, M...>) {
  return {{tile<M + 1>...}};
}

constexpr std::array<Tile, kTileRows> kTiles = tiles(std::make_integer_sequence<int, kTileRows>());
constexpr int kBlocksAtATime = 16;  // row blocks that a panel meets while it is in a near cache

// Panels [first, last) of linear(rows [count][in]). done(row, panel, low, high) takes each row's
// kPanel outputs, as two vectors.
template <class Done>
void multiply(const float* rows, int count, const Linear& linear, int first, int last, Done done) {
  Sums sums[kTileRows];
  const int blocks = (count + kTileRows - 1) / kTileRows;
  for (int block0 = 0; block0 < blocks; block0 += kBlocksAtATime) {
    const int block1 = std::min(blocks, block0 + kBlocksAtATime);
    for (int p = first; p < last; ++p) {
      const Floats low = load(linear.bias.get() + p * kPanel);
      const Floats high = load(linear.bias.get() + p * kPanel + kLanes);
      for (int block = block0; block < block1; ++block) {
        // Blocks of nearly equal size: a last one of a single row would leave most registers idle.
        const int begin = static_cast<int>(static_cast<long>(count) * block / blocks);
        const int end = static_cast<int>(static_cast<long>(count) * (block + 1) / blocks);
        const float* from = rows + static_cast<std::size_t>(begin) * linear.in;
        kTiles[end - begin - 1](from, linear.in, linear.panel(p), sums);
        for (int row = begin; row < end; ++row)
          done(row, p, sums[row - begin][0] + low, sums[row - begin][1] + high);
      }
    }
  }
}

}  // namespace nuwa
