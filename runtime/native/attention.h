// One row of nearby attention (spec/reference.py), over entries of one slot.
#pragma once

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
    for (int head = 0; head < heads; ++head, query += head_dim, out += head_dim) {
      const float* head_bias = bias ? bias + head * bias_stride : nullptr;
      const float* head_keys = keys + head * head_dim;
      const float* head_values = values + head * head_dim;
      float highest_score = -INFINITY;
      for (int j = 0; j < count_; ++j) {
        const float* key = head_keys + static_cast<std::size_t>(entry_[j]) * width;
        Floats product{};
        for (int i = 0; i < head_dim; i += kLanes) product += load(query + i) * load(key + i);
        score[j] = sum(product) * scale + (head_bias ? head_bias[column_[j]] : 0.f);
        highest_score = score[j] > highest_score ? score[j] : highest_score;
      }
      for (int j = count_; j % kLanes; ++j) score[j] = -INFINITY;
      Floats total{};
      for (int j = 0; j < count_; j += kLanes) {
        const Floats weight = exp(load(score + j) - highest_score);
        store(score + j, weight);
        total += weight;
      }
      const float share = 1.f / sum(total);
      for (int i = 0; i < head_dim; i += kLanes) {
        Floats mixed{};
        for (int j = 0; j < count_; ++j)
          mixed += score[j] * load(head_values + static_cast<std::size_t>(entry_[j]) * width + i);
        store(out + i, mixed * share);
      }
    }
  }

 private:
  Array<std::int32_t> entry_, column_;
  Array<float> score_;
  int count_ = 0;
};

}  // namespace nuwa
