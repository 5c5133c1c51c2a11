// The product of LLM.int8: quantises x, multiplies integers, and turns sums into numbers at once.
//
// Sums are exact, so they do not depend on their order. There are two ways to get them:
//
// - few tokens: W is read as it lies in memory. A vector of codes is multiplied with some tokens.
// - more tokens: some rows of W at a time are copied to the cache as the left panel, as their codes
//   are consecutive; x is the right one, with a token in each lane.
//
// Outlier columns of x and of W are gathered for the product with a blockwise-quantised matrix.
#include "matmul_int8.h"

#include "elements.h"
#include "matmul_blockwise.h"
#include "pack.h"
#include "panels.h"
#include "scratch.h"

namespace jaxbnb::JAXBNB_ISA {
namespace {

using Units = Int8Units;
// The codes in a vector of units.
constexpr int kGroup = kLanes * Units::kElements;

// Few tokens are at most so many. W is read once for some of them.
constexpr int64_t kFewTokens = 32;
constexpr int kTokensAtOnce = 8;
// Rows of W in a part: for few tokens, and in a panel, which has so many steps.
constexpr int64_t kPartRows = 64, kPanelRows = 128, kPanelSteps = 256;
// How far ahead W is fetched from memory.
constexpr int64_t kBytesAhead = 4096;

class Int8Multiplication {
 public:
  Int8Multiplication(const Int8Product& product, const Parallel& parallel)
      : p_(product),
        parallel_(parallel),
        padded_(ceil_to(p_.size, kGroup)),
        steps_(padded_ / Units::kElements),
        row_scale_(p_.tokens),
        offsets_(p_.tokens),
        is_outlier_(padded_) {}

  void run() const {
    memset(is_outlier_.data(), 0, padded_);
    for_tokens(parallel_, p_.tokens, [&](int64_t m) { row_scale_.data()[m] = scale_of(m); });
    const Scratch<int32_t> columns(p_.size);
    int64_t count = 0;
    for (int64_t i = 0; i < p_.size; ++i) {
      if (is_outlier_.data()[i]) columns.data()[count++] = i;
    }
    if (count == 0) return multiply(nullptr);
    if (p_.y.dtype == Dtype::kFloat32) {
      auto* const y = static_cast<float*>(p_.y.data);
      multiply_outliers(columns.data(), count, y);
      return multiply(y);
    }
    const Scratch<float> outliers(p_.tokens * p_.rows);
    multiply_outliers(columns.data(), count, outliers.data());
    multiply(outliers.data());
  }

 private:
  // Returns a token's largest magnitude, of those below the threshold; NaN if there is one. Marks
  // the columns of the others.
  float scale_of(int64_t token) const {
    // As integers, magnitudes are in order, and NaN is above infinity.
    Ints largest = broadcast(0);
    const Floats threshold = broadcast(p_.outlier_threshold);
    with_elements(p_.x, token * p_.size, [&](const auto* x) {
      if (p_.outlier_threshold == 0) {
        return for_vectors(x, p_.size, [&](int64_t, Floats x) {
          largest = max(largest, as_ints(absolute(x)));
        });
      }
      for_vectors(x, p_.size, [&](int64_t i, Floats x) {
        const Mask is_large = absolute(x) >= threshold;
        if (any(is_large)) mark(i, is_large);
        largest = max(largest, select(is_large, broadcast(0), as_ints(absolute(x))));
      });
    });
    const float absmax = float_of_bits(maximum(largest));
    // Denormals count as zero, as in XLA's code.
    return absmax < __FLT_MIN__ ? 0.0f : absmax;
  }

  // Several threads may mark a column.
  void mark(int64_t column, Mask is_large) const {
    int32_t lanes[kLanes];
    store(lanes, select(is_large, broadcast(1), broadcast(0)));
    for (int i = 0; i < kLanes; ++i) {
      if (lanes[i]) __atomic_store_n(&is_outlier_.data()[column + i], 1, __ATOMIC_RELAXED);
    }
  }

  // Gathered columns of W are a linear int8 matrix with one block a row.
  void multiply_outliers(const int32_t* columns, int64_t count, float* y) const {
    const Scratch<float> x(p_.tokens * count);
    for_tokens(parallel_, p_.tokens, [&](int64_t m) {
      const Scratch<float> token(p_.size + kLanes);
      read(p_.x, m * p_.size, p_.size, token.data());
      for (int64_t i = 0; i < count; ++i) x.data()[m * count + i] = token.data()[columns[i]];
    });
    const Scratch<uint8_t> codes(p_.rows * count);
    parallel_(parts_of(p_.rows, kPartRows), [&](int64_t part) {
      const int64_t last = at_most((part + 1) * kPartRows, p_.rows);
      for (int64_t r = part * kPartRows; r < last; ++r) {
        for (int64_t i = 0; i < count; ++i) {
          codes.data()[r * count + i] = p_.codes[r * p_.size + columns[i]];
        }
      }
    });
    BlockwiseProduct product{};
    product.x = x.data();
    product.y = y;
    product.dtype = Dtype::kFloat32;
    product.compute_dtype = p_.compute_dtype;
    product.codes = codes.data();
    product.kind = CodeKind::kLinear;
    product.absmax = p_.col_scale;
    product.tokens = p_.tokens;
    product.rows = p_.rows;
    product.size = product.stored = count;
    product.blocks = 1;
    product.block_size = ceil_to(count, 64);
    product.transpose = true;
    p_.multiply(product, parallel_);
  }

  // Multiplies integers, and adds the outliers' product if there is one.
  void multiply(const float* outliers) const {
    if (p_.tokens <= kFewTokens) return multiply_few_tokens(outliers);
    multiply_by_panels(outliers);
  }

  void multiply_few_tokens(const float* outliers) const {
    const Scratch<float> x(p_.tokens * steps_);
    for_tokens(parallel_, p_.tokens, [&](int64_t m) { quantize(m, x.data() + m * steps_); });
    parallel_(parts_of(p_.rows, kPartRows), [&](int64_t part) {
      const int64_t first = part * kPartRows, count = at_most(p_.rows - first, kPartRows);
      for (int64_t token = 0; token < p_.tokens; token += kTokensAtOnce) {
        int32_t sums[kTokensAtOnce][kPartRows];
        const int64_t tokens = at_most(p_.tokens - token, kTokensAtOnce);
        const float* const units = x.data() + token * steps_;
        dot_at_most<kTokensAtOnce>(tokens, first, count, units, sums);
        with_elements(p_.y, token * p_.rows + first, [&](auto* y) {
          for (int64_t m = 0; m < tokens; ++m) {
            for (int64_t i = 0; i < count; i += kLanes) {
              write(y + m * p_.rows + i, load(&sums[m][i]), token + m, first + i, outliers);
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

  // Multiplies rows of W with some tokens, some rows at a time: one has too few sums to keep the
  // multipliers busy.
  template <int kTokens>
  void dot(int64_t first, int64_t count, const float* x,
           int32_t (&sums)[kTokensAtOnce][kPartRows]) const {
    // Registers also hold a vector of each row, and one of x.
    constexpr int kRows = at_most(kMostSums * 2 / 3 / kTokens, 4);
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows) dot_rows<kTokens, kRows>(first + r, x, sums, r);
    for (; r < count; ++r) dot_rows<kTokens, 1>(first + r, x, sums, r);
  }

  template <int kTokens, int kRows>
  JAXBNB_APART void dot_rows(int64_t row, const float* x,
                             int32_t (&to)[kTokensAtOnce][kPartRows], int64_t at) const {
    const int8_t* const codes = p_.codes + row * p_.size;
    // The last codes of each row, fewer than a vector. Beyond them, x is zero.
    int8_t last[kRows][kGroup] = {};
    const int64_t whole = p_.size / kGroup * kGroup;
    for (int r = 0; r < kRows; ++r) memcpy(last[r], codes + r * p_.size + whole, p_.size - whole);
    // Sums stay in registers only if their numbers are constants.
    Ints sums[kRows][kTokens];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) sums[r][m] = broadcast(0);
    }
    for (int64_t column = 0; column < p_.size; column += kGroup, x += kLanes) {
      Floats w[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const int8_t* const from = column < whole ? codes + r * p_.size + column : last[r];
        prefetch(from, kBytesAhead);
        w[r] = Units::load_w(from);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) {
        const Floats token = load(x + m * steps_);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r][m] = Units::multiply_add(w[r], token, sums[r][m]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) to[m][at + r] = sum(sums[r][m]);
    }
  }

  void multiply_by_panels(const float* outliers) const {
    const Scratch<float> x(ceil_to(p_.tokens, kStrip) * steps_);
    pack_lanes(parallel_, p_.tokens, steps_, x.data(),
               [&](int64_t m, float* to) { quantize(m, to); });
    multiply_rows<Units>(
        parallel_, p_.rows, kPanelRows, p_.tokens, steps_, kPanelSteps, x.data(),
        [&](float* panel, const Panels& panels, int64_t row, int64_t step) {
          copy_left(panel, panels, row, step * Units::kElements);
        },
        [&](const Panels& panels, int64_t row, int64_t token) {
          with_elements(p_.y, token * p_.rows, [&](auto* y) {
            for_transposed(panels, [&](int64_t m, int64_t r, Floats sums) {
              write(y + m * p_.rows + row + r, as_ints(sums), token + m, row + r, outliers);
            });
          });
        });
  }

  // Copies rows of W to the left panel, from a column on.
  void copy_left(float* panel, const Panels& panels, int64_t row, int64_t column) const {
    const int64_t last = at_most(column + panels.steps * Units::kElements, p_.size);
    for (int64_t r = 0; r < panels.rows; ++r) {
      const int8_t* const codes = p_.codes + (row + r) * p_.size;
      float* to = panel + r * panels.left_stride;
      int64_t i = column;
      for (; i + kGroup <= last; i += kGroup, to += kLanes) store(to, Units::load_w(codes + i));
      if (i < last) {
        // Beyond the last code, x is zero.
        int8_t group[kGroup] = {};
        memcpy(group, codes + i, last - i);
        store(to, Units::load_w(group));
      }
    }
  }

  // Quantises a token to units, and fills the last vector with zeros.
  void quantize(int64_t token, float* to) const {
    const Scratch<int8_t> codes(padded_);
    memset(codes.data() + padded_ - kGroup, 0, kGroup);
    const float absmax = row_scale_.data()[token], nearer = factor_to_one(absmax);
    const Floats factor = broadcast(absmax > 0 ? 127.0f * (1.0f / (absmax * nearer)) : 0.0f);
    Ints total = broadcast(0);
    with_elements(p_.x, token * p_.size, [&](const auto* x) {
      for_vectors(x, p_.size, [&](int64_t i, Floats x) {
        // What is not finite becomes any code: the row has no finite scale.
        Ints code = round_to_ints(x * broadcast(nearer) * factor);
        // Outlier columns have codes of zero.
        code = code & (load(is_outlier_.data() + i) - broadcast(1));
        total += code;
        store(codes.data() + i, code);
      });
    });
    // Modulo 2^32, as the sums are.
    offsets_.data()[token] =
        static_cast<int32_t>(static_cast<uint32_t>(sum(total)) * uint32_t{Units::kOffset});
    for (int64_t i = 0; i < padded_; i += kGroup, to += kLanes) {
      store(to, Units::load_x(codes.data() + i));
    }
  }

  // Writes a token's numbers for kLanes rows of W, or for those that are left.
  template <class T>
  JAXBNB_MEMBER void write(T* y, Ints sums, int64_t token, int64_t row,
                           const float* outliers) const {
    const int64_t count = at_most(p_.rows - row, kLanes);
    const auto read = [count](const float* from) {
      return count == kLanes ? load(from) : load(from, count);
    };
    // What a product of two codes of 1 stands for, divided by the product of their scales.
    constexpr float kUnit = 1.0f / (127 * 127);
    const Floats scales = broadcast(row_scale_.data()[token]) * read(p_.col_scale + row);
    Floats numbers = to_floats(sums - broadcast(offsets_.data()[token])) * scales;
    numbers *= broadcast(kUnit);
    if (outliers) numbers += read(outliers + token * p_.rows + row);
    store_at_most(y, numbers, count);
  }

  const Int8Product& p_;
  const Parallel& parallel_;
  const int64_t padded_, steps_;       // codes and units of a token, in whole vectors
  const Scratch<float> row_scale_;     // of each token
  const Scratch<int32_t> offsets_;     // what each token's sums are above
  const Scratch<uint8_t> is_outlier_;  // 1 for each column with an outlier
};

}  // namespace

void multiply_int8(const Int8Product& product, const Parallel& parallel) {
  Int8Multiplication(product, parallel).run();
}

}  // namespace jaxbnb::JAXBNB_ISA
