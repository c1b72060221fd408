// NearbyAttention and CachedNearbyAttention as TensorRT plugins: IPluginV3, namespace "nuwa",
// version "1". No kernel code: enqueue fills in an AttentionCall.
#pragma once

#include <NvInfer.h>
#include <NvInferRuntimePlugin.h>

#include <string>

#include "attention.h"
#include "layout.h"

namespace nuwa {

constexpr const char* kNamespace = "nuwa";
constexpr const char* kVersion = "1";
constexpr const char* kHeads = "heads";  // the only attribute
// Changes whenever an engine built with this library could no longer run with another one, or
// kernels have become faster or slower.
constexpr std::int32_t kAbiVersion = 1;

// Whoever loads the library says where to log; until then, and if it never does, nobody hears.
void set_logger(nvinfer1::ILoggerFinder* finder);
void log_error(const char* plugin, const std::string& message);

class AttentionPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuildV2,
                              public nvinfer1::IPluginV3OneRuntime {
 public:
  // Tactics besides TensorRT's 0, with which the number of rows decides.
  enum Tactic : std::int32_t { kByRows = 0, kFused = 1, kSplit = 2 };

  AttentionPlugin(const Layout& layout, std::int32_t heads, std::int32_t tactic = kByRows);

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return layout_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  std::int32_t getNbOutputs() const noexcept override { return layout_.outputs; }
  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, std::int32_t inputs,
                               const nvinfer1::DynamicPluginTensorDesc* out,
                               std::int32_t outputs) noexcept override;
  bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* io,
                                 std::int32_t inputs, std::int32_t outputs) noexcept override;
  std::int32_t getOutputDataTypes(nvinfer1::DataType* types, std::int32_t outputs,
                                  const nvinfer1::DataType* in,
                                  std::int32_t inputs) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t inputs,
                               const nvinfer1::DimsExprs* shapes, std::int32_t shape_inputs,
                               nvinfer1::DimsExprs* out, std::int32_t outputs,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc*, std::int32_t,
                               const nvinfer1::DynamicPluginTensorDesc*,
                               std::int32_t) const noexcept override {
    return 0;
  }
  std::int32_t getAliasedInput(std::int32_t output) noexcept override {
    return layout_.aliased(output);
  }
  std::int32_t getNbTactics() noexcept override { return layout_.writes() ? 2 : 0; }
  std::int32_t getValidTactics(std::int32_t* tactics, std::int32_t count) noexcept override;
  const char* getTimingCacheID() noexcept override { return timing_.c_str(); }

  std::int32_t setTactic(std::int32_t tactic) noexcept override;
  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, std::int32_t inputs,
                             const nvinfer1::PluginTensorDesc* out,
                             std::int32_t outputs) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                       const void* const* from, void* const* to, void* workspace,
                       cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return &fields_;
  }

 private:
  bool counts(std::int32_t inputs, std::int32_t outputs) const {
    return (inputs == layout_.required || inputs == layout_.required + 1) &&
           outputs == layout_.outputs;
  }
  // What is wrong with these sizes, "" if nothing is; -1 fits everything.
  std::string misfit(const nvinfer1::Dims* const* dims, bool bias) const;
  std::int32_t check(const nvinfer1::Dims* const* dims, std::int32_t inputs,
                     std::int32_t outputs) const;

  const Layout& layout_;
  const std::int32_t heads_;
  std::int32_t tactic_;
  bool bias_ = false;  // of the shapes last seen
  const std::string timing_;
  const nvinfer1::PluginField field_;
  const nvinfer1::PluginFieldCollection fields_;
};

// Makes plugins of one kind, of the attribute `heads`; null, and a line in the log, for anything
// else than a positive whole number.
class AttentionCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit AttentionCreator(const Layout& layout);

  nvinfer1::IPluginV3* createPlugin(const char* name,
                                    const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }
  const char* getPluginName() const noexcept override { return layout_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const Layout& layout_;
  const nvinfer1::PluginField field_;
  const nvinfer1::PluginFieldCollection fields_;
};

}  // namespace nuwa
