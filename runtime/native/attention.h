// One row of nearby attention (spec/reference.py), over entries of one slot.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "memory.h"
#include "vector.h"

namespace nuwa {

// Which entries a row looks at, and which column of the bias each has. Scratch of a thread.
class Window {
 public:
  void reserve(int most) {
    entry_.reserve(most);
    column_.reserve(most);
    score_.reserve(most + kLanes);
  }
  void clear() { count_ = 0; }
  void add(std::int32_t entry, std::int32_t column) {
    entry_[count_] = entry;
    column_[count_++] = column;
  }
  // Those that are not masked (-1); their columns are `from`, `from` + 1 and so on.
  void add_all(const std::int32_t* entries, int count, std::int32_t from) {
    for (int j = 0; j < count; ++j)
      if (entries[j] >= 0) add(entries[j], from + j);
  }

  // query, out: [heads * head_dim]; keys, values: [entries][heads * head_dim]; bias:
  // [heads][bias_stride] or null. head_dim is a multiple of kLanes. Without an entry, zeros.
  void attend(const float* query, const float* keys, const float* values, const float* bias,
              int bias_stride, int heads, int head_dim, float* out) {
    const int width = heads * head_dim;
    if (!count_) {
      for (int i = 0; i < width; i += kLanes) store(out + i, Floats{});
      return;
    }
    float* score = score_.get();
    const float scale = 1.f / std::sqrt(static_cast<float>(head_dim));
    const auto score_block = score_block_for(head_dim / kLanes);
    for (int head = 0; head < heads; ++head, query += head_dim, out += head_dim) {
      const float* head_keys = keys + head * head_dim;
      Floats highest_score = all(-INFINITY);
      for (int j = 0; j < count_; j += kLanes) {
        const int here = std::min(count_ - j, kLanes);
        const std::int32_t* entry = entry_.get() + j;
        store(score + j, score_block(query, head_keys, entry, here, head_dim, width) * scale);
        if (bias)
          for (int lane = 0; lane < here; ++lane)
            score[j + lane] += bias[head * bias_stride + column_[j + lane]];
        for (int lane = here; lane < kLanes; ++lane) score[j + lane] = -INFINITY;
        highest_score = max(load(score + j), highest_score);
      }
      const float top = highest(highest_score);
      Floats total{};
      for (int j = 0; j < count_; j += kLanes) {
        const Floats weight = exp(load(score + j) - top);
        store(score + j, weight);
        total += weight;
      }
      const float share = 1.f / sum(total);
      const float* head_values = values + head * head_dim;
      int i = 0;
      for (; i + 4 * kLanes <= head_dim; i += 4 * kLanes)
        mix<4>(head_values + i, width, share, out + i);
      for (; i < head_dim; i += kLanes) mix<1>(head_values + i, width, share, out + i);
    }
  }

 private:
  // The query's products with the keys of `here` entries, at most kLanes, one a lane.
  typedef Floats (*ScoreBlock)(const float* query, const float* keys, const std::int32_t* entry,
                               int here, int head_dim, int width);

  // Vectors: head_dim / kLanes, known when this is compiled, or 0 for any.
  template <int Vectors>
  static Floats score_block(const float* query, const float* keys, const std::int32_t* entry,
                            int here, int head_dim, int width) {
    Floats product[kLanes] = {};
    const int vectors = Vectors ? Vectors : head_dim / kLanes;
    for (int lane = 0; lane < here; ++lane) {
      const float* key = keys + static_cast<std::size_t>(entry[lane]) * width;
      Floats total{};
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) total += load(query + v * kLanes) * load(key + v * kLanes);
      product[lane] = total;
    }
    return sums(product);
  }

  static ScoreBlock score_block_for(int vectors) {
    switch (vectors) {
      case 1: return score_block<1>;
      case 2: return score_block<2>;
      case 4: return score_block<4>;
      case 8: return score_block<8>;
      default: return score_block<0>;
    }
  }

  // The weighted sum of Vectors vectors of all entries' values.
  template <int Vectors>
  void mix(const float* values, int width, float share, float* out) const {
    const float* score = score_.get();
    Floats mixed[Vectors] = {};
    for (int j = 0; j < count_; ++j) {
      const float* value = values + static_cast<std::size_t>(entry_[j]) * width;
      for (int v = 0; v < Vectors; ++v) mixed[v] += score[j] * load(value + v * kLanes);
    }
    for (int v = 0; v < Vectors; ++v) store(out + v * kLanes, mixed[v] * share);
  }

  Array<std::int32_t> entry_, column_;
  Array<float> score_;
  int count_ = 0;
};

}  // namespace nuwa
