// Kernels of rows.h, and the C interface through which the runtime calls them.
#include "rows.h"

#include <cuda_runtime.h>

namespace nuwa {
namespace {

constexpr int kThreads = 64;  // of the block that gathers a row

__global__ void gather(RowCall call) {
  const std::int32_t row = blockIdx.x;
  if (row == 0)
    for (std::int32_t part = threadIdx.x; part < call.part_count; part += blockDim.x)
      call.finite[part] = 1;
  gather_row(call, row, threadIdx.x, blockDim.x);
}

__global__ void commit(RowCall call) {
  const std::int32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= call.rows) return;
  const RowLane* lane = lane_of(call, row);
  if (lane && lane->part >= 0 && !commit_row(call, *lane, row)) call.finite[lane->part] = 0;
}

}  // namespace
}  // namespace nuwa

extern "C" {

__attribute__((visibility("default"))) std::int32_t nuwa_rows_abi() { return nuwa::kRowsAbi; }
__attribute__((visibility("default"))) std::int32_t nuwa_rows_lane_size() {
  return sizeof(nuwa::RowLane);
}
__attribute__((visibility("default"))) std::int32_t nuwa_rows_call_size() {
  return sizeof(nuwa::RowCall);
}

// Null, or why the kernels cannot run on a device of this machine.
__attribute__((visibility("default"))) const char* nuwa_rows_unusable(std::int32_t device) {
  int before = 0;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, nuwa::gather);
  cudaSetDevice(before);
  cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Null, or what CUDA says is wrong; both run on the stream. What `call` points to is on the device,
// `call` itself is copied.
__attribute__((visibility("default"))) const char* nuwa_rows_gather(const nuwa::RowCall* call,
                                                                    void* stream) {
  if (call->rows < 1) return nullptr;
  nuwa::gather<<<call->rows, nuwa::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*call);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

__attribute__((visibility("default"))) const char* nuwa_rows_commit(const nuwa::RowCall* call,
                                                                    void* stream) {
  if (call->rows < 1) return nullptr;
  constexpr int kBlock = 128;
  const int blocks = (call->rows + kBlock - 1) / kBlock;
  nuwa::commit<<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(*call);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
}
