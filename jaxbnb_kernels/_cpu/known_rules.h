// The rules of our optimizers, for the C++ compiler: written by tests/kernels/known_rules.py.
#pragma once

#include "update_8bit.h"

namespace jaxbnb {

// See `Step` and `Program`.
struct KnownRule {
  int num_moments;
  bool is_signed[3];
  bool has_param;
  int num_scalars, num_uniforms, num_temporaries, num_constants;
  float constants[2];
  int num_instructions;
  Instruction instructions[16];
};

constexpr KnownRule kKnownRules[] = {
    // adam, an update
    {2, {true, false}, false, 9, 0, 3, 1, {0.0f}, 9,
     {{Op::kSumOfProducts, 16, 6, 1, 13, 0}, {Op::kProduct, 17, 14, 0, 0, 0},
      {Op::kFma, 17, 7, 2, 17, 0}, {Op::kProduct, 18, 0, 0, 15, 0},
      {Op::kSelectFiniteSum, 4, 16, 18, 16, 1}, {Op::kSelectFiniteSum, 5, 17, 18, 17, 2},
      {Op::kSqrtOfFma, 17, 5, 12, 9, 0}, {Op::kQuotient, 17, 4, 10, 17, 8},
      {Op::kAdd, 3, 17, 18, 0, 0}}},
    // adam, a step
    {2, {true, false}, true, 10, 1, 3, 1, {0.0f}, 11,
     {{Op::kNeg, 18, 11, 0, 0, 0}, {Op::kSumOfProducts, 19, 7, 1, 15, 0},
      {Op::kProduct, 20, 16, 0, 0, 0}, {Op::kFma, 20, 8, 2, 20, 0},
      {Op::kProduct, 21, 0, 0, 17, 0}, {Op::kSelectFiniteSum, 5, 19, 21, 19, 1},
      {Op::kSelectFiniteSum, 6, 20, 21, 20, 2}, {Op::kSqrtOfFma, 20, 6, 14, 10, 0},
      {Op::kQuotient, 20, 5, 12, 20, 9}, {Op::kAdd, 20, 20, 21, 0, 0},
      {Op::kFma, 4, 18, 20, 3, 0}}},
    // adam, a step with weight decay
    {2, {true, false}, true, 11, 1, 3, 1, {0.0f}, 12,
     {{Op::kNeg, 19, 11, 0, 0, 0}, {Op::kSumOfProducts, 20, 7, 1, 15, 0},
      {Op::kProduct, 21, 16, 0, 0, 0}, {Op::kFma, 21, 8, 2, 21, 0},
      {Op::kProduct, 22, 0, 0, 18, 0}, {Op::kSelectFiniteSum, 5, 20, 22, 20, 1},
      {Op::kSelectFiniteSum, 6, 21, 22, 21, 2}, {Op::kSqrtOfFma, 21, 6, 14, 10, 0},
      {Op::kQuotient, 21, 5, 12, 21, 9}, {Op::kAdd, 21, 21, 22, 0, 0},
      {Op::kFma, 21, 17, 3, 21, 0}, {Op::kFma, 4, 19, 21, 3, 0}}},
    // nadam, an update
    {2, {true, false}, false, 9, 0, 4, 1, {0.0f}, 12,
     {{Op::kMul, 16, 13, 0, 0, 0}, {Op::kFma, 17, 6, 1, 16, 0}, {Op::kProduct, 18, 14, 0, 0, 0},
      {Op::kFma, 18, 7, 2, 18, 0}, {Op::kProduct, 19, 0, 0, 15, 0},
      {Op::kSelectFiniteSum, 4, 17, 19, 17, 1}, {Op::kSelectFiniteSum, 5, 18, 19, 18, 2},
      {Op::kMul, 18, 6, 4, 0, 0}, {Op::kSumOfProducts, 18, 18, 11, 16, 10},
      {Op::kSqrtOfFma, 16, 5, 12, 9, 0}, {Op::kDivBySum, 16, 18, 16, 8, 0},
      {Op::kAdd, 3, 16, 19, 0, 0}}},
    // nadam, a step
    {2, {true, false}, true, 10, 1, 4, 1, {0.0f}, 14,
     {{Op::kNeg, 18, 11, 0, 0, 0}, {Op::kMul, 19, 15, 0, 0, 0}, {Op::kFma, 20, 7, 1, 19, 0},
      {Op::kProduct, 21, 16, 0, 0, 0}, {Op::kFma, 21, 8, 2, 21, 0},
      {Op::kProduct, 22, 0, 0, 17, 0}, {Op::kSelectFiniteSum, 5, 20, 22, 20, 1},
      {Op::kSelectFiniteSum, 6, 21, 22, 21, 2}, {Op::kMul, 21, 7, 5, 0, 0},
      {Op::kSumOfProducts, 21, 21, 13, 19, 12}, {Op::kSqrtOfFma, 19, 6, 14, 10, 0},
      {Op::kDivBySum, 19, 21, 19, 9, 0}, {Op::kAdd, 19, 19, 22, 0, 0},
      {Op::kFma, 4, 18, 19, 3, 0}}},
    // nadam, a step with weight decay
    {2, {true, false}, true, 11, 1, 4, 1, {0.0f}, 15,
     {{Op::kNeg, 19, 11, 0, 0, 0}, {Op::kMul, 20, 15, 0, 0, 0}, {Op::kFma, 21, 7, 1, 20, 0},
      {Op::kProduct, 22, 16, 0, 0, 0}, {Op::kFma, 22, 8, 2, 22, 0},
      {Op::kProduct, 23, 0, 0, 18, 0}, {Op::kSelectFiniteSum, 5, 21, 23, 21, 1},
      {Op::kSelectFiniteSum, 6, 22, 23, 22, 2}, {Op::kMul, 22, 7, 5, 0, 0},
      {Op::kSumOfProducts, 22, 22, 13, 20, 12}, {Op::kSqrtOfFma, 20, 6, 14, 10, 0},
      {Op::kDivBySum, 20, 22, 20, 9, 0}, {Op::kAdd, 20, 20, 23, 0, 0},
      {Op::kFma, 20, 17, 3, 20, 0}, {Op::kFma, 4, 19, 20, 3, 0}}},
    // lion, an update
    {1, {true}, false, 4, 0, 2, 1, {0.0f}, 6,
     {{Op::kSumOfProducts, 9, 5, 1, 7, 0}, {Op::kProduct, 10, 0, 0, 8, 0},
      {Op::kSelectFiniteSum, 3, 9, 10, 9, 1}, {Op::kSumOfProducts, 9, 6, 0, 4, 1},
      {Op::kSign, 9, 9, 0, 0, 0}, {Op::kAdd, 2, 9, 10, 0, 0}}},
    // lion, a step with weight decay
    {1, {true}, true, 6, 1, 2, 1, {0.0f}, 9,
     {{Op::kNeg, 12, 7, 0, 0, 0}, {Op::kSumOfProducts, 13, 6, 1, 9, 0},
      {Op::kProduct, 14, 0, 0, 11, 0}, {Op::kSelectFiniteSum, 4, 13, 14, 13, 1},
      {Op::kSumOfProducts, 13, 8, 0, 5, 1}, {Op::kSign, 13, 13, 0, 0, 0},
      {Op::kAdd, 13, 13, 14, 0, 0}, {Op::kFma, 13, 10, 2, 13, 0}, {Op::kFma, 3, 12, 13, 2, 0}}},
    // momentum, an update
    {1, {true}, false, 2, 0, 2, 1, {0.0f}, 4,
     {{Op::kSumOfProducts, 7, 5, 0, 4, 1}, {Op::kProduct, 8, 0, 0, 6, 0},
      {Op::kSelectFiniteSum, 3, 7, 8, 7, 1}, {Op::kAdd, 2, 3, 8, 0, 0}}},
    // momentum, a step
    {1, {true}, true, 3, 1, 2, 1, {0.0f}, 6,
     {{Op::kNeg, 9, 7, 0, 0, 0}, {Op::kSumOfProducts, 10, 6, 0, 5, 1},
      {Op::kProduct, 11, 0, 0, 8, 0}, {Op::kSelectFiniteSum, 4, 10, 11, 10, 1},
      {Op::kAdd, 11, 4, 11, 0, 0}, {Op::kFma, 3, 9, 11, 2, 0}}},
    // nesterov, an update
    {1, {true}, false, 2, 0, 2, 1, {0.0f}, 5,
     {{Op::kSumOfProducts, 7, 5, 0, 4, 1}, {Op::kProduct, 8, 0, 0, 6, 0},
      {Op::kSelectFiniteSum, 3, 7, 8, 7, 1}, {Op::kFma, 7, 4, 3, 0, 0}, {Op::kAdd, 2, 7, 8, 0, 0}}},
    // nesterov, a step
    {1, {true}, true, 3, 1, 2, 1, {0.0f}, 7,
     {{Op::kNeg, 9, 7, 0, 0, 0}, {Op::kSumOfProducts, 10, 6, 0, 5, 1},
      {Op::kProduct, 11, 0, 0, 8, 0}, {Op::kSelectFiniteSum, 4, 10, 11, 10, 1},
      {Op::kFma, 10, 5, 4, 0, 0}, {Op::kAdd, 10, 10, 11, 0, 0}, {Op::kFma, 3, 9, 10, 2, 0}}},
    // rmsprop, an update
    {1, {false}, false, 4, 0, 2, 1, {0.0f}, 7,
     {{Op::kProduct, 9, 7, 0, 0, 0}, {Op::kFma, 9, 5, 1, 9, 0}, {Op::kProduct, 10, 0, 0, 8, 0},
      {Op::kSelectFiniteSum, 3, 9, 10, 9, 1}, {Op::kFma, 9, 3, 4, 6, 0},
      {Op::kRsqrt, 9, 9, 0, 0, 0}, {Op::kFma, 2, 9, 0, 10, 0}}},
    // rmsprop, a step
    {1, {false}, true, 5, 1, 2, 1, {0.0f}, 9,
     {{Op::kNeg, 11, 8, 0, 0, 0}, {Op::kProduct, 12, 9, 0, 0, 0}, {Op::kFma, 12, 6, 1, 12, 0},
      {Op::kProduct, 13, 0, 0, 10, 0}, {Op::kSelectFiniteSum, 4, 12, 13, 12, 1},
      {Op::kFma, 12, 4, 5, 7, 0}, {Op::kRsqrt, 12, 12, 0, 0, 0}, {Op::kFma, 12, 12, 0, 13, 0},
      {Op::kFma, 3, 11, 12, 2, 0}}},
    // rmsprop_eps_outside, an update
    {1, {false}, false, 4, 0, 2, 1, {0.0f}, 8,
     {{Op::kProduct, 9, 7, 0, 0, 0}, {Op::kFma, 9, 5, 1, 9, 0}, {Op::kProduct, 10, 0, 0, 8, 0},
      {Op::kSelectFiniteSum, 3, 9, 10, 9, 1}, {Op::kMul, 9, 3, 4, 0, 0},
      {Op::kSqrt, 9, 9, 0, 0, 0}, {Op::kDivBySum, 9, 0, 9, 6, 0}, {Op::kAdd, 2, 9, 10, 0, 0}}},
    // rmsprop_eps_outside, a step
    {1, {false}, true, 5, 1, 2, 1, {0.0f}, 10,
     {{Op::kNeg, 11, 8, 0, 0, 0}, {Op::kProduct, 12, 9, 0, 0, 0}, {Op::kFma, 12, 6, 1, 12, 0},
      {Op::kProduct, 13, 0, 0, 10, 0}, {Op::kSelectFiniteSum, 4, 12, 13, 12, 1},
      {Op::kMul, 12, 4, 5, 0, 0}, {Op::kSqrt, 12, 12, 0, 0, 0}, {Op::kDivBySum, 12, 0, 12, 7, 0},
      {Op::kAdd, 12, 12, 13, 0, 0}, {Op::kFma, 3, 11, 12, 2, 0}}},
    // centered, an update
    {2, {true, false}, false, 4, 0, 3, 2, {0.0f, 16.0f}, 14,
     {{Op::kMul, 12, 9, 0, 0, 0}, {Op::kFma, 13, 7, 1, 12, 0},
      {Op::kSumOfProducts, 12, 7, 2, 12, 0}, {Op::kProduct, 14, 0, 0, 10, 0},
      {Op::kSelectFiniteSum, 4, 13, 14, 13, 1}, {Op::kSelectFiniteSum, 5, 12, 14, 12, 2},
      {Op::kMul, 12, 4, 6, 0, 0}, {Op::kMul, 13, 5, 6, 0, 0}, {Op::kFnma, 12, 12, 12, 13, 0},
      {Op::kDiv, 13, 13, 11, 0, 0}, {Op::kMax, 13, 12, 13, 0, 0}, {Op::kAdd, 13, 13, 8, 0, 0},
      {Op::kRsqrt, 13, 13, 0, 0, 0}, {Op::kFma, 3, 13, 0, 14, 0}}},
    // centered, a step
    {2, {true, false}, true, 5, 1, 3, 2, {0.0f, 16.0f}, 16,
     {{Op::kNeg, 14, 10, 0, 0, 0}, {Op::kMul, 15, 11, 0, 0, 0}, {Op::kFma, 16, 8, 1, 15, 0},
      {Op::kSumOfProducts, 15, 8, 2, 15, 0}, {Op::kProduct, 17, 0, 0, 12, 0},
      {Op::kSelectFiniteSum, 5, 16, 17, 16, 1}, {Op::kSelectFiniteSum, 6, 15, 17, 15, 2},
      {Op::kMul, 15, 5, 7, 0, 0}, {Op::kMul, 16, 6, 7, 0, 0}, {Op::kFnma, 15, 15, 15, 16, 0},
      {Op::kDiv, 16, 16, 13, 0, 0}, {Op::kMax, 16, 15, 16, 0, 0}, {Op::kAdd, 16, 16, 9, 0, 0},
      {Op::kRsqrt, 16, 16, 0, 0, 0}, {Op::kFma, 16, 16, 0, 17, 0}, {Op::kFma, 4, 14, 16, 3, 0}}},
    // centered_eps_outside, an update
    {2, {true, false}, false, 4, 0, 3, 2, {0.0f, 16.0f}, 14,
     {{Op::kMul, 12, 9, 0, 0, 0}, {Op::kFma, 13, 7, 1, 12, 0},
      {Op::kSumOfProducts, 12, 7, 2, 12, 0}, {Op::kProduct, 14, 0, 0, 10, 0},
      {Op::kSelectFiniteSum, 4, 13, 14, 13, 1}, {Op::kSelectFiniteSum, 5, 12, 14, 12, 2},
      {Op::kMul, 12, 4, 6, 0, 0}, {Op::kMul, 13, 5, 6, 0, 0}, {Op::kFnma, 12, 12, 12, 13, 0},
      {Op::kDiv, 13, 13, 11, 0, 0}, {Op::kMax, 13, 12, 13, 0, 0}, {Op::kSqrt, 13, 13, 0, 0, 0},
      {Op::kDivBySum, 13, 0, 13, 8, 0}, {Op::kAdd, 3, 13, 14, 0, 0}}},
    // centered_eps_outside, a step
    {2, {true, false}, true, 5, 1, 3, 2, {0.0f, 16.0f}, 16,
     {{Op::kNeg, 14, 10, 0, 0, 0}, {Op::kMul, 15, 11, 0, 0, 0}, {Op::kFma, 16, 8, 1, 15, 0},
      {Op::kSumOfProducts, 15, 8, 2, 15, 0}, {Op::kProduct, 17, 0, 0, 12, 0},
      {Op::kSelectFiniteSum, 5, 16, 17, 16, 1}, {Op::kSelectFiniteSum, 6, 15, 17, 15, 2},
      {Op::kMul, 15, 5, 7, 0, 0}, {Op::kMul, 16, 6, 7, 0, 0}, {Op::kFnma, 15, 15, 15, 16, 0},
      {Op::kDiv, 16, 16, 13, 0, 0}, {Op::kMax, 16, 15, 16, 0, 0}, {Op::kSqrt, 16, 16, 0, 0, 0},
      {Op::kDivBySum, 16, 0, 16, 9, 0}, {Op::kAdd, 16, 16, 17, 0, 0}, {Op::kFma, 4, 14, 16, 3, 0}}},
    // adagrad, an update
    {1, {false}, false, 1, 0, 3, 1, {0.0f}, 9,
     {{Op::kMul, 6, 0, 0, 0, 0}, {Op::kAdd, 7, 1, 6, 0, 0}, {Op::kMul, 6, 5, 6, 0, 0},
      {Op::kSelectFiniteSum, 3, 7, 6, 7, 1}, {Op::kLt, 7, 5, 3, 0, 0}, {Op::kAdd, 8, 3, 4, 0, 0},
      {Op::kRsqrt, 8, 8, 0, 0, 0}, {Op::kSelect, 8, 7, 8, 5, 0}, {Op::kFma, 2, 8, 0, 6, 0}}},
    // adagrad, a step
    {1, {false}, true, 2, 1, 3, 1, {0.0f}, 11,
     {{Op::kNeg, 8, 6, 0, 0, 0}, {Op::kMul, 9, 0, 0, 0, 0}, {Op::kAdd, 10, 1, 9, 0, 0},
      {Op::kMul, 9, 7, 9, 0, 0}, {Op::kSelectFiniteSum, 4, 10, 9, 10, 1},
      {Op::kLt, 10, 7, 4, 0, 0}, {Op::kAdd, 11, 4, 5, 0, 0}, {Op::kRsqrt, 11, 11, 0, 0, 0},
      {Op::kSelect, 11, 10, 11, 7, 0}, {Op::kFma, 11, 11, 0, 9, 0}, {Op::kFma, 3, 8, 11, 2, 0}}},
    // ademamix, an update
    {3, {true, true, false}, false, 11, 0, 4, 1, {0.0f}, 12,
     {{Op::kSumOfProducts, 20, 9, 1, 16, 0}, {Op::kSumOfProducts, 21, 11, 2, 18, 0},
      {Op::kProduct, 22, 17, 0, 0, 0}, {Op::kFma, 22, 10, 3, 22, 0},
      {Op::kProduct, 23, 0, 0, 19, 0}, {Op::kSelectFiniteSum, 5, 20, 23, 20, 1},
      {Op::kSelectFiniteSum, 6, 21, 23, 21, 2}, {Op::kSelectFiniteSum, 7, 22, 23, 22, 3},
      {Op::kSqrtOfFma, 22, 7, 15, 13, 0}, {Op::kSumOfProducts, 21, 5, 14, 8, 6},
      {Op::kDivBySum, 22, 21, 22, 12, 0}, {Op::kAdd, 4, 22, 23, 0, 0}}},
    // ademamix, a step with weight decay
    {3, {true, true, false}, true, 13, 1, 4, 1, {0.0f}, 15,
     {{Op::kNeg, 23, 15, 0, 0, 0}, {Op::kSumOfProducts, 24, 10, 1, 18, 0},
      {Op::kSumOfProducts, 25, 12, 2, 20, 0}, {Op::kProduct, 26, 19, 0, 0, 0},
      {Op::kFma, 26, 11, 3, 26, 0}, {Op::kProduct, 27, 0, 0, 22, 0},
      {Op::kSelectFiniteSum, 6, 24, 27, 24, 1}, {Op::kSelectFiniteSum, 7, 25, 27, 25, 2},
      {Op::kSelectFiniteSum, 8, 26, 27, 26, 3}, {Op::kSqrtOfFma, 26, 8, 17, 14, 0},
      {Op::kSumOfProducts, 25, 6, 16, 9, 7}, {Op::kDivBySum, 26, 25, 26, 13, 0},
      {Op::kAdd, 26, 26, 27, 0, 0}, {Op::kFma, 26, 21, 4, 26, 0}, {Op::kFma, 5, 23, 26, 4, 0}}},
};

constexpr int kNumKnownRules = 24;

}  // namespace jaxbnb
