// The dynamic 8-bit maps of optimizer states by arithmetic, without tables in memory.
//
// A sign apart, the levels of decade i, from 1 to 7, are the middles of n equal cells between
// 10^(i-8) and 10^(i-7), n = kFirst * 2^(i-1). They are numbered from n, so the exponent of a
// level's number, as a float, tells its decade. Decade 0 is the level of zero, numbered before all
// others, and decade 8 the level of one, numbered after them.
#pragma once

#include "simd.h"

namespace jaxbnb::JAXBNB_ISA {
namespace {

constexpr int kDecades = 7;
constexpr double kLow[kDecades + 2] = {0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1};

// Tables have eight entries, and decades are numbered modulo eight: 0 and 8 share an entry.
template <bool kSigned>
struct Dynamic8 {
  static constexpr int kFirst = kSigned ? 1 : 2;
  static constexpr int kLast = kFirst << kDecades;  // the number of the level of one

  // A level is number * scale + base, for numbers multiplied by kUnit. Entries are found by the low
  // bits of the exponent. A signed map's zero and one are the numbers 0 and 4 * kLast, at entry 0.
  static constexpr int kUnit = kSigned ? 4 : 1;
  float scale[8], base[8];

  // A number below 2^24 is shifted to the right to that of a level in decade i: by kShiftOfOne in
  // decade 8, by one more in each decade below. Entries are found by the low bits of the shift.
  static constexpr int kShiftOfOne = kSigned ? 16 : 15;

  // Magnitudes above begin[i] are in decade i or above: it is the middle between two levels. Within
  // a decade, magnitude * slope[i] + kOffset grows from one to two by equal steps from a level to
  // the next one.
  float begin[8], slope[8];
  static constexpr float kOffset = 8.0 / 9;

  constexpr Dynamic8() : scale(), base(), begin(), slope() {
    constexpr double kZero = kSigned ? 0 : 1;  // the number of the level of zero
    scale[entry(0)] = 1 / (kLast - kZero) / kUnit;
    base[entry(0)] = -kZero / (kLast - kZero);
    // All magnitudes of decade 8 are within the first step. In decade 0, the shift leaves nothing.
    slope[of_shift(8)] = kSigned ? 0.115 : 0.113;
    double highest = 0;
    for (int i = 1; i <= kDecades; ++i) {
      const double n = kFirst << (i - 1), cell = 9 * kLow[i] / n, lowest = kLow[i] + cell / 2;
      scale[entry(i)] = cell / kUnit;
      base[entry(i)] = lowest - n * cell;
      begin[of_shift(i)] = (highest + lowest) / 2;
      slope[of_shift(i)] = 1 / (9 * kLow[i]);
      highest = kLow[i + 1] - cell / 2;
    }
    begin[of_shift(8)] = (highest + 1) / 2;
    // No positive number may be stored as zero: the first cell begins there.
    if (!kSigned) begin[of_shift(1)] = 0;
  }

  static constexpr int entry(int decade) { return (decade + (kSigned ? 0 : 127)) & 7; }
  static constexpr int of_shift(int decade) { return (kShiftOfOne + 8 - decade) & 7; }
};

template <bool kSigned>
constexpr Dynamic8<kSigned> kDynamic8;

// Decodes levels, to within a relative 2^-21. Zero and one are exact.
template <bool kSigned>
class Dynamic8Decoder {
 public:
  JAXBNB_MEMBER Dynamic8Decoder()
      : scale_(kDynamic8<kSigned>.scale), base_(kDynamic8<kSigned>.base) {}

  JAXBNB_MEMBER Floats operator()(const uint8_t* codes) const { return levels(load(codes)); }
  JAXBNB_MEMBER Floats operator()(const uint8_t* codes, int64_t count) const {
    return levels(load(codes, count));
  }

 private:
  JAXBNB_MEMBER Floats levels(Ints codes) const {
    constexpr int kUnit = Dynamic8<kSigned>::kUnit, kZero = kSigned ? 127 : -1;
    // The codes become the last bits of floats, which are a unit apart.
    constexpr float kCount = (1 << 23) * kUnit;
    const Floats counted = as_floats(codes | as_ints(broadcast(kCount)));
    const Floats number = counted - broadcast(kCount + kZero * kUnit);
    const Ints exponent = shift_right<23>(as_ints(number));
    const Ints base = as_ints(base_[exponent]);
    if (!kSigned) return fma(number, scale_[exponent], as_floats(base));
    const Ints sign = as_ints(number) & broadcast(INT32_MIN);
    return fma(number, scale_[exponent], as_floats(base ^ sign));
  }

  const Table8<float> scale_, base_;
};

// Encodes the numbers of one block to the nearest levels. Rounding errors decide only where both
// neighbours are equally near, to within a relative 2^-21. The shift of each number comes first, the
// code follows: in separate loops, more of these long chains of instructions are under way at once.
template <bool kSigned>
class Dynamic8Encoder {
 public:
  // What to add to a code: the ones here are counted from the code of zero, or if unsigned from one.
  static constexpr int kZero = kSigned ? 127 : -1;

  // Both are in float32's normal range.
  JAXBNB_MEMBER Dynamic8Encoder(float absmax, float reciprocal)
      : begin_(scaled(Table8<float>(kMap.begin), absmax)),
        slope_(scaled(Table8<float>(kMap.slope), reciprocal)),
        phase_(bits(absmax) + static_cast<int32_t>(kPhase * kBitsPerDecade)) {}

  // A float's bits are nearly its logarithm. In this scale, decade i begins 0.3 to 0.7 above i - 1.
  // So the floor finds the decade or the one above, and a comparison tells which.
  JAXBNB_MEMBER Ints shift(Floats x) const {
    const Floats magnitude = magnitude_of(x);
    Ints shift = multiply_high<kScale>(broadcast(phase_) - as_ints(magnitude));
    if (!kSigned) shift = min(shift, broadcast(kMap.kShiftOfOne + kDecades));
    return increment(shift, magnitude <= begin_[shift]);
  }

  // The code of -1 is -1, for the level nearest to it is 0.
  JAXBNB_MEMBER Ints code(Floats x, Ints shift) const {
    const Floats position = fma(magnitude_of(x), slope_[shift], broadcast(kMap.kOffset));
    // The bits of floats from one to two are counted from 2^23 on. In decade 0, they may be less.
    Ints number = as_ints(position) - broadcast(0x3f000000);
    if (!kSigned) number = max(number, broadcast(1 << 23));
    const Ints code = shift_right(min(number, broadcast((1 << 24) - 1)), shift);
    return kSigned ? with_sign(code, x) : code;
  }

 private:
  static constexpr const Dynamic8<kSigned>& kMap = kDynamic8<kSigned>;
  static constexpr int kScale = 165;
  static constexpr double kBitsPerDecade = 0x1p32 / kScale;  // 3.1 powers of two
  static constexpr double kPhase = kMap.kShiftOfOne + 0.37;

  static JAXBNB_MEMBER Floats magnitude_of(Floats x) { return kSigned ? absolute(x) : x; }

  static JAXBNB_MEMBER int32_t bits(float a) {
    int32_t bits;
    memcpy(&bits, &a, sizeof(bits));
    return bits;
  }

  const Table8<float> begin_, slope_;
  const int32_t phase_;
};

}  // namespace
}  // namespace jaxbnb::JAXBNB_ISA
