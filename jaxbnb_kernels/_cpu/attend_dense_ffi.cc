// The handlers of `attend_dense`.
#include "attend_dense.h"

#include <string.h>

#include "handlers.h"

namespace jaxbnb {
namespace {

Attention attention_of(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                       const ffi::Buffer<ffi::PRED>& mask, float scale) {
  Attention attention{};
  attention.q = q.untyped_data();
  attention.k = k.untyped_data();
  attention.v = v.untyped_data();
  attention.mask = mask.typed_data();
  attention.dtype = *dtype_of(q.element_type());
  attention.scale = scale;
  attention.batch = q.dimensions()[0];
  attention.queries = q.dimensions()[1];
  attention.heads = q.dimensions()[2];
  attention.dim = q.dimensions()[3];
  attention.keys = k.dimensions()[1];
  attention.kv_heads = k.dimensions()[2];
  attention.masks = mask.dimensions()[0];
  return attention;
}

// Whether the arrays are those of one attention, and the results like the queries.
bool is_attention(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                  const ffi::Buffer<ffi::PRED>& mask, const ffi::AnyBuffer& out) {
  if (!has_rank(q, 4) || !has_rank(k, 4) || !has_rank(mask, 3) || !is_float(q)) return false;
  for (const auto* other : {&k, &v, &out}) {
    if (other->element_type() != q.element_type()) return false;
  }
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  const int64_t batch = of_q[0], heads = of_q[2], kv_heads = of_k[2], masks = mask.dimensions()[0];
  return has_shape(k, {batch, of_k[1], kv_heads, of_q[3]}) && has_shape_of(v, k) &&
         has_shape_of(out, q) && has_shape(mask, {masks, of_q[1], of_k[1]}) &&
         (heads == 0 || (kv_heads > 0 && heads % kv_heads == 0)) &&
         (batch == 0 || (masks > 0 && batch % masks == 0));
}

ffi::Error not_attention() {
  return ffi::Error::InvalidArgument(
      "attend_dense: q and the result must be (batch, queries, heads, dim), k and v (batch, keys, "
      "kv_heads, dim) and mask (masks, queries, keys). kv_heads must divide heads, and masks must "
      "divide batch. All must be float32, bfloat16 or float16, and the mask boolean");
}

ffi::Error attend_dense(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                        ffi::Buffer<ffi::PRED> mask, ffi::Result<ffi::AnyBuffer> out,
                        float scale) {
  if (!is_attention(q, k, v, mask, *out)) return not_attention();
  const Attention attention = attention_of(q, k, v, mask, scale);
  if (k.element_count() == 0) memset(out->untyped_data(), 0, out->size_bytes());
  if (k.element_count() == 0 || q.element_count() == 0) return ffi::Error::Success();
  JAXBNB_CHOSEN_BF16(attend)(attention, out->untyped_data(), ThreadPool(pool));
  return ffi::Error::Success();
}

ffi::Error attend_dense_gradient(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                                 ffi::AnyBuffer v, ffi::Buffer<ffi::PRED> mask,
                                 ffi::AnyBuffer d_out, ffi::Result<ffi::AnyBuffer> d_q,
                                 ffi::Result<ffi::AnyBuffer> d_k, ffi::Result<ffi::AnyBuffer> d_v,
                                 float scale) {
  if (!is_attention(q, k, v, mask, d_out) || !is_attention(*d_q, *d_k, *d_v, mask, q) ||
      !has_shape_of(*d_k, k)) {
    return not_attention();
  }
  const Attention attention = attention_of(q, k, v, mask, scale);
  if (k.element_count() == 0 || q.element_count() == 0) {
    for (auto* array : {&d_q, &d_k, &d_v}) {
      memset((*array)->untyped_data(), 0, (*array)->size_bytes());
    }
    return ffi::Error::Success();
  }
  JAXBNB_CHOSEN_BF16(attend_gradient)
  (attention, d_out.untyped_data(), d_q->untyped_data(), d_k->untyped_data(), d_v->untyped_data(),
   ThreadPool(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxbnb

JAXBNB_HANDLER(jaxbnb_cpu_attend_dense, jaxbnb::attend_dense,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::Buffer<jaxbnb::ffi::PRED>>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Attr<float>("scale"));

JAXBNB_HANDLER(jaxbnb_cpu_attend_dense_gradient, jaxbnb::attend_dense_gradient,
               jaxbnb::ffi::Ffi::Bind()
                   .Ctx<jaxbnb::ffi::ThreadPool>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Arg<jaxbnb::ffi::Buffer<jaxbnb::ffi::PRED>>()
                   .Arg<jaxbnb::ffi::AnyBuffer>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Ret<jaxbnb::ffi::AnyBuffer>()
                   .Attr<float>("scale"));
