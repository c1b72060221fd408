// The C interface of the text and the visual encoder: what backends/native_encoders.py hands over.
// Kept in step with it by hand; kAbiVersion of decoder_abi.h changes with changes here.
//
// Legend: T rows, w width, H heads, f hidden size of the feed-forward, d width of the decoder, L
// its layers, n columns of neighbours. All arrays are dense and row-major.
#pragma once

#include <cstdint>

#include "decoder_abi.h"

extern "C" {

// gated: whether the feed-forward has gates (GEGLU) or not (GELU); ids, positions: rows of these
// tables, position_starts: where those of the three axes begin.
struct NuwaEncoderShape {
  std::int32_t width, blocks, heads, hidden, gated, out, layers, ids, positions, columns;
  std::int32_t position_starts[3];
};

// Biases of qkv and of attention may be null.
struct NuwaEncoderBlock {
  const float *norm_weight, *norm_bias;
  NuwaMatrix qkv;  // [3w][w]: query, key, value
  const float* qkv_bias;
  NuwaMatrix attended;  // [w][w]
  const float* attended_bias;
  const float *ff_norm_weight, *ff_norm_bias;
  NuwaMatrix ff_in;  // [2f][w]: hidden, gate; or [f][w]
  const float* ff_in_bias;
  NuwaMatrix ff_out;  // [w][f]
  const float* ff_out_bias;
  const float* bias;  // [H][n]
};

// ids: [ids][w]; positions: [positions][w]; memory: L matrices [2d][d], of keys and values.
struct NuwaEncoderWeights {
  const float *ids, *positions;
  const NuwaEncoderBlock* blocks;
  const float *norm_weight, *norm_bias;
  NuwaMatrix project;  // [d][w]
  const float* project_bias;
  const NuwaMatrix* memory;
};

// ids [T]; coordinates [T][3], or null where a row's position is its number; neighbours [T][n], -1
// masked, or null where each row attends to all; entries [T]: where in keys and values, L pointers
// each to f32 [entries][d], a row's are put.
struct NuwaEncoding {
  const std::int32_t *ids, *coordinates, *neighbours, *entries;
  std::int32_t rows, threads;
  float *const *keys, *const *values;
};

// An encoder on a team's threads (convnet_abi.h), or null without memory. Width and d are multiples
// of twice nuwa_lanes(), as is hidden without gates; with gates it is one of nuwa_lanes(), as a
// head's width is. Copies the weights; the team must outlive it.
NUWA_EXPORT void* nuwa_encoder_new(const NuwaEncoderShape* shape, const NuwaEncoderWeights* weights,
                                   void* team);

// One at a time on a team, in the process that made it. 0, or 1 without memory, with nothing
// written.
NUWA_EXPORT std::int32_t nuwa_encoder_run(void* encoder, const NuwaEncoding* encoding);

NUWA_EXPORT void nuwa_encoder_free(void* encoder);
}
