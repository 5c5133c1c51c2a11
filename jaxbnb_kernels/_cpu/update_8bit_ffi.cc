// The handler that XLA calls for a step with 8-bit moments.
#include "update_8bit.h"

#include "handlers.h"
#include "huge_pages.h"

namespace jaxbnb {
namespace {

using Integers = ffi::Span<const int32_t>;

// Whether every instruction is known, and every value that it names exists.
bool is_valid(const Program& program, int64_t num_values) {
  for (int64_t i = 0; i < program.num_instructions; ++i) {
    const Instruction& line = program.instructions[i];
    if (line.op < Op::kCopy || line.op >= Op::kCount) return false;
    for (const int32_t value : {line.to, line.a, line.b, line.c, line.d}) {
      if (value < 0 || value >= num_values) return false;
    }
  }
  return num_values <= kMostValues && program.num_uniforms <= program.num_instructions;
}

// The operands are the scalars, the gradient, the parameter if there is one, the codes of each
// moment and the absmax of each; the results are the parameter or the update, the codes and the
// absmax.
ffi::Error update(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                  Integers instructions, ffi::Span<const float> constants, int64_t num_uniforms,
                  int64_t num_temporaries, Integers is_signed, int64_t row_size,
                  int64_t block_size) {
  constexpr int64_t kLine = sizeof(Instruction) / sizeof(int32_t);
  const int64_t num_moments = is_signed.size();
  const bool has_param = static_cast<int64_t>(operands.size()) == 3 + 2 * num_moments;
  const int64_t first = 2 + has_param;
  if (num_moments > kMostMoments || instructions.size() % kLine != 0 ||
      static_cast<int64_t>(operands.size()) != first + 2 * num_moments ||
      static_cast<int64_t>(results.size()) != 1 + 2 * num_moments) {
    return ffi::Error::InvalidArgument("update_8bit: not the operands of a step");
  }
  const auto operand = [&](int64_t i) { return *operands.get<ffi::AnyBuffer>(i); };
  const auto result = [&](int64_t i) { return **results.get<ffi::AnyBuffer>(i); };
  const ffi::AnyBuffer scalars = operand(0), grad = operand(1);
  const int64_t size = grad.element_count();
  if (size == 0) return ffi::Error::Success();

  Step step = {};
  step.program = {reinterpret_cast<const Instruction*>(instructions.begin()),
                  static_cast<int64_t>(instructions.size()) / kLine,
                  num_uniforms,
                  num_temporaries,
                  constants.begin(),
                  static_cast<int64_t>(constants.size())};
  step.num_scalars = scalars.dimensions().back();
  step.num_examples = static_cast<int64_t>(scalars.element_count()) / step.num_scalars;
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
  const int64_t num_values = 2 + has_param + 2 * num_moments + step.num_scalars +
                             step.program.num_constants + num_uniforms + num_temporaries;
  if (!is_valid(step.program, num_values)) {
    return ffi::Error::InvalidArgument("update_8bit: not a program");
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
