// The handler of `matmul_blockwise`: checks what XLA passes, and multiplies matrix by matrix.
#include "matmul_blockwise.h"

#include <string.h>

#include <optional>
#include <string_view>

#include "handlers.h"

namespace jaxbnb {
namespace {

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Whether x, W and y are (matrices, tokens, in), (matrices, rows, columns) and (matrices, tokens,
// out), for rows of `size` elements in any number of columns.
bool is_product(const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight, const ffi::AnyBuffer& y,
                int64_t size, bool transpose) {
  if (!has_rank(x, 3) || !has_rank(weight, 3)) return false;
  const auto of_w = weight.dimensions();
  const int64_t tokens = x.dimensions()[1], in = transpose ? size : of_w[1];
  return has_shape(x, {of_w[0], tokens, in}) &&
         has_shape(y, {of_w[0], tokens, transpose ? of_w[1] : size});
}

// Arrays have a leading axis of matrices. Without levels, codes are linear int8. `nested` is empty,
// or holds the nested absmax, the offset of each matrix, and the levels of absmax.
ffi::Error matmul_blockwise(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes,
                            ffi::AnyBuffer absmax, ffi::Buffer<ffi::F32> levels,
                            ffi::RemainingArgs nested, ffi::Result<ffi::AnyBuffer> y,
                            int64_t block_size, int64_t nested_block_size, int64_t size,
                            bool transpose, std::string_view compute_dtype) {
  const auto dtype = dtype_of(x.element_type()), dtype_of_product = dtype_named(compute_dtype);
  if (!dtype || !dtype_of_product || y->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument(
        "matmul_blockwise: x and y must have one dtype. It and the dtype of the product must be "
        "float32, bfloat16 or float16");
  }
  if (!is_size(block_size) || block_size % 32 != 0 || !is_size(nested_block_size) ||
      (size != 0 && !is_size(size))) {
    return ffi::Error::InvalidArgument(
        "matmul_blockwise: block_size must be a positive multiple of 32, nested_block_size "
        "positive, and size not negative");
  }
  const CodeKind kind = kind_of_codebook(levels.element_count());
  if (!are_codes(codes, levels) || !is_product(x, codes, *y, size, transpose) ||
      codes.dimensions()[2] != stored_size(kind, size)) {
    return ffi::Error::InvalidArgument(
        "matmul_blockwise: x must be (matrices, tokens, k), codes (matrices, rows, stored) and y "
        "(matrices, tokens, n). The codes of 16 or 256 levels must be uint8, and without levels "
        "int8");
  }
  const int64_t blocks = parts_in(size, block_size);
  if (absmax.element_type() != (nested.size() == 0 ? ffi::F32 : ffi::U8) ||
      !has_shape(absmax, {codes.dimensions()[0], codes.dimensions()[1], blocks})) {
    return ffi::Error::InvalidArgument(
        "matmul_blockwise: absmax must be (matrices, rows, blocks), and float32, or uint8 if "
        "nested");
  }
  BlockwiseProduct product{};
  product.dtype = *dtype;
  product.compute_dtype = *dtype_of_product;
  const int64_t matrices = codes.dimensions()[0];
  product.levels = levels.typed_data();
  product.kind = kind;
  product.tokens = x.dimensions()[1];
  product.rows = codes.dimensions()[1];
  product.stored = codes.dimensions()[2];
  product.blocks = blocks;
  product.size = size;
  product.block_size = block_size;
  product.nested_block_size = nested_block_size;
  product.transpose = transpose;
  const int64_t in = transpose ? size : product.rows, out = transpose ? product.rows : size;
  const int64_t bytes = bytes_of(product.dtype), absmaxes = product.rows * product.blocks;
  const int64_t entries = parts_in(absmaxes, nested_block_size);
  if (nested.size() != 0 &&
      (nested.size() != 3 || !has_floats(nested, 0, matrices * entries) ||
       !has_floats(nested, 1, matrices) || !has_floats(nested, 2, 256))) {
    return ffi::Error::InvalidArgument(
        "matmul_blockwise: after the levels follow nothing or three float32 arrays: nested absmax, "
        "an offset for each matrix, and 256 levels of absmax");
  }
  // A sum of nothing is zero; the kernel always has something to add.
  if (in == 0) memset(y->untyped_data(), 0, y->size_bytes());
  const ThreadPool threads(pool);
  for (int64_t i = 0; i < matrices && product.tokens * in * out > 0; ++i) {
    product.x = static_cast<const char*>(x.untyped_data()) + i * product.tokens * in * bytes;
    product.y = static_cast<char*>(y->untyped_data()) + i * product.tokens * out * bytes;
    product.codes =
        static_cast<const uint8_t*>(codes.untyped_data()) + i * product.rows * product.stored;
    if (nested.size() == 0) {
      product.absmax = static_cast<const float*>(absmax.untyped_data()) + i * absmaxes;
    } else {
      product.absmax_codes = static_cast<const uint8_t*>(absmax.untyped_data()) + i * absmaxes;
      product.nested_absmax = floats_of(nested, 0) + i * entries;
      product.offset = floats_of(nested, 1)[i];
      product.absmax_levels = floats_of(nested, 2);
    }
    JAXBNB_CHOSEN_BF16(multiply)(product, threads);
  }
  return ffi::Error::Success();
}

// Arrays have a leading axis of matrices of 16 bits. The product has their dtype; x and y may be
// float32 instead.
ffi::Error matmul_dense(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                        ffi::Result<ffi::AnyBuffer> y, bool transpose) {
  const auto dtype = dtype_of(x.element_type()), weight_dtype = dtype_of(weight.element_type());
  if (!dtype || !weight_dtype || bytes_of(*weight_dtype) != 2 ||
      y->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument(
        "matmul_dense: the matrix must be bfloat16 or float16. x and y must have one dtype, one of "
        "these or float32");
  }
  if (!has_rank(weight, 3) || !is_product(x, weight, *y, weight.dimensions()[2], transpose)) {
    return ffi::Error::InvalidArgument(
        "matmul_dense: x must be (matrices, tokens, k), the matrix (matrices, rows, columns) and y "
        "(matrices, tokens, n)");
  }
  // All rows share one block, as if they had a scale.
  static const float one = 1;
  BlockwiseProduct product{};
  product.dtype = *dtype;
  product.compute_dtype = *weight_dtype;
  product.kind = CodeKind::kDense;
  product.absmax = &one;
  product.tokens = x.dimensions()[1];
  product.rows = weight.dimensions()[1];
  product.size = weight.dimensions()[2];
  product.stored = 2 * product.size;
  product.block_size = (product.size + 63) / 64 * 64;
  product.transpose = transpose;
  const int64_t in = transpose ? product.size : product.rows;
  const int64_t out = transpose ? product.rows : product.size;
  const int64_t bytes = bytes_of(product.dtype);
  if (in == 0) memset(y->untyped_data(), 0, y->size_bytes());
  const ThreadPool threads(pool);
  for (int64_t i = 0; i < x.dimensions()[0] && product.tokens * in * out > 0; ++i) {
    product.x = static_cast<const char*>(x.untyped_data()) + i * product.tokens * in * bytes;
    product.y = static_cast<char*>(y->untyped_data()) + i * product.tokens * out * bytes;
    product.codes = static_cast<const uint8_t*>(weight.untyped_data()) + i * in * out * 2;
    JAXBNB_CHOSEN_BF16(multiply)(product, threads);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxbnb

JAXBNB_HANDLER(jaxbnb_cpu_matmul_dense, jaxbnb::matmul_dense,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Attr<bool>("transpose"));

JAXBNB_HANDLER(jaxbnb_cpu_matmul_blockwise, jaxbnb::matmul_blockwise,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::Buffer<jaxbnb::ffi::F32>>()
                   .RemainingArgs()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Attr<int64_t>("block_size")
                   .Attr<int64_t>("nested_block_size")
                   .Attr<int64_t>("size")
                   .Attr<bool>("transpose")
                   .Attr<std::string_view>("compute_dtype"));
