// The handler that XLA calls for a step with 8-bit moments.
#include "update_8bit.h"

#include <string.h>

#include <vector>

#include "handlers.h"
#include "huge_pages.h"

namespace jaxbnb {
namespace {

using Integers = ffi::Span<const int32_t>;

// Whether every instruction is known, reads values that exist, and writes one of its own kind. The
// results are values from `result` on, and uniform values from `first_uniform` on.
bool is_valid(const Program& program, int64_t result, int64_t first_uniform, int64_t num_known) {
  const int64_t uniforms = program.num_uniforms, temporaries = program.num_temporaries;
  if (uniforms < 0 || uniforms > program.num_instructions || temporaries < 0 ||
      temporaries > kMostValues) {
    return false;
  }
  // The first uniform value that is computed, the first temporary, and the end of all values.
  const int64_t computed = first_uniform + num_known, temporary = computed + uniforms;
  const int64_t end = temporary + temporaries;
  if (end > kMostValues) return false;
  const auto is_in = [](int64_t value, int64_t begin, int64_t end) {
    return value >= begin && value < end;
  };
  for (int64_t i = 0; i < program.num_instructions; ++i) {
    const Instruction& line = program.instructions[i];
    if (line.op < Op::kCopy || line.op >= Op::kCount) return false;
    const bool is_uniform = i < uniforms;
    for (const int32_t value : {line.a, line.b, line.c, line.d}) {
      // Operands that are not used are zero. The buffers of moments may be too short for a span.
      const bool is_there = is_uniform ? value == 0 || is_in(value, first_uniform, temporary)
                                       : is_in(value, 0, end);
      if (!is_there) return false;
    }
    const bool is_own = is_uniform ? is_in(line.to, computed, temporary)
                                   : is_in(line.to, result, first_uniform) ||
                                         is_in(line.to, temporary, end);
    if (!is_own) return false;
  }
  return true;
}

// The operands are the scalars, the gradient, the parameter if there is one, the codes of each
// moment and the absmax of each; the results are the parameter or the update, the codes and the
// absmax.
ffi::Error update(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                  Integers instructions, ffi::Span<const float> constants, int64_t num_uniforms,
                  int64_t num_temporaries, Integers is_signed, int64_t row_size,
                  int64_t block_size) {
  constexpr int64_t kLine = sizeof(Instruction) / sizeof(int32_t);
  static_assert(sizeof(Instruction) == 6 * sizeof(int32_t));
  const int64_t num_moments = is_signed.size();
  const bool has_param = static_cast<int64_t>(operands.size()) == 3 + 2 * num_moments;
  const int64_t first = 2 + has_param;
  if (num_moments < 1 || num_moments > kMostMoments || instructions.size() % kLine != 0 ||
      static_cast<int64_t>(operands.size()) != first + 2 * num_moments ||
      static_cast<int64_t>(results.size()) != 1 + 2 * num_moments) {
    return ffi::Error::InvalidArgument(
        "update_8bit: the operands must be scalars, a gradient, perhaps a parameter, and the codes "
        "and the absmax of 1 to 8 moments. The results must be those of a step");
  }
  const auto operand = [&](int64_t i) { return *operands.get<ffi::AnyBuffer>(i); };
  const auto result = [&](int64_t i) { return **results.get<ffi::AnyBuffer>(i); };
  const ffi::AnyBuffer scalars = operand(0), grad = operand(1);
  const int64_t size = grad.element_count();
  if (scalars.element_type() != ffi::F32 || has_rank(scalars, 0) ||
      scalars.dimensions().back() == 0) {
    return ffi::Error::InvalidArgument(
        "update_8bit: scalars must be float32, (*examples, scalars), and at least one");
  }
  const int64_t num_scalars = scalars.dimensions().back();
  const int64_t num_examples = static_cast<int64_t>(scalars.element_count()) / num_scalars;
  const ffi::AnyBuffer like_result = has_param ? operand(2) : grad;
  if (!is_float(grad) || !is_float(like_result) ||
      like_result.element_type() != result(0).element_type() || !has_count(result(0), size) ||
      !has_count(like_result, size)) {
    return ffi::Error::InvalidArgument(
        "update_8bit: the gradient, the parameter and the result must have one shape, and be "
        "float32, bfloat16 or float16. The result must have the dtype of the parameter, or of the "
        "gradient if there is no parameter");
  }
  if (size == 0) return ffi::Error::Success();
  if (!is_size(row_size) || !is_size(block_size) || num_examples == 0 ||
      size % num_examples != 0 || size / num_examples % row_size != 0) {
    return ffi::Error::InvalidArgument(
        "update_8bit: row_size and block_size must be positive, and the gradient must have whole "
        "rows for each of the examples that have scalars");
  }
  const int64_t num_blocks = size / row_size * parts_in(row_size, block_size);
  for (int64_t m = 0; m < num_moments; ++m) {
    for (const auto& codes : {operand(first + m), result(1 + m)}) {
      if (codes.element_type() == ffi::U8 && has_count(codes, size)) continue;
      return ffi::Error::InvalidArgument(
          "update_8bit: a moment must have a uint8 code for each number of the gradient");
    }
    for (const auto& absmax : {operand(first + num_moments + m), result(1 + num_moments + m)}) {
      if (absmax.element_type() == ffi::F32 && has_count(absmax, num_blocks)) continue;
      return ffi::Error::InvalidArgument(
          "update_8bit: a moment must have a float32 absmax for each block of block_size numbers");
    }
  }

  // Copied, because the attribute's integers are not objects of this type.
  std::vector<Instruction> lines(instructions.size() / kLine);
  memcpy(lines.data(), instructions.begin(), lines.size() * sizeof(Instruction));
  Step step = {};
  step.program = {lines.data(),
                  static_cast<int64_t>(lines.size()),
                  num_uniforms,
                  num_temporaries,
                  constants.begin(),
                  static_cast<int64_t>(constants.size())};
  step.num_scalars = num_scalars;
  step.num_examples = num_examples;
  step.row_size = row_size;
  step.num_rows = size / step.num_examples / row_size;
  step.block_size = block_size;
  step.scalars = scalars.typed_data<float>();
  step.grad = array_of(grad);
  step.result = array_of(result(0));
  if (has_param) {
    step.param = array_of(operand(2));
  } else {
    prefer_huge_pages(step.result.data, result(0).size_bytes());
  }
  step.num_moments = num_moments;
  for (int64_t m = 0; m < num_moments; ++m) {
    step.moments[m] = {operand(first + m).typed_data<uint8_t>(),
                       operand(first + num_moments + m).typed_data<float>(),
                       result(1 + m).typed_data<uint8_t>(),
                       result(1 + num_moments + m).typed_data<float>(), is_signed[m] != 0};
  }
  const int64_t num_inputs = 1 + num_moments + has_param;
  if (!is_valid(step.program, num_inputs, num_inputs + 1 + num_moments,
                num_scalars + step.program.num_constants)) {
    return ffi::Error::InvalidArgument(
        "update_8bit: the instructions must be known, and read and write values of the step");
  }
  JAXBNB_CHOSEN(update_8bit)(step, ThreadPool(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxbnb

JAXBNB_HANDLER(jaxbnb_cpu_update_8bit, jaxbnb::update,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .RemainingArgs()
                   .RemainingRets()
                   .Attr<jaxbnb::ffi::Span<const int32_t>>("instructions")
                   .Attr<jaxbnb::ffi::Span<const float>>("constants")
                   .Attr<int64_t>("num_uniforms")
                   .Attr<int64_t>("num_temporaries")
                   .Attr<jaxbnb::ffi::Span<const int32_t>>("is_signed")
                   .Attr<int64_t>("row_size")
                   .Attr<int64_t>("block_size"));
