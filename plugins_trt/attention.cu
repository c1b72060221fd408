// A block is a row and some of its heads, a warp each; see attention_core.h for what lanes do.
#include "attention.h"

#include <algorithm>

#include "attention_core.h"

namespace nuwa {
namespace {

constexpr int kMostWarps = 8;      // of a block
constexpr int kFusedRows = 512;    // a block compares each neighbour with all rows of the call

// Tensors of a call by their type.
template <class T>
struct Tensors {
  std::int32_t rows, slots, entries, neighbours, heads;
  const T* query;
  T *key, *value;
  const std::int32_t *slot, *neighbour;
  const T* bias;
  const T *key_new, *value_new;
  const std::int32_t* write_index;
  T* out;

  explicit Tensors(const AttentionCall& call)
      : rows(call.rows),
        slots(call.slots),
        entries(call.entries),
        neighbours(call.neighbours),
        heads(call.heads),
        query(static_cast<const T*>(call.query)),
        key(static_cast<T*>(call.key)),
        value(static_cast<T*>(call.value)),
        slot(call.slot),
        neighbour(call.neighbour),
        bias(static_cast<const T*>(call.bias)),
        key_new(static_cast<const T*>(call.key_new)),
        value_new(static_cast<const T*>(call.value_new)),
        write_index(call.write_index),
        out(static_cast<T*>(call.out)) {}

  // Where a row reads and writes; -1 for what is outside: TensorRT times kernels on made-up indices.
  __device__ std::int32_t slot_of(int row) const { return within(slot[row], slots); }
  __device__ std::int32_t written(int row) const {
    return slot_of(row) < 0 ? -1 : within(write_index[row], entries);
  }
  __device__ static std::int32_t within(std::int32_t index, std::int32_t size) {
    return static_cast<std::uint32_t>(index) < static_cast<std::uint32_t>(size) ? index : -1;
  }
};

template <class T>
__device__ Chunk<T> read(const T* from) {
  return *reinterpret_cast<const Chunk<T>*>(from);
}

// Where each neighbour of a row is read from, for the whole block. With kFused, entries that rows of
// this call write are read from what they write: so no block waits for another.
template <class T, bool kFused>
__device__ void find_sources(const Tensors<T>& call, int row, std::int32_t* source) {
  const int thread = threadIdx.y * kWarp + threadIdx.x, threads = blockDim.y * kWarp;
  const std::int32_t* own = call.neighbour + static_cast<std::int64_t>(row) * call.neighbours;
  const std::int32_t slot = call.slot_of(row);
  for (int j = thread; j < call.neighbours; j += threads)
    source[j] = slot < 0 ? kMasked : call.within(own[j], call.entries);
  __syncthreads();
  if constexpr (kFused) {
    for (int writer = thread; writer < call.rows; writer += threads) {
      const std::int32_t entry = call.written(writer);
      if (entry < 0 || call.slot[writer] != slot) continue;
      // One writer an entry, and neighbours of a row are all different: no two threads meet.
      for (int j = 0; j < call.neighbours; ++j)
        if (own[j] == entry) source[j] = of_call(writer);
    }
    __syncthreads();
  }
}

template <class T, int kHeadDim>
__device__ void write_head(const Tensors<T>& call, int row, int head) {
  const std::int32_t entry = call.written(row);
  if (entry < 0) return;
  constexpr int kLanes = Split<T, kHeadDim>::kLanes, kChannels = Split<T, kHeadDim>::kChannels;
  const std::int64_t width = static_cast<std::int64_t>(call.heads) * kHeadDim;
  const std::int64_t at = head * kHeadDim;
  const std::int64_t from = row * width + at;
  const std::int64_t to = (static_cast<std::int64_t>(call.slot[row]) * call.entries + entry) * width + at;
  for (int lane = threadIdx.x; lane < 2 * kLanes; lane += kWarp) {
    const bool is_key = lane < kLanes;
    const int offset = (is_key ? lane : lane - kLanes) * kChannels;
    T* target = (is_key ? call.key : call.value) + to + offset;
    *reinterpret_cast<Chunk<T>*>(target) =
        read((is_key ? call.key_new : call.value_new) + from + offset);
  }
}

template <class T, int kHeadDim>
__device__ void attend_head(const Tensors<T>& call, int row, int head, const std::int32_t* source) {
  constexpr int kLanes = Split<T, kHeadDim>::kLanes, kGroups = Split<T, kHeadDim>::kGroups;
  constexpr int kChannels = Split<T, kHeadDim>::kChannels;
  const std::int64_t width = static_cast<std::int64_t>(call.heads) * kHeadDim;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const std::int64_t at = head * kHeadDim + lane * kChannels;
  const std::int64_t slot = static_cast<std::int64_t>(call.slot[row]) * call.entries * width + at;

  float query[kChannels];
  unpack(read(call.query + row * width + at), query);
  const float scale = kLog2E * rsqrtf(static_cast<float>(kHeadDim));
  for (float& channel : query) channel *= scale;

  Partial<kChannels> partial;
  // All lanes of a warp take part in every round, for the sums over lanes.
#pragma unroll 4
  for (int first = 0; first < call.neighbours; first += kGroups) {
    const int j = first + group;
    const std::int32_t from = j < call.neighbours ? source[j] : kMasked;
    Chunk<T> key_chunk{}, value_chunk{};
    if (from != kMasked) {
      const bool cached = from >= 0;
      const std::int64_t offset = cached ? slot + from * width : from_call(from) * width + at;
      key_chunk = read((cached ? call.key : call.key_new) + offset);
      value_chunk = read((cached ? call.value : call.value_new) + offset);
    }
    float key[kChannels], value[kChannels];
    unpack(key_chunk, key);
    unpack(value_chunk, value);
    float score = dot(query, key);
    for (int mask = kLanes / 2; mask; mask /= 2) score += __shfl_xor_sync(~0u, score, mask);
    if (from == kMasked) continue;
    if (call.bias) score += kLog2E * to_float(call.bias[head * call.neighbours + j]);
    partial.add(score, value);
  }
  for (int mask = kLanes; mask < kWarp; mask *= 2) {
    Partial<kChannels> other;
    other.most = __shfl_xor_sync(~0u, partial.most, mask);
    other.weight = __shfl_xor_sync(~0u, partial.weight, mask);
    for (int i = 0; i < kChannels; ++i) other.sum[i] = __shfl_xor_sync(~0u, partial.sum[i], mask);
    partial.merge(other);
  }
  if (group) return;
  Chunk<T> out;
  for (int i = 0; i < kChannels; ++i) out.at[i] = from_float<T>(partial.mean(i));
  *reinterpret_cast<Chunk<T>*>(call.out + row * width + at) = out;
}

template <class T, int kHeadDim, bool kFused>
__global__ void attend_kernel(Tensors<T> call) {
  extern __shared__ std::int32_t source[];
  const int row = blockIdx.x, head = blockIdx.y * blockDim.y + threadIdx.y;
  find_sources<T, kFused>(call, row, source);
  if (head >= call.heads) return;
  if constexpr (kFused) write_head<T, kHeadDim>(call, row, head);
  attend_head<T, kHeadDim>(call, row, head, source);
}

template <class T, int kHeadDim>
__global__ void write_kernel(Tensors<T> call) {
  const int head = blockIdx.y * blockDim.y + threadIdx.y;
  if (head < call.heads) write_head<T, kHeadDim>(call, blockIdx.x, head);
}

template <class T, int kHeadDim>
cudaError_t launch(const AttentionCall& call, Launch how, cudaStream_t stream) {
  const Tensors<T> tensors(call);
  const int warps = std::min(call.heads, kMostWarps);
  const dim3 block(kWarp, warps), grid(call.rows, (call.heads + warps - 1) / warps);
  const std::size_t shared = call.neighbours * sizeof(std::int32_t);
  if (call.writes() && how == Launch::kFused) {
    attend_kernel<T, kHeadDim, true><<<grid, block, shared, stream>>>(tensors);
    return cudaGetLastError();
  }
  if (call.writes()) {
    write_kernel<T, kHeadDim><<<grid, block, 0, stream>>>(tensors);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  attend_kernel<T, kHeadDim, false><<<grid, block, shared, stream>>>(tensors);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_type(const AttentionCall& call, Launch how, cudaStream_t stream) {
  switch (call.head_dim) {
    case 32: return launch<T, 32>(call, how, stream);
    case 64: return launch<T, 64>(call, how, stream);
    case 128: return launch<T, 128>(call, how, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t attend(const AttentionCall& call, Launch how, cudaStream_t stream) {
  if (unsupported(call)) return cudaErrorInvalidValue;
  if (!call.rows) return cudaSuccess;
  switch (call.storage) {
    case Storage::kFloat32: return launch_type<float>(call, how, stream);
    case Storage::kFloat16: return launch_type<Half>(call, how, stream);
    case Storage::kBFloat16: return launch_type<BFloat16>(call, how, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t can_attend() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, attend_kernel<float, 64, true>);
  cudaGetLastError();  // so that it is not found by somebody else
  return error;
}

cudaError_t attend(const AttentionCall& call, cudaStream_t stream) {
  return attend(call, call.rows <= kFusedRows ? Launch::kFused : Launch::kSplit, stream);
}

}  // namespace nuwa
