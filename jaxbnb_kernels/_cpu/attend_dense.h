// Attention of few queries and keys, as its handlers and its kernels see it.
#pragma once

#include <stdint.h>

#include "array.h"
#include "isa.h"
#include "parallel.h"

namespace jaxbnb {

// out = softmax(scale * q @ k.T) @ v for each head; groups of query heads share a head of keys. All
// arrays have one dtype.
struct Attention {
  const void* q;     // (batch, queries, heads, dim)
  const void* k;     // (batch, keys, kv_heads, dim)
  const void* v;     // like k
  const bool* mask;  // (masks, queries, keys): which keys each query sees; masks divides batch
  Dtype dtype;
  float scale;
  int64_t batch, queries, keys, heads, kv_heads, dim, masks;
};

JAXBNB_DECLARE_BF16(
    void attend(const Attention& attention, void* out, const Parallel& parallel);
    // Computes the cotangents of q, k and v from that of the result.
    void attend_gradient(const Attention& attention, const void* d_out, void* d_q, void* d_k,
                         void* d_v, const Parallel& parallel))

}  // namespace jaxbnb
