// What the codes of an array are: how wide, and how they stand for numbers.
#pragma once

#include <stdint.h>

namespace jaxbnb {

// Codes of 4 or 8 bits are the numbers of levels, from a codebook of 16 or 256. Linear codes are
// int8, and stand for code / 127. A dense matrix has
// no codes.
enum class CodeKind { k4Bit, k8Bit, kLinear, kDense };

inline CodeKind kind_of_codebook(int64_t levels) {
  return levels == 16 ? CodeKind::k4Bit : levels == 256 ? CodeKind::k8Bit : CodeKind::kLinear;
}

}  // namespace jaxbnb
