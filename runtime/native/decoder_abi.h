// The library's C interface: what backends/native_cpu.py hands over. Kept in step with it by hand;
// kAbiVersion changes with every change here.
//
// Legend: T rows of a call, d width, L layers, H heads, K codebook size, f hidden size of the
// feed-forward, R entries of a cache slot, E entries of a condition slot. All arrays are dense and
// row-major.
#pragma once

#include <cstdint>

#define NUWA_EXPORT __attribute__((visibility("default")))

extern "C" {

constexpr std::int32_t kAbiVersion = 5;

// Sizes of a model. column_bounds: [L][2], the half-open range of `neighbours` that a layer reads;
// positions: rows of the table of positions, position_starts: [3], where those of the three axes
// begin; bos: the token that has no position; cross_table: columns of a layer's cross bias, those
// of the visual window and, last, text's, or 0; rows: of usual calls, for which room is made at
// once (more makes room when it comes).
struct NuwaShape {
  std::int32_t width, layers, heads, codebook, hidden, bos, cross_table, positions, rows;
  std::int32_t position_starts[3];
  const std::int32_t* column_bounds;
};

enum NuwaType : std::int32_t { kFloat32, kFloat16, kBFloat16, kInt8 };

// A matrix: [out][in], but of int8 [in][out] in units of scale [out], else null. The rows that it
// meets are f32, but bf16 or int8 if it is, and are rounded to that.
struct NuwaMatrix {
  const void* weight;
  const float* scale;
  std::int32_t type;
};

// Weights of a layer. bias [H][columns of the layer] and cross_bias [H][cross_table] may be null.
struct NuwaLayer {
  const float *self_norm_weight, *self_norm_bias;
  NuwaMatrix self_qkv;  // [3d][d]: query, key, value
  NuwaMatrix self_out;  // [d][d]
  const float* self_out_bias;
  const float *cross_norm_weight, *cross_norm_bias;
  NuwaMatrix cross_q;    // [d][d]
  NuwaMatrix cross_out;  // [d][d]
  const float* cross_out_bias;
  const float *ff_norm_weight, *ff_norm_bias;
  NuwaMatrix ff_in;  // [2f][d]: hidden, gate
  const float* ff_in_bias;
  NuwaMatrix ff_out;  // [d][f]
  const float* ff_out_bias;
  const float *bias, *cross_bias;
};

// tokens: [K + 1][d], projected codes and <bos>; positions: [P][d]; head: [K][d].
struct NuwaWeights {
  const float *tokens, *positions;
  const float *head_norm_weight, *head_norm_bias;
  NuwaMatrix head;
  const float* head_bias;
  const NuwaLayer* layers;
};

// Lane of backends/base.py.
struct NuwaLane {
  std::int32_t cache_slot, condition_slot, text_length, text_first;
};

// A stream and its staged rows, of backends/base.py. tokens: i32 [held], read and written; visual
// is null where the stream sees text alone. guidance: how far logits are moved, with two lanes.
struct NuwaStream {
  const std::int32_t *coordinates, *fed, *place, *given, *write_index, *neighbours, *visual;
  const float* uniform;
  std::int32_t* tokens;
  NuwaLane lanes[2];
  std::int32_t lane_count, top_k;
  float temperature, top_p, guidance;
};

// `count` staged rows of a stream from `first` on; finite is set to whether their logits were.
struct NuwaPart {
  const NuwaStream* stream;
  std::int32_t first, count, finite;
};

// One or more calls, one after the other: parts [call_count][part_count]; and the memory of the
// caches: L pointers each, to f32 [slots][R][d] and [slots][E][d]. What follows the first call may
// be left out: each begins only if *stop is 0 and all before it have taken less than most_seconds.
// done is set to the number that were run, seconds [call_count] to how long each of them took.
// threads: how many of the decoder's threads work on a call; what they compute does not depend on
// it. It and stop may change at any time, and stop may be null. logits: f32 [T][K] to fill, T
// counting each part's rows once a lane, its first lane's before its second's, or null; those of
// the last call stay. Rows whose token is given are left out of the logits: theirs are not touched.
struct NuwaStep {
  NuwaPart* parts;
  double* seconds;
  const std::int32_t *threads, *stop;
  std::int32_t call_count, part_count, done;
  std::int32_t neighbour_columns, visual_columns, cache_entries, condition_entries;
  float *const *key_caches, *const *value_caches;
  const float *const *cross_keys, *const *cross_values;
  float* logits;
  double most_seconds;
};

NUWA_EXPORT std::int32_t nuwa_abi_version();

// Floats of a vector. Width must be a multiple of twice as many, hidden and head_dim of as many.
NUWA_EXPORT std::int32_t nuwa_lanes();

// Whether this processor has what the library's int8 products need.
NUWA_EXPORT std::int32_t nuwa_has_int8();

// Whether this processor and system have what multiplies bf16 fast (AMX). No bit of a product
// depends on it; whether convolutions are in bf16 does (convnet_abi.h).
NUWA_EXPORT std::int32_t nuwa_has_tiles();

// The x86-64 level that this machine's processor and system can run: 4 (AVX-512), 3 (AVX2 and FMA)
// or 0 (anything else). The library of that level is the one to load.
NUWA_EXPORT std::int32_t nuwa_best_level();

// A decoder with `threads` threads, the caller's among them, or null if there is no memory or there
// are no threads for it. Copies what it needs of the weights.
NUWA_EXPORT void* nuwa_decoder_new(const NuwaShape* shape, const NuwaWeights* weights,
                                   std::int32_t threads);

// Runs calls; one step at a time for a decoder, in the process that made it. 0, or 1 without enough
// memory, with nothing written.
NUWA_EXPORT std::int32_t nuwa_decoder_step(void* decoder, NuwaStep* step);

NUWA_EXPORT void nuwa_decoder_free(void* decoder);

// The product that linear layers are made of, by itself: to [rows][out] = from [rows][in] times the
// matrix. in must be a multiple of nuwa_lanes(). 0, or 1 without enough memory.
NUWA_EXPORT std::int32_t nuwa_multiply(const float* from, std::int32_t rows, std::int32_t in,
                                       std::int32_t out, const NuwaMatrix* matrix, float* to);
}
