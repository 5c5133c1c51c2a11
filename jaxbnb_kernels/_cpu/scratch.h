// Memory for intermediate results of one call or of one of its parts.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

namespace jaxbnb::JAXBNB_ISA {

// Uninitialised, and aligned to cache lines.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(allocate(count * sizeof(T)))) {}
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }

 private:
  // A thread in the middle of a part cannot return an error to XLA.
  [[noreturn, gnu::cold, gnu::noinline]] static void fail(int64_t bytes) {
    fprintf(stderr, "jaxbnb: no memory for %lld bytes of a kernel's intermediate results\n",
            static_cast<long long>(bytes));
    abort();
  }

  static void* allocate(int64_t bytes) {
    constexpr int64_t kLine = 64;
    void* memory = aligned_alloc(kLine, (bytes / kLine + 1) * kLine);
    if (memory == nullptr) fail(bytes);
    return memory;
  }

  T* const data_;
};

}  // namespace jaxbnb::JAXBNB_ISA
