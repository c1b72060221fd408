// The library's C interface: what backends/native_cpu.py hands over. Kept in step with it by hand;
// kAbiVersion changes with every change here.
//
// Legend: T positions of a call, d width, L layers, H heads, K codebook size, f hidden size of the
// feed-forward, n neighbour columns, m columns of cross attention, R entries of a cache slot, E
// entries of a condition slot. All arrays are dense and row-major.
#pragma once

#include <cstdint>

#define NUWA_EXPORT __attribute__((visibility("default")))

extern "C" {

constexpr std::int32_t kAbiVersion = 1;

// Sizes of a model. column_bounds: [L][2], the half-open range of `neighbours` that a layer reads;
// positions: rows of the table of positions, position_starts: [3], where those of the three axes
// begin; bos: the token that has no position; cross_table: columns of a layer's cross bias, or 0.
struct NuwaShape {
  std::int32_t width, layers, heads, codebook, hidden, bos, cross_table, positions;
  std::int32_t position_starts[3];
  const std::int32_t* column_bounds;
};

// Weights of a layer, f32; matrices are [out][in]. bias [H][columns of the layer] and cross_bias
// [H][cross_table] may be null.
struct NuwaLayer {
  const float *self_norm_weight, *self_norm_bias, *self_qkv;     // [3d][d]: query, key, value
  const float *self_out_weight, *self_out_bias;                  // [d][d]
  const float *cross_norm_weight, *cross_norm_bias, *cross_q;    // [d][d]
  const float *cross_out_weight, *cross_out_bias;                // [d][d]
  const float *ff_norm_weight, *ff_norm_bias;                    //
  const float *ff_in_weight, *ff_in_bias;                        // [2f][d]: hidden, gate
  const float *ff_out_weight, *ff_out_bias;                      // [d][f]
  const float *bias, *cross_bias;
};

// tokens: [K + 1][d], projected codes and <bos>; positions: [P][d]; head_weight: [K][d].
struct NuwaWeights {
  const float *tokens, *positions;
  const float *head_norm_weight, *head_norm_bias, *head_weight, *head_bias;
  const NuwaLayer* layers;
};

// One call of decoder_step: StepBatch of backends/base.py, and the memory of the caches. The caches
// are L pointers each, to f32 [slots][R][d] and [slots][E][d]. cross_columns is read only by a
// model with cross biases. logits: f32 [T][K] to fill, or null. next_tokens: i32 [T] to fill.
struct NuwaStep {
  std::int32_t rows, neighbour_columns, cross_neighbour_columns, cache_entries, condition_entries;
  const std::int32_t *tokens, *coordinates, *slot, *write_index, *neighbours;
  const std::int32_t *condition_slot, *cross_neighbours, *cross_columns;
  const float* temperature;
  const std::int32_t* top_k;
  const float *top_p, *uniform, *guidance;
  const std::int32_t* unconditional_row;
  float *const *key_caches, *const *value_caches;
  const float *const *cross_keys, *const *cross_values;
  std::int32_t* next_tokens;
  float* logits;
};

NUWA_EXPORT std::int32_t nuwa_abi_version();

// Floats of a vector. Width must be a multiple of twice as many, hidden and head_dim of as many.
NUWA_EXPORT std::int32_t nuwa_lanes();

// The x86-64 level that this machine's processor and system can run: 4 (AVX-512), 3 (AVX2 and FMA)
// or 0 (anything else). The library of that level is the one to load.
NUWA_EXPORT std::int32_t nuwa_best_level();

// A decoder with `threads` threads, the caller's among them, or null if there is no memory or there
// are no threads for it. Copies what it needs of the weights.
NUWA_EXPORT void* nuwa_decoder_new(const NuwaShape* shape, const NuwaWeights* weights, std::int32_t threads);

// Runs a call; one at a time for a decoder, in the process that made it. 0, or 1 without enough
// memory, with nothing written.
NUWA_EXPORT std::int32_t nuwa_decoder_step(void* decoder, const NuwaStep* step);

NUWA_EXPORT void nuwa_decoder_free(void* decoder);
}
