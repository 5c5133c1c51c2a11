// Reads and writes arrays of any floating-point dtype as float32.
#pragma once

#include <string.h>

#include "array.h"
#include "simd.h"

namespace jaxbnb::JAXBNB_ISA {
namespace {

JAXBNB_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
JAXBNB_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls `act` with a pointer of an array's own type to element `at`.
template <class Act>
JAXBNB_INLINE void with_elements(const Array& array, int64_t at, const Act& act) {
  switch (array.dtype) {
    case Dtype::kFloat32:
      return act(static_cast<float*>(array.data) + at);
    case Dtype::kBfloat16:
      return act(static_cast<Bfloat16*>(array.data) + at);
    case Dtype::kFloat16:
      return act(static_cast<Float16*>(array.data) + at);
  }
}

// Calls use(i, x) for each vector of the elements from `from`. The lanes after the last are zero.
template <class T, class Use>
JAXBNB_INLINE void for_vectors(const T* from, int64_t count, const Use& use) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) use(i, load(from + i));
  if (i < count) use(i, load(from + i, count - i));
}

// Writes whole vectors.
[[maybe_unused]] void read(const Array& array, int64_t at, int64_t count, float* to) {
  with_elements(array, at, [=](const auto* from) {
    for_vectors(from, count, [=](int64_t i, Floats x) { store(to + i, x); });
  });
}

// Reads whole vectors.
[[maybe_unused]] void write(const float* from, int64_t count, const Array& array, int64_t at) {
  with_elements(array, at, [=](auto* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) store(to + i, load(from + i), count - i);
  });
}

[[maybe_unused]] float float_of_bits(int32_t bits) {
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

// A factor that brings numbers of a block nearer to one, if they are beyond 2^64 or below 2^-64, so
// that the reciprocal of the largest stays in float32's normal range. A power of two is exact.
JAXBNB_INLINE float factor_to_one(float absmax) {
  if (absmax > 0x1p64f) return 0x1p-64f;
  return absmax < 0x1p-64f ? 0x1p64f : 1.0f;
}

}  // namespace
}  // namespace jaxbnb::JAXBNB_ISA
