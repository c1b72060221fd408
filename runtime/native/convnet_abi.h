// The C interface of a convolutional network over single pictures: what backends/native_frames.py
// hands over. Kept in step with it by hand; kAbiVersion of decoder_abi.h changes with changes here.
//
// Legend: S side of a feature map, C its channels, K outputs.
#pragma once

#include <cstdint>

#include "decoder_abi.h"

extern "C" {

// What an operation does. Feature maps are f32 [S][S][C] in numbered buffers; what convolutions
// read is in one place, which operations before them have written.
enum NuwaOpKind : std::int32_t {
  kTakeFeatures,  // the network's input, f32 [S][S][C], as it is
  kTakePixels,    // the input, u8 [S][S][C], in [-1, 1]
  kTakeClasses,   // the input, u8 [S][S], as one of C is 1; of larger classes all are 0
  kCopy,          // map `from`
  kDouble,        // map `from`, every cell four times
  kNormalize,     // map `from` with GroupNorm of 32 groups, and SiLU where `silu` is not 0
  kAttend,        // each cell of map `from` over all cells of `keys` and `values`; one head
  kConvolve,      // what is there to map `to`; or, where it adds, to what is in that
  kGivePixels,    // map `from`, [-1, 1] as u8: the result [S][S][C]
  kGiveNearest    // the rows of `weight` nearest to each cell of map `from`: the result i32 [S][S]
};

// side, in: S and C of what is read; out: K of what a convolution makes, or what is chosen from. A
// convolution has a kernel of 1 or 3 and, around its input, a border of zeros: all round at stride
// 1, on the right and below only at stride 2. weight: [K][C][kernel][kernel], or [C] of a norm, or
// [K][C] of what is chosen from; bias: [K] or [C], or null.
struct NuwaOp {
  std::int32_t kind, from, to, keys, values, side, in, out, kernel, stride, adds, silu;
  const float *weight, *bias;
};

// `threads` threads, the caller's among them, for what runs one after the other: convnets and
// encoders (encoder_abi.h). Null if there is no memory or there are no threads.
NUWA_EXPORT void* nuwa_team_new(std::int32_t threads);

NUWA_EXPORT void nuwa_team_free(void* team);

// A network of so many operations on a team's threads, or null without memory. Copies the weights;
// the team must outlive it. Channels of norms are multiples of 32, those that attend of
// nuwa_lanes(). narrow: convolutions round to bf16 what they read and their weights, where the
// processor has what multiplies that fast (nuwa_has_tiles).
NUWA_EXPORT void* nuwa_convnet_new(const NuwaOp* ops, std::int32_t count, void* team,
                                   std::int32_t narrow);

// given: what the first operation takes; made: what the last one gives. On so many of the threads,
// of which no bit depends; one at a time on a team, in the process that made it. 0, or 1 without
// memory, with nothing made.
NUWA_EXPORT std::int32_t nuwa_convnet_run(void* convnet, const void* given, std::int32_t threads,
                                          void* made);

NUWA_EXPORT void nuwa_convnet_free(void* convnet);
}
