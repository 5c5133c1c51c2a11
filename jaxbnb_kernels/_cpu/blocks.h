// Rows that consist of blocks, divided into parts for threads.
#pragma once

#include "elements.h"
#include "parallel.h"

namespace jaxbnb::JAXBNB_ISA {
namespace {

struct Block {
  int64_t row, number;    // its row, and its number among all blocks of all rows
  int64_t first, count;   // its elements within the row
};

class Blocks {
 public:
  Blocks(int64_t num_rows, int64_t row_size, int64_t block_size)
      : row_size_(row_size), block_size_(block_size), per_row_(divide_up(row_size, block_size)),
        blocks_(num_rows * per_row_), per_part_(divide_up(kPart, block_size)) {}

  // The number of elements of the longest block.
  int64_t longest() const { return smaller(block_size_, row_size_); }

  int64_t parts() const { return divide_up(blocks_, per_part_); }

  // Calls use(block) for each block of a part.
  template <class Use>
  void of_part(int64_t part, const Use& use) const {
    const int64_t begin = part * per_part_, end = smaller(blocks_, begin + per_part_);
    int64_t row = begin / per_row_, in_row = begin % per_row_;
    for (int64_t number = begin; number < end; ++number) {
      const int64_t first = in_row * block_size_;
      use(Block{row, number, first, smaller(block_size_, row_size_ - first)});
      if (++in_row == per_row_) {
        in_row = 0;
        ++row;
      }
    }
  }

 private:
  // Elements of a part: enough to make claiming one cheap, few enough to share small arrays.
  static constexpr int64_t kPart = 32768;

  const int64_t row_size_, block_size_, per_row_, blocks_, per_part_;
};

}  // namespace
}  // namespace jaxbnb::JAXBNB_ISA
