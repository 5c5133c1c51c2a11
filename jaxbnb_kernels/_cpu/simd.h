// Vectors of float32 and int32 lanes, as many as the instruction set has, for the kernels.
//
// A kernel is compiled once per instruction set, in the namespace JAXBNB_ISA. `simd_<isa>.h` wraps
// its instructions; this file holds what is the same for all of them. On each:
//
//   Floats, Ints, Mask      kLanes lanes of float32, of int32, of truth
//   Table8<T>, Table16<T>   8 or 16 entries in registers; table[indices] reads the low 3 or 4 bits
//                           of each index, and does not look at the others
//   load(p), store(p, v)          kLanes elements, at any address
//   load(p, n), store(p, v, n)    the first n <= kLanes elements; the other lanes load 0
//
// Floats load from and store to float, Bfloat16 and Float16, rounding to the nearest, ties to even,
// and NaN stays NaN. Ints load from int32_t, and from uint8_t and int8_t, which they extend; they
// store to int32_t, and to bytes, of which they keep the low eight bits.
//
// min(a, b) and max(a, b) return b where either is NaN. to_ints truncates and round_to_ints rounds
// to even; NaN, and what int32 cannot hold, become any int.
//
//   increment(a, mask)                a + 1 where the mask is true, else a
//   multiply_high<k>(a)               a * k / 2^32, rounded down, from the high 16 bits of each lane
//                                     that is not negative; else any int of 16 bits
//   with_sign(a, x)                   a, negated where x is negative; must be zero where x is
//   gather(p, indices)                p[index] of each lane
//   scaled(table, factor)             a table of float with its entries multiplied
//   maximum(a)                        the largest lane, where none is NaN
//   store_bytes(p, a, b, c, d, k)     4 * kLanes ints of 16 bits, plus k, clipped to bytes
//   store_nibbles(p, a, b, c, d, t)   4 * kLanes entries of a ByteTable, each below 16, two a byte:
//                                     the first one in the high half
#pragma once

#include <stdint.h>
#include <string.h>

#define JAXBNB_INLINE static inline __attribute__((always_inline))
#define JAXBNB_MEMBER inline __attribute__((always_inline))
// For loops that need all registers: the compiler would spill those of what they are inlined into.
#define JAXBNB_APART __attribute__((noinline))

namespace jaxbnb {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace jaxbnb

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_NEON)
#include "simd_neon.h"
#endif

namespace jaxbnb::JAXBNB_ISA {

JAXBNB_INLINE Floats zero() { return broadcast(0.0f); }
JAXBNB_INLINE Floats negate(Floats a) { return as_floats(as_ints(a) ^ broadcast(INT32_MIN)); }
JAXBNB_INLINE Floats absolute(Floats a) { return as_floats(as_ints(a) & broadcast(INT32_MAX)); }
JAXBNB_INLINE Floats copy_sign(Floats magnitude, Floats sign) {
  const Ints signs = as_ints(sign) & broadcast(INT32_MIN);
  return as_floats(as_ints(absolute(magnitude)) | signs);
}
// Of numbers up to 88, to some units of the last place; zero below -87, where results are small.
JAXBNB_INLINE Floats exp(Floats a) {
  const Floats clipped = max(broadcast(-87.0f), a);
  const Ints powers = round_to_ints(clipped * broadcast(1.44269504f));
  // The logarithm of two in two parts, so that the first product is exact.
  const Floats count = to_floats(powers);
  const Floats high = fma(count, broadcast(-0.693359375f), clipped);
  const Floats x = fma(count, broadcast(2.12194440e-4f), high);
  // A polynomial for [-log(2) / 2, log(2) / 2], from Cephes.
  constexpr float kFactors[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f};
  Floats y = broadcast(1.9875691500e-4f);
  for (float factor : kFactors) y = fma(y, x, broadcast(factor));
  const Floats scaled = y * as_floats(shift_left<23>(powers + broadcast(127)));
  return select(a < broadcast(-87.0f), broadcast(0.0f), scaled);
}
JAXBNB_INLINE Mask is_nan(Floats a) { return a != a; }

JAXBNB_INLINE Floats& operator+=(Floats& a, Floats b) { return a = a + b; }
JAXBNB_INLINE Floats& operator*=(Floats& a, Floats b) { return a = a * b; }
JAXBNB_INLINE Ints& operator+=(Ints& a, Ints b) { return a = a + b; }

// A square of kLanes vectors: what interleaves distant halves, log2(kLanes) times, transposes.
JAXBNB_INLINE void transpose(Floats (&rows)[kLanes]) {
  for (int step = 1; step < kLanes; step *= 2) {
    Floats next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = rows[i];
      next[2 * i + 1] = rows[i + kLanes / 2];
      interleave(next[2 * i], next[2 * i + 1]);
    }
    memcpy(rows, next, sizeof(next));
  }
}

// The bits of a bfloat16 in the low half of each lane. Integer arithmetic, as the instruction of
// AVX512-BF16 takes denormals for zero.
JAXBNB_INLINE Ints to_bfloat16(Floats a) {
  const Ints bits = as_ints(a);
  const Ints is_odd = shift_right<16>(bits) & broadcast(1);
  const Ints rounded = bits + is_odd + broadcast(0x7fff);
  const Ints quiet_nan = bits | broadcast(0x400000);
  return shift_right<16>(select(is_nan(a), quiet_nan, rounded));
}

// Bfloat16 is the upper half of a float32.
JAXBNB_INLINE Floats of_bfloat16(Ints halves) { return as_floats(shift_left<16>(halves)); }

JAXBNB_INLINE Floats load(const Bfloat16* from) {
  return of_bfloat16(load_halves(&from->bits));
}

JAXBNB_INLINE void store(Bfloat16* to, Floats a) { store_halves(&to->bits, to_bfloat16(a)); }

// Fetches what will be read soon. The address may be outside of the array, as it is not read here.
JAXBNB_INLINE void prefetch(const void* from, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + ahead));
}

// The first elements, through a buffer of a whole vector: tails are rare.
template <class T>
JAXBNB_INLINE auto load(const T* from, int64_t count) {
  T buffer[kLanes] = {};
  memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}

template <class T, class V>
JAXBNB_INLINE void store(T* to, V a, int64_t count) {
  T buffer[kLanes];
  store(buffer, a);
  memcpy(to, buffer, count * sizeof(T));
}

}  // namespace jaxbnb::JAXBNB_ISA
