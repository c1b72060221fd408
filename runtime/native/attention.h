// One row of nearby attention (spec/reference.py), over entries of one slot.
#pragma once

#include <cmath>
#include <cstdint>

#include "memory.h"
#include "vector.h"

namespace nuwa {

// What a row looks at. neighbours: [columns] entries, -1 masked; bias: [heads][bias_stride] or
// null; bias_columns: which column of the bias each column has, its own if null.
struct Window {
  const std::int32_t* neighbours;
  int columns;
  const float* bias;
  int bias_stride;
  const std::int32_t* bias_columns;
};

// Scratch of a thread, for windows of at most `columns`.
struct AttentionScratch {
  Array<std::int32_t> entry, column;
  Array<float> score;

  void reserve(int columns) {
    entry.reserve(columns);
    column.reserve(columns);
    score.reserve(columns + kLanes);
  }
};

// query, out: [heads * head_dim]; keys, values: [entries][heads * head_dim]. head_dim is a multiple
// of kLanes. A row without a valid neighbour gives zeros.
inline void attend(const float* query, const float* keys, const float* values, const Window& window,
                   int heads, int head_dim, AttentionScratch& scratch, float* out) {
  const int width = heads * head_dim;
  std::int32_t *entry = scratch.entry.get(), *column = scratch.column.get();
  float* score = scratch.score.get();
  int used = 0;
  for (int j = 0; j < window.columns; ++j) {
    if (window.neighbours[j] < 0) continue;
    entry[used] = window.neighbours[j];
    column[used++] = window.bias_columns ? window.bias_columns[j] : j;
  }
  if (!used) {
    for (int i = 0; i < width; i += kLanes) store(out + i, Floats{});
    return;
  }
  const float scale = 1.f / std::sqrt(static_cast<float>(head_dim));
  for (int head = 0; head < heads; ++head, query += head_dim, out += head_dim) {
    const float* bias = window.bias ? window.bias + head * window.bias_stride : nullptr;
    const float* head_keys = keys + head * head_dim;
    const float* head_values = values + head * head_dim;
    float highest_score = -INFINITY;
    for (int j = 0; j < used; ++j) {
      const float* key = head_keys + static_cast<std::size_t>(entry[j]) * width;
      Floats product{};
      for (int i = 0; i < head_dim; i += kLanes) product += load(query + i) * load(key + i);
      score[j] = sum(product) * scale + (bias ? bias[column[j]] : 0.f);
      highest_score = score[j] > highest_score ? score[j] : highest_score;
    }
    for (int j = used; j % kLanes; ++j) score[j] = -INFINITY;
    Floats total{};
    for (int j = 0; j < used; j += kLanes) {
      const Floats weight = exp(load(score + j) - highest_score);
      store(score + j, weight);
      total += weight;
    }
    const float share = 1.f / sum(total);
    for (int i = 0; i < head_dim; i += kLanes) {
      Floats mixed{};
      for (int j = 0; j < used; ++j)
        mixed += score[j] * load(head_values + static_cast<std::size_t>(entry[j]) * width + i);
      store(out + i, mixed * share);
    }
  }
}

}  // namespace nuwa
