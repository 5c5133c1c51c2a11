// The levels of codes of 8 bits, a vector at a time, and what they are multiplied by.
#pragma once

#include "simd.h"

namespace jaxbnb::JAXBNB_ISA {

// From a codebook of 256 levels.
struct CodebookLevels {
  const float* levels;

  JAXBNB_MEMBER Floats operator()(const uint8_t* codes) const {
    return gather(levels, load(codes));
  }
  static JAXBNB_MEMBER Floats scale(float absmax) { return broadcast(absmax); }
};

// Linear int8: the codes themselves, in steps of absmax / 127.
struct LinearLevels {
  const float* levels;  // not used

  JAXBNB_MEMBER Floats operator()(const uint8_t* codes) const {
    return to_floats(load(reinterpret_cast<const int8_t*>(codes)));
  }
  static JAXBNB_MEMBER Floats scale(float absmax) { return broadcast(absmax * (1.0f / 127.0f)); }
};

}  // namespace jaxbnb::JAXBNB_ISA
