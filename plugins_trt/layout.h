// Where the tensors of the two operators are among a plugin's inputs and outputs, and what their
// sizes must be. Knows no TensorRT type, so that its messages can be tested anywhere.
#pragma once

#include <cstdint>

namespace nuwa {

struct Layout {
  const char* name;
  int query, key, value, slot, neighbours;
  int key_new, value_new, write_index;  // -1 for NearbyAttention
  int required;                         // inputs without bias, which comes last
  int outputs;                          // out; then, in place of the inputs, key and value

  bool writes() const { return write_index >= 0; }
  bool is_index(int input) const {
    return input == slot || input == neighbours || (writes() && input == write_index);
  }
  // The input that an output is the same memory as, or -1.
  int aliased(int output) const {
    return !writes() ? -1 : output == 1 ? key : output == 2 ? value : -1;
  }
};

constexpr Layout kNearby{"NearbyAttention", 0, 1, 2, 3, 4, -1, -1, -1, 5, 1};
constexpr Layout kCached{"CachedNearbyAttention", 0, 3, 4, 5, 7, 1, 2, 6, 8, 3};

}  // namespace nuwa
