// What the handlers that XLA calls share.
//
// A handler checks what XLA passes before a kernel reads or writes memory: a program may be written
// by hand, or exported by another version.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string_view>

#include "array.h"
#include "code_kind.h"
#include "thread_pool.h"
#include "xla/ffi/api/ffi.h"

namespace jaxbnb {

namespace ffi = ::xla::ffi;

// The dtype of an array that kernels read or write numbers of, or nothing for other dtypes.
inline std::optional<Dtype> dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return Dtype::kFloat32;
    case ffi::DataType::BF16:
      return Dtype::kBfloat16;
    case ffi::DataType::F16:
      return Dtype::kFloat16;
    default:
      return std::nullopt;
  }
}

template <class Buffer>
bool is_float(const Buffer& buffer) {
  return dtype_of(buffer.element_type()).has_value();
}

// The dtype of a product is an attribute, which has no type of its own for dtypes.
inline std::optional<Dtype> dtype_named(std::string_view name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBfloat16;
  if (name == "float16") return Dtype::kFloat16;
  return std::nullopt;
}

// The caller has checked that it is_float.
inline Array array_of(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), *dtype_of(buffer.element_type())};
}

template <class Buffer>
bool has_rank(const Buffer& buffer, size_t rank) {
  return buffer.dimensions().size() == rank;
}

template <class Buffer>
bool has_shape(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dimensions = buffer.dimensions();
  return std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end());
}

template <class Buffer>
bool has_shape_of(const Buffer& buffer, const Buffer& other) {
  const auto a = buffer.dimensions(), b = other.dimensions();
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

template <class Buffer>
bool has_count(const Buffer& buffer, int64_t count) {
  return static_cast<int64_t>(buffer.element_count()) == count;
}

// Whether a remaining operand holds so many float32 numbers, and where they are.
inline bool has_floats(const ffi::RemainingArgs& operands, size_t index, int64_t count) {
  const auto buffer = operands.get<ffi::Buffer<ffi::F32>>(index);
  return buffer.has_value() && has_count(*buffer, count);
}
inline const float* floats_of(const ffi::RemainingArgs& operands, size_t index) {
  return operands.get<ffi::Buffer<ffi::F32>>(index)->typed_data();
}

// Whether an attribute can be a number of elements: positive, and so small that sums of a few do
// not overflow.
inline bool is_size(int64_t size) { return size > 0 && size <= int64_t{1} << 48; }

// `size` is not negative.
inline int64_t parts_in(int64_t size, int64_t part) { return size / part + (size % part != 0); }

// Whether there is a kind of codes with so many levels, and whether these are codes of that kind.
template <class Levels>
bool are_codes(const ffi::AnyBuffer& codes, const Levels& levels) {
  const int64_t count = levels.element_count();
  const bool is_linear = count == 0;
  return (is_linear || count == 16 || count == 256) &&
         codes.element_type() == (is_linear ? ffi::S8 : ffi::U8);
}

// The bytes of a row of codes.
inline int64_t stored_size(CodeKind kind, int64_t elements) {
  return kind == CodeKind::k4Bit ? parts_in(elements, 2) : elements;
}

}  // namespace jaxbnb

// Defines and exports a handler.
#define JAXBNB_HANDLER(name, function, binding)                                           \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding)
