// Blockwise quantisation and its inverse, each in one pass over memory.
#include "quantize_blockwise.h"

#include "blocks.h"
#include "elements.h"
#include "levels.h"
#include "scratch.h"
#include "simd.h"

namespace jaxbnb::JAXBNB_ISA {
namespace {

// Elements that are encoded or decoded together.
constexpr int64_t kGroup = 4 * kLanes;

JAXBNB_INLINE int64_t whole_groups(int64_t count) { return divide_up(count, kGroup) * kGroup; }

// Copies a block as float32, and returns its largest magnitude: NaN if there is one.
float read_block(const Array& x, int64_t at, int64_t count, float* to) {
  // As integers, magnitudes are in order, and NaN is above infinity.
  Ints largest = broadcast(0);
  with_elements(x, at, [&](const auto* from) {
    for_vectors(from, count, [&](int64_t i, Floats x) {
      largest = max(largest, as_ints(absolute(x)));
      store(to + i, x);
    });
  });
  const float absmax = float_of_bits(maximum(largest));
  if (absmax != absmax) return __builtin_nanf("");
  // Denormals count as zero, as in XLA's code.
  return absmax < __FLT_MIN__ ? 0.0f : absmax;
}

// Encodes to 4 bits by a binary search. Each comparison finds a bit of the number's rank, counted
// from the highest: NaN is not below any point, so it gets the highest rank.
class NibbleEncoder {
 public:
  explicit NibbleEncoder(const Points& points)
      : half_(points.points[7]), quarters_(at(points, 4)), eighths_(at(points, 2)),
        sixteenths_(at(points, 1)), of_ranks_(reversed(points.of_ranks)) {}

  static constexpr int64_t bytes(int64_t elements) { return (elements + 1) / 2; }

  // Encodes kGroup numbers, each times both factors.
  JAXBNB_MEMBER void operator()(const float* x, const Floats (&factors)[2],
                                uint8_t* to) const {
    Ints codes[4];
    for (int i = 0; i < 4; ++i) codes[i] = rank(load(x + i * kLanes) * factors[0] * factors[1]);
    store_nibbles(to, codes[0], codes[1], codes[2], codes[3], of_ranks_);
  }

 private:
  struct Entries {
    float entries[8];
  };

  // The points that divide ranks in steps of 2 * `step`, from the highest one down.
  static Entries at(const Points& points, int step) {
    Entries found = {};
    for (int i = 0; i < 8 / step; ++i) found.entries[i] = points.points[15 - step - 2 * step * i];
    return found;
  }

  JAXBNB_MEMBER Ints rank(Floats x) const {
    Ints rank = increment(broadcast(0), x <= broadcast(half_));
    rank = increment(rank + rank, x <= Table8<float>(quarters_.entries)[rank]);
    rank = increment(rank + rank, x <= Table8<float>(eighths_.entries)[rank]);
    return increment(rank + rank, x <= Table8<float>(sixteenths_.entries)[rank]);
  }

  static ByteTable reversed(const uint8_t* of_ranks) {
    uint8_t entries[16];
    for (int i = 0; i < 16; ++i) entries[i] = of_ranks[15 - i];
    return ByteTable(entries);
  }

  const float half_;
  const Entries quarters_, eighths_, sixteenths_;
  const ByteTable of_ranks_;
};

// Encodes to 8 bits: a number's cell and one comparison decide.
class ByteEncoder {
 public:
  explicit ByteEncoder(const Cells& cells) : cells_(cells) {}

  static constexpr int64_t bytes(int64_t elements) { return elements; }

  JAXBNB_MEMBER void operator()(const float* x, const Floats (&factors)[2],
                                uint8_t* to) const {
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      store(to + i, code(load(x + i) * factors[0] * factors[1]));
    }
  }

 private:
  JAXBNB_MEMBER Ints code(Floats x) const {
    const Floats magnitude = cells_.is_signed ? absolute(x) : x;
    // NaN is in the lowest cell.
    const Ints bits = as_ints(max(magnitude, broadcast(cells_.lowest)));
    Ints cell = shift_right(bits, broadcast(cells_.shift)) - broadcast(cells_.first);
    if (cells_.is_signed) {
      const Mask is_negative = as_ints(x) < broadcast(0);
      cell = cell + select(is_negative, broadcast(cells_.negative), broadcast(0));
    }
    const Floats point = as_floats(gather(cells_.table, cell + cell));
    const Ints codes = gather(cells_.table + 1, cell + cell);
    const Ints code = select(x > point, shift_right<8>(codes), codes);
    return select(is_nan(x), broadcast(cells_.of_nan), code);
  }

  const Cells& cells_;
};

// Encodes to linear int8.
class LinearEncoder {
 public:
  static constexpr int64_t bytes(int64_t elements) { return elements; }

  JAXBNB_MEMBER void operator()(const float* x, const Floats (&factors)[2],
                                uint8_t* to) const {
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const Floats scaled = broadcast(127.0f) * (load(x + i) * factors[0] * factors[1]);
      const Ints code = round_to_ints(scaled);
      store(to + i, select(is_nan(scaled), broadcast(0), code));
    }
  }
};

template <class Encoder>
void quantize(const Quantize& call, const Encoder& encode, const Parallel& parallel) {
  const Blocks blocks(call.num_rows, call.row_size, call.block_size);
  parallel(blocks.parts(), [&](int64_t part) {
    const Scratch<float> scratch(whole_groups(blocks.longest()));
    float* const values = scratch.data();
    blocks.of_part(part, [&](const Block& block) {
      const int64_t at = block.row * call.row_size + block.first, count = block.count;
      const float absmax = read_block(call.x, at, count, values);
      call.absmax[block.number] = absmax;
      // The last group is filled with zeros.
      for (int64_t i = count; i < whole_groups(count); ++i) values[i] = 0;
      const float nearer = factor_to_one(absmax);
      const float reciprocal = absmax > 0 ? 1 / (absmax * nearer) : 0.0f;
      const Floats factors[2] = {broadcast(nearer), broadcast(reciprocal)};
      uint8_t* const to = call.codes + block.row * Encoder::bytes(call.row_size);
      int64_t i = 0;
      for (; i + kGroup <= count; i += kGroup) {
        encode(values + i, factors, to + Encoder::bytes(block.first + i));
      }
      if (i == count) return;
      uint8_t codes[kGroup];
      encode(values + i, factors, codes);
      memcpy(to + Encoder::bytes(block.first + i), codes, Encoder::bytes(count - i));
    });
  });
}

// Decodes codes of 4 bits of one block: to float32, two vectors at a time.
template <class T>
class Nibbles;

template <>
class Nibbles<float> {
 public:
  Nibbles(const float* levels, float absmax) : table_(scaled(levels, absmax).entries) {}

  static constexpr int64_t bytes(int64_t elements) { return (elements + 1) / 2; }

  JAXBNB_MEMBER void operator()(const uint8_t* codes, float* to) const {
    const Ints pairs = load(codes);
    Floats even = table_[shift_right<4>(pairs)], odd = table_[pairs];
    interleave(even, odd);
    store(to, even);
    store(to + kLanes, odd);
  }

  struct Entries {
    float entries[16];
  };

  static JAXBNB_MEMBER Entries scaled(const float* levels, float absmax) {
    Entries scaled;
    for (int i = 0; i < 16; i += kLanes) {
      store(scaled.entries + i, load(levels + i) * broadcast(absmax));
    }
    return scaled;
  }

 private:
  const Table16<float> table_;
};

// To a dtype of 16 bits: a lane holds two elements, the first one in its low half.
template <class Half>
class Nibbles {
 public:
  Nibbles(const float* levels, float absmax) : Nibbles(rounded(levels, absmax)) {}

  static constexpr int64_t bytes(int64_t elements) { return (elements + 1) / 2; }

  JAXBNB_MEMBER void operator()(const uint8_t* codes, Half* to) const {
    const Ints pairs = load(codes);
    const Ints both = low_[shift_right<4>(pairs)] | high_[pairs];
    store(reinterpret_cast<int32_t*>(to), both);
  }

 private:
  struct Entries {
    int32_t low[16], high[16];
  };

  explicit JAXBNB_MEMBER Nibbles(const Entries& entries)
      : low_(entries.low), high_(entries.high) {}

  static JAXBNB_MEMBER Entries rounded(const float* levels, float absmax) {
    const Nibbles<float>::Entries scaled = Nibbles<float>::scaled(levels, absmax);
    Entries entries;
    Half halves[16];
    for (int i = 0; i < 16; i += kLanes) {
      store(halves + i, load(scaled.entries + i));
      const Ints low = load_halves(&halves[i].bits);
      store(entries.low + i, low);
      store(entries.high + i, shift_left<16>(low));
    }
    return entries;
  }

  const Table16<int32_t> low_, high_;
};

// Decodes codes of 8 bits of one block.
template <class T, class Levels>
class Bytes {
 public:
  Bytes(const float* levels, float absmax) : levels_{levels}, scale_(Levels::scale(absmax)) {}

  static constexpr int64_t bytes(int64_t elements) { return elements; }

  JAXBNB_MEMBER void operator()(const uint8_t* codes, T* to) const {
    for (int i = 0; i < 2 * kLanes; i += kLanes) {
      store(to + i, levels_(codes + i) * scale_);
    }
  }

 private:
  const Levels levels_;
  const Floats scale_;
};

// A block's absmax. A nested one is computed in two operations, each rounded, as by the reference.
float absmax_of(const Dequantize& call, const Block& block) {
  const NestedAbsmax& nested = call.nested;
  if (nested.codes == nullptr) return call.absmax[block.number];
  const int64_t matrix = block.row / call.rows_of_matrix;
  const int64_t blocks = call.rows_of_matrix * divide_up(call.row_size, call.block_size);
  const int64_t entries = divide_up(blocks, NestedAbsmax::kNestedBlock);
  const int64_t entry = (block.number - matrix * blocks) / NestedAbsmax::kNestedBlock;
  const float level = nested.levels[nested.codes[block.number]];
  return level * nested.nested[matrix * entries + entry] + nested.offset[matrix];
}

template <class Decoder, class T>
void dequantize(const Dequantize& call, T* result, const Parallel& parallel) {
  constexpr int64_t kPair = 2 * kLanes;
  const Blocks blocks(call.num_rows, call.row_size, call.block_size);
  parallel(blocks.parts(), [&](int64_t part) {
    blocks.of_part(part, [&](const Block& block) {
      const int64_t row = call.row_numbers == nullptr ? block.row : call.row_numbers[block.row];
      const uint8_t* const codes = call.codes + row * Decoder::bytes(call.row_size) +
                                   Decoder::bytes(block.first);
      T* const to = result + block.row * call.row_size + block.first;
      const Decoder decode(call.levels, absmax_of(call, block));
      int64_t i = 0;
      for (; i + kPair <= block.count; i += kPair) decode(codes + Decoder::bytes(i), to + i);
      if (i == block.count) return;
      uint8_t last[kPair] = {};
      T decoded[kPair];
      memcpy(last, codes + Decoder::bytes(i), Decoder::bytes(block.count - i));
      decode(last, decoded);
      memcpy(to + i, decoded, (block.count - i) * sizeof(T));
    });
  });
}

}  // namespace

void quantize_blockwise(const Quantize& call, const Parallel& parallel) {
  switch (call.kind) {
    case CodeKind::k4Bit:
      return quantize(call, NibbleEncoder(call.points), parallel);
    case CodeKind::k8Bit:
      return quantize(call, ByteEncoder(call.cells), parallel);
    case CodeKind::kLinear:
      return quantize(call, LinearEncoder(), parallel);
  }
}

void dequantize_blockwise(const Dequantize& call, const Parallel& parallel) {
  with_elements(call.result, 0, [&]<class T>(T* result) {
    switch (call.kind) {
      case CodeKind::k4Bit:
        return dequantize<Nibbles<T>>(call, result, parallel);
      case CodeKind::k8Bit:
        return dequantize<Bytes<T, CodebookLevels>>(call, result, parallel);
      case CodeKind::kLinear:
        return dequantize<Bytes<T, LinearLevels>>(call, result, parallel);
    }
  });
}

}  // namespace jaxbnb::JAXBNB_ISA
