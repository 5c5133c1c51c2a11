// The handler of `matmul_blockwise`: checks what XLA passes, and multiplies matrix by matrix.
#include "matmul_blockwise.h"

#include <string.h>

#include <optional>
#include <string_view>

#include "handlers.h"

namespace jaxbnb {
namespace {

std::optional<Dtype> supported(ffi::DataType type) {
  if (type == ffi::F32) return Dtype::kFloat32;
  if (type == ffi::BF16) return Dtype::kBfloat16;
  if (type == ffi::F16) return Dtype::kFloat16;
  return std::nullopt;
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Arrays have a leading axis of matrices. Without levels, codes are linear int8. `nested` is empty or holds the nested absmax, the offset
// of each matrix, and the levels of absmax.
ffi::Error matmul_blockwise(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes,
                            ffi::AnyBuffer absmax, ffi::Buffer<ffi::F32> levels,
                            ffi::RemainingArgs nested, ffi::Result<ffi::AnyBuffer> y,
                            int64_t block_size, int64_t nested_block_size, int64_t size,
                            bool transpose, std::string_view compute_dtype) {
  const auto dtype = supported(x.element_type()), dtype_of_product = dtype_named(compute_dtype);
  if (!dtype || !dtype_of_product || y->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument("x, y and the product are float32, bfloat16 or float16");
  }
  BlockwiseProduct product{};
  product.dtype = *dtype;
  product.compute_dtype = *dtype_of_product;
  const int64_t matrices = codes.dimensions()[0];
  product.levels = levels.typed_data();
  product.kind = kind_of_codebook(levels.element_count());
  product.tokens = x.dimensions()[1];
  product.rows = codes.dimensions()[1];
  product.stored = codes.dimensions()[2];
  product.blocks = absmax.dimensions()[2];
  product.size = size;
  product.block_size = block_size;
  product.nested_block_size = nested_block_size;
  product.transpose = transpose;
  const int64_t in = transpose ? size : product.rows, out = transpose ? product.rows : size;
  const int64_t bytes = bytes_of(product.dtype), absmaxes = product.rows * product.blocks;
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
      const auto nested_absmax = nested.get<ffi::Buffer<ffi::F32>>(0);
      const auto offset = nested.get<ffi::Buffer<ffi::F32>>(1);
      const auto absmax_levels = nested.get<ffi::Buffer<ffi::F32>>(2);
      if (!nested_absmax.has_value() || !offset.has_value() || !absmax_levels.has_value()) {
        return ffi::Error::InvalidArgument("nested absmax, offset and levels are float32");
      }
      const int64_t entries = nested_absmax->element_count() / matrices;
      product.absmax_codes = static_cast<const uint8_t*>(absmax.untyped_data()) + i * absmaxes;
      product.nested_absmax = nested_absmax->typed_data() + i * entries;
      product.offset = offset->typed_data()[i];
      product.absmax_levels = absmax_levels->typed_data();
    }
    JAXBNB_CHOSEN_BF16(multiply)(product, threads);
  }
  return ffi::Error::Success();
}

// Arrays have a leading axis of matrices of 16 bits. The product has their dtype; x and y may be
// float32 instead.
ffi::Error matmul_dense(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                        ffi::Result<ffi::AnyBuffer> y, bool transpose) {
  const auto dtype = supported(x.element_type()), weight_dtype = supported(weight.element_type());
  if (!dtype || !weight_dtype || bytes_of(*weight_dtype) != 2 ||
      y->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument("the matrix has 16 bits, and x and y have one dtype");
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
