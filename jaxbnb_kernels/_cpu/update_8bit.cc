// A step of an optimizer with 8-bit moments: one read and one write of every array.
//
// A few hundred elements at a time, it decodes the moments, applies the rule and encodes the new
// moments, all in the first-level cache. The rule is a program. Any program can be interpreted: an
// instruction is a loop over vectors, which makes looking it up cheap. The compiler knows the
// programs of our own rules, and keeps their values in registers. Both compute the same numbers.
#include "update_8bit.h"

#include "dynamic8.h"
#include "elements.h"
#include "known_rules.h"
#include "scratch.h"
#include "simd.h"

namespace jaxbnb::JAXBNB_ISA {
namespace {

// Elements that an instruction computes at a time: a multiple of every kLanes.
constexpr int64_t kSpan = 256;
// Bytes that are stored at a time.
constexpr int64_t kBytes = 4 * kLanes;
// How many bytes ahead arrays are fetched. The loops that encode read nothing from the arrays, so
// the processor's own prefetching falls behind.
constexpr int64_t kAhead = 4096;
// Elements of a group: enough that encoding the first block need not wait for the last one's
// largest magnitude, few enough for the first-level cache.
constexpr int64_t kGroup = 1024;
// Elements of a part: enough to make claiming one cheap, few enough to share small arrays.
constexpr int64_t kPart = 16384;

// Hands out the memory of a part, in whole cache lines.
class Memory {
 public:
  explicit Memory(int64_t count) : scratch_(count), next_(scratch_.data()) {}

  float* take(int64_t count) {
    float* const taken = next_;
    next_ += whole_lines(count);
    return taken;
  }

  static int64_t whole_lines(int64_t count) { return divide_up(count, 16) * 16; }

 private:
  const Scratch<float> scratch_;
  float* next_;
};

JAXBNB_INLINE Floats truth(Mask mask) { return select(mask, broadcast(1.0f), zero()); }
JAXBNB_INLINE Mask is_true(Floats a) { return a != zero(); }
JAXBNB_INLINE Mask is_finite(Floats a) {
  return as_ints(absolute(a)) < as_ints(broadcast(__builtin_inff()));
}

// As XLA's, NaN where an operand is NaN.
JAXBNB_INLINE Floats with_nan_of(Floats a, Floats other) { return select(is_nan(a), a, other); }

JAXBNB_INLINE Floats sign(Floats a) {
  const Floats unit = copy_sign(broadcast(1.0f), a);
  return select((a < zero()) | (a > zero()), unit, a);
}

template <Op kOp>
JAXBNB_INLINE Floats compute(Floats a, [[maybe_unused]] Floats b, [[maybe_unused]] Floats c,
                             [[maybe_unused]] Floats d) {
  if constexpr (kOp == Op::kCopy) return a;
  if constexpr (kOp == Op::kAdd) return a + b;
  if constexpr (kOp == Op::kSub) return a - b;
  if constexpr (kOp == Op::kMul) return a * b;
  if constexpr (kOp == Op::kDiv) return a / b;
  if constexpr (kOp == Op::kMax) return with_nan_of(a, max(a, b));
  if constexpr (kOp == Op::kMin) return with_nan_of(a, min(a, b));
  if constexpr (kOp == Op::kAbs) return absolute(a);
  if constexpr (kOp == Op::kNeg) return negate(a);
  if constexpr (kOp == Op::kSign) return sign(a);
  if constexpr (kOp == Op::kSqrt) return sqrt(a);
  if constexpr (kOp == Op::kRsqrt) return broadcast(1.0f) / sqrt(a);
  if constexpr (kOp == Op::kIsFinite) return truth(is_finite(a));
  if constexpr (kOp == Op::kLt) return truth(a < b);
  if constexpr (kOp == Op::kLe) return truth(a <= b);
  if constexpr (kOp == Op::kEq) return truth(a == b);
  if constexpr (kOp == Op::kNe) return truth(a != b);
  if constexpr (kOp == Op::kNot) return broadcast(1.0f) - a;
  if constexpr (kOp == Op::kSelect) return select(is_true(a), b, c);
  if constexpr (kOp == Op::kFma) return fma(a, b, c);
  if constexpr (kOp == Op::kFms) return fma(a, b, negate(c));
  if constexpr (kOp == Op::kFnma) return fma(negate(a), b, c);
  if constexpr (kOp == Op::kSumOfProducts) return fma(a, b, c * d);
  if constexpr (kOp == Op::kProduct) return a * b * c;
  if constexpr (kOp == Op::kDivBySum) return a / (b + c);
  if constexpr (kOp == Op::kQuotient) return (a * b) / (c + d);
  if constexpr (kOp == Op::kSqrtOfFma) return sqrt(fma(a, b, c));
  if constexpr (kOp == Op::kSelectFinite) return select(is_finite(a), b, c);
  if constexpr (kOp == Op::kSelectFiniteSum) return select(is_finite(a + b), c, d);
}

// Computes `count` elements, rounded up to whole vectors. The result may overwrite an operand.
template <Op kOp>
void run(const Instruction& line, float* const* values, int64_t count) {
  float* const to = values[line.to];
  const float *const a = values[line.a], *const b = values[line.b];
  const float *const c = values[line.c], *const d = values[line.d];
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; i += kLanes) {
    store(to + i, compute<kOp>(load(a + i), load(b + i), load(c + i), load(d + i)));
  }
}

template <int kOp = 0>
void interpret(const Instruction& line, float* const* values, int64_t count) {
  if (line.op == Op{kOp}) return run<Op{kOp}>(line, values, count);
  if constexpr (kOp + 1 < static_cast<int>(Op::kCount)) {
    interpret<kOp + 1>(line, values, count);
  }
}

// The address may be outside of the array, as it is not read.
JAXBNB_INLINE void prefetch(const void* from) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + kAhead));
}

// Decodes elements of one block. Writes whole vectors.
template <bool kSigned>
void decode(const uint8_t* codes, float absmax, int64_t count, float* to) {
  const Dynamic8Decoder<kSigned> level;
  const Floats scale = broadcast(absmax);
  int64_t i = 0;
  // One prefetch for several vectors: each takes the place of a load.
  for (; i + kBytes <= count; i += kBytes) {
    prefetch(codes + i);
    for (int64_t k = 0; k < kBytes; k += kLanes) {
      store(to + i + k, level(codes + i + k) * scale);
    }
  }
  for (; i + kLanes <= count; i += kLanes) store(to + i, level(codes + i) * scale);
  if (i < count) store(to + i, level(codes + i, count - i) * scale);
}

float largest_magnitude(const float* values, int64_t count) {
  // Several maxima, so that none waits for the one before it.
  Floats largest[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) {
      largest[k] = max(largest[k], absolute(load(values + i + k * kLanes)));
    }
  }
  for_vectors(values + i, count - i, [&](int64_t, Floats x) {
    largest[0] = max(largest[0], absolute(x));
  });
  return maximum(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

// Encodes one block. The values may be scaled, and are read up to a multiple of kBytes.
template <bool kSigned>
void encode(float* values, int64_t count, float absmax, uint8_t* codes) {
  const float nearer = factor_to_one(absmax);
  if (nearer != 1.0f) {
    for (int64_t i = 0; i < count; ++i) values[i] *= nearer;
  }
  // Zeros are encoded as if the largest of their block were one.
  const float scaled = absmax > 0 ? absmax * nearer : 1.0f;
  const Dynamic8Encoder<kSigned> encoder(scaled, 1 / scaled);
  for (int64_t begin = 0; begin < count; begin += kSpan) {
    int32_t shifts[kSpan];
    const int64_t end = smaller(begin + kSpan, count);
    for (int64_t i = begin; i < end; i += kBytes) {
      for (int64_t k = 0; k < kBytes; k += kLanes) {
        store(shifts + i - begin + k, encoder.shift(load(values + i + k)));
      }
    }
    for (int64_t i = begin; i < end; i += kBytes) {
      const auto code = [&](int k) {
        const int64_t at = i + k * kLanes;
        return encoder.code(load(values + at), load(shifts + at - begin));
      };
      uint8_t last[kBytes];
      uint8_t* const to = i + kBytes <= end ? codes + i : last;
      store_bytes(to, code(0), code(1), code(2), code(3), encoder.kZero);
      if (to == last) memcpy(codes + i, last, end - i);
    }
  }
}

template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

// Calls use(Number<0>()), ..., use(Number<kCount - 1>()).
template <int kCount, int kFirst = 0, class Use>
JAXBNB_INLINE void for_each_number(const Use& use) {
  if constexpr (kFirst < kCount) {
    use(Number<kFirst>());
    for_each_number<kCount, kFirst + 1>(use);
  }
}

// Computes the values of a rule, of `count` elements, rounded up to whole vectors.
template <int kRule>
void step_known(float* const* values, int64_t count) {
  constexpr const KnownRule& kProgram = kKnownRules[kRule];
  constexpr int kMoments = kProgram.num_moments, kResult = 1 + kMoments + kProgram.has_param;
  constexpr int kUniform = kResult + 1 + kMoments;
  constexpr int kUniforms =
      kProgram.num_scalars + kProgram.num_constants + kProgram.num_uniforms;
  Floats value[kUniform + kUniforms + kProgram.num_temporaries];
  for_each_number<kUniforms>([&](auto u) {
    value[kUniform + u.value] = load(values[kUniform + u.value]);
  });
  // Copied, as the compiler fears that a store might change the pointers.
  float* at[kUniform];
  for_each_number<kUniform>([&](auto v) { at[v.value] = values[v.value]; });
#pragma GCC unroll 2
  for (int64_t i = 0; i < count; i += kLanes) {
    prefetch(at[0] + i);
    prefetch(at[kResult] + i);  // the parameter too, if it is updated in place
    for_each_number<kResult>([&](auto v) { value[v.value] = load(at[v.value] + i); });
    for_each_number<kProgram.num_instructions - kProgram.num_uniforms>([&](auto index) {
      constexpr Instruction kLine =
          kProgram.instructions[kProgram.num_uniforms + decltype(index)::value];
      value[kLine.to] =
          compute<kLine.op>(value[kLine.a], value[kLine.b], value[kLine.c], value[kLine.d]);
    });
    for_each_number<1 + kMoments>([&](auto v) {
      store(at[kResult + v.value] + i, value[kResult + v.value]);
    });
  }
}

using StepKnown = void (*)(float* const* values, int64_t count);

bool is_same(const Step& step, const KnownRule& rule) {
  const Program& program = step.program;
  if (step.num_moments != rule.num_moments || step.num_scalars != rule.num_scalars ||
      (step.param.data != nullptr) != rule.has_param ||
      program.num_instructions != rule.num_instructions ||
      program.num_uniforms != rule.num_uniforms ||
      program.num_temporaries != rule.num_temporaries ||
      program.num_constants != rule.num_constants) {
    return false;
  }
  for (int m = 0; m < rule.num_moments; ++m) {
    if (step.moments[m].is_signed != rule.is_signed[m]) return false;
  }
  for (int i = 0; i < rule.num_instructions; ++i) {
    if (program.instructions[i] != rule.instructions[i]) return false;
  }
  return memcmp(program.constants, rule.constants, rule.num_constants * sizeof(float)) == 0;
}

// The compiled form of a step's rule, or null.
template <int kRule = 0>
StepKnown find_known(const Step& step) {
  if constexpr (kRule < kNumKnownRules) {
    if (is_same(step, kKnownRules[kRule])) return step_known<kRule>;
    return find_known<kRule + 1>(step);
  }
  return nullptr;
}

// The values of a rule, for the elements of one part of an example.
class Part {
 public:
  Part(const Step& step, StepKnown step_known, int64_t example, int64_t group_size)
      : step_(step), step_known_(step_known), memory_(floats_needed(step, group_size)) {
    float** value = values_;
    const auto spans = [&](int64_t count) {
      for (; count > 0; --count) *value++ = memory_.take(kValue);
    };
    spans(num_inputs() + 1);
    for (int m = 0; m < step.num_moments; ++m) {
      new_moments_[m] = *value++ = memory_.take(group_size + kBytes);
    }
    const auto uniform = [&](float number) {
      *value = memory_.take(kSpan);
      for (int64_t i = 0; i < kSpan; i += kLanes) store(*value + i, broadcast(number));
      ++value;
    };
    const Program& program = step.program;
    const float* scalars = step.scalars + example * step.num_scalars;
    for (int64_t i = 0; i < step.num_scalars; ++i) uniform(scalars[i]);
    for (int64_t i = 0; i < program.num_constants; ++i) uniform(program.constants[i]);
    for (int64_t i = 0; i < program.num_uniforms; ++i) uniform(0.0f);
    spans(program.num_temporaries);
    grad_ = values_[0];
    param_ = values_[num_inputs() - 1];
    result_ = values_[num_inputs()];
    for (int64_t i = 0; i < program.num_uniforms; ++i) {
      interpret(program.instructions[i], values_, kSpan);
    }
  }

  // Steps elements of a row from `at`, whole blocks or the row's last ones.
  void step(int64_t at, int64_t count, int64_t block) {
    // Whole vectors, and what is left.
    for (int64_t i = 0, size; i < count; i += size) {
      const int64_t left = smaller(kSpan, count - i);
      size = left < kLanes ? left : left / kLanes * kLanes;
      step_span(at, i, size, block);
    }
    for (int64_t i = 0, b = block; i < count; i += step_.block_size, ++b) {
      const int64_t size = smaller(step_.block_size, count - i);
      for (int m = 0; m < step_.num_moments; ++m) {
        step_.moments[m].new_absmax[b] = largest_magnitude(new_moments_[m] + i, size);
      }
    }
    for (int64_t i = 0, b = block; i < count; i += step_.block_size, ++b) {
      const int64_t size = smaller(step_.block_size, count - i);
      for (int m = 0; m < step_.num_moments; ++m) {
        const Moment& moment = step_.moments[m];
        const auto encode_block = moment.is_signed ? encode<true> : encode<false>;
        encode_block(new_moments_[m] + i, size, moment.new_absmax[b], moment.new_codes + at + i);
      }
    }
  }

 private:
  // Gradient, old moments, and parameter.
  int64_t num_inputs() const { return 1 + step_.num_moments + (step_.param.data != nullptr); }

  static int64_t floats_needed(const Step& step, int64_t group_size) {
    const int64_t spans = 3 + step.num_moments + step.program.num_temporaries;
    const int64_t uniforms =
        step.num_scalars + step.program.num_constants + step.program.num_uniforms;
    return (spans + uniforms) * Memory::whole_lines(kValue) +
           step.num_moments * Memory::whole_lines(group_size + kBytes);
  }

  // Where the elements of a span are read and written: in the arrays, or converted in buffers.
  struct Place {
    float *grad, *param, *result;
  };

  Place place(int64_t at, int64_t count) {
    const auto find = [=](const Array& array, float* buffer) {
      const bool is_direct = count % kLanes == 0 && array.dtype == Dtype::kFloat32;
      return is_direct ? static_cast<float*>(array.data) + at : buffer;
    };
    const auto find_read = [=](const Array& array, float* buffer) {
      float* const found = find(array, buffer);
      if (found == buffer) read(array, at, count, buffer);
      return found;
    };
    const bool has_param = step_.param.data != nullptr;
    return {find_read(step_.grad, grad_), has_param ? find_read(step_.param, param_) : nullptr,
            find(step_.result, result_)};
  }

  void finish(const Place& place, int64_t at, int64_t count) {
    if (place.result == result_) write(result_, count, step_.result, at);
  }

  void step_span(int64_t at, int64_t begin, int64_t count, int64_t block) {
    const Place arrays = place(at + begin, count);
    const int64_t result = num_inputs();
    values_[0] = arrays.grad;
    if (arrays.param != nullptr) values_[result - 1] = arrays.param;
    values_[result] = arrays.result;
    for (int m = 0; m < step_.num_moments; ++m) {
      decode_span(step_.moments[m], at, begin, count, block, values_[1 + m]);
      values_[result + 1 + m] = new_moments_[m] + begin;
    }
    const Program& program = step_.program;
    if (step_known_ != nullptr) {
      step_known_(values_, count);
    } else {
      for (int64_t i = program.num_uniforms; i < program.num_instructions; ++i) {
        interpret(program.instructions[i], values_, count);
      }
    }
    finish(arrays, at + begin, count);
  }

  void decode_span(const Moment& moment, int64_t at, int64_t begin, int64_t count, int64_t block,
                   float* to) {
    const auto decode_block = moment.is_signed ? decode<true> : decode<false>;
    for (int64_t i = begin; i < begin + count;) {
      const int64_t b = i / step_.block_size;
      const int64_t end = smaller((b + 1) * step_.block_size, begin + count);
      decode_block(moment.codes + at + i, moment.absmax[block + b], end - i, to + i - begin);
      i = end;
    }
  }

  // Elements of a block may end within a vector, and are decoded in whole vectors.
  static constexpr int64_t kValue = kSpan + kLanes;

  const Step& step_;
  const StepKnown step_known_;
  Memory memory_;
  float* values_[kMostValues];
  float* new_moments_[kMostMoments];
  float *grad_, *param_, *result_;
};

}  // namespace

void update_8bit(const Step& step, const Parallel& parallel) {
  const StepKnown step_known = find_known(step);
  // A group is a span of small blocks, or one large block.
  const int64_t group_blocks = step.block_size < kGroup ? kGroup / step.block_size : 1;
  const int64_t group_size = group_blocks * step.block_size;
  const int64_t row_blocks = divide_up(step.row_size, step.block_size);
  const int64_t row_groups = divide_up(row_blocks, group_blocks);
  const int64_t groups = step.num_rows * row_groups;
  const int64_t part_groups = group_size < kPart ? kPart / group_size : 1;
  const int64_t parts = divide_up(groups, part_groups);
  parallel(step.num_examples * parts, [&](int64_t index) {
    const int64_t example = index / parts, first = index % parts * part_groups;
    Part part(step, step_known, example, smaller(group_size, step.row_size));
    for (int64_t group = first; group < smaller(groups, first + part_groups); ++group) {
      const int64_t row = example * step.num_rows + group / row_groups;
      const int64_t block = group % row_groups * group_blocks, begin = block * step.block_size;
      const int64_t count = smaller(group_size, step.row_size - begin);
      part.step(row * step.row_size + begin, count, row * row_blocks + block);
    }
  });
}

}  // namespace jaxbnb::JAXBNB_ISA
