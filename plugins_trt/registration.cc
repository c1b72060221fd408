// What a plugin registry looks for when it loads the library.
#include "plugin.h"

#define NUWA_EXPORT extern "C" __attribute__((visibility("default")))

NUWA_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { nuwa::set_logger(finder); }

NUWA_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  static nuwa::AttentionCreator nearby(nuwa::kNearby), cached(nuwa::kCached);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&nearby, &cached};
  count = 2;
  return creators;
}

NUWA_EXPORT std::int32_t nuwa_plugin_abi_version() { return nuwa::kAbiVersion; }
