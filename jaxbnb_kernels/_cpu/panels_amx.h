// Multiplies panels of bfloat16 pairs with AMX: tiles of 16 rows, 16 steps and 16 lanes.
#pragma once

#include "panels.h"

namespace jaxbnb::JAXBNB_ISA {

#if defined(__AMX_BF16__)

constexpr int kTile = 16;

// The state of a thread while it multiplies. Tiles 0 to 3 hold sums, 4 and 5 rows of the left
// panel, 6 and 7 lanes of the right one.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// The same units in memory as Bfloat16Units. Rows, steps and lanes are whole tiles: panels are
// allocated to the next multiple of 16, with zeros beyond the last step.
struct AmxUnits : Bfloat16Units {
  using State = AmxTiles;
  static constexpr int64_t kFewTokens = 4;
};

// The sums of one or two tiles of rows with one or two tiles of lanes.
template <int kRowTiles, int kLaneTiles>
static void multiply_tiles(const Panels& p, int64_t row, int64_t strip) {
  float* const to = p.sums + row * p.sums_stride + strip * kStrip;
  float* const to_next = to + kTile * p.sums_stride;
  const int64_t sums_bytes = p.sums_stride * sizeof(float);
  if (p.is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, to, sums_bytes);
    if constexpr (kLaneTiles > 1) _tile_loadd(1, to + kTile, sums_bytes);
    if constexpr (kRowTiles > 1) _tile_loadd(2, to_next, sums_bytes);
    if constexpr (kRowTiles > 1 && kLaneTiles > 1) _tile_loadd(3, to_next + kTile, sums_bytes);
  }
  const float* left = p.left + row * p.left_stride;
  const float* right = p.right + strip * p.strip_stride;
  const int64_t left_bytes = p.left_stride * sizeof(float);
  constexpr int64_t kRightBytes = kStrip * sizeof(float);
  for (int64_t k = 0; k < p.steps; k += kTile, left += kTile, right += kTile * kStrip) {
    _tile_loadd(4, left, left_bytes);
    _tile_loadd(6, right, kRightBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kLaneTiles > 1) {
      _tile_loadd(7, right + kTile, kRightBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRowTiles > 1) {
      _tile_loadd(5, left + kTile * p.left_stride, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kLaneTiles > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, sums_bytes);
  if constexpr (kLaneTiles > 1) _tile_stored(1, to + kTile, sums_bytes);
  if constexpr (kRowTiles > 1) _tile_stored(2, to_next, sums_bytes);
  if constexpr (kRowTiles > 1 && kLaneTiles > 1) _tile_stored(3, to_next + kTile, sums_bytes);
}

// Four tiles of rows with one tile of lanes: a sum waits for the one before it, for 52 cycles.
static void multiply_four_tiles(const Panels& p, int64_t row, int64_t strip) {
  const int64_t left_stride = kTile * p.left_stride, sums_stride = kTile * p.sums_stride;
  const int64_t left_bytes = p.left_stride * sizeof(float);
  const int64_t sums_bytes = p.sums_stride * sizeof(float);
  float* const to = p.sums + row * p.sums_stride + strip * kStrip;
  if (p.is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, to, sums_bytes);
    _tile_loadd(1, to + sums_stride, sums_bytes);
    _tile_loadd(2, to + 2 * sums_stride, sums_bytes);
    _tile_loadd(3, to + 3 * sums_stride, sums_bytes);
  }
  const float* left = p.left + row * p.left_stride;
  const float* right = p.right + strip * p.strip_stride;
  constexpr int64_t kRightBytes = kStrip * sizeof(float);
  for (int64_t k = 0; k < p.steps; k += kTile, left += kTile, right += kTile * kStrip) {
    _tile_loadd(6, right, kRightBytes);
    _tile_loadd(4, left, left_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left + left_stride, left_bytes);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, left + 2 * left_stride, left_bytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, left + 3 * left_stride, left_bytes);
    _tile_dpbf16ps(3, 5, 6);
  }
  _tile_stored(0, to, sums_bytes);
  _tile_stored(1, to + sums_stride, sums_bytes);
  _tile_stored(2, to + 2 * sums_stride, sums_bytes);
  _tile_stored(3, to + 3 * sums_stride, sums_bytes);
}

template <int kLaneTiles>
static void multiply_strip_by_tiles(const Panels& p, int64_t strip) {
  int64_t row = 0;
  if constexpr (kLaneTiles == 1) {
    for (; row + 3 * kTile < p.rows; row += 4 * kTile) multiply_four_tiles(p, row, strip);
  }
  for (; row + kTile < p.rows; row += 2 * kTile) multiply_tiles<2, kLaneTiles>(p, row, strip);
  if (row < p.rows) multiply_tiles<1, kLaneTiles>(p, row, strip);
}

template <>
void multiply_panels<AmxUnits>(const Panels& p) {
  const int64_t strips = (p.lanes + kLanes - 1) / kStrip;
  for (int64_t strip = 0; strip < strips; ++strip) multiply_strip_by_tiles<2>(p, strip);
  if (strips * kStrip < p.lanes) multiply_strip_by_tiles<1>(p, strips);
}

#endif

}  // namespace jaxbnb::JAXBNB_ISA
