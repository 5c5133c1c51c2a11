// The product with a blockwise-quantised matrix: decodes parts of it to the cache, and multiplies.
//
// Each number of y is a sum in an order that depends on shapes only, not on threads. There are
// three ways, by what limits them:
//
// - few tokens, x @ W.T: reading and decoding W. Each group of a row is decoded in registers and
//   multiplied with all tokens.
// - x @ W.T: arithmetic. Rows of W are the left panel, as they decode to consecutive units; x is
//   the right one, with a token in each lane.
// - x @ W: rows of W are the right panel, with a column in each lane; x is the left one.
#include "matmul_blockwise.h"

#include "codes.h"
#include "pack.h"
#include "panels.h"
#include "panels_amx.h"
#include "scratch.h"

namespace jaxbnb::JAXBNB_ISA {
namespace {

// For few tokens W is decoded in registers, once for so many of them.
constexpr int kTokensAtOnce = 8;
// Rows of W in a part of such a product.
constexpr int64_t kPartRows = 64;
// How far ahead codes are fetched from memory: two rows of a usual matrix.
constexpr int64_t kBytesAhead = 4096;

// What a part decodes at a time: rows or columns of W, by steps of the contraction. For some tokens
// a panel fits the first-level cache. For many, a strip of it does.
struct PanelSize {
  int64_t size, steps;
};
constexpr PanelSize kSmallLeft = {64, 128}, kLargeLeft = {128, 256};
constexpr PanelSize kSmallRight = {256, 32}, kLargeRight = {128, 256};
constexpr int64_t kSomeTokens = 64;
// Tokens fill whole tiles of AMX.
constexpr int64_t kTileSize = 16;

template <class Units, class Codes>
class Multiplication {
 public:
  Multiplication(const BlockwiseProduct& product, const Parallel& parallel)
      : p_(product), parallel_(parallel), codes_(product) {}

  void run() const {
    if (!p_.transpose) return to_columns();
    if (p_.tokens <= Units::kFewTokens) return to_rows_of_few_tokens();
    to_rows();
  }

 private:
  // Few tokens, x @ W.T.

  void to_rows_of_few_tokens() const {
    const int64_t stride = steps_of(p_.size), all = ceil_to(p_.tokens, kTokensAtOnce);
    const Scratch<float> x(all * stride);
    pack_tokens(x.data(), stride, p_.size, Codes::kEvensFirst);
    memset(x.data() + p_.tokens * stride, 0, (all - p_.tokens) * stride * sizeof(float));
    parallel_(parts_of(p_.rows, kPartRows), [&](int64_t part) {
      const int64_t first = part * kPartRows, count = at_most(p_.rows - first, kPartRows);
      for (int64_t token = 0; token < p_.tokens; token += kTokensAtOnce) {
        const int64_t tokens = at_most(p_.tokens - token, kTokensAtOnce);
        float sums[kTokensAtOnce][kPartRows];
        const float* const units = x.data() + token * stride;
        // Five tokens take as long as eight.
        if (tokens > 4) {
          dot<kTokensAtOnce>(first, count, units, stride, sums);
        } else {
          dot_at_most<4>(tokens, first, count, units, stride, sums);
        }
        with_type(p_.dtype, [&](auto type) {
          for (int64_t m = 0; m < tokens; ++m) {
            auto* const y = static_cast<decltype(type)*>(p_.y) + (token + m) * p_.rows + first;
            for (int64_t i = 0; i < count; i += kLanes) {
              store_at_most(y + i, load(&sums[m][i]), count - i);
            }
          }
        });
      }
    });
  }

  template <int kTokens, class... Args>
  void dot_at_most(int64_t tokens, Args&... args) const {
    if constexpr (kTokens > 0) {
      if (tokens == kTokens) return dot<kTokens>(args...);
      dot_at_most<kTokens - 1>(tokens, args...);
    }
  }

  // Multiplies rows of W with some tokens. One row has too few sums to keep the multipliers busy,
  // so some rows are multiplied at a time.
  template <int kTokens>
  void dot(int64_t first, int64_t count, const float* x, int64_t stride,
           float (&sums)[kTokensAtOnce][kPartRows]) const {
    constexpr int kSums = kTokens * kHalves<kTokens>;
    constexpr int kRows = at_most(kMostSums / kSums, 4);
    const Scratch<float> absmax(kRows * p_.blocks);
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows) {
      dot_rows<kTokens, kRows>(first + r, x, stride, absmax.data(), sums, r);
    }
    for (; r < count; ++r) dot_rows<kTokens, 1>(first + r, x, stride, absmax.data(), sums, r);
  }

  // The two halves of a group have sums of their own where there are few.
  template <int kTokens>
  static constexpr int kHalves = kTokens <= 2 ? 2 : 1;

  template <int kTokens, int kRows>
  JAXBNB_APART void dot_rows(int64_t first, const float* x, int64_t stride, float* absmax,
                             float (&to)[kTokensAtOnce][kPartRows], int64_t at) const {
    constexpr int kHalf = kHalves<kTokens> - 1;
    Rows<kRows> rows{0, p_.size, p_.block_size, {}, {}, kBytesAhead};
    for (int r = 0; r < kRows; ++r) {
      rows.codes[r] = p_.codes + (first + r) * p_.stored;
      rows.absmax[r] = absmax_of(p_, first + r, 0, p_.blocks, absmax + r * p_.blocks);
    }
    Floats sums[kRows][kTokens][kHalves<kTokens>];
    for (auto& row : sums) {
      for (auto& halves : row) halves[0] = halves[kHalf] = zero();
    }
    decode_rows<Units>(codes_, rows, [&](int64_t group, auto& groups) {
      const float* const units = x + group * kStrip;
      // Sums stay in registers only if their numbers are constants.
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const Floats token = load(units + m * stride + i * kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            Floats& sum = sums[r][m][i & kHalf];
            sum = Units::multiply_add(groups[r][i], token, sum);
          }
        }
      }
    });
    for (int r = 0; r < kRows; ++r) {
      for (int m = 0; m < kTokens; ++m) {
        const Floats total = kHalf ? sums[r][m][0] + sums[r][m][kHalf] : sums[r][m][0];
        to[m][at + r] = sum(total);
      }
    }
  }

  // x @ W.T.

  void to_rows() const {
    const auto [part_rows, most_steps] = p_.tokens <= kSomeTokens ? kSmallLeft : kLargeLeft;
    const int64_t steps = steps_of(p_.size), strips = parts_of(p_.tokens, kStrip);
    const Scratch<float> x(strips * kStrip * steps);
    pack_lanes(parallel_, p_.tokens, steps, x.data(), [&](int64_t m, float* to) {
      pack(m, p_.size, Codes::kEvensFirst, to);
    });
    multiply_rows<Units>(
        parallel_, p_.rows, part_rows, p_.tokens, steps, most_steps, x.data(),
        [&](float* panel, const Panels& panels, int64_t row, int64_t step) {
          decode_left(panel, panels, row, step * Units::kElements);
        },
        [&](const Panels& panels, int64_t row, int64_t token) {
          write_transposed(panels, row, token);
        });
  }

  // Decodes rows of W to the left panel, from an element on.
  JAXBNB_APART void decode_left(float* panel, const Panels& panels, int64_t first_row,
                                int64_t first) const {
    const int64_t last = at_most(first + panels.steps * Units::kElements, p_.size);
    const int64_t first_block = first / p_.block_size, last_block = parts_of(last, p_.block_size);
    const Scratch<float> absmax(last_block - first_block);
    for (int64_t r = 0; r < panels.rows; ++r) {
      const int64_t row = first_row + r;
      const Rows<1> codes{first,
                          last,
                          p_.block_size,
                          {p_.codes + row * p_.stored + Codes::bytes_of(first)},
                          {absmax_of(p_, row, first_block, last_block, absmax.data())},
                          Codes::bytes_of(panels.steps * Units::kElements)};
      float* const to = panel + r * panels.left_stride;
      decode_rows<Units>(codes_, codes, [&](int64_t index, auto& groups) {
        store_strip(to + index * kStrip, groups[0][0], groups[0][1]);
      });
    }
  }

  // Writes sums of rows by tokens to y, where each token has a row.
  void write_transposed(const Panels& panels, int64_t row, int64_t token) const {
    with_type(p_.dtype, [&](auto type) {
      auto* const y = static_cast<decltype(type)*>(p_.y) + token * p_.rows + row;
      for_transposed(panels, [&](int64_t m, int64_t r, Floats sums) {
        store_at_most(y + m * p_.rows + r, sums, panels.rows - r);
      });
    });
  }

  // x @ W.

  void to_columns() const {
    const int64_t steps = steps_of(p_.rows), stride = steps + kLine;
    const Scratch<float> x(ceil_to(p_.tokens, kTileSize) * stride);
    pack_tokens(x.data(), stride, p_.rows, false);
    const auto [part_columns, most_steps] = p_.tokens <= kSomeTokens ? kSmallRight : kLargeRight;
    for_parts(parallel_, p_.size, part_columns, p_.tokens,
              [&](int64_t column, int64_t token, int64_t tokens) {
      [[maybe_unused]] const typename Units::State state;
      const Scratch<float> panel(part_columns * most_steps);
      const Scratch<float> sums(ceil_to(tokens, kTileSize) * part_columns);
      Panels panels{};
      panels.left_stride = stride;
      panels.right = panel.data();
      panels.strip_stride = kStrip * most_steps;
      panels.sums = sums.data();
      panels.sums_stride = part_columns;
      panels.rows = tokens;
      panels.lanes = ceil_to(at_most(p_.size - column, part_columns), kStrip);
      for (int64_t step = 0; step < steps; step += most_steps) {
        panels.left = x.data() + token * stride + step;
        panels.steps = at_most(steps - step, most_steps);
        panels.is_first = step == 0;
        decode_right(panel.data(), panels, step, column);
        multiply_panels<Units>(panels);
      }
      write(panels, token, column);
    });
  }

  // Decodes columns of W to the right panel, from a step on.
  JAXBNB_APART void decode_right(float* panel, const Panels& panels, int64_t first_step,
                                 int64_t column) const {
    constexpr int kRows = Units::kElements;
    const int64_t last = at_most(column + panels.lanes, p_.size);
    const int64_t first_block = column / p_.block_size, last_block = parts_of(last, p_.block_size);
    const Scratch<float> absmax(kRows * (last_block - first_block));
    for (int64_t k = 0; k < panels.steps; ++k) {
      Rows<kRows> rows{column, last, p_.block_size, {}, {}, panels.steps * kRows * p_.stored};
      const int64_t first_row = (first_step + k) * kRows;
      float* const to = panel + k * kStrip;
      if (first_row >= p_.rows) {
        for (int64_t strip = 0; strip * kStrip < panels.lanes; ++strip) {
          store_strip(to + strip * panels.strip_stride, zero(), zero());
        }
        continue;
      }
      for (int i = 0; i < kRows; ++i) {
        // Beyond the last row, x is zero.
        const int64_t row = at_most(first_row + i, p_.rows - 1);
        float* const buffer = absmax.data() + i * (last_block - first_block);
        rows.codes[i] = p_.codes + row * p_.stored + Codes::bytes_of(column);
        rows.absmax[i] = absmax_of(p_, row, first_block, last_block, buffer);
      }
      decode_rows<Units>(codes_, rows, [&](int64_t index, auto& groups) {
        store_lanes(to + index * kRows * panels.strip_stride, panels.strip_stride, groups);
      });
    }
  }

  static JAXBNB_MEMBER void store_strip(float* to, Floats a, Floats b) {
    store(to, a);
    store(to + kLanes, b);
  }

  static JAXBNB_MEMBER void store_lanes(float* to, int64_t, Floats (&row)[1][2]) {
    store_strip(to, row[0][0], row[0][1]);
  }

#if defined(__AVX512BF16__)
  // Two rows are two strips of pairs. Even columns stay apart from odd ones.
  static JAXBNB_MEMBER void store_lanes(float* to, int64_t strip_stride, Floats (&rows)[2][2]) {
    Units::pair_up(rows[0][0], rows[1][0]);
    Units::pair_up(rows[0][1], rows[1][1]);
    if constexpr (Codes::kEvensFirst) {
      store_strip(to, rows[0][0], rows[0][1]);
      store_strip(to + strip_stride, rows[1][0], rows[1][1]);
    } else {
      store_strip(to, rows[0][0], rows[1][0]);
      store_strip(to + strip_stride, rows[0][1], rows[1][1]);
    }
  }
#endif

  // Writes sums of tokens by columns to y.
  void write(const Panels& panels, int64_t token, int64_t column) const {
    const int64_t columns = at_most(p_.size - column, panels.lanes);
    with_type(p_.dtype, [&](auto type) {
      for (int64_t m = 0; m < panels.rows; ++m) {
        auto* const y = static_cast<decltype(type)*>(p_.y) + (token + m) * p_.size + column;
        for (int64_t c = 0; c < columns; c += kStrip) {
          const float* const from = panels.sums + m * panels.sums_stride + c;
          Floats first = load(from), second = load(from + kLanes);
          if (Codes::kEvensFirst) interleave(first, second);
          store_at_most(y + c, first, columns - c);
          store_at_most(y + c + kLanes, second, columns - c - kLanes);
        }
      }
    });
  }

  // Packs x to rows of units.
  void pack_tokens(float* packed, int64_t stride, int64_t size, bool evens_first) const {
    for_tokens(parallel_, p_.tokens, [&](int64_t m) {
      pack(m, size, evens_first, packed + m * stride);
    });
  }

  void pack(int64_t token, int64_t size, bool evens_first, float* to) const {
    with_type(p_.dtype, [&](auto type) {
      const auto* const x = static_cast<const decltype(type)*>(p_.x) + token * size;
      pack_token<Units>(x, size, p_.compute_dtype, evens_first, to);
    });
  }

  // The units of a row of elements, in whole groups.
  static int64_t steps_of(int64_t elements) {
    return ceil_to(elements, Units::kGroup) / Units::kElements;
  }

  const BlockwiseProduct& p_;
  const Parallel& parallel_;
  const Codes codes_;
};

template <class Units>
void multiply_units(const BlockwiseProduct& product, const Parallel& parallel) {
  switch (product.kind) {
    case CodeKind::k4Bit:
      return Multiplication<Units, Nibbles<Units>>(product, parallel).run();
    case CodeKind::k8Bit:
      return Multiplication<Units, Bytes<Units, CodebookLevels>>(product, parallel).run();
    case CodeKind::kLinear:
      return Multiplication<Units, Bytes<Units, LinearLevels>>(product, parallel).run();
    case CodeKind::kDense:
      if constexpr (Units::kElements == 1) {
        if (product.compute_dtype == Dtype::kFloat16) {
          return Multiplication<Units, Dense<Units, Float16>>(product, parallel).run();
        }
      }
      return Multiplication<Units, Dense<Units, Bfloat16>>(product, parallel).run();
  }
}

}  // namespace

void multiply(const BlockwiseProduct& product, const Parallel& parallel) {
#if defined(__AMX_BF16__)
  using Pairs = AmxUnits;
#elif defined(__AVX512BF16__)
  using Pairs = Bfloat16Units;
#endif
#if defined(__AVX512BF16__)
  // A group of pairs has 64 elements, and one absmax.
  if (product.compute_dtype == Dtype::kBfloat16 && product.block_size % Pairs::kGroup == 0) {
    return multiply_units<Pairs>(product, parallel);
  }
#endif
  multiply_units<Float32Units>(product, parallel);
}

}  // namespace jaxbnb::JAXBNB_ISA
