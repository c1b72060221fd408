// Layers that transformers are made of, on the threads of a team.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "linear.h"
#include "memory.h"
#include "vector.h"

namespace nuwa {

struct Norm {
  Array<float> weight, bias;
};

inline Array<float> copied(const float* from, std::size_t size) {
  Array<float> made(size);
  std::memcpy(made.get(), from, size * sizeof(float));
  return made;
}

inline Array<float> copied_if_any(const float* from, std::size_t size) {
  return from ? copied(from, size) : Array<float>();
}

inline Norm copied_norm(const float* weight, const float* bias, std::size_t width) {
  return {copied(weight, width), copied(bias, width)};
}

// Rows of a gated feed-forward's first matrix so that a panel holds kLanes hidden values and their
// kLanes gates.
inline std::vector<int> gated_order(int hidden) {
  std::vector<int> order;
  for (int first = 0; first < hidden; first += kLanes)
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < kLanes; ++i) order.push_back(half * hidden + first + i);
  return order;
}

inline void layer_norm(const float* x, const Norm& norm, int width, float* out) {
  constexpr float kEpsilon = 1e-5f;  // NORM_EPS of training/visual.py
  Floats total{};
  for (int i = 0; i < width; i += kLanes) total += load(x + i);
  const float mean = sum(total) / width;
  Floats squares{};
  for (int i = 0; i < width; i += kLanes) {
    const Floats centred = load(x + i) - mean;
    squares += centred * centred;
  }
  const float scale = 1.f / std::sqrt(sum(squares) / width + kEpsilon);
  for (int i = 0; i < width; i += kLanes) {
    const Floats normed = (load(x + i) - mean) * scale;
    store(out + i, normed * load(norm.weight.get() + i) + load(norm.bias.get() + i));
  }
}

// One thread's part of a task: which of `working` threads it is, and what it needs to itself.
struct Portion {
  int index = 0, working = 1;
  Array<float> unpacked;  // a panel of f16 weights as floats

  // Where its share of `count` begins; the next one's begins where it ends.
  int first(int count) const { return at(count, index); }
  int last(int count) const { return at(count, index + 1); }

 private:
  int at(int count, int index) const {
    return static_cast<int>(static_cast<long>(count) * index / working);
  }
};

// multiply() of this thread's panels.
template <class Done>
void product(const Rows& rows, int count, const Linear& linear, Portion& portion, Done done) {
  multiply(rows, count, linear, portion.first(linear.panels), portion.last(linear.panels),
           portion.unpacked.get(), done);
}

// x [count][width] += linear(rows), of this thread's panels.
inline void add_product(const Rows& rows, int count, const Linear& linear, Portion& portion,
                        float* x, int width) {
  product(rows, count, linear, portion, [&](int row, int p, Floats low, Floats high) {
    float* to = x + static_cast<std::size_t>(row) * width + p * kPanel;
    store(to, load(to) + low);
    store(to + kLanes, load(to + kLanes) + high);
  });
}

}  // namespace nuwa
