// An array of floating-point numbers of a dtype that is known only when a kernel is called.
#pragma once

#include <stdint.h>

namespace jaxbnb {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

struct Array {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

}  // namespace jaxbnb
