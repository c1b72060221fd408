// The rows of a decoder step, put together where their tokens are: on the device.
//
// Before a stream decodes, what is known of its positions is staged as records; a step then names
// which records of which streams are next, some hundred bytes a stream, and a kernel spreads them
// over the inputs of decoder_step. Another puts what was drawn into the streams' tokens. Plain
// data, for GPUs and CPUs; runtime/backends/device_rows.py has the same structs.
//
// Legend: T rows of a call, n neighbour columns, v columns of the visual window, m columns of cross
// attention, K records of a stream.
#pragma once

#include <cstdint>

#include "storage.h"

namespace nuwa {

constexpr std::int32_t kRowsAbi = 1;  // raise it when anything below changes

// Columns of a record, all int32; n neighbours follow from kNeighbours on, and v of the visual window
// where the stream sees one.
enum Column : std::int32_t {
  kCoordinates,  // three
  kFed = 3,      // place of the token that the position is fed, or -1 - t for the token t
  kPlace,        // where its own token goes
  kGiven,        // its token if that is not drawn, else -1
  kWriteIndex,
  kUniform,      // the bits of a float
  kNeighbours
};

// Rows [row, row + count) of a call: one lane of a stream's next records.
struct RowLane {
  const std::int32_t* records;  // of the stream, the first of this call; [count, record]
  std::int32_t* tokens;         // of the stream
  std::int32_t row, count, record;
  std::int32_t part;            // whose tokens it draws; -1 for the second lane of a guided stream
  std::int32_t cache_slot, condition_slot, text_length, text_first;
  std::int32_t sees_visual;     // records have v visual columns
  std::int32_t to_unconditional;  // from a row to the one whose logits it is moved away from, or 0
  std::int32_t top_k;
  float temperature, top_p, guidance;
};

// One call. lanes in order of their rows, the first from row 0 on, those that are of no use past all
// rows. Rows from the last lane's end up to `rows` are padding, which reads no cache, writes none and
// draws for nobody. Kernels are launched by `rows` alone, so a call can be recorded and launched again
// for other lanes.
struct RowCall {
  const RowLane* lanes;
  std::int32_t lane_count, part_count, rows;
  std::int32_t neighbours, visual, columns;  // n, v, m
  std::int32_t first_visual;                 // column of cross attention
  std::int32_t bos;                          // the token that padding is fed
  const std::int32_t* text_place;            // [m], in the text; what is no text column has a place past all
  // Inputs of decoder_step by their names there.
  std::int32_t *tokens, *coordinates, *slot, *write_index, *neighbour, *condition_slot;
  std::int32_t *cross_neighbour, *top_k, *unconditional_row;
  float *temperature, *top_p, *uniform, *guidance;
  const std::int32_t* drawn;                 // [T], output of decoder_step
  std::int32_t* finite;                      // [parts], 1: logits of all drawn tokens were numbers
};

// The lane of a row, or null for padding.
NUWA_BOTH const RowLane* lane_of(const RowCall& call, std::int32_t row) {
  std::int32_t low = 0, high = call.lane_count;  // the lane is in [low, high)
  while (high - low > 1) {
    const std::int32_t middle = (low + high) / 2;
    if (call.lanes[middle].row <= row) low = middle;
    else high = middle;
  }
  if (low == high) return nullptr;
  const RowLane* lane = call.lanes + low;
  return row >= lane->row && row < lane->row + lane->count ? lane : nullptr;
}

NUWA_BOTH const std::int32_t* record_of(const RowLane& lane, std::int32_t row) {
  return lane.records + static_cast<std::int64_t>(row - lane.row) * lane.record;
}

// What one of `threads` threads does for a row.
NUWA_BOTH void gather_row(const RowCall& call, std::int32_t row, std::int32_t thread,
                          std::int32_t threads) {
  const RowLane* lane = lane_of(call, row);
  const std::int32_t* record = lane ? record_of(*lane, row) : nullptr;
  std::int32_t* neighbour = call.neighbour + static_cast<std::int64_t>(row) * call.neighbours;
  for (std::int32_t j = thread; j < call.neighbours; j += threads)
    neighbour[j] = record ? record[kNeighbours + j] : -1;
  std::int32_t* cross = call.cross_neighbour + static_cast<std::int64_t>(row) * call.columns;
  for (std::int32_t j = thread; j < call.columns; j += threads) {
    const std::int32_t window = j - call.first_visual, place = call.text_place[j];
    std::int32_t seen = -1;
    if (lane && lane->sees_visual && window >= 0 && window < call.visual)
      seen = record[kNeighbours + call.neighbours + window];
    else if (lane && place < lane->text_length)
      seen = place + lane->text_first;
    cross[j] = seen;
  }
  if (thread) return;
  for (std::int32_t axis = 0; axis < 3; ++axis)
    call.coordinates[3 * row + axis] = record ? record[kCoordinates + axis] : 0;
  const std::int32_t fed = record ? record[kFed] : -1 - call.bos;
  call.tokens[row] = fed < 0 ? -1 - fed : lane->tokens[fed];
  call.slot[row] = lane ? lane->cache_slot : 0;
  call.write_index[row] = record ? record[kWriteIndex] : -1;
  call.condition_slot[row] = lane ? lane->condition_slot : 0;
  call.temperature[row] = lane ? lane->temperature : 1.f;
  call.top_k[row] = lane ? lane->top_k : 0;
  call.top_p[row] = lane ? lane->top_p : 1.f;
  call.uniform[row] = record ? as_float(static_cast<std::uint32_t>(record[kUniform])) : 0.f;
  call.guidance[row] = lane ? lane->guidance : 1.f;
  call.unconditional_row[row] = row + (lane ? lane->to_unconditional : 0);
}

// Puts a row's token into its place; false if it was to be drawn from what is no number.
NUWA_BOTH bool commit_row(const RowCall& call, const RowLane& lane, std::int32_t row) {
  const std::int32_t* record = record_of(lane, row);
  const std::int32_t given = record[kGiven], drawn = call.drawn[row];
  lane.tokens[record[kPlace]] = given < 0 ? drawn : given;
  return given >= 0 || drawn >= 0;
}

}  // namespace nuwa
