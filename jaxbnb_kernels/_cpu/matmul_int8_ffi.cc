// The handler of `matmul_int8`: checks what XLA passes, and multiplies matrix by matrix.
#include "matmul_int8.h"

#include <string.h>

#include <string_view>

#include "handlers.h"
#include "huge_pages.h"

namespace jaxbnb {
namespace {

// Arrays have a leading axis of matrices.
ffi::Error matmul_int8(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S8> codes,
                       ffi::Buffer<ffi::F32> col_scale, ffi::Result<ffi::AnyBuffer> y,
                       float outlier_threshold, std::string_view compute_dtype) {
  const auto dtype = dtype_named(compute_dtype);
  if (!dtype || !is_float(x) || x.element_type() != y->element_type()) {
    return ffi::Error::InvalidArgument(
        "matmul_int8: x and y must have one dtype. It and the dtype of the product must be "
        "float32, bfloat16 or float16");
  }
  if (!has_rank(x, 3) || !has_rank(codes, 3) ||
      !has_shape(codes, {x.dimensions()[0], codes.dimensions()[1], x.dimensions()[2]}) ||
      !has_shape(*y, {x.dimensions()[0], x.dimensions()[1], codes.dimensions()[1]}) ||
      !has_count(col_scale, x.dimensions()[0] * codes.dimensions()[1])) {
    return ffi::Error::InvalidArgument(
        "matmul_int8: x must be (matrices, tokens, k), codes (matrices, n, k), y (matrices, "
        "tokens, n), and there must be a scale for each of the n rows of a matrix");
  }
  Int8Product product{};
  product.x = array_of(x);
  product.y = array_of(*y);
  product.tokens = x.dimensions()[1];
  product.rows = codes.dimensions()[1];
  product.size = codes.dimensions()[2];
  product.outlier_threshold = outlier_threshold;
  product.compute_dtype = *dtype;
  product.multiply = JAXBNB_CHOSEN_BF16(multiply);
  prefer_huge_pages(y->untyped_data(), y->size_bytes());
  // A sum of nothing is zero; the kernel always has something to add.
  if (product.size == 0) memset(y->untyped_data(), 0, y->size_bytes());
  const int64_t matrices = y->element_count() > 0 && product.size > 0 ? x.dimensions()[0] : 0;
  const ThreadPool threads(pool);
  for (int64_t i = 0; i < matrices; ++i) {
    product.x.data = static_cast<char*>(x.untyped_data()) + i * (x.size_bytes() / matrices);
    product.y.data = static_cast<char*>(y->untyped_data()) + i * (y->size_bytes() / matrices);
    product.codes = codes.typed_data() + i * product.rows * product.size;
    product.col_scale = col_scale.typed_data() + i * product.rows;
    JAXBNB_CHOSEN_INT8(multiply_int8)(product, threads);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxbnb

JAXBNB_HANDLER(jaxbnb_cpu_matmul_int8, jaxbnb::matmul_int8,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::Buffer<jaxbnb::ffi::S8>>()
                   .Arg<jaxbnb::ffi::Buffer<jaxbnb::ffi::F32>>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Attr<float>("outlier_threshold")
                   .Attr<std::string_view>("compute_dtype"));
