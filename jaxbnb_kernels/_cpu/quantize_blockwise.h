// Blockwise quantisation and its inverse, as their handlers and their kernels see them.
#pragma once

#include <stdint.h>

#include "array.h"
#include "code_kind.h"
#include "isa.h"
#include "parallel.h"

namespace jaxbnb {

// How to encode to 4 bits. Numbers have a rank, how many of the sorted points lie below them.
struct Points {
  float points[15];     // infinity where there are fewer
  uint8_t of_ranks[16];  // the code of each rank
};

// How to encode to 8 bits: `_cells.py` explains cells.
struct Cells {
  const int32_t* table;  // a decision point and two codes for each cell
  float lowest;
  int32_t shift, first;
  int32_t negative;  // how far behind the cells of positive numbers the ones of negative are
  bool is_signed;
  uint8_t of_nan;
};

// Rows of blocks of block_size elements, an even number; the last one of a row may be shorter. Two
// codes of 4 bits are a byte, the first one in the high half, and rows begin with a whole byte.
struct Quantize {
  Array x;
  uint8_t* codes;
  float* absmax;
  int64_t num_rows, row_size, block_size;
  CodeKind kind;
  Points points;  // for codes of 4 bits
  Cells cells;    // for codes of 8 bits
};

// Absmax in 8 bits: level * nested + offset, with an offset for each matrix. All absmax of a
// matrix, kNestedBlock of them for each nested absmax.
struct NestedAbsmax {
  static constexpr int64_t kNestedBlock = 256;

  const uint8_t* codes;  // null where absmax is float32
  const float* levels;
  const float* nested;
  const float* offset;
};

struct Dequantize {
  const uint8_t* codes;
  const int32_t* row_numbers;  // rows of codes for each row of the result; null for all in turn
  const float* absmax;         // a row for each row of the result
  NestedAbsmax nested;
  const float* levels;
  Array result;
  int64_t num_rows, row_size, block_size;
  int64_t rows_of_matrix;
  CodeKind kind;
};

JAXBNB_DECLARE(void quantize_blockwise(const Quantize& call, const Parallel& parallel))
JAXBNB_DECLARE(void dequantize_blockwise(const Dequantize& call, const Parallel& parallel))

}  // namespace jaxbnb
