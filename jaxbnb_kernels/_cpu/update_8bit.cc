// A step of an optimizer with 8-bit moments: one read and one write of every array.
//
// A few hundred elements at a time, it decodes the moments, interprets the rule and encodes the new
// moments, all in the first-level cache. An instruction of the rule is a loop over vectors, which
// makes looking it up cheap and serves any rule.
#include "update_8bit.h"

#include "dynamic8.h"
#include "elements.h"
#include "scratch.h"
#include "simd.h"

namespace jaxbnb::JAXBNB_ISA {
namespace {

// Elements that an instruction computes at a time: a multiple of every kLanes.
constexpr int64_t kSpan = 256;
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

// Calls `compute` for every vector of up to four operands. The result may overwrite an operand.
template <class Compute>
JAXBNB_INLINE void each(float* const* values, const Instruction& line, int64_t count,
                        const Compute& compute) {
  float* const to = values[line.to];
  const float *const a = values[line.a], *const b = values[line.b];
  const float *const c = values[line.c], *const d = values[line.d];
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; i += kLanes) {
    const auto operand = [i](const float* from) { return [=] { return load(from + i); }; };
    store(to + i, compute(operand(a), operand(b), operand(c), operand(d)));
  }
}

JAXBNB_INLINE Floats truth(Mask mask) { return select(mask, broadcast(1.0f), zero()); }
JAXBNB_INLINE Mask is_true(Floats a) { return a != zero(); }
JAXBNB_INLINE Mask is_finite(Floats a) { return absolute(a) < broadcast(__builtin_inff()); }

// As XLA's, NaN where an operand is NaN.
JAXBNB_INLINE Floats with_nan_of(Floats a, Floats other) { return select(is_nan(a), a, other); }

JAXBNB_INLINE Floats sign(Floats a) {
  const Floats unit = copy_sign(broadcast(1.0f), a);
  return select((a < zero()) | (a > zero()), unit, a);
}

JAXBNB_INLINE Floats select_finite(Floats a, Floats b, Floats c) {
  return select(is_finite(a), b, c);
}

// Computes `count` elements, rounded up to whole vectors.
void run(const Instruction& line, float* const* values, int64_t count) {
#define JAXBNB_CASE(op, expression)                                                     \
  case Op::op:                                                                          \
    return each(values, line, count,                                                    \
                []([[maybe_unused]] auto a, [[maybe_unused]] auto b,                    \
                   [[maybe_unused]] auto c, [[maybe_unused]] auto d)                    \
                    __attribute__((always_inline)) { return expression; })
  switch (line.op) {
    JAXBNB_CASE(kCopy, a());
    JAXBNB_CASE(kAdd, a() + b());
    JAXBNB_CASE(kSub, a() - b());
    JAXBNB_CASE(kMul, a() * b());
    JAXBNB_CASE(kDiv, a() / b());
    JAXBNB_CASE(kMax, with_nan_of(a(), max(a(), b())));
    JAXBNB_CASE(kMin, with_nan_of(a(), min(a(), b())));
    JAXBNB_CASE(kAbs, absolute(a()));
    JAXBNB_CASE(kNeg, negate(a()));
    JAXBNB_CASE(kSign, sign(a()));
    JAXBNB_CASE(kSqrt, sqrt(a()));
    JAXBNB_CASE(kRsqrt, broadcast(1.0f) / sqrt(a()));
    JAXBNB_CASE(kIsFinite, truth(is_finite(a())));
    JAXBNB_CASE(kLess, truth(a() < b()));
    JAXBNB_CASE(kLessEqual, truth(a() <= b()));
    JAXBNB_CASE(kEqual, truth(a() == b()));
    JAXBNB_CASE(kNotEqual, truth(a() != b()));
    JAXBNB_CASE(kNot, broadcast(1.0f) - a());
    JAXBNB_CASE(kSelect, select(is_true(a()), b(), c()));
    JAXBNB_CASE(kFma, fma(a(), b(), c()));
    JAXBNB_CASE(kFms, fma(a(), b(), negate(c())));
    JAXBNB_CASE(kFnma, fma(negate(a()), b(), c()));
    JAXBNB_CASE(kSumOfProducts, fma(a(), b(), c() * d()));
    JAXBNB_CASE(kProduct, a() * b() * c());
    JAXBNB_CASE(kDivBySum, a() / (b() + c()));
    JAXBNB_CASE(kQuotient, (a() * b()) / (c() + d()));
    JAXBNB_CASE(kSqrtOfFma, sqrt(fma(a(), b(), c())));
    JAXBNB_CASE(kSelectFinite, select_finite(a(), b(), c()));
    JAXBNB_CASE(kSelectFiniteSum, select_finite(a() + b(), c(), d()));
    case Op::kCount:
      return;
  }
#undef JAXBNB_CASE
}

// Decodes elements of one block. Writes whole vectors.
template <bool kSigned>
void decode(const uint8_t* codes, float absmax, int64_t count, float* to) {
  const Dynamic8Decoder<kSigned> level;
  const Floats scale = broadcast(absmax);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, level(codes + i) * scale);
  if (i < count) store(to + i, level(codes + i, count - i) * scale);
}

float largest_magnitude(const float* values, int64_t count) {
  Floats largest = zero();
  for_vectors(values, count, [&](int64_t, Floats x) { largest = max(largest, absolute(x)); });
  return maximum(largest);
}

// Encodes one block, and returns its absmax. The values may be scaled.
template <bool kSigned>
float encode(float* values, int64_t count, uint8_t* codes) {
  const float absmax = largest_magnitude(values, count);
  const float nearer = factor_to_one(absmax);
  if (nearer != 1.0f) {
    for (int64_t i = 0; i < count; ++i) values[i] *= nearer;
  }
  const float scaled = absmax * nearer;
  const Dynamic8Encoder<kSigned> encode(scaled, scaled > 0 ? 1 / scaled : 0.0f);
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    const auto code = [&](int k) { return encode(load(values + i + k * kLanes)); };
    store_bytes(codes + i, code(0), code(1), code(2), code(3), encode.kZero);
  }
  for (; i < count; i += kLanes) {
    const int64_t left = smaller(kLanes, count - i);
    const Ints code = encode(load(values + i, left)) + broadcast(encode.kZero);
    store(codes + i, max(code, broadcast(0)), left);
  }
  return absmax;
}

// The values of a rule, for the elements of one part of an example.
class Part {
 public:
  Part(const Step& step, int64_t example, int64_t group_size)
      : step_(step), program_(step.program), memory_(floats_needed(step, group_size)) {
    float** value = values_;
    const auto spans = [&](int64_t count) {
      for (; count > 0; --count) *value++ = memory_.take(kValue);
    };
    spans(num_inputs() + 1);
    for (int m = 0; m < step.num_moments; ++m) {
      new_moments_[m] = *value++ = memory_.take(group_size + kLanes);
    }
    const auto uniform = [&](float number) {
      *value = memory_.take(kSpan);
      for (int64_t i = 0; i < kSpan; i += kLanes) store(*value + i, broadcast(number));
      ++value;
    };
    const float* scalars = step.scalars + example * step.num_scalars;
    for (int64_t i = 0; i < step.num_scalars; ++i) uniform(scalars[i]);
    for (int64_t i = 0; i < program_.num_constants; ++i) uniform(program_.constants[i]);
    for (int64_t i = 0; i < program_.num_uniforms; ++i) uniform(0.0f);
    spans(program_.num_temporaries);
    grad_ = values_[0];
    param_ = values_[num_inputs() - 1];
    result_ = values_[num_inputs()];
    for (int64_t i = 0; i < program_.num_uniforms; ++i) {
      run(program_.instructions[i], values_, kSpan);
    }
  }

  // Steps elements of a row, whole blocks or the row's last ones.
  void step(int64_t at, int64_t count, int64_t block) {
    for (int64_t i = 0; i < count; i += kSpan) {
      step_span(at, i, smaller(kSpan, count - i), block);
    }
    for (int m = 0; m < step_.num_moments; ++m) {
      const Moment& moment = step_.moments[m];
      const auto encode_block = moment.is_signed ? encode<true> : encode<false>;
      for (int64_t i = 0, b = block; i < count; i += step_.block_size, ++b) {
        const int64_t size = smaller(step_.block_size, count - i);
        moment.new_absmax[b] = encode_block(new_moments_[m] + i, size, moment.new_codes + at + i);
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
           step.num_moments * Memory::whole_lines(group_size + kLanes);
  }

  void step_span(int64_t at, int64_t begin, int64_t count, int64_t block) {
    const bool is_whole = count % kLanes == 0;
    const auto place = [&](const Array& array, float* buffer) {
      const bool is_direct = is_whole && array.dtype == Dtype::kFloat32;
      return is_direct ? static_cast<float*>(array.data) + at + begin : buffer;
    };
    const int64_t result = num_inputs();
    values_[0] = place(step_.grad, grad_);
    if (values_[0] == grad_) read(step_.grad, at + begin, count, grad_);
    if (step_.param.data != nullptr) {
      values_[result - 1] = place(step_.param, param_);
      if (values_[result - 1] == param_) read(step_.param, at + begin, count, param_);
    }
    values_[result] = place(step_.result, result_);
    for (int m = 0; m < step_.num_moments; ++m) {
      decode_span(step_.moments[m], at, begin, count, block, values_[1 + m]);
      values_[result + 1 + m] = new_moments_[m] + begin;
    }
    for (int64_t i = program_.num_uniforms; i < program_.num_instructions; ++i) {
      run(program_.instructions[i], values_, count);
    }
    if (values_[result] == result_) write(result_, count, step_.result, at + begin);
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
  const Program& program_;
  Memory memory_;
  float* values_[kMostValues];
  float* new_moments_[kMostMoments];
  float *grad_, *param_, *result_;
};

}  // namespace

void update_8bit(const Step& step, const Parallel& parallel) {
  // A group is a span of small blocks, or one large block.
  const int64_t group_blocks = step.block_size < kSpan ? kSpan / step.block_size : 1;
  const int64_t group_size = group_blocks * step.block_size;
  const int64_t row_blocks = divide_up(step.row_size, step.block_size);
  const int64_t row_groups = divide_up(row_blocks, group_blocks);
  const int64_t groups = step.num_rows * row_groups;
  const int64_t part_groups = group_size < kPart ? kPart / group_size : 1;
  const int64_t parts = divide_up(groups, part_groups);
  parallel(step.num_examples * parts, [&](int64_t index) {
    const int64_t example = index / parts, first = index % parts * part_groups;
    Part part(step, example, smaller(group_size, step.row_size));
    for (int64_t group = first; group < smaller(groups, first + part_groups); ++group) {
      const int64_t row = example * step.num_rows + group / row_groups;
      const int64_t block = group % row_groups * group_blocks, begin = block * step.block_size;
      const int64_t count = smaller(group_size, step.row_size - begin);
      part.step(row * step.row_size + begin, count, row * row_blocks + block);
    }
  });
}

}  // namespace jaxbnb::JAXBNB_ISA
