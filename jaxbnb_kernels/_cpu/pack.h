// Packs x to units, and writes sums to y: what a product does besides its arithmetic.
#pragma once

#include "units.h"

namespace jaxbnb::JAXBNB_ISA {

constexpr int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
constexpr int64_t ceil_to(int64_t count, int64_t size) { return parts_of(count, size) * size; }
constexpr int64_t at_most(int64_t a, int64_t limit) { return a < limit ? a : limit; }

// Calls use(T{}) with the type of a dtype.
template <class Use>
JAXBNB_INLINE void with_type(Dtype dtype, const Use& use) {
  if (dtype == Dtype::kFloat32) return use(float{});
  if (dtype == Dtype::kBfloat16) return use(Bfloat16{});
  use(Float16{});
}

// Packs a token to units, and fills the last group with zeros.
template <class Units, class T>
static void pack_token(const T* x, int64_t count, Dtype dtype, bool evens_first, float* to) {
  for (int64_t k = 0; k < count; k += Units::kGroup, to += 2 * kLanes) {
    float group[Units::kGroup];
    for (int i = 0; i < Units::kGroup; i += kLanes) {
      const int64_t left = count - k - i;
      const Floats values = left >= kLanes ? load(x + k + i)
                            : left > 0     ? load(x + k + i, left)
                                           : zero();
      store(group + i, rounded(values, dtype));
    }
    Units::pack(group, evens_first, to);
  }
}

template <class T>
JAXBNB_INLINE void store_at_most(T* to, Floats a, int64_t count) {
  if (count >= kLanes) return store(to, a);
  if (count > 0) store(to, a, count);
}

}  // namespace jaxbnb::JAXBNB_ISA
