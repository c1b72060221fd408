// NearbyAttention and CachedNearbyAttention, operator domain nuwa, version 1, on a CUDA stream.
// spec/reference.py says what they compute. Knows nothing of TensorRT and of ONNX Runtime.
//
// Legend: T rows of a call, S cache slots, R entries a slot, n neighbours, H heads, d = H * head_dim.
#pragma once

#include <cuda_runtime_api.h>

#include "attention_call.h"

namespace nuwa {

// Puts a call onto the stream. Indices outside of their tensors are as negative ones: nothing is
// read or written there. cudaErrorInvalidValue for sizes that `unsupported` names; never
// waits, and allocates nothing, so that it can be captured in a graph.
cudaError_t attend(const AttentionCall& call, cudaStream_t stream);

// Whether this process' device, driver and what was compiled fit each other; cudaSuccess if so.
cudaError_t can_attend();

// How the call is put onto the stream; `attend` chooses by the number of rows.
enum class Launch {
  kFused,  // one kernel: what the call itself writes is read from where it comes from
  kSplit,  // a kernel that writes, then one that attends
};
cudaError_t attend(const AttentionCall& call, Launch launch, cudaStream_t stream);

}  // namespace nuwa
