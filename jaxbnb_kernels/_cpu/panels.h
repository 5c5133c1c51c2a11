// Multiplies panels of units that lie in the cache: sums += left @ right.
//
// The left panel holds rows of units. The right one holds strips of two vectors of lanes: for each
// step of the contraction the lanes of one strip, so that a strip is read in order.
#pragma once

#include "units.h"

namespace jaxbnb::JAXBNB_ISA {

constexpr int kStrip = 2 * kLanes;

struct Panels {
  const float* left;
  int64_t left_stride;
  const float* right;
  int64_t strip_stride;
  float* sums;  // (rows, lanes), or the same of int32
  int64_t sums_stride;
  int64_t rows, lanes, steps;
  bool is_first;  // whether to begin with zero sums
};

// Registers limit the sums of a tile: 12 of 16, or 24 of 32.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kMostSums = 12;
#else
constexpr int kMostSums = 24;
#endif
constexpr int kTileRows = kMostSums / 2;

// How many strips a tile has, for enough independent sums when it has few rows.
constexpr int strips_of_tile(int rows) {
  return rows * 8 <= kMostSums ? 4 : rows * 4 <= kMostSums ? 2 : 1;
}

// Sums stay in registers only if their numbers are constants, and GCC unrolls only small loops by
// itself.
template <class Units, int kRows, int kVectors>
JAXBNB_APART static void multiply_tile(const Panels& p, int64_t row, int64_t strip) {
  using Sum = typename Units::Sum;
  Sum* const to = reinterpret_cast<Sum*>(p.sums) + row * p.sums_stride + strip * kStrip;
  decltype(load(to)) sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = p.is_first ? broadcast(Sum{}) : load(to + i * p.sums_stride + j * kLanes);
    }
  }
  const float* left = p.left + row * p.left_stride;
  const float* right = p.right + strip * p.strip_stride;
  for (int64_t k = 0; k < p.steps; ++k, ++left, right += kStrip) {
    Floats vectors[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      vectors[j] = load(right + j / 2 * p.strip_stride + j % 2 * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Floats unit = broadcast(left[i * p.left_stride]);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        sums[i][j] = Units::multiply_add(unit, vectors[j], sums[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) store(to + i * p.sums_stride + j * kLanes, sums[i][j]);
  }
}

// Multiplies the last rows, fewer than kRows + 1, with some strips.
template <class Units, int kRows, int kVectors>
static void multiply_last_rows(const Panels& p, int64_t row, int64_t strip) {
  if constexpr (kRows > 0) {
    if (p.rows - row == kRows) return multiply_tile<Units, kRows, kVectors>(p, row, strip);
    multiply_last_rows<Units, kRows - 1, kVectors>(p, row, strip);
  }
}

template <class Units, int kRows, int kVectors>
static void multiply_strips(const Panels& p, int64_t strip) {
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) {
    multiply_tile<Units, kRows, kVectors>(p, row, strip);
  }
  multiply_last_rows<Units, kRows - 1, kVectors>(p, row, strip);
}

template <class Units, int kRows>
static void multiply_few_rows(const Panels& p) {
  if constexpr (kRows > 0) {
    if (p.rows < kRows) return multiply_few_rows<Units, kRows - 1>(p);
    constexpr int kStrips = strips_of_tile(kRows);
    int64_t strip = 0;
    for (; (strip + kStrips) * kStrip <= p.lanes; strip += kStrips) {
      multiply_tile<Units, kRows, 2 * kStrips>(p, 0, strip);
    }
    for (; strip * kStrip < p.lanes; ++strip) multiply_tile<Units, kRows, 2>(p, 0, strip);
  }
}

// Calls use(lane, row, sums) for the sums of each lane with kLanes rows at a time. Memory for whole
// vectors of rows lies below the sums.
template <class Use>
JAXBNB_INLINE void for_transposed(const Panels& panels, const Use& use) {
  for (int64_t lane = 0; lane < panels.lanes; lane += kLanes) {
    for (int64_t r = 0; r < panels.rows; r += kLanes) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = load(panels.sums + (r + i) * panels.sums_stride + lane);
      }
      transpose(square);
      for (int i = 0; i < kLanes && lane + i < panels.lanes; ++i) use(lane + i, r, square[i]);
    }
  }
}

template <class Units>
static void multiply_panels(const Panels& p) {
  if (p.rows <= kTileRows / 2) return multiply_few_rows<Units, kTileRows / 2>(p);
  const int64_t strips = (p.lanes + kLanes - 1) / kStrip;
  for (int64_t strip = 0; strip < strips; ++strip) {
    multiply_strips<Units, kTileRows, 2>(p, strip);
  }
  if (strips * kStrip < p.lanes) multiply_strips<Units, kTileRows, 1>(p, strips);
}

}  // namespace jaxbnb::JAXBNB_ISA
