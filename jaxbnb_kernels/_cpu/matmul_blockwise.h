// The product with a blockwise-quantised matrix, as its handler and its kernels see it.
#pragma once

#include <stdint.h>

#include "array.h"
#include "code_kind.h"
#include "isa.h"
#include "parallel.h"

namespace jaxbnb {

// y = x @ W.T, or x @ W. W has `rows` rows of `size` elements, in blocks along a row.
struct BlockwiseProduct {
  const void* x;  // (tokens, size), or (tokens, rows) if not transposed
  void* y;        // (tokens, rows), or (tokens, size) if not transposed
  Dtype dtype;    // of x and y
  Dtype compute_dtype;

  const uint8_t* codes;  // (rows, stored); two 4-bit codes a byte, the first one in the high half
  const float* levels;   // the codebook, if any
  CodeKind kind;

  const float* absmax;             // (rows, blocks), or null if nested
  const uint8_t* absmax_codes;     // (rows, blocks), or null if not nested
  const float* absmax_levels;      // 256
  const float* nested_absmax;      // one for each nested_block_size absmax
  float offset;
  int64_t nested_block_size;

  int64_t tokens, rows, size, stored, blocks;
  int64_t block_size;  // a multiple of 32
  bool transpose;
};

JAXBNB_DECLARE_BF16(void multiply(const BlockwiseProduct& product, const Parallel& parallel))

}  // namespace jaxbnb
