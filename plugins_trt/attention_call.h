// One call of either operator: sizes and where its tensors are. Plain data, for GPUs and CPUs.
//
// Legend: T rows, S cache slots, R entries a slot, n neighbours, H heads, d = H * head_dim.
#pragma once

#include <cstdint>

#include "storage.h"

namespace nuwa {

// Tensors are dense and start at a multiple of 16 bytes. query, out [T, d]; key, value [S, R, d];
// slot i32 [T] in [0, S); neighbours i32 [T, n] below R, negative ones masked; bias [H, n] of finite
// numbers, or null. Indices outside are as negative ones.
// key_new, value_new [T, d] are written to (slot, write_index i32 [T]) of key and value before any row
// attends, except where write_index is negative; no two rows may write the same entry. Null, all
// three, for NearbyAttention, which does not write to key and value.
struct AttentionCall {
  Storage storage;
  std::int32_t rows, slots, entries, neighbours, heads, head_dim;
  const void* query;
  void *key, *value;
  const std::int32_t *slot, *neighbour;
  const void* bias;
  const void *key_new, *value_new;
  const std::int32_t* write_index;
  void* out;

  bool writes() const { return write_index != nullptr; }
};

// Why a call of such sizes cannot be done, or null.
inline const char* unsupported(const AttentionCall& call) {
  if (call.head_dim != 32 && call.head_dim != 64 && call.head_dim != 128)
    return "head_dim is not 32, 64 or 128";
  if (call.heads < 1) return "there are no heads";
  if (call.rows < 0 || call.slots < 1 || call.entries < 1 || call.neighbours < 1)
    return "a size is not positive";
  if (call.neighbours > 8192) return "there are more than 8192 neighbours";
  return nullptr;
}

}  // namespace nuwa
