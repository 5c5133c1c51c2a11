// Attention of few queries and keys: all scores of a block of queries at once, in the cache.
//
// A part of the work is a block of queries of one head. Its products are those of panels.h: scores
// have a key in each lane, results a feature. Keys before the first and after the last that any
// query of the block sees are skipped.
//
// The gradient computes the scores again. It adds up the cotangents of keys and values transposed,
// with a key in each lane, and for each query head by itself, so that the order of a sum does not
// depend on threads.
#include "attend_dense.h"

#include <float.h>

#include "pack.h"

namespace jaxbnb::JAXBNB_ISA {
namespace {

// Queries of a block: whole vectors of pairs.
constexpr int64_t kBlock = 4 * kLanes;
// A score that is not seen.
constexpr float kUnseen = -FLT_MAX;

constexpr int64_t at_least(int64_t a, int64_t limit) { return a > limit ? a : limit; }

// Runs all parts on this thread.
class Serial final : public Parallel {
  void run(int64_t count, const void* part, Call call) const override {
    for (int64_t i = 0; i < count; ++i) call(part, i);
  }
};

// Units of the elements of one row, or of two, in the same lane.
template <class Units>
JAXBNB_INLINE Floats join(const Floats (&rows)[1], Dtype dtype) {
  return rounded(rows[0], dtype);
}
#if defined(__AVX512BF16__)
template <class Units>
JAXBNB_INLINE Floats join(const Floats (&rows)[2], Dtype) {
  return Units::of_rows(rows[0], rows[1]);
}
#endif

// The left panel of a product, or sums.
struct Left {
  Left(int64_t rows, int64_t size) : stride(size + kLine), memory(rows * stride) {}

  float* operator[](int64_t row) const { return memory.data() + row * stride; }

  const int64_t stride;
  const Scratch<float> memory;
};

// The right panel of a product.
struct Right {
  Right(int64_t lanes, int64_t steps)
      : strip_stride(kStrip * steps), memory(parts_of(lanes, kStrip) * strip_stride) {}

  float* at(int64_t lane, int64_t step) const {
    return memory.data() + lane / kStrip * strip_stride + step * kStrip + lane % kStrip;
  }

  const int64_t strip_stride;
  const Scratch<float> memory;
};

struct Range {
  int64_t first, last;
};

// T is the dtype of the arrays.
template <class Units, class T>
class Attending {
 public:
  Attending(const Attention& attention, const Parallel& parallel)
      : p_(attention),
        parallel_(parallel),
        blocks_(parts_of(p_.queries, kBlock)),
        steps_(ceil_to(p_.dim, Units::kGroup) / Units::kElements),
        padded_keys_(ceil_to(p_.keys, Units::kGroup)),
        key_steps_(padded_keys_ / Units::kElements),
        ranges_(p_.masks * blocks_) {
    parallel_(p_.masks * blocks_, [&](int64_t i) { ranges_.data()[i] = find_range(i); });
  }

  void attend(T* out) const {
    const int64_t groups = p_.batch * p_.kv_heads;
    const Right keys(groups * by_key(), steps_), values(groups * by_feature(), key_steps_);
    parallel_(groups, [&](int64_t group) {
      pack_by_key(group, p_.k, keys);
      pack_by_feature(group, p_.v, values);
    });
    parallel_(p_.batch * p_.heads * blocks_, [&](int64_t part) {
      const Block block = find_block(part);
      const Left scores(kBlock, padded_keys_), weights(kBlock, key_steps_);
      const Left q(kBlock, steps_), sums(kBlock, by_feature());
      pack_rows(block, p_.q, q);
      multiply(q, keys, {block.group * by_key() + block.keys.first, 0}, scores[0], scores.stride,
               block.rows, block.lanes, steps_);
      float factors[kBlock];
      for (int64_t r = 0; r < block.rows; ++r) {
        factors[r] = soften(block, r, scores[r]);
        pack_weights(block, scores[r], weights[r]);
      }
      multiply(weights, values, {block.group * by_feature(), step_of(block.keys.first)}, sums[0],
               sums.stride, block.rows, p_.dim, step_of(block.padded));
      write_rows(block, sums, factors, out);
    });
  }

  void gradient(const T* d_out, T* d_q, T* d_k, T* d_v) const {
    const int64_t groups = p_.batch * p_.kv_heads, heads = p_.batch * p_.heads;
    const Right keys(groups * by_key(), steps_), values(groups * by_key(), steps_);
    const Right features(groups * by_feature(), key_steps_);
    parallel_(groups, [&](int64_t group) {
      pack_by_key(group, p_.k, keys);
      pack_by_key(group, p_.v, values);
      pack_by_feature(group, p_.k, features);
    });
    // A feature in each row, of whole vectors of them.
    const int64_t rows = ceil_to(p_.dim, kLanes);
    const Left d_keys(heads * rows, padded_keys_), d_values(heads * rows, padded_keys_);
    parallel_(heads, [&](int64_t head) {
      memset(d_keys[head * rows], 0, rows * d_keys.stride * sizeof(float));
      memset(d_values[head * rows], 0, rows * d_values.stride * sizeof(float));
      const Left weights(kBlock, padded_keys_), d_weights(kBlock, padded_keys_);
      const Left left(at_least(kBlock, rows), at_least(kBlockSteps, at_least(steps_, key_steps_)));
      const Left sums(kBlock, by_feature());
      const Right right(at_least(padded_keys_, rows), kBlockSteps);
      for (int64_t i = 0; i < blocks_; ++i) {
        const Block block = find_block(head * blocks_ + i);
        const int64_t lane = block.group * by_key() + block.keys.first;
        pack_rows(block, p_.q, left);
        multiply(left, keys, {lane, 0}, weights[0], weights.stride, block.rows, block.lanes,
                 steps_);
        pack_rows(block, d_out, left);
        multiply(left, values, {lane, 0}, d_weights[0], d_weights.stride, block.rows, block.lanes,
                 steps_);
        for (int64_t r = 0; r < block.rows; ++r) {
          const float factor = soften(block, r, weights[r]);
          differentiate(block, factor, weights[r], d_weights[r]);
        }
        add_by_feature(block, d_out, weights, left, right, d_values, head * rows);
        add_by_feature(block, p_.q, d_weights, left, right, d_keys, head * rows);
        for (int64_t r = 0; r < block.rows; ++r) pack_weights(block, d_weights[r], left[r]);
        multiply(left, features, {block.group * by_feature(), step_of(block.keys.first)}, sums[0],
                 sums.stride, block.rows, p_.dim, step_of(block.padded));
        write_rows(block, sums, nullptr, d_q);
      }
    });
    parallel_(groups, [&](int64_t group) {
      write_group(group, d_keys, d_k);
      write_group(group, d_values, d_v);
    });
  }

 private:
  static constexpr int64_t kBlockSteps = kBlock / Units::kElements;

  struct Block {
    int64_t batch, head, group, query, rows;
    Range keys;
    int64_t lanes, padded;  // keys in whole vectors, and in whole groups of units
  };

  Block find_block(int64_t part) const {
    const int64_t head = part / blocks_, i = part % blocks_, batch = head / p_.heads;
    const int64_t mask = batch / (p_.batch / p_.masks);
    Block block{batch, head % p_.heads, 0, i * kBlock, at_most(p_.queries - i * kBlock, kBlock),
                ranges_.data()[mask * blocks_ + i], 0, 0};
    block.group = batch * p_.kv_heads + block.head / (p_.heads / p_.kv_heads);
    const int64_t count = block.keys.last - block.keys.first;
    block.lanes = ceil_to(count, kLanes);
    block.padded = ceil_to(count, Units::kGroup);
    return block;
  }

  // The keys that some query of a block sees, from a whole group of units on.
  Range find_range(int64_t index) const {
    const int64_t mask = index / blocks_, query = index % blocks_ * kBlock;
    const Scratch<uint8_t> seen(p_.keys);
    memset(seen.data(), 0, p_.keys);
    for (int64_t r = 0; r < kBlock && query + r < p_.queries; ++r) {
      const uint8_t* const row = mask_of(mask, query + r);
      for (int64_t i = 0; i < p_.keys; ++i) seen.data()[i] |= row[i];
    }
    Range range{0, p_.keys};
    while (range.last > 1 && !seen.data()[range.last - 1]) --range.last;
    while (range.first < range.last - 1 && !seen.data()[range.first]) ++range.first;
    range.first -= range.first % Units::kGroup;
    return range;
  }

  const uint8_t* mask_of(int64_t mask, int64_t query) const {
    return reinterpret_cast<const uint8_t*>(p_.mask) + (mask * p_.queries + query) * p_.keys;
  }

  // Sizes of a group's part of a right panel.
  int64_t by_key() const { return ceil_to(p_.keys, kStrip); }
  int64_t by_feature() const { return ceil_to(p_.dim, kStrip); }
  static int64_t step_of(int64_t element) { return element / Units::kElements; }

  const T* key_of(const void* array, int64_t group, int64_t key) const {
    const int64_t batch = group / p_.kv_heads, head = group % p_.kv_heads;
    return static_cast<const T*>(array) +
           ((batch * p_.keys + key) * p_.kv_heads + head) * p_.dim;
  }
  template <class To>
  To* query_of(To* array, const Block& block, int64_t row) const {
    return array +
           ((block.batch * p_.queries + block.query + row) * p_.heads + block.head) * p_.dim;
  }

  // Packs keys or values with a key in each lane.
  void pack_by_key(int64_t group, const void* array, const Right& to) const {
    pack_lanes(Serial{}, p_.keys, steps_, to.at(group * by_key(), 0), [&](int64_t key, float* to) {
      pack_token<Units>(key_of(array, group, key), p_.dim, p_.dtype, false, to);
    });
  }

  // Packs keys or values with a feature in each lane.
  void pack_by_feature(int64_t group, const void* array, const Right& to) const {
    pack_columns(p_.keys, key_steps_, p_.dim, to, group * by_feature(),
                 [&](int64_t key) { return key_of(array, group, key); });
  }

  // Packs rows, for a contraction over them. Those after `count` are zeros.
  template <class Row>
  JAXBNB_MEMBER void pack_columns(int64_t count, int64_t steps, int64_t lanes, const Right& to,
                                  int64_t lane, const Row& row) const {
    for (int64_t k = 0; k < steps; ++k) {
      for (int64_t i = 0; i < lanes; i += kLanes) {
        Floats rows[Units::kElements];
        for (int j = 0; j < Units::kElements; ++j) {
          const int64_t index = k * Units::kElements + j;
          rows[j] = index >= count         ? zero()
                    : lanes - i >= kLanes ? load(row(index) + i)
                                          : load(row(index) + i, lanes - i);
        }
        store(to.at(lane + i, k), join<Units>(rows, p_.dtype));
      }
    }
  }

  void pack_rows(const Block& block, const void* array, const Left& to) const {
    for (int64_t r = 0; r < block.rows; ++r) {
      const T* const row = query_of(static_cast<const T*>(array), block, r);
      pack_token<Units>(row, p_.dim, p_.dtype, false, to[r]);
    }
  }

  void pack_weights(const Block& block, float* row, float* to) const {
    for (int64_t i = 0; i < block.padded; i += Units::kGroup) {
      if constexpr (Units::kElements == 1) {
        for (int j = 0; j < Units::kGroup; j += kLanes) {
          store(row + i + j, rounded(load(row + i + j), p_.dtype));
        }
      }
      Units::pack(row + i, false, to + i / Units::kElements);
    }
  }

  struct Place {
    int64_t lane, step;
  };

  static void multiply(const Left& left, const Right& right, Place place, float* sums,
                       int64_t sums_stride, int64_t rows, int64_t lanes, int64_t steps,
                       bool is_first = true) {
    Panels panels{};
    panels.left = left[0];
    panels.left_stride = left.stride;
    panels.right = right.at(place.lane, place.step);
    panels.strip_stride = right.strip_stride;
    panels.sums = sums;
    panels.sums_stride = sums_stride;
    panels.rows = rows;
    panels.lanes = lanes;
    panels.steps = steps;
    panels.is_first = is_first;
    multiply_panels<Units>(panels);
  }

  // Replaces a row of scores by exp(score - largest), and zeros after the last whole vector.
  // Returns the reciprocal of their sum, or zero for a query that sees no key.
  JAXBNB_APART float soften(const Block& block, int64_t r, float* row) const {
    const uint8_t* const seen =
        mask_of(block.batch / (p_.batch / p_.masks), block.query + r) + block.keys.first;
    const int64_t count = block.keys.last - block.keys.first;
    Floats most = broadcast(kUnseen), total = zero();
    for (int64_t i = 0; i < count; i += kLanes) {
      const Ints is_seen = count - i >= kLanes ? load(seen + i) : load(seen + i, count - i);
      const Floats score = load(row + i) * broadcast(p_.scale);
      const Floats masked = select(is_seen > broadcast(0), score, broadcast(kUnseen));
      store(row + i, masked);
      most = max(most, masked);
    }
    const Floats largest = broadcast(maximum(most));
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats weight = exp(load(row + i) - largest);
      store(row + i, weight);
      total += weight;
    }
    for (int64_t i = block.lanes; i < block.padded; i += kLanes) store(row + i, zero());
    return maximum(most) == kUnseen ? 0 : 1 / sum(total);
  }

  // Normalises weights, and replaces their cotangents by those of the scores.
  JAXBNB_APART void differentiate(const Block& block, float factor, float* weights,
                                  float* d_weights) const {
    Floats inner = zero();
    for (int64_t i = 0; i < block.lanes; i += kLanes) {
      const Floats weight = load(weights + i) * broadcast(factor);
      store(weights + i, weight);
      inner = fma(weight, load(d_weights + i), inner);
    }
    const Floats mean = broadcast(sum(inner));
    for (int64_t i = 0; i < block.lanes; i += kLanes) {
      const Floats d_score = load(weights + i) * (load(d_weights + i) - mean);
      store(d_weights + i, d_score * broadcast(p_.scale));
    }
    for (int64_t i = block.lanes; i < block.padded; i += kLanes) store(d_weights + i, zero());
  }

  // Adds array.T @ weights to sums, with a feature in each row, a key in each lane.
  void add_by_feature(const Block& block, const void* array, const Left& weights, const Left& left,
                      const Right& right, const Left& sums, int64_t first_row) const {
    pack_columns(block.rows, kBlockSteps, p_.dim, right, 0, [&](int64_t r) {
      return query_of(static_cast<const T*>(array), block, r);
    });
    for (int64_t i = 0; i < p_.dim; i += kLanes) {
      for (int64_t k = 0; k < kBlockSteps; k += kLanes) {
        Floats square[kLanes];
        for (int j = 0; j < kLanes; ++j) square[j] = load(right.at(i, k + j));
        transpose(square);
        for (int j = 0; j < kLanes; ++j) store(left[i + j] + k, square[j]);
      }
    }
    pack_columns(block.rows, kBlockSteps, block.padded, right, 0,
                 [&](int64_t r) { return static_cast<const float*>(weights[r]); });
    // Whole strips, so that no other lanes are added up.
    multiply(left, right, {0, 0}, sums[first_row] + block.keys.first, sums.stride, p_.dim,
             block.padded, kBlockSteps, false);
  }

  // Writes rows of sums, each multiplied by its factor if there are any.
  void write_rows(const Block& block, const Left& sums, const float* factors, T* to) const {
    for (int64_t r = 0; r < block.rows; ++r) {
      T* const row = query_of(to, block, r);
      const Floats factor = broadcast(factors == nullptr ? 1.0f : factors[r]);
      for (int64_t i = 0; i < p_.dim; i += kLanes) {
        store_at_most(row + i, load(sums[r] + i) * factor, p_.dim - i);
      }
    }
  }

  // Adds up the heads of a group, and writes a row for each key.
  void write_group(int64_t group, const Left& sums, T* to) const {
    const int64_t rows = ceil_to(p_.dim, kLanes), heads = p_.heads / p_.kv_heads;
    float* const total = sums[group * heads * rows];
    for (int64_t h = 1; h < heads; ++h) {
      const float* const other = sums[(group * heads + h) * rows];
      for (int64_t i = 0; i < rows * sums.stride; ++i) total[i] += other[i];
    }
    Panels panels{};
    panels.sums = total;
    panels.sums_stride = sums.stride;
    panels.rows = p_.dim;
    panels.lanes = p_.keys;
    for_transposed(panels, [&](int64_t key, int64_t i, Floats features) {
      T* const row = const_cast<T*>(key_of(to, group, key));
      store_at_most(row + i, features, p_.dim - i);
    });
  }

  const Attention& p_;
  const Parallel& parallel_;
  const int64_t blocks_, steps_, padded_keys_, key_steps_;
  const Scratch<Range> ranges_;
};

template <class Use>
void with_units(const Attention& attention, const Parallel& parallel, const Use& use) {
#if defined(__AVX512BF16__)
  if (attention.dtype == Dtype::kBfloat16) {
    return use(Attending<Bfloat16Units, Bfloat16>(attention, parallel), Bfloat16{});
  }
#endif
  with_type(attention.dtype, [&](auto type) {
    use(Attending<Float32Units, decltype(type)>(attention, parallel), type);
  });
}

}  // namespace

void attend(const Attention& attention, void* out, const Parallel& parallel) {
  with_units(attention, parallel, [&](const auto& attending, auto type) {
    attending.attend(static_cast<decltype(type)*>(out));
  });
}

void attend_gradient(const Attention& attention, const void* d_out, void* d_q, void* d_k,
                     void* d_v, const Parallel& parallel) {
  with_units(attention, parallel, [&](const auto& attending, auto type) {
    using T = decltype(type);
    attending.gradient(static_cast<const T*>(d_out), static_cast<T*>(d_q), static_cast<T*>(d_k),
                       static_cast<T*>(d_v));
  });
}

}  // namespace jaxbnb::JAXBNB_ISA
