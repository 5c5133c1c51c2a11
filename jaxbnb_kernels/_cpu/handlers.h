// What the handlers that XLA calls share.
#pragma once

#include <optional>
#include <string_view>

#include "array.h"
#include "thread_pool.h"
#include "xla/ffi/api/ffi.h"

namespace jaxbnb {

namespace ffi = ::xla::ffi;

inline Dtype dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16:
      return Dtype::kBfloat16;
    case ffi::DataType::F16:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat32;
  }
}

// The dtype of a product is an attribute, which has no type of its own for dtypes.
inline std::optional<Dtype> dtype_named(std::string_view name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBfloat16;
  if (name == "float16") return Dtype::kFloat16;
  return std::nullopt;
}

inline Array array_of(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), dtype_of(buffer.element_type())};
}

}  // namespace jaxbnb

// Defines and exports a handler.
#define JAXBNB_HANDLER(name, function, binding)                                           \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding)
