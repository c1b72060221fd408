#include "plugin.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <new>

namespace nuwa {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr int kMostInputs = 9;

std::atomic<nvinfer1::ILoggerFinder*> finder{nullptr};

// Runs what may throw, for callers that must not: -1 and a line in the log if it does.
template <class Body>
std::int32_t guarded(const char* plugin, Body&& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    log_error(plugin, error.what());
    return -1;
  }
}

bool is_stored(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

Storage storage_of(DataType type) {
  return type == DataType::kFLOAT  ? Storage::kFloat32
         : type == DataType::kHALF ? Storage::kFloat16
                                   : Storage::kBFloat16;
}

std::size_t bytes_of(const nvinfer1::PluginTensorDesc& tensor) {
  std::size_t bytes = tensor.type == DataType::kFLOAT ? 4 : 2;
  for (int i = 0; i < tensor.dims.nbDims; ++i) bytes *= tensor.dims.d[i];
  return bytes;
}

std::string written(const Dims& dims) {
  std::string text = "[";
  for (int i = 0; i < dims.nbDims; ++i)
    text += (i ? ", " : "") + (dims.d[i] < 0 ? std::string("?") : std::to_string(dims.d[i]));
  return text + "]";
}

// heads of a collection of fields; 0 with a reason.
std::int32_t read_heads(const nvinfer1::PluginFieldCollection* fields, std::string& reason) {
  for (int i = 0; fields && i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    if (!field.name || std::strcmp(field.name, kHeads)) continue;
    std::int64_t heads = 0;
    if (field.length != 1 || !field.data) {
      reason = "heads is not one number";
      return 0;
    }
    if (field.type == PluginFieldType::kINT32)
      heads = *static_cast<const std::int32_t*>(field.data);
    else if (field.type == PluginFieldType::kINT64)
      heads = *static_cast<const std::int64_t*>(field.data);
    else
      reason = "heads is not of a type for whole numbers";
    if (reason.empty() && (heads < 1 || heads > 4096))
      reason = "heads " + std::to_string(heads) + " is not in [1, 4096]";
    return reason.empty() ? static_cast<std::int32_t>(heads) : 0;
  }
  reason = "the attribute heads is missing";
  return 0;
}

}  // namespace

void set_logger(nvinfer1::ILoggerFinder* given) { finder = given; }

void log_error(const char* plugin, const std::string& message) {
  nvinfer1::ILoggerFinder* const found = finder;
  nvinfer1::ILogger* const logger = found ? found->findLogger() : nullptr;
  if (logger)
    logger->log(nvinfer1::ILogger::Severity::kERROR,
                (std::string(kNamespace) + "::" + plugin + ": " + message).c_str());
}

AttentionPlugin::AttentionPlugin(const Layout& layout, std::int32_t heads, std::int32_t tactic)
    : layout_(layout),
      heads_(heads),
      tactic_(tactic),
      timing_(std::string(layout.name) + "_heads" + std::to_string(heads) + "_abi" +
              std::to_string(kAbiVersion)),
      field_(kHeads, &heads_, PluginFieldType::kINT32, 1),
      fields_{1, &field_} {}

nvinfer1::IPluginCapability* AttentionPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* AttentionPlugin::clone() noexcept {
  try {
    auto* made = new AttentionPlugin(layout_, heads_, tactic_);
    made->bias_ = bias_;
    return made;
  } catch (const std::exception& error) {
    log_error(layout_.name, error.what());
    return nullptr;
  }
}

std::string AttentionPlugin::misfit(const Dims* const* dims, bool bias) const {
  const auto size = [&](int input, int axis) { return dims[input]->d[axis]; };
  const auto differ = [](std::int64_t a, std::int64_t b) { return a >= 0 && b >= 0 && a != b; };
  const auto rank = [&](int input, int wanted, const char* what) -> std::string {
    if (dims[input]->nbDims == wanted) return "";
    return std::string(what) + " has the shape " + written(*dims[input]) + ", not one of " +
           std::to_string(wanted) + " sizes";
  };
  std::string reason;
  const auto wants = [&](int input, int sizes, const char* what) {
    if (reason.empty()) reason = rank(input, sizes, what);
  };
  wants(layout_.query, 2, "query");
  wants(layout_.key, 3, "key");
  wants(layout_.value, 3, "value");
  wants(layout_.slot, 1, "slot");
  wants(layout_.neighbours, 2, "neighbours");
  if (layout_.writes()) {
    wants(layout_.key_new, 2, "key_new");
    wants(layout_.value_new, 2, "value_new");
    wants(layout_.write_index, 1, "write_index");
  }
  if (bias) wants(layout_.required, 2, "bias");
  if (!reason.empty()) return reason;

  const std::int64_t width = size(layout_.query, 1);
  if (width >= 0) {
    const std::int64_t head_dim = width / heads_;
    if (width % heads_ || (head_dim != 32 && head_dim != 64 && head_dim != 128))
      return "query is " + std::to_string(width) + " wide, which is not " + std::to_string(heads_) +
             " heads of 32, 64 or 128";
  }
  const auto same = [&](int input, int axis, int other, int other_axis, const char* what) {
    if (reason.empty() && differ(size(input, axis), size(other, other_axis)))
      reason = std::string(what) + ": " + written(*dims[input]) + " and " + written(*dims[other]);
  };
  same(layout_.key, 2, layout_.query, 1, "key and query differ in width");
  for (int axis = 0; axis < 3; ++axis)
    same(layout_.value, axis, layout_.key, axis, "value and key differ");
  same(layout_.slot, 0, layout_.query, 0, "slot and query differ in rows");
  same(layout_.neighbours, 0, layout_.query, 0, "neighbours and query differ in rows");
  if (layout_.writes()) {
    for (int axis = 0; axis < 2; ++axis) {
      same(layout_.key_new, axis, layout_.query, axis, "key_new and query differ");
      same(layout_.value_new, axis, layout_.query, axis, "value_new and query differ");
    }
    same(layout_.write_index, 0, layout_.query, 0, "write_index and query differ in rows");
  }
  if (bias) {
    same(layout_.required, 1, layout_.neighbours, 1, "bias and neighbours differ in columns");
    if (reason.empty() && differ(size(layout_.required, 0), heads_))
      reason = "bias has the shape " + written(*dims[layout_.required]) + ", for " +
               std::to_string(heads_) + " heads";
  }
  return reason;
}

std::int32_t AttentionPlugin::check(const Dims* const* dims, std::int32_t inputs,
                                    std::int32_t outputs) const {
  if (!counts(inputs, outputs)) {
    log_error(layout_.name, std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
                                " outputs, not " + std::to_string(layout_.required) + " or, with bias, " +
                                std::to_string(layout_.required + 1) + " and " +
                                std::to_string(layout_.outputs));
    return -1;
  }
  const std::string reason = misfit(dims, inputs > layout_.required);
  if (reason.empty()) return 0;
  log_error(layout_.name, reason);
  return -1;
}

std::int32_t AttentionPlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in,
                                              std::int32_t inputs,
                                              const nvinfer1::DynamicPluginTensorDesc*,
                                              std::int32_t outputs) noexcept {
  return guarded(layout_.name, [&] {
    const Dims* dims[kMostInputs] = {};
    for (int i = 0; i < inputs && i < kMostInputs; ++i) dims[i] = &in[i].desc.dims;
    return check(dims, inputs, outputs);
  });
}

bool AttentionPlugin::supportsFormatCombination(std::int32_t position,
                                                const nvinfer1::DynamicPluginTensorDesc* io,
                                                std::int32_t inputs,
                                                std::int32_t outputs) noexcept {
  if (!counts(inputs, outputs) || position < 0 || position >= inputs + outputs) return false;
  const nvinfer1::PluginTensorDesc& tensor = io[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position < inputs && layout_.is_index(position)) return tensor.type == DataType::kINT32;
  if (position == layout_.query) return is_stored(tensor.type);
  return tensor.type == io[layout_.query].desc.type;
}

std::int32_t AttentionPlugin::getOutputDataTypes(DataType* types, std::int32_t outputs,
                                                 const DataType* in,
                                                 std::int32_t inputs) const noexcept {
  if (!counts(inputs, outputs)) return -1;
  for (int i = 0; i < outputs; ++i) types[i] = in[layout_.query];
  return 0;
}

std::int32_t AttentionPlugin::getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t inputs,
                                              const nvinfer1::DimsExprs*, std::int32_t,
                                              nvinfer1::DimsExprs* out, std::int32_t outputs,
                                              nvinfer1::IExprBuilder&) noexcept {
  if (!counts(inputs, outputs)) return -1;
  out[0] = in[layout_.query];
  for (int i = 1; i < outputs; ++i) out[i] = in[layout_.aliased(i)];
  return 0;
}

std::int32_t AttentionPlugin::getValidTactics(std::int32_t* tactics, std::int32_t count) noexcept {
  if (count != getNbTactics()) return -1;
  for (int i = 0; i < count; ++i) tactics[i] = kFused + i;
  return 0;
}

std::int32_t AttentionPlugin::setTactic(std::int32_t tactic) noexcept {
  if (tactic < kByRows || tactic > (layout_.writes() ? kSplit : kByRows)) return -1;
  tactic_ = tactic;
  return 0;
}

// Also called when an input only moves, so it keeps next to nothing.
std::int32_t AttentionPlugin::onShapeChange(const nvinfer1::PluginTensorDesc* in,
                                            std::int32_t inputs, const nvinfer1::PluginTensorDesc*,
                                            std::int32_t outputs) noexcept {
  return guarded(layout_.name, [&] {
    const Dims* dims[kMostInputs] = {};
    for (int i = 0; i < inputs && i < kMostInputs; ++i) dims[i] = &in[i].dims;
    bias_ = inputs > layout_.required;
    return check(dims, inputs, outputs);
  });
}

std::int32_t AttentionPlugin::enqueue(const nvinfer1::PluginTensorDesc* in,
                                      const nvinfer1::PluginTensorDesc*, const void* const* from,
                                      void* const* to, void*, cudaStream_t stream) noexcept {
  return guarded(layout_.name, [&]() -> std::int32_t {
    const Dims& keys = in[layout_.key].dims;
    const auto index = [&](int input) { return static_cast<const std::int32_t*>(from[input]); };
    AttentionCall call{};
    call.storage = storage_of(in[layout_.query].type);
    call.rows = static_cast<std::int32_t>(in[layout_.query].dims.d[0]);
    call.slots = static_cast<std::int32_t>(keys.d[0]);
    call.entries = static_cast<std::int32_t>(keys.d[1]);
    call.neighbours = static_cast<std::int32_t>(in[layout_.neighbours].dims.d[1]);
    call.heads = heads_;
    call.head_dim = static_cast<std::int32_t>(in[layout_.query].dims.d[1] / heads_);
    call.query = from[layout_.query];
    call.key = const_cast<void*>(from[layout_.key]);  // not written to without write_index
    call.value = const_cast<void*>(from[layout_.value]);
    call.slot = index(layout_.slot);
    call.neighbour = index(layout_.neighbours);
    call.bias = bias_ ? from[layout_.required] : nullptr;
    call.out = to[0];
    if (layout_.writes()) {
      call.key_new = from[layout_.key_new];
      call.value_new = from[layout_.value_new];
      call.write_index = index(layout_.write_index);
      call.key = to[1];
      call.value = to[2];
      for (int output = 1; output < layout_.outputs; ++output) {
        const int input = layout_.aliased(output);
        if (to[output] == from[input]) continue;
        // Right, but slow: an engine built without aliased plugin I/O.
        const cudaError_t copied = cudaMemcpyAsync(to[output], from[input], bytes_of(in[input]),
                                                   cudaMemcpyDeviceToDevice, stream);
        if (copied != cudaSuccess) {
          cudaGetLastError();
          return copied;
        }
      }
    }
    const cudaError_t error =
        tactic_ == kByRows
            ? attend(call, stream)
            : attend(call, tactic_ == kFused ? Launch::kFused : Launch::kSplit, stream);
    if (error != cudaSuccess) {
      const char* reason = unsupported(call);
      log_error(layout_.name, reason ? reason : cudaGetErrorString(error));
    }
    return error;
  });
}

AttentionCreator::AttentionCreator(const Layout& layout)
    : layout_(layout), field_(kHeads, nullptr, PluginFieldType::kINT32, 1), fields_{1, &field_} {}

nvinfer1::IPluginV3* AttentionCreator::createPlugin(const char*,
                                                    const nvinfer1::PluginFieldCollection* fields,
                                                    nvinfer1::TensorRTPhase) noexcept {
  try {
    std::string reason;
    const std::int32_t heads = read_heads(fields, reason);
    if (heads) return new AttentionPlugin(layout_, heads);
    log_error(layout_.name, reason);
  } catch (const std::exception& error) {
    log_error(layout_.name, error.what());
  }
  return nullptr;
}

}  // namespace nuwa
