// Packs x to units, and writes sums to y: what a product does besides its arithmetic.
#pragma once

#include "panels.h"
#include "parallel.h"
#include "scratch.h"

namespace jaxbnb::JAXBNB_ISA {

constexpr int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
constexpr int64_t ceil_to(int64_t count, int64_t size) { return parts_of(count, size) * size; }
constexpr int64_t at_most(int64_t a, int64_t limit) { return a < limit ? a : limit; }

// Calls use(T{}) with the type of a dtype.
template <class Use>
JAXBNB_INLINE void with_type(Dtype dtype, const Use& use) {
  if (dtype == Dtype::kFloat32) return use(float{});
  if (dtype == Dtype::kBfloat16) return use(Bfloat16{});
  use(Float16{});
}

// Packs a token to units, and fills the last group with zeros.
template <class Units, class T>
static void pack_token(const T* x, int64_t count, Dtype dtype, bool evens_first, float* to) {
  if (Units::kElements == 2 && __is_same(T, Bfloat16) && !evens_first) {
    // Neighbours in memory are a pair already.
    memcpy(to, x, count * sizeof(T));
    memset(reinterpret_cast<T*>(to) + count, 0, (ceil_to(count, Units::kGroup) - count) * sizeof(T));
    return;
  }
  for (int64_t k = 0; k < count; k += Units::kGroup, to += 2 * kLanes) {
    float group[Units::kGroup];
    for (int i = 0; i < Units::kGroup; i += kLanes) {
      const int64_t left = count - k - i;
      const Floats values = left >= kLanes ? load(x + k + i)
                            : left > 0     ? load(x + k + i, left)
                                           : zero();
      store(group + i, rounded(values, dtype));
    }
    Units::pack(group, evens_first, to);
  }
}

template <class T>
JAXBNB_INLINE void store_at_most(T* to, Floats a, int64_t count) {
  if (count >= kLanes) return store(to, a);
  if (count > 0) store(to, a, count);
}

// Calls use(token) for each token.
template <class Use>
static void for_tokens(const Parallel& parallel, int64_t tokens, const Use& use) {
  constexpr int64_t kTokens = 16;
  parallel(parts_of(tokens, kTokens), [&](int64_t part) {
    const int64_t last = at_most((part + 1) * kTokens, tokens);
    for (int64_t m = part * kTokens; m < last; ++m) use(m);
  });
}

// Packs x to strips of panels: a token in each lane, a row for each step. Steps are whole vectors.
// pack(token, to) writes the units of a token.
template <class Pack>
static void pack_lanes(const Parallel& parallel, int64_t tokens, int64_t steps, float* packed,
                       const Pack& pack) {
  parallel(parts_of(tokens, kLanes), [&](int64_t part) {
    const int64_t first = part * kLanes, count = at_most(tokens - first, kLanes);
    const Scratch<float> rows(kLanes * steps);
    memset(rows.data() + count * steps, 0, (kLanes - count) * steps * sizeof(float));
    for (int64_t m = 0; m < count; ++m) pack(first + m, rows.data() + m * steps);
    float* const to = packed + first / kStrip * kStrip * steps + first % kStrip;
    for (int64_t k = 0; k < steps; k += kLanes) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(rows.data() + i * steps + k);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(to + (k + i) * kStrip, square[i]);
    }
  });
}

// A panel of W is used for so many tokens before it is overwritten. If there is only one panel,
// fewer, so that other threads have work too.
constexpr int64_t kPanelTokens = 512, kOnlyPanelTokens = 128;

// Calls use(first, token, tokens) for each part of the rows or columns of W, and some tokens.
template <class Use>
static void for_parts(const Parallel& parallel, int64_t size, int64_t part_size, int64_t tokens,
                      const Use& use) {
  const int64_t parts = parts_of(size, part_size);
  const int64_t most = parts > 1 ? kPanelTokens : kOnlyPanelTokens;
  const int64_t blocks = parts_of(tokens, most);
  parallel(parts * blocks, [&](int64_t index) {
    const int64_t token = index % blocks * most;
    use(index / blocks * part_size, token, at_most(tokens - token, most));
  });
}

// Added to the distance of rows that are far apart, so that they do not share a set of the cache.
constexpr int64_t kLine = 16;

// Multiplies rows of W with all tokens: x @ W.T. `x` comes from pack_lanes. fill(to, panels,
// row, step) decodes or copies some steps of some rows to the left panel, and write(panels, row,
// token) takes their sums.
template <class Units, class Fill, class Write>
static void multiply_rows(const Parallel& parallel, int64_t rows, int64_t part_rows, int64_t tokens,
                          int64_t steps, int64_t most_steps, const float* x, const Fill& fill,
                          const Write& write) {
  for_parts(parallel, rows, part_rows, tokens, [&](int64_t row, int64_t token, int64_t count) {
    [[maybe_unused]] const typename Units::State state;
    Panels panels{};
    panels.sums_stride = ceil_to(count, kStrip);
    const Scratch<float> panel(part_rows * (most_steps + kLine));
    const Scratch<float> sums(part_rows * panels.sums_stride);
    panels.left = panel.data();
    panels.left_stride = most_steps + kLine;
    panels.strip_stride = kStrip * steps;
    panels.sums = sums.data();
    panels.rows = at_most(rows - row, part_rows);
    panels.lanes = count;
    for (int64_t step = 0; step < steps; step += most_steps) {
      panels.right = x + token * steps + step * kStrip;
      panels.steps = at_most(steps - step, most_steps);
      panels.is_first = step == 0;
      fill(panel.data(), panels, row, step);
      multiply_panels<Units>(panels);
    }
    write(panels, row, token);
  });
}

}  // namespace jaxbnb::JAXBNB_ISA
