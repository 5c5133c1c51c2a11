// What a lane of a product takes at a time: a unit, of 32 bits.
//
// A unit is a float32, or a pair of bfloat16 where there are instructions that multiply pairs, or
// some codes of int8. The two operands of a product are arrays of units, so that one kernel serves
// all kinds. Two vectors of floating-point units are a group: neighbours in memory that are decoded
// together. A group may hold its even elements first and then its odd ones, as the two halves of
// packed bytes come out in this order.
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
  using Sum = float;
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
  using Sum = float;
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

  // Pairs of two rows' elements, which are rounded.
  static JAXBNB_MEMBER Floats of_rows(Floats a, Floats b) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = i / 2 + i % 2 * 16;
    const __m512i halves = _mm512_castps_si512(of_two(a, b).lanes);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(order), halves))};
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

// Codes of int8: a unit has four, or two as int16 where no instruction sums four products. Sums are
// int32, exact modulo 2^32.
//
// Some instructions multiply unsigned bytes with signed ones. For them W's codes are offset to be
// unsigned, and the caller subtracts kOffset times the sum of x's codes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

struct Int8Units {
  struct State {};
  using Sum = int32_t;
  static constexpr int kElements = 4;
  static constexpr int kOffset = 128;

  // Loads kLanes units.
  static JAXBNB_MEMBER Floats load_x(const int8_t* from) {
    return as_floats(load(reinterpret_cast<const int32_t*>(from)));
  }
  static JAXBNB_MEMBER Floats load_w(const int8_t* from) {
    return as_floats(as_ints(load_x(from)) ^ broadcast(static_cast<int32_t>(0x80808080)));
  }

  static JAXBNB_MEMBER Ints multiply_add(Floats w, Floats x, Ints sum) {
#if defined(__AVX512VNNI__)
    return {_mm512_dpbusd_epi32(sum.lanes, as_ints(w).lanes, as_ints(x).lanes)};
#else
    return {_mm256_dpbusd_avx_epi32(sum.lanes, as_ints(w).lanes, as_ints(x).lanes)};
#endif
  }
};

#elif defined(__AVX2__)

struct Int8Units {
  struct State {};
  using Sum = int32_t;
  static constexpr int kElements = 2;
  static constexpr int kOffset = 0;

  static JAXBNB_MEMBER Floats load_x(const int8_t* from) {
#if defined(__AVX512F__)
    const auto bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return as_floats(Ints{_mm512_cvtepi8_epi16(bytes)});
#else
    const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return as_floats(Ints{_mm256_cvtepi8_epi16(bytes)});
#endif
  }
  static JAXBNB_MEMBER Floats load_w(const int8_t* from) { return load_x(from); }

  static JAXBNB_MEMBER Ints multiply_add(Floats w, Floats x, Ints sum) {
#if defined(__AVX512F__)
    return sum + Ints{_mm512_madd_epi16(as_ints(w).lanes, as_ints(x).lanes)};
#else
    return sum + Ints{_mm256_madd_epi16(as_ints(w).lanes, as_ints(x).lanes)};
#endif
  }
};

#elif defined(__ARM_NEON)

struct Int8Units {
  struct State {};
  using Sum = int32_t;
  static constexpr int kElements = 4;
  static constexpr int kOffset = 0;

  static JAXBNB_MEMBER Floats load_x(const int8_t* from) {
    return {vreinterpretq_f32_s8(vld1q_s8(from))};
  }
  static JAXBNB_MEMBER Floats load_w(const int8_t* from) { return load_x(from); }

  static JAXBNB_MEMBER Ints multiply_add(Floats w, Floats x, Ints sum) {
    const int8x16_t a = vreinterpretq_s8_f32(w.lanes), b = vreinterpretq_s8_f32(x.lanes);
#if defined(__ARM_FEATURE_DOTPROD)
    return {vdotq_s32(sum.lanes, a, b)};
#else
    // Two products of codes, of which one is above -128, fit in int16.
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    const int16x8_t pairs = vpaddq_s16(low, vmull_high_s8(a, b));
    return {vpadalq_s16(sum.lanes, pairs)};
#endif
  }
};

#endif

}  // namespace jaxbnb::JAXBNB_ISA
