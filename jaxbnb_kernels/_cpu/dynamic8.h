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

  // A level is number * scale + base. Entries are found by the low bits of the number's exponent.
  float scale[8], base[8];

  // Magnitudes up to end[i] are in decade i or below: it is the middle between two levels. Within
  // decade i, a magnitude's code, or if signed that code's distance from the one of zero, is the
  // floor of the smaller one of magnitude * slope[i] + offset[i] and last[i].
  float end[8], slope[8], offset[8], last[8];

  constexpr Dynamic8() : scale(), base(), end(), slope(), offset(), last() {
    constexpr double kZero = kFirst / 2.0;       // the number of the level of zero
    constexpr double kCodeOfNumber = 1 - kFirst;  // the first number is coded as one
    constexpr double kCodeOfOne = kLast + kCodeOfNumber;
    scale[entry(0)] = 1 / (kLast - kZero);
    base[entry(0)] = -kZero * scale[entry(0)];
    // Just above the code of zero for zero, and just above the code of one for one.
    slope[0] = kCodeOfOne + 1;
    offset[0] = 0.25;
    last[0] = kCodeOfOne + 0.5;
    double highest = 0;
    for (int i = 1; i <= kDecades; ++i) {
      const double n = kFirst << (i - 1), cell = 9 * kLow[i] / n, lowest = kLow[i] + cell / 2;
      scale[entry(i)] = cell;
      base[entry(i)] = lowest - n * cell;
      end[i - 1] = (highest + lowest) / 2;
      slope[i] = 1 / cell;
      offset[i] = n + kCodeOfNumber - kLow[i] / cell;
      last[i] = 2 * n + kCodeOfNumber - 0.5;
      highest = kLow[i + 1] - cell / 2;
    }
    end[kDecades] = (highest + 1) / 2;
    if (!kSigned) {
      // No positive number may be stored as zero: the first cell begins there.
      end[0] = 0;
      slope[1] = 0.75 / (kLow[1] + 9 * kLow[1] / kFirst);
      offset[1] = 1.25;
    }
  }

  static constexpr int entry(int decade) { return (126 + kFirst - 1 + decade) & 7; }
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
    if (!kSigned) return magnitudes(to_floats(codes + broadcast(1)));
    const Floats number = to_floats(codes - broadcast(127));
    const Floats magnitude = magnitudes(max(absolute(number), broadcast(0.5f)));
    return as_floats(as_ints(magnitude) | (as_ints(number) & broadcast(INT32_MIN)));
  }
  JAXBNB_MEMBER Floats magnitudes(Floats numbers) const {
    const Ints exponent = shift_right<23>(as_ints(numbers));
    return fma(numbers, scale_[exponent], base_[exponent]);
  }

  const Table8<float> scale_, base_;
};

// Encodes the numbers of one block to the nearest levels. Rounding errors decide only where both
// neighbours are equally near, to within a relative 2^-21.
template <bool kSigned>
class Dynamic8Encoder {
 public:
  // What to add to the result: a signed map's codes are counted from the one of zero.
  static constexpr int kZero = kSigned ? 127 : 0;

  // Both are in float32's normal range.
  JAXBNB_MEMBER Dynamic8Encoder(float absmax, float reciprocal)
      : end_(scaled(Table8<float>(kDynamic8<kSigned>.end), absmax)),
        slope_(scaled(Table8<float>(kDynamic8<kSigned>.slope), reciprocal)),
        offset_(kDynamic8<kSigned>.offset),
        last_(kDynamic8<kSigned>.last),
        phase_(kPhaseOfOne - kDecadesPerBit * bits(absmax)) {}

  // The code of each lane less kZero. The code of -1 is -1, for the level nearest to it is 0.
  JAXBNB_MEMBER Ints operator()(Floats x) const {
    const Floats magnitude = kSigned ? absolute(x) : x;
    const Ints decade = decade_of(magnitude);
    const Floats position = fma(magnitude, slope_[decade], offset_[decade]);
    const Floats distance = min(position, last_[decade]);
    if (!kSigned) return to_ints(distance);
    const Ints sign = as_ints(x) & broadcast(INT32_MIN);
    return to_ints(as_floats(as_ints(distance) | sign));
  }

 private:
  // A float's bits are nearly its logarithm. In this scale, the end of decade i is 0.3 to 0.7 above
  // i. So the floor finds the decade or the one below, and a comparison tells which.
  JAXBNB_MEMBER Ints decade_of(Floats magnitude) const {
    const Floats bits = to_floats(as_ints(magnitude));
    const Ints low = to_ints(max(fma(bits, broadcast(kDecadesPerBit), broadcast(phase_)), zero()));
    return increment(low, magnitude > end_[low]);
  }

  static constexpr float kDecadesPerBit = 1 / (3.11f * (1 << 23)), kPhaseOfOne = 7.63f;

  static JAXBNB_MEMBER float bits(float a) {
    int32_t bits;
    memcpy(&bits, &a, sizeof(bits));
    return bits;
  }

  const Table8<float> end_, slope_, offset_, last_;
  const float phase_;
};

}  // namespace
}  // namespace jaxbnb::JAXBNB_ISA
