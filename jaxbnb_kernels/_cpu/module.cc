// Chooses the instruction set of the kernels, once, and tells and overrides it for callers. Tells
// which sources the library is of.
#include <string.h>

#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define JAXBNB_EXPORT extern "C" __attribute__((visibility("default")))

namespace jaxbnb {
namespace {

// In the order of Isa.
constexpr const char* kNames[] = {"none",   "neon",        "neon_dotprod", "avx2", "avx2_vnni",
                                  "avx512", "avx512_vnni", "avx512_bf16",  "amx"};

#if defined(__x86_64__)

bool has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 4));
}

bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((edx & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  // Linux keeps the 8 KiB of tiles only for processes that ask: ARCH_REQ_XCOMP_PERM of TILEDATA.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kAvx2Vnni:
      return has(Isa::kAvx2) && has_avx_vnni();
    case Isa::kAvx512:
      return has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::kAvx512Vnni:
      return has(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni");
    case Isa::kAvx512Bf16:
      return has(Isa::kAvx512Vnni) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vbmi");
    case Isa::kAmx:
      return has(Isa::kAvx512Bf16) && has_amx();
    default:
      return false;
  }
}

#else

// Every Arm processor of 64 bits has NEON.
bool has(Isa isa) {
  if (isa == Isa::kNeon) return true;
#if defined(__linux__)
  if (isa == Isa::kNeonDotprod) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
  return false;
}

#endif

Isa best() {
  for (int i = static_cast<int>(Isa::kAmx); i > 0; --i) {
    if (has(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::kNone;
}

// A function's static: chosen at the first call, by one thread.
Isa& chosen() {
  static Isa isa = best();
  return isa;
}

}  // namespace

Isa isa() { return chosen(); }

}  // namespace jaxbnb

// What tells the sources of this library from others: `build.py` looks for it in the file.
JAXBNB_EXPORT const char* jaxbnb_cpu_digest() { return JAXBNB_DIGEST; }

// The name of the instruction set in use; "none" where the processor has none of them.
JAXBNB_EXPORT const char* jaxbnb_cpu_isa() {
  return jaxbnb::kNames[static_cast<int>(jaxbnb::isa())];
}

// Makes the kernels use another instruction set, for tests and benchmarks, while none runs. An
// empty name restores the best one. Returns whether this processor has it.
JAXBNB_EXPORT bool jaxbnb_cpu_use(const char* name) {
  using jaxbnb::Isa;
  for (int i = 1; i <= static_cast<int>(Isa::kAmx); ++i) {
    if (strcmp(name, jaxbnb::kNames[i]) != 0 || !jaxbnb::has(static_cast<Isa>(i))) continue;
    jaxbnb::chosen() = static_cast<Isa>(i);
    return true;
  }
  if (*name != '\0') return false;
  jaxbnb::chosen() = jaxbnb::best();
  return true;
}
