// Which instruction set the kernels use, and how a handler calls the kernel compiled for it.
#pragma once

namespace jaxbnb {

// In rising order. Each includes what the one before it has, except that AVX-512 need not have the
// short vectors of AVX-VNNI.
enum class Isa {
  kNone,
  kNeon,
  kNeonDotprod,
  kAvx2,
  kAvx2Vnni,
  kAvx512,
  kAvx512Vnni,
  kAvx512Bf16,
  kAmx
};

Isa isa();

}  // namespace jaxbnb

// JAXBNB_DECLARE declares a function in the namespace of each instruction set that every kernel is
// compiled for; JAXBNB_CHOSEN is a pointer to the one in use. The forms with BF16 are for products,
// which gain from bfloat16 instructions, and are compiled for these too. Those with INT8 are for
// products of integers, which gain from instructions that sum four of them.
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

#define JAXBNB_DECLARE_INT8(...)    \
  JAXBNB_DECLARE_BF16(__VA_ARGS__)  \
  namespace avx2_vnni { __VA_ARGS__; } \
  namespace avx512_vnni { __VA_ARGS__; }

#define JAXBNB_CHOSEN_INT8(function)                                         \
  (::jaxbnb::isa() == ::jaxbnb::Isa::kAvx2Vnni     ? avx2_vnni::function     \
   : ::jaxbnb::isa() == ::jaxbnb::Isa::kAvx512Vnni ? avx512_vnni::function   \
                                                   : JAXBNB_CHOSEN_BF16(function))

#else

#define JAXBNB_DECLARE(...) namespace neon { __VA_ARGS__; }
#define JAXBNB_CHOSEN(function) neon::function
#define JAXBNB_DECLARE_BF16(...) JAXBNB_DECLARE(__VA_ARGS__)
#define JAXBNB_CHOSEN_BF16(function) JAXBNB_CHOSEN(function)

#define JAXBNB_DECLARE_INT8(...) \
  JAXBNB_DECLARE(__VA_ARGS__)    \
  namespace neon_dotprod { __VA_ARGS__; }

#define JAXBNB_CHOSEN_INT8(function)                                             \
  (::jaxbnb::isa() == ::jaxbnb::Isa::kNeonDotprod ? neon_dotprod::function       \
                                                  : JAXBNB_CHOSEN(function))

#endif
