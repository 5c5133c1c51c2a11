// The dynamic 8-bit maps of optimizer states by arithmetic, without tables in memory.
//
// A sign apart, the levels of decade i, from 0 to 6, are the middles of n equal cells between
// 10^(i-7) and 10^(i-6), n = kFirst * 2^i. They are numbered from n, so the exponent of a level's
// number, as a float, tells its decade. The level of zero is numbered before the first decade, and
// the level of one after the last.
#pragma once

#include "simd.h"

namespace jaxbnb::JAXBNB_ISA {
namespace {

constexpr int kDecades = 7;
constexpr double kLow[kDecades] = {1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1};

// Where a decade's first number begins, in cells of the decade: levels of different distances meet
// here. All other numbers begin at the edge of their cell.
constexpr float kShift = 0.2f;

template <bool kSigned>
struct Dynamic8 {
  static constexpr int kFirst = kSigned ? 1 : 2;
  static constexpr int kLast = kFirst << kDecades;  // the number of the level of one

  // Within decade i, a number is the floor of x * slope[i] + offset[i]. The lines of two decades
  // meet where these do, and the next one is less steep. So the least of all lines is the one.
  float slope[kDecades], offset[kDecades];
  float near_one;  // the middle between one and the level below

  // A level is number * scale + base; the low three bits of the number's exponent find both. The
  // levels of zero and one share an entry, a line through both.
  float scale[8], base[8];

  constexpr Dynamic8() : slope(), offset(), near_one(), scale(), base() {
    for (int i = 0; i < kDecades; ++i) {
      const double n = kFirst << i, cell = 9 * kLow[i] / n, low = kLow[i];
      slope[i] = 1 / cell;
      offset[i] = n - low / cell;
      scale[entry(i)] = cell;
      base[entry(i)] = low - n * cell + cell / 2;
      near_one = 1 - cell / 4;
    }
    // The first number begins in the middle between zero and its level; in the unsigned map at
    // zero, because no positive number may be stored as zero. The next number begins as always.
    const double cell = 9 * kLow[0] / kFirst;
    const double begin = kSigned ? (kLow[0] + cell / 2) / 2 : 0;
    const double first = kFirst + kShift + (kSigned ? 0 : 0.01);
    slope[0] = (kFirst + 1 - first) / (kLow[0] + cell - begin);
    offset[0] = first - slope[0] * begin;
    scale[entry(-1)] = 1 / (kLast - zero());
    base[entry(-1)] = -zero() * scale[entry(-1)];
  }

  static constexpr float zero() { return kFirst / 2.0f; }
  static constexpr int entry(int decade) { return (127 + kFirst - 1 + decade) & 7; }
};

template <bool kSigned>
constexpr Dynamic8<kSigned> kDynamic8;

// Decodes levels, to within their last bit. Zero and one are exact.
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
// neighbours are equally near to within 2^-21 of the level.
template <bool kSigned>
class Dynamic8Encoder {
 public:
  // The reciprocal of the block's largest magnitude is in float32's normal range.
  JAXBNB_MEMBER Dynamic8Encoder(float absmax, float reciprocal)
      : near_one_(kDynamic8<kSigned>.near_one * absmax) {
    for (int i = 0; i < kDecades; ++i) slope_[i] = kDynamic8<kSigned>.slope[i] * reciprocal;
  }

  // Codes, one a lane.
  JAXBNB_MEMBER Ints operator()(Floats x) const {
    const Floats magnitude = kSigned ? absolute(x) : x;
    Floats position = line(0, magnitude);
    for (int i = 1; i < kDecades; ++i) position = min(position, line(i, magnitude));
    const Ints number = floor(position);
    const Mask is_below_one = x <= broadcast(near_one_);
    if (kSigned) return decrement(with_sign(number, x) + broadcast(128), is_below_one);
    const Ints code = decrement(number, is_below_one);
    return decrement(code, x <= zero());
  }

 private:
  JAXBNB_MEMBER Floats line(int decade, Floats x) const {
    return fma(x, broadcast(slope_[decade]), broadcast(kDynamic8<kSigned>.offset[decade]));
  }

  // A decade's first number is a power of two, and kShift counts only there. A power of two
  // shares no bit with the number before it, and every other number does.
  JAXBNB_MEMBER Ints floor(Floats position) const {
    const Ints number = to_ints(position), shifted = to_ints(position - broadcast(kShift));
    return decrement(number, (number ^ shifted) > shifted);
  }

  float slope_[kDecades];
  const float near_one_;
};

}  // namespace
}  // namespace jaxbnb::JAXBNB_ISA
