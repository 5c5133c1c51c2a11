// Which instruction set the kernels use, and how a handler calls the kernel compiled for it.
#pragma once

namespace jaxbnb {

// In rising order: each includes what the one before it has.
enum class Isa { kNone, kNeon, kAvx2, kAvx512, kAvx512Bf16, kAmx };

Isa isa();

}  // namespace jaxbnb

// JAXBNB_DECLARE declares a function in the namespace of each instruction set that every kernel is
// compiled for; JAXBNB_CHOSEN is a pointer to the one in use. The forms with BF16 are for products,
// which gain from bfloat16 instructions, and are compiled for these too.
#if defined(__x86_64__)

#define JAXBNB_DECLARE(...)          \
  namespace avx2 { __VA_ARGS__; }    \
  namespace avx512 { __VA_ARGS__; }

#define JAXBNB_CHOSEN(function) \
  (::jaxbnb::isa() >= ::jaxbnb::Isa::kAvx512 ? avx512::function : avx2::function)

#define JAXBNB_DECLARE_BF16(...)        \
  JAXBNB_DECLARE(__VA_ARGS__)           \
  namespace avx512_bf16 { __VA_ARGS__; } \
  namespace amx { __VA_ARGS__; }

#define JAXBNB_CHOSEN_BF16(function)                                        \
  (::jaxbnb::isa() == ::jaxbnb::Isa::kAmx           ? amx::function         \
   : ::jaxbnb::isa() == ::jaxbnb::Isa::kAvx512Bf16  ? avx512_bf16::function \
                                                    : JAXBNB_CHOSEN(function))

#else

#define JAXBNB_DECLARE(...) namespace neon { __VA_ARGS__; }
#define JAXBNB_CHOSEN(function) neon::function
#define JAXBNB_DECLARE_BF16(...) JAXBNB_DECLARE(__VA_ARGS__)
#define JAXBNB_CHOSEN_BF16(function) JAXBNB_CHOSEN(function)

#endif
