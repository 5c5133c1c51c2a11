// Decodes rows of blockwise-quantised matrices to groups of units.
//
// A block's sixteen levels, multiplied by its absmax and rounded to the dtype of the product, fit a
// register or two. A permutation of these decodes the matrix to the very numbers that the reference
// multiplies with, at one multiplication a block. The levels of codes of
// 8 bits are multiplied one by one.
#pragma once

#include "levels.h"
#include "units.h"

namespace jaxbnb::JAXBNB_ISA {

// Codes of 4 bits. The high halves of bytes are the even elements of a row.
template <class Units>
class Nibbles;

template <>
class Nibbles<Float32Units> {
 public:
  static constexpr bool kEvensFirst = true;
  static constexpr int64_t bytes_of(int64_t elements) { return (elements + 1) / 2; }

  using Block = Table16<float>;

  explicit Nibbles(const BlockwiseProduct& product)
      : levels_(product.levels), dtype_(product.compute_dtype) {}

  JAXBNB_MEMBER Block block(float absmax) const {
    const Floats scale = broadcast(absmax);
    if (dtype_ == Dtype::kFloat32) {
      return levels_.map([&](Ints a) { return as_ints(as_floats(a) * scale); });
    }
    return levels_.map([&](Ints a) { return as_ints(rounded(as_floats(a) * scale, dtype_)); });
  }

  static JAXBNB_MEMBER void decode(const Block& block, const uint8_t* codes, Floats (&group)[2]) {
    const Ints bytes = load(codes);
    group[0] = block[shift_right<4>(bytes)];
    group[1] = block[bytes];
  }

 private:
  const Table16<float> levels_;
  const Dtype dtype_;
};

// Codes of 8 bits.
template <class Units, class Levels>
class Bytes;

template <class Levels>
class Bytes<Float32Units, Levels> {
 public:
  static constexpr bool kEvensFirst = false;
  static constexpr int64_t bytes_of(int64_t elements) { return elements; }

  struct Block {
    Levels levels;
    Floats scale;
    Dtype dtype;
  };

  explicit Bytes(const BlockwiseProduct& product)
      : levels_{product.levels}, dtype_(product.compute_dtype) {}

  JAXBNB_MEMBER Block block(float absmax) const { return {levels_, Levels::scale(absmax), dtype_}; }

  static JAXBNB_MEMBER void decode(const Block& block, const uint8_t* codes, Floats (&group)[2]) {
    for (int i = 0; i < 2; ++i) {
      group[i] = rounded(block.levels(codes + i * kLanes) * block.scale, block.dtype);
    }
  }

 private:
  const Levels levels_;
  const Dtype dtype_;
};

// A dense matrix is its own code, without absmax. T is what it holds.
template <class Units, class T>
class Dense {
 public:
  static constexpr bool kEvensFirst = false;
  static constexpr int64_t bytes_of(int64_t elements) { return sizeof(T) * elements; }

  struct Block {};

  explicit Dense(const BlockwiseProduct&) {}

  JAXBNB_MEMBER Block block(float) const { return {}; }

  static JAXBNB_MEMBER void decode(const Block&, const uint8_t* codes, Floats (&group)[2]) {
    for (int i = 0; i < 2; ++i) {
      if constexpr (Units::kElements == 2) {
        // Neighbours in memory are a pair already.
        group[i] = load(reinterpret_cast<const float*>(codes) + i * kLanes);
      } else {
        group[i] = load(reinterpret_cast<const T*>(codes) + i * kLanes);
      }
    }
  }
};

#if defined(__AVX512BF16__)

template <class Units>
  requires(Units::kElements == 2)
class Nibbles<Units> {
 public:
  static constexpr bool kEvensFirst = true;
  static constexpr int64_t bytes_of(int64_t elements) { return (elements + 1) / 2; }

  // The levels are there twice, so that a permutation by five bits sees only four of them.
  struct Block {
    __m512i levels;
  };

  explicit Nibbles(const BlockwiseProduct& product) : levels_(load(product.levels)) {}

  JAXBNB_MEMBER Block block(float absmax) const {
    const Floats scaled = levels_ * broadcast(absmax);
    return {_mm512_castps_si512(Units::of_two(scaled, scaled).lanes)};
  }

  static JAXBNB_MEMBER void decode(const Block& block, const uint8_t* codes, Floats (&group)[2]) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m512i bytes = _mm512_cvtepu8_epi16(packed);
    const __m512i evens = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), block.levels);
    group[0] = {_mm512_castsi512_ps(evens)};
    group[1] = {_mm512_castsi512_ps(_mm512_permutexvar_epi16(bytes, block.levels))};
  }

 private:
  const Floats levels_;
};

template <class Units, class Levels>
  requires(Units::kElements == 2)
class Bytes<Units, Levels> {
 public:
  static constexpr bool kEvensFirst = false;
  static constexpr int64_t bytes_of(int64_t elements) { return elements; }

  struct Block {
    Levels levels;
    Floats scale;
  };

  explicit Bytes(const BlockwiseProduct& product) : levels_{product.levels} {}

  JAXBNB_MEMBER Block block(float absmax) const { return {levels_, Levels::scale(absmax)}; }

  static JAXBNB_MEMBER void decode(const Block& block, const uint8_t* codes, Floats (&group)[2]) {
    const auto decoded = [&](int i) {
      return block.levels(codes + i * kLanes) * block.scale;
    };
    group[0] = Bfloat16Units::of_two(decoded(0), decoded(1));
    group[1] = Bfloat16Units::of_two(decoded(2), decoded(3));
  }

 private:
  const Levels levels_;
};

#endif

// A part of some rows that are decoded together, from element `first` to `last` - 1.
template <int kRows>
struct Rows {
  int64_t first, last, block_size;
  const uint8_t* codes[kRows];  // of the first element
  const float* absmax[kRows];   // of the block that it is in
  int64_t ahead;                // bytes from a code to one that will be decoded soon
};

template <class Units, class Codes, int kRows, class Use>
JAXBNB_INLINE void decode_group(const Rows<kRows>& rows, int64_t group,
                                const typename Codes::Block (&blocks)[kRows], const Use& use) {
  Floats groups[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    const uint8_t* const from = rows.codes[r] + group * Codes::bytes_of(Units::kGroup);
    prefetch(from, rows.ahead);
    Codes::decode(blocks[r], from, groups[r]);
  }
  use(group, groups);
}

// Decodes from a group on to the end of its block, or of the rows, and returns the next group.
template <class Units, class Codes, int kRows, class Use>
JAXBNB_INLINE int64_t decode_block(const Codes& codes, const Rows<kRows>& rows, int64_t block,
                                   int64_t group, int64_t end, const Use& use) {
  typename Codes::Block blocks[kRows];
  for (int r = 0; r < kRows; ++r) blocks[r] = codes.block(rows.absmax[r][block]);
  for (; group < end; ++group) decode_group<Units, Codes>(rows, group, blocks, use);
  return group;
}

// Calls use(index, groups) for each group of the rows. A group that they end in is filled with the
// first level.
template <class Units, class Codes, int kRows, class Use>
JAXBNB_INLINE void decode_rows(const Codes& codes, const Rows<kRows>& rows, const Use& use) {
  const int64_t count = rows.last - rows.first, whole = count / Units::kGroup;
  int64_t block = 0, group = 0;
  // With a constant number of groups, blocks do not wait for each other.
  if (constexpr int64_t kUsual = 64; rows.block_size == kUsual) {
    constexpr int64_t kGroups = kUsual / Units::kGroup;
    for (; (block + 1) * kGroups <= whole; ++block) {
      decode_block<Units>(codes, rows, block, block * kGroups, (block + 1) * kGroups, use);
    }
    group = block * kGroups;
  }
  const int64_t groups = rows.block_size / Units::kGroup;
  int64_t end = (block + 1) * groups - rows.first % rows.block_size / Units::kGroup;
  for (; end <= whole; ++block, end += groups) {
    group = decode_block<Units>(codes, rows, block, group, end, use);
  }
  if (group < whole) group = decode_block<Units>(codes, rows, block, group, whole, use);
  const int64_t left = count - whole * Units::kGroup;
  if (left == 0) return;
  Floats last[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    uint8_t buffer[Codes::bytes_of(Units::kGroup)] = {};
    const uint8_t* const from = rows.codes[r] + group * Codes::bytes_of(Units::kGroup);
    memcpy(buffer, from, Codes::bytes_of(left));
    Codes::decode(codes.block(rows.absmax[r][block]), buffer, last[r]);
  }
  use(group, last);
}

// The absmax of blocks `first` to `last` - 1 of a row: in place, or decoded to a buffer.
static inline const float* absmax_of(const BlockwiseProduct& product, int64_t row, int64_t first,
                                     int64_t last, float* buffer) {
  const int64_t begin = row * product.blocks + first, count = last - first;
  if (product.absmax != nullptr) return product.absmax + begin;
  const int64_t nested_size = product.nested_block_size;
  for (int64_t i = 0; i < count;) {
    const int64_t nested = (begin + i) / nested_size;
    const int64_t to_next = (nested + 1) * nested_size - begin;
    const int64_t end = to_next < count ? to_next : count;
    const float scale = product.nested_absmax[nested];
    for (; i < end; ++i) {
      // Two operations, each rounded, as the reference has them.
      const float level = product.absmax_levels[product.absmax_codes[begin + i]];
      buffer[i] = level * scale + product.offset;
    }
  }
  return buffer;
}

}  // namespace jaxbnb::JAXBNB_ISA
