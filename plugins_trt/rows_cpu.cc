// What rows.cu does, on a CPU: for tests on machines without a GPU.
#include "rows.h"

extern "C" {

__attribute__((visibility("default"))) std::int32_t nuwa_rows_abi() { return nuwa::kRowsAbi; }
__attribute__((visibility("default"))) std::int32_t nuwa_rows_lane_size() {
  return sizeof(nuwa::RowLane);
}
__attribute__((visibility("default"))) std::int32_t nuwa_rows_call_size() {
  return sizeof(nuwa::RowCall);
}

__attribute__((visibility("default"))) const char* nuwa_rows_unusable(std::int32_t) {
  return nullptr;
}

__attribute__((visibility("default"))) const char* nuwa_rows_gather(const nuwa::RowCall* call, void*) {
  constexpr std::int32_t kThreads = 3;
  for (std::int32_t part = 0; part < call->part_count; ++part) call->finite[part] = 1;
  for (std::int32_t row = 0; row < call->rows; ++row)
    for (std::int32_t thread = 0; thread < kThreads; ++thread)
      nuwa::gather_row(*call, row, thread, kThreads);
  return nullptr;
}

__attribute__((visibility("default"))) const char* nuwa_rows_commit(const nuwa::RowCall* call, void*) {
  for (std::int32_t row = 0; row < call->rows; ++row) {
    const nuwa::RowLane* lane = nuwa::lane_of(*call, row);
    if (lane && lane->part >= 0 && !nuwa::commit_row(*call, *lane, row)) call->finite[lane->part] = 0;
  }
  return nullptr;
}
}
