// Calls a TensorRT plugin library as TensorRT does, without TensorRT: for plugin_harness.py. With a
// GPU also `enqueue`, on device memory. Creators are asked for directly, because the plugin registry
// of one TensorRT version cannot be called with the headers of another.
#include <NvInfer.h>
#include <NvInferRuntimePlugin.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstring>
#include <deque>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::string heard;

struct Logger final : ILogger {
  void log(Severity severity, AsciiChar const* message) noexcept override {
    heard += std::to_string(static_cast<int>(severity)) + " " + message + "\n";
  }
} logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

// A size as text, such as "T"; or a number.
struct Size final : IDimensionExpr, apiv::VDimensionExpr {
  std::string text;
  explicit Size(std::string given) : text(std::move(given)) { mImpl = this; }
  bool isConstant() const override { return !text.empty() && std::isdigit(text[0]); }
  std::int64_t getConstantValue() const override { return std::stoll(text); }
  bool isSizeTensor() const override { return false; }
};

struct Builder final : IExprBuilder, apiv::VExprBuilder {
  std::deque<Size> made;
  Builder() { mImpl = this; }
  IDimensionExpr const* size(std::string text) { return &made.emplace_back(std::move(text)); }
  IDimensionExpr const* constant(std::int64_t value) override { return size(std::to_string(value)); }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&,
                                  IDimensionExpr const&) override {
    return size("?");
  }
  IDimensionExpr const* declareSizeTensor(std::int32_t, IDimensionExpr const&,
                                          IDimensionExpr const&) override {
    return nullptr;
  }
};

// Sizes of tensors, one after the other, as plugin_harness.py gives them.
std::vector<Dims> read_dims(int tensors, const int* ranks, const std::int64_t* sizes) {
  std::vector<Dims> made(tensors);
  for (Dims& dims : made) {
    dims.nbDims = *ranks++;
    for (int i = 0; i < dims.nbDims; ++i) dims.d[i] = *sizes++;
  }
  return made;
}

template <class T>
T* as(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<T*>(plugin->getCapabilityInterface(type));
}
IPluginV3OneBuildV2* build(IPluginV3* plugin) {
  return as<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
  return as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

std::vector<PluginTensorDesc> descriptions(int tensors, const int* types, const int* ranks,
                                           const std::int64_t* sizes) {
  const std::vector<Dims> dims = read_dims(tensors, ranks, sizes);
  std::vector<PluginTensorDesc> made(tensors);
  for (int i = 0; i < tensors; ++i) {
    made[i].dims = dims[i];
    made[i].type = static_cast<DataType>(types[i]);
    made[i].format = TensorFormat::kLINEAR;
  }
  return made;
}

}  // namespace

extern "C" {

// Opens a library and gives its creators, or null with the reason in the log.
IPluginCreatorInterface* const* harness_open(const char* path, int* count) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    heard += dlerror();
    return nullptr;
  }
  const auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  const auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(std::int32_t&)>(
      dlsym(library, "getCreators"));
  if (!set || !get) return nullptr;
  set(&finder);
  return get(*count);
}

// What was logged since it was last asked for, each line after its severity.
const char* harness_log() {
  static std::string told;
  told.swap(heard);
  heard.clear();
  return told.c_str();
}

const char* harness_name(IPluginCreatorV3One* creator) { return creator->getPluginName(); }

IPluginV3* harness_create(IPluginCreatorV3One* creator, const char* field, int type,
                          const void* data, int length, int phase) {
  const PluginField one{field, data, static_cast<PluginFieldType>(type), length};
  const PluginFieldCollection fields{field ? 1 : 0, &one};
  return creator->createPlugin("tested", &fields, static_cast<TensorRTPhase>(phase));
}

// The plugin that an engine file would give: of the fields that this one writes down.
IPluginV3* harness_round_trip(IPluginCreatorV3One* creator, IPluginV3* plugin) {
  return creator->createPlugin("read", runtime(plugin)->getFieldsToSerialize(),
                               TensorRTPhase::kRUNTIME);
}

IPluginV3* harness_clone(IPluginV3* plugin) { return plugin->clone(); }
IPluginV3* harness_attach(IPluginV3* plugin) { return runtime(plugin)->attachToContext(nullptr); }
void harness_delete(IPluginV3* plugin) { delete plugin; }

const char* harness_identity(IPluginV3* plugin) {
  static std::string told;
  const auto* core = as<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
  told = std::string(core->getPluginNamespace()) + "/" + core->getPluginName() + "/" +
         core->getPluginVersion() + " " + build(plugin)->getTimingCacheID();
  return told.c_str();
}

int harness_outputs(IPluginV3* plugin) { return build(plugin)->getNbOutputs(); }
int harness_format_limit(IPluginV3* plugin) { return build(plugin)->getFormatCombinationLimit(); }
const char* harness_metadata(IPluginV3* plugin) { return build(plugin)->getMetadataString(); }
int harness_aliased(IPluginV3* plugin, int output) { return build(plugin)->getAliasedInput(output); }

int harness_tactics(IPluginV3* plugin, int* tactics) {
  const int count = build(plugin)->getNbTactics();
  return build(plugin)->getValidTactics(tactics, count) ? -1 : count;
}
int harness_set_tactic(IPluginV3* plugin, int tactic) { return runtime(plugin)->setTactic(tactic); }

int harness_output_types(IPluginV3* plugin, int inputs, const int* types, int outputs, int* made) {
  std::vector<DataType> in(inputs), out(outputs);
  for (int i = 0; i < inputs; ++i) in[i] = static_cast<DataType>(types[i]);
  const int status = build(plugin)->getOutputDataTypes(out.data(), outputs, in.data(), inputs);
  for (int i = 0; i < outputs; ++i) made[i] = static_cast<int>(out[i]);
  return status;
}

// Shapes as text: "T d;S R d" in, likewise out; null if the plugin refuses.
const char* harness_output_shapes(IPluginV3* plugin, const char* shapes, int outputs) {
  static std::string told;
  Builder builder;
  std::vector<DimsExprs> in(1), out(outputs);
  std::string word;
  const auto end_word = [&] {
    if (!word.empty()) in.back().d[in.back().nbDims++] = builder.size(word);
    word.clear();
  };
  in.back().nbDims = 0;
  for (const char* at = shapes; *at; ++at) {
    if (*at != ' ' && *at != ';') {
      word += *at;
      continue;
    }
    end_word();
    if (*at == ';') in.emplace_back().nbDims = 0;
  }
  end_word();
  if (build(plugin)->getOutputShapes(in.data(), static_cast<int>(in.size()), nullptr, 0, out.data(),
                                     outputs, builder))
    return nullptr;
  told.clear();
  for (const DimsExprs& dims : out) {
    if (!told.empty()) told += ";";
    for (int i = 0; i < dims.nbDims; ++i)
      told += (i ? " " : "") + static_cast<const Size*>(dims.d[i])->text;
  }
  return told.c_str();
}

int harness_supports(IPluginV3* plugin, int position, int inputs, int outputs, const int* types,
                     const int* formats) {
  std::vector<DynamicPluginTensorDesc> io(inputs + outputs);
  for (int i = 0; i <= position && i < inputs + outputs; ++i) {  // later ones are not known yet
    io[i].desc.type = static_cast<DataType>(types[i]);
    io[i].desc.format = static_cast<TensorFormat>(formats[i]);
  }
  return build(plugin)->supportsFormatCombination(position, io.data(), inputs, outputs);
}

// -1 is a size that is not known.
int harness_configure(IPluginV3* plugin, int inputs, const int* types, const int* ranks,
                      const std::int64_t* sizes, int outputs) {
  const auto tensors = descriptions(inputs, types, ranks, sizes);
  std::vector<DynamicPluginTensorDesc> in(inputs), out(outputs);
  for (int i = 0; i < inputs; ++i) in[i].desc = tensors[i];
  return build(plugin)->configurePlugin(in.data(), inputs, out.data(), outputs);
}

// As TensorRT asks after it has configured a plugin.
std::int64_t harness_workspace(IPluginV3* plugin, int inputs, const int* types, const int* ranks,
                               const std::int64_t* sizes, int outputs) {
  const auto tensors = descriptions(inputs, types, ranks, sizes);
  std::vector<DynamicPluginTensorDesc> in(inputs), out(outputs);
  for (int i = 0; i < inputs; ++i) {
    in[i].desc = tensors[i];
    in[i].min = in[i].opt = in[i].max = tensors[i].dims;
  }
  return build(plugin)->getWorkspaceSize(in.data(), inputs, out.data(), outputs);
}

int harness_shape_change(IPluginV3* plugin, int inputs, const int* types, const int* ranks,
                         const std::int64_t* sizes, int outputs) {
  const auto in = descriptions(inputs, types, ranks, sizes);
  const std::vector<PluginTensorDesc> out(outputs);
  return runtime(plugin)->onShapeChange(in.data(), inputs, out.data(), outputs);
}

// Runs the plugin on a GPU: copies `in` there, and `out` back. in_place: outputs that are aliased to
// an input get its memory. 0, or an error of the plugin or of CUDA.
int harness_enqueue(IPluginV3* plugin, int inputs, const int* types, const int* ranks,
                    const std::int64_t* sizes, const void* const* in, int outputs, void* const* out,
                    const std::int64_t* out_bytes, int in_place) {
  const auto tensors = descriptions(inputs, types, ranks, sizes);
  const std::vector<PluginTensorDesc> made(outputs);
  std::vector<void*> from(inputs), to(outputs), allocated;
  int status = 0;
  const auto done = [&](cudaError_t error) {
    if (!status) status = error;
    return error == cudaSuccess;
  };
  const auto allocate = [&](std::size_t bytes) {
    void* memory = nullptr;
    if (done(cudaMalloc(&memory, bytes))) allocated.push_back(memory);
    return memory;
  };
  for (int i = 0; i < inputs && !status; ++i) {
    std::size_t bytes = tensors[i].type == DataType::kFLOAT || tensors[i].type == DataType::kINT32 ? 4 : 2;
    for (int axis = 0; axis < tensors[i].dims.nbDims; ++axis) bytes *= tensors[i].dims.d[axis];
    from[i] = allocate(bytes);
    if (!status) done(cudaMemcpy(from[i], in[i], bytes, cudaMemcpyHostToDevice));
  }
  for (int i = 0; i < outputs && !status; ++i) {
    const int aliased = build(plugin)->getAliasedInput(i);
    to[i] = in_place && aliased >= 0 ? from[aliased] : allocate(out_bytes[i]);
  }
  cudaStream_t stream = nullptr;
  if (!status) done(cudaStreamCreate(&stream));
  if (!status) status = runtime(plugin)->onShapeChange(tensors.data(), inputs, made.data(), outputs);
  if (!status)
    status = runtime(plugin)->enqueue(tensors.data(), made.data(), from.data(), to.data(), nullptr, stream);
  if (!status) done(cudaStreamSynchronize(stream));
  for (int i = 0; i < outputs && !status; ++i)
    done(cudaMemcpy(out[i], to[i], out_bytes[i], cudaMemcpyDeviceToHost));
  if (stream) cudaStreamDestroy(stream);
  for (void* memory : allocated) cudaFree(memory);
  return status;
}

// Puts a call onto a stream: `from` and `to` are on the GPU. Neither allocates nor waits.
int harness_launch(IPluginV3* plugin, int inputs, const int* types, const int* ranks,
                   const std::int64_t* sizes, const void* const* from, int outputs,
                   void* const* to, cudaStream_t stream) {
  const auto tensors = descriptions(inputs, types, ranks, sizes);
  const std::vector<PluginTensorDesc> made(outputs);
  const int status =
      runtime(plugin)->onShapeChange(tensors.data(), inputs, made.data(), outputs);
  if (status) return status;
  return runtime(plugin)->enqueue(tensors.data(), made.data(), from, to, nullptr, stream);
}
}
