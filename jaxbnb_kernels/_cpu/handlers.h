// What the handlers that XLA calls share.
#pragma once

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

inline Array array_of(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), dtype_of(buffer.element_type())};
}

}  // namespace jaxbnb

// Defines and exports a handler.
#define JAXBNB_HANDLER(name, function, binding)                                           \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding)
