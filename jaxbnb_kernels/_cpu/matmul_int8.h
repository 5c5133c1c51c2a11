// The product of LLM.int8, as its handler and its kernels see it.
#pragma once

#include <stdint.h>

#include "array.h"
#include "isa.h"
#include "matmul_blockwise.h"
#include "parallel.h"

namespace jaxbnb {

// y = x @ W.T, where each row of x is quantised to int8 too. Columns of x with an outlier, which is
// at least the threshold, are multiplied by the decoded W instead. Nothing is empty.
struct Int8Product {
  Array x;                 // (tokens, size)
  Array y;                 // (tokens, rows), in the dtype of x
  const int8_t* codes;     // (rows, size)
  const float* col_scale;  // a scale for each row of W
  int64_t tokens, rows, size;
  float outlier_threshold;  // 0 if all columns are alike
  Dtype compute_dtype;      // of the outliers' product
  // Computes the outliers' product.
  void (*multiply)(const BlockwiseProduct& product, const Parallel& parallel);
};

JAXBNB_DECLARE_INT8(void multiply_int8(const Int8Product& product, const Parallel& parallel))

}  // namespace jaxbnb
