// Memory for intermediate results of one call or of one of its parts.
#pragma once

#include <stdint.h>
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
  static void* allocate(int64_t bytes) {
    constexpr int64_t kLine = 64;
    void* memory = aligned_alloc(kLine, (bytes / kLine + 1) * kLine);
    if (memory == nullptr) abort();
    return memory;
  }

  T* const data_;
};

}  // namespace jaxbnb::JAXBNB_ISA
