// What a lane of a product takes at a time: a unit, of 32 bits.
//
// A unit is a float32, or a pair of bfloat16 where there are instructions that multiply pairs. The
// two operands of a product are arrays of units, so that one kernel serves both kinds. Two vectors
// of units are a group: neighbours in memory that are decoded together. A group may hold its even
// elements first and then its odd ones, as the two halves of packed bytes come out in this order.
#pragma once

#include "matmul_blockwise.h"
#include "simd.h"

namespace jaxbnb::JAXBNB_ISA {

JAXBNB_INLINE Floats rounded(Floats a, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return a;
  if (dtype == Dtype::kBfloat16) return of_bfloat16(to_bfloat16(a));
  Float16 halves[kLanes];
  store(halves, a);
  return load(halves);
}

// The product is computed in float32, with operands that are rounded to its dtype.
struct Float32Units {
  struct State {};  // of a thread while it multiplies
  // The most tokens for which W is decoded in registers. Panels hold whole vectors of tokens.
  static constexpr int64_t kFewTokens = kLanes;
  static constexpr int kElements = 1;
  static constexpr int kGroup = 2 * kLanes;

  static JAXBNB_MEMBER Floats multiply_add(Floats a, Floats b, Floats sum) {
    return fma(a, b, sum);
  }

  static JAXBNB_MEMBER void pack(const float* from, bool evens_first, float* to) {
    Floats first = load(from), second = load(from + kLanes);
    if (evens_first) deinterleave(first, second);
    store(to, first);
    store(to + kLanes, second);
  }
};

#if defined(__AVX512BF16__)

// The instructions take denormals for zero.
struct Bfloat16Units {
  struct State {};
  static constexpr int64_t kFewTokens = kLanes;
  static constexpr int kElements = 2;
  static constexpr int kGroup = 4 * kLanes;

  static JAXBNB_MEMBER __m512bh pairs(Floats a) { return (__m512bh)a.lanes; }
  static JAXBNB_MEMBER Floats of_two(Floats low, Floats high) {
    return {(__m512)_mm512_cvtne2ps_pbh(high.lanes, low.lanes)};
  }

  static JAXBNB_MEMBER Floats multiply_add(Floats a, Floats b, Floats sum) {
    return {_mm512_dpbf16_ps(sum.lanes, pairs(a), pairs(b))};
  }

  static JAXBNB_MEMBER void pack(const float* from, bool evens_first, float* to) {
    Floats a = load(from), b = load(from + kLanes);
    Floats c = load(from + 2 * kLanes), d = load(from + 3 * kLanes);
    if (evens_first) {
      deinterleave(a, b);
      deinterleave(c, d);
      store(to, of_two(a, c));
      store(to + kLanes, of_two(b, d));
    } else {
      store(to, of_two(a, b));
      store(to + kLanes, of_two(c, d));
    }
  }

  // Pairs of two rows' elements: those of the first and of the second half of their lanes.
  static JAXBNB_MEMBER void pair_up(Floats& a, Floats& b) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
      order[0][i] = i / 2 + i % 2 * 32;
      order[1][i] = order[0][i] + 16;
    }
    const __m512i first = _mm512_castps_si512(a.lanes), second = _mm512_castps_si512(b.lanes);
    const auto pairs = [&](const uint16_t* order) {
      return _mm512_castsi512_ps(
          _mm512_permutex2var_epi16(first, _mm512_load_si512(order), second));
    };
    a.lanes = pairs(order[0]);
    b.lanes = pairs(order[1]);
  }
};

#endif

}  // namespace jaxbnb::JAXBNB_ISA
