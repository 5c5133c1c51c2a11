// The handlers that XLA calls for blockwise quantisation, its inverse, and the look-up of rows.
#include "quantize_blockwise.h"

#include <string.h>

#include <bit>

#include "handlers.h"
#include "huge_pages.h"

namespace jaxbnb {
namespace {

using U8 = ffi::Buffer<ffi::U8>;
using F32 = ffi::Buffer<ffi::F32>;

int64_t last_dimension(const ffi::AnyBuffer& array) { return array.dimensions().back(); }

// The number of rows; none are empty.
int64_t rows_of(const ffi::AnyBuffer& array) {
  const int64_t count = array.element_count();
  return count == 0 ? 0 : count / last_dimension(array);
}

// Whether x has rows of blocks, and an absmax for each.
template <class Absmax>
bool has_blocks(const ffi::AnyBuffer& x, const Absmax& absmax, CodeKind kind, int64_t block_size) {
  const bool is_block = is_size(block_size) && (kind != CodeKind::k4Bit || block_size % 2 == 0);
  return is_block && is_float(x) && !has_rank(x, 0) &&
         has_count(absmax, rows_of(x) * parts_in(last_dimension(x), block_size));
}

// Whether there is a code for each number of x.
template <class Codes>
bool has_codes(const ffi::AnyBuffer& x, const Codes& codes, CodeKind kind) {
  return has_count(codes, rows_of(x) * stored_size(kind, last_dimension(x)));
}

ffi::Error not_blocks() {
  return ffi::Error::InvalidArgument(
      "quantize_blockwise: numbers must be float32, bfloat16 or float16, in rows of blocks of "
      "block_size, which is positive, and even for codes of 4 bits. Each row must have a code for "
      "each number, two to a byte if they have 4 bits, and an absmax for each block");
}

ffi::Error not_decodable() {
  return ffi::Error::InvalidArgument(
      "dequantize_blockwise: there must be 16 or 256 levels, whose codes are uint8, or none, for "
      "codes of int8. absmax must be float32, or uint8 if nested");
}

ffi::Error not_nested() {
  return ffi::Error::InvalidArgument(
      "dequantize_blockwise: after the levels follow nothing or three float32 arrays: 256 levels "
      "of absmax, nested absmax, and an offset for each matrix");
}

// What is the same for all codes.
Quantize quantize_call(const ffi::AnyBuffer& x, void* codes, int64_t bytes, F32& absmax,
                       int64_t block_size) {
  Quantize call = {};
  call.x = array_of(x);
  call.codes = static_cast<uint8_t*>(codes);
  prefer_huge_pages(codes, bytes);
  call.absmax = absmax.typed_data();
  call.row_size = last_dimension(x);
  call.num_rows = rows_of(x);
  call.block_size = block_size;
  return call;
}

// To 4 bits: points are the 15 sorted decision points, codes the 16 that they separate.
ffi::Error quantize_4bit(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<U8> codes,
                         ffi::Result<F32> absmax, ffi::Span<const float> points,
                         ffi::Span<const uint8_t> of_ranks, int64_t block_size) {
  if (points.size() != 15 || of_ranks.size() != 16) {
    return ffi::Error::InvalidArgument(
        "quantize_blockwise: a codebook of 16 levels must have 15 decision points");
  }
  if (!has_blocks(x, *absmax, CodeKind::k4Bit, block_size) ||
      !has_codes(x, *codes, CodeKind::k4Bit)) {
    return not_blocks();
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

// Whether numbers up to 1 lie in cells of the table; see `_cells.py`.
bool are_cells(const ffi::Buffer<ffi::S32>& table, float lowest, int64_t shift, int64_t first,
               int64_t per_sign, bool is_signed) {
  if (!(lowest > 0 && lowest <= 1) || shift < 0 || shift > 23) return false;
  const auto cell_of = [=](float x) { return int64_t{std::bit_cast<int32_t>(x) >> shift}; };
  return first == cell_of(lowest) && per_sign == cell_of(1) - first + 1 &&
         has_count(table, 2 * per_sign * (is_signed ? 2 : 1));
}

// To 8 bits, by a table of cells.
ffi::Error quantize_8bit(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> table,
                         ffi::Result<U8> codes, ffi::Result<F32> absmax, float lowest,
                         int64_t shift, int64_t first, int64_t per_sign, bool is_signed,
                         int64_t code_of_nan, int64_t block_size) {
  if (!are_cells(table, lowest, shift, first, per_sign, is_signed)) {
    return ffi::Error::InvalidArgument(
        "quantize_blockwise: the table must have two numbers for each cell, up to that of 1");
  }
  if (!has_blocks(x, *absmax, CodeKind::k8Bit, block_size) ||
      !has_codes(x, *codes, CodeKind::k8Bit)) {
    return not_blocks();
  }
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
  if (!has_blocks(x, *absmax, CodeKind::kLinear, block_size) ||
      !has_codes(x, *codes, CodeKind::kLinear)) {
    return not_blocks();
  }
  if (x.element_count() == 0) return ffi::Error::Success();
  Quantize call =
      quantize_call(x, codes->untyped_data(), codes->size_bytes(), *absmax, block_size);
  call.kind = CodeKind::kLinear;
  JAXBNB_CHOSEN(quantize_blockwise)(call, ThreadPool(pool));
  return ffi::Error::Success();
}

// An empty array of levels stands for linear int8. The absmax are float32. Or they are uint8, and
// `nested` holds their levels, the nested absmax and an offset for each matrix.
ffi::Error dequantize(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::AnyBuffer absmax, F32 levels,
                      ffi::RemainingArgs nested, ffi::Result<ffi::AnyBuffer> result,
                      int64_t block_size) {
  const CodeKind kind = kind_of_codebook(levels.element_count());
  if (!has_blocks(*result, absmax, kind, block_size) || !has_codes(*result, codes, kind)) {
    return not_blocks();
  }
  if (!are_codes(codes, levels) ||
      absmax.element_type() != (nested.size() == 0 ? ffi::F32 : ffi::U8)) {
    return not_decodable();
  }
  if (result->element_count() == 0) return ffi::Error::Success();
  Dequantize call = {};
  call.codes = static_cast<const uint8_t*>(codes.untyped_data());
  call.levels = levels.typed_data();
  call.kind = kind;
  call.result = array_of(*result);
  call.row_size = last_dimension(*result);
  call.num_rows = rows_of(*result);
  call.block_size = block_size;
  call.rows_of_matrix = call.num_rows;
  prefer_huge_pages(result->untyped_data(), result->size_bytes());
  if (nested.size() == 0) {
    call.absmax = absmax.typed_data<float>();
  } else {
    const auto offset = nested.get<F32>(2);
    const int64_t matrices = offset.has_value() ? offset->element_count() : 0;
    if (matrices == 0 || call.num_rows % matrices != 0) return not_nested();
    call.rows_of_matrix = call.num_rows / matrices;
    const int64_t blocks = call.rows_of_matrix * parts_in(call.row_size, block_size);
    const int64_t entries = parts_in(blocks, NestedAbsmax::kNestedBlock);
    if (nested.size() != 3 || !has_floats(nested, 0, 256) ||
        !has_floats(nested, 1, matrices * entries)) {
      return not_nested();
    }
    call.nested = {absmax.typed_data<uint8_t>(), floats_of(nested, 0), floats_of(nested, 1),
                   offset->typed_data()};
  }
  JAXBNB_CHOSEN(dequantize_blockwise)(call, ThreadPool(pool));
  return ffi::Error::Success();
}

// Decodes the rows of these numbers; absmax are those of the rows looked up.
ffi::Error embed(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> row_numbers, F32 absmax,
                 ffi::AnyBuffer codes, F32 levels, ffi::Result<ffi::AnyBuffer> result,
                 int64_t block_size) {
  const CodeKind kind = kind_of_codebook(levels.element_count());
  if (!has_blocks(*result, absmax, kind, block_size)) return not_blocks();
  if (!are_codes(codes, levels)) return not_decodable();
  const int64_t size = last_dimension(*result);
  if (!has_rank(codes, 2) || codes.dimensions()[1] != stored_size(kind, size) ||
      !has_shape(*result, {static_cast<int64_t>(row_numbers.element_count()), size})) {
    return ffi::Error::InvalidArgument(
        "embed_blockwise: codes must be (rows, stored), and the result must have a row for each "
        "row number");
  }
  if (result->element_count() == 0) return ffi::Error::Success();
  const int32_t* const numbers = row_numbers.typed_data();
  const int64_t rows = codes.dimensions()[0];
  if (!std::all_of(numbers, numbers + row_numbers.element_count(),
                   [=](int32_t number) { return number >= 0 && number < rows; })) {
    return ffi::Error::InvalidArgument("embed_blockwise: a row number must be that of a row");
  }
  Dequantize call = {};
  call.codes = static_cast<const uint8_t*>(codes.untyped_data());
  call.row_numbers = numbers;
  call.absmax = absmax.typed_data();
  call.levels = levels.typed_data();
  call.kind = kind;
  call.result = array_of(*result);
  call.row_size = size;
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
