// What a step with 8-bit moments is given: its arrays, and its rule as a program.
#pragma once

#include <stdint.h>

#include "array.h"
#include "isa.h"
#include "parallel.h"

namespace jaxbnb {

// Numbered as in `update_8bit/cpu_program.py`, which says what the operands mean.
enum class Op : int32_t {
  kCopy,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kMax,
  kMin,
  kAbs,
  kNeg,
  kSign,
  kSqrt,
  kRsqrt,
  kIsFinite,
  kLt,
  kLe,
  kEq,
  kNe,
  kNot,
  kSelect,
  kFma,
  kFms,
  kFnma,
  kSumOfProducts,
  kProduct,
  kDivBySum,
  kQuotient,
  kSqrtOfFma,
  kSelectFinite,
  kSelectFiniteSum,
  kCount
};

struct Instruction {
  Op op;
  int32_t to, a, b, c, d;

  bool operator==(const Instruction&) const = default;
};

constexpr int kMostMoments = 8, kMostValues = 128;

// A rule. Its values are numbered in this order: the gradient, the old moments and the parameter,
// if the step writes it; the result and the new moments; the scalars, the constants and what the
// first num_uniforms instructions compute, which are the same for all elements; temporaries.
struct Program {
  const Instruction* instructions;
  int64_t num_instructions, num_uniforms, num_temporaries;
  const float* constants;
  int64_t num_constants;
};

// One moment of all elements before and after the step, perhaps in the same memory.
struct Moment {
  const uint8_t* codes;
  const float* absmax;
  uint8_t* new_codes;
  float* new_absmax;
  bool is_signed;
};

// Examples of rows of blocks of block_size elements; the last block of a row may be shorter. Each
// example has its own scalars.
struct Step {
  Program program;
  int64_t num_examples, num_rows, row_size, block_size;
  const float* scalars;
  int64_t num_scalars;
  Array grad, param, result;  // no parameter where the result is an update
  Moment moments[kMostMoments];
  int num_moments;
};

JAXBNB_DECLARE(void update_8bit(const Step& step, const Parallel& parallel))

}  // namespace jaxbnb
