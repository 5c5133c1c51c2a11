// How a kernel shares its work among threads, without any standard header.
//
// Kernels are compiled once per instruction set. A template of the standard library that two of
// these objects share would be linked once, perhaps as AVX-512 code for an AVX2 machine. So kernels
// see this interface, and only files that are compiled once implement it.
#pragma once

#include <stdint.h>

namespace jaxbnb {

class Parallel {
 public:
  // Calls part(0), ..., part(count - 1), each once, on any threads and in any order, and returns
  // when all have returned. What a part computes must not depend on the number of threads.
  template <class Part>
  void operator()(int64_t count, const Part& part) const {
    run(count, &part, [](const void* part, int64_t index) {
      (*static_cast<const Part*>(part))(index);
    });
  }

 protected:
  using Call = void (*)(const void* part, int64_t index);
  ~Parallel() = default;

 private:
  virtual void run(int64_t count, const void* part, Call call) const = 0;
};

}  // namespace jaxbnb
