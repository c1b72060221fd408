// Draws a token from logits as training/sampling.py does: weights are whole numbers, so that their
// sums are the same in any order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "memory.h"
#include "vector.h"

namespace nuwa {

constexpr std::int64_t kOne = 1 << 24;  // the likeliest token's weight

struct SamplingScratch {
  Array<float> guided, scaled, sorted;
  Array<std::int32_t> weight;
  Array<std::int64_t> running;

  // codebook: K; row: K rounded up to whole panels.
  void reserve(int codebook, int row) {
    guided.reserve(row);
    scaled.reserve(row);
    sorted.reserve(codebook);
    weight.reserve(row);
    running.reserve(codebook);
  }
};

struct Drawing {
  float temperature;
  std::int32_t top_k;
  float top_p, uniform;
};

inline Ints whole(Floats fraction) {
  return __builtin_convertvector(fraction * static_cast<float>(kOne), Ints);
}

inline std::int64_t whole(float fraction) {
  return static_cast<std::int64_t>(fraction * static_cast<float>(kOne));
}

// size: a multiple of kLanes.
inline bool all_finite(const float* logits, int size) {
  Floats odd{};
  for (int i = 0; i < size; i += kLanes) odd += load(logits + i) * 0.f;
  return sum(odd) == 0.f;
}

// Only scaled logits of at least this much are drawn from; -infinity without top_k and top_p.
inline float cut_off(int codebook, float highest_logit, const Drawing& drawing,
                     SamplingScratch& scratch) {
  if (drawing.top_k <= 0 && !(drawing.top_p < 1.f)) return -INFINITY;
  float* sorted = scratch.sorted.get();
  std::int64_t* running = scratch.running.get();
  const int width = drawing.top_k > 0 ? std::min<int>(drawing.top_k, codebook) : codebook;
  std::copy(scratch.scaled.get(), scratch.scaled.get() + codebook, sorted);
  std::partial_sort(sorted, sorted + width, sorted + codebook, std::greater<float>());
  std::int64_t total = 0;
  for (int i = 0; i < width; ++i) {
    running[i] = total;  // of the likelier ones
    total += whole(exp(all(sorted[i] - highest_logit)))[0];
  }
  int kept = 0;
  while (kept < width && running[kept] * kOne < whole(drawing.top_p) * total) ++kept;
  return sorted[std::max(kept - 1, 0)];
}

// logits: [codebook]; the token drawn, or the likeliest at temperature 0. The last one where
// logits are not finite numbers, which must not lead outside.
inline std::int32_t draw(const float* logits, int codebook, const Drawing& drawing,
                         SamplingScratch& scratch) {
  if (!(drawing.temperature > 0.f)) {
    int best = 0;
    for (int i = 1; i < codebook; ++i) best = logits[i] > logits[best] ? i : best;
    return best;
  }
  float* scaled = scratch.scaled.get();
  std::int32_t* weight = scratch.weight.get();
  const int padded = (codebook + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; i < codebook; ++i) scaled[i] = logits[i] / drawing.temperature;
  for (int i = codebook; i < padded; ++i) scaled[i] = -INFINITY;
  Floats top = load(scaled);
  for (int i = kLanes; i < padded; i += kLanes) top = max(top, load(scaled + i));
  const float highest_logit = highest(top);
  Ints odd = Ints{};
  for (int i = 0; i < padded; i += kLanes) odd |= ~(load(scaled + i) <= highest_logit);
  for (int i = 0; i < kLanes; ++i)
    if (odd[i]) return codebook - 1;
  if (highest_logit == INFINITY) return codebook - 1;
  for (int i = 0; i < padded; i += kLanes)
    store(weight + i, whole(exp(load(scaled + i) - highest_logit)));

  const float cut = cut_off(codebook, highest_logit, drawing, scratch);
  std::int64_t total = 0;
  for (int i = 0; i < codebook; ++i) total += scaled[i] >= cut ? weight[i] : 0;
  const std::int64_t wanted = whole(drawing.uniform) * total;
  std::int64_t running = 0;
  for (int i = 0; i < codebook; ++i) {
    running += scaled[i] >= cut ? weight[i] : 0;
    if (running * kOne > wanted) return i;
  }
  return codebook - 1;
}

}  // namespace nuwa
