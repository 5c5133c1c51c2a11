// The handlers that XLA calls for blockwise quantisation, its inverse, and the look-up of rows.
#include "quantize_blockwise.h"

#include <string.h>

#include "handlers.h"
#include "huge_pages.h"

namespace jaxbnb {
namespace {

using U8 = ffi::Buffer<ffi::U8>;
using F32 = ffi::Buffer<ffi::F32>;

int64_t last_dimension(const ffi::AnyBuffer& array) { return array.dimensions().back(); }

// What is the same for all codes.
Quantize quantize_call(const ffi::AnyBuffer& x, void* codes, int64_t bytes, F32& absmax,
                       int64_t block_size) {
  Quantize call = {};
  call.x = array_of(x);
  call.codes = static_cast<uint8_t*>(codes);
  prefer_huge_pages(codes, bytes);
  call.absmax = absmax.typed_data();
  call.row_size = last_dimension(x);
  call.num_rows = x.element_count() / call.row_size;
  call.block_size = block_size;
  return call;
}

// To 4 bits: points are the 15 sorted decision points, codes the 16 that they separate.
ffi::Error quantize_4bit(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<U8> codes,
                         ffi::Result<F32> absmax, ffi::Span<const float> points,
                         ffi::Span<const uint8_t> of_ranks, int64_t block_size) {
  if (points.size() != 15 || of_ranks.size() != 16) {
    return ffi::Error::InvalidArgument("a codebook of 16 levels has 15 decision points");
  }
  if (x.element_count() == 0) return ffi::Error::Success();
  Quantize call =
      quantize_call(x, codes->untyped_data(), codes->size_bytes(), *absmax, block_size);
  call.kind = CodeKind::k4Bit;
  memcpy(call.points.points, points.begin(), sizeof(call.points.points));
  memcpy(call.points.of_ranks, of_ranks.begin(), sizeof(call.points.of_ranks));
  JAXBNB_CHOSEN(quantize_blockwise)(call, ThreadPool(pool));
  return ffi::Error::Success();
}

// To 8 bits, by a table of cells.
ffi::Error quantize_8bit(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> table,
                         ffi::Result<U8> codes, ffi::Result<F32> absmax, float lowest,
                         int64_t shift, int64_t first, int64_t per_sign, bool is_signed,
                         int64_t code_of_nan, int64_t block_size) {
  if (x.element_count() == 0) return ffi::Error::Success();
  Quantize call =
      quantize_call(x, codes->untyped_data(), codes->size_bytes(), *absmax, block_size);
  call.kind = CodeKind::k8Bit;
  call.cells = {table.typed_data(),
                lowest,
                static_cast<int32_t>(shift),
                static_cast<int32_t>(first),
                static_cast<int32_t>(per_sign),
                is_signed,
                static_cast<uint8_t>(code_of_nan)};
  JAXBNB_CHOSEN(quantize_blockwise)(call, ThreadPool(pool));
  return ffi::Error::Success();
}

// To linear int8.
ffi::Error quantize_linear(ffi::ThreadPool pool, ffi::AnyBuffer x,
                           ffi::Result<ffi::Buffer<ffi::S8>> codes, ffi::Result<F32> absmax,
                           int64_t block_size) {
  if (x.element_count() == 0) return ffi::Error::Success();
  Quantize call =
      quantize_call(x, codes->untyped_data(), codes->size_bytes(), *absmax, block_size);
  call.kind = CodeKind::kLinear;
  JAXBNB_CHOSEN(quantize_blockwise)(call, ThreadPool(pool));
  return ffi::Error::Success();
}

// An empty array of levels stands for linear int8. The absmax are float32; or, if nested is not empty, uint8, and it holds their levels, the nested
// absmax and an offset for each matrix.
ffi::Error dequantize(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::AnyBuffer absmax, F32 levels,
                      ffi::RemainingArgs nested, ffi::Result<ffi::AnyBuffer> result,
                      int64_t block_size) {
  if (result->element_count() == 0) return ffi::Error::Success();
  Dequantize call = {};
  call.codes = static_cast<const uint8_t*>(codes.untyped_data());
  call.levels = levels.typed_data();
  call.kind = kind_of_codebook(levels.element_count());
  call.result = array_of(*result);
  call.row_size = last_dimension(*result);
  call.num_rows = result->element_count() / call.row_size;
  call.block_size = block_size;
  call.rows_of_matrix = call.num_rows;
  prefer_huge_pages(result->untyped_data(), result->size_bytes());
  if (nested.size() == 0) {
    call.absmax = absmax.typed_data<float>();
  } else {
    const auto absmax_levels = nested.get<F32>(0), nested_absmax = nested.get<F32>(1);
    const auto offset = nested.get<F32>(2);
    if (!absmax_levels.has_value() || !nested_absmax.has_value() || !offset.has_value()) {
      return ffi::Error::InvalidArgument("the levels of absmax, nested absmax and offsets are f32");
    }
    call.nested = {absmax.typed_data<uint8_t>(), absmax_levels->typed_data(),
                   nested_absmax->typed_data(), offset->typed_data()};
    call.rows_of_matrix = call.num_rows / static_cast<int64_t>(offset->element_count());
  }
  JAXBNB_CHOSEN(dequantize_blockwise)(call, ThreadPool(pool));
  return ffi::Error::Success();
}

// Decodes the rows of these numbers, which exist; absmax are those of the rows looked up.
ffi::Error embed(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> row_numbers, F32 absmax, ffi::AnyBuffer codes,
                 F32 levels, ffi::Result<ffi::AnyBuffer> result, int64_t block_size) {
  if (result->element_count() == 0) return ffi::Error::Success();
  Dequantize call = {};
  call.codes = static_cast<const uint8_t*>(codes.untyped_data());
  call.row_numbers = row_numbers.typed_data();
  call.absmax = absmax.typed_data();
  call.levels = levels.typed_data();
  call.kind = kind_of_codebook(levels.element_count());
  call.result = array_of(*result);
  call.row_size = last_dimension(*result);
  call.num_rows = row_numbers.element_count();
  prefer_huge_pages(result->untyped_data(), result->size_bytes());
  call.block_size = block_size;
  JAXBNB_CHOSEN(dequantize_blockwise)(call, ThreadPool(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxbnb

JAXBNB_HANDLER(jaxbnb_cpu_quantize_4bit, jaxbnb::quantize_4bit,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Ret<jaxbnb::U8>()
                   .Ret<jaxbnb::F32>()
                   .Attr<jaxbnb::ffi::Span<const float>>("points")
                   .Attr<jaxbnb::ffi::Span<const uint8_t>>("codes")
                   .Attr<int64_t>("block_size"));

JAXBNB_HANDLER(jaxbnb_cpu_quantize_8bit, jaxbnb::quantize_8bit,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::Buffer<jaxbnb::ffi::S32>>()
                   .Ret<jaxbnb::U8>()
                   .Ret<jaxbnb::F32>()
                   .Attr<float>("lowest")
                   .Attr<int64_t>("shift")
                   .Attr<int64_t>("first")
                   .Attr<int64_t>("per_sign")
                   .Attr<bool>("is_signed")
                   .Attr<int64_t>("code_of_nan")
                   .Attr<int64_t>("block_size"));

JAXBNB_HANDLER(jaxbnb_cpu_quantize_linear, jaxbnb::quantize_linear,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Ret<jaxbnb::ffi::Buffer<jaxbnb::ffi::S8>>()
                   .Ret<jaxbnb::F32>()
                   .Attr<int64_t>("block_size"));

JAXBNB_HANDLER(jaxbnb_cpu_dequantize_blockwise, jaxbnb::dequantize,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::F32>()
                   .RemainingArgs()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Attr<int64_t>("block_size"));

JAXBNB_HANDLER(jaxbnb_cpu_embed_blockwise, jaxbnb::embed,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::Buffer<jaxbnb::ffi::S32>>()
                   .Arg<jaxbnb::F32>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::F32>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Attr<int64_t>("block_size"));
