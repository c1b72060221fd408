// The arithmetic of nearby attention: what one lane does, and in which order lanes are added up.
//
// A head's channels lie on kLanes lanes of a warp, sixteen bytes each, so a warp reads kGroups
// neighbours at a time. A group of lanes goes over every kGroups-th neighbour, and in the end groups
// are merged. Nothing depends on the other rows of a call. Softmax and sums are in fp32.
#pragma once

#include <cmath>

#include "storage.h"

namespace nuwa {

constexpr int kWarp = 32;
constexpr float kLog2E = 1.44269504088896340736f;

template <class T, int kHeadDim>
struct Split {
  static constexpr int kChannels = Chunk<T>::kSize;  // of a lane
  static constexpr int kLanes = kHeadDim / kChannels;
  static constexpr int kGroups = kWarp / kLanes;
  static_assert(kLanes >= 1 && kLanes <= kWarp && kWarp % kLanes == 0, "no split of such heads");
};

// A softmax under way, over some neighbours and a lane's channels of their values. Scores are in
// units of the binary logarithm.
template <int kChannels>
struct Partial {
  float most = -INFINITY;  // of the scores
  float weight = 0.f;
  float sum[kChannels] = {};

  NUWA_BOTH void add(float score, const float (&value)[kChannels]) {
    const float top = fmaxf(most, score);
    const float keep = exp2f(most - top), take = exp2f(score - top);
    weight = weight * keep + take;
    for (int i = 0; i < kChannels; ++i) sum[i] = sum[i] * keep + take * value[i];
    most = top;
  }

  NUWA_BOTH void merge(const Partial& other) {
    if (other.weight == 0.f) return;  // it has none; one that has some weighs at least 1, or is NaN
    const float top = fmaxf(most, other.most);
    const float keep = exp2f(most - top), take = exp2f(other.most - top);
    weight = weight * keep + other.weight * take;
    for (int i = 0; i < kChannels; ++i) sum[i] = sum[i] * keep + other.sum[i] * take;
    most = top;
  }

  NUWA_BOTH float mean(int channel) const { return weight == 0.f ? 0.f : sum[channel] / weight; }
};

template <class T>
NUWA_BOTH void unpack(const Chunk<T>& from, float (&to)[Chunk<T>::kSize]) {
  for (int i = 0; i < Chunk<T>::kSize; ++i) to[i] = to_float(from.at[i]);
}

template <int kChannels>
NUWA_BOTH float dot(const float (&a)[kChannels], const float (&b)[kChannels]) {
  float sum = a[0] * b[0];
  for (int i = 1; i < kChannels; ++i) sum += a[i] * b[i];
  return sum;
}

// What the neighbours of a row are read from: an entry of the cache slot if >= 0, nothing if kMasked,
// else row from_call(source) of what the call itself writes.
constexpr std::int32_t kMasked = -1;
NUWA_BOTH std::int32_t of_call(std::int32_t row) { return -2 - row; }
NUWA_BOTH std::int32_t from_call(std::int32_t source) { return -2 - source; }

}  // namespace nuwa
