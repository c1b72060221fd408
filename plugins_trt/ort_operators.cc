// NearbyAttention and CachedNearbyAttention as custom operators of ONNX Runtime: for its CUDA
// provider around the kernels or, built with NUWA_ON_CPU, for its CPU provider around what stands in
// for them in tests. A registered operator takes the place of the function body in a graph, so every
// type that a graph may have is registered.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef NUWA_ON_CPU
#include "attention_cpu.h"
#else
#include "attention.h"
#endif
#include "layout.h"

namespace nuwa {
namespace {

constexpr ONNXTensorElementDataType kTypes[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                                ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                                ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16};

Storage storage_of(ONNXTensorElementDataType type) {
  for (int i = 0; i < 3; ++i)
    if (kTypes[i] == type) return static_cast<Storage>(i);
  throw std::invalid_argument("no type of an operator");
}

#ifdef NUWA_ON_CPU
constexpr const char* kProvider = "CPUExecutionProvider";

void run(const AttentionCall& call, Ort::KernelContext&) {
  if (const char* reason = attend_on_cpu(call)) throw std::invalid_argument(reason);
}
void copy(void* to, const void* from, std::size_t bytes, Ort::KernelContext&) {
  std::memcpy(to, from, bytes);
}
#else
constexpr const char* kProvider = "CUDAExecutionProvider";

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  // As ONNX Runtime's own kernels say it: by that backends know errors that a GPU does not survive.
  throw std::runtime_error(std::string("CUDA error ") + cudaGetErrorName(error) + ":" +
                           cudaGetErrorString(error));
}
cudaStream_t stream_of(Ort::KernelContext& context) {
  return static_cast<cudaStream_t>(context.GetGPUComputeStream());
}
void run(const AttentionCall& call, Ort::KernelContext& context) {
  if (const char* reason = unsupported(call)) throw std::invalid_argument(reason);
  check(attend(call, stream_of(context)));
}
void copy(void* to, const void* from, std::size_t bytes, Ort::KernelContext& context) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_of(context)));
}
#endif

using Shape = std::vector<std::int64_t>;

class Kernel {
 public:
  Kernel(const Layout& layout, Storage storage, const OrtKernelInfo* info)
      : layout_(layout),
        storage_(storage),
        heads_(Ort::ConstKernelInfo(info).GetAttribute<std::int64_t>("heads")) {
    if (heads_ < 1) throw std::invalid_argument("heads " + std::to_string(heads_) + " is below 1");
  }

  void Compute(OrtKernelContext* given) {
    Ort::KernelContext context(given);
    const auto shape = [&](int input) {
      return context.GetInput(input).GetTensorTypeAndShapeInfo().GetShape();
    };
    const auto read = [&](int input) { return context.GetInput(input).GetTensorRawData(); };
    const auto index = [&](int input) { return static_cast<const std::int32_t*>(read(input)); };
    const Shape query = shape(layout_.query), key = shape(layout_.key);
    if (query.size() != 2 || key.size() != 3 || query[1] % heads_ || key[2] != query[1])
      throw std::invalid_argument("query and key do not fit each other or heads");
    const Shape near = shape(layout_.neighbours), rows{query[0]};
    if (shape(layout_.value) != key || shape(layout_.slot) != rows || near.size() != 2 ||
        near[0] != query[0])
      throw std::invalid_argument("value, slot or neighbours do not fit query and key");
    if (layout_.writes() && (shape(layout_.key_new) != query || shape(layout_.value_new) != query ||
                             shape(layout_.write_index) != rows))
      throw std::invalid_argument("key_new, value_new or write_index do not fit query");
    AttentionCall call{};
    call.storage = storage_;
    call.rows = static_cast<std::int32_t>(query[0]);
    call.slots = static_cast<std::int32_t>(key[0]);
    call.entries = static_cast<std::int32_t>(key[1]);
    call.neighbours = static_cast<std::int32_t>(near[1]);
    call.heads = static_cast<std::int32_t>(heads_);
    call.head_dim = static_cast<std::int32_t>(query[1] / heads_);
    call.query = read(layout_.query);
    call.key = const_cast<void*>(read(layout_.key));  // not written to without write_index
    call.value = const_cast<void*>(read(layout_.value));
    call.slot = index(layout_.slot);
    call.neighbour = index(layout_.neighbours);
    const int bias = layout_.required;
    if (context.GetInputCount() > static_cast<std::size_t>(bias) && context.GetInput(bias)) {
      if (shape(bias) != Shape{heads_, near[1]})
        throw std::invalid_argument("bias does not fit heads and neighbours");
      call.bias = read(bias);
    }
    call.out = context.GetOutput(0, query).GetTensorMutableRawData();
    if (layout_.writes()) {
      call.key_new = read(layout_.key_new);
      call.value_new = read(layout_.value_new);
      call.write_index = index(layout_.write_index);
      call.key = in_place(context, 1, key);
      call.value = in_place(context, 2, key);
    }
    run(call, context);
  }

 private:
  // The memory of an output that continues an input: the same if the session is bound so.
  void* in_place(Ort::KernelContext& context, int output, const Shape& shape) {
    void* to = context.GetOutput(output, shape).GetTensorMutableRawData();
    const void* from = context.GetInput(layout_.aliased(output)).GetTensorRawData();
    std::size_t bytes = storage_ == Storage::kFloat32 ? 4 : 2;
    for (const std::int64_t size : shape) bytes *= size;
    if (to != from) copy(to, from, bytes, context);
    return to;
  }

  const Layout& layout_;
  const Storage storage_;
  const std::int64_t heads_;
};

struct Operator final : Ort::CustomOpBase<Operator, Kernel> {
  const Layout& layout;
  const ONNXTensorElementDataType type;

  Operator(const Layout& given, ONNXTensorElementDataType stored) : layout(given), type(stored) {
    if (!layout.writes()) return;
    OrtCustomOp::GetMayInplace = [](int** inputs, int** outputs) -> std::size_t {
      *inputs = new int[2]{kCached.key, kCached.value};
      *outputs = new int[2]{1, 2};
      return 2;
    };
    OrtCustomOp::ReleaseMayInplace = [](int* inputs, int* outputs) {
      delete[] inputs;
      delete[] outputs;
    };
  }

  void* CreateKernel(const OrtApi&, const OrtKernelInfo* info) const {
    return new Kernel(layout, storage_of(type), info);
  }
  const char* GetName() const { return layout.name; }
  const char* GetExecutionProviderType() const { return kProvider; }
  std::size_t GetInputTypeCount() const { return layout.required + 1; }
  std::size_t GetOutputTypeCount() const { return layout.outputs; }
  ONNXTensorElementDataType GetInputType(std::size_t input) const {
    return layout.is_index(static_cast<int>(input)) ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : type;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(std::size_t input) const {
    return static_cast<int>(input) < layout.required ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  ONNXTensorElementDataType GetOutputType(std::size_t) const { return type; }
};

}  // namespace
}  // namespace nuwa

#ifndef NUWA_ON_CPU
// Null, or why the kernels cannot run on a device of this machine.
extern "C" __attribute__((visibility("default"))) const char* nuwa_unusable(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = nuwa::can_attend();
  cudaSetDevice(before);
  cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) return nullptr;  // an ONNX Runtime before these headers: function bodies run instead
  Ort::InitApi(api);
  try {
    static Ort::CustomOpDomain domain("nuwa");
    static const auto operators = [] {
      std::vector<std::unique_ptr<nuwa::Operator>> made;
      for (const nuwa::Layout* layout : {&nuwa::kNearby, &nuwa::kCached})
        for (const ONNXTensorElementDataType type : nuwa::kTypes) {
          made.push_back(std::make_unique<nuwa::Operator>(*layout, type));
          domain.Add(made.back().get());
        }
      return made;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
  } catch (const std::exception& error) {
    return Ort::Status(error).release();
  }
  return nullptr;
}
